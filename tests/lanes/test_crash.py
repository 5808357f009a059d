"""The promise under kill -9 of the real service at random moments."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.lanes.harness import compare, query, stage, until

LIFE = 0.9  # seconds at most from ready to the kill, where that is long enough to send something
KILLS = 300 if os.environ.get("WATCHER_LONG") == "1" else int(os.environ.get("WATCHER_KILLS", "25"))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_nothing_is_lost_invented_or_reordered_by_kill_9(tmp_path: Path) -> None:
    seed = int(os.environ.get("WATCHER_SEED", time.time_ns() % 1_000_000))
    dice = random.Random(seed)
    with stage(tmp_path, error_rate=0.05, seed=seed) as (service, source, receiver):
        source.grow(20, 0)
        longest, heard, fruitful = LIFE, 0, 0
        for _round in range(KILLS):
            service.start()
            if dice.random() < 0.85:  # the rest dies while it starts
                assert service.ready(), service.tail()
            moments = dice.randrange(1, 5)
            for _ in range(moments):
                source.grow(dice.randrange(0, 12), dice.randrange(0, 6))
                time.sleep(dice.uniform(0.0, longest / moments))  # the moment of the kill is what is random here
            service.kill()
            before, heard = heard, receiver.log.stat().st_size
            fruitful += heard > before
            # On a busy machine one that is killed within a second never gets to send: then the next may live longer.
            longest = max(LIFE, longest * 0.8) if heard > before else min(longest * 1.5, 30.0)
        service.start()
        assert service.ready(), service.tail()
        database = tmp_path / "watcher.db"
        until(
            lambda: (
                len(query(database, "SELECT 1 FROM seen")) == len(source.items)
                and not query(database, "SELECT 1 FROM delivery WHERE status = 0")
                and compare(database, receiver, source).stale == 0
            ),
            seconds=120,
            what="the backlog drains",
            every=0.3,
        )
        assert service.stop() == 0
        report = compare(database, receiver, source)
        print(f"\nseed {seed}, {KILLS} kills, {fruitful} lives that sent something: {report}")
        assert report.clean, f"seed {seed}: {report}"
        assert fruitful >= KILLS // 5, "killed so early that there was nothing to lose"
        assert report.duplicates <= KILLS * 16, "at most what was in flight may repeat"
        assert query(database, "SELECT count(*) FROM delivery WHERE status = 2") == [(0,)]
