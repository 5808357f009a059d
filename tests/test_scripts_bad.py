"""Bad scripts: whatever they do, the run fails with a reason, nothing of them stays, and the next run works."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.scripts import FakeHost, alive, noted, until, write
from watcher.errors import TriggerError
from watcher.scripts import Call, Scripts
from watcher.values import ScriptSettings

MB = 1024 * 1024
GOOD = """
    def main():
        return [{"id": 1}]
"""


@pytest.fixture
async def scripts() -> AsyncIterator[Scripts]:
    scripts = Scripts(ScriptSettings(workers=4))
    yield scripts
    await scripts.close()


async def fails(scripts: Scripts, script: Path, *, seconds: float = 20.0, **rest: object) -> TriggerError:
    call = Call(script, timeout=timedelta(seconds=seconds), **rest)  # type: ignore[arg-type]
    with pytest.raises(TriggerError) as caught:
        await scripts.call(call, FakeHost())
    return caught.value


async def works(scripts: Scripts, folder: Path) -> None:
    listing = await scripts.call(Call(write(folder, GOOD, "good.py")), FakeHost())
    assert [entry.key for entry in listing.entries] == ["1"]


# --- what it raises ---


async def test_an_error_shows_the_script_s_own_lines_and_what_it_printed(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        def main():
            print("about to divide")
            return 1 / 0
        """,
    )
    error = await fails(scripts, script)
    assert error.kind == "raised"
    assert str(error) == "ZeroDivisionError: division by zero"
    assert "return 1 / 0" in error.detail
    assert "watcher/scripts" not in error.detail
    assert error.logs == "about to divide\n"


async def test_a_syntax_error_has_its_line(scripts: Scripts, tmp_path: Path) -> None:
    error = await fails(scripts, write(tmp_path, "def main()\n    return []\n"))
    assert str(error) == "script.py:1: expected ':'"


async def test_an_import_that_fails_is_named(scripts: Scripts, tmp_path: Path) -> None:
    error = await fails(scripts, write(tmp_path, "import no_such_module\ndef main(): return []\n"))
    assert str(error) == "ModuleNotFoundError: No module named 'no_such_module'"
    assert error.detail.startswith("Traceback")


async def test_a_script_without_main(scripts: Scripts, tmp_path: Path) -> None:
    error = await fails(scripts, write(tmp_path, "def run(): return []\n"))
    assert error.kind == "missing"
    assert "def main" in str(error)


async def test_a_script_that_is_gone(scripts: Scripts, tmp_path: Path) -> None:
    error = await fails(scripts, tmp_path / "gone.py")
    assert error.kind == "missing"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise SystemExit(3)", "sys.exit(3)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise BaseException('odd')", "BaseException: odd"),
        ("raise ValueError('x' * 10_000_000)", "ValueError: xxx"),
        ("class E(Exception):\n        def __str__(self): raise RuntimeError\n    raise E", "E"),
        ("def f(): f()\n    f()", "RecursionError"),
    ],
)
async def test_odd_exceptions(scripts: Scripts, tmp_path: Path, body: str, said: str) -> None:
    error = await fails(scripts, write(tmp_path, f"def main():\n    {body}\n"))
    assert error.kind == "raised"
    assert said in str(error)
    assert len(str(error)) < 600
    assert len(error.detail) <= 8192
    await works(scripts, tmp_path)


# --- what it returns ---


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ("{'a': 1}", "junk", "a dict, not a list"),
        ("3", "junk", "a int, not a list"),
        ("[float('nan')]", "junk", "item 0 is nan"),
        ("[{'id': 1}, {'price': [1, float('inf')]}]", "junk", "item 1.price[1] is inf"),
        ("[{'raw': b'x'}]", "junk", "item 0.raw is bytes"),
        ("[{'tags': {1, 2}}]", "junk", "item 0.tags is a set"),
        ("[{(1, 2): 3}]", "junk", "item 0 has a key of type tuple"),
        ("[{'f': open}]", "junk", "item 0.f is of type builtin_function_or_method"),
        ("[10 ** 5000]", "junk", "4,000 digits"),
        ("cycle()", "junk", "item 0.self contains itself"),
        ("deep()", "junk", "nested too deeply"),
        ("[{}] * 200", "too_large", "200 items, 100 are allowed"),
        ("['x' * 3_000_000]", "too_large", "larger than 2,000,000 bytes"),
    ],
)
async def test_junk_says_where_it_is(tmp_path: Path, value: str, kind: str, said: str) -> None:
    script = write(
        tmp_path,
        f"""
        def cycle():
            item = {{}}
            item["self"] = item
            return [item]

        def deep():
            item = []
            for _ in range(100_000):
                item = [item]
            return [item]

        def main():
            return {value}
        """,
    )
    scripts = Scripts(ScriptSettings(max_items=100, max_result=2_000_000))
    try:
        error = await fails(scripts, script)
        assert (error.kind, said in str(error)) == (kind, True), str(error)
        await works(scripts, tmp_path)
    finally:
        await scripts.close()


