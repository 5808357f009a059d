"""What an operator may do: each verb one function over an Operator, with plain JSON in and out."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import secrets as random
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING, Any

from watcher import config as configuration
from watcher import connections, resource_types
from watcher.config import units
from watcher.engine import silence
from watcher.errors import ConfigError, SecretError, StoreError, TriggerError, WatcherError
from watcher.failpoint import failpoint
from watcher.log import mask, register
from watcher.store import audit
from watcher.store import deliveries as delivery_store
from watcher.store import flows as flow_store
from watcher.store import items as item_store
from watcher.store import jobs as job_store
from watcher.store import resources as resource_store
from watcher.store import retries as retry_store
from watcher.store import runs as run_store
from watcher.store import states as state_store
from watcher.store import tokens as token_store
from watcher.store import variables as variable_store
from watcher.store import watchers as watcher_store
from watcher.values import UNSET, Config, JobStatus, Json, Memory, RunRecord

if TYPE_CHECKING:
    from watcher.engine.silence import Silence
    from watcher.run import Plan, Runner
    from watcher.secrets import Key
    from watcher.store.db import Database, Tx

TOKEN_PREFIX = "wtc_"  # noqa: S105  (what a token starts with, so that leaked ones can be recognised)


@dataclasses.dataclass(frozen=True, slots=True)
class Operator:
    """What the verbs work on. The last four are given only inside a running service."""

    config: Callable[[], Config]
    db: Database
    clock: Callable[[], datetime]
    runner: Runner | None = None
    key: Key | None = None
    wake: Callable[[Collection[str]], None] = lambda flows: None  # deliveries of these flows became due
    reload: Callable[[], Awaitable[Sequence[str]]] | None = None  # the options that take a restart
    next_run: Callable[[str], datetime | None] | None = None
    silences: Callable[[], Mapping[str, Silence]] | None = None
    outbound: Callable[[], Config] | None = None  # with local flows as the dispatcher sees them
    started_at: datetime | None = None


Verb = Callable[..., Awaitable[Json]]
VERBS: dict[str, Verb] = {}
READS: set[str] = set()
"""Verbs that write nothing: a database opened read-only is enough."""


def _verb(function: Verb) -> Verb:
    VERBS[function.__name__] = function
    return function


def _read(function: Verb) -> Verb:
    READS.add(function.__name__)
    return _verb(function)


class Unknown(WatcherError):
    """There is nothing of that name or number."""

    exit_code = 2


class Unsuited(WatcherError):
    """The verb does not fit what it was asked of."""

    exit_code = 2


class Rejected(WatcherError):
    """The new configuration is bad; the message shows every mistake with its place."""

    exit_code = 78


# --- looking ----------------------------------------------------------------------------------------------------------


@_read
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
            _flow(config, name, flows.get(name), owed) | {"failed_jobs": failed.get(name, 0)}
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


def _flow(config: Config, name: str, row: Any, owed: Mapping[str, Any]) -> Json:
    flow = config.flows.get(name)
    condition, reason = "ok", ""
    if flow is None:
        condition, reason = "gone", "no longer in the configuration: its deliveries wait"
    elif not flow.enabled:
        condition, reason = "disabled", "enabled = false"
    elif row is not None and row.paused_at:
        condition, reason = "paused", row.pause_reason
    elif row is not None and row.held_since:
        condition, reason = "held", row.held_reason
    backlog = owed.get(name)
    if condition == "ok" and backlog and backlog.trouble:
        condition, reason = "retrying", backlog.trouble
    return {
        "name": name,
        "condition": condition,
        "reason": reason,
        "preset": flow.preset if flow else None,
        "pending": backlog.pending if backlog else 0,
        "oldest_at": plain(backlog.oldest) if backlog else None,
        "dead": backlog.dead if backlog else 0,
        "delivered_at": plain(row.delivered_at) if row else None,
        "probe_at": plain(row.probe_at) if row else None,
    }


@_read
async def runs(op: Operator, name: str | None = None, limit: int = 20, before: int | None = None) -> Json:
    """The newest runs that found something, failed or were quarantined; ``before`` is an id to go on below."""
    await _filters(op, name)
    async with op.db.read() as tx:
        return plain(await run_store.list(tx, name, limit, before))


@_read
async def run_details(op: Operator, id: int) -> Json:
    """One run with its log, its error and its items."""
    async with op.db.read() as tx:
        run = await run_store.get(tx, id)
        found = await item_store.list(tx, run_id=id, limit=100)
    if run is None:
        raise Unknown(f"no such run: {id} (`watcher runs` lists them)")
    return plain(run) | {"items": plain(found)}


@_read
async def items(op: Operator, name: str | None = None, limit: int = 20, before: int | None = None) -> Json:
    """The newest items; ``before`` is a `seq` to go on below."""
    await _filters(op, name)
    async with op.db.read() as tx:
        return plain(await item_store.list(tx, name, limit=limit, before=before))


@_read
async def deliveries(
    op: Operator,
    name: str | None = None,
    flow: str | None = None,
    status: str | None = None,
    limit: int = 20,
    before: int | None = None,
) -> Json:
    """The newest deliveries, of one watcher, flow or status; ``before`` is a `seq` to go on below."""
    await _filters(op, name, flow)
    async with op.db.read() as tx:
        rows = await delivery_store.list(tx, flow=flow, watcher_name=name, status=status, limit=limit, before=before)
    return plain(rows)


async def _filters(op: Operator, name: str | None, flow: str | None = None) -> None:
    """Refuse names that nobody ever had: an empty list would look like an answer."""
    async with op.db.read() as tx:
        if name is not None:
            _known(name, {*op.config().watchers, *(row.name for row in await watcher_store.everyone(tx))}, "watcher")
        if flow is not None:
            known = {*(row.name for row in await flow_store.everyone(tx)), *await delivery_store.pending(tx)}
            _known(flow, {*op.config().flows, *known}, "flow")


@_read
async def why(op: Operator, key: str, name: str | None = None) -> Json:
    """Everything ever decided about one key (or item or delivery id), one story per watcher that met it."""
    await _filters(op, name)
    async with op.db.read() as tx:
        stories = await item_store.why(tx, name, key)
    answers = {a.id: a.answer.decode("utf-8", "replace") for story in stories for a in story.attempts}
    found = plain(stories)
    async with op.db.read() as tx:
        jobs = await job_store.some(tx, [delivery.id for story in stories for delivery in story.deliveries])
    for story in found:
        for attempt in story["attempts"]:
            attempt["answer"] = answers[attempt["id"]]
        for delivery in story["deliveries"]:
            job = jobs.get(delivery["id"])
            delivery["job"] = None if job is None else _job(job)
    return found


@_read
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
        _known(flow, op.config().flows, "flow")
    return [_job(row) for row in found]


@_read
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


# --- running ----------------------------------------------------------------------------------------------------------


@_verb
async def plan(op: Operator, name: str, record: bool = False) -> Json:
    """What a run would send, key by key, with the reason; and what the source answered, to ``record`` it."""
    runner = _runner(op, name)
    with TemporaryDirectory(prefix="watcher-") as directory:
        file = Path(directory, "recording.json")
        found = await _told(runner.plan(name, record=file if record else None))
        return {"plan": found.to_json(), "recording": _parsed(file) if record else None}


@_verb
async def test(op: Operator, name: str, recording: Json) -> Json:
    """Run a watcher offline against the answers of a recorded run: nothing is asked of the source, nothing saved."""
    runner = _runner(op, name)
    with TemporaryDirectory(prefix="watcher-") as directory:
        file = Path(directory, "recording.json")
        _write(file, recording)
        return (await _told(runner.test(name, file))).to_json()


def _parsed(file: Path) -> Json:
    return json.loads(file.read_bytes())


def _write(file: Path, value: Json) -> None:
    file.write_text(json.dumps(value))


async def _told(work: Awaitable[Plan]) -> Plan:
    """With the script's own traceback, or the start of the source's answer, when it fails."""
    try:
        return await work
    except TriggerError as error:
        detail = "" if error.kind == "unreachable" else error.detail  # where in the script it asked explains nothing
        raise WatcherError(mask(f"{error}\n{detail}".strip())) from error


@_verb
async def run(op: Operator, name: str) -> Json:
    """One run now; its deliveries go out from the running service, or from the next one."""
    return _record(await _runner(op, name).run(name))


@_verb
async def apply(op: Operator, name: str, plan: Json) -> Json:
    """Commit exactly what a plan says, if nothing was committed since it was made."""
    from watcher.run import Plan

    runner = _runner(op, name)
    try:
        proposed = Plan.from_json(plan)
    except (KeyError, TypeError, ValueError) as error:
        raise Unsuited("that is no plan: make one with `watcher plan NAME --out FILE`") from error
    if proposed.watcher != name:
        raise Unsuited(f"that plan is one of {proposed.watcher!r}, not of {name!r}")
    return _record(await runner.apply(proposed))


@_verb
async def approve(op: Operator, name: str) -> Json:
    """Commit the plan that was put in quarantine, and let the watcher run again."""
    record = await _runner(op, name).approve(name)
    await _note(op, "approve", name)
    return _record(record)


def _record(record: RunRecord) -> Json:
    return {field: value for field, value in plain(record).items() if field != "plan"}


def _runner(op: Operator, name: str) -> Runner:
    if name not in op.config().watchers:
        raise Unknown(f"no such watcher: {name}{did_you_mean(name, op.config().watchers)}")
    if op.runner is None:
        raise StoreError("the database is open for reading only")
    return op.runner


# --- steering ---------------------------------------------------------------------------------------------------------


@_verb
async def pause(op: Operator, name: str, reason: str = "", flow: bool = False) -> Json:
    """Take no more ticks of a watcher, or send nothing to a flow (its deliveries wait), until resumed."""
    now = op.clock()
    if flow:
        _known(name, op.config().flows, "flow")
        await op.db.write(lambda tx: flow_store.pause(tx, name, reason, now))
    else:
        _known(name, op.config().watchers, "watcher")
        await op.db.write(lambda tx: watcher_store.pause(tx, name, reason, now))
    await _note(op, "pause", name, reason)
    return {"paused": name}


@_verb
async def resume(op: Operator, name: str, flow: bool = False) -> Json:
    """Undo a pause, drop a quarantine with its plan, clear failures and back-off; or let a held flow send at once."""
    now = op.clock()
    if flow:
        _known(name, op.config().flows, "flow")
        await op.db.write(lambda tx: flow_store.resume(tx, name, now))
        op.wake([name])
    else:
        _known(name, op.config().watchers, "watcher")
        await op.db.write(lambda tx: watcher_store.resume(tx, name, now))
    await _note(op, "resume", name)
    return {"resumed": name}


@_read
async def owed(
    op: Operator, flow: str | None = None, name: str | None = None, since: str | None = None, status: str = "dead"
) -> Json:
    """The ids of every delivery of a status that matches; ``since`` (RFC 3339) is when its item was found."""
    await _filters(op, name, flow)
    after = datetime.fromisoformat(since) if since else None
    found: list[str] = []
    before = None
    async with op.db.read() as tx:
        while page := await delivery_store.list(
            tx, flow=flow, watcher_name=name, status=status, limit=1000, before=before
        ):
            found += [row.id for row in page if after is None or row.found_at >= after]
            before = page[-1].seq
    return {"ids": found}


@_verb
async def retry_begin(op: Operator, total: int) -> Json:
    """Begin a retry of many, part by part: the id to call `retry` and `retry_end` with. One at a time."""
    now = op.clock()
    return {"bulk": await op.db.write(lambda tx: retry_store.begin(tx, total, now))}


@_verb
async def retry_end(op: Operator, bulk: str) -> Json:
    """A retry of many is over, or its command was interrupted: how many deliveries it made due."""
    now = op.clock()
    return {"retried": await op.db.write(lambda tx: retry_store.end(tx, bulk, now))}


@_verb
async def retry_stop(op: Operator) -> Json:
    """Let the retry of many that is at work, in whatever process, stop before its next part."""
    now = op.clock()
    bulk = await op.db.write(lambda tx: retry_store.stop(tx, now))
    return {"stopped": bulk is not None, "retried": bulk.done if bulk else 0, "total": bulk.total if bulk else 0}


@_verb
async def retry(op: Operator, ids: Sequence[str], bulk: str | None = None) -> Json:
    """Make these deliveries due now, or all deliveries of these items, dead or not, under the ids that they had.

    As a part of a ``bulk`` retry it does nothing, and says so, once somebody asked for that one to stop.
    """
    now = op.clock()
    async with op.db.read() as tx:
        items = [item.seq for item in [await item_store.get(tx, id) for id in ids if id.startswith("itm_")] if item]
        of_items = await delivery_store.of_items(tx, items) if items else []
    named = [id for id in ids if not id.startswith("itm_")] + [row.id for row in of_items]

    async def write(tx: Tx) -> int | None:
        if bulk and not await retry_store.go_on(tx, bulk, now):
            return None
        due = await delivery_store.retry(tx, named, now=now)
        if bulk:
            await retry_store.note(tx, bulk, due, now)
        return due

    count = await op.db.write(write)
    if count is None:
        return {"retried": 0, "stopped": True}
    if count:
        await _note(op, "retry", named[0] if count == 1 else f"{count} deliveries")
        op.wake(list(op.config().flows))
    return {"retried": count, "stopped": False}


@_read
async def rendered(op: Operator, id: str) -> Json:
    """The request that the next attempt of a delivery would make, rendered anew by the flow as it is now configured.

    Nothing is sent. References are not followed and secrets are not shown: a signature is not made.
    """
    from watcher.flows import preview

    async with op.db.read() as tx:
        delivery = await delivery_store.as_sent(tx, id)
    if delivery is None:
        raise Unknown(f"no such delivery: {id} (`watcher deliveries` lists them)")
    _known(delivery.flow, op.config().flows, "flow")
    return {"delivery": id, **preview.request((op.outbound or op.config)().flows[delivery.flow], delivery, op.clock())}


@_read
async def sample_flow(op: Operator, name: str, item: Json = None) -> Json:
    """Send one marked sample event to a flow, past its queue, limits and hours, and say what it answered.

    Nothing is saved. ``item`` takes the place of the sample's own.
    """
    from watcher.flows import sample
    from watcher.flows.attempt import Courier, resolve
    from watcher.http.sender import Sender
    from watcher.resolve import Resolver

    _known(name, op.config().flows, "flow")
    flow = (op.outbound or op.config)().flows[name]
    if flow.steps:
        raise Unsuited(f"{name} is a local flow: start the service first, which runs it")
    delivery = sample.delivery(flow, op.clock(), item)
    sender = Sender()
    try:
        resolved = await resolve(flow, Resolver(op.config, op.db, op.key))
        judgement, response = await Courier(sample.marked(flow), sender, op.clock).attempt(
            delivery, resolved, op.clock()
        )
    finally:
        await sender.close()
    return {
        "flow": name,
        "delivery": delivery.id,
        "verdict": judgement.verdict.value,
        "note": mask(judgement.note),
        "status_code": response.status if response else None,
        "answer": mask(response.body[:1000].decode("utf-8", "replace")) if response else "",
    }


@_verb
async def reload(op: Operator) -> Json:
    """Read the configuration again; a bad one leaves the old in force and is an error here."""
    if op.reload is None:
        raise StoreError("no service is running, so there is nothing to reload: `watcher serve` reads the file anyway")
    try:
        needs_restart = await op.reload()
    except ConfigError as error:
        raise Rejected(configuration.render(error).rstrip()) from error
    config = op.config()
    counts = {"watchers": len(config.watchers), "flows": len(config.flows), "digest": config.digest}
    return counts | {"needs_restart": list(needs_restart)}


# --- state ------------------------------------------------------------------------------------------------------------


@_read
async def state_get(op: Operator, name: str, version: int | None = None) -> Json:
    """What a watcher remembers, now or at an earlier version."""
    return _memory(await _load(op, name, version))


@_read
async def state_history(op: Operator, name: str, limit: int = 20) -> Json:
    """The versions of a watcher's memory, newest first."""
    if not await _stored(op, name):
        return []
    async with op.db.read() as tx:
        return plain(await state_store.history(tx, name, limit))


