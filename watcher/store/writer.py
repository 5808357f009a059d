"""The one thread that writes a SQLite database: what waits at the same time shares a transaction.

It has one connection, which the loop may borrow while the thread has nothing to do: a few short statements cost three
times as much in a thread that competes with a busy loop. The commit, which waits for the disk, is always the thread's.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Engine, RootTransaction, exc
from sqlalchemy.ext.asyncio import AsyncConnection
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random

from watcher.errors import StoreError
from watcher.failpoint import failpoint

T = TypeVar("T")
Operation = Callable[[AsyncConnection], Awaitable[T]]

BUSY_SECONDS = 5.0  # SQLite waits so long for another process's lock, four times
GROUP = 256  # operations in one commit at most
BORROWED = 0.02  # seconds; a transaction that took the loop longer sends the next ones to the thread
WITHOUT = 1.0  # seconds; for so long
WAL_LIMIT = 32 * 1024 * 1024  # bytes: readers that follow each other without a gap keep SQLite from starting it anew
WAL_LOOK = 1.0  # seconds from one look at its size to the next
WAITING = 4096  # operations that wait or run; whoever comes next waits for room


@dataclass(slots=True)
class _Job:
    operation: Operation[Any]
    done: asyncio.Future[Any]
    alone: bool
    begun: _Begun | None = None


@dataclass(frozen=True, slots=True)
class _Begun:
    """What ran in the loop and has yet to be committed."""

    transaction: RootTransaction
    result: Any


@dataclass(frozen=True, slots=True)
class _Outcome:
    result: Any
    error: Exception | None = None


class Writer:
    """Runs operations in a thread of its own and answers in the loop that it was made in.

    An operation runs there in one go: handing each statement over and back would cost a busy loop more than the
    database does. ``translated`` turns the driver's errors into ours.
    """

    def __init__(self, engine: Engine, path: Path, translated: Callable[[], AbstractContextManager[None]]) -> None:
        self.commits = 0
        self._engine = engine
        self._path = path
        self._translated = translated
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(WAITING)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._owed = 0  # jobs that the thread has not answered yet; while there are none, the connection is the loop's
        self._not_before = 0.0  # monotonic; until then the loop leaves the connection alone
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._closing = False
        self._connection: Connection | None = None
        self._looked = 0.0  # at the size of the WAL
        threading.Thread(target=self._serve, name="store-writer", daemon=True).start()

    async def run(self, operation: Operation[T], *, alone: bool, short: bool = False) -> T:
        """What the operation returns, once it is committed; or raise what it raised, with nothing written.

        ``short``: a few statements about a few hundred rows, which may run in the loop.
        """
        async with self._room:
            if self._closing or self._ended.done():
                raise StoreError(f"{self._path} is closed")
            job = _Job(operation, self._loop.create_future(), alone)
            if short and not alone and not self._owed:
                job.begun = self._begun_here(operation)
            self._owed += 1
            self._jobs.put(job)
            return cast(T, await job.done)

    async def close(self) -> None:
        """Finish what waits, write the WAL back into the file, close the connection."""
        if not self._closing:
            self._closing = True
            self._jobs.put(None)
        await asyncio.wait([self._ended])

    def _begun_here(self, operation: Operation[Any]) -> _Begun | None:
        """Run an operation in the loop, up to its commit; None, and nothing done, when that is the thread's after all:
        it waits for locks, and knows what to make of errors."""
        connection, begun = self._connection, time.monotonic()
        if connection is None or connection.invalidated or begun < self._not_before:
            return None
        try:
            _set_patience(connection, 0.0)
            try:
                transaction = connection.begin()
            finally:
                _set_patience(connection, BUSY_SECONDS)
            result = _run_here(operation, connection)
        except Exception:
            _roll_back(connection)
            return None
        if time.monotonic() - begun > BORROWED:
            self._not_before = time.monotonic() + WITHOUT
        return _Begun(transaction, result)

    def _answer(self, taken: int, jobs: Sequence[_Job], outcomes: Sequence[_Outcome]) -> None:
        self._owed -= taken
        for job, outcome in zip(jobs, outcomes, strict=True):
            if job.done.done():
                continue
            if outcome.error is not None:
                job.done.set_exception(outcome.error)
            else:
                job.done.set_result(outcome.result)

    def _settle_ended(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    # --- in the thread

    def _serve(self) -> None:
        try:
            while self._one_group():
                pass
            self._stop()
        finally:
            self._tell(self._settle_ended)

    def _one_group(self) -> bool:
        """Take what waits, run it in one transaction, answer; False when told to stop. What a group wrote must not
        live on until the next one: hence a function."""
        taken, jobs = 0, list[_Job]()
        job = self._jobs.get()
        while job is not None:
            taken += 1
            if job.begun or not job.done.done():
                jobs.append(job)
            if job.begun or len(jobs) >= GROUP or self._jobs.empty():
                break
            job = self._jobs.get_nowait()
        outcomes = self._commit(jobs) if jobs else []
        if time.monotonic() - self._looked >= WAL_LOOK:
            self._looked = time.monotonic()
            self._keep_wal_short()
        self._tell(self._answer, taken, jobs, outcomes)  # from then on the connection may be the loop's
        return job is not None

    def _tell(self, what: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self._loop.call_soon_threadsafe(what, *arguments)

    def _commit(self, jobs: Sequence[_Job]) -> Sequence[_Outcome]:
        if begun := jobs[0].begun:  # the loop borrows only while nothing waits, so that this is all
            return [self._commit_begun(jobs[0], begun)]
        return self._commit_together(jobs)

    def _commit_begun(self, job: _Job, begun: _Begun) -> _Outcome:
        try:
            begun.transaction.commit()
        except exc.DBAPIError:
            assert self._connection
            _roll_back(self._connection)
            return self._commit_alone(job)
        self.commits += 1
        return _Outcome(begun.result)

    def _commit_together(self, jobs: Sequence[_Job]) -> Sequence[_Outcome]:
        if len(jobs) > 1 and not any(job.alone for job in jobs):
            try:
                with self._translated(), self._begin() as tx:
                    results = [_run_here(job.operation, tx) for job in jobs]
                self.commits += 1
                return [_Outcome(result) for result in results]
            except StoreError as error:
                if is_locked(error.__cause__):
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
        if self._connection is None or self._connection.invalidated:
            self._connection = self._engine.connect()
        for attempt in Retrying(
            retry=retry_if_exception(is_locked), stop=stop_after_attempt(4), wait=wait_random(0, 0.3), reraise=True
        ):
            with attempt:
                transaction = self._connection.begin()
        try:
            yield self._connection
            transaction.commit()
        except BaseException:
            _roll_back(self._connection)
            raise

    def _keep_wal_short(self) -> None:
        """Write a long WAL back and cut it: no new reader needs it then, and those that read now end soon."""
        wal = self._path.with_name(self._path.name + "-wal")
        if self._connection is None or not wal.exists() or wal.stat().st_size <= WAL_LIMIT:
            return
        with contextlib.suppress(sqlite3.Error, exc.DBAPIError):  # it is tried again after the next look
            _set_patience(self._connection, 0.5)
            try:
                driver = cast(Any, self._connection.connection.driver_connection)
                driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                _set_patience(self._connection, BUSY_SECONDS)

    def _stop(self) -> None:
        if self._connection is not None:
            try:
                failpoint("mid_checkpoint")
                cast(Any, self._connection.connection.driver_connection).execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except (sqlite3.Error, exc.DBAPIError):
                pass  # the WAL stays beside the file and is read by whoever opens it next
            self._connection.close()
        self._engine.dispose()


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


def _set_patience(connection: Connection, seconds: float) -> None:
    cast(Any, connection.connection.driver_connection).execute(f"PRAGMA busy_timeout={int(seconds * 1000)}")


def _roll_back(connection: Connection) -> None:
    try:
        connection.rollback()
        # When the commit itself failed, SQLAlchemy takes that for the end of the transaction; SQLite may not.
        cast(Any, connection.connection.driver_connection).rollback()
    except (sqlite3.Error, exc.DBAPIError):
        connection.invalidate()


def is_locked(error: BaseException | None) -> bool:
    """Whether SQLite refused because somebody else holds its lock."""
    name = getattr(getattr(error, "orig", None), "sqlite_errorname", "")
    return name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
