"""Hours in which a flow may be sent to, on the clock of its own time zone. Pure: time is passed in."""

from __future__ import annotations

import re
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from watcher.values import Hours

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
PATTERN = r"^([a-z]{3}(-[a-z]{3})?(,[a-z]{3}(-[a-z]{3})?)* )?\d{2}:\d{2}-\d{2}:\d{2}$"

_DAY = timedelta(days=1)
_HOW = 'write it like "08:00-20:00" or "mon-fri 08:00-18:00"'


def parse(text: str, timezone: str = "UTC") -> Hours:
    """``mon-fri 08:00-18:00``; an end before the start is on the next day.

    Raises ValueError with the way to write it.
    """
    if not re.fullmatch(PATTERN.strip("^$"), text):
        raise ValueError(f"not hours: {_HOW}")
    days, _, hours = text.rpartition(" ")
    start, end = (_clock(part) for part in hours.split("-"))
    if start >= _DAY:
        raise ValueError(f"a day starts at 00:00: {_HOW}")
    length = end - start if end > start else end - start + _DAY
    if length <= timedelta() or start == end:
        raise ValueError(f'from {hours[:5]} to {hours[:5]} is no time at all; for a whole day write "00:00-24:00"')
    return Hours(_weekdays(days), start, length, timezone)


def show(hours: Hours) -> str:
    """A text that `parse` reads back."""
    days = ",".join(DAYS[day] for day in hours.days)
    end = hours.start + hours.length
    end = end - _DAY if end > _DAY else end
    return f"{days} {_shown(hours.start)}-{_shown(end)}".removeprefix(",".join(DAYS)).strip()


def opens_in(hours: Hours, now: datetime) -> timedelta:
    """How long until something may be sent; nothing when that is now."""
    zone = ZoneInfo(hours.timezone)
    today = now.astimezone(zone).date()
    for ahead in range(-1, 9):  # since yesterday, whose hours may go past midnight
        day = today + timedelta(days=ahead)
        if day.weekday() not in hours.days:
            continue
        midnight = datetime.combine(day, time())
        # Wall clock first, zone second: on the day the clocks change, eight o'clock is still eight o'clock.
        begin = (midnight + hours.start).replace(tzinfo=zone).astimezone(UTC)
        end = (midnight + hours.start + hours.length).replace(tzinfo=zone).astimezone(UTC)
        if now < end:
            return max(begin - now, timedelta())
    raise AssertionError("every week has each of its days")


def _weekdays(text: str) -> tuple[int, ...]:
    if not text:
        return tuple(range(7))
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        for name in (first, last or first):
            if name not in DAYS:
                raise ValueError(f"no such day: {name} (known are {', '.join(DAYS)})")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        chosen.update(day % 7 for day in range(begin, end + 1 if end >= begin else end + 8))
    return tuple(sorted(chosen))


def _clock(text: str) -> timedelta:
    hour, minute = (int(part) for part in text.split(":"))
    if minute > 59 or timedelta(hours=hour, minutes=minute) > _DAY:
        raise ValueError(f"no such time: {text}")
    return timedelta(hours=hour, minutes=minute)


def _shown(at: timedelta) -> str:
    minutes = at // timedelta(minutes=1)
    return f"{minutes // 60:02}:{minutes % 60:02}"
