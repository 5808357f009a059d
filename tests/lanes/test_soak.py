"""Two hundred watchers for a while, with faults on: memory, files and the write-ahead log stay where they are."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import pytest

from tests.lanes.harness import LISTING, Receiver, Service, Source, free_port, query, until

LONG = os.environ.get("WATCHER_LONG") == "1"
SECONDS = 3600 if LONG else 60
WATCHERS = 200
FLOWS = 5

HEAD = """
database = "sqlite:///watcher.db"

[server]
bind = "127.0.0.1:{port}"

[delivery]
schedule = ["0s", {retries}]
"""
FLOW = """
[flows.f{n}]
url = "{url}"
"""
WATCHER = """
[watchers.w{n}]
trigger = "{trigger}"
every = "4s"
flow = "f{flow}"
first_run = "all"
max_change = 1000000
timeout = "10s"
with = {{ url = "{source}" }}
"""
CLUMSY = '''"""Everything that the source lists, if luck has it."""
import random
from watcher import http, trigger

@trigger(key="id")
def main(url: str):
    if random.random() < 0.2:
        raise RuntimeError("bad luck")
    return http.sync.get(url).json()
'''


def _open_files(pid: int) -> int:
    """Root alone may count them: the service shows its memory and its files to nobody."""
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except PermissionError:
        return 0


def held(pid: int) -> tuple[float, int]:
    """Resident MiB and open files of the service itself, without its workers."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, _open_files(pid)


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 900)
def test_soak(tmp_path: Path) -> None:
    source, receiver, port = Source(6), Receiver(tmp_path, 0.05, 6), free_port()
    config = HEAD.format(port=port, retries=", ".join(['"500ms"'] * 30))
    config += "".join(FLOW.format(n=n, url=receiver.url) for n in range(FLOWS))
    for n in range(WATCHERS):
        trigger = {0: "./clumsy.py", 1: "./listing.py"}.get(n % 50, "http_json")
        # One source in twenty is not there at all.
        url = source.url if n % 20 else "http://127.0.0.1:1/"
        config += WATCHER.format(n=n, trigger=trigger, flow=n % FLOWS, source=url)
    service = Service(tmp_path, config, port)
    service.write("listing.py", LISTING)
    service.write("clumsy.py", CLUMSY)
    samples: list[tuple[float, float, int, int]] = []
    wal = tmp_path / "watcher.db-wal"
    try:
        source.grow(5, 0)
        process = service.start()
        assert service.ready(60), service.tail()
        began = time.monotonic()
        while (past := time.monotonic() - began) < SECONDS:
            source.grow(1, 1)
            samples.append((past, *held(process.pid), wal.stat().st_size if wal.exists() else 0))
            time.sleep(max(1.0, SECONDS / 600))  # between two samples
        until(lambda: not query(tmp_path / "watcher.db", "SELECT 1 FROM delivery WHERE status = 0"), 120, "it drains")
        assert service.stop(60) == 0, service.tail()
        wanted = query(tmp_path / "watcher.db", "SELECT id FROM delivery")
    finally:
        service.kill()
        receiver.close()
        source.close()
    accepted = {line["id"] for line in receiver.received() if line["status"] == 200}
    assert {delivery for (delivery,) in wanted} == accepted, "nothing lost, nothing invented"
    warm = [sample for sample in samples if sample[0] > SECONDS / 3]
    slope, _ = statistics.linear_regression([s[0] / 3600 for s in warm], [s[1] for s in warm])
    files = [s[2] for s in warm]
    print(f"\n{len(wanted)} deliveries in {SECONDS} s; RSS {warm[0][1]:.0f} → {warm[-1][1]:.0f} MiB, {slope:.1f} MiB/h;"
          f" files {min(files)} … {max(files)}; WAL at most {max(s[3] for s in samples) / 2**20:.1f} MiB")  # fmt: skip
    if LONG:
        assert slope < 1
    assert warm[-1][1] - warm[0][1] < 25, "MiB"
    assert statistics.mean(files[-5:]) - statistics.mean(files[:5]) < 30
    assert max(s[3] for s in samples) < 64 * 2**20
    events = [json.loads(line) for line in (tmp_path / "service.log").read_text().splitlines() if line[:1] == "{"]
    assert not [event for event in events if event["event"] in ("run.crashed", "service.died", "run.not_stored")]
