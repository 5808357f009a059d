"""What a program wrote, as the entries of a run or the result of a step."""

from __future__ import annotations

import asyncio
from typing import Any

from watcher.errors import TriggerError
from watcher.scripts.calls import Call
from watcher.scripts.entries import Picked
from watcher.scripts.frames import load
from watcher.scripts.listing import Row, Sink, take
from watcher.trigger import Marked
from watcher.values import UNSET, Entry, Json, Listing, ScriptSettings

LARGE = 256 * 1024  # bytes above which a thread does it, so that no other watcher waits


async def listing(
    call: Call, marked: Marked, settings: ScriptSettings, output: bytes, logs: str, *, envelope: bool
) -> Listing:
    """The listing in a program's output. TriggerError of kind ``junk`` or ``too_large``.

    ``envelope``: the output may also be JSON lines, or an object with ``items`` and a ``state``.
    """

    def read() -> Listing:
        state: Json = UNSET
        items: Any = _document(output, call.script.name, lines=envelope)
        if envelope and isinstance(items, dict) and set(items) <= {"items", "state"}:
            state = items.get("state", UNSET)
            items = items.get("items", [])
        elif envelope and isinstance(items, dict):
            items = [items]
        picked = Picked(marked, call.key, call.cursor)
        found: list[Entry] = []

        def keep(row: Row) -> None:
            found.append(Entry(load(row[2]), row[0], row[1]))

        take(items, Sink(picked, settings.max_items, settings.max_result, keep))
        return Listing(marked.label, found, state=state, logs=logs, warnings=picked.warnings())

    try:
        return await asyncio.to_thread(read) if len(output) > LARGE else read()
    except TriggerError as error:
        error.logs = logs
        raise


def result(output: bytes, name: str) -> Json:
    """What a step returned: the JSON in its output, None if there is none, a list if there are several lines."""
    return _document(output, name, lines=True)


def _document(output: bytes, name: str, *, lines: bool) -> Json:
    text = output.decode("utf-8", "replace").strip()
    if not text:
        return None
    try:
        return load(text)
    except (ValueError, RecursionError) as error:
        wrong = error
    if lines and "\n" in text:
        try:
            return [load(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError) as error:
            wrong = error
    raise TriggerError(
        f"{name} wrote something that is neither JSON nor JSON lines: {wrong}: what is not a result goes to "
        "standard error",
        kind="junk",
        detail=text[:8192],
    )
