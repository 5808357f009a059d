"""Stops asking a source while too many deliveries of its watcher wait, and lets it go on by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from watcher import log
from watcher.engine import rounds
from watcher.store import deliveries

if TYPE_CHECKING:
    from watcher.store.db import Database
    from watcher.values import Config

_log = log.get("backlog")

LOOK_EVERY = 5.0  # seconds, or fifty times as long as a look takes


@dataclass(slots=True)
class Backlog:
    """``waits`` holds the watchers that are not polled for now, with how many of their deliveries wait."""

    db: Database
    config: Callable[[], Config]
    waits: dict[str, int] = field(default_factory=dict)

    def holds(self, name: str) -> bool:
        """Whether this watcher's ticks are to be skipped."""
        return name in self.waits

    async def look(self) -> None:
        """Count what waits; tell once when a watcher stops and once when it goes on."""
        async with self.db.read() as tx:
            waiting = await deliveries.waiting(tx)
        now = over(self.config(), waiting)
        for name in now.keys() - self.waits.keys():
            _log.warning("watcher.backlogged", watcher=name, waiting=now[name])
        for name in self.waits.keys() - now.keys():
            _log.info("watcher.backlog_gone", watcher=name)
        self.waits = now

    async def watch(self) -> None:
        """Look now and then, for ever."""
        await rounds.for_ever(self.look, LOOK_EVERY)


def over(config: Config, waiting: Mapping[str, int]) -> dict[str, int]:
    """The watchers whose backlog is at its bound."""
    return {
        name: count
        for name, count in waiting.items()
        if name in config.watchers and count >= config.watchers[name].max_backlog
    }
