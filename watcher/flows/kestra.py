"""The preset for Kestra: one execution per item, by a webhook trigger or with typed inputs."""

from __future__ import annotations

import json
from datetime import datetime
from typing import ClassVar, cast
from urllib.parse import quote

from pydantic import Field, model_validator

from watcher.flows import envelope
from watcher.flows import preset as p
from watcher.values import Delivery, Flow, Judgement, Request, Response, Verdict

CORRELATION = "system.correlationId"
"""The one system label that may be given to an execution when it is created."""


class Settings(p.PresetSettings):
    """What only the kestra preset knows."""

    hidden: ClassVar[frozenset[str]] = frozenset({"password", "webhook_key"})

    namespace: p.Part = Field(description="The namespace of the flow, such as `company.team`.")
    flow_id: p.Part = Field(description="The id of the flow.")
    webhook_key: str | None = Field(
        None,
        min_length=1,
        description="The key of the flow's Webhook trigger, which is a secret. Without it the flow is started with "
        "inputs, one for each field of what is sent.",
    )
    tenant: p.Part = Field("main", description="The tenant.")
    user: str | None = Field(None, description="User name for Basic authentication.")
    password: str | None = Field(None, description="Password for Basic authentication; usually a reference.")

    @model_validator(mode="after")
    def _one_part(self) -> Settings:
        if self.webhook_key in (".", ".."):
            raise ValueError("webhook_key is no key")
        return self


def request(flow: Flow, delivery: Delivery, resolved: p.Resolved, now: datetime) -> Request:
    settings = cast(Settings, resolved.settings)
    target = f"{p.path_part(settings.namespace)}/{p.path_part(settings.flow_id)}"
    if settings.webhook_key is not None:
        body, content_type = envelope.body(flow, delivery, "envelope")
        url = f"{_executions(resolved)}/webhook/{target}/{p.path_part(settings.webhook_key)}"
    else:
        boundary = f"watcher-{delivery.id}"  # the same bytes at every attempt
        body = _multipart(json.loads(envelope.arguments(flow, delivery, "plain")), boundary)
        content_type = f"multipart/form-data; boundary={boundary}"
        url = f"{_executions(resolved)}/{target}?labels={CORRELATION}:{delivery.id}&wait=false"
    headers = envelope.headers(flow, delivery, resolved, now, body, content_type)
    headers |= {"content-type": content_type} | _authorization(resolved)
    return Request("POST", url, headers, body)


def judge(flow: Flow, delivery: Delivery, resolved: p.Resolved, response: Response, now: datetime) -> Judgement:
    """204: the trigger's conditions were not met. The event was taken, and no execution is the right answer."""
    if response.status == 204:
        return Judgement(Verdict.DELIVERED, "the trigger's conditions were not met: no execution")
    judgement = p.judge_status(response, now)
    if response.status in (400, 422):
        return Judgement(judgement.verdict, f"answered {response.status}{p.said(response, 'message')}")
    return judgement


def look_before(flow: Flow, delivery: Delivery, resolved: p.Resolved) -> Request | None:
    """The execution that an earlier attempt may have started; a webhook's cannot be found."""
    if cast(Settings, resolved.settings).webhook_key is not None:
        return None
    label = quote(f"filters[labels][EQUALS][{CORRELATION}]", safe="")
    return Request("GET", f"{_executions(resolved)}/search?{label}={delivery.id}&size=1", _authorization(resolved))


def already(flow: Flow, delivery: Delivery, response: Response) -> bool:
    """Only an execution that shows the label counts: a version that knows no such filter would answer with any."""
    found = p.parsed(response) if response.status == 200 else None
    results = found.get("results") if isinstance(found, dict) else None
    label = {"key": CORRELATION, "value": delivery.id}
    return any(isinstance(each, dict) and label in (each.get("labels") or []) for each in results or [])


def _multipart(inputs: dict[str, object], boundary: str) -> bytes:
    """RFC 7578: one part per input, text as it is and anything else as JSON."""
    parts = b""
    for name, value in inputs.items():
        escaped = name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A").encode("utf-8", "replace")
        content = value.encode("utf-8", "replace") if isinstance(value, str) else envelope.dump(value)
        head = b'--%b\r\ncontent-disposition: form-data; name="%b"\r\n\r\n' % (boundary.encode(), escaped)
        parts += head + content + b"\r\n"
    return parts + b"--%b--\r\n" % boundary.encode()


def _executions(resolved: p.Resolved) -> str:
    return f"{resolved.url.rstrip('/')}/api/v1/{p.path_part(cast(Settings, resolved.settings).tenant)}/executions"


def _authorization(resolved: p.Resolved) -> dict[str, str]:
    settings = cast(Settings, resolved.settings)
    if settings.user is not None:
        return p.basic(settings.user, settings.password or "")
    return p.bearer(resolved)


preset = p.Preset(
    Settings, request, judge, formats=p.ALL_FORMATS, look_before=look_before, already=already, max_item=8_000_000
)
