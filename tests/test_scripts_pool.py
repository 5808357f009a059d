"""Many scripts at once: warm workers are used again, replaced in time, and hung ones starve nobody."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.scripts import FakeHost, alive, noted, until, write
from watcher.errors import TriggerError
from watcher.scripts import Call, Scripts, pool
from watcher.values import ScriptSettings

WHO = """
    import os
    calls = 0
    def main():
        global calls
        calls += 1
        return [{"id": os.getpid(), "calls": calls}]
"""
HANGS = """
    import time
    def main():
        time.sleep(300)
"""


@asynccontextmanager
async def running(**settings: int) -> AsyncIterator[Scripts]:
    scripts = Scripts(ScriptSettings(**settings))
    try:
        yield scripts
    finally:
        await scripts.close()


async def pid(scripts: Scripts, script: Path, **rest: object) -> int:
    listing = await scripts.call(Call(script, **rest), FakeHost())  # type: ignore[arg-type]
    assert listing.entries[0].item.get("calls", 1) == 1  # a fresh namespace each time
    return int(listing.entries[0].item["id"])


async def test_a_worker_stays_warm_and_its_namespace_fresh(tmp_path: Path) -> None:
    script = write(tmp_path, WHO)
    async with running() as scripts:
        assert await pid(scripts, script) == await pid(scripts, script)


async def test_an_edited_script_runs_its_new_code_in_the_warm_worker(tmp_path: Path) -> None:
    script = write(tmp_path, WHO)
    async with running() as scripts:
        first = await pid(scripts, script)
        assert (await scripts.describe(script)).doc == ""
        write(tmp_path, '"""Now with a doc."""\n' + "import os\ndef main(): return [{'id': os.getpid()}, {'id': 2}]\n")
        listing = await scripts.call(Call(script), FakeHost())
        assert [entry.key for entry in listing.entries] == [str(first), "2"]
        assert (await scripts.describe(script)).doc == "Now with a doc."


async def test_scripts_share_no_worker(tmp_path: Path) -> None:
    async with running() as scripts:
        assert await pid(scripts, write(tmp_path, WHO, "a.py")) != await pid(scripts, write(tmp_path, WHO, "b.py"))


async def test_a_worker_is_replaced_after_its_runs(tmp_path: Path) -> None:
    script = write(tmp_path, WHO)
    async with running(max_runs=3) as scripts:
        pids = [await pid(scripts, script) for _ in range(7)]
        assert [len(set(pids[n : n + 3])) for n in (0, 3)] == [1, 1]
        assert len(set(pids)) == 3
        assert not alive(pids[0])


async def test_a_worker_that_grew_is_replaced(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, sys
        leaked = sys.modules.setdefault("leaked", [])
        def main():
            leaked.append(bytearray(os.urandom(1)) * 30_000_000)
            return [{"id": os.getpid()}]
        """,
    )
    async with running() as scripts:
        pids = [await pid(scripts, script) for _ in range(5)]
        assert len(set(pids)) == 2


@pytest.mark.parametrize(
    "leaves",
    [
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "subprocess.Popen(['sleep', '60'])",
        "subprocess.run(['sh', '-c', 'setsid sleep 60 & sleep 0.2'])",
    ],
)
async def test_a_worker_with_something_left_in_it_is_replaced(tmp_path: Path, leaves: str) -> None:
    script = write(
        tmp_path,
        f"""
        import os, subprocess, threading, time
        def main():
            {leaves}
            return [{{"id": os.getpid()}}]
        """,
    )
    async with running() as scripts:
        first = await pid(scripts, script)
        assert not alive(first)
        assert await pid(scripts, script) != first


async def test_an_idle_worker_that_died_is_not_used(tmp_path: Path) -> None:
    script = write(tmp_path, WHO)
    async with running() as scripts:
        first = await pid(scripts, script)
        os.kill(first, 9)
        assert await until(lambda: not alive(first))
        await asyncio.sleep(0.1)
        assert await pid(scripts, script) != first


async def test_no_more_workers_are_kept_than_configured(tmp_path: Path) -> None:
    async with running(workers=2) as scripts:
        pids = [await pid(scripts, write(tmp_path, WHO, f"{n}.py")) for n in range(5)]
        assert await until(lambda: [alive(p) for p in pids] == [False, False, False, True, True])


async def test_an_unused_worker_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "IDLE", 0.1)
    async with running() as scripts:
        first = await pid(scripts, write(tmp_path, WHO))
        assert await until(lambda: not alive(first))


