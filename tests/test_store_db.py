"""Connections and transactions: one writer, groups, locks, and errors that say what to do."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.support.postgres import Postgres
from tests.support.store import NOW, ended, know, proposal, start_python
from watcher.errors import Conflict, Damaged, DatabaseFull, StoreError
from watcher.store import meta, migrate, runs, states, watchers, writer
from watcher.store.db import Database, lock, network_filesystem


async def _put(tx: AsyncConnection, name: str, value: str) -> str:
    await meta.put(tx, name, value)
    return value


async def set_up(url: str) -> None:
    """What the service does first with its database."""
    database = await Database.open(url)
    try:
        await migrate.upgrade(database, backup_to=None, now=NOW)
    finally:
        await database.close()


async def test_what_waits_together_shares_one_commit(sqlite_db: Database) -> None:
    before = sqlite_db.commits
    written = await asyncio.gather(*(sqlite_db.write(lambda tx, n=n: _put(tx, f"n{n}", str(n))) for n in range(200)))
    assert written == [str(n) for n in range(200)]
    assert sqlite_db.commits - before <= 2


async def test_only_the_guilty_of_a_group_fails(db: Database) -> None:
    async def guilty(tx: AsyncConnection) -> str:
        await meta.put(tx, "guilty", "written, then regretted")
        raise Conflict("not this one")

    writes = [db.write(lambda tx, n=n: _put(tx, f"n{n}", str(n))) for n in range(20)]
    results = await asyncio.gather(*writes[:10], db.write(guilty), *writes[10:], return_exceptions=True)
    assert [r for r in results if isinstance(r, Exception)] == [results[10]]
    assert isinstance(results[10], Conflict)
    async with db.read() as tx:
        assert await meta.get(tx, "guilty") is None
        assert [await meta.get(tx, f"n{n}") for n in range(20)] == [str(n) for n in range(20)]


async def test_statement_that_fails_takes_nobody_with_it(db: Database) -> None:
    async def nonsense(tx: AsyncConnection) -> None:
        await tx.exec_driver_sql("SELECT * FROM no_such_table")

    results = await asyncio.gather(
        db.write(lambda tx: _put(tx, "a", "1")), db.write(nonsense), db.write(lambda tx: _put(tx, "b", "2")),
        return_exceptions=True,
    )  # fmt: skip
    assert results[0] == "1"
    assert isinstance(results[1], StoreError)
    assert results[2] == "2"


async def test_writer_whose_caller_gave_up_does_not_stop_the_others(sqlite_db: Database) -> None:
    go_on = threading.Event()

    async def slow(tx: AsyncConnection) -> None:
        go_on.wait(10)  # SQLite's operations run in the writer's thread

    first = asyncio.create_task(sqlite_db.write(slow))
    second = asyncio.create_task(sqlite_db.write(lambda tx: _put(tx, "a", "1")))
    third = asyncio.create_task(sqlite_db.write(lambda tx: _put(tx, "b", "2")))
    await asyncio.sleep(0)
    second.cancel()
    go_on.set()
    await first
    assert await third == "2"
    async with sqlite_db.read() as tx:
        assert await meta.get(tx, "a") is None


async def test_reader_does_not_wait_for_the_writer_nor_see_what_is_not_committed(sqlite_db: Database) -> None:
    entered, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    async def slow(tx: AsyncConnection) -> None:
        await meta.put(tx, "a", "1")
        loop.call_soon_threadsafe(entered.set)
        go_on.wait(10)

    writing = asyncio.create_task(sqlite_db.write(slow))
    await entered.wait()
    async with sqlite_db.read() as tx:
        assert await meta.get(tx, "a") is None
    go_on.set()
    await writing
    async with sqlite_db.read() as tx:
        assert await meta.get(tx, "a") == "1"


async def test_write_that_waits_for_anything_but_its_transaction_is_refused(sqlite_db: Database) -> None:
    """A transaction over a network call would stop every other writer."""

    async def dawdle(tx: AsyncConnection) -> None:
        await asyncio.to_thread(int)

    with pytest.raises(RuntimeError):
        await sqlite_db.write(dawdle)


async def test_reader_cannot_write(db: Database) -> None:
    with pytest.raises(StoreError):
        async with db.read() as tx:
            await meta.put(tx, "a", "1")


async def test_increments_by_two_processes_are_all_kept(db: Database) -> None:
    """Load, add one, compare-and-set, again after a conflict: in two processes at once."""
    await know(db, "w")
    code = """
