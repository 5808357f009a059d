"""Resource types: those that come with watcher, and the user's own."""

from __future__ import annotations

from functools import partial

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from watcher import resource_types
from watcher.server.windmill.desk import Answer, Desk, changing, fields, known_query, new_path, said, text_of, when
from watcher.store import resources as store
from watcher.values import Json


def routes(desk: Desk) -> list[BaseRoute]:
    """Under ``/resources/type``."""
    rooms = [
        ("list", list_, "read", "GET"),
        ("listnames", list_names, "read", "GET"),
        ("get/{path}", get, "read", "GET"),
        ("exists/{path}", exists, "read", "GET"),
        ("create", create, "write", "POST"),
        ("update/{path}", update, "write", "POST"),
        ("delete/{path}", delete, "write", "DELETE"),
    ]
    return [
        desk.route(f"/resources/type/{path}", partial(endpoint, desk), f"resource_types:{need}", method)
        for path, endpoint, need, method in rooms
    ]


async def fits(desk: Desk, type: str, value: Json) -> None:
    """Raise Unfit when the type is known and the value is none. Other names are names only, as in Windmill."""
    found = await _find(desk, type)
    if found is not None:
        await resource_types.fits(type, found["schema"], value)


async def list_(desk: Desk, request: Request) -> Response:
    return Answer([*(await _all(desk)).values()])


async def list_names(desk: Desk, request: Request) -> Response:
    return Answer([*await _all(desk)])


async def get(desk: Desk, request: Request) -> Response:
    found = await _find(desk, request.path_params["path"])
    if found is None:
        raise HTTPException(404, f"there is no resource type {request.path_params['path']}")
    return Answer(found)


async def exists(desk: Desk, request: Request) -> Response:
    known_query(request)
    return Answer(await _find(desk, request.path_params["path"]) is not None)


async def create(desk: Desk, request: Request) -> Response:
    changing(request)
    given = await fields(request)
    name, schema = new_path(text_of(given, "name")), given.get("schema") or {}
    if "/" in name:
        raise HTTPException(400, "the name of a resource type holds no /")
    if await _find(desk, name) is not None:
        raise HTTPException(400, f"Resource type {name} already exists")
    await _put(desk, name, schema, text_of(given, "description", ""))
    return said(f"resource_type {name} created", 201)


async def update(desk: Desk, request: Request) -> Response:
    changing(request)
    given = await fields(request)
    found = await _own(desk, request.path_params["path"])
    schema, description = given.get("schema", found["schema"]), text_of(given, "description", found["description"])
    await _put(desk, found["name"], schema, description)
    return said(f"resource_type {found['name']} updated")


async def delete(desk: Desk, request: Request) -> Response:
    changing(request)
    found = await _own(desk, request.path_params["path"])
    await desk.db.write(lambda tx: store.delete_type(tx, found["name"]))
    return said(f"resource_type {found['name']} deleted")


async def _put(desk: Desk, name: str, schema: Json, description: str) -> None:
    resource_types.check_schema(name, schema)
    now = desk.clock()
    await desk.db.write(lambda tx: store.put_type(tx, name, schema, now, description=description))


async def _own(desk: Desk, name: str) -> Json:
    if name in resource_types.SHIPPED:
        raise HTTPException(400, f"the resource type {name} comes with watcher: make one of another name")
    found = await _find(desk, name)
    if found is None:
        raise HTTPException(404, f"there is no resource type {name}")
    return found


async def _find(desk: Desk, name: str) -> Json | None:
    workspace = desk.config().workspace
    if name in resource_types.SHIPPED:
        description, schema = resource_types.SHIPPED[name]
        return _as_windmill(workspace, name, schema, description, None)
    async with desk.db.read() as tx:
        row = await store.get_type(tx, name)
    return row and _as_windmill(workspace, row.name, row.json_schema, row.description, when(row.edited_at))


async def _all(desk: Desk) -> dict[str, Json]:
    workspace = desk.config().workspace
    shipped = {
        name: _as_windmill(workspace, name, schema, description, None)
        for name, (description, schema) in resource_types.SHIPPED.items()
    }
    async with desk.db.read() as tx:
        rows = await store.list_types(tx)
    own = {
        row.name: _as_windmill(workspace, row.name, row.json_schema, row.description, when(row.edited_at))
        for row in rows
    }
    return dict(sorted({**own, **shipped}.items()))


def _as_windmill(workspace: str, name: str, schema: Json, description: str, edited_at: str | None) -> Json:
    return {
        "workspace_id": workspace,
        "name": name,
        "schema": schema,
        "description": description,
        "created_by": "watcher",
        "edited_at": edited_at,
        "format_extension": None,
        "is_fileset": False,
    }
