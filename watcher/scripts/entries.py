"""What a main gave back, as entries: keys and cursors picked, JSON made sure of, limits kept."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from pathlib import PurePath
from typing import Any

from watcher.errors import TriggerError
from watcher.scripts.frames import dump, load
from watcher.trigger import Marked, Picker
from watcher.values import Entry, Json


def plain(value: Any) -> Json:
    """What JSON does not know but has one obvious text for. TypeError for anything else."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal | uuid.UUID | PurePath):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=plain).encode


def to_json(value: Any, what: str) -> str:
    """JSON text of what a script gave. TriggerError of kind ``junk`` says where in it the trouble is."""
    try:
        return _encode(value)
    except RecursionError as error:
        raise TriggerError(f"{what} is nested too deeply to be JSON", kind="junk") from error
    except (TypeError, ValueError) as error:
        where, trouble = _trouble(value, what, frozenset(), 0) or (what, str(error))
        raise TriggerError(f"{where} {trouble}", kind="junk") from error


def _trouble(value: Any, where: str, inside: frozenset[int], depth: int) -> tuple[str, str] | None:
    """The first part that is not JSON, and why not."""
    if value is None or isinstance(value, bool | str):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else (where, f"is {value}, which JSON does not know: use None")
    if isinstance(value, int):
        return None if -(10**4000) < value < 10**4000 else (where, "is an integer of more than 4,000 digits")
    if id(value) in inside:
        return where, "contains itself"
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str | int | float | bool | None):
                return where, f"has a key of type {type(name).__name__}: names in a JSON object are text"
        parts: Iterable[tuple[str, Any]] = ((f"{where}.{name}", part) for name, part in value.items())
    elif isinstance(value, list | tuple):
        parts = ((f"{where}[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, bytes | bytearray):
        return where, "is bytes, which JSON does not know: decode them, or use base64"
    elif isinstance(value, set | frozenset):
        return where, "is a set, which JSON does not know and whose order is not fixed: use sorted(...)"
    else:
        try:
            parts = [(where, plain(value))]
        except Exception:
            return where, f"is of type {type(value).__name__}, which JSON does not know"
    if depth > 200:
        return None
    for name, part in parts:
        found = _trouble(part, name, inside | {id(value)}, depth + 1)
        if found:
            return found
    return None


def picker(pick: Picker, what: str) -> Callable[[Any], Any] | None:
    """A callable for a JMESPath expression or a callable. TriggerError of kind ``arguments`` for a bad expression."""
    if pick is None or callable(pick):
        return pick
    if pick.isidentifier() and pick.isascii():  # the common case, without JMESPath's cost
        return lambda item: item.get(pick) if isinstance(item, dict) else None
    import jmespath
    from jmespath.exceptions import JMESPathError

    try:
        search = jmespath.compile(pick).search
    except JMESPathError as error:
        raise TriggerError(f"{what} = {pick!r} is not JMESPath: {error}", kind="arguments") from None

    def find(item: Any) -> Any:
        try:
            return search(item)
        except JMESPathError as error:
            raise TriggerError(f"{what} = {pick!r}: {error}", kind="junk") from error

    return find


def as_key(value: Any, where: str) -> str | None:
    """A key as text: 1 and "1" are one key. None, and the empty text, are no key at all."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool | float):
        return dump(value)
    if isinstance(value, int):
        return str(value)
    return to_json(value, f"the key of {where}")


class Picked:
    """Turns items into entries, by the label's pickers or by the watcher's, which come first."""

    def __init__(self, marked: Marked, key: str | None, cursor: str | None) -> None:
        default = "id" if marked.label.style == "windmill" else None
        self.key = picker(key or marked.key or default, "key")
        self.cursor = picker(cursor or marked.cursor, "cursor")
        self.asked = key or marked.label.key
        self.windmill = marked.label.style == "windmill"
        self.count = 0
        self.keyed = 0

    def entry(self, item: Any) -> tuple[str | None, Json, str]:
        """The key, the cursor and the JSON text of one item."""
        where = f"item {self.count}"
        self.count += 1
        text = to_json(item, where)
        key = as_key(self.key(item), where) if self.key else None
        self.keyed += key is not None
        cursor = self.cursor(item) if self.cursor else None
        if cursor is not None and not isinstance(cursor, str | int):
            cursor = load(to_json(cursor, f"the cursor of {where}"))
        return key, cursor, text

    def warnings(self) -> tuple[str, ...]:
        """What an author would want to know, and no error."""
        if self.asked and self.count and not self.keyed:
            return (
                f"key = {self.asked!r} was found in none of {self.count} items: each is known by its whole content, "
                "so that an edited item is a new one",
            )
        return ()


def entries(packed: Iterable[Any]) -> list[Entry]:
    """Entries from ``[key, cursor, item]`` triples that came from a worker. ValueError for any other shape."""
    result = []
    for row in packed:
        if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str | None)):
            raise ValueError("an entry is not [key, cursor, item]")
        result.append(Entry(row[2], row[0], row[1]))
    return result
