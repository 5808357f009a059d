"""A source, a receiver and the real service, each in its own process or thread, and the checker that compares them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

LISTING = '''"""Everything that the source lists."""
from watcher import http, trigger


@trigger(key="id", on=("new", "changed"))
async def main(url: str) -> list[dict]:
    return (await http.get(url)).json()
'''


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A peer that was killed in the middle of a request is what we are here for."""


class Source:
    """A list that grows and changes; `final` is what each key said last."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.items: dict[str, int] = {}
        self.lock = threading.Lock()
        source = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with source.lock:
                    body = json.dumps([{"id": k, "n": n} for k, n in source.items.items()]).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/items"

    def grow(self, new: int, changed: int) -> None:
        with self.lock:
            for _ in range(new):
                self.items[f"k{len(self.items)}"] = 0
            for key in self.dice.sample(list(self.items), min(changed, len(self.items))):
                self.items[key] += 1

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Receiver:
    def __init__(self, where: Path, error_rate: float = 0.0, seed: int = 1) -> None:
        self.log = where / "received.jsonl"
        self.log.touch()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "receiver.py"), str(self.log), str(error_rate), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/"

    def received(self) -> list[dict]:  # type: ignore[type-arg]
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass
class Service:
    """The real `watcher serve` over one directory; start and kill it as often as you like."""

    where: Path
    config: str
    port: int
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    database: str = ""

    def write(self, name: str, text: str) -> None:
        (self.where / name).write_text(text)

    def start(self, failpoint: str = "", **env: str) -> subprocess.Popen[bytes]:
        self.write("watcher.toml", self.config)
        self.starts += 1
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.where),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
        } | env
        if failpoint:
            environment |= {"WATCHER_TEST": "1", "WATCHER_FAILPOINT": failpoint}
        with open(self.where / "service.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "watcher", "serve", "-c", "watcher.toml"],
                cwd=self.where,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.process

    def ready(self, seconds: float = 20) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process is not None and self.process.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=2),
            ):
                return True
            time.sleep(0.02)
        return False

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def stop(self, seconds: float = 40) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(seconds)

    def tail(self, lines: int = 40) -> str:
        return "\n".join((self.where / "service.log").read_text(errors="replace").splitlines()[-lines:])


def until(condition, seconds: float, what: str, every: float = 0.05) -> None:  # type: ignore[no-untyped-def]
    """Wait for something that another process does; polling is the only way to see it from outside."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(every)


def query(database: Path | str, sql: str, *args: object) -> list[tuple]:  # type: ignore[type-arg]
    """Rows of a SQLite file, or of a PostgreSQL database given by its address."""
    if isinstance(database, str):
        import psycopg

        with psycopg.connect(database) as connection:
            return connection.execute(sql.replace("?", "%s").encode(), args).fetchall()
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)) as db:
        return db.execute(sql, args).fetchall()


@dataclass
class Report:
    """What the promise forbids, counted. All but `duplicates` must be 0."""

    committed: int = 0
    received: int = 0
    lost: int = 0  # committed, never received with a 200
    phantom: int = 0  # received, not committed
    inversions: int = 0  # out of order for a key, after dropping repeated ids
    twice_new: int = 0  # a key that was announced as new more than once
    unseen: int = 0  # in the source, never an item
    stale: int = 0  # the last thing received about a key is not what the source says last
    duplicates: int = 0  # repeated ids: allowed, at most those in flight at a crash
    details: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.phantom or self.inversions or self.twice_new or self.unseen or self.stale)


def compare(database: Path | str, receiver: Receiver, source: Source, flow: str = "sink") -> Report:
    owed = {
        delivery: (key, revision, change)
        for delivery, key, revision, change in query(
            database,
            "SELECT d.id, i.key, i.revision, i.change FROM delivery d JOIN item i ON i.seq = d.item_seq"
            " WHERE d.flow = ?",
            flow,
        )
    }
    report = Report(committed=len(owed))
    log = receiver.received()
    report.received = len(log)
    accepted: set[str] = set()
    first_seen: dict[str, list[int]] = defaultdict(list)
    last: dict[str, int] = {}
    met: set[str] = set()
    for line in log:
        if line["id"] not in owed:
            report.phantom += 1
            report.details.append(f"phantom {line}")
            continue
        key, revision, _ = owed[line["id"]]
        if line["status"] == 200:
            report.duplicates += line["id"] in accepted
            if line["id"] not in accepted:
                first_seen[key].append(revision)
                last[key] = line["body"]["data"]["item"]["n"]
            accepted.add(line["id"])
        met.add(line["id"])
    report.lost = len(owed.keys() - accepted)
    for key, revisions in first_seen.items():
        if revisions != sorted(revisions):
            report.inversions += 1
            report.details.append(f"inverted {key}: {revisions}")
    news: dict[str, int] = defaultdict(int)
    for key, _, change in owed.values():
        news[key] += change == "new"
    report.twice_new = sum(n != 1 for n in news.values())
    report.unseen = len(source.items.keys() - news.keys())
    for key, n in source.items.items():
        if last.get(key) != n:
            report.stale += 1
            report.details.append(f"stale {key}: source {n}, received {last.get(key)}")
    return report


CONFIG = """
database = "{database}"

[server]
bind = "127.0.0.1:{port}"

[delivery]
schedule = ["0s", {retries}]

[flows.sink]
url = "{receiver}"
at_once = 16

[watchers.list]
trigger = "./listing.py"
every = "200ms"
flow = "sink"
first_run = "all"
max_change = 1000000
with = {{ url = "{source}" }}
"""


@contextlib.contextmanager
def stage(
    where: Path, *, error_rate: float = 0.0, seed: int = 1, extra: str = ""
) -> Iterator[tuple[Service, Source, Receiver]]:
    """Source, receiver and a service that is not started yet."""
    source, receiver, port = Source(seed), Receiver(where, error_rate, seed), free_port()
    config = CONFIG.format(
        database="sqlite:///watcher.db",
        port=port,
        receiver=receiver.url,
        source=source.url,
        retries=", ".join(['"200ms"'] * 30),
    )
    service = Service(where, config + extra, port)
    service.write("listing.py", LISTING)
    try:
        yield service, source, receiver
    finally:
        service.kill()
        receiver.close()
        source.close()