@_read
async def state_diff(op: Operator, name: str, old: int | None = None, new: int | None = None) -> Json:
    """What changed between two versions, as JSON Patch: by default between the last two."""
    import jsonpatch

    after = _memory(await _load(op, name, new))
    if after["version"] < 2 and old is None:
        raise Unsuited(f"{name} is at version {after['version']}: there is nothing before it to compare with")
    before = _memory(await _load(op, name, after["version"] - 1 if old is None else old))
    hide = {"version": None}
    return {"old": before, "new": after, "patch": jsonpatch.make_patch(before | hide, after | hide).patch}


@_verb
async def state_set(
    op: Operator, name: str, value: Json = None, cursor: Json = None, move: bool = False, expected: int | None = None
) -> Json:
    """Put a value in place of the script's state, or move the cursor; ``expected`` is the version it replaces."""
    memory = await _load(op, name)
    if expected is not None and expected != memory.version:
        raise WatcherError(
            f"{name} is at version {memory.version}, not {expected}: look at `watcher state diff {name}`"
        )
    changed = {"cursor": cursor} if move else {"state": value}
    return await _put(op, name, dataclasses.replace(memory, **changed), memory.version, "set by hand")


@_verb
async def state_rollback(op: Operator, name: str, version: int) -> Json:
    """Put an earlier memory in force again, as a new version. Seen keys stay seen."""
    current = await _load(op, name)
    old = await _load(op, name, version)
    return await _put(op, name, old, current.version, f"rolled back to version {version}")


