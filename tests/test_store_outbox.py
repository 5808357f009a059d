"""The outbox: one commit for all, heads of lanes, leases and fences, settling, dead letters."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from datetime import timedelta

import pytest
from sqlalchemy import text

from tests.support.store import (
    LEASE,
    NOW,
    claim,
    commit,
    ended,
    know,
    new_item,
    proposal,
    run_record,
    seen_row,
    settle,
    settlement,
    start_python,
)
from watcher.errors import Conflict, StoreError
from watcher.store import deliveries, flows, items, runs, seen, states, watchers
from watcher.store.db import Database
from watcher.values import NewDelivery, Status, Verdict


async def heads(db: Database, flow: str = "f") -> list[int]:
    async with db.read() as tx:
        rows = await tx.execute(text(f"SELECT seq FROM delivery WHERE status = 0 AND head AND flow = '{flow}'"))
        return sorted(rows.scalars())


async def listed(db: Database, **filters: object) -> list[deliveries.DeliveryView]:
    async with db.read() as tx:
        return [*await deliveries.list(tx, limit=1000, **filters)][::-1]  # type: ignore[arg-type]


# --- commit


async def test_everything_a_run_found_is_committed_together(db: Database) -> None:
    await know(db, "w")
    found = [new_item("a", {"n": 1}, flows=("f", "g")), new_item("b", {"n": 2})]
    record = run_record(counts={"new": 2}, warnings=("odd",), logs="printed", tick_at=NOW)
    done = await db.write(
        lambda tx: runs.commit(tx, proposal(found, state=5, learn=[seen_row("a"), seen_row("b")], record=record))
    )
    assert (done.version, done.items, done.deliveries) == (1, 2, 3)
    async with db.read() as tx:
        assert (await states.load(tx, "w")).state == 5
        assert await seen.count(tx, "w") == 2
        (run,) = await runs.list(tx, "w")
        assert (run.id, run.outcome, run.counts, run.warnings, run.logs) == (
            done.run_id, "ok", {"new": 2}, ["odd"], "printed",
        )  # fmt: skip
        assert [i.key for i in await items.list(tx, "w")] == ["b", "a"]
        assert [i.payload for i in await items.list(tx, run_id=run.id)] == [{"item": {"n": 2}}, {"item": {"n": 1}}]
        status = await watchers.get(tx, "w")
    assert (status.success_at, status.found_at, status.tick_at, status.failures) == (NOW, NOW, NOW, 0)


async def test_conflict_writes_nothing_at_all(db: Database) -> None:
    await know(db, "w")
    await commit(db, state=1)
    doubled = proposal([new_item("a", 1)], expected=0, learn=[seen_row("a")])
    with pytest.raises(Conflict):
        await db.write(lambda tx: runs.commit(tx, doubled))
    assert await listed(db) == []
    async with db.read() as tx:
        assert len(await runs.list(tx)) == 1
        assert await seen.count(tx, "w") == 0


async def test_item_that_was_committed_before_is_not_sent_again(db: Database) -> None:
    """After a rollback or a restore of the state the same finds have the same ids."""
    await know(db, "w")
    await commit(db, [new_item("a", 1), new_item("b", 1)])
    await settle(db, [settlement(d) for d in await claim(db)])
    again = [new_item("a", 1), new_item("b", 1, flows=("f", "g")), new_item("c", 1)]
    done = await commit(db, again)
    assert (done.items, done.deliveries) == (1, 2)
    assert [(d.key, d.flow, d.status) for d in await listed(db)] == [
        ("a", "f", "delivered"), ("b", "f", "delivered"), ("b", "g", "pending"), ("c", "f", "pending"),
    ]  # fmt: skip
    assert [d.key for d in await claim(db, "g")] == ["b"]
    assert [d.key for d in await claim(db, "f")] == ["c"]


async def test_filter_that_failed_makes_a_dead_delivery_with_its_reason(db: Database) -> None:
    await know(db, "w")
    found = new_item("a", 1)
    (owed,) = found.deliveries
    dead = NewDelivery(owed.id, owed.flow, owed.lane, owed.due_at, dead="filter: item.points is not a number")
    await commit(db, [type(found)(**{f: getattr(found, f) for f in found.__slots__} | {"deliveries": (dead,)})])
    assert await claim(db) == []
    (row,) = await listed(db, status="dead")
    assert (row.note, row.settled_at) == ("filter: item.points is not a number", NOW)


@pytest.mark.parametrize("place", ["after_state_write", "mid_outbox", "before_commit"])
async def test_process_that_dies_in_the_middle_of_a_commit_leaves_nothing(db: Database, place: str) -> None:
    await know(db, "w")
    code = """
