"""Variables: named strings at paths, stored exactly as they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import delete as delete_from
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.store.db import micros, run_sql
from watcher.store.tables import variable


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable. ``value`` is ciphertext when it is secret, and in no case shown by `repr`."""

    path: str
    value: str = field(repr=False)
    is_secret: bool
    description: str
    edited_at: datetime


async def get(tx: AsyncConnection, path: str) -> Variable | None:
    row = (await tx.execute(select(variable).where(variable.c.path == path))).first()
    return None if row is None else Variable(**row._mapping)


async def list(tx: AsyncConnection) -> Sequence[Variable]:
    """All, by path."""
    return [Variable(**row._mapping) for row in await tx.execute(select(variable).order_by(variable.c.path))]


async def put(
    tx: AsyncConnection, path: str, value: str, now: datetime, *, is_secret: bool = False, description: str = ""
) -> None:
    """Create or replace. A secret must come encrypted: what is given is what is written."""
    await run_sql(
        tx,
        "INSERT INTO variable (path, value, is_secret, description, edited_at) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (path) DO UPDATE SET value = excluded.value, is_secret = excluded.is_secret, "
        "description = excluded.description, edited_at = excluded.edited_at",
        (path, value, is_secret, description, micros(now)),
    )


async def delete(tx: AsyncConnection, path: str) -> bool:
    """False: there was none."""
    return bool((await tx.execute(delete_from(variable).where(variable.c.path == path))).rowcount)
