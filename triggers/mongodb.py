"""New and changed documents of a MongoDB collection, by its change stream, or by a field that grows.

    [watchers.tickets]
    trigger = "mongodb"
    every = "10s"
    flow = "answer"
    on = ["new", "changed"]
    with = { database = "$res:u/me/mongo", collection = "tickets", match = { status = "open" } }

A replica set (Atlas is one) has a change stream: it says which documents were touched, and each is then read as it is
now. The resume token is kept with the items, so that nothing is missed and nothing comes twice. When the token has
fallen out of the oplog, the run is marked with a gap, and the whole collection is compared with what is known:
what is new or changed is found all the same, once; ``lost = "stop"`` fails instead until somebody decides.

A server of its own has none: there ``cursor`` is asked for inclusively, `_id` if nothing is said, and what appears
late, with an older value, is found for ``late`` seconds. Edits are found if ``cursor`` grows with them.

Where ``on`` names ``removed`` the whole collection is read each time.

Needs pymongo: ``pip install 'change-watcher[mongodb]'``.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal

from watcher import gap, get_state, mongo, set_state, trigger

MOST = 100_000  # documents of one listing that must be whole
UNDATED = 10_000  # documents without a cursor
MARKS = 8  # points in time that are remembered within `late`
FRESH = 600  # seconds after which a resume token is renewed though nothing came
LOST = (136, 222, 260, 280, 286)  # the oplog, the token or the stream is not what it was
ENDED = ("drop", "dropDatabase", "rename", "invalidate")
NUMBERS = ("double", "int", "long", "decimal")
TYPES = (*NUMBERS, "string", "objectId", "date", "timestamp", "object", "array", "binData", "bool", "regex")


class Document(dict[str, Any]):
    """One document as JSON, with what identifies and orders it."""

    key: Any
    cursor: Any


@trigger(key=lambda document: document.key, cursor=lambda document: document.cursor)
def main(
    database: str | dict[str, Any],
    collection: str,
    db: str | None = None,
    match: dict[str, Any] | None = None,
    mode: Literal["auto", "stream", "poll"] = "auto",
    cursor: str = "_id",
    late: float = 300,
    lost: Literal["compare", "stop"] = "compare",
    first: int | None = None,
    limit: int = 5000,
    since: Any = None,
) -> list[Document]:
    """List the documents that were touched since the last run.

    Args:
        database: a resource of type mongodb ("$res:u/me/mongo"), its path, or a URL: mongodb://…, mongodb+srv://….
        collection: its name.
        db: the database, if it is not the one that the resource names.
        match: only documents that fit this query.
        mode: "stream" insists on the change stream, "poll" never uses it.
        cursor: without a change stream: the field that grows.
        late: without a change stream: seconds within which documents may appear late.
        lost: what to do when the resume token has fallen out of the oplog: "compare" or "stop".
        first: look at only so many documents at the first run, those with the greatest `_id` (or `cursor`). By change
            stream only inserts count then: an edit of one that nobody looked at cannot be told from a new one.
        limit: documents of one run; what is more comes with the next ones.
    """
    client = mongo.sync(database, tz_aware=True, datetime_conversion="DATETIME_AUTO", serverSelectionTimeoutMS=10_000)
    source = Collection(client[db] if db else client.get_default_database(), collection, match or {})
    of = [source.database.name, collection]
    state = get_state() or {}
    if state.get("of") != of:
        state = {"of": of}  # another collection: what was reached there says nothing here
    said = client.admin.command("hello")
    streams = "setName" in said or said.get("msg") == "isdbgrid"
    if mode == "stream" and not streams:
        raise ValueError('this server is no replica set and has no change stream: leave `mode` out, or say "poll"')
    if mode != "poll" and streams:
        return streamed(source, state, since, lost, first, limit)
    return polled(source, state, since, cursor, said["localTime"], late, first, limit)


# --- by change stream -------------------------------------------------------------------------------------------------


def streamed(
    source: Collection, state: dict[str, Any], since: Any, lost: str, first: int | None, limit: int
) -> list[Document]:
    """The documents that the stream names, each once, as they are now."""
    from pymongo.errors import OperationFailure

    if since is None or "token" not in state:
        token, place = source.start()
        if state.get("there"):
            source.must_exist()
        there = source.exists()
        if "token" not in state or state["there"] != there:
            set_state({"token": token, "at": place, **state, "there": there})
        return source.everything(first, place)
    try:
        touched, read, token, place = source.events(state["token"], limit, inserts_only=first is not None)
    except OperationFailure as error:
        if error.code not in LOST:
            raise
        if lost == "stop" or first is not None:
            raise RuntimeError(
                f"the resume token fell out of the oplog: what happened in {source.name} since the last run cannot be "
                "told. `watcher state reset` begins anew from now; a larger oplog or a shorter `every` prevents it"
            ) from None
        gap(f"the resume token fell out of the oplog: {source.name} was compared as a whole instead")
        return compared(source, state, since)
    if token is None:
        source.must_exist()
        gap(f"the collection {source.name} was dropped or renamed, and made anew: it was compared as a whole")
        return compared(source, state, since)
    if read or (token != state["token"] and Decimal(place) > Decimal(state["at"]) + FRESH):
        set_state({**state, "token": token, "at": place, "there": True})
    return source.by_id({id: max(at, since, key=Decimal) for id, at in touched.items()})


def compared(source: Collection, state: dict[str, Any], since: str) -> list[Document]:
    token, place = source.start()
    set_state({**state, "token": token, "at": place, "there": True})
    return source.everything(None, max(since, place, key=Decimal))


class Collection:
    """One collection, and the query that its documents must fit."""

    def __init__(self, database: Any, name: str, match: Mapping[str, Any]) -> None:
        self.database, self.name, self.match = database, name, dict(match)
        self.documents = database[name]

    def exists(self) -> bool:
        return bool(list(self.database.list_collections(filter={"name": self.name})))

    def must_exist(self) -> None:
        if not self.exists():
            raise LookupError(
                f"there is no collection {self.name!r} anymore: it was dropped or renamed. Nothing is forgotten: it "
                "goes on when there is one again"
            )

    def start(self) -> tuple[Any, str]:
        """A token for what comes from now on, and the server's time as a number."""
        now = self._now()
        with self.documents.watch(max_await_time_ms=100) as stream:
            stream.try_next()
            return stream.resume_token, now

    def _now(self) -> str:
        return numbered(self.database.client.admin.command("hello")["lastWrite"]["opTime"]["ts"], 0)

    def events(self, token: Any, limit: int, *, inserts_only: bool) -> tuple[dict[Any, str], int, Any, str]:
        """The documents that were touched, by `_id`, with the place of each one's last event; how many events there
        were; the token after them, None if the stream is at its end for good; the time."""
        shape = [{"$project": {"operationType": 1, "documentKey": 1, "clusterTime": 1}}]
        wanted = ("insert",) if inserts_only else ("insert", "update", "replace")
        touched: dict[Any, str] = {}
        read, place = 0, self._now()
        with self.documents.watch(shape, resume_after=token, max_await_time_ms=100, batch_size=1000) as stream:
            while read < limit and (event := stream.try_next()) is not None:
                place = numbered(event["clusterTime"], read)
                read += 1
                if event["operationType"] in ENDED:
                    return {}, read, None, place
                if event["operationType"] in wanted:
                    touched.pop(event["documentKey"]["_id"], None)
                    touched[event["documentKey"]["_id"]] = place
            return touched, read, stream.resume_token, place

    def by_id(self, places: dict[Any, str]) -> list[Document]:
        """These documents as far as they are there and fit, in the order of their events."""
        ids, found = list(places), dict[Any, Document]()
        for start in range(0, len(ids), 500):
            query = {"$and": [{"_id": {"$in": ids[start : start + 500]}}, self.match]}
            for raw in self.documents.find(query):
                found[raw["_id"]] = document(raw, places[raw["_id"]])
        return [found[id] for id in ids if id in found]

    def everything(self, first: int | None, place: Any) -> list[Document]:
        cursor = self.documents.find(self.match).sort("_id", -1).limit(first or MOST + 1)
        found = [document(raw, place) for raw in cursor]
        self.bounded(found)
        return found

    def bounded(self, found: list[Any]) -> None:
        if len(found) > MOST:
            raise ValueError(
                f"there are more than {MOST:,} documents: `first = 1000` looks at only so many at the first run, or "
                "select fewer with `match`"
            )

    # --- by a field

    def ordered(self, field: str, low: Any, after: list[Any] | None, limit: int) -> list[Any]:
        """Raw documents from ``low`` on or after a place, oldest first."""
        query: dict[str, Any] = {field: {"$gte": low}} if low is not None else {field: {"$ne": None}}
        if after is not None and field == "_id":
            query = {"_id": {"$gt": after[1]}}
        elif after is not None:
            query = {"$or": [{field: {"$gt": after[0]}}, {field: after[0], "_id": {"$gt": after[1]}}]}
        sort = [(field, 1)] if field == "_id" else [(field, 1), ("_id", 1)]
        return list(self.documents.find({"$and": [query, self.match]}).sort(sort).limit(limit))

    def last(self, field: str, skipped: int) -> Any:
        found = list(self.documents.find({field: {"$ne": None}}, {field: 1}).sort(field, -1).skip(skipped).limit(1))
        return value_at(found[0], field) if found else None

    def must_be_of_one_type(self, field: str, example: Any) -> None:
        """MongoDB compares only what is of one type: the others would never be listed."""
        own = {"ObjectId": "objectId", "datetime": "date", "str": "string", "Timestamp": "timestamp"}.get(
            type(example).__name__
        )
        others = [name for name in TYPES if name != own and (own or name not in NUMBERS)]
        other = None if example is None else self.documents.find_one({field: {"$type": others}}, {field: 1})
        if other is not None:
            kinds = f"{type(example).__name__} and {type(value_at(other, field)).__name__}"
            raise ValueError(f"{field} is of several types, {kinds}, which do not compare: choose another `cursor`")

    def undated(self, field: str) -> list[Document]:
        found = [
            document(raw, None) for raw in self.documents.find({"$and": [{field: None}, self.match]}).limit(UNDATED + 1)
        ]
        if len(found) > UNDATED:
            raise ValueError(f"more than {UNDATED:,} documents have no {field}: choose another `cursor`")
        return found


