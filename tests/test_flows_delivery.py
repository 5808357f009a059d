"""Engines on real sockets, each answering as the real one does: sent once, known when sent twice, held when it must."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs

import pytest
from standardwebhooks import Webhook

from tests.support.deliveries import NOW, delivery, resolved
from tests.support.dispatching import References, dispatching
from tests.support.receiver import Received, Receiver, answer
from watcher.flows import attempt, sandbox
from watcher.flows.attempt import Courier
from watcher.flows.hours import parse
from watcher.http.sender import Sender
from watcher.log import mask
from watcher.store.db import Database
from watcher.values import Batch, Flow, Verdict

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
DEPLOYMENT = "0b0a9fb1-0a0e-4c2c-8e36-2c0a5d0b7a11"

Engine = Callable[[Received], bytes]


def reply(status: int, body: Any = None, **headers: str) -> bytes:
    return answer(status, b"" if body is None else json.dumps(body).encode(), **headers)


class Runs:
    """What an engine remembers: the runs that it started, by the key that it was given, if any."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.keys: dict[str, str] = {}
        self.logins = 0
        self.token = ""
        self.lose = 0  # so many runs are started whose answer is lost

    def start(self, key: str, content: Any) -> bool:
        """Whether this is a new run."""
        if key in self.keys:
            return False
        self.keys[key] = f"run{len(self.started)}"
        self.started.append(content)
        return True

    def lost(self) -> bool:
        self.lose -= 1
        return self.lose >= 0


def prefect(runs: Runs) -> Engine:
    def act(request: Received) -> bytes:
        if request.path == "/api/deployments/name/summarise/production":
            return reply(200, {"id": DEPLOYMENT, "parameter_openapi_schema": {"x": "y" * 10_000}})
        if request.path != f"/api/deployments/{DEPLOYMENT}/create_flow_run":
            return reply(404, {"detail": "Not Found"})
        body = request.json()
        if "wrong" in body["parameters"]:
            return reply(409, {"detail": "Error creating flow run: unexpected parameter wrong"})
        new = runs.start(body["idempotency_key"], body["parameters"])
        return reply(500) if runs.lost() else reply(201 if new else 200, {"id": runs.keys[body["idempotency_key"]]})

    return act


def airflow(runs: Runs) -> Engine:
    def act(request: Received) -> bytes:
        if request.path == "/auth/token":
            runs.logins += 1
            runs.token = f"jwt{runs.logins}-secret-token"
            return reply(201, {"access_token": runs.token})
        if request.headers.get("authorization") != f"Bearer {runs.token}":
            return reply(401, {"detail": "Invalid JWT token"})
        if request.method == "GET":
            return reply(200 if request.path.rpartition("/")[2] in runs.keys else 404)
        body = request.json()
        new = runs.start(body["dag_run_id"], body["conf"])
        return reply(500) if runs.lost() else reply(200 if new else 409, {"dag_run_id": body["dag_run_id"]})

    return act


def kestra(runs: Runs) -> Engine:
    def act(request: Received) -> bytes:
        if "/search?" in request.path:
            key = request.path.partition("=")[2].partition("&")[0]
            label = {"key": "system.correlationId", "value": key}
            found = [{"id": runs.keys[key], "inputs": "x" * 10_000, "labels": [label]}] if key in runs.keys else []
            return reply(200, {"results": found, "total": len(found)})
        key = request.path.partition("correlationId:")[2].partition("&")[0]
        assert request.headers["content-type"].startswith("multipart/form-data")
        assert runs.start(key, request.body.decode()), "started twice"
        return reply(500) if runs.lost() else reply(200, {"id": runs.keys[key]})

    return act


def trigger_dev(runs: Runs) -> Engine:
    def act(request: Received) -> bytes:
        body = request.json()
        key = body["options"]["idempotencyKey"]
        new = runs.start(key, body["payload"])
        return reply(500) if runs.lost() else reply(200, {"id": runs.keys[key], "isCached": not new})

    return act


def windmill(runs: Runs) -> Engine:
    def act(request: Received) -> bytes:
        if request.method == "GET":
            return reply(200 if request.path.rpartition("/")[2] in runs.keys else 404)
        key = request.path.partition("job_id=")[2]
        new = runs.start(key, request.json())
        return reply(500) if runs.lost() else answer(201, key.encode()) if new else reply(400)

    return act


