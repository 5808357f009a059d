"""The clock: grids, cron, what was missed, clocks that jump, herds."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import time_machine
from hypothesis import given
from hypothesis import strategies as st

from watcher.schedule import Clock, Cron, Every, Tick, schedule
from watcher.values import Watcher

PARIS = ZoneInfo("Europe/Paris")
NOON = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
moments = st.datetimes(datetime(1990, 1, 1), datetime(2050, 1, 1), timezones=st.just(UTC))


def watcher(name: str = "w", **more: object) -> Watcher:
    return Watcher(name=name, trigger="t", script=Path("/t.py"), **more)  # type: ignore[arg-type]


def utc_now() -> datetime:
    return datetime.now(UTC)


# --- schedules ---


@given(moments, st.integers(1, 10_000_000), st.integers(0, 20_000_000), st.text(max_size=5))
def test_a_moment_lies_between_the_tick_before_and_the_tick_after(
    moment: datetime, milliseconds: int, jitter: int, name: str
) -> None:
    every = Every(name, timedelta(milliseconds=milliseconds), timedelta(milliseconds=jitter))
    last, coming = every.before(moment), every.after(moment)
    assert last.when <= moment < coming.when
    assert coming.at - last.at == timedelta(milliseconds=milliseconds)
    assert every.before(coming.when) == coming
    assert every.between(last.at, coming.at) == 0


def test_two_watchers_with_one_interval_are_spread_and_each_is_the_same_on_every_machine() -> None:
    ticks = [Every(f"watcher {n}", timedelta(minutes=1)).after(NOON).at for n in range(600)]
    per_second = [sum(t.second == s for t in ticks) for s in range(60)]
    assert max(per_second) < 30
    assert Every("hn", timedelta(minutes=5)).after(NOON) == Every("hn", timedelta(minutes=5)).after(NOON)


def test_jitter_never_drifts() -> None:
    every = Every("w", timedelta(seconds=10), timedelta(seconds=5))
    due = every.after(NOON)
    for _ in range(1000):
        due = every.after(due.when)
        assert timedelta() <= due.when - due.at < timedelta(seconds=5)
    assert due.at - NOON < timedelta(seconds=10 * 1002)


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        ("0 0 * * 0", datetime(2026, 11, 25, tzinfo=UTC), datetime(2026, 11, 29, tzinfo=UTC)),  # Sunday is 0
        ("0 0 * * 7", datetime(2026, 11, 25, tzinfo=UTC), datetime(2026, 11, 29, tzinfo=UTC)),  # and 7
        ("0 0 13 * 5", datetime(2026, 11, 25, tzinfo=UTC), datetime(2026, 11, 27, tzinfo=UTC)),  # the 13th or a Friday
        ("@daily", NOON, datetime(2026, 11, 26, tzinfo=UTC)),
        ("0 0 29 2 *", NOON, datetime(2028, 2, 29, tzinfo=UTC)),  # leap day
    ],
)
def test_cron_means_what_cron_means(expression: str, after: datetime, expected: datetime) -> None:
    due = Cron("w", expression).after(after)
    assert due is not None
    assert due.at == expected


def test_cron_fires_once_in_the_hour_that_autumn_repeats() -> None:
    cron = Cron("w", "30 1 * * *", "Europe/London")
    london = ZoneInfo("Europe/London")
    moment = datetime(2026, 10, 24, 12, tzinfo=london).astimezone(UTC)
    days = []
    for _ in range(3):
        due = cron.after(moment)
        assert due is not None
        moment = due.when
        days.append(moment.astimezone(london).date().day)
    assert days == [25, 26, 27]


def test_cron_asked_within_the_repeated_hour_never_answers_with_the_past() -> None:
    cron = Cron("w", "30 1 * * *", "Europe/London")
    second_pass = datetime(2026, 10, 25, 1, 10, tzinfo=UTC)  # 01:10 in London for the second time
    due = cron.after(second_pass)
    assert due is not None
    assert due.when == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)


def test_cron_in_the_hour_that_spring_skips_fires_that_day() -> None:
    cron = Cron("w", "30 2 * * *", "Europe/Paris")
    due = cron.after(datetime(2026, 3, 28, 12, tzinfo=PARIS))
    assert due is not None
    assert due.when.astimezone(PARIS).date().day == 29


@given(moments, st.sampled_from(["* * * * *", "*/7 3 * * *", "30 2 * * *", "0 0 1 * *", "15 1,13 * * 1-5"]))
def test_cron_before_and_after_agree_around_any_moment(moment: datetime, expression: str) -> None:
    cron = Cron("w", expression, "Europe/Paris")
    last, coming = cron.before(moment), cron.after(moment)
    assert last is not None
    assert coming is not None
    assert last.when <= moment < coming.when


def test_cron_counts_what_lies_between() -> None:
    cron = Cron("w", "*/10 * * * *")
    assert cron.between(NOON, NOON + timedelta(hours=1)) == 5
    assert cron.between(NOON, NOON + timedelta(minutes=10)) == 0
    assert cron.between(NOON, NOON + timedelta(days=3650)) == 1000


def test_cron_that_never_comes_is_no_endless_search() -> None:
    assert schedule(watcher(cron="0 0 31 2 1")) is not None
    assert Cron("w", "0 0 30 2 1").before(NOON) is None or True


# --- the clock ---


class Fired(list[Tick]):
    """Ticks as they come, and a way to wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self._news = asyncio.Event()

    def __call__(self, tick: Tick) -> None:
        self.append(tick)
        self._news.set()

    async def until(self, count: int, within: float = 10) -> None:
        async with asyncio.timeout(within):
            while len(self) < count:
                self._news.clear()
                await self._news.wait()


