"""Backups while the database is in use, and every way back from them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.support.postgres import Postgres
from tests.support.store import NOW, claim, commit, know, new_item, run_record, seen_row, settle, settlement
from watcher.errors import Damaged, DatabaseTooNew, StoreError
from watcher.store import audit, backup, jobs, meta, migrate, resources, runs, tokens, variables, watchers
from watcher.store.db import Database, lock
from watcher.values import Verdict


@pytest.fixture(params=["sqlite", "postgresql"])
async def other(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    """A second, empty database of each kind."""
    if request.param == "sqlite":
        database = await Database.open(f"sqlite:///{tmp_path / 'other.db'}")
        yield database
        await database.close()
        return
    server: Postgres = request.getfixturevalue("postgres")
    url = server.create()
    database = await Database.open(url)
    yield database
    await database.close()
    server.drop(url)


async def fill(db: Database) -> None:
    """Something in every table."""
    await know(db, "w", "idle")
    learn = [seen_row("a", {"n": 1}, keep=True), seen_row("b")]
    await commit(db, [new_item("a", {"text": "ä\u2028"}, flows=("f", "g")), new_item("b", 2)], state=[1], learn=learn)
    first, second = await claim(db)
    await settle(db, [settlement(first, answer=b"\x00\xff"), settlement(second, Verdict.ITEM)])
    await db.write(lambda tx: runs.record(tx, run_record(outcome="failed", plan=b"\x00plan")))
    await db.write(lambda tx: resources.put(tx, "u/a/r", "github", {"token": "$var:u/a/v"}, NOW))
    await db.write(lambda tx: resources.put_type(tx, "github", {"type": "object"}, NOW))
    await db.write(lambda tx: variables.put(tx, "u/a/v", "v1:k:ciphertext", NOW, is_secret=True))
    await db.write(lambda tx: tokens.create(tx, b"\x01" * 32, "wtc_abc", NOW, scopes=["read"]))
    await db.write(lambda tx: audit.note(tx, "state.set", "w", NOW))
    await db.write(lambda tx: jobs.create(tx, "id", "flow", "f/announce", b"{}", NOW))


async def dump(db: Database) -> list[str]:
    return [line async for line in backup.export(db)]


async def rows(db: Database) -> list[str]:
    return sorted(line for line in (await dump(db))[1:-1] if '["meta","epoch"' not in line)


async def epoch(db: Database) -> str:
    async with db.read() as tx:
        return await meta.epoch(tx)


async def test_export_is_read_by_either_database(db: Database, other: Database) -> None:
    await fill(db)
    lines = await dump(db)
    assert await backup.import_(other, lines) == len(lines) - 2
    assert await rows(other) == await rows(db)
    assert await migrate.check(other) == "current"
    assert await epoch(other) != await epoch(db)


async def test_life_goes_on_after_an_import(db: Database, other: Database) -> None:
    """The serial numbers go on where they were, and what was owed is owed."""
    await fill(db)
    await backup.import_(other, await dump(db))
    await commit(other, [new_item("a", 3, revision=2, epoch="later")], state=[2])
    sent = await claim(other, "g") + await claim(other, "f")  # type: ignore[operator]
    assert sorted((d.key, d.flow) for d in sent) == [("a", "f"), ("a", "g")]
    await know(other, "w", "idle", "new")
    await db.write(lambda tx: audit.note(tx, "x", "y", NOW))


async def test_import_into_a_database_in_use_is_refused(db: Database) -> None:
    await fill(db)
    lines = await dump(db)
    before = await rows(db)
    with pytest.raises(StoreError, match="in use"):
        await backup.import_(db, lines)
    assert await rows(db) == before


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda lines: lines[:-1], Damaged),
        (lambda lines: lines[:5] + lines[6:], Damaged),
        (lambda lines: [*lines[:5], lines[5][:-3], *lines[6:]], Damaged),
        (lambda lines: [*lines[:5], lines[5].replace("a", "b", 1), *lines[6:]], Damaged),
        (lambda lines: ["not JSON"], StoreError),
        (lambda lines: ['{"watcher": 99, "schema": "0001"}'], StoreError),
        (lambda lines: [lines[0].replace(f'"{migrate.head()}"', '"9999"'), *lines[1:]], DatabaseTooNew),
        (lambda lines: [], StoreError),
    ],
    ids=["cut_short", "line_lost", "line_cut", "byte_changed", "no_json", "other_format", "newer", "empty"],
)
async def test_damaged_export_changes_nothing(db: Database, damage, error: type[StoreError]) -> None:  # type: ignore[no-untyped-def]
    await know(db)
    await fill(db)
    lines = damage(await dump(db))
    before = await rows(db)
    with pytest.raises(error):
        await backup.import_(db, lines, replace=True)
    assert await rows(db) == before


async def test_backup_taken_under_load_is_whole(db: Database, tmp_path: Path) -> None:
    await know(db, "w")

    async def write() -> None:
        for n in range(30):
            await commit(db, [new_item(f"{n} {m}", m) for m in range(5)], state=n)

    writing = asyncio.create_task(write())
    copies = []
    for n in range(3):
        copies.append(await backup.backup(db, tmp_path / f"copy{n}"))
        await asyncio.sleep(0)
    await writing
    for n, copy in enumerate(copies):
        url = f"sqlite:///{tmp_path / f'restored{n}.db'}"
        await backup.restore(url, copy, NOW)
        restored = await Database.open(url)
        async with restored.read() as tx:
            version = (await tx.execute(text("SELECT coalesce(max(version), 0) FROM state"))).scalar_one()
            items = (await tx.execute(text("SELECT count(*) FROM item"))).scalar_one()
            owed = (await tx.execute(text("SELECT count(*) FROM delivery"))).scalar_one()
        await restored.close()
        assert items == owed == 5 * version


async def test_backup_never_overwrites_and_leaves_no_parts(db: Database, tmp_path: Path) -> None:
    copy = await backup.backup(db, tmp_path / "copies" / "one")
    assert copy.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StoreError, match="exists already"):
        await backup.backup(db, copy)
    assert [p.name for p in copy.parent.iterdir()] == ["one"]


async def test_restored_database_begins_a_new_epoch(database_url: str, tmp_path: Path) -> None:
    """Receivers have seen ids that were given after the backup: they must not come again for other items."""
    db = await Database.open(database_url)
    await migrate.upgrade(db, backup_to=None, now=NOW)
    await fill(db)
    copy = await backup.backup(db, tmp_path / "copy")
    before, first = await rows(db), await epoch(db)
    await know(db, "w", "idle", "born later")
    await db.close()
    aside = await backup.restore(database_url, copy, NOW)
    assert (aside is not None) == (db.dialect == "sqlite")
    db = await Database.open(database_url)
    assert await rows(db) == before
    assert await epoch(db) != first
    await db.close()
    if aside is not None:
        old = await Database.open(f"sqlite:///{aside}")
        async with old.read() as tx:
            assert "born later" in [w.name for w in await watchers.everyone(tx)]
        await old.close()


async def test_restore_beside_a_running_service_is_refused(tmp_path: Path, sqlite_db: Database) -> None:
    copy = await backup.backup(sqlite_db, tmp_path / "copy")
    with lock(sqlite_db.url):
        with pytest.raises(StoreError, match="in use by process"):
            await backup.restore(sqlite_db.url, copy, NOW)


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0 and then nothing", b"\xff\xfe", b"{}\n"])
async def test_bad_backup_leaves_the_database_as_it_is(tmp_path: Path, content: bytes) -> None:
    url = f"sqlite:///{tmp_path / 'watcher.db'}"
    db = await Database.open(url)
    await migrate.upgrade(db, backup_to=None, now=NOW)
    await fill(db)
    before = await rows(db)
    await db.close()
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(StoreError):
        await backup.restore(url, tmp_path / "bad", NOW)
    with pytest.raises(StoreError, match="no such backup"):
        await backup.restore(url, tmp_path / "nothing", NOW)
    db = await Database.open(url)
    assert await rows(db) == before
    await db.close()
    assert not [p.name for p in tmp_path.iterdir() if "restoring" in p.name]
