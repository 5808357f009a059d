"""The S3 API in front of any storage, for whoever signs with the key that stands for a token.

A client is told its endpoint, ``/api/w/{workspace}/s3_proxy/_wm_bucket_/{storage}``, and puts bucket and key behind it.
The bucket's own credentials stay here, and the storage's permissions hold. What begins with a storage instead are
links, which let anybody read one object for a while. Source: the S3 API reference; addresses as Windmill's clients
write them.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from email.utils import format_datetime, parsedate_to_datetime
from functools import partial
from hashlib import sha256
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from watcher import log
from watcher.errors import ObjectsError, StoreError
from watcher.objects import OWN, SAID, Action, Meta, Reading, Storage, Who, bounded, parse_key
from watcher.server.guard import JOB_SCOPES, Principal
from watcher.server.windmill import s3_xml as xml
from watcher.server.windmill import sigv4
from watcher.server.windmill.content import Content
from watcher.server.windmill.desk import Desk, who_is
from watcher.server.windmill.s3_ahead import Ahead, heard
from watcher.server.windmill.s3_parts import Part, Parts, Upload, room
from watcher.server.windmill.signing import Signing, stands_for
from watcher.server.windmill.sigv4 import Asked, Refusal
from watcher.store import tokens

_log = log.get("s3_proxy")

ROOM = "_wm_bucket_"
REGION = "us-east-1"
SMALL = 1024 * 1024  # bytes of an object that is held whole: one request to the storage instead of several
BATCH = 512 * 1024  # bytes of a body that are verified at once
MOST_XML = 4 * 1024 * 1024
MOST_METADATA = 2048  # bytes of what a client adds of its own, as in S3
MOST_UNREAD = 8 * 1024 * 1024  # bytes of a refused body that are still taken in, so that the client sees the answer
PATIENCE = 5.0  # seconds until a client that waits for its upload to be put together hears that we are at it
REMEMBERED = 600.0  # seconds that a completed upload is, for a client that asks again
MOST_AHEAD = 2  # uploads that go on to their storage while they come in: each takes some 40 MiB of memory
_UNKNOWN = {  # sub-resources that would be taken for something else if they were ignored
    "accelerate", "acl", "analytics", "attributes", "cors", "encryption", "inventory", "legal-hold", "lifecycle",
    "logging", "metrics", "notification", "object-lock", "ownershipControls", "policy", "policyStatus",
    "publicAccessBlock", "replication", "requestPayment", "restore", "retention", "select", "tagging", "torrent",
    "versionId", "versioning", "versions", "website",
}  # fmt: skip
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_KINDS = {
    "missing": "NoSuchKey",
    "denied": "AccessDenied",
    "bad_key": "InvalidArgument",
    "bad_range": "InvalidRange",
    "no_storage": "NoSuchBucket",
    "no_such_storage": "NoSuchBucket",
    "exists": "PreconditionFailed",
    "too_large": "EntityTooLarge",
    "broken": "IncompleteBody",
    "full": "InsufficientStorage",
    "unreachable": "ServiceUnavailable",
}


def routes(desk: Desk) -> list[BaseRoute]:
    """Under ``/s3_proxy``."""
    proxy = Proxy(desk, Signing(desk.db, desk.key))
    every = ["GET", "HEAD", "PUT", "POST", "DELETE"]
    return [
        Route(f"/api/w/{{workspace}}/s3_proxy/{ROOM}/{{storage}}", proxy.answer, methods=every),
        Route(f"/api/w/{{workspace}}/s3_proxy/{ROOM}/{{storage}}/{{rest:path}}", proxy.answer, methods=every),
        Route("/api/w/{workspace}/s3_proxy/{storage}/{rest:path}", proxy.linked, methods=["GET", "HEAD"]),
    ]


def bucket_of(storage: Storage) -> str:
    """The bucket by which the proxy knows a storage: its own, so that addresses with it mean the same both ways."""
    value = storage.resource
    if isinstance(value, dict):
        found = value.get("containerName") if storage.kind == "azure_blob" else value.get("bucket")
        if isinstance(found, str) and found:
            return found
    return "objects"


@dataclass(slots=True)
class Call:
    """One signed request, proven: what is asked of which object, by whom."""

    request: Request
    asked: Asked
    storage: Storage
    principal: Principal
    bucket: str
    key: str
    query: Mapping[str, str]
    now: datetime
    body: sigv4.Body
    who: Who = field(init=False)

    def __post_init__(self) -> None:
        self.who = who_is(self.principal)

    def may(self, action: Action, key: str | None = None) -> None:
        """Raise ObjectsError, kind ``denied``, or Refusal."""
        changes = action in ("write", "delete")
        if not self.principal.may(f"objects:{'write' if changes else 'read'}"):
            raise Refusal("AccessDenied", "this token was not made for objects: objects is none of its scopes")
        if changes and self.principal.session is not None and self.principal.session.dry:
            raise Refusal("AccessDenied", "this job only looks (`watcher plan`): nothing is changed by it")
        self.storage.check(self.who, parse_key(self.key if key is None else key), action)

    def sees(self, key: str) -> bool:
        """Whether a key may be shown in a listing; of a folder, whether anything in it may be."""
        return self.storage.allows(self.who, f"{key}_" if key.endswith("/") else key, "list")

    async def content(self) -> AsyncIterator[bytes]:
        """The body, verified: nothing may be kept of it before this has ended."""
        try:
            async for chunks in _gathered(self.request.stream(), BATCH):
                for piece in await self._fed(chunks):
                    yield piece
        except ClientDisconnect as error:
            raise Refusal("IncompleteBody", "the connection broke off in the middle of the body") from error
        self.body.finish()

    async def _fed(self, chunks: Sequence[bytes]) -> list[bytes]:
        """What of these belongs to the object. Much is summed in a thread, while more comes in."""

        def feed() -> list[bytes]:
            return [piece for chunk in chunks for piece in self.body.feed(chunk)]

        return feed() if sum(map(len, chunks)) < BATCH else await asyncio.to_thread(feed)

    async def text(self) -> bytes:
        """A body that is XML."""
        found = b""
        async for chunk in self.content():
            found += chunk
            if len(found) > MOST_XML:
                raise Refusal("EntityTooLarge", f"more than {MOST_XML} bytes of XML")
        return found


class Proxy:
    """All of it."""

    def __init__(self, desk: Desk, signing: Signing) -> None:
        self._desk = desk
        self._signing = signing
        self._tokens = tokens.Lookup(desk.db)
        self._ahead: dict[str, Ahead] = {}
        self._completing: dict[tuple[str, bytes], asyncio.Task[Meta]] = {}

    @property
    def _parts(self) -> Parts:
        return Parts(room(self._desk.config().data))

    # --- who, and what ------------------------------------------------------------------------------------------------

    async def answer(self, request: Request) -> Response:
        """A signed request of an S3 client."""

        async def work() -> Response:
            call = await self._proven(request)
            return await self._dispatch(call)

        return await _told(request, work)

    async def linked(self, request: Request) -> Response:
        """A link: one object, to be read."""

        async def work() -> Response:
            name, key = (
                request.path_params["storage"],
                _decoded(_raw(request).split("/s3_proxy/", 1)[1]).partition("/")[2],
            )
            self._here(request)
            ring = await self._signing.ring()
            opens = ring.opens(name, key, request.scope["query_string"].decode("latin-1"), self._desk.clock())
            if opens is None:
                raise Refusal("AccessDenied", "this link is over: ask for a new one")
            if not opens:
                raise Refusal("AccessDenied", "this link was not made here, or was altered")
            storage = await self._desk.objects.storage(name)
            return await _read(request, storage, key, {})

        return await _told(request, work)

    def _here(self, request: Request) -> None:
        if request.path_params["workspace"] != self._desk.config().workspace:
            raise Refusal("NoSuchBucket", "there is no such workspace")

    async def _proven(self, request: Request) -> Call:
        self._here(request)
        now = self._desk.clock()
        raw = _raw(request)
        headers = [(name.decode("latin-1"), _text(value)) for name, value in request.scope["headers"]]
        asked = Asked(request.method, raw, request.scope["query_string"].decode("latin-1"), headers)
        claimed = sigv4.claim(asked)
        if claimed is None:
            version = "AWS's Signature Version 4 (boto3: Config(signature_version='s3v4'))"
            raise Refusal("AccessDenied", f"requests are signed here, with {version}")
        sigv4.check_time(claimed, now)
        secret = await self._secret(asked, claimed)
        principal = await self._principal(claimed.access_key, now)
        storage = await self._desk.objects.storage(request.path_params["storage"])
        rest = raw.partition(f"/{ROOM}/")[2].partition("/")[2]
        bucket, _, key = _decoded(rest).partition("/")
        if bucket and bucket != bucket_of(storage):
            raise Refusal("NoSuchBucket", f"this endpoint has one bucket, {bucket_of(storage)}")
        query = dict(sigv4.pairs(asked.query))
        # Of an upload that is completed the checksum is that of all its parts, and not of the XML that names them.
        of_body = _without_sums(asked) if request.method == "POST" and "uploadId" in query else asked
        return Call(request, asked, storage, principal, bucket, key, query, now, sigv4.Body(of_body, claimed, secret))

    async def _secret(self, asked: Asked, claimed: sigv4.Claim) -> str:
        """The secret with which it was signed. Raises Refusal."""
        if stands_for(claimed.access_key) is None:
            raise Refusal("InvalidAccessKeyId", "this is no access key of ours")
        refusal: Refusal | None = None
        for secret in (await self._signing.ring()).secrets_of(claimed.access_key):
            for form in (asked, _unmounted(asked)):
                try:
                    sigv4.check(form, claimed, secret)
                except Refusal as error:
                    refusal = refusal or error
                else:
                    return secret
        assert refusal is not None
        raise refusal

    async def _principal(self, access_key: str, now: datetime) -> Principal:
        """Whom a key stands for that was proven to be theirs."""
        stands = stands_for(access_key)
        assert stands is not None
        if stands.job:
            session = self._desk.sessions.of_digest(stands.digest)
            if session is None:
                raise Refusal("ExpiredToken", "the job of this key is over, or was superseded")
            return Principal(f"job {session.job_id}", JOB_SCOPES, session)
        row = await self._tokens.get(stands.digest, now)
        if row is None:
            raise Refusal("ExpiredToken", "the token of this key is over, or was revoked")
        return Principal(row.label, row.scopes or ("*",))

    async def _dispatch(self, call: Call) -> Response:
        if odd := _UNKNOWN & call.query.keys():
            raise Refusal("NotImplemented", f"?{min(odd)} is not to be had here")
        of = self._of_object(call) if call.key else self._of_bucket(call)
        endpoint = of.get(call.asked.method)
        if endpoint is None:
            raise Refusal("MethodNotAllowed", f"{call.asked.method} means nothing here")
        return await endpoint(call)

    def _of_object(self, call: Call) -> Mapping[str, Callable[[Call], Awaitable[Response]]]:
        if "uploadId" in call.query:
            put = self._copy_part if call.asked.header("x-amz-copy-source") else self._put_part
            return {"PUT": put, "POST": self._complete, "DELETE": self._abort, "GET": self._list_parts}
        if "uploads" in call.query:
            return {"POST": self._begin}
        put = self._copy if call.asked.header("x-amz-copy-source") else self._put
        return {"GET": self._get, "HEAD": self._get, "PUT": put, "DELETE": self._delete}

    def _of_bucket(self, call: Call) -> Mapping[str, Callable[[Call], Awaitable[Response]]]:
        if not call.bucket:
            return {"GET": self._buckets}
        if "delete" in call.query:
            return {"POST": self._delete_many}
        if "uploads" in call.query:
            return {"GET": self._list_uploads}
        if "location" in call.query:
            return {"GET": self._location}
        return {"GET": self._list, "HEAD": self._look}

    # --- buckets ------------------------------------------------------------------------------------------------------

    async def _buckets(self, call: Call) -> Response:
        return _xml(xml.buckets([bucket_of(call.storage)], call.now))

    async def _location(self, call: Call) -> Response:
        return _xml(xml.location(REGION))

    async def _look(self, call: Call) -> Response:
        return Response(status_code=200, headers={"x-amz-bucket-region": REGION})

    async def _list(self, call: Call) -> Response:
        """Only what the caller may list is shown, and so a page may have less on it than was asked for."""
        if not call.principal.may("objects:read"):
            raise Refusal("AccessDenied", "this token was not made for objects: objects is none of its scopes")
        query, version = call.query, 2 if call.query.get("list-type") == "2" else 1
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        if delimiter not in ("", "/"):
            raise Refusal("NotImplemented", "the delimiter of a listing is a slash")
        most = query.get("max-keys", "1000")
        if not (most.isascii() and most.isdigit() and len(most) < 10):
            raise Refusal("InvalidArgument", "max-keys is a number")
        limit = min(int(most), 1000)
        token = query.get("continuation-token", "") if version == 2 else ""
        start = query.get("start-after" if version == 2 else "marker", "")
        after = _untoken(token) if token else start
        objects, folders, following = await _page(call.storage, prefix, delimiter, after or None, limit)
        page = xml.Page(
            call.bucket,
            prefix,
            delimiter,
            limit,
            [each for each in objects if call.sees(each.key)],
            [each for each in folders if call.sees(each)],
            following,
            query.get("encoding-type") == "url",
            token,
            "" if following is None else urlsafe_b64encode(following.encode()).decode(),
            start,
        )
        return _xml(xml.listing(page, version=version))

    async def _delete_many(self, call: Call) -> Response:
        keys, quiet = xml.parse_delete(await call.text())
        gone: list[str] = []
        failed: dict[str, tuple[str, str]] = {}
        for key in keys:
            try:
                call.may("delete", key)
                await call.storage.delete(key)
                gone.append(key)
            except (ObjectsError, Refusal) as error:
                code = error.code if isinstance(error, Refusal) else _KINDS[error.kind]
                failed[key] = code, str(error)
        return _xml(xml.deleted([] if quiet else gone, failed))

    # --- objects ------------------------------------------------------------------------------------------------------

    async def _get(self, call: Call) -> Response:
        call.may("read")
        return await _read(call.request, call.storage, call.key, call.query)

    async def _put(self, call: Call) -> Response:
        call.may("write")
        _refuse_vows(call.asked)
        absent = _only_if_absent(call.asked)
        meta = await self._store(call, call.content(), size=call.body.size, absent=absent, **_described(call.asked))
        return Response(status_code=200, headers={"etag": xml.etag(meta.etag)})

    async def _store(
        self,
        call: Call,
        body: AsyncIterator[bytes],
        *,
        size: int | None,
        absent: bool = False,
        content_type: str | None = None,
        content_disposition: str | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> Meta:
        most = self._desk.config().max_upload
        if size is not None and size > most:
            raise ObjectsError(f"more than {most} bytes: raise max_upload in [storage]", kind="too_large")
        kept = _Kept(bounded(body, most))
        whole = b"".join([chunk async for chunk in kept]) if size is not None and size <= SMALL else aiter(kept)
        try:
            return await call.storage.put(
                call.key,
                whole,
                content_type=content_type,
                content_disposition=content_disposition,
                attributes=attributes,
                if_absent=absent,
            )
        except Exception:
            if kept.error is not None:  # whatever the storage made of it
                raise kept.error from None
            raise

    async def _delete(self, call: Call) -> Response:
        call.may("delete")
        await call.storage.delete(call.key)
        return Response(status_code=204)

    async def _copy(self, call: Call) -> Response:
        call.may("write")
        reading = await self._source(call)
        if call.asked.header("x-amz-metadata-directive") == "REPLACE":
            described = _described(call.asked)
        else:
            of = reading.meta
            described = {
                "content_type": of.content_type,
                "content_disposition": of.content_disposition,
                "attributes": of.attributes,
            }
        size = reading.end - reading.start
        meta = await self._store(call, aiter(reading), size=size, absent=_only_if_absent(call.asked), **described)
        return _xml(xml.copied("CopyObjectResult", meta.etag, meta.modified))

    async def _source(self, call: Call) -> Reading:
        """The object that is copied, or the range of it."""
        given = (call.asked.header("x-amz-copy-source") or "").partition("?")
        bucket, _, key = _decoded(given[0].removeprefix("/")).partition("/")
        if given[2] or bucket != call.bucket:
            raise Refusal("NoSuchBucket", "objects are copied within their bucket, and have no versions")
        call.may("read", key)
        span = call.asked.header("x-amz-copy-source-range")
        found = _RANGE.fullmatch(span) if span else None
        if span and (found is None or not found[1] or not found[2]):
            raise Refusal("InvalidArgument", "x-amz-copy-source-range is bytes=FIRST-LAST")
        if found is None:
            return await call.storage.get(key)
        return await call.storage.get(key, start=int(found[1]), end=int(found[2]) + 1)

    # --- uploads in parts ---------------------------------------------------------------------------------------------

    async def _begin(self, call: Call) -> Response:
        call.may("write")
        _refuse_vows(call.asked)
        described = _described(call.asked)
        upload = Upload(call.storage.name, call.key, call.principal.name, **described)
        put = partial(self._store, call, size=None, **described)
        id = await self._parts.begin(upload, call.now)
        # A folder is as near as the parts: nothing is gained there.
        if call.storage.kind != "folder" and len(self._ahead) < MOST_AHEAD:
            ahead = Ahead(self._parts, id, put)
            ahead.task.add_done_callback(lambda _: self._ahead.pop(id, None))
            self._ahead[id] = ahead
        return _xml(xml.begun(call.bucket, call.key, id))

    async def _upload(self, call: Call) -> tuple[str, Upload]:
        call.may("write")
        id = call.query["uploadId"]
        return id, await self._parts.of(id, call.storage.name, call.key)

    async def _put_part(self, call: Call) -> Response:
        id, _ = await self._upload(call)
        part = await self._parts.add(id, _number(call), bounded(call.content(), self._desk.config().max_upload))
        await self._offer(id, part)
        return Response(status_code=200, headers={"etag": xml.etag(part.etag)})

    async def _copy_part(self, call: Call) -> Response:
        id, _ = await self._upload(call)
        reading = await self._source(call)
        part = await self._parts.add(id, _number(call), aiter(reading))
        await self._offer(id, part)
        return _xml(xml.copied("CopyPartResult", part.etag, part.at))

    async def _offer(self, id: str, part: Part) -> None:
        if (ahead := self._ahead.get(id)) is not None:
            await ahead.offer(part)

    async def _complete(self, call: Call) -> Response:
        """A client that has lost patience asks again: it is led to what goes on since it asked first, or to its end."""
        call.may("write")
        id, asked = call.query["uploadId"], await call.text()
        named = f"{call.storage.name} {id} {call.key}", sha256(asked).digest()
        work = self._completing.get(named)
        if work is None:
            upload = await self._parts.of(id, call.storage.name, call.key)
            parts = await self._parts.chosen(id, xml.parse_complete(asked))
            work = asyncio.create_task(self._put_together(call, id, upload, parts), name=f"complete {id}")
            work.add_done_callback(heard)
            work.add_done_callback(partial(self._completed, named))
            self._completing[named] = work
        done = partial(xml.completed, call.bucket, call.key, place=str(call.request.url.replace(query="")))
        await asyncio.wait({work}, timeout=PATIENCE)
        return _xml(done(work.result().etag)) if work.done() else _Slow(call.request, work, done)

    async def _sum_up(self, call: Call, id: str, parts: Sequence[Part]) -> None:
        """Raise Refusal unless the parts have the checksum of the whole that the client sent. (``…-3`` is one of the
        checksums of three parts, which were verified when they came.)"""
        given = {name: value for name, value in call.asked.headers if _is_sum(name) and "-" not in value}
        fed = sigv4.sums(given)
        if fed:
            async for chunk in self._parts.read(id, parts):
                for each in fed.values():
                    each.update(chunk)
            sigv4.check_sums(fed, given)

    async def _put_together(self, call: Call, id: str, upload: Upload, parts: Sequence[Part]) -> Meta:
        await self._sum_up(call, id, parts)
        absent, ahead = _only_if_absent(call.asked), self._ahead.pop(id, None)
        meta = None
        if ahead is not None:
            if absent:  # which it was not told when it began
                await ahead.stop()
            meta = await ahead.finish(parts)
        if meta is None:
            meta = await self._store(
                call,
                self._parts.read(id, parts),
                size=sum(part.size for part in parts),
                absent=absent,
                content_type=upload.content_type,
                content_disposition=upload.content_disposition,
                attributes=upload.attributes,
            )
        await self._parts.remove(id)
        return meta

    def _completed(self, named: tuple[str, bytes], work: asyncio.Task[Meta]) -> None:
        """What went well is remembered for a while; what did not may be tried again."""
        if work.cancelled() or work.exception() is not None:
            self._completing.pop(named, None)
        else:
            asyncio.get_running_loop().call_later(REMEMBERED, self._completing.pop, named, None)

    async def _abort(self, call: Call) -> Response:
        id, _ = await self._upload(call)
        if (ahead := self._ahead.pop(id, None)) is not None:
            await ahead.stop()
        await self._parts.remove(id)
        return Response(status_code=204)

    async def _list_parts(self, call: Call) -> Response:
        id, _ = await self._upload(call)
        found = [(part.number, part.size, part.etag, part.at) for part in await self._parts.kept(id)]
        return _xml(xml.parts(call.bucket, call.key, id, found, xml.MOST_PARTS))

    async def _list_uploads(self, call: Call) -> Response:
        found = [
            (upload.key, id, at)
            for id, upload, at in await self._parts.all()
            if upload.storage == call.storage.name
            and upload.key.startswith(call.query.get("prefix", ""))
            and call.storage.allows(call.who, upload.key, "write")
        ]
        return _xml(xml.uploads(call.bucket, found))


# --- requests ---------------------------------------------------------------------------------------------------------


def _raw(request: Request) -> str:
    raw: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    return raw.decode("latin-1")


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _decoded(path: str) -> str:
    try:
        return unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        raise Refusal("InvalidURI", "a key is UTF-8") from None


def _unmounted(asked: Asked) -> Asked:
    """The same request as a client signs it that takes host and path of its endpoint for the name of a host."""
    place = re.match(rf"/.*?/s3_proxy/{ROOM}/[^/]+", asked.path)
    if place is None:
        return asked
    headers = [(name, value + place[0].lower() if name == "host" else value) for name, value in asked.headers]
    return replace(asked, path=asked.path[place.end() :] or "/", headers=headers)


def _refuse_vows(asked: Asked) -> None:
    """Raise Refusal for an upload that is to be locked, or encrypted with a key of the client's: to take it all the
    same would be a promise that nobody keeps."""
    for name, value in asked.headers:
        lock = name.startswith(("x-amz-object-lock-", "x-amz-server-side-encryption-"))
        if lock or (name == "x-amz-server-side-encryption" and value != "AES256"):
            raise Refusal("NotImplemented", f"{name}: nothing is locked or encrypted here by the wish of a client")


def _is_sum(name: str) -> bool:
    return name.startswith("x-amz-checksum-")


def _without_sums(asked: Asked) -> Asked:
    return replace(asked, headers=[(name, value) for name, value in asked.headers if not _is_sum(name)])


def _described(asked: Asked) -> dict[str, Any]:
    kind, disposition = asked.header("content-type"), asked.header("content-disposition")
    if kind == "binary/octet-stream":  # what S3's own clients say of what they know nothing of
        kind = None
    return {"content_type": kind, "content_disposition": disposition, "attributes": _attributes(asked)}


def _attributes(asked: Asked) -> dict[str, str]:
    """What a client says of its object besides. Raises Refusal for what S3 would not keep either."""
    given: dict[str, str] = {}
    for name, value in asked.headers:
        if name in SAID or name.startswith(OWN):
            given[name] = f"{given[name]},{value}" if name in given else value
    coding = [each.strip() for each in given.pop("content-encoding", "").split(",")]
    if coding := [each for each in coding if each not in ("", "aws-chunked")]:  # that one is the request's own
        given["content-encoding"] = ", ".join(coding)
    if sum(len(name) - len(OWN) + len(value) for name, value in given.items() if name.startswith(OWN)) > MOST_METADATA:
        raise Refusal("MetadataTooLarge", f"the metadata of an object has at most {MOST_METADATA} bytes")
    for name, value in given.items():
        if name == OWN or not (value.isascii() and value.isprintable()):
            raise Refusal("InvalidArgument", f"{name} must have a name and printable ASCII characters")
    return given


def _only_if_absent(asked: Asked) -> bool:
    if asked.header("if-match") is not None:
        raise Refusal("NotImplemented", "writes take If-None-Match: * and no other condition")
    condition = asked.header("if-none-match")
    if condition not in (None, "*"):
        raise Refusal("NotImplemented", "writes take If-None-Match: * and no other condition")
    return condition is not None


def _number(call: Call) -> int:
    text = call.query.get("partNumber", "")
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise Refusal("InvalidArgument", "partNumber is a number")
    return int(text)


def _untoken(token: str) -> str:
    try:
        return urlsafe_b64decode(token.encode()).decode()
    except ValueError:
        raise Refusal("InvalidArgument", "this continuation token is none of ours") from None


async def _gathered(body: AsyncIterator[bytes], least: int) -> AsyncIterator[list[bytes]]:
    """The chunks of a stream, so many together that they have ``least`` bytes."""
    waiting: list[bytes] = []
    size = 0
    async for chunk in body:
        waiting.append(chunk)
        size += len(chunk)
        if size >= least:
            yield waiting
            waiting, size = [], 0
    yield waiting


class _Kept:
    """A stream that remembers why it ended, where whoever reads it makes another error of it."""

    def __init__(self, body: AsyncIterator[bytes]) -> None:
        self._body = body
        self.error: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._body:
                yield chunk
        except Exception as error:
            self.error = error
            raise


async def _page(
    storage: Storage, prefix: str, delimiter: str, after: str | None, limit: int
) -> tuple[list[Meta], list[str], str | None]:
    """Objects, folders, and where to go on."""
    if limit == 0:
        return [], [], None
    if delimiter:
        level = await storage.level(prefix, after=after, limit=limit)
        return list(level.objects), list(level.folders), level.after
    found = await storage.list(prefix, after=after, limit=limit + 1)
    more = len(found) > limit or len(found) == 1000  # of which there are at most a thousand
    found = found[:limit]
    return found, [], found[-1].key if more else None


# --- answers ----------------------------------------------------------------------------------------------------------


async def _told(request: Request, work: Callable[[], Awaitable[Response]]) -> Response:
    """The response, or S3's XML for what went wrong."""
    try:
        return await work()
    except Refusal as error:
        code, message = error.code, str(error)
    except ObjectsError as error:
        code, message = _KINDS[error.kind], str(error)
    except StoreError as error:
        code, message = "ServiceUnavailable", str(error)
    await _take_in(request)
    return _error(request, code, message)


