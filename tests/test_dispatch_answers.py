"""What becomes of a delivery when the flow behaves in each of the receiver's 24 ways, and in some of its own."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import pytest

from tests.support.dispatching import References, dispatching
from tests.support.receiver import BEHAVIOURS, Receiver, answer
from watcher import dispatch
from watcher.http.sender import Sender
from watcher.log import register
from watcher.store.db import Database
from watcher.values import Flow, Request, Response

DELIVERED = {"ok": 200, "created": 201, "no_content": 204, "no_content_with_body": 204}
LATE = {"slow_body": 200, "endless": 200, "reset_in_body": 200}  # the status was heard: the rest changes nothing
ITEM = {"bad_request": 400, "too_large": 413, "unprocessable": 422}
TARGET = {"redirect": 302, "unauthorized": 401, "forbidden": 403, "not_found": 404, "gone": 410}
PASSING = {
    "request_timeout": 408, "too_many": 429, "error": 500, "unavailable": 503, "silent": None, "slow_head": None,
    "reset": None, "half_close": None, "garbage": None,
}  # fmt: skip
WAITS = {"too_many": (7, 7), "unavailable": (110, 125)}  # what Retry-After asked for; else jitter around 5 s


def test_there_are_24_behaviours_and_each_has_its_outcome() -> None:
    assert len(BEHAVIOURS) == 24
    assert DELIVERED.keys() | LATE.keys() | ITEM.keys() | TARGET.keys() | PASSING.keys() == BEHAVIOURS.keys()


def flow(url: str, **more: Any) -> Flow:
    return Flow("hook", url=url, **{"timeout": timedelta(seconds=0.4), **more})


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
async def test_each_behaviour_of_a_receiver_has_its_outcome(sqlite_db: Database, behaviour: str) -> None:
    async with Receiver() as receiver, dispatching(sqlite_db, flow(f"{receiver.url}/{behaviour}")) as bench:
        await bench.commit({"id": 1})
        (tried,) = await bench.until_settled(1)
        (row,) = await bench.rows()
        held = (await bench.status("hook")).held_since is not None
        status = (DELIVERED | LATE | ITEM | TARGET | PASSING)[behaviour]
        assert tried.status_code == row.status_code == status
        assert len(tried.answer) <= 4096
        assert tried.number == 1
        if behaviour in DELIVERED or behaviour in LATE:
            assert (row.status, row.verdict, held) == ("delivered", "delivered", False)
        elif behaviour in ITEM:
            assert (row.status, row.verdict, held) == ("dead", "item", False)
            assert str(status) in row.note
        elif behaviour in TARGET:
            assert (row.status, row.verdict, held, row.attempts) == ("pending", "target", True, 0)
        else:
            assert (row.status, row.verdict, held, row.attempts) == ("pending", "passing", False, 1)
            low, high = WAITS.get(behaviour, (0, 10))
            ended = tried.started_at + timedelta(milliseconds=tried.duration_ms)
            assert timedelta(seconds=low - 0.5) <= row.due_at - ended <= timedelta(seconds=high + 0.5)
            assert row.note
        assert len(receiver.received) == 1


async def test_a_flow_that_speaks_no_tls_or_has_no_address_is_held(sqlite_db: Database) -> None:
    def look_up(host: str, *_: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    sender = Sender(look_up=look_up)
    async with Receiver() as receiver:
        plain = Flow("plain", url=receiver.url.replace("http:", "https:") + "/ok")
        nowhere = Flow("nowhere", url="http://no-such-host.test/")
        async with dispatching(sqlite_db, plain, nowhere, sender=sender) as bench:
            await bench.commit({"id": 1})
            rows = await bench.until(lambda rows: all(row.verdict for row in rows))
            assert {(row.flow, row.verdict, row.attempts) for row in rows} == {
                ("plain", "target", 0),
                ("nowhere", "target", 0),
            }
            assert "secure" in (await bench.status("plain")).held_reason
            assert "resolved" in (await bench.status("nowhere")).held_reason
    await sender.close()


async def test_a_flow_that_refuses_connections_is_tried_again(sqlite_db: Database) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening
        async with dispatching(sqlite_db, flow(f"http://127.0.0.1:{taken.getsockname()[1]}/")) as bench:
            await bench.commit({"id": 1})
            (tried,) = await bench.until_settled(1)
            assert (tried.verdict, tried.status_code) == ("passing", None)


async def test_an_address_that_the_guard_refuses_holds_the_flow(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        async with dispatching(sqlite_db, flow(f"{receiver.url}/ok", private_addresses=False)) as bench:
            await bench.commit({"id": 1})
            (tried,) = await bench.until_settled(1)
            assert tried.verdict == "target"
            assert receiver.received == []


async def test_a_template_that_fails_on_an_item_kills_that_item_alone(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        async with dispatching(sqlite_db, flow(f"{receiver.url}/ok", body={"n": "{{ item.n + 1 }}"})) as bench:
            await bench.commit({"id": 1, "n": "x"}, {"id": 2, "n": 2})
            bad, good = await bench.until_done()
            assert (bad.status, good.status) == ("dead", "delivered")
            assert "flows.hook.body" in bad.note
            assert [request.json() for request in receiver.received] == [{"n": 3}]


async def test_a_secret_that_cannot_sign_holds_the_flow_and_is_not_shown(sqlite_db: Database) -> None:
    async with dispatching(sqlite_db, flow("http://127.0.0.1:9/", secrets=("whsec_c2hvcnQ=",))) as bench:
        await bench.commit({"id": 1})
        (tried,) = await bench.until_settled(1)
        assert tried.verdict == "target"
        assert "24" in tried.note
        assert "c2hvcnQ" not in tried.note


async def test_an_answer_that_echoes_a_secret_is_kept_without_it(sqlite_db: Database) -> None:
    register("s3cret-t0ken-value")
    async with Receiver(decide=lambda r: answer(500, r.headers["authorization"].encode())) as receiver:
        references = References({"$var:u/admin/token": "s3cret-t0ken-value"})
        made = flow(receiver.url, token="$var:u/admin/token")
        async with dispatching(sqlite_db, made, resolver=references) as bench:
            await bench.commit({"id": 1})
            (tried,) = await bench.until_settled(1)
            assert receiver.received[0].headers["authorization"] == "Bearer s3cret-t0ken-value"
            assert b"s3cret" not in tried.answer
            assert tried.answer


async def test_a_reference_is_followed_at_each_use(sqlite_db: Database) -> None:
    references = References({"$var:u/admin/token": "first"})
    async with Receiver() as receiver:
        made = flow(f"{receiver.url}/ok", token="$var:u/admin/token", headers={"X-Key": "$var:u/admin/token"})
        async with dispatching(sqlite_db, made, resolver=references) as bench:
            await bench.commit({"id": 1})
            await receiver.wait(1)
            references.values["$var:u/admin/token"] = "second"
            await bench.commit({"id": 2})
            await receiver.wait(2)
            assert [r.headers["authorization"] for r in receiver.received] == ["Bearer first", "Bearer second"]
            assert [r.headers["x-key"] for r in receiver.received] == ["first", "second"]


async def test_a_reference_that_leads_nowhere_holds_the_flow_until_it_does(sqlite_db: Database) -> None:
    references = References()
    async with Receiver() as receiver:
        made = flow(f"{receiver.url}/ok", token="$var:u/admin/token")
        async with dispatching(sqlite_db, made, resolver=references) as bench:
            await bench.commit({"id": 1}, {"id": 2})
            await bench.until(lambda rows: any(row.verdict == "target" for row in rows))
            assert "no such variable" in (await bench.status("hook")).held_reason
            references.values["$var:u/admin/token"] = "known"
            bench.later(timedelta(seconds=31))
            await bench.until_done()
            assert len(receiver.received) == 2


async def test_windmill_that_knows_the_job_already_is_a_success(sqlite_db: Database) -> None:
    def windmill(request: Any) -> bytes:
        return answer(200, b"{}") if request.method == "GET" else answer(400, b"job id already exists")

    async with Receiver(decide=windmill) as receiver:
        made = Flow("hook", preset="windmill", url=receiver.url, settings={"path": "f/a/b"})
        async with dispatching(sqlite_db, made) as bench:
            await bench.commit({"id": 1})
            (row,) = await bench.until_done()
            assert (row.status, row.verdict) == ("delivered", "duplicate")
            assert [r.method for r in receiver.received] == ["POST", "GET"]
            assert row.id in receiver.received[1].path


async def test_windmill_that_does_not_know_the_job_refused_the_item(sqlite_db: Database) -> None:
    async with Receiver(decide=lambda r: answer(404 if r.method == "GET" else 400)) as receiver:
        made = Flow("hook", preset="windmill", url=receiver.url, settings={"path": "f/a/b"})
        async with dispatching(sqlite_db, made) as bench:
            await bench.commit({"id": 1})
            (row,) = await bench.until_done()
            assert (row.status, row.verdict) == ("dead", "item")


async def test_a_bug_in_sending_is_tried_again_and_others_go_on(sqlite_db: Database) -> None:
    class Buggy:
        async def send(self, request: Request, **_: Any) -> Response:
            if b'"id":1' in request.body:
                raise KeyError("bug")
            return Response(200)

    async with dispatching(sqlite_db, flow("http://127.0.0.1:9/"), sender=Buggy()) as bench:
        await bench.commit({"id": 1}, {"id": 2})
        await bench.until_settled(2)
        first, second = await bench.rows()
        assert (first.status, first.verdict, first.note) == ("pending", "passing", "KeyError while sending")
        assert second.status == "delivered"


async def test_an_outcome_that_cannot_be_understood_keeps_no_other_from_being_settled(
    sqlite_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def masked(body: bytes) -> bytes:
        if body == b"odd":
            raise KeyError("bug")
        return body

    class Sent:
        async def send(self, request: Request, **_: Any) -> Response:
            return Response(200, body=b"odd" if b'"id":1' in request.body else b"fine")

    monkeypatch.setattr(dispatch, "_masked", masked)
    async with dispatching(sqlite_db, flow("http://127.0.0.1:9/"), sender=Sent()) as bench:
        await bench.commit({"id": 1}, {"id": 2})
        await bench.until_settled(2)
        first, second = await bench.rows()
        assert (first.status, first.verdict, first.note) == ("pending", "passing", "KeyError while sending")
        assert second.status == "delivered"


async def test_every_attempt_carries_the_same_id_and_body_and_its_own_number(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        receiver.script.extend(["reset", "error", "ok"])
        async with dispatching(sqlite_db, flow(f"{receiver.url}/scripted")) as bench:
            await bench.commit({"id": 1})
            for count in (1, 2):
                await bench.until_settled(count)
                bench.later(timedelta(hours=1))
            await bench.until_done()
            assert {(r.id, r.body) for r in receiver.received} == {(receiver.received[0].id, receiver.received[0].body)}
            assert [r.attempt for r in receiver.received] == [1, 2, 3]
