"""Python scripts with packages of their own: what they say that they need, and environments made by the real uv."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.scripts import FakeHost, write
from watcher.errors import TriggerError
from watcher.scripts import Call, Scripts, environments
from watcher.scripts.dependencies import Needs, needs
from watcher.values import ScriptSettings

LIBRARY = """
    # /// script
    # requires-python = ">=3.11"
    # dependencies = ["idna==3.10"]
    # ///
    import idna
    from watcher import get_resource, trigger

    @trigger(key="a.key")
    def main(n: int, names: list[str] = [], since_when: str | None = None):
        return [{"a": {"key": n}, "version": idna.__version__, "names": names, "file": idna.__file__}]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all tests here: uv fetches each package once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
async def scripts(data: Path) -> AsyncIterator[Scripts]:
    found = Scripts(ScriptSettings(workers=2), data=data)
    yield found
    await found.close()


# --- what a script says


def asked(tmp_path: Path, text: str) -> Needs | None:
    return needs(tmp_path / "script.py", text)


def test_a_script_that_says_nothing_needs_nothing(tmp_path: Path) -> None:
    assert asked(tmp_path, "import requests\n") is None


def test_metadata_is_taken_as_it_is_written(tmp_path: Path) -> None:
    text = '# /// script\n# dependencies = [\n#   "httpx<1",\n# ]\n#\n# [tool.uv]\n# offline = true\n# ///\n'
    found = asked(tmp_path, text)
    assert found
    assert found.metadata == 'dependencies = [\n  "httpx<1",\n]\n\n[tool.uv]\noffline = true'


@pytest.mark.parametrize("bad", ['dependencies = ["a"', 'dependencies = "a"', "dependencies = [1]"])
def test_metadata_that_cannot_be_read_is_an_error(tmp_path: Path, bad: str) -> None:
    with pytest.raises(TriggerError, match="metadata"):
        asked(tmp_path, f"# /// script\n# {bad}\n# ///\n")


def test_windmills_requirements_replace_the_imports(tmp_path: Path) -> None:
    found = asked(tmp_path, "#requirements:\n#idna==3.10\n#rich[jupyter]>=13\n\nimport yaml\nimport wmill\n")
    assert found == Needs('dependencies = ["idna==3.10", "rich[jupyter]>=13"]')


def test_windmills_extra_requirements_come_on_top_of_the_imports(tmp_path: Path) -> None:
    text = "# extra_requirements:\n# requests==2.32.3\n\nimport json\nimport requests\nimport yaml\nimport wmill\n"
    found = asked(tmp_path, text)
    assert found == Needs('dependencies = ["pyyaml", "wmill", "requests==2.32.3"]')


@pytest.mark.parametrize(
    ("comment", "range_"), [("# py311", "==3.11.*"), ("#py: >=3.11,<4", ">=3.11,<4"), ("#py: 3.12", "==3.12.*")]
)
def test_windmills_choice_of_python(tmp_path: Path, comment: str, range_: str) -> None:
    found = asked(tmp_path, f"{comment}\n#requirements:\n#idna\n\nimport idna\n")
    assert found == Needs(f'requires-python = "{range_}"\ndependencies = ["idna"]')


