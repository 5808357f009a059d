"""What a preset is: a pure pair of functions that turns a delivery into a request and an answer into a verdict."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import quote

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from watcher.errors import DeliveryError
from watcher.values import Delivery, Flow, Judgement, Request, Response, Verdict

MAX_WAIT = 24 * 3600.0
"""Seconds; no answer may put a delivery off for longer."""

ITEMS_FAULT = frozenset({400, 413, 422})
TARGETS_FAULT = frozenset({401, 403, 404, 405, 410})
_DELIVERED = Judgement(Verdict.DELIVERED)

EMBEDDED = ("envelope", "plain", "cloudevents-structured")
"""Formats that fit into a field of an engine's own request."""
ALL_FORMATS = (*EMBEDDED, "cloudevents")
"""Formats where body and headers are the message."""


class PresetSettings(BaseModel):
    """The keys of a ``[flows.NAME]`` table that only one preset knows."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    hidden: ClassVar[frozenset[str]] = frozenset({"password"})
    """Settings that are secrets: never shown, never logged."""


def _part(text: str) -> str:
    if text.strip("/") in ("", ".", "..") or not text.isprintable() or any(p in (".", "..") for p in text.split("/")):
        raise ValueError("must name one thing: no control characters, and no `.` or `..` between slashes")
    return text


Part = Annotated[str, Field(max_length=500), AfterValidator(_part)]
"""A setting that becomes part of a path."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A flow's references, followed: secrets in the clear, so it is made late, passed on and never stored."""

    url: str
    token: str | None = None
    secrets: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)  # those that were references; sent as they are
    settings: Any = None  # the preset's own `settings` model
    learned: str = ""  # what the preset's preliminary request brought: a session's token, an id


@dataclass(frozen=True, slots=True)
class Preliminary:
    """A request whose answer every delivery needs: for a token, or for the id behind a name.

    ``request`` says what to ask, or None when this flow needs nothing. ``learn`` reads the answer: a text, which is
    kept in memory until a `Judgement` calls it ``stale`` and comes back as `Resolved.learned`, or why there is none.
    """

    request: Callable[[Flow, Resolved], Request | None]
    learn: Callable[[Flow, Resolved, Response, datetime], str | Judgement]
    secret: bool = False  # what is learned must never be shown


@dataclass(frozen=True, slots=True)
class Preset:
    """One kind of flow.

    ``judge_look_up`` is given the first answer and the answer to the request that ``judge`` asked for in
    `Judgement.look_up`. ``look_before`` is a request to make before any attempt but the first, where the engine has no
    idempotency key; ``already`` says whether its answer shows that the delivery came through before.
    """

    settings: type[PresetSettings]
    request: Callable[[Flow, Delivery, Resolved, datetime], Request]
    judge: Callable[[Flow, Delivery, Resolved, Response, datetime], Judgement]
    judge_look_up: Callable[[Flow, Delivery, Response, Response], Judgement] | None = None
    format: Literal["envelope", "plain"] = "envelope"  # what is sent where the flow does not say
    formats: tuple[str, ...] = EMBEDDED  # what a flow may say
    url: str = ""  # where to send, where the flow does not say
    secret_url: bool = False  # the address itself opens the door
    preliminary: Preliminary | None = None
    look_before: Callable[[Flow, Delivery, Resolved], Request | None] | None = None
    already: Callable[[Flow, Delivery, Response], bool] | None = None
    rate: tuple[int, timedelta] | None = None  # the engine's own limit, where the flow says none
    max_item: int | None = 4 * 1024 * 1024  # bytes of an item that is sent whole, where the flow does not say
    batch: Callable[[Flow, Sequence[tuple[Delivery, bytes]], Resolved, datetime], Request] | None = None


def judge_status(response: Response, now: datetime) -> Judgement:
    """What a status code says where a preset knows no better.

    Standard Webhooks asks only for "2xx is success, all else is retried". Sorting the rest by whose fault it is keeps
    a rotated token from filling the dead letters, and one bad item from being tried for three days.
    """
    status = response.status
    if 200 <= status < 300:
        return _DELIVERED
    note = f"answered {status}"
    if 300 <= status < 400:
        where = response.headers.get("location", "")[:200]
        return Judgement(Verdict.TARGET, f"{note}: redirects are not followed; set url to {where or 'the new place'}")
    if status in ITEMS_FAULT:
        return Judgement(Verdict.ITEM, note)
    if status in TARGETS_FAULT:
        return Judgement(Verdict.TARGET, note)
    return Judgement(Verdict.PASSING, note, retry_after(response.headers.get("retry-after", ""), now))


def judge_preliminary(response: Response, now: datetime, what: str) -> Judgement:
    """Why a preliminary request brought nothing: never the item's fault."""
    judgement = judge_status(response, now)
    verdict = Verdict.PASSING if judgement.verdict is Verdict.PASSING else Verdict.TARGET
    detail = said(response, "detail", "message")
    return Judgement(verdict, f"answered {response.status} when asked for {what}{detail}", judgement.retry_after)


def path_part(text: str) -> str:
    """One part of a path: a slash or a question mark in it leads nowhere else."""
    return quote(text, safe="")


def several_parts(text: str) -> str:
    """A path whose slashes are slashes."""
    return quote(text, safe="/")


def bearer(resolved: Resolved) -> dict[str, str]:
    return {} if resolved.token is None else {"authorization": f"Bearer {resolved.token}"}


def basic(user: str, password: str) -> dict[str, str]:
    """RFC 7617, in UTF-8."""
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def oversized(engine: str, size: int, limit: int, unit: str = "bytes") -> DeliveryError:
    """The item's fault: this engine takes no message of that size."""
    return DeliveryError(
        f"{size} {unit}, and {engine} takes at most {limit}: send less of the item with `body`, or a link to it"
    )


def parsed(response: Response) -> Any:
    """The answer as JSON; None when it is none, or was cut."""
    try:
        return json.loads(response.body)
    except ValueError:
        return None


def said(response: Response, *names: str) -> str:
    """What a JSON answer says under the first of these names, shortened, for a note; else nothing."""
    found = parsed(response)
    for name in names:
        if isinstance(found, dict) and found.get(name):
            text = found[name] if isinstance(found[name], str) else json.dumps(found[name])
            return ": " + " ".join(text.split())[:300]
    return ""


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
