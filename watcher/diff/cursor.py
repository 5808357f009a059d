"""Where an entry stands on its source's own scale: numbers, instants or texts, compared exactly."""

from __future__ import annotations

import calendar
import email.utils
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Literal

from watcher.errors import TriggerError
from watcher.values import Json

Kind = Literal["number", "instant", "text"]

_NUMBER = re.compile(r"-?\d{1,400}(\.\d{1,400})?")
_RFC3339 = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)"
    r"(?P<time>[Tt ](?P<clock>\d\d:\d\d)(?P<second>:\d\d)?([.,](?P<fraction>\d{1,30}))?"
    r" ?(?P<zone>[Zz]|[+-]\d\d:?\d\d)?)?"
)
_RFC2822 = re.compile(r"([A-Za-z]{3}, )?\d{1,2} [A-Za-z]{3} \d{4} \d\d:\d\d(:\d\d)? .{1,12}")
_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Point:
    """One place on the scale. ``at`` compares within one ``kind``: a number, nanoseconds since 1970, or a text."""

    kind: Kind
    at: int | Decimal | str
    cursor: Json  # as the source wrote it

    def before(self, other: Point) -> bool:
        """Whether this lies strictly before ``other``, which is of the same kind."""
        return self.at < other.at  # type: ignore[operator]


def point(cursor: Json) -> Point | None:
    """Read a cursor; None if the entry has none.

    Digits in a text are a number ("999" comes before "1000"). Instants are RFC 3339 or RFC 2822, to the nanosecond;
    one without a zone is UTC. Any other text is compared as text.

    Raises:
        TriggerError: it is neither a number nor a text (``junk``).
    """
    if cursor is None or cursor == "":
        return None
    if isinstance(cursor, str):
        return _read(cursor)
    if isinstance(cursor, (int, float)) and not isinstance(cursor, bool):
        return Point("number", cursor if isinstance(cursor, int) else Decimal(cursor), cursor)
    raise TriggerError(f"the cursor must be a number or a text, not {_shown(cursor)}: check `cursor`", kind="junk")


@lru_cache(maxsize=4096)
def _read(text: str) -> Point:
    if _NUMBER.fullmatch(text):
        return Point("number", Decimal(text) if "." in text else int(text), text)
    instant = _rfc3339(text) if _RFC3339.fullmatch(text) else _rfc2822(text) if _RFC2822.fullmatch(text) else None
    return Point("text", text, text) if instant is None else Point("instant", instant, text)


def _rfc3339(text: str) -> int | None:
    parts = _RFC3339.fullmatch(text)
    assert parts
    try:
        day = date.fromisoformat(parts["date"])
        hour, minute = (int(p) for p in (parts["clock"] or "00:00").split(":"))
        second = int((parts["second"] or ":0")[1:])
        if hour > 23 or minute > 59 or second > 60:  # 60: a leap second
            return None
        seconds = calendar.timegm((day.year, day.month, day.day, hour, minute, second))
    except ValueError:
        return None
    zone = parts["zone"] or "Z"
    if zone not in "Zz":
        offset = int(zone[1:3]) * 3600 + int(zone[-2:]) * 60
        seconds -= offset if zone[0] == "+" else -offset
    return seconds * _NANO + int((parts["fraction"] or "0").ljust(9, "0")[:9])


def _rfc2822(text: str) -> int | None:
    try:
        at = email.utils.parsedate_to_datetime(text)
    except (ValueError, IndexError, TypeError):
        return None
    return nanoseconds(at if at.tzinfo else at.replace(tzinfo=UTC))


def nanoseconds(at: datetime) -> int:
    """An aware instant as nanoseconds since 1970."""
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