import asyncio, sys
from tests.support.store import proposal
from watcher.errors import Conflict
from watcher.store import runs, states
from watcher.store.db import Database

async def increment(db, times):
    for _ in range(times):
        while True:
            async with db.read() as tx:
                memory = await states.load(tx, "w")
            state = 1 if memory.version == 0 else memory.state + 1
            wanted = proposal(expected=memory.version, state=state)
            try:
                await db.write(lambda tx: runs.commit(tx, wanted))
                break
            except Conflict:
                pass

async def main():
    db = await Database.open(sys.argv[1])
    await asyncio.gather(*(increment(db, int(sys.argv[2])) for _ in range(2)))
    await db.close()

asyncio.run(main())
"""
    times = 500 if os.environ.get("WATCHER_LONG") == "1" else 25
    processes = [start_python(code, db.url, str(times)) for _ in range(2)]
    for code_, _, err in await asyncio.gather(*(ended(p, 600) for p in processes)):
        assert code_ == 0, err
    async with db.read() as tx:
        memory = await states.load(tx, "w")
    assert (memory.version, memory.state) == (4 * times, 4 * times)


async def test_ticks_are_taken_once_by_two_processes(db: Database) -> None:
    await know(db, "w")
    code = """
import asyncio, sys
from datetime import timedelta
from tests.support.store import NOW
from watcher.store import watchers
from watcher.store.db import Database

async def main():
    db = await Database.open(sys.argv[1])
    for n in range(50):
        if await db.write(lambda tx: watchers.take(tx, "w", NOW + timedelta(seconds=n))):
            print(n)
    await db.close()

asyncio.run(main())
"""
    processes = [start_python(code, db.url) for _ in range(2)]
    taken = []
    for code_, out, err in await asyncio.gather(*(ended(p) for p in processes)):
        assert code_ == 0, err
        taken += [int(line) for line in out.split()]
    assert len(taken) == len(set(taken))
    assert max(taken) == 49


# --- locks


def test_second_service_on_one_file_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'watcher.db'}"
    code = "import sys; from watcher.store.db import lock\nwith lock(sys.argv[1]): print('held', flush=True); input()"
    holder = start_python(code, url)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StoreError, match=f"process {holder.pid}"):
        with lock(url):
            pass
    holder.communicate("\n")
    with lock(url):
        pass


def test_lock_of_a_killed_holder_is_free(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'watcher.db'}"
    code = "import sys; from watcher.store.db import lock\nwith lock(sys.argv[1]): print('held', flush=True); input()"
    holder = start_python(code, url)
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.kill()
    holder.communicate()
    with lock(url):
        pass


def test_postgres_needs_no_lock_file() -> None:
    with lock("postgresql://nowhere/watcher"), lock("postgresql://nowhere/watcher"):
        pass


MOUNTS = """\
/dev/vda / ext4 rw 0 0
files:/export /srv/data nfs4 rw 0 0
/dev/vdb /srv/data/local ext4 rw 0 0
//host/share /mnt/my\\040share cifs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/watcher/watcher.db", None),
        ("/srv/data/watcher.db", "nfs4"),
        ("/srv/data/local/watcher.db", None),
        ("/srv/database/watcher.db", None),
        ("/mnt/my share/watcher.db", "cifs"),
    ],
)
def test_network_file_system_is_recognised(path: str, kind: str | None) -> None:
    assert network_filesystem(Path(path), MOUNTS) == kind


