"""Parts that go on to their storage while others come in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from watcher.errors import ObjectsError
from watcher.objects import Meta
from watcher.server.windmill import s3_ahead
from watcher.server.windmill.s3_ahead import Ahead
from watcher.server.windmill.s3_parts import Part, Parts, Upload

AT = datetime(2026, 3, 1, tzinfo=UTC)


class Far:
    """A storage that takes a stream piece by piece, and only while it is open."""

    def __init__(self, where: Path) -> None:
        self.parts = Parts(where)
        self.found: list[bytes] = []
        self.kept: bytes | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None

    async def begin(self) -> Ahead:
        self.id = await self.parts.begin(Upload("s", "k", "me"), AT)
        return Ahead(self.parts, self.id, self.put)

    async def put(self, body: AsyncIterator[bytes]) -> Meta:
        async for chunk in body:
            await self.open.wait()
            if self.error is not None:
                raise self.error
            self.found.append(chunk)
        self.kept = b"".join(self.found)
        return Meta("k", len(self.kept), "etag", AT)

    async def part(self, number: int, body: bytes) -> Part:
        async def one() -> AsyncIterator[bytes]:
            yield body

        return await self.parts.add(self.id, number, one())

    async def until(self, *found: bytes) -> None:
        for _ in range(1000):
            if self.found == [*found]:
                return
            await asyncio.sleep(0.002)  # read in a thread
        raise AssertionError(self.found)


@pytest.fixture
async def far(tmp_path: Path) -> Far:
    return Far(tmp_path)


async def test_parts_are_sent_in_their_order_as_soon_as_they_can(far: Far) -> None:
    ahead = await far.begin()
    parts = {}
    for number, after in ((2, []), (1, [b"1", b"2"]), (3, [b"1", b"2", b"3"])):
        parts[number] = await far.part(number, str(number).encode())
        await ahead.offer(parts[number])
        await far.until(*after)
    assert far.kept is None
    meta = await ahead.finish([parts[1], parts[2], parts[3]])
    assert (meta and meta.size, far.kept) == (3, b"123")


async def test_parts_as_they_are_chosen_are_those_that_were_sent(far: Far) -> None:
    ahead = await far.begin()
    parts = [await far.part(number, str(number).encode()) for number in (1, 2)]
    for part in parts:
        await ahead.offer(part)
    await far.until(b"1", b"2")
    chosen = await far.parts.chosen(far.id, [(part.number, part.etag) for part in parts])
    assert await ahead.finish(chosen) is not None
    assert far.found == [b"1", b"2"]


async def test_numbers_may_have_gaps(far: Far) -> None:
    ahead = await far.begin()
    parts = [await far.part(number, str(number).encode()) for number in (1, 5, 9)]
    for part in parts:
        await ahead.offer(part)
    await far.until(b"1")
    assert await ahead.finish(parts) is not None
    assert far.kept == b"159"


@pytest.mark.parametrize("how", ["replaced", "left out"])
async def test_a_part_that_was_sent_and_is_not_wanted_means_from_the_start(far: Far, how: str) -> None:
    ahead = await far.begin()
    first = await far.part(1, b"old")
    await ahead.offer(first)
    await far.until(b"old")
    other = await far.part(1 if how == "replaced" else 2, b"new")
    await ahead.offer(other)
    assert await ahead.finish([other]) is None
    assert (ahead.task.cancelled(), far.kept) == (True, None)


async def test_a_storage_that_gives_up_means_from_the_start(far: Far) -> None:
    ahead = await far.begin()
    far.error = ObjectsError("no answer", kind="unreachable")
    part = await far.part(1, b"x")
    await ahead.offer(part)
    assert await ahead.finish([part]) is None


async def test_a_client_that_is_faster_than_the_storage_waits(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_ahead, "MOST_BEHIND", 1)
    far.open.clear()
    ahead = await far.begin()
    parts = [await far.part(number, str(number).encode()) for number in range(1, 5)]
    for part in parts[:2]:
        await ahead.offer(part)
    waiting = asyncio.create_task(ahead.offer(parts[2]))
    later = asyncio.create_task(ahead.offer(parts[3]))
    assert not (await asyncio.wait({later}, timeout=0.05))[0]
    far.open.set()
    await asyncio.wait_for(asyncio.gather(waiting, later), 10)
    assert await ahead.finish(parts) is not None


async def test_a_storage_is_not_held_for_ever(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_ahead, "IDLE", 0.01)
    ahead = await far.begin()
    await asyncio.wait_for(asyncio.wait({ahead.task}), 10)
    part = await far.part(1, b"x")
    await ahead.offer(part)
    assert await ahead.finish([part]) is None
    assert far.kept is None
