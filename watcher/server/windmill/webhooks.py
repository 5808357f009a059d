"""What a webhook's caller sent, as the arguments of a job: JSON, forms, files, CloudEvents, plain text."""

from __future__ import annotations

import base64
import binascii
from email import message_from_bytes
from email.message import Message
from email.policy import HTTP
from pathlib import PurePosixPath
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import Request

from watcher.errors import ObjectsError
from watcher.objects import new_key
from watcher.server.windmill.desk import Desk, body, changing, parse, who, who_is
from watcher.values import Json

METADATA = "WEBHOOK__METADATA__"
"""The argument that holds what a CloudEvent says of itself."""

MAX_PARTS = 1000
_STRUCTURED = "application/cloudevents+json"
_TEXT = ("text/plain", "text/xml", "application/xml")


async def arguments(desk: Desk, request: Request) -> dict[str, Json]:
    """The body as named arguments. What is no object becomes the argument ``body``, as in Windmill.

    Files of a form are put into object storage; their argument is a list of S3 objects. Raises HTTPException.
    """
    query = request.query_params
    args = await _from_body(desk, request)
    if query.get("raw") == "true":
        args["raw_string"] = (await request.body()).decode("utf-8", "replace")
    for name in filter(None, query.get("include_header", "").split(",")):
        args[name.strip().lower().replace("-", "_")] = request.headers.get(name.strip())
    for name in filter(None, query.get("include_query", "").split(",")):
        args[name.strip()] = query.get(name.strip())
    return args


async def _from_body(desk: Desk, request: Request) -> dict[str, Json]:
    query = request.query_params
    if request.method == "GET":
        return _named(_payload(query.get("payload", "")), wrap=query.get("wrap_body") == "true")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form_with_files(desk, request)
    if kind in _TEXT:
        return {"raw_string": (await request.body()).decode("utf-8", "replace")}
    if kind == "application/x-www-form-urlencoded" and not (await request.body()).lstrip().startswith((b"{", b"[")):
        return _form(await request.body())  # else it is JSON, of a caller that did not say so
    if kind == "application/cloudevents-batch+json":
        raise HTTPException(415, "a batch of CloudEvents is not taken: send each event by itself")
    value = await body(request)
    if kind == _STRUCTURED:
        return _event(value)
    args = _named(value, wrap=query.get("wrap_body") == "true")
    if event := {name[3:]: text for name, text in request.headers.items() if name.startswith("ce-")}:
        args[METADATA] = event
    return args


def _named(value: Json, *, wrap: bool) -> dict[str, Json]:
    return {"body": value} if wrap or not isinstance(value, dict) else dict(value)


def _payload(text: str) -> Json:
    plain = text.rstrip("=")
    try:
        return parse(base64.b64decode(plain + "=" * (-len(plain) % 4), b"-_", validate=True))
    except (binascii.Error, ValueError) as error:
        raise HTTPException(400, "payload is JSON in URL-safe base64") from error


def _event(value: Json) -> dict[str, Json]:
    """Of an event in one piece the data are the arguments, and all else is what it says of itself."""
    if not isinstance(value, dict) or "specversion" not in value:
        raise HTTPException(400, "a CloudEvent is an object with a specversion")
    about = dict(value)
    data = about.pop("data", None)
    return {**_named({} if data is None else data, wrap=False), METADATA: about}


def _form(raw: bytes) -> dict[str, Json]:
    try:
        found = parse_qs(raw.decode(), keep_blank_values=True, strict_parsing=bool(raw), max_num_fields=MAX_PARTS)
    except ValueError as error:
        raise HTTPException(400, f"the body is no form: {error}") from error
    return {name: values[0] if len(values) == 1 else [*values] for name, values in found.items()}


async def _form_with_files(desk: Desk, request: Request) -> dict[str, Json]:
    head = f"content-type: {request.headers['content-type']}\r\n\r\n".encode("latin-1")
    whole = message_from_bytes(head + await request.body(), policy=HTTP)
    parts = whole.get_payload()
    if not isinstance(parts, list) or whole.defects or len(parts) > MAX_PARTS:
        raise HTTPException(400, f"the body is no multipart form of at most {MAX_PARTS} parts")
    args: dict[str, Json] = {}
    for part in parts:
        assert isinstance(part, Message)
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if not isinstance(name, str) or not isinstance(content, bytes):
            raise HTTPException(400, "a part of the form has no name")
        if (file := part.get_filename()) is not None:
            stored = await _stored(desk, request, content, file, part.get_content_type())
            args[name] = [*_list(args.get(name, [])), stored]
        else:
            text = content.decode("utf-8", "replace")
            args[name] = text if name not in args else [*_list(args[name]), text]
    return args


def _list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else [value]


async def _stored(desk: Desk, request: Request, content: bytes, file: str, kind: str) -> Json:
    """Put one file into the workspace's storage."""
    changing(request)
    key = new_key(desk.clock(), extension=PurePosixPath(file).suffix.lstrip("."), content_type=kind)
    try:
        storage = await desk.objects.storage(None)
        storage.check(who_is(who(request)), key, "write")
        await storage.put(key, content, content_type=kind)
    except ObjectsError as error:
        status = 403 if error.kind == "denied" else 500
        raise HTTPException(status, f"the file {file!r} was not stored: {error}") from error
    return {"s3": key, "filename": file}