async def test_an_endless_generator_is_capped(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        def main():
            n = 0
            while True:
                yield {"id": (n := n + 1)}
        """,
    )
    scripts = Scripts(ScriptSettings(max_items=1000))
    try:
        listing = await scripts.call(Call(script), FakeHost())
        assert (len(listing.entries), listing.capped, listing.complete) == (1000, True, False)
    finally:
        await scripts.close()


async def test_a_hundred_thousand_items_come_through(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "def main():\n    return [{'id': n, 'text': 'x' * 50} for n in range(100_000)]\n")
    longest = 0.0

    async def heartbeat() -> None:
        nonlocal longest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            longest = max(longest, time.perf_counter() - before)

    beating = asyncio.create_task(heartbeat())
    listing = await scripts.call(Call(script), FakeHost())
    beating.cancel()
    assert len(listing.entries) == 100_000
    assert listing.entries[-1].key == "99999"
    assert longest < 1.0


# --- what it does to its process ---


async def test_a_hang_ends_at_the_timeout_and_says_so(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "def main():\n    print('begin')\n    while True: pass\n")
    await scripts.describe(script)  # the worker runs
    began = time.monotonic()
    error = await fails(scripts, script, seconds=1)
    assert time.monotonic() - began < 6
    assert error.kind == "timeout"
    assert "within 1 s" in str(error)
    assert error.logs == "begin\n"
    await works(scripts, tmp_path)


async def test_a_regex_that_never_ends_is_killed(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "import re\ndef main():\n    re.match(r'(a+)+$', 'a' * 40 + 'b')\n")
    assert (await fails(scripts, script, seconds=0.5)).kind == "timeout"


async def test_sigterm_is_not_what_kills(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, signal, time
        def main(into):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
            open(into, "a").write(f"{os.getpid()} ")
            while True: time.sleep(60)
        """,
    )
    into = tmp_path / "pids"
    error = await fails(scripts, script, seconds=1, args={"into": str(into)})
    assert error.kind == "timeout"
    assert noted(into)
    assert not any(map(alive, noted(into)))


