"""Verbs about what a watcher remembers: its state, history, rollback, reset."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from watcher.errors import WatcherError
from watcher.operations.operator import Operator, Unsuited, must_be_known, plain, reads, verb, write_down
from watcher.store import states as state_store
from watcher.store import watchers as watcher_store
from watcher.values import UNSET, Json, Memory

if TYPE_CHECKING:
    pass


@reads
async def state_get(op: Operator, name: str, version: int | None = None) -> Json:
    """What a watcher remembers, now or at an earlier version."""
    return _memory(await _load(op, name, version))


@reads
async def state_history(op: Operator, name: str, limit: int = 20) -> Json:
    """The versions of a watcher's memory, newest first."""
    if not await _stored(op, name):
        return []
    async with op.db.read() as tx:
        return plain(await state_store.history(tx, name, limit))


@reads
async def state_diff(op: Operator, name: str, old: int | None = None, new: int | None = None) -> Json:
    """What changed between two versions, as JSON Patch: by default between the last two."""
    import jsonpatch

    after = _memory(await _load(op, name, new))
    if after["version"] < 2 and old is None:
        raise Unsuited(f"{name} is at version {after['version']}: there is nothing before it to compare with")
    before = _memory(await _load(op, name, after["version"] - 1 if old is None else old))
    hide = {"version": None}
    return {"old": before, "new": after, "patch": jsonpatch.make_patch(before | hide, after | hide).patch}


@verb
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


@verb
async def state_rollback(op: Operator, name: str, version: int) -> Json:
    """Put an earlier memory in force again, as a new version. Seen keys stay seen."""
    current = await _load(op, name)
    old = await _load(op, name, version)
    return await _put(op, name, old, current.version, f"rolled back to version {version}")


@verb
async def state_reset(op: Operator, name: str) -> Json:
    """Forget everything, seen keys too: the next run is a first run."""
    await _stored(op, name)
    now = op.clock()
    await op.db.write(lambda tx: state_store.reset(tx, name, now))
    await write_down(op, "state.reset", name)
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
    await write_down(op, "state.set", name, note)
    return _memory(dataclasses.replace(memory, version=version))


async def _stored(op: Operator, name: str) -> bool:
    """Whether the database knows this watcher already. Raises Unknown when the configuration does not either."""
    async with op.db.read() as tx:
        known = {row.name for row in await watcher_store.everyone(tx)}
    must_be_known(name, {*op.config().watchers, *known}, "watcher")
    return name in known


def _memory(memory: Memory) -> dict[str, Json]:
    return {
        "version": memory.version,
        "state": None if memory.state is UNSET else memory.state,
        "cursor": memory.cursor,
        "known": memory.known,
        "validators": {request: dict(values) for request, values in memory.validators.items()},
    }
