"""New and changed rows of a table or a query: PostgreSQL, MySQL, MariaDB, SQLite.

    [watchers.orders]
    trigger = "sql"
    every = "1m"
    flow = "ship"
    on = ["new", "changed"]
    with = { database = "$res:u/me/shop", table = "orders", cursor = "updated_at" }

``cursor`` is a column that grows: a time or a number. It is asked for inclusively, and rows are known by their primary
key, so those that share an instant are each found once. A row may also *appear* late, with an older value than others,
because its transaction was open for a while: rows of the last ``late`` seconds are listed again, by the server's clock,
and on PostgreSQL for as long as any transaction that wrote before is still open.

Without ``cursor`` PostgreSQL's own transaction numbers are used: nothing is missed however long a transaction takes,
and edits need no column; but the whole table is scanned each time. Other databases list the whole table then, and so
does each one where ``on`` names ``removed``.

Needs the database's client: ``pip install 'change-watcher[postgres]'``, or ``[mysql]``.
"""

from __future__ import annotations

import base64
import json
import math
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from watcher import get_resource, get_state, mysql, postgres, set_state, trigger

PAGE = 1000  # rows of one statement
MOST = 100_000  # rows of one listing that must be whole
UNDATED = 10_000  # rows without a cursor
MARKS = 8  # points in time that are remembered within `late`


class Row(dict[str, Any]):
    """One row as JSON, with what identifies and orders it."""

    key: Any
    cursor: Any
    place: tuple[Any, ...]  # the cursor and the key as the database has them


@trigger(key=lambda row: row.key, cursor=lambda row: row.cursor)
def main(
    database: str | dict[str, Any],
    table: str | None = None,
    query: str | None = None,
    cursor: str | None = None,
    primary_key: str | list[str] | None = None,
    late: float = 300,
    undated: bool = True,
    first: int | None = None,
    limit: int = 10_000,
    seconds: float = 30,
    since: Any = None,
) -> list[Row]:
    """List the rows from the cursor on, oldest first.

    Args:
        database: a resource of type postgresql or mysql ("$res:u/me/db"), its path, or a URL: postgresql://…,
            mysql://…, sqlite:///relative.db, sqlite:////absolute.db.
        table: "orders", or "sales.orders" in another schema.
        query: one SELECT instead of a table.
        cursor: the column that grows; its texts, if it is text, must sort as what they stand for.
        primary_key: the columns that identify a row, where the table does not say so itself, as a query never does.
        late: seconds within which rows may appear late, with an older cursor than others. On PostgreSQL a transaction
            that has written something is waited for longer.
        undated: list rows whose cursor is NULL too, each time.
        first: look at only so many rows at the first run, the newest: for large tables whose `cursor` never changes.
        limit: rows of one run; what is more comes with the next ones.
        seconds: what one statement may take.
    """
    if first is not None and cursor is None:
        raise ValueError("`first` needs a `cursor`: without one there is no newest row")
    with opened(database, seconds) as connection:
        source = Source(connection, table, query, primary_key, cursor)
        state = get_state() or {}
        if state.get("of") != source.of:
            state = {}  # another table or column: what was reached there says nothing here
        if source.by_transaction:
            return transactions(source, state, since, limit)
        if cursor is None:
            return source.whole()
        return dated(source, state, since, late=late, first=first, limit=limit) + (source.undated() if undated else [])


