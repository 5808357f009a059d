"""Memory and what the script saw become the items and the next memory: pure, no I/O, no clock."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import jsonpatch

from watcher import ids
from watcher.diff.cursor import Point, nanoseconds, one_kind, point, since
from watcher.errors import TriggerError
from watcher.scripts.entries import as_key, picker
from watcher.values import (
    UNSET,
    Change,
    Decision,
    Diff,
    Entry,
    Find,
    FirstRun,
    Json,
    Label,
    Listing,
    MaxChange,
    Memory,
    Reason,
    Seen,
    Style,
    Watcher,
)

__all__ = [
    "compare",
    "effective",
    "floor",
    "hashes",
    "key_of",
    "silent",
    "storable",
    "whole_listing_needed",
    "window",
]

_LARGEST_PATCHED = 256 * 1024  # bytes of canonical JSON; above it the patch replaces the whole
_UNSTORABLE = re.compile("[\\x00\ud800-\udfff]")
_A_PAGE = 10  # fewer entries than this are hardly a page that was full


# --- the label in force -----------------------------------------------------------------------------------------------


def effective(watcher: Watcher, label: Label) -> Label:
    """The script's label with what the configuration says instead of it.

    A Windmill script says itself what is new, so only ``key`` means something to it.
    """
    if label.style == "windmill":
        return replace(label, key=watcher.key or label.key)
    on = watcher.on or label.on
    style: Style = "cursor" if watcher.cursor else label.style
    if "removed" in on and not watcher.cursor:
        style = "listing"  # what is gone lies before any cursor: the script is asked for everything, `since` is None
    return replace(
        label,
        style=style,
        key=watcher.key or label.key,
        cursor=watcher.cursor or label.cursor,
        lookback=watcher.lookback or label.lookback,
        on=on,
    )


def floor(label: Label, memory: Memory) -> Json:
    """What a script is given as ``since``: the furthest point less the lookback, inclusive; None before the first run.

    ``label`` is the effective one. Raises TriggerError when its lookback does not fit the cursor.
    """
    return since(memory.cursor, label.lookback) if label.style == "cursor" else None


def whole_listing_needed(label: Label) -> bool:
    """Whether paging may never stop early: absences count, or an edit may stand on any page."""
    return label.style == "windmill" or "removed" in label.on or ("changed" in label.on and label.style == "listing")


def _policy(watcher: Watcher, label: Label) -> dict[str, Json]:
    """What of ``first_run`` and the effective label is remembered, to notice that it was changed."""
    first = watcher.first_run
    detail = {"newest": f":{first.newest}", "since": f":{first.since}"}.get(first.policy, "")
    return {
        "first_run": first.policy + detail,
        "style": label.style,
        "key": label.key,
        "cursor": label.cursor,
        "on": list(label.on),
    }


# --- keys -------------------------------------------------------------------------------------------------------------


def key_of(entry: Entry) -> str:
    """The entry's key; one without a key is known by its content."""
    return storable(entry.key) if entry.key else _content_key(entry.item)


def storable(text: str) -> str:
    """The text with what no database takes (NUL, half a surrogate pair) written as JSON writes it."""
    if text.isascii() and "\0" not in text:
        return text
    return _UNSTORABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _content_key(item: Json) -> str:
    return "#" + ids.content_hash(item).hex()


def hashes(watcher: Watcher, label: Label, memory: Memory, listing: Listing) -> list[bytes]:
    """The key hashes to look up in the ledger before `compare`; after a change of ``key`` also the former ones."""
    label = effective(watcher, label)
    wanted = dict.fromkeys(ids.key_hash(key_of(entry)) for entry in listing.entries)
    if _key_changed(label, memory):
        wanted |= dict.fromkeys(_former_hashes(memory, listing.entries))
    return list(wanted)


def _key_changed(label: Label, memory: Memory) -> bool:
    return "key" in memory.policy and label.style != "windmill" and memory.policy["key"] != label.key


def _former_hashes(memory: Memory, entries: Iterable[Entry]) -> Iterator[bytes]:
    """Under which key each entry was known before ``key`` was changed."""
    pick = picker(memory.policy["key"], "the former key")
    for entry in entries:
        key = as_key(pick(entry.item), "an item") if pick else None
        yield ids.key_hash(storable(key) if key else _content_key(entry.item))