@_verb
async def state_reset(op: Operator, name: str) -> Json:
    """Forget everything, seen keys too: the next run is a first run."""
    await _stored(op, name)
    now = op.clock()
    await op.db.write(lambda tx: state_store.reset(tx, name, now))
    await _note(op, "state.reset", name)
    return {"reset": name}


async def _load(op: Operator, name: str, version: int | None = None) -> Memory:
    if not await _stored(op, name):
        return Memory()
    async with op.db.read() as tx:
        memory = await (state_store.load(tx, name) if version is None else state_store.version(tx, name, version))
    return await state_store.whole(op.db, memory)


async def _put(op: Operator, name: str, memory: Memory, expected: int, note: str) -> Json:
    now = op.clock()
    keep = op.config().watchers[name].keep_history if name in op.config().watchers else 100
    stored = await state_store.apart(op.db, memory)
    version = await op.db.write(
        lambda tx: state_store.put(tx, name, stored, expected, now, run_id=None, note=note, keep=keep)
    )
    await _note(op, "state.set", name, note)
    return _memory(dataclasses.replace(memory, version=version))


async def _stored(op: Operator, name: str) -> bool:
    """Whether the database knows this watcher already. Raises Unknown when the configuration does not either."""
    async with op.db.read() as tx:
        known = {row.name for row in await watcher_store.everyone(tx)}
    _known(name, {*op.config().watchers, *known}, "watcher")
    return name in known


