"""Moving house: a folder of Windmill's becomes a configuration that works, and what scripts remember comes along."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from watcher.cli import main, moving
from watcher.errors import WatcherError

WATCH = """import wmill


def main(url: str, limit: int = 10):
    last = wmill.get_state() or 0
    wmill.set_state(last)
    return []
"""
FILES = {
    "f/shop/watch.py": WATCH,
    "f/shop/watch.script.yaml": "summary: ''\nkind: trigger\nlock: '!inline f/shop/watch.script.lock'\n",
    "f/shop/watch.script.lock": "# py: 3.11\nwmill==1.500.0\n",
    "f/shop/every5.schedule.yaml": """
schedule: '0 */5 * * * *'
timezone: Europe/Paris
script_path: f/shop/watch
is_flow: false
enabled: true
args:
  url: $res:f/shop/site
  limit: 3
  nothing: null
on_failure: f/shop/tell
""",
    "f/shop/site.resource.yaml": ""
    "resource_type: shop\nvalue: {base: https://shop.example.com, token: $var:f/shop/token}\n",
    "f/shop/shop.resource-type.yaml": ""
    "schema: {type: object, properties: {base: {type: string}}}\ndescription: A shop\n",
    "f/shop/token.variable.yaml": "value: $encrypted:abc\nis_secret: true\ndescription: ''\n",
    "f/shop/region.variable.yaml": "value: eu\nis_secret: false\n",
    "f/shop/watch/schedule-f-shop-every5.resource.yaml": "resource_type: state\nvalue: 41\n",
    "f/shop/stars.flow/flow.yaml": """
summary: Stars
value:
  modules:
    - id: a
      value:
        type: rawscript
        language: deno
        content: '!inline a.inline_script.ts'
        lock: '!inline a.inline_script.lock'
        input_transforms:
          repo: {type: javascript, expr: flow_input.repo}
          page: {type: static, value: 100}
      stop_after_if: {expr: '!result || (Array.isArray(result) && result.length == 0)', skip_if_stopped: true}
    - id: b
      value:
        type: forloopflow
        iterator: {type: javascript, expr: results.a}
        skip_failures: true
        parallel: false
        modules:
          - id: c
            value:
              type: rawscript
              language: python3
              content: '!inline c.inline_script.py'
              input_transforms:
                user: {type: javascript, expr: flow_input.iter.value.user.login}
                greeting: {type: static, value: hello}
          - id: d
            value:
              type: rawscript
              language: python3
              content: '!inline d.inline_script.py'
              input_transforms:
                text: {type: javascript, expr: results.c.text}
                whole: {type: javascript, expr: flow_input.iter.value}
            sleep: {type: static, value: 5}
""",
    "f/shop/stars.flow/a.inline_script.ts": "export async function main(repo: string, page: number) { return []; }\n",
    "f/shop/stars.flow/c.inline_script.py": ""
    "def main(user: str, greeting: str): return {'text': f'{greeting} {user}'}\n",
    "f/shop/stars.flow/d.inline_script.py": "def main(text: str, whole: dict):\n    return [text, whole]\n",
    "f/shop/stars_hourly.schedule.yaml": """