# --- by a field that grows --------------------------------------------------------------------------------------------


def polled(
    source: Collection,
    state: dict[str, Any],
    since: Any,
    field: str,
    clock: datetime,
    late: float,
    first: int | None,
    limit: int,
) -> list[Document]:
    """By a field. A mark [when, cursor] says: of all that was there then, nothing up to it is unlisted.

    The oldest mark is where the next listing begins; a later one takes its place once it is old enough.
    """
    from bson import json_util

    plain = json_util.JSONOptions(tz_aware=True)

    def kept(name: str) -> Any:
        return json_util.loads(state[name], json_options=plain) if name in state else None

    now, whole = clock.timestamp(), since is None
    known = kept("marks")
    if known:
        source.must_exist()
    marks = known or [[0, source.last(field, first - 1) if first else None]]
    low = kept("from") if whole and known else marks[0][1]
    settled = [mark for mark in marks if now - mark[0] >= late]
    if settled and not whole:
        marks = marks[marks.index(settled[-1]) :]
        low = marks[0][1]
    scan = {} if whole else kept("scan") or {}
    size = MOST if whole else limit
    raw = source.ordered(field, low, scan.get("after"), size + 1)
    if whole:
        source.bounded(raw)
    more, raw = len(raw) > size, raw[:size]
    values = [value_at(one, field) for one in raw]
    source.must_be_of_one_type(field, values[-1] if values else None)
    past = [value for value in values if not in_future(value, now)]
    mark = scan.get("mark") or [now, furthest(source, field, now) if more else past[-1] if past else None]
    scan = {"after": [values[-1], raw[-1]["_id"]], "mark": mark} if more else {}
    if not more and mark[1] is not None and mark[1] != marks[-1][1]:
        close = len(marks) > 1 and marks[-1][0] - marks[-2][0] < late / MARKS
        marks = [*(marks[:-1] if close else marks), mark]
    following = {"of": state["of"], "from": state.get("from", json_util.dumps(low)), "marks": json_util.dumps(marks)}
    if scan:
        following["scan"] = json_util.dumps(scan)
    if not known or marks[-1] != known[-1] or following.get("scan") != state.get("scan"):
        set_state(following)
    return [document(one, raised(ordering(value), since)) for one, value in zip(raw, values, strict=True)] + (
        source.undated(field) if field != "_id" else []
    )