KEYED: dict[str, tuple[Callable[[Runs], Engine], str, dict[str, Any]]] = {
    "prefect": (prefect, "/api", {"deployment": "summarise/production"}),
    "airflow": (airflow, "", {"dag": "summarise", "user": "watcher", "password": "pass"}),
    "kestra": (kestra, "", {"namespace": "company.team", "flow_id": "summarise"}),
    "trigger.dev": (trigger_dev, "", {"task": "summarise"}),
    "windmill": (windmill, "", {"path": "f/a/b"}),
}


@pytest.mark.parametrize("preset", [*KEYED])
async def test_an_engine_with_a_key_starts_one_run_per_item_though_answers_are_lost(
    sqlite_db: Database, preset: str
) -> None:
    engine, path, settings = KEYED[preset]
    runs = Runs()
    runs.lose = 3
    async with Receiver(decide=engine(runs)) as receiver:
        flow = Flow("hook", preset=preset, url=receiver.url + path, token=None, settings=settings)
        async with dispatching(sqlite_db, flow) as bench:
            await bench.commit(*({"id": n, "title": f"T{n}"} for n in range(6)))
            await bench.until_settled(6)
            bench.later(timedelta(minutes=1))
            rows = await bench.until_done()
            assert [row.status for row in rows] == ["delivered"] * 6
            assert sorted(row.verdict for row in rows) == ["delivered"] * 3 + ["duplicate"] * 3
            assert len(runs.started) == 6


async def test_airflow_is_asked_for_a_token_once_and_again_when_it_expires(sqlite_db: Database) -> None:
    runs = Runs()
    async with Receiver(decide=airflow(runs)) as receiver:
        settings = {"dag": "summarise", "user": "watcher", "password": "pass"}
        flow = Flow("hook", preset="airflow", url=receiver.url, settings=settings)
        async with dispatching(sqlite_db, flow) as bench:
            await bench.commit(*({"id": n} for n in range(8)))
            await bench.until_done()
            assert runs.logins == 1
            runs.token = "another: that one has expired"
            await bench.commit(*({"id": n} for n in range(8, 16)))
            rows = await bench.until_done()
            assert runs.logins == 2
            assert {(row.verdict, row.attempts) for row in rows} == {("delivered", 1)}
            assert mask("jwt1-secret-token jwt2-secret-token").count("secret") == 0


async def test_a_wrong_password_of_airflow_holds_the_flow_and_burns_nothing(sqlite_db: Database) -> None:
    async with Receiver(decide=lambda request: reply(401, {"detail": "Invalid credentials"})) as receiver:
        settings = {"dag": "summarise", "user": "watcher", "password": "wrong-password"}
        flow = Flow("hook", preset="airflow", url=receiver.url, settings=settings)
        async with dispatching(sqlite_db, flow) as bench:
            await bench.commit({"id": 1}, {"id": 2}, {"id": 3})
            await bench.until_settled(3)
            assert {(row.status, row.attempts) for row in await bench.rows()} == {("pending", 0)}
            assert "asked for a token: Invalid credentials" in (await bench.status("hook")).held_reason
            assert len(receiver.received) <= 3


async def test_a_schema_error_of_prefect_kills_its_item_and_a_deployment_that_is_gone_holds_the_flow(
    sqlite_db: Database,
) -> None:
    runs = Runs()
    async with Receiver(decide=prefect(runs)) as receiver:
        flow = Flow(
            "hook", preset="prefect", url=f"{receiver.url}/api", settings={"deployment": "summarise/production"}
        )
        gone = Flow("gone", preset="prefect", url=f"{receiver.url}/api", settings={"deployment": "summarise/other"})
        async with dispatching(sqlite_db, flow, gone) as bench:
            await bench.commit({"id": 1, "wrong": True}, {"id": 2})
            await bench.until(lambda rows: all(row.verdict for row in rows))
            assert {(row.flow, row.status) for row in await bench.rows()} == {
                ("hook", "dead"), ("hook", "delivered"), ("gone", "pending"),
            }  # fmt: skip
            assert "no deployment summarise/other" in (await bench.status("gone")).held_reason


UNKEYED: dict[str, tuple[str, dict[str, Any], bytes]] = {
    "n8n": ("", {"path": "news"}, reply(200, {"message": "Workflow was started"})),
    "kestra": ("", {"namespace": "n", "flow_id": "f", "webhook_key": "$var:key"}, answer(204)),
    "github": ("", {"repository": "owner/name"}, answer(204)),
    "gitlab": ("", {"project": "group/project"}, reply(201, {"id": 5})),
    "slack": ("/services/T0/B0/s3cretpart", {}, answer(200, b"ok")),
}


