"""Backups, and the ways back from them: a file put in place, or rows read in again, on either database."""

# ruff: noqa: S608  the SQL is our own text; what comes from outside goes as a parameter
from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import Boolean, LargeBinary, MetaData, Table
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.errors import Damaged, StoreError
from watcher.store import meta, migrate
from watcher.store.db import Database, dialect_of, insert_many, is_postgres, lock, sqlite_path
from watcher.store.dump import FORMAT, backup, export

__all__ = ["backup", "export", "import_", "restore"]

_BATCH = 1000


async def restore(url: str, source: Path, now: datetime) -> Path | None:
    """Replace the database by a backup: a SQLite file, or an export of either database.

    Nobody else may have it open. Item ids begin a new epoch, because receivers have seen those given since the backup.
    Returns where the database that was there is kept now (SQLite only). Raises StoreError, Damaged, DatabaseTooNew.
    """
    if not source.is_file():  # noqa: ASYNC240
        raise StoreError(f"{source}: no such backup")
    if dialect_of(url) == "postgresql":
        await _read_in(url, source)
        return None
    with lock(url):
        target = sqlite_path(url)
        part = target.with_name(target.name + ".restoring")
        _remove(part)
        try:
            if _is_sqlite(source):
                shutil.copyfile(source, part)
                await _finish(f"sqlite:///{part}", now)
            else:
                await _read_in(f"sqlite:///{part}", source)
            os.chmod(part, 0o600)
            return _put_in_place(part, target, now)
        finally:
            _remove(part)


def _is_sqlite(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(16) == b"SQLite format 3\0"


def _remove(file: Path) -> None:
    for suffix in ("", "-wal", "-shm", ".migrating"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)


def _put_in_place(part: Path, target: Path, now: datetime) -> Path | None:
    """The old database is set aside with its WAL, never deleted: the backup may be the wrong one."""
    aside = None
    if target.exists():
        aside = target.with_name(f"{target.name}.before-restore-{now:%Y%m%dT%H%M%S.%f}")
        for suffix in ("-wal", "-shm", ""):
            old = target.with_name(target.name + suffix)
            if old.exists():
                old.rename(aside.with_name(aside.name + suffix))
    part.rename(target)
    return aside


async def _finish(url: str, now: datetime) -> None:
    db = await Database.open(url)
    try:
        if await migrate.check(db) == "empty":
            raise StoreError("the backup holds no database of watcher's")
        await migrate.upgrade(db, backup_to=None, now=now)
        await db.write(meta.renew_epoch)
    finally:
        await db.close()


async def _read_in(url: str, source: Path) -> None:
    db = await Database.open(url)
    try:
        with source.open(encoding="utf-8") as lines:
            await import_(db, lines, replace=True)
    except UnicodeDecodeError as error:
        raise Damaged(f"{source} is neither a SQLite database nor an export") from error
    finally:
        await db.close()


async def import_(db: Database, lines: Iterable[str], *, replace: bool = False) -> int:
    """Read an export into an empty database, of either kind; with ``replace`` what is there goes first.

    All or nothing, in one transaction. The schema is made as old as the export, filled, then brought up to date.
    The epoch is renewed. Returns the number of rows. Raises StoreError, Damaged, DatabaseTooNew.
    """

    async def operation(tx: AsyncConnection) -> int:
        rest = iter(lines)
        header = _header(next(rest, ""))
        migrate.standing_of(header["schema"])
        await _make_room(tx, replace=replace)
        await tx.run_sync(lambda connection: migrate.upgrade_to(connection, header["schema"]))
        count = await _fill(tx, header, rest)
        await tx.run_sync(lambda connection: migrate.upgrade_to(connection, "head"))
        await meta.renew_epoch(tx)
        return count

    return await db.write(operation, alone=True)


def _header(line: str) -> Any:
    try:
        header = json.loads(line)
        if header["watcher"] != FORMAT or not header["schema"]:
            raise StoreError("this export is of another format: use the version of watcher that wrote it")
        return header
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError("this is not an export of watcher's: its first line is not the header") from error


async def _make_room(tx: AsyncConnection, *, replace: bool) -> None:
    metadata = await tx.run_sync(_reflect)
    if not replace:
        for name in ("watcher", "resource", "variable", "token", "job"):
            if name in metadata.tables and (await tx.exec_driver_sql(f"SELECT 1 FROM {name} LIMIT 1")).first():
                raise StoreError("this database is in use: import into an empty one, or use `watcher restore`")
    await tx.run_sync(metadata.drop_all)


def _reflect(connection: Any) -> MetaData:
    metadata = MetaData()
    metadata.reflect(connection)
    return metadata


async def _fill(tx: AsyncConnection, header: Any, lines: Iterator[str]) -> int:
    tables = (await tx.run_sync(_reflect)).tables
    for table in tables.values():
        if table.name != "alembic_version":
            await tx.exec_driver_sql(f"DELETE FROM {table.name}")
    checksum, rows = hashlib.sha256(), 0
    footer: dict[str, Any] = {}
    while not footer and (some := [line.rstrip("\n") for line in islice(lines, _BATCH)]):
        batch: dict[str, list[tuple[Any, ...]]] = {}
        for line in some:
            if line.startswith("{"):
                footer = _parsed(line)
                break
            checksum.update(line.encode())
            rows += 1
            name, *values = _parsed(line)
            if name not in header["tables"] or name not in tables:
                raise Damaged(f"the export names a table that it does not have: {name}")
            batch.setdefault(name, []).append(tuple(values))
        for name, values in batch.items():
            await _insert(tx, tables[name], header["tables"][name], values)
    if footer != {"rows": rows, "sha256": checksum.hexdigest()}:
        raise Damaged("the export is damaged or cut short: its last line does not fit what comes before")
    if is_postgres(tx):
        await _wind_on(tx, tables.values())
    return rows


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise Damaged("the export is damaged: one of its lines is not JSON") from error


async def _insert(tx: AsyncConnection, table: Table, columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    kinds = [table.c[name].type for name in columns]

    def value(kind: Any, given: Any) -> Any:
        if given is None:
            return None
        if isinstance(kind, LargeBinary):
            return base64.b64decode(given)
        return bool(given) if isinstance(kind, Boolean) else given

    await insert_many(tx, table, columns, [tuple(value(k, v) for k, v in zip(kinds, row, strict=True)) for row in rows])


async def _wind_on(tx: AsyncConnection, tables: Iterable[Table]) -> None:
    """PostgreSQL's sequences do not notice numbers that were given by hand."""
    for table in tables:
        column = next(iter(table.primary_key.columns), None)
        if column is None or column.server_default is None:
            continue
        await tx.exec_driver_sql(
            f"SELECT setval(pg_get_serial_sequence('{table.name}', '{column.name}'), "
            f"(SELECT coalesce(max({column.name}), 0) + 1 FROM {table.name}), false)"
        )
