"""What may be forgotten after a while, and never what is still owed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, delete, exists, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.store import seen, watchers
from watcher.store.db import Database
from watcher.store.tables import attempt, audit, delivery, item, job, meta, run, token, watcher

KEEP_DEAD = timedelta(days=90)
_OVER = ("succeeded", "failed", "canceled")


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows were dropped."""

    runs: int = 0
    items: int = 0
    deliveries: int = 0
    attempts: int = 0
    jobs: int = 0

    @property
    def total(self) -> int:
        return self.runs + self.items + self.deliveries + self.attempts + self.jobs


async def prune(
    tx: AsyncConnection,
    name: str,
    *,
    keep_runs: timedelta,
    now: datetime,
    limit: int = 1000,
    keep_dead: timedelta = KEEP_DEAD,
) -> Pruned:
    """Drop up to ``limit`` items of one watcher's old runs with their deliveries, and the runs that are empty then.

    An item stays while any of its deliveries is pending, or dead for less than ``keep_dead``. The ledger is not
    touched: what the source still lists is never new again. Call it again while it drops something.
    """
    number = await watchers.ident(tx, name)
    i, d, r = item.c, delivery.c, run.c
    old = now - keep_runs
    owed = exists(
        select(d.seq).where(
            d.item_seq == i.seq, or_(d.status == 0, and_(d.status == 2, d.settled_at > now - keep_dead))
        )
    )
    stale = (
        select(i.seq)
        .join(run, r.id == i.run_id)
        .where(r.watcher_id == number, r.finished_at < old, ~owed)
        .order_by(i.seq)
        .limit(limit)
    )
    items = [*(await tx.execute(stale)).scalars()]
    deliveries = [*(await tx.execute(select(d.seq).where(d.item_seq.in_(items)))).scalars()] if items else []
    attempts = await _drop(tx, attempt.c.delivery_seq, deliveries)
    await _drop(tx, d.seq, deliveries)
    await _drop(tx, i.seq, items)
    waits = select(watcher.c.quarantine_run).where(watcher.c.id == number, watcher.c.quarantine_run.is_not(None))
    empty = (
        select(r.id)
        .where(r.watcher_id == number, r.finished_at < old, ~exists(select(i.seq).where(i.run_id == r.id)))
        .where(r.id.not_in(waits))
        .order_by(r.id)
        .limit(limit)
    )
    runs = [*(await tx.execute(empty)).scalars()]
    await _drop(tx, r.id, runs)
    return Pruned(len(runs), len(items), len(deliveries), attempts)


async def prune_jobs(tx: AsyncConnection, *, keep: timedelta, now: datetime, limit: int = 1000) -> Pruned:
    """Drop jobs that ended before ``keep``, tokens that have expired, and the audit of a year ago."""
    j = job.c
    old = select(j.id).where(j.status.in_(_OVER), j.finished_at < now - keep).limit(limit)
    ended = [*(await tx.execute(old)).scalars()]
    await _drop(tx, j.id, ended)
    for id in ended:
        await tx.execute(delete(meta).where(meta.c.name.startswith(f"user_state:{id}:")))
    await tx.execute(delete(token).where(token.c.expires_at < now))
    await tx.execute(delete(audit).where(audit.c.at < now - timedelta(days=365)))
    return Pruned(jobs=len(ended))


async def _drop(tx: AsyncConnection, column: Any, values: Sequence[Any]) -> int:
    dropped = 0
    for start in range(0, len(values), 500):
        some = values[start : start + 500]
        dropped += (await tx.execute(delete(column.table).where(column.in_(some)))).rowcount
    return dropped


async def forget(db: Database, name: str, *, forget_after: timedelta, limit: int = 5000) -> int:
    """Forget the keys that the source has not listed for ``forget_after`` (whole days). Returns how many.

    Counted back from the last day on which a listing was noted by `seen.touch`; see `seen.unlisted`.
    The search is a read: the writer is only held for what is dropped.
    """
    days = max(1, forget_after.days)
    async with db.read() as tx:
        before, keys = await seen.unlisted(tx, name, days, limit)
    if not keys:
        return 0
    return await db.write(lambda tx: seen.forget(tx, name, keys, before))
