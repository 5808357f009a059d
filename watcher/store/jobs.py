"""Jobs: runs of local flows and scripts, claimed with a lease, resumed after a crash."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.store.db import insert_many, micros
from watcher.store.tables import job
from watcher.values import JobStatus, Json

_LOG_TAIL = 65_536
_OVER = (JobStatus.SUCCEEDED.value, JobStatus.FAILED.value, JobStatus.CANCELED.value)


@dataclass(frozen=True, slots=True)
class Job:
    """One job's row, read only. ``step`` is the step that runs, or that runs next; ``results`` those before it."""

    id: str
    kind: str  # flow, script
    path: str
    status: JobStatus
    args: bytes  # JSON object
    result: bytes | None
    error: str
    detail: str
    step: int
    results: bytes  # JSON list
    starts: int
    logs: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    lease_until: datetime | None
    owner: str | None
    parent: str | None
    root: str | None
    cancel_reason: str | None
    progress: int | None


def _job(row: Any) -> Job:
    values = dict(row._mapping)
    values["status"] = JobStatus(row.status)
    for name in ("args", "results"):
        values[name] = bytes(values[name])
    values["result"] = None if row.result is None else bytes(row.result)
    return Job(**values)


async def create(
    tx: AsyncConnection,
    id: str,
    kind: str,
    path: str,
    args: bytes,
    now: datetime,
    parent: str | None = None,
    root: str | None = None,
    due_at: datetime | None = None,
) -> bool:
    """Queue a job, to be claimed from ``due_at`` on (None: at once), which is kept as the end of a lease.

    False: a job of that id is there already, whatever became of it.
    """
    columns = (
        "id", "kind", "path", "status", "args", "error", "detail", "step", "results", "starts", "logs",
        "created_at", "parent", "root", "lease_until",
    )  # fmt: skip
    row = (
        id, kind, path, JobStatus.QUEUED.value, args, "", "", 0, b"[]", 0, "", micros(now), parent,
        root or parent or id, None if due_at is None else micros(due_at),
    )  # fmt: skip
    return await insert_many(tx, job, columns, [row], "ON CONFLICT DO NOTHING") == 1


def _is_due(now: datetime) -> Any:
    return or_(job.c.lease_until.is_(None), job.c.lease_until <= now)


