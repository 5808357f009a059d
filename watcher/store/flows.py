"""Flows as the database knows them: held, paused, last delivered to."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.store.db import insert_many, micros
from watcher.store.tables import flow


@dataclass(frozen=True, slots=True)
class FlowStatus:
    """What is known of one flow beyond its configuration."""

    name: str
    held_since: datetime | None = None
    held_reason: str = ""
    probe_at: datetime | None = None
    probes: int = 0
    paused_at: datetime | None = None
    pause_reason: str = ""
    delivered_at: datetime | None = None


async def everyone(tx: AsyncConnection) -> list[FlowStatus]:
    """Every flow that was ever delivered to, held or paused."""
    return [FlowStatus(**row._mapping) for row in await tx.execute(select(flow).order_by(flow.c.name))]


all = everyone


async def held(tx: AsyncConnection) -> dict[str, FlowStatus]:
    """The flows that must not be sent to as usual: held ones (a probe may go at `probe_at`) and paused ones."""
    stopped = or_(flow.c.held_since.is_not(None), flow.c.paused_at.is_not(None))
    return {row.name: FlowStatus(**row._mapping) for row in await tx.execute(select(flow).where(stopped))}


async def _know(tx: AsyncConnection, names: Collection[str]) -> None:
    columns = ("name", "held_reason", "probes", "pause_reason")
    await insert_many(tx, flow, columns, [(name, "", 0, "") for name in sorted(names)], "ON CONFLICT DO NOTHING")


async def hold(tx: AsyncConnection, name: str, reason: str, probe_at: datetime | None, now: datetime) -> bool:
    """Hold a flow until a probe succeeds; a flow that is held already counts one more probe. True: newly held.

    Without ``probe_at`` it is not probed: somebody has to resume it.
    """
    await _know(tx, [name])
    values: dict[str, Any] = {"held_reason": reason[:2_000], "probe_at": probe_at}
    free = update(flow).where(flow.c.name == name, flow.c.held_since.is_(None))
    newly = (await tx.execute(free.values(held_since=now, probes=0, **values))).rowcount == 1
    if not newly:
        again = update(flow).where(flow.c.name == name)
        await tx.execute(again.values(probes=flow.c.probes + 1, **values))
    return newly


async def resume(tx: AsyncConnection, name: str, now: datetime) -> bool:
    """Send to a flow as usual again, whether it was held or paused. True: it was."""
    stopped = or_(flow.c.held_since.is_not(None), flow.c.paused_at.is_not(None))
    free = {"held_since": None, "held_reason": "", "probe_at": None, "probes": 0, "paused_at": None, "pause_reason": ""}
    return bool((await tx.execute(update(flow).where(flow.c.name == name, stopped).values(free))).rowcount)


async def end_hold(tx: AsyncConnection, name: str, now: datetime) -> bool:
    """Send to a held flow as usual again; what an operator paused stays paused. True: it was held."""
    free = {"held_since": None, "held_reason": "", "probe_at": None, "probes": 0}
    held = update(flow).where(flow.c.name == name, flow.c.held_since.is_not(None))
    return bool((await tx.execute(held.values(free))).rowcount)


async def pause(tx: AsyncConnection, name: str, reason: str, now: datetime) -> None:
    """Send nothing to a flow, not even a probe, until somebody resumes it."""
    await _know(tx, [name])
    await tx.execute(update(flow).where(flow.c.name == name).values(paused_at=now, pause_reason=reason[:2_000]))


async def delivered(tx: AsyncConnection, names: Collection[str], now: datetime) -> None:
    """Note that these flows accepted something."""
    await insert_many(
        tx,
        flow,
        ("name", "held_reason", "probes", "pause_reason", "delivered_at"),
        [(name, "", 0, "", micros(now)) for name in sorted(names)],
        "ON CONFLICT (name) DO UPDATE SET delivered_at = excluded.delivered_at",
    )
