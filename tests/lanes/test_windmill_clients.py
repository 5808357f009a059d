"""Windmill's own clients by version, function by function, against the real service: what works, and each trouble."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support import windmill
from tests.support.receiver import Receiver, answer
from tests.support.service import free_port
from tests.support.windmill import NEWEST, NPM, OLDER_NPM, OLDEST, VERSIONS, Place, on_deno, python

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

PYTHON = (*VERSIONS, OLDEST)
TYPESCRIPT = (NPM, *OLDER_NPM)
PATH = "f/waiting/schedule-f-watchers-waiting"
NO_JOB = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Place]:
    async with windmill.place(tmp_path) as found:
        yield found


# --- Python -----------------------------------------------------------------------------------------------------------
# Each row: the function, an expression that calls it, and what comes of it. ``f("name")`` is the function of the module
# or of its client; what a version does not have is ``absent``, and ABSENT says which those are.

ROWS: dict[str, tuple[str, Any]] = {
    "get_state_path": ('f("get_state_path")()', PATH),
    "get_state, first run": ('f("get_state")()', None),
    "set_state": ('f("set_state")({"last": 7})', None),
    "set_state again": ('f("set_state")({"last": 8})', None),
    "get_state": ('f("get_state")()', {"last": 8}),
    "set_state(path)": ('f("set_state")([1], path="u/me/s")', None),
    "get_state(path)": ('f("get_state")(path="u/me/s")', [1]),
    "set_variable": ('f("set_variable")("u/me/v", "one")', None),
    "set_variable again": ('f("set_variable")("u/me/v", "two")', None),
    "set_variable(is_secret)": ('f("set_variable")("u/me/secret", "s3cr3t-s3cr3t", is_secret=True)', None),
    "get_variable": ('f("get_variable")("u/me/v")', "two"),
    "get_variable, secret": ('f("get_variable")("u/me/secret")', "s3cr3t-s3cr3t"),
    "set_resource": (
        'f("set_resource")(value={"token": "$var:u/me/v"}, path="u/me/r", resource_type="github")', None
    ),
    "set_resource again": (
        'f("set_resource")(value={"token": "$var:u/me/v", "n": 1}, path="u/me/r", resource_type="github")', None
    ),
    "get_resource": ('f("get_resource")("u/me/r")', {"token": "two", "n": 1}),
    "get_resource(none_if_undefined)": ('f("get_resource")("u/none", none_if_undefined=True)', None),
    "get_resource(interpolated)": (
        'f("get_resource")("u/me/r", interpolated=False)', {"token": "$var:u/me/v", "n": 1}
    ),
    "get_resource, missing": ('f("get_resource")("u/none")', "404"),
    "get_variable, missing": ('f("get_variable")("u/none")', "404"),
    "list_resources": ('[r["path"] for r in f("list_resources")("github")]', ["u/admin/fixed", "u/me/r"]),
    "run_flow_async, wait_job": ('f("wait_job")(f("run_flow_async")("add", {"a": 1, "b": 2}))', {"sum": 3}),
    "run_flow_async(scheduled_in_secs)": (
        'f("get_job_status")(f("run_flow_async")("add", {"a": 1}, scheduled_in_secs=3600))', "WAITING"
    ),
    "run_script_by_path": ('f("run_script_by_path")("f/tools/double", {"n": 4})', 8),
    "run_script_by_path_async": ('len(f("run_script_by_path_async")("f/tools/double", {"n": 4}))', 36),
    "run_script_by_hash": (f'f("run_script_by_hash")("{"0" * 16}")', "404"),
    "run_script": ('(f("run_script"))(path="f/tools/double", args={"n": 5})', 10),
    "get_result": ('f("get_result")(done("add", {"a": 1}))', {"sum": 1}),
    "get_job_status": ('f("get_job_status")(done("add", {"a": 1}))', "COMPLETED"),
    "get_job": ('f("get_job")(done("add", {"a": 1}))["type"]', "CompletedJob"),
    "wait_job, failed": ('"no such luck" in said(lambda: f("wait_job")(f("run_flow_async")("broken")))', True),
    "wait_job, missing": (f'f("wait_job")("{NO_JOB}")', "404"),
    "get_result, missing": (f'f("get_result")("{NO_JOB}")', "404"),
    "get_job, missing": (f'f("get_job")("{NO_JOB}")', "404"),
    "run_flow_async, missing": ('f("run_flow_async")("none")', "404"),
    "run_script_by_path, missing": ('f("run_script_by_path")("f/none", {})', "404"),
    "get_root_job_id": ('f("get_root_job_id")() == os.environ["WM_JOB_ID"]', True),
    "set_progress": ('f("set_progress")(40)', None),
    "get_progress": ('f("get_progress")()', 40),
    "set_flow_user_state": ('f("set_flow_user_state")("k", {"a": 1})', None),
    "get_flow_user_state": ('f("get_flow_user_state")("k")', {"a": 1}),
    "cancel_job": ('f("cancel_job")(f("run_flow_async")("slow"), "enough")', ...),
    "cancel_running": ('f("cancel_running")() or None', None),
    "whoami": ('email(f("whoami")())', "watcher@localhost"),
    "get_version": ('f("get_version")()[:9]', "watcher v"),
    "username_to_email": ('f("username_to_email")("me")', "me@localhost"),
    "create_token": ('f("create_token")()[:4]', "wtc_"),
    "worker_is_draining": ('f("worker_is_draining")()', False),
    "get_id_token": ('f("get_id_token")("aws")', "404"),
    "get_resume_urls": ('f("get_resume_urls")("me")', "404"),
}  # fmt: skip

PRELUDE = r"""
import concurrent.futures, os, re, sys, wmill
client = getattr(wmill, "Windmill", None)
client = client and client()
def f(name):
    found = getattr(wmill, name, None) or getattr(client, name, None)
    if found is None: raise NotImplementedError
    return found
