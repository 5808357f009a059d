"""States by Windmill's own clients, under the token of a run: staged, seen by the run itself, kept with its items."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support import windmill
from tests.support.windmill import NEWEST, OLDEST, VERSIONS, Place, node, on_deno, python

PATH = "f/waiting/schedule-f-watchers-waiting"
VALUES = [0, "", False, [], {}, [1, [2]], "text", 1.5, "$var:u/admin/fixed", "$res:u/admin/fixed", {"a": None}, "é"]


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Place]:
    async with windmill.place(tmp_path) as found:
        yield found


async def state(here: Place, path: str = PATH) -> Any:
    """What is committed, as an operator reads it; the status when there is nothing."""
    status, text = await here.service.ask(
        "GET", f"/api/w/main/resources/get_value_interpolated/{path}", headers={"authorization": f"Bearer {here.token}"}
    )
    return json.loads(text) if status == 200 else status


# --- what works -------------------------------------------------------------------------------------------------------

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
wmill.set_variable("u/me/a", "x"); wmill.set_variable("u/me/a", "y")
wmill.set_resource({"token": "$var:u/me/a"}, "u/me/github", "github")
show([before, path, wmill.get_state(), wmill.get_variable("u/me/a"), wmill.get_resource("u/me/github"),
      wmill.whoami().email, wmill.get_version()[:7]])
"""
    said = (await python(OLDEST, code, env)).value
    assert said == [None, PATH, {"last": 8}, "y", {"token": "y"}, "watcher@localhost", "watcher"]
    await here.let_go([{"id": 1}])
    assert await state(here) == {"last": 8}


JAVASCRIPT = """
const before = await named.getState();
const path = wmill.getStatePath();
await named.setState({last: 7});
const own = await named.getState();
for (const value of VALUES) {
    await named.setState(value);
    const back = await named.getState();
    if (JSON.stringify(back) !== JSON.stringify(value)) throw Error(JSON.stringify([value, back]));
}
await named.setState({last: 8});
show([before === undefined, path, own]);
"""


@pytest.mark.parametrize("runtime", [on_deno, pytest.param(node, marks=pytest.mark.long)])
async def test_typescript_reads_and_writes_the_same_state(here: Place, runtime: Any) -> None:
    env = await here.job()
    said = await runtime(JAVASCRIPT.replace("VALUES", json.dumps(VALUES)), env)
    assert said.value == [True, PATH, {"last": 7}]
    await here.let_go([{"id": 1}])
    assert await state(here) == {"last": 8}


async def test_every_json_value_survives_and_none_is_followed(here: Place) -> None:
    env = await here.job()
    code = f"""
import json, wmill
for value in json.loads({json.dumps(json.dumps(VALUES))}):
    wmill.set_state(value)
    assert wmill.get_state() == value and type(wmill.get_state()) is type(value), value
    wmill.set_state(value, path="u/me/other")
    assert wmill.get_state(path="u/me/other") == value, value
wmill.set_state(None)
assert wmill.get_state() is None
wmill.set_state("$var:u/admin/fixed")
show(True)
"""
    assert (await python(NEWEST, code, env)).value is True
    await here.let_go([{"id": 1}])
    assert await state(here) == "$var:u/admin/fixed"
    assert await state(here, "u/me/other") == VALUES[-1]


async def test_our_own_functions_and_the_clients_share_one_staging_area(here: Place) -> None:
    (here.where / "plain.py").write_text(
        "import json, os, urllib.request\n"
        "from watcher import get_state, set_state\n"
        "def ask(path, value=None):\n"
        "    url = os.environ['BASE_INTERNAL_URL'] + '/api/w/main/resources/' + path\n"
        "    data = None if value is None else json.dumps(value).encode()\n"
        "    r = urllib.request.Request(url, data, {'Authorization': 'Bearer ' + os.environ['WM_TOKEN']})\n"
        "    return json.loads(urllib.request.urlopen(r).read() or b'null') if data is None else \\\n"
        "        urllib.request.urlopen(r).read()\n"
        "def main():\n"
        "    path = os.environ['WM_STATE_PATH']\n"
        "    before = get_state()\n"
        "    set_state(1)\n"
        "    by_http = ask('get_value_interpolated/' + path)\n"
        "    ask('update_value/' + path, {'value': 2})\n"
        "    set_state({'shared': True}, path='u/me/shared')\n"
        "    found = os.listdir('shared')\n"
        "    open('./shared/file', 'w').close()\n"
        "    return [{'id': 1, 'seen': [before, by_http, get_state(), get_state('u/me/shared'), get_state('u/no')],\n"
        "             'shared': found}]\n"
    )
    asked = await here.api("POST", "jobs/run_wait_result/p/plain", {})
    assert json.loads(asked)["counts"] == {"new": 1}
    with closing(sqlite3.connect(here.where / "watcher.db")) as db:
        payload = json.loads(db.execute("SELECT payload FROM item").fetchone()[0])
    assert payload["item"]["seen"] == [None, 1, 2, {"shared": True}, None]
    assert payload["item"]["shared"] == []  # a directory of this run, which is empty
    assert await state(here, "f/plain/schedule-f-watchers-plain") == 2
    assert await state(here, "u/me/shared") == {"shared": True}