# --- compare ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Row:
    """One key of a listing."""

    key: str
    hash: bytes
    item: Json
    point: Point | None
    hashed: bytes = b""

    @property
    def content(self) -> bytes:
        if not self.hashed:
            self.hashed = ids.content_hash(self.item)
        return self.hashed


@dataclass(slots=True)
class _Draft:
    """A diff in the making."""

    label: Label
    memory: Memory
    past: Mapping[bytes, Seen]
    known: int
    finds: list[tuple[Point | None, Find, str]] = field(default_factory=list)
    learn: dict[bytes, Seen] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    upheaval: int = 0  # changes that are more than what came after the cursor
    doubt: str = ""  # why nothing may be committed before somebody has looked

    @property
    def tracks(self) -> bool:
        """Whether the ledger keeps values: to tell what a changed or removed item was before."""
        return "changed" in self.label.on or "removed" in self.label.on

    def decide(self, key: str, reason: Reason, note: str = "") -> None:
        self.decisions.append(Decision(key, reason, note))

    def remember(self, row: _Row, revision: int) -> None:
        key, value = (row.key, row.item) if self.tracks else (None, UNSET)
        self.learn[row.hash] = Seen(row.hash, row.content, revision, True, key, value)

    def learn_silently(self, row: _Row, known: Seen | None, reason: Reason, note: str) -> None:
        known = known or self.past.get(row.hash)
        self.remember(row, known.revision if known else 0)
        self.decide(row.key, reason, note)

    def find(self, row: _Row, change: Change, known: Seen | None, note: str = "", *, again: bool = False) -> None:
        """One more item about this key, of which the ledger says ``known`` so far.

        With ``again`` it is the very item that was found last: the same revision, and so the same id.
        """
        if known is None and row.hash in self.past:  # the ledger forgot it, the items did not
            known = self.past[row.hash]
            once = self.label.style != "windmill" or self.memory.version == 0
            again = once and known.content == row.content
        revision = known.revision + (not again) if known else 1
        found = Find(row.key, row.hash, change, revision, row.content, row.item)
        if change == "changed" and known:
            found = replace(found, previous=known.value, patch=_patch(known.value, row.item))
        self.finds.append((row.point, found, note))
        self.remember(row, revision)


def compare(
    watcher: Watcher,
    label: Label,
    memory: Memory,
    listing: Listing,
    seen: Mapping[bytes, Seen],
    now: datetime,
    *,
    past: Mapping[bytes, Seen] | None = None,
    rewound: bool = False,
) -> Diff:
    """Work out what is new, changed and removed, and what to remember.

    Args:
        label: the script's own; what the configuration says instead is applied here.
        seen: the ledger rows of `hashes`; where ``removed`` is asked for and the listing is complete, also those of
            all keys that the source listed before.
        now: an aware instant. A cursor that lies after it does not move the mark.
        past: of keys that the ledger does not hold, the last item that was found about them: after a reset, or where
            a key was forgotten, one id must never stand for two different things.
        rewound: the memory is an earlier one (a rollback), so that a Windmill script will return things again; they
            keep their ids.

    Returns:
        The proposal, with ``memory.version`` one further. `silent` tells whether it is worth a commit.

    Raises:
        TriggerError: the cursors cannot be ordered (``junk``), or ``lookback`` or ``first_run`` do not fit them
            (``arguments``).
    """
    label = effective(watcher, label)
    state = memory.state if listing.state is UNSET else listing.state
    following = replace(memory, version=memory.version + 1, state=state, validators=listing.validators)
    if listing.unchanged:
        return Diff(memory=following, warnings=tuple(listing.warnings))
    draft = _Draft(label, memory, past or {}, memory.known)
    policy = _policy(watcher, label)
    if label.style == "windmill":
        if _report(watcher, memory, listing, seen, draft, rewound):
            policy["rewound"] = True
    else:
        rows = _rows(listing, seen, draft)
        one_kind([point(memory.cursor), point(memory.origin), *(row.point for row in rows)])
        seen = _carry_over(memory, listing, rows, seen, draft)
        if memory.version == 0:
            _first_sight(watcher, rows, draft)
        else:
            _decide(memory, rows, seen, draft)
            _remove(listing, rows, seen, draft)
        if label.style == "cursor":
            draft.finds.sort(key=_oldest_first)
            following = replace(following, cursor=_furthest(memory, rows, now), origin=_origin(memory, rows))
    if memory.version and "first_run" in memory.policy:
        _notice_first_run(watcher, memory.policy["first_run"], policy["first_run"], draft)
        policy["first_run"] = memory.policy["first_run"]
    return Diff(
        finds=tuple(find for _, find, _ in draft.finds),
        memory=replace(following, known=max(draft.known, 0), policy=policy),
        learn=tuple(draft.learn.values()),
        touch=_listed(listing) if watcher.forget_after else (),
        decisions=(*_decisions(watcher, draft), *draft.decisions),
        gap=_gap(memory, listing, seen, draft),
        quarantine=_doubt(watcher, memory, listing, seen, draft),
        warnings=(*listing.warnings, *draft.warnings),
    )


