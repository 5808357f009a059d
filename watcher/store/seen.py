"""The ledger of keys that each watcher has met; asking about a page costs the page, not the ledger."""

# ruff: noqa: S608  the SQL is our own text; what comes from outside goes as a parameter
from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher import ids
from watcher.errors import Damaged
from watcher.store import checks, watchers
from watcher.store.db import insert_many, is_postgres, run_sql
from watcher.store.tables import seen
from watcher.values import UNSET, Seen

_COLUMNS = "s.key_hash, s.content, s.revision, s.present, s.key, s.value"

# The hashes travel as one blob that SQLite cuts into pieces of 16 bytes: one statement, one parameter, and the
# ledger's own order, whatever the number of keys. CROSS JOIN keeps the planner from scanning the ledger instead.
_PIECES = """
WITH RECURSIVE piece(at, hash) AS (
  SELECT 1, substr(?, 1, 16) UNION ALL SELECT at + 16, substr(?, at + 16, 16) FROM piece WHERE at + 16 < ?
)
"""


async def _among(
    tx: AsyncConnection, number: int, hashes: Collection[bytes], columns: str, more: str = "", *values: Any
) -> list[Any]:
    """The rows of those of ``hashes`` that the ledger holds."""
    if not hashes:
        return []
    ordered = sorted(set(hashes))
    if is_postgres(tx):
        sql = f"SELECT {columns} FROM seen s WHERE s.watcher_id = %s AND s.key_hash = ANY(%s) {more}"
        return list(await tx.exec_driver_sql(sql.replace("?", "%s"), (number, ordered, *values)))
    blob = b"".join(ordered)
    join = "FROM piece CROSS JOIN seen s ON s.watcher_id = ? AND s.key_hash = piece.hash"
    sql = f"{_PIECES} SELECT {columns} {join} {more}"
    return list(await tx.exec_driver_sql(sql, (blob, blob, len(blob), number, *values)))


def _seen(name: str, row: Any) -> Seen:
    key_hash, content, revision, present, key, value = row
    if value is not None and checks.of_value(value) != content:
        raise Damaged(
            f"watchers.{name}: what the ledger holds about {key!r} is not what was written: the disk damaged it. "
            "Nothing was compared with it. Restore a backup, or `watcher state reset` to begin anew"
        )
    return Seen(
        bytes(key_hash), bytes(content), revision, bool(present), key, UNSET if value is None else json.loads(value)
    )


async def probe(tx: AsyncConnection, name: str, hashes: Collection[bytes]) -> dict[bytes, Seen]:
    """Which of these keys were met before. Raises Damaged, StoreError."""
    number = await watchers.ident(tx, name)
    rows = (_seen(name, row) for row in await _among(tx, number, hashes, _COLUMNS))
    return {row.key_hash: row for row in rows}


async def present(tx: AsyncConnection, name: str) -> dict[bytes, Seen]:
    """All keys that the source still listed when last looked at in full: what a removal is found by."""
    number = await watchers.ident(tx, name)
    sql = f"SELECT {_COLUMNS} FROM seen s WHERE s.watcher_id = ? AND s.present"
    rows = (_seen(name, row) for row in await run_sql(tx, sql, (number,)))
    return {row.key_hash: row for row in rows}


async def count(tx: AsyncConnection, name: str) -> int:
    number = await watchers.ident(tx, name)
    return int(
        (await tx.execute(select(func.count()).select_from(seen).where(seen.c.watcher_id == number))).scalar_one()
    )


async def learn(tx: AsyncConnection, number: int, rows: Iterable[Seen]) -> None:
    """Insert or replace ledger rows. Sorted: neighbours share a page of the table, and two writers never deadlock."""
    values = []
    for row in sorted(rows, key=lambda row: row.key_hash):
        value = None if row.value is UNSET else ids.canonical(row.value)
        if value is not None and checks.of_value(value) != row.content:
            raise ValueError(f"the content hash of {row.key!r} is not its value's")
        values.append((number, row.key_hash, row.content, row.revision, row.present, 0, row.key, value))
    await insert_many(
        tx,
        seen,
        ("watcher_id", "key_hash", "content", "revision", "present", "listed_day", "key", "value"),
        values,
        "ON CONFLICT (watcher_id, key_hash) DO UPDATE SET content = excluded.content, revision = excluded.revision, "
        "present = excluded.present, key = excluded.key, value = excluded.value",
    )


def day_of(at: datetime) -> int:
    """Days since 1970, UTC."""
    return (at.astimezone(UTC).date() - date(1970, 1, 1)).days


async def touch(tx: AsyncConnection, number: int, hashes: Collection[bytes], day: int) -> None:
    """Note that the source listed these keys on ``day``."""
    if hashes:
        sql = "UPDATE seen SET listed_day = ? WHERE watcher_id = ? AND key_hash = ?"
        await run_sql(tx, sql, [(day, number, key) for key in sorted(hashes)])


async def listed_before(tx: AsyncConnection, name: str, hashes: Collection[bytes], day: int) -> set[bytes]:
    """Those of the listed keys whose `last listed` day is before ``day``, or was never noted: they want a touch."""
    number = await watchers.ident(tx, name)
    return {bytes(row[0]) for row in await _among(tx, number, hashes, "s.key_hash", "AND s.listed_day < ?", day)}


async def unlisted(tx: AsyncConnection, name: str, days: int, limit: int) -> tuple[int, list[bytes]]:
    """Keys that the source has not listed for ``days``, counted back from the last day on which it listed anything,
    and the day before which that is.

    Counted from there and not from today: a source that is down, or that answers "unchanged", proves nothing.
    A key whose day was never noted is not among them.
    """
    number = await watchers.ident(tx, name)
    last = (await run_sql(tx, "SELECT max(listed_day) FROM seen WHERE watcher_id = ?", (number,))).scalar() or 0
    rows = await run_sql(
        tx,
        "SELECT key_hash FROM seen WHERE watcher_id = ? AND listed_day > 0 AND listed_day < ? LIMIT ?",
        (number, last - days, limit),
    )
    return last - days, [bytes(key) for key in rows.scalars()]


async def forget(tx: AsyncConnection, name: str, hashes: Collection[bytes], before: int) -> int:
    """Drop those of ``hashes`` that were still not listed since day ``before``. Returns how many."""
    if not hashes:
        return 0
    number = await watchers.ident(tx, name)
    sql = "DELETE FROM seen WHERE watcher_id = ? AND key_hash = ? AND listed_day < ?"
    return int((await run_sql(tx, sql, [(number, key, before) for key in sorted(hashes)])).rowcount)
