"""How long the command and the service take to start, and what the service costs when nothing happens.

    python -m benchmarks.start

Goals: ``watcher --help`` under 0.3 s, ready under 2 s. Beside each wall time stands the processor time, which other
work on the machine disturbs less, and ``python -c pass`` as the floor, measured in turn with the rest.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.service import Service

ROUNDS = 5
IDLE_SECONDS = 10.0
CONFIG = """
database = "sqlite:///watcher.db"

[server]
bind = "127.0.0.1:{port}"

[flows.sink]
url = "http://127.0.0.1:9/"

[watchers.files]
trigger = "directory"
every = "1h"
flow = "sink"
with = { path = "." }
"""
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Took:
    wall: float  # seconds
    processor: float  # seconds


def command(*arguments: str) -> Took:
    """One command, from start to end."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def processor(pid: int) -> float:
    """Seconds that a running process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def memory(pid: int) -> float:
    """MiB in RAM."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def ready(service: Service) -> Took:
    """From the start of the service to the first 200 of /readyz."""
    begun = time.perf_counter()
    process = service.start()
    while process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(service.url + "/readyz", timeout=5) as answer:
            if answer.status == 200:
                return Took(time.perf_counter() - begun, processor(process.pid))
        time.sleep(0.005)
    raise SystemExit(service.tail())


def main() -> None:
    took: dict[str, list[Took]] = {}

    def note(name: str, one: Took) -> None:
        took.setdefault(name, []).append(one)

    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder), CONFIG, anew=True)
        for round in range(ROUNDS):
            note("python -c pass", command("-c", "pass"))
            note("watcher --help", command("-m", "watcher", "--help"))
            for kept in Path(folder).glob("watcher.db*"):
                kept.unlink()
            note("ready, new database", ready(service))
            service.kill()
            note("ready, database there", ready(service))
            if round < ROUNDS - 1:
                service.kill()
        assert service.process is not None
        pid, begun = service.process.pid, time.perf_counter()
        used = processor(pid)
        time.sleep(IDLE_SECONDS)
        idle = (processor(pid) - used) / (time.perf_counter() - begun)
        resident = memory(pid)
        service.kill()

    print(f"median of {ROUNDS}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    print(f"{'':24}{'wall s':>8}{'cpu s':>8}")
    for name, all in took.items():
        wall, cpu = (statistics.median(getattr(one, field) for one in all) for field in ("wall", "processor"))
        print(f"{name:24}{wall:8.2f}{cpu:8.2f}")
    print(f"idle: {resident:.0f} MiB, {idle * 100:.2f} % of one processor")
    goals = {"watcher --help": 0.3, "ready, new database": 2.0, "ready, database there": 2.0}
    missed = [name for name, goal in goals.items() if min(one.wall for one in took[name]) > goal]
    print(json.dumps({"missed": missed}))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
