"""What a main returns or yields, page by page, into a sink that keeps the limits."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from watcher.errors import TriggerError
from watcher.scripts.entries import Picked
from watcher.values import Json

PAGE = 100  # items of a generator that yields single items; a generator of lists makes its own pages

Row = tuple[str | None, Json, str]
"""Key, cursor, and the item as JSON text."""


class Sink:
    """Where the items of one run go, within its limits: ``keep`` takes each row."""

    def __init__(self, picked: Picked, max_items: int, max_bytes: int, keep: Callable[[Row], None]) -> None:
        self.picked = picked
        self.max_items = max_items
        self.max_bytes = max_bytes
        self.size = 0
        self.waiting = 0  # items since the last page was finished
        self.complete = True
        self.capped = False
        self._keep = keep

    @property
    def full(self) -> bool:
        return self.picked.count >= self.max_items

    def add(self, item: Any) -> None:
        """Take one item. TriggerError of kind ``too_large`` or ``junk``."""
        row = self.picked.entry(item)
        self.size += len(row[2])
        if self.size > self.max_bytes:
            raise TriggerError(
                f"the result is larger than {self.max_bytes:,} bytes: list less, take fewer fields per item, "
                "or raise [scripts] max_result",
                kind="too_large",
            )
        self.waiting += 1
        self._keep(row)


async def drain(result: Any, sink: Sink, turn: Callable[[], Awaitable[bool]]) -> None:
    """Take all that an ``async def main`` gives: its list, or the pages of its generator.

    ``turn`` is called after each page, and says whether another one is wanted.
    """
    if not inspect.isasyncgen(result):
        take(await result, sink)
        return
    try:
        async for piece in result:
            if _put(piece, sink) and not await turn():
                sink.complete = False
                return
            if sink.full:
                _cap(sink)
                return
        if sink.waiting:
            await turn()
    finally:
        await result.aclose()


def drain_sync(result: Any, sink: Sink, turn: Callable[[], bool]) -> None:
    """Take all that a ``def main`` gave, as `drain` does."""
    if not inspect.isgenerator(result):
        take(result, sink)
        return
    try:
        for piece in result:
            if _put(piece, sink) and not turn():
                sink.complete = False
                return
            if sink.full:
                _cap(sink)
                return
        if sink.waiting:
            turn()
    finally:
        result.close()


def take(value: Any, sink: Sink) -> None:
    """Take a whole list. From a script that says itself what is new None is nothing, and a text one thing to tell.

    From any other they are mistakes.
    """
    if value is None and sink.picked.windmill:
        return
    if isinstance(value, str) and sink.picked.windmill:
        value = [value] if value else []
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        raise TriggerError(
            f"main returned {_kind(value)}, not a list: return a list of items, [] when there is none", kind="junk"
        )
    if len(value) > sink.max_items:
        raise TriggerError(
            f"main returned {len(value):,} items, {sink.max_items:,} are allowed: list less (`since` tells how far "
            "the last run came), yield pages, or raise [scripts] max_items",
            kind="too_large",
        )
    for item in value:
        sink.add(item)


def _put(piece: Any, sink: Sink) -> bool:
    """Take what a generator yielded, as far as there is room; True if that finishes a page."""
    items = piece if isinstance(piece, list | tuple) else (piece,)
    for item in items:
        if sink.full:
            return True
        sink.add(item)
    return sink.waiting >= (1 if items is piece else PAGE)


def _cap(sink: Sink) -> None:
    sink.complete = False
    sink.capped = True


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
