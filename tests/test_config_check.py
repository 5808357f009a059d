"""A watcher held against its script: arguments, cursor and lookback, with the place of each mistake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.config import GOOD, load
from watcher import config
from watcher.errors import ConfigError, Mistake
from watcher.scripts import Scripts
from watcher.values import ScriptSettings

SCRIPT = """
from watcher import trigger

@trigger(key="id")
async def main(repo: str, limit: int = 10, tags: list[str] = [], github: dict | None = None):
    return []
"""
CURSOR = SCRIPT.replace('key="id"', 'key="id", cursor="at"')


@pytest.fixture
async def scripts() -> AsyncIterator[Scripts]:
    scripts = Scripts(ScriptSettings())
    await scripts.start()
    yield scripts
    await scripts.close()


async def check(scripts: Scripts, folder: Path, line: str, script: str = SCRIPT) -> list[str]:
    (folder / "own.py").write_text(script)
    text = GOOD.replace('"git"', '"./own.py"').replace('with = { repo = "." }', line)
    return await config.check(load(folder, text).config, scripts)


async def found(scripts: Scripts, folder: Path, line: str, script: str = SCRIPT) -> list[Mistake]:
    with pytest.raises(ConfigError) as caught:
        await check(scripts, folder, line, script)
    return caught.value.mistakes


@pytest.mark.parametrize(
    "line",
    [
        'with = { repo = "." }',
        'with = { repo = ".", limit = 3, tags = ["a"] }',
        'with = { repo = "$var:u/me/repo", limit = "$var:u/me/limit", github = "$res:u/me/github" }',
        'with = { repo = ".", github = { token = "$env:HOME" } }',
    ],
)
async def test_arguments_that_fit(scripts: Scripts, tmp_path: Path, line: str) -> None:
    (tmp_path / "own.py").write_text(SCRIPT)
    text = GOOD.replace('"git"', '"./own.py"').replace('with = { repo = "." }', line)
    assert await config.check(load(tmp_path, text, {"HOME": "/"}).config, scripts) == []


@pytest.mark.parametrize(
    ("line", "column", "message", "hint"),
    [
        ('with = { repo = ".", limt = 3 }', 22, "the trigger has no argument limt", "did you mean limit?"),
        ('with = { repo = ".", x = 3 }', 22, "the trigger has no argument x", "it takes repo, limit, tags, github"),
        ('with = { repo = ".", limit = "many" }', 30, "valid integer", ""),
        ('with = { repo = ".", tags = ["a", 3] }', 35, "valid string", ""),
        ("with = { limit = 3 }", 1, "the trigger needs repo", "with = { repo = … }"),
        ('with = { repo = "." }\nlookback = "5m"', 12, "has no cursor to look back from", "JMESPath"),
        ('with = { repo = "." }\nfirst_run = "since:2026"', 13, "has no cursor to begin from", "JMESPath"),
    ],
)
async def test_a_mistake_is_found_where_it_stands(
    scripts: Scripts, tmp_path: Path, line: str, column: int, message: str, hint: str
) -> None:
    (mistake,) = await found(scripts, tmp_path, line)
    assert message in mistake.message
    assert hint in mistake.hint
    assert (mistake.line, mistake.column) == (13 + line.count("\n"), column), mistake
    assert f"watcher.toml:{mistake.line}:" in config.render(ConfigError([mistake]))


async def test_no_arguments_at_all_point_at_the_watcher(scripts: Scripts, tmp_path: Path) -> None:
    (mistake,) = await found(scripts, tmp_path, "")
    assert (mistake.line, mistake.message) == (9, "the trigger needs repo")


async def test_a_cursor_may_come_from_the_script_or_from_the_watcher(scripts: Scripts, tmp_path: Path) -> None:
    line = 'with = { repo = "." }\nlookback = "5m"\nfirst_run = "since:2026"'
    assert await check(scripts, tmp_path, line, CURSOR) == []
    assert await check(scripts, tmp_path, line + '\ncursor = "at"') == []


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("def main(:", "own.py"),
        ("import nothing_of_this_name\ndef main(): ...", "nothing_of_this_name"),
        ("x = 1", "has no main"),
    ],
)
async def test_a_script_that_cannot_be_loaded(scripts: Scripts, tmp_path: Path, script: str, message: str) -> None:
    (mistake,) = await found(scripts, tmp_path, "", script)
    assert message in mistake.message
    assert (mistake.line, mistake.column) == (10, 11)


async def test_what_is_switched_off_only_warns(scripts: Scripts, tmp_path: Path) -> None:
    (warning,) = await check(scripts, tmp_path, "enabled = false")
    assert warning == "watchers.commits.with.repo: the trigger needs repo (with = { repo = … })"


async def test_the_scripts_of_all_watchers_are_told_at_once(scripts: Scripts, tmp_path: Path) -> None:
    other = '\n[watchers.b]\ntrigger = "./own.py"\nevery = "1m"\nflow = "notify"\nwith = { repo = 1, limit = [] }\n'
    mistakes = await found(scripts, tmp_path, "with = { nothing = 1 }" + other)
    assert [m.where for m in mistakes] == [
        "watchers.commits.with.repo",
        "watchers.commits.with.nothing",
        "watchers.b.with.repo",
        "watchers.b.with.limit",
    ]


def test_the_example_holds_against_the_built_in_triggers() -> None:
    root = Path(__file__).parent.parent

    async def work() -> list[str]:
        scripts = Scripts(ScriptSettings())
        await scripts.start()
        try:
            return await config.check(config.load(root / "config.example.toml", environ={}), scripts)
        finally:
            await scripts.close()

    assert asyncio.run(work()) == []


async def test_a_step_of_a_local_flow_is_loaded_as_a_trigger_is(scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text("import nowhere_to_be_had\ndef main(item): return item\n")
    flow = '\n[flows.local]\nsteps = ["step.py"]\n'
    text = GOOD.replace('"git"', '"./own.py"') + flow
    (tmp_path / "own.py").write_text(SCRIPT)
    with pytest.raises(ConfigError) as caught:
        await config.check(load(tmp_path, text).config, scripts)
    (mistake,) = caught.value.mistakes
    assert '"step.py"' in text.splitlines()[(mistake.line or 0) - 1]
    assert "nowhere_to_be_had" in mistake.message
    (tmp_path / "step.py").write_text("def main(item): return item\n")
    assert await config.check(load(tmp_path, text).config, scripts) == []