def test_a_windmill_script_gets_what_it_imports(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("")
    found = asked(tmp_path, "import os, bs4, helper\nfrom no_such_module_here.x import y\nimport wmill\n")
    assert found == Needs('dependencies = ["beautifulsoup4", "no_such_module_here", "wmill"]')


def test_a_windmill_script_whose_imports_are_all_there_runs_in_the_service_s_own(tmp_path: Path) -> None:
    (tmp_path / "wmill.py").write_text("")
    assert asked(tmp_path, "import httpx\nimport wmill\n") is None


def test_a_lock_beside_the_script_is_used(tmp_path: Path) -> None:
    (tmp_path / "script.script.lock").write_text("# py: 3.11\nwmill==1.500.0\n")
    found = asked(tmp_path, "import no_such_module_here\nimport wmill\n")
    assert found
    assert found.pinned == "# py: 3.11\nwmill==1.500.0\n"


# --- environments


async def test_a_script_runs_in_an_environment_of_its_own(scripts: Scripts, tmp_path: Path, data: Path) -> None:
    script = write(tmp_path, LIBRARY)
    listing = await scripts.call(Call(script, {"n": 3}), FakeHost())
    item = listing.entries[0].item
    assert (listing.entries[0].key, item["version"]) == ("3", "3.10")
    assert item["file"].startswith(str(data))
    assert list(tmp_path.iterdir()) == [script]  # nothing was written beside it
    (lock,) = data.glob("scripts/python/*/script.py.lock")
    assert "idna" in lock.read_text()


async def test_its_arguments_are_checked_without_pydantic(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, LIBRARY)
    described = await scripts.describe(script)
    assert described.arguments_schema["properties"]["names"] == {
        "type": "array",
        "items": {"type": "string"},
        "default": [],
    }
    assert described.arguments_schema["required"] == ["n"]
    with pytest.raises(TriggerError, match=r"n: input .* an integer; names\.1: .* string; nam: .*did you mean names"):
        await scripts.check(script, {"n": "x", "names": ["a", 1], "nam": 1})


async def test_from_then_on_no_uv_is_needed(scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = write(tmp_path, LIBRARY)
    await scripts.call(Call(script, {"n": 3}), FakeHost())
    monkeypatch.setattr(environments, "find_uv", lambda: None)
    again = Scripts(ScriptSettings(workers=1), data=data_of(scripts))
    try:
        assert (await again.call(Call(script, {"n": 4}), FakeHost())).entries[0].key == "4"
    finally:
        await again.close()


async def test_an_environment_that_was_deleted_is_made_again_offline(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = write(tmp_path, LIBRARY)
    await scripts.call(Call(script, {"n": 3}), FakeHost())
    for ready in data_of(scripts).glob("scripts/python/*/ready"):
        ready.unlink()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody is there
    assert (await scripts.call(Call(script, {"n": 5}), FakeHost())).entries[0].key == "5"


async def test_a_package_that_does_not_exist_is_told_at_the_check(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, '# /// script\n# dependencies = ["idna==0.0.0.1"]\n# ///\ndef main(): return []\n')
    with pytest.raises(TriggerError, match=r"script\.py: uv lock") as caught:
        await scripts.describe(script)
    assert "idna==0.0.0.1" in caught.value.detail


async def test_without_uv_the_check_says_what_to_install(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "find_uv", lambda: None)
    script = write(tmp_path, '# /// script\n# dependencies = ["six"]\n# ///\ndef main(): return []\n')
    with pytest.raises(TriggerError, match=r"install change-watcher\[scripts\]"):
        await scripts.describe(script)


async def test_a_script_of_its_own_environment_is_killed_like_any_other(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path, LIBRARY.replace("        return [", "        import time; time.sleep(60)\n        return [")
    )
    with pytest.raises(TriggerError, match="did not finish") as caught:
        await scripts.call(Call(script, {"n": 3}, timeout=timedelta(seconds=2)), FakeHost())
    assert caught.value.kind == "timeout"


async def test_another_installation_of_watcher_is_not_the_one_that_a_worker_loads(
    scripts: Scripts, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "watcher"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    (tmp_path / "json.py").write_text("raise RuntimeError('not the standard library')")
    script = write(tmp_path, "import json, watcher\ndef main(): return [{'id': watcher.__file__}]\n")
    listing = await scripts.call(Call(script), FakeHost())
    assert Path(listing.entries[0].item["id"]).parent == Path(environments.__file__).parent.parent


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give something away")
async def test_what_root_made_belongs_to_the_service_s_user(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    os.chown(data, 12345, 12345)
    found = Scripts(ScriptSettings(workers=1), data=data)
    try:
        await found.describe(write(tmp_path, "# /// script\n# dependencies = []\n# ///\ndef main(): return []\n"))
    finally:
        await found.close()
    assert {path.lstat().st_uid for path in data.rglob("*")} == {12345}


def data_of(scripts: Scripts) -> Path:
    return scripts._environments._folder.parent


def test_this_python_is_the_one_that_environments_are_made_from() -> None:
    assert os.access(sys.executable, os.X_OK)
    assert environments.find_uv()