import asyncio, sys
from tests.support.store import commit, new_item, seen_row
from watcher.store.db import Database

async def main():
    db = await Database.open(sys.argv[1])
    await commit(db, [new_item("a", 1)], state=1, learn=[seen_row("a")])

asyncio.run(main())
"""
    env = {"WATCHER_TEST": "1", "WATCHER_FAILPOINT": f"{place}:kill"}
    code_, _, err = await ended(start_python(code, db.url, env=env))
    assert code_ == -9, err
    async with db.read() as tx:
        assert (await states.load(tx, "w")).version == 0
        assert await runs.list(tx) == []
        assert await seen.count(tx, "w") == 0
    assert await listed(db) == []
    assert (await commit(db, [new_item("a", 1)], state=1, learn=[seen_row("a")])).items == 1


# --- lanes


async def test_deliveries_about_one_key_go_out_one_after_another(db: Database) -> None:
    await know(db, "w")
    for price in (10, 12, 10):
        await commit(db, [new_item("a", {"price": price}, revision=price)])
    await commit(db, [new_item("b", {"price": 1})])
    sent = []
    while claimed := await claim(db):
        sent.append([(d.key, d.revision) for d in claimed])
        await settle(db, [settlement(d) for d in claimed])
    assert sent == [[("a", 10), ("b", 1)], [("a", 12)]]


async def test_head_in_backoff_holds_its_own_lane_only(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1), new_item("b", 1)])
    await commit(db, [new_item("a", 2, revision=2), new_item("b", 2, revision=2)])
    first = await claim(db)
    later = NOW + timedelta(minutes=5)
    await settle(db, [settlement(d, Verdict.PASSING, due_at=later) if d.key == "a" else settlement(d) for d in first])
    assert [(d.key, d.revision) for d in await claim(db)] == [("b", 2)]
    async with db.read() as tx:
        assert await deliveries.next_due(tx, ["f"], NOW) == NOW + LEASE
        assert await deliveries.due(tx, ["f", "g"], later) == {"f"}
    assert sorted((d.key, d.attempt) for d in await claim(db, now=later, token="u")) == [("a", 2), ("b", 2)]


async def test_lane_goes_on_when_its_head_dies(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", n, revision=n) for n in (1, 2)])
    (first,) = await claim(db)
    await settle(db, [settlement(first, Verdict.ITEM, status_code=422, note="refused")])
    assert [d.revision for d in await claim(db)] == [2]


async def test_order_by_watcher_is_the_order_of_commits(db: Database) -> None:
    await know(db, "w")
    for n in range(3):
        await commit(db, [new_item(f"{n}{m}", n, order="watcher") for m in range(3)])
    sent = []
    while claimed := await claim(db, limit=10):
        assert len(claimed) == 1
        sent += [d.key for d in claimed]
        await settle(db, [settlement(d) for d in claimed])
    assert sent == [f"{n}{m}" for n in range(3) for m in range(3)]


async def test_no_order_lets_all_go_at_once(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", n, revision=n, order="none") for n in range(5)])
    assert len(await claim(db)) == 5


async def test_flows_do_not_wait_for_each_other(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1, flows=("f", "g"))])
    await claim(db, "f")
    assert len(await claim(db, "g")) == 1


async def test_new_delivery_beside_one_that_is_being_settled_is_never_left_behind(db: Database) -> None:
    """Each commit adds to lanes whose head may be settled at that very moment, by another connection."""
    await know(db, *(f"w{n}" for n in range(4)))
    total = 4 * 12
    sent: defaultdict[str, list[int]] = defaultdict(list)

    async def produce(watcher: str) -> None:
        for n in range(12):
            await commit(db, [new_item("a", n, watcher=watcher, revision=n)], watcher=watcher)

    async def deliver(token: str) -> None:
        while sum(len(some) for some in sent.values()) < total:
            claimed = await claim(db, limit=4, token=token)
            for d in claimed:
                sent[d.watcher].append(d.revision)
            await settle(db, [settlement(d) for d in claimed], token=token)
            await asyncio.sleep(0)

    async with asyncio.timeout(60):
        await asyncio.gather(*(produce(f"w{n}") for n in range(4)), *(deliver(f"t{n}") for n in range(3)))
    assert all(revisions == sorted(revisions) for revisions in sent.values())
    assert await heads(db) == []


async def test_mending_sets_wrong_heads_right(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", n, revision=n) for n in range(3)] + [new_item("b", 1)])
    right = await heads(db)
    assert len(right) == 2
    await db.write(lambda tx: tx.execute(text("UPDATE delivery SET head = NOT head")))
    await db.write(deliveries.mend)
    assert await heads(db) == right


@pytest.mark.parametrize("lanes", ["one_lane", "as_many_lanes"])
async def test_claims_are_fast_with_a_hundred_thousand_waiting(db: Database, lanes: str) -> None:
    """A claim looks at what it claims, not at what waits."""
    await know(db, "w")
    await commit(db, [new_item("a", 1)])
    one, many = lanes == "one_lane", "int8send(i)" if db.dialect == "postgresql" else "CAST(i AS BLOB)"
    await db.write(
        lambda tx: tx.execute(
            text(
                "WITH RECURSIVE n (i) AS (SELECT CAST(2 AS bigint) UNION ALL SELECT i + 1 FROM n WHERE i < 100000) "
                "INSERT INTO delivery (seq, id, item_seq, watcher_id, flow, lane, status, head, attempts, starts, "
                "due_at, verdict, note) "
                f"SELECT i, 'id ' || i, item_seq, watcher_id, flow, {'lane' if one else many}, 0, {not one}, 0, 0, "
                "due_at, '', '' FROM n, delivery WHERE seq = 1"
            )
        )
    )
    if db.dialect == "postgresql":
        await db.write(lambda tx: tx.execute(text("ANALYZE delivery")))
    began = time.perf_counter()
    for _ in range(20):
        claimed = await claim(db, limit=8)
        assert len(claimed) == (1 if one else 8)
        await settle(db, [settlement(d) for d in claimed])
        async with db.read() as tx:
            assert await deliveries.due(tx, ["f"], NOW) == {"f"}
            assert await deliveries.next_due(tx, ["f"], NOW) == NOW
    assert (time.perf_counter() - began) / 20 < 0.1  # a scan of what waits takes longer on any machine


# --- leases and fences


async def test_claimed_delivery_is_nobody_elses_until_its_lease_ends(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1)])
    (first,) = await claim(db, token="slow")
    assert first.attempt == 1
    assert await claim(db, token="other") == []
    assert await claim(db, token="other", now=NOW + LEASE - timedelta(seconds=1)) == []
    (again,) = await claim(db, token="other", now=NOW + LEASE)
    assert (again.id, again.attempt) == (first.id, 2)


async def test_process_that_was_paused_past_its_lease_is_fenced_off(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1), new_item("b", 1)])
    slow = await claim(db, token="slow")
    late = NOW + LEASE
    (taken, _) = await claim(db, token="other", now=late)
    await settle(db, [settlement(taken)], token="other", now=late)
    fenced = await settle(db, [settlement(d, Verdict.PASSING, due_at=late) for d in slow], token="slow", now=late)
    assert fenced == {d.seq for d in slow}
    assert [(d.status, d.verdict) for d in await listed(db)] == [("delivered", "delivered"), ("pending", "")]
    async with db.read() as tx:
        assert [a.verdict for a in await deliveries.attempts(tx, taken.seq)] == ["delivered"]


async def test_settling_twice_writes_once(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1)])
    claimed = await claim(db)
    assert await settle(db, [settlement(d) for d in claimed]) == set()
    assert await settle(db, [settlement(d) for d in claimed]) == {claimed[0].seq}


async def test_released_claim_is_due_at_once_and_does_not_count(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1)])
    (first,) = await claim(db)
    await db.write(lambda tx: deliveries.release(tx, "t", [first.seq], NOW))
    (again,) = await claim(db)
    assert again.attempt == 1


async def test_twenty_claimers_share_four_thousand_without_a_double(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item(f"k{n}", n) for n in range(4000)])
    taken: list[int] = []

    async def work(token: str) -> None:
        while claimed := await claim(db, limit=50, token=token):
            taken.extend(d.seq for d in claimed)
            assert await settle(db, [settlement(d) for d in claimed], token=token) == set()

    await asyncio.gather(*(work(f"t{n}") for n in range(20)))
    assert len(taken) == len(set(taken)) == 4000


async def test_two_processes_share_the_outbox_without_a_double(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item(f"k{n}", n) for n in range(600)])
    code = """