CHILDREN = {
    "child": """
        note(subprocess.Popen(["sleep", "300"]).pid)
    """,
    "setsid grandchild": """
        subprocess.Popen(["setsid", "sh", "-c", "echo $$ >> pids; sleep 300 & echo $! >> pids; wait"])
    """,
    "daemon that forked twice and cleared its environment": """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                note(os.getpid())
                os.execve("/bin/sleep", ["sleep", "300"], {})
            os._exit(0)
        os.wait()
    """,
    "fork that ignores every signal": """
        if os.fork() == 0:
            os.setsid()
            for number in range(1, 32):
                if number not in (9, 19):
                    signal.signal(number, signal.SIG_IGN)
            note(os.getpid())
            while True: time.sleep(60)
    """,
}
ENDINGS = {
    "hangs": ("while True: time.sleep(60)", "timeout"),
    "returns": ("return []", ""),
    "raises": ("raise ValueError", "raised"),
    "exits": ("os._exit(7)", "crashed"),
    "is killed": ("os.kill(os.getpid(), 9)", "crashed"),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("child", CHILDREN)
async def test_every_process_of_a_script_ends_with_its_run(
    scripts: Scripts, tmp_path: Path, child: str, ending: str
) -> None:
    text = """
import os, signal, subprocess, sys, time

def note(pid):
    with open("pids", "a") as file:
        file.write(f"{pid}\\n")

def main():
    note(os.getpid())
BODY
    deadline = time.monotonic() + 5
    while len(open("pids").read().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    END
"""
    body = textwrap.indent(textwrap.dedent(CHILDREN[child]), "    ")
    end, kind = ENDINGS[ending]
    script = write(tmp_path, text.replace("BODY", body).replace("END", end))
    call = Call(script, timeout=timedelta(seconds=2 if kind == "timeout" else 20), cwd=tmp_path)
    if kind:
        with pytest.raises(TriggerError) as caught:
            await scripts.call(call, FakeHost())
        assert caught.value.kind == kind, str(caught.value)
    else:
        await scripts.call(call, FakeHost())
    pids = noted(tmp_path / "pids")
    assert len(pids) >= 2
    assert not [pid for pid in pids if alive(pid)]
    await works(scripts, tmp_path)


async def test_a_fork_bomb_is_put_out(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, time
        def main(into):
            end = time.monotonic() + 20
            count = 0
            while time.monotonic() < end and count < 400:
                count += 1
                if os.fork() == 0:
                    open(into, "a").write(f"{os.getpid()}\\n")
                    time.sleep(60)
                    os._exit(0)
            time.sleep(60)
        """,
    )
    into = tmp_path / "pids"
    error = await fails(scripts, script, args={"into": str(into)})
    assert error.kind == "crashed"
    assert "more processes than are allowed" in str(error)
    assert len(noted(into)) > 10
    assert not [pid for pid in noted(into) if alive(pid)]
    await works(scripts, tmp_path)


async def test_ten_gigabytes_are_not_given(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "def main():\n    return [len(bytearray(10 * 1024 ** 3))]\n")
    error = await fails(scripts, script)
    assert error.kind == "memory"
    assert "memory_limit" in str(error)


async def test_memory_that_grows_step_by_step_ends_at_the_limit(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "def main():\n    all = []\n    while True: all.append('x' * 1_000_000)\n")
    assert (await fails(scripts, script, memory_limit=100 * MB)).kind == "memory"
    await works(scripts, tmp_path)


async def test_memory_spread_over_children_is_counted_together(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, time
        def main():
            for _ in range(10):
                if os.fork() == 0:
                    mine = bytearray(os.urandom(1)) * 60_000_000
                    time.sleep(60)
            time.sleep(60)
        """,
    )
    assert (await fails(scripts, script, memory_limit=100 * MB)).kind == "memory"


async def test_processor_time_has_its_own_limit(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "def main():\n    while True: pass\n")
    error = await fails(scripts, script, seconds=30, cpu_limit=timedelta(seconds=1))
    assert error.kind == "cpu"


async def test_the_processor_limit_counts_one_run_not_the_worker_s_life(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import time
        def main():
            end = time.process_time() + 0.4
            while time.process_time() < end: pass
            return []
        """,
    )
    for _ in range(4):
        await scripts.call(Call(script, cpu_limit=timedelta(seconds=1)), FakeHost())


async def test_a_gigabyte_of_output_is_drained_and_its_end_kept(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os
        def main():
            block = b"x" * (1 << 20)
            for _ in range(1024):
                os.write(1, block)
            print("the end")
            return []
        """,
    )
    listing = await scripts.call(Call(script), FakeHost())
    assert listing.logs.endswith("the end\n")
    assert "bytes left out" in listing.logs
    assert len(listing.logs) < 70_000


async def test_a_segfault_is_told_with_where_it_happened(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "import ctypes\ndef main():\n    ctypes.string_at(0)\n")
    error = await fails(scripts, script)
    assert error.kind == "crashed"
    assert "SIGSEGV" in str(error)
    assert "Segmentation fault" in error.detail
    assert 'script.py", line 3 in main' in error.detail
    await works(scripts, tmp_path)


@pytest.mark.parametrize("first", [0, 3])
async def test_a_script_that_closes_every_file(scripts: Scripts, tmp_path: Path, first: int) -> None:
    script = write(tmp_path, f"import os\ndef main():\n    os.closerange({first}, 1000)\n    return []\n")
    error = await fails(scripts, script, seconds=5)
    assert error.kind in ("crashed", "timeout")
    await works(scripts, tmp_path)


JUNK = {
    "noise": "os.urandom(100_000)",
    "a length of four gigabytes": "b'\\xff' * 8",
    "text that is no JSON": "frame(b'{hello')",
    "an array": "frame(b'[1, 2]')",
    "a message of no known kind": 'frame(b\'{"op": "launch"}\')',
    "a message without a kind": "frame(b'{}')",
    "entries of the wrong shape": 'frame(b\'{"op": "page", "entries": [1]}\')',
    "NaN": 'frame(b\'{"op": "page", "entries": [[null, null, NaN]]}\')',
    "deep nesting": "frame(b'[' * 100_000)",
    "a request without a number": 'frame(b\'{"op": "fetch"}\')',
    "an end without its facts": 'frame(b\'{"op": "done"}\')',
    "an end with the wrong facts": 'frame(b\'{"op": "done", "label": 3, "unchanged": 1}\')',
    "half a message": "frame(b'{}')[:9]",
}


@pytest.mark.parametrize("junk", JUNK)
async def test_junk_on_the_channel_fails_one_run_only(scripts: Scripts, tmp_path: Path, junk: str) -> None:
    script = write(
        tmp_path,
        f"""
        import os, socket, stat, struct, time

        def frame(body):
            return struct.pack("!II", len(body), 0) + body

        def main():
            for fd in range(3, 100):
                try:
                    if stat.S_ISSOCK(os.fstat(fd).st_mode):
                        os.write(fd, {JUNK[junk]})
                except OSError:
                    pass
            time.sleep(0.5)
            os._exit(0)
        """,
    )
    error = await fails(scripts, script, seconds=5)
    assert error.kind in ("junk", "crashed"), str(error)
    await works(scripts, tmp_path)


async def test_a_script_that_kills_its_warden(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, time
        def main(into):
            open(into, "w").write(f"{os.getpid()}")
            os.kill(os.getppid(), 9)
            time.sleep(60)
        """,
    )
    into = tmp_path / "pids"
    error = await fails(scripts, script, args={"into": str(into)})
    assert error.kind == "crashed"
    assert await until(lambda: not any(map(alive, noted(into))))
    await works(scripts, tmp_path)


async def test_a_script_that_stops_its_warden_is_still_ended(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("watcher.scripts.process.END", 0.5)
    script = write(
        tmp_path,
        """
        import os, signal, subprocess, time
        def main(into):
            child = subprocess.Popen(["setsid", "sleep", "300"])
            open(into, "w").write(f"{os.getpid()} {os.getppid()} {child.pid}")
            os.kill(os.getppid(), signal.SIGSTOP)
            time.sleep(60)
        """,
    )
    into = tmp_path / "pids"
    error = await fails(scripts, script, seconds=1, args={"into": str(into)})
    assert error.kind == "timeout"
    assert await until(lambda: not any(map(alive, noted(into))))


async def test_all_ends_when_the_service_is_killed(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, subprocess, time
        def main():
            child = subprocess.Popen(["setsid", "sleep", "300"])
            open("pids.new", "w").write(f"{os.getpid()} {os.getppid()} {child.pid}")
            os.rename("pids.new", "pids")
            time.sleep(300)
        """,
    )
    service = write(
        tmp_path,
        f"""
        import asyncio
        from pathlib import Path
        from watcher.scripts import Call, Scripts
        from watcher.values import ScriptSettings
        asyncio.run(Scripts(ScriptSettings()).call(Call(Path({str(script)!r}), cwd=Path({str(tmp_path)!r})), None))
        """,
        "service.py",
    )
    process = await asyncio.create_subprocess_exec(sys.executable, str(service), cwd=Path(__file__).parent.parent)
    pids = tmp_path / "pids"
    assert await until(pids.exists, 30)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    assert await until(lambda: not any(map(alive, noted(pids))))


async def test_a_cancelled_run_leaves_nothing(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, time
        def main(into):
            open(into, "w").write(f"{os.getpid()}")
            time.sleep(300)
        """,
    )
    into = tmp_path / "pids"
    run = asyncio.create_task(scripts.call(Call(script, {"into": str(into)}), FakeHost()))
    assert await until(lambda: bool(noted(into)), 30)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert not any(map(alive, noted(into)))
    assert os.getpid() not in noted(into)