def dated(
    source: Source, state: dict[str, Any], since: Any, *, late: float, first: int | None, limit: int
) -> list[Row]:
    """By a column. A mark [when, cursor, transaction] says: of all that was there then, nothing up to it is unlisted.

    The oldest mark is where the next listing begins; a later one takes its place as soon as no transaction that was
    open then can still be open.
    """
    now, horizon, following = source.now()
    whole = since is None
    marks = state.get("marks") or [[0, source.newest(first) if first else None, 0]]
    low = state.get("from", marks[0][1]) if whole else marks[0][1]
    settled = [mark for mark in marks if now - mark[0] >= late and mark[2] <= horizon]
    if settled and not whole:
        marks = marks[marks.index(settled[-1]) :]
        low = marks[0][1]
    if since is not None and low is not None and above(low, since):
        low = since  # the watcher's own `lookback` reaches further
    scan = {} if whole else state.get("scan") or {}
    rows, more = source.rows(low, scan.get("after"), MOST if whole else limit)
    if whole and more:
        raise ValueError(
            f"there are more than {MOST:,} rows: `first = 1000` looks at only so many at the first run, the newest; "
            "or select fewer with `query`"
        )
    if len(forms := {form(row.cursor) for row in rows if row.cursor is not None}) > 1:
        raise ValueError(
            f"the cursors are written in {len(forms)} ways, so that their texts do not sort as the times do"
        )
    past = [row.cursor for row in rows if not in_future(row.cursor, now)]
    mark = scan.get("mark") or [now, source.furthest(now) if more else past[-1] if past else None, following]
    if more:
        scan = {"after": [bare(value) for value in rows[-1].place], "mark": mark}
    else:
        scan = {}
        if mark[1] is not None and mark[1] != marks[-1][1]:
            close = len(marks) > 1 and marks[-1][0] - marks[-2][0] < late / MARKS
            marks = [*(marks[:-1] if close else marks), mark]
    if not state and rows and isinstance(rank(mark[1]), datetime):
        marks = [[0, reaching_back(rows, mark[1], late), 0], marks[-1]]
    following_state = {"of": source.of, "from": state.get("from", low), "marks": marks} | (
        {"scan": scan} if scan else {}
    )
    if not state or following_state["marks"][-1] != state["marks"][-1] or scan != state.get("scan", {}):
        set_state(following_state)
    for row in rows:
        if since is not None and row.cursor is not None and not above(row.cursor, since):
            row.cursor = since  # it came late: the last run was further already
    return rows


def reaching_back(rows: list[Row], mark: Any, late: float) -> Any:
    """The first cursor that is not older than so many seconds before the mark."""
    earliest = rank(mark) - timedelta(seconds=late)
    return next(row.cursor for row in rows if row.cursor is not None and rank(row.cursor) >= earliest)


def transactions(source: Source, state: dict[str, Any], since: Any, limit: int) -> list[Row]:
    """By PostgreSQL's transaction numbers: of those at the horizon and above, some may still be open."""
    _, horizon, following = source.now()
    system = source.system()
    same = state.get("system", system) == system and (since is None or since <= following)
    scan = (state.get("scan") or {}) if same and since is not None else {}
    rows, more = source.rows(since if same else None, scan.get("after"), limit if same and since is not None else MOST)
    if more and (since is None or not same):
        raise ValueError(f"there are more than {MOST:,} rows: name a `cursor`, or select fewer with `query`")
    top = scan.get("horizon", horizon)
    scan = {"after": [bare(value) for value in rows[-1].place], "horizon": top} if more else {}
    following_state = {"of": source.of, "system": system} | ({"scan": scan} if scan else {})
    if following_state != state:
        set_state(following_state)
    for row in rows:
        row.cursor = max(min(row.cursor, top), since or 0)
    return rows


# --- reading ----------------------------------------------------------------------------------------------------------


