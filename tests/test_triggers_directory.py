"""The directory trigger: each file when it is written to its end, and what became of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.watching import Watching, fetcher
from watcher.errors import TriggerError
from watcher.scripts import Scripts
from watcher.values import ScriptSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scripts() -> AsyncIterator[Scripts]:
    scripts = Scripts(ScriptSettings())
    await scripts.start()
    yield scripts
    await scripts.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def watching(scripts: Scripts, folder: Path, **args: Any) -> Watching:
    return Watching(scripts, fetcher(), "directory", path=str(folder), **{"settle": 0, **args})


async def test_new_changed_and_removed_files(scripts: Scripts, folder: Path) -> None:
    (folder / "a").write_text("1")
    (folder / "b").write_text("1")
    w = watching(scripts, folder)
    assert await w.changes() == [("new", "a"), ("new", "b")]
    assert await w.changes() == []
    (folder / "a").write_text("22")
    (folder / "b").unlink()
    (folder / "c").write_text("3")
    assert await w.changes() == [("changed", "a"), ("new", "c"), ("removed", "b")]


async def test_an_item_says_where_the_file_is(scripts: Scripts, folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in" / "a.csv").write_bytes(b"12345")
    os.utime(folder / "in" / "a.csv", ns=(0, 1_600_000_000_123_456_000))
    (item,) = await watching(scripts, folder).poll()
    assert item == {
        "path": "in/a.csv",
        "file": f"{folder}/in/a.csv",
        "name": "a.csv",
        "size": 5,
        "modified": "2020-09-13T12:26:40.123456+00:00",
    }


async def test_a_file_that_is_being_written_waits_until_it_has_settled(scripts: Scripts, folder: Path) -> None:
    (folder / "half").write_text("1")
    busy = watching(scripts, folder, settle=3600)
    assert await busy.changes() == []
    busy.args["settle"] = 0  # an hour later
    assert await busy.changes() == [("new", "half")]


async def test_a_known_file_that_is_written_again_is_neither_removed_nor_changed_yet(
    scripts: Scripts, folder: Path
) -> None:
    (folder / "a").write_text("1")
    w = watching(scripts, folder)
    await w.changes()
    (folder / "a").write_text("half of it")
    w.args["settle"] = 3600
    assert await w.changes() == []
    w.args["settle"] = 0
    assert await w.changes() == [("changed", "a")]


async def test_a_copy_that_keeps_the_old_time_is_still_seen_as_being_written(scripts: Scripts, folder: Path) -> None:
    (folder / "copy").write_text("1")
    os.utime(folder / "copy", (1, 1))
    assert await watching(scripts, folder, settle=3600).changes() == []


async def test_a_file_from_the_future_does_not_wait_for_ever(scripts: Scripts, folder: Path) -> None:
    (folder / "a").write_text("1")
    os.utime(folder / "a", (4_000_000_000, 4_000_000_000))
    assert await watching(scripts, folder, settle=5).changes() == [("new", "a")]


async def test_a_pattern_by_name_and_by_path(scripts: Scripts, folder: Path) -> None:
    (folder / "in").mkdir()
    for name in ("a.csv", "b.txt", "in/c.csv"):
        (folder / name).write_text("1")
    assert await watching(scripts, folder, pattern="*.csv").changes() == [("new", "a.csv"), ("new", "in/c.csv")]
    assert await watching(scripts, folder, pattern="in/*").changes() == [("new", "in/c.csv")]
    assert await watching(scripts, folder, recursive=False).changes() == [("new", "a.csv"), ("new", "b.txt")]


async def test_hidden_files_are_copies_under_way_unless_asked_for(scripts: Scripts, folder: Path) -> None:
    (folder / ".upload").mkdir()
    (folder / ".upload" / "a").write_text("1")
    (folder / ".b.XyZ").write_text("1")
    assert await watching(scripts, folder).changes() == []
    assert await watching(scripts, folder, hidden=True).changes() == [("new", ".b.XyZ"), ("new", ".upload/a")]


async def test_content_that_changes_under_the_same_size_and_time(scripts: Scripts, folder: Path) -> None:
    (folder / "a").write_text("1")
    os.utime(folder / "a", (1, 1))
    plain, exact = watching(scripts, folder), watching(scripts, folder, digest=True)
    await plain.changes()
    await exact.changes()
    (folder / "a").write_text("2")
    os.utime(folder / "a", (1, 1))
    assert await plain.changes() == []
    assert await exact.changes() == [("changed", "a")]


async def test_links_are_no_way_out_and_no_circle(scripts: Scripts, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("1")
    (folder / "circle").symlink_to(folder)
    (folder / "broken").symlink_to(tmp_path / "nothing")
    (folder / "outside").symlink_to(tmp_path)
    (folder / "file").symlink_to(tmp_path / "secret")
    assert await watching(scripts, folder).changes() == [("new", "file")]


async def test_names_that_are_not_text(scripts: Scripts, folder: Path) -> None:
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe"))).write_text("1")
    (folder / "zwei ü\n").write_text("1")
    w = watching(scripts, folder, digest=True)
    assert await w.changes() == [("new", "\\xff\\xfe"), ("new", "zwei ü\n")]
    assert await w.changes() == []


async def test_pipes_and_sockets_are_no_files(scripts: Scripts, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert await watching(scripts, folder, digest=True).changes() == []


async def test_a_folder_that_is_gone_is_an_error_and_not_an_empty_one(scripts: Scripts, folder: Path) -> None:
    (folder / "a").write_text("1")
    w = watching(scripts, folder)
    await w.changes()
    folder.rename(folder.with_name("moved"))
    with pytest.raises(TriggerError, match=r"there is no folder .*check `path`"):
        await w.changes()
    folder.with_name("moved").rename(folder)
    assert await w.changes() == []


async def test_ten_thousand_files(scripts: Scripts, folder: Path) -> None:
    for number in range(10_000):
        (folder / f"{number:05}").touch()
    w = watching(scripts, folder)
    assert len(await w.changes()) == 10_000
    (folder / "05000").unlink()
    assert await w.changes() == [("removed", "05000")]