@pytest.mark.parametrize("preset", [*UNKEYED])
async def test_an_engine_without_a_key_gets_the_deliverys_id(sqlite_db: Database, preset: str) -> None:
    path, settings, says = UNKEYED[preset]
    async with Receiver(decide=lambda request: says) as receiver:
        flow = Flow("hook", preset=preset, url=receiver.url + path, token="$var:t", settings=settings)
        references = References({"$var:t": "t0ken-t0ken", "$var:key": "k3y-k3y-k3y"})
        async with dispatching(sqlite_db, flow, resolver=references) as bench:
            await bench.commit({"id": 1})
            (row,) = await bench.until_done()
            (sent,) = receiver.received
            assert row.status == "delivered"
            assert sent.id == row.id
            if preset == "gitlab":
                form = parse_qs(sent.body.decode())
                assert form["token"] == ["t0ken-t0ken"]
                assert "t0ken" not in sent.path
                assert json.loads(form["variables[WATCHER_PAYLOAD]"][0])["data"]["item"] == {"id": 1}


# --- batches and hours ------------------------------------------------------------------------------------------------


def batched(receiver: Receiver, **more: Any) -> Flow:
    given: dict[str, Any] = {"batch": Batch(10, timedelta(seconds=0.2)), "at_once": 2, "secrets": (SECRET,)}
    return Flow("hook", url=f"{receiver.url}/batch", **{**given, **more})


def keys(request: Received) -> list[str]:
    return [each["data"]["key"] for each in request.json()]


async def test_many_items_share_a_request_that_verifies(sqlite_db: Database) -> None:
    async with Receiver(decide=lambda request: answer(200)) as receiver:
        async with dispatching(sqlite_db, batched(receiver)) as bench:
            await bench.commit(*({"id": n} for n in range(25)))
            rows = await bench.until_done()
            assert {(row.verdict, row.attempts) for row in rows} == {("delivered", 1)}
            assert sorted(len(request.json()) for request in receiver.received) == [5, 10, 10]
            assert sorted(key for request in receiver.received for key in keys(request)) == sorted(map(str, range(25)))
            for request in receiver.received:
                Webhook(SECRET).verify(request.body, request.headers)
            assert len({request.id for request in receiver.received}) == 3
            assert receiver.most_at_once <= 2


async def test_a_bad_item_in_a_batch_dies_alone(sqlite_db: Database) -> None:
    def picky(request: Received) -> bytes:
        return answer(422 if "7" in keys(request) else 200)

    async with Receiver(decide=picky) as receiver:
        async with dispatching(sqlite_db, batched(receiver)) as bench:
            await bench.commit(*({"id": n} for n in range(10)))
            rows = await bench.until_done()
            assert [row.key for row in rows if row.status == "dead"] == ["7"]
            assert sum(row.status == "delivered" for row in rows) == 9
            assert len(receiver.received) <= 9


async def test_a_207_settles_each_item_by_its_own_code(sqlite_db: Database) -> None:
    codes = {"1": 200, "2": 422, "3": 503}

    def multi(request: Received) -> bytes:
        return reply(207, [codes[key] for key in keys(request)])

    async with Receiver(decide=multi) as receiver:
        async with dispatching(sqlite_db, batched(receiver)) as bench:
            await bench.commit({"id": 1}, {"id": 2}, {"id": 3})
            await bench.until_settled(3)
            assert {row.key: row.verdict for row in await bench.rows()} == {
                "1": "delivered", "2": "item", "3": "passing",
            }  # fmt: skip


async def test_a_207_that_is_no_list_is_tried_again(sqlite_db: Database) -> None:
    async with Receiver(decide=lambda request: reply(207, {"ok": 1})) as receiver:
        async with dispatching(sqlite_db, batched(receiver)) as bench:
            await bench.commit({"id": 1}, {"id": 2})
            assert {tried.verdict for tried in await bench.until_settled(2)} == {"passing"}


async def test_a_template_that_fails_on_one_item_leaves_the_rest_of_its_batch(sqlite_db: Database) -> None:
    async with Receiver(decide=lambda request: answer(200)) as receiver:
        async with dispatching(sqlite_db, batched(receiver, body={"n": "{{ item.n + 1 }}"})) as bench:
            await bench.commit({"id": 1, "n": "x"}, {"id": 2, "n": 2})
            bad, good = await bench.until_done()
            assert (bad.status, good.status) == ("dead", "delivered")
            assert receiver.received[0].json() == [{"n": 3}]


