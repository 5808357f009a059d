"""Scripts that behave: the styles, what they are given, what they may reach, how their pages are pulled."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

from tests.support.scripts import FakeHost, write
from watcher.errors import TriggerError
from watcher.scripts import Call, Scripts
from watcher.values import UNSET, Response, ScriptSettings


@pytest.fixture
async def scripts() -> AsyncIterator[Scripts]:
    scripts = Scripts(ScriptSettings(workers=4, environment=("SHOWN",)))
    yield scripts
    await scripts.close()


# --- styles ---


async def test_a_listing_has_keys(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        '''
        """Things."""
        from watcher import trigger

        @trigger(key="objectID", on=("new", "changed"))
        def main():
            return [{"objectID": 7, "at": 1}, {"objectID": "a"}, {"title": "no key"}]
        ''',
    )
    listing = await scripts.call(Call(script), FakeHost())
    assert [entry.key for entry in listing.entries] == ["7", "a", None]
    assert (listing.label.style, listing.label.key, listing.label.on) == ("listing", "objectID", ("new", "changed"))
    assert listing.complete
    assert listing.state is UNSET
    described = await scripts.describe(script)
    assert (described.doc, described.style, described.label.doc) == ("Things.", "listing", "Things.")


async def test_a_cursor_script_is_given_since(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        from watcher import trigger

        @trigger(key="id", cursor="at", lookback="15m")
        def main(since: str | None):
            return [{"id": 1, "at": since}, {"id": 2, "at": 3.5}]
        """,
    )
    first = await scripts.call(Call(script), FakeHost())
    assert [entry.cursor for entry in first.entries] == [None, 3.5]
    then = await scripts.call(Call(script, since="2026-01-01T00:00:00Z"), FakeHost())
    assert then.entries[0].cursor == "2026-01-01T00:00:00Z"
    assert (then.label.style, then.label.cursor, then.label.lookback) == ("cursor", "at", "15m")
    described = await scripts.describe(script)
    assert described.takes_since
    assert described.arguments_schema["properties"] == {}


async def test_a_windmill_script_keeps_its_state_by_itself(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        from watcher import get_state, get_state_path, set_state

        def main(table: str):
            last = get_state() or 0
            set_state(last + 2)
            assert get_state() == last + 2
            return [{"id": n, "table": table, "path": get_state_path()} for n in range(last, last + 2)]
        """,
    )
    first = await scripts.call(Call(script, {"table": "t"}, state_path="f/a/user"), FakeHost())
    assert (first.state, first.label.style) == (2, "windmill")
    second = await scripts.call(Call(script, {"table": "t"}, state=2), FakeHost())
    assert [entry.key for entry in second.entries] == ["2", "3"]
    assert first.entries[0].item["path"] == "f/a/user"


async def test_a_windmill_script_that_returns_none_found_nothing(scripts: Scripts, tmp_path: Path) -> None:
    listing = await scripts.call(Call(write(tmp_path, "def main(): pass")), FakeHost())
    assert listing.entries == []


async def test_a_windmill_script_may_tell_one_thing_in_words(scripts: Scripts, tmp_path: Path) -> None:
    listing = await scripts.call(Call(write(tmp_path, "def main(): return 'it rose'")), FakeHost())
    assert [entry.item for entry in listing.entries] == ["it rose"]


async def test_a_listing_that_forgot_to_return_is_no_empty_source(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "from watcher import trigger\n@trigger(key='id')\ndef main(): pass\n")
    with pytest.raises(TriggerError, match="main returned None, not a list"):
        await scripts.call(Call(script), FakeHost())


async def test_keys_and_cursors_may_be_callables(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        from watcher import trigger

        @trigger(key=lambda item: (item["repo"], item["n"]), cursor=lambda item: item["n"] * 2)
        def main():
            return [{"repo": "a", "n": 1}]
        """,
    )
    listing = await scripts.call(Call(script), FakeHost())
    assert (listing.entries[0].key, listing.entries[0].cursor) == ('["a",1]', 2)
    assert (listing.label.style, listing.label.key) == ("cursor", None)


