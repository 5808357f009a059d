"""Files in object storage, as Windmill's clients load, write, delete and list them: all streams, errors as text."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from watcher.errors import ObjectsError
from watcher.objects import Action, Meta, Storage, Who, bounded, new_key, parse_key, quoted
from watcher.server.windmill.content import Content
from watcher.server.windmill.desk import Desk, Endpoint, changing, said, when, who, who_is
from watcher.store import resources as resource_store
from watcher.values import Json

_STATUS = {
    "no_storage": 500,  # Windmill's own
    "no_such_storage": 404,
    "missing": 404,
    "denied": 403,
    "bad_key": 400,
    "bad_range": 416,
    "exists": 409,
    "too_large": 413,
    "broken": 400,
    "full": 507,
    "unreachable": 502,
}
_PREVIEW = 1024 * 1024
_LOOKED_AT = 20_000
"""Objects that one listing reads at most, when permissions hide most of them."""
_DRAINED = 16 * 1024 * 1024
"""Bytes of a refused upload that are read all the same, so that the client hears why and not just a closed door."""
_DRAINING = 10.0  # seconds
_HEADERS = {
    "content-security-policy": "default-src 'none'; sandbox",  # a page among the objects is not one of ours
}


def routes(desk: Desk) -> list[BaseRoute]:
    """Under ``/job_helpers``."""
    rooms = [
        ("download_s3_file", download, "read", "GET"),
        ("upload_s3_file", upload, "write", "POST"),
        ("delete_s3_file", delete, "write", "DELETE"),
        ("move_s3_file", move, "write", "GET"),
        ("list_stored_files", list_, "read", "GET"),
        ("list_stored_files_paged", level, "read", "GET"),
        ("load_file_metadata", metadata, "read", "GET"),
        ("load_file_preview", preview, "read", "GET"),
        ("test_connection", test_connection, "read", "GET"),
    ]
    return [
        desk.route(f"/job_helpers/{path}", partial(_told, partial(endpoint, desk)), f"objects:{need}", method)
        for path, endpoint, need, method in rooms
    ]


async def _told(endpoint: Endpoint, request: Request) -> Response:
    """The response, or what storage could not do with Windmill's status for it. Always text: the Python client looks
    for a field in whatever JSON it gets."""
    try:
        return await endpoint(request)
    except ObjectsError as error:
        raise HTTPException(_STATUS[error.kind], str(error)) from error


# --- bytes ------------------------------------------------------------------------------------------------------------


async def download(desk: Desk, request: Request) -> Response:
    """The bytes of ``file_key``; a HEAD request gets the headers alone."""
    storage, key = await _object(desk, request, "read")
    if request.method == "HEAD":
        return _HeadOnly(_described(await storage.head(key)))
    reading = await storage.get(key)
    return Content(200, _described(reading.meta), reading)


async def upload(desk: Desk, request: Request) -> Response:
    """Store the body as ``file_key``, or under a key made up here. 413 above ``max_upload``."""
    try:
        try:
            return await _upload(desk, request)
        except ClientDisconnect as error:
            raise ObjectsError("the upload broke off: nothing of it was kept", kind="broken") from error
    except (HTTPException, ObjectsError):
        await _drain(request)
        raise


async def _upload(desk: Desk, request: Request) -> Response:
    changing(request)
    most = desk.config().max_upload
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > most:
        raise ObjectsError(f"more than {most} bytes: raise max_upload in [storage]", kind="too_large")
    query = request.query_params
    content_type = _header(request, "content_type") or _content_type(request)
    key = query.get("file_key") or new_key(
        desk.clock(), extension=query.get("file_extension"), content_type=content_type
    )
    storage = await _storage(desk, request)
    storage.check(_who(request), parse_key(key), "write")
    disposition = _header(request, "content_disposition")
    await storage.put(key, bounded(request.stream(), most), content_type=content_type, content_disposition=disposition)
    return JSONResponse({"file_key": key})


def _content_type(request: Request) -> str | None:
    """The request's own, unless it says nothing: both clients call everything an octet stream."""
    given = request.headers.get("content-type", "")
    return None if given in ("", "application/octet-stream", "application/json") else given


