"""Built-in triggers over real databases, streams and buckets, run by the real engine: each thing comes exactly once."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import NOW
from tests.support.postgres import Postgres
from tests.support.running import Bench, running
from tests.support.servers import PASSWORD, Azurite, MariaDB, MongoDB, Redis, SeaweedFS, serving
from tests.support.service import ROOT, Service
from watcher.scripts import builtins
from watcher.store.db import Database
from watcher.values import MaxChange

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # the first test of a server may have to install it
NUMBERS = itertools.count(1)


class Watch:
    """One watcher of a built-in trigger, in the real engine: worker processes, ledger, commit."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def set(self, trigger: str, on: tuple[str, ...] | None = ("new", "changed"), **args: Any) -> None:
        self.bench.configure(trigger=trigger, script=builtins() / f"{trigger}.py", args=args, on=on)

    async def run(self) -> list[tuple[str, str]]:
        """Change and key of what one run committed. AssertionError if it failed."""
        before = len(await self.bench.found())
        record = await self.bench.run()
        assert record.outcome in ("ok", "quiet"), f"{record.error}\n{record.detail}"
        return [(item.change, item.key) for item in (await self.bench.found())[before:]]

    async def fails(self) -> str:
        """What a run says that fails. It names no secret, in its traceback neither."""
        record = await self.bench.run()
        assert record.outcome == "failed", record.outcome
        for text in (record.error, record.detail, record.logs):
            assert PASSWORD not in text
        return record.error

    async def gap(self) -> str:
        return (await self.bench.runs())[0].gap


@pytest.fixture
async def watch(sqlite_db: Database, tmp_path: Path) -> AsyncIterator[Watch]:
    async with running(sqlite_db, tmp_path, NOW) as bench:
        yield Watch(bench)


class Killed:
    """`watcher run w` as a process of its own, which a power cut ends at a named place; the next one goes on."""

    def __init__(self, folder: Path, trigger: str, args: dict[str, Any], first_run: str = "baseline") -> None:
        self.folder = folder
        written = ", ".join(f"{name} = {json.dumps(value)}" for name, value in args.items())
        (folder / "watcher.toml").write_text(
            f"""database = "sqlite:///{folder}/watcher.db"
[flows.sink]
url = "http://127.0.0.1:9/"
[watchers.w]
trigger = "{trigger}"
every = "1h"
flow = "sink"
first_run = "{first_run}"
with = {{ {written} }}
"""
        )

    def run(self, failpoint: str = "") -> list[str]:
        """The keys of all items after one run."""
        done = subprocess.run(
            [sys.executable, "-m", "watcher", "run", "w", "-c", "watcher.toml"],
            cwd=self.folder,
            env={
                "PATH": os.environ["PATH"], "HOME": str(self.folder), "PYTHONPATH": str(ROOT),
                "WATCHER_TEST": "1", "WATCHER_FAILPOINT": f"{failpoint}:kill" if failpoint else "",
            },
            capture_output=True, text=True, check=False, timeout=100,
        )  # fmt: skip
        assert done.returncode == (-signal.SIGKILL if failpoint else 0), done.stdout + done.stderr
        assert PASSWORD not in done.stdout + done.stderr
        with closing(sqlite3.connect(self.folder / "watcher.db")) as connection:
            return [key for (key,) in connection.execute("SELECT key FROM item ORDER BY seq")]


# --- SQL --------------------------------------------------------------------------------------------------------------


class Shop:
    """A table ``orders`` on one server. ``connect`` opens another session, in a transaction if ``autocommit=False``."""

    def __init__(self, url: str, connect: Callable[..., Any], now: str) -> None:
        self.url, self.connect, self.now = url, connect, now
        self.do("CREATE TABLE orders (id INT PRIMARY KEY, at TIMESTAMP(6) NULL, name VARCHAR(40))")

    def do(self, statement: str) -> None:
        with closing(self.connect()) as session:
            session.cursor().execute(statement)

    def add(self, *numbers: int, at: str = "") -> str:
        rows = ", ".join(f"({number}, {at or self.now}, 'n{number}')" for number in numbers)
        statement = f"INSERT INTO orders VALUES {rows}"
        self.do(statement)
        return statement


@pytest.fixture
def postgres_shop(postgres: Postgres) -> Iterator[Shop]:
    url = postgres.create()
    yield Shop(url, lambda autocommit=True: psycopg.connect(url, autocommit=autocommit), "clock_timestamp()")
    postgres.drop(url)


@pytest.fixture
def mariadb_shop(mariadb: MariaDB) -> Shop:
    url = mariadb.create()
    name = url.rpartition("/")[2]
    return Shop(url, lambda autocommit=True: mariadb.client(database=name, autocommit=autocommit), "NOW(6)")


