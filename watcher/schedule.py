"""When each watcher is due: one clock for all of them, built on APScheduler and rebuilt from the configuration."""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect, bisect_left, insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from hashlib import blake2b
from itertools import islice, takewhile
from typing import Any
from zoneinfo import ZoneInfo

from apscheduler.executors.base import BaseExecutor  # type: ignore[import-untyped]
from apscheduler.job import Job  # type: ignore[import-untyped]
from apscheduler.jobstores.base import (  # type: ignore[import-untyped]
    BaseJobStore,
    ConflictingIdError,
    JobLookupError,
)
from apscheduler.schedulers.asyncio import AsyncIOScheduler  # type: ignore[import-untyped]
from apscheduler.triggers.base import BaseTrigger  # type: ignore[import-untyped]
from cronsim import CronSim

from watcher import log, metrics
from watcher.values import Watcher

_log = log.get("schedule")
# APScheduler reports every run at INFO, which doubles the cost of a tick.
logging.getLogger("apscheduler").setLevel(logging.WARNING)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_SECOND = timedelta(seconds=1)

ALIASES = {
    "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@hourly": "0 * * * *",
}  # fmt: skip

AT_ONCE = 64
"""Ticks taken before the loop may do something else: ten thousand watchers on one second must not stall it."""

LEAST_SLEEP = 0.003
"""Seconds: ticks that are closer together are taken together."""

CATCH_UP_GAP = timedelta(milliseconds=5)
"""Between the runs that make up for what was missed while nobody was there."""

JUMP = 5.0
"""Seconds between wall clock and monotonic clock that count as a jump."""


@dataclass(frozen=True, slots=True)
class Due:
    """One moment of a schedule. ``at`` is its name, the same on every machine; ``when`` adds the jitter."""

    at: datetime
    when: datetime


@dataclass(frozen=True, slots=True)
class Tick:
    """One tick that was taken: run this watcher now. ``missed`` ticks before it had nobody to take them."""

    watcher: str
    at: datetime
    missed: int = 0


# --- schedules: pure --------------------------------------------------------------------------------------------------


