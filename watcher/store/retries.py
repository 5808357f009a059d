"""One bulk retry at a time: how far it has come, and whether somebody wants it stopped."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.errors import StoreError
from watcher.store import meta

_NAME = "bulk_retry"
_GONE = timedelta(minutes=2)
"""Whoever was at work has not been heard of for so long: it was killed."""


@dataclass(frozen=True, slots=True)
class BulkRetry:
    """A bulk retry that is at work."""

    id: str
    total: int
    done: int
    started_at: datetime
    heard_at: datetime
    stop: bool = False


async def current(tx: AsyncConnection, now: datetime) -> BulkRetry | None:
    """The one at work, if there is one."""
    text = await meta.get(tx, _NAME)
    if not text:
        return None
    told = json.loads(text)
    at = {name: datetime.fromisoformat(told[name]) for name in ("started_at", "heard_at")}
    bulk = BulkRetry(**{**told, **at})
    return bulk if now - bulk.heard_at < _GONE else None


async def begin(tx: AsyncConnection, total: int, now: datetime) -> str:
    """Note that so many deliveries are about to be made due. Returns its id. Raises StoreError when one is at work."""
    other = await current(tx, now)
    if other:
        raise StoreError(
            f"another retry is at work, {other.done} of {other.total}: wait for it, or `watcher retry --stop`"
        )
    bulk = BulkRetry(uuid.uuid4().hex, total, 0, now, now)
    await _put(tx, bulk)
    return bulk.id


async def go_on(tx: AsyncConnection, id: str, now: datetime) -> bool:
    """Whether the next part may be done: it is still the one at work, and nobody wants it stopped."""
    bulk = await current(tx, now)
    return bulk is None or (bulk.id == id and not bulk.stop)


async def note(tx: AsyncConnection, id: str, more: int, now: datetime) -> None:
    """So many more are due."""
    bulk = await current(tx, now)
    if bulk and bulk.id == id:
        await _put(tx, replace(bulk, done=bulk.done + more, heard_at=now))


async def stop(tx: AsyncConnection, now: datetime) -> BulkRetry | None:
    """Ask the one at work to stop before its next part. What it did so far stays done."""
    bulk = await current(tx, now)
    if bulk:
        await _put(tx, replace(bulk, stop=True))
    return bulk


async def end(tx: AsyncConnection, id: str, now: datetime) -> int:
    """It is over. Returns how many it made due."""
    bulk = await current(tx, now)
    if bulk is None or bulk.id != id:
        return 0
    await meta.put(tx, _NAME, "")
    return bulk.done


async def _put(tx: AsyncConnection, bulk: BulkRetry) -> None:
    await meta.put(tx, _NAME, json.dumps(asdict(bulk), default=datetime.isoformat))
