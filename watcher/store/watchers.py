"""Watchers as the database knows them: who they are, how they fare, whether they may run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import bindparam, case, func, literal, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.errors import StoreError
from watcher.store.db import insert_many
from watcher.store.tables import watcher

WELL: Mapping[str, Any] = {"failures": 0, "failing_since": None, "last_error": "", "backoff_until": None}
AT_LARGE: Mapping[str, Any] = {"quarantined_at": None, "quarantine_reason": "", "quarantine_run": None}


@dataclass(frozen=True, slots=True)
class WatcherStatus:
    """One watcher's row, read only."""

    id: int
    name: str
    origin: str  # goes into item ids in place of the name: it survives a renaming
    paused_at: datetime | None = None
    pause_reason: str = ""
    quarantined_at: datetime | None = None
    quarantine_reason: str = ""
    quarantine_run: int | None = None
    failures: int = 0
    failing_since: datetime | None = None
    last_error: str = ""
    backoff_until: datetime | None = None
    tick_at: datetime | None = None
    checked_at: datetime | None = None
    success_at: datetime | None = None
    found_at: datetime | None = None
    quiet_runs: int = 0
    skipped_ticks: int = 0
    missed_ticks: int = 0
    gone_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Quiet:
    """What quiet runs left in memory, to be added to a watcher's row."""

    checked_at: datetime | None = None
    success_at: datetime | None = None
    tick_at: datetime | None = None
    quiet_runs: int = 0
    skipped: int = 0
    missed: int = 0
    recovered: bool = False  # it failed before, and no longer does


async def sync(tx: AsyncConnection, names: Mapping[str, str | None], now: datetime) -> None:
    """Make the rows follow the configuration: ``names`` gives each watcher's name and the name it had before.

    New names get a row, renamed ones keep theirs, and what is no longer configured is marked as gone but kept.
    """
    rows = {status.name: status for status in await everyone(tx)}
    origins = {status.origin for status in rows.values()}
    for name, was in names.items():
        if name in rows:
            if rows[name].gone_at is not None:
                await _set(tx, name, gone_at=None)
        elif was in rows and was not in names:
            await _set(tx, was, name=name, gone_at=None)
            del rows[was]
        else:
            # The name may be the origin of a watcher that was renamed: two watchers must not give the same item ids.
            origin = name if name not in origins else f"{name}@{now:%Y%m%dT%H%M%S.%f}"
            await _create(tx, name, origin)
    gone = [name for name, status in rows.items() if name not in names and status.gone_at is None]
    for name in gone:
        await _set(tx, name, gone_at=now)


async def _create(tx: AsyncConnection, name: str, origin: str) -> None:
    zeros = {"pause_reason": "", "quarantine_reason": "", "quiet_runs": 0, "skipped_ticks": 0, "missed_ticks": 0}
    values = {"name": name, "origin": origin, **zeros, **WELL}
    # Two services that start together on one PostgreSQL both find it missing.
    await insert_many(tx, watcher, tuple(values), [tuple(values.values())], "ON CONFLICT DO NOTHING")


async def _set(tx: AsyncConnection, watcher_name: str, /, **values: Any) -> None:
    result = await tx.execute(update(watcher).where(watcher.c.name == watcher_name).values(**values))
    if result.rowcount != 1:
        raise _unknown(watcher_name)


def _unknown(name: str) -> StoreError:
    return StoreError(f"watchers.{name}: the database does not know this watcher: is it in the configuration?")


async def ident(tx: AsyncConnection, name: str) -> int:
    """The number by which the other tables refer to a watcher. Raises StoreError."""
    number = (await tx.execute(select(watcher.c.id).where(watcher.c.name == name))).scalar_one_or_none()
    if number is None:
        raise _unknown(name)
    return int(number)


async def get(tx: AsyncConnection, name: str) -> WatcherStatus:
    """Raises StoreError when there is none of that name."""
    row = (await tx.execute(select(watcher).where(watcher.c.name == name))).first()
    if row is None:
        raise _unknown(name)
    return WatcherStatus(**row._mapping)


