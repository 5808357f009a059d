"""Two services on one PostgreSQL under kill -9: each tick is taken once, each item is sent, and in order."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.lanes.harness import Service, compare, free_port, query, stage, until
from tests.support.postgres import Postgres

KILLS = 300 if os.environ.get("WATCHER_LONG") == "1" else 30


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_services_on_one_postgresql_are_killed_in_turn(tmp_path: Path, postgres: Postgres) -> None:
    dice = random.Random(5)
    database = postgres.create()
    with stage(tmp_path, error_rate=0.05, seed=5) as (one, source, receiver):
        one.config = one.config.replace("sqlite:///watcher.db", database)
        one.config += '\n[delivery]\nlease = "40s"\n' if "[delivery]" not in one.config else ""
        second = tmp_path / "second"
        second.mkdir()
        port = free_port()
        two = Service(second, one.config.replace(f":{one.port}", f":{port}"), port)
        two.write("listing.py", (tmp_path / "listing.py").read_text())
        services = [one, two]
        try:
            source.grow(20, 0)
            for service in services:
                service.start()
            for service in services:
                assert service.ready(60), service.tail()
            for _ in range(KILLS):
                source.grow(dice.randrange(1, 10), dice.randrange(0, 5))
                time.sleep(dice.uniform(0, 0.8))  # the moment of the kill is what is random here
                victim = dice.choice(services)
                victim.kill()
                victim.start()
                if dice.random() < 0.7:
                    assert victim.ready(60), victim.tail()
            for service in services:
                assert service.ready(60), service.tail()
            source.grow(5, 5)
            until(
                lambda: (
                    len(query(database, "SELECT 1 FROM seen")) == len(source.items)
                    and not query(database, "SELECT 1 FROM delivery WHERE status = 0")
                    and compare(database, receiver, source).stale == 0
                ),
                seconds=180,
                what="the backlog drains",
                every=0.5,
            )
            for service in services:
                assert service.stop(60) == 0
            report = compare(database, receiver, source)
            twice = query(
                database,
                "SELECT tick_at, count(*) FROM run WHERE tick_at IS NOT NULL GROUP BY watcher_id, tick_at"
                " HAVING count(*) > 1",
            )
            runs = query(database, "SELECT outcome, count(*) FROM run GROUP BY outcome")
        finally:
            two.kill()
            one.kill()
            postgres.drop(database)
    print(f"\n{KILLS} kills of two services, runs {runs}: {report}")
    assert twice == [], "each tick is taken by one of them"
    assert report.clean, report
    assert report.duplicates <= KILLS * 16, "at most what was in flight may repeat"
