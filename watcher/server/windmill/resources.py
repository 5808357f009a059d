"""Resources, states among them: a job's own writes are staged, and its reads see them."""

from __future__ import annotations

import time
from functools import partial

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from watcher import log
from watcher.errors import Damaged, StoreError, WatcherError
from watcher.server.windmill.desk import (
    Answer,
    Desk,
    Endpoint,
    body,
    changing,
    fields,
    job,
    known_query,
    new_path,
    page,
    said,
    text_of,
    when,
    who,
)
from watcher.server.windmill.types import fits
from watcher.store import resources as store
from watcher.values import UNSET, Json

_log = log.get("server")

PATIENT = 1.0
"""Seconds that every client waits for an answer."""


def routes(desk: Desk) -> list[BaseRoute]:
    """Under ``/resources``."""
    rooms = [
        ("get_value_interpolated/{path:path}", get_value_interpolated, "read:{path}", "GET"),
        ("get_value/{path:path}", get_value, "read:{path}", "GET"),
        ("get/{path:path}", get, "read:{path}", "GET"),
        ("exists/{path:path}", exists, "read:{path}", "GET"),
        ("history/{path:path}", history, "read:{path}", "GET"),
        ("list", list_, "read", "GET"),
        ("create", create, None, "POST"),
        ("update_value/{path:path}", update_value, "write:{path}", "POST"),
        ("update/{path:path}", update, "write:{path}", "POST"),
        ("delete/{path:path}", delete, "write:{path}", "DELETE"),
    ]
    return [
        desk.route(f"/resources/{path}", partial(_heard, partial(endpoint, desk)), need and f"resources:{need}", method)
        for path, endpoint, need, method in rooms
    ]


async def _heard(endpoint: Endpoint, request: Request) -> Response:
    """The response; a job whose script did not wait for it keeps nothing.

    Clients of 2024 and before give up after five seconds, and then say that there is no state.
    """
    began, session = time.monotonic(), job(request)
    try:
        response = await endpoint(request)
    except (HTTPException, WatcherError):
        raise
    except Exception as error:  # a mistake of ours is no "there is nothing" either
        _log.error("request.failed", path=request.url.path, exc_info=error)
        if session is not None:
            session.fail(f"{request.url.path} could not be answered: the log has the details")
        raise HTTPException(500, "something unforeseen went wrong: the log has the details") from error
    if session is None or time.monotonic() - began < PATIENT:
        return response
    await request.body()  # what was sent comes before the news that nobody listens
    if await request.is_disconnected():
        session.fail(f"its script did not wait for {request.url.path}, which the database was late with")
    return response


# --- reading ----------------------------------------------------------------------------------------------------------


async def get_value_interpolated(desk: Desk, request: Request) -> Response:
    """The value, references in it followed; 404 only when there is truly nothing, and not for as long as the database
    is in trouble. States are never followed: they hold what the outside world said."""
    known_query(request, "job_id", "allow_cache")
    return Answer(await _value(desk, request, followed=True))


async def get_value(desk: Desk, request: Request) -> Response:
    """The value as it is stored."""
    known_query(request)
    return Answer(await _value(desk, request, followed=False))


async def _value(desk: Desk, request: Request, *, followed: bool) -> Json:
    path = request.path_params["path"]
    value = await desk.states.read(path, job(request), followed=followed)
    if value is UNSET:
        raise HTTPException(404, f"there is no resource {path}")
    return value


async def get(desk: Desk, request: Request) -> Response:
    """The whole resource, its value as it is stored."""
    known_query(request)
    path, session = request.path_params["path"], job(request)
    found = await desk.states.patiently(partial(_described, desk, request, path), session)
    if found is None:
        raise HTTPException(404, f"there is no resource {path}")
    return Answer(found)


async def exists(desk: Desk, request: Request) -> Response:
    """true or false. Always as JSON: the TypeScript client takes the text ``false`` for true."""
    known_query(request)
    path = request.path_params["path"]
    found = await desk.states.patiently(partial(_described, desk, request, path), job(request))
    return Answer(found is not None)


async def _described(desk: Desk, request: Request, path: str) -> Json | None:
    session, config = job(request), desk.config()
    described = partial(_as_windmill, config.workspace, path)
    if session is not None and (session.owns(path) or path in session.staged):
        value = session.read(path)
        return None if value is UNSET else described(store.STATE, value, when(session.started_at))
    if desk.states.owner(path) is not None:
        value = await desk.states.read(path)
        return None if value is UNSET else described(store.STATE, value, when(desk.clock()))
    if (fixed := config.resources.get(path)) is not None:
        return described(fixed.type, fixed.value, None, by="the configuration file")
    async with desk.db.read() as tx:
        row = await store.get(tx, path)
    if session is not None and (row is None or row.type == store.STATE):
        session.versions.setdefault(path, row.version if row else 0)
    if row is None:
        return None
    return described(row.type, row.value, when(row.edited_at), row.created_by, row.description)


def _as_windmill(
    workspace: str, path: str, type: str, value: Json, edited_at: str | None, by: str = "watcher", description: str = ""
) -> Json:
    return {
        "workspace_id": workspace,
        "path": path,
        "value": value,
        "description": description,
        "resource_type": type,
        "extra_perms": {},
        "is_oauth": False,
        "is_linked": False,
        "is_draft": False,
        "is_refreshed": False,
        "is_expired": False,
        "created_by": by or "watcher",
        "edited_at": edited_at,
    }


