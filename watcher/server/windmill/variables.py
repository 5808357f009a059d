"""Variables: named strings; secret ones are stored encrypted, and every reading of one is noted."""

from __future__ import annotations

from functools import partial

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from watcher.log import register
from watcher.server.windmill.desk import (
    Answer,
    Desk,
    changing,
    fields,
    job,
    known_query,
    new_path,
    page,
    said,
    text_of,
    who,
)
from watcher.store import audit
from watcher.store import variables as store
from watcher.store.db import Tx
from watcher.store.variables import Variable
from watcher.values import Json


def routes(desk: Desk) -> list[BaseRoute]:
    """Under ``/variables``."""
    rooms = [
        ("get_value/{path:path}", get_value, "read:{path}", "GET"),
        ("get/{path:path}", get, "read:{path}", "GET"),
        ("exists/{path:path}", exists, "read:{path}", "GET"),
        ("list", list_, "read", "GET"),
        ("create", create, None, "POST"),
        ("update/{path:path}", update, "write:{path}", "POST"),
        ("delete/{path:path}", delete, "write:{path}", "DELETE"),
    ]
    return [
        desk.route(f"/variables/{path}", partial(endpoint, desk), need and f"variables:{need}", method)
        for path, endpoint, need, method in rooms
    ]


async def get_value(desk: Desk, request: Request) -> Response:
    """The value as a JSON string."""
    known_query(request, "allow_cache")
    found = await _find(desk, request, request.path_params["path"])
    return Answer(await _plain(desk, request, found))


async def get(desk: Desk, request: Request) -> Response:
    """The whole variable; a secret's value too, unless ``decrypt_secret=false``."""
    known_query(request, "decrypt_secret", "include_encrypted")
    found = await _find(desk, request, request.path_params["path"])
    if not found.is_secret or request.query_params.get("decrypt_secret") != "false":
        return Answer(_as_windmill(desk, found, await _plain(desk, request, found)))
    return Answer(_as_windmill(desk, found, None))


async def exists(desk: Desk, request: Request) -> Response:
    known_query(request)
    return Answer(await _look(desk, request, request.path_params["path"]) is not None)


async def list_(desk: Desk, request: Request) -> Response:
    """All that this token may read, by path; values of secrets left out."""
    fixed = desk.config().variables
    async with desk.db.read() as tx:
        rows = [row for row in await store.list(tx) if row.path not in fixed]
    rows += [_fixed(desk, path) for path in fixed]
    start = request.query_params.get("path_start", "")
    shown = [
        _as_windmill(desk, row, None if row.is_secret else row.value)
        for row in sorted(rows, key=lambda row: row.path)
        if row.path.startswith(start) and who(request).may(f"variables:read:{row.path}")
    ]
    return Answer(page(request, shown))


async def create(desk: Desk, request: Request) -> Response:
    """201; 400 when it is there already."""
    changing(request)
    given = await fields(request)
    path = new_path(text_of(given, "path"))
    desk.require(request, f"variables:write:{path}")
    if await _look(desk, request, path) is not None:
        raise HTTPException(400, f"Variable {path} already exists")
    secret = given.get("is_secret") is True
    await _put(desk, request, path, text_of(given, "value"), secret, text_of(given, "description", ""))
    return said(f"variable {path} created", 201)


async def update(desk: Desk, request: Request) -> Response:
    """Change value, secrecy, description or path; 404 when there is none."""
    known_query(request, "already_encrypted")
    changing(request)
    given = await fields(request)
    path = request.path_params["path"]
    found = await _find(desk, request, path)
    secret = given.get("is_secret")
    secret = found.is_secret if secret is None else secret is True
    if secret != found.is_secret and given.get("value") is None:
        raise HTTPException(400, "is_secret changes together with the value only: send the value too")
    to = new_path(text_of(given, "path", path))
    desk.require(request, f"variables:write:{to}")
    if to != path and await _look(desk, request, to) is not None:
        raise HTTPException(400, f"Variable {to} already exists")
    value = text_of(given, "value") if given.get("value") is not None else await _plain(desk, request, found)
    await _put(desk, request, to, value, secret, text_of(given, "description", found.description))
    if to != path:
        await desk.db.write(lambda tx: store.delete(tx, path))
    return said(f"variable {to} updated")


async def delete(desk: Desk, request: Request) -> Response:
    changing(request)
    path = request.path_params["path"]
    await _find(desk, request, path)
    if path in desk.config().variables:
        raise HTTPException(400, f"variables.{path} stands in the configuration file: change it there")
    now, by = desk.clock(), who(request).name

    async def remove(tx: Tx) -> None:
        await store.delete(tx, path)
        await audit.note(tx, "variables.delete", path, now, actor=by)

    await desk.db.write(remove)
    return said(f"variable {path} deleted")


def _fixed(desk: Desk, path: str) -> Variable:
    return Variable(path, desk.config().variables[path], False, "in the configuration file", desk.clock())


async def _look(desk: Desk, request: Request, path: str) -> Variable | None:
    async def read() -> Variable | None:
        if path in desk.config().variables:
            return _fixed(desk, path)
        async with desk.db.read() as tx:
            return await store.get(tx, path)

    return await desk.states.patiently(read, job(request))


async def _find(desk: Desk, request: Request, path: str) -> Variable:
    found = await _look(desk, request, path)
    if found is None:
        raise HTTPException(404, f"there is no variable {path}")
    return found


async def _plain(desk: Desk, request: Request, found: Variable) -> str:
    """The value that can be read. That a secret was read is noted first: once for each job and each request else."""
    value = await desk.resolver.variable(found.path)
    session = job(request)
    if not found.is_secret or (session is not None and found.path in session.audited):
        return value
    now, by = desk.clock(), who(request).name
    await desk.db.write(lambda tx: audit.note(tx, "variables.decrypt_secret", found.path, now, actor=by))
    if session is not None:
        session.audited.add(found.path)
    return value


async def _put(desk: Desk, request: Request, path: str, value: str, secret: bool, description: str) -> None:
    if path in desk.config().variables:
        raise HTTPException(400, f"variables.{path} stands in the configuration file: change it there")
    if len(value) > 1024 * 1024:
        raise HTTPException(400, "a variable has 1 MiB at most")
    stored = value
    if secret:
        if desk.key is None:
            raise HTTPException(400, "a secret needs a key, and there is none: `watcher secret new-key` makes one")
        register(value)
        stored = desk.key.encrypt(path, value)
    now, by = desk.clock(), who(request).name

    async def put(tx: Tx) -> None:
        await store.put(tx, path, stored, now, is_secret=secret, description=description)
        await audit.note(tx, "variables.write", path, now, actor=by)

    await desk.db.write(put)


def _as_windmill(desk: Desk, row: Variable, value: str | None) -> Json:
    return {
        "workspace_id": desk.config().workspace,
        "path": row.path,
        "value": value,
        "is_secret": row.is_secret,
        "description": row.description,
        "account": None,
        "is_oauth": False,
        "is_expired": False,
        "is_refreshed": False,
        "is_linked": False,
        "is_draft": False,
        "extra_perms": {},
        "labels": None,
    }
