"""Rows of a table, each found once: over SQLite, whose clock and transactions are this machine's."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from tests.support.watching import TRIGGERS
from watcher.errors import TriggerError
from watcher.scripts.loading import load, read
from watcher.testing import FakeSource, Record, Trial, conform

SQL = TRIGGERS / "sql.py"


class Shop:
    """One database with one table, and a watcher of it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "shop.db"
        self.url = f"sqlite:///{self.file}"
        self.do("CREATE TABLE orders (id INTEGER PRIMARY KEY, at TEXT, v)")

    def do(self, statement: str, *values: Any) -> None:
        with closing(sqlite3.connect(self.file)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(statement, values)
            connection.commit()

    def add(self, *rows: tuple[int, str | None]) -> None:
        values = ", ".join(f"({number}, {at!r}, 0)" if at else f"({number}, NULL, 0)" for number, at in rows)
        self.do(f"INSERT INTO orders (id, at, v) VALUES {values}")

    def watch(self, on: tuple[str, ...] = ("new", "changed"), **args: Any) -> Trial:
        whole = {"database": self.url, "table": "orders", "cursor": "at", **args}
        return Trial(SQL, {name: value for name, value in whole.items() if value is not None}, on=on)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def told(trial: Trial) -> list[tuple[str, str]]:
    return [(find.change, find.key) for find in trial.poll().finds]


def test_rows_that_share_an_instant_come_once_each_and_edits_too(shop: Shop) -> None:
    shop.add((1, "2026-01-01 00:00:00"), (2, "2026-01-01 00:00:01"))
    trial = shop.watch()
    assert told(trial) == []
    shop.add((3, "2026-01-01 00:00:01"))
    assert told(trial) == [("new", "3")]
    shop.add((4, "2026-01-01 00:00:01"))
    shop.do("UPDATE orders SET v = 9, at = '2026-01-01 00:00:02' WHERE id = 1")
    assert told(trial) == [("new", "4"), ("changed", "1")]
    assert told(trial) == []


def test_a_row_that_appears_late_is_found(shop: Shop) -> None:
    shop.add((1, "2026-01-01 00:00:00"), (2, "2026-01-01 00:10:00"))
    trial = shop.watch()
    told(trial)
    shop.add((3, "2026-01-01 00:05:00"))
    assert told(trial) == [("new", "3")]
    assert told(trial) == []


def test_after_a_while_only_what_came_since_is_read(shop: Shop) -> None:
    shop.add((1, "2026-01-01 00:00:00"), (2, "2026-01-01 00:10:00"))
    trial = shop.watch(late=0)
    told(trial)
    shop.add((3, "2026-01-01 00:20:00"))
    assert [entry.key for entry in trial.call("2026-01-01 00:10:00").listing.entries] == ["2", "3"]


def test_the_row_that_was_remembered_may_go(shop: Shop) -> None:
    shop.add((1, "2026-01-01 00:00:00"), (2, "2026-01-01 00:10:00"))
    trial = shop.watch(late=0)
    told(trial)
    shop.do("DELETE FROM orders WHERE id = 2")
    shop.add((3, "2026-01-01 00:10:00"))
    assert told(trial) == [("new", "3")]


def test_removals_are_told_where_they_are_asked_for(shop: Shop) -> None:
    shop.add((1, "2026-01-01 00:00:00"), (2, "2026-01-01 00:10:00"))
    trial = shop.watch(on=("new", "removed"), late=0)
    told(trial)
    shop.do("DELETE FROM orders WHERE id = 1")
    shop.add((3, "2026-01-01 00:20:00"))
    assert sorted(told(trial)) == [("new", "3"), ("removed", "1")]


def test_a_row_without_a_cursor_is_found_and_once_it_has_one_it_is_the_same(shop: Shop) -> None:
    shop.add((1, "2026-01-01 00:00:00"))
    trial = shop.watch(on=("new",))
    told(trial)
    shop.add((2, None))
    assert told(trial) == [("new", "2")]
    shop.do("UPDATE orders SET at = '2026-01-02 00:00:00' WHERE id = 2")
    assert told(trial) == []
    assert shop.watch(undated=False).call().keys == ["1", "2"]


def test_a_date_in_the_future_hides_nothing(shop: Shop) -> None:
    shop.add((1, "2026-01-01 00:00:00"), (2, "2999-01-01 00:00:00"))
    trial = shop.watch(late=0)
    told(trial)
    for number in (3, 4):
        shop.add((number, "2026-01-02 00:00:00"))
        assert told(trial) == [("new", str(number))]


def test_more_rows_than_one_run_takes_come_with_the_next_ones(shop: Shop) -> None:
    shop.add((0, "2026-01-01 00:00:00"))
    trial = shop.watch(limit=7)
    told(trial)
    shop.add(*((number, "2026-01-01 00:00:01") for number in range(1, 31)))  # all at one instant
    found: list[str] = []
    for run in range(8):
        found += [key for _, key in told(trial)]
        if run == 1:
            shop.add((99, "2026-01-01 00:00:00"))  # behind where the reading has come to
    for _ in range(8):
        found += [key for _, key in told(trial)]
    assert sorted(found, key=int) == [*map(str, range(1, 31)), "99"]


def test_another_table_begins_anew(shop: Shop) -> None:
    shop.add((1, "2026-01-01 00:00:00"), (2, "2026-01-01 00:10:00"))
    trial = shop.watch(late=0)
    told(trial)
    told(trial)
    shop.do("CREATE TABLE parts (id INTEGER PRIMARY KEY, at TEXT, v)")
    shop.do("INSERT INTO parts VALUES (7, '2025-01-01 00:00:00', 0)")
    trial.args["table"] = "parts"
    assert told(trial) == [("new", "7")]


def test_a_number_as_cursor_and_two_columns_as_key(shop: Shop) -> None:
    shop.do("CREATE TABLE lines (number INTEGER, part TEXT, id INTEGER, PRIMARY KEY (number, part))")
    shop.do("INSERT INTO lines VALUES (1, 'a', 9)")
    trial = shop.watch(table="lines", cursor="id")
    told(trial)
    shop.do("INSERT INTO lines VALUES (1, 'b', 10), (1, 'b/c', 10)")
    assert told(trial) == [("new", '[1, "b"]'), ("new", '[1, "b/c"]')]


def test_a_query_with_colons_and_percent_signs(shop: Shop) -> None:
    shop.add((1, "2026-01-01 00:00:00"))
    query = "SELECT id AS \"order\", at, '10:20 :x 5%' AS note FROM orders WHERE at LIKE '2026%';"
    trial = shop.watch(table=None, query=query, primary_key="order")
    told(trial)
    shop.add((2, "2026-01-01 00:00:00"), (3, "2025-01-01 00:00:00"))
    (find,) = trial.poll().finds
    assert find.item == {"order": 2, "at": "2026-01-01 00:00:00", "note": "10:20 :x 5%"}


def test_without_a_cursor_the_whole_table_is_compared(shop: Shop) -> None:
    shop.add((1, None))
    trial = shop.watch(cursor=None)
    told(trial)
    shop.add((2, None))
    shop.do("UPDATE orders SET v = 5 WHERE id = 1")
    assert sorted(told(trial)) == [("changed", "1"), ("new", "2")]


def test_of_a_large_table_only_the_newest_rows_are_looked_at(shop: Shop) -> None:
    shop.add(*((number, f"2026-01-01 00:00:{number:02}") for number in range(20)))
    trial = shop.watch(on=("new",), first=3)
    assert len(trial.poll().learn) == 3
    shop.do("DELETE FROM orders WHERE id IN (17, 18)")  # older ones do not move up in their place
    shop.add((20, "2026-01-01 00:00:20"))
    assert told(trial) == [("new", "20")]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("DROP TABLE orders", "no table 'orders': was it dropped or renamed? There are: parts"),
        ("ALTER TABLE orders RENAME COLUMN at TO changed_at", "no column 'at': it has id, changed_at, v"),
    ],
)
def test_a_dropped_table_or_column_is_an_error_and_no_removal(shop: Shop, change: str, says: str) -> None:
    shop.add((1, "2026-01-01 00:00:00"))
    shop.do("CREATE TABLE parts (id)")
    trial = shop.watch(on=("new", "removed"))
    told(trial)
    memory = trial.memory
    shop.do(change)
    with pytest.raises(TriggerError, match=says.replace("?", r"\?")):
        trial.poll()
    assert trial.memory is memory


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"query": "SELECT 1"}, "either `table` or `query`"),
        ({"table": None, "query": "SELECT * FROM orders"}, "name the columns .* in `primary_key`"),
        (
            {"table": None, "query": "SELECT nonsense", "primary_key": "id"},
            "the database says: no such column: nonsense",
        ),
        ({"table": None, "query": "DELETE FROM orders", "primary_key": "id"}, "the database says: .*syntax error"),
        ({"primary_key": "nr"}, "no column 'nr': it has id, at, v"),
        ({"database": "sqlite:///missing.db"}, "no SQLite database 'missing.db': check `database`"),
        ({"database": "oracle://scott:tiger@x/y"}, "`database` is a resource of type postgresql or mysql, or a URL"),
        ({"database": "postgres://me:tiger@127.0.0.1:1/x"}, "the database says: .*[Cc]onnection"),
    ],
)
def test_mistakes_say_what_to_do_and_no_secret(shop: Shop, args: dict[str, Any], says: str) -> None:
    with pytest.raises(TriggerError, match=says) as raised:
        shop.watch(**args).poll()
    assert "tiger" not in str(raised.value) + raised.value.detail