schedule: '0 0 9 * * 2-6'
timezone: UTC
script_path: f/shop/stars
is_flow: true
enabled: false
args: {repo: a/b}
""",
    "f/shop/stars/a_schedule-f-shop-stars_hourly.resource.yaml": "resource_type: state\nvalue: {seen: [1, 2]}\n",
    "f/shop/elsewhere.resource.yaml": "resource_type: state\nvalue: [1]\n",
    "f/shop/odd.schedule.yaml": "schedule: '5/7 * * * * *'\nscript_path: f/shop/watch\nis_flow: false\n",
    "f/shop/go.schedule.yaml": "schedule: '0 0 * * * *'\nscript_path: f/shop/fast\nis_flow: false\n",
    "f/shop/fast.go": "package inner\n",
    "f/shop/fast.script.yaml": "summary: ''\n",
    "f/shop/idle.py": "def main(): return []\n",
    "f/shop/idle.script.yaml": "summary: ''\n",
    "f/shop/broken.schedule.yaml": "schedule: [\n",
    "f/shop/alone.flow/flow.yaml": "summary: ''\nvalue: {modules: []}\n",
    "f/shop/hook.http_trigger.yaml": "script_path: f/shop/idle\n",
    "f/shop/board.app/app.yaml": "summary: ''\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for where, text in FILES.items():
        path = tmp_path / "windmill" / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "windmill"


def left(moved: moving.Moved) -> dict[str, str]:
    return {file: " | ".join(why for other, why in moved.left if other == file) for file, _ in moved.left}


def test_a_schedule_becomes_a_watcher(folder: Path) -> None:
    moved = moving.read(folder)
    assert moved.watchers["every5"] == {
        "trigger": "./f/shop/watch.py",
        "flow": "keep",
        "with": {"url": "$res:f/shop/site", "limit": 3},
        "cron": "*/5 * * * *",
        "timezone": "Europe/Paris",
    }
    assert moved.files["f/shop/watch.py"] == WATCH  # unchanged
    assert moved.files["f/shop/watch.script.lock"].endswith("wmill==1.500.0\n")
    assert moved.states["every5"] == 41
    assert moved.resources["f/shop/site"]["type"] == "shop"
    assert moved.variables == {"f/shop/region": "eu"}
    assert moved.types["shop"][1] == "A shop"
    assert moved.other_states == {"f/shop/elsewhere": [1]}


def test_a_flow_that_watches_becomes_a_trigger_and_a_local_flow(folder: Path) -> None:
    moved = moving.read(folder)
    assert moved.watchers["stars_hourly"] == {
        "trigger": "./f/shop/stars.flow/a.inline_script.ts",
        "with": {"repo": "a/b", "page": 100},
        "flow": "stars",
        "cron": "0 9 * * 1-5",  # Windmill's first cron counted from Sunday as 1
        "timezone": "UTC",
        "enabled": False,
    }
    assert moved.flows["stars"]["at_once"] == 1
    assert [Path(str(step)).name for step in moved.flows["stars"]["steps"]] == [
        "c_arguments.py", "c.inline_script.py", "d_arguments.py", "d.inline_script.py",
    ]  # fmt: skip
    assert moved.states["stars_hourly"] == {"seen": [1, 2]}


def test_the_steps_of_a_flow_get_the_arguments_that_they_had(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = moving.read(folder)
    (tmp_path / "shared").mkdir()
    monkeypatch.chdir(tmp_path)
    value: object = {"user": {"login": "ada"}}
    for step in moved.flows["stars"]["steps"]:
        scope: dict[str, object] = {}
        exec(moved.files[str(step).removeprefix("./")], scope)
        main_ = scope["main"]
        assert callable(main_)
        value = main_(**value) if "inline" in str(step) else main_(value)  # type: ignore[arg-type]
    assert value == ["hello ada", {"user": {"login": "ada"}}]


def test_whatever_could_not_come_along_is_told_with_its_reason(folder: Path) -> None:
    told = left(moving.read(folder))
    assert "watcher variable set f/shop/token --secret" in told["f/shop/token.variable.yaml"]
    assert "on_failure" in told["f/shop/every5.schedule.yaml"]
    assert "sleep of step d" in told["f/shop/stars_hourly.schedule.yaml"]
    assert "finer than a minute" in told["f/shop/odd.schedule.yaml"]
    assert "only Python and TypeScript" in told["f/shop/go.schedule.yaml"]
    assert "not YAML" in told["f/shop/broken.schedule.yaml"]
    assert "no schedule runs it" in told["f/shop/idle.py"]
    assert "no schedule runs it" in told["f/shop/alone.flow/flow.yaml"]
    assert "a webhook starts a flow" in told["f/shop/hook.http_trigger.yaml"]
    assert "apps" in told["f/shop/board.app"]
    assert "f/shop/stars.flow/flow.yaml" not in told


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("expr: results.a", "expr: results.a.rows"), "not over what its first step found"),
        (("expr: results.c.text", "expr: results.c.text.toUpperCase()"), "worked out by"),
        (("content: '!inline c.inline_script.py'", "content: '!inline ../../../../etc/passwd'"), "there is no file"),
        (("language: deno", "language: bash"), "only Python and TypeScript"),
    ],
)
def test_a_flow_that_is_another_pattern_is_left_with_the_reason(
    folder: Path, change: tuple[str, str], why: str
) -> None:
    flow = folder / "f/shop/stars.flow/flow.yaml"
    flow.write_text(flow.read_text().replace(*change))
    moved = moving.read(folder)
    assert "stars_hourly" not in moved.watchers
    assert why in left(moved)["f/shop/stars_hourly.schedule.yaml"]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WatcherError, match="holds nothing of Windmill's"):
        moving.read(tmp_path)
    with pytest.raises(WatcherError, match="is not a folder"):
        moving.read(tmp_path / "nowhere")


def test_the_command_writes_a_configuration_that_checks_and_remembers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Two scripts that need nothing fetched: the runtimes have tests of their own.
    (folder / "f/shop/watch.script.lock").unlink()
    (folder / "f/shop/watch.py").write_text(WATCH.replace("import wmill", "import watcher as wmill"))
    (folder / "f/shop/token.variable.yaml").write_text("value: t\nis_secret: false\n")
    assert main(["import", "windmill", str(folder), "--to", "new", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["watchers"] == ["every5", "stars_hourly"]
    assert done["states"] == 3
    file = tmp_path / "new" / "watcher.toml"
    assert tomllib.loads(file.read_text())["watchers"]["every5"]["with"]["limit"] == 3
    assert file.stat().st_mode & 0o77 == 0
    assert main(["check", "-c", str(file)]) == 0, capsys.readouterr().err
    assert main(["state", "get", "every5", "-c", str(file)]) == 0
    assert "41" in capsys.readouterr().out
    assert main(["import", "windmill", str(folder), "--to", "new"]) == 1  # never over something that is there
