"""Items that are too large for their flow: what is sent, what is kept, and what becomes of both when things fail."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.error
import urllib.request
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.deliveries import delivery
from tests.support.dispatching import Bench, Clock, References
from tests.support.outbox import config, prepare
from tests.support.receiver import Receiver
from tests.support.scripts import write
from tests.support.service import Service
from watcher import control
from watcher.errors import Damaged, ObjectsError
from watcher.flows import large
from watcher.http.sender import Sender
from watcher.objects import Objects
from watcher.objects.stow import ITEMS, STATES, Stowage
from watcher.store.db import Database
from watcher.values import Flow, StorageSettings

DAY = timedelta(days=1)


class Attic:
    """A folder as the primary storage, and what is stowed there."""

    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        storages = {"_default_": StorageSettings("_default_", "folder", path=path)}
        self.config = replace(config([]), storages=storages)
        self.objects = Objects(lambda: self.config, self._no_resource)
        self.stowage = Stowage(self.objects, self.clock, lambda: 30 * DAY, self._link)

    async def _no_resource(self, path: str) -> Any:
        raise AssertionError(path)

    async def _link(self, storage: str, key: str) -> str:
        return f"exp=1&sig={storage}"

    async def read(self, reference: dict[str, str]) -> Any:
        return json.loads(await self.stowage.whole(reference["s3"]))

    async def keys(self) -> list[str]:
        return [meta.key for meta in await (await self.objects.storage()).list()]


@pytest.fixture
def attic(tmp_path: Path) -> Attic:
    return Attic(tmp_path / "objects")


TEXT = "x" * 5000


@pytest.mark.parametrize("form", ["envelope", "plain", "cloudevents", "cloudevents-structured"])
async def test_a_large_item_travels_as_a_reference_that_every_attempt_makes_anew(
    sqlite_db: Database, attic: Attic, form: Any
) -> None:
    await prepare(sqlite_db, "news")
    sender = Sender()
    async with Receiver() as receiver:
        receiver.script.extend(["error", "ok", "ok"])
        flow = Flow("hook", url=f"{receiver.url}/scripted", format=form, max_item=2000, order="watcher")
        bench = Bench(sqlite_db, config([flow]), sender, References(), Clock(), stow=attic.stowage.item)
        bench.start()
        await bench.commit({"id": 1, "text": TEXT}, {"id": 2, "text": "small"})
        await bench.until_settled(1)
        bench.later(timedelta(hours=1))
        await bench.until_done()
        await bench.end()
        first, again, small = receiver.received
        assert (first.body, first.id) == (again.body, again.id)
        sent, little = (_item(form, r.json()) for r in (first, small))
        assert sent == {"s3": (await attic.keys())[0], "presigned": "exp=1&sig=_default_"}
        assert little["text"] == "small"
        assert await attic.read(sent) == {"id": 1, "text": TEXT}
        assert len(await attic.keys()) == 1
    await sender.close()


def _item(form: str, sent: Any) -> Any:
    return sent if form == "plain" else sent.get("data", sent)["item"]


async def test_only_as_much_as_needs_to_stays_behind(attic: Attic) -> None:
    flow = Flow("hook", max_item=3000)
    changed = delivery(
        {"id": 1, "text": TEXT}, previous={"id": 1, "text": "short"}, patch=[{"op": "replace"}], change="changed"
    )
    assert large.too_large(flow, changed, None)
    made = json.loads((await large.by_reference(flow, changed, None, attic.stowage.item)).payload)
    assert made["previous"] == {"id": 1, "text": "short"}
    assert made["patch"] == [{"op": "replace"}]
    assert set(made["item"]) == {"s3", "presigned"}
    both = delivery({"text": TEXT}, previous={"text": TEXT + "y"}, change="changed")
    made = json.loads((await large.by_reference(flow, both, None, attic.stowage.item)).payload)
    assert await attic.read(made["previous"]) == {"text": TEXT + "y"}
    assert await attic.read(made["item"]) == {"text": TEXT}
    assert not large.too_large(replace(flow, body={"n": "{{ item.id }}"}), changed, None)  # it says itself what is sent
    assert not large.too_large(Flow("hook"), changed, None)


async def test_a_storage_in_trouble_is_not_the_items_fault(sqlite_db: Database) -> None:
    async def full(body: bytes) -> Any:
        raise ObjectsError("no space left in the storage", kind="full")

    await prepare(sqlite_db, "news")
    flow = Flow("hook", url="http://127.0.0.1:9/", max_item=2000)
    bench = Bench(sqlite_db, config([flow]), None, References(), Clock(), stow=full)
    bench.start()
    await bench.commit({"id": 1, "text": TEXT})
    (tried,) = await bench.until_settled(1)
    await bench.end()
    assert (tried.verdict, tried.status_code) == ("passing", None)
    assert "no space left" in tried.note


async def test_without_a_storage_it_is_sent_whole(sqlite_db: Database, attic: Attic) -> None:
    attic.config = replace(attic.config, storages={})
    await prepare(sqlite_db, "news")
    sender = Sender()
    async with Receiver() as receiver:
        flow = Flow("hook", url=f"{receiver.url}/ok", max_item=2000)
        bench = Bench(sqlite_db, config([flow]), sender, References(), Clock(), stow=attic.stowage.item)
        bench.start()
        await bench.commit({"id": 1, "text": TEXT})
        await bench.until_done()
        await bench.end()
        assert receiver.received[0].json()["data"]["item"]["text"] == TEXT
    await sender.close()


async def test_what_was_stowed_is_collected_when_it_is_old_and_not_when_it_was_used_again(attic: Attic) -> None:
    old, used = await attic.stowage.item(b'"old"'), await attic.stowage.item(b'"used"')
    await _age(attic, 20 * DAY)  # past half of its time: whoever is sent it now has as long again
    await attic.stowage.item(b'"used"')
    await _age(attic, 15 * DAY)
    assert await attic.stowage.collect(ITEMS, 30 * DAY) == 1
    assert await attic.keys() == [used["s3"]]
    with pytest.raises(ObjectsError, match="no"):
        await attic.stowage.whole(old["s3"])


async def _age(attic: Attic, by: timedelta) -> None:
    """Let time pass for what lies there."""
    for file in (attic.config.storages["_default_"].path or Path()).rglob("*"):
        if file.is_file():
            at = file.stat().st_mtime - by.total_seconds()
            os.utime(file, (at, at))


async def test_what_is_wanted_is_kept_however_old_and_damage_is_found(attic: Attic) -> None:
    key, orphan = await attic.stowage.state(b"[1]"), await attic.stowage.state(b"[2]")
    await _age(attic, 100 * DAY)

    async def wanted() -> set[str]:
        return {key}

    assert await attic.stowage.collect(STATES, DAY, wanted) == 1
    assert await attic.keys() == [key] != [orphan]
    assert await attic.stowage.whole(key) == b"[1]"
    await (await attic.objects.storage()).put(key, b"[3]")
    with pytest.raises(Damaged, match="not what was written"):
        await attic.stowage.whole(key)


SERVED = """
database = "sqlite:///watcher.db"

