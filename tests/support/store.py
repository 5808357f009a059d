"""What the store's tests commit, claim and settle: small proposals with all their parts."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from watcher import ids
from watcher.store import deliveries, runs, states, watchers
from watcher.store.db import Database
from watcher.store.runs import Committed
from watcher.values import (
    UNSET,
    Delivery,
    Json,
    Memory,
    NewDelivery,
    NewItem,
    Outcome,
    Proposal,
    RunRecord,
    Seen,
    Settlement,
    Verdict,
)

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
LEASE = timedelta(seconds=30)
ROOT = Path(__file__).parent.parent.parent


def run_record(watcher: str = "w", outcome: Outcome = "ok", at: datetime = NOW, **more: Json) -> RunRecord:
    return RunRecord(watcher, outcome, at - timedelta(seconds=1), at, **more)


def new_item(
    key: str,
    item: Json,
    *,
    watcher: str = "w",
    revision: int = 1,
    flows: Sequence[str] = ("f",),
    order: str = "key",
    epoch: str = "e",
    due_at: datetime = NOW,
) -> NewItem:
    hashed, content = ids.key_hash(key), ids.content_hash(item)
    id = ids.item_id(epoch, watcher, hashed, revision, content, "new")
    owed = tuple(
        NewDelivery(ids.delivery_id(id, flow), flow, ids.lane(order, watcher, hashed, id), due_at) for flow in flows
    )
    return NewItem(id, key, hashed, "new", revision, content, ids.canonical({"item": item}), owed)


def seen_row(key: str, item: Json = None, *, revision: int = 1, keep: bool = False) -> Seen:
    value = item if keep else UNSET
    return Seen(ids.key_hash(key), ids.content_hash(item), revision, True, key if keep else None, value)


def proposal(
    items: Iterable[NewItem] = (),
    *,
    watcher: str = "w",
    expected: int = 0,
    state: Json = UNSET,
    learn: Sequence[Seen] = (),
    touch: Sequence[bytes] = (),
    at: datetime = NOW,
    keep_history: int = 100,
    record: RunRecord | None = None,
) -> Proposal:
    found = tuple(items)
    return Proposal(
        watcher=watcher,
        expected=expected,
        memory=Memory(version=expected + 1, state=state),
        items=found,
        learn=learn,
        touch=touch,
        run=record or run_record(watcher, at=at),
        keep_history=keep_history,
    )


async def know(db: Database, *names: str, now: datetime = NOW) -> None:
    wanted: Mapping[str, str | None] = dict.fromkeys(names)
    await db.write(lambda tx: watchers.sync(tx, wanted, now))


async def commit(db: Database, items: Iterable[NewItem] = (), **more: Json) -> Committed:
    """Commit on top of whatever is there."""
    watcher = more.get("watcher", "w")
    async with db.read() as tx:
        expected = (await states.load(tx, watcher)).version
    wanted = proposal(items, expected=expected, **more)
    return await db.write(lambda tx: runs.commit(tx, wanted))


async def claim(
    db: Database, flow: str = "f", *, limit: int = 100, now: datetime = NOW, token: str = "t", lease: timedelta = LEASE
) -> Sequence[Delivery]:
    return await db.write(lambda tx: deliveries.claim(tx, flow, limit=limit, now=now, lease=lease, token=token))


def settlement(delivery: Delivery, verdict: Verdict = Verdict.DELIVERED, **more: Json) -> Settlement:
    return Settlement(delivery, verdict, NOW, 12, **more)


async def settle(db: Database, settlements: Sequence[Settlement], *, token: str = "t", now: datetime = NOW) -> set[int]:
    return await db.write(lambda tx: deliveries.settle(tx, token, settlements, now))


def start_python(code: str, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Another process that imports this checkout; ``sys.argv[1:]`` are the arguments."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


async def ended(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str, str]:
    """Wait for a process without stopping the loop: (exit code, stdout, stderr)."""
    out, err = await asyncio.to_thread(process.communicate, None, seconds)
    return process.returncode, out, err


KILLED = -signal.SIGKILL
