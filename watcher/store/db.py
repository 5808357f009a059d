"""Connections, transactions and errors: the only module that knows which database it is."""

# ruff: noqa: S608  the SQL is our own text; what comes from outside goes as a parameter
from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, cast
from urllib.parse import quote

from sqlalchemy import Connection, Engine, Table, create_engine, event, exc
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from tenacity import (
    AsyncRetrying,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random,
    wait_random_exponential,
)

from watcher.errors import Damaged, DatabaseFull, StoreError
from watcher.failpoint import failpoint
from watcher.models import Instant

T = TypeVar("T")
Tx = AsyncConnection
"""An open transaction, as those who only pass it on know it."""
Operation = Callable[[AsyncConnection], Awaitable[T]]
Dialect = Literal["sqlite", "postgresql"]

BUSY_SECONDS = 5.0  # SQLite waits so long for another process's lock, four times
GROUP = 256  # operations in one commit at most
WAL_LIMIT = 32 * 1024 * 1024  # bytes: readers that follow each other without a gap keep SQLite from starting it anew
WAL_LOOK = 1.0  # seconds from one look at its size to the next
WAITING = 4096  # operations in the queue; whoever comes next waits for room

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


def _is_locked(error: BaseException | None) -> bool:
    name = getattr(getattr(error, "orig", None), "sqlite_errorname", "")
    return name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


# --- the database -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Job:
    operation: Operation[Any]
    done: asyncio.Future[Any]
    alone: bool


@dataclass(frozen=True, slots=True)
class _Outcome:
    result: Any
    error: Exception | None = None


class Database:
    """One open database: any number of readers, and one way to write.

    Every error of the driver leaves here as a StoreError that says what to do; an error that an operation raises
    itself (`Conflict`) passes through, after a rollback.
    """

    def __init__(self, url: str, *, read_only: bool) -> None:
        self.url = url
        self.dialect = dialect_of(url)
        self.read_only = read_only
        self.commits = 0
        self.attic: Any = None  # where states are that are too large; see `store.states`
        self._queue: asyncio.Queue[_Job | None] = asyncio.Queue(WAITING)
        self._task: asyncio.Task[None] | None = None
        if self.dialect == "sqlite":
            self.path = sqlite_path(url)
            self._where = str(self.path)
            self._readers = _sqlite_readers(self.path)
            self._writers = _sqlite_writer(self.path)
            self._writer: Connection | None = None
            self._looked = 0.0  # at the size of the WAL
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-writer")  # only it uses the writer
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
            self._task = asyncio.create_task(self._own_the_writer(), name="store-writer")
            try:
                await self.write(_nothing)
            except BaseException:
                await self._stop_writer()
                raise
            self.commits = 0

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
        await self._stop_writer()
        await self._readers.dispose()

    async def _stop_writer(self) -> None:
        if self._task is not None:
            await self._queue.put(None)
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

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

    async def write(self, operation: Operation[T], *, alone: bool = False) -> T:
        """Run ``operation`` in a transaction and commit it, whole or not at all.

        On SQLite what waits at the same time shares one commit; on PostgreSQL each has its own. An operation may run
        more than once before it counts, unless ``alone``: then it has its own transaction and is never run twice.
        Raises what the operation raises, and StoreError, DatabaseFull or Damaged.
        """
        if self.read_only:
            raise StoreError(f"{self._where} was opened for reading only")
        if self.dialect == "postgresql":
            return await self._write_postgres(operation, alone)
        if self._task is None or self._task.done():
            raise StoreError(f"{self._where} is closed")
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        await self._queue.put(_Job(operation, done, alone))
        return await done

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
        self.commits += 1
        return result

    async def _own_the_writer(self) -> None:
        """Take what waits, run it in one transaction, answer; until told to stop."""
        loop = asyncio.get_running_loop()
        stopping = False
        while not stopping:
            jobs: list[_Job] = []
            first = await self._queue.get()
            while first is not None:
                if not first.done.done():
                    jobs.append(first)
                if len(jobs) >= GROUP or self._queue.empty():
                    break
                first = self._queue.get_nowait()
            stopping = first is None
            if jobs:
                outcomes = await loop.run_in_executor(self._thread, self._commit_together, jobs)
                for job, outcome in zip(jobs, outcomes, strict=True):
                    _answer(job, outcome)
                if time.monotonic() - self._looked >= WAL_LOOK:
                    self._looked = time.monotonic()
                    await loop.run_in_executor(self._thread, self._keep_wal_short)
                del job, outcome, outcomes  # a commit of 100,000 items must not live on until the next one
            first = None
        await loop.run_in_executor(self._thread, self._stop_writing)
        self._thread.shutdown(wait=False)

    # In the writer's thread. A whole group runs there in one go: handing each statement over and back would cost a
    # busy event loop more than the database does.

    def _commit_together(self, jobs: list[_Job]) -> list[_Outcome]:
        if len(jobs) > 1 and not any(job.alone for job in jobs):
            try:
                with self._translated(), self._begin() as tx:
                    results = [_run_here(job.operation, tx) for job in jobs]
                self.commits += 1
                return [_Outcome(result) for result in results]
            except StoreError as error:
                if _is_locked(error.__cause__):
                    return [_Outcome(None, error)] * len(jobs)  # nobody is guilty, and each alone would wait as long
            except Exception:  # noqa: S110 -- one of them is guilty: alone, only that one fails
                pass
        return [self._commit_alone(job) for job in jobs]

    def _commit_alone(self, job: _Job) -> _Outcome:
        try:
            with self._translated(), self._begin() as tx:
                result = _run_here(job.operation, tx)
        except Exception as error:  # whatever it is, somebody waits for an answer
            return _Outcome(None, error)
        self.commits += 1
        return _Outcome(result)

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        """BEGIN IMMEDIATE … COMMIT, waiting for another program's lock."""
        if self._writer is None or self._writer.invalidated:
            self._writer = self._writers.connect()
        for attempt in Retrying(
            retry=retry_if_exception(_is_locked), stop=stop_after_attempt(4), wait=wait_random(0, 0.3), reraise=True
        ):
            with attempt:
                transaction = self._writer.begin()
        try:
            yield self._writer
            transaction.commit()
        except BaseException:
            _roll_back(self._writer)
            raise

    def _keep_wal_short(self) -> None:
        """Write a long WAL back and cut it: no new reader needs it then, and those that read now end soon."""
        wal = self.path.with_name(self.path.name + "-wal")
        if self._writer is None or not wal.exists() or wal.stat().st_size <= WAL_LIMIT:
            return
        with contextlib.suppress(sqlite3.Error, exc.DBAPIError):  # it is tried again after the next look
            driver = cast(Any, self._writer.connection.driver_connection)
            driver.execute("PRAGMA busy_timeout=500")
            try:
                driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                driver.execute(f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1000)}")

    def _stop_writing(self) -> None:
        if self._writer is not None:
            try:
                failpoint("mid_checkpoint")
                cast(Any, self._writer.connection.driver_connection).execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except (sqlite3.Error, exc.DBAPIError):
                pass  # the WAL stays beside the file and is read by whoever opens it next
            self._writer.close()
        self._writers.dispose()

    async def vacuum_into(self, to: Path) -> None:
        """Write a compact copy of a SQLite database into an empty file, beside whatever else goes on."""
        try:
            await asyncio.to_thread(_vacuum_into, self.path, to)
        except sqlite3.Error as error:
            raise _sqlite_error(error, self.path) from error


