"""Each engine's requests against golden files, its answers as a table, and what its settings refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support.deliveries import NOW, delivery, resolved
from watcher.errors import DeliveryError
from watcher.flows import kestra, presets
from watcher.flows.preset import Resolved
from watcher.values import Delivery, Flow, Judgement, Request, Response, Verdict

GOLDEN = Path(__file__).parent / "golden" / "flows"
CASES = [(file.stem, case) for file in sorted(GOLDEN.glob("*.json")) for case in json.loads(file.read_text())]
ID = delivery().id

SETTINGS: dict[str, dict[str, Any]] = {
    "http": {},
    "windmill": {"path": "f/a/b"},
    "n8n": {"path": "news"},
    "prefect": {"deployment": "summarise/production"},
    "kestra": {"namespace": "company.team", "flow_id": "summarise"},
    "airflow": {"dag": "summarise", "user": "watcher", "password": "pass"},
    "github": {"repository": "owner/name"},
    "gitlab": {"project": "42"},
    "trigger.dev": {"task": "summarise"},
    "slack": {},
}


def flow(preset: str, **settings: Any) -> Flow:
    return Flow("hook", preset=preset, url="https://engine.example.com", settings={**SETTINGS[preset], **settings})


def ask(made: Flow, *, learned: str = "", of: Delivery | None = None) -> Request:
    return presets[made.preset].request(made, of or delivery(), resolved(made, learned=learned), NOW)


def judge(made: Flow, status: int, body: Any = b"", *, learned: str = "", **headers: str) -> Judgement:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = Response(status, {name.replace("_", "-"): value for name, value in headers.items()}, content)
    return presets[made.preset].judge(made, delivery(), resolved(made, learned=learned), response, NOW)


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}: {case['case']}" for name, case in CASES])
def test_the_request_is_the_golden_one(name: str, case: dict[str, Any]) -> None:
    made = Flow("hook", preset=name, **case["flow"])
    request = ask(made, learned=case.get("learned", ""), of=delivery(case.get("item"), key=case.get("key", "1")))
    headers = {key: value for key, value in request.headers.items() if key != "user-agent"}
    golden = case["request"]
    assert (request.method, request.url, headers) == (golden["method"], golden["url"], golden["headers"])
    if "json" in golden:
        assert json.loads(request.body) == golden["json"]
    else:
        assert request.body.decode() == golden["text"]


def test_every_preset_has_a_golden_file() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == {*presets} == {*SETTINGS}


@pytest.mark.parametrize("name", sorted(presets))
def test_every_attempt_sends_the_same_bytes(name: str) -> None:
    made = flow(name)
    first, later = ask(made), ask(made, of=delivery(attempt=5))
    assert (first.body, first.url) == (later.body, later.url)
    assert first.headers["webhook-id"] == later.headers["webhook-id"] == ID


@pytest.mark.parametrize("name", sorted(presets))
def test_half_a_surrogate_pair_and_a_hostile_key_reach_every_engine(name: str) -> None:
    item = {"title": "\ud83d \r\nX-Evil: 1 <!channel> \x00", 'a"\r\n--b': "\u2028", "n": [None]}
    request = ask(flow(name), of=delivery(item, key="k\r\n\x00\ud800/../?x=1#y"))
    assert b"\r\nX-Evil" not in b"\r\n".join(f"{k}: {v}".encode() for k, v in request.headers.items())
    assert all(value.isascii() and value.isprintable() for value in request.headers.values())
    assert "\n" not in request.url
    if name in ("windmill", "n8n", "prefect", "airflow", "trigger.dev", "slack"):
        assert json.loads(request.body)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("windmill", "path"), ("windmill", "workspace"), ("n8n", "path"), ("prefect", "deployment"),
        ("kestra", "namespace"), ("kestra", "flow_id"), ("kestra", "tenant"), ("airflow", "dag"),
        ("github", "repository"), ("github", "workflow"), ("gitlab", "project"), ("trigger.dev", "task"),
    ],
)  # fmt: skip
def test_a_setting_cannot_lead_to_another_address(name: str, setting: str) -> None:
    for bad in ("", "..", ".", "a/../../b", "a\nb", "/"):
        with pytest.raises(ValidationError):
            presets[name].settings.model_validate({**SETTINGS[name], setting: bad})
    for odd in ("a?x=1/b", "a#y/b", "a b/ä"):
        host, query, fragment = "https://engine.example.com/", "x=1", "y"
        url = ask(flow(name, **{setting: odd})).url
        assert url.startswith(host)
        assert f"?{query}" not in url
        assert f"#{fragment}" not in url
        assert " " not in url


@pytest.mark.parametrize("name", sorted(presets))
def test_settings_of_other_presets_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        presets[name].settings.model_validate({**SETTINGS[name], "pth": "x"})


def test_what_the_environment_says_is_text_and_understood() -> None:
    assert resolved(flow("airflow", version="2")).settings.version == 2
    assert resolved(flow("github", run_details="false")).settings.run_details is False


def test_a_test_address_of_n8n_is_refused() -> None:
    with pytest.raises(ValidationError, match="two minutes"):
        presets["n8n"].settings.model_validate({"path": "webhook-test/news"})


@pytest.mark.parametrize(
    ("made", "size", "says"),
    [
        (flow("github"), 66_000, "GitHub takes at most 65535"),
        (flow("github", workflow="x.yml"), 33_000, "GitHub takes at most 65535"),  # quotes are escaped twice
        (flow("gitlab"), 131_000, "a variable of GitLab takes at most"),
        (flow("n8n"), 17_000_000, "n8n takes at most 16777216"),
    ],
)
def test_an_item_over_the_engines_limit_is_its_own_fault(made: Flow, size: int, says: str) -> None:
    item = {"text": ('"' if "workflow" in made.settings else "x") * (size // (2 if "workflow" in made.settings else 1))}
    with pytest.raises(DeliveryError, match=says):
        ask(made, of=delivery(item))
    ask(made, of=delivery({"text": "x" * (size // 8)}))


def test_a_message_longer_than_slack_takes_is_the_items_fault() -> None:
    made = Flow("hook", preset="slack", url="https://hooks.slack.com/x", body={"text": "{{ item.text }}"})
    with pytest.raises(DeliveryError, match="Slack takes at most 40000"):
        ask(made, of=delivery({"text": "x" * 40_001}))


# --- answers ----------------------------------------------------------------------------------------------------------

OK, DUP, ITEM, TARGET, PASSING = (
    Verdict.DELIVERED, Verdict.DUPLICATE, Verdict.ITEM, Verdict.TARGET, Verdict.PASSING,
)  # fmt: skip
GITHUB_FLOW = flow("github", workflow="x.yml")


@pytest.mark.parametrize(
    ("made", "status", "body", "verdict", "note"),
    [
        (flow("n8n"), 200, {"message": "Workflow was started"}, OK, ""),
        (flow("n8n"), 404, {"code": 404}, TARGET, "activate the workflow"),
        (flow("n8n"), 404, b"<title>Error</title>\n<pre>Cannot POST /webhook/news</pre>", PASSING, "still starting"),
        (flow("n8n"), 403, b"", TARGET, "403"),
        (flow("n8n"), 413, b"", ITEM, "413"),
        (flow("n8n"), 500, b"", PASSING, "500"),
        (flow("prefect"), 201, {"id": "x"}, OK, ""),
        (flow("prefect"), 200, {"id": "x"}, DUP, ""),
        (flow("prefect"), 409, {"detail": "Validation failed for field 'n'"}, ITEM, "Validation failed"),
        (flow("prefect"), 404, {"detail": "Deployment not found"}, TARGET, "Deployment not found"),
        (flow("prefect"), 401, b"", TARGET, "401"),
        (flow("prefect"), 422, {"exception_detail": [{"msg": "no"}]}, ITEM, "no"),
        (flow("prefect"), 503, b"", PASSING, "503"),
        (flow("kestra", webhook_key="k"), 200, {"id": "x"}, OK, ""),
        (flow("kestra", webhook_key="k"), 204, b"", OK, "no execution"),
        (flow("kestra", webhook_key="k"), 404, b"", TARGET, "404"),
        (flow("kestra"), 200, {"id": "x"}, OK, ""),
        (flow("kestra"), 422, {"message": "Invalid input"}, ITEM, "Invalid input"),
        (flow("kestra"), 401, b"", TARGET, "401"),
        (flow("airflow"), 200, {"dag_run_id": "x"}, OK, ""),
        (flow("airflow"), 400, {"detail": "conf is wrong"}, ITEM, "conf is wrong"),
        (flow("airflow"), 422, {"detail": [{"msg": "bad"}]}, ITEM, "bad"),
        (flow("airflow"), 404, {"detail": "The Dag was not found"}, TARGET, "not found"),
        (flow("airflow"), 403, b"", TARGET, "403"),
        (flow("airflow"), 500, b"", PASSING, "500"),
        (flow("github"), 204, b"", OK, ""),
        (GITHUB_FLOW, 200, {"html_url": "https://github.com/o/n/actions/runs/1"}, OK, "runs/1"),
        (GITHUB_FLOW, 204, b"", OK, ""),
        (flow("github"), 404, {"message": "Not Found"}, TARGET, "may the token write"),
        (flow("github"), 401, {"message": "Bad credentials"}, TARGET, "Bad credentials"),
        (flow("github"), 403, {"message": "Resource not accessible"}, TARGET, "not accessible"),
        (flow("github"), 403, {"message": "You have exceeded a secondary rate limit."}, PASSING, "rate limit"),
        (flow("github"), 422, {"message": "Invalid request. Too big"}, ITEM, "Too big"),
        (GITHUB_FLOW, 422, {"message": "No ref found for: trunk"}, TARGET, "No ref"),
        (GITHUB_FLOW, 422, {"message": "Workflow does not have 'workflow_dispatch' trigger"}, TARGET, "trigger"),
        (GITHUB_FLOW, 422, {"message": 'Unexpected inputs provided: ["watcher"]'}, TARGET, "Unexpected"),
        (flow("gitlab"), 201, {"id": 5}, OK, "pipeline 5"),
        (flow("gitlab"), 400, {"message": {"base": ["Reference not found"]}}, TARGET, "Reference not found"),
        (flow("gitlab"), 400, {"message": {"base": ["filtered out by workflow rules"]}}, ITEM, "workflow rules"),
        (flow("gitlab"), 404, {"message": "404 Not Found"}, TARGET, "pipeline trigger token"),
        (flow("gitlab"), 429, b"", PASSING, "429"),
        (flow("trigger.dev"), 200, {"id": "run_1"}, OK, "run_1"),
        (flow("trigger.dev"), 200, {"id": "run_1", "isCached": False}, OK, "run_1"),
        (flow("trigger.dev"), 200, {"id": "run_1", "isCached": True}, DUP, "run_1"),
        (flow("trigger.dev"), 200, b"<html>", TARGET, "run's id"),
        (flow("trigger.dev"), 422, {"error": "payload"}, ITEM, "payload"),
        (flow("trigger.dev"), 404, {"error": "task not found"}, TARGET, "task"),
        (flow("slack"), 200, b"ok", OK, ""),
        (flow("slack"), 200, b"<html>", TARGET, "incoming webhook"),
        (flow("slack"), 400, b"no_text", ITEM, "no_text"),
        (flow("slack"), 400, b"invalid_payload", ITEM, "invalid_payload"),
        (flow("slack"), 400, b"user_not_found", TARGET, "user_not_found"),
        (flow("slack"), 403, b"invalid_token", TARGET, "invalid_token"),
        (flow("slack"), 404, b"no_service", TARGET, "no_service"),
        (flow("slack"), 410, b"channel_is_archived", TARGET, "archived"),
        (flow("slack"), 429, b"rate_limited", PASSING, "rate_limited"),
        (flow("slack"), 500, b"rollup_error", PASSING, "rollup_error"),
    ],
)
def test_an_engines_answer_says_what_became_of_the_item(
    made: Flow, status: int, body: Any, verdict: Verdict, note: str
) -> None:
    judgement = judge(made, status, body)
    assert judgement.verdict is verdict
    assert note in judgement.note
    assert judgement.look_up is None


def test_an_answer_that_is_no_json_surprises_no_preset() -> None:
    for name in presets:
        for status in (200, 201, 204, 400, 401, 403, 404, 409, 422, 500):
            for body in (b"", b"\xff\xfe", b"[1]", b"null", b'{"detail": {"a": [1]}, "message": 3, "id": null}', b"{"):
                assert judge(flow(name), status, body).verdict in Verdict


def test_rate_limits_of_github_say_when_to_come_back() -> None:
    at = str(int(NOW.timestamp()) + 90)
    assert judge(flow("github"), 403, retry_after="7").retry_after == 7.0
    limited = judge(flow("github"), 403, x_ratelimit_remaining="0", x_ratelimit_reset=at)
    assert limited.verdict is PASSING
    assert limited.retry_after == pytest.approx(89.75)
    assert judge(flow("github"), 403, b"secondary rate limit").retry_after == 60.0
    assert judge(flow("github"), 429, x_ratelimit_remaining="0", x_ratelimit_reset="9" * 30).retry_after == 86400.0


def test_airflows_409_is_looked_up_by_the_runs_id() -> None:
    look_up = judge(flow("airflow"), 409, {"detail": "DAGRun already exists"}, learned="jwt").look_up
    assert look_up == Request(
        "GET",
        f"https://engine.example.com/api/v2/dags/summarise/dagRuns/watcher__{ID}",
        {"authorization": "Bearer jwt"},
    )
    decide = presets["airflow"].judge_look_up
    assert decide
    assert decide(flow("airflow"), delivery(), Response(409), Response(200)).verdict is DUP
    assert decide(flow("airflow"), delivery(), Response(409), Response(404)).verdict is PASSING


def test_a_token_that_airflow_gave_is_stale_after_401_and_ones_own_is_not() -> None:
    assert judge(flow("airflow"), 401, learned="jwt").stale
    own = Flow("hook", preset="airflow", url="https://x.example", token="jwt", settings={"dag": "d"})
    assert not judge(own, 401).stale
    assert judge(flow("prefect"), 404, learned="an id").stale


# --- what is asked beforehand -----------------------------------------------------------------------------------------


def preliminary(made: Flow, **more: Any) -> Request | None:
    found = presets[made.preset].preliminary
    assert found
    return found.request(made, resolved(made, **more))


def learn(made: Flow, status: int, body: Any) -> str | Judgement:
    found = presets[made.preset].preliminary
    assert found
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return found.learn(made, resolved(made), Response(status, {}, content), NOW)


def test_airflow_3_is_asked_for_a_token() -> None:
    assert preliminary(flow("airflow")) == Request(
        "POST",
        "https://engine.example.com/auth/token",
        {"content-type": "application/json"},
        b'{"username":"watcher","password":"pass"}',
    )
    assert preliminary(flow("airflow", version=2)) is None
    assert preliminary(flow("airflow"), token="jwt") is None
    assert learn(flow("airflow"), 201, {"access_token": "a"}) == "a"
    assert learn(flow("airflow"), 200, {"jwt_token": "b"}) == "b"


@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        (201, {"access_token": "a\r\nb"}, TARGET), (201, {}, TARGET), (200, b"<html>", TARGET), (401, b"", TARGET),
        (404, b"", TARGET), (422, {"detail": "x"}, TARGET), (400, b"", TARGET), (500, b"", PASSING),
        (429, b"", PASSING),
    ],
)  # fmt: skip
def test_no_token_is_never_the_items_fault(status: int, body: Any, verdict: Verdict) -> None:
    found = learn(flow("airflow"), status, body)
    assert isinstance(found, Judgement)
    assert found.verdict is verdict


def test_prefect_is_asked_for_the_id_behind_a_name() -> None:
    request = preliminary(flow("prefect", deployment="my flow/a?b"))
    assert request
    assert request.url == "https://engine.example.com/deployments/name/my%20flow/a%3Fb"
    id = "0b0a9fb1-0a0e-4c2c-8e36-2c0a5d0b7a11"
    assert preliminary(flow("prefect", deployment=id)) is None
    assert learn(flow("prefect"), 200, {"id": id}) == id
    for status, body, verdict in (
        (404, b"", TARGET),
        (200, b"<html>", TARGET),
        (401, b"", TARGET),
        (502, b"", PASSING),
    ):
        found = learn(flow("prefect"), status, body)
        assert isinstance(found, Judgement)
        assert found.verdict is verdict


def test_kestra_is_asked_for_an_execution_that_may_have_come_through() -> None:
    made = flow("kestra", tenant="acme")
    request = kestra.look_before(made, delivery(), resolved(made))
    assert request
    assert request.url == (
        "https://engine.example.com/api/v1/acme/executions/search"
        f"?filters%5Blabels%5D%5BEQUALS%5D%5Bsystem.correlationId%5D={ID}&size=1"
    )
    label = {"key": "system.correlationId", "value": ID}
    assert (
        kestra.look_before(made, delivery(), Resolved("x", settings=resolved(flow("kestra", webhook_key="k")).settings))
        is None
    )

    def there(status: int, body: Any) -> bool:
        return kestra.already(made, delivery(), Response(status, {}, json.dumps(body).encode()))

    assert there(200, {"results": [{"labels": [{"key": "a", "value": "b"}, label]}], "total": 1})
    assert not there(200, {"results": [], "total": 0})
    assert not there(200, {"results": [{"labels": None}, 3], "total": 2})  # it took no notice of the filter
    assert not there(404, {"results": [{"labels": [label]}]})
    assert not there(200, [])
