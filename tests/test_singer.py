"""Singer taps as sources: a real one from PyPI, unmodified, and ones that misbehave."""

from __future__ import annotations

import json
import stat
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.running import running
from tests.support.scripts import FakeHost, write
from watcher.errors import TriggerError
from watcher.scripts import Call, Scripts, builtins
from watcher.store.db import Database
from watcher.values import ScriptSettings

SINGER = builtins() / "singer.py"
TAP = ["tap-rest-api-msdk==1.4.2", "setuptools<80"]  # the tap itself forgot to name setuptools


@pytest.fixture
async def scripts(tmp_path: Path) -> AsyncIterator[Scripts]:
    found = Scripts(ScriptSettings(workers=2), data=tmp_path / "data")
    yield found
    await found.close()


def tap(folder: Path, *messages: object, then: str = "") -> str:
    """A tap that notes how it was called and says these messages."""
    path = write(folder, "", "tap-test")
    said = "\n".join(message if isinstance(message, str) else json.dumps(message) for message in messages)
    path.write_text(
        f'#!/bin/sh\nwhile [ $# -gt 0 ]; do echo "$1" $(cat "$2") >> {folder}/called; shift 2; done\n'
        f"cat <<'END'\n{said}\nEND\n{then}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def record(stream: str, **fields: object) -> dict[str, object]:
    return {"type": "RECORD", "stream": stream, "record": fields}


@pytest.mark.long  # a tap and all it needs are installed from the registry
@pytest.mark.timeout(300)
async def test_a_real_tap_finds_each_record_once(sqlite_db: Database, tmp_path: Path) -> None:
    now = datetime(2026, 1, 10, tzinfo=UTC)
    async with running(sqlite_db, tmp_path, now) as bench:
        await bench.scripts.close()
        bench.scripts = Scripts(ScriptSettings(workers=2), data=tmp_path / "data")
        bench.runner = bench.another()
        config = {
            "api_url": bench.url.removesuffix("/items"),
            "streams": [
                {
                    "name": "orders", "path": "/items", "records_path": "$[*]",
                    "primary_keys": ["number"], "replication_key": "at", "num_inference_records": 10,
                }
            ],
        }  # fmt: skip
        bench.configure(
            trigger="singer",
            script=SINGER,
            args={"tap": "tap-rest-api-msdk", "requirements": TAP, "config": config},
            timeout=timedelta(minutes=2),
        )

        def order(number: int) -> dict[str, object]:
            return {"number": number, "at": f"2026-01-{number:02}T00:00:00Z"}

        first = await bench.run(order(1), order(2))
        assert first.outcome == "ok", first.error
        assert await bench.keys() == []  # the baseline
        second = await bench.run(order(1), order(2), order(3))
        assert second.outcome == "ok", second.error
        await bench.run()
        await bench.run(order(2), order(3), order(4))
        assert await bench.keys() == ["orders/3", "orders/4"]
        state = (await bench.memory()).state
        assert state["bookmarks"]["orders"]["replication_key_value"] == "2026-01-04T00:00:00Z"


async def test_records_states_and_everything_else_a_tap_says(scripts: Scripts, tmp_path: Path) -> None:
    program = tap(
        tmp_path,
        {"type": "SCHEMA", "stream": "a", "schema": {}, "key_properties": ["x", "y"]},
        record("a", x=1, y="é"),
        {"type": "STATE", "value": {"n": 1}},
        "not JSON at all",
        {"type": "SCHEMA", "stream": "b", "schema": {}, "key_properties": []},
        record("b", z=1.5),
        {"type": "ACTIVATE_VERSION", "stream": "a", "version": 7},
        {"type": "STATE", "value": {"n": 2}},
    )
    listing = await scripts.call(Call(SINGER, {"tap": program, "config": {"k": 1}}, state={"n": 0}), FakeHost())
    assert [(entry.key, entry.item["stream"]) for entry in listing.entries] == [("a/1/é", "a"), (None, "b")]
    assert listing.state == {"n": 2}
    assert "not JSON at all" in listing.logs
    called = (tmp_path / "called").read_text()
    assert '{"k": 1}' in called
    assert '{"n": 0}' in called


async def test_a_tap_that_fails_says_nothing_new(scripts: Scripts, tmp_path: Path) -> None:
    program = tap(tmp_path, record("a", x=1), then="echo no luck >&2; exit 2")
    with pytest.raises(TriggerError, match="tap-test ended with status 2") as caught:
        await scripts.call(Call(SINGER, {"tap": program}), FakeHost())
    assert "no luck" in caught.value.logs


async def test_a_tap_of_batches_is_told_to_stop_that(scripts: Scripts, tmp_path: Path) -> None:
    program = tap(tmp_path, {"type": "BATCH", "stream": "a", "manifest": []})
    with pytest.raises(TriggerError, match="batch_config"):
        await scripts.call(Call(SINGER, {"tap": program}), FakeHost())


async def test_a_catalog_with_a_selection_is_passed_on(scripts: Scripts, tmp_path: Path) -> None:
    catalog = {"streams": [{"tap_stream_id": "a", "schema": {}, "metadata": []}]}
    await scripts.call(Call(SINGER, {"tap": tap(tmp_path), "catalog": catalog}), FakeHost())
    assert json.dumps(catalog) in (tmp_path / "called").read_text()


async def test_streams_are_selected_of_those_that_the_tap_discovers(scripts: Scripts, tmp_path: Path) -> None:
    there = {"streams": [{"tap_stream_id": "a", "schema": {}}, {"stream": "b", "schema": {}, "metadata": []}]}
    program = Path(tap(tmp_path, record("a", x=1)))
    said = program.read_text()
    program.write_text(
        said.replace("#!/bin/sh\n", f"#!/bin/sh\n[ \"$3\" = --discover ] && echo '{json.dumps(there)}' && exit\n")
    )
    listing = await scripts.call(Call(SINGER, {"tap": str(program), "streams": ["a"]}), FakeHost())
    assert len(listing.entries) == 1
    catalog = json.loads((tmp_path / "called").read_text().partition("--catalog ")[2].splitlines()[0])
    chosen = [stream["metadata"][0]["metadata"]["selected"] for stream in catalog["streams"]]
    assert chosen == [True, False]
    with pytest.raises(TriggerError, match="the tap has no stream c: it has a, b"):
        await scripts.call(Call(SINGER, {"tap": str(program), "streams": ["c"]}), FakeHost())


async def test_a_tap_that_is_nowhere_is_an_error(scripts: Scripts) -> None:
    with pytest.raises(TriggerError, match="FileNotFoundError"):
        await scripts.call(Call(SINGER, {"tap": "tap-nowhere"}), FakeHost())