async def test_the_watcher_s_key_comes_before_the_label_s(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "from watcher import trigger\n@trigger(key='id')\ndef main(): return [{'id': 1, 'a': {'b': 2}, 'c': 3}]\n",
    )
    listing = await scripts.call(Call(script, key="a.b", cursor="c"), FakeHost())
    assert (listing.entries[0].key, listing.entries[0].cursor) == ("2", 3)


async def test_a_key_that_no_item_has_is_warned_about(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "from watcher import trigger\n@trigger(key='ID')\ndef main(): return [{'id': 1}]\n")
    listing = await scripts.call(Call(script), FakeHost())
    assert "found in none of 1 items" in listing.warnings[0]


async def test_a_key_that_is_no_jmespath_is_an_error(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "def main(): return [{'id': 1}]\n")
    with pytest.raises(TriggerError, match="is not JMESPath"):
        await scripts.call(Call(script, key="a..b"), FakeHost())


# --- async, generators ---


@pytest.mark.parametrize("how", ["def", "async def"])
async def test_pages_are_pulled_until_all_is_known(scripts: Scripts, tmp_path: Path, how: str) -> None:
    script = write(
        tmp_path,
        f"""
        from watcher import trigger

        @trigger(key="id")
        {how} main():
            try:
                for page in range(1000):
                    print("page", page)
                    yield [{{"id": page * 10 + n}} for n in range(10)]
            finally:
                print("closed")
        """,
    )
    host = FakeHost(enough=3)
    listing = await scripts.call(Call(script), host)
    assert [len(page) for page in host.pages] == [10, 10, 10]
    assert len(listing.entries) == 30
    assert (listing.complete, listing.capped) == (False, False)
    assert listing.logs == "page 0\npage 1\npage 2\nclosed\n"
    assert (await scripts.describe(script)).pages


async def test_single_items_of_a_generator_make_pages(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "def main():\n    for n in range(250): yield {'id': n}\n")
    host = FakeHost()
    listing = await scripts.call(Call(script), host)
    assert [len(page) for page in host.pages] == [100, 100, 50]
    assert (len(listing.entries), listing.complete) == (250, True)


async def test_an_empty_page_does_not_end_the_paging(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "def main():\n    yield []\n    yield [{'id': 1}]\n")
    listing = await scripts.call(Call(script), FakeHost(enough=1))
    assert len(listing.entries) == 1


# --- what they reach ---


async def test_fetches_go_through_the_service(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import asyncio
        from watcher import http

        async def main():
            first, second = await asyncio.gather(http.get("http://a/"), http.get("http://b/", headers={"X-A": "1"}))
            return [{"id": 1, "value": first.json()}, {"id": 2, "size": len(second.body)}]
        """,
    )
    host = FakeHost(
        answers={
            "http://a/": Response(200, {"content-type": "application/json"}, b'{"x":[1]}', "http://a/"),
            "http://b/": Response(200, {}, bytes(range(256)) * 4000, "http://b/"),
        }
    )
    listing = await scripts.call(Call(script), host)
    assert [entry.item for entry in listing.entries] == [{"id": 1, "value": {"x": [1]}}, {"id": 2, "size": 1_024_000}]
    assert host.asked[1].headers["x-a"] == "1"


async def test_a_plain_main_fetches_without_await_and_from_threads(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        from concurrent.futures import ThreadPoolExecutor
        from watcher import http

        def main():
            with ThreadPoolExecutor(8) as threads:
                answers = threads.map(lambda n: http.sync.get("http://a/").status, range(100))
                return [{"id": n, "status": status} for n, status in enumerate(answers)]
        """,
    )
    host = FakeHost(answers={"http://a/": Response(200, {}, b"", "http://a/")})
    listing = await scripts.call(Call(script), host)
    assert [entry.item["status"] for entry in listing.entries] == [200] * 100


async def test_a_source_that_is_down_keeps_its_kind(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "from watcher import http\nasync def main(): await http.get('http://down/')\n")
    with pytest.raises(TriggerError, match="http://down/: refused") as caught:
        await scripts.call(Call(script), FakeHost())
    assert (caught.value.kind, caught.value.retry_after) == ("unreachable", 7.5)
    assert "await http.get('http://down/')" in caught.value.detail


