"""One run with its Nth write or sync failing, for each N until the run completes: all or nothing, then all of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.lanes import tracing
from tests.lanes.harness import ROOT, query

ALL = os.environ.get("WATCHER_LONG") == "1"
CASES = 6  # of each kind in short form, spread over the whole run

CONFIG = """
database = "sqlite:///watcher.db"

[flows.sink]
url = "http://127.0.0.1:1/"

[watchers.list]
trigger = "./listing.py"
every = "1h"
flow = "sink"
first_run = "all"
max_change = 100000
"""
LISTING = """
import json
from pathlib import Path
from watcher import trigger

@trigger(key="id", on=("new", "changed"))
def main():
    return json.loads(Path(__file__).with_name("list.json").read_text())
"""
FIRST, ALL_OF_THEM = 3, 60


def run(where: Path, *before: str) -> subprocess.CompletedProcess[str]:
    """One real run, by hand."""
    return subprocess.run(
        [*before, sys.executable, "-m", "watcher", "run", "list", "--config", str(where / "watcher.toml")],
        cwd=where,
        env={"PATH": os.environ["PATH"], "HOME": str(where), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def lists(where: Path, count: int) -> None:
    (where / "list.json").write_text(json.dumps([{"id": n, "text": "x" * 300} for n in range(count)]))


def counts(where: Path) -> tuple[int, int, int, int]:
    """The state's version, and how many items, deliveries and seen keys there are."""
    sql = "SELECT (SELECT version FROM state), (SELECT count(*) FROM item), (SELECT count(*) FROM delivery), "
    return query(where / "watcher.db", sql + "(SELECT count(*) FROM seen)")[0]  # type: ignore[return-value]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation after its first run, with more to be found by the next."""
    tracing.needed()
    where = tmp_path_factory.mktemp("stage")
    (where / "watcher.toml").write_text(CONFIG)
    (where / "listing.py").write_text(LISTING)
    lists(where, FIRST)
    assert run(where).returncode == 0
    assert counts(where) == (1, FIRST, FIRST, FIRST)
    lists(where, ALL_OF_THEM)
    return where


def calls(stage: Path, where: Path, name: str) -> int:
    """How many such calls a run makes: of the one thread that makes most, because strace counts for each."""
    shutil.copytree(stage, where)
    assert run(where, *tracing.traced(where / "trace", "-e", f"trace={name}")).returncode == 0
    threads = Counter(line.split(" ")[0] for line in (where / "trace").read_text().splitlines() if name in line)
    return max(threads.values())


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("name", ["pwrite64", "fdatasync"])
def test_the_nth_call_fails(stage: Path, tmp_path: Path, name: str, error: str) -> None:
    most = calls(stage, tmp_path / "count", name)
    chosen = range(1, most + 2) if ALL else sorted({1, 2, *(1 + most * n // CASES for n in range(CASES + 1))})
    outcomes: Counter[str] = Counter()
    for nth in chosen:
        where = tmp_path / f"{nth}"
        shutil.copytree(stage, where)
        done = run(where, *tracing.traced(Path("/dev/null"), "-e", f"inject={name}:error={error}:when={nth}"))
        words = done.stdout + done.stderr
        assert "Traceback" not in words, f"call {nth}: {words}"
        assert "should not happen" not in words, f"call {nth}: {words}"
        found = counts(where)
        assert found in ((1, FIRST, FIRST, FIRST), (2, ALL_OF_THEM, ALL_OF_THEM, ALL_OF_THEM)), f"call {nth}: {found}"
        assert query(where / "watcher.db", "PRAGMA integrity_check") == [("ok",)], f"call {nth}"
        outcomes[f"exit {done.returncode}, {'all' if found[0] == 2 else 'nothing'} written"] += 1
        again = run(where)
        assert again.returncode == 0, f"after call {nth}: {again.stderr}"
        assert counts(where) == (2, ALL_OF_THEM, ALL_OF_THEM, ALL_OF_THEM), f"after call {nth}"
        assert query(where / "watcher.db", "SELECT count(DISTINCT key) FROM item") == [(ALL_OF_THEM,)]
        shutil.rmtree(where)
    print(f"\n{name} {error}: {len(chosen)} of {most} calls: {dict(outcomes)}")