def test_times_that_are_written_in_two_ways_do_not_sort(shop: Shop) -> None:
    shop.add((1, "2026-01-01 00:00:00"), (2, "2026-01-01T00:00:00Z"))
    with pytest.raises(TriggerError, match="written in 2 ways"):
        shop.watch().poll()


def test_a_statement_that_takes_too_long_is_ended(shop: Shop) -> None:
    endless = "WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) SELECT max(id) AS id FROM n"
    with pytest.raises(TriggerError, match=r"interrupted .*raise `seconds`"):
        shop.watch(table=None, query=endless, primary_key="id", cursor="id", seconds=0.1).poll()


def test_each_thing_is_found_exactly_once_whatever_the_source_does(tmp_path: Path) -> None:
    """The conformance kit's source, as a table."""
    shop = Shop(tmp_path)
    script = load(read(SQL))
    sources: list[FakeSource] = []

    def item(record: Record) -> Any:
        found = script.module.Row(row(record))
        found.key, found.cursor = found["id"], found["at"]
        return found

    def source() -> FakeSource:
        sources.append(FakeSource(item=item))
        return sources[-1]

    assert conform(
        mirrored(script.main, shop, sources),
        {"database": shop.url, "table": "orders", "cursor": "at"},
        source=source,
        troubles=("ties", "lag", "edits", "deletions", "errors"),
        lag=timedelta(minutes=3),
        on=("new", "changed"),
        rounds=12,
        seeds=[1],
    )


def row(record: Record) -> dict[str, Any]:
    return {"id": record.number, "at": record.at.strftime("%Y-%m-%d %H:%M:%S"), "v": record.version}


def mirrored(main: Callable[..., Any], shop: Shop, sources: list[FakeSource]) -> Callable[..., Any]:
    """The trigger's main, before which the table becomes what the source lists; a source that fails has no table."""

    @wraps(main)
    def mirror(*args: Any, **rest: Any) -> Any:
        with closing(sqlite3.connect(shop.file)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("DROP TABLE IF EXISTS orders")
            if not sources[-1].fails:
                connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, at TEXT, v)")
                rows = [tuple(row(record).values()) for record in sources[-1].listed()]
                connection.executemany("INSERT INTO orders VALUES (?, ?, ?)", rows)
            connection.commit()
        return main(*args, **rest)

    return mirror