async def test_file_locked_by_another_program_is_waited_for(sqlite_db: Database, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "watcher.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    writing = asyncio.create_task(sqlite_db.write(lambda tx: _put(tx, "a", "1")))
    done, _ = await asyncio.wait([writing], timeout=0.3)
    assert not done
    async with sqlite_db.read() as tx:  # meanwhile readers read
        assert await meta.get(tx, "a") is None
    other.execute("COMMIT")
    assert await writing == "1"
    other.close()


async def test_file_locked_for_too_long_is_an_error_that_names_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BUSY_SECONDS", 0.05)
    path = tmp_path / "watcher.db"
    db = await Database.open(f"sqlite:///{path}")
    await migrate.upgrade(db, backup_to=None, now=NOW)
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('BEGIN IMMEDIATE'); print('held', flush=True); input()"
    )
    holder = start_python(code, str(path))
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(StoreError, match=f"locked by another program.*process {holder.pid}"):
        await db.write(lambda tx: _put(tx, "a", "1"))
    await asyncio.to_thread(holder.communicate, "\n")
    assert await db.write(lambda tx: _put(tx, "a", "1")) == "1"
    await db.close()


# --- the loop borrows the connection


async def _where(tx: AsyncConnection, seen: list[str], name: str = "a") -> str:
    seen.append(threading.current_thread().name)
    return await _put(tx, name, "1")


async def test_short_write_runs_in_the_loop_and_is_answered_when_it_is_durable(
    sqlite_db: Database, tmp_path: Path
) -> None:
    seen: list[str] = []
    before = sqlite_db.commits
    assert await sqlite_db.write(lambda tx: _where(tx, seen), short=True) == "1"
    assert seen == [threading.current_thread().name]
    assert sqlite_db.commits - before == 1
    with sqlite3.connect(tmp_path / "watcher.db") as other:
        assert other.execute("SELECT value FROM meta WHERE name = 'a'").fetchone() == ("1",)


async def test_short_write_waits_its_turn_behind_what_the_thread_has_to_do(sqlite_db: Database) -> None:
    seen: list[str] = []
    long = asyncio.create_task(sqlite_db.write(lambda tx: _where(tx, seen, "long")))
    await asyncio.sleep(0)  # it is the thread's now, whether that has begun or not
    assert await sqlite_db.write(lambda tx: _where(tx, seen, "short"), short=True) == "1"
    assert await long == "1"
    assert seen == ["store-writer"] * 2


async def test_writes_of_both_kinds_see_each_other_in_the_order_in_which_they_came(sqlite_db: Database) -> None:
    async def add(tx: AsyncConnection) -> int:
        count = int(await meta.get(tx, "count") or 0) + 1
        await meta.put(tx, "count", str(count))
        return count

    written = await asyncio.gather(*(sqlite_db.write(add, short=bool(n % 3)) for n in range(300)))
    assert written == [*range(1, 301)]


async def test_short_write_that_fails_leaves_nothing_and_raises_what_it_raised(sqlite_db: Database) -> None:
    seen: list[str] = []

    async def guilty(tx: AsyncConnection) -> None:
        await _where(tx, seen)
        raise Conflict("not this one")

    with pytest.raises(Conflict, match="not this one"):
        await sqlite_db.write(guilty, short=True)
    assert seen == [threading.current_thread().name, "store-writer"]  # the thread knows what to make of errors
    async with sqlite_db.read() as tx:
        assert await meta.get(tx, "a") is None
    assert await sqlite_db.write(lambda tx: _put(tx, "a", "2"), short=True) == "2"


