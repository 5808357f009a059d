"""Trouble with the database under the real service: locked, full, damaged, cut, too new, out of reach, in use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest

from tests.support.receiver import Receiver
from tests.support.scripts import until
from tests.support.service import Service
from tests.support.site import Site
from tests.support.trouble import World, listed
from watcher.errors import StoreError
from watcher.store import db as store_db
from watcher.store import writer as store_writer

pytestmark = pytest.mark.timeout(240)


@asynccontextmanager
async def worlds(where: Path) -> AsyncIterator[World]:
    async with Site() as site, Receiver() as receiver:
        world = World(where, site, receiver)
        try:
            yield world
        finally:
            world.service.kill()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with worlds(tmp_path) as world:
        yield world


async def running(world: World, count: int = 1) -> None:
    """Start a watcher of one page beside the good ones, and wait for what it lists first."""
    url = world.site.on("/list", listed(count))
    if "list" not in world.watchers:
        options = f'with = {{ url = "{url}" }}\nmax_change = 100000'
        world.watch("list", options, trigger="http_json", every="200ms")
    world.service.start()
    await world.service.ready()
    await received(world, count)


async def received(world: World, count: int, seconds: float = 30) -> None:
    """Wait until everything of the watcher was received, and each once."""
    wanted = {("list", str(n)) for n in range(count)}
    assert await until(lambda: wanted <= set(world.received()), seconds), world.service.tail()
    assert max(world.received().values()) == 1


@contextmanager
def held(database: Path) -> Iterator[int]:
    """The file is locked by another program for as long as this lasts; its process id."""
    program = "import sqlite3, sys; d = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60); "
    program += "d.execute('BEGIN EXCLUSIVE'); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield holder.pid
        holder.communicate()


# --- locked -----------------------------------------------------------------------------------------------------------


async def test_a_lock_by_another_program_is_waited_for(world: World) -> None:
    await running(world)
    for seconds, count in ((0.1, 3), (2.0, 5)):
        with held(world.where / "watcher.db"):
            before = len(world.received())
            world.site.on("/list", listed(count))
            await asyncio.sleep(seconds)  # so long is it held
            assert (await world.service.get("/readyz"))[0] == 200
            assert (await world.type("status"))[0] == 0, "reading goes on"
            assert len(world.received()) == before
        await received(world, count)
    assert world.service.events("run.not_stored") == []
    assert await world.service.stop() == 0


@pytest.mark.long
async def test_a_lock_for_half_a_minute_fails_runs_names_the_holder_and_loses_nothing(world: World) -> None:
    await running(world)
    before = world.states()
    with held(world.where / "watcher.db") as pid:
        world.site.on("/list", listed(5))
        told = await world.service.event("run.not_stored", seconds=60)
        assert f"locked by another program (held by process {pid})" in told["error"]
        assert (await world.service.get("/readyz"))[0] == 200
        code, out, _ = await world.type("items", "list")
        assert (code, "list" in out) == (0, True)
        assert world.states() == before
    await received(world, 5, seconds=60)
    assert await world.service.stop() == 0


async def test_what_waits_for_a_lock_fails_together_and_not_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "BUSY_SECONDS", 0.2)
    db = await store_db.Database.open(f"sqlite:///{tmp_path / 'watcher.db'}")

    async def nothing(tx: object) -> None: ...

    with held(tmp_path / "watcher.db"):
        began = time.monotonic()
        ended = await asyncio.gather(*(db.write(nothing) for _ in range(20)), return_exceptions=True)
        assert time.monotonic() - began < 20 * 0.2 * 4 / 2, "one alone waits four times 0.2 s, and a little between"
    assert all(isinstance(error, StoreError) and "locked by another program" in str(error) for error in ended)
    await db.close()


async def test_a_long_wal_is_cut_although_somebody_always_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "WAL_LIMIT", 1_000_000)
    monkeypatch.setattr(store_writer, "WAL_LOOK", 0.0)
    db = await store_db.Database.open(f"sqlite:///{tmp_path / 'watcher.db'}")
    wal, longest = tmp_path / "watcher.db-wal", 0
    await db.write(lambda tx: tx.exec_driver_sql("CREATE TABLE t (x)"))
    reading = True

    async def read() -> None:
        while reading:
            async with db.read() as tx:
                await tx.exec_driver_sql("SELECT count(*) FROM t")
                await asyncio.sleep(0.01)  # so long does its view of the database last

    readers = [asyncio.create_task(read()) for _ in range(4)]
    for _ in range(200):
        await db.write(lambda tx: tx.exec_driver_sql("INSERT INTO t VALUES (zeroblob(100000))"))
        longest = max(longest, wal.stat().st_size)
    reading = False
    await asyncio.gather(*readers)
    assert longest < 8_000_000, "20 MB were written"
    await db.close()


# --- full -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24M", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may mount; RLIMIT_FSIZE stands for it in test_app.py")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


async def test_a_full_disk_pauses_runs_and_frees_them_by_itself(small_disk: Path) -> None:
    async with worlds(small_disk) as world:
        await running(world)
        before = world.states()
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        log = small_disk / "service.log"
        with contextlib.suppress(OSError), log.open("ab", buffering=0) as file:
            while True:  # its last page has no room either
                file.write(b"\n")
        world.site.on("/list", listed(500))
        for _ in range(200):
            if (await world.service.get("/readyz"))[0] == 503:
                break
            await asyncio.sleep(0.1)  # another process: there is nothing to await
        status, detail = await world.service.get("/readyz")
        assert status == 503
        assert "free some space" in detail
        assert world.states() == before
        assert world.rows("SELECT count(*) FROM item WHERE key != '0'") == [(0,)]
        assert world.service.process is not None
        assert world.service.process.poll() is None, "nor does it end because it cannot write its log"
        filler.unlink()
        began = time.monotonic()
        await received(world, 500, seconds=40)
        assert time.monotonic() - began < 30
        assert (await world.service.get("/readyz"))[0] == 200
        assert await world.service.stop() == 0


# --- damaged ----------------------------------------------------------------------------------------------------------


def flipped(body: bytes, dice: random.Random) -> bytes:
    """The same with one bit changed."""
    at = dice.randrange(len(body) * 8)
    return body[: at // 8] + bytes([body[at // 8] ^ (1 << at % 8)]) + body[at // 8 + 1 :]


def flip(database: Path, table: str, column: str, rows: str, dice: random.Random) -> int:
    """Change one bit in a column of each of these rows, and nothing else. How many were changed."""
    with closing(sqlite3.connect(database)) as db:
        found = db.execute(f"SELECT rowid, {column} FROM {table} WHERE {rows}").fetchall()
        changed = [(flipped(bytes(body), dice), rowid) for rowid, body in found]
        db.executemany(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", changed)
        db.commit()
        return len(changed)


async def test_damaged_state_quarantines_and_makes_no_change_of_anything(world: World) -> None:
    count = 100 if os.environ.get("WATCHER_LONG") == "1" else 30
    dice = random.Random(1)
    url = world.site.on("/list", listed(3))
    for n in range(count):
        world.watch(f"w{n}", f'with = {{ url = "{url}" }}\non = ["new", "changed", "removed"]', trigger="http_json")
    world.service.start()
    await world.service.ready()
    assert await until(lambda: len(world.received()) == 3 * count, 60), world.service.tail()
    assert await world.service.stop() == 0

    victims = "watcher_id IN (SELECT id FROM watcher WHERE name LIKE 'w%') AND watcher_id % 2 = 0"
    ruined = flip(world.where / "watcher.db", "state", "body", victims, dice)
    assert ruined >= count // 2 - 1
    before = world.states()
    world.service.start()
    await world.service.ready()
    assert await until(lambda: len(world.service.events("watcher.quarantined")) == ruined, 60), world.service.tail()
    told = world.service.events("watcher.quarantined")[0]
    assert "is not what was written" in told["reason"]
    assert "watcher state rollback" in told["reason"]
    status = await world.status()
    assert sum(one["condition"] == "quarantined" for one in status.values()) == ruined
    assert world.states() == before
    assert len(world.received()) == 3 * count, "no false change, no item again"
    name = told["watcher"]
    code, _, err = await world.type("approve", name)
    assert (code, "state rollback" in err) == (1, True)

    world.site.on("/list", listed(4))
    well = count - ruined
    assert await until(lambda: len(world.received()) == 3 * count + well, 60), "the others go on"
    assert (await world.type("state", "reset", name, "--yes"))[0] == 0
    assert (await world.type("resume", name))[0] == 0
    assert await until(lambda: (name, "3") in world.received(), 30), world.service.tail()
    assert max(world.received().values()) == 1
    assert await world.service.stop() == 0


async def test_a_damaged_payload_is_a_dead_letter_and_is_never_sent(world: World) -> None:
    dice = random.Random(2)
    world.receiver.decide = lambda request: "unavailable"
    url = world.site.on("/list", listed(40))
    world.watch("list", f'with = {{ url = "{url}" }}', trigger="http_json", every="200ms")
    world.service.start()
    await world.service.ready()
    assert await until(lambda: (world.states().get("list") or (0,))[0] == 1), world.service.tail()
    assert await world.service.stop() == 0
    ruined = flip(world.where / "watcher.db", "item", "payload", "seq % 2 = 0 AND key != ''", dice)
    good = set(world.rows("SELECT w.name, i.key FROM item i JOIN watcher w ON w.id = i.watcher_id WHERE seq % 2 = 1"))
    with closing(sqlite3.connect(world.where / "watcher.db")) as db:
        db.execute("UPDATE delivery SET due_at = 0 WHERE status = 0")
        db.commit()
    world.receiver.received.clear()
    world.receiver.decide = None
    world.service.start()
    await world.service.ready()
    assert await until(lambda: not world.rows("SELECT 1 FROM delivery WHERE status = 0"), 60), world.service.tail()
    assert set(world.received()) == good
    dead = await world.ask("deliveries", name=None, flow=None, status="dead", limit=100, before=None)
    assert len(dead) == ruined
    assert all("not what was written" in one["note"] or "damaged" in one["note"] for one in dead), dead[0]
    assert await world.service.stop() == 0


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def no_header(file: Path) -> None:
    with file.open("r+b") as database:
        database.write(bytes(100))


def scribble(file: Path) -> None:
    dice = random.Random(3)
    with file.open("r+b") as database:
        for page in range(1, file.stat().st_size // 4096):
            database.seek(page * 4096)
            database.write(dice.randbytes(64))


@pytest.mark.parametrize("ruin", [cut, no_header, scribble])
async def test_a_ruined_file_is_refused_with_advice_and_a_backup_brings_it_back(world: World, ruin) -> None:  # type: ignore[no-untyped-def]
    await running(world, 3)
    assert (await world.type("backup", str(world.where / "backup.db")))[0] == 0
    assert await world.service.stop() == 0
    ruin(world.where / "watcher.db")
    world.service.start()
    assert await world.service.ended() == 69
    said = world.service.tail(3)
    assert "is damaged" in said
    assert "watcher restore" in said
    assert "Traceback" not in said
    code, out, err = await world.type("restore", str(world.where / "backup.db"), "--yes")
    assert code == 0, out + err
    world.site.on("/list", listed(4))
    world.service.start()
    await world.service.ready()
    await received(world, 4)
    assert await world.service.stop() == 0


# --- out of reach -----------------------------------------------------------------------------------------------------


async def test_a_newer_schema_is_exit_78_and_left_alone(world: World) -> None:
    await running(world)
    assert await world.service.stop() == 0
    database = world.where / "watcher.db"
    with closing(sqlite3.connect(database)) as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = database.read_bytes()
    world.service.start()
    assert await world.service.ended() == 78
    said = world.service.tail(3)
    assert "newer than this program" in said
    assert "install the newer version again" in said
    assert "Traceback" not in said
    assert database.read_bytes() == before
    code, _, err = await world.type("status")
    assert (code, "newer than this program" in err) == (78, True)


@pytest.mark.parametrize("verb", ["serve", "status"])
async def test_a_folder_that_cannot_be_made_is_named(world: World, verb: str) -> None:
    (world.where / "file").write_text("not a folder")
    world.service.config = world.service.config.replace("sqlite:///watcher.db", "sqlite:///file/deeper/watcher.db")
    world.service.write()
    code, _, err = await world.type(verb)
    assert code == 69
    assert str(world.where / "file") in err
    assert "Traceback" not in err


async def test_a_read_only_disk_is_named_at_start(tmp_path: Path, small_disk: Path) -> None:
    async with worlds(small_disk) as world:
        await running(world)
        assert await world.service.stop() == 0
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        code, _, err = await world.type("serve")
        assert code == 69, err
        assert "must be able to write there" in err or "read-only" in err
        assert "Traceback" not in err
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        world.service.start()
        await world.service.ready()
        assert await world.service.stop() == 0


async def test_a_second_service_is_refused_and_told_who_has_the_database(world: World) -> None:
    await running(world)
    assert world.service.process is not None
    other = Service(world.where, world.service.config, environ={"WATCHER_SERVER__BIND": "127.0.0.1:0"})
    other.start()
    assert await other.ended() == 69
    assert f"in use by process {world.service.process.pid}" in world.service.tail(3)
    assert (await world.service.get("/readyz"))[0] == 200
    assert await world.service.stop() == 0


# --- time -------------------------------------------------------------------------------------------------------------


async def test_three_hours_of_downtime_are_made_up_for_by_one_run(world: World) -> None:
    url = world.site.on("/list", listed(1))
    world.watch("list", f'with = {{ url = "{url}" }}', trigger="http_json", every="30m")
    world.service.start()
    await world.service.ready()
    await received(world, 1)
    assert await world.service.stop() == 0
    with closing(sqlite3.connect(world.where / "watcher.db")) as db:
        db.execute("UPDATE watcher SET tick_at = tick_at - 3 * 3600 * 1000000 WHERE name = 'list'")
        db.commit()
    asked = len(world.site.asked_for("/list"))
    good = len(world.polls())
    world.site.on("/list", listed(2))
    world.service.start()
    await world.service.ready()
    await received(world, 2)
    assert await until(lambda: len(world.polls()) > good + 10)
    assert len(world.site.asked_for("/list")) == asked + 1, "one run makes up for six"
    assert await world.service.stop() == 0
    assert (await world.type("status"))[0] == 0
    missed = world.rows("SELECT missed_ticks FROM watcher WHERE name = 'list'")[0][0]
    assert missed in (5, 6)
