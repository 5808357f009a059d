"""Function by function: resources, variables, jobs and users by Windmill's own clients, and their errors."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support import windmill
from tests.support.windmill import NEWEST, VERSIONS, Place, node, on_deno, python


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Place]:
    async with windmill.place(tmp_path) as found:
        yield found


RESOURCES = """
import re, wmill
def failure(work):
    try: work()
    except Exception as error: return re.search(r": (\\d+), ", str(error))[1]
wmill.set_variable("u/me/token", "s3cr3t-s3cr3t", is_secret=True)
wmill.set_variable("u/me/plain", "one"); wmill.set_variable("u/me/plain", "two")
wmill.set_resource(value={"token": "$var:u/me/token"}, path="u/me/github", resource_type="github")
wmill.set_resource(value={"inner": "$res:u/me/github", "n": [{"deep": ["$var:u/me/plain"]}]}, path="u/me/outer",
                   resource_type="any")
c = wmill.Windmill()
show([
    wmill.get_variable("u/me/token"), wmill.get_variable("u/me/plain"), wmill.get_variable("u/admin/fixed"),
    wmill.get_resource("u/me/outer"), wmill.get_resource("$res:u/me/github"), wmill.get_resource("u/admin/fixed"),
    wmill.get_resource("u/none", none_if_undefined=True),
    failure(lambda: wmill.get_resource("u/none")), failure(lambda: wmill.get_variable("u/none")),
    failure(lambda: wmill.set_resource(value={"token": 5}, path="u/me/bad", resource_type="github")),
    failure(lambda: wmill.set_resource(value={}, path="u/me/github", resource_type="github")),
])
"""


@pytest.mark.parametrize("version", VERSIONS)
async def test_resources_and_variables_in_python(here: Place, version: str) -> None:
    env = await here.job()
    token = {"token": "s3cr3t-s3cr3t"}
    assert (await python(version, RESOURCES, env)).value == [
        "s3cr3t-s3cr3t", "two", "written in the file",
        {"inner": token, "n": [{"deep": ["two"]}]}, token, {"token": "ghp_fixed_fixed"},
        None, "404", "404", "400", "400",
    ]  # fmt: skip
    await here.let_go()
    with closing(sqlite3.connect(here.where / "watcher.db")) as db:
        stored = dict(db.execute("SELECT path, value FROM variable"))
        read = db.execute("SELECT count(*) FROM audit WHERE action = 'variables.decrypt_secret'").fetchone()[0]
    assert stored["u/me/token"].startswith("v1:")
    assert read == 1  # once for the job
    assert "s3cr3t-s3cr3t" not in (here.where / "service.log").read_text()


SCRIPT = """
await named.setVariable("u/me/token", "s3cr3t-s3cr3t", true, "of me");
await named.setVariable("u/me/token", "s3cr3t-again");
await named.setResource({token: "$var:u/me/token"}, "u/me/github", "github");
await named.setResource({token: "x", more: "$var:u/me/token"}, "u/me/github");
const {ResourceService, JobService, UserService, SettingsService, VariableService} = named;
const id = await named.runFlowAsync("add", {a: 2, b: 3});
const root = await named.getRootJobId(id);
await named.setProgress(40); await named.setFlowUserState("k", {v: 1});
show([
    await named.getVariable("u/me/token"), await named.getResource("u/me/github"),
    (await VariableService.getVariable({workspace: "main", path: "u/me/token"})).is_secret,
    await failure(() => named.setResource(1, "u/me/new")), await failure(() => named.getResource("u/none")),
    await failure(() => named.getVariable("u/none")),
    (await ResourceService.listResource({workspace: "main", resourceType: "github"})).map(r => [r.path, r.value]),
    await named.waitJob(id), root === id, await named.getProgress(), await named.getFlowUserState("k"),
    await named.runScriptByPath("f/tools/double", {n: 21}),
    (await UserService.globalWhoami()).email, (await UserService.whoami({workspace: "main"})).username,
    (await SettingsService.backendVersion()).slice(0, 7), await named.usernameToEmail("me"),
    await failure(() => named.runFlow("broken", {})), (await JobService.getJob({workspace: "main", id})).type,
]);
"""


@pytest.mark.parametrize("runtime", [on_deno, pytest.param(node, marks=pytest.mark.long)])
async def test_resources_variables_and_jobs_in_typescript(here: Place, runtime: Any) -> None:
    said = (await runtime(SCRIPT, await here.job())).value
    await here.let_go()
    assert said[:3] == ["s3cr3t-again", {"token": "x", "more": "s3cr3t-again"}, True]
    assert all(text for text in said[3:6])
    assert said[6] == [["u/admin/fixed", None], ["u/me/github", None]]
    assert said[7:16] == [{"sum": 5}, True, 40, {"v": 1}, 42, "watcher@localhost", "watcher", "watcher", "me@localhost"]
    assert "no such luck" in said[16]
    assert said[17] == "CompletedJob"


JOBS = """
import time, wmill
c = wmill.Windmill()
def failure(work):
    try: work()
    except Exception as error: return str(error)
