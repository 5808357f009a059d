"""New entries of a Redis or Valkey stream, each exactly once, alone or as a member of a consumer group.

    [watchers.signups]
    trigger = "redis_stream"
    every = "5s"
    flow = "welcome"
    with = { database = "$res:u/me/redis", stream = "signups" }

Without ``group`` the stream is only read, from the last entry on. With one, Redis hands each entry to one consumer of
the group: entries are acknowledged (XACK) by the run *after* the one whose items were committed, so that what a killed
run had read is read again. A group that does not exist is made, and begins with what comes from then on; the first run
takes nothing, so that `first_run` cannot swallow what waits.

Entries that were trimmed or deleted before they were read are gone for good: they are counted, and told as a gap.

Needs redis-py: ``pip install 'change-watcher[redis]'``.
"""

from __future__ import annotations

import base64
from decimal import Decimal
from typing import Any

from watcher import gap, get_state, redis, set_state, trigger

MOST = 100_000  # entries at the first run


class Entry(dict[str, Any]):
    """One entry, and where it stands: its id as a number, its two halves before and after the point."""

    place: str


@trigger(key="id", cursor=lambda entry: entry.place)
def main(
    database: str | dict[str, Any],
    stream: str,
    group: str | None = None,
    consumer: str = "watcher",
    claim: float | None = None,
    first: int | None = None,
    limit: int = 5000,
    since: str | None = None,
) -> list[Entry]:
    """List the entries from the last one on, oldest first.

    Args:
        database: a resource of type redis ("$res:u/me/redis"), its path, or a URL: redis://…, rediss://….
        stream: its key.
        group: read as a member of this consumer group.
        consumer: the name in the group.
        claim: also take over what other consumers of the group have left unacknowledged for so many seconds.
        first: look at only so many entries at the first run, the newest.
        limit: entries of one run; what is more comes with the next ones.
    """
    client = redis.sync(database, decode_responses=False, socket_timeout=30, socket_connect_timeout=10)
    if type(client).__module__.startswith("upstash"):
        raise ValueError("Upstash's REST does not do it in one step: name its other URL, rediss://…, as `database`")
    source = Stream(client, stream)
    of = [stream, group]
    state = get_state()
    if state is not None and state["of"] != of:
        state = None  # another stream or group: what was reached there says nothing here
    if group is not None:
        return grouped(source, state, group, consumer, claim, limit, since)
    if state is None or since is None:
        return beginning(source, state, first)
    return going_on(source, state, limit, since)


def beginning(source: Stream, state: dict[str, Any] | None, first: int | None) -> list[Entry]:
    """Everything that is there, or the newest."""
    facts, entries = source.look("-", first or MOST + 1, newest=first is not None)
    if facts is None and state and state["last"]:
        raise source.gone()
    if len(entries) > MOST:
        raise ValueError(f"there are more than {MOST:,} entries: `first = 1000` looks at only so many, the newest")
    if state and facts and first is None and facts["added"] and facts["added"] > state["added"] + len(entries):
        missed = facts["added"] - state["added"] - len(entries)
        gap(f"{missed} entries of the stream {source.name} were trimmed or deleted before they were read")
    last = entries[-1]["id"] if entries else state["last"] if state else None
    following = {"of": [source.name, None], "last": last, "added": facts["added"] if facts else 0, "read": 0}
    if following != state:
        set_state(following)
    return entries


def going_on(source: Stream, state: dict[str, Any], limit: int, since: str) -> list[Entry]:
    """From the last entry on, which is listed once more. What was added and is not there anymore was missed."""
    facts, entries = source.look(state["last"], limit + 1)
    if facts is None:
        raise source.gone()
    anew = facts["last"] < number(state["last"]) or (facts["added"] is not None and facts["added"] < state["added"])
    if anew:
        facts, entries = source.look("-", limit + 1)
    assert facts is not None
    more, entries = len(entries) > limit, entries[:limit]
    new = [entry for entry in entries if anew or number(entry["id"]) > number(state["last"])]
    read = state["read"] + len(new)
    if anew:
        gap(f"the stream {source.name} was deleted and made anew: what stood last in the old one may be missing")
    elif not more and facts["added"] is not None and facts["added"] > state["added"] + read:
        missed = facts["added"] - state["added"] - read
        gap(f"{missed} entries of the stream {source.name} were trimmed or deleted before they were read")
    elif facts["added"] is None and new and entries[0]["id"] != state["last"]:
        gap(f"entries of the stream {source.name} were trimmed: some may not have been read before")
    if new or (facts["added"] or 0) != state["added"] + state["read"]:
        last = entries[-1]["id"] if entries else state["last"]
        counted = (
            {"added": state["added"], "read": read} if more and not anew else {"added": facts["added"] or 0, "read": 0}
        )
        set_state({"of": state["of"], "last": last, **counted})
    return raised(entries, since)


def grouped(
    source: Stream, state: dict[str, Any] | None, group: str, consumer: str, claim: float | None, limit: int, since: Any
) -> list[Entry]:
    """What Redis hands out, and what it handed out before and is not acknowledged."""
    if state is None:
        source.make(group, whole=False)
        set_state({"of": [source.name, group], "unacknowledged": [], "lost": 0})
        return []
    if source.make(group, whole=True):
        gap(f"the group {group} was gone, or the whole stream {source.name}: it is read from its beginning again")
    if state["unacknowledged"]:
        source.client.xack(source.name, group, *state["unacknowledged"])  # they were committed, as this state was
    lost = source.lost(group)
    entries, dead = source.pending(group, consumer, limit)
    if claim is not None and len(entries) < limit:
        gone = source.claim(group, consumer, claim, limit - len(entries))
        entries, dead = source.pending(group, consumer, limit)
        dead += gone
    if len(entries) < limit:
        entries += source.fresh(group, consumer, limit - len(entries))
    if dead:
        gap(
            f"{len(dead)} entries of the stream {source.name} were trimmed or deleted while they were pending: "
            + ", ".join(dead[:5])
        )
    if lost and lost != state["lost"]:
        gap(f"{lost} entries of the stream {source.name} were trimmed before the group {group} had read them")
    following = {"of": state["of"], "unacknowledged": [entry["id"] for entry in entries] + dead, "lost": lost}
    if following["unacknowledged"] or lost != state["lost"]:
        set_state(following)
    return raised(entries, since)


