"""One run: load, call, diff, commit, with a real database, real scripts and a real source."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from tests.support import site
from tests.support.running import ALL, KEYED, PAGED, PATIENT, WINDMILL, Bench, a, running
from watcher import ids
from watcher.errors import DatabaseFull, StoreError, TriggerError, WatcherError
from watcher.run import Plan
from watcher.store import meta, runs, states, watchers
from watcher.store.db import Database
from watcher.store.tables import seen as seen_table
from watcher.store.tables import state as state_table
from watcher.values import Flow, MaxChange


@pytest.fixture
async def bench(db: Database, tmp_path: Path, now: datetime) -> AsyncIterator[Bench]:
    async with running(db, tmp_path, now) as bench:
        yield bench


# --- what is committed ------------------------------------------------------------------------------------------------


async def test_the_first_run_learns_and_the_second_finds(bench: Bench) -> None:
    first = await bench.run(a(1), a(2))
    assert (first.outcome, first.counts) == ("ok", {"baseline": 2})
    assert await bench.keys() == []
    second = await bench.run(a(3), a(1), a(2))
    assert (second.outcome, second.counts) == ("ok", {"new": 1, "seen": 2})
    (item,) = await bench.found()
    assert (item.key, item.change, item.revision, item.payload) == ("3", "new", 1, {"item": a(3)})
    (delivery,) = await bench.owed()
    assert (delivery.flow, delivery.status, delivery.due_at) == ("f", "pending", bench.now)
    assert delivery.id == ids.delivery_id(item.id, "f")
    assert bench.woken == ["f"]
    async with bench.db.read() as tx:
        epoch = await meta.epoch(tx)
    assert item.id == ids.item_id(epoch, "w", ids.key_hash("3"), 1, ids.content_hash(a(3)), "new")


async def test_a_change_is_sent_with_what_it_was_before(bench: Bench) -> None:
    bench.configure(on=("new", "changed", "removed"))
    await bench.run(a(1, price=10), a(2))
    await bench.run(a(1, price=12), a(2))
    await bench.run(a(1, price=12))
    changed, removed = await bench.found()
    assert changed.payload == {
        "item": a(1, price=12),
        "previous": a(1, price=10),
        "patch": [{"op": "replace", "path": "/price", "value": 12}],
    }
    assert (removed.change, removed.payload) == ("removed", {"item": a(2)})


async def test_each_run_of_a_labelled_script_has_an_empty_shared_directory_that_goes_with_it(bench: Bench) -> None:
    bench.configure(first_run=ALL, args={})
    bench.script("""
        from watcher import shared, trigger

        @trigger(key="id")
        def main():
            (shared() / "download").write_text("x")
            return [{"id": str(shared()), "holds": [path.name for path in shared().iterdir()]}]
        """)
    await bench.runner.run("w")
    await bench.runner.run("w")
    first, second = [item.payload["item"] for item in await bench.found()]
    assert (first["holds"], second["holds"]) == (["download"], ["download"])
    assert first["id"] != second["id"]
    assert not Path(first["id"]).parent.exists()
    assert not Path(second["id"]).parent.exists()


async def test_a_renamed_watcher_keeps_its_memory_and_its_ids(bench: Bench) -> None:
    bench.configure(first_run=ALL)
    await bench.run(a(1))
    bench.configure(name="v", was="w", flows=("f",))
    await bench.sync()
    bench.items = [a(1), a(2)]
    await bench.runner.run("v")
    first, second = await bench.found()
    assert second.key == "2"
    async with bench.db.read() as tx:
        epoch = await meta.epoch(tx)
    assert second.id == ids.item_id(epoch, "w", ids.key_hash("2"), 1, ids.content_hash(a(2)), "new")
    assert first.watcher == "v"


async def test_each_flow_gets_what_its_filter_lets_through(bench: Bench) -> None:
    bench.flows = {
        "all": Flow("all", order="watcher"),
        "some": Flow("some", filter="item.points > 10"),
        "off": Flow("off", enabled=False),
    }
    bench.configure(first_run=ALL, flows=("all", "some", "off", "gone"))
    record = await bench.run(a(1, points=5), a(2, points=50), a(3))
    owed = {(d.key, d.flow): d for d in await bench.owed()}
    assert set(owed) == {(k, f) for k in "123" for f in ("all", "gone")} | {("2", "some"), ("3", "some")}
    assert owed["3", "some"].status == "dead"
    assert "flows.some.filter failed" in owed["3", "some"].note
    assert [item.note for item in await bench.found()] == [
        "disabled: off, filtered: some", "disabled: off", "disabled: off"
    ]  # fmt: skip
    assert record.counts == {"new": 3, "filtered": 1}


async def test_an_item_above_the_cap_arrives_at_the_next_poll(bench: Bench) -> None:
    bench.configure(first_run=ALL, max_items=2)
    record = await bench.run(*(a(n) for n in range(5)))
    minute = timedelta(minutes=1)
    assert [d.due_at - bench.now for d in await bench.owed()] == [0 * minute] * 2 + [minute] * 2 + [2 * minute]
    assert record.counts == {"new": 2, "over_cap": 3}


async def test_the_surplus_of_a_cron_watcher_is_due_at_its_own_pace(bench: Bench) -> None:
    bench.configure(first_run=ALL, max_items=1, every=None, cron="@hourly", timezone="Europe/Paris")
    await bench.run(a(1), a(2))
    assert [d.due_at - bench.now for d in await bench.owed()] == [timedelta(), timedelta(hours=1)]


async def test_what_no_database_takes_as_text_is_committed_all_the_same(bench: Bench) -> None:
    bench.configure(first_run=ALL, on=("new", "changed"))
    bench.site.on("/items", site.Answer(200, rb'[{"id":"\ud83d\u0000","text":"\ud83d\u0000"}]'))
    await bench.run()
    (item,) = await bench.found()
    assert item.key == r"\ud83d\u0000"
    assert item.payload == {"item": {"id": "\ud83d\0", "text": "\ud83d\0"}}
    assert (await bench.run()).outcome == "quiet"
    bench.script(KEYED.replace("return ", r"raise ValueError('\0 \ud83d') #"))
    assert (await bench.run()).error == r"ValueError: \u0000 \ud83d"


# --- quiet runs -------------------------------------------------------------------------------------------------------


async def test_a_run_that_finds_nothing_opens_no_write_transaction(bench: Bench) -> None:
    await bench.run(a(1))
    before, commits = await bench.memory(), bench.db.commits
    for _ in range(5):
        assert (await bench.run(tick=True)).outcome == "quiet"
    assert bench.db.commits == commits
    assert await bench.memory() == before
    assert (await bench.status()).quiet_runs == 0
    await bench.runner.flush()
    status = await bench.status()
    assert (status.quiet_runs, status.checked_at, status.success_at, status.tick_at) == (5, *[bench.now] * 3)
    assert len(await bench.runs()) == 1
    assert bench.db.commits == commits + 1


async def test_what_quiet_runs_left_goes_along_with_the_next_commit(bench: Bench) -> None:
    await bench.run(a(1))
    await bench.run()
    commits = bench.db.commits
    await bench.run(a(1), a(2))
    assert (await bench.status()).quiet_runs == 1
    if bench.db.dialect == "sqlite":
        assert bench.db.commits == commits + 1


async def test_what_could_not_be_flushed_is_flushed_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.run(a(1))
    await bench.run()
    write = bench.db.write

    async def full(*_: Any, **__: Any) -> None:
        raise DatabaseFull("no space")

    monkeypatch.setattr(bench.db, "write", full)
    with pytest.raises(DatabaseFull):
        await bench.runner.flush()
    monkeypatch.setattr(bench.db, "write", write)
    bench.runner.note_ticks("w", skipped=2, missed=3)
    await bench.runner.flush()
    status = await bench.status()
    assert (status.quiet_runs, status.skipped_ticks, status.missed_ticks) == (1, 2, 3)


async def test_an_empty_source_is_a_baseline_too(bench: Bench) -> None:
    assert (await bench.run()).outcome == "ok"
    assert (await bench.run()).outcome == "quiet"
    await bench.run(a(1))
    assert await bench.keys() == ["1"]


# --- validators -------------------------------------------------------------------------------------------------------


def etag(bench: Bench, tag: str, *items: Any) -> None:
    bench.site.on("/items", site.conditional(json.dumps(items).encode(), f'"{tag}"'))


def conditions(bench: Bench) -> list[str | None]:
    return [asked.headers.get("if-none-match") for asked in bench.site.asked]


async def test_an_unchanged_source_is_asked_conditionally_and_diffed_not_at_all(bench: Bench) -> None:
    bench.script(PATIENT)
    etag(bench, "1", a(1))
    await bench.run()
    assert (await bench.memory()).validators
    bench.runner = bench.another()
    bench.fetcher._kept.clear()
    assert (await bench.run()).outcome == "quiet"
    assert conditions(bench) == [None, '"1"']
    etag(bench, "2", a(1), a(2))
    await bench.run()
    assert await bench.keys() == ["2"]


async def test_validators_of_a_quiet_run_are_used_without_being_stored(bench: Bench) -> None:
    bench.script(PATIENT)
    etag(bench, "1", a(1))
    await bench.run()
    etag(bench, "2", a(1, edited=True))
    commits = bench.db.commits
    for _ in range(2):
        bench.fetcher._kept.clear()
        assert (await bench.run()).outcome == "quiet"
    assert conditions(bench) == [None, '"1"', '"2"']
    assert bench.db.commits == commits


async def test_a_failed_run_keeps_no_validators_so_that_no_304_hides_what_was_never_committed(bench: Bench) -> None:
    bench.script(PATIENT)
    etag(bench, "1", a(1))
    await bench.run()
    etag(bench, "2", a(1), a(2))
    bench.script(PATIENT.replace("return (await", "items = (await") + "    raise ValueError(len(items))\n")
    assert (await bench.run()).outcome == "failed"
    bench.script(PATIENT)
    bench.fetcher._kept.clear()
    await bench.run()
    assert await bench.keys() == ["2"]
    assert '"2"' not in conditions(bench)


async def test_a_commit_that_failed_keeps_no_validators(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.script(PATIENT)
    etag(bench, "1", a(1))
    await bench.run()
    etag(bench, "2", a(1), a(2))
    write = bench.db.write

    async def full(*_: Any, **__: Any) -> None:
        raise DatabaseFull("no space")

    monkeypatch.setattr(bench.db, "write", full)
    with pytest.raises(DatabaseFull):
        await bench.run()
    monkeypatch.setattr(bench.db, "write", write)
    bench.fetcher._kept.clear()
    await bench.run()
    assert await bench.keys() == ["2"]


@pytest.mark.parametrize("edit", ["script", "args", "key", "on"])
async def test_an_edited_watcher_asks_its_source_anew(bench: Bench, edit: str) -> None:
    bench.script(PATIENT)
    etag(bench, "1", a(1, slug="one"))
    await bench.run()
    match edit:
        case "script":
            bench.script(PATIENT + "# another filter\n")
        case "args":
            bench.script(PATIENT.replace("url: str", "url: str, more: int = 0"))
            await bench.run()
            bench.configure(args={**bench.watcher.args, "more": 1})
        case "key":
            bench.configure(key="slug")
        case "on":
            bench.configure(on=("new", "changed"))
    bench.site.asked.clear()
    bench.fetcher._kept.clear()
    await bench.run()
    assert conditions(bench) == [None]
    assert await bench.keys() == []


# --- state ------------------------------------------------------------------------------------------------------------


async def test_a_windmill_script_keeps_its_state_with_its_items(bench: Bench) -> None:
    bench.script(WINDMILL)
    await bench.run(a(1), a(2))
    assert (await bench.memory()).state == 2
    assert await bench.keys() == []
    await bench.run(a(1), a(2), a(3))
    assert (await bench.memory()).state == 3
    assert await bench.keys() == ["3"]
    commits = bench.db.commits
    assert (await bench.run()).outcome == "quiet"
    assert bench.db.commits == commits


async def test_state_that_was_set_by_a_failing_script_is_forgotten(bench: Bench) -> None:
    bench.script(WINDMILL)
    await bench.run(a(1))
    bench.script(WINDMILL.replace("return rows", "raise RuntimeError('boom')"))
    record = await bench.run(a(1), a(2))
    assert (record.outcome, record.error_kind, record.error) == ("failed", "raised", "RuntimeError: boom")
    assert "boom" in record.detail
    assert (await bench.memory()).state == 1
    bench.script(WINDMILL)
    await bench.run()
    assert await bench.keys() == ["2"]


async def test_a_state_that_another_run_moved_meanwhile_is_a_conflict_and_nothing_is_written(bench: Bench) -> None:
    await bench.run(a(1))
    bench.items = [a(1), a(2)]
    one, other = await asyncio.gather(bench.runner.run("w"), bench.another().run("w"))
    outcomes = {one.outcome, other.outcome}
    assert outcomes in ({"ok", "conflict"}, {"ok", "quiet"})
    assert await bench.times() == {"2": 1}
    if "conflict" in outcomes:
        assert (await bench.runs())[0].outcome == "conflict"


async def test_the_tick_of_every_run_is_remembered(bench: Bench) -> None:
    await bench.run(a(1), tick=True)
    assert (await bench.status()).tick_at == bench.now
    bench.site.on("/items", site.error())
    await bench.run(tick=True)
    await bench.runner.flush()
    assert (await bench.status()).tick_at == bench.now


# --- failures ---------------------------------------------------------------------------------------------------------


async def test_a_failing_watcher_backs_off_and_its_state_stays_as_it_was(bench: Bench) -> None:
    await bench.run(a(1))
    before = await bench.memory()
    bench.site.on("/items", site.error(500))
    spans = []
    for _ in range(9):
        bench.now = max(bench.now, (await bench.status()).backoff_until or bench.now)
        record = await bench.run()
        assert (record.outcome, record.error_kind) == ("failed", "http")
        spans.append(((await bench.status()).backoff_until or bench.now) - bench.now)
    half = timedelta(seconds=30)
    assert spans == [timedelta(), *(timedelta(minutes=m) - half for m in (2, 4, 8, 16, 32, 60, 60, 60))]
    status = await bench.status()
    assert status.failures == 9
    assert await bench.memory() == before
    bench.now += timedelta(minutes=1)
    assert "tried again from" in (await bench.run(tick=True)).warnings[0]
    assert len(bench.site.asked) == 10
    bench.url = bench.site.on("/items", lambda asked: site.json([a(1), a(2)]))
    assert (await bench.run()).outcome == "ok"
    assert await bench.keys() == ["2"]
    status = await bench.status()
    assert (status.failures, status.backoff_until, status.failing_since) == (0, None, None)


async def test_a_quiet_success_ends_the_failing_at_once(bench: Bench) -> None:
    await bench.run(a(1))
    bench.site.on("/items", site.error(500), lambda asked: site.json([a(1)]))
    await bench.run()
    assert (await bench.status()).failures == 1
    assert (await bench.run()).outcome == "quiet"
    assert (await bench.status()).failures == 0


@pytest.fixture
def info() -> Iterator[None]:
    """Events of level `info` are heard."""
    before = structlog.get_config()
    structlog.configure(**{**before, "wrapper_class": structlog.make_filtering_bound_logger(20)})
    yield
    structlog.configure(**before)


@pytest.mark.usefixtures("info")
async def test_one_notice_when_a_watcher_starts_failing_and_one_when_it_recovers(bench: Bench) -> None:
    await bench.run(a(1))
    bench.site.on("/items", *[site.error(500)] * 3, lambda asked: site.json([a(1)]))
    with capture_logs() as events:
        for _ in range(5):
            await bench.run()
    told = [event["event"] for event in events if event["event"].startswith("watcher.")]
    assert told == ["watcher.failing", "watcher.recovered"]


async def test_a_source_that_says_when_to_come_back_is_left_alone_until_then(bench: Bench) -> None:
    bench.site.on("/items", site.too_many(600), lambda asked: site.json([a(1)]))
    record = await bench.run(tick=True)
    assert record.outcome == "failed"
    again = (await bench.status()).backoff_until
    assert again is not None
    assert timedelta(seconds=590) <= again - bench.now <= timedelta(seconds=601)
    assert (await bench.run(tick=True)).warnings
    assert len(bench.site.asked) == 1


async def test_a_paused_watcher_takes_no_tick_and_still_runs_by_hand(bench: Bench) -> None:
    await bench.db.write(lambda tx: watchers.pause(tx, "w", "holidays", bench.now))
    assert (await bench.run(a(1), tick=True)).warnings == ("paused: holidays",)
    assert (await bench.memory()).version == 0
    assert (await bench.run()).outcome == "ok"


async def test_a_reference_that_leads_nowhere_fails_the_run(bench: Bench) -> None:
    bench.configure(args={"url": "$var:nowhere"})
    record = await bench.run()
    assert record.outcome == "failed"
    assert "there is no variable nowhere" in record.error


async def test_a_watcher_that_is_not_configured_is_an_error(bench: Bench) -> None:
    with pytest.raises(WatcherError, match="no such watcher"):
        await bench.runner.run("nobody")


async def test_a_database_that_cannot_be_read_is_an_error_and_no_first_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.run(a(1))

    async def broken(*_: Any) -> None:
        raise StoreError("locked")

    with monkeypatch.context() as patched:
        patched.setattr(states, "load", broken)
        with pytest.raises(StoreError):
            await bench.run(a(1), a(2))
    assert await bench.keys() == []
    await bench.run()
    assert await bench.keys() == ["2"]


# --- damage and doubt -------------------------------------------------------------------------------------------------


async def test_damaged_state_quarantines_the_watcher_and_is_never_diffed(bench: Bench) -> None:
    await bench.run(a(1))
    memory = await bench.memory()
    await bench.db.write(lambda tx: tx.execute(state_table.update().values(sha256=b"x" * 32)))
    record = await bench.run(a(1), a(2))
    assert (record.outcome, record.error_kind) == ("quarantined", "damaged")
    assert "state rollback" in record.error
    assert (await bench.status()).quarantined_at == bench.now
    assert await bench.keys() == []
    assert (await bench.run()).outcome == "quarantined"
    with pytest.raises(WatcherError, match="without a plan"):
        await bench.runner.approve("w")
    async with bench.db.read() as tx:
        kept = await states.version(tx, "w", memory.version)
    await bench.db.write(lambda tx: states.put(tx, "w", kept, memory.version, bench.now, None, "rollback"))
    await bench.db.write(lambda tx: watchers.resume(tx, "w", bench.now))
    assert (await bench.run()).outcome == "ok"
    assert await bench.keys() == ["2"]


async def test_damage_is_told_once_and_not_at_each_tick(bench: Bench) -> None:
    await bench.run(a(1))
    await bench.db.write(lambda tx: tx.execute(state_table.update().values(sha256=b"x" * 32)))
    for _ in range(3):
        assert (await bench.run(a(1), tick=True)).outcome == "quarantined"
    async with bench.db.read() as tx:
        told = [run for run in await runs.list(tx, "w", 10) if run.outcome == "quarantined"]
    assert len(told) == 1


async def test_a_damaged_ledger_quarantines_too(bench: Bench) -> None:
    bench.configure(on=("new", "changed"))
    await bench.run(a(1, v=1))
    await bench.db.write(lambda tx: tx.execute(seen_table.update().values(value=b'{"id":1,"v":9}')))
    record = await bench.run(a(1, v=2))
    assert (record.outcome, record.error_kind) == ("quarantined", "damaged")
    assert await bench.keys() == []


async def test_an_upheaval_waits_for_approval_and_approve_commits_precisely_that(bench: Bench) -> None:
    bench.configure(on=("new", "removed"), max_change=MaxChange(share=0.5, floor=0))
    await bench.run(*(a(n) for n in range(4)))
    before = await bench.memory()
    record = await bench.run(a(0), tick=True)
    assert record.outcome == "quarantined"
    assert "3 changes at once" in record.error
    assert await bench.memory() == before
    assert await bench.keys() == []
    assert (await bench.run(*(a(n) for n in range(4)), tick=True)).outcome == "quarantined"
    bench.items = [a(9)]
    approved = await bench.runner.approve("w")
    assert approved.outcome == "approved"
    assert [(i.change, i.key) for i in await bench.found()] == [("removed", k) for k in "123"]
    assert len(await bench.owed()) == 3
    assert (await bench.status()).quarantined_at is None
    with pytest.raises(WatcherError, match="nothing to approve"):
        await bench.runner.approve("w")


async def test_resume_drops_a_quarantine_and_looks_again(bench: Bench) -> None:
    bench.configure(max_change=MaxChange(share=None, count=1))
    await bench.run(a(0))
    assert (await bench.run(a(0), a(1), a(2))).outcome == "quarantined"
    await bench.db.write(lambda tx: watchers.resume(tx, "w", bench.now))
    assert (await bench.run(a(0), a(2))).outcome == "ok"
    assert await bench.keys() == ["2"]


async def test_a_plan_whose_state_was_moved_since_cannot_be_approved(bench: Bench) -> None:
    bench.configure(max_change=MaxChange(share=None, count=0))
    await bench.run(a(0))
    await bench.run(a(0), a(1))
    memory = await bench.memory()
    await bench.db.write(lambda tx: states.put(tx, "w", memory, memory.version, bench.now, None, "by hand"))
    assert (await bench.runner.approve("w")).outcome == "conflict"
    assert await bench.keys() == []
    assert (await bench.status()).quarantined_at is not None


@pytest.mark.parametrize(
    "answer", [site.html(), site.truncated([a(1), a(2), a(3)]), site.error(), site.json({}), site.json([])],
    ids=["login page", "truncated", "500", "object", "empty"],
)  # fmt: skip
async def test_an_answer_that_is_none_removes_nothing(bench: Bench, answer: site.Answer) -> None:
    bench.configure(on=("new", "changed", "removed"))
    await bench.run(a(1), a(2), a(3))
    before = await bench.memory()
    bench.site.on("/items", answer)
    assert (await bench.run()).outcome in ("failed", "quarantined")
    assert await bench.memory() == before
    assert await bench.keys() == []


# --- plans ------------------------------------------------------------------------------------------------------------


async def test_a_plan_saves_nothing_and_apply_commits_precisely_it(bench: Bench) -> None:
    bench.configure(on=("new", "changed"), max_items=2)
    bench.flows["g"] = Flow("g", filter="item.v > 1")
    bench.configure(flows=("f", "g"))
    await bench.run(a(1, v=1))
    commits = bench.db.commits
    bench.items = [a(1, v=2), a(2, v=1), a(3, v=0)]
    plan = await bench.runner.plan("w")
    assert bench.db.commits == commits
    assert [(d.key, d.reason) for d in plan.decisions] == [
        ("1", "changed"), ("2", "new"), ("3", "over_cap"), ("2", "filtered"), ("3", "filtered")
    ]  # fmt: skip
    shown = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(shown) == replace(plan, proposal=Plan.from_json(shown).proposal)
    bench.items = [a(4)]
    bench.now += timedelta(hours=1)
    record = await bench.runner.apply(Plan.from_json(shown))
    assert record.outcome == "ok"
    assert [(i.id, i.key, i.payload, i.note) for i in await bench.found()] == [
        (i["id"], i["key"], i["payload"], i["note"]) for i in shown["items"]
    ]
    assert {(d.id, d.flow) for d in await bench.owed()} == {
        (d["id"], d["flow"]) for i in shown["items"] for d in i["deliveries"]
    }
    bench.items = [a(1, v=2), a(2, v=1), a(3, v=0)]
    assert (await bench.run()).outcome == "quiet"


async def test_a_plan_is_applied_once(bench: Bench) -> None:
    await bench.run(a(1))
    bench.items = [a(1), a(2)]
    plan = await bench.runner.plan("w")
    assert (await bench.runner.apply(plan)).outcome == "ok"
    again = await bench.runner.apply(plan)
    assert again.outcome == "conflict"
    assert "another run committed first" in again.error
    assert await bench.keys() == ["2"]


async def test_a_plan_made_before_a_restore_is_a_conflict(bench: Bench) -> None:
    await bench.run(a(1))
    plan = await bench.runner.plan("w")
    await bench.db.write(meta.renew_epoch)
    record = await bench.runner.apply(plan)
    assert record.outcome == "conflict"
    assert "restored" in record.error


async def test_a_plan_shows_why_it_would_not_be_committed(bench: Bench) -> None:
    bench.configure(max_change=MaxChange(share=None, count=0))
    await bench.run(a(1))
    bench.items = [a(1), a(2)]
    plan = await bench.runner.plan("w")
    assert "max_change allows 0" in plan.quarantine
    assert (await bench.status()).quarantined_at is None
    assert (await bench.runner.apply(Plan.from_json(plan.to_json()))).outcome == "approved"


async def test_a_plan_lists_what_is_seen_even_if_the_source_did_not_move(bench: Bench) -> None:
    bench.script(PATIENT)
    etag(bench, "1", a(1))
    await bench.run()
    assert [(d.key, d.reason) for d in (await bench.runner.plan("w")).decisions] == [("1", "seen")]


@pytest.mark.parametrize("odd", [None, [], {}, {"format": 9}, {"format": 1}, "x"])
def test_what_is_no_plan_is_refused(odd: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Plan.from_json(odd)


# --- recordings -------------------------------------------------------------------------------------------------------


async def test_a_recorded_fetch_is_run_again_offline(bench: Bench, tmp_path: Path) -> None:
    await bench.run(a(1))
    bench.items = [a(1), a(2), a(3)]
    file = tmp_path / "recording.json"
    plan = await bench.runner.plan("w", record=file)
    assert file.stat().st_mode & 0o777 == 0o600
    await bench.run()
    bench.site.asked.clear()
    commits = bench.db.commits
    tested = await bench.runner.test("w", file)
    assert [(d.key, d.reason) for d in tested.decisions] == [(d.key, d.reason) for d in plan.decisions]
    assert bench.site.asked == []
    assert bench.db.commits == commits
    bench.script(KEYED.replace(".json()", ".json()[2:]"))
    assert [i.key for i in (await bench.runner.test("w", file)).proposal.items] == ["3"]


async def test_a_recording_holds_every_page_and_no_credentials(bench: Bench, tmp_path: Path) -> None:
    bench.script(PAGED.replace('{"page": page}', '{"page": page, "token": "hunter2hunter2"}'))
    bench.items = [a(n) for n in range(50)]
    listing = site.Listing(bench.items, 20)
    bench.site.on("/items", listing.numbered)
    bench.configure(first_run=ALL)
    file = tmp_path / "recording.json"
    record = await bench.runner.run("w", record=file)
    assert record.counts == {"new": 50}
    assert "hunter2" not in file.read_text()
    assert len((await bench.runner.test("w", file)).proposal.items) == 50


async def test_what_the_recording_does_not_hold_is_an_error(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "recording.json"
    await bench.runner.plan("w", record=file)
    bench.configure(args={"url": bench.site.url + "/other"})
    with pytest.raises(TriggerError, match=r"holds no answer to GET .*/other"):
        await bench.runner.test("w", file)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "\xff"])
async def test_what_is_no_recording_is_refused(bench: Bench, tmp_path: Path, text: str) -> None:
    file = tmp_path / "recording.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match="is no recording"):
        await bench.runner.test("w", file)


# --- paging -----------------------------------------------------------------------------------------------------------


async def test_paging_stops_at_a_page_that_is_known(bench: Bench) -> None:
    bench.script(PAGED)
    bench.items = [a(n) for n in range(100)]
    bench.site.on("/items", lambda asked: site.Listing(bench.items, 20).numbered(asked))
    await bench.run()
    assert len(bench.site.asked) == 6  # the baseline is everything
    bench.site.asked.clear()
    assert (await bench.run()).outcome == "quiet"
    assert len(bench.site.asked) == 1
    bench.items = [a(f"new {n}") for n in range(25)] + bench.items
    bench.site.asked.clear()
    await bench.run()
    assert len(await bench.keys()) == 25
    assert len(bench.site.asked) == 3


async def test_a_source_that_lists_the_oldest_first_is_read_whole_now_and_then(bench: Bench) -> None:
    bench.script(PAGED)
    bench.items = [a(n) for n in range(60)]
    bench.site.on("/items", lambda asked: site.Listing(bench.items, 20).numbered(asked))
    await bench.run()
    bench.items.append(a("last"))
    assert (await bench.run()).outcome == "quiet"
    await bench.run(minutes=61)
    assert await bench.keys() == ["last"]


async def test_a_gap_is_told(bench: Bench) -> None:
    await bench.run(*(a(n) for n in range(20)))
    record = await bench.run(*(a(n) for n in range(50, 70)))
    assert "none of the 20 listed items was known" in record.gap
    assert (await bench.runs())[0].gap == record.gap


# --- what is forgotten ------------------------------------------------------------------------------------------------


async def test_a_key_that_is_still_listed_is_touched_once_a_day(bench: Bench) -> None:
    bench.configure(forget_after=timedelta(days=30))
    await bench.run(a(1))
    assert (await bench.run()).outcome == "quiet"
    assert (await bench.run(minutes=24 * 60)).outcome == "ok"
    assert (await bench.run()).outcome == "quiet"


async def test_where_keys_are_forgotten_the_source_is_read_in_full_now_and_then(bench: Bench) -> None:
    bench.script(PATIENT)
    bench.configure(forget_after=timedelta(days=2))
    etag(bench, "1", a(1))
    from watcher.store import retention

    for _ in range(10):
        await bench.run(minutes=12 * 60)
        await retention.forget(bench.db, "w", forget_after=timedelta(days=2))
    assert await bench.known() == 1
    assert await bench.keys() == []


async def test_after_a_reset_the_next_run_is_a_first_run_and_ids_stay_honest(bench: Bench) -> None:
    bench.configure(first_run=ALL, on=("new", "changed"))
    for v in (10, 12, 10):
        await bench.run(a(1, v=v))
    before = {item.id for item in await bench.found()}
    await bench.db.write(lambda tx: states.reset(tx, "w", bench.now))
    await bench.run(a(1, v=10))
    for v in (12, 10):
        await bench.run(a(1, v=v))
    found = await bench.found()
    assert len({item.id for item in found}) == len(found)
    assert [item.change for item in found if item.id not in before] == ["new", "changed", "changed"]


async def test_after_a_reset_what_was_sent_is_not_sent_again(bench: Bench) -> None:
    bench.configure(first_run=ALL)
    await bench.run(a(1), a(2))
    await bench.db.write(lambda tx: states.reset(tx, "w", bench.now))
    await bench.run(a(1), a(2), a(3))
    assert await bench.times() == {"1": 1, "2": 1, "3": 1}


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_one_hundred_thousand_items_fit_into_512_mebibytes(tmp_path: Path) -> None:
    """The whole path in a process of its own, whose peak is measured: worker's answer, diff, commit."""
    code = """
import asyncio, resource, sys, time
from datetime import UTC, datetime
from pathlib import Path
from watcher.http.fetcher import Fetcher
from watcher.resolve import Resolver
from watcher.run import Runner
from watcher.scripts import Scripts
from watcher.store import migrate, watchers, items
from watcher.store.db import Database
from watcher.values import *
folder = Path(sys.argv[1])
(folder / "w.py").write_text('''
from watcher import trigger
@trigger(key="id", on=("new", "changed", "removed"))
def main():
    return [{"id": n, "title": f"the title of number {n}", "body": "some words " * 20} for n in range(100_000)]
''')
now = datetime(2026, 3, 1, tzinfo=UTC)
watcher = Watcher("w", "./w.py", folder / "w.py", ("f",), first_run=FirstRun("all"))
config = Config(None, "", folder, flows={"f": Flow("f")}, watchers={"w": watcher})
async def main():
    db = await Database.open(f"sqlite:///{folder}/watcher.db")
    await migrate.upgrade(db, backup_to=None, now=now)
    await db.write(lambda tx: watchers.sync(tx, {"w": None}, now))
    scripts, fetcher = Scripts(ScriptSettings()), Fetcher(HttpSettings(), lambda: now)
    runner = Runner(lambda: config, db, scripts, fetcher, Resolver(lambda: config, db, None), lambda: now, print)
    stall, late = 0.0, asyncio.Event()
    async def beat():
        nonlocal stall
        while not late.is_set():
            before = time.monotonic()
            await asyncio.sleep(0.01)
            stall = max(stall, time.monotonic() - before - 0.01)
    beating = asyncio.create_task(beat())
    first = await runner.run("w")
    second = await runner.run("w")
    late.set(); await beating
    await scripts.close(); await fetcher.close(); await db.close()
    print(first.outcome, first.counts, second.outcome, round(stall, 2), file=sys.stderr)
    assert first.counts["new"] + first.counts["over_cap"] == 100_000 and second.outcome == "quiet"
asyncio.run(main())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 512 * 1024, done.stderr


# --- a script that is edited ------------------------------------------------------------------------------------------

BARE = """
from watcher import http

def main(url: str):
    return http.sync.get(url).json()
"""


async def test_a_script_replaced_between_its_description_and_its_run_is_looked_at_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.run(a(1), a(2))
    bench.script(BARE)  # whatever this one returns is new
    describe = bench.scripts.describe

    async def slow(script: Path) -> Any:
        described = await describe(script)
        if described.style == "windmill":
            bench.script(KEYED)
        return described

    monkeypatch.setattr(bench.scripts, "describe", slow)
    found = await bench.run(a(3), a(1), a(2))
    assert (found.outcome, found.counts) == ("ok", {"new": 1, "seen": 2})
    assert await bench.keys() == ["3"]


async def test_a_script_that_is_never_the_one_described_fails_and_changes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.run(a(1), a(2))
    before = await bench.memory()
    describe = bench.scripts.describe

    async def slow(script: Path) -> Any:
        bench.script(BARE)
        described = await describe(script)
        bench.script(KEYED)
        return described

    monkeypatch.setattr(bench.scripts, "describe", slow)
    failed = await bench.run(a(3), a(1), a(2))
    assert (failed.outcome, failed.error_kind) == ("failed", "edited")
    assert "edited while it ran" in failed.error
    assert (await bench.memory(), await bench.keys()) == (before, [])
