"""A consistent copy of the whole database, taken while it is in use."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import LargeBinary, MetaData, Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.errors import StoreError
from watcher.store.db import Database, Dialect

FORMAT = 1
SUFFIX: dict[Dialect, str] = {"sqlite": "db", "postgresql": "jsonl"}


async def backup(db: Database, to: Path) -> Path:
    """Copy the database to a file that must not exist yet: a SQLite file, or on PostgreSQL an export.

    The copy is complete or not there. Raises StoreError.
    """
    if to.exists():  # noqa: ASYNC240
        raise StoreError(f"{to} exists already: choose another name")
    part = to.with_name(to.name + ".part")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        if db.dialect == "sqlite":
            await db.vacuum_into(part)
        else:
            with part.open("w", encoding="utf-8") as file:
                async for line in export(db):
                    file.write(line + "\n")
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(to)
    except OSError as error:
        raise StoreError(f"{to}: {error.strerror}: nothing was backed up") from error
    finally:
        with suppress(OSError):
            part.unlink()
    return to


async def export(db: Database) -> AsyncIterator[str]:
    """The database as lines of JSON: a header, the rows of every table, a footer with their number and checksum.

    Secret variables are there only as they are stored: encrypted. Instants are microseconds since 1970, bytes base64.
    """
    async with db.snapshot() as tx:
        tables = await tx.run_sync(_tables)
        revision = (await tx.exec_driver_sql("SELECT version_num FROM alembic_version")).scalar_one_or_none()
        header = {
            "watcher": FORMAT,
            "schema": revision,
            "tables": {t.name: [c.name for c in t.columns] for t in tables},
        }
        checksum, rows = hashlib.sha256(), 0
        yield json.dumps(header)
        for table in tables:
            async for line in _lines(tx, table):
                checksum.update(line.encode())
                rows += 1
                yield line
        yield json.dumps({"rows": rows, "sha256": checksum.hexdigest()})


def _tables(connection: Any) -> list[Table]:
    """As they are in this database, which may be older than the program."""
    metadata = MetaData()
    metadata.reflect(connection)
    return [table for name, table in sorted(metadata.tables.items()) if name != "alembic_version"]


async def _lines(tx: AsyncConnection, table: Table) -> AsyncIterator[str]:
    binary = [isinstance(column.type, LargeBinary) for column in table.columns]
    result = await tx.stream(select(table).order_by(*table.primary_key.columns))
    async for row in result:
        values = [_text(v) if is_binary else v for v, is_binary in zip(row, binary, strict=True)]
        yield json.dumps([table.name, *values], ensure_ascii=True, separators=(",", ":"))


def _text(value: bytes | None) -> str | None:
    return None if value is None else base64.b64encode(value).decode("ascii")
