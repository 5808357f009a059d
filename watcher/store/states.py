"""What each watcher remembers between runs: one checked value, its versions, and compare-and-set."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from datetime import datetime
from importlib import import_module
from typing import Any, Protocol

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher import ids
from watcher.errors import Conflict, Damaged, ObjectsError, StoreError
from watcher.store import checks, watchers
from watcher.store.db import Database, is_postgres, run_sql
from watcher.store.tables import seen, state, state_history
from watcher.values import UNSET, Memory

LARGE = 4 * 1024 * 1024
"""Bytes of a state that stands in its row; a larger one becomes an object."""


@dataclass(frozen=True, slots=True)
class StateVersion:
    """One version of a watcher's memory, as the history lists it."""

    version: int
    at: datetime
    run_id: int | None
    note: str
    size: int  # bytes


def encode(memory: Memory) -> bytes:
    """Canonical JSON of all but the version. Raises ValueError or TypeError when the state is not JSON."""
    body = {f.name: getattr(memory, f.name) for f in fields(Memory) if f.name != "version"}
    if body["state"] is UNSET:
        del body["state"]
    if not body["state_at"]:
        del body["state_at"]
    return ids.canonical(_plain(body))


def _plain(value: Any) -> Any:
    """Mappings that are not dicts (a MappingProxy, say) are objects in JSON too."""
    return {k: dict(v) if hasattr(v, "items") and not isinstance(v, dict) else v for k, v in value.items()}


def decode(version: int, body: bytes) -> Memory:
    """The reverse of `encode`. What a newer version of the program added is dropped."""
    names = {f.name for f in fields(Memory)}
    return Memory(version=version, **{k: v for k, v in json.loads(body).items() if k in names})


def _verified(name: str, version: int, body: bytes, sha256: bytes) -> Memory:
    if checks.of_state(version, body) != sha256:
        raise Damaged(
            f"watchers.{name}: the stored state (version {version}) is not what was written: the disk damaged it. "
            f"Nothing was compared with it. `watcher state history {name}` and `watcher state rollback {name}` help"
        )
    return decode(version, body)


# --- states that are too large to stand in a row ----------------------------------------------------------------------


class Attic(Protocol):
    """Where large states are; `watcher.objects.stow.Stowage`."""

    async def state(self, body: bytes) -> str: ...

    async def whole(self, key: str) -> bytes: ...


async def whole(db: Database, memory: Memory) -> Memory:
    """The memory with its state, wherever that is. Never call it in a transaction. Raises Damaged, StoreError."""
    if not memory.state_at:
        return memory
    if db.attic is None:
        raise StoreError("this state is kept in the object storage: ask the service, which can reach it")
    try:
        state = json.loads(await db.attic.whole(memory.state_at))
    except ObjectsError as error:  # that it cannot be read is never that there is none
        raise StoreError(f"a state that is kept in the object storage cannot be read: {error}") from error
    return replace(memory, state=state, state_at="")


async def apart(db: Database, memory: Memory) -> Memory:
    """The memory as it is to be written: a state above `LARGE` is stowed first. Never call it in a transaction.

    Raises StoreError when it cannot be, ValueError or TypeError when the state is not JSON.
    """
    if db.attic is None or memory.state is UNSET or isinstance(memory.state, int | float | bool | None):
        return memory
    body = ids.canonical(memory.state)
    if len(body) <= LARGE:
        return memory
    try:
        return replace(memory, state=UNSET, state_at=await db.attic.state(body))
    except ObjectsError as error:
        if error.kind == "no_storage":
            return memory
        raise StoreError(f"a state of {len(body)} bytes cannot be stored: {error}") from error


async def stowed(db: Database) -> set[str]:
    """The objects that any version of any memory speaks of."""
    found: set[str] = set()
    async with db.read() as tx:
        has = "position(?::bytea in body)" if is_postgres(tx) else "instr(body, ?)"
        for table in ("state", "state_history"):
            rows = await run_sql(tx, f"SELECT body FROM {table} WHERE {has} > 0", (b'"state_at":',))  # noqa: S608
            found |= {str(json.loads(body).get("state_at", "")) for body in rows.scalars()}
    return found


# --- one watcher's memory ---------------------------------------------------------------------------------------------


