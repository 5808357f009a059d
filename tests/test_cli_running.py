"""The verbs while the service runs: they ask it over its socket, and it goes on meanwhile."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import command
from tests.support.cli import CONFIG, LISTING, Desk
from watcher import control

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", "HOME": "/nonexistent"}


# As MemoryDenyWriteExecute of our systemd unit would have it (PR_SET_MDWE, Linux 6.3; older ones go without).
CONFINED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(65, 1, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "watcher", "serve"])
"""


def start(where: Path) -> subprocess.Popen[str]:
    with open(where / "service.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", CONFINED], cwd=where, env=ENVIRONMENT, stdout=log, stderr=log, text=True
        )


def wait_until_ready(where: Path, process: subprocess.Popen[str]) -> None:
    """Another process gets ready: looking is the only way to know."""
    until = time.monotonic() + 60
    while not control.alive(where / "watcher-data" / "control.sock"):
        assert process.poll() is None, (where / "service.log").read_text()
        assert time.monotonic() < until, "the service did not get ready"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One service for all tests of this page; each uses a watcher or a flow of its own, or puts back what it moved."""
    where = tmp_path_factory.mktemp("service")
    (where / "listing.py").write_text(LISTING)
    (where / "listed.json").write_text('[{"id": "a", "n": 1}]')
    text = CONFIG.replace("LISTED", str(where / "listed.json"))
    names = ("planned", "halved", "paused", "stated", "retried", "two")
    tables = {name: text[text.index("[watchers") :].replace("watchers.one", f"watchers.{name}") for name in names}
    # A cron watcher waits for its time: nobody may commit between a plan and its run.
    tables["planned"] = tables["planned"].replace('every = "1h"', 'cron = "0 0 1 1 *"')
    tables["stated"] = tables["stated"].replace('every = "1h"', 'cron = "0 0 1 1 *"')
    tables["halved"] = (
        tables["planned"].replace("watchers.planned", "watchers.halved").replace("listed.json", "halved.json")
    )
    (where / "halved.json").write_text(json.dumps([{"id": "a", "title": "cut \ud83d"}]))
    (where / "watcher.toml").write_text(text + "".join(tables.values()))
    process = start(where)
    try:
        wait_until_ready(where, process)
        yield where
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        assert not (where / "watcher-data" / "control.sock").exists()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def watcher(service: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(service)
    monkeypatch.delenv("WATCHER_CONFIG", raising=False)
    return Desk(service, capsys)


def of(rows: list[dict[str, object]], name: str) -> dict[str, object]:
    return next(row for row in rows if row["name"] == name)


def test_the_status_is_the_service_s_own(watcher: Desk) -> None:
    found = watcher.json("status")
    assert found["service"]["running"]
    assert found["service"]["pid"] != os.getpid()
    assert of(found["watchers"], "one")["next_at"]
    done = subprocess.run(
        [sys.executable, "-m", "watcher", "status", "--json"],
        cwd=watcher.where, env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["service"] == found["service"]
    assert done.stderr == ""


def test_the_socket_is_its_owner_s_alone(watcher: Desk) -> None:
    at = watcher.where / "watcher-data" / "control.sock"
    assert stat.S_IMODE(at.stat().st_mode) == 0o600


def test_a_plan_is_made_kept_and_committed_by_the_service(watcher: Desk) -> None:
    watcher("plan", "planned", "--out", "plan.json", "--record", "recording.json")
    assert stat.S_IMODE(Path("plan.json").stat().st_mode) == 0o600
    assert "commits exactly this" in watcher.err
    record = watcher.json("run", "planned", "--plan", "plan.json")
    assert record["outcome"] == "ok"
    assert [item["key"] for item in watcher.json("items", "planned")] == ["a"]
    assert watcher.json("run", "planned")["outcome"] == "quiet"


def test_a_paused_watcher_is_paused_at_once_and_goes_on_at_once(watcher: Desk) -> None:
    watcher("pause", "paused", "--reason", "lunch")
    found = of(watcher.json("status")["watchers"], "paused")
    assert (found["condition"], found["reason"], found["next_at"]) == ("paused", "lunch", None)
    watcher("resume", "paused")
    assert of(watcher.json("status")["watchers"], "paused")["condition"] in ("new", "ok")


def test_a_state_that_is_set_is_what_the_next_run_sees(watcher: Desk) -> None:
    before = watcher.json("state", "get", "stated")["version"]
    watcher("state", "set", "stated", '{"page": 7}', "--if-version", str(before))
    assert json.loads(watcher("state", "get", "stated")) == {"page": 7}
    watcher("state", "set", "stated", "1", "--if-version", str(before), expect=1)
    watcher("state", "reset", "stated", "--yes")
    assert watcher.json("state", "get", "stated")["version"] == 0


def test_a_delivery_is_retried_by_the_service(watcher: Desk) -> None:
    watcher("run", "retried")
    delivery = watcher.json("deliveries", "retried")[0]["id"]
    watcher("pause", "sink", "--flow")
    try:
        assert watcher.json("retry", delivery)["retried"] in (0, 1)  # 0 while an attempt is under way
    finally:
        watcher("resume", "sink", "--flow")


def test_a_usage_error_is_the_same_as_without_a_service(watcher: Desk) -> None:
    watcher("runs", "onee", expect=2)
    assert watcher.err == "error: no such watcher: onee (did you mean one?)\n"


def test_a_good_configuration_is_swapped_in_and_a_bad_one_is_not(watcher: Desk) -> None:
    file = watcher.where / "watcher.toml"
    good = file.read_text()
    more = good + good[good.index("[watchers.two") :].replace("two", "three")
    file.write_text(more)
    try:
        assert watcher.json("reload")["watchers"] == 8
        file.write_text(more.replace('every = "1h"', 'every = "1 hour"', 1))
        watcher("reload", expect=78)
        assert "watcher.toml:" in watcher.err
        assert "^" in watcher.err
    finally:
        file.write_text(good)
    watcher("reload")
    assert len([w for w in watcher.json("status")["watchers"] if w["condition"] != "gone"]) == 7


def test_a_backup_and_an_export_are_made_while_it_runs(watcher: Desk) -> None:
    file = watcher("backup", "running.db").strip()
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT count(*) FROM watcher").fetchone()[0] >= 6
    db.close()
    watcher("export")
    assert json.loads(watcher.out.splitlines()[0])["watcher"] == 1


def test_nothing_is_put_in_place_under_a_running_service(watcher: Desk) -> None:
    Path("some.db").write_bytes(b"")
    for arguments in (["restore", "some.db", "--yes"], ["import", "some.db"]):
        watcher(*arguments, expect=69)
        assert "stop it first" in watcher.err


def test_a_second_service_is_refused_and_told_who_holds_the_database(watcher: Desk) -> None:
    pid = watcher.json("status")["service"]["pid"]
    done = command.run(["serve"], cwd=watcher.where, env=ENVIRONMENT)
    assert done.returncode == 69
    assert f"in use by process {pid}" in done.stderr
    assert "Traceback" not in done.stderr
    assert control.alive(watcher.where / "watcher-data" / "control.sock")


def test_an_item_that_was_cut_within_a_character_hides_nothing(watcher: Desk) -> None:
    plan, recording = str(watcher.where / "plan.json"), str(watcher.where / "recording.json")
    (item,) = watcher.json("plan", "halved")["items"]
    assert item["payload"]["item"] == {"id": "a", "title": "cut \ud83d"}
    watcher("plan", "halved", "--out", plan, "--record", recording)
    watcher("run", "halved", "--plan", plan)
    assert any(found["payload"] == item["payload"] for found in watcher.json("items"))


def test_the_doctor_asks_the_service(watcher: Desk) -> None:
    findings = {finding["what"]: finding for finding in watcher.json("doctor")}
    assert findings["service"]["found"].startswith("running as process")
    assert findings["database"]["level"] == "OK"
