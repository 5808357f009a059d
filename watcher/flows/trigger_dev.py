"""The preset for Trigger.dev: one run of a task per item, under our own idempotency key."""

from __future__ import annotations

from datetime import datetime
from typing import cast

from pydantic import Field

from watcher.flows import envelope
from watcher.flows import preset as p
from watcher.values import Delivery, Flow, Judgement, Request, Response, Verdict


class Settings(p.PresetSettings):
    """What only the trigger.dev preset knows."""

    task: p.Part = Field(description="The task's id.")
    tags: tuple[str, ...] = Field((), max_length=10, description="Tags of each run.")
    idempotency_ttl: str = Field(
        "30d",
        pattern=r"^\d+[smhd]$",
        description="How long Trigger.dev remembers a delivery's id: longer than deliveries are retried.",
    )


def request(flow: Flow, delivery: Delivery, resolved: p.Resolved, now: datetime) -> Request:
    settings = cast(Settings, resolved.settings)
    options: dict[str, object] = {"idempotencyKey": delivery.id, "idempotencyKeyTTL": settings.idempotency_ttl}
    if settings.tags:
        options["tags"] = list(settings.tags)
    payload = envelope.embedded(flow, delivery, preset.format)
    body = b'{"payload":%b,"options":%b}' % (payload, envelope.dump(options))
    headers = envelope.headers(flow, delivery, resolved, now, body, envelope.JSON) | p.bearer(resolved)
    url = f"{resolved.url.rstrip('/')}/api/v1/tasks/{p.path_part(settings.task)}/trigger"
    return Request("POST", url, headers, body)


def judge(flow: Flow, delivery: Delivery, resolved: p.Resolved, response: Response, now: datetime) -> Judgement:
    """200 with the run's id; `isCached` says that this key had started it before."""
    judgement = p.judge_status(response, now)
    if judgement.verdict is not Verdict.DELIVERED:
        return Judgement(
            judgement.verdict, f"answered {response.status}{p.said(response, 'error')}", judgement.retry_after
        )
    found = p.parsed(response)
    if not isinstance(found, dict) or "id" not in found:
        return Judgement(Verdict.TARGET, "answered without a run's id: is url Trigger.dev's own address?")
    return Judgement(Verdict.DUPLICATE if found.get("isCached") is True else Verdict.DELIVERED, str(found["id"])[:100])


preset = p.Preset(Settings, request, judge, format="plain", url="https://api.trigger.dev", max_item=2_500_000)
