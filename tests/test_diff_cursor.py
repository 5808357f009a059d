"""Cursors: what is read from them, how they compare, and where a script is told to begin."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.diff.cursor import nanoseconds, one_kind, point, since
from watcher.errors import TriggerError


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (1, 2),
        (1, 1.5),
        ("999", "1000"),
        (999, "1000"),
        ("-2", -1),
        ("0.1", "0.10000001"),
        (2**63, 2**63 + 1),
        ("2026-01-01", "2026-01-01T00:00:01Z"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00.000000001Z"),
        ("2026-01-01T00:00:00.1Z", "2026-01-01T00:00:00.15Z"),
        ("2026-01-01T01:00:00+02:00", "2026-01-01T00:00:00Z"),
        ("2026-01-01T00:00:00-0130", "2026-01-01T02:00:00"),
        ("2026-01-01 00:00", "2026-01-01 00:01"),
        ("2016-12-31T23:59:59Z", "2016-12-31T23:59:60Z"),
        ("Fri, 27 Feb 2026 10:00:00 GMT", "Fri, 27 Feb 2026 11:30:00 +0100"),
        ("27 Feb 2026 10:00:00 -0000", "2026-02-27T10:00:01Z"),
        ("abc", "abd"),
    ],
)
def test_cursors_compare_by_what_they_mean(earlier: Any, later: Any) -> None:
    one, other = point(earlier), point(later)
    assert one
    assert other
    assert one.kind == other.kind
    assert one.before(other)
    assert not other.before(one)


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_cursor_is_no_point(nothing: Any) -> None:
    assert point(nothing) is None


@pytest.mark.parametrize("odd", [True, [1], {"a": 1}])
def test_a_cursor_that_is_neither_number_nor_text_is_junk(odd: Any) -> None:
    with pytest.raises(TriggerError, match="a number or a text") as caught:
        point(odd)
    assert caught.value.kind == "junk"


@pytest.mark.parametrize(
    "text", ["2026-13-01", "2026-02-30T00:00:00Z", "2026-01-01T25:00:00Z", "yesterday", "Fri, 99 Feb 2026 10:00:00 GMT"]
)
def test_what_only_looks_like_a_date_is_a_text(text: str) -> None:
    found = point(text)
    assert found
    assert found.kind == "text"


def test_two_kinds_on_one_scale_are_refused() -> None:
    one_kind([point(1), None, point("2")])
    with pytest.raises(TriggerError, match="check `cursor`"):
        one_kind([None, point(1), point("x")])


@pytest.mark.parametrize(
    ("cursor", "lookback", "expected"),
    [
        (None, "15m", None),
        (100, None, 100),
        (100, "30", 70),
        (100, "0.5", 99.5),
        ("100", "30", "70"),
        ("100", "0.5", "99.5"),
        (10**40, "1", 10**40 - 1),
        (1.5, "1", 0.5),
        ("2026-03-01T12:00:00Z", "15m", "2026-03-01T11:45:00Z"),
        ("2026-03-01t12:00:00z", "1h 30m", "2026-03-01t10:30:00z"),
        ("2026-03-01T12:00:00.250Z", "1500ms", "2026-03-01T11:59:58.750Z"),
        ("2026-03-01T12:00:00.123456789Z", "1s", "2026-03-01T11:59:59.123456789Z"),
        ("2026-03-01T00:30:00+01:00", "1h", "2026-02-28T23:30:00+01:00"),
        ("2026-03-01T12:00", "30s", "2026-03-01T11:59"),
        ("2026-03-01", "1h", "2026-02-28"),
        ("2026-03-01 12:00:00", "2d", "2026-02-27 12:00:00"),
        ("Sun, 01 Mar 2026 12:00:00 GMT", "1w", "Sun, 22 Feb 2026 12:00:00 GMT"),
        ("Sun, 01 Mar 2026 12:00:00 +0100", "1h", "Sun, 01 Mar 2026 11:00:00 +0100"),
        ("0001-01-02T00:00:00Z", "900w", "0001-01-03T00:00:00Z"),
    ],
)
def test_since_is_the_cursor_less_the_lookback_in_its_own_form(
    cursor: Any, lookback: str | None, expected: Any
) -> None:
    found = since(cursor, lookback)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("cursor", "lookback", "advice"),
    [
        (100, "15m", "a number in the cursor's own unit"),
        ("2026-03-01", "900", 'a span such as "15m"'),
        ("abc", "900", "left out"),
        (100, "soon", "neither a span"),
    ],
)
def test_a_lookback_that_does_not_fit_says_what_would(cursor: Any, lookback: str, advice: str) -> None:
    with pytest.raises(TriggerError, match=advice) as caught:
        since(cursor, lookback)
    assert caught.value.kind == "arguments"


@given(st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)), st.integers(0, 10**6))
def test_since_never_lies_after_the_cursor(at: datetime, seconds: int) -> None:
    for text in (at.isoformat() + "Z", at.isoformat(timespec="seconds") + "+05:30", at.date().isoformat()):
        mark, low = point(text), point(since(text, f"{seconds}s"))
        assert mark
        assert low
        assert not mark.before(low)
        assert isinstance(mark.at, int)
        assert isinstance(low.at, int)
        assert mark.at - low.at >= seconds * 10**9


@given(st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)))
def test_an_instant_reads_as_itself(at: datetime) -> None:
    found = point(at.isoformat())
    assert found
    assert found.at == nanoseconds(at.replace(tzinfo=UTC))
