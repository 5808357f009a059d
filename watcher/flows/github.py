"""The preset for GitHub Actions: one event, or one run of a workflow, per item."""

from __future__ import annotations

from datetime import datetime
from typing import cast

from pydantic import Field

from watcher.flows import envelope
from watcher.flows import preset as p
from watcher.values import Delivery, Flow, Judgement, Request, Response, Verdict

LIMIT = 65_535
"""Characters of `client_payload`, and of all inputs together."""

_WRONG_WORKFLOW = ("no ref found", "workflow_dispatch", "unexpected inputs", "disabled workflow")


class Settings(p.PresetSettings):
    """What only the github preset knows."""

    repository: p.Part = Field(pattern=r"^[^/]+/[^/]+$", description="The repository, as `owner/name`.")
    workflow: p.Part | None = Field(
        None,
        description="File name of a workflow with `on: workflow_dispatch`. Without it a `repository_dispatch` event "
        "is sent, which any workflow may listen to.",
    )
    event_type: str = Field(
        "watcher", min_length=1, max_length=100, description="The type of the `repository_dispatch` event."
    )
    ref: str = Field("main", min_length=1, description="The branch or tag whose `workflow` runs.")
    input: str = Field(
        "watcher", min_length=1, description="The input of the `workflow` that gets what is sent, as JSON text."
    )
    run_details: bool = Field(
        True,
        description="Ask for the id of the workflow's run; an older GitHub Enterprise Server does not know how.",
    )


def request(flow: Flow, delivery: Delivery, resolved: p.Resolved, now: datetime) -> Request:
    settings = cast(Settings, resolved.settings)
    # All in one place: no more than ten keys may stand at the top. The id is for the workflow's `concurrency`.
    payload = b'{"id":"%b","event":%b}' % (delivery.id.encode(), envelope.embedded(flow, delivery, preset.format))
    if settings.workflow is None:
        what, path = payload, "dispatches"
        body = b'{"event_type":%b,"client_payload":%b}' % (envelope.dump(settings.event_type), payload)
    else:
        what = envelope.dump({settings.input: payload.decode()})
        path = f"actions/workflows/{p.path_part(settings.workflow)}/dispatches"
        details = b',"return_run_details":true' if settings.run_details else b""
        body = b'{"ref":%b,"inputs":%b%b}' % (envelope.dump(settings.ref), what, details)
    if len(what.decode()) > LIMIT:
        raise p.oversized("GitHub", len(what.decode()), LIMIT, "characters")
    headers = envelope.headers(flow, delivery, resolved, now, body, envelope.JSON)
    headers |= p.bearer(resolved)
    headers |= {"accept": "application/vnd.github+json", "x-github-api-version": "2022-11-28"}
    owner, _, name = settings.repository.partition("/")
    url = f"{resolved.url.rstrip('/')}/repos/{p.path_part(owner)}/{p.path_part(name)}/{path}"
    return Request("POST", url, headers, body)


def judge(flow: Flow, delivery: Delivery, resolved: p.Resolved, response: Response, now: datetime) -> Judgement:
    """204 says only that the event was taken. 403 is a rate limit as often as a missing permission."""
    judgement = p.judge_status(response, now)
    note = f"answered {response.status}{p.said(response, 'message')}"
    if response.status in (403, 429) and _limited(response):
        return Judgement(Verdict.PASSING, f"{note} (rate limit)", _wait(response, now))
    if response.status == 422 and any(text in note.lower() for text in _WRONG_WORKFLOW):
        return Judgement(Verdict.TARGET, note)
    if response.status == 404:
        return Judgement(Verdict.TARGET, f"{note}: is it there, and may the token write to it?")
    if judgement.verdict is Verdict.DELIVERED:
        found = p.parsed(response) if response.status == 200 else None
        url = found.get("html_url") if isinstance(found, dict) else None
        return Judgement(Verdict.DELIVERED, str(url)[:300] if url else "")
    return Judgement(judgement.verdict, note, judgement.retry_after)


def _limited(response: Response) -> bool:
    return (
        response.status == 429
        or "retry-after" in response.headers
        or response.headers.get("x-ratelimit-remaining") == "0"
        or b"rate limit" in response.body.lower()
    )


def _wait(response: Response, now: datetime) -> float | None:
    """Seconds, by ``Retry-After`` or else by the instant at which the limit is lifted."""
    asked = p.retry_after(response.headers.get("retry-after", ""), now)
    reset = response.headers.get("x-ratelimit-reset", "")
    if asked is None and response.headers.get("x-ratelimit-remaining") == "0" and reset.isascii() and reset.isdigit():
        return min(max(int(reset[:12]) - now.timestamp(), 0.0), p.MAX_WAIT)
    return asked if asked is not None else 60.0  # what GitHub asks for where it names no time


preset = p.Preset(Settings, request, judge, url="https://api.github.com", max_item=48_000)
