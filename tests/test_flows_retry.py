"""When a delivery is tried again: pure arithmetic on schedules, windows and probes."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.support.deliveries import NOW, delivery
from watcher.flows.retry import Window, conclude, probe_after, wait
from watcher.values import DeliverySettings, Judgement, Response, Settlement, Verdict

SCHEDULE = DeliverySettings().schedule


def end(judgement: Judgement, *, attempt: int = 1, chance: float = 0.5, probe: bool = False) -> Settlement:
    return conclude(
        delivery(attempt=attempt),
        judgement,
        schedule=SCHEDULE,
        started_at=NOW - timedelta(seconds=2),
        now=NOW,
        chance=chance,
        probe=probe,
        response=Response(500, {}, b"x" * 10_000),
    )


def test_the_schedule_lasts_three_days_on_average() -> None:
    waits = [end(Judgement(Verdict.PASSING), attempt=attempt).due_at for attempt in range(1, 10)]
    assert [at - NOW for at in waits if at] == list(SCHEDULE[1:])
    assert sum(SCHEDULE, timedelta()) == timedelta(hours=75, minutes=35, seconds=5)


@pytest.mark.parametrize(("chance", "factor"), [(0.0, 0), (0.25, 0.5), (0.5, 1), (0.75, 1.5), (0.999, 1.998)])
def test_jitter_is_full_and_centred(chance: float, factor: float) -> None:
    assert wait(timedelta(minutes=5), None, chance) == timedelta(minutes=5) * factor


def test_after_the_last_attempt_a_delivery_is_dead_and_says_why() -> None:
    ended = end(Judgement(Verdict.PASSING, "answered 500"), attempt=10)
    assert (ended.dead, ended.due_at) == (True, None)
    assert ended.note == "answered 500; given up after 10 attempts"


@pytest.mark.parametrize(("asked", "expected"), [(0.0, 5), (3.0, 5), (60.0, 60), (1e9, 86400)])
def test_retry_after_is_never_less_than_the_schedule_nor_more_than_a_day(asked: float, expected: int) -> None:
    assert wait(timedelta(seconds=5), asked, 0.9) == timedelta(seconds=expected)


def test_the_items_fault_is_dead_at_once_and_the_targets_waits() -> None:
    assert end(Judgement(Verdict.ITEM, "answered 400")).dead
    held = end(Judgement(Verdict.TARGET, "answered 401"))
    assert (held.dead, held.due_at) == (False, NOW)


def test_a_probe_burns_no_attempt_for_passing_trouble() -> None:
    assert end(Judgement(Verdict.PASSING), attempt=10, probe=True).verdict is Verdict.TARGET
    assert end(Judgement(Verdict.DELIVERED), probe=True).verdict is Verdict.DELIVERED


def test_only_the_start_of_an_answer_is_kept_and_the_time_it_took() -> None:
    ended = end(Judgement(Verdict.DELIVERED))
    assert (len(ended.answer), ended.status_code, ended.duration_ms) == (4096, 500, 2000)


def test_probes_come_after_30_seconds_and_at_last_hourly() -> None:
    assert [probe_after(n).total_seconds() for n in range(9)] == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert probe_after(10_000) == timedelta(hours=1)


def test_a_window_holds_in_every_span_and_opens_again() -> None:
    window = Window(3, timedelta(seconds=10))
    assert window.free(0) == 3
    window.take(2, 0)
    window.take(1, 4)
    assert (window.free(9.9), round(window.opens(9.9), 6)) == (0, 0.1)
    assert (window.free(10), window.opens(10)) == (2, 0)
    window.take(2, 10)
    assert window.free(13.9) == 0
    assert window.free(14) == 1
