"""Who wakes whom in one process: ticks start runs, runs wake the dispatcher, and no run is ever doubled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from watcher import log, metrics
from watcher.errors import DatabaseFull, StoreError
from watcher.schedule import Tick
from watcher.store import watchers as watcher_store

if TYPE_CHECKING:
    from watcher.run import Runner
    from watcher.store.db import Database
    from watcher.values import RunRecord

_log = log.get("engine")

TELL_EVERY = timedelta(minutes=5)  # that a watcher's runs take longer than its interval


@dataclass(slots=True)
class Embedded:
    """The runs of this process.

    On PostgreSQL each tick is taken in the database, so that of several processes one runs it; on SQLite there is
    only this one.
    """

    runner: Runner
    db: Database
    clock: Callable[[], datetime]
    brake: Callable[[], str] = lambda: ""  # why no run may start now, or nothing
    full: Callable[[DatabaseFull], None] = lambda error: None
    backlogged: Callable[[str], bool] = lambda name: False  # too many deliveries of this watcher wait
    _running: dict[str, asyncio.Task[Any]] = field(default_factory=dict)
    _told: dict[str, datetime] = field(default_factory=dict)
    _overrun: dict[str, int] = field(default_factory=dict)  # ticks that came while a run went on
    _slow: set[str] = field(default_factory=set)  # watchers whose last run took longer than their interval
    _unstored: dict[str, str] = field(
        default_factory=dict
    )  # watchers whose last run the database did not take, and why

    def tick(self, tick: Tick) -> None:
        """Start the run of one tick, or skip it: the run before still goes on, or the database has no room."""
        name = tick.watcher
        if name in self._running:
            self._overrun[name] = self._overrun.get(name, 0) + 1
            metrics.skipped_ticks.labels(name).inc()
            return
        if self.brake() or self.backlogged(name):
            return
        task = asyncio.create_task(self._run(tick), name=f"run {name}")
        self._running[name] = task
        task.add_done_callback(lambda _: self._ended(name))

    def _ended(self, name: str) -> None:
        self._running.pop(name, None)
        skipped = self._overrun.pop(name, 0)
        if not skipped:
            self._slow.discard(name)
            return
        self.runner.note_ticks(name, skipped=skipped)
        if name not in self._slow:  # once is nothing: a first run waits for its worker to start
            self._slow.add(name)
            return
        now = self.clock()
        if now - self._told.get(name, now - TELL_EVERY) >= TELL_EVERY:
            # The run takes longer than the interval: the watcher is later than its schedule says.
            _log.warning("run.overran", watcher=name, skipped_ticks=skipped)
            self._told[name] = now

    async def _run(self, tick: Tick) -> None:
        if tick.missed:
            self.runner.note_ticks(tick.watcher, missed=tick.missed)
        try:
            if self.db.dialect == "postgresql" and not await self._take(tick):
                return
            await self.runner.run(tick.watcher, tick_at=tick.at)
            self._stored(tick.watcher)
        except DatabaseFull as error:
            self.full(error)
        except StoreError as error:
            self._not_stored(tick.watcher, str(error))
        except Exception:
            # One watcher's accident must not end the others; the next tick tries again.
            _log.exception("run.crashed", watcher=tick.watcher)

    def _not_stored(self, name: str, error: str) -> None:
        """Tell of trouble with the database once, and not at each tick of each watcher while it lasts."""
        if error not in self._unstored.values():
            _log.error("run.not_stored", watcher=name, error=error)
        self._unstored[name] = error

    def _stored(self, name: str) -> None:
        error = self._unstored.pop(name, None)
        if error is not None and error not in self._unstored.values():
            _log.info("run.stored_again", watcher=name)

    async def _take(self, tick: Tick) -> bool:
        return await self.db.write(lambda tx: watcher_store.take(tx, tick.watcher, tick.at))

    async def nudge(self, name: str) -> RunRecord:
        """Run a watcher now, after the run that may be going on. Raises StoreError when there is no room for one."""
        while (going := self._running.get(name)) is not None:
            await asyncio.wait({going})
        if reason := self.brake():
            raise StoreError(f"no run may start: {reason}")
        task = asyncio.create_task(self.runner.run(name), name=f"run {name}")
        self._running[name] = task
        task.add_done_callback(lambda _: self._ended(name))
        return await task

    def running(self) -> frozenset[str]:
        """The watchers whose run goes on now."""
        return frozenset(self._running)

    async def drain(self, grace: float) -> None:
        """Give the runs ``grace`` seconds to end, then cancel them: an uncommitted run leaves no trace."""
        tasks = list(self._running.values())
        if not tasks:
            return
        await asyncio.wait(tasks, timeout=grace)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
