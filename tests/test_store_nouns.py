"""Watchers, jobs, settings and retention, on both databases."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.support.store import LEASE, NOW, claim, commit, know, new_item, run_record, seen_row, settle, settlement
from watcher.errors import Conflict, Damaged, StoreError
from watcher.store import (
    audit,
    deliveries,
    items,
    jobs,
    resources,
    retention,
    runs,
    seen,
    states,
    tokens,
    variables,
    watchers,
)
from watcher.store.db import Database
from watcher.store.watchers import Quiet, WatcherStatus
from watcher.values import JobStatus, Verdict

LATER = NOW + timedelta(days=100)


async def status(db: Database, name: str = "w") -> WatcherStatus:
    async with db.read() as tx:
        return await watchers.get(tx, name)


# --- watchers


async def test_renamed_watcher_keeps_its_memory_and_its_origin(db: Database) -> None:
    await know(db, "old")
    await commit(db, state=1, watcher="old")
    await db.write(lambda tx: watchers.sync(tx, {"new": "old"}, NOW))
    assert (await status(db, "new")).origin == "old"
    async with db.read() as tx:
        assert (await states.load(tx, "new")).state == 1
        with pytest.raises(StoreError):
            await watchers.get(tx, "old")
    await db.write(lambda tx: watchers.sync(tx, {"new": "old"}, NOW))  # `was` may stay in the file
    assert (await status(db, "new")).gone_at is None


async def test_new_watcher_with_a_renamed_ones_old_name_has_another_origin(db: Database) -> None:
    """Else both would give the same ids to different items."""
    await know(db, "a")
    await db.write(lambda tx: watchers.sync(tx, {"b": "a"}, NOW))
    await db.write(lambda tx: watchers.sync(tx, {"b": "a", "a": None}, NOW))
    assert (await status(db, "b")).origin == "a"
    assert (await status(db, "a")).origin != "a"


async def test_watcher_that_leaves_the_configuration_is_marked_and_comes_back_as_it_was(db: Database) -> None:
    await know(db, "w", "x")
    await commit(db, state=1)
    await know(db, "x")
    assert (await status(db)).gone_at == NOW
    await know(db, "w", "x")
    assert (await status(db)).gone_at is None
    async with db.read() as tx:
        assert (await states.load(tx, "w")).state == 1


async def test_failures_are_counted_until_a_run_commits(db: Database) -> None:
    await know(db, "w")
    for n in (1, 2, 3):
        at = NOW + timedelta(minutes=n)
        assert await db.write(lambda tx, at=at: watchers.failed(tx, "w", "no answer", at + LEASE, at)) == n
    now = await status(db)
    assert (now.failing_since, now.backoff_until, now.last_error) == (
        NOW + timedelta(minutes=1), NOW + timedelta(minutes=3) + LEASE, "no answer",
    )  # fmt: skip
    await commit(db)
    now = await status(db)
    assert (now.failures, now.failing_since, now.backoff_until, now.last_error) == (0, None, None, "")


async def test_quiet_runs_are_added_up(db: Database) -> None:
    await know(db, "w", "x")
    await db.write(lambda tx: watchers.failed(tx, "w", "no answer", None, NOW))
    one = Quiet(NOW, NOW, NOW, quiet_runs=3, skipped=1, missed=2)
    two = Quiet(NOW - LEASE, None, NOW + LEASE, quiet_runs=1, recovered=True)
    await db.write(lambda tx: watchers.flush(tx, {"w": one, "gone": one}, NOW))
    assert (await status(db)).failures == 1
    await db.write(lambda tx: watchers.flush(tx, {"w": two}, NOW))
    await db.write(lambda tx: watchers.flush(tx, {}, NOW))
    now = await status(db)
    assert (now.quiet_runs, now.skipped_ticks, now.missed_ticks, now.failures) == (4, 1, 2, 0)
    assert (now.checked_at, now.success_at, now.tick_at) == (NOW, NOW, NOW + LEASE)
    assert (await status(db, "x")).quiet_runs == 0


async def test_tick_is_taken_once_and_never_backwards(db: Database) -> None:
    await know(db, "w")
    assert await db.write(lambda tx: watchers.take(tx, "w", NOW))
    assert not await db.write(lambda tx: watchers.take(tx, "w", NOW))
    assert not await db.write(lambda tx: watchers.take(tx, "w", NOW - LEASE))
    assert await db.write(lambda tx: watchers.take(tx, "w", NOW + LEASE))


async def test_resuming_clears_pause_quarantine_and_backoff(db: Database) -> None:
    await know(db, "w")
    await db.write(lambda tx: watchers.pause(tx, "w", "holiday", NOW))
    await db.write(lambda tx: watchers.quarantine(tx, "w", "damaged", None, NOW))
    await db.write(lambda tx: watchers.failed(tx, "w", "no", NOW + LEASE, NOW))
    before = await status(db)
    assert (before.pause_reason, before.quarantine_reason) == ("holiday", "damaged")
    await db.write(lambda tx: watchers.resume(tx, "w", NOW))
    now = await status(db)
    assert (now.paused_at, now.quarantined_at, now.backoff_until, now.failures) == (None, None, None, 0)


async def test_unknown_watcher_is_an_error(db: Database) -> None:
    for write in (
        lambda tx: watchers.pause(tx, "nobody", "", NOW),
        lambda tx: watchers.failed(tx, "nobody", "", None, NOW),
        lambda tx: runs.record(tx, run_record("nobody", "failed")),
    ):
        with pytest.raises(StoreError, match="nobody"):
            await db.write(write)


# --- jobs


async def new_job(db: Database, id: str = "j", **more: object) -> bool:
    return await db.write(lambda tx: jobs.create(tx, id, "flow", "f/a", b'{"n":1}', NOW, **more))  # type: ignore[arg-type]


async def take_jobs(db: Database, owner: str = "me", *, limit: int = 10, at: timedelta = timedelta()) -> list[jobs.Job]:
    return [*await db.write(lambda tx: jobs.claim(tx, owner, limit=limit, now=NOW + at, lease=LEASE))]


async def job(db: Database, id: str = "j") -> jobs.Job:
    async with db.read() as tx:
        found = await jobs.get(tx, id)
    assert found is not None
    return found


async def test_job_of_an_id_that_is_there_already_is_not_made_again(db: Database) -> None:
    assert await new_job(db)
    assert not await new_job(db)
    assert (await job(db)).root == "j"
    async with db.read() as tx:
        assert await jobs.get(tx, "other") is None


async def test_job_runs_step_by_step_to_its_end(db: Database) -> None:
    await new_job(db)
    (taken,) = await take_jobs(db)
    assert (taken.status, taken.starts, taken.args, taken.step) == (JobStatus.RUNNING, 1, b'{"n":1}', 0)
    assert await take_jobs(db, "you") == []
    assert await db.write(lambda tx: jobs.step_done(tx, "j", "me", 0, [{"a": 1}], "said", NOW, LEASE))
    now = await job(db)
    assert (now.step, now.results, now.logs) == (1, b'[{"a": 1}]', "said")
    done = lambda tx: jobs.finish(tx, "j", "me", JobStatus.SUCCEEDED, result=b"2", logs="said", now=NOW)  # noqa: E731
    assert await db.write(done)
    assert not await db.write(done)
    now = await job(db)
    assert (now.status, now.result, now.finished_at, now.owner) == (JobStatus.SUCCEEDED, b"2", NOW, None)


async def test_job_of_a_dead_process_is_taken_over_and_the_first_is_fenced(db: Database) -> None:
    await new_job(db)
    await take_jobs(db)
    (again,) = await take_jobs(db, "you", at=LEASE)
    assert (again.starts, again.started_at) == (2, NOW)
    assert not await db.write(lambda tx: jobs.step_done(tx, "j", "me", 0, b"[]", "", NOW, LEASE))
    assert not await db.write(lambda tx: jobs.finish(tx, "j", "me", JobStatus.FAILED, error="late", now=NOW))
    assert await db.write(lambda tx: jobs.heartbeat(tx, ["j"], "me", NOW)) == set()
    assert await db.write(lambda tx: jobs.heartbeat(tx, ["j"], "you", NOW + 3 * LEASE)) == {"j"}
    assert await take_jobs(db, at=2 * LEASE) == []


async def test_jobs_left_running_are_taken_over_at_once_by_who_is_alone(db: Database) -> None:
    await new_job(db)
    await take_jobs(db)
    async with db.read() as tx:
        assert await jobs.next_due(tx, NOW) == NOW + LEASE
    await db.write(lambda tx: jobs.abandon(tx, NOW))
    assert len(await take_jobs(db, "you")) == 1


async def test_released_job_waits_again_and_its_start_does_not_count(db: Database) -> None:
    await new_job(db)
    await take_jobs(db)
    await db.write(lambda tx: jobs.release(tx, ["j"], "me"))
    async with db.read() as tx:
        assert await jobs.next_due(tx, NOW) == NOW
    assert [j.starts for j in await take_jobs(db)] == [1]


async def test_cancelled_job_is_fenced(db: Database) -> None:
    await new_job(db)
    await take_jobs(db)
    assert await db.write(lambda tx: jobs.cancel(tx, "j", "changed my mind", NOW))
    assert not await db.write(lambda tx: jobs.cancel(tx, "j", "again", NOW))
    assert not await db.write(lambda tx: jobs.finish(tx, "j", "me", JobStatus.SUCCEEDED, result=b"1", now=NOW))
    now = await job(db)
    assert (now.status, now.cancel_reason, now.result) == (JobStatus.CANCELED, "changed my mind", None)


async def test_jobs_are_listed_by_path_and_status(db: Database) -> None:
    for n in range(3):
        await new_job(db, f"j{n}")
    await db.write(lambda tx: jobs.cancel(tx, "j1", "", NOW))
    async with db.read() as tx:
        assert len(await jobs.list(tx, path="f/a")) == 3
        assert [j.id for j in await jobs.list(tx, status=JobStatus.CANCELED)] == ["j1"]
        assert await jobs.list(tx, path="f/b") == []
        assert await jobs.list(tx, before=NOW) == []


# --- settings


async def test_resource_has_versions_and_a_history(db: Database) -> None:
    async def put(value: object, **more: object) -> int:
        return await db.write(lambda tx: resources.put(tx, "u/a/r", "github", value, NOW, **more))  # type: ignore[arg-type]

    assert [await put({"n": n}) for n in range(3)] == [1, 2, 3]
    with pytest.raises(Conflict, match="version 3"):
        await put({"n": 9}, expected=2)
    assert await put({"n": 9}, expected=3) == 4
    async with db.read() as tx:
        found = await resources.get(tx, "u/a/r")
        assert found is not None
        assert (found.value, found.type, found.version) == ({"n": 9}, "github", 4)
        assert [v.value["n"] for v in await resources.history(tx, "u/a/r")] == [9, 2, 1, 0]
        assert await resources.list(tx, "slack") == []
        assert await resources.list(tx, "github") == await resources.list(tx) == [found]
    assert await db.write(lambda tx: resources.delete(tx, "u/a/r"))
    assert not await db.write(lambda tx: resources.delete(tx, "u/a/r"))
    assert await put({"n": 10}, expected=0) == 5


async def test_damaged_resource_is_an_error(db: Database) -> None:
    from sqlalchemy import text

    await db.write(lambda tx: resources.put(tx, "p", "t", 1, NOW))
    await db.write(lambda tx: tx.execute(text("UPDATE resource SET value = sha256")))
    async with db.read() as tx:
        with pytest.raises(Damaged):
            await resources.get(tx, "p")


async def test_resource_types_are_put_and_deleted(db: Database) -> None:
    for kind in ("object", "string"):
        await db.write(lambda tx, kind=kind: resources.put_type(tx, "t", {"type": kind}, NOW, description="d"))
    async with db.read() as tx:
        found = await resources.get_type(tx, "t")
        assert found is not None
        assert found.json_schema == {"type": "string"}
        assert await resources.list_types(tx) == [found]
    assert await db.write(lambda tx: resources.delete_type(tx, "t"))


async def test_variable_is_stored_as_it_is_given_and_never_shown_by_accident(db: Database) -> None:
    await db.write(lambda tx: variables.put(tx, "u/a/plain", "x", NOW))
    await db.write(lambda tx: variables.put(tx, "u/a/v", "v1:key:c2VjcmV0", NOW, is_secret=True))
    async with db.read() as tx:
        found = await variables.get(tx, "u/a/v")
        assert found is not None
        assert (found.value, found.is_secret) == ("v1:key:c2VjcmV0", True)
        assert "c2VjcmV0" not in repr(found)
        assert [v.path for v in await variables.list(tx)] == ["u/a/plain", "u/a/v"]
    assert await db.write(lambda tx: variables.delete(tx, "u/a/v"))
    assert not await db.write(lambda tx: variables.delete(tx, "u/a/v"))


async def test_token_is_found_by_its_hash_until_it_expires(db: Database) -> None:
    for n, prefix in enumerate(("wtc_aa1", "wtc_aa2", "wtc_b%_")):
        digest = bytes([n]) * 32
        await db.write(
            lambda tx, d=digest, p=prefix: tokens.create(tx, d, p, NOW, scopes={"b", "a"}, expires_at=NOW + LEASE)
        )
    await db.write(lambda tx: tokens.create(tx, b"j" * 32, "wtc_job", NOW, job_id="j"))
    known = tokens.Lookup(db)
    found = await known.get(b"\0" * 32, NOW)
    assert found is not None
    assert (found.prefix, found.scopes) == ("wtc_aa1", ("a", "b"))
    assert await known.get(b"\0" * 32, NOW + LEASE) is None
    assert await known.get(b"?" * 32, NOW) is None
    async with db.read() as tx:
        assert [t.prefix for t in await tokens.list(tx)] == ["wtc_aa1", "wtc_aa2", "wtc_b%_"]
    with pytest.raises(StoreError, match="2 tokens"):
        await db.write(lambda tx: tokens.delete(tx, "wtc_aa"))
    assert await db.write(lambda tx: tokens.delete(tx, "wtc_b%"))
    assert not await db.write(lambda tx: tokens.delete(tx, "wtc_%"))
    await db.write(lambda tx: tokens.used(tx, b"\0" * 32, NOW))
    await db.write(lambda tx: tokens.delete_of_job(tx, "j"))
    async with db.read() as tx:
        assert [t.used_at for t in await tokens.list(tx)] == [NOW, None]
    assert await known.get(b"j" * 32, NOW) is None


async def test_audit_lists_the_newest_first(db: Database) -> None:
    for n in range(3):
        await db.write(lambda tx, n=n: audit.note(tx, "state.set", f"w{n}", NOW, actor="me", note="by hand"))
    async with db.read() as tx:
        entries = await audit.list(tx, limit=2)
        assert [e.subject for e in entries] == ["w2", "w1"]
        assert [e.subject for e in await audit.list(tx, before=entries[-1].id)] == ["w0"]
        assert len(await audit.list(tx, subject="w1")) == 1


# --- retention


async def prune(
    db: Database, *, keep: timedelta = timedelta(days=30), at: timedelta = timedelta(days=40)
) -> retention.Pruned:
    return await db.write(lambda tx: retention.prune(tx, "w", keep_runs=keep, now=NOW + at))


async def test_what_is_owed_or_dead_is_not_forgotten(db: Database) -> None:
    await know(db, "w")
    keys = ("done", "dead", "pending")
    await commit(db, [new_item(k, 1) for k in keys], learn=[seen_row(k) for k in keys])
    done, dead, _ = await claim(db)
    await settle(db, [settlement(done), settlement(dead, Verdict.ITEM)])
    assert await prune(db, at=timedelta(days=20)) == retention.Pruned()
    assert await prune(db) == retention.Pruned(0, 1, 1, 1)
    async with db.read() as tx:
        assert [i.key for i in await items.list(tx, "w")] == ["pending", "dead"]
        assert len(await runs.list(tx)) == 1
    assert await prune(db, at=timedelta(days=100)) == retention.Pruned(0, 1, 1, 1)
    (late,) = await claim(db, now=LATER)
    await settle(db, [settlement(late)], now=LATER)
    assert await prune(db, at=timedelta(days=101)) == retention.Pruned(1, 1, 1, 1)
    async with db.read() as tx:
        assert await runs.list(tx) == []
        assert await deliveries.list(tx) == []
        assert await seen.count(tx, "w") == 3


async def test_item_that_reached_one_flow_of_two_stays_whole(db: Database) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1, flows=("f", "g"))])
    await settle(db, [settlement(d) for d in await claim(db, "f")])
    assert await prune(db) == retention.Pruned()


async def test_quarantined_run_that_waits_for_approval_is_kept(db: Database) -> None:
    await know(db, "w")
    ids = [await db.write(lambda tx: runs.record(tx, run_record(outcome="quarantined", plan=b"p"))) for _ in range(2)]
    await db.write(lambda tx: watchers.quarantine(tx, "w", "too much", ids[0], NOW))
    assert await prune(db) == retention.Pruned(runs=1)
    async with db.read() as tx:
        assert await runs.plan(tx, ids[0]) == b"p"


async def test_pruning_takes_a_little_at_a_time(db: Database) -> None:
    await know(db, "w", "other")
    await commit(db, [new_item(f"k{n}", n, flows=()) for n in range(25)])
    await commit(db, [new_item("k", 1, flows=(), watcher="other")], watcher="other")
    dropped = []
    while (
        some := await db.write(lambda tx: retention.prune(tx, "w", keep_runs=timedelta(days=1), now=LATER, limit=10))
    ).total:
        dropped.append((some.runs, some.items))
    assert dropped == [(0, 10), (0, 10), (1, 5)]
    async with db.read() as tx:
        assert [i.watcher for i in await items.list(tx)] == ["other"]


async def test_old_jobs_and_expired_tokens_go(db: Database) -> None:
    await new_job(db, "over")
    await db.write(lambda tx: jobs.cancel(tx, "over", "", NOW))
    await new_job(db, "queued")
    await db.write(lambda tx: tokens.create(tx, b"1" * 32, "wtc_1", NOW, expires_at=NOW))
    gone = await db.write(lambda tx: retention.prune_jobs(tx, keep=timedelta(days=7), now=LATER))
    assert gone == retention.Pruned(jobs=1)
    async with db.read() as tx:
        assert [j.id for j in await jobs.list(tx)] == ["queued"]
        assert await tokens.list(tx) == []
