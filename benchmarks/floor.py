"""What all benchmarks share: a floor measured in turn with the real thing, medians, goals."""

from __future__ import annotations

import platform
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

Once = Callable[[], Awaitable["Took"]]


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of one measurement: on the wall, and of processor time in all threads of this process."""

    wall: float
    cpu: float

    def __sub__(self, other: Took) -> Took:
        return Took(self.wall - other.wall, self.cpu - other.cpu)


def now() -> Took:
    return Took(time.perf_counter(), time.process_time())


async def took(do: Callable[[], Awaitable[object]]) -> Took:
    before = now()
    await do()
    return now() - before


async def interleave(kinds: Mapping[str, Once], rounds: int) -> dict[str, Took]:
    """Measure each kind once per round, in turn, so that what else the machine does disturbs all alike: medians."""
    times: dict[str, list[Took]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, once in kinds.items():
            times[kind].append(await once())
    return {kind: Took(median(t.wall for t in some), median(t.cpu for t in some)) for kind, some in times.items()}


@dataclass(slots=True)
class Report:
    """Prints figures as they come and remembers whether every goal was reached."""

    title: str
    ok: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        print(
            f"{self.title}\nPython {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {platform.machine()}\n"
        )

    def line(self, name: str, value: str) -> None:
        print(f"{name:52} {value}")

    def times(self, figures: Mapping[str, Took], floor: str | None = None) -> None:
        for kind, t in figures.items():
            ratio = (
                f"   {t.wall / figures[floor].wall:5.2f} wall {t.cpu / figures[floor].cpu:5.2f} CPU" if floor else ""
            )
            self.line(kind, f"{t.wall * 1e3:9.2f} ms {t.cpu * 1e3:9.2f} ms CPU{ratio}")

    def goal(self, name: str, value: float, at_most: float) -> None:
        good = value <= at_most
        self.ok = self.ok and good
        self.line(name, f"{value:9.2f}  goal: at most {at_most:g}: {'ok' if good else 'MISSED'}")

    def exit(self) -> None:
        sys.exit(0 if self.ok else 1)


def rss() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