def _header(request: Request, name: str) -> str | None:
    value = request.query_params.get(name) or None
    if value is not None and (len(value) > 1000 or not value.isascii() or not value.isprintable()):
        raise HTTPException(400, f"{name} is a header: at most 1000 printable ASCII characters")
    return value


async def _drain(request: Request) -> None:
    """Read on after a refusal, within bounds. A client that waits for a go-ahead has sent nothing, and will not."""
    length = request.headers.get("content-length", "0")
    if "expect" in request.headers or not length.isdigit() or int(length) > _DRAINED:
        return
    left = _DRAINED
    try:
        async with asyncio.timeout(_DRAINING):
            async for chunk in request.stream():
                left -= len(chunk)
                if left < 0:
                    return
    except (TimeoutError, ClientDisconnect, RuntimeError):
        pass  # it has gone, or was read before


async def delete(desk: Desk, request: Request) -> Response:
    """200, and 404 when there is none."""
    changing(request)
    storage, key = await _object(desk, request, "delete")
    await storage.head(key)
    await storage.delete(key)
    return said(f"deleted {key}")


async def move(desk: Desk, request: Request) -> Response:
    """Copy ``src_file_key`` to ``dest_file_key``, then delete it."""
    changing(request)
    source, to = (parse_key(request.query_params.get(name, "")) for name in ("src_file_key", "dest_file_key"))
    storage, asking = await _storage(desk, request), _who(request)
    checks: list[tuple[str, Action]] = [(source, "read"), (source, "delete"), (to, "write")]
    for key, action in checks:
        storage.check(asking, key, action)
    if source != to:
        reading = await storage.get(source)
        async with aclosing(aiter(reading)) as chunks:
            meta = reading.meta
            await storage.put(
                to,
                chunks,
                content_type=meta.content_type,
                content_disposition=meta.content_disposition,
                attributes=meta.attributes,
            )
        await storage.delete(source)
    return said(f"moved {source} to {to}")


# --- what there is ----------------------------------------------------------------------------------------------------


async def list_(desk: Desk, request: Request) -> Response:
    """Keys under ``prefix`` that the token may list, ``max_keys`` of them, behind ``marker``."""
    query, asking = request.query_params, _who(request)
    storage = await _storage(desk, request)
    most, after = _number(request, "max_keys", 1000, 1000), query.get("marker") or None
    prefix = query.get("search") or query.get("prefix", "")
    found: list[str] = []
    looked_at, more = 0, True
    while more and len(found) < most and looked_at < _LOOKED_AT:
        page = await storage.list(prefix, after=after)
        more = len(page) == 1000
        for meta in page:
            if len(found) == most:
                more = True
                break
            after = meta.key
            if storage.allows(asking, meta.key, "list"):
                found.append(meta.key)
        looked_at += len(page)
    answer: dict[str, Json] = {"windmill_large_files": [{"s3": key} for key in found], "restricted_access": False}
    if more and after:
        answer["next_marker"] = after
    return JSONResponse(answer)


async def level(desk: Desk, request: Request) -> Response:
    """Folders and files right under ``prefix``, as far as the token may list them."""
    query, asking = request.query_params, _who(request)
    storage = await _storage(desk, request)
    prefix = query.get("prefix", "")
    if prefix and not prefix.endswith("/"):
        raise HTTPException(400, "prefix ends with a slash, or is empty")
    found = await storage.level(
        prefix, after=query.get("page_token") or None, limit=_number(request, "max_keys", 1000, 1000)
    )
    answer: dict[str, Json] = {
        "folders": [
            {"prefix": folder, "name": folder.removeprefix(prefix).rstrip("/")}
            for folder in found.folders
            if storage.allows(asking, f"{folder}_", "list")  # whatever lies in it
        ],
        "files": [
            {
                "key": meta.key,
                "name": meta.key.removeprefix(prefix),
                "size": meta.size,
                "last_modified": when(meta.modified),
            }
            for meta in found.objects
            if storage.allows(asking, meta.key, "list")
        ],
        "restricted_access": False,
    }
    if found.after:
        answer["next_page_token"] = found.after
    return JSONResponse(answer)


