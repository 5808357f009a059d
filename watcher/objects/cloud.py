"""S3 and what speaks it, Azure Blob and Google Cloud Storage, through obstore: the only importer of it."""

from __future__ import annotations

import asyncio
import atexit
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from watcher.errors import ObjectsError
from watcher.objects.meta import CHUNK, OWN, SAID, Body, Level, Meta, Reading
from watcher.values import Json

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART = 8 * 1024 * 1024
"""Bytes of one part of an upload: ten thousand of them, S3's limit, are 80 GiB."""
_AT_ONCE = 4
"""Parts of one upload under way."""
_RETRIES: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
_TIMEOUTS = {"connect_timeout": "5s", "timeout": "300s"}


def store(kind: str, value: Json) -> ObjectStore:
    """obstore's own store for a resource of type ``s3``, ``azure_blob`` or ``gcs``. Raises ObjectsError."""
    try:
        from obstore.store import AzureStore, GCSStore, S3Store
    except ImportError as error:
        raise ObjectsError(
            'object storage in a cloud needs obstore: pip install "change-watcher[objects]"', kind="unreachable"
        ) from error
    _leave_slowly()
    if not isinstance(value, Mapping):
        raise ObjectsError(f"a resource of type {kind} is an object with the connection in it", kind="unreachable")
    made_of = {"s3": s3, "azure_blob": azure, "gcs": gcs}[kind](value)
    of: Any = {"s3": S3Store, "azure_blob": AzureStore, "gcs": GCSStore}[kind]
    given: dict[str, Any] = {} if made_of.credentials is None else {"credential_provider": made_of.credentials}
    try:
        made: ObjectStore = of(
            config=dict(made_of.settings),
            client_options={**_TIMEOUTS, "allow_http": made_of.http},
            retry_config=_RETRIES,
            **given,
        )
    except Exception as error:  # each kind of mistake is an exception of its own there
        raise ObjectsError(f"the resource of type {kind}: {_short(str(error))}", kind="unreachable") from error
    return made


@cache
def _leave_slowly() -> None:
    """Let obstore's threads drop what they hold of Python's before the interpreter goes: one that comes too late aborts
    the whole process, though everything was done (seen with 0.12.1 on Python 3.11)."""
    atexit.register(time.sleep, 0.1)


# --- resources, as Windmill writes them -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connection:
    """What obstore is told. Whatever it is not told it takes from the environment of this process, whose keys are not
    for the bucket of anybody who can write a resource: so credentials are given, or switched off."""

    settings: Mapping[str, Any]
    http: bool  # without TLS
    credentials: Callable[[], Any] | None = field(default=None, repr=False)


def s3(value: Mapping[str, Any]) -> Connection:
    """From a resource of type ``s3``. Without keys nothing is signed: a public bucket."""
    address = endpoint(value)
    key, secret = value.get("accessKey") or "", value.get("secretKey") or ""
    if bool(key) != bool(secret):
        raise ObjectsError("the resource of the storage has only one of accessKey and secretKey", kind="unreachable")
    keys = {"access_key_id": key, "secret_access_key": secret, "token": value.get("token") or None, "expires_at": None}
    settings = {
        "bucket": _needed(value, "bucket"),
        "region": value.get("region") or "us-east-1",
        "endpoint": address,
        "virtual_hosted_style_request": value.get("pathStyle") is False,
        "skip_signature": not key,
        "request_payer": False,
    }
    return Connection(settings, address.startswith("http://"), (lambda: keys) if key else None)


def endpoint(value: Mapping[str, Any]) -> str:
    """The address of an ``s3`` resource: its scheme from ``useSSL`` unless it has one, its port, and with
    ``pathStyle = false`` the bucket before the host."""
    host = str(value.get("endPoint") or "").strip().rstrip("/")
    scheme, separator, bare = host.rpartition("://")
    if not separator:
        scheme = "http" if value.get("useSSL") is False else "https"
    bare = bare or f"s3.{value.get('region') or 'us-east-1'}.amazonaws.com"
    if value.get("port") and not bare.rpartition(":")[2].isdigit():
        bare += f":{value['port']}"
    bucket = value.get("bucket")
    if value.get("pathStyle") is False and not bare.startswith(f"{bucket}."):
        bare = f"{bucket}.{bare}"
    return f"{scheme}://{bare}"