def one_kind(points: Iterable[Point | None]) -> None:
    """Do nothing if all stand on one scale; those without a cursor do not count.

    Raises:
        TriggerError: there are two kinds, so that no order could be told (``junk``).
    """
    first: Point | None = None
    for p in points:
        if p is None:
            continue
        first = first or p
        if p.kind != first.kind:
            raise TriggerError(
                f"the cursor is sometimes {_kind(first)} and sometimes {_kind(p)}, so nothing can be ordered by it: "
                "check `cursor`; if it was changed on purpose, `watcher state reset` starts afresh",
                kind="junk",
            )


def since(cursor: Json, lookback: str | None) -> Json:
    """The furthest point less the lookback, in the cursor's own form: where to list from, inclusively.

    Raises:
        TriggerError: the lookback does not fit the cursor (``arguments``).
    """
    mark = point(cursor)
    if mark is None or not lookback:
        return cursor
    back = _parse_lookback(lookback)
    if mark.kind == "number" and isinstance(back, Decimal):
        whole = isinstance(mark.at, int) and back == int(back)
        floor = mark.at - (int(back) if whole else back)  # type: ignore[operator]
        if isinstance(cursor, str):
            return format(floor, "f") if isinstance(floor, Decimal) else str(floor)
        return float(floor) if isinstance(cursor, float) or floor != int(floor) else int(floor)
    if mark.kind == "instant" and isinstance(back, timedelta):
        assert isinstance(mark.at, int)
        return _written_like(cursor, max(mark.at - back // timedelta(microseconds=1) * 1000, _FIRST))
    wanted = {"number": "a number in the cursor's own unit", "instant": 'a span such as "15m"', "text": "left out"}
    raise TriggerError(
        f"lookback = {lookback!r} does not fit a cursor that is {_kind(mark)}: it must be {wanted[mark.kind]}",
        kind="arguments",
    )


_FIRST = nanoseconds(datetime(1, 1, 3, tzinfo=UTC))  # room for a zone's offset


def _parse_lookback(text: str) -> Decimal | timedelta:
    if _NUMBER.fullmatch(text):
        return Decimal(text)
    parts = _SPAN.findall(text.replace(" ", ""))
    if parts and "".join(n + unit for n, unit in parts) == text.replace(" ", ""):
        return timedelta(seconds=sum(float(n) * _UNITS[unit] for n, unit in parts))
    raise TriggerError(
        f'lookback = {text!r} is neither a span such as "15m" nor a number in the cursor\'s own unit', kind="arguments"
    )


def _written_like(text: str, at: int) -> str:
    """An instant in the form of another: the same zone, the same precision (rounded down), the same syntax."""
    parts = _RFC3339.fullmatch(text)
    if parts is None:
        zone = email.utils.parsedate_to_datetime(text).tzinfo or UTC
        moment = datetime.fromtimestamp(at // _NANO, UTC)
        if text.endswith("GMT"):
            return email.utils.format_datetime(moment, usegmt=True)
        return email.utils.format_datetime(moment.astimezone(zone))
    zone_text = parts["zone"] or ""
    offset = 0
    if zone_text and zone_text not in "Zz":
        offset = int(zone_text[1:3]) * 3600 + int(zone_text[-2:]) * 60
        offset = offset if zone_text[0] == "+" else -offset
    moment = datetime(1970, 1, 1) + timedelta(seconds=at // _NANO + offset)
    written = f"{moment.year:04}-{moment.month:02}-{moment.day:02}"
    if parts["time"] is None:
        return written
    written += f"{parts['time'][0]}{moment.hour:02}:{moment.minute:02}"
    if parts["second"]:
        written += f":{moment.second:02}"
    if parts["fraction"]:
        digits = len(parts["fraction"])
        written += "." + f"{at % _NANO:09}".ljust(digits, "0")[:digits]
    return written + zone_text


def _kind(p: Point) -> str:
    return f"{ {'number': 'a number', 'instant': 'a date', 'text': 'a text'}[p.kind] } ({_shown(p.cursor)})"


def _shown(value: Json) -> str:
    return repr(value)[:60]