def _error(request: Request, code: str, message: str) -> Response:
    id = secrets.token_hex(8)
    body = "" if request.method == "HEAD" else xml.error(code, message, request.url.path, id)
    response = _xml(body, xml.STATUS[code])
    response.headers["x-amz-request-id"] = id
    return response


async def _take_in(request: Request) -> None:
    """What a client still sends of a body that is not wanted: it would not see the answer before it is through."""
    length = request.headers.get("content-length", "")
    if request.headers.get("expect") or not length.isdigit() or int(length) > MOST_UNREAD:
        return
    try:
        async for _ in request.stream():
            pass
    except (ClientDisconnect, RuntimeError):  # gone, or taken in already
        pass


def _xml(text: str, status: int = 200) -> Response:
    return Response(text, status, media_type="application/xml")


@dataclass(frozen=True, slots=True)
class Span:
    """The part of an object that a Range header asks for: from ``start`` up to and without ``end``, or the ``last``
    so many bytes."""

    start: int = 0
    end: int | None = None
    last: int | None = None

    @classmethod
    def asked(cls, header: str) -> Span | None:
        """None for what is no range, or several: S3 then gives all of it."""
        found = _RANGE.fullmatch(header)
        if found is None or not (found[1] or found[2]):
            return None
        if not found[1]:
            return cls(last=int(found[2]))
        span = cls(int(found[1]), int(found[2]) + 1 if found[2] else None)
        return None if span.end is not None and span.end <= span.start else span

    def within(self, size: int) -> tuple[int, int]:
        """First byte and the one behind the last. Raises Refusal."""
        start = self.start if self.last is None else max(0, size - self.last)
        if start >= size:
            raise Refusal("InvalidRange", f"the object has {size} bytes")
        return start, size if self.end is None else min(self.end, size)


