"""How durations, sizes and rates are written: "1h30m", "10MB", "10/s"."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

_UNITS = {"w": 604_800.0, "d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(ms|[wdhms])")
_SIZE = re.compile(r"(\d{1,15})\s?(B|kB|MB|GB|KiB|MiB|GiB)")
_SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_RATE = re.compile(r"(\d{1,6})/(\d{0,4})(s|m|h|d)")
_LONGEST = timedelta(days=3650)

DURATION_PATTERN = r"^(\d+(\.\d+)?(ms|[wdhms]))+$"
SIZE_PATTERN = r"^\d+ ?(B|kB|MB|GB|KiB|MiB|GiB)$"
RATE_PATTERN = r"^\d+/\d*[smhd]$"


def duration(value: Any) -> timedelta:
    """ "1h30m" as a timedelta. Raises ValueError with the way to write it."""
    if isinstance(value, timedelta):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f'a duration has a unit: write "{value}s" for {value} seconds')
    if not isinstance(value, str):
        raise ValueError('a duration is text, such as "30s", "5m" or "1h30m"')
    text = value.replace(" ", "")
    parts = list(_DURATION.finditer(text))
    if not parts or "".join(part.group() for part in parts) != text:
        raise ValueError(f'"{shortened(value)}" is not a duration: write "250ms", "30s", "5m", "1h30m", "2d" or "1w"')
    seconds = sum(float(part[1]) * _UNITS[part[2]] for part in parts)
    if seconds > _LONGEST.total_seconds():
        raise ValueError("a duration is at most ten years")
    return timedelta(seconds=seconds)


def size(value: Any) -> int:
    """ "10MB" as bytes. Raises ValueError with the way to write it."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError('a size is text such as "64kB", "10MB" or "2GiB", or a number of bytes')
    return int(found[1]) * _SIZES[found[2]]


def rate(value: Any) -> tuple[int, timedelta]:
    """ "10/s" or "100/5m" as (so many, per span). Raises ValueError with the way to write it."""
    if isinstance(value, tuple):
        return value
    found = _RATE.fullmatch(value.replace(" ", "")) if isinstance(value, str) else None
    if found is None or int(found[1]) < 1 or found[2] == "0":
        raise ValueError('a rate is text such as "10/s", "100/m" or "1000/15m"')
    return int(found[1]), timedelta(seconds=int(found[2] or 1) * _UNITS[found[3]])


def show_duration(value: timedelta) -> str:
    """A text that `duration` reads back."""
    left = round(value.total_seconds() * 1000)
    shown = ""
    for unit, length in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left = divmod(left, length)
        shown += f"{count}{unit}" if count else ""
    return shown or "0s"


def show_size(value: int) -> str:
    """The shortest text that `size` reads back."""
    for unit in ("GB", "GiB", "MB", "MiB", "kB", "KiB"):
        if value and value % _SIZES[unit] == 0:
            return f"{value // _SIZES[unit]}{unit}"
    return f"{value}B"


def show_rate(value: tuple[int, timedelta]) -> str:
    """A text that `rate` reads back."""
    seconds = round(value[1].total_seconds())
    unit = next(unit for unit in "dhms" if seconds % _UNITS[unit] == 0)
    spans = round(seconds / _UNITS[unit])
    return f"{value[0]}/{spans if spans > 1 else ''}{unit}"


def shortened(text: str, limit: int = 60) -> str:
    """The text, cut for a message."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def matches(pattern: str, text: str) -> bool:
    """Whether the whole text matches, a trailing newline not forgiven."""
    return re.fullmatch(pattern.removeprefix("^").removesuffix("$"), text) is not None
