"""When a delivery is tried again, when it is given up, and how fast a flow may be asked. Pure: time is passed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import datetime, timedelta

from watcher.flows.preset import MAX_WAIT
from watcher.values import Delivery, Judgement, Response, Settlement, Verdict

MAX_ANSWER = 4096
"""Bytes of an answer that are kept."""

FIRST_PROBE = timedelta(seconds=30)
LAST_PROBE = timedelta(hours=1)


def conclude(
    delivery: Delivery,
    judgement: Judgement,
    *,
    schedule: Sequence[timedelta],
    started_at: datetime,
    now: datetime,
    chance: float,
    probe: bool = False,
    response: Response | None = None,
) -> Settlement:
    """How one attempt ended. ``chance`` is a random number in [0, 1); ``schedule`` holds the wait before each attempt.

    A probe of a held flow burns no attempt, whatever passing trouble it met: that says nothing about the item.
    """
    verdict, note, due_at, dead = judgement.verdict, judgement.note, None, False
    if probe and verdict is Verdict.PASSING:
        verdict = Verdict.TARGET
    if verdict is Verdict.ITEM:
        dead = True
    elif verdict is Verdict.TARGET:
        due_at = now
    elif verdict is Verdict.PASSING:
        if delivery.attempt >= len(schedule):
            dead, note = True, f"{note}; given up after {delivery.attempt} attempts"
        else:
            due_at = now + wait(schedule[delivery.attempt], judgement.retry_after, chance)
    return Settlement(
        delivery,
        verdict,
        started_at,
        max(0, int((now - started_at).total_seconds() * 1000)),
        status_code=response.status if response else None,
        note=note,
        answer=response.body[:MAX_ANSWER] if response else b"",
        due_at=due_at,
        dead=dead,
    )


def wait(base: timedelta, retry_after: float | None, chance: float) -> timedelta:
    """Full jitter around ``base``: anything from nothing to twice as much, so that a herd never comes back together.

    What the flow asked for beats it, but is never less than ``base`` and never more than a day.
    """
    if retry_after is not None:
        return max(base, timedelta(seconds=min(retry_after, MAX_WAIT)))
    return timedelta(seconds=base.total_seconds() * 2 * chance)


def probe_after(probes: int) -> timedelta:
    """How long a held flow is left alone before probe number ``probes`` + 1: 30 s, doubled, up to an hour."""
    return min(FIRST_PROBE * (1 << min(probes, 16)), LAST_PROBE)


class Window:
    """At most ``count`` starts in any ``span``: exact, where a leaky bucket lets twice as many burst."""

    def __init__(self, count: int, span: timedelta) -> None:
        self.count = count
        self.span = span.total_seconds()
        self._starts: deque[float] = deque()

    def free(self, now: float) -> int:
        """How many may start at the monotonic instant ``now``."""
        while self._starts and self._starts[0] <= now - self.span:
            self._starts.popleft()
        return self.count - len(self._starts)

    def take(self, number: int, now: float) -> None:
        self._starts.extend([now] * number)

    def opens(self, now: float) -> float:
        """Seconds until another may start."""
        return 0.0 if self.free(now) > 0 else self._starts[0] + self.span - now