async def _read(request: Request, storage: Storage, key: str, query: Mapping[str, str]) -> Response:
    """The object, the range of it, or only its headers."""
    span = Span.asked(request.headers.get("range", ""))
    if request.method == "HEAD":
        return _content(request, await storage.head(key), span, None, query)
    start, end = (0, None) if span is None else (span.start, span.end)
    if span is not None and span.last is not None:
        start, end = span.within((await storage.head(key)).size)
    reading = await storage.get(key, start=start, end=end)
    try:
        return _content(request, reading.meta, span, reading, query)
    except BaseException:
        reading.close()
        raise


def _content(
    request: Request, meta: Meta, span: Span | None, reading: Reading | None, query: Mapping[str, str]
) -> Response:
    start, until = (0, meta.size) if span is None else span.within(meta.size)
    if (unchanged := _condition(request, meta)) is not None:
        if reading is not None:
            reading.close()
        return unchanged
    headers = {
        "etag": xml.etag(meta.etag),
        "last-modified": format_datetime(meta.modified, usegmt=True),
        "content-type": query.get("response-content-type") or meta.content_type or "binary/octet-stream",
        "content-length": str(until - start),
        "accept-ranges": "bytes",
        "content-security-policy": "default-src 'none'; sandbox",  # a page among the objects is not one of ours
    }
    for name in SAID:
        if said := query.get(f"response-{name}") or meta.attributes.get(name):
            headers[name] = said
    headers |= {name: value for name, value in meta.attributes.items() if name.startswith(OWN)}
    if disposition := query.get("response-content-disposition") or meta.content_disposition:
        headers["content-disposition"] = disposition
    if span is not None:
        headers["content-range"] = f"bytes {start}-{until - 1}/{meta.size}"
    return Content(200 if span is None else 206, headers, reading)