class Source:
    """A table or a query in an open, read-only transaction."""

    def __init__(
        self,
        connection: Any,
        table: str | None,
        query: str | None,
        primary_key: str | list[str] | None,
        cursor: str | None,
    ) -> None:
        import sqlalchemy as sa

        if (table is None) == (query is None):
            raise ValueError("give either `table` or `query`")
        self.sa, self.connection, self.kind = sa, connection, connection.dialect.name
        self.what = f"the table {table}" if table else "the query"
        keys = [primary_key] if isinstance(primary_key, str) else primary_key or []
        if table:
            schema, _, name = table.rpartition(".")
            self._find(name, schema or None)
            keys = keys or sa.inspect(connection).get_pk_constraint(name, schema or None)["constrained_columns"]
            self.origin: Any = sa.table(
                sa.quoted_name(name, True), schema=sa.quoted_name(schema, True) if schema else None
            )
        else:
            self.origin = sa.text(f"({plain_sql(str(query))}) AS rows_of_query")
        described = connection.execute(sa.select(sa.text("*")).select_from(self.origin).limit(0))
        self.names = list(described.keys())
        described.close()
        if not keys:
            raise ValueError(f"{self.what} has no primary key: name the columns that identify a row in `primary_key`")
        for name in [*keys, *([cursor] if cursor else [])]:
            if name not in self.names:
                raise LookupError(f"{self.what} has no column {name!r}: it has {', '.join(self.names)}")
        self.keys = [self.column(name) for name in keys]
        self.key_names = list(keys)
        self.of = [table or query, cursor]
        self.cursor_name = cursor
        self.by_transaction = bool(self.kind == "postgresql" and table and cursor is None and self._has_xmin())
        self.order: Any = self._transaction() if self.by_transaction else self.column(cursor) if cursor else None

    def column(self, name: str) -> Any:
        return self.sa.column(self.sa.quoted_name(name, True))

    def _find(self, name: str, schema: str | None) -> None:
        inspector = self.sa.inspect(self.connection)
        if not inspector.has_table(name, schema):
            there = [*inspector.get_table_names(schema), *inspector.get_view_names(schema)]
            shown = ", ".join(sorted(there)[:20]) or "none"
            raise LookupError(f"there is no table {name!r}: was it dropped or renamed? There are: {shown}")

    def _has_xmin(self) -> bool:
        try:
            with self.connection.begin_nested():
                self.connection.execute(
                    self.sa.select(self.sa.literal_column("xmin")).select_from(self.origin).limit(0)
                )
        except self.sa.exc.DBAPIError:
            return False  # a view, or another server's table
        return True

    def _transaction(self) -> Any:
        """The number of the transaction that wrote a row, in full: the row itself keeps the lower 32 bits."""
        self.following = self.now()[2]
        back = f"((({self.following} - xmin::text::bigint) % 4294967296 + 4294967296) % 4294967296)"
        return self.sa.literal_column(f"({self.following} - {back})")

    def now(self) -> tuple[float, int, int]:
        """The server's clock, the oldest transaction that is open, and the next one's number."""
        statement = {
            "postgresql": "SELECT extract(epoch FROM clock_timestamp()), pg_snapshot_xmin(s)::text::bigint, "
            "pg_snapshot_xmax(s)::text::bigint FROM pg_current_snapshot() AS s",
            "mysql": "SELECT UNIX_TIMESTAMP(NOW(6)), 0, 0",
            "mariadb": "SELECT UNIX_TIMESTAMP(NOW(6)), 0, 0",
            "sqlite": "SELECT (julianday('now') - 2440587.5) * 86400.0, 0, 0",
        }[self.kind]
        now, horizon, following = self.connection.exec_driver_sql(statement).one()
        return float(now), int(horizon), int(following)

    def system(self) -> str:
        """Which server this is: another one counts other transactions."""
        return str(self.connection.exec_driver_sql("SELECT system_identifier FROM pg_control_system()").scalar())

    def rows(self, low: Any, after: list[Any] | None, limit: int) -> tuple[list[Row], bool]:
        """Rows from ``low`` on, or after a place, in order; and whether there are more than ``limit``."""
        found: list[Row] = []
        place = [unbare(value) for value in after] if after else None
        while len(found) <= limit:
            size = min(PAGE, limit + 1 - len(found))
            page = self._page(low, place, size)
            found += page
            if len(page) < size:
                break
            place = list(page[-1].place)
        return found[:limit], len(found) > limit

    def _page(self, low: Any, place: list[Any] | None, size: int) -> list[Row]:
        order = [self.order, *self.keys]
        conditions = [self.order.is_not(None)]
        if place is not None:
            conditions += [self.order >= self.value(place[0]), self._beyond(order, place)]
        elif low is not None:
            conditions.append(self.order >= self.value(low))
        return self._read(conditions, order, size)

    def _beyond(self, columns: list[Any], place: list[Any]) -> Any:
        """(a, b) > (x, y), written so that every database uses an index for it."""
        first, value = columns[0], self.value(place[0])
        if len(columns) == 1:
            return first > value
        return self.sa.or_(first > value, self.sa.and_(first == value, self._beyond(columns[1:], place[1:])))

    def value(self, value: Any) -> Any:
        """A value in a statement, whose type the database takes from what it is compared with."""
        return self.sa.bindparam(None, value, self.sa.types.NullType(), unique=True)

    def whole(self) -> list[Row]:
        rows = self._read([], self.keys, MOST + 1)
        if len(rows) > MOST:
            raise ValueError(f"there are more than {MOST:,} rows: name a `cursor`, or select fewer with `query`")
        return rows

    def undated(self) -> list[Row]:
        """Rows whose cursor is NULL: they stand nowhere in the order, so all are listed each time."""
        rows = self._read([self.order.is_(None)], self.keys, UNDATED + 1)
        if len(rows) > UNDATED:
            raise ValueError(
                f"more than {UNDATED:,} rows have no {self.cursor_name}: choose another `cursor`, or leave them out "
                "with `undated = false`"
            )
        return rows

    def _read(self, conditions: list[Any], order: list[Any], size: int) -> list[Row]:
        sa = self.sa
        shown = [sa.literal_column("*")] if not self.by_transaction else [sa.literal_column("*"), self.order]
        statement = sa.select(*shown).select_from(self.origin).where(*conditions).order_by(*order).limit(size)
        rows = []
        for values in self.connection.execute(statement):
            raw = dict(zip(self.names, values, strict=False))
            row = Row({name: as_json(value) for name, value in raw.items()})
            keys = [raw[name] for name in self.key_names]
            if None in keys:
                raise ValueError(f"{self.what} has a row whose {', '.join(self.key_names)} is NULL: it identifies none")
            row.key = as_json(keys[0]) if len(keys) == 1 else json.dumps([as_json(key) for key in keys])
            at = values[-1] if self.by_transaction else raw.get(self.cursor_name) if self.cursor_name else None
            if isinstance(at, float) and self.kind != "sqlite":
                raise ValueError(
                    f"{self.cursor_name} is a float, which no database compares exactly: choose another cursor"
                )
            row.cursor = None if "infinity" in str(at) else as_json(at)
            row.place = (at, *keys)
            rows.append(row)
        return rows

    def newest(self, count: int) -> Any:
        """The cursor of the row that has so many before it, counted from the newest; None if there are fewer."""
        return self._cursor([], count - 1)

    def furthest(self, now: float) -> Any:
        """The last cursor that is not in the future."""
        skipped = 0
        while (found := self._cursor([], skipped)) is not None and in_future(found, now):
            skipped = skipped * 2 + 1
        return found

    def _cursor(self, conditions: list[Any], skipped: int) -> Any:
        statement = self.sa.select(self.order).select_from(self.origin).where(self.order.is_not(None), *conditions)
        return as_json(self.connection.execute(statement.order_by(self.order.desc()).limit(1).offset(skipped)).scalar())


