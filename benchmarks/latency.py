"""How long an item waits between its commit and its arrival, alone and beside a flow that hangs.

    python -m benchmarks.latency [ITEMS [ROUNDS]]

Goals: at 100 items a second, a median under 15 ms and a 99th percentile under 75 ms. While another flow hangs for 30 s
with 1,000 items waiting, the 99th percentile stays under 1 s. The receiver is a process of its own on loopback; it and
this one read the same clock. The floor is the sender alone, at the same pace, in turn with the whole: what the machine
adds to any request at that moment. Of all figures the median of the rounds counts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median, quantiles

from benchmarks.floor import Report
from tests.support.dispatching import References
from tests.support.outbox import Source, config, prepare
from tests.support.receiver import receiver_process
from watcher import ids, log
from watcher.dispatch import Dispatcher
from watcher.http.sender import Sender
from watcher.store import meta
from watcher.store.db import Database
from watcher.values import Flow, Request

PACE = 0.01  # seconds between items
TIMEOUT = timedelta(seconds=30)
WAITING = 1000


@asynccontextmanager
async def dispatching(folder: Path, flows: Sequence[Flow]) -> AsyncIterator[tuple[Database, Dispatcher]]:
    """An empty database with a dispatcher over it, as the service has them."""
    db = await Database.open(f"sqlite:///{folder / 'watcher.db'}")
    await prepare(db, "news", "stuck")
    sender, told = Sender(), config(flows)
    dispatcher = Dispatcher(lambda: told, db, sender, References(), lambda: datetime.now(UTC))
    stop = asyncio.Event()
    serving = asyncio.create_task(dispatcher.serve(stop))
    try:
        yield db, dispatcher
    finally:
        stop.set()
        await serving
        await dispatcher.drain(timedelta(seconds=1))
        await sender.close()
        await db.close()


async def paced(numbers: range) -> AsyncIterator[int]:
    """Numbers at 100 a second; whoever is late does not make the rest later."""
    begun = time.perf_counter()
    for tick, number in enumerate(numbers):
        await asyncio.sleep(max(0.0, begun + tick * PACE - time.perf_counter()))
        yield number


async def whole(source: Source, dispatcher: Dispatcher, flow: Flow, numbers: range) -> dict[str, float]:
    """One commit for each item, as a watcher that finds one at a time: when each delivery's commit was done."""
    async with source.db.read() as tx:
        epoch = await meta.epoch(tx)
    committed: dict[str, float] = {}
    async for number in paced(numbers):
        item = {"id": str(number), "title": "a title of ordinary length, as stories have"}
        await source.commit([item], epoch=epoch)
        committed[delivery(epoch, source.name, flow, item)] = time.time()
        dispatcher.wake([flow.name])
    return committed


def delivery(epoch: str, watcher: str, flow: Flow, item: dict[str, str]) -> str:
    """The id that a new item is delivered under."""
    id = ids.item_id(epoch, watcher, ids.key_hash(item["id"]), 1, ids.content_hash(item), "new")
    return ids.delivery_id(id, flow.name)


async def arrivals(received: Path, wanted: dict[str, float]) -> dict[str, float]:
    """When each of these ids came first."""
    while True:
        came: dict[str, float] = {}
        for line in received.read_text().splitlines():
            found = json.loads(line)
            came.setdefault(found["id"], found["at"])
        if wanted.keys() <= came.keys():
            return came
        await asyncio.sleep(0.1)


async def waited(source: Source, dispatcher: Dispatcher, flow: Flow, numbers: range, received: Path) -> list[float]:
    """Seconds from commit to arrival, of each item."""
    committed = await whole(source, dispatcher, flow, numbers)
    came = await arrivals(received, committed)
    return [came[id] - at for id, at in committed.items()]


async def floor(url: str, received: Path, count: int) -> list[float]:
    """The same pace, the same sender, no database and no dispatcher."""
    sender, sent = Sender(), dict[str, float]()
    tasks = set()
    async for number in paced(range(count)):
        id = ids.delivery_id(str(number), "floor")
        request = Request("POST", url, {"webhook-id": id, "content-type": "application/json"}, b'{"id":1}')
        sent[id] = time.time()
        tasks.add(asyncio.create_task(sender.send(request, timeout=TIMEOUT)))
    await asyncio.gather(*tasks)
    came = await arrivals(received, sent)
    await sender.close()
    return [came[id] - at for id, at in sent.items()]


def tell(report: Report, kind: str, waits: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile in milliseconds, and a line about them."""
    middle, late = median(waits) * 1e3, quantiles(waits, n=100)[98] * 1e3
    report.line(kind, f"{middle:8.1f} ms median {late:8.1f} ms p99 {max(waits) * 1e3:8.1f} ms longest")
    return middle, late


async def once(report: Report, folder: Path, url: str, received: Path, count: int) -> tuple[float, float, float]:
    """Median and 99th percentile alone, and 99th percentile beside a flow that hangs."""
    tell(report, "the sender alone", await floor(url + "/ok", received, count))
    quick = Flow("quick", url=url + "/ok", timeout=TIMEOUT)
    stuck = Flow("stuck", url=url + "/delay/30", timeout=2 * TIMEOUT)
    async with dispatching(folder, [quick, stuck]) as (db, dispatcher):
        source, hanging = Source(db, [quick]), Source(db, [stuck], "stuck")
        waits = await waited(source, dispatcher, quick, range(count), received)
        middle, late = tell(report, "commit to arrival", waits)
        await hanging.commit([{"id": str(number)} for number in range(WAITING)])
        dispatcher.wake([stuck.name])
        waits = await waited(source, dispatcher, quick, range(count, 2 * count), received)
        _, beside = tell(report, f"the same, {WAITING} items waiting for a flow that hangs", waits)
    return middle, late, beside


async def main(count: int, rounds: int) -> Report:
    report = Report(f"latency: {count} items at {1 / PACE:.0f} a second, from commit to arrival, {rounds} rounds")
    log.configure("error")
    figures = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder, received = Path(name), Path(name, "received.jsonl")
            async with receiver_process(received) as (url,):
                figures.append(await once(report, folder, url, received, count))
    middle, late, beside = (median(values) for values in zip(*figures, strict=True))
    report.goal("median, ms", middle, 15)
    report.goal("99th percentile, ms", late, 75)
    report.goal("99th percentile beside a flow that hangs, ms", beside, 1000)
    return report


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:]]
    asyncio.run(main(*given[:1] or [1000], *given[1:2] or [3])).exit()
