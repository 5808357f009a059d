"""The endpoints over a folder and no socket, and an S3 client of a few lines that signs as it is told."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote
from xml.etree import ElementTree

import httpx

from watcher.jobs import Jobs
from watcher.objects import ACTIONS, PRIMARY, Objects
from watcher.resolve import Resolver
from watcher.secrets import Key
from watcher.server import site, windmill
from watcher.server.guard import JOB_SCOPES, Principal
from watcher.server.windmill import Desk, sigv4
from watcher.staging import Session
from watcher.store.db import Database
from watcher.values import Config, FileResource, StorageRule, StorageSettings

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
ROOM = "/api/w/main/s3_proxy/_wm_bucket_"
EVERYTHING = (StorageRule("**/*", frozenset(ACTIONS)),)
S3 = {"bucket": "lake", "region": "eu-west-3", "endPoint": "s3.example.com", "accessKey": "id", "secretKey": "hush"}
AZURE = {"accountName": "acct", "containerName": "lake", "accessKey": "aGk="}
GCS = {"bucket": "lake", "serviceAccountKey": {"client_email": "a@b"}}


class Place:
    """The application; ``operator`` is a bearer token, ``session`` a running job with ``token``."""

    def __init__(self, db: Database, where: Path, *, key: Key | None = None) -> None:
        self.now = AT
        self.db = db
        resources = {
            f"u/admin/{type}": (type, value) for type, value in (("s3", S3), ("azure_blob", AZURE), ("gcs", GCS))
        }
        self.config = Config(
            file=None,
            database=db.url,
            data=where / "data",
            storages={
                PRIMARY: StorageSettings(PRIMARY, path=where / "objects", permissions=EVERYTHING),
                "cold": StorageSettings("cold", path=where / "cold", permissions=EVERYTHING),
            },
            resources={path: FileResource(type, value) for path, (type, value) in resources.items()},
        )
        resolver = Resolver(lambda: self.config, db, key, environ={})
        nothing = cast(Any, None)
        jobs = Jobs(lambda: self.config, db, nothing, nothing, resolver, lambda: self.now)
        self.sessions = jobs.sessions
        objects = Objects(lambda: self.config, resolver.resource)
        desk = Desk(lambda: self.config, db, lambda: self.now, jobs, resolver, key, objects=objects)
        self.principals = {"operator": Principal("ops", ("*",)), "nobody": Principal("nobody", ("jobs",))}
        self.application = site.application(windmill.routes(desk), authenticate=self._who, hosts=None)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.application, raise_app_exceptions=False), base_url="http://here:8321"
        )
        self.session = Session("watcher", "w", "f/w", AT)
        self.opened = self.sessions.open(self.session)
        self.token = self.opened.__enter__()

    async def _who(self, token: str) -> Principal | None:
        session = self.sessions.find(token)
        return self.principals.get(token) if session is None else Principal("job", JOB_SCOPES, session)

    def storage(self, name: str = PRIMARY, **changes: Any) -> None:
        """Change the settings of a storage."""
        changed = replace(self.config.storages.get(name, StorageSettings(name)), **changes)
        self.config = replace(self.config, storages={**self.config.storages, name: changed})

    async def ask(self, path: str, body: Any = None, *, token: str | None = None, want: int = 200) -> Any:
        """POST to Windmill's endpoints (GET without a body), by the job unless another token is given."""
        headers = {"authorization": f"Bearer {token or self.token}"}
        method = "GET" if body is None else "POST"
        answer = await self.http.request(method, f"/api/w/main/{path}", json=body, headers=headers)
        assert answer.status_code == want, answer.text
        return answer.json() if want == 200 else answer.text

    async def client(self, *, token: str | None = None, storage: str | None = None) -> Client:
        """An S3 client with the settings that the endpoints give for this token."""
        asked = {} if storage is None else {"storage": storage}
        found = await self.ask("job_helpers/v2/s3_resource_info", asked, token=token)
        return Client(self, found["endPoint"], found["bucket"], found["accessKey"], found["secretKey"])


class Client:
    def __init__(self, place: Place, endpoint: str, bucket: str, access_key: str, secret: str) -> None:
        self.place = place
        self.host, _, room = endpoint.partition("/")
        self.room = f"/{room}"
        self.bucket = bucket
        self.access_key = access_key
        self.secret = secret
        self.late = timedelta()

    async def __call__(
        self,
        method: str,
        key: str = "",
        query: str = "",
        body: bytes | AsyncIterator[bytes] = b"",
        *,
        bucket: str | None = None,
        payload: str | None = None,
        **headers: str,
    ) -> httpx.Response:
        """One request; ``key`` as it is in the address. Header names with _ for -."""
        path = f"{self.room}/{self.bucket if bucket is None else bucket}" + (f"/{key}" if key else "")
        if payload is None:
            payload = hashlib.sha256(body).hexdigest() if isinstance(body, bytes) else sigv4.UNSIGNED
        given = [("host", self.host), *((name.replace("_", "-"), value) for name, value in headers.items())]
        signed = sigv4.sign(
            sigv4.Asked(method, path, query, given),
            self.access_key,
            self.secret,
            self.place.now - self.late,
            region="us-east-1",
            payload=payload,
        )
        url = f"http://{self.host}{path}" + (f"?{query}" if query else "")
        return await self.place.http.request(method, url, headers=list(signed), content=body)

    async def put(self, key: str, body: bytes = b"hello", **headers: str) -> str:
        """Store it; its ETag."""
        answer = await self("PUT", quote(key), body=body, **headers)
        assert answer.status_code == 200, answer.text
        return answer.headers["etag"]

    async def keys(self, query: str = "list-type=2") -> list[str]:
        """What a listing shows, folders among it."""
        found = ElementTree.fromstring((await self("GET", query=query)).text)
        names = [each.findtext(f"{NS}Key") for each in found.iter(f"{NS}Contents")]
        return [name or "" for name in names] + [
            each.findtext(f"{NS}Prefix") or "" for each in found.iter(f"{NS}CommonPrefixes")
        ]


NS = "{http://s3.amazonaws.com/doc/2006-03-01/}"


def code(answer: httpx.Response) -> tuple[int, str]:
    """Status and S3's own code of an error."""
    return answer.status_code, ElementTree.fromstring(answer.text).findtext("Code") or ""


def value(answer: httpx.Response, name: str) -> str:
    """The text of the first element of that name."""
    return next(each.text or "" for each in ElementTree.fromstring(answer.text).iter() if each.tag.endswith(name))
