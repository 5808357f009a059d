"""The preset for n8n: one execution per item, started by a Webhook node."""

from __future__ import annotations

from datetime import datetime
from typing import cast

from pydantic import Field, field_validator

from watcher.flows import envelope
from watcher.flows import preset as p
from watcher.values import Delivery, Flow, Judgement, Request, Response, Verdict

_STARTING = b"Cannot POST /webhook/"
"""What n8n 2 says, with 404, from when it listens until it knows its webhooks; later its 404 is JSON of its own."""
LIMIT = 16 * 1024 * 1024
"""Bytes of a body that n8n takes, unless its `N8N_PAYLOAD_SIZE_MAX` says otherwise."""


class Settings(p.PresetSettings):
    """What only the n8n preset knows."""

    path: p.Part = Field(description="The path of the Webhook node: what follows `/webhook/` in its production URL.")
    user: str | None = Field(None, description="User name, if the node asks for Basic authentication.")
    password: str | None = Field(None, description="Password for Basic authentication; usually a reference.")
    auth_header: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9-]+$",
        description="Name of the header that carries `token`, if the node asks for Header Auth and not for a JWT.",
    )

    @field_validator("path")
    @classmethod
    def _listens_for_good(cls, path: str) -> str:
        if path.strip("/").startswith(("webhook/", "webhook-test/")):
            raise ValueError("only what follows /webhook/; the test URL listens for two minutes after a click")
        return path.strip("/")


def request(flow: Flow, delivery: Delivery, resolved: p.Resolved, now: datetime) -> Request:
    settings = cast(Settings, resolved.settings)
    body, content_type = envelope.body(flow, delivery, preset.format)
    if len(body) > LIMIT:
        raise p.oversized("n8n", len(body), LIMIT)
    headers = envelope.headers(flow, delivery, resolved, now, body, content_type)
    if settings.user is not None:
        headers |= p.basic(settings.user, settings.password or "")
    elif settings.auth_header and resolved.token is not None:
        headers[settings.auth_header.lower()] = resolved.token
    else:
        headers |= p.bearer(resolved)
    return Request(flow.method, f"{resolved.url.rstrip('/')}/webhook/{p.several_parts(settings.path)}", headers, body)


def judge(flow: Flow, delivery: Delivery, resolved: p.Resolved, response: Response, now: datetime) -> Judgement:
    """n8n has no idempotency key: the Remove Duplicates node on `webhook-id` drops what came twice."""
    judgement = p.judge_status(response, now)
    if response.status == 404 and _STARTING in response.body:
        return Judgement(Verdict.PASSING, "answered 404: it is still starting")
    if response.status == 404:
        return Judgement(
            Verdict.TARGET, "answered 404: activate the workflow, and compare `path` with its Webhook node"
        )
    return judgement


preset = p.Preset(Settings, request, judge, formats=p.ALL_FORMATS, max_item=15_000_000)
