"""Several deliveries in one request: a list of what would have been sent alone, and each one's own verdict. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from watcher import ids
from watcher.flows import envelope
from watcher.flows.preset import Preset, Resolved, judge_status, parsed
from watcher.values import Delivery, Flow, Judgement, Request, Response, Verdict

LIMIT = 4 * 1024 * 1024
"""Bytes of one request; an item that is larger goes alone."""

CLOUDEVENTS = "application/cloudevents-batch+json; charset=utf-8"

Rendered = tuple[Delivery, bytes]
"""A delivery, and the JSON that is sent of it."""


def rendered(flow: Flow, delivery: Delivery) -> bytes:
    """One member of the list. Raises DeliveryError when the flow's template fails on it."""
    return envelope.embedded(flow, delivery, "envelope")


def by_size(deliveries: Sequence[Rendered]) -> list[list[Rendered]]:
    """In order, in as few groups as the limit allows."""
    groups: list[list[Rendered]] = []
    size = 0
    for each in deliveries:
        size += len(each[1]) + 1
        if not groups or size > LIMIT:
            groups.append([])
            size = len(each[1]) + 1
        groups[-1].append(each)
    return groups


def request(
    flow: Flow, group: Sequence[Rendered], resolved: Resolved, now: datetime, authorization: dict[str, str]
) -> Request:
    """``[…, …]``. Its ``webhook-id`` is that of this very group: when a part of it comes again it has another one, and
    only the id of each member's item tells that it came before."""
    first = group[0][0]
    one = ids.delivery_id("|".join(delivery.id for delivery, _ in group), flow.name)
    whole = replace(first, id=one, attempt=max(delivery.attempt for delivery, _ in group))
    body = b"[%b]" % b",".join(content for _, content in group)
    kind = CLOUDEVENTS if flow.format == "cloudevents-structured" else envelope.JSON
    return Request(
        flow.method, resolved.url, envelope.headers(flow, whole, resolved, now, body, kind) | authorization, body
    )


def judge(
    preset: Preset, flow: Flow, group: Sequence[Rendered], resolved: Resolved, response: Response, now: datetime
) -> list[Judgement]:
    """One verdict for all, or, of a 207 with a list of status codes in the order of the items, one for each."""
    if response.status != 207:
        return [preset.judge(flow, group[0][0], resolved, response, now)] * len(group)
    codes = parsed(response)
    if not isinstance(codes, list) or len(codes) != len(group) or not all(isinstance(code, int) for code in codes):
        note = f"answered 207, but not with a list of {len(group)} status codes"
        return [Judgement(Verdict.PASSING, note)] * len(group)
    return [judge_status(Response(code), now) for code in codes]
