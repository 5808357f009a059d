"""What one run of a script costs, by runtime, above what the script itself takes."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.scripts import FakeHost
from watcher.scripts import Call, Scripts
from watcher.values import ScriptSettings

PYTHON = "def main(n: int):\n    return [{'id': n}]\n"
FILES = {
    "warm": ("warm.py", PYTHON),
    "uv": ("own.py", '# /// script\n# dependencies = ["idna==3.10"]\n# ///\nimport idna\n' + PYTHON),
    "deno": ("watch.ts", "export function main(n: number) { return [{ id: n }]; }\n"),
    "program": ("program", "#!/bin/sh\necho '[{\"id\": 1}]'\n"),
}
RUNS = {"warm": 200, "uv": 200, "deno": 15, "program": 30}
ROUNDS = 3
AT_ONCE = 2  # cores


def cpu() -> float:
    """Seconds of processor time, of this process and of those that it has ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        scripts = Scripts(ScriptSettings(workers=AT_ONCE), data=Path(folder) / "data")
        calls = {}
        for kind, (name, text) in FILES.items():
            path = Path(folder) / name
            path.write_text(text)
            path.chmod(0o755)
            calls[kind] = Call(path, {"n": 1})
            began = time.perf_counter()
            await scripts.call(calls[kind], FakeHost())
            print(f"{kind:8} first run, with all that it fetches: {time.perf_counter() - began:6.2f} s")
        try:
            await measure(scripts, calls)
        finally:
            await scripts.close()


async def measure(scripts: Scripts, calls: dict[str, Call]) -> None:
    taken: dict[str, list[float]] = {kind: [] for kind in calls}
    floor = []
    for _ in range(ROUNDS):  # in turn, so that a busy moment of the machine meets all of them
        for kind, call in calls.items():
            for _ in range(RUNS[kind]):
                began = time.perf_counter()
                await scripts.call(call, FakeHost())
                taken[kind].append(time.perf_counter() - began)
        for _ in range(10):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-I", "-c", "pass"], check=True)
            floor.append(time.perf_counter() - began)
    base = statistics.median(floor)
    for kind, all_ in taken.items():
        median, p90 = statistics.median(all_), statistics.quantiles(all_, n=10)[8]
        print(f"{kind:8} {median * 1000:8.2f} ms (p90 {p90 * 1000:.2f}), {median / base:6.3f} of `python -I -c pass`")
    print(f"floor    {base * 1000:8.2f} ms: python -I -c pass")
    began, used = time.perf_counter(), cpu()

    async def one_after_another() -> None:
        for _ in range(500):
            await scripts.call(calls["warm"], FakeHost())

    await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))
    seconds = time.perf_counter() - began
    jobs = 500 * AT_ONCE
    print(
        f"{jobs / seconds:8.0f} warm jobs/s, {AT_ONCE} at once; {(cpu() - used) / jobs * 1000:.2f} ms of our processor"
    )


if __name__ == "__main__":
    asyncio.run(main())