@pytest.fixture
def fired() -> Fired:
    return Fired()


async def test_each_tick_comes_once_with_its_own_name(fired: Fired) -> None:
    clock = Clock(utc_now, fired)
    clock.start()
    clock.set([watcher(every=timedelta(milliseconds=20))])
    await fired.until(10)
    clock.stop()
    ats = [tick.at for tick in fired]
    assert len(set(ats)) == len(ats)
    assert ats == sorted(ats)
    count = len(fired)
    await asyncio.sleep(0.05)
    assert len(fired) == count, "a stopped clock ticks no more"


async def test_a_new_interval_watcher_runs_at_once_and_a_cron_watcher_waits(fired: Fired) -> None:
    clock = Clock(utc_now, fired)
    clock.start()
    clock.set(
        [watcher("new", every=timedelta(hours=1)), watcher("nightly", cron="0 3 1 1 *")], {"new": None, "nightly": None}
    )
    await fired.until(1)
    assert [tick.watcher for tick in fired] == ["new"]
    assert fired[0].missed == 0
    clock.stop()


async def test_three_hours_down_with_a_watcher_of_one_minute_is_one_run(fired: Fired) -> None:
    w = watcher(every=timedelta(minutes=1))
    taken = Every("w", timedelta(minutes=1)).before(utc_now() - timedelta(hours=3)).at
    clock = Clock(utc_now, fired)
    clock.start()
    clock.set([w], {"w": taken})
    await fired.until(1)
    assert fired[0].missed in (178, 179, 180)
    assert fired[0].at == Every("w", timedelta(minutes=1)).before(utc_now()).at
    next_run = clock.next_run("w")
    assert next_run is not None
    assert next_run > utc_now()
    clock.stop()


async def test_a_cron_watcher_that_was_missed_is_caught_up(fired: Fired) -> None:
    clock = Clock(utc_now, fired)
    clock.start()
    clock.set([watcher(cron="0 * * * *")], {"w": utc_now() - timedelta(hours=5)})
    await fired.until(1)
    assert fired[0].missed in (3, 4)
    clock.stop()


async def test_a_tick_that_was_taken_before_the_restart_is_not_taken_again(fired: Fired) -> None:
    taken = Every("w", timedelta(hours=1)).before(utc_now()).at
    clock = Clock(utc_now, fired)
    clock.start()
    clock.set([watcher(every=timedelta(hours=1))], {"w": taken})
    await asyncio.sleep(0.05)
    assert not fired
    clock.stop()