class Stream:
    """One stream, asked through redis-py."""

    def __init__(self, client: Any, name: str) -> None:
        self.client, self.name = client, name

    def gone(self) -> LookupError:
        return LookupError(
            f"there is no stream {self.name!r} anymore: it was deleted, renamed or has expired. Nothing is forgotten: "
            "it goes on when there is one again"
        )

    def look(self, start: str, count: int, *, newest: bool = False) -> tuple[dict[str, Any] | None, list[Entry]]:
        """Its last id and its count of all entries ever added, with the entries at one moment. None: no such key."""
        from redis.exceptions import ResponseError

        asked = self.client.pipeline(transaction=True)
        asked.xinfo_stream(self.name)
        if newest:
            asked.xrevrange(self.name, count=count)
        else:
            asked.xrange(self.name, min=start, count=count)
        facts, found = asked.execute(raise_on_error=False)
        if isinstance(facts, ResponseError) and "no such key" in str(facts):
            return None, []
        for answer in (facts, found):
            if isinstance(answer, Exception):
                raise answer
        told = {text(name): value for name, value in facts.items()}
        entries = [self.entry(*pair) for pair in found]
        return (
            {"last": number(text(told["last-generated-id"])), "added": told.get("entries-added")},
            entries[::-1] if newest else entries,
        )

    def make(self, group: str, *, whole: bool) -> bool:
        """Make the group, and the stream if there is none; False if the group was there."""
        from redis.exceptions import ResponseError

        facts, _ = (None, []) if whole else self.look("-", 1)
        begin, read = ("{}-{}".format(*facts["last"]), facts["added"]) if facts else ("0-0", 0)
        try:
            self.client.xgroup_create(self.name, group, id=begin, mkstream=True, entries_read=read)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
            return False
        return True

    def pending(self, group: str, consumer: str, limit: int) -> tuple[list[Entry], list[str]]:
        """What this consumer was given and has not acknowledged; and the ids of those that are not there anymore."""
        found = self._handed_out(group, consumer, "0", limit)
        alive = [self.entry(id, fields) for id, fields in found if fields]
        return alive, [text(id) for id, fields in found if not fields]

    def fresh(self, group: str, consumer: str, limit: int) -> list[Entry]:
        return [self.entry(id, fields) for id, fields in self._handed_out(group, consumer, ">", limit)]

    def claim(self, group: str, consumer: str, idle: float, limit: int) -> list[str]:
        """Make what others have not acknowledged for long this consumer's own. Answers what is not there anymore."""
        start, gone = "0-0", list[str]()
        while limit > 0:
            found = self.client.xautoclaim(self.name, group, consumer, int(idle * 1000), start, count=min(limit, 1000))
            start, limit = text(found[0]), limit - len(found[1])
            gone += [text(id) for id in found[2:3] and found[2]]
            if start == "0-0":
                break
        return gone

    def _handed_out(self, group: str, consumer: str, after: str, count: int) -> list[Any]:
        answer = self.client.xreadgroup(group, consumer, {self.name: after}, count=count) or []
        entries = list(answer.values()) if isinstance(answer, dict) else [found for _, found in answer]
        return [pair for found in entries for pair in unnested(found)]

    def lost(self, group: str) -> int:
        """How many entries were trimmed or deleted before the group read them, as far as Redis can tell."""
        asked = self.client.pipeline(transaction=True)
        asked.xinfo_stream(self.name)
        asked.xinfo_groups(self.name)
        facts, groups = asked.execute()
        told = {text(name): value for name, value in facts.items()}
        own = next(g for g in ({text(n): v for n, v in g.items()} for g in groups) if text(g["name"]) == group)
        if told.get("entries-added") is None or own.get("entries-read") is None:
            return 0
        return max(0, int(told["entries-added"]) - int(told["length"]) - int(own["entries-read"]))

    def entry(self, id: bytes, fields: dict[bytes, bytes]) -> Entry:
        name = text(id)
        shown = {text(field) if readable(field) else repr(field): as_json(value) for field, value in fields.items()}
        entry = Entry(id=name, stream=self.name, fields=shown)
        entry.place = place(name)
        return entry


def raised(entries: list[Entry], since: str | None) -> list[Entry]:
    """What is read again lies behind the last run's end: it counts all the same, if it was not committed."""
    for entry in entries:
        if since is not None and Decimal(entry.place) < Decimal(since):
            entry.place = since
    return entries


def number(id: str) -> tuple[int, int]:
    milliseconds, _, sequence = id.partition("-")
    return int(milliseconds), int(sequence or 0)


def place(id: str) -> str:
    """An id as a decimal number, which sorts as ids do."""
    milliseconds, sequence = number(id)
    return f"{milliseconds}.{sequence:020}"


def unnested(found: list[Any]) -> list[Any]:
    """RESP3 wraps the entries of a stream once more."""
    return (
        found[0]
        if found and isinstance(found[0], list) and found[0] and isinstance(found[0][0], tuple | list)
        else found
    )


def text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")


def readable(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def as_json(value: bytes) -> Any:
    """A value as text; one that is no text as {"base64": …}."""
    return text(value) if readable(value) else {"base64": base64.b64encode(value).decode()}