id = c.run_flow_async("add", {"a": 1, "b": 2})
result = c.wait_job(id)
slow = c.run_flow_async("slow")
while c.get_job_status(slow) == "WAITING": time.sleep(0.05)
seen = [c.get_job_status(slow), len(c.get_job(slow)["id"])]
by_path = getattr(c, "run_script_by_path", None) or (lambda path, args=None: c.run_script(path=path, args=args))
if hasattr(c, "cancel_job"):
    c.cancel_job(slow, "enough")
else:  # older than that
    c.post(f"/w/{c.workspace}/jobs_u/queue/cancel/{slow}", json={"reason": "enough"})
wmill.set_progress(33)
c.set_flow_user_state("k", [1])
later = c.run_flow_async("add", {"a": 1}, scheduled_in_secs=3600)
show([
    result, c.get_result(id), c.get_job_status(id), c.get_root_job_id(id) == id, seen, c.get_job_status(later),
    "Canceled" in failure(lambda: c.wait_job(slow)),
    "no such luck" in failure(lambda: c.wait_job(c.run_flow_async("broken"))),
    by_path("f/tools/double", {"n": 4}), "404" in failure(lambda: c.run_flow_async("none")),
    "404" in failure(lambda: c.wait_job("00000000-0000-0000-0000-000000000000")),
    "404" in failure(lambda: by_path("f/tools/none")),
    wmill.get_progress(), c.get_flow_user_state("k"), c.get_flow_user_state("none"), list(c.cancel_running()),
    c.whoami()["email"] if hasattr(c, "whoami") else c.user["email"], c.version[:7], c.create_token()[:4],
    c.get_root_job_id() == __import__("os").environ["WM_JOB_ID"],
])
"""


@pytest.mark.parametrize("version", [NEWEST, pytest.param("1.460.0", marks=pytest.mark.long)])
async def test_jobs_in_python(here: Place, version: str) -> None:
    said = (await python(version, JOBS, await here.job())).value
    assert said == [
        {"sum": 3}, {"sum": 3}, "COMPLETED", True, ["RUNNING", 36], "WAITING", True, True, 8, True, True, True,
        33, [1], None, [], "watcher@localhost", "watcher", "wtc_", True,
    ]  # fmt: skip
    await here.let_go()


async def test_errors_are_told_as_each_client_tells_them(here: Place) -> None:
    env = await here.job()
    wrong = {**env, "WM_TOKEN": "wtc_wrong"}
    code = """
import re, wmill
def failure(work):
    try: return work()
    except Exception as error: return re.search(r": (\\d+), ", str(error))[1]
show([wmill.get_state(), failure(lambda: wmill.set_state(1)), failure(lambda: wmill.get_variable("u/a")),
      failure(lambda: wmill.get_resource("u/a"))])
