"""What the verbs work on and how one becomes known, with the errors and the words that they share."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from watcher.errors import WatcherError
from watcher.store import audit
from watcher.values import UNSET, Config, Json

if TYPE_CHECKING:
    from watcher.engine.silence import Silence
    from watcher.run import Runner
    from watcher.secrets import Key
    from watcher.store.db import Database


@dataclasses.dataclass(frozen=True, slots=True)
class Operator:
    """What the verbs work on. The last four are given only inside a running service."""

    config: Callable[[], Config]
    db: Database
    clock: Callable[[], datetime]
    runner: Runner | None = None
    key: Key | None = None
    wake: Callable[[Collection[str]], None] = lambda flows: None  # deliveries of these flows became due
    reload: Callable[[], Awaitable[Sequence[str]]] | None = None  # the options that take a restart
    next_run: Callable[[str], datetime | None] | None = None
    silences: Callable[[], Mapping[str, Silence]] | None = None
    outbound: Callable[[], Config] | None = None  # with local flows as the dispatcher sees them
    started_at: datetime | None = None


Verb = Callable[..., Awaitable[Json]]
VERBS: dict[str, Verb] = {}
READS: set[str] = set()
"""Verbs that write nothing: a database opened read-only is enough."""


def verb(function: Verb) -> Verb:
    VERBS[function.__name__] = function
    return function


def reads(function: Verb) -> Verb:
    READS.add(function.__name__)
    return verb(function)


class Unknown(WatcherError):
    """There is nothing of that name or number."""

    exit_code = 2


class Unsuited(WatcherError):
    """The verb does not fit what it was asked of."""

    exit_code = 2


class Rejected(WatcherError):
    """The new configuration is bad; the message shows every mistake with its place."""

    exit_code = 78


async def write_down(op: Operator, action: str, subject: str, note: str = "") -> None:
    now = op.clock()
    await op.db.write(lambda tx: audit.note(tx, action, subject, now, actor="operator", note=note))


def must_be_known(name: str, names: Collection[str], noun: str) -> None:
    if name not in names:
        raise Unknown(f"no such {noun}: {name}{did_you_mean(name, names)}")


def did_you_mean(word: str, words: Collection[str]) -> str:
    """`` (did you mean …?)``, or what there is when nothing is near; empty when there is nothing."""
    near = difflib.get_close_matches(word, words, 1)
    if near:
        return f" (did you mean {near[0]}?)"
    return f" (there is {', '.join(sorted(words)[:10])})" if words else ""


def plain(value: Any) -> Json:
    """Any view of the store as JSON: instants as RFC 3339 in UTC, bytes as hexadecimal."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Enum):
        return value.name.lower() if isinstance(value.value, int) else value.value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if value is UNSET:
        return None
    return str(value) if isinstance(value, Path) else value