import asyncio, sys
from tests.support.store import claim, settle, settlement
from watcher.store.db import Database

async def main():
    db = await Database.open(sys.argv[1])
    while claimed := await claim(db, limit=7, token=sys.argv[2]):
        for d in claimed:
            print(d.seq)
        assert await settle(db, [settlement(d) for d in claimed], token=sys.argv[2]) == set()
    await db.close()

asyncio.run(main())
"""
    taken: list[str] = []
    for code_, out, err in await asyncio.gather(*(ended(start_python(code, db.url, t)) for t in ("one", "two"))):
        assert code_ == 0, err
        taken += out.split()
    assert len(taken) == len(set(taken)) == 600


# --- outcomes


@pytest.mark.parametrize(
    ("verdict", "more", "status", "attempts"),
    [
        (Verdict.DELIVERED, {"status_code": 201}, Status.DELIVERED, 1),
        (Verdict.DUPLICATE, {"status_code": 409}, Status.DELIVERED, 1),
        (Verdict.ITEM, {"status_code": 422, "note": "no"}, Status.DEAD, 1),
        (Verdict.PASSING, {"due_at": NOW + timedelta(hours=1)}, Status.PENDING, 1),
        (Verdict.PASSING, {"dead": True, "note": "gave up"}, Status.DEAD, 1),
        (Verdict.TARGET, {"due_at": NOW}, Status.PENDING, 0),
    ],
)
async def test_outcome(db: Database, verdict: Verdict, more: dict[str, object], status: Status, attempts: int) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1)])
    (taken,) = await claim(db)
    await settle(db, [settlement(taken, verdict, answer=b"x" * 9000, **more)])
    (row,) = await listed(db)
    failed = status is not Status.DELIVERED
    assert (row.status, row.attempts, row.verdict) == (status.name.lower(), attempts, verdict.value)
    assert (row.first_failed_at, row.settled_at) == (NOW if failed else None, None if status is Status.PENDING else NOW)
    if status is Status.PENDING:
        assert row.due_at == more["due_at"]
    async with db.read() as tx:
        (tried,) = await deliveries.attempts(tx, row.seq)
        story = (await items.why(tx, None, "a"))[0]
    assert (tried.number, tried.verdict, tried.duration_ms, len(tried.answer)) == (1, verdict.value, 12, 4096)
    assert (story.watcher, len(story.items), story.deliveries, story.attempts) == ("w", 1, (row,), (tried,))


async def test_first_failure_is_remembered_over_later_ones(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1)])
    for n in range(3):
        at = NOW + timedelta(minutes=n)
        (taken,) = await claim(db, now=at)
        assert (taken.attempt, taken.first_failed_at) == (n + 1, NOW if n else None)
        await settle(db, [settlement(taken, Verdict.PASSING, due_at=at + timedelta(minutes=1))], now=at)


async def test_item_that_kills_its_sender_is_dead_after_ten_starts(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1), new_item("a", 2, revision=2)])
    at = NOW
    for _ in range(10):
        assert len(await claim(db, now=at)) == 1
        at += LEASE
    assert await claim(db, now=at) == []
    (dead,) = await listed(db, status="dead")
    assert dead.note.startswith("crashed")
    assert [d.revision for d in await claim(db, now=at)] == [2]


async def test_an_outcome_begins_the_count_of_starts_anew(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1)])
    for n in range(25):
        at = NOW + timedelta(hours=n)
        (taken,) = await claim(db, now=at)
        await settle(db, [settlement(taken, Verdict.PASSING, due_at=at)], now=at)


@pytest.mark.parametrize("column", ["payload", "key", "change", "revision"])
async def test_damaged_item_is_never_sent(db: Database, column: str) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1), new_item("b", 2)])
    damage = {"payload": "sha256", "key": "'c'", "change": "'removed'", "revision": "9"}[column]
    await db.write(lambda tx: tx.execute(text(f"UPDATE item SET {column} = {damage} WHERE key = 'a'")))
    assert [d.key for d in await claim(db)] == ["b"]
    (dead,) = await listed(db, status="dead")
    assert dead.note.startswith("damaged")


async def test_item_that_is_gone_does_not_stop_its_lane(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1), new_item("a", 2, revision=2)])
    await db.write(lambda tx: tx.execute(text("DELETE FROM item WHERE revision = 1")))
    assert await claim(db) == []
    assert [d.revision for d in await claim(db)] == [2]


async def test_dead_letter_is_replayed_under_the_same_id(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1), new_item("b", 1), new_item("a", 2, revision=2)])
    first, other = await claim(db)
    await settle(db, [settlement(first, Verdict.ITEM), settlement(other)])
    assert await db.write(lambda tx: deliveries.retry(tx, flow="g", now=NOW)) == 0
    assert await db.write(lambda tx: deliveries.retry(tx, watcher_name="w", since=NOW, now=NOW)) == 1
    (again,) = await claim(db)
    assert (again.id, again.attempt, again.first_failed_at) == (first.id, 1, None)
    await settle(db, [settlement(again)])
    assert [d.revision for d in await claim(db)] == [2]


async def test_replay_by_id_takes_delivered_ones_too(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1)])
    (first,) = await claim(db)
    await settle(db, [settlement(first)])
    assert await db.write(lambda tx: deliveries.retry(tx, [first.id], now=NOW)) == 1
    assert [d.id for d in await claim(db)] == [first.id]
    assert await db.write(lambda tx: deliveries.retry(tx, [first.id], now=NOW)) == 0  # somebody has it right now


async def test_backlog_counts_what_waits_and_what_is_dead(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item(f"k{n}", n, flows=("f", "g")) for n in range(3)])
    await commit(db, [new_item("later", 1)], at=NOW + timedelta(hours=1))
    await settle(db, [settlement(d, Verdict.ITEM) for d in await claim(db, "g", limit=2)])
    async with db.read() as tx:
        owed = await deliveries.pending(tx)
    assert owed == {"f": deliveries.Backlog(4, NOW, 0), "g": deliveries.Backlog(1, NOW, 2)}


async def test_listing_pages_backwards(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item(f"k{n}", n) for n in range(5)])
    async with db.read() as tx:
        first = await deliveries.list(tx, limit=2)
        rest = await deliveries.list(tx, limit=10, before=first[-1].seq)
        assert [d.key for d in [*first, *rest]] == ["k4", "k3", "k2", "k1", "k0"]
        assert await deliveries.get(tx, first[0].id) == first[0]
        assert (await items.get(tx, first[0].item_id)).key == "k4"  # type: ignore[union-attr]
        assert (await items.why(tx, "w", first[0].id))[0].key == "k4"
        assert await items.why(tx, None, "nothing") == []


# --- flows


async def test_flow_is_held_once_probed_and_freed(db: Database) -> None:
    probe = NOW + timedelta(seconds=30)
    assert await db.write(lambda tx: flows.hold(tx, "f", "503", probe, NOW))
    assert not await db.write(lambda tx: flows.hold(tx, "f", "503 again", probe + LEASE, NOW + LEASE))
    async with db.read() as tx:
        status = (await flows.held(tx))["f"]
    assert (status.held_since, status.held_reason, status.probe_at, status.probes) == (
        NOW, "503 again", probe + LEASE, 1,
    )  # fmt: skip
    await db.write(lambda tx: flows.pause(tx, "f", "holiday", NOW))
    assert await db.write(lambda tx: flows.end_hold(tx, "f", NOW))
    async with db.read() as tx:
        assert (await flows.held(tx))["f"].pause_reason == "holiday"
    assert await db.write(lambda tx: flows.resume(tx, "f", NOW))
    assert not await db.write(lambda tx: flows.resume(tx, "f", NOW))
    async with db.read() as tx:
        assert await flows.held(tx) == {}


async def test_flow_knows_when_it_last_took_something(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1)])
    await settle(db, [settlement(d) for d in await claim(db)])
    async with db.read() as tx:
        assert [(s.name, s.delivered_at) for s in await flows.everyone(tx)] == [("f", NOW)]


async def test_quarantined_plan_is_kept_until_it_is_approved(db: Database) -> None:
    await know(db, "w")
    id = await db.write(lambda tx: runs.record(tx, run_record(outcome="quarantined", plan=b"the plan")))
    await db.write(lambda tx: watchers.quarantine(tx, "w", "too much", id, NOW))
    async with db.read() as tx:
        assert await runs.plan(tx, id) == b"the plan"
        assert (await watchers.get(tx, "w")).quarantine_run == id
        with pytest.raises(StoreError, match="no plan"):
            await runs.plan(tx, id + 1)
    await commit(db, record=run_record(outcome="approved"))
    async with db.read() as tx:
        assert (await watchers.get(tx, "w")).quarantined_at is None
