"""The figures of /metrics: what the service counted, and what the database holds at this moment."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from watcher import metrics
from watcher.errors import StoreError
from watcher.store import deliveries, flows

if TYPE_CHECKING:
    from watcher.store.db import Database
    from watcher.values import Config


class Figures:
    """Asks when it is asked, so that no gauge is ever older than the scrape."""

    def __init__(
        self,
        db: Database,
        clock: Callable[[], datetime],
        config: Callable[[], Config],
        next_run: Callable[[str], datetime | None],
    ) -> None:
        self._db = db
        self._clock = clock
        self._config = config
        self._next_run = next_run

    async def text(self) -> bytes:
        """Prometheus's text format. A database that does not answer is a figure too, not an error."""
        registry = CollectorRegistry()
        up = Gauge("watcher_database_up", "Whether the database answers.", registry=registry)
        try:
            await self._outbox(registry)
            up.set(1)
        except StoreError:
            up.set(0)
        coming = Gauge(
            "watcher_next_run_timestamp_seconds", "When a watcher is due next.", ["watcher"], registry=registry
        )
        for name in self._config().watchers:
            if (when := self._next_run(name)) is not None:
                coming.labels(name).set(when.timestamp())
        return generate_latest(metrics.registry) + generate_latest(registry)

    async def _outbox(self, registry: CollectorRegistry) -> None:
        async with self._db.read() as tx:
            owed = await deliveries.pending(tx)
            held = await flows.held(tx)
        now = self._clock()
        pending = Gauge("watcher_outbox_pending", "Deliveries that wait.", ["flow"], registry=registry)
        age = Gauge("watcher_outbox_oldest_age_seconds", "Age of the oldest waiting item.", ["flow"], registry=registry)
        dead = Gauge("watcher_dead_letters", "Deliveries that were given up.", ["flow"], registry=registry)
        holds = Gauge(
            "watcher_flow_held", "Whether a flow is held until its target is well.", ["flow"], registry=registry
        )
        for name in {*self._config().flows, *owed}:
            backlog = owed.get(name)
            pending.labels(name).set(backlog.pending if backlog else 0)
            dead.labels(name).set(backlog.dead if backlog else 0)
            oldest = backlog.oldest if backlog else None
            age.labels(name).set(max(0.0, (now - oldest).total_seconds()) if oldest else 0)
            holds.labels(name).set(name in held)