def _vacuum_into(path: Path, to: Path) -> None:
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, isolation_level=None)
    try:
        for pragma in (f"busy_timeout={int(BUSY_SECONDS * 1000)}", "wal_autocheckpoint=0"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("VACUUM INTO ?", (str(to),))
    finally:
        connection.close()


async def _nothing(tx: AsyncConnection) -> None:
    """A transaction that only proves that the database can be written."""


class _Here:
    """A connection as operations know it, whose statements run at once in this thread: no await of it ever waits."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.dialect = connection.dialect

    async def execute(self, statement: Any, parameters: Any = None) -> Any:
        return self._connection.execute(statement, parameters)

    async def exec_driver_sql(self, statement: str, parameters: Any = None) -> Any:
        return self._connection.exec_driver_sql(statement, parameters)

    async def scalar(self, statement: Any, parameters: Any = None) -> Any:
        return self._connection.scalar(statement, parameters)

    async def run_sync(self, work: Callable[..., T], *arguments: Any) -> T:
        return work(self._connection, *arguments)


def _run_here(operation: Operation[T], connection: Connection) -> T:
    """Run an operation to its end in this thread. It may await its transaction and nothing else."""
    steps = operation(cast(AsyncConnection, _Here(connection))).__await__()
    try:
        next(steps)
    except StopIteration as end:
        return cast(T, end.value)
    raise RuntimeError("a write may await its transaction and nothing else: do the rest before or after it")


def _roll_back(connection: Connection) -> None:
    try:
        connection.rollback()
    except exc.DBAPIError:
        connection.invalidate()


def _answer(job: _Job, outcome: _Outcome) -> None:
    if job.done.done():
        return
    if outcome.error is not None:
        job.done.set_exception(outcome.error)
    else:
        job.done.set_result(outcome.result)


# --- engines ----------------------------------------------------------------------------------------------------------


def _sqlite_url(path: Path, driver: str, mode: str) -> URL:
    return URL.create(f"sqlite+{driver}", database="file:" + quote(str(path)), query={"mode": mode, "uri": "true"})


def _sqlite_readers(path: Path) -> AsyncEngine:
    url = _sqlite_url(path, "aiosqlite", "rw")
    engine = create_async_engine(url, hide_parameters=True, pool_size=4, max_overflow=12)
    _set_up(engine.sync_engine, "BEGIN", "query_only=ON", "wal_autocheckpoint=0", "cache_size=-4096")
    return engine


def _sqlite_writer(path: Path) -> Engine:
    engine = create_engine(_sqlite_url(path, "pysqlite", "rwc"), hide_parameters=True, poolclass=NullPool)
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
        for pragma in (f"busy_timeout={int(BUSY_SECONDS * 1000)}", "foreign_keys=ON", *pragmas):
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