def _memory(memory: Memory) -> dict[str, Json]:
    return {
        "version": memory.version,
        "state": None if memory.state is UNSET else memory.state,
        "cursor": memory.cursor,
        "known": memory.known,
        "validators": {request: dict(values) for request, values in memory.validators.items()},
    }


# --- variables, resources, tokens -------------------------------------------------------------------------------------


@_read
async def variable_list(op: Operator) -> Json:
    """Every variable, from the configuration and from the database, secret values left out."""
    async with op.db.read() as tx:
        rows = await variable_store.list(tx)
    stored = [plain(row) | {"source": "database"} for row in rows if row.path not in op.config().variables]
    fixed = [
        {"path": path, "value": value, "is_secret": False, "source": "file"}
        for path, value in op.config().variables.items()
    ]
    found = stored + fixed
    return sorted((_shown(variable) for variable in found), key=lambda variable: variable["path"])


def _shown(variable: dict[str, Json]) -> dict[str, Json]:
    return variable | {"value": None} if variable["is_secret"] else variable


@_verb
async def variable_get(op: Operator, path: str) -> Json:
    """The value of one variable; reading a secret one is noted in the audit list."""
    if path in op.config().variables:
        return {"path": path, "value": op.config().variables[path], "is_secret": False, "source": "file"}
    async with op.db.read() as tx:
        row = await variable_store.get(tx, path)
    if row is None:
        raise Unknown(f"no such variable: {path} (`watcher variable list` shows them)")
    value = row.value
    if row.is_secret:
        value = _key(op).decrypt(path, row.value)
        await _note(op, "variable.read", path)
    return plain(row) | {"value": value, "source": "database"}