def silent(memory: Memory, diff: Diff) -> bool:
    """Whether a run with this diff leaves nothing to write: no item, nothing learnt, and the memory says the same.

    New validators alone are not worth a commit: without them the next answer is merely longer. The first run always
    is: a source that was empty at first sight has been seen.
    """
    after = diff.memory
    return (
        diff.quiet
        and memory.version > 0
        and memory.cursor == after.cursor
        and {**memory.policy, "at": 0} == {**after.policy, "at": 0}  # `at`: the version, written by the commit
        and _same(memory.state, after.state)
    )


def _same(one: Json, other: Json) -> bool:
    if one is UNSET or other is UNSET:
        return one is other
    return ids.canonical(one) == ids.canonical(other)


def _listed(listing: Listing) -> tuple[bytes, ...]:
    return tuple(dict.fromkeys(ids.key_hash(key_of(entry)) for entry in listing.entries))


# --- what the script listed -------------------------------------------------------------------------------------------


def _rows(listing: Listing, seen: Mapping[bytes, Seen], draft: _Draft) -> list[_Row]:
    """Each key once, in listed order."""
    rows: dict[bytes, _Row] = {}
    shared: Counter[str] = Counter()
    ordered = draft.label.style == "cursor"
    for entry in listing.entries:
        key = key_of(entry)
        row = _Row(key, ids.key_hash(key), entry.item, point(entry.cursor) if ordered else None)
        other = rows.setdefault(row.hash, row)
        if other is row:
            continue
        draft.decide(key, "duplicate", "listed more than once")
        if other.content != row.content:
            shared[key] += 1
            rows[row.hash] = _which(other, row, seen.get(row.hash))
    if shared:
        key, extra = shared.most_common(1)[0]
        draft.warnings.append(
            f"{len(shared)} key(s) stand for several different items in one listing, for example {key[:80]!r} for "
            f"{extra + 1}: only one of them counts; choose a `key` that is unique"
        )
    return list(rows.values())


def _which(one: _Row, other: _Row, known: Seen | None) -> _Row:
    """Of two items with one key: the further one; else the one that is known, so that a shared key does not flap
    with the order of the listing; else the later one, which was fetched later."""
    if one.point and other.point and one.point.at != other.point.at:
        return other if one.point.before(other.point) else one
    return one if known and known.content == one.content else other


def _carry_over(
    memory: Memory, listing: Listing, rows: list[_Row], seen: Mapping[bytes, Seen], draft: _Draft
) -> Mapping[bytes, Seen]:
    """After a change of ``key`` in the configuration: what was known under the former key is not new under this one."""
    if not _key_changed(draft.label, memory):
        return seen
    current = (ids.key_hash(key_of(entry)) for entry in listing.entries)
    former = dict(zip(current, _former_hashes(memory, listing.entries), strict=True))
    carried = dict(seen)
    recognised = 0
    for row in rows:
        old = seen.get(former[row.hash])
        recognised += row.hash in seen or old is not None
        if row.hash in seen or old is None:
            continue
        carried[row.hash] = replace(old, key_hash=row.hash, key=row.key if old.key is not None else None)
        draft.learn[row.hash] = carried[row.hash]
        if old.key_hash not in former:
            draft.learn[old.key_hash] = replace(old, present=False)
            carried.pop(old.key_hash, None)
    if rows and memory.known and not recognised:
        draft.doubt = f"`key` was changed, and none of the {len(rows)} listed items could be recognised"
    return carried


