"""Resources and resource types: typed JSON objects at paths, with their earlier versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete as delete_from
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher import ids
from watcher.errors import Conflict, Damaged
from watcher.store.db import micros, run_sql
from watcher.store.tables import resource, resource_history, resource_type
from watcher.values import UNSET, Json, StagedState

STATE = "state"
"""The resource type of what scripts remember."""


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource, as it is stored: references in its value are not resolved."""

    path: str
    type: str
    value: Json
    version: int
    description: str
    created_by: str
    edited_at: datetime


@dataclass(frozen=True, slots=True)
class ResourceVersion:
    """One version of a resource, as the history lists it."""

    path: str
    version: int
    type: str
    value: Json
    edited_at: datetime


@dataclass(frozen=True, slots=True)
class ResourceType:
    """A resource type of the user's own."""

    name: str
    json_schema: Json
    description: str
    edited_at: datetime


def _resource(row: Any) -> Resource:
    if hashlib.sha256(row.value).digest() != row.sha256:
        raise Damaged(f"resource {row.path} is not what was written: the disk damaged it. Write it again")
    value = json.loads(row.value)
    return Resource(row.path, row.resource_type, value, row.version, row.description, row.created_by, row.edited_at)


async def get(tx: AsyncConnection, path: str) -> Resource | None:
    """Raises Damaged."""
    row = (await tx.execute(select(resource).where(resource.c.path == path))).first()
    return None if row is None else _resource(row)


async def list(tx: AsyncConnection, type: str | None = None) -> Sequence[Resource]:
    """All, or all of one type, by path. Raises Damaged."""
    statement = select(resource).order_by(resource.c.path)
    if type is not None:
        statement = statement.where(resource.c.resource_type == type)
    return [_resource(row) for row in await tx.execute(statement)]


async def put(
    tx: AsyncConnection,
    path: str,
    type: str,
    value: Json,
    now: datetime,
    *,
    description: str = "",
    by: str = "",
    expected: int | None = None,
    keep: int = 100,
) -> int:
    """Create or replace a resource. Returns its version.

    ``expected`` is the version that must still be in force (0: none). Raises Conflict.
    """
    r, h = resource.c, resource_history.c
    found = select(r.version).where(r.path == path).with_for_update()
    current = (await tx.execute(found)).scalar_one_or_none() or 0
    if expected is not None and expected != current:
        raise Conflict(f"resource {path} is at version {current}, not {expected}: read it again, then repeat the edit")
    last = select(h.version).where(h.path == path).order_by(h.version.desc()).limit(1)
    version = ((await tx.execute(last)).scalar_one_or_none() or 0) + 1
    body = ids.canonical(value)
    values = {
        "resource_type": type, "value": body, "sha256": hashlib.sha256(body).digest(), "version": version,
        "description": description, "edited_at": now,
    }  # fmt: skip
    if current:
        await tx.execute(update(resource).where(r.path == path).values(values))
    else:
        await tx.execute(insert(resource).values(path=path, created_by=by, **values))
    await tx.execute(
        insert(resource_history).values(path=path, version=version, resource_type=type, value=body, edited_at=now)
    )
    await tx.execute(delete_from(resource_history).where(h.path == path, h.version <= version - keep))
    return version


async def put_states(tx: AsyncConnection, states: Iterable[StagedState], now: datetime, *, by: str) -> None:
    """Write what a job staged. Raises Conflict when a state is no longer the one that the job read."""
    for state in states:
        if state.value is UNSET:
            await delete(tx, state.path)
        else:
            await put(tx, state.path, STATE, state.value, now, by=by, expected=state.expected)


async def history(tx: AsyncConnection, path: str, limit: int = 100) -> Sequence[ResourceVersion]:
    """Newest first; those of a deleted resource too."""
    h = resource_history.c
    rows = await tx.execute(select(resource_history).where(h.path == path).order_by(h.version.desc()).limit(limit))
    return [
        ResourceVersion(row.path, row.version, row.resource_type, json.loads(row.value), row.edited_at) for row in rows
    ]


async def delete(tx: AsyncConnection, path: str) -> bool:
    """False: there was none."""
    return bool((await tx.execute(delete_from(resource).where(resource.c.path == path))).rowcount)


# --- types ------------------------------------------------------------------------------------------------------------


def _type(row: Any) -> ResourceType:
    return ResourceType(row.name, json.loads(row.json_schema), row.description, row.edited_at)


async def get_type(tx: AsyncConnection, name: str) -> ResourceType | None:
    row = (await tx.execute(select(resource_type).where(resource_type.c.name == name))).first()
    return None if row is None else _type(row)


async def list_types(tx: AsyncConnection) -> Sequence[ResourceType]:
    return [_type(row) for row in await tx.execute(select(resource_type).order_by(resource_type.c.name))]


async def put_type(tx: AsyncConnection, name: str, json_schema: Json, now: datetime, *, description: str = "") -> None:
    await run_sql(
        tx,
        "INSERT INTO resource_type (name, json_schema, description, edited_at) VALUES (?, ?, ?, ?) ON CONFLICT (name) "
        "DO UPDATE SET json_schema = excluded.json_schema, description = excluded.description, "
        "edited_at = excluded.edited_at",
        (name, ids.canonical(json_schema), description, micros(now)),
    )


async def delete_type(tx: AsyncConnection, name: str) -> bool:
    return bool((await tx.execute(delete_from(resource_type).where(resource_type.c.name == name))).rowcount)
