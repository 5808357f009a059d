"""Connections, transactions and errors: the only module that knows which database it is."""

# ruff: noqa: S608  the SQL is our own text; what comes from outside goes as a parameter
from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from sqlalchemy import Engine, Table, create_engine, event, exc
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from watcher.errors import Damaged, DatabaseFull, StoreError
from watcher.models import Instant
from watcher.store import writer
from watcher.store.writer import Operation, Writer

T = TypeVar("T")
Tx = AsyncConnection
"""An open transaction, as those who only pass it on know it."""
Dialect = Literal["sqlite", "postgresql"]

_NETWORK_FILESYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "ncpfs", "afs"})
_instant = Instant()


# --- addresses --------------------------------------------------------------------------------------------------------


def dialect_of(url: str) -> Dialect:
    """Which database ``sqlite:///…`` or ``postgresql://…`` names. Raises StoreError for any other."""
    name = url.partition(":")[0].partition("+")[0]
    if name == "sqlite":
        return "sqlite"
    if name in ("postgresql", "postgres"):
        return "postgresql"
    raise StoreError(f"database: neither sqlite:///… nor postgresql://…: {name}")


def sqlite_path(url: str) -> Path:
    """The file of a ``sqlite:///relative`` or ``sqlite:////absolute`` address."""
    database = make_url(url).database
    if not database or database == ":memory:":
        raise StoreError("database: SQLite needs a file: sqlite:////var/lib/watcher/watcher.db")
    return Path(database).absolute()


def network_filesystem(path: Path, mounts: str) -> str | None:
    """The type of the network file system that ``path`` lies on, by the text of /proc/mounts; None if it is local."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) > 2 and path.is_relative_to(fields[1].replace("\\040", " ")) and len(fields[1]) >= best:
            best, kind = len(fields[1]), fields[2]
    return kind if kind in _NETWORK_FILESYSTEMS else None


def _refuse_network(path: Path) -> None:
    try:
        mounts = Path("/proc/mounts").read_text()
    except OSError:
        return
    if kind := network_filesystem(path.resolve(), mounts):
        raise StoreError(f"{path} lies on {kind}: SQLite cannot lock there. Use a local disk, or PostgreSQL")


@contextmanager
def lock(url: str) -> Iterator[None]:
    """Hold a SQLite database for this process alone. Raises StoreError that names the holder. No-op on PostgreSQL."""
    if dialect_of(url) == "postgresql":
        yield
        return
    path = sqlite_path(url)
    file = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_network(path)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{file}: {error.strerror}: the service must be able to write there") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise StoreError(f"{path} is in use by process {pid}: stop it first, or ask it instead") from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


# --- errors -----------------------------------------------------------------------------------------------------------


def _holder(path: Path) -> str:
    """ " (held by process 123)", by /proc/locks, or nothing."""
    try:
        inodes = {p.stat().st_ino for p in (path, path.with_name(path.name + "-shm")) if p.exists()}
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "WRITE" in fields and int(fields[-3].rpartition(":")[2]) in inodes and int(fields[-4]) != os.getpid():
                return f" (held by process {fields[-4]})"
    except (OSError, ValueError, IndexError):
        pass
    return ""


def _sqlite_error(error: sqlite3.Error, path: Path) -> StoreError:
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_FULL" or name.startswith(("SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC", "SQLITE_IOERR_TRUNC")):
        return DatabaseFull(f"{path} cannot grow ({error}): free some space; nothing was written and nothing is lost")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return Damaged(f"{path} is damaged ({error}): stop the service and run `watcher restore` with a backup")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreError(f"{path} is locked by another program{_holder(path)}: close it, then try again")
    if name.startswith("SQLITE_CANTOPEN"):
        return StoreError(f"{path} cannot be opened: does its folder exist, and may this user write there?")
    if name.startswith("SQLITE_READONLY"):
        return StoreError(f"{path} is read-only for this user: correct its owner or its permissions")
    return StoreError(f"{path}: {error}")


def _postgres_error(error: BaseException, where: str) -> StoreError:
    state = getattr(error, "sqlstate", None) or ""
    text = str(error).strip().partition("\n")[0]
    if state == "53100":
        return DatabaseFull(f"{where}: the server's disk is full ({text}): free some space; nothing was written")
    if state.startswith("XX"):
        return Damaged(f"{where}: the server reports damage: {text}")
    if not state or state.startswith(("08", "57P")):
        return StoreError(f"{where} does not answer ({text}): is PostgreSQL running there, and reachable?")
    return StoreError(f"{where}: {text}")


def _sqlstate(error: BaseException) -> str:
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""


def _is_retryable(error: BaseException) -> bool:
    """PostgreSQL gave up one of two transactions that were in each other's way: the loser simply runs again."""
    return isinstance(error, exc.DBAPIError) and _sqlstate(error) in ("40001", "40P01", "55P03")


# --- the database -----------------------------------------------------------------------------------------------------