# --- deciding ---------------------------------------------------------------------------------------------------------


def _first_sight(watcher: Watcher, rows: list[_Row], draft: _Draft) -> None:
    """Nothing is known yet: `first_run` says what is sent."""
    chosen = _chosen(watcher.first_run, rows, draft.label)
    for row in rows:
        if row.hash in chosen and "new" in draft.label.on:
            draft.find(row, "new", None)
        else:
            draft.learn_silently(row, None, "baseline", "it was there at the first run")
    draft.known = len(rows)


def _chosen(first: FirstRun, rows: list[_Row], label: Label) -> set[bytes]:
    if first.policy == "since":
        bar = point(first.since)
        if label.style != "cursor" or bar is None:
            raise TriggerError(
                f'first_run = "since:{first.since}" needs a cursor to compare with: '
                'set `cursor`, or use "all", "newest:N" or "baseline"',
                kind="arguments",
            )
        one_kind([bar, *(row.point for row in rows)])
        return {row.hash for row in rows if row.point and not row.point.before(bar)}
    if first.policy == "newest":
        newest = sorted(rows, key=_newest_first) if label.style == "cursor" else rows
        return {row.hash for row in newest[: first.newest]}
    return {row.hash for row in rows} if first.policy == "all" else set()


def _newest_first(row: _Row) -> Any:
    """What has no date counts as the oldest; texts have no negative, so ranks are told by a reversed comparison."""
    return (row.point is None, _Reversed(row.point.at if row.point else 0))


@dataclass(frozen=True, slots=True)
class _Reversed:
    at: Any

    def __lt__(self, other: _Reversed) -> bool:
        return bool(other.at < self.at)


def _decide(memory: Memory, rows: list[_Row], seen: Mapping[bytes, Seen], draft: _Draft) -> None:
    mark, bottom = point(memory.cursor), _bottom(draft.label, memory)
    for row in rows:
        known = seen.get(row.hash)
        if known is not None and known.present:
            _decide_known(row, known, draft)
        elif known is None and bottom and row.point and row.point.before(bottom):
            draft.decide(row.key, "boundary", f"unknown, but it lies before {bottom.cursor}")
        elif "new" not in draft.label.on:
            draft.learn_silently(row, known, "baseline", "new, which `on` does not ask for")
            draft.known += 1
        else:
            draft.find(row, "new", known, "it came back" if known else "")
            draft.known += 1
            draft.upheaval += not (row.point and (mark is None or mark.before(row.point)))


def _decide_known(row: _Row, known: Seen, draft: _Draft) -> None:
    if not draft.tracks:
        draft.decide(row.key, "seen")
    elif known.value is UNSET:
        draft.learn_silently(row, known, "baseline", "`on` was widened: changes count from here")
    elif known.content == row.content:
        draft.decide(row.key, "seen")
    elif "changed" in draft.label.on:
        draft.find(row, "changed", known)
        draft.upheaval += 1
    else:
        draft.learn_silently(row, known, "seen", "changed, which `on` does not ask for")


def _remove(listing: Listing, rows: list[_Row], seen: Mapping[bytes, Seen], draft: _Draft) -> None:
    """What is known and no longer listed, if the listing is one that proves absence."""
    if "removed" not in draft.label.on:
        return
    if draft.label.style == "cursor":
        draft.warnings.append("removals cannot be seen from a cursor on: leave out `cursor`, or `removed` in `on`")
        return
    if listing.capped or not listing.complete:
        draft.warnings.append("removals were not looked for: the listing is not complete")
        return
    listed = {row.hash for row in rows}
    gone = [known for known in seen.values() if known.present and known.key_hash not in listed]
    for known in sorted(gone, key=lambda known: (known.key or "", known.key_hash)):
        draft.known -= 1
        if known.key is None or known.value is UNSET:  # met before `on` asked for removals: nobody can say what it was
            draft.learn[known.key_hash] = replace(known, present=False)
            continue
        draft.find(_Row(known.key, known.key_hash, known.value, None, known.content), "removed", known)
        draft.learn[known.key_hash] = replace(known, present=False, revision=known.revision + 1)
        draft.upheaval += 1


