"""Uploads in parts that go on to their storage while parts still come in, so that completing one is short.

Many clients give a request half a minute and no more, however the answer is drawn out: Polars is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any

from watcher.objects import Meta
from watcher.server.windmill.s3_parts import Part, Parts

MOST_BEHIND = 8
"""Parts that may wait for the storage; a client that is faster is answered later."""
_LATER = 20.0  # seconds, at most
IDLE = 600.0
"""Seconds without a part until the storage is let go. The parts stay, and all are sent when the upload is completed."""


class Ahead:
    """One such upload: the parts 1, 2, 3 … as far as they are there, in one stream that ``put`` stores."""

    def __init__(self, parts: Parts, id: str, put: Callable[[AsyncIterator[bytes]], Coroutine[Any, Any, Meta]]) -> None:
        self._parts = parts
        self._id = id
        self._there: dict[int, Part] = {}
        self._taken: list[Part] = []
        self._wanted: Sequence[Part] | None = None
        self._news = asyncio.Event()
        self._moved = asyncio.Event()
        self.task = asyncio.create_task(put(self._body()), name=f"upload {id}")
        self.task.add_done_callback(heard)

    async def offer(self, part: Part) -> None:
        """A part is there. Returns when not too many wait."""
        self._there[part.number] = part
        self._news.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LATER):
                while not self.task.done() and self._behind() > MOST_BEHIND:
                    self._moved.clear()
                    await self._moved.wait()

    def _behind(self) -> int:
        """Parts that could be sent on: up to the first one that is missing."""
        count = 0
        while count <= MOST_BEHIND and len(self._taken) + count + 1 in self._there:
            count += 1
        return count

    async def finish(self, wanted: Sequence[Part]) -> Meta | None:
        """The object, made of these parts. None when it has to be sent from the start: one that was sent on is not
        among them, or was replaced, or the storage gave up."""
        if not self.task.done() and [*wanted[: len(self._taken)]] == self._taken:
            self._wanted = wanted
            self._news.set()
            await asyncio.wait({self.task})
            if not self.task.cancelled() and self.task.exception() is None:
                return self.task.result()
        await self.stop()
        return None

    async def stop(self) -> None:
        """Give it up; nothing of it is left."""
        self.task.cancel()
        await asyncio.wait({self.task})

    async def _body(self) -> AsyncIterator[bytes]:
        while True:
            part = self._next()
            if part is not None:
                self._taken.append(part)
                self._moved.set()
                async with aclosing(self._parts.read(self._id, [part])) as chunks:
                    async for chunk in chunks:
                        yield chunk
            elif self._wanted is not None:
                return
            else:
                self._news.clear()
                async with asyncio.timeout(IDLE):
                    await self._news.wait()

    def _next(self) -> Part | None:
        count = len(self._taken)
        if self._wanted is not None:
            return self._wanted[count] if count < len(self._wanted) else None
        return self._there.get(count + 1)


def heard(task: asyncio.Task[Meta]) -> None:
    """Whoever waits for a task may have gone: its error is no unhandled one."""
    if not task.cancelled():
        task.exception()
