"""The preset for any URL: the envelope, the plain item or a template, signed when there is a secret."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import cast

from pydantic import Field

from watcher.flows import batch, envelope
from watcher.flows.preset import ALL_FORMATS, Preset, PresetSettings, Resolved, basic, bearer, judge_status
from watcher.values import Delivery, Flow, Judgement, Request, Response


class Settings(PresetSettings):
    """What only the http preset knows."""

    user: str | None = Field(None, description="User name for HTTP Basic authentication, with `password`.")
    password: str | None = Field(None, description="Password for HTTP Basic authentication; usually a reference.")
    idempotency_header: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9-]+$",
        description="A further header that carries the delivery's id, such as `Idempotency-Key`.",
    )


def request(flow: Flow, delivery: Delivery, resolved: Resolved, now: datetime) -> Request:
    settings = cast(Settings, resolved.settings)
    body, content_type = envelope.body(flow, delivery, preset.format)
    headers = envelope.headers(flow, delivery, resolved, now, body, content_type)
    headers |= _authorization(resolved)
    if settings.idempotency_header:
        headers[settings.idempotency_header.lower()] = delivery.id
    return Request(flow.method, resolved.url, headers, body)


def request_many(flow: Flow, group: Sequence[batch.Rendered], resolved: Resolved, now: datetime) -> Request:
    """The list of what would have been sent of each delivery."""
    return batch.request(flow, group, resolved, now, _authorization(resolved))


def _authorization(resolved: Resolved) -> dict[str, str]:
    settings = cast(Settings, resolved.settings)
    if settings.user is not None and resolved.token is None:
        return basic(settings.user, settings.password or "")
    return bearer(resolved)


def judge(flow: Flow, delivery: Delivery, resolved: Resolved, response: Response, now: datetime) -> Judgement:
    return judge_status(response, now)


preset = Preset(Settings, request, judge, formats=ALL_FORMATS, batch=request_many)