async def test_a_script_may_catch_what_a_source_answers(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        from watcher import http

        async def main():
            try:
                await http.get("http://down/")
            except Exception as error:
                return [{"id": error.kind}]
        """,
    )
    listing = await scripts.call(Call(script), FakeHost())
    assert listing.entries[0].key == "unreachable"


async def test_an_unchanged_source_ends_the_run(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "from watcher import http\nasync def main(): await http.get('http://a/', stop_if_unchanged=True)\n",
    )
    host = FakeHost(answers={"http://a/": Response(304, {}, b"", "http://a/")})
    listing = await scripts.call(Call(script), host)
    assert (listing.unchanged, listing.entries) == (True, [])
    assert host.options[0].stop_if_unchanged


async def test_resources_and_variables(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        from watcher import get_resource, get_variable

        async def main():
            return [{"id": get_resource("$res:u/a/db")["host"] + get_variable("u/a/token")}]
        """,
    )
    host = FakeHost(resources={"u/a/db": {"host": "h"}}, variables={"u/a/token": "t"})
    assert (await scripts.call(Call(script), host)).entries[0].key == "ht"


async def test_a_resource_may_be_awaited_as_everything_else_in_an_async_main(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import json
        from watcher import get_resource

        async def main():
            found = await get_resource("u/a/db")
            return [{"id": json.dumps(found), "host": found["host"]}]
        """,
    )
    host = FakeHost(resources={"u/a/db": {"host": "h"}})
    assert [entry.item for entry in (await scripts.call(Call(script), host)).entries] == [
        {"id": '{"host": "h"}', "host": "h"}
    ]


async def test_the_state_of_another_path_is_read_as_a_resource(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        from watcher import get_state
        def main(): return [{"id": get_state("f/other")}, {"id": get_state("f/none") or "none"}]
        """,
    )
    listing = await scripts.call(Call(script, state_path="f/own"), FakeHost(resources={"f/other": "theirs"}))
    assert [entry.key for entry in listing.entries] == ["theirs", "none"]


async def test_nothing_can_be_asked_while_a_script_is_described(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "from watcher import get_variable\nX = get_variable('a')\ndef main(): return []\n")
    with pytest.raises(TriggerError, match="only be called by a script that watcher runs"):
        await scripts.describe(script)