async def list_(desk: Desk, request: Request) -> Response:
    """All that this token may read, by path, values left out; ``resource_type`` (several with commas) and
    ``resource_type_exclude`` choose."""
    query, config = request.query_params, desk.config()
    wanted = [name for name in query.get("resource_type", "").split(",") if name]
    unwanted = query.get("resource_type_exclude", "").split(",")
    async with desk.db.read() as tx:
        rows = await store.list(tx)
    described = partial(_as_windmill, config.workspace)
    found = [
        described(row.path, row.type, None, when(row.edited_at), row.created_by, row.description)
        for row in rows
        if row.path not in config.resources
    ]
    fixed = [described(path, r.type, None, None, "the configuration file") for path, r in config.resources.items()]
    chosen = [
        each
        for each in sorted(found + fixed, key=lambda each: str(each["path"]))
        if (not wanted or each["resource_type"] in wanted)
        and each["resource_type"] not in unwanted
        and each["path"].startswith(query.get("path_start", ""))
        and who(request).may(f"resources:read:{each['path']}")
    ]
    return Answer(page(request, chosen))


async def history(desk: Desk, request: Request) -> Response:
    """Earlier versions, newest first; those of a deleted resource too. (Ours: Windmill keeps none.)"""
    async with desk.db.read() as tx:
        rows = await store.history(tx, request.path_params["path"])
    versions = [
        {"version": row.version, "resource_type": row.type, "value": row.value, "edited_at": when(row.edited_at)}
        for row in rows
    ]
    return Answer(versions)


# --- writing ----------------------------------------------------------------------------------------------------------


async def create(desk: Desk, request: Request) -> Response:
    """201; 400 when it is there already, unless ``update_if_exists=true``."""
    given = await fields(request)
    path, type = new_path(text_of(given, "path")), text_of(given, "resource_type")
    value, description = given.get("value"), text_of(given, "description", "")
    desk.require(request, f"resources:write:{path}")
    found = await desk.states.patiently(partial(_described, desk, request, path), job(request))
    replaced = request.query_params.get("update_if_exists") == "true"
    if found is not None and not replaced:
        raise HTTPException(400, f"Resource {path} already exists")
    await _write(desk, request, path, found["resource_type"] if found else type, value, description)
    return said(f"resource {path} created", 201)


async def update_value(desk: Desk, request: Request) -> Response:
    """200; 404 when there is nothing to update, where Windmill answers 200 and forgets the value."""
    known_query(request)
    given = await body(request)
    value = given.get("value") if isinstance(given, dict) else given
    path = request.path_params["path"]
    found = await _to_change(desk, request, path)
    await _write(desk, request, path, found["resource_type"], value, found["description"])
    return said(f"value of resource {path} updated")


async def update(desk: Desk, request: Request) -> Response:
    """Change value, type, description or path."""
    given = await fields(request)
    path = request.path_params["path"]
    found = await _to_change(desk, request, path)
    to = new_path(text_of(given, "path", path))
    desk.require(request, f"resources:write:{to}")
    if to != path and await desk.states.patiently(partial(_described, desk, request, to), job(request)):
        raise HTTPException(400, f"Resource {to} already exists")
    type = text_of(given, "resource_type", found["resource_type"])
    value = given.get("value", found["value"])
    await _write(desk, request, to, type, value, text_of(given, "description", found["description"]))
    if to != path:
        await _remove(desk, request, path, found["resource_type"])
    return said(f"resource {to} updated")


async def delete(desk: Desk, request: Request) -> Response:
    path = request.path_params["path"]
    found = await _to_change(desk, request, path)
    await _remove(desk, request, path, found["resource_type"])
    return said(f"resource {path} deleted")


async def _to_change(desk: Desk, request: Request, path: str) -> Json:
    try:
        found = await desk.states.patiently(partial(_described, desk, request, path), job(request))
    except Damaged:
        found = {"resource_type": store.STATE, "description": "", "value": None}  # to write it again is the remedy
    if found is None:
        raise HTTPException(404, f"there is no resource {path} to change")
    return found


async def _write(desk: Desk, request: Request, path: str, type: str, value: Json, description: str) -> None:
    session = job(request)
    if type == store.STATE or (session is not None and session.owns(path)):
        await desk.states.write(path, value, session, note=who(request).name)
        return
    changing(request)
    if path in desk.config().resources:
        raise HTTPException(400, f"resources.{path} stands in the configuration file: change it there")
    if desk.states.owner(path) is not None:
        raise HTTPException(400, f"{path} is the memory of a watcher: its type is `state`")
    await fits(desk, type, value)
    now, by = desk.clock(), who(request).name
    await desk.db.write(lambda tx: store.put(tx, path, type, value, now, description=description, by=by))


async def _remove(desk: Desk, request: Request, path: str, type: str) -> None:
    session = job(request)
    if session is not None and session.owns(path):
        session.stage(path, None)  # a watcher's memory has no "nothing" to go back to: to both clients null is that
        return
    if type == store.STATE:
        await desk.states.write(path, UNSET, session, note=who(request).name)
        return
    changing(request)
    if path in desk.config().resources:
        raise HTTPException(400, f"resources.{path} stands in the configuration file: change it there")
    if not await desk.db.write(lambda tx: store.delete(tx, path)):
        raise StoreError(f"resource {path} was deleted by somebody else")