async def everyone(tx: AsyncConnection) -> list[WatcherStatus]:
    """All watchers by name, those that are gone from the configuration included."""
    rows = await tx.execute(select(watcher).order_by(watcher.c.name))
    return [WatcherStatus(**row._mapping) for row in rows]


all = everyone


async def pause(tx: AsyncConnection, name: str, reason: str, now: datetime) -> None:
    await _set(tx, name, paused_at=now, pause_reason=reason)


async def resume(tx: AsyncConnection, name: str, now: datetime) -> None:
    """Let a paused, quarantined or backed-off watcher run again."""
    await _set(tx, name, paused_at=None, pause_reason="", **AT_LARGE, **WELL)


async def quarantine(tx: AsyncConnection, name: str, reason: str, run_id: int | None, now: datetime) -> None:
    """Keep a watcher from running until somebody approves or resumes. ``run_id`` holds the plan to be approved."""
    await _set(tx, name, quarantined_at=now, quarantine_reason=reason, quarantine_run=run_id, checked_at=now)


async def failed(tx: AsyncConnection, name: str, error: str, backoff_until: datetime | None, now: datetime) -> int:
    """Note a failed run. Returns how many failed in a row, this one included."""
    result = await tx.execute(
        update(watcher)
        .where(watcher.c.name == name)
        .values(
            failures=watcher.c.failures + 1,
            failing_since=func.coalesce(watcher.c.failing_since, literal(now, watcher.c.failing_since.type)),
            last_error=error,
            backoff_until=backoff_until,
            checked_at=now,
        )
        .returning(watcher.c.failures)
    )
    failures = result.scalar_one_or_none()
    if failures is None:
        raise _unknown(name)
    return int(failures)


async def flush(tx: AsyncConnection, quiet: Mapping[str, Quiet], now: datetime) -> None:
    """Add what quiet runs left in memory. Watchers that are gone are skipped."""
    if not quiet:
        return
    rows = [
        {
            "of": name,
            "checked": q.checked_at,
            "success": q.success_at,
            "tick": q.tick_at,
            "quiet": q.quiet_runs,
            "skipped": q.skipped,
            "missed": q.missed,
        }
        for name, q in sorted(quiet.items())
    ]
    await tx.execute(
        update(watcher)
        .where(watcher.c.name == bindparam("of"))
        .values(
            checked_at=_later("checked_at", "checked"),
            success_at=_later("success_at", "success"),
            tick_at=_later("tick_at", "tick"),
            quiet_runs=watcher.c.quiet_runs + bindparam("quiet"),
            skipped_ticks=watcher.c.skipped_ticks + bindparam("skipped"),
            missed_ticks=watcher.c.missed_ticks + bindparam("missed"),
        ),
        rows,
    )
    for name in (name for name, q in quiet.items() if q.recovered):
        await tx.execute(update(watcher).where(watcher.c.name == name).values(**WELL))


def _later(column: str, parameter: str) -> Any:
    """The later of what is stored and what is given; either may be absent."""
    stored, given = watcher.c[column], bindparam(parameter, type_=watcher.c[column].type)
    return case((or_(stored.is_(None), given > stored), given), else_=stored)


async def take(tx: AsyncConnection, name: str, tick_at: datetime) -> bool:
    """Take a tick for this process alone. False: another process took it, or a later one."""
    free = or_(watcher.c.tick_at.is_(None), watcher.c.tick_at < tick_at)
    result = await tx.execute(update(watcher).where(watcher.c.name == name, free).values(tick_at=tick_at))
    return bool(result.rowcount == 1)


async def rewind(tx: AsyncConnection, now: datetime) -> None:
    """Forget ticks that were taken in the future: a clock that ran ahead and was put right must silence no watcher.

    A minute is left to the clocks of several machines.
    """
    ahead = watcher.c.tick_at > now + timedelta(minutes=1)
    await tx.execute(update(watcher).where(ahead).values(tick_at=now))