"""
    assert (await python(NEWEST, code, wrong)).value == [None, "401", "401", "401"]
    said = (
        await on_deno("show([await failure(() => named.getState()), await failure(() => named.setState(1))])", wrong)
    ).value
    assert all(said)
    elsewhere = {**env, "WM_WORKSPACE": "other"}
    assert (await python(NEWEST, code, elsewhere)).value == [None, "404", "404", "404"]
    assert (await here.let_go([{"id": 1}]))["success"] is True


async def test_tokens_have_scopes_and_give_no_more_than_they_have(here: Place) -> None:
    body = {"label": "hook", "scopes": ["jobs:run:flows:add"], "expiration": "2999-01-01T00:00:00Z"}
    hook = await here.api("POST", "/api/users/tokens/create", body)
    id = await here.api("POST", "jobs/run/f/add", {"a": 1}, token=hook)
    for method, path in (
        ("POST", "jobs/run/f/slow"), ("GET", f"jobs_u/get/{id}"), ("GET", "resources/list"), ("GET", "variables/list"),
        ("POST", "/api/users/tokens/create"), ("GET", "resources/get_value/u/admin/fixed"),
    ):  # fmt: skip
        await here.api(method, path, {} if method == "POST" else None, token=hook, want=403)
    body = {"label": "maker", "scopes": ["users", "resources:write:f/a/*"]}
    maker = await here.api("POST", "/api/users/tokens/create", body)
    for scopes, want in ((["*"], 403), (["resources"], 403), (["resources:read:f/a/b"], 201), ("x", 400), ([1], 400)):
        await here.api("POST", "/api/users/tokens/create", {"label": "", "scopes": scopes}, token=maker, want=want)
    made = {"path": "f/a/r", "value": 1, "resource_type": "any"}
    await here.api("POST", "resources/create", made, token=maker, want=201)
    await here.api("GET", "resources/get/f/a/r", token=maker)
    await here.api("GET", "resources/get/f/aa", token=maker, want=403)
    await here.api("POST", "resources/create", {**made, "path": "f/b/r"}, token=maker, want=403)
    await here.api("DELETE", f"/api/users/tokens/delete/{hook[:10]}")
    await here.api("POST", "jobs/run/f/add", {}, token=hook, want=401)
    await here.api("POST", "/api/users/tokens/create", {"label": "", "expiration": "2001-01-01T00:00:00Z"}, want=400)


async def test_webhooks_wait_for_a_result_and_shape_it(here: Place) -> None:
    (here.where / "add.py").write_text(
        "def main(item):\n    return item.get('give') if isinstance(item, dict) else item\n"
    )
    assert json.loads(await here.api("POST", "jobs/run_wait_result/f/add", {"give": [1]})) == [1]
    await here.api("POST", "jobs/run_wait_result/f/add", {"give": None}, want=204)
    shaped = {"windmill_status_code": 202, "windmill_content_type": "text/csv", "result": "a,b"}
    assert await here.api("POST", "jobs/run_wait_result/f/add", {"give": shaped}, want=202) == "a,b"
    assert "no such luck" in await here.api("POST", "jobs/run_wait_result/f/broken", {}, want=422)
    status, text = await here.service.ask("POST", f"/api/w/main/jobs/run/f/add?token={here.token}", b"{}")
    assert (status, len(text)) == (201, 36)
    assert (await here.service.ask("GET", f"/api/version?token={here.token}"))[0] == 200
    assert (await here.service.ask("GET", "/api/version?token=wrong"))[0] == 401
    await here.api("GET", "s3_proxy/x", want=404)


async def test_webhooks_take_every_body_that_windmills_take(here: Place) -> None:
    (here.where / "add.py").write_text("def main(item):\n    return item\n")
    event = {"specversion": "1.0", "id": "e1", "source": "/s", "type": "t"}
    form = (
        '--b\r\ncontent-disposition: form-data; name="a"\r\n\r\né\r\n'
        '--b\r\ncontent-disposition: form-data; name="doc"; filename="x y.csv"\r\ncontent-type: text/csv\r\n\r\n'
        "1,2\r\n3,4\r\n--b--\r\n"
    )
    wanted: list[tuple[str, str, dict[str, str], Any]] = [
        ("application/json", '{"a": 1}', {}, {"a": 1}),
        ("application/json", "[1]", {}, {"body": [1]}),
        ("application/x-www-form-urlencoded", "a=1&b=x+y&b=", {}, {"a": "1", "b": ["x y", ""]}),
        ("application/x-www-form-urlencoded", '{"a": 1}', {}, {"a": 1}),  # what curl -d says of any body
        ("text/plain", '{"a": 1}', {}, {"raw_string": '{"a": 1}'}),
        ("application/cloudevents+json", json.dumps({**event, "data": {"a": 1}}), {},
         {"a": 1, "WEBHOOK__METADATA__": event}),
        ("application/cloudevents+json", json.dumps({**event, "data": [1]}), {},
         {"body": [1], "WEBHOOK__METADATA__": event}),
        ("application/json", '{"a": 1}', {f"ce-{name}": text for name, text in event.items()},
         {"a": 1, "WEBHOOK__METADATA__": event}),
    ]  # fmt: skip
    token = {"authorization": f"Bearer {here.token}"}
    path = "/api/w/main/jobs/run_wait_result/f/add"
    for kind, raw, more, args in wanted:
        status, text = await here.service.ask("POST", path, raw.encode(), {"content-type": kind, **token, **more})
        assert (status, json.loads(text)) == (200, args), kind
    multipart = {"content-type": "multipart/form-data; boundary=b", **token}
    status, text = await here.service.ask("POST", path, form.encode(), multipart)
    assert status == 200, text
    found = json.loads(text)
    assert (found["a"], found["doc"][0]["filename"]) == ("é", "x y.csv")
    key = found["doc"][0]["s3"]
    assert await here.api("GET", f"job_helpers/download_s3_file?file_key={key}") == "1,2\r\n3,4"
    for kind, raw, code in (
        ("multipart/form-data; boundary=c", form, 400),
        ("multipart/form-data", form, 400),
        ("application/cloudevents+json", '{"data": {}}', 400),
        ("application/cloudevents-batch+json", "[]", 415),
        ("application/json", "{", 400),
        ("application/x-www-form-urlencoded", "a&b", 400),
    ):
        assert (await here.service.ask("POST", path, raw.encode(), {"content-type": kind, **token}))[0] == code, kind
    assert "payload" in await here.api("GET", "jobs/run_wait_result/p/f/tools/double?payload=!", want=400)


WITHOUT = """
import re, wmill
def said(work):
    try: work()
    except Exception as error: return re.search(r": (\\d+), (.*)", str(error)).groups()