@_verb
async def variable_set(op: Operator, path: str, value: str, secret: bool = False, description: str = "") -> Json:
    """Create or replace a variable; a secret one is stored encrypted."""
    if path in op.config().variables:
        raise Unsuited(f"{path} is set in the configuration file, which goes first: change it there")
    now = op.clock()
    stored = _key(op).encrypt(path, value) if secret else value
    await op.db.write(lambda tx: variable_store.put(tx, path, stored, now, is_secret=secret, description=description))
    await _note(op, "variable.set", path)
    return {"path": path, "is_secret": secret}


@_verb
async def variable_delete(op: Operator, path: str) -> Json:
    """Delete a variable of the database."""
    if not await op.db.write(lambda tx: variable_store.delete(tx, path)):
        raise Unknown(f"no such variable in the database: {path}")
    await _note(op, "variable.delete", path)
    return {"deleted": path}


@_read
async def resource_list(op: Operator, type: str | None = None) -> Json:
    """Every resource, from the configuration and from the database, values left out."""
    fixed = op.config().resources
    async with op.db.read() as tx:
        rows = await resource_store.list(tx, type)
    found = [plain(row) | {"source": "database"} for row in rows if row.path not in fixed]
    found += [
        {"path": path, "type": resource.type, "source": "file"}
        for path, resource in fixed.items()
        if type in (None, resource.type)
    ]
    return sorted(({k: v for k, v in r.items() if k != "value"} for r in found), key=lambda r: r["path"])


