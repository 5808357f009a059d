"""Requests and verdicts of each preset, as tables of before and after."""

from __future__ import annotations

import json
from datetime import timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support.deliveries import NOW, delivery, resolved
from watcher.flows import presets
from watcher.flows.preset import retry_after
from watcher.values import Flow, Request, Response, Verdict

HTTP = Flow("hook", url="http://127.0.0.1:9/hook", token="t0ken")
WINDMILL = Flow(
    "summarise",
    preset="windmill",
    url="https://windmill.example.com/",
    token="t0ken",
    settings={"path": "f/news/summarise", "workspace": "my team"},
)
ID = delivery().id


def ask(flow: Flow, **more: Any) -> Request:
    return presets[flow.preset].request(flow, delivery(**more), resolved(flow), NOW)


def judge(flow: Flow, status: int, body: bytes = b"", **headers: str) -> Any:
    response = Response(status, {name.replace("_", "-"): value for name, value in headers.items()}, body)
    return presets[flow.preset].judge(flow, delivery(), resolved(flow), response, NOW)


def test_the_envelope_names_the_item_and_the_headers_name_the_delivery() -> None:
    request = ask(HTTP)
    assert (request.method, request.url) == ("POST", "http://127.0.0.1:9/hook")
    assert json.loads(request.body) == {
        "type": "watcher.item.new",
        "timestamp": "2026-03-01T12:00:00.250000Z",
        "data": {
            "watcher": "news",
            "run_id": 7,
            "item_id": "itm_abc",
            "key": "1",
            "change": "new",
            "revision": 1,
            "item": {"id": 1, "title": "Hello"},
        },
    }
    agent = request.headers["user-agent"]
    assert agent.startswith("watcher")
    assert request.headers == {
        "content-type": "application/json",
        "user-agent": agent,
        "traceparent": "00-7d4448409dc051d1b2455ffdce74fad2-7d4448409dc051d0-01",
        "webhook-id": ID,
        "webhook-timestamp": "1772366400",
        "x-watcher-attempt": "1",
        "authorization": "Bearer t0ken",
    }


def test_a_change_carries_what_it_was_and_how_it_changed() -> None:
    patch = [{"op": "replace", "path": "/p", "value": 2}]
    request = ask(HTTP, item={"p": 2}, previous={"p": 1}, patch=patch, change="changed", revision=2)
    sent = json.loads(request.body)
    assert sent["type"] == "watcher.item.changed"
    assert sent["data"] | {"item": {"p": 2}, "previous": {"p": 1}, "patch": patch, "revision": 2} == sent["data"]


def test_every_attempt_sends_the_same_bytes() -> None:
    again = presets["http"].request(HTTP, delivery(attempt=5), resolved(HTTP), NOW + timedelta(hours=3))
    assert again.body == ask(HTTP).body
    assert again.headers["webhook-id"] == ID
    assert again.headers["x-watcher-attempt"] == "5"


def test_all_attempts_are_spans_of_one_trace_and_a_user_may_choose_another() -> None:
    spans = [ask(HTTP, attempt=attempt).headers["traceparent"].split("-") for attempt in (1, 2, 3)]
    assert {(version, trace, flags) for version, trace, _, flags in spans} == {("00", ID.replace("-", ""), "01")}
    assert len({span for _, _, span, _ in spans}) == 3
    assert {len(span) for _, _, span, _ in spans} == {16}
    own = Flow("hook", url="http://x/", headers={"Traceparent": "{{ item.trace }}"})
    assert ask(own, item={"trace": "00-1-2-00"}).headers["traceparent"] == "00-1-2-00"


def test_half_a_surrogate_pair_from_a_source_is_still_json_that_can_be_sent() -> None:
    for made in (
        HTTP,
        Flow("hook", url="http://x/", format="plain"),
        Flow("hook", url="http://x/", body={"t": "{{ item.t }}"}),
    ):
        text = ask(made, item={"t": "\ud83d"}).body.decode()
        assert "\\ud83d" in text


def test_plain_is_the_item_alone_and_what_is_no_object_gets_a_name() -> None:
    plain = Flow("hook", url="http://x/", format="plain")
    assert json.loads(ask(plain, item={"a": 1}).body) == {"a": 1}
    assert json.loads(ask(plain, item=[1, 2]).body) == {"body": [1, 2]}


def test_basic_authentication_and_an_idempotency_header() -> None:
    made = Flow(
        "hook", url="http://x/", method="PUT",
        settings={"user": "me", "password": "pä:ss", "idempotency_header": "Idempotency-Key"},
    )  # fmt: skip
    request = ask(made)
    assert request.method == "PUT"
    assert request.headers["authorization"] == "Basic bWU6cMOkOnNz"
    assert request.headers["idempotency-key"] == ID


