"""The preset for Prefect 3, server or Cloud: one flow run of a deployment per item, under our own idempotency key."""

from __future__ import annotations

import re
from datetime import datetime
from typing import cast

from pydantic import Field

from watcher.flows import envelope
from watcher.flows import preset as p
from watcher.values import Delivery, Flow, Judgement, Request, Response, Verdict

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class Settings(p.PresetSettings):
    """What only the prefect preset knows."""

    deployment: p.Part = Field(
        pattern=r"^[^/]+(/[^/]+)?$",
        description="The deployment: `flow/deployment` by name, or its id.",
    )
    parameter: str | None = Field(
        None,
        min_length=1,
        description="The parameter of the flow that gets what is sent. Without it, its fields are the parameters.",
    )
    tags: tuple[str, ...] = Field(("watcher",), max_length=50, description="Tags of each flow run.")
    user: str | None = Field(None, description="User name of a server with an `auth_string`; Cloud takes a `token`.")
    password: str | None = Field(None, description="Password of that user; usually a reference.")


def request(flow: Flow, delivery: Delivery, resolved: p.Resolved, now: datetime) -> Request:
    settings = cast(Settings, resolved.settings)
    if settings.parameter is None:
        parameters = envelope.arguments(flow, delivery, preset.format)
    else:
        name = envelope.dump(settings.parameter)
        parameters = b"{%b:%b}" % (name, envelope.embedded(flow, delivery, preset.format))
    rest = envelope.dump({"idempotency_key": delivery.id, "tags": list(settings.tags)})
    body = b'{"parameters":%b,%b' % (parameters, rest[1:])
    headers = envelope.headers(flow, delivery, resolved, now, body, envelope.JSON) | _authorization(resolved)
    id = resolved.learned or settings.deployment
    return Request("POST", f"{resolved.url.rstrip('/')}/deployments/{p.path_part(id)}/create_flow_run", headers, body)


def judge(flow: Flow, delivery: Delivery, resolved: p.Resolved, response: Response, now: datetime) -> Judgement:
    """201 is a new run, 200 the one that this key made before. 409: the parameters do not fit the flow's schema."""
    if response.status == 200:
        return Judgement(Verdict.DUPLICATE)
    if response.status == 409:
        return Judgement(Verdict.ITEM, f"the parameters do not fit the flow{p.said(response, 'detail')}")
    judgement = p.judge_status(response, now)
    if response.status == 404:
        return Judgement(
            Verdict.TARGET, f"answered 404{p.said(response, 'detail')}: is the deployment there, and url the API's?",
            stale=bool(resolved.learned),
        )  # fmt: skip
    if response.status == 422:
        return Judgement(Verdict.ITEM, f"answered 422{p.said(response, 'exception_detail', 'detail')}")
    return judgement


def _ask_id(flow: Flow, resolved: p.Resolved) -> Request | None:
    name = cast(Settings, resolved.settings).deployment
    if _UUID.fullmatch(name):
        return None
    path = "/".join(p.path_part(part) for part in name.split("/"))
    return Request("GET", f"{resolved.url.rstrip('/')}/deployments/name/{path}", _authorization(resolved))


def _learn_id(flow: Flow, resolved: p.Resolved, response: Response, now: datetime) -> str | Judgement:
    found = p.parsed(response)
    if response.status == 200 and isinstance(found, dict) and _UUID.fullmatch(str(found.get("id"))):
        return str(found["id"])
    if response.status in (200, 404):
        name = cast(Settings, resolved.settings).deployment
        return Judgement(Verdict.TARGET, f"there is no deployment {name}, or url is not the address of Prefect's API")
    return p.judge_preliminary(response, now, "the deployment's id")


def _authorization(resolved: p.Resolved) -> dict[str, str]:
    settings = cast(Settings, resolved.settings)
    if settings.user is not None:
        return p.basic(settings.user, settings.password or "")
    return p.bearer(resolved)


preset = p.Preset(
    Settings, request, judge, format="plain", preliminary=p.Preliminary(_ask_id, _learn_id), max_item=480_000
)
