"""Looks at the database that are taken again and again, whatever the last one met."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Never

from watcher import log
from watcher.errors import StoreError

_log = log.get("engine")


async def for_ever(look: Callable[[], Awaitable[None]], every: float) -> Never:
    """Look, then wait ``every`` seconds, or longer where looking is slow: it takes a fiftieth of the time at most."""
    while True:
        begun = time.monotonic()
        try:
            await look()
        except StoreError as error:
            _log.error("chore.failed", error=str(error))
        await asyncio.sleep(max(every, 50 * (time.monotonic() - begun)))