def plain_sql(query: str) -> str:
    """One SELECT, of whose text nothing is taken for a parameter."""
    return re.sub(r"(?<![:\w\\]):(?=\w)", r"\:", query.strip().rstrip(";"))


# --- connecting -------------------------------------------------------------------------------------------------------


@contextmanager
def opened(database: str | dict[str, Any], seconds: float) -> Iterator[Any]:
    """A connection in a transaction that only reads, in UTC, with a limit for each statement."""
    import sqlalchemy as sa

    if isinstance(database, str) and "://" not in database:
        database = get_resource(database)
    engine, begin = prepared(sa, database, seconds)
    try:
        with closing(engine.connect()) as connection:
            begin(connection)
            yield connection
    except sa.exc.DBAPIError as error:
        said = " ".join(str(error.orig).split())[:500]
        slow = " (raise `seconds`, or let an index help)" if re.search("time|interrupted", said) else ""
        raise RuntimeError(f"the database says: {said}{slow}") from None
    finally:
        engine.dispose()


def prepared(sa: Any, database: str | dict[str, Any], seconds: float) -> tuple[Any, Any]:
    """An engine, and what to say first on its connection."""
    scheme = database.partition("://")[0].partition("+")[0] if isinstance(database, str) else ""
    rest: dict[str, Any] = {"poolclass": sa.pool.NullPool, "hide_parameters": True}
    if scheme == "sqlite":
        file = Path(unquote(str(database).partition(":///")[2].partition("?")[0]))
        if not file.is_file():
            raise FileNotFoundError(f"there is no SQLite database {str(file)!r}: check `database`")
        return sa.create_engine("sqlite://", creator=lambda: read_only(file, seconds), **rest), begin_sqlite
    if scheme in ("postgresql", "postgres") or (isinstance(database, Mapping) and "dbname" in database):
        url = database if isinstance(database, Mapping) else re.sub(r"^postgres\w*(\+\w+)?:", "postgresql:", database)
        connect: Any = lambda: postgres.sync(url, connect_timeout=10)  # noqa: E731
        return (
            sa.create_engine("postgresql+psycopg://", creator=connect, **rest),
            lambda connection: begin_postgres(connection, seconds),
        )
    if scheme in ("mysql", "mariadb") or (isinstance(database, Mapping) and "database" in database):
        url = database if isinstance(database, Mapping) else re.sub(r"^\w+(\+\w+)?:", "mysql:", database)
        connect = lambda: mysql.sync(url, connect_timeout=10, read_timeout=seconds + 5)  # noqa: E731
        return (
            sa.create_engine("mysql+pymysql://", creator=connect, **rest),
            lambda connection: begin_mysql(connection, seconds),
        )
    raise ValueError(
        "`database` is a resource of type postgresql or mysql, or a URL: postgresql://, mysql://, sqlite:///"
    )