c = wmill.Windmill()
show([said(lambda: c.get_id_token("aws")), said(c.get_resume_urls),
      said(lambda: c.run_script_by_path_async("f/tools/double", {"n": 1}, retry={"constant": {"attempts": 1}})),
      said(lambda: c.run_inline_script_preview("1", "python3"))])
"""


async def test_what_watcher_has_not_says_so_to_the_client(here: Place) -> None:
    said = (await python(NEWEST, WITHOUT, await here.job())).value
    words = ("OIDC", "approvals", "not retried", "no code out of a request")
    assert [status for status, _ in said] == ["404", "404", "400", "404"]
    assert [word for (_, text), word in zip(said, words, strict=True) if word not in text] == []
    await here.let_go()


async def test_resource_types_are_checked_and_history_is_kept(here: Place) -> None:
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    await here.api("POST", "resources/type/create", {"name": "c_mine", "schema": schema}, want=201)
    await here.api("POST", "resources/type/create", {"name": "c_mine", "schema": schema}, want=400)
    await here.api("POST", "resources/type/create", {"name": "s3", "schema": schema}, want=400)
    await here.api("POST", "resources/type/create", {"name": "bad", "schema": {"type": "nonsense"}}, want=400)
    names = json.loads(await here.api("GET", "resources/type/listnames"))
    assert {"c_mine", "state", "s3", "azure_blob", "postgresql", "mongodb", "mongodb_rest", "redis", "upstash"} <= {
        *names
    }
    mine = {"path": "u/me/m", "resource_type": "c_mine"}
    assert "n" in await here.api("POST", "resources/create", {**mine, "value": {"n": "x"}}, want=400)
    await here.api("POST", "resources/create", {**mine, "value": {"n": 1}}, want=201)
    await here.api("POST", "resources/create", {**mine, "value": {"n": 2}}, want=400)
    await here.api("POST", "resources/create?update_if_exists=true", {**mine, "value": {"n": "$var:u/me/n"}}, want=201)
    await here.api("POST", "resources/update_value/u/me/m", {"value": {}}, want=400)
    await here.api("POST", "resources/update_value/u/me/none", {"value": {}}, want=404)
    history = json.loads(await here.api("GET", "resources/history/u/me/m"))
    assert [each["value"] for each in history] == [{"n": "$var:u/me/n"}, {"n": 1}]
    await here.api("POST", "resources/update/u/me/m", {"path": "u/me/moved", "value": {"n": 3}})
    assert json.loads(await here.api("GET", "resources/exists/u/me/m")) is False
    await here.api("DELETE", "resources/delete/u/me/moved")
    await here.api("GET", "resources/get/u/me/moved", want=404)


async def test_a_resource_type_whose_pattern_takes_for_ever_stops_nobody(here: Place) -> None:
    slow = {"properties": {"a": {"type": "string", "pattern": "^(a+)+$"}, "$ref": {"pattern": "x"}}}
    await here.api("POST", "resources/type/create", {"name": "c_slow", "schema": slow}, want=201)
    made = {"path": "u/me/slow", "resource_type": "c_slow"}
    refused = asyncio.create_task(
        here.api("POST", "resources/create", {**made, "value": {"a": "a" * 60 + "!"}}, want=400)
    )
    answered = 0
    while not refused.done() and answered < 20:
        await here.api("GET", "users/whoami")
        answered += 1
    assert answered == 20
    assert "too long" in await refused
    assert "does not match" in await here.api("POST", "resources/create", {**made, "value": {"a": "b"}}, want=400)
    await here.api("POST", "resources/create", {**made, "value": {"a": "aaa"}}, want=201)
    bad = {"properties": {"a": {"pattern": "("}}}
    await here.api("POST", "resources/type/create", {"name": "c_bad", "schema": bad}, want=400)


async def test_a_resource_that_is_nested_too_deep_to_follow_is_told(here: Place) -> None:
    deep: Any = "$var:u/admin/fixed"
    for _ in range(800):
        deep = [deep]
    made = {"path": "u/me/deep", "resource_type": "any", "value": deep}
    await here.api("POST", "resources/create", made, want=201)
    assert "deep" in await here.api("GET", "resources/get_value_interpolated/u/me/deep", want=400)


async def test_references_that_lead_nowhere_or_in_a_circle_are_no_missing_resource(here: Place) -> None:
    for path, to in (("u/me/a", "u/me/b"), ("u/me/b", "u/me/a"), ("u/me/c", "u/me/none")):
        made = {"path": path, "value": {"x": f"$res:{to}"}, "resource_type": "any"}
        await here.api("POST", "resources/create", made, want=201)
    assert "circle" in await here.api("GET", "resources/get_value_interpolated/u/me/a", want=400)
    assert "none" in await here.api("GET", "resources/get_value_interpolated/u/me/c", want=400)
    assert json.loads(await here.api("GET", "resources/get_value/u/me/c")) == {"x": "$res:u/me/none"}


async def test_circles_and_a_flipped_byte_are_errors_and_never_values_to_the_real_clients(here: Place) -> None:
    env = await here.job()
    made = """
