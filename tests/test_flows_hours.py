"""Hours in which a flow may be sent to: how they are written, and when they open, in every zone and on odd days."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.flows.hours import opens_in, parse, show

PARIS = "Europe/Paris"


def at(text: str, zone: str = "UTC") -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("08:00-20:00", "08:00-20:00"),
        ("mon-fri 08:00-18:00", "mon,tue,wed,thu,fri 08:00-18:00"),
        ("fri-mon 22:00-06:00", "mon,fri,sat,sun 22:00-06:00"),
        ("sat,sun 00:00-24:00", "sat,sun 00:00-24:00"),
        ("mon-sun 23:59-00:00", "23:59-24:00"),
    ],
)
def test_hours_are_read_and_shown(text: str, shown: str) -> None:
    assert show(parse(text)) == shown
    assert parse(shown) == parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "8-20", "08:00", "08:00-08:00", "25:00-26:00", "24:00-08:00", "08:60-09:00", "xyz 08:00-09:00",
     "mon-xyz 08:00-09:00", "08:00-20:00 mon", "mon - fri 08:00-18:00", "08:00-24:01", "00:00-00:00"],
)  # fmt: skip
def test_what_are_no_hours_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(text)


@pytest.mark.parametrize(
    ("hours", "now", "wait"),
    [
        ("08:00-20:00", "2026-03-02T08:00", 0),
        ("08:00-20:00", "2026-03-02T19:59:59", 0),
        ("08:00-20:00", "2026-03-02T20:00", 12 * 60),
        ("08:00-20:00", "2026-03-02T07:30", 30),
        ("mon-fri 08:00-18:00", "2026-03-06T18:00", (2 * 24 + 14) * 60),  # a Friday
        ("22:00-06:00", "2026-03-02T05:59", 0),
        ("22:00-06:00", "2026-03-02T06:00", 16 * 60),
        ("fri 22:00-06:00", "2026-03-07T05:00", 0),  # the night after Friday
        ("sat 00:00-24:00", "2026-03-07T23:59", 0),
        ("sat 00:00-24:00", "2026-03-08T00:00", 6 * 24 * 60),
    ],
)
def test_it_is_known_how_long_until_they_open(hours: str, now: str, wait: float) -> None:
    assert opens_in(parse(hours), at(now)) == timedelta(minutes=wait)


@pytest.mark.parametrize(
    ("now", "wait"),
    [
        ("2026-03-28T20:00", 11),  # the night has 23 hours
        ("2026-10-24T20:00", 13),  # and this one 25
        ("2026-06-01T20:00", 12),
    ],
)
def test_the_clock_is_the_local_one_when_it_is_changed(now: str, wait: int) -> None:
    assert opens_in(parse("08:00-20:00", PARIS), at(now, PARIS)) == timedelta(hours=wait)


def test_hours_that_do_not_exist_on_one_day_begin_when_the_clock_goes_on() -> None:
    hours = parse("02:30-03:30", PARIS)  # 29 March 2026 has no 02:30 there
    assert opens_in(hours, at("2026-03-29T01:59", PARIS)) <= timedelta(hours=1)


@given(
    start=st.integers(0, 1439),
    length=st.integers(1, 1440),
    days=st.sets(st.sampled_from(["mon", "tue", "wed", "thu", "fri", "sat", "sun"]), min_size=1),
    now=st.datetimes(datetime(2025, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC)),
    zone=st.sampled_from(["UTC", PARIS, "America/St_Johns", "Pacific/Apia", "Australia/Lord_Howe"]),
)
def test_when_the_wait_is_over_they_are_open_and_not_long_before(
    start: int, length: int, days: set[str], now: datetime, zone: str
) -> None:
    end = (start + length - 1) % 1440 + 1
    if end == start:
        return
    hours = parse(f"{','.join(days)} {start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}", zone)
    wait = opens_in(hours, now)
    assert timedelta() <= wait <= timedelta(days=8)
    assert opens_in(hours, now + wait) == timedelta()
    if wait:
        assert opens_in(hours, now + wait - timedelta(microseconds=1)) == timedelta(microseconds=1)