class Database:
    """One open database: any number of readers, and one way to write.

    Every error of the driver leaves here as a StoreError that says what to do; an error that an operation raises
    itself (`Conflict`) passes through, after a rollback.
    """

    def __init__(self, url: str, *, read_only: bool) -> None:
        self.url = url
        self.dialect = dialect_of(url)
        self.read_only = read_only
        self._commits = 0
        self.attic: Any = None  # where states are that are too large; see `store.states`
        self._writer: Writer | None = None
        if self.dialect == "sqlite":
            self.path = sqlite_path(url)
            self._where = str(self.path)
            self._readers = _sqlite_readers(self.path)
        else:
            self._readers = _postgres_engine(url)
            self._where = self._readers.url.render_as_string(hide_password=True)

    @classmethod
    async def open(cls, url: str, *, read_only: bool = False) -> Database:
        """Connect to ``sqlite:///…`` (made if missing, unless ``read_only``) or ``postgresql://…``."""
        db = cls(url, read_only=read_only)
        if db.dialect == "sqlite":
            await db._open_sqlite()
        else:
            await db._open_postgres()
        return db

    async def _open_sqlite(self) -> None:
        if self.read_only and not self.path.exists():
            raise StoreError(f"{self.path}: no such database: start `watcher serve` once, or correct `database`")
        _refuse_network(self.path)
        if not self.read_only:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"{self.path.parent}: {error.strerror}: may this user write there?") from error
            self._writer = Writer(_sqlite_writer(self.path), self.path, self._translated)
            try:
                await self.write(_nothing)
            except BaseException:
                await self._writer.close()
                raise
            self._writer.commits = 0

    async def _open_postgres(self) -> None:
        async with self.read() as tx:
            durable = (await tx.exec_driver_sql("SHOW synchronous_commit")).scalar_one()
        if durable == "off":
            await self._readers.dispose()
            raise StoreError(
                f"{self._where}: synchronous_commit is off, so a committed item could be lost: "
                "ALTER DATABASE … SET synchronous_commit = on"
            )

    async def close(self) -> None:
        """Finish what waits, write the WAL back into the file, close every connection."""
        if self._writer is not None:
            await self._writer.close()
        await self._readers.dispose()

    @property
    def commits(self) -> int:
        """Transactions that were committed since it was opened."""
        return self._commits + (self._writer.commits if self._writer else 0)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except exc.DBAPIError as error:
            cause = error.orig if error.orig is not None else error
            if isinstance(cause, sqlite3.Error):
                raise _sqlite_error(cause, self.path) from error
            raise _postgres_error(cause, self._where) from error
        except exc.TimeoutError as error:
            raise StoreError(f"{self._where}: all connections are busy: try again") from error

    # --- reading

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A consistent view on SQLite, READ COMMITTED on PostgreSQL; writing through it is an error."""
        with self._translated():
            async with self._readers.connect() as connection:
                if self.dialect == "postgresql":
                    await connection.execution_options(postgresql_readonly=True)
                yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """Like `read`, and every statement sees the same moment on PostgreSQL too."""
        with self._translated():
            async with self._readers.connect() as connection:
                if self.dialect == "postgresql":
                    await connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
                yield connection

    # --- writing

    async def write(self, operation: Operation[T], *, alone: bool = False, short: bool = False) -> T:
        """Run ``operation`` in a transaction and commit it, whole or not at all.

        On SQLite what waits at the same time shares one commit; on PostgreSQL each has its own. An operation may run
        more than once before it counts, unless ``alone``: then it has its own transaction and is never run twice. One
        that is ``short``, a few statements about a few hundred rows, may run in the loop.
        Raises what the operation raises, and StoreError, DatabaseFull or Damaged.
        """
        if self.read_only:
            raise StoreError(f"{self._where} was opened for reading only")
        if self.dialect == "postgresql":
            return await self._write_postgres(operation, alone)
        assert self._writer is not None
        return await self._writer.run(operation, alone=alone, short=short)

    async def _write_postgres(self, operation: Operation[T], alone: bool) -> T:
        with self._translated():
            async for attempt in AsyncRetrying(
                retry=retry_if_exception(_is_retryable),
                stop=stop_after_attempt(1 if alone else 10),
                wait=wait_random_exponential(multiplier=0.01, max=1),
                reraise=True,
            ):
                with attempt:
                    async with self._readers.begin() as tx:
                        result = await operation(tx)
        self._commits += 1
        return result

    async def vacuum_into(self, to: Path) -> None:
        """Write a compact copy of a SQLite database into an empty file, beside whatever else goes on."""
        try:
            await asyncio.to_thread(_vacuum_into, self.path, to)
        except sqlite3.Error as error:
            raise _sqlite_error(error, self.path) from error


def _vacuum_into(path: Path, to: Path) -> None:
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, isolation_level=None)
    try:
        for pragma in (f"busy_timeout={int(writer.BUSY_SECONDS * 1000)}", "wal_autocheckpoint=0"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("VACUUM INTO ?", (str(to),))
    finally:
        connection.close()


async def _nothing(tx: AsyncConnection) -> None:
    """A transaction that only proves that the database can be written."""


# --- engines ----------------------------------------------------------------------------------------------------------


def _sqlite_url(path: Path, driver: str, mode: str) -> URL:
    return URL.create(f"sqlite+{driver}", database="file:" + quote(str(path)), query={"mode": mode, "uri": "true"})


def _sqlite_readers(path: Path) -> AsyncEngine:
    url = _sqlite_url(path, "aiosqlite", "rw")
    engine = create_async_engine(url, hide_parameters=True, pool_size=4, max_overflow=12)
    _set_up(engine.sync_engine, "BEGIN", "query_only=ON", "wal_autocheckpoint=0", "cache_size=-4096")
    return engine


def _sqlite_writer(path: Path) -> Engine:
    url = _sqlite_url(path, "pysqlite", "rwc")
    # The loop and the writer's thread take turns; and the same few statements come in as many sizes as groups have.
    more = {"check_same_thread": False, "cached_statements": 512}
    engine = create_engine(url, hide_parameters=True, poolclass=NullPool, connect_args=more)
    # FULL: what was sent must never outlive its commit. Only this connection may checkpoint, because SQLite
    # before 3.51.3 can corrupt a database when two do (the "WAL-reset" bug).
    # 8 MB of cache: a large commit that does not fit into SQLite's usual 2 writes its pages more than once.
    wal = ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=1000", "cache_size=-8192")
    _set_up(engine, "BEGIN IMMEDIATE", *wal)
    return engine


def _set_up(engine: Engine, begin: str, *pragmas: str) -> None:
    @event.listens_for(engine, "connect")
    def _(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # else the driver begins transactions of its own, too late and too weak
        cursor = connection.cursor()
        for pragma in (f"busy_timeout={int(writer.BUSY_SECONDS * 1000)}", "foreign_keys=ON", *pragmas):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _(connection: Any) -> None:
        connection.exec_driver_sql(begin)


def _postgres_engine(url: str) -> AsyncEngine:
    parsed = make_url(url).set(drivername="postgresql+psycopg")
    try:
        return create_async_engine(
            parsed,
            hide_parameters=True,
            pool_size=8,
            max_overflow=8,
            pool_pre_ping=True,
            connect_args={"connect_timeout": 10, "application_name": "watcher", "keepalives_idle": 30},
        )
    except ImportError as error:
        raise StoreError("PostgreSQL needs its driver: install change-watcher[postgres]") from error


# --- statements that need to know the database ------------------------------------------------------------------------


def micros(at: datetime | None) -> int | None:
    """An instant as the databases hold it, for statements that bypass SQLAlchemy's types."""
    return None if at is None else _instant.process_bind_param(at, None)  # type: ignore[arg-type]


