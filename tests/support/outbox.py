"""Commits items that are owed to flows, the way a run does, without a trigger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from watcher import ids
from watcher.store import meta, migrate, runs, watchers
from watcher.store.db import Database
from watcher.values import Config, DeliverySettings, Flow, Memory, NewDelivery, NewItem, Proposal, RunRecord


def config(flows: Sequence[Flow], **delivery: Any) -> Config:
    """A configuration of nothing but flows."""
    settings = DeliverySettings(**delivery)
    return Config(None, "", Path("/nowhere"), delivery=settings, flows={flow.name: flow for flow in flows})


async def prepare(db: Database, *names: str) -> None:
    """An empty database that knows these watchers."""
    now = datetime.now(UTC)
    await migrate.upgrade(db, backup_to=None, now=now)
    await db.write(lambda tx: watchers.sync(tx, dict.fromkeys(names), now))


class Source:
    """One watcher that finds what it is told to find: ``await source.commit([item, …])``."""

    def __init__(
        self, db: Database, flows: Sequence[Flow], name: str = "news", clock: Callable[[], datetime] | None = None
    ) -> None:
        self.db = db
        self.flows = flows
        self.name = name
        self.clock = clock or (lambda: datetime.now(UTC))
        self.version = 0
        self.revisions: dict[str, int] = {}

    async def commit(self, items: Sequence[Mapping[str, Any]], *, epoch: str | None = None) -> runs.Committed:
        """One run that found these items, in order; an item's key is its ``id``."""
        if epoch is None:
            async with self.db.read() as tx:
                epoch = await meta.epoch(tx)
        now = self.clock()
        new = [self._item(epoch, item, now) for item in items]
        self.version += 1
        proposal = Proposal(
            watcher=self.name,
            expected=self.version - 1,
            memory=Memory(version=self.version),
            items=new,
            learn=(),
            touch=(),
            run=RunRecord(self.name, "ok", now, now),
        )
        return await self.db.write(lambda tx: runs.commit(tx, proposal))

    def _item(self, epoch: str, item: Mapping[str, Any], now: datetime) -> NewItem:
        key = str(item["id"])
        hashed, content = ids.key_hash(key), ids.content_hash(item)
        revision = self.revisions[key] = self.revisions.get(key, 0) + 1
        change = "new" if revision == 1 else "changed"
        id = ids.item_id(epoch, self.name, hashed, revision, content, change)
        owed = tuple(
            NewDelivery(ids.delivery_id(id, flow.name), flow.name, ids.lane(flow.order, self.name, hashed, id), now)
            for flow in self.flows
        )
        payload = b'{"item":' + ids.canonical(item) + b"}"
        return NewItem(id, key, hashed, change, revision, content, payload, owed)
