"""What the clock costs: ten thousand watchers, a thousand ticks a second, beside a bare heap of timers.

    python -m benchmarks.clock

Goals: at most 3 times the processor time of the heap; 99 of 100 ticks less than 10 ms late; the loop never held up
for 50 ms, not even when all watchers share one second. The heap does the least that any clock must: it knows when
each is due, wakes up then, and calls. Both are measured in turn; what is printed are medians.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from apscheduler.schedulers import base  # type: ignore[import-untyped]

from watcher.schedule import Clock
from watcher.values import Watcher

ROUNDS = 5
WATCHERS = 10_000
EVERY = timedelta(seconds=10)
SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Measured:
    per_tick: float  # µs of processor time
    ticks: float  # per second
    late: float  # ms, 99 of 100 are less
    stall: float  # ms for which the loop was held up at worst


def now() -> datetime:
    return datetime.now(UTC)


async def observe(late: list[float]) -> Measured:
    """Look on for a while, at what arrives in ``late`` (seconds)."""
    await asyncio.sleep(0.3)
    late.clear()
    cpu, begun = time.process_time(), time.perf_counter()
    await asyncio.sleep(SECONDS)
    return measure(late, time.process_time() - cpu, time.perf_counter() - begun)


def measure(late: list[float], processor: float, took: float, stall: float = 0.0) -> Measured:
    ordered = sorted(late)
    p99 = ordered[int(len(ordered) * 0.99)]
    return Measured(processor / len(ordered) * 1e6, len(ordered) / took, p99 * 1e3, stall * 1e3)


async def heap() -> Measured:
    loop, late = asyncio.get_running_loop(), list[float]()
    start, every = loop.time(), EVERY.total_seconds()
    due = [(start + n * every / WATCHERS, n) for n in range(WATCHERS)]
    heapq.heapify(due)
    timer: list[asyncio.TimerHandle] = []

    def turn() -> None:
        moment = loop.time()
        while due[0][0] <= moment:
            when, n = due[0]
            heapq.heapreplace(due, (when + every, n))
            late.append(moment - when)
        timer[:] = [loop.call_at(due[0][0], turn)]

    turn()
    measured = await observe(late)
    timer[0].cancel()
    return measured


def watchers(**when: object) -> list[Watcher]:
    return [Watcher(f"watcher {n}", "t", Path("/t.py"), **when) for n in range(WATCHERS)]  # type: ignore[arg-type]


async def spread() -> Measured:
    late = list[float]()
    clock = Clock(now, lambda tick: late.append((now() - tick.at).total_seconds()))
    clock.start()
    clock.set(watchers(every=EVERY))
    measured = await observe(late)
    clock.stop()
    return measured


async def herd() -> Measured:
    """All in the same second: the worst that a configuration can ask for.

    The minute is moved to where we are. The loop goes round without a pause meanwhile; its longest round, by processor
    time, is the stall: another process's turn is not ours.
    """
    moment = now()
    offset = moment.replace(second=50, microsecond=0) - moment

    class Moved(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return now() + offset

    late = list[float]()
    real, base.datetime = base.datetime, Moved
    try:
        clock = Clock(Moved.now, lambda tick: late.append((Moved.now() - tick.at).total_seconds()))
        clock.start()
        clock.set(watchers(cron="* * * * *"))
        while not late:
            await asyncio.sleep(0)
        worst, last = 0.0, time.thread_time()
        cpu, begun = time.process_time(), time.perf_counter()
        while len(late) < WATCHERS:
            await asyncio.sleep(0)
            worst, last = max(worst, time.thread_time() - last), time.thread_time()
        measured = measure(late, time.process_time() - cpu, time.perf_counter() - begun, worst)
        clock.stop()
    finally:
        base.datetime = real
    return measured


def main() -> None:
    found: dict[str, list[Measured]] = {"heap of timers": [], "clock": [], "all on one second": []}
    ways: list[Callable[[], Awaitable[Measured]]] = [heap, spread, herd]
    for _ in range(ROUNDS):
        for results, way in zip(found.values(), ways, strict=True):
            results.append(asyncio.run(way()))  # type: ignore[arg-type]
            gc.collect()

    def median(name: str, figure: str) -> float:
        return statistics.median(getattr(one, figure) for one in found[name])

    print(f"median of {ROUNDS}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    print(f"{'':20}{'µs cpu/tick':>12}{'ticks/s':>9}{'p99 late ms':>13}{'stall ms':>10}")
    for name in found:
        row = [median(name, figure) for figure in ("per_tick", "ticks", "late", "stall")]
        print(f"{name:20}{row[0]:12.0f}{row[1]:9.0f}{row[2]:13.1f}{row[3]:10.1f}")
    ratio = statistics.median(
        ours.per_tick / floor.per_tick for ours, floor in zip(found["clock"], found["heap of timers"], strict=True)
    )
    print(f"clock / heap: {ratio:.2f}")
    missed = [
        *(["processor time"] if ratio > 3 else []),
        *(["lateness"] if min(one.late for one in found["clock"]) > 10 else []),  # others' turns can only add to it
        *(["stall"] if median("all on one second", "stall") > 50 else []),
    ]
    print(json.dumps({"missed": missed}))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
