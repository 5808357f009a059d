"""What the service says by itself: each trouble once when it begins and once when it is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.support import store as s
from tests.support.running import Bench, a, running
from watcher import failpoint
from watcher.app import Service
from watcher.engine.embedded import Embedded
from watcher.engine.silence import Listener, rhythm
from watcher.errors import StoreError
from watcher.schedule import Tick
from watcher.store import watchers
from watcher.store.db import Database
from watcher.values import Config, Watcher

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


# --- a watcher that finds nothing any more ----------------------------------------------------------------------------


def test_a_rhythm_takes_ten_finds_and_is_three_times_the_longest_wait() -> None:
    daily = [NOW + n * timedelta(days=1) for n in range(10)]
    assert rhythm(daily[:9]) is None
    assert rhythm(daily) == timedelta(days=3)
    assert rhythm([*daily[:5], *(at + timedelta(days=2) for at in daily[5:])]) == timedelta(days=9), "a weekend"
    assert rhythm([NOW + n * timedelta(minutes=1) for n in range(30)]) == HOUR, "an hour at least"


def watching(**options: object) -> Config:
    watcher = replace(Watcher(name="w", trigger="t", script=Path("t.py"), flows=("f",)), **options)  # type: ignore[arg-type]
    return Config(file=None, database="", data=Path(), watchers={"w": watcher})


async def finds(db: Database, count: int, every: timedelta = HOUR) -> datetime:
    """Commit runs that each found one item. When the last one was."""
    await s.know(db, "w")
    for n in range(count):
        await s.commit(db, [s.new_item(str(n), n)], at=NOW + n * every)
    return NOW + (count - 1) * every


async def succeeds(db: Database, at: datetime) -> None:
    quiet = {"w": watchers.Quiet(checked_at=at, success_at=at)}
    await db.write(lambda tx: watchers.flush(tx, quiet, at))


async def test_a_silence_far_beyond_the_rhythm_is_told_once_and_its_end_too(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = Mock()
    monkeypatch.setattr("watcher.engine.silence._log", logger)
    last = await finds(db, 12)
    listener = Listener(db, watching)
    await succeeds(db, last + 3 * HOUR - timedelta(seconds=1))
    await listener.look()
    assert not listener.silent
    await succeeds(db, last + 3 * HOUR)
    await listener.look()
    await listener.look()
    (told,) = logger.warning.call_args_list
    assert told.args == ("watcher.silent",)
    assert told.kwargs["reason"].startswith("nothing found since 2026-03-01 23:00Z; before that never for more than 6")
    assert logger.info.call_args_list == []
    await s.commit(db, [s.new_item("again", 1)], at=last + 4 * HOUR)
    await listener.look()
    assert not listener.silent
    assert logger.info.call_args.args == ("watcher.heard_again",)


@pytest.mark.parametrize(
    ("options", "silent"),
    [
        ({}, True),
        ({"silent_after": "off"}, False),
        ({"silent_after": timedelta(days=30)}, False),
        ({"silent_after": timedelta(hours=2)}, True),
        ({"enabled": False}, False),
    ],
)
async def test_the_bound_can_be_set_and_switched_off(
    sqlite_db: Database, options: dict[str, object], silent: bool
) -> None:
    last = await finds(sqlite_db, 12)
    await succeeds(sqlite_db, last + timedelta(days=2))
    listener = Listener(sqlite_db, lambda: watching(**options))
    await listener.look()
    assert bool(listener.silent) is silent


async def test_neither_a_failing_watcher_nor_a_stopped_service_is_silent(sqlite_db: Database) -> None:
    last = await finds(sqlite_db, 12)
    listener = Listener(sqlite_db, watching)
    await listener.look()  # days later, but nobody looked at the source since
    assert not listener.silent
    await succeeds(sqlite_db, last + timedelta(days=2))
    await sqlite_db.write(lambda tx: watchers.failed(tx, "w", "down", None, last + timedelta(days=3)))
    await listener.look()
    assert not listener.silent


async def test_a_watcher_that_never_found_anything_is_silent_only_by_a_bound_of_its_own(sqlite_db: Database) -> None:
    await s.know(sqlite_db, "w")
    await s.commit(sqlite_db, [], at=NOW)
    await succeeds(sqlite_db, NOW + timedelta(days=9))
    for options, silent in (({}, False), ({"silent_after": timedelta(days=1)}, True)):
        listener = Listener(sqlite_db, lambda options=options: watching(**options))  # type: ignore[misc]
        await listener.look()
        assert bool(listener.silent) is silent


# --- the database -----------------------------------------------------------------------------------------------------


async def test_a_database_in_trouble_is_told_of_once_and_once_when_it_is_well(
    sqlite_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = Mock()
    monkeypatch.setattr("watcher.engine.embedded._log", logger)
    trouble: list[str] = ["locked"]

    class Runner:
        async def run(self, name: str, *, tick_at: datetime) -> None:
            if trouble:
                raise StoreError(trouble[0])

    engine = Embedded(Runner(), sqlite_db, lambda: NOW)  # type: ignore[arg-type]

    async def ticks() -> None:
        for name in ("one", "two"):
            engine.tick(Tick(name, NOW))
        await engine.drain(5)

    for _ in range(3):
        await ticks()
    assert [call.args[0] for call in logger.error.call_args_list] == ["run.not_stored"]
    trouble[0] = "out of reach"
    await ticks()
    assert [call.kwargs["error"] for call in logger.error.call_args_list] == ["locked", "out of reach"]
    trouble.clear()
    await ticks()
    await ticks()
    assert [call.args[0] for call in logger.info.call_args_list] == ["run.stored_again"]


# --- the watchdog -----------------------------------------------------------------------------------------------------


class Watched:
    """As much of a service as its watchdog looks at."""

    def __init__(self) -> None:
        self.pings = 0
        self.notifier = Mock(watchdog_every=timedelta(milliseconds=20), watchdog=self.ping)
        self.stuck = asyncio.Event()
        self.broken = False

    def ping(self) -> None:
        self.pings += 1

    async def _ask_database(self) -> None:
        if self.broken:
            raise StoreError("out of reach")
        if self.stuck.is_set():
            await asyncio.Event().wait()


async def pings(service: Watched, seconds: float) -> int:
    before = service.pings
    await asyncio.sleep(seconds)  # so long is listened
    return service.pings - before


async def test_the_watchdog_is_fed_only_while_the_database_answers() -> None:
    service = Watched()
    feeding = asyncio.create_task(Service._feed_watchdog(service))  # type: ignore[arg-type]
    assert await pings(service, 0.3) >= 2
    service.stuck.set()
    await asyncio.sleep(0.05)
    assert await pings(service, 0.2) == 0, "a query that never ends"
    service.stuck.clear()
    assert await pings(service, 0.3) >= 2, "and it goes on when it answers again"
    service.broken = True
    await asyncio.sleep(0.05)
    assert await pings(service, 0.2) == 0, "a database that is out of reach"
    feeding.cancel()


async def test_a_loop_that_hangs_feeds_no_watchdog() -> None:
    service = Watched()
    feeding = asyncio.create_task(Service._feed_watchdog(service))  # type: ignore[arg-type]
    assert await pings(service, 0.2) >= 1
    before = service.pings
    time.sleep(0.3)  # the loop hangs
    assert service.pings == before
    feeding.cancel()


# --- a fault of ours after a commit -----------------------------------------------------------------------------------


@pytest.fixture
async def bench(sqlite_db: Database, tmp_path: Path) -> AsyncIterator[Bench]:
    async with running(sqlite_db, tmp_path, NOW) as bench:
        yield bench


async def test_a_fault_after_the_commit_does_not_say_that_nothing_was_changed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.run(a(1))
    with monkeypatch.context() as armed:
        armed.setattr(failpoint, "_points", {"after_commit": ("raise", 1)})
        armed.setattr(failpoint, "_reached", {})
        record = await bench.run(a(1), a(2))
    assert record.outcome == "failed"
    assert "what was found is committed and will be sent" in record.error
    assert await bench.keys() == ["2"]


# --- runs that take longer than their interval ------------------------------------------------------------------------


async def test_a_watcher_that_is_too_slow_is_told_of_when_it_is_so_twice_in_a_row(
    sqlite_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = Mock()
    monkeypatch.setattr("watcher.engine.embedded._log", logger)
    slow = asyncio.Event()

    class Runner:
        async def run(self, name: str, *, tick_at: datetime) -> None:
            await slow.wait()

        def note_ticks(self, name: str, *, skipped: int) -> None: ...

    engine = Embedded(Runner(), sqlite_db, lambda: NOW)  # type: ignore[arg-type]

    async def run(skipped: int) -> list[str]:
        slow.clear()
        for _ in range(1 + skipped):
            engine.tick(Tick("w", NOW))
        await asyncio.sleep(0)
        slow.set()
        await engine.drain(5)
        return [call.args[0] for call in logger.warning.call_args_list]

    assert await run(1) == [], "a first run waits for its worker"
    assert await run(0) == []
    assert await run(1) == []
    assert await run(2) == ["run.overran"]
