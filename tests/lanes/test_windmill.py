"""Trigger scripts in Windmill's own style, unchanged, run by the real service that is killed again and again."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.lanes.harness import ROOT, Quiet, Receiver, Service, free_port, query, until

SCRIPTS = ROOT / "tests" / "windmill_scripts"
KILLS = 40 if os.environ.get("WATCHER_LONG") == "1" else int(os.environ.get("WATCHER_KILLS", "6"))
NETWORK = {  # what the machine needs to reach the package indexes
    name: value
    for name, value in os.environ.items()
    if name.startswith(("SSL_CERT", "UV_INDEX", "UV_DEFAULT", "NPM_CONFIG", "NODE_EXTRA")) or name.endswith("_PROXY")
}
BY_URL = ("new_rows.py", "new_stargazers.py", "recent_events.py", "pages.py", "new_rows.ts", "changes.ts")

CONFIG = """
database = "sqlite:///watcher.db"

[server]
bind = "127.0.0.1:{port}"

[delivery]
schedule = ["0s", {retries}]

[flows.sink]
url = "{receiver}"
at_once = 16

[resources."f/shop/site"]
type = "site"
value = {{ base = "{base}" }}
"""
WATCHER = """
[watchers.{name}]
trigger = "./{file}"
every = "{every}"
flow = "sink"
first_run = "all"
timeout = "60s"
with = {{ {args} }}
"""


class Rows:
    """A list that grows. Each row has an id, a name, and a time that it shares with its neighbours."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.temperature = 41
        rows = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                warm = self.path.startswith("/Paris")
                body = f"{rows.temperature}°F".encode() if warm else json.dumps(rows.rows).encode()
                self.send_response(200)
                kind = "text/plain; charset=utf-8" if warm else "application/json"
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.base = f"http://127.0.0.1:{self.server.server_port}"

    def grow(self, count: int) -> None:
        first = len(self.rows) + 1
        self.rows = self.rows + [
            {"id": n, "name": f"n{n}", "at": f"2026-01-01T00:{n // 3 // 60 % 60:02}:{n // 3 % 60:02}"}
            for n in range(first, first + count)
        ]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def watcher(command: list[str], where: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "watcher", *command, "-c", "watcher.toml"],
        cwd=where,
        env={"PATH": os.environ["PATH"], "HOME": str(where), "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", **NETWORK},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def staged(where: Path, rows: Rows, receiver: Receiver, tables: list[str]) -> Service:
    port = free_port()
    config = CONFIG.format(
        port=port, receiver=receiver.url, base=rows.base, retries=", ".join(['"200ms"'] * 30)
    ) + "".join(tables)
    service = Service(where, config, port)
    (where / "watcher.toml").write_text(config)
    for script in SCRIPTS.iterdir():
        if script.suffix in (".py", ".ts"):
            shutil.copy(script, where)
    watcher(["check"], where)  # makes the environments, so that kills meet runs and not installations
    return service


def found(where: Path) -> dict[str, Counter[str]]:
    """How often each key was found, by watcher."""
    counts: dict[str, Counter[str]] = {}
    sql = "SELECT w.name, i.key FROM item i JOIN watcher w ON w.id = i.watcher_id"
    for name, key in query(where / "watcher.db", sql):
        counts.setdefault(name, Counter())[key] += 1
    return counts


def eventually(condition: Callable[[], bool], seconds: float, service: Service) -> None:
    """Wait for what the service does; if it does not, its log says why."""
    try:
        until(condition, seconds, "what the service was to do")
    except AssertionError as error:
        raise AssertionError(service.tail()) from error


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_windmills_own_scripts_find_each_item_once_through_kills(tmp_path: Path) -> None:
    dice = random.Random(int(os.environ.get("WATCHER_SEED", time.time_ns() % 1_000_000)))
    rows, receiver = Rows(), Receiver(tmp_path)
    tables = [
        WATCHER.format(
            name=file.replace(".", "_"),
            file=file,
            every="500ms" if file.endswith(".py") else "2s",
            args=f'url = "{rows.base}/items"',
        )
        for file in BY_URL
    ]
    tables.append(
        WATCHER.format(name="new_names_ts", file="new_names.ts", every="2s", args='site = "$res:f/shop/site"')
    )
    rows.grow(3)
    service = staged(tmp_path, rows, receiver, tables)
    names = {file.replace(".", "_") for file in (*BY_URL, "new_names.ts")}
    try:
        for _ in range(KILLS):
            service.start(**NETWORK)
            assert service.ready(60), service.tail()
            for _ in range(dice.randrange(1, 4)):
                rows.grow(dice.randrange(1, 5))
                time.sleep(dice.uniform(0.5, 3.0))  # the moment of the kill is what is random here
            service.kill()
        service.start(**NETWORK)
        assert service.ready(60), service.tail()
        wanted = {str(row["id"]) for row in rows.rows}
        by_name = {str(row["name"]) for row in rows.rows}

        def all_found() -> bool:
            counts = found(tmp_path)
            return all(len(counts.get(name, ())) == len(wanted) for name in names) and not query(
                tmp_path / "watcher.db", "SELECT 1 FROM delivery WHERE status = 0"
            )

        eventually(all_found, 240, service)
        time.sleep(5)  # and what would come twice has time to
        for name, counts in found(tmp_path).items():
            by = by_name if name in ("new_names_ts", "new_stargazers_py") else wanted
            assert set(counts) == by, name
            assert set(counts.values()) == {1}, (name, counts.most_common(3))
        owed = {row[0] for row in query(tmp_path / "watcher.db", "SELECT id FROM delivery")}
        assert {line["id"] for line in receiver.received() if line["status"] == 200} == owed
    finally:
        service.kill()
        receiver.close()
        rows.close()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_temperature_that_rose_or_fell(tmp_path: Path) -> None:
    """The example of Windmill's page on persistent storage; its state comes along, as it would from Windmill."""
    rows, receiver = Rows(), Receiver(tmp_path)
    table = WATCHER.format(name="temperature", file="temperature.py", every="500ms", args="").replace("with = {  }", "")
    service = staged(tmp_path, rows, receiver, [table])
    script = tmp_path / "temperature.py"
    script.write_text(script.read_text().replace("http://wttr.in", rows.base))  # the page's own address is not reached
    try:
        watcher(["state", "set", "temperature", '"41"'], tmp_path)

        def told(what: str) -> int:
            sql = "SELECT count(*) FROM item WHERE CAST(payload AS TEXT) LIKE ?"
            return int(query(tmp_path / "watcher.db", sql, f"%has {what}%")[0][0])

        rises = falls = 0
        for temperature in (45, 44, 52, 50, 61):
            service.start(**NETWORK)
            assert service.ready(60), service.tail()
            rises += temperature > rows.temperature
            falls += temperature < rows.temperature
            rows.temperature = temperature
            until(lambda: (told("increased"), told("decreased")) == (rises, falls), 60, service.tail())  # noqa: B023
            service.kill()
        assert (told("increased"), told("decreased")) == (3, 2)
        assert json.loads(watcher(["state", "get", "temperature", "--json"], tmp_path)) is not None
    finally:
        service.kill()
        receiver.close()
        rows.close()


