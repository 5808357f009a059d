"""Memory and ledger: compare-and-set, history, checksums, and asking about a page."""

from __future__ import annotations

import random
import sqlite3
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.support.store import NOW, commit, know, proposal, seen_row
from watcher import ids
from watcher.errors import Conflict, Damaged, StoreError
from watcher.store import migrate, retention, runs, seen, states
from watcher.store.db import Database
from watcher.values import UNSET, Memory

MEMORY = Memory(
    version=1,
    state={"newest": [1, 2.5, "ä", None]},
    cursor="2026-03-01T00:00:00Z",
    known=7,
    validators={"GET https://example.org": {"etag": '"a"'}},
    script="abc",
    policy={"first_run": "baseline"},
)


async def load(db: Database, name: str = "w") -> Memory:
    async with db.read() as tx:
        return await states.load(tx, name)


async def put(db: Database, memory: Memory, expected: int, **more: Any) -> int:
    return await db.write(lambda tx: states.put(tx, "w", memory, expected, NOW, **more))


async def test_memory_that_was_never_committed_is_empty(db: Database) -> None:
    await know(db, "w")
    assert await load(db) == Memory()


async def test_memory_comes_back_as_it_was_written(db: Database) -> None:
    await know(db, "w")
    assert await put(db, MEMORY, 0) == 1
    assert await load(db) == MEMORY


@pytest.mark.parametrize("state", [None, False, 0, "", [], {}, UNSET])
async def test_no_state_is_told_from_an_empty_one(db: Database, state: Any) -> None:
    await know(db, "w")
    await put(db, Memory(state=state), 0)
    assert (await load(db)).state == state


async def test_unknown_watcher_is_an_error_and_not_an_empty_memory(db: Database) -> None:
    with pytest.raises(StoreError, match="does not know"):
        await load(db, "nobody")


@pytest.mark.parametrize("expected", [0, 2])
async def test_memory_that_moved_is_not_overwritten(db: Database, expected: int) -> None:
    await know(db, "w")
    await put(db, MEMORY, 0)
    with pytest.raises(Conflict):
        await put(db, Memory(state="mine"), expected)
    assert await load(db) == MEMORY


async def test_history_keeps_so_many_and_a_rollback_is_a_new_version(db: Database) -> None:
    await know(db, "w")
    for n in range(6):
        await put(db, Memory(state=n), n, keep=3, note=f"note {n}")
    async with db.read() as tx:
        listed = await states.history(tx, "w")
        old = await states.version(tx, "w", 4)
        with pytest.raises(StoreError, match="no version 3"):
            await states.version(tx, "w", 3)
    assert [(v.version, v.note) for v in listed] == [(6, "note 5"), (5, "note 4"), (4, "note 3")]
    assert await put(db, old, 6, note="rollback to 4") == 7
    assert await load(db) == replace(old, version=7)


async def test_reset_makes_the_next_run_a_first_one_but_gives_no_version_twice(db: Database) -> None:
    await know(db, "w")
    await commit(db, state="a", learn=[seen_row("k")])
    slow = proposal(expected=1, state="too late")
    await db.write(lambda tx: states.reset(tx, "w", NOW))
    assert await load(db) == Memory()
    async with db.read() as tx:
        assert await seen.probe(tx, "w", [ids.key_hash("k")]) == {}
        assert [(v.version, v.note) for v in await states.history(tx, "w")] == [(2, "reset"), (1, "ok")]
    assert (await commit(db, state="b")).version == 3
    with pytest.raises(Conflict):
        await db.write(lambda tx: runs.commit(tx, slow))


@pytest.mark.parametrize("column", ["body", "sha256", "version"])
async def test_damaged_state_is_never_taken_for_a_state(db: Database, column: str) -> None:
    await know(db, "w")
    await put(db, MEMORY, 0)
    damage = "version = version + 8" if column == "version" else f"{column} = sha256"
    if column == "sha256":
        damage = "sha256 = body"
    await db.write(lambda tx: tx.execute(text(f"UPDATE state SET {damage}")))
    with pytest.raises(Damaged, match="rollback"):
        await load(db)


async def test_of_five_hundred_flipped_bits_none_becomes_a_change(tmp_path: Path) -> None:
    """Bits flipped in the file itself: what is read is what was written, or an error."""
    file = tmp_path / "watcher.db"
    db = await Database.open(f"sqlite:///{file}")
    await migrate.upgrade(db, backup_to=None, now=NOW)
    await know(db, "w")
    rows = [seen_row(f"key {n}", {"n": n, "text": "x" * 50}, keep=True) for n in range(40)]
    await commit(db, state={"text": "y" * 20_000}, learn=rows)
    hashes = [row.key_hash for row in rows]
    async with db.read() as tx:
        memory, ledger = await states.load(tx, "w"), await seen.probe(tx, "w", hashes)
    await db.close()
    whole, dice, noticed = file.read_bytes(), random.Random(1), 0
    for _ in range(500):
        at, bit = dice.randrange(len(whole)), dice.randrange(8)
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(bytes([whole[at] ^ (1 << bit)]))
        try:
            reader = await Database.open(f"sqlite:///{file}", read_only=True)
            try:
                async with reader.read() as tx:
                    assert await states.load(tx, "w") == memory
                    for key, row in (await seen.probe(tx, "w", hashes)).items():
                        assert (row.content, row.value) == (ledger[key].content, ledger[key].value)
            finally:
                await reader.close()
        except StoreError:
            noticed += 1
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(whole[at : at + 1])
    assert noticed > 50