@pytest.fixture(params=["postgres_shop", "mariadb_shop"])
def shop(request: pytest.FixtureRequest) -> Shop:
    found: Shop = request.getfixturevalue(request.param)
    return found


async def test_rows_that_share_an_instant_edits_and_removals(watch: Watch, shop: Shop) -> None:
    at = "'2026-01-01 10:00:00.5'"
    shop.add(1, 2, at=at)
    watch.set("sql", database=shop.url, table="orders", cursor="at")
    assert await watch.run() == []
    shop.add(3, 4, at=at)
    assert await watch.run() == [("new", "3"), ("new", "4")]
    shop.do("UPDATE orders SET name = 'other', at = '2026-01-02' WHERE id = 1")
    shop.do("DELETE FROM orders WHERE id = 2")
    shop.add(5, at="NULL")
    assert await watch.run() == [("changed", "1"), ("new", "5")]
    assert await watch.run() == []
    watch.set("sql", database=shop.url, table="orders", cursor="at", on=("new", "changed", "removed"))
    await watch.run()
    shop.do("DELETE FROM orders WHERE id = 4")
    assert await watch.run() == [("removed", "4")]


async def test_a_transaction_that_commits_after_a_later_one(watch: Watch, shop: Shop) -> None:
    shop.add(1)
    watch.set("sql", database=shop.url, table="orders", cursor="at", late=60)
    await watch.run()
    with closing(shop.connect(autocommit=False)) as slow:
        slow.cursor().execute(f"INSERT INTO orders VALUES (2, {shop.now}, 'slow')")
        shop.add(3)
        assert await watch.run() == [("new", "3")]
        shop.add(4)
        assert await watch.run() == [("new", "4")]
        slow.commit()
    assert await watch.run() == [("new", "2")]
    assert await watch.run() == []


async def test_postgresql_waits_for_a_transaction_that_wrote_however_long_it_is_open(
    watch: Watch, postgres_shop: Shop
) -> None:
    shop = postgres_shop
    shop.add(1)
    watch.set("sql", database=shop.url, table="orders", cursor="at", late=0)
    await watch.run()
    with closing(shop.connect(autocommit=False)) as slow:
        slow.cursor().execute(f"INSERT INTO orders VALUES (2, {shop.now}, 'slow')")
        for number in range(3, 8):
            shop.add(number)
            assert await watch.run() == [("new", str(number))]
        slow.commit()
    assert await watch.run() == [("new", "2")]
    assert await watch.run() == []


async def test_postgresql_by_transaction_needs_no_column(watch: Watch, postgres_shop: Shop) -> None:
    shop = postgres_shop
    shop.add(*range(1, 30))
    watch.set("sql", database=shop.url, table="orders")
    assert await watch.run() == []
    with closing(shop.connect(autocommit=False)) as slow:
        slow.cursor().execute("INSERT INTO orders VALUES (100, NULL, 'slow')")
        shop.add(*range(30, 60))
        assert await watch.run() == [("new", str(number)) for number in range(30, 60)]
        assert await watch.gap() == ""
        shop.do("UPDATE orders SET name = 'other' WHERE id = 5")
        assert await watch.run() == [("changed", "5")]
        slow.commit()
    assert await watch.run() == [("new", "100")]
    shop.do("VACUUM FREEZE orders")
    shop.do("CLUSTER orders USING orders_pkey")
    assert await watch.run() == []


async def test_postgresql_by_transaction_in_pieces_loses_nothing(watch: Watch, postgres_shop: Shop) -> None:
    shop = postgres_shop
    shop.add(0)
    watch.set("sql", database=shop.url, table="orders", limit=10)
    await watch.run()
    with closing(shop.connect(autocommit=False)) as slow:
        slow.cursor().execute("INSERT INTO orders VALUES (100, NULL, 'slow')")
        shop.add(*range(1, 36))
        found = await watch.run()
        found += await watch.run()
        slow.commit()
    for _ in range(12):
        found += await watch.run()
    assert sorted(found, key=lambda it: int(it[1])) == [("new", str(n)) for n in [*range(1, 36), 100]]


