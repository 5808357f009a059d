"""One flow run per item on real engines, though the engine is killed in the middle, and the service twice.

Install the engines with ``tests/lanes/engines.sh``, then::

    python -m pytest -m engines tests/lanes/test_engines.py -s
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.lanes.engines import ENGINES, Airflow, Engine, N8n, Ours, Prefect
from tests.lanes.harness import LISTING, Service, Source, free_port, query, until
from watcher.dispatch import REST

ITEMS = 200
KILL_ENGINE = 60  # deliveries settled
KILL_SERVICE = 30  # requests answered after the engine's return: what this answer says is never written down

CONFIG = """
database = "sqlite:///watcher.db"

[server]
bind = "127.0.0.1:{port}"

[delivery]
schedule = ["0s", "1s", "1s", {later}]

[flows.engine]
{flow}

[watchers.list]
trigger = "./listing.py"
every = "200ms"
flow = "engine"
first_run = "all"
with = {{ url = "{source}" }}
"""


@pytest.mark.long
@pytest.mark.engines
@pytest.mark.timeout(1800)
@pytest.mark.flaky(reruns=0)  # what is lost in one run of many is lost
@pytest.mark.parametrize("kind", [Ours, Prefect, Airflow, N8n], ids=lambda kind: kind.name)
def test_one_flow_run_per_item_though_both_sides_are_killed(kind: type[Engine], tmp_path: Path) -> None:
    engine, source, port = kind(tmp_path / "engine"), Source(1), free_port()
    engine.require()
    here = tmp_path / "watcher"
    here.mkdir()
    database = here / "watcher.db"
    service = Service(here, "", port)
    service.write("listing.py", LISTING)
    try:
        engine.prepare()
        engine.start()
        engine.deploy()
        flow = f"{engine.flow()}at_once = {engine.at_once}\n" + (f'rate = "{engine.rate}"\n' if engine.rate else "")
        service.config = CONFIG.format(port=port, flow=flow, source=source.url, later=", ".join(['"3s"'] * 40))
        source.grow(ITEMS, 0)
        begun = time.monotonic()
        service.start()
        assert service.ready(60), service.tail()
        until(lambda: settled(database) >= KILL_ENGINE, 300, f"the first deliveries: {service.tail(5)}", every=0.01)
        engine.kill()
        killed, at = time.monotonic(), settled(database)
        until(lambda: tried(database, "passing") + tried(database, "target") > 0, 60, "the outage is noticed")
        service.kill()
        service.start(failpoint=f"after_send:kill@{KILL_SERVICE}")
        engine.start()
        back, owed = time.monotonic(), settled(database)
        outage = back - killed
        assert service.process
        until(
            lambda: settled(database) > owed or service.process.poll() is not None,
            300,
            f"deliveries go on: {service.tail()}",
            every=0.01,
        )
        resumed = time.monotonic() - back
        until(lambda: service.process.poll() is not None, 300, f"our own kill: {service.tail()}")
        service.start()
        assert service.ready(60), service.tail()
        until(lambda: settled(database) == ITEMS or dead(database), 300, f"all is delivered: {service.tail()}")
        spent = time.monotonic() - begun
        assert not dead(database), query(database, "SELECT note FROM delivery WHERE status = 2 LIMIT 3")
        remarks = engine.remarks()
        runs = Counter(engine.runs())
        assert service.stop() == 0
    finally:
        service.kill()
        engine.close()
        source.close()
    figures = {
        "engine": engine.name,
        "version": engine.version,
        "items": ITEMS,
        "runs": runs.total(),
        "distinct": len(runs),
        "duplicates": runs.total() - len(runs),
        "engine killed at": at,
        "outage, s": round(outage, 1),
        "from the engine's return to the next delivery, s": round(resumed, 1),
        "times broken": said(here / "service.log", "flow.broken"),
        "failed attempts": tried(database, "passing") + tried(database, "target"),
        "held": tried(database, "target"),
        "answered 'already there'": tried(database, "duplicate"),
        "from start to last delivery, s": round(spent, 1),
        "remarks": remarks,
        "notes": notes(database),
    }
    print(f"\n{json.dumps(figures)}")
    with open(ENGINES / "figures.jsonl" if ENGINES.exists() else tmp_path / "figures.jsonl", "a") as log:
        log.write(json.dumps(figures) + "\n")
    assert runs.keys() == source.items.keys(), "an item without a run, or a run without an item"
    if engine.idempotent:
        assert runs.total() == ITEMS, [key for key, count in runs.items() if count > 1]
    else:
        assert runs.total() <= ITEMS + 3 * engine.at_once, "at most what was in flight at each of the three kills"
    assert resumed < REST[1] + 30, "an engine that is back is asked after the longest rest at the latest"


def notes(database: Path) -> dict[str, int]:
    """What was written down of attempts, without the addresses, which differ by the delivery's id."""
    found = [str(note) for (note,) in query(database, "SELECT note FROM attempt WHERE note != ''")]
    return dict(Counter(note.split(": ", 1)[-1] if note.startswith("http") else note for note in found).most_common(8))


def said(log: Path, event: str) -> int:
    return log.read_text(errors="replace").count(event)


def settled(database: Path) -> int:
    return count(database, "SELECT count(*) FROM delivery WHERE status = 1")


def dead(database: Path) -> int:
    return count(database, "SELECT count(*) FROM delivery WHERE status = 2")


def tried(database: Path, verdict: str) -> int:
    return count(database, "SELECT count(*) FROM attempt WHERE verdict = ?", verdict)


def count(database: Path, sql: str, *args: object) -> int:
    return int(query(database, sql, *args)[0][0])
