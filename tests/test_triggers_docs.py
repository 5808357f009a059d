"""The page about triggers: its scripts work, and it names every trigger and argument."""

from __future__ import annotations

import io
import re
import sqlite3
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import site as s
from tests.support.scripts import FakeHost
from tests.support.site import Site
from tests.support.watching import TRIGGERS, Web, fetcher
from watcher.scripts import Call, Scripts
from watcher.scripts.shared import on_demand
from watcher.values import ScriptSettings

TEXT = (Path(__file__).parent.parent / "docs" / "triggers.md").read_text()
SCRIPTS = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "def main" in block]


@pytest.fixture
async def scripts() -> AsyncIterator[Scripts]:
    scripts = Scripts(ScriptSettings())
    await scripts.start()
    yield scripts
    await scripts.close()


def written(folder: Path, number: int) -> Path:
    path = folder / "script.py"
    path.write_text(SCRIPTS[number])
    return path


async def test_the_scripts_that_ask_the_web(scripts: Scripts, tmp_path: Path) -> None:
    web = Web(fetcher())
    async with Site() as site:
        args: dict[str, Any] = {"shop": site.url}
        site.on("/api/orders", s.json({"orders": [{"number": 1}]}))
        listing = await scripts.call(Call(written(tmp_path, 0), args), web)
        assert [entry.key for entry in listing.entries] == ["1"]
        site.on("/api/orders", s.json([{"number": 1, "updated_at": "2026-01-01T00:00:00Z"}]))
        listing = await scripts.call(Call(written(tmp_path, 1), args, since="2026-01-01T00:00:00Z"), web)
        assert [entry.cursor for entry in listing.entries] == ["2026-01-01T00:00:00Z"]
        assert site.asked[-1].params["since"] == "2026-01-01T00:00:00Z"
    await web.fetcher.close()


async def test_the_script_in_windmills_way(scripts: Scripts, tmp_path: Path) -> None:
    database = tmp_path / "a.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.execute("INSERT INTO t VALUES ('a'), ('b')")
    connection.close()
    call = Call(written(tmp_path, 2), {"database": str(database), "table": "t"})
    listing = await scripts.call(call, FakeHost())
    assert [entry.item for entry in listing.entries] == [{"id": 1, "row": [1, "a"]}, {"id": 2, "row": [2, "b"]}]
    assert listing.state == 2


async def test_the_script_with_a_shared_directory(scripts: Scripts, tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("orders.csv", "id,total\n7,12\n")
    async with Site() as site, on_demand() as shared:
        url = site.on("/orders.zip", lambda asked: s.Answer(body=archive.getvalue()))
        web = Web(fetcher())
        listing = await scripts.call(Call(written(tmp_path, 3), {"url": url}, shared=shared), web)
        assert [entry.item for entry in listing.entries] == [{"id": "7", "total": "12"}]
        assert {path.name for path in shared().iterdir()} == {"orders.csv", "orders.zip"}
        await web.fetcher.close()


def test_the_tests_of_the_page_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "orders.py").write_text(SCRIPTS[0])
    monkeypatch.chdir(tmp_path)
    (text,) = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "watcher.testing" in block]
    page: dict[str, Any] = {}
    exec(compile(text, "triggers.md", "exec"), page)
    tests = [test for name, test in page.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


async def test_every_built_in_trigger_and_each_of_its_arguments(scripts: Scripts) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| .*? \| (.*) \|$", TEXT.partition("## The built-in triggers")[2], re.M))
    assert set(rows) == {script.stem for script in TRIGGERS.glob("*.py")}
    for name, arguments in rows.items():
        described = await scripts.describe(TRIGGERS / f"{name}.py")
        assert re.findall(r"`(\w+)`", arguments) == list(described.arguments_schema["properties"]), name
