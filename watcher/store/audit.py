"""Who read or changed what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.store.tables import audit


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the audit."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    note: str


async def note(
    tx: AsyncConnection, action: str, subject: str, now: datetime, *, actor: str = "", note: str = ""
) -> None:
    """Write one line. Never a secret's value."""
    await tx.execute(insert(audit).values(at=now, actor=actor, action=action, subject=subject, note=note[:2_000]))


async def list(
    tx: AsyncConnection, *, subject: str | None = None, limit: int = 100, before: int | None = None
) -> Sequence[Entry]:
    """Newest first; ``before`` is the id of the last one that was seen."""
    statement = select(audit).order_by(audit.c.id.desc()).limit(limit)
    if subject is not None:
        statement = statement.where(audit.c.subject == subject)
    if before is not None:
        statement = statement.where(audit.c.id < before)
    return [Entry(**row._mapping) for row in await tx.execute(statement)]