# --- what goes wrong --------------------------------------------------------------------------------------------------


async def test_a_job_that_fails_keeps_nothing_and_its_token_ends_with_it(here: Place) -> None:
    env = await here.job()
    both = "import wmill; wmill.set_state(1); wmill.set_state(2, path='u/me/s'); show(1)"
    assert (await python(NEWEST, both, env)).value == 1
    assert (await here.let_go("fail"))["success"] is False
    assert [await state(here), await state(here, "u/me/s")] == [404, 404]
    late = await python(NEWEST, "import wmill; wmill.set_state(3)", env)
    assert late.code == 1
    assert "409" in late.err
    late = await on_deno("show(await failure(() => named.getState()))", env)
    assert "superseded" in late.value
    with closing(sqlite3.connect(here.where / "watcher.db")) as db:
        stored = "".join(db.iterdump())
    assert env["WM_TOKEN"] not in stored
    assert env["WM_TOKEN"] not in (here.where / "service.log").read_text()


async def test_another_watchers_memory_is_read_but_not_written(here: Place) -> None:
    other = "f/plain/schedule-f-watchers-plain"
    await here.api("POST", "resources/create", {"path": other, "value": 5, "resource_type": "state"})
    env = await here.job()
    code = f"import wmill; show(wmill.get_state(path='{other}')); wmill.set_state(6, path='{other}')"
    said = await python(NEWEST, code, env)
    assert said.out.strip() == "5"
    assert "403" in said.err
    await here.let_go()
    assert await state(here, other) == 5


async def test_two_runs_that_share_a_state_lose_no_update(here: Place) -> None:
    await here.api("POST", "resources/create", {"path": "u/me/n", "value": 1, "resource_type": "state"})
    env = await here.job()
    add = "import wmill; wmill.set_state(wmill.get_state(path='u/me/n') + 1, path='u/me/n'); show(1)"
    assert (await python(NEWEST, add, env)).value == 1
    await here.api("POST", "resources/update_value/u/me/n", {"value": 10})  # somebody else, in the meantime
    ended = await here.let_go([{"id": 1}])
    assert ended["success"] is False
    assert "version" in ended["result"]["error"]["message"]
    assert await state(here, "u/me/n") == 10


async def test_a_read_waits_for_a_database_in_trouble_instead_of_telling_of_no_state(here: Place) -> None:
    await here.api("POST", "resources/create", {"path": "u/me/s", "value": "precious", "resource_type": "state"})
    env = await here.job()
    with closing(sqlite3.connect(here.where / "watcher.db", isolation_level=None, timeout=30)) as db:
        db.execute("ALTER TABLE resource RENAME TO resource_away")
        reading = asyncio.create_task(python(NEWEST, "import wmill; show(wmill.get_state(path='u/me/s'))", env))
        done, _ = await asyncio.wait({reading}, timeout=2)
        assert not done
        db.execute("ALTER TABLE resource_away RENAME TO resource")
    assert (await reading).value == "precious"
    await here.let_go()


async def test_a_restart_in_the_middle_of_a_job_keeps_nothing_of_it(here: Place) -> None:
    env = await here.job()
    assert (await python(NEWEST, "import wmill; wmill.set_state(1); show(1)", env)).value == 1
    here.service.signal(signal.SIGKILL)
    await here.service.ended()
    refused = "import wmill; show(wmill.get_state()); wmill.set_state(2)"
    said = await python(NEWEST, refused, env)
    assert (said.out.strip(), said.code) == ("null", 1)  # the client hides it when reading, not when writing
    assert "onnect" in said.err
    assert "fetch failed" in (await on_deno("show(await failure(() => named.setState(1)))", env)).value
    here.service.start()
    await here.service.ready()
    said = await python(NEWEST, refused, env)
    assert (said.out.strip(), said.code) == ("null", 1)
    assert "409" in said.err
    assert await state(here) == 404


