"""Stops runs while the database has no room, and lets them go again by itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from watcher import log
from watcher.errors import DatabaseFull, StoreError
from watcher.store import meta

if TYPE_CHECKING:
    from watcher.store.db import Database

_log = log.get("brake")

LOOK_EVERY = 10.0  # seconds
LEAST_FREE = 256 * 1024 * 1024  # bytes, or 5 % of a small disk


@dataclass(slots=True)
class Brake:
    """``reason`` says why no run may start now; empty when all is well. Deliveries go on as far as they can."""

    db: Database
    clock: Callable[[], datetime]
    reason: str = ""

    def full(self, error: DatabaseFull) -> None:
        """The database just said that it cannot grow."""
        self._pull(str(error))

    def _pull(self, reason: str) -> None:
        if not self.reason:
            _log.error("runs.paused", reason=reason)
        self.reason = reason

    async def look(self) -> None:
        """Pull when the disk is nearly full; release when it is not and the database takes writes again."""
        if low := self._low():
            self._pull(low)
            return
        if not self.reason:
            return
        now = self.clock()
        try:
            await self.db.write(lambda tx: meta.put(tx, "wrote_at", now.isoformat()))
        except StoreError as error:
            self.reason = str(error)
            return
        self.reason = ""
        _log.info("runs.resumed")

    def _low(self) -> str:
        if self.db.dialect != "sqlite":
            return ""
        disk = os.statvfs(self.db.path.parent)
        free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        if free >= min(LEAST_FREE, total // 20):
            return ""
        return f"{self.db.path.parent} has only {free // 2**20} MiB left: free some space"

    async def watch(self) -> None:
        """Look every ten seconds, for ever."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY)