async def test_closing_ends_every_worker_and_fails_what_runs(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    script = write(
        tmp_path,
        """
        import os, time
        def main(begun):
            open(begun, "w").write(str(os.getpid()))
            time.sleep(300)
        """,
        "b.py",
    )
    async with running() as scripts:
        first = await pid(scripts, write(tmp_path, WHO, "a.py"))
        run = asyncio.create_task(scripts.call(Call(script, {"begun": str(begun)}), FakeHost()))
        assert await until(lambda: bool(noted(begun)), 60)
        await scripts.close()
        with pytest.raises(TriggerError):
            await run
        assert not any(map(alive, (first, *noted(begun))))
        with pytest.raises(TriggerError, match="the service is stopping"):
            await pid(scripts, write(tmp_path, WHO, "c.py"))


async def test_hung_scripts_starve_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SLOW", 0.2)
    hung = [write(tmp_path, HANGS, f"hung{n}.py") for n in range(3)]
    good = write(tmp_path, WHO, "good.py")
    async with running(workers=2) as scripts:
        runs = [
            asyncio.create_task(scripts.call(Call(script, timeout=timedelta(seconds=30)), FakeHost()))
            for script in hung * 2
        ]
        await asyncio.sleep(0.5)
        began = time.monotonic()
        await pid(scripts, good)
        assert time.monotonic() - began < 10
        assert not any(run.done() for run in runs)
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)


async def test_one_script_in_many_watchers_takes_half_of_the_room_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SLOW", 0.1)
    hung, good = write(tmp_path, HANGS, "hung.py"), write(tmp_path, WHO, "good.py")
    async with running(workers=1) as scripts:
        runs = [
            asyncio.create_task(scripts.call(Call(hung, timeout=timedelta(seconds=30)), FakeHost())) for _ in range(20)
        ]
        await asyncio.sleep(0.3)
        assert await pid(scripts, good)
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)


async def test_who_finds_no_room_hears_who_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "OVERFLOW", 1)
    hung, good = write(tmp_path, HANGS, "hung.py"), write(tmp_path, WHO, "good.py")
    async with running(workers=1) as scripts:
        run = asyncio.create_task(scripts.call(Call(hung, timeout=timedelta(seconds=30)), FakeHost()))
        await asyncio.sleep(0.1)
        with pytest.raises(TriggerError, match=r"no worker process was free within 0\.5 s") as caught:
            await scripts.call(Call(good, timeout=timedelta(seconds=0.5)), FakeHost())
        assert "hung.py" in str(caught.value)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        assert await pid(scripts, good)  # and the room is given back


HOGS: dict[str, str] = {
    "burns": "while True: pass",
    "prints": "while True: print('x' * 10_000)",
    "forks": "while True: os.fork() or time.sleep(60)",
    "allocates": "all = []\n            while True: all.append('x' * 1_000_000)",
    "yields": "yield from ({'id': n, 'text': 'x' * 1000} for n in range(10**9))",
    "asks": "while True: get_variable('x')",
}


@pytest.mark.parametrize("hog", HOGS)
async def test_the_ticks_of_others_are_not_late(tmp_path: Path, hog: str) -> None:
    script = write(
        tmp_path,
        f"""
        import os, time
        from watcher import get_variable
        def main():
            {HOGS[hog]}
        """,
        "hog.py",
    )
    good = write(tmp_path, WHO, "good.py")
    async with running() as scripts:
        await pid(scripts, good)
        hogs = [
            asyncio.create_task(
                scripts.call(Call(script, timeout=timedelta(seconds=1.5)), FakeHost(variables={"x": "y"}))
            )
            for _ in range(2)
        ]
        late = await _lateness(0.02, lambda: all(hog.done() for hog in hogs))
        assert max(late) < 1.0
        await pid(scripts, good)
        await asyncio.gather(*hogs, return_exceptions=True)


async def _lateness(tick: float, ended: Callable[[], bool]) -> list[float]:
    late = []
    while not ended():
        due = time.perf_counter() + tick
        await asyncio.sleep(tick)
        late.append(time.perf_counter() - due)
    return late


async def test_many_that_start_with_one_script_describe_it_once(tmp_path: Path) -> None:
    mark = tmp_path / "described"
    script = write(tmp_path, f"open({str(mark)!r}, 'a').write('x')\ndef main(): return []\n")
    async with running() as scripts:
        await asyncio.gather(*(scripts.describe(script) for _ in range(20)))
    assert mark.read_text() == "x"
