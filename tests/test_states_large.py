"""States that are too large for a row: kept as objects, verified, and never taken for no state at all."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Desk, desk
from tests.support.outbox import prepare
from tests.test_flows_large import DAY, Attic, _age
from watcher.errors import Conflict, Damaged, ObjectsError, StoreError
from watcher.objects.stow import STATES, UNWANTED
from watcher.store import states
from watcher.store.db import Database
from watcher.values import UNSET, Memory

LARGE = {"seen": "x" * 5000}
LARGER = {"seen": "y" * 6000}


@pytest.fixture
def attic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attic:
    monkeypatch.setattr(states, "LARGE", 2000)
    return Attic(tmp_path / "objects")


@pytest.fixture
async def store(db: Database, attic: Attic) -> Database:
    await prepare(db, "news")
    db.attic = attic.stowage
    return db


async def put(db: Database, state: Any, expected: int) -> int:
    kept = await states.apart(db, Memory(version=expected, state=state))
    return await db.write(lambda tx: states.put(tx, "news", kept, expected, datetime.now(UTC)))


async def stored(db: Database, version: int | None = None) -> Memory:
    async with db.read() as tx:
        return await (states.load(tx, "news") if version is None else states.version(tx, "news", version))


async def test_a_large_state_is_an_object_and_its_row_speaks_of_it(store: Database, attic: Attic) -> None:
    assert await put(store, {"small": 1}, 0) == 1
    assert await attic.keys() == []
    assert await put(store, LARGE, 1) == 2
    row = await stored(store)
    assert (row.state, row.state_at) == (UNSET, (await attic.keys())[0])
    assert len(states.encode(row)) < 500
    back = await states.whole(store, row)
    assert (back.state, back.state_at, back.version) == (LARGE, "", 2)
    assert await put(store, {"small": 2}, 2) == 3  # which the object must not stand before
    assert (await states.whole(store, await stored(store))).state == {"small": 2}
    assert (await states.whole(store, await stored(store, 2))).state == LARGE  # a rollback finds it


async def test_what_cannot_be_read_is_never_no_state(store: Database, attic: Attic) -> None:
    await put(store, LARGE, 0)
    row, storage = await stored(store), await attic.objects.storage()
    await storage.put(row.state_at, b"{}")
    with pytest.raises(Damaged):
        await states.whole(store, row)
    await storage.delete(row.state_at)
    with pytest.raises(StoreError, match="cannot be read"):
        await states.whole(store, row)
    store.attic = None
    with pytest.raises(StoreError, match="ask the service"):
        await states.whole(store, row)


async def test_a_crash_between_object_and_commit_leaves_an_orphan_that_is_collected(
    store: Database, attic: Attic
) -> None:
    await put(store, LARGE, 0)
    with pytest.raises(Conflict):
        await put(store, LARGER, 7)  # its object is stowed, its commit fails
    assert len(await attic.keys()) == 2

    async def wanted() -> set[str]:
        return await states.stowed(store)

    assert await attic.stowage.collect(STATES, UNWANTED, wanted) == 0  # too young: it may be about to be committed
    await _age(attic, 8 * DAY)
    assert await attic.stowage.collect(STATES, UNWANTED, wanted) == 1
    assert (await states.whole(store, await stored(store))).state == LARGE
    attic.clock.advance(timedelta(hours=2))
    await put(store, LARGER, 1)  # a key that was collected is not given again
    assert (await states.whole(store, await stored(store))).state == LARGER


async def test_a_storage_that_is_full_keeps_the_state_as_it_was(store: Database, attic: Attic) -> None:
    class Full:
        async def state(self, body: bytes) -> str:
            raise ObjectsError("no space left", kind="full")

    await put(store, LARGE, 0)
    store.attic = Full()
    with pytest.raises(StoreError, match="no space left"):
        await put(store, LARGER, 1)
    store.attic = attic.stowage
    assert (await states.whole(store, await stored(store))).state == LARGE


async def test_without_a_storage_it_stands_in_its_row(store: Database, attic: Attic) -> None:
    attic.config = replace(attic.config, storages={})
    await put(store, LARGE, 0)
    assert (await stored(store)).state == LARGE


SCRIPT = """
from watcher import get_state, set_state

def main() -> list[dict]:
    state = get_state() or {"n": 0, "filling": "x" * 5000}
    set_state({**state, "n": state["n"] + 1})
    return [{"id": state["n"]}]
"""


@pytest.fixture
def watcher(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(states, "LARGE", 2000)
    return desk(tmp_path, capsys, monkeypatch)


def test_a_script_with_a_large_state_runs_again_and_again(watcher: Desk) -> None:
    (watcher.where / "listing.py").write_text(SCRIPT)
    watcher.configure(change=lambda text: text.partition("with =")[0])
    for _ in range(3):
        watcher("run", "one")
    assert watcher.json("state", "get", "one")["state"]["n"] == 3
    objects = [file for file in watcher.where.rglob("*.json") if "states" in file.parts]
    assert len(objects) == 3
    assert b"xxxxxxxxxx" not in (watcher.where / "watcher.db").read_bytes()
    assert {"op": "replace", "path": "/state/n", "value": 3} in watcher.json("state", "diff", "one")["patch"]
    watcher("state", "rollback", "one", "1")
    assert watcher.json("state", "get", "one")["state"]["n"] == 1
    watcher("run", "one")
    assert watcher.json("state", "get", "one")["state"]["n"] == 2
