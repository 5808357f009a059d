"""A dispatcher at work in this process, with a clock that a test may move and a view of what became of deliveries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.support.outbox import Source, config, prepare
from watcher.dispatch import Dispatcher
from watcher.errors import ResolveError
from watcher.http.sender import Sender
from watcher.store import deliveries, flows
from watcher.store.db import Database
from watcher.values import Config, Flow


class Clock:
    """Real time, moved by whatever a test wants."""

    def __init__(self) -> None:
        self.offset = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.offset

    def advance(self, by: timedelta) -> None:
        self.offset += by


class References:
    """A resolver that knows what it was given."""

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        self.values = dict(values or {})

    async def text(self, ref: str) -> str:
        if ref not in self.values:
            raise ResolveError(f"{ref}: no such variable", missing=True)
        return self.values[ref]


class Bench:
    """One dispatcher, what feeds it, and what it did."""

    def __init__(
        self,
        db: Database,
        config: Config,
        sender: Any,
        resolver: Any,
        clock: Clock,
        source: Source | None = None,
        stow: Any = None,
    ) -> None:
        self.db = db
        self.config = config
        self.clock = clock
        self.stop = asyncio.Event()
        self.sender = sender
        self.dispatcher = Dispatcher(lambda: self.config, db, sender, resolver, clock, stow)
        self.source = source or Source(db, list(config.flows.values()), clock=clock)
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self.dispatcher.serve(self.stop))

    async def end(self, grace: timedelta = timedelta(seconds=5)) -> None:
        self.stop.set()
        if self.task:
            await self.task
            self.task = None
            await self.dispatcher.drain(grace)

    async def commit(self, *items: Mapping[str, Any]) -> None:
        """Commit items and say so."""
        await self.source.commit(items)
        self.dispatcher.wake(self.config.flows)

    def later(self, by: timedelta) -> None:
        """Let time pass."""
        self.clock.advance(by)
        self.dispatcher.wake(self.config.flows)

    async def rows(self, **filters: Any) -> Sequence[deliveries.DeliveryView]:
        """Deliveries in the order in which they were committed."""
        async with self.db.read() as tx:
            return [*reversed(await deliveries.list(tx, limit=100_000, **filters))]

    async def tried(self) -> list[deliveries.AttemptView]:
        """Every attempt that was settled, by delivery."""
        rows = await self.rows()
        async with self.db.read() as tx:
            return [attempt for row in rows for attempt in await deliveries.attempts(tx, row.seq)]

    async def status(self, name: str) -> flows.FlowStatus:
        async with self.db.read() as tx:
            return next((s for s in await flows.everyone(tx) if s.name == name), flows.FlowStatus(name))

    async def until(
        self, what: Callable[[Sequence[deliveries.DeliveryView]], bool]
    ) -> Sequence[deliveries.DeliveryView]:
        """Until the deliveries look as wanted."""
        async with asyncio.timeout(30):
            while not what(rows := await self.rows()):
                await asyncio.sleep(0.01)
        return rows

    async def until_settled(self, attempts: int) -> list[deliveries.AttemptView]:
        """Until so many attempts were settled."""
        async with asyncio.timeout(30):
            while len(tried := await self.tried()) < attempts:
                await asyncio.sleep(0.01)
        return tried

    async def until_done(self) -> Sequence[deliveries.DeliveryView]:
        """Until nothing is pending."""
        return await self.until(lambda rows: bool(rows) and all(row.status != "pending" for row in rows))


@asynccontextmanager
async def dispatching(
    db: Database,
    *flows: Flow,
    sender: Any = None,
    resolver: Any = None,
    started: bool = True,
    **delivery: Any,
) -> AsyncIterator[Bench]:
    """A started dispatcher for these flows on a database that knows the watcher ``news``."""
    await prepare(db, "news")
    own = Sender() if sender is None else None
    bench = Bench(db, config(flows, **delivery), sender or own, resolver or References(), Clock())
    if started:
        bench.start()
    try:
        yield bench
    finally:
        await bench.end()
        if own:
            await own.close()
