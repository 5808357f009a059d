"""The preset for Apache Airflow 3 and 2: one DAG run per item, its id chosen by us."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, cast

from pydantic import BeforeValidator, Field

from watcher.flows import envelope
from watcher.flows import preset as p
from watcher.values import Delivery, Flow, Judgement, Request, Response, Verdict


def _number(value: object) -> object:
    """What comes from the environment is text."""
    return int(value) if value in ("2", "3") and isinstance(value, str) else value


class Settings(p.PresetSettings):
    """What only the airflow preset knows."""

    dag: p.Part = Field(description="The DAG's id.")
    version: Annotated[Literal[3, 2], BeforeValidator(_number)] = Field(3, description="Airflow's major version.")
    user: str | None = Field(
        None,
        description="User name. Airflow 3 is asked for a token with it, anew when it has expired, unless there is a "
        "`token`; Airflow 2 takes it as Basic authentication.",
    )
    password: str | None = Field(None, description="Password of that user; usually a reference.")


def request(flow: Flow, delivery: Delivery, resolved: p.Resolved, now: datetime) -> Request:
    settings = cast(Settings, resolved.settings)
    fields: dict[str, object] = {"dag_run_id": _run_id(delivery)}
    if settings.version == 3:
        # Without a null here, 3.0 refuses the request and later versions take the present second for the run's date.
        fields["logical_date"] = None
    fields["note"] = f"{delivery.watcher}: {delivery.key}"[:1000]
    body = b'%b,"conf":%b}' % (envelope.dump(fields)[:-1], envelope.arguments(flow, delivery, preset.format))
    headers = envelope.headers(flow, delivery, resolved, now, body, envelope.JSON) | _authorization(resolved)
    return Request("POST", _runs(resolved), headers, body)


def judge(flow: Flow, delivery: Delivery, resolved: p.Resolved, response: Response, now: datetime) -> Judgement:
    """409 is said of our run's id and of its date: only a look-up tells which."""
    if response.status == 409:
        run = Request("GET", f"{_runs(resolved)}/{p.path_part(_run_id(delivery))}", _authorization(resolved))
        return Judgement(Verdict.PASSING, "answered 409", look_up=run)
    judgement = p.judge_status(response, now)
    note = f"answered {response.status}{p.said(response, 'detail')}"
    if response.status == 401:
        return Judgement(Verdict.TARGET, note, stale=bool(resolved.learned))
    if response.status in (400, 404, 422):
        return Judgement(judgement.verdict, note)
    return judgement


def judge_look_up(flow: Flow, delivery: Delivery, first: Response, found: Response) -> Judgement:
    """Whether the run is there already."""
    if found.status == 200:
        return Judgement(Verdict.DUPLICATE)
    return Judgement(
        Verdict.PASSING, f"answered 409{p.said(first, 'detail')}, and {found.status} when asked for the run"
    )


def _ask_token(flow: Flow, resolved: p.Resolved) -> Request | None:
    settings = cast(Settings, resolved.settings)
    if settings.version != 3 or resolved.token is not None or settings.user is None:
        return None
    body = envelope.dump({"username": settings.user, "password": settings.password or ""})
    return Request("POST", f"{resolved.url.rstrip('/')}/auth/token", {"content-type": envelope.JSON}, body)


def _learn_token(flow: Flow, resolved: p.Resolved, response: Response, now: datetime) -> str | Judgement:
    found = p.parsed(response)
    if response.status in (200, 201) and isinstance(found, dict):
        token = found.get("access_token") or found.get("jwt_token")
        if isinstance(token, str) and token.isascii() and token.isprintable():
            return token
        return Judgement(Verdict.TARGET, "/auth/token answered without a token")
    if 200 <= response.status < 300:
        return Judgement(Verdict.TARGET, "/auth/token answered with something else: is url Airflow's own address?")
    return p.judge_preliminary(response, now, "a token")


def _run_id(delivery: Delivery) -> str:
    return f"watcher__{delivery.id}"


def _runs(resolved: p.Resolved) -> str:
    settings = cast(Settings, resolved.settings)
    api = {3: "v2", 2: "v1"}[settings.version]
    return f"{resolved.url.rstrip('/')}/api/{api}/dags/{p.path_part(settings.dag)}/dagRuns"


def _authorization(resolved: p.Resolved) -> dict[str, str]:
    settings = cast(Settings, resolved.settings)
    if resolved.learned:
        return {"authorization": f"Bearer {resolved.learned}"}
    if settings.user is not None and resolved.token is None:
        return p.basic(settings.user, settings.password or "")
    return p.bearer(resolved)


preset = p.Preset(
    Settings, request, judge, judge_look_up, format="plain",
    preliminary=p.Preliminary(_ask_token, _learn_token, secret=True),
    max_item=1_000_000,
)  # fmt: skip