@_read
async def resource_get(op: Operator, path: str) -> Json:
    """One resource with its value as it is stored: references in it stay references."""
    if path in op.config().resources:
        fixed = op.config().resources[path]
        return {"path": path, "type": fixed.type, "value": fixed.value, "source": "file"}
    async with op.db.read() as tx:
        row = await resource_store.get(tx, path)
    if row is None:
        raise Unknown(f"no such resource: {path} (`watcher resource list` shows them)")
    return plain(row) | {"source": "database"}


@_verb
async def resource_set(op: Operator, path: str, type: str, value: Json, description: str = "") -> Json:
    """Create or replace a resource. Raises Unfit when its type is known and the value is none of it."""
    if path in op.config().resources:
        raise Unsuited(f"{path} is set in the configuration file, which goes first: change it there")
    await _fits(op, type, value)
    now = op.clock()
    version = await op.db.write(
        lambda tx: resource_store.put(tx, path, type, value, now, description=description, by="operator")
    )
    await _note(op, "resource.set", path)
    return {"path": path, "type": type, "version": version}


async def _fits(op: Operator, type: str, value: Json) -> None:
    async with op.db.read() as tx:
        own = await resource_store.get_type(tx, type)
    known = resource_types.SHIPPED.get(type) or (own and (own.description, own.json_schema))
    if known:
        resource_types.check(type, known[1], value)


