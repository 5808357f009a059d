"""Notices when a watcher finds nothing for far longer than it ever did: a source that dried up looks just like calm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from watcher import log, metrics
from watcher.engine import rounds
from watcher.store import runs, watchers

if TYPE_CHECKING:
    from watcher.store.db import Database, Tx
    from watcher.store.watchers import WatcherStatus
    from watcher.values import Config, Watcher

_log = log.get("silence")

LOOK_EVERY = 60.0  # seconds, or fifty times as long as a look takes
ENOUGH = 10
"""Finds that make a rhythm; with fewer nothing is learnt."""
LEARN_FROM = 50  # finds, the newest
FACTOR = 3  # times the longest wait between two of them
LEAST = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Silence:
    """A watcher that has been looking in vain since ``since``, longer than ``bound``."""

    since: datetime
    bound: timedelta
    learnt: bool

    @property
    def reason(self) -> str:
        """For people."""
        told = f"nothing found since {self.since:%Y-%m-%d %H:%M}Z"
        if not self.learnt:
            return f"{told}, for longer than silent_after"
        return f"{told}; before that never for more than {_about(self.bound / FACTOR)}. Is the source still alive?"


def rhythm(finds: Sequence[datetime]) -> timedelta | None:
    """How long a silence must last to be strange, given when something was found; None while that is not known."""
    if len(finds) < ENOUGH:
        return None
    ordered = sorted(finds)
    longest = max(later - earlier for earlier, later in pairwise(ordered))
    return max(FACTOR * longest, LEAST)


def _about(span: timedelta) -> str:
    hours = span.total_seconds() / 3600
    if hours < 2:
        return f"{max(1, round(hours * 60))} minutes"
    return f"{round(hours)} hours" if hours < 48 else f"{round(hours / 24)} days"


async def silences(
    tx: Tx, config: Config, everyone: Sequence[WatcherStatus], known: dict[str, tuple[Any, timedelta | None]]
) -> dict[str, Silence]:
    """The watchers that are silent. ``known`` keeps what was learnt, so that nothing is asked for twice.

    Counted is the time up to the last success, so that neither a stopped service nor a source that fails (which is
    told as such) looks like silence.
    """
    found = {}
    for status in everyone:
        watcher = config.watchers.get(status.name)
        if watcher is None or not _listens(watcher, status) or status.success_at is None:
            continue
        fixed = watcher.silent_after if isinstance(watcher.silent_after, timedelta) else None
        since = status.found_at
        if since is None:
            since = await runs.first(tx, status.id) if fixed else None
        if since is None or status.success_at - since < (fixed or LEAST):
            continue
        bound = fixed or await _learnt(tx, status, known)
        if bound is not None and status.success_at - since >= bound:
            found[status.name] = Silence(since, bound, learnt=fixed is None)
    return found


def _listens(watcher: Watcher, status: WatcherStatus) -> bool:
    troubled = status.paused_at or status.quarantined_at or status.failures
    return watcher.enabled and watcher.silent_after != "off" and not troubled


async def _learnt(tx: Tx, status: WatcherStatus, known: dict[str, tuple[Any, timedelta | None]]) -> timedelta | None:
    seen_at, bound = known.get(status.name, (None, None))
    if seen_at != status.found_at:
        bound = rhythm(await runs.finds(tx, status.id, LEARN_FROM))
        known[status.name] = status.found_at, bound
    return bound


@dataclass(slots=True)
class Listener:
    """``silent`` holds the watchers that are silent now."""

    db: Database
    config: Callable[[], Config]
    silent: Mapping[str, Silence] = field(default_factory=dict)
    _known: dict[str, tuple[Any, timedelta | None]] = field(default_factory=dict)

    async def look(self) -> None:
        """Find out who is silent; tell once when a watcher falls silent and once when it is heard again."""
        config = self.config()
        async with self.db.read() as tx:
            now = await silences(tx, config, await watchers.everyone(tx), self._known)
        for name in now.keys() - self.silent.keys():
            _log.warning("watcher.silent", watcher=name, reason=now[name].reason)
            metrics.silent.labels(name).set(1)
        for name in self.silent.keys() - now.keys():
            _log.info("watcher.heard_again", watcher=name)
            if name in config.watchers:
                metrics.silent.labels(name).set(0)
        self.silent = now

    async def watch(self) -> None:
        """Look now and then, for ever."""
        await rounds.for_ever(self.look, LOOK_EVERY)