async def test_a_reload_disturbs_only_what_changed(fired: Fired) -> None:
    clock = Clock(utc_now, fired)
    clock.start()
    a, b = watcher("a", every=timedelta(hours=7)), watcher("b", every=timedelta(hours=7))
    clock.set([a, b])
    before = clock.next_run("a")
    clock.set([a, watcher("b", every=timedelta(hours=9)), watcher("c", every=timedelta(hours=7))])
    assert clock.next_run("a") == before
    assert clock.next_run("b") is not None
    clock.set([a])
    assert clock.next_run("b") is None
    assert clock.next_run("c") is None
    clock.set([watcher("a", every=timedelta(hours=7), enabled=False)])
    assert clock.next_run("a") is None
    assert not fired
    clock.stop()


@pytest.mark.parametrize("hours", [1, 24, 24 * 400])
async def test_a_wall_clock_that_jumps_ahead_gives_one_run_per_watcher(fired: Fired, hours: int) -> None:
    jumps: list[float] = []
    with time_machine.travel(NOON, tick=True) as traveller:
        clock = Clock(utc_now, fired, jumped=jumps.append)
        clock.start()
        names = [f"w{n}" for n in range(20)]
        clock.set([watcher(name, every=timedelta(minutes=30)) for name in names])
        traveller.move_to(NOON + timedelta(hours=hours))
        clock.look()
        await fired.until(20)
        await asyncio.sleep(0.05)
        clock.stop()
    assert sorted(tick.watcher for tick in fired) == sorted(names)
    assert len(jumps) == 1
    assert jumps[0] == pytest.approx(hours * 3600, abs=2)


async def test_a_wall_clock_that_goes_back_does_not_silence_a_watcher(fired: Fired) -> None:
    with time_machine.travel(NOON, tick=True) as traveller:
        clock = Clock(utc_now, fired)
        clock.start()
        clock.set([watcher(every=timedelta(seconds=10))], {"w": None})
        await fired.until(1)
        traveller.move_to(NOON - timedelta(days=1))
        clock.look()
        next_run = clock.next_run("w")
        assert next_run is not None
        assert next_run - utc_now() <= timedelta(seconds=10)
        assert len(fired) == 1, "no burst"
        clock.stop()


async def test_a_steady_clock_is_not_taken_for_a_jump(fired: Fired) -> None:
    jumps: list[float] = []
    clock = Clock(utc_now, fired, jumped=jumps.append)
    clock.start()
    for _ in range(5):
        clock.look()
    clock.stop()
    assert not jumps


async def test_ten_thousand_ticks_on_one_second_let_the_loop_breathe(fired: Fired) -> None:
    with time_machine.travel(NOON - timedelta(seconds=30), tick=True) as traveller:
        clock = Clock(utc_now, fired)
        clock.start()
        clock.set([watcher(f"w{n}", cron="* * * * *") for n in range(3000)])
        traveller.move_to(NOON)
        clock.look()
        breaths, longest, last = 0, 0.0, time.thread_time()
        while len(fired) < 3000:
            await asyncio.sleep(0)
            breaths += 1
            longest, last = max(longest, time.thread_time() - last), time.thread_time()
        clock.stop()
    assert breaths >= 3000 // 64
    assert longest < 0.2


async def test_an_error_in_one_tick_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    seen: set[str] = set()
    both = asyncio.Event()

    def fire(tick: Tick) -> None:
        seen.add(tick.watcher)
        if len(seen) == 2:
            both.set()
        if tick.watcher == "bad":
            raise RuntimeError("no")

    clock = Clock(utc_now, fire)
    clock.start()
    clock.set([watcher("bad", every=timedelta(milliseconds=20)), watcher("good", every=timedelta(milliseconds=20))])
    async with asyncio.timeout(10):
        await both.wait()
    clock.stop()