HALF = """
const half = {title: "\\u{1f600}".slice(0, 1)};
const same = (value) => JSON.stringify(value) === JSON.stringify(half);
const before = await named.getState();
await named.setState(half);
await named.setState(half, "u/me/half");
show([before === undefined || same(before), same(await named.getState()), same(await named.getState("u/me/half"))]);
"""


async def test_a_text_that_was_cut_within_a_character_is_read_again(here: Place) -> None:
    """JavaScript cuts an emoji in two; such a state must not be one that can never be read again."""
    for _ in range(2):
        env = await here.job()
        assert (await on_deno(HALF, env)).value == [True, True, True]
        # Today's wmill cannot send such a text; it can read one, and must not take it for "there is none".
        seen = "import wmill; show(wmill.get_state(path='u/me/half'))"
        assert (await python(NEWEST, seen, env)).value == {"title": "\ud83d"}
        assert (await here.let_go([{"id": 1}]))["success"] is True
    assert await state(here) == {"title": "\ud83d"}
    whole = json.loads(await here.api("GET", f"resources/get/{PATH}"))
    assert whole["value"] == {"title": "\ud83d"}


async def test_a_state_that_cannot_be_decoded_makes_its_run_fail(here: Place) -> None:
    """Python's client takes the error for "there is none"; the run keeps nothing of what its script made of that."""
    await here.api("POST", "resources/create", {"path": "u/me/s", "value": "precious", "resource_type": "state"})
    with closing(sqlite3.connect(here.where / "watcher.db", timeout=30)) as db:
        db.execute("UPDATE resource SET value = '{\"cut' WHERE path = 'u/me/s'")
        db.commit()
    env = await here.job()
    code = """
import wmill
assert wmill.get_state(path="u/me/s") is None
wmill.set_state("begins anew")
show(1)
"""
    assert (await python(NEWEST, code, env)).value == 1
    ended = await here.let_go([{"id": 1}])
    assert ended["success"] is False
    assert "u/me/s" in ended["result"]["error"]["message"]
    assert await state(here) == 404


async def test_sizes(here: Place) -> None:
    env = await here.job()
    code = """
import wmill
wmill.set_state("x" * 2_100_000)
assert len(wmill.get_state()) == 2_100_000
try:
    wmill.set_state("x" * (64 * 1024 * 1024))
except Exception as error:
    show(str(error)[-120:])
"""
    assert "413" in (await python(NEWEST, code, env)).value
    await here.let_go([{"id": 1}])
    assert len(await state(here)) == 2_100_000


@pytest.mark.parametrize("path", ["u/me/a?b", "u/me/a#b", "u/me/../x", "u//x", "/u/x", "u/me/", "u/a%2Fb", "u/\\n", ""])
async def test_a_path_that_a_client_could_not_ask_for_is_refused(here: Place, path: str) -> None:
    body = {"path": path.encode().decode("unicode_escape"), "value": 1, "resource_type": "state"}
    await here.api("POST", "resources/create", body, want=400)


async def test_bad_paths_by_the_real_client(here: Place) -> None:
    await here.api("POST", "resources/create", {"path": "u/me/a", "value": 1, "resource_type": "state"})
    env = await here.job()
    code = """
import wmill
def wrong(path):
    try: wmill.set_state(2, path=path)
    except Exception as error: return str(error).split(": ")[-1][:3]
wmill.set_state("ü", path="f/dünn/状態")
show([wrong("u/me/a?b"), wmill.get_state(path="u/me/a?b"), wmill.get_state(path="u/me/a"), wrong("u/me/../x"),
      wmill.get_state(path="f/dünn/状態"), wmill.get_state(path="u%2Fme%2Fa")])
"""
    said = (await python(NEWEST, code, env)).value
    assert said[0] is not None
    assert said[1:3] == [None, 1]  # what follows the ? is no state of u/me/a, and u/me/a was not overwritten
    assert said[3] is not None
    assert said[4:] == ["ü", 1]
    await here.let_go()


async def test_what_is_no_json_is_refused(here: Place) -> None:
    env = await here.job()
    nan = "import wmill; wmill.set_state(float('nan'))"
    assert (await python("1.297.0", nan, env)).code == 1
    assert "JSON" in (await python(NEWEST, nan, env)).err
    for raw in (b"{", b'{"value": NaN}', b'{"value": 1e999}', b'{"value": -1E+400}', b"[" * 100_000, b"\xff"):
        status, text = await here.service.ask(
            "POST", f"/api/w/main/resources/update_value/{PATH}", raw, {"authorization": f"Bearer {env['WM_TOKEN']}"}
        )
        assert (status, "JSON" in text) == (400, True)
    await here.let_go()
    assert await state(here) == 404
