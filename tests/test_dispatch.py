"""Dispatch at work: order, limits, fairness, holding, retrying, fencing, draining, and what a crash leaves."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.support.dispatching import Bench, References, dispatching
from tests.support.outbox import config
from tests.support.receiver import Received, Receiver, answer
from watcher import dispatch
from watcher.dispatch import NO_SUCH_FLOW
from watcher.errors import DatabaseFull
from watcher.http.sender import Sender
from watcher.store import flows as flow_store
from watcher.store.db import Database
from watcher.values import Flow, Judgement, Request, Response, Verdict


def item(request: Received) -> Any:
    return request.json()["data"]["item"]


async def test_items_of_one_key_arrive_in_order_and_one_after_another(db: Database) -> None:
    open_now: set[str] = set()
    clashes = []

    class Watching:
        def __init__(self) -> None:
            self.inner = Sender()

        async def send(self, request: Request, **more: Any) -> Response:
            key = request.headers["x-key"]
            if key in open_now:
                clashes.append(key)
            open_now.add(key)
            try:
                return await self.inner.send(request, **more)
            finally:
                open_now.discard(key)

    sender = Watching()
    async with Receiver() as receiver:
        flow = Flow("hook", url=f"{receiver.url}/delay/0.002", at_once=16, headers={"X-Key": "{{ key }}"})
        async with dispatching(db, flow, sender=sender) as bench:
            for version in range(8):
                await bench.commit(*({"id": key, "version": version} for key in range(10)))
            await bench.until_done()
    await sender.inner.close()
    seen = defaultdict(list)
    for request in receiver.received:
        seen[item(request)["id"]].append(item(request)["version"])
    assert dict(seen) == {key: list(range(8)) for key in range(10)}
    assert clashes == []


async def test_a_head_that_fails_blocks_its_own_lane_and_no_other(db: Database) -> None:
    def decide(request: Received) -> str:
        return "error" if item(request) == {"id": "bad", "n": 1} and request.attempt < 3 else "ok"

    async with Receiver(decide=decide) as receiver:
        async with dispatching(db, Flow("hook", url=receiver.url)) as bench:
            await bench.commit({"id": "bad", "n": 1}, {"id": "good", "n": 1})
            await bench.commit({"id": "bad", "n": 2}, {"id": "good", "n": 2})
            rows = await bench.until(lambda rows: sum(row.status == "delivered" for row in rows) == 2)
            assert {row.key for row in rows if row.status == "delivered"} == {"good"}
            bench.later(timedelta(seconds=11))
            await bench.until_settled(4)
            bench.later(timedelta(minutes=11))
            await bench.until_done()
    assert [(item(r)["n"], r.attempt) for r in receiver.received if item(r)["id"] == "bad"] == [
        (1, 1), (1, 2), (1, 3), (2, 1),
    ]  # fmt: skip


async def test_order_by_watcher_is_one_lane_and_order_none_has_no_lanes(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        one = Flow("one", url=f"{receiver.url}/ok", order="watcher")
        none = Flow("none", url=f"{receiver.url}/delay/0.05", order="none")
        async with dispatching(sqlite_db, one, none) as bench:
            await bench.commit(*({"id": n} for n in range(20)))
            await bench.commit(*({"id": 0, "version": n} for n in range(1, 5)))
            await bench.until_done()
            ones = [item(r) for r in receiver.received if r.path == "/ok"]
            assert ones == [{"id": n} for n in range(20)] + [{"id": 0, "version": n} for n in range(1, 5)]
            assert receiver.most_at_once > 1


async def test_no_more_requests_are_in_flight_than_the_flow_and_the_service_allow(sqlite_db: Database) -> None:
    async with Receiver() as receiver, Receiver() as other:
        narrow = Flow("narrow", url=f"{receiver.url}/delay/0.02", at_once=2)
        wide = Flow("wide", url=f"{other.url}/delay/0.02", at_once=50)
        async with dispatching(sqlite_db, narrow, wide, at_once=10) as bench:
            await bench.commit(*({"id": n} for n in range(40)))
            await bench.until_done()
            assert receiver.most_at_once == 2
            assert 5 <= other.most_at_once <= 8  # two in ten are the other flow's own


async def test_a_rate_is_never_exceeded_in_any_span(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        flow = Flow("hook", url=f"{receiver.url}/ok", at_once=50, rate=(5, timedelta(seconds=0.5)))
        async with dispatching(sqlite_db, flow) as bench:
            await bench.commit(*({"id": n} for n in range(16)))
            await bench.until_done()
            times = [request.at for request in receiver.received]
            assert len(times) == 16
            assert all(later - earlier > 0.4 for earlier, later in zip(times, times[5:], strict=False))
            assert times[-1] - times[0] < 5


async def test_a_flow_that_hangs_delays_no_other(sqlite_db: Database) -> None:
    async with Receiver() as stuck, Receiver() as receiver:
        hanging = Flow("hanging", url=f"{stuck.url}/silent", at_once=64, timeout=timedelta(seconds=30))
        fine = Flow("fine", url=f"{receiver.url}/ok", at_once=64)
        async with dispatching(sqlite_db, hanging, fine) as bench:
            await bench.commit(*({"id": n} for n in range(300)))
            begun = time.monotonic()
            await receiver.wait(300)
            await bench.until(lambda rows: all(r.status == "delivered" for r in rows if r.flow == "fine"))
            assert time.monotonic() - begun < 10
            assert len(stuck.received) == 48
            bench.stop.set()
            assert bench.task
            await bench.task
            bench.task = None
            await bench.dispatcher.drain(timedelta(0))
            left = await bench.rows(flow="hanging")
            assert {(row.status, row.attempts, row.lease_until) for row in left} == {("pending", 0, None)}


async def test_two_flows_that_both_have_much_to_do_share(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        first = Flow("first", url=f"{receiver.url}/delay/0.01/", at_once=64)
        second = Flow("second", url=f"{receiver.url}/delay/0.010", at_once=64)
        async with dispatching(sqlite_db, first, second, at_once=16) as bench:
            await bench.commit(*({"id": n} for n in range(200)))
            await bench.until_done()
            half = [request.path for request in receiver.received[:200]]
            assert 40 < half.count("/delay/0.010") < 160


async def test_a_flow_at_fault_is_held_burns_no_attempt_is_told_once_and_goes_on(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(dispatch.log, level, lambda event, **_: told.append(event), raising=False)
    broken = True
    async with Receiver(decide=lambda r: "unauthorized" if broken else "ok") as receiver:
        async with dispatching(db, Flow("hook", url=receiver.url, at_once=4)) as bench:
            await bench.commit(*({"id": n} for n in range(20)))
            await bench.until(lambda rows: any(row.verdict == "target" for row in rows))
            before = len(receiver.received)
            assert before <= 8
            status = await bench.status("hook")
            assert status.held_since is not None
            assert status.probe_at is not None
            assert timedelta(seconds=25) < status.probe_at - status.held_since <= timedelta(seconds=31)
            for wait, probe in ((31, 1), (61, 2), (121, 3), (241, 4)):
                bench.later(timedelta(seconds=wait))
                await receiver.wait(before + probe)
                async with asyncio.timeout(10):
                    while (await bench.status("hook")).probes != probe:
                        await asyncio.sleep(0.01)
            assert len(receiver.received) == before + 4  # one delivery each time
            assert all(row.attempts == 0 and row.status == "pending" for row in await bench.rows())
            broken = False
            bench.later(timedelta(seconds=481))
            await bench.until_done()
            assert (await bench.status("hook")).held_since is None
            assert (await bench.status("hook")).delivered_at is not None
    assert told.count("flow.held") == 1
    assert told.count("flow.resumed") == 1


async def test_a_probe_that_meets_passing_trouble_holds_on_and_burns_nothing(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        receiver.script.extend(["not_found", "error", "unavailable", "ok"])
        async with dispatching(sqlite_db, Flow("hook", url=f"{receiver.url}/scripted")) as bench:
            await bench.commit({"id": 1})
            for count, wait in ((1, 31), (2, 61), (3, 121)):
                await bench.until_settled(count)
                (row,) = await bench.rows()
                assert (row.status, row.attempts, row.verdict) == ("pending", 0, "target")
                bench.later(timedelta(seconds=wait))
            await bench.until_done()
            assert (await bench.status("hook")).held_since is None


async def test_an_operator_can_resume_a_held_flow_at_once_and_pause_one(db: Database) -> None:
    broken = True
    async with Receiver(decide=lambda r: "gone" if broken else "ok") as receiver:
        async with dispatching(db, Flow("hook", url=receiver.url)) as bench:
            await bench.commit({"id": 1})
            await bench.until_settled(1)
            broken = False
            now = bench.clock()
            await db.write(lambda tx: flow_store.resume(tx, "hook", now))
            await bench.until_done()  # without a wake-up: the database is asked now and then
            await db.write(lambda tx: flow_store.pause(tx, "hook", "holidays", now))
            await asyncio.sleep(2.1)
            await bench.commit({"id": 2})
            await asyncio.sleep(0.3)
            assert len(receiver.received) == 2
            await db.write(lambda tx: flow_store.resume(tx, "hook", now))
            await bench.until_done()
            assert len(receiver.received) == 3


async def test_deliveries_of_a_flow_that_left_the_configuration_wait_for_it(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        gone, kept = Flow("gone", url=f"{receiver.url}/ok"), Flow("kept", url=f"{receiver.url}/ok")
        async with dispatching(sqlite_db, gone, kept, started=False) as bench:
            await bench.source.commit([{"id": 1}])
            bench.config = config([kept])
            bench.start()
            await bench.until(lambda rows: any(row.status == "delivered" for row in rows))
            async with asyncio.timeout(10):
                while (await bench.status("gone")).held_reason != NO_SUCH_FLOW:
                    await asyncio.sleep(0.01)
            bench.config = config([gone, kept])
            bench.dispatcher.wake(["gone"])
            await bench.until_done()
            assert (await bench.status("gone")).held_since is None


async def test_a_disabled_flow_waits_and_a_changed_one_is_used_at_once(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        flow = Flow("hook", url=f"{receiver.url}/ok", enabled=False)
        async with dispatching(sqlite_db, flow) as bench:
            await bench.commit({"id": 1})
            await asyncio.sleep(0.2)
            assert receiver.received == []
            bench.config = config([replace(flow, enabled=True, url=f"{receiver.url}/created")])
            bench.dispatcher.wake([])
            await bench.until_done()
            assert [request.path for request in receiver.received] == ["/created"]


async def test_the_schedule_ends_in_the_dead_letters_and_a_retry_begins_it_anew(sqlite_db: Database) -> None:
    from watcher.store import deliveries

    async with Receiver() as receiver:
        schedule = (timedelta(0), timedelta(seconds=5), timedelta(minutes=5))
        async with dispatching(sqlite_db, Flow("hook", url=f"{receiver.url}/error"), schedule=schedule) as bench:
            await bench.commit({"id": 1})
            for count, wait in ((1, timedelta(seconds=11)), (2, timedelta(minutes=11))):
                await bench.until_settled(count)
                bench.later(wait)
            (row,) = await bench.until_done()
            assert (row.status, row.attempts) == ("dead", 3)
            assert row.note == "answered 500; given up after 3 attempts"
            now = bench.clock()
            assert await sqlite_db.write(lambda tx: deliveries.retry(tx, [row.id], now=now)) == 1
            bench.dispatcher.wake(["hook"])
            await bench.until_settled(4)
            assert receiver.received[-1].id == row.id


async def test_nothing_is_sent_before_it_is_due(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        async with dispatching(sqlite_db, Flow("hook", url=f"{receiver.url}/scripted")) as bench:
            receiver.script.append("unavailable")  # asks for two minutes
            await bench.commit({"id": 1})
            await bench.until_settled(1)
            bench.later(timedelta(seconds=100))
            await asyncio.sleep(0.3)
            assert len(receiver.received) == 1
            bench.later(timedelta(seconds=30))
            await bench.until_done()


async def test_a_flow_that_is_too_busy_is_left_alone_for_as_long_as_it_asks(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        receiver.script.append("too_many")  # seven seconds
        async with dispatching(sqlite_db, Flow("hook", url=f"{receiver.url}/scripted", at_once=1)) as bench:
            await bench.commit({"id": 1}, {"id": 2})
            await bench.until_settled(1)
            await bench.commit({"id": 3})
            await asyncio.sleep(0.5)
            assert len(receiver.received) == 1
            assert bench.dispatcher._targets["hook"].closed_until > time.monotonic() + 5


async def test_a_flow_that_only_fails_is_asked_for_a_sign_of_life_and_spared_until_it_gives_one(
    sqlite_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "REST", (0.05, 0.2))
    answers = {"now": "error"}
    async with Receiver(decide=lambda _: answers["now"]) as receiver:
        flow = Flow("hook", url=receiver.url, at_once=8)
        async with dispatching(sqlite_db, flow, schedule=(timedelta(0),) * 50) as bench:
            await bench.commit(*({"id": number} for number in range(300)))
            await receiver.wait(20)
            await asyncio.sleep(1)
            assert len(receiver.received) < 80  # else thousands
            for _ in range(50):
                await asyncio.sleep(0.01)
                assert bench.dispatcher.in_flight <= 1
            answers["now"] = "ok"
            rows = await bench.until_done()
            assert {row.status for row in rows} == {"delivered"}
            assert bench.dispatcher._targets["hook"].failures == 0


async def test_what_began_before_a_rest_and_fails_after_it_makes_the_next_no_longer(
    sqlite_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "BROKEN", 1)
    async with dispatching(sqlite_db, Flow("hook", url="http://127.0.0.1:9/"), started=False) as bench:
        bench.dispatcher._follow(bench.config)
        target = bench.dispatcher._targets["hook"]
        failed = Judgement(Verdict.PASSING, "no answer")
        began = time.monotonic()
        bench.dispatcher._mind(target, failed, None, began)
        target.closed_until = time.monotonic()  # the rest is over
        bench.dispatcher._mind(target, failed, None, began)
        assert target.rests == 1
        bench.dispatcher._mind(target, failed, None, time.monotonic())
        assert target.rests == 2


async def test_a_process_that_slept_past_its_lease_settles_nothing(db: Database) -> None:
    async with Receiver() as slow, Receiver() as receiver:
        flow = Flow("hook", url=f"{slow.url}/delay/1.5", timeout=timedelta(seconds=5))
        async with dispatching(db, flow, lease=timedelta(seconds=30)) as sleeper:
            await sleeper.commit({"id": 1})
            await slow.wait(1)
            other = Bench(
                db,
                config([replace(flow, url=f"{receiver.url}/ok")]),
                Sender(),
                References(),
                sleeper.clock,
                sleeper.source,
            )
            sleeper.clock.advance(timedelta(seconds=31))
            other.start()
            await receiver.wait(1)
            await other.until_done()
            async with asyncio.timeout(10):
                while sleeper.dispatcher.in_flight:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            (tried,) = await other.tried()
            assert tried.number == 2
            assert slow.received[0].id == receiver.received[0].id
            await other.end()
            await other.sender.close()


async def test_a_claim_whose_lease_is_over_is_not_sent(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        async with dispatching(sqlite_db, Flow("hook", url=f"{receiver.url}/ok"), started=False) as bench:
            await bench.source.commit([{"id": 1}])
            dispatcher = bench.dispatcher
            started: list[Any] = []
            dispatcher._spawn = started.append  # type: ignore[method-assign]
            await dispatcher._turn(claim=True)
            (deliver,) = started
            ready = deliver.cr_frame.f_locals["ready"]
            deliver.close()
            await dispatcher._deliver(ready._replace(expires=time.monotonic() - 1))
            assert receiver.received == []
            await dispatcher._turn(claim=False)
            (row,) = await bench.rows()
            assert (row.status, row.attempts, row.lease_until) == ("pending", 0, None)


async def test_a_request_made_long_before_its_turn_is_made_anew_and_bears_the_time_of_its_attempt(
    sqlite_db: Database,
) -> None:
    async with Receiver() as receiver:
        async with dispatching(sqlite_db, Flow("hook", url=f"{receiver.url}/ok"), started=False) as bench:
            await bench.source.commit([{"id": 1}])
            started: list[Any] = []
            bench.dispatcher._spawn = started.append  # type: ignore[method-assign]
            await bench.dispatcher._turn(claim=True)
            (deliver,) = started
            ready = deliver.cr_frame.f_locals["ready"]
            deliver.close()
            bench.clock.advance(timedelta(minutes=10))
            await bench.dispatcher._deliver(ready._replace(stale=time.monotonic() - 1))
            (got,) = receiver.received
            made = int(ready.made.headers["webhook-timestamp"])
            assert 600 <= int(got.headers["webhook-timestamp"]) - made < 660
            await bench.dispatcher._turn(claim=False)
            ((tried,), (row,)) = await bench.tried(), await bench.rows()
            assert (row.status, int(tried.started_at.timestamp())) == (
                "delivered",
                int(got.headers["webhook-timestamp"]),
            )


async def test_two_processes_on_one_database_send_each_delivery_once(db: Database) -> None:
    if db.dialect == "sqlite":
        pytest.skip("a SQLite database has one service")
    async with Receiver() as receiver:
        flow = Flow("hook", url=f"{receiver.url}/delay/0.002", at_once=16)
        async with dispatching(db, flow) as first:
            second = Bench(db, first.config, Sender(), References(), first.clock, first.source)
            second.start()
            for version in range(6):
                await first.commit(*({"id": n, "version": version} for n in range(40)))
                second.dispatcher.wake(["hook"])
            await first.until_done()
            await second.end()
            await second.sender.close()
    assert len(receiver.received) == 240
    assert len({request.id for request in receiver.received}) == 240
    seen = defaultdict(list)
    for request in receiver.received:
        seen[item(request)["id"]].append(item(request)["version"])
    assert all(versions == list(range(6)) for versions in seen.values())


async def test_a_drain_lets_what_is_in_flight_end_and_leaves_no_lease(db: Database) -> None:
    async with Receiver() as receiver:
        flow = Flow("hook", url=f"{receiver.url}/delay/0.3", at_once=8)
        async with dispatching(db, flow) as bench:
            await bench.commit(*({"id": n} for n in range(20)))
            await receiver.wait(8)
            await bench.end()
            rows = await bench.rows()
            assert 8 <= sum(row.status == "delivered" for row in rows) == len(receiver.received) < 20
            assert all(row.lease_until is None and row.attempts == 0 for row in rows if row.status == "pending")
            bench.stop.clear()
            bench.start()
            await bench.until_done()
    assert len({request.id for request in receiver.received}) == len(receiver.received) == 20


async def test_after_a_crash_what_was_in_flight_is_sent_again_at_once_under_its_id(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        async with dispatching(sqlite_db, Flow("hook", url=f"{receiver.url}/scripted"), started=False) as bench:
            receiver.script.append("silent")
            crashing = Bench(sqlite_db, bench.config, bench.sender, References(), bench.clock, bench.source)
            crashing.start()
            await crashing.commit({"id": 1}, {"id": 1, "n": 2})
            await receiver.wait(1)
            assert crashing.task
            crashing.task.cancel()
            await asyncio.gather(crashing.task, return_exceptions=True)
            crashing.task = None
            bench.start()
            await bench.until_done()
    assert [r.id for r in receiver.received][:2] == [receiver.received[0].id] * 2
    assert len(receiver.received) == 3


async def test_outcomes_survive_a_database_that_cannot_be_written_for_a_while(sqlite_db: Database) -> None:
    async with Receiver() as receiver:
        async with dispatching(sqlite_db, Flow("hook", url=f"{receiver.url}/ok")) as bench:
            await bench.commit({"id": 1})
            await bench.until_done()
            write, full = sqlite_db.write, True

            async def failing(operation: Any, **more: Any) -> Any:
                if full and "_exchange" in operation.__code__.co_names:
                    raise DatabaseFull("no space")
                return await write(operation, **more)

            gate = asyncio.Event()

            class Slow:
                async def send(self, request: Request, **more: Any) -> Response:
                    sent.append(request)
                    await gate.wait()
                    return Response(200)

            sent: list[Request] = []
            bench.dispatcher._targets["hook"].courier._sender = Slow()
            await bench.commit({"id": 2}, {"id": 3})
            while len(sent) < 2:
                await asyncio.sleep(0.01)
            sqlite_db.write = failing  # type: ignore[method-assign]
            gate.set()
            await asyncio.sleep(0.8)
            rows = await bench.rows()
            assert [row.status for row in rows] == ["delivered", "pending", "pending"]
            full = False
            await bench.until_done()
            assert len(sent) == 2


async def test_commits_are_few_when_much_is_in_flight(sqlite_db: Database) -> None:
    async with Receiver(keep=False) as receiver:
        async with dispatching(sqlite_db, Flow("hook", url=f"{receiver.url}/ok", at_once=64), started=False) as bench:
            await bench.source.commit([{"id": n} for n in range(1000)])
            before = sqlite_db.commits
            bench.start()
            await bench.until_done()
            assert sqlite_db.commits - before <= 80


async def test_a_wake_up_that_is_lost_costs_seconds_and_no_item(db: Database) -> None:
    async with Receiver() as receiver:
        async with dispatching(db, Flow("hook", url=f"{receiver.url}/ok")) as bench:
            await asyncio.sleep(0.1)
            await bench.source.commit([{"id": 1}])
            async with asyncio.timeout(10):
                await receiver.wait(1)


async def test_an_idle_dispatcher_writes_nothing(sqlite_db: Database) -> None:
    async with dispatching(sqlite_db, Flow("hook", url="http://127.0.0.1:9/")) as bench:
        await asyncio.sleep(0.3)
        before = sqlite_db.commits
        await asyncio.sleep(2.2)
        assert sqlite_db.commits == before
        assert bench.dispatcher.in_flight == 0


async def test_ten_percent_failing_heads_make_no_inversions(sqlite_db: Database) -> None:
    def decide(request: Received) -> str | bytes:
        return answer(503, retry_after="0") if hash((request.id, request.attempt)) % 10 == 0 else "ok"

    async with Receiver(decide=decide) as receiver:
        schedule = (timedelta(0),) * 30
        flow = Flow("hook", url=receiver.url, at_once=32)
        async with dispatching(sqlite_db, flow, schedule=schedule) as bench:
            for version in range(10):
                await bench.commit(*({"id": n, "version": version} for n in range(40)))
            await bench.until_done()
    seen: dict[int, list[int]] = defaultdict(list)
    for request in receiver.received:
        if item(request)["version"] not in seen[item(request)["id"]]:
            seen[item(request)["id"]].append(item(request)["version"])
    assert all(versions == list(range(10)) for versions in seen.values())
    assert len(seen) == 40