def read_only(file: Path, seconds: float) -> sqlite3.Connection:
    connection = sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=10)
    until = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > until, 100_000)
    return connection


def begin_sqlite(connection: Any) -> None:
    connection.exec_driver_sql("PRAGMA query_only = 1")
    connection.exec_driver_sql("BEGIN")


def begin_postgres(connection: Any, seconds: float) -> None:
    from psycopg.types.string import TextLoader

    class Instant(TextLoader):
        """As text: PostgreSQL knows times that Python does not."""

        def load(self, data: Any) -> str:
            text = str(super().load(data))
            return text if "BC" in text else re.sub(r"\+00$", "Z", text.replace(" ", "T", 1))

    connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    for name in ("timestamptz", "timestamp", "date"):
        connection.connection.driver_connection.adapters.register_loader(name, Instant)
    for setting in (f"statement_timeout = {int(seconds * 1000)}", "timezone = 'UTC'", "datestyle = 'ISO'"):
        connection.exec_driver_sql(f"SET LOCAL {setting}")


def begin_mysql(connection: Any, seconds: float) -> None:
    limit = (
        f"max_statement_time = {seconds}"
        if connection.dialect.is_mariadb
        else f"max_execution_time = {int(seconds * 1000)}"
    )
    for statement in (
        f"SET SESSION {limit}",
        "SET SESSION time_zone = '+00:00'",
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
    ):
        connection.exec_driver_sql(statement)


# --- values -----------------------------------------------------------------------------------------------------------


def as_json(value: Any) -> Any:
    """A value as JSON: numbers with decimals exactly, as text; times as RFC 3339; bytes as base64."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, date | clock):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(as_json, value))
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return str(value)


def bare(value: Any) -> Any:
    """A value for the state, from which it comes back as it was."""
    return {"bytes": as_json(value)} if isinstance(value, bytes | bytearray | memoryview) else as_json(value)


def unbare(value: Any) -> Any:
    return base64.b64decode(value["bytes"]) if isinstance(value, dict) else value


def rank(cursor: Any) -> Any:
    """A cursor as something that compares: a number, an instant, or the text itself."""
    text = str(cursor)
    if re.fullmatch(r"-?\d+(\.\d+)?", text):
        return Decimal(text)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return text
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def form(cursor: Any) -> str:
    """How a time is written, without the time: with T or a space, in which zone."""
    if not isinstance(rank(cursor), datetime):
        return ""
    return re.sub(r"^\d{4}-\d\d-\d\d(?:([T ])[\d:.]+)?", r"time \1", str(cursor))


def above(one: Any, other: Any) -> bool:
    """Whether a cursor lies beyond another one."""
    a, b = rank(one), rank(other)
    return bool(a > b) if type(a) is type(b) else str(one) > str(other)


def in_future(cursor: Any, now: float) -> bool:
    """A time after the server's own, or none at all: a mark that would hide all that is still to come."""
    at = rank(cursor)
    return cursor is None or (isinstance(at, datetime) and at.timestamp() > now)
