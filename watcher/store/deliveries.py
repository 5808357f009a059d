"""The outbox: what is owed to which flow, claimed with a lease, settled in groups."""

# ruff: noqa: S608  the SQL is our own text; what comes from outside goes as a parameter
from __future__ import annotations

from collections.abc import Collection, MutableSequence, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import chain
from typing import Any

from sqlalchemy import Select, exists, func, literal, select, text, union_all, update
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.errors import Damaged
from watcher.store import checks, flows
from watcher.store.db import insert_many, instant, is_postgres, marks, micros, run_sql, serials
from watcher.store.tables import attempt, delivery, item, watcher
from watcher.values import Delivery, NewDelivery, Settlement, Status, Verdict

MAX_STARTS = 10  # starts in a row without an outcome, before an item is taken for the cause
SUSPECT_STARTS = 2  # so many, and it may be the cause

# Written as text where a partial index must be recognised: SQLite compares the words, not the meaning.
_IS_PENDING = text("delivery.status = 0")
_IS_HEAD = text("delivery.status = 0 AND delivery.head")

_EARLIER = """
SELECT 1 FROM delivery e
WHERE e.flow = delivery.flow AND e.lane = delivery.lane AND e.status = 0 AND e.seq < delivery.seq
"""
_QUEUE = f"UPDATE delivery SET head = false WHERE delivery.status = 0 AND delivery.head AND EXISTS ({_EARLIER})"
_STEP_FORWARD = (
    f"UPDATE delivery SET head = true WHERE delivery.status = 0 AND NOT delivery.head AND NOT EXISTS ({_EARLIER})"
)
_COLUMNS = (
    "seq", "id", "item_seq", "watcher_id", "flow", "lane", "status", "head", "attempts", "starts", "due_at",
    "settled_at", "verdict", "note",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DeliveryView:
    """One delivery as it is shown."""

    seq: int
    id: str
    flow: str
    watcher: str
    item_id: str
    item_seq: int
    key: str
    change: str
    status: str  # pending, delivered, dead
    attempts: int
    due_at: datetime
    lease_until: datetime | None
    first_failed_at: datetime | None
    settled_at: datetime | None
    verdict: str
    status_code: int | None
    note: str
    found_at: datetime


@dataclass(frozen=True, slots=True)
class AttemptView:
    """One attempt; ``answer`` is the start of what the flow said."""

    id: int
    delivery_seq: int
    number: int
    started_at: datetime
    duration_ms: int
    verdict: str
    status_code: int | None
    note: str
    answer: bytes


@dataclass(frozen=True, slots=True)
class Backlog:
    """What one flow is owed."""

    pending: int
    oldest: datetime | None  # when the oldest pending item was found
    dead: int
    trouble: str = ""  # why the oldest pending delivery has not gone out yet, if it was tried


# --- owing ------------------------------------------------------------------------------------------------------------


async def owe(tx: AsyncConnection, watcher_id: int, owed: Sequence[tuple[int, NewDelivery]], now: datetime) -> int:
    """Insert deliveries, in order, each with its item's number. Returns how many are new.

    The first of its lane in this commit is a head, unless earlier ones of that lane are still pending.
    """
    if not owed:
        return 0
    first_of: dict[tuple[str, bytes], str] = {}
    for _, d in owed:
        if not d.dead:
            first_of.setdefault((d.flow, d.lane), d.id)
    waiting = {flow for flow in {flow for flow, _ in first_of} if await _any_pending(tx, flow)}
    await _hold_lanes(tx, [key for key in first_of if key[0] in waiting])
    numbers = await serials(tx, delivery, len(owed))
    stamp = micros(now)
    due = {at: micros(at) for at in {d.due_at for _, d in owed}}
    rows = []
    for seq, (item_seq, d) in zip(numbers, owed, strict=True):
        status, settled, verdict = (2, stamp, Verdict.ITEM.value) if d.dead else (0, None, "")
        head = first_of.get((d.flow, d.lane)) == d.id
        rows.append(
            (
                seq, d.id, item_seq, watcher_id, d.flow, d.lane, status, head, 0, 0, due[d.due_at], settled,
                verdict, d.dead,
            )
        )  # fmt: skip
    written = await insert_many(tx, delivery, _COLUMNS, rows, "ON CONFLICT DO NOTHING")
    if waiting:
        await run_sql(tx, f"{_QUEUE} AND seq >= ?", (numbers[0],))
    if written != len(owed):  # a head may be among those that existed already
        await mend(tx, numbers[0])
    return written


async def _any_pending(tx: AsyncConnection, flow: str) -> bool:
    sql = "SELECT 1 FROM delivery WHERE flow = ? AND status = 0 LIMIT 1"
    return (await run_sql(tx, sql, (flow,))).first() is not None


async def _hold_lanes(tx: AsyncConnection, lanes: Sequence[tuple[str, bytes]]) -> None:
    """On PostgreSQL, keep the last pending delivery of each lane from being settled until we commit.

    Else its settling would look for a successor, not see ours, and leave ours waiting for a head that is gone.
    """
    if not lanes or not is_postgres(tx):
        return
    names, keys = zip(*sorted(lanes), strict=True)
    await tx.exec_driver_sql(
        "SELECT 1 FROM unnest(%s::text[], %s::bytea[]) AS wanted (flow, lane) CROSS JOIN LATERAL ("
        "SELECT seq FROM delivery d WHERE d.flow = wanted.flow AND d.lane = wanted.lane AND d.status = 0 "
        "ORDER BY seq DESC LIMIT 1 FOR UPDATE) AS last",
        ([*names], [*keys]),
    )


async def mend(tx: AsyncConnection, since: int | None = None) -> None:
    """Set `head` right, of all deliveries or from a number on: exactly the first pending one of each lane has it."""
    for sql in (_STEP_FORWARD, _QUEUE):
        if since is None:
            await run_sql(tx, sql)
        else:
            await run_sql(tx, f"{sql} AND seq >= ?", (since,))


# --- claiming ---------------------------------------------------------------------------------------------------------


async def claim(
    tx: AsyncConnection, flow: str, *, limit: int, now: datetime, lease: timedelta, token: str
) -> Sequence[Delivery]:
    """Take up to ``limit`` due deliveries of a flow, each the head of its lane, for ``lease``.

    What cannot be sent dies here, with the reason: its item is damaged or gone, or it was started ten times and never
    ended. On PostgreSQL two processes never take the same one.
    """
    rows = (await run_sql(tx, _CLAIM + ("FOR UPDATE OF delivery SKIP LOCKED" if is_postgres(tx) else ""),
                          (flow, micros(now), limit))).all()  # fmt: skip
    lost: dict[int, str] = {}
    taken: MutableSequence[Delivery] = []
    suspected = False
    for row in rows:
        starts, sha256, found = _read(row)
        if reason := _unfit(found, starts, sha256):
            lost[found.seq] = reason
        elif starts < SUSPECT_STARTS:
            taken.append(found)
        elif not suspected:
            # One suspect at a time: what is sent beside the item that kills us shares its fate, and is not to blame.
            suspected = True
            taken.append(found)
    if lost:
        await _bury(tx, lost, now)
    if taken:
        until = micros(now + lease)
        await run_sql(
            tx,
            "UPDATE delivery SET token = ?, lease_until = ?, due_at = ?, attempts = attempts + 1, starts = starts + 1 "
            f"WHERE seq IN ({marks(tx, len(taken))})",
            (token, until, until, *(each.seq for each in taken)),
        )
    return taken


_SENT = """
SELECT delivery.seq, delivery.id, delivery.flow, delivery.attempts, delivery.starts, delivery.first_failed_at,
       item.id AS item_id, watcher.name AS watcher, item.run_id, item.key, item.change, item.revision, item.found_at,
       item.payload, item.sha256
FROM delivery LEFT JOIN item ON item.seq = delivery.item_seq LEFT JOIN watcher ON watcher.id = delivery.watcher_id
"""
_CLAIM = f"""{_SENT}
WHERE delivery.status = 0 AND delivery.head AND delivery.flow = ? AND delivery.due_at <= ?
ORDER BY delivery.due_at, delivery.seq LIMIT ?
"""


def _read(row: Any) -> tuple[int, bytes, Delivery]:
    """How often it was started, the checksum of its item, and the delivery."""
    seq, id, flow, attempts, starts, failed, item_id, name, run_id, key, change, revision, found, payload, sha256 = row
    return starts, sha256, Delivery(
        seq, id, flow, attempts + 1, None if failed is None else _moment(failed), item_id, name, run_id, key, change,
        revision, None if found is None else _moment(found), payload,  # type: ignore[arg-type]
    )  # fmt: skip


_moment = lru_cache(256)(instant)
"""Items of one run share their instant."""


def _unfit(found: Delivery, starts: int, sha256: bytes) -> str:
    """Why a delivery must not be sent; empty when it may."""
    if starts >= MAX_STARTS:
        return f"crashed: started {starts} times and never ended; whatever sends it may be killed by it"
    if None in (found.item_id, found.watcher):  # the joins found nothing
        return "damaged: its item is gone from the database"
    if checks.of_item(found.item_id, found.key, found.change, found.revision, found.payload) != sha256:
        return "damaged: its item is not what was written"
    return ""


async def _bury(tx: AsyncConnection, lost: dict[int, str], now: datetime) -> None:
    sql = (
        "UPDATE delivery SET status = 2, settled_at = ?, verdict = ?, note = ?, token = NULL, lease_until = NULL "
        "WHERE seq = ?"
    )
    stamp = micros(now)
    await run_sql(tx, sql, [(stamp, Verdict.ITEM.value, note, seq) for seq, note in lost.items()])
    await _promote(tx, [*lost])


async def _promote(tx: AsyncConnection, ended: Sequence[int]) -> None:
    """Make the next pending delivery of each of these deliveries' lanes its head."""
    if ended:
        await run_sql(
            tx,
            "UPDATE delivery SET head = true WHERE NOT head AND seq IN (SELECT (SELECT min(e.seq) FROM delivery e "
            "WHERE e.flow = d.flow AND e.lane = d.lane AND e.status = 0) "
            f"FROM delivery d WHERE d.seq IN ({marks(tx, len(ended))}))",
            (*ended,),
        )


async def release(tx: AsyncConnection, token: str, seqs: Collection[int], now: datetime) -> None:
    """Give back claims that were not sent: they are due at once and the start does not count."""
    if seqs:
        await run_sql(
            tx,
            "UPDATE delivery SET token = NULL, lease_until = NULL, due_at = ?, attempts = attempts - 1, "
            f"starts = starts - 1 WHERE token = ? AND status = 0 AND seq IN ({marks(tx, len(seqs))})",
            (micros(now), token, *seqs),
        )


async def abandon(tx: AsyncConnection, now: datetime) -> None:
    """Make due at once whatever a process that is gone had claimed. Only for the one process that owns the database."""
    await run_sql(
        tx,
        "UPDATE delivery SET token = NULL, lease_until = NULL, due_at = ? "
        "WHERE delivery.status = 0 AND delivery.head AND token IS NOT NULL",
        (micros(now),),
    )


# --- settling ---------------------------------------------------------------------------------------------------------


async def settle(tx: AsyncConnection, token: str, settlements: Sequence[Settlement], now: datetime) -> set[int]:
    """Write how attempts ended. Returns the numbers of those that are no longer ours: the lease ran out and somebody
    else has them; nothing was written about them."""
    held = await _held(tx, token, [s.delivery.seq for s in settlements])
    kept = [s for s in settlements if s.delivery.seq in held]
    # As few statements as can be, and none of them once per row: most outcomes of a group are alike.
    alike: dict[tuple[Any, ...], MutableSequence[int]] = {}
    over: MutableSequence[int] = []
    delivered: set[str] = set()
    stamp = micros(now)
    for s in kept:
        status = _status(s)
        alike.setdefault(_ended(s, status, stamp), []).append(s.delivery.seq)
        if status is not Status.PENDING:
            over.append(s.delivery.seq)
        if status is Status.DELIVERED:
            delivered.add(s.delivery.flow)
    for ended, seqs in alike.items():
        await run_sql(tx, f"{_SETTLE} AND seq IN ({marks(tx, len(seqs))})", (*ended, token, *seqs))
    await _note_attempts(tx, kept)
    await _promote(tx, over)
    await flows.delivered(tx, delivered, now)
    return {s.delivery.seq for s in settlements} - held


_SETTLE = """
UPDATE delivery SET status = ?, due_at = coalesce(?, due_at), settled_at = ?, verdict = ?, status_code = ?, note = ?,
  attempts = attempts - ?, first_failed_at = coalesce(first_failed_at, ?), starts = 0, token = NULL, lease_until = NULL
WHERE token = ?
"""


async def _held(tx: AsyncConnection, token: str, seqs: Sequence[int]) -> set[int]:
    """Those of the deliveries that this token still holds."""
    if not seqs:
        return set()
    mine = f"FROM delivery WHERE token = ? AND status = 0 AND seq IN ({marks(tx, len(seqs))})"
    if is_postgres(tx):
        return {*(await run_sql(tx, f"SELECT seq {mine} ORDER BY seq FOR UPDATE", (token, *seqs))).scalars()}
    # Nearly always all of them: a count is one row where the busy loop would have to be waited for at each.
    if (await run_sql(tx, f"SELECT count(*) {mine}", (token, *seqs))).scalar_one() == len(seqs):
        return {*seqs}
    return {*(await run_sql(tx, f"SELECT seq {mine}", (token, *seqs))).scalars()}


async def _note_attempts(tx: AsyncConnection, settlements: Sequence[Settlement]) -> None:
    for start in range(0, len(settlements), 500):
        some = settlements[start : start + 500]
        values = ", ".join([f"({marks(tx, 8)})"] * len(some))
        await run_sql(
            tx,
            "INSERT INTO attempt (delivery_seq, number, started_at, duration_ms, verdict, status_code, note, answer) "
            f"VALUES {values}",
            (*chain.from_iterable(_tried(s) for s in some),),
        )


def _status(s: Settlement) -> Status:
    if s.verdict in (Verdict.DELIVERED, Verdict.DUPLICATE):
        return Status.DELIVERED
    return Status.DEAD if s.dead or s.verdict is Verdict.ITEM else Status.PENDING


def _ended(s: Settlement, status: Status, stamp: int | None) -> tuple[Any, ...]:
    pending = status is Status.PENDING
    return (
        int(status),
        (micros(s.due_at) if s.due_at else stamp) if pending else None,
        None if pending else stamp,
        s.verdict.value,
        s.status_code,
        s.note[:2_000],
        1 if s.verdict is Verdict.TARGET else 0,  # the target's fault burns no attempt
        None if status is Status.DELIVERED else stamp,
    )


def _tried(s: Settlement) -> tuple[Any, ...]:
    return (
        s.delivery.seq,
        s.delivery.attempt,
        micros(s.started_at),
        s.duration_ms,
        s.verdict.value,
        s.status_code,
        s.note[:2_000],
        s.answer[:4_096],
    )


# --- looking ----------------------------------------------------------------------------------------------------------


async def due(tx: AsyncConnection, names: Collection[str], now: datetime) -> set[str]:
    """Those of the flows that have something to claim."""
    if not names:
        return set()
    d = delivery.c
    ready = [
        select(literal(name)).where(exists(select(d.seq).where(_IS_HEAD, d.flow == name, d.due_at <= now)))
        for name in sorted(names)
    ]
    return {*(await tx.execute(union_all(*ready))).scalars()}


async def next_due(tx: AsyncConnection, names: Collection[str], now: datetime) -> datetime | None:
    """When the next delivery of any of these flows can be claimed (not before ``now``); None when nothing is owed."""
    if not names:
        return None
    d = delivery.c
    first = [select(func.min(d.due_at).label("at")).where(_IS_HEAD, d.flow == name) for name in sorted(names)]
    times = [at for at in (await tx.execute(union_all(*first))).scalars() if at is not None]
    return max(min(times), now) if times else None


async def waiting(tx: AsyncConnection) -> dict[str, int]:
    """How many deliveries of each watcher wait, of those that have any: one pass over the partial index."""
    owed = select(delivery.c.watcher_id, func.count().label("n")).where(_IS_PENDING).group_by(delivery.c.watcher_id)
    counts = owed.subquery()
    rows = await tx.execute(select(watcher.c.name, counts.c.n).join(counts, counts.c.watcher_id == watcher.c.id))
    return {row.name: row.n for row in rows}


async def pending(tx: AsyncConnection) -> dict[str, Backlog]:
    """What each flow is owed, for the metrics: one pass over the partial indexes."""
    d = delivery.c
    waits = await tx.execute(
        select(d.flow, func.count().label("n"), func.min(d.seq).label("first")).where(_IS_PENDING).group_by(d.flow)
    )
    counts = {row.flow: (row.n, row.first) for row in waits}
    firsts = [first for _, first in counts.values()]
    found = await tx.execute(
        select(d.seq, item.c.found_at, d.attempts, d.note).join(item, item.c.seq == d.item_seq).where(d.seq.in_(firsts))
    )
    oldest = {row.seq: (row.found_at, row.note if row.attempts else "") for row in found}
    dead_rows = await tx.execute(
        select(d.flow, func.count().label("n")).where(text("delivery.status = 2")).group_by(d.flow)
    )
    dead = {row.flow: row.n for row in dead_rows}
    backlog = {}
    for flow in sorted(counts.keys() | dead.keys()):
        n, first = counts.get(flow, (0, None))
        found_at, trouble = oldest.get(first, (None, ""))
        backlog[flow] = Backlog(n, found_at, dead.get(flow, 0), trouble)
    return backlog


def _select() -> Select[Any]:
    d, i = delivery.c, item.c
    return (
        select(
            d.seq, d.id, d.flow, watcher.c.name.label("watcher"), i.id.label("item_id"), d.item_seq, i.key, i.change,
            d.status, d.attempts, d.due_at, d.lease_until, d.first_failed_at, d.settled_at, d.verdict, d.status_code,
            d.note, i.found_at,
        )
        .join(item, i.seq == d.item_seq)
        .join(watcher, watcher.c.id == d.watcher_id)
    )  # fmt: skip


def _view(row: Any) -> DeliveryView:
    return DeliveryView(**{**row._mapping, "status": Status(row.status).name.lower()})


def _matching(
    statement: Any, flow: str | None, watcher_name: str | None, status: str | None, since: datetime | None
) -> Any:
    if flow is not None:
        statement = statement.where(delivery.c.flow == flow)
    if watcher_name is not None:
        number = select(watcher.c.id).where(watcher.c.name == watcher_name).scalar_subquery()
        statement = statement.where(delivery.c.watcher_id == number)
    if status is not None:
        statement = statement.where(text(f"delivery.status = {int(Status[status.upper()])}"))
    if since is not None:
        found = select(item.c.seq).where(item.c.seq == delivery.c.item_seq, item.c.found_at >= since)
        statement = statement.where(exists(found))
    return statement


async def list(
    tx: AsyncConnection,
    *,
    flow: str | None = None,
    watcher_name: str | None = None,
    status: str | None = None,
    since: datetime | None = None,
    limit: int = 50,
    before: int | None = None,
) -> Sequence[DeliveryView]:
    """Newest first. ``status`` is pending, delivered or dead; ``before`` the `seq` of the last one that was seen."""
    statement = _matching(_select(), flow, watcher_name, status, since).order_by(delivery.c.seq.desc()).limit(limit)
    if before is not None:
        statement = statement.where(delivery.c.seq < before)
    return [_view(row) for row in await tx.execute(statement)]


async def get(tx: AsyncConnection, id: str) -> DeliveryView | None:
    row = (await tx.execute(_select().where(delivery.c.id == id))).first()
    return None if row is None else _view(row)


async def as_sent(tx: AsyncConnection, id: str) -> Delivery | None:
    """One delivery as its next attempt would see it. Raises Damaged."""
    row = (await run_sql(tx, f"{_SENT} WHERE delivery.id = ?", (id,))).first()
    if row is None:
        return None
    _, sha256, found = _read(row)
    if reason := _unfit(found, 0, sha256):
        raise Damaged(f"{id}: {reason}")
    return found


async def of_items(tx: AsyncConnection, item_seqs: Collection[int]) -> Sequence[DeliveryView]:
    """All deliveries of these items, in order."""
    statement = _select().where(delivery.c.item_seq.in_(item_seqs)).order_by(delivery.c.seq)
    return [_view(row) for row in await tx.execute(statement)]


async def attempts(tx: AsyncConnection, delivery_seq: int) -> Sequence[AttemptView]:
    """How each attempt of one delivery ended, in order."""
    rows = await tx.execute(select(attempt).where(attempt.c.delivery_seq == delivery_seq).order_by(attempt.c.id))
    return [AttemptView(**row._mapping) for row in rows]


# --- by hand ----------------------------------------------------------------------------------------------------------


async def retry(
    tx: AsyncConnection,
    ids: Collection[str] | None = None,
    *,
    flow: str | None = None,
    watcher_name: str | None = None,
    since: datetime | None = None,
    status: str = "dead",
    now: datetime,
) -> int:
    """Make deliveries due now, their schedule begun anew: the named ones, or all of ``status`` that match.

    Dead and delivered ones are owed again under the same id; pending ones that nobody holds just wait no longer.
    Returns how many.
    """
    d = delivery.c
    statement = update(delivery).where(d.token.is_(None))
    if ids is not None:
        statement = statement.where(d.id.in_(ids))
    statement = _matching(statement, flow, watcher_name, None if ids is not None else status, since)
    result = await tx.execute(
        statement.values(
            status=0, head=False, attempts=0, starts=0, due_at=now, lease_until=None, settled_at=None,
            first_failed_at=None, verdict="", status_code=None, note="",
        )
    )  # fmt: skip
    if result.rowcount:
        await (mend(tx) if ids is None else _mend_lanes(tx, [*ids]))
    return int(result.rowcount)


async def _mend_lanes(tx: AsyncConnection, ids: Sequence[str]) -> None:
    """Set `head` right in the lanes of these deliveries, and look at no other."""
    lanes = f"SELECT d.flow, d.lane FROM delivery d WHERE d.id IN ({marks(tx, len(ids))})"
    await run_sql(tx, f"{_QUEUE} AND (delivery.flow, delivery.lane) IN ({lanes})", (*ids,))
    first = "SELECT min(e.seq) FROM delivery e WHERE e.flow = d.flow AND e.lane = d.lane AND e.status = 0"
    await run_sql(
        tx,
        "UPDATE delivery SET head = true WHERE status = 0 AND NOT head AND seq IN "
        f"(SELECT ({first}) FROM delivery d WHERE d.id IN ({marks(tx, len(ids))}))",
        (*ids,),
    )
