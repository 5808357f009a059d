"""The machine's clock is moved under the real service: it goes on at once, without a burst, and loses nothing."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.receiver import Receiver
from tests.support.scripts import until
from tests.support.site import Site
from tests.support.trouble import World, listed

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
HOUR = 3600


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with Site() as site, Receiver() as receiver:
        world = World(tmp_path, site, receiver)
        yield world
        world.service.kill()


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("jump", [HOUR, -HOUR, 24 * HOUR, -24 * HOUR], ids=lambda seconds: f"{seconds // HOUR:+d}h")
async def test_the_clock_jumps(world: World, jump: int) -> None:
    if LIBRARY is None:
        pytest.skip("needs libfaketime (apt-get install faketime)")
    offset = world.where / "offset"
    offset.write_text("+0")
    url = world.site.on("/list", listed(1))
    world.watch("list", f'with = {{ url = "{url}" }}', trigger="http_json", every="10m")
    world.service.start(
        LD_PRELOAD=str(LIBRARY), FAKETIME_TIMESTAMP_FILE=str(offset), FAKETIME_NO_CACHE="1", DONT_FAKE_MONOTONIC="1"
    )
    await world.service.ready()
    assert await until(lambda: ("list", "0") in world.received(), 30), world.service.tail()
    assert await until(lambda: len(world.polls()) > 10, 30)
    world.site.on("/good", listed(2))
    world.site.on("/list", listed(2))
    asked = len(world.site.asked_for("/list"))
    began, before = time.monotonic(), len(world.polls())
    offset.write_text(f"{jump:+d}")
    jumped = await world.service.event("clock.jumped", seconds=20)
    assert abs(jumped["seconds"] - jump) < 5
    assert await until(lambda: len(world.polls()) > before + 5, 15), "the good watcher goes on"
    assert await until(lambda: ("good", "1") in world.received(), 15), world.service.tail()
    if jump > 0:
        assert await until(lambda: ("list", "1") in world.received(), 15), "one run makes up for what was jumped over"
    took = time.monotonic() - began
    assert len(world.site.asked_for("/list")) - asked <= 1, "and no burst"
    assert len(world.polls()) - before <= took / 0.2 + 3
    assert max(world.received().values()) == 1
    assert await world.service.stop() == 0