@_verb
async def resource_add(
    op: Operator, type: str, url: str, path: str | None = None, description: str = "", replace: bool = False
) -> Json:
    """A resource out of a connection string, its secrets in secret variables beside it.

    Raises Typo, Unfit, and Unsuited for a path that is taken unless it is to be ``replace``d.
    """
    if type not in connections.TYPES:
        raise Unknown(f"no connection string makes a {type}{did_you_mean(type, connections.TYPES)}; see `resource set`")
    found = connections.parse(type, url)
    hidden = connections.secrets(found.type, found.value)
    for secret in hidden.values():
        register(secret)
    path = path or connections.suggested_path(found)
    if not replace and await _taken(op, path):
        raise Unsuited(f"there is a resource {path}: name another path with --path, or --replace it")
    if path in op.config().resources:
        raise Unsuited(f"{path} is set in the configuration file, which goes first: change it there")
    if hidden and op.key is None:
        raise SecretError(connections.without_key(path, found))
    value, variables = connections.apart(path, found)
    await _fits(op, found.type, value)
    now = op.clock()

    async def put(tx: Tx) -> int:
        for name, secret in variables.items():
            sealed = _key(op).encrypt(name, secret)
            await variable_store.put(tx, name, sealed, now, is_secret=True, description=f"of resource {path}")
        return await resource_store.put(tx, path, found.type, value, now, description=description, by="operator")

    version = await op.db.write(put)
    await _note(op, "resource.set", path)
    return {
        "path": path, "type": found.type, "version": version, "value": value, "variables": list(variables),
        "notes": list(found.notes),
    }  # fmt: skip


async def _taken(op: Operator, path: str) -> bool:
    async with op.db.read() as tx:
        return await resource_store.get(tx, path) is not None


@_verb
async def resource_url(op: Operator, path: str) -> Json:
    """The connection string of a resource, its secrets in it, which is noted in the audit list."""
    from watcher.resolve import Resolver

    type = (await resource_get(op, path))["type"]
    if type not in connections.TYPES:
        raise Unsuited(f"{path} is of type {type}, which has no connection string: {', '.join(connections.TYPES)} have")
    value = await Resolver(op.config, op.db, op.key).resource(path)
    await _fits(op, type, value)
    await _note(op, "resource.read", path)
    return {"path": path, "type": type, "url": connections.write(type, value)}


@_read
async def resource_test(op: Operator, path: str, timeout: float = 10.0) -> Json:  # noqa: ASYNC109 -- kept by the probe
    """Connect to what a resource describes, from where this runs, and say what is wrong and what to do about it."""
    from watcher.connections.probe import TESTED, probe
    from watcher.objects import Objects
    from watcher.resolve import Resolver

    type = (await resource_get(op, path))["type"]
    if type not in TESTED:
        raise Unsuited(f"{path} is of type {type}, which cannot be tested: {', '.join(TESTED)} can")
    resolver = Resolver(op.config, op.db, op.key)
    value = await resolver.resource(path)
    await _fits(op, type, value)
    store = Objects(op.config, resolver.resource).of_resource
    started = monotonic()
    verdict = await probe(type, value, timeout, store)
    return {
        "path": path, "type": type, "ok": verdict.ok, "kind": verdict.kind, "said": mask(verdict.said),
        "do": mask(verdict.do), "version": verdict.version, "seconds": round(monotonic() - started, 3),
    }  # fmt: skip


@_verb
async def resource_delete(op: Operator, path: str) -> Json:
    """Delete a resource of the database."""
    if not await op.db.write(lambda tx: resource_store.delete(tx, path)):
        raise Unknown(f"no such resource in the database: {path}")
    await _note(op, "resource.delete", path)
    return {"deleted": path}


@_read
async def token_list(op: Operator) -> Json:
    """The API tokens that people made: label, first characters, scopes, expiry, last use."""
    async with op.db.read() as tx:
        rows = await token_store.list(tx)
    return [{name: value for name, value in plain(row).items() if name != "sha256"} for row in rows]


@_verb
async def token_create(op: Operator, label: str, scopes: Sequence[str] = (), expires_in: float | None = None) -> Json:
    """A new API token; ``expires_in`` in seconds. It is shown this once: only its hash is kept."""
    now = op.clock()
    token = TOKEN_PREFIX + random.token_urlsafe(32)
    expires = now + timedelta(seconds=expires_in) if expires_in else None
    digest = hashlib.sha256(token.encode()).digest()
    await op.db.write(
        lambda tx: token_store.create(tx, digest, token[:10], now, label=label, scopes=scopes, expires_at=expires)
    )
    await _note(op, "token.create", token[:10], label)
    return {"token": token, "label": label, "scopes": list(scopes), "expires_at": plain(expires)}