async def load(tx: AsyncConnection, name: str) -> Memory:
    """The newest memory as it is stored (see `whole`); version 0 when nothing was ever committed.

    Raises Damaged, StoreError.
    """
    number = await watchers.ident(tx, name)
    row = (await tx.execute(select(state).where(state.c.watcher_id == number))).first()
    return Memory() if row is None else _verified(name, row.version, row.body, row.sha256)


async def history(tx: AsyncConnection, name: str, limit: int = 100) -> list[StateVersion]:
    """Newest first."""
    number = await watchers.ident(tx, name)
    h = state_history.c
    rows = await tx.execute(
        select(h.version, h.at, h.run_id, h.note, func.length(h.body).label("size"))
        .where(h.watcher_id == number)
        .order_by(h.version.desc())
        .limit(limit)
    )
    return [StateVersion(**row._mapping) for row in rows]


async def version(tx: AsyncConnection, name: str, n: int) -> Memory:
    """One earlier version. Raises StoreError when it is no longer (or not yet) there, Damaged."""
    number = await watchers.ident(tx, name)
    h = state_history.c
    row = (await tx.execute(select(state_history).where(h.watcher_id == number, h.version == n))).first()
    if row is None:
        raise StoreError(f"watchers.{name}: no version {n} of its state is kept: see `watcher state history {name}`")
    return _verified(name, n, row.body, row.sha256)


async def put(
    tx: AsyncConnection,
    name: str,
    memory: Memory,
    expected: int,
    now: datetime,
    run_id: int | None = None,
    note: str = "",
    keep: int = 100,
) -> int:
    """Write a new version if the newest is still ``expected`` (0: none). Returns its number. Raises Conflict.

    A rollback is a `put` of an old version: what happened in between stays in the history.
    """
    number = await watchers.ident(tx, name)
    return await swap(tx, number, name, memory, expected, now, run_id, note, keep)


async def swap(
    tx: AsyncConnection,
    number: int,
    name: str,
    memory: Memory,
    expected: int,
    now: datetime,
    run_id: int | None,
    note: str,
    keep: int,
) -> int:
    """`put` for who knows the watcher's number already."""
    new = expected + 1 if expected else await _newest(tx, number) + 1
    body = encode(memory)
    values = {"version": new, "body": body, "sha256": checks.of_state(new, body), "run_id": run_id, "at": now}
    if expected:
        statement: Any = update(state).where(state.c.watcher_id == number, state.c.version == expected).values(values)
    else:
        statement = _insert(tx)(state).values(watcher_id=number, **values).on_conflict_do_nothing()
    if (await tx.execute(statement.returning(state.c.version))).first() is None:
        raise Conflict(f"watchers.{name}: another run committed first; this one is dropped and nothing of it is kept")
    await tx.execute(insert(state_history).values(watcher_id=number, note=note, **values))
    h = state_history.c
    await tx.execute(delete(state_history).where(h.watcher_id == number, h.version <= new - max(keep, 1)))
    return new


def _insert(tx: AsyncConnection) -> Any:
    """The dialect's own, which knows ON CONFLICT; imported here, because loading PostgreSQL's takes a while."""
    return import_module(f"sqlalchemy.dialects.{tx.dialect.name}").insert


async def _newest(tx: AsyncConnection, number: int) -> int:
    """No version is given twice, not even after a reset: a run that began before it must not pass for a new one."""
    h = state_history.c
    return int((await tx.execute(select(func.max(h.version)).where(h.watcher_id == number))).scalar() or 0)


async def reset(tx: AsyncConnection, name: str, now: datetime) -> None:
    """Forget the memory and every seen key: the next run is a first run. The history keeps the versions before."""
    number = await watchers.ident(tx, name)
    removed = await tx.execute(delete(state).where(state.c.watcher_id == number))
    await tx.execute(delete(seen).where(seen.c.watcher_id == number))
    if removed.rowcount:
        new = await _newest(tx, number) + 1
        body = encode(Memory())
        digest = checks.of_state(new, body)
        await tx.execute(
            insert(state_history).values(
                watcher_id=number,
                version=new,
                body=body,
                sha256=digest,
                run_id=None,
                at=now,
                note="reset",
            )
        )