def _report(
    watcher: Watcher, memory: Memory, listing: Listing, seen: Mapping[bytes, Seen], draft: _Draft, rewound: bool
) -> bool:
    """A Windmill script: what it returns is what is new, also when it returns the same thing again.

    Returns whether a script that was rewound has not yet come to anything that was not found before.
    """
    sent = len(listing.entries) if memory.version else _sent_at_first(watcher.first_run, len(listing.entries))
    repeated = 0
    for number, entry in enumerate(listing.entries):
        key = key_of(entry)
        row = _Row(key, ids.key_hash(key), entry.item, None)
        before, known = seen.get(row.hash), draft.learn.get(row.hash) or seen.get(row.hash)
        draft.known += known is None
        if number >= sent:
            draft.learn_silently(row, known, "baseline", "it was there at the first run")
            continue
        again = rewound and row.hash not in draft.learn and before is not None and before.content == row.content
        repeated += again
        note = "found before the state was rolled back: the same id" if again else "returned before" if known else ""
        draft.find(row, "new", known, note, again=again)
    return rewound and repeated == len(listing.entries)


def _sent_at_first(first: FirstRun, count: int) -> int:
    if first.policy == "since":
        raise TriggerError(
            'first_run = "since:…" needs a cursor, and this script has none: use "all", "newest:N" or "baseline"',
            kind="arguments",
        )
    return {"all": count, "newest": first.newest, "baseline": 0}[first.policy]


def _decisions(watcher: Watcher, draft: _Draft) -> Iterator[Decision]:
    """One for each find: above the cap it is committed like the others, and owed later."""
    for number, (_, find, note) in enumerate(draft.finds):
        later = number // watcher.max_items
        if later:
            note = f"{find.change}{': ' + note if note else ''}; sent {later} interval{'s' * (later > 1)} later"
        yield Decision(find.key, "over_cap" if later else find.change, note)


# --- the cursor -------------------------------------------------------------------------------------------------------


def _bottom(label: Label, memory: Memory) -> Point | None:
    """Unknown entries strictly before this were there before us: the cursor's floor, or where the first run began."""
    if label.style != "cursor":
        return None
    low, origin = point(floor(label, memory)), point(memory.origin)
    if low is None or origin is None:
        return low or origin
    return origin if low.before(origin) else low


def _furthest(memory: Memory, rows: list[_Row], now: datetime) -> Json:
    """The mark after this listing. It never goes back, and a date in the future does not drag it along."""
    latest = nanoseconds(now)
    mark = point(memory.cursor)
    for row in rows:
        p = row.point
        if p is None or (p.kind == "instant" and isinstance(p.at, int) and p.at > latest):
            continue
        if mark is None or mark.before(p):
            mark = p
    return mark.cursor if mark else None


def _origin(memory: Memory, rows: list[_Row]) -> Json:
    if memory.version:
        return memory.origin
    lowest: Point | None = None
    for row in rows:
        if row.point and (lowest is None or row.point.before(lowest)):
            lowest = row.point
    return lowest.cursor if lowest else None


def _oldest_first(found: tuple[Point | None, Find, str]) -> tuple[bool, Any]:
    p = found[0]
    return (p is None, p.at if p else 0)


def window(label: Label, memory: Memory, entries: Sequence[Entry], seen: Mapping[bytes, Seen]) -> bool:
    """Whether paging must go on after these newest pages.

    With a cursor it may stop once it is strictly below the floor, if the source lists the newest first: known entries
    are no end, because a late record may stand behind them. Without one it may stop where all entries are known: a
    single known one may be pinned to the top.

    Args:
        label: the effective one.
        entries: those of the last page; of the last few where pages are small.
        seen: the ledger rows of their keys.
    """
    if memory.version == 0 or not entries or whole_listing_needed(label):
        return True
    if label.style == "listing":
        return not all(ids.key_hash(key_of(entry)) in seen for entry in entries)
    points = [point(entry.cursor) for entry in entries]
    bottom = _bottom(label, memory)
    one_kind([bottom, *points])
    dated = [p for p in points if p]
    newest_first = len(dated) > 1 and dated[-1].before(dated[0])
    return not (newest_first and bottom and dated[-1].before(bottom))


