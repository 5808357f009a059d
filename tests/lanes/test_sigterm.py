"""SIGTERM under load: a clean end within 30 seconds, nothing held, nothing sent twice, the log written back."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest

from tests.lanes.harness import compare, query, stage, until

ROUNDS = 200 if os.environ.get("WATCHER_LONG") == "1" else 20


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_sigterm_under_load(tmp_path: Path) -> None:
    dice = random.Random(4)
    database, longest = tmp_path / "watcher.db", 0.0
    with stage(tmp_path) as (service, source, receiver):
        source.grow(50, 0)
        for round in range(ROUNDS):
            service.start(WATCHER_LOGGING__FORMAT="json")
            assert service.ready(60), service.tail()
            source.grow(dice.randrange(50, 300), dice.randrange(0, 20))
            time.sleep(dice.uniform(0, 0.6))  # the moment of the signal is what is random here
            began = time.monotonic()
            assert service.stop(60) == 0, service.tail()
            longest = max(longest, time.monotonic() - began)
            held = query(database, "SELECT count(*) FROM delivery WHERE status = 0 AND lease_until IS NOT NULL")
            assert held == [(0,)], f"round {round}"
            wal = tmp_path / "watcher.db-wal"
            assert not wal.exists() or wal.stat().st_size == 0
        service.start(WATCHER_LOGGING__FORMAT="json")
        assert service.ready(60), service.tail()
        until(
            lambda: (
                not query(database, "SELECT 1 FROM delivery WHERE status = 0")
                and compare(database, receiver, source).stale == 0
            ),
            seconds=120,
            what="the backlog drains",
            every=0.5,
        )
        assert service.stop(60) == 0
        report = compare(database, receiver, source)
    print(f"\n{ROUNDS} SIGTERMs, the slowest stop {longest:.1f} s: {report}")
    assert longest <= 30
    assert report.clean, report
    assert report.duplicates == 0, report
    events = [json.loads(line) for line in (tmp_path / "service.log").read_text().splitlines() if line[:1] == "{"]
    assert not [event for event in events if event["event"] == "library.message" and event["level"] == "info"]
    assert not [event for event in events if event["level"] in ("error", "critical")]