async def test_short_write_never_keeps_the_loop_waiting_for_another_programs_lock(
    sqlite_db: Database, tmp_path: Path
) -> None:
    other = sqlite3.connect(tmp_path / "watcher.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    seen: list[str] = []
    writing = asyncio.create_task(sqlite_db.write(lambda tx: _where(tx, seen), short=True))
    await asyncio.sleep(0)  # would last as long as the lock
    assert not writing.done()
    other.execute("COMMIT")
    other.close()
    assert await writing == "1"
    assert seen == ["store-writer"]


async def test_short_write_whose_caller_gave_up_is_committed_all_the_same(sqlite_db: Database) -> None:
    """What ran may have been acted on; and a transaction that nobody ends would stop everybody."""
    given_up = asyncio.create_task(sqlite_db.write(lambda tx: _put(tx, "a", "1"), short=True))
    await asyncio.sleep(0)
    given_up.cancel()
    assert await sqlite_db.write(lambda tx: _put(tx, "b", "2")) == "2"
    async with sqlite_db.read() as tx:
        assert await meta.get(tx, "a") == "1"


async def test_short_write_that_was_not_short_sends_the_next_ones_to_the_thread(
    sqlite_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BORROWED", -1.0)  # whatever it takes is too long
    seen: list[str] = []
    for _ in range(3):
        await sqlite_db.write(lambda tx: _where(tx, seen), short=True)
    assert seen == [threading.current_thread().name, "store-writer", "store-writer"]


async def test_short_write_for_which_the_disk_has_no_room_is_an_error_and_the_next_one_goes_on(
    sqlite_db: Database,
) -> None:
    async def pages(tx: AsyncConnection) -> int:
        return int((await tx.exec_driver_sql("PRAGMA page_count")).scalar_one())

    async def allow(tx: AsyncConnection, count: int) -> None:
        await tx.exec_driver_sql(f"PRAGMA max_page_count = {count}")

    full = await sqlite_db.write(pages) + 2
    await sqlite_db.write(lambda tx: allow(tx, full))
    with pytest.raises(DatabaseFull, match="free some space"):
        await sqlite_db.write(lambda tx: _put(tx, "large", "x" * 100_000), short=True)
    assert await sqlite_db.write(lambda tx: _put(tx, "small", "fits"), short=True) == "fits"


@pytest.mark.parametrize("short", [False, True])
async def test_write_whose_commit_fails_is_undone_and_says_why(sqlite_db: Database, short: bool) -> None:
    async def tables(tx: AsyncConnection) -> None:
        await tx.exec_driver_sql("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
        await tx.exec_driver_sql("CREATE TABLE child (id INTEGER REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")

    async def orphan(tx: AsyncConnection) -> None:
        await tx.exec_driver_sql("INSERT INTO child VALUES (7)")  # is checked at the commit

    await sqlite_db.write(tables)
    with pytest.raises(StoreError, match="FOREIGN KEY"):
        await sqlite_db.write(orphan, short=short)
    assert await sqlite_db.write(lambda tx: _put(tx, "a", "1"), short=short) == "1"
    async with sqlite_db.read() as tx:
        assert (await tx.exec_driver_sql("SELECT count(*) FROM child")).scalar_one() == 0


# --- trouble


async def test_full_disk_rolls_everything_back_and_work_resumes_by_itself(sqlite_db: Database) -> None:
    await know(sqlite_db, "w")

    async def pages(tx: AsyncConnection) -> int:
        return int((await tx.exec_driver_sql("PRAGMA page_count")).scalar_one())

    async def allow(tx: AsyncConnection, count: int) -> None:
        await tx.exec_driver_sql(f"PRAGMA max_page_count = {count}")

    now = await sqlite_db.write(pages)
    await sqlite_db.write(lambda tx: allow(tx, now + 5))
    large = proposal(state="x" * 200_000)
    with pytest.raises(DatabaseFull, match="free some space"):
        await sqlite_db.write(lambda tx: runs.commit(tx, large))
    async with sqlite_db.read() as tx:
        assert (await states.load(tx, "w")).version == 0
        assert await runs.list(tx, "w") == []
    assert await sqlite_db.write(lambda tx: _put(tx, "small", "fits")) == "fits"
    results = await asyncio.gather(
        sqlite_db.write(lambda tx: runs.commit(tx, large)),
        sqlite_db.write(lambda tx: _put(tx, "beside", "fits too")),
        return_exceptions=True,
    )
    assert isinstance(results[0], DatabaseFull)
    assert results[1] == "fits too"
    await sqlite_db.write(lambda tx: allow(tx, 1_000_000))
    assert (await sqlite_db.write(lambda tx: runs.commit(tx, large))).version == 1


@pytest.mark.parametrize(
    "ruin",
    [
        lambda file: file.write(b"\0" * 100),
        lambda file: file.write(b"This is not a database, and never was.\n" * 100),
        lambda file: file.truncate(5000),
    ],
    ids=["zeroed_header", "overwritten", "truncated"],
)
async def test_damaged_file_is_refused_and_the_message_points_at_the_backup(tmp_path: Path, ruin) -> None:  # type: ignore[no-untyped-def]
    url = f"sqlite:///{tmp_path / 'watcher.db'}"
    await set_up(url)
    with (tmp_path / "watcher.db").open("r+b") as file:
        ruin(file)
    size = (tmp_path / "watcher.db").stat().st_size
    with pytest.raises(Damaged, match="restore"):
        await set_up(url)
    assert (tmp_path / "watcher.db").stat().st_size == size


async def test_missing_file_is_not_made_by_a_reader(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such database"):
        await Database.open(f"sqlite:///{tmp_path / 'watcher.db'}", read_only=True)
    assert list(tmp_path.iterdir()) == []


async def test_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file"):
        await Database.open(f"sqlite:///{tmp_path / 'file' / 'watcher.db'}")


async def test_read_only_database_refuses_to_write(sqlite_db: Database) -> None:
    reader = await Database.open(sqlite_db.url, read_only=True)
    with pytest.raises(StoreError, match="reading only"):
        await reader.write(lambda tx: _put(tx, "a", "1"))
    async with reader.read() as tx:
        assert await meta.epoch(tx)
    await reader.close()


async def test_server_that_does_not_answer_is_an_error_that_hides_the_password() -> None:
    with pytest.raises(StoreError, match="does not answer") as caught:
        await Database.open("postgresql://me:hunter2@127.0.0.1:1/watcher")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["mysql://localhost/x", "sqlite://", "sqlite:///:memory:"])
async def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match="database"):
        await Database.open(url)


async def test_server_that_restarts_is_used_again_without_a_restart_of_ours(
    postgres: Postgres, postgres_db: Database
) -> None:
    await know(postgres_db, "w")
    await asyncio.to_thread(postgres.restart)
    async with postgres_db.read() as tx:
        assert [w.name for w in await watchers.everyone(tx)] == ["w"]
    await postgres_db.write(lambda tx: _put(tx, "a", "1"))


async def test_closing_leaves_no_wal_behind(tmp_path: Path) -> None:
    db = await Database.open(f"sqlite:///{tmp_path / 'watcher.db'}")
    await migrate.upgrade(db, backup_to=None, now=NOW)
    assert (tmp_path / "watcher.db-wal").stat().st_size > 0
    await db.close()
    assert not (tmp_path / "watcher.db-wal").exists()


async def test_commits_are_durable_and_quiet_reads_are_free(sqlite_db: Database, tmp_path: Path) -> None:
    """FULL: each commit is flushed. A read flushes nothing, and takes no lock that a writer would wait for."""

    async def level(tx: AsyncConnection) -> int:
        return int((await tx.exec_driver_sql("PRAGMA synchronous")).scalar_one())

    assert await sqlite_db.write(level) == 2
    wal = tmp_path / "watcher.db-wal"
    before, commits = wal.stat(), sqlite_db.commits
    await know(sqlite_db)
    async with sqlite_db.read() as tx:
        await watchers.everyone(tx)
    after = wal.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert sqlite_db.commits == commits + 1
