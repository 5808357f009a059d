"""A poll of a page of 1,000 items, when 10 thousand keys were seen before and when 10 million were.

    python -m benchmarks.diff [ROUNDS]

Goals: at most 4 times the time and 20 MB more memory with 10 million; with nothing new no write transaction and no
flush, which shows in the write-ahead log: not a byte of it changes.
Making the ledger of 10 million takes a minute or two and half a gigabyte in the temporary folder.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.floor import Report, Took, interleave, rss, took
from watcher import diff
from watcher.store import migrate, runs, seen, states, watchers
from watcher.store.db import Database
from watcher.values import Entry, Label, Listing, Proposal, RunRecord, Watcher

PAGE = 1000
SMALL, LARGE = 10_000, 10_000_000
WATCHER = Watcher("w", "w", Path("/w.py"))
LABEL = Label(style="listing", key="id")


def story(key: str) -> dict[str, Any]:
    return {"id": key, "title": "a title of ordinary length, as stories have", "url": f"https://example.org/{key}"}


class Ledger:
    """A watcher that has seen ``size`` keys, and a page of which it knows all."""

    def __init__(self, folder: Path, size: int) -> None:
        self.file, self.size = folder / f"{size}.db", size
        self.known = [story(f"known {n}") for n in range(PAGE)]
        self.number = 0
        self.db: Database

    async def open(self) -> None:
        now = datetime.now(UTC)
        self.db = await Database.open(f"sqlite:///{self.file}")
        await migrate.upgrade(self.db, backup_to=None, now=now)
        await self.db.write(lambda tx: watchers.sync(tx, {"w": None}, now))
        fill = sqlite3.connect(self.file)
        sql = (
            "INSERT INTO seen (watcher_id, key_hash, content, revision, present, listed_day) VALUES (1, ?, ?, 1, 1, 0)"
        )
        fill.executemany(sql, self.others())
        fill.commit()
        fill.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        fill.close()
        await self.poll(self.known)

    def others(self) -> Iterator[tuple[bytes, bytes]]:
        """As many keys as were seen, spread like hashes, in the table's order."""
        step = 2**128 // self.size
        for n in range(self.size - PAGE):
            yield (n * step + n % 7).to_bytes(16, "big"), b"0123456789abcdef"

    def nothing_new(self) -> Any:
        return lambda: took(lambda: self.poll(self.known))

    def hundred_new(self) -> Any:
        async def once() -> Took:
            self.number += 1
            fresh = [story(f"new {self.number} {n}") for n in range(100)]
            return await took(lambda: self.poll(self.known[100:] + fresh))

        return once

    async def poll(self, page: list[dict[str, Any]]) -> None:
        """Load, diff, and commit if anything is new: the deliveries, which cost the same everywhere, left out."""
        now = datetime.now(UTC)
        listing = Listing(LABEL, [Entry(item, item["id"]) for item in page])
        async with self.db.read() as tx:
            memory = await states.load(tx, "w")
            known = await seen.probe(tx, "w", diff.hashes(WATCHER, LABEL, memory, listing))
        proposed = diff.compare(WATCHER, LABEL, memory, listing, known, now)
        if diff.silent(memory, proposed):
            return
        record = RunRecord("w", "ok", now, now)
        proposal = Proposal("w", memory.version, proposed.memory, (), proposed.learn, proposed.touch, record)
        await self.db.write(lambda tx: runs.commit(tx, proposal))

    def log(self) -> tuple[int, int, int]:
        wal = self.file.with_name(self.file.name + "-wal").stat()
        return self.db.commits, wal.st_size, wal.st_mtime_ns


async def main(rounds: int) -> None:
    report = Report(f"A page of {PAGE:,} against {SMALL:,} and {LARGE:,} seen keys")
    with tempfile.TemporaryDirectory() as folder:
        small, large = Ledger(Path(folder), SMALL), Ledger(Path(folder), LARGE)
        for ledger in (small, large):
            await ledger.open()
            await ledger.db.close()
        small.db = await Database.open(f"sqlite:///{small.file}")
        await interleave({"0": small.nothing_new(), "100": small.hundred_new()}, 20)
        before = rss()
        large.db = await Database.open(f"sqlite:///{large.file}")
        await interleave({"0": large.nothing_new(), "100": large.hundred_new()}, 20)
        grown = (rss() - before) / 1e6
        logs = small.log(), large.log()
        nothing = await interleave({"10 k, 0 new": small.nothing_new(), "10 M, 0 new": large.nothing_new()}, rounds)
        quiet = logs == (small.log(), large.log())
        some = await interleave({"10 k, 100 new": small.hundred_new(), "10 M, 100 new": large.hundred_new()}, rounds)
        for ledger in (small, large):
            await ledger.db.close()
    report.times(nothing, "10 k, 0 new")
    report.times(some, "10 k, 100 new")
    report.goal("0 new: times the time at 10 k (wall)", nothing["10 M, 0 new"].wall / nothing["10 k, 0 new"].wall, 4)
    report.goal("100 new: times the time at 10 k (wall)", some["10 M, 100 new"].wall / some["10 k, 100 new"].wall, 4)
    report.goal("more memory at 10 M, MB", grown, 20)
    report.goal("0 new: transactions and bytes written", 0 if quiet else 1, 0)
    report.exit()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 31))
