"""Verbs that look: the status, runs, items, deliveries, jobs, and why."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from watcher.config import units
from watcher.engine import silence
from watcher.flows import hours
from watcher.operations.operator import Operator, Unknown, Unsuited, must_be_known, plain, reads
from watcher.store import deliveries as delivery_store
from watcher.store import flows as flow_store
from watcher.store import items as item_store
from watcher.store import jobs as job_store
from watcher.store import retries as retry_store
from watcher.store import runs as run_store
from watcher.store import watchers as watcher_store
from watcher.values import JobStatus, Json

if TYPE_CHECKING:
    from watcher.engine.silence import Silence


@reads
async def status(op: Operator) -> Json:
    """Every watcher and every flow: in which condition, since when, why, and what waits."""
    config = op.config()
    async with op.db.read() as tx:
        known = {row.name: row for row in await watcher_store.everyone(tx)}
        flows = {row.name: row for row in await flow_store.everyone(tx)}
        owed = await delivery_store.pending(tx)
        waiting = await delivery_store.waiting(tx)
        if op.silences:
            silent = op.silences()
        else:
            silent = await silence.silences(tx, config, list(known.values()), {})
        failed = await job_store.failed_since(tx, op.clock() - timedelta(days=1))
        bulk = await retry_store.current(tx, op.clock())
    return {
        "retry": {"done": bulk.done, "total": bulk.total, "started_at": plain(bulk.started_at)} if bulk else None,
        "service": {"running": op.started_at is not None, "pid": os.getpid() if op.started_at else None}
        | {"started_at": plain(op.started_at)},
        "watchers": [
            _watcher(op, name, known.get(name), waiting.get(name, 0), silent.get(name))
            for name in sorted({*config.watchers, *known})
        ],
        "flows": [
            _flow(op, name, flows.get(name), owed) | {"failed_jobs": failed.get(name, 0)}
            for name in sorted({*config.flows, *flows, *owed})
        ],
    }


def _watcher(op: Operator, name: str, row: Any, waiting: int, silent: Silence | None) -> Json:
    watcher = op.config().watchers.get(name)
    condition, reason = "ok", ""
    if watcher is None:
        condition, reason = "gone", "no longer in the configuration"
    elif not watcher.enabled:
        condition, reason = "disabled", "enabled = false"
    elif row is None:
        condition, reason = "new", "never ran"
    elif row.quarantined_at:
        condition, reason = "quarantined", row.quarantine_reason
    elif row.paused_at:
        condition, reason = "paused", row.pause_reason
    elif waiting >= watcher.max_backlog:
        condition = "waiting"
        reason = f"{waiting} of its deliveries wait (max_backlog is {watcher.max_backlog}): goes on when fewer do"
    elif row.failures:
        condition, reason = "failing", row.last_error
    elif not row.checked_at:
        condition, reason = "new", "never ran"
    elif silent:
        condition, reason = "silent", silent.reason
    stored = {} if row is None else {k: v for k, v in plain(row).items() if k not in ("id", "name", "origin")}
    runs = watcher is not None and watcher.enabled and condition not in ("paused", "quarantined")
    return {
        "name": name,
        "condition": condition,
        "reason": reason,
        "trigger": watcher.trigger if watcher else None,
        "flows": list(watcher.flows) if watcher else [],
        "schedule": _schedule(watcher) if watcher else None,
        "next_at": plain(_next(op.next_run(name), row)) if op.next_run and runs else None,
        **stored,
    }


def _next(tick: datetime | None, row: Any) -> datetime | None:
    """When a watcher runs next: not before its back-off is over."""
    waits = row.backoff_until if row is not None else None
    return max(tick, waits) if tick and waits else tick


def _schedule(watcher: Any) -> str:
    if watcher.cron:
        return f"{watcher.cron} ({watcher.timezone})"
    return "every " + units.show_duration(watcher.every) if watcher.every else "by hand"


def _flow(op: Operator, name: str, row: Any, owed: Mapping[str, Any]) -> Json:
    flow = op.config().flows.get(name)
    condition, reason = _stopped(op, name, row)
    backlog = owed.get(name)
    if not condition and backlog and backlog.trouble:
        condition, reason = "retrying", backlog.trouble
    return {
        "name": name,
        "condition": condition or "ok",
        "reason": reason,
        "preset": flow.preset if flow else None,
        "pending": backlog.pending if backlog else 0,
        "oldest_at": plain(backlog.oldest) if backlog else None,
        "dead": backlog.dead if backlog else 0,
        "delivered_at": plain(row.delivered_at) if row else None,
        "probe_at": plain(row.probe_at) if row else None,
    }


def _stopped(op: Operator, name: str, row: Any) -> tuple[str, str]:
    """In which condition a flow is that is not sent to, and why; both empty when it is."""
    flow = op.config().flows.get(name)
    if flow is None:
        return "gone", "no longer in the configuration: its deliveries wait"
    if not flow.enabled:
        return "disabled", "enabled = false"
    if row is not None and row.paused_at:
        return "paused", row.pause_reason
    if row is not None and row.held_since:
        return "held", row.held_reason
    if flow.hours and (wait := hours.opens_in(flow.hours, op.clock())):
        opens = (op.clock() + wait).astimezone(ZoneInfo(flow.hours.timezone))
        return "closed", f"sends {hours.show(flow.hours)} ({flow.hours.timezone}): next at {opens:%Y-%m-%d %H:%M}"
    return "", ""


def _waits(op: Operator, name: str, row: Any) -> str:
    """Why what is owed to a flow is not sent now; empty when nothing but its own time is in the way."""
    condition, reason = _stopped(op, name, row)
    if condition == "held" and row.probe_at:
        reason += f"; asked again at {row.probe_at:%Y-%m-%d %H:%M:%S}Z"
    return f"{condition}: {reason}" if reason else condition


@reads
async def runs(op: Operator, name: str | None = None, limit: int = 20, before: int | None = None) -> Json:
    """The newest runs that found something, failed or were quarantined; ``before`` is an id to go on below."""
    await check_filters(op, name)
    async with op.db.read() as tx:
        return plain(await run_store.list(tx, name, limit, before))


@reads
async def run_details(op: Operator, id: int) -> Json:
    """One run with its log, its error and its items."""
    async with op.db.read() as tx:
        run = await run_store.get(tx, id)
        found = await item_store.list(tx, run_id=id, limit=100)
    if run is None:
        raise Unknown(f"no such run: {id} (`watcher runs` lists them)")
    return plain(run) | {"items": plain(found)}


@reads
async def items(op: Operator, name: str | None = None, limit: int = 20, before: int | None = None) -> Json:
    """The newest items; ``before`` is a `seq` to go on below."""
    await check_filters(op, name)
    async with op.db.read() as tx:
        return plain(await item_store.list(tx, name, limit=limit, before=before))


@reads
async def deliveries(
    op: Operator,
    name: str | None = None,
    flow: str | None = None,
    status: str | None = None,
    limit: int = 20,
    before: int | None = None,
) -> Json:
    """The newest deliveries, of one watcher, flow or status; ``before`` is a `seq` to go on below."""
    await check_filters(op, name, flow)
    async with op.db.read() as tx:
        rows = await delivery_store.list(tx, flow=flow, watcher_name=name, status=status, limit=limit, before=before)
    return plain(rows)


async def check_filters(op: Operator, name: str | None, flow: str | None = None) -> None:
    """Refuse names that nobody ever had: an empty list would look like an answer."""
    async with op.db.read() as tx:
        if name is not None:
            must_be_known(
                name, {*op.config().watchers, *(row.name for row in await watcher_store.everyone(tx))}, "watcher"
            )
        if flow is not None:
            known = {*(row.name for row in await flow_store.everyone(tx)), *await delivery_store.pending(tx)}
            must_be_known(flow, {*op.config().flows, *known}, "flow")


@reads
async def why(op: Operator, key: str, name: str | None = None) -> Json:
    """Everything ever decided about one key (or item or delivery id), one story per watcher that met it."""
    await check_filters(op, name)
    async with op.db.read() as tx:
        stories = await item_store.why(tx, name, key)
    answers = {a.id: a.answer.decode("utf-8", "replace") for story in stories for a in story.attempts}
    found = plain(stories)
    async with op.db.read() as tx:
        jobs = await job_store.some(tx, [delivery.id for story in stories for delivery in story.deliveries])
        flows = {row.name: row for row in await flow_store.everyone(tx)}
    for story in found:
        for attempt in story["attempts"]:
            attempt["answer"] = answers[attempt["id"]]
        for delivery in story["deliveries"]:
            job = jobs.get(delivery["id"])
            delivery["job"] = None if job is None else _job(job)
            pending = delivery["status"] == "pending"
            delivery["waits"] = _waits(op, delivery["flow"], flows.get(delivery["flow"])) if pending else ""
    return found


@reads
async def jobs(op: Operator, flow: str | None = None, status: str | None = None, limit: int = 20) -> Json:
    """The newest jobs of local flows and scripts, of one flow or status, without what they took and gave."""
    if status is not None and status not in [known.value for known in JobStatus]:
        raise Unsuited(f"no such status: {status} (there is {', '.join(known.value for known in JobStatus)})")
    if flow is not None and (there := op.config().flows.get(flow)) is not None and not there.steps:
        raise Unsuited(f"flows.{flow} has no steps, so it runs elsewhere: `watcher deliveries --flow {flow}`")
    wanted = JobStatus(status) if status else None
    async with op.db.read() as tx:
        found = await job_store.list(tx, path=flow, status=wanted, limit=limit)
    if flow is not None and not found:
        must_be_known(flow, op.config().flows, "flow")
    return [_job(row) for row in found]


@reads
async def job(op: Operator, id: str) -> Json:
    """One job with what it took, what it printed, its result and its error. A delivery's id is its job's."""
    async with op.db.read() as tx:
        found = await job_store.get(tx, id)
    if found is None:
        raise Unknown(f"no such job: {id} (`watcher jobs` lists them; they are kept for 30 days)")
    flow = op.config().flows.get(found.path)
    whole = {"args": _json(found.args), "result": _json(found.result), "logs": found.logs, "detail": found.detail}
    return _job(found) | {"steps": len(flow.steps) if flow else None} | whole


def _job(found: job_store.Job) -> Json:
    kept = ("id", "kind", "path", "status", "step", "starts", "created_at", "started_at", "finished_at", "error")
    more = ("cancel_reason", "parent", "progress")
    return {name: value for name, value in plain(found).items() if name in (*kept, *more)}


def _json(body: bytes | None) -> Json:
    return None if not body else json.loads(body)