def _condition(request: Request, meta: Meta) -> Response | None:
    """304 or 412, when the client has this very version or wanted another one."""
    tag = xml.etag(meta.etag)

    def among(text: str) -> bool:
        return text.strip() == "*" or tag in [xml.etag(each.strip()) for each in text.split(",")]

    none, match = request.headers.get("if-none-match"), request.headers.get("if-match")
    if match is not None and not among(match):
        raise Refusal("PreconditionFailed", "the object is another version")
    since = _date(request.headers.get("if-unmodified-since"))
    if match is None and since is not None and meta.modified.replace(microsecond=0) > since:
        raise Refusal("PreconditionFailed", "the object was modified since")
    since = _date(request.headers.get("if-modified-since"))
    same = among(none) if none is not None else since is not None and meta.modified.replace(microsecond=0) <= since
    return Response(status_code=304, headers={"etag": tag}) if same else None


def _date(text: str | None) -> datetime | None:
    try:
        found = parsedate_to_datetime(text or "")
    except ValueError:
        return None
    return found if found.tzinfo else None


class _Slow(Response):
    """The answer to an upload that takes long to put together: 200 and blanks, then how it went. As S3 does it."""

    def __init__(self, request: Request, work: asyncio.Future[Meta], done: Callable[..., str]) -> None:
        super().__init__(status_code=200, media_type="application/xml")
        del self.headers["content-length"]
        self._request = request
        self._work = work
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": xml.HEAD.encode(), "more_body": True})
        while not (await asyncio.wait({self._work}, timeout=PATIENCE))[0]:
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
        try:
            text = self._done(self._work.result().etag, head=False)
        except (ObjectsError, Refusal) as error:
            code = error.code if isinstance(error, Refusal) else _KINDS[error.kind]
            text = xml.error(code, str(error), self._request.url.path, secrets.token_hex(8), head=False)
        await send({"type": "http.response.body", "body": text.encode(), "more_body": False})