def azure(value: Mapping[str, Any]) -> Connection:
    """From a resource of type ``azure_blob``: by account key, or by a workload's identity."""
    account, key = _needed(value, "accountName"), value.get("accessKey")
    address = str(value.get("endpoint") or "").strip().rstrip("/") or f"{account}.blob.core.windows.net"
    if "://" not in address:
        address = ("http://" if value.get("useSSL") is False else "https://") + address
    identity = {
        theirs: value[ours]
        for ours, theirs in (
            ("tenantId", "tenant_id"),
            ("clientId", "client_id"),
            ("federatedTokenFile", "federated_token_file"),
        )
        if value.get(ours) and not key
    }
    settings = {
        "account_name": account,
        "container_name": _needed(value, "containerName"),
        "endpoint": address,
        "use_emulator": False,
        "skip_signature": not key and not identity,
        **identity,
    }
    keys = {"access_key": key, "expires_at": None}
    return Connection(settings, address.startswith("http://"), (lambda: keys) if key else None)


def gcs(value: Mapping[str, Any]) -> Connection:
    """From a resource of type ``gcs``. Without a key nothing is signed: a public bucket."""
    key = value.get("serviceAccountKey")
    settings: dict[str, Any] = {"bucket": _needed(value, "bucket"), "skip_signature": not key}
    if key:
        settings["service_account_key"] = key if isinstance(key, str) else json.dumps(key)
    return Connection(settings, "http://" in str(settings.get("service_account_key")))


