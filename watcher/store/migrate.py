"""The schema brought up to date: under a lock, after a backup, whole or not at all."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import Connection, inspect
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.errors import Damaged, DatabaseTooNew, StoreError
from watcher.store import deliveries, dump, meta
from watcher.store.db import Database, is_postgres

if TYPE_CHECKING:
    from alembic.config import Config

Standing = Literal["current", "older", "empty"]

_FOLDER = Path(__file__).parent / "migrations"
_LOCK_KEY = 0x7761746368  # PostgreSQL's advisory lock for whoever migrates
LOCK_SECONDS = 120.0


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's settings, without a file of its own."""
    from alembic.config import Config  # here and below: most starts migrate nothing, and it takes a tenth of a start

    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def revisions() -> Iterator[str]:
    """Every step that this version of the program knows, newest first: they are numbered, and so are their files."""
    numbers = (file.name.partition("_")[0] for file in (_FOLDER / "versions").glob("[0-9]*_*.py"))
    return iter(sorted(numbers, reverse=True))


def head() -> str:
    """The newest step."""
    return next(revisions())


def revision_of(connection: Connection) -> str | None:
    """The step at which a database stands; None when it is empty. Raises StoreError for somebody else's database."""
    tables = set(inspect(connection).get_table_names())
    if "alembic_version" not in tables:
        if tables:
            raise StoreError("this database holds tables that are not watcher's: give watcher a database of its own")
        return None
    return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()


def standing_of(revision: str | None) -> Standing:
    """Raises DatabaseTooNew for a step that this program does not know."""
    if revision is None:
        return "empty"
    known = list(revisions())
    if revision not in known:
        raise DatabaseTooNew(
            f"the database is at schema {revision}, newer than this program ({known[0]}): "
            "install the newer version again, or restore the backup that was made before the upgrade"
        )
    return "current" if revision == known[0] else "older"


async def check(db: Database) -> Standing:
    """Where the schema stands. Raises DatabaseTooNew, Damaged, StoreError."""
    async with db.read() as tx:
        return standing_of(await tx.run_sync(revision_of))


async def quick_check(db: Database) -> None:
    """Read the whole SQLite file once. Raises Damaged. PostgreSQL checks itself."""
    if db.dialect == "postgresql":
        return
    async with db.read() as tx:
        found = (await tx.exec_driver_sql("PRAGMA quick_check(1)")).scalar_one()
    if found != "ok":
        raise Damaged(f"{db.path} is damaged ({found}): stop the service and run `watcher restore` with a backup")


async def upgrade(db: Database, *, backup_to: Path | None, now: datetime, verify: bool = True) -> Standing:
    """Bring the schema to the newest step and give a new database its epoch. Returns how it was found.

    ``backup_to`` is a folder: an older schema is first copied there. ``verify`` reads the whole file first.
    A crash in the middle leaves the old schema. Raises DatabaseTooNew, Damaged, StoreError.
    """
    async with _lock(db):
        if verify:
            await quick_check(db)
        standing = await check(db)
        if standing == "older" and backup_to is not None:
            copy = f"before-upgrade-{now:%Y%m%dT%H%M%S.%f}.{dump.SUFFIX[db.dialect]}"
            await dump.backup(db, backup_to / copy)

        async def migrate(tx: AsyncConnection) -> None:
            if is_postgres(tx):
                await tx.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK_KEY})")
            if standing_of(await tx.run_sync(revision_of)) != "current":
                await tx.run_sync(lambda connection: upgrade_to(connection, "head"))
            if await meta.get(tx, "epoch") is None:
                await meta.renew_epoch(tx)
                await meta.put(tx, "created_at", now.isoformat())
            await deliveries.mend(tx)

        await db.write(migrate, alone=True)
        return standing


@asynccontextmanager
async def _lock(db: Database) -> AsyncIterator[None]:
    """One process at a time migrates a SQLite file; PostgreSQL's own lock is taken in the transaction."""
    if db.dialect == "postgresql":
        yield
        return
    file = db.path.with_name(db.path.name + ".migrating")
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        async with _timeout(file):
            while not _locked(handle):  # noqa: ASYNC110  another process's lock sends no event
                await asyncio.sleep(0.05)
        yield
    finally:
        os.close(handle)


@asynccontextmanager
async def _timeout(file: Path) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(LOCK_SECONDS):
            yield
    except TimeoutError as error:
        raise StoreError(f"{file}: another process has been migrating for {LOCK_SECONDS:.0f} s: look at it") from error


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def upgrade_to(connection: Connection, revision: str) -> Any:
    """Take an empty database to a given step, to fill it with rows of that age."""
    from alembic import command

    return command.upgrade(alembic_config(connection), revision)