async def test_windmill_s_variables_are_there_for_one_run(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIDDEN", "secret")
    script = write(
        tmp_path,
        """
        import os
        def main():
            os.environ["LEFT"] = "over"
            os.chdir("/")
            names = ("WM_TOKEN", "WM_STATE_PATH", "HIDDEN", "LEFT_BEFORE")
            return [{"id": 1, **{name: os.environ.get(name) for name in names}}]
        """,
    )
    env = {"WM_TOKEN": "t1", "WM_STATE_PATH": "p"}
    first = (await scripts.call(Call(script, env=env), FakeHost())).entries[0].item
    assert first == {"id": 1, "WM_TOKEN": "t1", "WM_STATE_PATH": "p", "HIDDEN": None, "LEFT_BEFORE": None}
    check = write(tmp_path, "import os\ndef main(): return [{'id': 1, 'env': dict(os.environ), 'cwd': os.getcwd()}]\n")
    for _ in range(2):
        item = (await scripts.call(Call(check), FakeHost())).entries[0].item
        assert not {"WM_TOKEN", "LEFT", "HIDDEN"} & set(item["env"])
        assert item["cwd"] == os.getcwd()


async def test_no_file_of_the_service_is_inherited(scripts: Scripts, tmp_path: Path) -> None:
    secret = os.open(write(tmp_path, "secret", "secret.txt"), os.O_RDONLY)
    os.set_inheritable(secret, True)
    script = write(
        tmp_path,
        """
        import os, subprocess
        def main():
            links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
            names = [os.readlink(link) for link in links if os.path.lexists(link)]
            child = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True).stdout
            return [{"id": 1, "own": names, "child": child}]
        """,
    )
    try:
        item = (await scripts.call(Call(script), FakeHost())).entries[0].item
    finally:
        os.close(secret)
    assert "secret.txt" not in str(item)
    assert "socket" not in item["child"]


async def test_a_script_imports_its_neighbours_and_sees_their_edits(scripts: Scripts, tmp_path: Path) -> None:
    write(tmp_path, "NUMBER = 1\n", "neighbour.py")
    write(tmp_path, "raise ImportError('shadows the standard library')\n", "csv.py")
    script = write(tmp_path, "import csv, neighbour\ndef main(): return [{'id': neighbour.NUMBER}]\n")
    assert (await scripts.call(Call(script), FakeHost())).entries[0].key == "1"
    write(tmp_path, "NUMBER = 2000\n", "neighbour.py")
    assert (await scripts.call(Call(script), FakeHost())).entries[0].key == "2000"
    assert not (tmp_path / "__pycache__").exists()


async def test_dates_numbers_and_rows_become_json(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        from dataclasses import dataclass
        from datetime import date, datetime, timezone
        from decimal import Decimal
        from pathlib import Path
        from uuid import UUID

        @dataclass
        class Row:
            id: int
            at: date

        def main():
            return [
                Row(1, date(2026, 1, 2)),
                {"id": UUID(int=5), "at": datetime(2026, 1, 2, tzinfo=timezone.utc), "n": Decimal("1.10")},
                {"id": "\\ud800", "path": Path("/a"), "row": (1, 2), 3: None},
            ]
        """,
    )
    first, second, third = (entry.item for entry in (await scripts.call(Call(script), FakeHost())).entries)
    assert first == {"id": 1, "at": "2026-01-02"}
    assert second == {"id": str(UUID(int=5)), "at": "2026-01-02T00:00:00+00:00", "n": "1.10"}
    assert third == {"id": "\ud800", "path": "/a", "row": [1, 2], "3": None}


# --- steps ---


async def test_a_step_returns_any_value_and_works_in_its_folder(scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "job" / "shared").mkdir(parents=True)
    step = write(
        tmp_path,
        """
        import os
        def main(item: dict, note: str = "none"):
            open("shared/file", "w").write(item["title"])
            print("wrote", os.environ["WM_JOB_ID"])
            return {"length": len(item["title"]), "note": note}
        """,
    )
    done = await scripts.step(
        step, {"item": {"title": "abc"}, "other": 1}, cwd=tmp_path / "job", env={"WM_JOB_ID": "j1"}, host=FakeHost()
    )
    assert (done.result, done.logs) == ({"length": 3, "note": "none"}, "wrote j1\n")
    assert (tmp_path / "job/shared/file").read_text() == "abc"


@pytest.mark.parametrize(("value", "result"), [([1, 2], [1, 2]), (None, None), ({"a": 1}, {"a": 1}), ("text", "text")])
async def test_a_step_with_one_argument_takes_the_whole_value(
    scripts: Scripts, tmp_path: Path, value: object, result: object
) -> None:
    step = write(tmp_path, "async def main(previous): return previous\n")
    assert (await scripts.step(step, value, host=FakeHost())).result == result


async def test_a_step_that_hangs_is_stopped(scripts: Scripts, tmp_path: Path) -> None:
    step = write(tmp_path, "import time\ndef main(): time.sleep(300)\n")
    with pytest.raises(TriggerError) as caught:
        await scripts.step(step, {}, timeout=timedelta(seconds=0.5), host=FakeHost())
    assert caught.value.kind == "timeout"


async def test_a_step_that_sets_a_state_hears_that_it_would_be_lost(scripts: Scripts, tmp_path: Path) -> None:
    step = write(tmp_path, "from watcher import set_state\ndef main(): set_state(1)\n")
    with pytest.raises(TriggerError, match="a step of a flow keeps no state"):
        await scripts.step(step, {}, host=FakeHost())


async def test_a_package_in_an_environment_below_the_script_is_imported_once(scripts: Scripts, tmp_path: Path) -> None:
    site = tmp_path / ".venv" / "site-packages"
    (site / "package").mkdir(parents=True)
    write(site / "package", f"open({str(tmp_path / 'imported')!r}, 'a').write('x')\n", "__init__.py")
    script = write(
        tmp_path,
        f"""
        import sys
        sys.path.append({str(site)!r})
        import package
        def main(): return []
        """,
    )
    for _ in range(3):
        await scripts.call(Call(script), FakeHost())
    assert (tmp_path / "imported").read_text() == "x"