import wmill
for path, value in (("u/me/a", "$res:u/me/b"), ("u/me/b", "$res:u/me/a"), ("u/me/c", "$res:u/me/none")):
    wmill.set_resource(value={"x": value}, path=path, resource_type="any")
wmill.set_variable("u/me/secret", "s3cr3t-s3cr3t", is_secret=True)
show(1)
"""
    assert (await python(NEWEST, made, env)).value == 1
    with closing(sqlite3.connect(here.where / "watcher.db", timeout=30)) as db:
        stored = db.execute("SELECT value FROM variable WHERE path = 'u/me/secret'").fetchone()[0]
        flipped = stored[:-6] + ("A" if stored[-6] != "A" else "B") + stored[-5:]
        db.execute("UPDATE variable SET value = ? WHERE path = 'u/me/secret'", (flipped,))
        db.commit()
    asked = """
import re, wmill
def said(work):
    try: return work()
    except Exception as error: return re.search(r": (\\d+), (.*)", str(error)).groups()
ask = [lambda: wmill.get_resource("u/me/a"), lambda: wmill.get_resource("u/me/c"),
       lambda: wmill.get_variable("u/me/secret")]
show([said(work) for work in ask])
"""
    circle, nowhere, broken = (await python(NEWEST, asked, env)).value
    assert [circle[0], nowhere[0], broken[0]] == ["400", "400", "400"]  # a 404 would be taken for "there is none"
    assert "circle" in circle[1]
    assert "altered" in broken[1]
    ts = """show([await failure(() => named.getResource("u/me/a", true)),
                await failure(() => named.getVariable("u/me/secret"))])"""
    assert all((await on_deno(ts, env)).value)
    await here.let_go()


async def test_a_plan_changes_nothing_even_by_a_client(here: Place) -> None:
    (here.where / "plain.py").write_text(
        "import json, os, urllib.request, urllib.error\n"
        "def ask(path, value):\n"
        "    url = os.environ['BASE_INTERNAL_URL'] + '/api/w/main/' + path\n"
        "    head = {'Authorization': 'Bearer ' + os.environ['WM_TOKEN']}\n"
        "    try: return urllib.request.urlopen(urllib.request.Request(url, json.dumps(value).encode(), head)).status\n"
        "    except urllib.error.HTTPError as error: return error.code\n"
        "def main():\n"
        "    state = {'path': 'u/me/s', 'value': 1, 'resource_type': 'state'}\n"
        "    variable = {'path': 'u/me/v', 'value': 'x'}\n"
        "    return [{'id': 1, 'codes': [ask('resources/create', state), ask('variables/create', variable),\n"
        "                                ask('jobs/run/f/add', {})]}]\n"
    )
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "watcher", "plan", "plain", "--json", "--config", str(here.where / "watcher.toml")],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
        env={"PATH": "/usr/bin:/bin", "HOME": str(here.where), **here.service.environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["items"][0]["payload"]["item"]["codes"] == [201, 403, 403]
    await here.api("GET", "resources/get/u/me/s", want=404)