def furthest(source: Collection, field: str, now: float) -> Any:
    """The last value that is not in the future."""
    skipped = 0
    while (found := source.last(field, skipped)) is not None and in_future(found, now):
        skipped = skipped * 2 + 1
    return found


def in_future(value: Any, now: float) -> bool:
    """A time after the server's own: a mark that would hide all that is still to come."""
    at = getattr(value, "generation_time", value)
    return isinstance(at, datetime) and at.timestamp() > now


def ordering(value: Any) -> Any:
    """A value of the field that grows, as a number or a text that sorts as MongoDB sorts it."""
    kind = type(value).__name__
    if kind == "ObjectId":
        return f"ObjectId {value}"
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if kind == "Timestamp":
        return numbered(value, 0)
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError(f"a cursor of type {kind} does not order: choose a time, a number or a text")


def raised(value: Any, since: Any) -> Any:
    """What came late lies behind where the last run ended: it counts all the same."""
    return since if since is not None and isinstance(value, str) == isinstance(since, str) and value < since else value


def numbered(at: Any, number: int) -> str:
    """A time of the cluster as a number, and what came at it in order."""
    return f"{at.time}.{at.inc:010}{number:08}"


def value_at(found: Any, field: str) -> Any:
    for part in field.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


# --- values -----------------------------------------------------------------------------------------------------------


def document(raw: Mapping[str, Any], cursor: Any) -> Document:
    made = Document(as_json(raw))
    made.key, made.cursor = made["_id"], cursor
    return made


def as_json(value: Any) -> Any:
    """A value as JSON: ids, decimals and times as text, bytes as base64."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items()}
    if isinstance(value, Iterable):
        return [as_json(part) for part in value]
    return str(value)
