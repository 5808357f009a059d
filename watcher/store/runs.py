"""Runs: the one transaction that commits what a run found, and the record of how runs ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, case, exists, insert, literal, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.errors import StoreError
from watcher.failpoint import failpoint
from watcher.store import checks, deliveries, resources, seen, states, watchers
from watcher.store.db import insert_many, micros, serials
from watcher.store.tables import item, run, watcher
from watcher.values import Json, NewItem, Proposal, RunRecord

_ITEM_COLUMNS = (
    "seq", "id", "watcher_id", "run_id", "key", "key_hash", "change", "revision", "content", "payload", "sha256",
    "note", "found_at",
)  # fmt: skip
_LONGEST = {"error": 2_000, "detail": 8_192, "logs": 65_536, "gap": 2_000}


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit wrote. Items and deliveries that existed already (a replay) are not counted again."""

    run_id: int
    version: int
    items: int
    deliveries: int


@dataclass(frozen=True, slots=True)
class RunView:
    """One recorded run."""

    id: int
    watcher: str
    outcome: str
    started_at: datetime
    finished_at: datetime
    tick_at: datetime | None
    state_version: int | None
    counts: Json
    error_kind: str
    error: str
    detail: str
    logs: str
    gap: str
    warnings: Json


async def commit(tx: AsyncConnection, proposal: Proposal) -> Committed:
    """Write the new memory, the ledger, the run, its items and its deliveries, all or nothing.

    Raises Conflict when the memory is no longer at ``proposal.expected``; StoreError for an unknown watcher.
    """
    name, record = proposal.watcher, proposal.run
    number = await watchers.ident(tx, name)
    run_id = await _insert(tx, number, record, proposal.expected + 1)
    version = await states.swap(
        tx, number, name, proposal.memory, proposal.expected, record.finished_at, run_id, record.outcome,
        proposal.keep_history,
    )  # fmt: skip
    failpoint("after_state_write")
    await resources.put_states(tx, proposal.states, record.finished_at, by=f"watchers.{name}")
    await seen.learn(tx, number, proposal.learn)
    await seen.touch(tx, number, proposal.touch, seen.day_of(record.finished_at))
    written, owed = await _insert_items(tx, number, run_id, proposal.items, record.finished_at)
    await _went_well(tx, number, record, found=bool(written))
    failpoint("before_commit")
    return Committed(run_id, version, written, owed)


async def _insert_items(
    tx: AsyncConnection, number: int, run_id: int, found: Sequence[NewItem], at: datetime
) -> tuple[int, int]:
    """Insert items, then what is owed of them. An item id that exists already is the same item: it stays as it is."""
    if not found:
        return 0, 0
    # After the compare-and-set: whoever waits for it gets higher numbers, so a lane's order is the commits' order.
    numbers: Sequence[int] = await serials(tx, item, len(found))
    stamp = micros(at)
    rows = [
        (
            seq, i.id, number, run_id, i.key, i.key_hash, i.change, i.revision, i.content, i.payload,
            checks.of_item(i.id, i.key, i.change, i.revision, i.payload), i.note, stamp,
        )
        for seq, i in zip(numbers, found, strict=True)
    ]  # fmt: skip
    written = await insert_many(tx, item, _ITEM_COLUMNS, rows, "ON CONFLICT DO NOTHING")
    failpoint("mid_outbox")
    if written != len(found):
        known = await _numbers_of(tx, [i.id for i in found])
        numbers = [known[i.id] for i in found]
    owed = [(seq, d) for seq, i in zip(numbers, found, strict=True) for d in i.deliveries]
    return written, await deliveries.owe(tx, number, owed, at)


async def _numbers_of(tx: AsyncConnection, item_ids: Sequence[str]) -> dict[str, int]:
    known: dict[str, int] = {}
    for start in range(0, len(item_ids), 1000):
        some = item_ids[start : start + 1000]
        known.update(
            (row.id, row.seq) for row in await tx.execute(select(item.c.id, item.c.seq).where(item.c.id.in_(some)))
        )
    return known


