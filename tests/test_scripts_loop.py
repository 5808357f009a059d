"""Built-ins in the service's own loop, and which file is run where."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.scripts import FakeHost, write
from watcher.errors import TriggerError
from watcher.scripts import Call, Scripts, builtins, locate
from watcher.values import Response, ScriptSettings

LISTS = '''
    """Things of a site."""
    import os
    from watcher import http, trigger

    @trigger(key="id", loop=True)
    async def main(url: str):
        page = await http.get(url)
        return [{**item, "pid": os.getpid()} for item in page.json()]
'''


@pytest.fixture
async def scripts(tmp_path: Path) -> AsyncIterator[Scripts]:
    (tmp_path / "triggers").mkdir()
    scripts = Scripts(ScriptSettings(max_items=1000), triggers=tmp_path / "triggers")
    yield scripts
    await scripts.close()


def built_in(tmp_path: Path, text: str, name: str = "site.py") -> Path:
    return write(tmp_path / "triggers", text, name)


HOST = {"http://a/": Response(200, {}, b'[{"id": 1}, {"id": 2}]', "http://a/")}


async def test_a_built_in_that_asks_for_it_runs_in_the_loop(scripts: Scripts, tmp_path: Path) -> None:
    import os

    script = built_in(tmp_path, LISTS)
    listing = await scripts.call(Call(script, {"url": "http://a/"}), FakeHost(HOST))
    assert [entry.key for entry in listing.entries] == ["1", "2"]
    assert listing.entries[0].item["pid"] == os.getpid()
    described = await scripts.describe(script)
    assert (described.doc, described.label.loop) == ("Things of a site.", True)
    assert list(described.arguments_schema["properties"]) == ["url"]


async def test_anybody_else_s_script_runs_in_a_worker(scripts: Scripts, tmp_path: Path) -> None:
    import os

    script = write(tmp_path, LISTS)
    listing = await scripts.call(Call(script, {"url": "http://a/"}), FakeHost(HOST))
    assert listing.entries[0].item["pid"] != os.getpid()


async def test_a_built_in_that_blocks_runs_in_a_worker(scripts: Scripts, tmp_path: Path) -> None:
    import os

    script = built_in(tmp_path, "import os\ndef main(): return [{'id': os.getpid()}]\n")
    listing = await scripts.call(Call(script), FakeHost())
    assert listing.entries[0].key != str(os.getpid())


async def test_a_slow_source_ends_at_the_timeout(scripts: Scripts, tmp_path: Path) -> None:
    script = built_in(tmp_path, LISTS)
    call = Call(script, {"url": "http://a/"}, timeout=timedelta(seconds=0.1))
    with pytest.raises(TriggerError, match=r"within 0\.1 s") as caught:
        await scripts.call(call, FakeHost(HOST, delay=5))
    assert caught.value.kind == "timeout"


async def test_errors_in_the_loop_are_told_like_those_of_a_worker(scripts: Scripts, tmp_path: Path) -> None:
    script = built_in(tmp_path, LISTS)
    with pytest.raises(TriggerError, match="refused") as caught:
        await scripts.call(Call(script, {"url": "http://down/"}), FakeHost())
    assert caught.value.kind == "unreachable"
    assert "page = await http.get(url)" in caught.value.detail
    with pytest.raises(TriggerError, match="url is missing"):
        await scripts.call(Call(script), FakeHost())
    with pytest.raises(TriggerError, match="did you mean url"):
        await scripts.check(script, {"urll": "x"})


async def test_pages_state_and_unchanged_in_the_loop(scripts: Scripts, tmp_path: Path) -> None:
    script = built_in(
        tmp_path,
        """
        from watcher import get_state, http, set_state, trigger

        @trigger(key="id", cursor="id", loop=True)
        async def main(since: int | None = None):
            set_state((get_state() or 0) + 1)
            if since == 99:
                await http.get("http://same/", stop_if_unchanged=True)
            for page in range(100):
                yield [{"id": page * 10 + n} for n in range(10)]
        """,
    )
    host = FakeHost(enough=2)
    listing = await scripts.call(Call(script, state=4), host)
    assert ([len(page) for page in host.pages], listing.complete, listing.state) == ([10, 10], False, 5)
    capped = await scripts.call(Call(script), FakeHost(enough=10_000))
    assert (len(capped.entries), capped.complete) == (1000, False)
    same = await scripts.call(
        Call(script, since=99), FakeHost({"http://same/": Response(304, {}, b"", "http://same/")})
    )
    assert (same.unchanged, same.entries) == (True, ())


async def test_two_watchers_of_one_built_in_keep_their_contexts_apart(scripts: Scripts, tmp_path: Path) -> None:
    script = built_in(
        tmp_path,
        """
        import asyncio
        from watcher import get_state_path, trigger

        @trigger(key="id", loop=True)
        async def main():
            await asyncio.sleep(0.01)
            return [{"id": get_state_path()}]
        """,
    )
    listings = await asyncio.gather(*(scripts.call(Call(script, state_path=str(n)), FakeHost()) for n in range(20)))
    assert [listing.entries[0].key for listing in listings] == [str(n) for n in range(20)]


async def test_an_edited_built_in_is_loaded_anew(scripts: Scripts, tmp_path: Path) -> None:
    text = "from watcher import trigger\n@trigger(loop=True)\nasync def main(): return [{}]\n"
    script = built_in(tmp_path, text)
    assert len((await scripts.call(Call(script), FakeHost())).entries) == 1
    built_in(tmp_path, text.replace("[{}]", "[{}, {'a': 1}]"))
    assert len((await scripts.call(Call(script), FakeHost())).entries) == 2


@pytest.mark.parametrize("ask", ["get_resource('a')", "get_variable('a')", "http.sync.get('http://a/')"])
async def test_nothing_may_block_the_loop(scripts: Scripts, tmp_path: Path, ask: str) -> None:
    script = built_in(
        tmp_path,
        f"""
        from watcher import get_resource, get_variable, http, trigger
        @trigger(loop=True)
        async def main(): {ask}
        """,
    )
    with pytest.raises(TriggerError, match="in the loop"):
        await scripts.call(Call(script), FakeHost(HOST))


async def test_a_trigger_in_the_loop_is_no_step(scripts: Scripts, tmp_path: Path) -> None:
    with pytest.raises(TriggerError, match="no step of a flow"):
        await scripts.step(built_in(tmp_path, LISTS), {}, host=FakeHost())


async def test_a_file_that_nothing_can_run_says_so(scripts: Scripts, tmp_path: Path) -> None:
    with pytest.raises(TriggerError, match=r"nothing here can run it"):
        await scripts.call(Call(write(tmp_path, "", "a.sh")), FakeHost())


def test_triggers_are_found_by_name_or_by_path(tmp_path: Path) -> None:
    (tmp_path / "triggers").mkdir()
    site = built_in(tmp_path, "", "site.py")
    own = write(tmp_path, "", "mine.py")
    assert locate("site", tmp_path, tmp_path / "triggers") == site
    assert locate("./mine.py", tmp_path, tmp_path / "triggers") == own
    assert locate("mine.py", tmp_path, tmp_path / "triggers") == own
    with pytest.raises(TriggerError, match=r"no such trigger: sitr \(did you mean site\?\)"):
        locate("sitr", tmp_path, tmp_path / "triggers")
    with pytest.raises(TriggerError, match=r"did you mean .*/mine\.py\?"):
        locate("./min.py", tmp_path, tmp_path / "triggers")
    with pytest.raises(TriggerError, match=r"there are site; a file is \./other\.py"):
        locate("other", tmp_path, tmp_path / "triggers")


def test_the_built_ins_come_with_the_package() -> None:
    assert builtins().name == "triggers"
    assert builtins().is_dir()
