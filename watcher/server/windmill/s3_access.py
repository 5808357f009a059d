"""Ways to the workspace's storages: connection settings for S3 clients, and signed links.

A storage's own credentials are handed out only if it is public, or as a resource that the caller may read anyway:
everybody else is led to the proxy, with keys that stand for the token that asks.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from watcher.errors import ObjectsError
from watcher.objects import PRIMARY, S3Object, Storage
from watcher.server.windmill import s3_settings
from watcher.server.windmill.desk import Desk, fields, job, who, who_is
from watcher.server.windmill.s3_proxy import REGION, ROOM, bucket_of
from watcher.server.windmill.s3_settings import Bucket, NoSettings
from watcher.server.windmill.signing import USUAL, Signing
from watcher.values import UNSET, Json

Words = Callable[[Bucket], Json]
"""A bucket in the words of one client."""

MOST_SIGNED = 10_000


def routes(desk: Desk) -> list[BaseRoute]:
    """Under ``/job_helpers`` and ``/apps``."""
    access = Access(desk, Signing(desk.db, desk.key))
    read = "objects:read"
    rooms = {
        "s3_resource_info": s3_settings.info,
        "polars_connection_settings": s3_settings.polars,
        "duckdb_connection_settings": s3_settings.duckdb,
    }
    return [
        *(
            desk.route(f"/job_helpers/v2/{name}", partial(access.settings, words), read, "POST")
            for name, words in rooms.items()
        ),
        *(
            desk.route(f"/job_helpers/{name}", partial(given, words), read, "POST")
            for name, words in rooms.items()
            if words is not s3_settings.info
        ),
        desk.route("/job_helpers/v2/s3_proxy_bucket", access.bucket, read),
        desk.route("/apps/sign_s3_objects", access.sign, read, "POST"),
    ]


async def given(words: Words, request: Request) -> Response:
    """The first version of these endpoints: the resource itself is sent, and comes back in the client's words."""
    resource = (await fields(request)).get("s3_resource")
    try:
        return JSONResponse(words(s3_settings.of_resource(resource)))
    except NoSettings as error:
        raise HTTPException(400, str(error)) from error


class Access:
    """The endpoints."""

    def __init__(self, desk: Desk, signing: Signing) -> None:
        self._desk = desk
        self._signing = signing

    async def settings(self, words: Words, request: Request) -> Response:
        """For the resource at ``s3_resource_path``, or for the workspace's storage (``storage``: which of them)."""
        asked = await fields(request)
        path, name = asked.get("s3_resource_path"), asked.get("storage")
        if path:
            if not isinstance(path, str):
                raise HTTPException(400, "s3_resource_path must be text")
            kind, value = await self._resource(request, path.removeprefix("$res:"))
        else:
            storage = await self._storage(name)
            kind, value = storage.kind, storage.resource
            speaks = kind == "s3" or (kind == "azure_blob" and words is s3_settings.duckdb)
            if not (storage.public and speaks):
                return JSONResponse(words(await self._proxied(request, storage)))
        try:
            return JSONResponse(_direct(words, kind, value))
        except NoSettings as error:
            raise HTTPException(400, str(error)) from error

    async def bucket(self, request: Request) -> Response:
        """The bucket by which the proxy knows the primary storage."""
        return JSONResponse({"bucket": bucket_of(await self._storage(None))})

    async def sign(self, request: Request) -> Response:
        """The objects again, each with the query that lets anybody read it for ``expiry_secs``."""
        asked, now = await fields(request), self._desk.clock()
        wanted, seconds = asked.get("s3_objects"), asked.get("expiry_secs")
        if not isinstance(wanted, list) or len(wanted) > MOST_SIGNED:
            raise HTTPException(400, f"s3_objects is a list of at most {MOST_SIGNED} objects")
        if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float)):
            raise HTTPException(400, "expiry_secs is a number of seconds")
        lifetime = USUAL if seconds is None else timedelta(seconds=min(max(seconds, 0), 1e6))
        ring, found = await self._signing.ring(), []
        for each in wanted:
            try:
                object = S3Object.parse(each)
                storage = await self._desk.objects.storage(object.storage)
                storage.check(who_is(who(request)), object.s3, "read")
            except ObjectsError as error:
                raise _http(error) from error
            query = ring.link(storage.name, object.s3, now, lifetime)
            found.append(S3Object(object.s3, object.storage, query, object.filename).json())
        return JSONResponse(found)

    async def _storage(self, name: Json) -> Storage:
        try:
            return await self._desk.objects.storage(name)
        except ObjectsError as error:
            if error.kind == "no_storage":  # Windmill's own sentence and status
                raise HTTPException(404, "No datasets storage resource defined at the workspace level") from error
            raise _http(error) from error

    async def _resource(self, request: Request, path: str) -> tuple[str, Json]:
        """Type and value of a resource, its references followed."""
        self._desk.require(request, f"resources:read:{path}")
        value = await self._desk.states.read(path, job(request))
        if value is UNSET:
            raise HTTPException(404, f"there is no resource {path}")
        looks_azure = isinstance(value, dict) and "accountName" in value
        looks_google = isinstance(value, dict) and "serviceAccountKey" in value
        return "azure_blob" if looks_azure else "gcs" if looks_google else "s3", value

    async def _proxied(self, request: Request, storage: Storage) -> Bucket:
        """The storage behind our proxy, with keys that stand for the token of this request."""
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        token = token.strip() if kind else request.query_params.get("token", "").strip()
        ring = await self._signing.ring()
        access_key, secret = ring.credentials(token, job=job(request) is not None)
        host = request.headers.get("host") or request.url.netloc
        tls = "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
        place = f"{host}/api/w/{self._desk.config().workspace}/s3_proxy/{ROOM}/{storage.name or PRIMARY}"
        return Bucket(bucket_of(storage), place, tls, REGION, access_key, secret)


def _direct(words: Words, kind: str, value: Json) -> Json:
    if kind == "s3":
        return words(s3_settings.of_resource(value))
    if kind == "azure_blob" and words is s3_settings.duckdb:
        return s3_settings.duckdb_azure(value)
    name = "Azure Blob" if kind == "azure_blob" else "Google Cloud Storage"
    raise NoSettings(f"{name} does not speak S3: leave s3_resource_path out to reach a storage of it by the proxy")


def _http(error: ObjectsError) -> HTTPException:
    status = {"missing": 404, "denied": 403, "no_such_storage": 404, "no_storage": 500, "unreachable": 502}
    return HTTPException(status.get(error.kind, 400), str(error))