async def _went_well(tx: AsyncConnection, number: int, record: RunRecord, *, found: bool) -> None:
    w = watcher.c
    values: dict[str, Any] = {"checked_at": record.finished_at, "success_at": record.finished_at, **watchers.WELL}
    if record.tick_at is not None:
        taken = literal(record.tick_at, w.tick_at.type)  # in a CASE, a bare value would take the driver's own form
        values["tick_at"] = case((or_(w.tick_at.is_(None), w.tick_at < taken), taken), else_=w.tick_at)
    if found:
        values["found_at"] = record.finished_at
    if record.outcome == "approved":
        values.update(watchers.AT_LARGE)
    await tx.execute(update(watcher).where(w.id == number).values(values))


async def record(tx: AsyncConnection, record: RunRecord) -> int:
    """Record a run that committed nothing: it failed, was quarantined, or lost the race. Returns its id."""
    return await _insert(tx, await watchers.ident(tx, record.watcher), record, None)


async def _insert(tx: AsyncConnection, number: int, record: RunRecord, version: int | None) -> int:
    values = {
        "watcher_id": number,
        "outcome": record.outcome,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "tick_at": record.tick_at,
        "state_version": version,
        "counts": json.dumps(dict(record.counts)),
        "error_kind": record.error_kind,
        "error": record.error[:2_000],
        "detail": record.detail[:8_192],
        "logs": record.logs[-65_536:],
        "gap": record.gap[:2_000],
        "warnings": json.dumps(record.warnings),
        "plan": record.plan or None,
    }
    result = await tx.execute(insert(run).values(values).returning(run.c.id))
    return int(result.scalar_one())


def _select() -> Select[Any]:
    columns = [c for c in run.c if c.name not in ("watcher_id", "plan")]
    return select(watcher.c.name.label("watcher"), *columns).join(watcher, watcher.c.id == run.c.watcher_id)


def _view(row: Any) -> RunView:
    values = dict(row._mapping)
    return RunView(**{**values, "counts": json.loads(row.counts), "warnings": json.loads(row.warnings)})


async def list(
    tx: AsyncConnection, name: str | None = None, limit: int = 50, before: int | None = None
) -> Sequence[RunView]:
    """Newest first, of one watcher or of all; ``before`` is the id of the last one that was seen."""
    statement = _select().order_by(run.c.id.desc()).limit(limit)
    if name is not None:
        statement = statement.where(run.c.watcher_id == await watchers.ident(tx, name))
    if before is not None:
        statement = statement.where(run.c.id < before)
    return [_view(row) for row in await tx.execute(statement)]


async def get(tx: AsyncConnection, id: int) -> RunView | None:
    row = (await tx.execute(_select().where(run.c.id == id))).first()
    return None if row is None else _view(row)


async def finds(tx: AsyncConnection, watcher_id: int, limit: int) -> Sequence[datetime]:
    """When a watcher's newest runs that found items ended, newest first."""
    statement = (
        select(run.c.finished_at)
        .where(run.c.watcher_id == watcher_id, exists().where(item.c.run_id == run.c.id))
        .order_by(run.c.id.desc())
        .limit(limit)
    )
    return [*(await tx.execute(statement)).scalars()]


async def first(tx: AsyncConnection, watcher_id: int) -> datetime | None:
    """When the oldest run of a watcher that is still on record ended."""
    statement = select(run.c.finished_at).where(run.c.watcher_id == watcher_id).order_by(run.c.id).limit(1)
    at: datetime | None = (await tx.execute(statement)).scalar_one_or_none()
    return at


async def plan(tx: AsyncConnection, id: int) -> bytes:
    """What a quarantined run wanted to commit. Raises StoreError when that run left no plan."""
    body = (await tx.execute(select(run.c.plan).where(run.c.id == id))).scalar_one_or_none()
    if body is None:
        raise StoreError(f"run {id} left no plan to approve: it was pruned, or it was not quarantined")
    return bytes(body)