NAIVE = """
import json, sys
from moment import main
found = main(sys.argv[1])
with open("results", "a") as results:
    for row in found:
        print(row["id"], file=results)
"""
ROUNDS = 4


class Naive:
    """Windmill's rule for states: what a script sets is stored at once, whatever becomes of what it returns."""

    def __init__(self) -> None:
        self.state: object = None
        naive = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                missing = naive.state is None
                value = naive.state if "interpolated" in self.path else {"value": naive.state, "resource_type": "state"}
                self.answer(404 if missing else 200, json.dumps(value).encode())

            def do_POST(self) -> None:
                naive.state = json.loads(self.rfile.read(int(self.headers["content-length"])))["value"]
                self.answer(201 if self.path.endswith("create") else 200, b"ok")

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.env = {
            "PATH": os.environ["PATH"], "WM_TOKEN": "t", "WM_WORKSPACE": "main", "WM_STATE_PATH": "f/moment/user",
            "BASE_INTERNAL_URL": f"http://127.0.0.1:{self.server.server_port}",
        }  # fmt: skip

    def run(self, where: Path, url: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", NAIVE, url], cwd=where, env=self.env)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_kill_between_set_state_and_return_loses_items_naively_and_none_here(tmp_path: Path) -> None:
    rows, receiver, naive = Rows(), Receiver(tmp_path), Naive()
    there = tmp_path / "naive"
    there.mkdir()
    shutil.copy(SCRIPTS / "moment.py", there)
    table = WATCHER.format(name="moment", file="moment.py", every="500ms", args=f'url = "{rows.base}/items"')
    service = staged(tmp_path, rows, receiver, [table])
    try:
        for _ in range(ROUNDS):
            rows.grow(3)
            worker = naive.run(there, f"{rows.base}/items")
            until((there / "between").exists, 60, "the naive run sets its state", every=0.005)
            worker.kill()
            worker.wait()
            (there / "between").unlink()
            assert naive.run(there, f"{rows.base}/items").wait(60) == 0  # as a restarted job is: it sees the new state
            service.start(**NETWORK)
            until((tmp_path / "between").exists, 60, service.tail(), every=0.005)
            service.kill()
            (tmp_path / "between").unlink()
        service.start(**NETWORK)
        eventually(lambda: len(found(tmp_path).get("moment", ())) == len(rows.rows), 60, service)
        results = (there / "results").read_text().split() if (there / "results").exists() else []
        assert (len(rows.rows), len(results)) == (3 * ROUNDS, 0)  # naively: every item of every killed run is lost
        assert found(tmp_path)["moment"] == Counter(str(row["id"]) for row in rows.rows)  # here: each of them, once
    finally:
        service.kill()
        receiver.close()
        rows.close()
        naive.close()


SINGER = """
[watchers.tap]
trigger = "singer"
every = "1s"
flow = "sink"
first_run = "all"
timeout = "90s"

[watchers.tap.with]
tap = "tap-rest-api-msdk"
requirements = ["tap-rest-api-msdk==1.4.2", "setuptools<80"]

[watchers.tap.with.config]
api_url = "{base}"

[[watchers.tap.with.config.streams]]
name = "orders"
path = "/items"
records_path = "$[*]"
primary_keys = ["id"]
replication_key = "id"
num_inference_records = 10
"""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_singer_tap_finds_each_record_once_through_kills(tmp_path: Path) -> None:
    dice = random.Random(int(os.environ.get("WATCHER_SEED", time.time_ns() % 1_000_000)))
    rows, receiver = Rows(), Receiver(tmp_path)
    rows.grow(3)
    service = staged(tmp_path, rows, receiver, [SINGER.format(base=rows.base)])
    try:
        for _ in range(3):
            service.start(**NETWORK)
            assert service.ready(60), service.tail()
            rows.grow(2)
            time.sleep(dice.uniform(2, 8))  # the moment of the kill is what is random here
            service.kill()
        service.start(**NETWORK)
        wanted = {f"orders/{row['id']}" for row in rows.rows}
        eventually(lambda: len(found(tmp_path).get("tap", ())) >= len(wanted), 120, service)
        assert found(tmp_path)["tap"] == Counter(wanted)
    finally:
        service.kill()
        receiver.close()
        rows.close()
