"""Dead letters: read, rendered anew by the flow as it is now, retried one by one or many at a time, and stopped."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Desk, desk
from tests.support.deliveries import NOW, delivery
from tests.support.dispatching import dispatching
from tests.support.outbox import Source, prepare
from tests.support.receiver import Receiver
from watcher.cli import watchers
from watcher.errors import DeliveryError, StoreError
from watcher.flows import preview
from watcher.operations import Operator, steering
from watcher.store import deliveries, retries
from watcher.store.db import Database
from watcher.values import Flow

MINUTE = timedelta(minutes=1)


async def test_a_dead_letter_goes_out_as_the_flow_renders_it_now_under_its_own_id(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        wrong = Flow("hook", url=receiver.url + "/ok", body={"n": "{{ item.n + 1 }}"})
        async with dispatching(sqlite_db, wrong) as bench:
            await bench.commit({"id": 1, "n": "three"})
            (dead,) = await bench.until_done()
            assert (dead.status, receiver.received) == ("dead", [])
            bench.config = replace(bench.config, flows={"hook": replace(wrong, body={"n": "{{ item.n | length }}"})})
            await sqlite_db.write(lambda tx: deliveries.retry(tx, [dead.id], now=datetime.now(UTC)))
            bench.dispatcher.wake(["hook"])
            (row,) = await bench.until_done()
            assert (row.status, receiver.received[0].json(), receiver.received[0].id) == (
                "delivered",
                {"n": 5},
                dead.id,
            )


async def test_a_dry_run_shows_the_first_attempt_of_the_schedule_that_a_retry_begins(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        async with dispatching(sqlite_db, Flow("hook", url=receiver.url + "/unprocessable")) as bench:
            await bench.commit({"id": 1})
            (dead,) = await bench.until_done()
            shown = await steering.rendered(Operator(lambda: bench.config, sqlite_db, lambda: NOW), dead.id)
            assert (dead.attempts, shown["headers"]["x-watcher-attempt"]) == (1, "1")


def test_what_would_be_sent_is_shown_without_a_secret() -> None:
    flow = Flow(
        "hook", url="http://127.0.0.1/x", token="t0ken", secrets=("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",),
        headers={"X-Key": "$var:u/me/key", "X-Item": "{{ key }}"}, body={"n": "{{ item.id }}"},
    )  # fmt: skip
    found = preview.request(flow, delivery(attempt=3), NOW)
    assert (found["method"], found["url"], found["body"]) == ("POST", "http://127.0.0.1/x", '{"n":1}')
    assert found["headers"] | {
        "x-key": "*****", "x-item": "1", "authorization": "Bearer *****", "x-watcher-attempt": "3",
        "webhook-signature": "made at each attempt",
    } == found["headers"]  # fmt: skip
    slack = preview.request(
        Flow("s", preset="slack", url="https://hooks.slack.com/services/T/B/s3cret"), delivery(), NOW
    )
    assert "s3cret" not in str(slack)
    gitlab = Flow("g", preset="gitlab", url="http://x", token="glptt-s3cret", settings={"project": "1", "ref": "main"})
    assert "s3cret" not in str(preview.request(gitlab, delivery(), NOW))
    with pytest.raises(DeliveryError, match="body failed"):
        preview.request(Flow("hook", url="http://x/", body={"n": "{{ item.id + '1' }}"}), delivery(), NOW)


async def test_one_bulk_retry_is_at_work_and_can_be_stopped(db: Database) -> None:
    await prepare(db, "news")
    now = datetime.now(UTC)
    first = await db.write(lambda tx: retries.begin(tx, 100, now))
    assert await db.write(lambda tx: retries.go_on(tx, first, now))
    await db.write(lambda tx: retries.note(tx, first, 40, now))
    with pytest.raises(StoreError, match=r"40 of 100.*--stop"):
        await db.write(lambda tx: retries.begin(tx, 5, now + MINUTE))
    told = await db.write(lambda tx: retries.stop(tx, now))
    assert told is not None
    assert (told.done, told.total) == (40, 100)
    assert not await db.write(lambda tx: retries.go_on(tx, first, now))
    assert await db.write(lambda tx: retries.end(tx, first, now)) == 40
    assert await db.write(lambda tx: retries.stop(tx, now)) is None
    killed = await db.write(lambda tx: retries.begin(tx, 7, now))
    second = await db.write(lambda tx: retries.begin(tx, 8, now + 3 * MINUTE))  # the other was not heard of since
    assert not await db.write(lambda tx: retries.go_on(tx, killed, now + 3 * MINUTE))
    assert await db.write(lambda tx: retries.go_on(tx, second, now + 3 * MINUTE))


async def test_a_retry_puts_the_right_delivery_at_the_head_of_each_lane(db: Database) -> None:
    await prepare(db, "news")
    source = Source(db, [Flow("hook")])
    chance = random.Random(7)
    for _ in range(6):
        await source.commit([{"id": number, "at": chance.random()} for number in range(12)])

    async def rows() -> list[Any]:
        async with db.read() as tx:
            found = await tx.exec_driver_sql("SELECT seq, id, status, head FROM delivery ORDER BY seq")
            return [tuple(row) for row in found]

    kill = [seq for seq, *_ in await rows() if chance.random() < 0.6]
    await db.write(lambda tx: tx.exec_driver_sql(f"UPDATE delivery SET status = 2 WHERE seq IN ({str(kill)[1:-1]})"))
    await db.write(deliveries.mend)
    dead = [id for _, id, status, _ in await rows() if status == 2]
    while dead:
        some, dead = dead[:5], dead[5:]
        assert await db.write(lambda tx, some=some: deliveries.retry(tx, some, now=datetime.now(UTC))) == len(some)
        before = await rows()
        await db.write(deliveries.mend)
        assert await rows() == before
    assert sum(bool(head) for *_, head in before) == 12


@pytest.fixture
def watcher(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    """45 dead letters, and retries in parts of 10."""
    monkeypatch.setattr(watchers, "_BATCH", 10)
    new = desk(tmp_path, capsys, monkeypatch)
    new.configure(change=lambda text: text.replace("[flows.sink]", '[flows.sink]\nfilter = "item.n + item.id > 1"'))
    new.lists(*({"id": str(number), "n": 1} for number in range(45)))
    new("run", "one")
    return new


def test_a_retry_of_many_tells_how_far_it_is(watcher: Desk) -> None:
    assert watcher.json("retry", "--all", "--yes") == {"retried": 45}
    assert [line for line in watcher.err.splitlines() if " of 45" in line] == [
        f"{done} of 45" for done in (10, 20, 30, 40, 45)
    ]
    assert len(watcher.json("deliveries", "--status", "pending", "--limit", "100")) == 45


def test_a_retry_of_many_that_is_stopped_elsewhere_keeps_what_it_did(
    watcher: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, parts = watchers.call, []

    def stopping(config: Any, verb: str, **more: Any) -> Any:
        if verb == "retry":
            parts.append(verb)
            if len(parts) == 3:
                assert call(config, "status")["retry"]["done"] == 20
                assert call(config, "retry_stop") == {"stopped": True, "retried": 20, "total": 45}
        return call(config, verb, **more)

    monkeypatch.setattr(watchers, "call", stopping)
    watcher("retry", "--all", "--yes", expect=1)
    assert "stopped: 20 of 45 are due again, the rest stays as it was" in watcher.err
    monkeypatch.setattr(watchers, "call", call)
    assert len(watcher.json("deliveries", "--status", "dead", "--limit", "100")) == 25
    watcher("retry", "--stop")
    assert "no retry of many is at work" in watcher.err
    assert watcher.json("status")["retry"] is None


def test_a_retry_of_many_can_be_interrupted(watcher: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    call, parts = watchers.call, []

    def interrupted(config: Any, verb: str, **more: Any) -> Any:
        done = call(config, verb, **more)
        parts.append(verb)
        if parts.count("retry") == 2 and verb == "retry":
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(watchers, "call", interrupted)
    watcher("retry", "--all", "--yes", expect=130)
    assert "stopped: 20 of 45" in watcher.err


def test_a_dry_run_shows_the_request_and_changes_nothing(watcher: Desk) -> None:
    one = watcher.json("deliveries", "--status", "dead", "--limit", "1")[0]["id"]
    shown = watcher("retry", "--dry-run", one)
    assert shown.startswith("POST http://127.0.0.1:1/\n")
    assert f"webhook-id: {one}" in shown
    assert '"item":{' in shown
    assert len(watcher.json("deliveries", "--status", "dead", "--limit", "100")) == 45
    watcher("retry", "--dry-run", expect=2)
    watcher("retry", "--dry-run", "no-such-id", expect=2)