async def claim(
    tx: AsyncConnection,
    owner: str,
    *,
    limit: int,
    now: datetime,
    lease: timedelta,
    only: str | None = None,
    without: Collection[str] = (),
) -> Sequence[Job]:
    """Take up to ``limit`` jobs, oldest first: queued ones, and running ones whose owner let the lease run out.

    ``only`` those of one path, and none of the paths in ``without``.
    """
    j = job.c
    these = [j.path == only] if only is not None else [j.path.not_in(sorted(without))] if without else []
    abandoned = and_(j.status == JobStatus.RUNNING.value, j.lease_until <= now)
    free = (
        select(j.id)
        .where(or_(and_(j.status == JobStatus.QUEUED.value, _is_due(now)), abandoned))
        .where(*these)
        .order_by(j.created_at, j.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    found = [*(await tx.execute(free)).scalars()]
    if not found:
        return []
    await tx.execute(
        update(job)
        .where(j.id.in_(found))
        .values(
            status=JobStatus.RUNNING.value,
            owner=owner,
            lease_until=now + lease,
            starts=j.starts + 1,
            started_at=func.coalesce(j.started_at, micros(now)),
        )
    )
    return [_job(row) for row in await tx.execute(select(job).where(j.id.in_(found)).order_by(j.created_at, j.id))]


def _owned(id: str, owner: str) -> Any:
    return and_(job.c.id == id, job.c.owner == owner, job.c.status == JobStatus.RUNNING.value)


async def step_done(
    tx: AsyncConnection,
    id: str,
    owner: str,
    step: int,
    results: Sequence[Json] | bytes,
    logs: str,
    now: datetime,
    lease: timedelta,
) -> bool:
    """Note that step number ``step`` (from 0) ended, with the results so far. False: fenced, somebody else has it."""
    body = results if isinstance(results, bytes) else json.dumps([*results]).encode()
    result = await tx.execute(
        update(job)
        .where(_owned(id, owner))
        .values(step=step + 1, results=body, logs=logs[-_LOG_TAIL:], lease_until=now + lease)
    )
    return bool(result.rowcount == 1)


async def finish(
    tx: AsyncConnection,
    id: str,
    owner: str,
    status: JobStatus,
    *,
    result: bytes | None = None,
    error: str = "",
    detail: str = "",
    logs: str = "",
    now: datetime,
) -> bool:
    """End a job. False: fenced, it was cancelled or somebody else has it; nothing was written."""
    ended = await tx.execute(
        update(job)
        .where(_owned(id, owner))
        .values(
            status=status.value,
            result=result,
            error=error[:2_000],
            detail=detail[:8_192],
            logs=logs[-_LOG_TAIL:],
            finished_at=now,
            lease_until=None,
            owner=None,
        )
    )
    return bool(ended.rowcount == 1)


async def heartbeat(tx: AsyncConnection, ids: Collection[str], owner: str, until: datetime) -> set[str]:
    """Extend the leases of running jobs. Returns those that are still ours."""
    j = job.c
    mine = and_(j.id.in_(ids), j.owner == owner, j.status == JobStatus.RUNNING.value)
    return {*(await tx.execute(update(job).where(mine).values(lease_until=until).returning(j.id))).scalars()}


async def release(tx: AsyncConnection, ids: Collection[str], owner: str) -> None:
    """Give back jobs at a shutdown: they are queued again and this start does not count."""
    j = job.c
    mine = and_(j.id.in_(ids), j.owner == owner, j.status == JobStatus.RUNNING.value)
    await tx.execute(
        update(job).where(mine).values(status=JobStatus.QUEUED.value, owner=None, lease_until=None, starts=j.starts - 1)
    )


async def abandon(tx: AsyncConnection, now: datetime) -> None:
    """End the leases of everybody: a SQLite database has one service, and the one before it is gone."""
    await tx.execute(update(job).where(job.c.status == JobStatus.RUNNING.value).values(lease_until=now))


async def cancel(tx: AsyncConnection, id: str, reason: str, now: datetime) -> bool:
    """End a job that is not over yet. Whoever runs it finds out at its next heartbeat. False: it was over."""
    ended = await tx.execute(
        update(job)
        .where(job.c.id == id, job.c.status.not_in(_OVER))
        .values(status=JobStatus.CANCELED.value, cancel_reason=reason, finished_at=now, lease_until=None, owner=None)
    )
    return bool(ended.rowcount == 1)


async def set_progress(tx: AsyncConnection, id: str, percent: int) -> None:
    await tx.execute(update(job).where(job.c.id == id).values(progress=percent))


async def get(tx: AsyncConnection, id: str) -> Job | None:
    row = (await tx.execute(select(job).where(job.c.id == id))).first()
    return None if row is None else _job(row)


async def list(
    tx: AsyncConnection,
    *,
    path: str | None = None,
    status: JobStatus | None = None,
    limit: int = 50,
    before: datetime | None = None,
) -> Sequence[Job]:
    """Newest first; ``before`` is the `created_at` of the last one that was seen."""
    statement = select(job).order_by(job.c.created_at.desc(), job.c.id).limit(limit)
    if path is not None:
        statement = statement.where(job.c.path == path)
    if status is not None:
        statement = statement.where(job.c.status == status.value)
    if before is not None:
        statement = statement.where(job.c.created_at < before)
    return [_job(row) for row in await tx.execute(statement)]


async def next_due(tx: AsyncConnection, now: datetime) -> datetime | None:
    """When a job can be claimed next: now, or when the first lease of a running one ends."""
    j = job.c
    if (await tx.execute(select(j.id).where(j.status == JobStatus.QUEUED.value, _is_due(now)).limit(1))).first():
        return now
    later = select(func.min(j.lease_until)).where(j.status.in_((JobStatus.QUEUED.value, JobStatus.RUNNING.value)))
    first: datetime | None = (await tx.execute(later)).scalar_one_or_none()
    return first


async def failed_since(tx: AsyncConnection, since: datetime) -> dict[str, int]:
    """How many jobs failed since then, by path."""
    j = job.c
    counts = (
        select(j.path, func.count())
        .where(j.status == JobStatus.FAILED.value, j.created_at >= since)
        .group_by(j.path)
        .order_by(j.path)
    )
    return {path: int(count) for path, count in await tx.execute(counts)}


async def some(tx: AsyncConnection, ids: Collection[str]) -> dict[str, Job]:
    """Those of these jobs that there are."""
    return {row.id: _job(row) for row in await tx.execute(select(job).where(job.c.id.in_(ids)))} if ids else {}