def test_state_that_is_not_json_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        states.encode(Memory(state=float("nan")))


# --- the ledger


async def test_probe_answers_for_the_listed_keys_only(db: Database) -> None:
    await know(db, "w", "other")
    rows = [seen_row(f"k{n}", {"n": n}, keep=n % 2 == 0) for n in range(100)]
    await commit(db, learn=rows)
    await commit(db, learn=[seen_row("k200")], watcher="other")
    wanted = [ids.key_hash(f"k{n}") for n in range(50, 300)]
    async with db.read() as tx:
        found = await seen.probe(tx, "w", wanted)
        assert await seen.probe(tx, "w", []) == {}
        assert await seen.count(tx, "w") == 100
    assert found == {row.key_hash: row for row in rows[50:]}


async def test_thousands_of_keys_are_asked_for_at_once(db: Database) -> None:
    await know(db, "w")
    rows = [seen_row(f"k{n}") for n in range(40_000)]
    await commit(db, learn=rows)
    async with db.read() as tx:
        assert len(await seen.probe(tx, "w", [row.key_hash for row in rows])) == 40_000


async def test_learning_again_replaces(db: Database) -> None:
    await know(db, "w")
    await commit(db, learn=[seen_row("k", {"price": 10}, keep=True)])
    changed = replace(seen_row("k", {"price": 12}, keep=True), revision=2, present=False)
    await commit(db, learn=[changed])
    async with db.read() as tx:
        assert await seen.probe(tx, "w", [changed.key_hash]) == {changed.key_hash: changed}
        assert await seen.present(tx, "w") == {}


async def test_present_holds_what_the_source_still_lists(db: Database) -> None:
    await know(db, "w")
    here, gone = seen_row("here"), replace(seen_row("gone"), present=False)
    await commit(db, learn=[here, gone])
    async with db.read() as tx:
        assert await seen.present(tx, "w") == {here.key_hash: here}


async def test_content_hash_of_another_value_is_refused(db: Database) -> None:
    await know(db, "w")
    wrong = replace(seen_row("k", {"a": 1}, keep=True), value={"a": 2})
    with pytest.raises(ValueError, match="content hash"):
        await commit(db, learn=[wrong])
    assert (await load(db)).version == 0


async def test_damaged_value_in_the_ledger_is_never_compared_with(db: Database) -> None:
    await know(db, "w")
    row = seen_row("k", {"price": 10}, keep=True)
    await commit(db, learn=[row])
    await db.write(lambda tx: tx.execute(text("UPDATE seen SET value = content")))
    async with db.read() as tx:
        with pytest.raises(Damaged, match="disk"):
            await seen.probe(tx, "w", [row.key_hash])


async def test_key_that_the_source_no_longer_lists_is_forgotten_after_a_while(db: Database) -> None:
    await know(db, "w")
    rows = {name: seen_row(name) for name in ("listed", "unlisted", "never_noted")}
    noted = [rows["listed"].key_hash, rows["unlisted"].key_hash]
    await commit(db, learn=[*rows.values()], touch=noted)
    later = NOW + timedelta(days=40)
    day = seen.day_of(later)
    async with db.read() as tx:
        every = [row.key_hash for row in rows.values()]
        assert await seen.listed_before(tx, "w", every, day) == {*every}
    await commit(db, touch=[rows["listed"].key_hash], at=later)
    assert await retention.forget(db, "w", forget_after=timedelta(days=41)) == 0
    assert await retention.forget(db, "w", forget_after=timedelta(days=30)) == 1
    assert await retention.forget(db, "w", forget_after=timedelta(days=30)) == 0
    async with db.read() as tx:
        left = await seen.probe(tx, "w", [row.key_hash for row in rows.values()])
    assert {*left} == {rows["listed"].key_hash, rows["never_noted"].key_hash}


async def test_source_that_is_silent_for_a_year_forgets_nothing(db: Database) -> None:
    """Unchanged, unreachable: neither says that the source no longer lists a key."""
    await know(db, "w")
    row = seen_row("k")
    await commit(db, learn=[row], touch=[row.key_hash])
    assert await retention.forget(db, "w", forget_after=timedelta(days=1)) == 0


async def test_probe_uses_the_ledgers_own_order(sqlite_db: Database, tmp_path: Path) -> None:
    """The cost is the page's: every key is searched for, nothing is scanned."""
    with sqlite3.connect(tmp_path / "watcher.db") as connection:
        join = "FROM piece CROSS JOIN seen s ON s.watcher_id = ? AND s.key_hash = piece.hash"
        sql = f"EXPLAIN QUERY PLAN {seen._PIECES} SELECT s.content {join}"
        plan = " ".join(row[3] for row in connection.execute(sql, (b"", b"", 0, 1)))
    connection.close()
    assert "SEARCH s USING PRIMARY KEY (watcher_id=? AND key_hash=?)" in plan
    assert "SCAN s" not in plan
