"""What it costs to run a script in a worker process: a warm run against `python -I -c pass`, interleaved, medians.

    python benchmarks/isolation.py [ROUNDS]

Goal: a warm run takes at most 0.2 of the time of the floor.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

from watcher.scripts import Call, Scripts
from watcher.scripts.warden import descendants
from watcher.values import ScriptSettings

GOAL = 0.2
RUNS = 20  # of a kind, in one round

SCRIPT = '''
"""A script with arguments, a key and a page of items."""
from watcher import trigger

@trigger(key="id", cursor="at")
def main(count: int, since: str | None = None):
    return [{"id": n, "at": n, "title": "an item of ordinary length", "tags": ["a", "b"]} for n in range(count)]
'''


class Nobody:
    """A host that is asked for nothing."""

    async def fetch(self, request: Any, options: Any) -> Any: ...
    async def resource(self, path: str) -> Any: ...
    async def variable(self, path: str) -> str:
        return ""

    async def page(self, entries: Any) -> bool:
        return True


async def timed(do: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await do()
    return time.perf_counter() - began


async def bare_python() -> None:
    await asyncio.to_thread(subprocess.run, [sys.executable, "-I", "-c", "pass"], check=True)


def proportional(pid: int) -> int:
    """Bytes of a process, of what it shares its part."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))


async def main(rounds: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(SCRIPT)
        other = Path(folder, "other.py")
        other.write_text(SCRIPT)
        scripts = Scripts(ScriptSettings())

        def run(count: int, of: Path = script) -> Callable[[], Awaitable[object]]:
            return lambda: scripts.call(Call(of, {"count": count}), Nobody())

        try:
            cold = await timed(run(1))
            kinds = {"python -I -c pass": bare_python, "warm run, 1 item": run(1), "warm run, 1,000 items": run(1000)}
            times: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(rounds):
                for kind, do in kinds.items():
                    times[kind].append(median([await timed(do) for _ in range(RUNS)]))
            before = descendants(os.getpid())
            await run(1, other)()
            idle = sum(map(proportional, descendants(os.getpid()) - before))
        finally:
            await scripts.close()
    floor = median(times["python -I -c pass"])
    for kind in kinds:
        middle = median(times[kind])
        print(f"{kind:24} {middle * 1e3:8.2f} ms   {middle / floor:6.3f} of the floor")
    print(f"{'first run of a worker':24} {cold * 1e3:8.2f} ms")
    print(f"{'an idle worker':24} {idle / 1e6:8.1f} MB (warden and worker, shared pages by their part)")
    ratio = median(times["warm run, 1 item"]) / floor
    print(f"goal: at most {GOAL}; reached {ratio:.3f}: {'ok' if ratio <= GOAL else 'MISSED'}")
    return 0 if ratio <= GOAL else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)))