[server]
bind = "127.0.0.1:{port}"

[flows.hook]
url = "RECEIVER/ok"

[watchers.one]
trigger = "./large.py"
every = "1h"
flow = "hook"
first_run = "all"
"""
SCRIPT = """
    from watcher import trigger

    @trigger(key="id")
    def main():
        return [{"id": 1, "text": "x" * 5_000_000}]
"""


@pytest.mark.timeout(120)
async def test_the_link_of_a_delivered_reference_opens_the_item_and_an_altered_one_does_not(tmp_path: Path) -> None:
    write(tmp_path, SCRIPT, "large.py")
    async with Receiver() as receiver:
        service = Service(tmp_path, SERVED.replace("RECEIVER", receiver.url))
        service.start()
        try:
            await service.ready()
            await run_now(tmp_path)
            async with asyncio.timeout(60):
                await receiver.wait(1)
            reference = receiver.received[0].json()["data"]["item"]
            address = f"{service.url}/api/w/main/s3_proxy/_default_/{reference['s3']}?{reference['presigned']}"
            status, body = await asyncio.to_thread(fetched, address)
            assert (status, json.loads(body)) == (200, {"id": 1, "text": "x" * 5_000_000})
            status, _ = await asyncio.to_thread(fetched, address[:-1] + ("0" if address[-1] != "0" else "1"))
            assert status in (401, 403)
        finally:
            service.kill()


async def run_now(where: Path) -> None:
    """The first tick of an hourly watcher may be far."""
    await asyncio.to_thread(control.call, control.path(where / "watcher-data"), "run", {"name": "one"})


def fetched(address: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
