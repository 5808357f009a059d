"""What a preset is: a pure pair of functions that turns a delivery into a request and an answer into a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from watcher.values import Delivery, Flow, Judgement, Request, Response, Verdict

MAX_WAIT = 24 * 3600.0
"""Seconds; no answer may put a delivery off for longer."""

ITEMS_FAULT = frozenset({400, 413, 422})
TARGETS_FAULT = frozenset({401, 403, 404, 405, 410})


class PresetSettings(BaseModel):
    """The keys of a ``[flows.NAME]`` table that only one preset knows."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A flow's references, followed: secrets in the clear, so it is made late, passed on and never stored."""

    url: str
    token: str | None = None
    secrets: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)  # those that were references; sent as they are
    settings: Any = None  # the preset's own `settings` model


@dataclass(frozen=True, slots=True)
class Preset:
    """One kind of flow.

    ``judge_look_up`` is given the first answer and the answer to the request that ``judge`` asked for in
    `Judgement.look_up`.
    """

    settings: type[PresetSettings]
    request: Callable[[Flow, Delivery, Resolved, datetime], Request]
    judge: Callable[[Flow, Delivery, Resolved, Response, datetime], Judgement]
    judge_look_up: Callable[[Flow, Delivery, Response, Response], Judgement] | None = None
    format: Literal["envelope", "plain"] = "envelope"  # what is sent where the flow does not say


def judge_status(response: Response, now: datetime) -> Judgement:
    """What a status code says where a preset knows no better.

    Standard Webhooks asks only for "2xx is success, all else is retried". Sorting the rest by whose fault it is keeps
    a rotated token from filling the dead letters, and one bad item from being tried for three days.
    """
    status = response.status
    if 200 <= status < 300:
        return Judgement(Verdict.DELIVERED)
    note = f"answered {status}"
    if 300 <= status < 400:
        where = response.headers.get("location", "")[:200]
        return Judgement(Verdict.TARGET, f"{note}: redirects are not followed; set url to {where or 'the new place'}")
    if status in ITEMS_FAULT:
        return Judgement(Verdict.ITEM, note)
    if status in TARGETS_FAULT:
        return Judgement(Verdict.TARGET, note)
    return Judgement(Verdict.PASSING, note, retry_after(response.headers.get("retry-after", ""), now))


def retry_after(text: str, now: datetime) -> float | None:
    """Seconds to wait, from either form of ``Retry-After`` (RFC 9110, 10.2.3); None when it says nothing usable."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:10]), MAX_WAIT)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    at = at.replace(tzinfo=at.tzinfo or UTC)
    return min(max((at - now).total_seconds(), 0.0), MAX_WAIT)