def test_users_headers_come_first_and_cannot_replace_ours() -> None:
    made = Flow("hook", url="http://x/", headers={"Content-Type": "text/x", "Webhook-Id": "mine", "User-Agent": "me"})
    headers = ask(made).headers
    assert (headers["content-type"], headers["user-agent"], headers["webhook-id"]) == ("text/x", "me", ID)


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        ((200, 201, 202, 204, 207, 299), Verdict.DELIVERED),
        ((300, 301, 302, 303, 304, 307, 308), Verdict.TARGET),
        ((400, 413, 422), Verdict.ITEM),
        ((401, 403, 404, 405, 410), Verdict.TARGET),
        ((402, 408, 409, 418, 425, 429, 451), Verdict.PASSING),
        ((500, 501, 502, 503, 504, 520, 599, 100), Verdict.PASSING),
    ],
)
def test_a_status_says_whose_fault_it_is(statuses: tuple[int, ...], verdict: Verdict) -> None:
    for status in statuses:
        assert judge(HTTP, status).verdict is verdict, status


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("9" * 400, 86400.0),
        (format_datetime(NOW + timedelta(seconds=90)), 89.75),
        ("Sun, 01 Mar 2026 12:02:00 GMT", 119.75),
        ("Sun Mar  1 12:02:00 2026", 119.75),
        ("Sun, 01 Mar 2020 12:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86400.0),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("1.5", None),
        ("²", None),
        ("Sun, 99 Foo 2026 12:00:00 GMT", None),
    ],
)
def test_retry_after_is_read_in_both_forms_and_bounded(text: str, seconds: float | None) -> None:
    assert retry_after(text, NOW) == (None if seconds is None else pytest.approx(seconds, abs=0.3))


def test_retry_after_comes_with_the_verdict() -> None:
    assert judge(HTTP, 429, retry_after="7").retry_after == 7.0
    assert judge(HTTP, 503).retry_after is None


@pytest.mark.parametrize(("kind", "letter"), [("flow", "f"), ("script", "p"), ("hash", "h")])
def test_windmill_is_asked_for_a_job_with_our_id_and_gets_the_item_as_arguments(kind: str, letter: str) -> None:
    made = Flow("s", preset="windmill", url=WINDMILL.url, token="t0ken", settings={**WINDMILL.settings, "kind": kind})
    request = ask(made)
    assert request.method == "POST"
    assert request.url == (
        f"https://windmill.example.com/api/w/my%20team/jobs/run/{letter}/f/news/summarise?job_id={ID}"
    )
    assert json.loads(request.body) == {"id": 1, "title": "Hello"}
    assert request.headers["authorization"] == "Bearer t0ken"


def test_windmill_can_be_sent_the_envelope_or_a_template() -> None:
    made = Flow("s", preset="windmill", url="http://x", format="envelope", settings={"path": "f/a/b"})
    assert json.loads(ask(made).body)["type"] == "watcher.item.new"
    made = Flow("s", preset="windmill", url="http://x", body={"n": "{{ item.id }}"}, settings={"path": "f/a/b"})
    assert json.loads(ask(made).body) == {"n": 1}


@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        (201, ID.encode(), Verdict.DELIVERED),
        (201, f'"{ID.upper()}"\n'.encode(), Verdict.DELIVERED),
        (200, ID.encode(), Verdict.DUPLICATE),
        (200, b"<html>please log in</html>", Verdict.TARGET),
        (201, b"", Verdict.TARGET),
        (204, b"", Verdict.TARGET),
        (401, b"", Verdict.TARGET),
        (404, b"flow not found", Verdict.TARGET),
        (413, b"", Verdict.ITEM),
        (500, b"", Verdict.PASSING),
    ],
)
def test_windmill_has_a_job_only_when_it_says_its_id(status: int, body: bytes, verdict: Verdict) -> None:
    judgement = judge(WINDMILL, status, body)
    assert judgement.verdict is verdict
    assert judgement.look_up is None


@pytest.mark.parametrize("status", [400, 409])
def test_windmill_is_asked_for_the_job_when_its_answer_may_mean_that_the_id_is_known(status: int) -> None:
    look_up = judge(WINDMILL, status).look_up
    assert look_up == Request(
        "GET", f"https://windmill.example.com/api/w/my%20team/jobs_u/get/{ID}", {"authorization": "Bearer t0ken"}
    )
    decide = presets["windmill"].judge_look_up
    assert decide
    assert decide(WINDMILL, delivery(), Response(status), Response(200)).verdict is Verdict.DUPLICATE
    assert decide(WINDMILL, delivery(), Response(400), Response(404)).verdict is Verdict.ITEM
    assert decide(WINDMILL, delivery(), Response(409), Response(404)).verdict is Verdict.PASSING
    assert decide(WINDMILL, delivery(), Response(status), Response(500)).verdict is Verdict.PASSING


def test_settings_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError):
        presets["windmill"].settings.model_validate({"path": "f/a", "pth": "x"})
    with pytest.raises(ValidationError):
        presets["windmill"].settings.model_validate({})
    with pytest.raises(ValidationError):
        presets["http"].settings.model_validate({"idempotency_header": "a b\r\n"})


@pytest.mark.parametrize("name", sorted(presets))
def test_every_setting_of_every_preset_is_described(name: str) -> None:
    assert all(field.description for field in presets[name].settings.model_fields.values())