async def test_a_batch_that_is_gathered_when_the_service_stops_is_given_back(sqlite_db: Database) -> None:
    async with Receiver(decide=lambda request: answer(200)) as receiver:
        async with dispatching(sqlite_db, batched(receiver, batch=Batch(10, timedelta(minutes=5)))) as bench:
            await bench.commit({"id": 1}, {"id": 2})
            await bench.until(lambda rows: all(row.lease_until for row in rows))
            await bench.end()
            assert {(row.status, row.attempts, row.lease_until) for row in await bench.rows()} == {("pending", 0, None)}
            assert receiver.received == []


async def test_a_flow_that_is_held_is_probed_with_one_item_and_goes_on_with_batches(sqlite_db: Database) -> None:
    broken = True
    async with Receiver(decide=lambda request: answer(401 if broken else 200)) as receiver:
        async with dispatching(sqlite_db, batched(receiver)) as bench:
            await bench.commit(*({"id": n} for n in range(10)))
            await bench.until_settled(10)
            broken = False
            receiver.received.clear()
            bench.later(timedelta(minutes=1))
            rows = await bench.until_done()
            assert {(row.verdict, row.attempts) for row in rows} == {("delivered", 1)}
            assert len(receiver.received[0].json()) == 1


def hours_from_now(ahead: int) -> str:
    start = datetime.now(UTC) + timedelta(hours=ahead)
    return f"{start:%H}:00-{start + timedelta(hours=2):%H}:00"


async def test_outside_of_its_hours_nothing_is_sent_and_nothing_is_counted(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        flow = Flow("hook", url=f"{receiver.url}/ok", hours=parse(hours_from_now(3)))
        other = Flow("other", url=f"{receiver.url}/ok")
        async with dispatching(sqlite_db, flow, other) as bench:
            await bench.commit({"id": 1})
            await bench.until(lambda rows: any(row.flow == "other" and row.status == "delivered" for row in rows))
            rows = {row.flow: row for row in await bench.rows()}
            assert (rows["hook"].status, rows["hook"].attempts, rows["hook"].verdict) == ("pending", 0, "")
            bench.later(timedelta(hours=3))
            rows = {row.flow: row for row in await bench.until_done()}
            assert (rows["hook"].status, rows["hook"].attempts) == ("delivered", 1)


# --- templates that take their time -----------------------------------------------------------------------------------

LINGERS = "{% for a in item.many %}{{ item.many | sort | length }}{% endfor %}"


async def turns(work: Coroutine[Any, Any, Any]) -> int:
    """How often the loop went round while this was at work."""
    task, count = asyncio.create_task(work), 0
    while not task.done():
        await asyncio.sleep(0)
        count += 1
    await task
    return count


async def test_a_template_that_takes_its_time_leaves_the_loop_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    flow, sender = Flow("hook", url="http://127.0.0.1:9/x", body=LINGERS), Sender()
    courier = Courier(flow, sender, lambda: NOW)
    large = delivery({"many": list(range(20_000))})
    assert await turns(courier.attempt(large, resolved(flow), NOW)) > 10
    assert courier.made_ahead(delivery({"many": []}), resolved(flow), NOW) is None, "the flow is known to be slow now"
    await sender.close()


async def test_a_flow_whose_requests_took_long_to_make_has_them_made_in_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(attempt, "WARY", 2)
    body = LINGERS.replace("item.many", "('x' * item.n)")
    async with Receiver(decide=lambda request: answer(200)) as receiver:
        flow, sender = Flow("hook", url=f"{receiver.url}/x", body=body), Sender()
        courier = Courier(flow, sender, lambda: NOW)
        slow, quick = delivery({"n": 100_000}), delivery({"n": 1})
        judgement, _ = await courier.attempt(slow, resolved(flow), NOW)
        assert "takes more than" in judgement.note
        assert await turns(courier.attempt(slow, resolved(flow), NOW)) > 10
        for _ in range(2):
            assert courier.made_ahead(quick, resolved(flow), NOW) is None
            assert (await courier.attempt(quick, resolved(flow), NOW))[0].verdict is Verdict.DELIVERED
        assert courier.made_ahead(quick, resolved(flow), NOW), "after a while without trouble nothing is left of it"
        await sender.close()


async def test_a_batch_whose_template_takes_its_time_leaves_the_loop_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    flow = Flow("hook", url="http://127.0.0.1:9/x", map={"n": LINGERS}, batch=Batch(10, timedelta(seconds=1)))
    sender = Sender()
    courier = Courier(flow, sender, lambda: NOW)
    many = [delivery({"many": list(range(20_000))}, seq=n) for n in range(2)]
    assert await turns(courier.attempt_many(many, resolved(flow), NOW, float("inf"))) > 20
    await sender.close()