def _fraction(text: str) -> float:
    """A number in [0, 1) that is the same for this text on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest()) / 2**56


def _minute(moment: datetime) -> datetime:
    return moment.replace(second=0, microsecond=0)


@lru_cache(maxsize=4096)
def _following(expression: str, zone: tzinfo, minute: datetime) -> datetime | None:
    """The first tick after this minute. Remembered, since many watchers share one expression and ask at one time."""
    for local in CronSim(expression, minute.astimezone(zone)):
        # In the hour that a clock change repeats, CronSim may answer with the first of the two.
        if (at := local.astimezone(UTC)) > minute:
            return at
    return None


class Every:
    """A fixed grid, moved by a hash of the watcher's name: no herd on one second, no drift, alike everywhere."""

    catches_up_at_first = True  # a watcher that never ran has no reason to wait for its first grid point

    def __init__(self, name: str, every: timedelta, jitter: timedelta = timedelta()) -> None:
        self.name = name
        self._every = every // _MICROSECOND
        self._offset = int(_fraction(name) * self._every)
        self._jitter = min(jitter // _MICROSECOND, self._every - 1)

    def _due(self, at: int) -> int:
        return at + int(_fraction(f"{self.name}|{at}") * self._jitter) if self._jitter else at

    def after(self, moment: datetime) -> Due:
        """The first tick that is due later than ``moment``."""
        x = (moment - _EPOCH) // _MICROSECOND
        at = x - (x - self._offset) % self._every
        when = self._due(at)
        if when <= x:
            at += self._every
            when = self._due(at)
        return Due(_EPOCH + timedelta(microseconds=at), _EPOCH + timedelta(microseconds=when))

    def before(self, moment: datetime) -> Due:
        """The last tick that is due at ``moment`` or earlier."""
        x = (moment - _EPOCH) // _MICROSECOND
        at = x - (x - self._offset) % self._every
        when = self._due(at)
        if when > x:
            at -= self._every
            when = self._due(at)
        return Due(_EPOCH + timedelta(microseconds=at), _EPOCH + timedelta(microseconds=when))

    def between(self, start: datetime, end: datetime) -> int:
        """How many ticks lie strictly between two ticks."""
        return max(0, (end - start) // _MICROSECOND // self._every - 1)


class Cron:
    """Five fields with the semantics of Debian's cron: clock changes included, either day field may match."""

    catches_up_at_first = False

    def __init__(self, name: str, expression: str, timezone: str = "UTC", jitter: timedelta = timedelta()) -> None:
        self.name = name
        self._expression = ALIASES.get(expression.strip().lower(), expression)
        self._zone = UTC if timezone == "UTC" else ZoneInfo(timezone)
        self._jitter = jitter

    def _due(self, at: datetime) -> Due:
        if not self._jitter:
            return Due(at, at)
        return Due(at, at + self._jitter * _fraction(f"{self.name}|{at.isoformat()}"))

    def after(self, moment: datetime) -> Due | None:
        """The first tick that is due later than ``moment``; None if there is none in 50 years."""
        at = _following(self._expression, self._zone, _minute(moment - self._jitter))
        while at is not None:
            due = self._due(at)
            if due.when > moment:
                return due
            at = _following(self._expression, self._zone, at)
        return None

    def before(self, moment: datetime) -> Due | None:
        """The last tick that is due at ``moment`` or earlier; None if there is none in 50 years."""
        for local in CronSim(self._expression, (moment + _MICROSECOND).astimezone(self._zone), reverse=True):
            due = self._due(local.astimezone(UTC))
            if due.when <= moment:
                return due
        return None

    def between(self, start: datetime, end: datetime) -> int:
        """How many ticks lie strictly between two ticks; a thousand stands for more."""
        ticks = islice(CronSim(self._expression, start.astimezone(self._zone)), 1000)
        return sum(1 for _ in takewhile(lambda local: local.astimezone(UTC) < end, ticks))


Schedule = Every | Cron


def schedule(watcher: Watcher) -> Schedule | None:
    """The schedule of a watcher, or None for one that only runs by hand."""
    if watcher.every:
        return Every(watcher.name, watcher.every, watcher.jitter)
    if watcher.cron:
        return Cron(watcher.name, watcher.cron, watcher.timezone, watcher.jitter)
    return None


# --- the clock --------------------------------------------------------------------------------------------------------


class _Trigger(BaseTrigger):  # type: ignore[misc]
    """Our schedule as APScheduler asks for it; it remembers the tick that it named last."""

    __slots__ = ("next", "schedule")

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.next: Due | None = None

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        # After `now` and never just after the previous: what was missed is made up for by one run.
        base = max(previous_fire_time or now, now)
        if self.next is None or self.next.when <= base:
            self.next = self.schedule.after(base)
        return self.next.when if self.next else None


class _Store(BaseJobStore):  # type: ignore[misc]
    """Jobs in memory, sorted by time. Hands out due ones in small batches, so that the loop breathes between them.

    APScheduler's own store searches in Python what `bisect` searches in C, which is a third of the cost of a tick.
    """

    def __init__(self) -> None:
        super().__init__()
        self._jobs: dict[str, tuple[float, Job]] = {}
        self._order: list[tuple[float, str]] = []

    def lookup_job(self, job_id: str) -> Job | None:
        return self._jobs[job_id][1] if job_id in self._jobs else None

    def get_due_jobs(self, now: datetime) -> list[Job]:
        due = bisect(self._order, (now.timestamp(), "\U0010ffff"), hi=min(len(self._order), AT_ONCE))
        return [self._jobs[name][1] for _, name in self._order[:due]]

    def get_next_run_time(self) -> datetime | None:
        when: datetime | None = self._jobs[self._order[0][1]][1].next_run_time if self._order else None
        return when

    def get_all_jobs(self) -> list[Job]:
        return [self._jobs[name][1] for _, name in self._order]

    def add_job(self, job: Job) -> None:
        if job.id in self._jobs:
            raise ConflictingIdError(job.id)
        when = job.next_run_time.timestamp()
        self._jobs[job.id] = when, job
        insort(self._order, (when, job.id))

    def update_job(self, job: Job) -> None:
        self.remove_job(job.id)
        self.add_job(job)

    def remove_job(self, job_id: str) -> None:
        if job_id not in self._jobs:
            raise JobLookupError(job_id)
        when, _ = self._jobs.pop(job_id)
        del self._order[bisect_left(self._order, (when, job_id))]

    def remove_all_jobs(self) -> None:
        self._jobs.clear()
        self._order.clear()


class _Inline(BaseExecutor):  # type: ignore[misc]
    """Calls the job in the loop, at once: it only starts a run, and who runs it is not APScheduler's business."""

    def submit_job(self, job: Job, run_times: list[datetime]) -> None:
        job.func(*job.args, when=run_times[-1])

    def _do_submit_job(self, job: Job, run_times: list[datetime]) -> None:
        raise NotImplementedError("submit_job does all of it")


class _Scheduler(AsyncIOScheduler):  # type: ignore[misc]
    """Its timer already runs in the loop: to wake the loop up once more through a pipe would double a tick's cost."""

    def _start_timer(self, wait_seconds: float | None) -> None:
        self._stop_timer()
        if wait_seconds is not None:
            if wait_seconds > 0:
                wait_seconds = max(wait_seconds, LEAST_SLEEP)
            self._timeout = self._eventloop.call_later(wait_seconds, self._turn)

    def _turn(self) -> None:
        self._start_timer(self._process_jobs())


class Clock:
    """Calls ``fire`` in the event loop for every tick of every watcher that was ``set``.

    ``fire`` must return at once. ``jumped`` (seconds, negative when the wall clock went back) is called when the wall
    clock was moved; by then the plans are already made anew.
    """

    def __init__(
        self,
        now: Callable[[], datetime],
        fire: Callable[[Tick], None],
        *,
        jumped: Callable[[float], None] = lambda seconds: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._fire = fire
        self._jumped = jumped
        self._monotonic = monotonic
        self._scheduler = _Scheduler(
            timezone=UTC,
            jobstores={"default": _Store()},
            executors={"default": _Inline()},
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )
        self._plans: dict[str, tuple[Any, ...]] = {}
        self._taken: dict[str, datetime] = {}
        self._offset = 0.0
        self._look: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to tick, in the running loop."""
        self._scheduler.start()
        self._offset = self._now().timestamp() - self._monotonic()
        self._look = asyncio.get_running_loop().call_later(1, self._look_again)

    def stop(self) -> None:
        """No tick after this."""
        if self._look:
            self._look.cancel()
            self._look = None
            self._scheduler.remove_all_jobs()
            self._scheduler.shutdown(wait=False)
        self._plans.clear()

    def set(self, watchers: Iterable[Watcher], taken: Mapping[str, datetime | None] | None = None) -> None:
        """Follow exactly these watchers; those whose schedule is unchanged are not disturbed. Call ``start`` first.

        ``taken`` gives the last tick that was ever taken for a watcher that is new to this clock: what was missed
        since then is made up for by one run. A name that ``taken`` does not hold is not caught up.
        """
        taken = taken or {}
        wanted = {w.name: w for w in watchers if w.enabled}
        self._scheduler.pause()  # else every single change wakes the scheduler
        try:
            for name in self._plans.keys() - wanted.keys():
                self._remove(name)
            late = 0
            now = self._now()
            for name, watcher in wanted.items():
                plan = (watcher.every, watcher.cron, watcher.timezone, watcher.jitter)
                if self._plans.get(name) == plan:
                    continue
                if name in self._plans:
                    self._remove(name)
                times = schedule(watcher)
                if times is None:
                    continue
                self._plans[name] = plan
                first = None
                if name in taken and self._missed_one(times, taken[name], now):
                    if (last := taken[name]) is not None:
                        self._taken[name] = last
                    first = now + late * CATCH_UP_GAP
                    late += 1
                self._add(name, times, first)
        finally:
            self._scheduler.resume()

    @staticmethod
    def _missed_one(times: Schedule, taken: datetime | None, now: datetime) -> bool:
        if taken is None:
            return times.catches_up_at_first
        last = times.before(now)
        return last is not None and last.at > taken

    def _add(self, name: str, times: Schedule, first: datetime | None) -> None:
        trigger = _Trigger(times)
        when = first or trigger.get_next_fire_time(None, self._now())
        if when is not None:
            self._scheduler.add_job(self._due, trigger, args=(name, trigger), id=name, name=name, next_run_time=when)

    def _remove(self, name: str) -> None:
        del self._plans[name]
        self._taken.pop(name, None)
        if self._scheduler.get_job(name):
            self._scheduler.remove_job(name)

    def _due(self, name: str, trigger: _Trigger, when: datetime = _EPOCH) -> None:
        now = self._now()
        late = now - when
        metrics.schedule_lag.observe(max(0.0, late.total_seconds()))
        planned = trigger.next
        missed = 0
        if planned is None or planned.when != when or late > _SECOND:
            planned = trigger.schedule.before(now)
            if planned is None:
                return
            if (last := self._taken.get(name)) is not None:
                missed = trigger.schedule.between(last, planned.at)
                metrics.missed_ticks.labels(name).inc(missed)
        self._taken[name] = planned.at
        self._fire(Tick(name, planned.at, missed))

    def next_run(self, name: str) -> datetime | None:
        """When the watcher is due next; None when it has no schedule or is not followed."""
        job = self._scheduler.get_job(name)
        when: datetime | None = job.next_run_time if job else None
        return when

    # --- clock jumps ---

    def _look_again(self) -> None:
        self.look()
        self._look = asyncio.get_running_loop().call_later(1, self._look_again)

    def look(self) -> None:
        """Notice a wall clock that was moved, or a machine that slept, and plan anew. Called each second."""
        offset = self._now().timestamp() - self._monotonic()
        jump = offset - self._offset
        self._offset = offset
        if abs(jump) <= JUMP:
            return
        _log.warning("clock.jumped", seconds=round(jump, 3))
        now = self._now()
        self._scheduler.pause()
        for job in self._scheduler.get_jobs() if jump < 0 else ():
            name, trigger = job.args
            if self._taken.get(name, now) > now:
                self._taken[name] = now  # ticks of a future that is not one any more
            trigger.next = None
            job.modify(next_run_time=trigger.get_next_fire_time(None, now))
        self._scheduler.resume()
        self._jumped(jump)
