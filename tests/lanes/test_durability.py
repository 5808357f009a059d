"""What was sent was on the disk before: for each delivery the fdatasync of its commit precedes its POST."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lanes import tracing
from tests.lanes.harness import ROOT, query, stage, until

ITEMS = 1000 if os.environ.get("WATCHER_LONG") == "1" else 200
ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
SYNCED = re.compile(r"(fdatasync|fsync)\([^)]*-wal.* = 0|<\.\.\. fdatasync resumed>.* = 0")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_commit_is_on_the_disk_before_its_items_are_sent(tmp_path: Path) -> None:
    tracing.needed()
    trace, database = tmp_path / "trace", tmp_path / "watcher.db"
    calls = "trace=pwrite64,fdatasync,fsync,sendto,sendmsg,writev"
    with stage(tmp_path) as (service, source, receiver):
        source.grow(ITEMS // 10, 0)
        service.write("watcher.toml", service.config)
        with (tmp_path / "service.log").open("ab") as log:
            service.process = subprocess.Popen(
                [*tracing.traced(trace, "-y", "-s", "8192", "-e", calls), sys.executable, "-m", "watcher", "serve"],
                cwd=tmp_path,
                env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )
        assert service.ready(120), service.tail()
        for n in range(1, 10):
            source.grow(ITEMS // 10, 0)
            until(lambda n=n: len(receiver.received()) >= n * ITEMS // 10, 120, "news arrive", every=0.1)
        until(lambda: len(receiver.received()) >= ITEMS, 120, "all arrives", every=0.1)
        until(lambda: not query(database, "SELECT 1 FROM delivery WHERE status = 0"), 60, "all is settled")
        ids = {delivery for (delivery,) in query(database, "SELECT id FROM delivery")}
        # strace passes no signal on to the service: it is asked by its own number.
        pid = int((tmp_path / "watcher.db.lock").read_text())
        os.kill(pid, 15)
        assert service.process.wait(60) == 0, service.tail()
    assert len(ids) >= ITEMS
    durable, late = order(trace, ids)
    assert durable == ids, f"{len(ids - durable)} were never seen to be synced before they were sent: {late[:3]}"
    assert late == []
    print(f"\n{len(durable)} of {len(ids)} deliveries were sent after the fdatasync of their commit")


def order(trace: Path, ids: set[str]) -> tuple[set[str], list[str]]:
    """Which ids were synced with their commit before they were sent, and which were sent too early."""
    written: set[str] = set()  # in the WAL, not synced yet
    synced: set[str] = set()
    sent: set[str] = set()
    late: list[str] = []
    with trace.open(errors="replace") as lines:
        for line in lines:
            call = line.partition(" ")[2].lstrip()
            if call.startswith("pwrite64(") and "watcher.db-wal" in call[:300]:
                written |= set(ID.findall(call)) & ids - synced
            elif SYNCED.match(call):
                synced, written = synced | written, set()
            elif call.startswith(("sendto(", "sendmsg(", "writev(")) and "POST " in call:
                for found in set(ID.findall(call)) & ids - sent:
                    sent.add(found)
                    if found not in synced:
                        late.append(found)
    return sent & synced, late