def _needed(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not found:
        raise ObjectsError(f"the resource of the storage has no {name}", kind="unreachable")
    return found


# --- operations -------------------------------------------------------------------------------------------------------


class Cloud:
    """The objects of one bucket or container. Listings come in the order that the server keeps."""

    def __init__(self, kind: str, value: Json, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.kind = kind
        self.store = store(kind, value)
        self._now = now
        name = value.get("containerName") if kind == "azure_blob" else value.get("bucket")
        self._where = f"{'container' if kind == 'azure_blob' else 'bucket'} {name}"

    async def put(
        self,
        key: str,
        body: Body,
        *,
        content_type: str | None,
        content_disposition: str | None,
        attributes: Mapping[str, str],
        if_absent: bool,
    ) -> Meta:
        given = {"Content-Type": content_type, "Content-Disposition": content_disposition}
        said = {name: value for name, value in given.items() if value}
        said |= {self._name(name): value for name, value in attributes.items()}
        stream = _Stream(_one(body) if isinstance(body, bytes) else body)
        with self._errors(key, writing=True):
            # What fits into one part is one request, which alone can be conditional; a longer stream looks first.
            start = await stream.take(PART)
            if stream.ended:
                mode = "create" if if_absent else "overwrite"
                etag = await self._put(key, start, stream, said, mode=mode, use_multipart=False)
            else:
                if if_absent and await self._is_there(key):
                    raise ObjectsError(f"there is an object {key} already", kind="exists")
                options = {"use_multipart": True, "chunk_size": PART, "max_concurrency": _AT_ONCE}
                etag = await self._put(key, stream, stream, said, **options)
        return Meta(key, stream.size, etag, self._now(), content_type, content_disposition, attributes)

    def _name(self, attribute: str) -> str:
        """What obstore calls an attribute. Raises ObjectsError."""
        own = attribute.removeprefix(OWN)
        if own == attribute:
            return attribute.title()
        if own.title() in _STANDARD:
            raise ObjectsError(f"{attribute} cannot be kept: {own} means something else already", kind="bad_key")
        return _ODD.sub(lambda odd: f"_x{ord(odd[0]):04x}_", own) if self.kind == "azure_blob" else own

    async def _put(self, key: str, body: Any, stream: _Stream, attributes: Mapping[str, str], **options: Any) -> str:
        """Upload. obstore aborts a multipart upload when the stream raises, and not when its caller is cancelled: so
        the caller waits for the one after the other."""
        import obstore

        task = asyncio.ensure_future(
            obstore.put_async(self.store, key, body, attributes=dict(attributes) or None, **options)
        )
        try:
            return (await asyncio.shield(task))["e_tag"] or ""
        except asyncio.CancelledError:
            stream.stop()
            await asyncio.wait({task})
            if not task.cancelled() and task.exception() is None:  # too late: all of it was there
                with suppress(Exception):
                    await obstore.delete_async(self.store, key)
            raise

    async def _is_there(self, key: str) -> bool:
        try:
            await self.head(key)
        except ObjectsError as error:
            if error.kind != "missing":
                raise
            return False
        return True

    async def get(self, key: str, *, start: int, end: int | None) -> Reading:
        import obstore

        options: Any = {}
        if end is not None:
            if end <= start:
                raise bad_range(key)
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        with self._errors(key):
            found = await obstore.get_async(self.store, key, options=options or None)
        meta = _meta(found.meta, found.attributes)
        return Reading(meta, *found.range, self._chunks(key, found))

    async def _chunks(self, key: str, found: Any) -> AsyncIterator[bytes]:
        with self._errors(key):
            async for chunk in found.stream(min_chunk_size=CHUNK):
                yield bytes(chunk)

    async def head(self, key: str) -> Meta:
        import obstore

        with self._errors(key):
            try:
                found = await obstore.get_async(self.store, key, options={"head": True})
            except FileNotFoundError:
                # The answer to HEAD has no body to say whether it is the object or the bucket that is missing.
                found = await obstore.get_async(self.store, key, options={"range": (0, 1)})
        return _meta(found.meta, found.attributes)

    async def delete(self, key: str) -> None:
        import obstore

        with self._errors(key), suppress(FileNotFoundError):
            await obstore.delete_async(self.store, key)

    async def list(self, prefix: str, *, after: str | None, limit: int) -> list[Meta]:
        import obstore

        parent, _, start = prefix.rpartition("/")
        found: list[Meta] = []
        with self._errors(prefix):
            async for page in obstore.list(self.store, parent or None, offset=after, chunk_size=limit):
                for each in page:
                    if start and not each["path"].startswith(prefix):
                        continue
                    found.append(_meta(each))
                    if len(found) == limit:
                        return found
        return found

    async def level(self, prefix: str, *, after: str | None, limit: int) -> Level:
        import obstore

        with self._errors(prefix):
            found = await obstore.list_with_delimiter_async(self.store, prefix.rpartition("/")[0] or None)
        objects = {each["path"]: _meta(each) for each in found["objects"]}
        names = sorted(
            name
            for name in [*objects, *(f"{folder}/" for folder in found["common_prefixes"])]
            if name.startswith(prefix) and name > (after or "")
        )
        shown = names[:limit]
        return Level(
            tuple(objects[name] for name in shown if name in objects),
            tuple(name for name in shown if name not in objects),
            shown[-1] if len(names) > limit else None,
        )

    @contextmanager
    def _errors(self, key: str, *, writing: bool = False) -> Iterator[None]:
        """What obstore raises, as ObjectsError."""
        from obstore import exceptions

        try:
            yield
        except (FileNotFoundError, exceptions.BaseError) as error:
            raise told(self._where, key, error, writing=writing) from error


class _Stream:
    """A body, taken in pieces of at least CHUNK bytes. ``stop`` makes it raise at the next one, or while it waits."""

    def __init__(self, body: AsyncIterator[bytes]) -> None:
        self._body = aiter(body)
        self._waiting: list[bytes] = []
        self._stopped = asyncio.Event()
        self.ended = False
        self.size = 0

    def stop(self) -> None:
        self._stopped.set()

    async def take(self, least: int) -> bytes:
        """The next bytes, at least so many unless the body ends before."""
        size = sum(map(len, self._waiting))
        while size < least and not self.ended:
            if (chunk := await self._next()) is None:
                self.ended = True
                break
            self._waiting.append(chunk)
            size += len(chunk)
            self.size += len(chunk)
        return b"".join(self._waiting)

    async def _next(self) -> bytes | None:
        following = asyncio.ensure_future(anext(self._body, None))
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                return following.result()
            raise ObjectsError("the upload was given up", kind="broken")
        finally:
            following.cancel()
            stopped.cancel()

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> bytes:
        chunk = await self.take(CHUNK)
        self._waiting.clear()
        if not chunk:
            raise StopAsyncIteration
        return chunk


async def _one(body: bytes) -> AsyncIterator[bytes]:
    yield body


_STANDARD = ("Content-Type", "Content-Disposition", *(name.title() for name in SAID))
_ODD = re.compile(r"[^A-Za-z0-9_]|^[0-9]")
"""What a name of Azure's must not have. It stands there as Microsoft writes it in the names of XML."""
_WRITTEN = re.compile(r"_x([0-9a-f]{4})_")


def _meta(found: Mapping[str, Any], attributes: Mapping[str, str] | None = None) -> Meta:
    given = attributes or {}
    said = {name: given[name.title()] for name in SAID if name.title() in given}
    own = {
        OWN + _WRITTEN.sub(lambda odd: chr(int(odd[1], 16)), name.lower()): value
        for name, value in given.items()
        if name not in _STANDARD
    }
    return Meta(
        found["path"],
        found["size"],
        found["e_tag"] or "",
        found["last_modified"],
        given.get("Content-Type"),
        given.get("Content-Disposition"),
        said | own,
    )


# --- errors -----------------------------------------------------------------------------------------------------------

_ANSWER = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([\w.-]{1,80})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,300})")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_FULL = ("XMinioStorageFull", "InsufficientStorage", "QuotaExceeded")