@_verb
async def token_revoke(op: Operator, prefix: str) -> Json:
    """Revoke the one token whose first characters or label these are."""
    async with op.db.read() as tx:
        rows = [t for t in await token_store.list(tx) if t.label == prefix or t.prefix.startswith(prefix)]
    if len(rows) != 1:
        count = "no token" if not rows else f"{len(rows)} tokens"
        raise Unknown(f"{count} with that label or beginning: {prefix} (`watcher token list` shows them)")
    await op.db.write(lambda tx: token_store.delete(tx, rows[0].prefix))
    await _note(op, "token.revoke", rows[0].prefix, rows[0].label)
    return {"revoked": rows[0].prefix, "label": rows[0].label}


async def rotate_key(db: Database, environ: Mapping[str, str], file: Path | None, now: datetime) -> Json:
    """Encrypt every secret anew. At each moment the key file opens every stored secret, so a crash loses none.

    A file with one key gets a new first line, the secrets are encrypted with that in one transaction, and then the
    old line goes. A file with several lines is a rotation that was not finished (or a key that was added by hand):
    it is finished. Raises SecretError.
    """
    from watcher import secrets

    ours = file is not None and not secrets.from_elsewhere(environ)
    if ours and file is not None and len(lines := secrets.lines_of(file)) == 1:
        secrets.load_key(environ, file)  # nothing is written beside what is no key
        secrets.write_keys(file, [secrets.new_key(), *lines])
    failpoint("key_written")
    key = secrets.load_key(environ, file)
    if key is None:
        raise SecretError("there is no key to change: `watcher secret new-key` makes the first one")
    count, encrypted = await db.write(lambda tx: _encrypt_anew(tx, key, now))
    failpoint("key_in_use")
    if ours and file is not None:
        secrets.write_keys(file, secrets.lines_of(file)[:1])
    old = [] if ours else [name for name in key.keys if name != key.current]
    return {"key": key.current, "secrets": count, "encrypted": encrypted, "old_keys": old}


async def _encrypt_anew(tx: Tx, key: Key, now: datetime) -> tuple[int, int]:
    found = [row for row in await variable_store.list(tx) if row.is_secret]
    old = [row for row in found if not row.value.startswith(f"v1:{key.current}:")]
    for row in old:
        sealed = key.encrypt(row.path, key.decrypt(row.path, row.value))
        await variable_store.put(tx, row.path, sealed, row.edited_at, is_secret=True, description=row.description)
    await audit.note(tx, "secret.rotate", key.current, now, actor="operator", note=f"{len(old)} encrypted anew")
    return len(found), len(old)


def _key(op: Operator) -> Key:
    if op.key is None:
        raise WatcherError("there is no key to encrypt secrets with: `watcher doctor` says how to make one")
    return op.key


# --- helpers ----------------------------------------------------------------------------------------------------------


async def _note(op: Operator, action: str, subject: str, note: str = "") -> None:
    now = op.clock()
    await op.db.write(lambda tx: audit.note(tx, action, subject, now, actor="operator", note=note))


def _known(name: str, names: Collection[str], noun: str) -> None:
    if name not in names:
        raise Unknown(f"no such {noun}: {name}{did_you_mean(name, names)}")


def did_you_mean(word: str, words: Collection[str]) -> str:
    """`` (did you mean …?)``, or what there is when nothing is near; empty when there is nothing."""
    near = difflib.get_close_matches(word, words, 1)
    if near:
        return f" (did you mean {near[0]}?)"
    return f" (there is {', '.join(sorted(words)[:10])})" if words else ""


def plain(value: Any) -> Json:
    """Any view of the store as JSON: instants as RFC 3339 in UTC, bytes as hexadecimal."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Enum):
        return value.name.lower() if isinstance(value.value, int) else value.value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if value is UNSET:
        return None
    return str(value) if isinstance(value, Path) else value