# --- doubts -----------------------------------------------------------------------------------------------------------


def _doubt(watcher: Watcher, memory: Memory, listing: Listing, seen: Mapping[bytes, Seen], draft: _Draft) -> str:
    """Why this may not be what it looks like: a login page, a truncated answer, a source that renamed all its keys."""
    if memory.version == 0 or not draft.finds:
        return ""
    what = draft.doubt or _too_much(watcher.max_change, memory, listing, seen, draft)
    if memory.policy.get("style") == "windmill" and draft.label.style != "windmill":
        what = "the script used to say itself what is new and now lists the world: what is old may look new"
    if not what:
        return ""
    return (
        f"{what}. Nothing was sent: `watcher approve {watcher.name}` commits it all the same, "
        f"`watcher resume {watcher.name}` drops it and looks again, "
        f"`watcher state reset {watcher.name}` takes the source as it is for a new baseline"
    )


def _too_much(limit: MaxChange, memory: Memory, listing: Listing, seen: Mapping[bytes, Seen], draft: _Draft) -> str:
    found = len(draft.finds)
    if limit.count is not None and found > limit.count:
        return f"{found} changes at once, and max_change allows {limit.count}"
    if limit.share is None or draft.label.style == "windmill":
        return ""
    known = max(memory.known, sum(row.present for row in seen.values()))
    emptied = not listing.entries  # no number of removals is small enough to believe an empty answer
    if draft.upheaval <= max(0 if emptied else limit.floor, limit.share * known):
        return ""
    what = "the source listed nothing at all" if emptied else f"{draft.upheaval} changes at once"
    return f"{what}, with {known} known keys: more than the share of {limit.share:.0%} that max_change allows"


def _gap(memory: Memory, listing: Listing, seen: Mapping[bytes, Seen], draft: _Draft) -> str:
    """Why something may have been missed: the script says so, or its listing reaches back to nothing known."""
    label, entries = draft.label, listing.entries
    if listing.gap:
        return listing.gap
    if memory.version == 0 or label.style == "windmill" or not entries or not (memory.known or seen):
        return ""
    ordered = label.style == "cursor"
    first, last = (point(e.cursor) if ordered else None for e in (entries[0], entries[-1]))
    if first and last and first.before(last):
        return ""  # oldest first, from the floor on: the rest comes with the next run
    bottom = _bottom(label, memory)
    reached = bool(bottom and last and not bottom.before(last))
    if listing.capped:
        known = ids.key_hash(key_of(entries[-1])) in seen
        return "" if reached or known else f"paging hit its limit after {len(entries)} items, before it met a known one"
    if "removed" in label.on or reached or any(ids.key_hash(key_of(entry)) in seen for entry in entries):
        return ""
    if ordered and len(entries) < _A_PAGE:
        return ""  # a source that leaves out the instant it was asked from overlaps with nothing
    return f"none of the {len(entries)} listed items was known: older ones may have come and gone between two runs"


def _notice_first_run(watcher: Watcher, then: Json, now: Json, draft: _Draft) -> None:
    if then != now:
        draft.warnings.append(
            f'first_run = "{now}" has no effect: the first run is over and was "{then}"; '
            f"`watcher state reset {watcher.name}` makes the next run the first"
        )


def _patch(previous: Json, item: Json) -> Json:
    """RFC 6902, from ``previous`` to ``item``: checked, because the library takes 1 and true for the same."""
    whole = [{"op": "replace", "path": "", "value": item}]
    wanted = ids.canonical(item)
    if len(wanted) + len(ids.canonical(previous)) > _LARGEST_PATCHED or type(previous) is not type(item):
        return whole
    if not isinstance(item, dict | list):
        return whole
    try:
        patch = jsonpatch.make_patch(previous, item)
        exact = ids.canonical(patch.apply(previous)) == wanted
    except (jsonpatch.JsonPatchException, RecursionError, TypeError, ValueError):
        return whole
    return patch.patch if exact else whole