def told(where: str, key: str, error: BaseException, *, writing: bool = False) -> ObjectsError:
    """What obstore raised, in a sentence. Of a server's answer only its code and message are shown: the rest of it may
    hold what was signed."""
    text = str(error)
    status = found[1] if (found := _ANSWER.search(text)) else ""
    code = found[1] if (found := _CODE.search(text)) else ""
    message = found[1].strip().splitlines()[0] if (found := _MESSAGE.search(text)) else ""
    said = ": ".join(part for part in (code, message) if part)
    if code in _NO_BUCKET or (writing and isinstance(error, FileNotFoundError)):
        return ObjectsError(f"there is no {where}: create it, or correct the resource", kind="unreachable")
    if isinstance(error, FileNotFoundError):
        return ObjectsError(f"there is no object {key}", kind="missing")
    if type(error).__name__ == "AlreadyExistsError":
        return ObjectsError(f"there is an object {key} already", kind="exists")
    if status == "416" or "Wanted range starting at" in text:
        return bad_range(key)
    if status == "507" or code in _FULL:
        return ObjectsError(f"{where} is full: {said}", kind="full")
    if status in ("401", "403"):
        fix = "check the keys of its resource, and what they may do"
        return ObjectsError(f"{where}: access is refused ({said or status}): {fix}", kind="unreachable")
    if status:
        return ObjectsError(f"{where}: the server answers {status}{': ' + said if said else ''}", kind="unreachable")
    return ObjectsError(f"{where}: {_short(text)}", kind="unreachable")


def bad_range(key: str) -> ObjectsError:
    """Nothing of the object lies in the range that was asked for."""
    return ObjectsError(f"{key} is shorter than that", kind="bad_range")


_SENDING = re.compile(r"Error performing \w+ (\w+://[^/\s]+)\S* in .*? - (?:HTTP error: )?(.*)", re.DOTALL)


def _short(text: str) -> str:
    found = _SENDING.search(text)
    first = (f"{found[1]}: {found[2]}" if found else text).strip().splitlines()[0]
    return first.replace("error sending request", "cannot be reached")[:300]
