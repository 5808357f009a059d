"""Facts about the database itself, by name."""

from __future__ import annotations

import secrets

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.errors import StoreError
from watcher.store.db import run_sql
from watcher.store.tables import meta


async def get(tx: AsyncConnection, name: str) -> str | None:
    return (await tx.execute(select(meta.c.value).where(meta.c.name == name))).scalar_one_or_none()


async def put(tx: AsyncConnection, name: str, value: str) -> None:
    await run_sql(
        tx,
        "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        (name, value),
    )


async def keep(tx: AsyncConnection, name: str, value: str) -> str:
    """Put it there unless something is there already; what stands there now. For what several processes make up."""
    await run_sql(tx, "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO NOTHING", (name, value))
    return str((await tx.execute(select(meta.c.value).where(meta.c.name == name))).scalar_one())


async def epoch(tx: AsyncConnection) -> str:
    """The random name of this installation's present life; part of every item id."""
    value = await get(tx, "epoch")
    if value is None:
        raise StoreError("the database was never set up: start `watcher serve` once")
    return value


async def renew_epoch(tx: AsyncConnection) -> str:
    """Begin another life: ids of items committed from now on differ from any that were given before."""
    value = secrets.token_hex(8)
    await put(tx, "epoch", value)
    return value
