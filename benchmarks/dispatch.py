"""Deliver 10,000 new items to one flow, against a bare loop of the sender that we ship and against bare aiohttp.

    python -m benchmarks.dispatch [ITEMS [ROUNDS]]

The receiver is a process of its own on loopback, 64 requests are in flight, SQLite commits with synchronous=FULL. All
kinds are measured in turn, in the same run. "Shaped and signed" renders a body and a header and signs. "End
to end" begins when the items are committed and ends when the last delivery is
settled. Absolute figures mean little without the floors beside them: read the ratios.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.floor import Report, Took, interleave, took
from tests.support.deliveries import resolved
from tests.support.dispatching import References
from tests.support.outbox import Source, config, prepare
from tests.support.receiver import receiver_process
from watcher import log
from watcher.app import spare_the_collector
from watcher.dispatch import Dispatcher
from watcher.flows import presets
from watcher.http.sender import Sender
from watcher.store import deliveries
from watcher.store.db import Database
from watcher.values import Delivery, Flow, Request

AT_ONCE = 64
DESTINATIONS = 200
TIMEOUT = timedelta(seconds=30)
SHAPED: dict[str, Any] = {
    "secrets": ("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",),
    "headers": {"X-Item": "{{ watcher }}-{{ key }}"},
    "body": {
        "text": "{{ item.title }} by {{ item.by }}",
        "link": "{{ item.url }}",
        "number": "{{ item.id }}",
        "found": {"by": "{{ watcher }}", "key": "{{ key }}", "at": "{{ found_at }}"},
    },
}
"""All that costs something for each delivery; what is sent is about as long as the envelope."""


def items(count: int) -> list[dict[str, Any]]:
    text = "a title of ordinary length, as stories have"
    return [{"id": n, "title": text, "url": f"https://example.org/{n}", "by": "someone"} for n in range(count)]


class Pipeline:
    """Claim, deliver, settle: what the service does once a run has committed."""

    def __init__(self, folder: Path, url: str, sender: Sender, count: int, **more: Any) -> None:
        self.folder = folder
        self.flow = Flow("hook", url=url, at_once=AT_ONCE, timeout=TIMEOUT, **more)
        self.sender = sender
        self.count = count
        self.runs = itertools.count()
        self.commits: list[int] = []

    async def once(self) -> Took:
        db = await Database.open(f"sqlite:///{self.folder / f'{next(self.runs)}.db'}")
        await prepare(db, "news")
        await Source(db, [self.flow]).commit(items(self.count))
        before = db.commits
        spent = await took(lambda: self.deliver(db))
        self.commits.append(db.commits - before)
        async with db.read() as tx:
            backlog = (await deliveries.pending(tx)).get("hook")
        assert backlog is None, backlog
        await db.close()
        return spent

    async def deliver(self, db: Database) -> None:
        told = config([self.flow], at_once=AT_ONCE)
        dispatcher = Dispatcher(lambda: told, db, self.sender, References(), lambda: datetime.now(UTC))
        stop = asyncio.Event()
        serving = asyncio.create_task(dispatcher.serve(stop))
        while dispatcher.in_flight or await pending(db):  # to ask the database more often would be measured too
            await asyncio.sleep(0.01)
        stop.set()
        await serving
        await dispatcher.drain(TIMEOUT)

    async def request(self) -> Request:
        """One request as the pipeline makes it, for the bare loops to send."""
        db = await Database.open(f"sqlite:///{self.folder / 'one.db'}")
        await prepare(db, "news")
        await Source(db, [self.flow]).commit(items(1))
        now = datetime.now(UTC)
        claimed: Sequence[Delivery] = await db.write(
            lambda tx: deliveries.claim(tx, "hook", limit=1, now=now, lease=TIMEOUT, token="benchmark")
        )
        await db.close()
        return presets["http"].request(self.flow, claimed[0], resolved(self.flow), now)


async def pending(db: Database) -> bool:
    async with db.read() as tx:
        return (await tx.exec_driver_sql("SELECT 1 FROM delivery WHERE status = 0 LIMIT 1")).first() is not None


async def side_by_side(count: int, send: Callable[[int], Any]) -> None:
    """Send so many requests, 64 at once, and do nothing else."""
    numbers = iter(range(count))

    async def one_after_another() -> None:
        for number in numbers:
            await send(number)

    await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))


def loop_of_ours(sender: Sender, request: Request, urls: Sequence[str], count: int) -> Callable[[], Any]:
    requests = [Request(request.method, url, request.headers, request.body) for url in urls]

    async def send(number: int) -> None:
        answer = await sender.send(requests[number % len(requests)], timeout=TIMEOUT)
        assert answer.status == 200

    return lambda: took(lambda: side_by_side(count, send))


def loop_of_aiohttp(
    session: aiohttp.ClientSession, request: Request, urls: Sequence[str], count: int
) -> Callable[[], Any]:
    async def send(number: int) -> None:
        url = urls[number % len(urls)]
        async with session.post(url, data=request.body, headers=dict(request.headers)) as answer:
            await answer.read()
            assert answer.status == 200

    return lambda: took(lambda: side_by_side(count, send))


def tell(report: Report, figures: Mapping[str, Took], count: int, commits: float) -> None:
    for kind, spent in figures.items():
        report.line(kind, f"{count / spent.wall:8.0f} a second {spent.cpu / count * 1e6:8.0f} µs CPU each")
    print()
    bare, whole, floor, many = (
        figures[kind]
        for kind in ("our sender, bare loop", "end to end", "aiohttp, bare loop", f"our sender, {DESTINATIONS}")
    )
    shaped = figures["shaped and signed"]
    report.goal("shaped and signed, times plain: time", shaped.wall / whole.wall, 1.1)
    report.goal("  the same: CPU", shaped.cpu / whole.cpu, 1.1)
    report.line("end to end, rate of the bare sender loop's", f"{bare.wall / whole.wall:9.2f}")
    report.goal("  the same, upside down (0.75 is 1.33)", whole.wall / bare.wall, 1 / 0.75)
    report.goal("CPU added to the sender, µs an item", (whole.cpu - bare.cpu) / count * 1e6, 100)
    report.goal("commits per 1,000 items", commits / count * 1000, 80)
    report.goal("our sender's CPU, times aiohttp's", bare.cpu / floor.cpu, 3.5)
    report.goal(f"our sender at {DESTINATIONS} destinations, times at one", many.cpu / bare.cpu, 1.5)


async def main(count: int, rounds: int) -> Report:
    report = Report(f"dispatch: {count} items, one flow, {AT_ONCE} in flight, medians of {rounds}")
    log.configure("warning")
    spare_the_collector()  # as the service does
    with tempfile.TemporaryDirectory() as folder:
        async with receiver_process(ports=DESTINATIONS) as urls:
            sender = Sender()
            pipeline = Pipeline(Path(folder), urls[0] + "/ok", sender, count)
            shaped = Pipeline(Path(folder), urls[0] + "/ok", sender, count, **SHAPED)
            shaped.runs = pipeline.runs  # each run's database has a name of its own
            request = await pipeline.request()
            one, many = [urls[0] + "/ok"], [url + "/ok" for url in urls]
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                figures = await interleave(
                    {
                        "aiohttp, bare loop": loop_of_aiohttp(session, request, one, count),
                        "our sender, bare loop": loop_of_ours(sender, request, one, count),
                        "end to end": pipeline.once,
                        "shaped and signed": shaped.once,
                        f"our sender, {DESTINATIONS}": loop_of_ours(sender, request, many, count),
                    },
                    rounds,
                )
            await sender.close()
    tell(report, figures, count, sorted(pipeline.commits)[len(pipeline.commits) // 2])
    return report


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:]]
    asyncio.run(main(*given[:1] or [10_000], *given[1:2] or [3])).exit()
