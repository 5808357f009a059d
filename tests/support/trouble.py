"""The real service with many bad watchers and good ones beside them: how it was before, meanwhile and afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import textwrap
from collections import Counter
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.support import command, site
from tests.support.receiver import Receiver
from tests.support.service import ROOT, Service
from watcher import control

HEAD = """
database = "sqlite:///watcher.db"

[server]
bind = "127.0.0.1:{port}"

[scripts]
workers = 8  # fewer than there are bad scripts
max_result = "5MB"

[flows.sink]
url = "SINK"
order = "none"

[watchers.good]
trigger = "http_json"
every = "200ms"
flow = "sink"
with = { url = "SITE/good" }

[watchers.own]
trigger = "./own.py"
every = "200ms"
flow = "sink"
with = { url = "SITE/own" }
"""
LISTING = """
    from watcher import trigger

    @trigger(key="id")
    def main():
        return [{{"id": n}} for n in range({count})]
"""
FETCHING = """
    from watcher import http, trigger

    @trigger(key="id")
    def main(url: str):
        return http.sync.get(url).json()
"""


def listed(count: int) -> site.Answer:
    return site.json([{"id": n} for n in range(count)])


@dataclass
class World:
    """One service, the site its watchers look at, and the receiver of all that they find."""

    where: Path
    site: site.Site
    receiver: Receiver
    watchers: list[str] = field(default_factory=list)
    service: Service = field(init=False)

    def __post_init__(self) -> None:
        self.site.on("/good", listed(1))
        self.site.on("/own", listed(1))
        self.script("own", FETCHING)
        head = HEAD.replace("SINK", f"{self.receiver.url}/ok").replace("SITE", self.site.url)
        self.service = Service(self.where, head)

    def script(self, name: str, text: str) -> None:
        (self.where / f"{name}.py").write_text(textwrap.dedent(text))

    def lists(self, name: str, count: int) -> None:
        self.script(name, LISTING.format(count=count))

    def watch(self, name: str, options: str = "", *, trigger: str = "", every: str = "3s") -> None:
        """One more watcher; its first run is announced whole."""
        self.watchers.append(name)
        text = f'[watchers.{name}]\ntrigger = "{trigger or f"./{name}.py"}"\nevery = "{every}"\nflow = "sink"\n'
        self.service.config += f'\n{text}first_run = "all"\n{options}\n'

    # --- what a user may ask

    async def ask(self, verb: str, **arguments: Any) -> Any:
        at = control.path(self.where / "watcher-data")
        return await asyncio.to_thread(control.call, at, verb, arguments)

    async def type(self, *arguments: str) -> tuple[int, str, str]:
        """One real command; exit code, standard output, standard error."""
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(self.where)}
        named = [*arguments, "--config", str(self.where / "watcher.toml")]
        done = await asyncio.to_thread(command.run, named, cwd=self.where, env=env)
        return done.returncode, done.stdout, done.stderr

    async def status(self) -> dict[str, Any]:
        """By watcher's name."""
        return {one["name"]: one for one in (await self.ask("status"))["watchers"]}

    def rows(self, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
        where = f"file:{self.where / 'watcher.db'}?mode=ro"
        with closing(sqlite3.connect(where, uri=True, timeout=20)) as db:
            return db.execute(sql, arguments).fetchall()

    def states(self) -> dict[str, tuple[int, bytes]]:
        """Version and checksum of each watcher's memory."""
        sql = "SELECT w.name, s.version, s.sha256 FROM state s JOIN watcher w ON w.id = s.watcher_id"
        return {name: (version, digest) for name, version, digest in self.rows(sql)}

    # --- what came of it

    def received(self) -> Counter[tuple[str, str]]:
        """How often each (watcher, key) was received."""
        data = [request.json()["data"] for request in self.receiver.received]
        return Counter((one["watcher"], one["key"]) for one in data)

    def tries(self, keys: Collection[tuple[str, str]]) -> list[tuple[str, str, str, int, float]]:
        """Watcher, key, delivery's id, number of the attempt and time of each request about one of these items."""
        told = [(request.json()["data"], request) for request in self.receiver.received]
        return [
            (data["watcher"], data["key"], request.id, request.attempt, request.at)
            for data, request in told
            if (data["watcher"], data["key"]) in keys
        ]

    def longest_gap(self, path: str = "/good") -> float:
        """Seconds between two polls of the good watcher, at the longest: its interval plus how late it was."""
        return max((b - a for a, b in pairwise(self.polls(path))), default=0.0)

    def polls(self, path: str = "/good") -> list[float]:
        return [asked.at for asked in self.site.asked_for(path)]


def errors(log: Path) -> list[dict[str, Any]]:
    """What a log says at level error or worse."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("level") in ("error", "critical")]