def said(work):
    try: return str(work())
    except NotImplementedError: raise
    except Exception as error: return str(error)
def done(path, args):
    id = f("run_flow_async")(path, args)
    f("wait_job")(id)
    return id
def email(user): return user["email"] if isinstance(user, dict) else user.email
def row(code):
    try:
        for name in re.findall(r'\bf\("(\w+)"\)', code): f(name)
        return eval(code)
    except NotImplementedError:
        return "absent"
    except Exception as error:
        if "unexpected keyword" in str(error): return "absent"
        known = re.search(r"(?:: |error '|status code: )(4\d\d|50\d)(?!\d)", str(error))
        return known[1] if known else type(error).__name__
rows = json.loads(ROWS)
"""

IN_TURN = PRELUDE + "show({name: row(code) for name, code in rows.items()})\n"
TOGETHER = PRELUDE + (
    "with concurrent.futures.ThreadPoolExecutor(64) as pool:\n"
    "    show(dict(zip(rows, pool.map(row, rows.values()))))\n"
    "sys.stdout.flush(); os._exit(0)\n"  # the clients register an attempt to cancel what they wait for
)
LATER = {"cancel_job", "get_resource(interpolated)", "get_state(path)", "list_resources", "run_script_by_hash",
         "run_script_by_path", "run_script_by_path, missing", "set_state(path)", "worker_is_draining"}  # fmt: skip
KEPT = {"get_state_path", "get_state, first run", "set_state", "set_state again", "get_state", "set_variable",
        "set_variable again", "get_variable", "get_variable, secret", "set_resource", "set_resource again",
        "get_resource", "get_resource(none_if_undefined)", "get_resource, missing", "get_variable, missing",
        "get_result, missing", "whoami", "get_version", "get_resume_urls"}  # fmt: skip
ABSENT: dict[str, set[str]] = {
    VERSIONS[0]: set(),
    VERSIONS[1]: LATER,
    VERSIONS[2]: LATER | {"get_progress", "set_progress", "username_to_email"},
    OLDEST: set(ROWS) - KEPT,
}
OWN_WORDS: dict[str, dict[str, Any]] = {  # where a version tells trouble in its own way
    VERSIONS[2]: {"wait_job, missing": "JSONDecodeError"},
    OLDEST: dict.fromkeys(
        ("get_variable, secret", "get_resource, missing", "get_variable, missing", "get_result, missing",
         "get_resume_urls"), "Exception",
    ),
}  # fmt: skip


async def by_python(version: str, env: Mapping[str, str], code: str = IN_TURN) -> dict[str, Any]:
    rows = json.dumps({name: code for name, (code, _) in ROWS.items()})
    said = await python(version, code.replace("ROWS", repr(rows)), env, seconds=600)
    return dict(said.value)


def differs(
    version: str, rows: Mapping[str, tuple[str, Any]], absent: set[str], found: Mapping[str, Any], **own: Any
) -> dict[str, Any]:
    """What came of a row, and what should have; no row is left out but those that the version is known not to have."""
    assert {name for name, value in found.items() if value == "absent"} == absent, version
    wanted = {name: expected for name, (_, expected) in rows.items()} | own
    return {
        name: (value, wanted[name])
        for name, value in found.items()
        if name not in absent and value != wanted[name] and wanted[name] is not ...
    }


@pytest.mark.parametrize("version", PYTHON)
async def test_python(here: Place, version: str) -> None:
    found = await by_python(version, await here.job())
    assert differs(version, ROWS, ABSENT[version], found, **OWN_WORDS.get(version, {})) == {}
    assert (await here.let_go([{"id": 1}]))["success"] is True
    kept = await here.api("GET", f"resources/get_value_interpolated/{PATH}")
    assert json.loads(kept) == {"last": 8}


# --- TypeScript -------------------------------------------------------------------------------------------------------

TS_ROWS: dict[str, tuple[str, Any]] = {
    "getStatePath": ('process.env.WM_STATE_PATH && (named.getStatePath ?? wmill.getStatePath ?? (() => PATH))()', PATH),
    "getState, first run": ('f("getState")()', "undefined"),
    "setState": ('f("setState")({last: 7})', "undefined"),
    "setState again": ('f("setState")({last: 8})', "undefined"),
    "getState": ('f("getState")()', {"last": 8}),
    "setVariable": ('f("setVariable")("u/me/v", "one")', "undefined"),
    "setVariable again": ('f("setVariable")("u/me/v", "two")', "undefined"),
    "setVariable, secret": ('f("setVariable")("u/me/secret", "s3cr3t-s3cr3t", true, "of me")', "undefined"),
    "getVariable": ('f("getVariable")("u/me/v")', "two"),
    "getVariable, secret": ('f("getVariable")("u/me/secret")', "s3cr3t-s3cr3t"),
    "getVariable, missing": ('f("getVariable")("u/none")', "Error"),
    "setResource": ('f("setResource")({token: "$var:u/me/v"}, "u/me/r", "github")', "undefined"),
    "setResource again": ('f("setResource")({token: "$var:u/me/v", n: 1}, "u/me/r")', "undefined"),
    "setResource, missing": ('f("setResource")(1, "u/me/none")', "Error"),
    "getResource": ('f("getResource")("u/me/r")', {"token": "two", "n": 1}),
    "getResource, missing": ('f("getResource")("u/none")', "Error"),
    "getResource, undefinedIfEmpty": ('f("getResource")("u/none", true)', "undefined"),
    "ResourceService.listResource": (
        'named.ResourceService.listResource({workspace, resourceType: "github"}).then(all => all.map(r => r.path))',
        ["u/admin/fixed", "u/me/r"],
    ),
    "runFlowAsync, waitJob": ('f("runFlowAsync")("add", {a: 1, b: 2}).then(f("waitJob"))', {"sum": 3}),
    "runFlow": ('f("runFlow")("add", {a: 2})', {"sum": 2}),
    "runFlow, failed": ('f("runFlow")("broken", {})', "Error"),
    "runScriptByPath": ('f("runScriptByPath")("f/tools/double", {n: 4})', 8),
    "runScriptByPathAsync": ('f("runScriptByPathAsync")("f/tools/double", {n: 4}).then(id => id.length)', 36),
    "runScript": ('f("runScript")("f/tools/double", null, {n: 5})', 10),
    "runScriptAsync": ('f("runScriptAsync")("f/tools/double", null, {n: 5}).then(id => id.length)', 36),
    "getResult": (
        'f("runFlowAsync")("add", {a: 3}).then(id => f("waitJob")(id).then(() => f("getResult")(id)))', {"sum": 3}
    ),
    "getRootJobId": ('f("getRootJobId")().then(id => id === process.env.WM_JOB_ID)', True),
    "getRootJobId, missing": (f'f("getRootJobId")("{NO_JOB}")', "404"),
    "waitJob, missing": (f'f("waitJob")("{NO_JOB}")', "404"),
    "JobService.getJob": (
        'named.JobService.getJob({workspace, id: process.env.WM_JOB_ID}).then(job => job.type)', "QueuedJob"
    ),
    "setProgress": ('f("setProgress")(40)', ...),
    "getProgress": ('f("getProgress")()', 40),
    "setFlowUserState": ('f("setFlowUserState")("k", {a: 1})', "undefined"),
    "getFlowUserState": ('f("getFlowUserState")("k")', {"a": 1}),
    "cancelJob": ('f("runFlowAsync")("slow", {}).then(id => f("cancelJob")(id, "enough"))', ...),
    "UserService.globalWhoami": ('named.UserService.globalWhoami().then(user => user.email)', "watcher@localhost"),
    "UserService.whoami": ('named.UserService.whoami({workspace}).then(user => user.username)', "watcher"),
    "SettingsService.backendVersion": (
        'named.SettingsService.backendVersion().then(text => text.slice(0, 9))', "watcher v"
    ),
    "usernameToEmail": ('f("usernameToEmail")("me")', "me@localhost"),
    "getIdToken": ('f("getIdToken")("aws")', "404"),
    "getResumeUrls": ('f("getResumeUrls")("me")', "404"),
}  # fmt: skip
TS_LATER = {"cancelJob", "getProgress", "getResult", "runScriptByPath", "runScriptByPathAsync", "setProgress"}
TS_ABSENT: dict[str, set[str]] = {
    TYPESCRIPT[0]: set(),
    TYPESCRIPT[1]: {"cancelJob"},
    TYPESCRIPT[2]: TS_LATER,
    TYPESCRIPT[3]: TS_LATER | {"runFlow", "runFlow, failed", "runFlowAsync, waitJob"},
}

MODULE = r"""
import process from "node:process";
const workspace = process.env.WM_WORKSPACE, PATH = process.env.WM_STATE_PATH;
class Absent extends Error {}
const f = (name) => {
    const found = named[name] ?? wmill[name];
    if (!found) throw new Absent();
    return found;
};
const row = async (code) => {
    try {
        for (const [, name] of code.matchAll(/\bf\("(\w+)"\)/g)) f(name);
        const value = await eval(`(async () => (${code}))()`);
        return value === undefined ? "undefined" : value;
    } catch (error) {
        if (error instanceof Absent) return "absent";
        if (error.status) return String(error.status);
        return "Error";
    }
};
const rows = ROWS, found = {};
"""
TS_IN_TURN = MODULE + "for (const name in rows) found[name] = await row(rows[name]);\nshow(found);\n"
TS_TOGETHER = MODULE + (
    "await Promise.all(Object.keys(rows).map(async (name) => { found[name] = await row(rows[name]); }));\n"
    "show(found); process.exit(0);\n"
)


async def by_deno(version: str, env: Mapping[str, str], code: str = TS_IN_TURN) -> dict[str, Any]:
    rows = json.dumps({name: code for name, (code, _) in TS_ROWS.items()})
    said = await on_deno(code.replace("ROWS", rows), env, 600, version)
    return dict(said.value)


@pytest.mark.parametrize("version", TYPESCRIPT)
async def test_typescript(here: Place, version: str) -> None:
    found = await by_deno(version, await here.job())
    assert differs(version, TS_ROWS, TS_ABSENT[version], found) == {}
    assert (await here.let_go([{"id": 1}]))["success"] is True
    kept = await here.api("GET", f"resources/get_value_interpolated/{PATH}")
    assert json.loads(kept) == {"last": 8}


# --- trouble ----------------------------------------------------------------------------------------------------------
# What each client makes of it. A Python client says "no state" to every trouble: hence a job whose read failed keeps
# nothing. The oldest says nothing at all, also where it writes; and TypeScript takes an error's text for a job's id.

QUIET = {name for name, (code, _) in ROWS.items() if 'f("get_state")' in code or "none_if_undefined" in code}
ANYWHERE = {"whoami", "get_version", "create_token"}  # not of one workspace
TS_QUIET = {"setFlowUserState", "getFlowUserState"}
TS_IDS = {"runScriptByPathAsync", "runScriptAsync"}
TS_MISSING = {"getState, first run", "getState", "getResource, undefinedIfEmpty"}  # what a 404 is taken for
TS_WORDS = {name for name, (code, _) in TS_ROWS.items() if "getVariable" in code or "getResource" in code}
TROUBLES: dict[str, dict[str, str]] = {
    "401": {"WM_TOKEN": "wtc_wrong"},
    "404": {"WM_WORKSPACE": "other"},
    "500": {},
    "refused": {},
}


def troubled(version: str, status: str) -> dict[str, Any]:
    """What each Python function gives."""
    said = "ConnectError" if status == "refused" else status
    found: dict[str, Any] = {name: None if name in QUIET else said for name in ROWS}
    found |= {"get_state_path": PATH, "wait_job, failed": False}
    if status == "404":
        found |= {name: ROWS[name][1] for name in ANYWHERE}
    if version == OLDEST and said in ("ConnectError", "ReadTimeout"):
        return found | dict.fromkeys(QUIET, said)
    if version == OLDEST:
        quiet = dict.fromkeys({*QUIET, *(name for name in found if name.startswith("set_"))})
        loud = {name: "Exception" for name in found if name.startswith("get_") and name not in {*QUIET, "get_version"}}
        versions = {"get_version": {"404": "watcher v", "500": "broken"}.get(status, "a valid b")}
        return found | quiet | loud | versions | {"get_state_path": PATH, "whoami": "AttributeError"}
    if version == VERSIONS[2] and status != "refused":
        found["wait_job, missing"] = "JSONDecodeError"
    return found


def ts_troubled(status: str) -> dict[str, Any]:
    """What each TypeScript function gives."""
    said = "Error" if status == "refused" else status
    found: dict[str, Any] = dict.fromkeys(TS_ROWS, said)
    found |= {name: ... for name, (code, _) in TS_ROWS.items() if "runFlow" in code or "runScript" in code}
    found |= {name: "Error" for name in TS_WORDS if TS_ROWS[name][1] is not ...}
    found |= {"getStatePath": PATH, **dict.fromkeys(TS_QUIET, "undefined")}
    found |= dict.fromkeys(("getState, first run", "getState"), "Error")
    if status == "404":
        found |= dict.fromkeys(TS_MISSING, "undefined")
        found |= {name: TS_ROWS[name][1] for name in ("UserService.globalWhoami", "SettingsService.backendVersion")}
    return found


@pytest.mark.parametrize("status", TROUBLES)
async def test_trouble_as_each_client_tells_it(here: Place, status: str) -> None:
    env = {**await here.job(), **TROUBLES[status]}
    if status == "refused":
        env["BASE_INTERNAL_URL"] = f"http://127.0.0.1:{free_port()}"
    async with Receiver(decide=lambda _: answer(500, b"broken")) as broken:  # ours would not, but what stands before it
        if status == "500":
            env["BASE_INTERNAL_URL"] = broken.url
        for version in PYTHON:
            found = await by_python(version, env)
            assert differs(version, ROWS, ABSENT[version], found, **troubled(version, status)) == {}, version
        for version in TYPESCRIPT:
            found = await by_deno(version, env)
            if status != "refused":
                for name in TS_IDS - TS_ABSENT[version]:
                    assert isinstance(found[name], int), "it took the error's text for an id"
            assert differs(version, TS_ROWS, TS_ABSENT[version], found, **ts_troubled(status)) == {}, version
    assert (await here.let_go([{"id": 1}]))["success"] is True


async def test_a_restart_in_the_middle_of_a_job(here: Place) -> None:
    env = await here.job()
    for version in PYTHON:
        assert (await python(version, STATE, env)).code == 0, version
    again = await asyncio.gather(*(on_deno(TS_STATE, env, version=version) for version in TYPESCRIPT))
    assert {said.value for said in again} == {1}
    here.service.signal(signal.SIGKILL)
    await here.service.ended()
    here.service.start()
    await here.service.ready()
    for version in PYTHON:
        late = await python(version, "import wmill\nwmill.set_state(2)\nshow(wmill.get_state())", env)
        if version == OLDEST:
            assert late.value is None  # it says nothing of a 409, but nothing was kept either
        else:
            assert "409" in late.err, version
    for version in TYPESCRIPT:
        code = "show([await failure(() => named.setState(2)), await failure(() => named.getState())])"
        assert all((await on_deno(code, env, version=version)).value), version
    await here.api("GET", f"resources/get/{PATH}", want=404)


STATE = "import wmill\nbefore = wmill.get_state()\nwmill.set_state(1)\nshow(before)"
TS_STATE = "const before = await named.getState(); await named.setState(1); show(before);"


async def test_a_database_in_trouble_is_waited_for_and_then_the_job_keeps_nothing(tmp_path: Path) -> None:
    """The longest that a read waits is a minute; meanwhile all versions ask for everything at once."""
    async with windmill.place(tmp_path, windmill.CONFIG.replace('"100s"', '"590s"')) as here:
        await here.api("POST", "resources/create", {"path": "u/me/s", "value": "precious", "resource_type": "state"})
        env = await here.job()
        with closing(sqlite3.connect(here.where / "watcher.db", isolation_level=None, timeout=30)) as db:
            for table in ("resource", "variable"):
                db.execute(f"ALTER TABLE {table} RENAME TO {table}_away")
            pythons = [by_python(version, env, TOGETHER) for version in PYTHON]
            everybody = await asyncio.gather(*pythons, *(by_deno(version, env, TS_TOGETHER) for version in TYPESCRIPT))
            for table in ("resource", "variable"):
                db.execute(f"ALTER TABLE {table}_away RENAME TO {table}")
        for version, found in zip((*PYTHON, *TYPESCRIPT), everybody, strict=True):
            assert differs(version, *unreadable(version), found) == {}, version
        ended = await here.let_go([{"id": 1}])
        assert ended["success"] is False
        assert "could not be read" in ended["result"]["error"]["message"]
        assert json.loads(await here.api("GET", "resources/get_value/u/me/s")) == "precious"
        await here.api("GET", f"resources/get/{PATH}", want=404)


def unreadable(version: str) -> tuple[dict[str, tuple[str, Any]], set[str]]:
    """The rows, with what each function gives when resources and variables cannot be read, and what is absent."""
    if version in TYPESCRIPT:
        words = ("Variable", "Resource", "listResource")
        wanted = {name: "Error" if name in TS_WORDS else "503" for name in TS_ROWS}
        return {
            name: (code, wanted[name] if any(word in code for word in words) else ...)
            for name, (code, _) in TS_ROWS.items()
        }, TS_ABSENT[version]
    said = troubled(version, "503" if version == VERSIONS[0] else "ReadTimeout")  # the older wait five seconds
    words = ("variable", "resource", "path=")
    return {
        name: (code, said[name] if any(word in code for word in words) and "run_script" not in code else ...)
        for name, (code, _) in ROWS.items()
    }, ABSENT[version]


async def test_a_client_that_does_not_wait_for_the_database_makes_its_job_fail(here: Place) -> None:
    """The older ones give up after five seconds, and say that there is no state."""
    await here.api("POST", "resources/create", {"path": "u/me/s", "value": "precious", "resource_type": "state"})
    env = await here.job()
    with closing(sqlite3.connect(here.where / "watcher.db", isolation_level=None, timeout=30)) as db:
        db.execute("ALTER TABLE resource RENAME TO away")
        said = await python("1.460.0", "import wmill\nshow(wmill.get_resource('u/me/s', none_if_undefined=True))", env)
        db.execute("ALTER TABLE away RENAME TO resource")
    assert said.value is None
    ended = await here.let_go([{"id": 1}])
    assert ended["success"] is False
    assert "did not wait" in ended["result"]["error"]["message"]


BUNNY = """
[watchers.bunny]
trigger = "./watch.bun.ts"
cron = "0 0 29 2 *"
flow = "sink"
timeout = "100s"
first_run = "all"
"""
BUN = """
import { getState, setState } from "windmill-client";
export async function main() {
  const last: number = (await getState()) ?? 0;
  await setState(last + 1);
  return [{ id: last + 1, bun: typeof Bun }];
}
"""


async def test_bun_runs_what_asks_for_it(tmp_path: Path) -> None:
    path = f"{windmill.bun()}:{os.environ['PATH']}"
    (tmp_path / "watch.bun.ts").write_text(BUN)
    async with windmill.place(tmp_path, windmill.CONFIG + BUNNY, PATH=path, **windmill.network()) as here:
        for _ in range(2):
            id = await here.api("POST", "jobs/run/p/bunny", {})
            await ended(here, id)
        assert json.loads(await here.api("GET", "resources/get_value/f/watch/schedule-f-watchers-bunny")) == 2
        with closing(sqlite3.connect(here.where / "watcher.db")) as db:
            items = [json.loads(payload)["item"] for (payload,) in db.execute("SELECT payload FROM item ORDER BY seq")]
        assert items == [{"id": 1, "bun": "object"}, {"id": 2, "bun": "object"}]


async def ended(here: Place, id: str) -> None:
    """Wait for a job of another process; there is nothing to await."""
    for _ in range(3000):
        maybe = json.loads(await here.api("GET", f"jobs_u/completed/get_result_maybe/{id}"))
        if maybe["completed"]:
            assert maybe["success"], maybe
            return
        await asyncio.sleep(0.05)
    raise AssertionError(here.service.tail())


@pytest.mark.parametrize(
    ("environ", "why"),
    [({"WATCHER_SECRET_KEY": "YW5vdGhlciBzZWNyZXQgb2YgMzIgYnl0ZXMgb2ssLi4="}, "another key"), ({}, "there is no key")],
)
async def test_a_service_without_the_right_key_does_not_start(
    here: Place, environ: Mapping[str, str], why: str
) -> None:
    env = await here.job()
    made = "import wmill; wmill.set_variable('u/me/secret', 's3cr3t-s3cr3t', is_secret=True); show(1)"
    assert (await python(NEWEST, made, env)).value == 1
    here.service.kill()
    here.service.environ = {"FIXED_TOKEN": "x" * 10, **environ}
    here.service.start()
    assert await here.service.ended() != 0
    assert why in here.service.tail()
