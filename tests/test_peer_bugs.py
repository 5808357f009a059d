"""Twenty-two ways in which other products lose or repeat items, each tried here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support import site
from tests.support.running import ALL, DATED, KEYED, PAGED, PATIENT, WINDMILL, Bench, a, running
from watcher import failpoint
from watcher.engine.embedded import Embedded
from watcher.errors import Damaged, StoreError
from watcher.schedule import Tick
from watcher.scripts import builtins
from watcher.store import deliveries, states, watchers
from watcher.store.db import Database
from watcher.store.tables import state as state_table
from watcher.testing import Trial
from watcher.values import Delivery, Flow, Settlement, Verdict

LEASE = timedelta(seconds=90)


@pytest.fixture
async def bench(db: Database, tmp_path: Path, now: datetime) -> AsyncIterator[Bench]:
    async with running(db, tmp_path, now) as bench:
        yield bench


async def claim(bench: Bench, token: str, flow: str = "f", limit: int = 100) -> list[Delivery]:
    return list(
        await bench.db.write(
            lambda tx: deliveries.claim(tx, flow, limit=limit, now=bench.now, lease=LEASE, token=token)
        )
    )


async def settle(bench: Bench, token: str, sent: list[Delivery], verdict: Verdict = Verdict.DELIVERED) -> set[int]:
    due = bench.now + timedelta(minutes=5) if verdict is Verdict.PASSING else None
    ended = [Settlement(delivery, verdict, bench.now, 5, 200, due_at=due) for delivery in sent]
    return await bench.db.write(lambda tx: deliveries.settle(tx, token, ended, bench.now))


def from_then_on(bench: Bench, asked: site.Asked) -> site.Answer:
    """A source that is asked from an instant on, inclusively."""
    return site.json([item for item in bench.items if item["at"] >= asked.params.get("since", "")])


async def test_01_two_items_share_the_cursor_and_the_second_appears_one_poll_later(bench: Bench) -> None:
    bench.script(DATED)
    bench.site.on(
        "/items", lambda asked: site.json([i for i in bench.items if i["at"] >= asked.params.get("since", "")])
    )
    await bench.run(a(0, at="2026-03-01T10:00:00Z"))
    await bench.run(a(0, at="2026-03-01T10:00:00Z"), a(1, at="2026-03-01T11:00:00Z"))
    await bench.run(*bench.items, a(2, at="2026-03-01T11:00:00Z"))
    await bench.run()
    assert await bench.times() == {"1": 1, "2": 1}


async def test_02_an_item_becomes_visible_ten_minutes_late_with_an_older_timestamp(bench: Bench) -> None:
    bench.script(DATED)
    bench.site.on(
        "/items", lambda asked: site.json([i for i in bench.items if i["at"] >= asked.params.get("since", "")])
    )
    bench.configure(lookback="15m")
    await bench.run(a(0, at="2026-03-01T10:00:00Z"))
    await bench.run(a(0, at="2026-03-01T10:00:00Z"), a(2, at="2026-03-01T11:10:00Z"))
    await bench.run(*bench.items, a(1, at="2026-03-01T11:00:00Z"))
    await bench.run()
    assert await bench.times() == {"2": 1, "1": 1}


async def test_03_the_remembered_last_item_is_deleted(bench: Bench) -> None:
    await bench.run(a(3), a(2), a(1))
    await bench.run(a(2), a(1))
    await bench.run(a(4), a(2), a(1))
    assert await bench.times() == {"4": 1}
    bench.script(DATED)
    await bench.run(a(4, at=4), a(2, at=2), a(1, at=1))
    await bench.run(a(2, at=2), a(1, at=1))
    await bench.run(a(5, at=5), a(2, at=2), a(1, at=1))
    assert await bench.times() == {"4": 1, "5": 1}


async def test_04_the_list_is_sorted_anew(bench: Bench) -> None:
    await bench.run(a(1), a(2), a(3))
    await bench.run(a(3), a(9), a(1), a(2))
    await bench.run(a(2), a(1), a(9), a(3))
    assert await bench.times() == {"9": 1}


async def test_05_an_insert_shifts_the_second_page_while_it_is_read(bench: Bench) -> None:
    bench.script(PAGED)
    listing = site.Listing([a(n) for n in range(30)], 10)
    bench.site.on("/items", listing.numbered)
    await bench.run()
    listing.items = [a(f"new {n}") for n in range(15)] + listing.items
    # Between two requests one is put on top, so that page two begins with the last of page one; then one is taken
    # away, so that page two begins behind one that nobody has seen.
    listing.after = {
        listing.count + 1: lambda it: it.items.insert(0, a("drifted")),
        listing.count + 2: lambda it: it.items.pop(3),
    }
    for _ in range(3):
        await bench.run()
    expected = {f"new {n}": 1 for n in range(15)} | {"drifted": 1}
    assert await bench.times() == expected


@pytest.mark.parametrize("count", [101, 1001])
async def test_06_more_items_than_a_list_of_ids_would_remember(bench: Bench, count: int) -> None:
    await bench.run(*(a(n) for n in range(count)))
    for turn in range(3):
        await bench.run(*reversed(bench.items), a(f"new {turn}"))
    assert await bench.times() == {"new 0": 1, "new 1": 1, "new 2": 1}


def feed(*entries: str) -> str:
    return f'<?xml version="1.0"?><rss version="2.0"><channel><title>t</title>{"".join(entries)}</channel></rss>'


def post(title: str, guid: str, date: str = "") -> str:
    date = f"<pubDate>{date}</pubDate>" if date else ""
    return f"<item><title>{title}</title><link>https://b.example/{title}</link><guid>{guid}</guid>{date}</item>"


@pytest.mark.filterwarnings("ignore:To avoid breaking existing software:DeprecationWarning")  # feedparser's own
@pytest.mark.parametrize("trouble", ["shared", "random", "no date", "future date"])
def test_07_ids_that_are_shared_or_random_and_dates_that_are_missing_or_in_the_future(trouble: str) -> None:
    posts = [f"post{n}" for n in range(5)]
    fetches = 0

    def show(title: str) -> str:
        match trouble:
            case "shared":
                return post(title, "https://b.example/", "Sun, 01 Mar 2026 10:00:00 GMT")
            case "random":
                return post(title, f"{title}-{fetches}", "Sun, 01 Mar 2026 10:00:00 GMT")
            case "no date":
                return post(title, title)
            case _:
                return post(title, title, "Fri, 01 Jan 2100 10:00:00 GMT")

    def answer(request: Any) -> bytes:
        nonlocal fetches
        fetches += 1
        return feed(*map(show, posts)).encode()

    trial = Trial(builtins() / "rss.py", {"url": "https://b.example/feed"}, site=answer)
    trial.poll()
    found = []
    for turn in range(3):
        posts.insert(0, f"new{turn}")
        found += [find.item["title"] for find in trial.poll().finds]
        found += [find.item["title"] for find in trial.poll().finds]
    assert found == ["new0", "new1", "new2"]


@pytest.mark.parametrize(
    "answer", [site.json([]), site.html(), site.truncated([a(n) for n in range(9)])],
    ids=["empty page", "login page", "truncated"],
)  # fmt: skip
async def test_08_an_answer_that_is_none_deletes_nothing_and_changes_no_state(
    bench: Bench, answer: site.Answer
) -> None:
    bench.configure(on=("new", "changed", "removed"))
    await bench.run(*(a(n) for n in range(9)))
    before = await bench.memory()
    bench.site.on("/items", answer)
    for _ in range(2):
        assert (await bench.run()).outcome in ("failed", "quarantined")
        assert await bench.memory() == before
    await bench.db.write(lambda tx: watchers.resume(tx, "w", bench.now))
    bench.site.on("/items", lambda asked: site.json(bench.items))
    await bench.run()
    await bench.run(*(a(n) for n in range(10)))
    assert [(item.change, item.key) for item in await bench.found()] == [("new", "9")]


@pytest.mark.parametrize("place", ["after_fetch", "after_diff", "before_begin", "mid_outbox", "before_commit"])
async def test_09a_a_crash_before_the_commit_loses_nothing(
    bench: Bench, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.run(a(1))
    before = await bench.memory()
    with monkeypatch.context() as armed:
        armed.setattr(failpoint, "_points", {place: ("raise", 1)})
        armed.setattr(failpoint, "_reached", {})
        assert (await bench.run(a(1), a(2))).error_kind == "bug"
    assert await bench.memory() == before
    assert await bench.owed() == []
    bench.runner = bench.another()
    await bench.run()
    assert await bench.times() == {"2": 1}


async def test_09b_a_crash_after_the_commit_repeats_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.run(a(1))
    with monkeypatch.context() as armed:
        armed.setattr(failpoint, "_points", {"after_commit": ("raise", 1)})
        armed.setattr(failpoint, "_reached", {})
        await bench.run(a(1), a(2))
    bench.runner = bench.another()
    assert (await bench.run()).outcome == "quiet"
    assert await bench.times() == {"2": 1}
    assert [d.status for d in await bench.owed()] == ["pending"]


async def test_09c_a_crash_between_send_and_ack_sends_again_under_the_same_id(bench: Bench) -> None:
    bench.configure(first_run=ALL)
    await bench.run(a(1))
    (sent,) = await claim(bench, "process one")  # it sends, and dies before it settles
    assert await claim(bench, "process two") == []
    bench.now += LEASE
    (again,) = await claim(bench, "process two")
    assert (again.id, again.attempt) == (sent.id, 2)
    assert await settle(bench, "process one", [sent]) == {sent.seq}  # it was only asleep, and is fenced off
    assert await settle(bench, "process two", [again]) == set()
    assert [d.status for d in await bench.owed()] == ["delivered"]


async def test_10_state_that_cannot_be_read_is_an_error_and_never_a_first_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.configure(first_run=ALL)
    await bench.run(a(1))
    for error in (StoreError("locked"), Damaged("flipped")):

        async def broken(*_: Any, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(states, "load", broken)
            try:
                assert (await bench.run(a(1), a(2))).outcome == "quarantined"
            except StoreError:
                pass
        assert await bench.times() == {"1": 1}
    await bench.db.write(lambda tx: watchers.resume(tx, "w", bench.now))
    await bench.db.write(lambda tx: tx.execute(state_table.update().values(body=b"{}")))
    assert (await bench.run()).outcome == "quarantined"
    assert await bench.times() == {"1": 1}


@pytest.mark.parametrize("edit", ["args", "script", "key", "cursor", "on", "first_run", "flows", "name"])
async def test_11_the_configuration_is_edited_between_two_polls(bench: Bench, edit: str) -> None:
    bench.script(PATIENT)
    rows = [a(n, slug=f"slug {n}", at=n) for n in range(3)]
    await bench.run(*rows)
    match edit:
        case "args":
            bench.configure(args={"url": bench.site.on("/moved", lambda asked: site.json(bench.items))})
        case "script":
            bench.script(KEYED)
        case "key":
            bench.configure(key="slug")
        case "cursor":
            bench.configure(cursor="at")
        case "on":
            bench.configure(on=("new", "changed", "removed"))
        case "first_run":
            bench.configure(first_run=ALL)
        case "flows":
            bench.flows = {"g": Flow("g")}
            bench.configure(flows=("g",))
        case "name":
            bench.configure(name="v", was="w")
            await bench.sync()
    bench.items = [*rows, a(9, slug="slug 9", at=9)]
    for _ in range(2):
        await bench.runner.run(bench.watcher.name)
    assert [item.payload["item"]["id"] for item in await bench.found()] == [9]
    assert [d.flow for d in await bench.owed()] == list(bench.watcher.flows)


async def test_12_a_poll_slower_than_its_interval_never_overlaps_and_its_drift_is_reported(bench: Bench) -> None:
    released = asyncio.Event()
    bench.site.on("/items", site.Answer(200, b'[{"id": 1}]', before=released))
    engine = Embedded(bench.runner, bench.db, lambda: bench.now)
    for tick in range(4):
        engine.tick(Tick("w", bench.now + timedelta(minutes=tick)))
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        while not bench.site.asked:
            await asyncio.sleep(0.01)
    assert engine.running() == {"w"}
    released.set()
    await engine.drain(10)
    assert bench.site.most_at_once == len(bench.site.asked) == 1
    await bench.runner.flush()
    assert (await bench.status()).skipped_ticks == 3


async def test_13_a_poll_that_hangs_is_ended_told_of_and_tried_again(bench: Bench) -> None:
    bench.configure(timeout=timedelta(seconds=1))
    bench.script("def main(url):\n    while True:\n        pass\n")
    record = await bench.run()
    assert (record.outcome, record.error_kind) == ("failed", "timeout")
    assert "longer timeout" in record.error
    assert (await bench.status()).failures == 1
    bench.configure(timeout=timedelta(seconds=20))
    bench.script(KEYED)
    assert (await bench.run()).outcome == "ok"


async def test_14_too_many_requests_on_the_very_first_poll(bench: Bench) -> None:
    bench.site.on("/items", site.too_many(120), lambda asked: site.json(bench.items))
    assert (await bench.run(a(1), tick=True)).outcome == "failed"
    assert (await bench.run(tick=True)).warnings
    assert len(bench.site.asked) == 1
    bench.fetcher._manners._hosts.clear()
    assert (await bench.run(minutes=3, tick=True)).outcome == "ok"
    await bench.run(a(1), a(2))
    assert await bench.times() == {"2": 1}


async def test_15_a_stop_while_seven_of_ten_are_delivered(bench: Bench) -> None:
    bench.configure(first_run=ALL)
    await bench.run(*(a(n) for n in range(10)))
    taken = await claim(bench, "before the stop")
    assert await settle(bench, "before the stop", taken[:7]) == set()
    await bench.db.write(lambda tx: deliveries.release(tx, "before the stop", [d.seq for d in taken[7:]], bench.now))
    left = await claim(bench, "after the restart")
    assert [(d.id, d.attempt) for d in left] == [(d.id, 1) for d in taken[7:]]
    await settle(bench, "after the restart", left)
    assert [d.status for d in await bench.owed()] == ["delivered"] * 10


@pytest.mark.parametrize("script", [WINDMILL, KEYED])
async def test_16_a_rollback_and_a_replay_give_the_same_ids(bench: Bench, script: str) -> None:
    bench.script(script)
    await bench.run(a(1))
    first = await bench.memory()
    await bench.run(a(1), a(2), a(3))
    before = [(item.id, item.key) for item in await bench.found()]
    memory = await bench.memory()
    await bench.db.write(lambda tx: states.put(tx, "w", first, memory.version, bench.now, None, "rollback"))
    await bench.run()
    await bench.run(a(1), a(2), a(3), a(4))
    after = [(item.id, item.key) for item in await bench.found()]
    assert after[:2] == before
    assert [key for _, key in after] == ["2", "3", "4"]
    owed = [d.id for d in await bench.owed()]
    assert len(owed) == 3
    await settle(bench, "t", await claim(bench, "t"))
    assert await bench.db.write(lambda tx: deliveries.retry(tx, owed[:1], now=bench.now)) == 1
    assert [d.id for d in await claim(bench, "u")] == owed[:1]


async def test_17_a_cap_of_n_per_poll_and_item_n_plus_one_arrives_next_poll(bench: Bench) -> None:
    bench.configure(first_run=ALL, max_items=3)
    await bench.run(*(a(n) for n in range(7)))
    batches = []
    for turn in range(4):
        due = await claim(bench, f"t{turn}")
        await settle(bench, f"t{turn}", due)
        batches.append([d.key for d in due])
        bench.now += timedelta(minutes=1)
    assert batches == [["0", "1", "2"], ["3", "4", "5"], ["6"], []]


async def test_18_an_unchanged_item_older_than_any_limit_never_fires_again(bench: Bench) -> None:
    from watcher.store import retention

    bench.configure(forget_after=timedelta(days=30), keep_runs=timedelta(days=1), keep_history=2)
    await bench.run(a(1))
    await bench.run(a(1), a(2))
    for _ in range(12):
        bench.now += timedelta(days=10)
        await bench.run()
        await retention.forget(bench.db, "w", forget_after=timedelta(days=30))
        await bench.db.write(
            lambda tx: retention.prune(tx, "w", keep_runs=timedelta(days=1), now=bench.now, limit=1000)
        )
    assert await bench.known() == 2
    assert await bench.keys() in ([], ["2"])
    assert len(await bench.owed()) <= 1
    assert (await bench.status()).found_at is not None


async def test_19_two_processes_on_one_database_poll_once_and_commit_once(
    postgres_db: Database, tmp_path: Path, now: datetime
) -> None:
    async with running(postgres_db, tmp_path, now) as bench:
        await bench.run(a(1))
        bench.items = [a(1), a(2)]
        bench.site.asked.clear()
        engines = [Embedded(bench.another(), postgres_db, lambda: bench.now) for _ in range(2)]
        tick = Tick("w", bench.now + timedelta(minutes=1))
        for engine in engines:
            engine.tick(tick)
        for engine in engines:
            await engine.drain(20)
        assert len(bench.site.asked) == 1
        assert await bench.times() == {"2": 1}
        bench.items = [a(1), a(2), a(3)]
        records = await asyncio.gather(*(bench.another().run("w") for _ in range(4)))
        assert sum(record.outcome == "ok" for record in records) == 1
        assert await bench.times() == {"2": 1, "3": 1}


async def test_20_a_receiver_is_down_for_a_day(bench: Bench) -> None:
    bench.flows = {"down": Flow("down", order="watcher"), "up": Flow("up")}
    bench.configure(first_run=ALL, flows=("down", "up"))
    for hour in range(24):
        await bench.run(*(a(n) for n in range(hour + 1)), minutes=60)
        (up,) = await claim(bench, f"up {hour}", "up")
        assert up.key == str(hour)  # the other target never waits
        await settle(bench, f"up {hour}", [up])
        down = await claim(bench, f"down {hour}", "down")
        assert [d.key for d in down] == ["0"]  # one that fails holds its lane: one attempt, whatever waits behind it
        await settle(bench, f"down {hour}", down, Verdict.PASSING)
    order = []
    bench.now += timedelta(hours=1)
    while down := await claim(bench, "down again", "down"):
        order += [d.key for d in down]
        await settle(bench, "down again", down)
    assert order == [str(n) for n in range(24)]


async def test_21_a_to_b_to_a_is_two_changes(bench: Bench) -> None:
    bench.configure(on=("new", "changed"))
    await bench.run(a(1, state="A"))
    for state in ("B", "A", "A"):
        await bench.run(a(1, state=state))
    found = await bench.found()
    assert [(item.change, item.payload["item"]["state"]) for item in found] == [("changed", "B"), ("changed", "A")]
    assert len({item.id for item in found}) == 2
    assert len({d.id for d in await bench.owed()}) == 2


async def test_22_a_token_rotated_on_disk_is_used_by_the_next_poll(bench: Bench, tmp_path: Path) -> None:
    bench.script(KEYED.replace("url: str", "url: str, token: str").replace("get(url)", "get(url, auth=token)"))
    file = tmp_path / "token"
    bench.configure(args={"url": bench.url, "token": f"$file:{file}"})
    for token in ("first-secret", "second-secret"):
        file.write_text(token + "\n")
        await bench.run(a(1))
    assert [asked.headers["authorization"] for asked in bench.site.asked] == [
        "Bearer first-secret", "Bearer second-secret"
    ]  # fmt: skip
