"""The preset for GitLab: one pipeline per item, by a pipeline trigger token."""

from __future__ import annotations

from datetime import datetime
from typing import cast
from urllib.parse import urlencode

from pydantic import Field

from watcher.flows import envelope
from watcher.flows import preset as p
from watcher.values import Delivery, Flow, Judgement, Request, Response, Verdict

LIMIT = 128 * 1024 - 1024
"""Bytes of one variable: a runner hands it to a process, and Linux passes on no more than 128 KiB in one."""

FORM = "application/x-www-form-urlencoded"


class Settings(p.PresetSettings):
    """What only the gitlab preset knows."""

    project: p.Part = Field(description="The project, by number or as `group/project`.")
    ref: str = Field("main", min_length=1, description="The branch or tag that the pipeline runs on.")
    variable: str = Field(
        "WATCHER_PAYLOAD",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="The variable that holds what is sent, as JSON. Variables are shown in GitLab's pages.",
    )
    input: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_-]+$",
        description="The input of the pipeline (GitLab 17.11 and later) that gets it instead of the variable.",
    )


def request(flow: Flow, delivery: Delivery, resolved: p.Resolved, now: datetime) -> Request:
    settings = cast(Settings, resolved.settings)
    payload = envelope.embedded(flow, delivery, preset.format)
    if len(payload) > LIMIT:
        raise p.oversized("a variable of GitLab", len(payload), LIMIT)
    place = f"inputs[{settings.input}]" if settings.input else f"variables[{settings.variable}]"
    # In the body, where the token is in no log of addresses.
    fields = {"token": resolved.token or "", "ref": settings.ref, place: payload.decode()}
    fields["variables[WATCHER_DELIVERY]"] = delivery.id
    body = urlencode(fields).encode()
    headers = envelope.headers(flow, delivery, resolved, now, body, FORM) | {"content-type": FORM}
    url = f"{resolved.url.rstrip('/')}/api/v4/projects/{p.path_part(settings.project)}/trigger/pipeline"
    return Request("POST", url, headers, body)


def judge(flow: Flow, delivery: Delivery, resolved: p.Resolved, response: Response, now: datetime) -> Judgement:
    """201 with the pipeline. 400 is about the item, but for a branch that is not there."""
    judgement = p.judge_status(response, now)
    note = f"answered {response.status}{p.said(response, 'message', 'error')}"
    if response.status == 400 and "reference not found" in note.lower():
        return Judgement(Verdict.TARGET, note)
    if response.status == 404:
        return Judgement(Verdict.TARGET, f"{note}: check `project`, and that `token` is a pipeline trigger token of it")
    if judgement.verdict is Verdict.DELIVERED:
        found = p.parsed(response)
        return Judgement(
            Verdict.DELIVERED, f"pipeline {found['id']}" if isinstance(found, dict) and "id" in found else ""
        )
    return Judgement(judgement.verdict, note, judgement.retry_after)


preset = p.Preset(Settings, request, judge, url="https://gitlab.com", max_item=96_000)
