"""States by Windmill's own clients, under the token of a run: staged, seen by the run itself, kept with its items."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import windmill
from tests.support.windmill import NEWEST, OLDEST, VERSIONS, Place, node, on_deno, python

PATH = "f/waiting/schedule-f-watchers-waiting"


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Place]:
    async with windmill.place(tmp_path) as found:
        yield found


async def state(here: Place, path: str = PATH) -> Any:
    """What is committed, as an operator reads it."""
    status, text = await here.service.ask(
        "GET", f"/api/w/main/resources/get_value/{path}", headers={"authorization": f"Bearer {here.token}"}
    )
    return json.loads(text) if status == 200 else status


READ_WRITE = """
import wmill
before, path = wmill.get_state(), wmill.get_state_path()
wmill.set_state({"last": 7})
show([before, path, wmill.get_state()])
"""


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_run_sees_what_it_wrote_and_it_is_kept_with_the_items(here: Place, version: str) -> None:
    env = await here.job()
    assert (await python(version, READ_WRITE, env)).value == [None, PATH, {"last": 7}]
    assert await state(here) == 404  # nobody else sees it yet
    assert (await here.let_go([{"id": 1}]))["success"] is True
    assert await state(here) == {"last": 7}
    env = await here.job()
    assert (await python(version, READ_WRITE, env)).value == [{"last": 7}, PATH, {"last": 7}]
    await here.let_go()


@pytest.mark.long
async def test_the_oldest_client_with_its_old_endpoints(here: Place) -> None:
    env = await here.job()
    code = """
import wmill
before, path = wmill.get_state(), wmill.get_state_path()
wmill.set_state({"last": 7})
wmill.set_state({"last": 8})
show([before, path, wmill.get_state(), wmill.get_version()[:7]])
wmill.set_variable("u/me/a", "x"); wmill.set_variable("u/me/a", "y")
wmill.set_resource({"token": "$var:u/me/a"}, "u/me/github", "github")
show([before, path, wmill.get_state(), wmill.get_variable("u/me/a"), wmill.get_resource("u/me/github"),
      wmill.whoami().email])
"""
    said = (await python(OLDEST, code, env)).value
    assert said == [None, PATH, {"last": 8}, "y", {"token": "y"}, "watcher@localhost"]
    await here.let_go([{"id": 1}])
    assert await state(here) == {"last": 8}