async def metadata(desk: Desk, request: Request) -> Response:
    """What is known of ``file_key``."""
    storage, key = await _object(desk, request, "read")
    meta = await storage.head(key)
    return JSONResponse(
        {
            "mime_type": meta.content_type,
            "size_in_bytes": meta.size,
            "last_modified": when(meta.modified),
            "expires": None,
            "version_id": None,
        }
    )


async def preview(desk: Desk, request: Request) -> Response:
    """The start of a text, or what lies at ``read_bytes_from``; of anything else that there is none."""
    storage, key = await _object(desk, request, "read")
    start = _number(request, "read_bytes_from", 0, 2**63 - 1, least=0)
    length = _number(request, "read_bytes_length", 128 * 1024, _PREVIEW)
    meta = await storage.head(key)
    if meta.size == 0:
        return JSONResponse({"content_type": "RawText", "content": "", "msg": None})
    raw = await (await storage.get(key, start=start, end=start + length)).all()
    text = raw.decode("utf-8", "replace")
    if "\0" in text or text.count("\ufffd") > 4:  # a cut at either end spoils four bytes at most
        return JSONResponse({"content_type": "Unknown", "content": None, "msg": "this is no text: load it instead"})
    kind = "Csv" if key.endswith(".csv") or (meta.content_type or "").startswith("text/csv") else "RawText"
    return JSONResponse({"content_type": kind, "content": text, "msg": None})


async def test_connection(desk: Desk, request: Request) -> Response:
    """200 when the storage answers."""
    storage = await _storage(desk, request)
    await storage.list(limit=1)
    return said(f"the storage {storage.name} ({storage.kind}) answers")


# --- whose and where --------------------------------------------------------------------------------------------------


def _who(request: Request) -> Who:
    return who_is(who(request))


async def _object(desk: Desk, request: Request, action: Action) -> tuple[Storage, str]:
    """The storage and key that a request names, which whoever asks may do this with."""
    key = parse_key(request.query_params.get("file_key", ""))
    storage = await _storage(desk, request)
    storage.check(_who(request), key, action)
    return storage, key


async def _storage(desk: Desk, request: Request) -> Storage:
    """That of ``s3_resource_path``, if the token may read it; else the workspace's, by name."""
    path = request.query_params.get("s3_resource_path", "").removeprefix("$res:")
    if path:
        return await of_path(desk, request, path)
    name = request.query_params.get("storage")
    if name in ("null", "undefined", "None") and name not in desk.config().storages:
        name = None  # what is no name, as a client's language writes it
    return await desk.objects.storage(name)


async def of_path(desk: Desk, request: Request, path: str) -> Storage:
    """The storage that the resource at a path describes. Raises 403, 404, ObjectsError."""
    desk.require(request, f"resources:read:{path}")
    fixed = desk.config().resources.get(path)
    if fixed is not None:
        type = fixed.type
    else:
        async with desk.db.read() as tx:
            row = await resource_store.get(tx, path)
        if row is None:
            raise HTTPException(404, f"there is no resource {path}")
        type = row.type
    return await desk.objects.of_resource(await desk.resolver.resource(path), type)


def _number(request: Request, name: str, default: int, most: int, *, least: int = 1) -> int:
    text = request.query_params.get(name) or str(default)
    if not text.isdigit() or len(text) > 19:
        raise HTTPException(400, f"{name} is a number")
    return max(least, min(int(text), most))


# --- answers ----------------------------------------------------------------------------------------------------------


def _described(meta: Meta) -> dict[str, str]:
    return {
        **_HEADERS,
        "content-length": str(meta.size),
        "content-type": meta.content_type or "application/octet-stream",
        "content-disposition": f"attachment; filename*=UTF-8''{quoted(meta.key.rpartition('/')[2])}",
        "last-modified": meta.modified.strftime("%a, %d %b %Y %H:%M:%S GMT"),
        **({"etag": meta.etag} if meta.etag.startswith('"') and meta.etag.isascii() else {}),
    }


class _HeadOnly(Response):
    """Headers of a body that is not sent."""

    def __init__(self, headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
