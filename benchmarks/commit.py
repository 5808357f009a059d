"""One commit of 10,000 new items, from the diff on, against raw `executemany` of the same rows.

    python -m benchmarks.commit [ROUNDS]

Goal: at most 2.5 times the floor. The floor inserts the rows that the run made into an equal database, with the same
indexes, in one transaction, synchronous=FULL: what SQLite alone takes.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.floor import Report, Took, interleave, took
from watcher import diff
from watcher.run import Runner, _Before
from watcher.store import meta, migrate, runs, seen, states, watchers
from watcher.store.db import Database
from watcher.values import (
    Config,
    Entry,
    FirstRun,
    Flow,
    Label,
    Listing,
    MaxChange,
    Proposal,
    RunRecord,
    Watcher,
)

ITEMS = 10_000
TABLES = ("run", "item", "delivery", "seen", "state_history")
WATCHER = Watcher(
    "w", "w", Path("/w.py"), ("f",), first_run=FirstRun("all"), max_change=MaxChange(None, None), max_items=ITEMS
)
LABEL = Label(style="listing", key="id")
DELIVERED = "UPDATE delivery SET status = 1 WHERE status = 0"  # between two runs, in both files


def page(number: int) -> list[dict[str, Any]]:
    text = "a title of ordinary length, as stories have"
    return [
        {"id": f"{number}-{n}", "title": text, "url": f"https://example.org/{number}/{n}", "points": n, "by": "someone"}
        for n in range(ITEMS)
    ]


class Ours:
    """What a run does once its script has answered: probe, diff, items, one commit."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.number = 0
        config = Config(None, db.url, Path("/"), flows={"f": Flow("f")}, watchers={"w": WATCHER})
        nobody: Any = None
        self.runner = Runner(lambda: config, db, nobody, nobody, nobody, lambda: datetime.now(UTC), lambda _: None)

    async def once(self) -> Took:
        self.number += 1
        listed = page(self.number)
        listing = Listing(LABEL, [Entry(item, item["id"]) for item in listed])
        spent = await took(lambda: self.run(listing))
        await self.db.write(lambda tx: tx.exec_driver_sql(DELIVERED))
        return spent

    async def run(self, listing: Listing) -> None:
        now = datetime.now(UTC)
        async with self.db.read() as tx:
            memory, status = await states.load(tx, "w"), await watchers.get(tx, "w")
            before = _Before(status, memory, await meta.epoch(tx), memory.version)
            hashes = [*diff.hashes(WATCHER, LABEL, memory, listing)]
            known = await seen.probe(tx, "w", hashes)
        proposed = diff.compare(WATCHER, LABEL, memory, listing, known, now)
        items, _ = self.runner._items(WATCHER, proposed.finds, before, now)
        record = RunRecord("w", "ok", now, now, counts={"new": len(items)})
        proposal = Proposal("w", memory.version, proposed.memory, items, proposed.learn, proposed.touch, record)
        done = await self.db.write(lambda tx: runs.commit(tx, proposal))
        assert done.items == done.deliveries == ITEMS


class Floor:
    """The rows of the newest run of ours, in another file, by the standard library."""

    def __init__(self, ours: Path, file: Path) -> None:
        self.ours = sqlite3.connect(ours)
        self.file = sqlite3.connect(file, isolation_level=None)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=1000"):
            self.file.execute(f"PRAGMA {pragma}")

    def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        newest = self.ours.execute("SELECT max(id) FROM run").fetchone()[0]
        first, last = self.ours.execute("SELECT min(seq), max(seq) FROM item WHERE run_id = ?", (newest,)).fetchone()
        where = {
            "run": f"WHERE id = {newest}",
            "item": f"WHERE run_id = {newest}",
            "delivery": f"WHERE item_seq BETWEEN {first} AND {last}",
            "seen": f"WHERE key_hash IN (SELECT key_hash FROM item WHERE run_id = {newest})",
            "state_history": f"WHERE run_id = {newest}",
        }
        rows = {table: self.ours.execute(f"SELECT * FROM {table} {where[table]}").fetchall() for table in TABLES}
        status = [column[1] for column in self.ours.execute("PRAGMA table_info(delivery)")].index("status")
        rows["delivery"] = [(*row[:status], 0, *row[status + 1 :]) for row in rows["delivery"]]
        return rows

    async def once(self) -> Took:
        rows = self.rows()
        spent = await took(lambda: self.insert(rows))
        self.file.execute(DELIVERED)
        return spent

    async def insert(self, rows: dict[str, list[tuple[Any, ...]]]) -> None:
        self.file.execute("BEGIN IMMEDIATE")
        for table, some in rows.items():
            marks = ", ".join("?" * len(some[0]))
            self.file.executemany(f"INSERT INTO {table} VALUES ({marks})", some)
        self.file.execute("COMMIT")


async def database(file: Path) -> Database:
    db = await Database.open(f"sqlite:///{file}")
    await migrate.upgrade(db, backup_to=None, now=datetime.now(UTC))
    await db.write(lambda tx: watchers.sync(tx, {"w": None}, datetime.now(UTC)))
    return db


async def main(rounds: int) -> None:
    report = Report(f"Diff, state, ledger, items and deliveries of {ITEMS:,} new items in one commit")
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "ours.db"), Path(folder, "floor.db")
        await (await database(files[1])).close()
        db = await database(files[0])
        ours, floor = Ours(db), Floor(*files)
        await ours.once()  # what is compiled and cached once
        before = db.commits
        figures = await interleave({"ours": ours.once, "raw executemany": floor.once}, rounds)
        commits = (db.commits - before) / rounds - 1  # the one that marks them as delivered
        await db.close()
    report.times(figures, "raw executemany")
    report.line("items a second", f"{ITEMS / figures['ours'].wall:9.0f}")
    report.goal("commits for one run", commits, 1)
    report.goal("times the floor (wall)", figures["ours"].wall / figures["raw executemany"].wall, 2.5)
    report.exit()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 7))
