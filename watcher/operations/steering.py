"""Verbs that steer the service: pause, resume, retry, a sample to a flow, reload."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, cast

from watcher import config as configuration
from watcher.errors import ConfigError, StoreError
from watcher.log import mask
from watcher.operations.looking import check_filters
from watcher.operations.operator import Operator, Rejected, Unknown, Unsuited, must_be_known, reads, verb, write_down
from watcher.store import deliveries as delivery_store
from watcher.store import flows as flow_store
from watcher.store import items as item_store
from watcher.store import retries as retry_store
from watcher.store import watchers as watcher_store
from watcher.values import Json, Judgement

if TYPE_CHECKING:
    from watcher.store.db import Tx


@verb
async def pause(op: Operator, name: str, reason: str = "", flow: bool = False) -> Json:
    """Take no more ticks of a watcher, or send nothing to a flow (its deliveries wait), until resumed."""
    now = op.clock()
    if flow:
        must_be_known(name, op.config().flows, "flow")
        await op.db.write(lambda tx: flow_store.pause(tx, name, reason, now))
    else:
        must_be_known(name, op.config().watchers, "watcher")
        await op.db.write(lambda tx: watcher_store.pause(tx, name, reason, now))
    await write_down(op, "pause", name, reason)
    return {"paused": name}


@verb
async def resume(op: Operator, name: str, flow: bool = False) -> Json:
    """Undo a pause, drop a quarantine with its plan, clear failures and back-off; or let a held flow send at once."""
    now = op.clock()
    if flow:
        must_be_known(name, op.config().flows, "flow")
        await op.db.write(lambda tx: flow_store.resume(tx, name, now))
        op.wake([name])
    else:
        must_be_known(name, op.config().watchers, "watcher")
        await op.db.write(lambda tx: watcher_store.resume(tx, name, now))
    await write_down(op, "resume", name)
    return {"resumed": name}


@reads
async def owed(
    op: Operator, flow: str | None = None, name: str | None = None, since: str | None = None, status: str = "dead"
) -> Json:
    """The ids of every delivery of a status that matches; ``since`` (RFC 3339) is when its item was found."""
    await check_filters(op, name, flow)
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


@verb
async def retry_begin(op: Operator, total: int) -> Json:
    """Begin a retry of many, part by part: the id to call `retry` and `retry_end` with. One at a time."""
    now = op.clock()
    return {"bulk": await op.db.write(lambda tx: retry_store.begin(tx, total, now))}


@verb
async def retry_end(op: Operator, bulk: str) -> Json:
    """A retry of many is over, or its command was interrupted: how many deliveries it made due."""
    now = op.clock()
    return {"retried": await op.db.write(lambda tx: retry_store.end(tx, bulk, now))}


@verb
async def retry_stop(op: Operator) -> Json:
    """Let the retry of many that is at work, in whatever process, stop before its next part."""
    now = op.clock()
    bulk = await op.db.write(lambda tx: retry_store.stop(tx, now))
    return {"stopped": bulk is not None, "retried": bulk.done if bulk else 0, "total": bulk.total if bulk else 0}


@verb
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
        await write_down(op, "retry", named[0] if count == 1 else f"{count} deliveries")
        op.wake(list(op.config().flows))
    return {"retried": count, "stopped": False}


@reads
async def rendered(op: Operator, id: str) -> Json:
    """The request that a retry of a delivery would make, rendered anew by the flow as it is now configured.

    Nothing is sent. References are not followed and secrets are not shown: a signature is not made.
    """
    from watcher.flows import preview

    async with op.db.read() as tx:
        delivery = await delivery_store.as_sent(tx, id)
    if delivery is None:
        raise Unknown(f"no such delivery: {id} (`watcher deliveries` lists them)")
    must_be_known(delivery.flow, op.config().flows, "flow")
    anew = replace(delivery, attempt=1, first_failed_at=None)  # a retry begins the schedule anew
    return {"delivery": id, **preview.request((op.outbound or op.config)().flows[delivery.flow], anew, op.clock())}


@reads
async def sample_flow(op: Operator, name: str, item: Json = None) -> Json:
    """Send one marked sample event to a flow, past its queue, limits and hours, and say what it answered.

    Nothing is saved. ``item`` takes the place of the sample's own.
    """
    from watcher.flows import sample
    from watcher.flows.attempt import Courier, resolve
    from watcher.http.sender import Sender
    from watcher.resolve import Resolver

    must_be_known(name, op.config().flows, "flow")
    flow = (op.outbound or op.config)().flows[name]
    if flow.steps:
        raise Unsuited(f"{name} is a local flow: start the service first, which runs it")
    delivery = sample.delivery(flow, op.clock(), item)
    sender = Sender()
    try:
        resolved = await resolve(flow, Resolver(op.config, op.db, op.key))
        courier = Courier(sample.marked(flow), sender, op.clock)
        if flow.batch:
            (tried,) = await courier.attempt_many([delivery], resolved, op.clock(), math.inf)
            judgement, response = cast(Judgement, tried.judgement), tried.response
        else:
            judgement, response = await courier.attempt(delivery, resolved, op.clock())
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


@verb
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