def instant(value: int | None) -> datetime | None:
    """The reverse of `micros`."""
    return _instant.process_result_value(value, None)  # type: ignore[arg-type]


def is_postgres(tx: AsyncConnection) -> bool:
    return tx.dialect.name == "postgresql"


def marks(tx: AsyncConnection, count: int) -> str:
    """``?, ?, ?`` or ``%s, %s, %s``."""
    return ", ".join(["%s" if is_postgres(tx) else "?"] * count)


async def run_sql(tx: AsyncConnection, sql: str, parameters: Any = ()) -> Any:
    """Run SQL written with ``?`` marks, past SQLAlchemy's compiler: for the few statements where it would cost more
    than the database does. A list of tuples runs it once for each."""
    if is_postgres(tx):
        sql = sql.replace("?", "%s")
    return await tx.exec_driver_sql(sql, parameters)


async def insert_many(
    tx: AsyncConnection, table: Table, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], conflict: str = ""
) -> int:
    """Insert rows as the driver takes them (instants as `micros`). Returns how many were inserted."""
    if not rows:
        return 0
    sql = f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES ({marks(tx, len(columns))}) {conflict}"
    result = await tx.exec_driver_sql(sql, list(rows))
    return int(result.rowcount)


async def serials(tx: AsyncConnection, table: Table, count: int) -> Sequence[int]:
    """``count`` new numbers for the table's serial key, rising in commit order among those who hold the same lock."""
    column = next(iter(table.primary_key.columns)).name
    if is_postgres(tx):
        rows = await tx.exec_driver_sql(
            f"SELECT nextval(pg_get_serial_sequence('{table.name}', '{column}')) FROM generate_series(1, %s)",
            (count,),
        )
        return sorted(int(n) for n in rows.scalars())
    last = (await tx.exec_driver_sql(f"SELECT coalesce(max({column}), 0) FROM {table.name}")).scalar_one()
    return range(int(last) + 1, int(last) + 1 + count)
