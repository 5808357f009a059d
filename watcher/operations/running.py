"""Verbs that run a watcher: plan, test, run, apply a plan, approve."""

from __future__ import annotations

import json
from collections.abc import Awaitable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from watcher.errors import StoreError, TriggerError, WatcherError
from watcher.log import mask
from watcher.operations.operator import Operator, Unknown, Unsuited, did_you_mean, plain, verb, write_down
from watcher.values import Json, RunRecord

if TYPE_CHECKING:
    from watcher.run import Plan, Runner


@verb
async def plan(op: Operator, name: str, record: bool = False) -> Json:
    """What a run would send, key by key, with the reason; and what the source answered, to ``record`` it."""
    runner = _runner(op, name)
    with TemporaryDirectory(prefix="watcher-") as directory:
        file = Path(directory, "recording.json")
        found = await _told(runner.plan(name, record=file if record else None))
        return {"plan": found.to_json(), "recording": _parsed(file) if record else None}


@verb
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


@verb
async def run(op: Operator, name: str) -> Json:
    """One run now; its deliveries go out from the running service, or from the next one."""
    return _record(await _runner(op, name).run(name))


@verb
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


@verb
async def approve(op: Operator, name: str) -> Json:
    """Commit the plan that was put in quarantine, and let the watcher run again."""
    record = await _runner(op, name).approve(name)
    await write_down(op, "approve", name)
    return _record(record)


def _record(record: RunRecord) -> Json:
    return {field: value for field, value in plain(record).items() if field != "plan"}


def _runner(op: Operator, name: str) -> Runner:
    if name not in op.config().watchers:
        raise Unknown(f"no such watcher: {name}{did_you_mean(name, op.config().watchers)}")
    if op.runner is None:
        raise StoreError("the database is open for reading only")
    return op.runner
