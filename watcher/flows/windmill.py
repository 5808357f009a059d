"""The preset for Windmill, and for watcher's own local flows: one job per item, its id chosen by us."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, cast

from pydantic import Field

from watcher.flows import envelope
from watcher.flows.preset import (
    ALL_FORMATS,
    Part,
    Preset,
    PresetSettings,
    Resolved,
    bearer,
    judge_status,
    path_part,
    several_parts,
)
from watcher.values import Delivery, Flow, Judgement, Request, Response, Verdict

_RUN = {"flow": "f", "script": "p", "hash": "h"}
_VERIFIABLE = "&include_header=webhook-id,webhook-timestamp,webhook-signature&raw=true"


class Settings(PresetSettings):
    """What only the windmill preset knows."""

    path: Part = Field(description="The flow's or script's path, such as `f/news/summarise`, or a script's hash.")
    kind: Literal["flow", "script", "hash"] = Field("flow", description="What `path` names.")
    workspace: Part = Field("main", description="The Windmill workspace.")
    verifiable: bool = Field(
        False,
        description="Hand the script the `webhook-…` headers and the raw body (`raw_string`) too, so that it can "
        "verify the signature.",
    )


def request(flow: Flow, delivery: Delivery, resolved: Resolved, now: datetime) -> Request:
    settings = cast(Settings, resolved.settings)
    body, content_type = envelope.body(flow, delivery, preset.format)
    headers = envelope.headers(flow, delivery, resolved, now, body, content_type)
    headers |= bearer(resolved)
    url = f"{_api(resolved)}/jobs/run/{_RUN[settings.kind]}/{several_parts(settings.path)}?job_id={delivery.id}"
    return Request("POST", url + (_VERIFIABLE if settings.verifiable else ""), headers, body)


def judge(flow: Flow, delivery: Delivery, resolved: Resolved, response: Response, now: datetime) -> Judgement:
    """201 is a new job. An id that Windmill knows already is answered 200, 400 or 409, depending on its version."""
    if response.status in (200, 201):
        if response.body.strip().strip(b'"').decode("ascii", "replace").lower() != delivery.id:
            return Judgement(
                Verdict.TARGET, f"answered {response.status}, but not with the job's id: is url Windmill's own address?"
            )
        return Judgement(Verdict.DELIVERED if response.status == 201 else Verdict.DUPLICATE)
    judgement = judge_status(response, now)
    if response.status in (400, 409):
        job = Request("GET", f"{_api(resolved)}/jobs_u/get/{delivery.id}", bearer(resolved))
        return Judgement(judgement.verdict, judgement.note, judgement.retry_after, look_up=job)
    if judgement.verdict is Verdict.DELIVERED:
        return Judgement(Verdict.TARGET, f"answered {response.status}, which Windmill does not: check url and path")
    return judgement


def judge_look_up(flow: Flow, delivery: Delivery, first: Response, found: Response) -> Judgement:
    """Whether the job that we asked for is there after all."""
    if found.status == 200:
        return Judgement(Verdict.DUPLICATE)
    if found.status == 404 and first.status == 400:
        return Judgement(Verdict.ITEM, "answered 400, and there is no such job")
    return Judgement(Verdict.PASSING, f"answered {first.status}, and {found.status} when asked for the job")


def _api(resolved: Resolved) -> str:
    workspace = path_part(cast(Settings, resolved.settings).workspace)
    return f"{resolved.url.rstrip('/')}/api/w/{workspace}"


preset = Preset(Settings, request, judge, judge_look_up, format="plain", formats=ALL_FORMATS, max_item=1_900_000)