async def test_a_role_that_may_only_read(watch: Watch, postgres: Postgres, postgres_shop: Shop) -> None:
    shop = postgres_shop
    role = "reader_" + shop.url.rpartition("/")[2].partition("?")[0]
    shop.do(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
    shop.do(f"GRANT SELECT ON orders TO {role}")
    known = psycopg.conninfo.conninfo_to_dict(shop.url)
    resource = {"host": known["host"], "dbname": known["dbname"], "user": role, "password": PASSWORD}
    watch.set("sql", database=resource, table="orders")
    await watch.run()
    watch.set("sql", database=resource, table="orders", cursor="id")
    await watch.run()
    shop.add(1)
    assert await watch.run() == [("new", "1")]
    shop.do(f"DROP OWNED BY {role}")
    assert "permission denied for table orders" in await watch.fails()
    shop.do(f"DROP ROLE {role}")


async def test_what_postgresql_knows_becomes_json(watch: Watch, postgres_shop: Shop) -> None:
    shop = postgres_shop
    shop.do(
        'CREATE TABLE "Odd Names" ("Order" uuid PRIMARY KEY, "select" timestamptz, n numeric(10,2), b bytea, '
        "a int[], j jsonb, i interval, f float8, d date, r int4range, t timestamp)"
    )
    watch.set("sql", database=shop.url, table="public.Odd Names", cursor="select")
    await watch.run()
    key = "4be0643f-1d98-573b-97cd-ca98a65347dd"
    shop.do(
        f"INSERT INTO \"Odd Names\" VALUES ('{key}', '2026-01-01 12:00:00.25+02', 12.50, '\\x00ff', '{{1,2}}', "
        "'{\"x\": [1.5]}', '1 day', 'NaN', 'infinity', '[1,5)', '2026-01-01 10:00'), "
        "(gen_random_uuid(), 'infinity', 1, '', '{}', 'null', '0', 0, '0044-03-15 BC', 'empty', '-infinity')"
    )
    assert len(await watch.run()) == 2
    item = next(item for item in await watch.bench.found() if item.key == key).payload["item"]
    assert item == {
        "Order": key, "select": "2026-01-01T10:00:00.25Z", "n": "12.50", "b": "AP8=", "a": [1, 2], "j": {"x": [1.5]},
        "i": 86400.0, "f": "nan", "d": "infinity", "r": "[1, 5)", "t": "2026-01-01T10:00:00",
    }  # fmt: skip
    assert await watch.run() == []


async def test_a_query_with_a_join(watch: Watch, shop: Shop) -> None:
    shop.do("CREATE TABLE names (id INT, note VARCHAR(20))")
    shop.do("INSERT INTO names VALUES (1, 'a'), (2, 'b')")
    query = "SELECT o.id, o.at, n.note FROM orders o JOIN names n ON n.id = o.id WHERE n.note LIKE '%'"
    watch.set("sql", database=shop.url, query=query, cursor="at", primary_key="id")
    await watch.run()
    shop.add(1, 2, 3)
    assert await watch.run() == [("new", "1"), ("new", "2")]


async def test_a_dropped_table_or_column_is_told_and_removes_nothing(watch: Watch, shop: Shop) -> None:
    shop.add(1)
    watch.set("sql", database=shop.url, table="orders", cursor="at", on=("new", "changed", "removed"))
    await watch.run()
    shop.do("ALTER TABLE orders RENAME COLUMN at TO changed_at")
    assert "has no column 'at': it has id, changed_at, name" in await watch.fails()
    shop.do("ALTER TABLE orders RENAME TO old_orders")
    assert "no table 'orders': was it dropped or renamed? There are: old_orders" in await watch.fails()
    shop.do("ALTER TABLE old_orders RENAME TO orders")
    shop.do("ALTER TABLE orders RENAME COLUMN changed_at TO at")
    shop.add(2)
    assert await watch.run() == [("new", "2")]


async def test_a_query_cannot_write_and_cannot_go_on_for_ever(watch: Watch, shop: Shop) -> None:
    sleep = "pg_sleep(20)" if shop.url.startswith("postgres") else "sleep(20)"
    watch.set("sql", database=shop.url, query=f"SELECT 1 AS id, {sleep} AS s", primary_key="id", seconds=0.5)
    if shop.url.startswith("postgres"):
        assert "timeout" in await watch.fails()
        query = "SELECT id FROM orders WHERE set_config('a.b', 'c', false) IS NULL OR nextval('s') > 0"
        shop.do("CREATE SEQUENCE s")
        shop.add(1)
        watch.set("sql", database=shop.url, query=query, primary_key="id")
        assert "read-only transaction" in await watch.fails()
    else:
        assert "raise `seconds`" in await watch.fails()


async def test_a_server_that_restarts_in_the_middle(watch: Watch, mariadb: MariaDB, mariadb_shop: Shop) -> None:
    shop = mariadb_shop
    shop.add(1)
    watch.set("sql", database=shop.url, table="orders", cursor="at")
    await watch.run()
    shop.add(2)
    mariadb.kill()
    assert "the database says" in await watch.fails()
    mariadb.start()
    shop.add(3)
    assert await watch.run() == [("new", "2"), ("new", "3")]


async def test_a_wrong_password_is_told_without_it(watch: Watch, mariadb_shop: Shop) -> None:
    watch.set("sql", database=mariadb_shop.url.replace(PASSWORD, PASSWORD + "x"), table="orders", cursor="at")
    assert "Access denied" in await watch.fails()


# --- Redis ------------------------------------------------------------------------------------------------------------

PLACES = ("after_fetch", "before_commit", "after_commit")


async def test_a_stream_is_read_from_its_last_entry_on(watch: Watch, redis: Redis) -> None:
    client, key = redis.client(), "plain"
    client.xadd(key, {"n": "old"}, id="5-5")
    watch.set("redis_stream", on=None, database=redis.url, stream=key, limit=10)
    assert await watch.run() == []
    for n in range(25):
        client.xadd(key, {"n": n}, id="5-*" if n < 5 else "9-*" if n < 15 else "10-*")
    found = [key for run in range(4) for _, key in await watch.run()]
    assert found == [f"5-{n}" for n in range(6, 11)] + [f"9-{n}" for n in range(10)] + [f"10-{n}" for n in range(10)]
    client.xadd(key, {b"\xff": b"\x00\xff", "text": "é"}, id="11-0")
    assert await watch.run() == [("new", "11-0")]
    item = (await watch.bench.found())[-1].payload["item"]
    assert item == {"id": "11-0", "stream": key, "fields": {"b'\\xff'": {"base64": "AP8="}, "text": "é"}}
    assert [run.gap for run in await watch.bench.runs() if run.gap] == []


@pytest.mark.parametrize("how", ["trimmed", "deleted"])
async def test_entries_that_nobody_read_are_counted(watch: Watch, redis: Redis, how: str) -> None:
    client, key = redis.client(), f"lossy-{how}"
    ids = [client.xadd(key, {"n": n}) for n in range(3)]
    watch.set("redis_stream", on=None, database=redis.url, stream=key)
    await watch.run()
    ids += [client.xadd(key, {"n": n}) for n in range(10)]
    if how == "trimmed":
        client.xtrim(key, maxlen=4, approximate=False)
    else:
        client.xdel(key, *ids[5:11])
    found = [id for _, id in await watch.run()]
    assert found == [id.decode() for id in (ids[9:] if how == "trimmed" else ids[3:5] + ids[11:])]
    assert await watch.gap() == f"6 entries of the stream {key} were trimmed or deleted before they were read"
    client.xadd(key, {"n": "next"})
    assert len(await watch.run()) == 1
    assert await watch.gap() == ""


async def test_a_stream_that_is_trimmed_to_nothing(watch: Watch, redis: Redis) -> None:
    client, key = redis.client(), "emptied"
    client.xadd(key, {"n": 1})
    watch.set("redis_stream", on=None, database=redis.url, stream=key)
    await watch.run()
    client.xadd(key, {"n": 2})
    client.xtrim(key, maxlen=0, approximate=False)
    assert await watch.run() == []
    assert await watch.gap() == f"1 entries of the stream {key} were trimmed or deleted before they were read"
    assert await watch.run() == []
    assert (await watch.bench.runs())[0].gap != ""  # told once: the last run was quiet, and is not listed
    client.xadd(key, {"n": 3})
    assert len(await watch.run()) == 1


async def test_a_stream_that_is_renamed_or_made_anew(watch: Watch, redis: Redis) -> None:
    client, key = redis.client(), "moved"
    watch.set("redis_stream", on=None, database=redis.url, stream=key)
    assert await watch.run() == []  # not there yet
    client.xadd(key, {"n": 1}, id="5-1")
    assert await watch.run() == [("new", "5-1")]
    client.rename(key, "elsewhere")
    assert "no stream 'moved' anymore: it was deleted, renamed" in await watch.fails()
    client.xadd(key, {"n": 2}, id="3-1")
    assert await watch.run() == [("new", "3-1")]
    assert "was deleted and made anew" in await watch.gap()
    client.xadd(key, {"n": 3}, id="3-2")
    assert await watch.run() == [("new", "3-2")]


def test_the_end_of_a_run_at_any_moment_loses_no_entry_of_a_group(tmp_path: Path, redis: Redis) -> None:
    client, key = redis.client(), "crashing"
    running = Killed(tmp_path, "redis_stream", {"database": redis.url, "stream": key, "group": "g", "limit": 4})
    running.run()
    ids: list[str] = []
    for place in PLACES:
        ids += [client.xadd(key, {"n": n}).decode() for n in range(3)]
        running.run(place)
    for _ in range(4):
        found = running.run()
    assert found == ids
    assert client.xpending(key, "g")["pending"] == 0


async def test_what_a_group_had_before_and_what_others_left(watch: Watch, redis: Redis) -> None:
    client, key = redis.client(), "shared"
    client.xgroup_create(key, "g", "0", mkstream=True)
    ids = [client.xadd(key, {"n": n}).decode() for n in range(6)]
    client.xreadgroup("g", "somebody", {key: ">"}, count=2)
    watch.set("redis_stream", on=None, database=redis.url, stream=key, group="g")
    assert await watch.run() == []
    assert await watch.run() == [("new", id) for id in ids[2:]]
    watch.set("redis_stream", on=None, database=redis.url, stream=key, group="g", claim=0)
    assert await watch.run() == [("new", id) for id in ids[:2]]
    assert await watch.run() == []
    assert client.xpending(key, "g")["pending"] == 0


async def test_a_group_whose_stream_is_trimmed_or_deleted(watch: Watch, redis: Redis) -> None:
    client, key = redis.client(), "trimmed-group"
    watch.set("redis_stream", on=None, database=redis.url, stream=key, group="g")
    await watch.run()
    for n in range(10):
        client.xadd(key, {"n": n})
    client.xtrim(key, maxlen=3, approximate=False)
    assert len(await watch.run()) == 3
    assert await watch.gap() == f"7 entries of the stream {key} were trimmed before the group g had read them"
    client.delete(key)
    id = client.xadd(key, {"n": "again"}).decode()
    assert await watch.run() == [("new", id)]
    assert "the group g was gone" in await watch.gap()
    client.xadd(key, {"n": "last"})
    assert len(await watch.run()) == 1
    assert await watch.gap() == ""


def test_the_end_of_a_run_at_any_moment_loses_no_element_of_a_list(tmp_path: Path, redis: Redis) -> None:
    client = redis.client()
    client.lpush("jobs", "a", "a")
    running = Killed(tmp_path, "redis_list", {"database": redis.url, "list": "jobs", "limit": 4})
    assert running.run() == []
    for place in PLACES:
        client.lpush("jobs", *(f"{place}-{n}" for n in range(3)))
        running.run(place)
    for _ in range(4):
        running.run()
    with closing(sqlite3.connect(tmp_path / "watcher.db")) as connection:
        found = [json.loads(payload)["item"]["value"] for (payload,) in connection.execute("SELECT payload FROM item")]
    assert found == ["a", "a", *(f"{place}-{n}" for place in PLACES for n in range(3))]
    assert client.keys("jobs*") == [b"jobs:watcher:turn"]


async def test_two_runs_of_one_list_at_once_and_a_state_that_was_rolled_back(watch: Watch, redis: Redis) -> None:
    client = redis.client()
    watch.set("redis_list", on=None, database=redis.url, list="twice", end="left", parse=True)
    await watch.run()
    client.rpush("twice", "1", '{"x": [2]}', b"\xff")
    first = await watch.bench.runner.plan("w")  # has taken, and comes to nothing
    assert [item.key for item in first.proposal.items] == ["1-0", "1-1", "1-2"]
    client.rpush("twice", "4")
    assert await watch.run() == [("new", f"1-{n}") for n in range(4)]
    values = [item.payload["item"]["value"] for item in await watch.bench.found()]
    assert values == [1, {"x": [2]}, {"base64": "/w=="}, 4]
    assert (await watch.bench.runner.apply(first)).outcome == "conflict"
    client.rpush("twice", "5")
    assert await watch.run() == [("new", "2-0")]
    client.set("twice:watcher:turn", 9)
    assert "another run has come to turn 9" in await watch.fails()


async def test_a_redis_that_restarts_or_refuses(watch: Watch, redis: Redis) -> None:
    client = redis.client()
    client.xadd("steady", {"n": 0})
    watch.set("redis_stream", on=None, database=redis.url, stream="steady")
    await watch.run()
    client.xadd("steady", {"n": 1})
    redis.kill()
    assert "onnect" in await watch.fails()
    redis.start()
    assert len(await watch.run()) == 1
    watch.set("redis_stream", on=None, database=redis.url.replace(PASSWORD, PASSWORD + "x"), stream="steady")
    assert "invalid username-password pair" in await watch.fails()
    redis.client().set("text", "x")
    watch.set("redis_stream", on=None, database=redis.url, stream="text")
    assert "WRONGTYPE" in await watch.fails()


# --- MongoDB ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tickets(mongodb: MongoDB) -> Iterator[Any]:
    """A collection on a replica set."""
    with mongodb.client() as client:
        yield client[mongodb.create()].tickets


@pytest.fixture(scope="module")
def standalone() -> Iterator[MongoDB]:
    """A server without a change stream."""
    yield from serving(lambda: MongoDB("--standalone"))


def url_of(server: MongoDB, collection: Any) -> str:
    return f"{server.url}{collection.database.name}"


async def test_the_change_stream_tells_each_document_once(watch: Watch, mongodb: MongoDB, tickets: Any) -> None:
    tickets.insert_many([{"_id": n, "status": "open"} for n in range(3)])
    watch.set("mongodb", database=url_of(mongodb, tickets), collection="tickets", match={"status": "open"})
    assert await watch.run() == []
    tickets.insert_many([{"_id": n, "status": "open"} for n in range(3, 20)])
    tickets.insert_one({"_id": 99, "status": "closed"})
    tickets.update_one({"_id": 0}, {"$set": {"note": "a"}})
    tickets.update_one({"_id": 0}, {"$set": {"note": "b"}})
    tickets.delete_one({"_id": 5})
    expected = [("new", str(n)) for n in range(3, 20) if n != 5] + [("changed", "0")]
    assert await watch.run() == expected
    assert (await watch.bench.found())[-1].payload["item"] == {"_id": 0, "status": "open", "note": "b"}
    assert await watch.run() == []
    tickets.update_one({"_id": 99}, {"$set": {"status": "open"}})
    mongodb.restart()
    assert await watch.run() == [("new", "99")]
    assert [run.gap for run in await watch.bench.runs() if run.gap] == []


async def test_more_events_than_one_run_takes(watch: Watch, mongodb: MongoDB, tickets: Any) -> None:
    tickets.insert_one({"_id": "first"})
    watch.set("mongodb", database=url_of(mongodb, tickets), collection="tickets", limit=7)
    await watch.run()
    tickets.insert_many([{"_id": n} for n in range(20)])  # one instant of the cluster or several
    tickets.delete_many({"_id": {"$in": list(range(10, 20))}})
    tickets.insert_one({"_id": "last"})
    found = [key for _ in range(7) for _, key in await watch.run()]
    assert found == [*map(str, range(10)), "last"]


async def test_removals_are_found_by_reading_the_whole_collection(watch: Watch, mongodb: MongoDB, tickets: Any) -> None:
    tickets.insert_many([{"_id": n} for n in range(3)])
    on = ("new", "changed", "removed")
    watch.set("mongodb", on=on, database=url_of(mongodb, tickets), collection="tickets")
    await watch.run()
    tickets.delete_one({"_id": 1})
    tickets.insert_one({"_id": 3})
    assert sorted(await watch.run()) == [("new", "3"), ("removed", "1")]
    tickets.drop()
    assert "no collection 'tickets' anymore" in await watch.fails()


async def test_a_token_that_fell_out_of_the_oplog_is_told_and_nothing_is_lost(watch: Watch, tmp_path: Path) -> None:
    for server in serving(lambda: MongoDB("--oplog-max-entries", "5")):
        with server.client() as client:
            tickets = client.test.tickets
            tickets.insert_many([{"_id": n} for n in range(3)])
            watch.set("mongodb", database=server.url + "test", collection="tickets")
            await watch.run()
            tickets.insert_one({"_id": 3})
            tickets.update_one({"_id": 1}, {"$set": {"a": 1}})
            for n in range(30):
                client.test.noise.insert_one({"n": n})
            client.admin.command("secantusAdmin.pruneOplog")
            watch.set("mongodb", database=server.url + "test", collection="tickets", lost="stop")
            assert "the resource token" not in (said := await watch.fails())
            assert "the resume token fell out of the oplog: what happened in tickets" in said
            watch.set("mongodb", database=server.url + "test", collection="tickets")
            assert sorted(await watch.run()) == [("changed", "1"), ("new", "3")]
            assert "the resume token fell out of the oplog: tickets was compared" in await watch.gap()
            tickets.insert_one({"_id": 4})
            assert await watch.run() == [("new", "4")]
            assert await watch.gap() == ""


async def test_a_collection_that_is_dropped_or_renamed(watch: Watch, mongodb: MongoDB, tickets: Any) -> None:
    tickets.insert_many([{"_id": n} for n in range(3)])
    watch.set("mongodb", database=url_of(mongodb, tickets), collection="tickets")
    await watch.run()
    tickets.rename("other")
    assert "no collection 'tickets' anymore: it was dropped or renamed" in await watch.fails()
    tickets.insert_many([{"_id": 1, "again": True}, {"_id": 7}])
    assert sorted(await watch.run()) == [("changed", "1"), ("new", "7")]
    assert "dropped or renamed, and made anew" in await watch.gap()
    tickets.insert_one({"_id": 8})
    assert await watch.run() == [("new", "8")]


async def test_without_a_change_stream_by_id_or_by_a_field(watch: Watch, standalone: MongoDB) -> None:
    with standalone.client(tz_aware=True) as client:
        database = client[standalone.create()]
        url = standalone.url + database.name
        noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
        database.tickets.insert_many([{"at": noon, "n": n} for n in range(3)])
        watch.set("mongodb", database=url, collection="tickets", mode="stream")
        assert "no replica set and has no change stream" in await watch.fails()
        watch.set("mongodb", database=url, collection="tickets", cursor="at", limit=4)
        assert await watch.run() == []
        ids = database.tickets.insert_many([{"at": noon, "n": n} for n in range(3, 8)]).inserted_ids
        ids += database.tickets.insert_many([{"at": noon - timedelta(hours=1)}, {}, {"at": None}]).inserted_ids
        ids.append(database.tickets.insert_one({"at": datetime(2999, 1, 1, tzinfo=UTC)}).inserted_id)
        found = [key for _ in range(8) for _, key in await watch.run()]
        assert sorted(found) == sorted(map(str, ids))
        database.tickets.update_one({"n": 1}, {"$set": {"at": noon + timedelta(hours=1), "n": "x"}})
        assert [change for _ in range(5) for change, _ in await watch.run()] == ["changed"]
        database.tickets.insert_one({"at": "2026-01-01"})
        assert "at is of several types" in await watch.fails()


async def test_by_the_id_that_the_driver_makes(watch: Watch, standalone: MongoDB) -> None:
    with standalone.client() as client:
        database = client[standalone.create()]
        database.tickets.insert_many([{"n": n} for n in range(3)])
        watch.set(
            "mongodb", on=("new",), database=standalone.url + "other", db=database.name, collection="tickets", first=2
        )
        assert await watch.run() == []
        ids = database.tickets.insert_many([{"n": n} for n in range(20)]).inserted_ids
        assert await watch.run() == [("new", str(id)) for id in ids]
        standalone.restart()
        assert await watch.run() == []
        database.tickets.drop()
        assert "no collection 'tickets' anymore" in await watch.fails()


async def test_what_mongodb_knows_becomes_json(watch: Watch, mongodb: MongoDB, tickets: Any) -> None:
    import bson

    watch.set("mongodb", database=url_of(mongodb, tickets), collection="tickets")
    await watch.run()
    id = bson.ObjectId("65f0a1b2c3d4e5f601234567")
    raw = {
        "_id": id, "d": bson.Decimal128("1.50"), "l": bson.Int64(2**53 + 1), "b": b"\x00\xff", "f": float("nan"),
        "t": datetime(2026, 1, 1, 12, 0, 0, 250000, tzinfo=UTC), "a": [{"x": None}, True],
    }  # fmt: skip
    tickets.insert_one(raw)
    assert await watch.run() == [("new", str(id))]
    assert (await watch.bench.found())[-1].payload["item"] == {
        "_id": str(id), "d": "1.50", "l": 2**53 + 1, "b": "AP8=", "f": "nan", "t": "2026-01-01T12:00:00.250Z",
        "a": [{"x": None}, True],
    }  # fmt: skip


# --- buckets ----------------------------------------------------------------------------------------------------------


class Bucket:
    """A place for objects on a real server: ``put`` as its own client does it."""

    def __init__(self, trigger: str, args: dict[str, Any], put: Callable[..., Any], delete: Callable[..., Any]) -> None:
        self.trigger, self.args, self.put, self.delete = trigger, args, put, delete


@pytest.fixture
def s3_bucket(seaweedfs: SeaweedFS) -> Bucket:
    client = seaweedfs.client()
    prefix = f"sources-{os.getpid()}-{next(NUMBERS)}/"
    return Bucket(
        "s3_objects",
        {"storage": seaweedfs.resource, "prefix": prefix},
        lambda key, body: client.put_object(Bucket=seaweedfs.bucket, Key=prefix + key, Body=body),
        lambda key: client.delete_object(Bucket=seaweedfs.bucket, Key=prefix + key),
    )


@pytest.fixture
def azure_container(azurite: Azurite) -> Iterator[Bucket]:
    resource = azurite.create()
    with azurite.client() as service, service.get_container_client(resource["containerName"]) as client:
        yield Bucket(
            "azure_blobs",
            {"container": resource, "prefix": "in/", "settle": 0},
            lambda key, body: client.upload_blob("in/" + key, body, overwrite=True),
            lambda key: client.delete_blob("in/" + key),
        )


@pytest.fixture(params=["s3_bucket", "azure_container"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    found: Bucket = request.getfixturevalue(request.param)
    return found


async def test_objects_that_are_new_overwritten_and_removed(watch: Watch, bucket: Bucket) -> None:
    prefix = bucket.args["prefix"]
    bucket.put("m.csv", b"1")
    bucket.put("z.csv", b"1")
    watch.set(bucket.trigger, on=("new", "changed", "removed"), pattern="*.csv", **bucket.args)
    assert await watch.run() == []
    bucket.put("a.csv", b"1")  # sorts before what was there
    bucket.put("deep/er.csv", b"1")
    bucket.put("not.txt", b"1")
    bucket.put("m.csv", b"22")
    bucket.delete("z.csv")
    assert sorted(await watch.run()) == [
        ("changed", f"{prefix}m.csv"), ("new", f"{prefix}a.csv"), ("new", f"{prefix}deep/er.csv"),
        ("removed", f"{prefix}z.csv"),
    ]  # fmt: skip
    assert await watch.run() == []
    changed = next(item for item in await watch.bench.found() if item.change == "changed").payload
    assert (changed["previous"]["size"], changed["item"]["size"], changed["item"]["s3"]) == (1, 2, f"{prefix}m.csv")


async def test_more_objects_than_one_page(watch: Watch, s3_bucket: Bucket) -> None:
    s3_bucket.put("0", b"")
    watch.set("s3_objects", **s3_bucket.args)
    await watch.run()
    names = [f"{number:04}" for number in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: s3_bucket.put(name, b""), names))
    watch.bench.configure(max_change=MaxChange(share=None))
    assert len(await watch.run()) == 1100
    s3_bucket.put("!before", b"")
    assert await watch.run() == [("new", s3_bucket.args["prefix"] + "!before")]


async def test_an_object_that_is_touched_is_left_in_peace(watch: Watch, bucket: Bucket) -> None:
    prefix = bucket.args["prefix"]
    bucket.put("old", b"1")
    args = {**bucket.args, "settle": 3}
    watch.set(bucket.trigger, on=("new", "changed", "removed"), **args)
    await settled(watch)  # the baseline is empty or not: what counts is that `old` is known
    bucket.put("old", b"12")
    bucket.put("young", b"1")
    assert await watch.run() == []
    found = await settled(watch)
    assert sorted(found) == [("changed", f"{prefix}old"), ("new", f"{prefix}young")]


async def settled(watch: Watch) -> list[tuple[str, str]]:
    """What comes until nothing is young anymore; the store's clock is what is waited for."""
    found: list[tuple[str, str]] = []
    until = time.monotonic() + 3.5
    while time.monotonic() < until:
        found += await watch.run()
    return found + await watch.run()


async def test_a_bucket_that_is_not_there_and_wrong_keys(watch: Watch, seaweedfs: SeaweedFS, azurite: Azurite) -> None:
    on = ("new", "removed")
    watch.set("s3_objects", on=on, storage={**seaweedfs.resource, "bucket": "nowhere"})
    assert "NoSuchBucket" in await watch.fails()
    watch.set("s3_objects", on=on, storage={**seaweedfs.resource, "secretKey": PASSWORD + "x"})
    assert "SignatureDoesNotMatch" in await watch.fails()
    watch.set("s3_objects", on=on, storage={**seaweedfs.resource, "endPoint": "127.0.0.1:9"})
    assert "cannot be reached" in await watch.fails()
    watch.set("azure_blobs", on=on, container={**azurite.create(), "containerName": "nowhere"})
    assert "ContainerNotFound" in await watch.fails()


async def test_a_server_that_restarts_removes_nothing(watch: Watch, seaweedfs: SeaweedFS, s3_bucket: Bucket) -> None:
    s3_bucket.put("one", b"1")
    watch.set("s3_objects", on=("new", "changed", "removed"), **s3_bucket.args)
    await watch.run()
    seaweedfs.stop()
    assert "cannot be reached" in await watch.fails()
    seaweedfs.start()
    s3_bucket.put("two", b"2")
    assert await watch.run() == [("new", s3_bucket.args["prefix"] + "two")]


async def test_the_workspaces_own_storage(tmp_path: Path) -> None:
    inbox = tmp_path / "objects" / "u" / "watcher" / "inbox"
    inbox.mkdir(parents=True)
    (inbox / "old.csv").write_text("1")
    service = Service(
        tmp_path,
        """database = "sqlite:///{where}/watcher.db"
data = "{where}"
[server]
bind = "127.0.0.1:{port}"
[flows.sink]
url = "http://127.0.0.1:9/"
[watchers.w]
trigger = "s3_objects"
every = "1s"
flow = "sink"
with = { prefix = "u/watcher/inbox/", pattern = "*.csv" }
""",
    )
    service.start()
    try:
        await service.ready()
        await service.event("run.committed")
        (inbox / "new.csv").write_text("22")
        assert (await service.event("run.committed", 2))["items"] == 1
    finally:
        service.kill()
    with closing(sqlite3.connect(tmp_path / "watcher.db")) as connection:
        ((key, payload),) = connection.execute("SELECT key, payload FROM item")
    assert (key, json.loads(payload)["item"]["size"]) == ("u/watcher/inbox/new.csv", 2)
