"""Items that were found, and everything that was ever decided about one key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher import ids
from watcher.errors import Damaged
from watcher.store import checks, deliveries
from watcher.store.deliveries import AttemptView, DeliveryView
from watcher.store.tables import attempt, delivery, item, seen, watcher
from watcher.values import Json


@dataclass(frozen=True, slots=True)
class ItemView:
    """One item as it is shown. ``payload`` is the object {"item", "previous"?, "patch"?}."""

    seq: int
    id: str
    watcher: str
    run_id: int
    key: str
    change: str
    revision: int
    note: str
    found_at: datetime
    payload: Json


@dataclass(frozen=True, slots=True)
class SeenView:
    """What the ledger holds about one key."""

    watcher: str
    key_hash: bytes
    content: bytes
    revision: int
    present: bool
    listed_day: int


@dataclass(frozen=True, slots=True)
class Story:
    """Everything ever decided about one key of one watcher."""

    watcher: str
    key: str
    seen: SeenView | None
    items: tuple[ItemView, ...]
    deliveries: tuple[DeliveryView, ...]
    attempts: tuple[AttemptView, ...]


def _select() -> Select[Any]:
    i = item.c
    return select(
        i.seq, i.id, watcher.c.name.label("watcher"), i.run_id, i.key, i.change, i.revision, i.note, i.found_at,
        i.payload, i.sha256,
    ).join(watcher, watcher.c.id == i.watcher_id)  # fmt: skip


def _view(row: Any) -> ItemView:
    values = dict(row._mapping)
    sha256 = values.pop("sha256")
    if checks.of_item(row.id, row.key, row.change, row.revision, row.payload) != sha256:
        raise Damaged(f"item {row.id} is not what was written: the disk damaged it. It is never sent")
    values["payload"] = json.loads(row.payload)
    return ItemView(**values)


async def list(
    tx: AsyncConnection,
    watcher_name: str | None = None,
    *,
    run_id: int | None = None,
    limit: int = 50,
    before: int | None = None,
) -> Sequence[ItemView]:
    """Newest first; ``before`` is the `seq` of the last one that was seen. Raises Damaged."""
    statement = _select().order_by(item.c.seq.desc()).limit(limit)
    if watcher_name is not None:
        statement = statement.where(watcher.c.name == watcher_name)
    if run_id is not None:
        statement = statement.where(item.c.run_id == run_id)
    if before is not None:
        statement = statement.where(item.c.seq < before)
    return [_view(row) for row in await tx.execute(statement)]


async def get(tx: AsyncConnection, id: str) -> ItemView | None:
    """One item by its id. Raises Damaged."""
    row = (await tx.execute(_select().where(item.c.id == id))).first()
    return None if row is None else _view(row)


async def why(tx: AsyncConnection, watcher_name: str | None, key: str) -> Sequence[Story]:
    """Everything about a key: the ledger's row, its items, their deliveries and attempts; one story per watcher.

    ``key`` may also be an item's id or a delivery's id. Empty when nothing is known.
    """
    key = await _key_of(tx, key)
    hashed = ids.key_hash(key)
    w = select(watcher.c.id, watcher.c.name).order_by(watcher.c.name)
    if watcher_name is not None:
        w = w.where(watcher.c.name == watcher_name)
    stories = [await _story(tx, number, name, key, hashed) for number, name in (await tx.execute(w)).all()]
    return [story for story in stories if story.seen or story.items]


async def _key_of(tx: AsyncConnection, text: str) -> str:
    by_id = select(item.c.key).where(item.c.id == text)
    by_delivery = select(item.c.key).join(delivery, delivery.c.item_seq == item.c.seq)
    for statement in (by_id, by_delivery.where(delivery.c.id == text)):
        key = (await tx.execute(statement)).scalar_one_or_none()
        if key is not None:
            return str(key)
    return text


async def _story(tx: AsyncConnection, number: int, name: str, key: str, hashed: bytes) -> Story:
    s = seen.c
    met = (await tx.execute(select(seen).where(s.watcher_id == number, s.key_hash == hashed))).first()
    rows = await tx.execute(
        _select().where(item.c.watcher_id == number, item.c.key_hash == hashed).order_by(item.c.seq)
    )
    found = tuple(_view(row) for row in rows)
    owed = tuple(await deliveries.of_items(tx, [i.seq for i in found]))
    tried = await tx.execute(
        select(attempt).where(attempt.c.delivery_seq.in_([d.seq for d in owed])).order_by(attempt.c.id)
    )
    return Story(
        watcher=name,
        key=key,
        seen=None
        if met is None
        else SeenView(name, met.key_hash, met.content, met.revision, bool(met.present), met.listed_day),
        items=found,
        deliveries=owed,
        attempts=tuple(AttemptView(**row._mapping) for row in tried),
    )
