"""One watcher, really run: a site on loopback, a script, a database, a clock that only moves when told."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tests.support import site
from watcher.http.fetcher import Fetcher
from watcher.resolve import Resolver
from watcher.run import Runner
from watcher.scripts import Scripts
from watcher.store import deliveries, items, runs, seen, states, watchers
from watcher.store.db import Database
from watcher.store.watchers import WatcherStatus
from watcher.values import Config, FirstRun, Flow, HttpSettings, Memory, RunRecord, ScriptSettings, Watcher

ALL = FirstRun("all")

KEYED = """
from watcher import http, trigger

@trigger(key="id", loop=True)
async def main(url: str):
    return (await http.get(url)).json()
"""

DATED = """
from watcher import http, trigger

@trigger(key="id", cursor="at", loop=True)
async def main(url: str, since=None):
    page = await http.get(url, params={} if since is None else {"since": since})
    return page.json()
"""

PATIENT = """
from watcher import http, trigger

@trigger(key="id", loop=True)
async def main(url: str):
    return (await http.get(url, stop_if_unchanged=True)).json()
"""

PAGED = """
from watcher import http, trigger

@trigger(key="id", loop=True)
async def main(url: str):
    page = 1
    while items := (await http.get(url, params={"page": page})).json():
        yield items
        page += 1
"""

WINDMILL = """
from watcher import get_state, http, set_state

def main(url: str):
    last = get_state() or 0
    rows = [row for row in http.sync.get(url).json() if row["id"] > last]
    if rows:
        set_state(max(row["id"] for row in rows))
    return rows
"""


class Bench:
    """A runner with one watcher, ``w``, whose script asks ``site`` for ``/items``. ``items`` is what is there."""

    def __init__(self, db: Database, folder: Path, where: site.Site, now: datetime) -> None:
        self.db = db
        self.folder = folder
        self.site = where
        self.now = now
        self.items: list[Any] = []
        self.url = where.on("/items", lambda asked: site.json(self.items))
        self.flows: dict[str, Flow] = {"f": Flow("f", url="http://127.0.0.1:9/")}
        self.watcher = Watcher(
            name="w",
            trigger="./w.py",
            script=folder / "w.py",
            flows=("f",),
            args={"url": self.url},
            every=timedelta(minutes=1),
            timeout=timedelta(seconds=20),
        )
        self.woken: list[str] = []
        self.scripts = Scripts(ScriptSettings(workers=2), triggers=folder)
        self.fetcher = Fetcher(HttpSettings(), lambda: self.now)
        self.runner = self.another()
        self.script(KEYED)

    def another(self) -> Runner:
        """A runner that knows nothing of the one before: another process, or the same after a restart."""
        resolver = Resolver(lambda: self.config, self.db, None, environ={})
        return Runner(
            lambda: self.config, self.db, self.scripts, self.fetcher, resolver, lambda: self.now, self._committed
        )

    def _committed(self, flows: Collection[str]) -> None:
        self.woken += flows

    @property
    def config(self) -> Config:
        return Config(None, self.db.url, self.folder, flows=self.flows, watchers={self.watcher.name: self.watcher})

    def script(self, text: str) -> None:
        self.watcher.script.write_text(textwrap.dedent(text))

    def configure(self, **options: Any) -> None:
        self.watcher = replace(self.watcher, **options)

    async def sync(self) -> None:
        names = {self.watcher.name: self.watcher.was}
        await self.db.write(lambda tx: watchers.sync(tx, names, self.now))

    async def run(self, *found: Any, tick: bool = False, minutes: float = 1) -> RunRecord:
        """One run a minute later; with ``found``, those are what the source lists from now on."""
        if found:
            self.items = list(found)
        self.now += timedelta(minutes=minutes)
        return await self.runner.run("w", tick_at=self.now if tick else None)

    # --- what is stored

    async def memory(self) -> Memory:
        async with self.db.read() as tx:
            return await states.load(tx, "w")

    async def status(self) -> WatcherStatus:
        async with self.db.read() as tx:
            return await watchers.get(tx, "w")

    async def found(self) -> list[items.ItemView]:
        """All items, oldest first."""
        async with self.db.read() as tx:
            return list(reversed(await items.list(tx, limit=100_000)))

    async def keys(self) -> list[str]:
        return [item.key for item in await self.found()]

    async def owed(self) -> list[deliveries.DeliveryView]:
        """All deliveries, oldest first."""
        async with self.db.read() as tx:
            return list(reversed(await deliveries.list(tx, limit=100_000)))

    async def runs(self) -> Sequence[runs.RunView]:
        """Newest first."""
        async with self.db.read() as tx:
            return await runs.list(tx, "w", limit=1000)

    async def known(self) -> int:
        async with self.db.read() as tx:
            return await seen.count(tx, "w")

    async def times(self) -> Counter[str]:
        """How often each key was found."""
        return Counter(await self.keys())


@asynccontextmanager
async def running(db: Database, folder: Path, now: datetime) -> AsyncIterator[Bench]:
    async with site.Site() as where:
        bench = Bench(db, folder, where, now)
        await bench.sync()
        try:
            yield bench
        finally:
            await bench.scripts.close()
            await bench.fetcher.close()


def a(id: Any, **rest: Any) -> dict[str, Any]:
    return {"id": id, **rest}
