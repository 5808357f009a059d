"""Bad scripts and bad sources at the real service: each fails alone, says why, changes nothing, and heals whole."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.support import site as s
from tests.support.receiver import Receiver
from tests.support.running import Bench, a, running
from tests.support.scripts import until
from tests.support.service import free_port
from tests.support.site import Site
from tests.support.trouble import FETCHING, World, errors, listed
from watcher import diff
from watcher.store.db import Database

pytestmark = pytest.mark.timeout(300)

PATIENCE = 15.0  # seconds from one poll of a good watcher to the next, on a machine that others use too


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with Site() as site, Receiver() as receiver:
        world = World(tmp_path, site, receiver)
        yield world
        world.service.kill()


async def all_failed(world: World, names: set[str], seconds: float = 120) -> None:
    """Wait until each of these watchers failed at least once."""

    async def failed() -> set[str]:
        status = await world.status()
        return {name for name in names if status[name]["failures"] > 0}

    for _ in range(int(seconds / 0.2)):
        if await failed() == names:
            return
        await asyncio.sleep(0.2)  # another process: there is nothing to await
    raise AssertionError(f"never failed: {names - await failed()}\n{world.service.tail()}")


async def on_time(world: World) -> None:
    """Ticks were taken in time, and the good watchers, one in the loop and one in a worker, were run all the time."""
    metrics = (await world.service.get("/metrics"))[1]
    lag = {key: float(value) for key, _, value in (line.rpartition(" ") for line in metrics.splitlines())
           if key.startswith("watcher_schedule_lag_seconds_")}  # fmt: skip
    ticks, within = lag["watcher_schedule_lag_seconds_count"], 'watcher_schedule_lag_seconds_bucket{le="%s"}'
    assert lag[within % "1.0"] >= 0.98 * ticks > 0, "all of them, when nobody else uses the machine"
    assert lag[within % "5.0"] == ticks
    assert world.longest_gap("/good") < PATIENCE
    assert world.longest_gap("/own") < PATIENCE


async def healed(world: World, names: set[str], count: int, seconds: float = 60) -> None:
    """Wait until everything that there is to find was received once."""
    wanted = {(name, str(n)) for name in names for n in range(count)}
    for name in names:
        await world.ask("resume", name=name)
    assert await until(lambda: wanted <= set(world.received()), seconds), (
        f"missing: {wanted - set(world.received())}\n{world.service.tail()}"
    )
    twice = {key for key, n in world.received().items() if n > 1}
    assert not twice, "\n".join([*map(str, world.tries(twice)), world.service.tail(400)])


def napping() -> list[str]:
    """Processes that a script left behind."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it is gone
            if NAP.encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
    return found


# --- scripts ----------------------------------------------------------------------------------------------------------

NAP = f"98765.{os.getpid()}"  # seconds; tells these processes from those of another run beside this one
SCRIPTS = {
    # what the script does; the kind of the failure; what the user reads
    "raises": ("def main():\n    raise ValueError('there is no price')", "raised", "ValueError: there is no price"),
    "hangs": ("def main():\n    while True: pass", "timeout", "within 4 s"),
    "hangs_async": (
        "import asyncio\nasync def main():\n    await asyncio.sleep(3600)", "timeout", "within 4 s",
    ),
    "ignores_sigterm": (
        "import signal, time\ndef main():\n    for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
        "    while True: time.sleep(60)", "timeout", "within 4 s",
    ),
    "eats_memory": ("def main():\n    return [len(bytearray(10 * 1024 ** 3))]", "memory", "memory_limit"),
    "forks": (
        "import os, time\ndef main():\n    for _ in range(300):\n        if os.fork() == 0: time.sleep(600)\n"
        "    time.sleep(600)", "crashed", "more processes than are allowed",
    ),
    "grandchild": (
        f"import os, subprocess, time\ndef main():\n    subprocess.Popen(['setsid', 'sleep', '{NAP}'])\n"
        "    time.sleep(600)", "timeout", "within 4 s",
    ),
    "junk": ("def main():\n    return 42", "junk", "a int, not a list"),
    "nan": ("def main():\n    return [{'id': 1, 'price': float('nan')}]", "junk", "item 0.price is nan"),
    "cycle": ("def main():\n    a = {}\n    a['a'] = a\n    return [a]", "junk", "contains itself"),
    "too_many": ("def main():\n    return [{}] * 100_001", "too_large", "100,001 items, 100,000 are allowed"),
    "too_large": ("def main():\n    return ['x' * 6_000_000]", "too_large", "larger than"),
    "exits": ("import sys\ndef main():\n    sys.exit(3)", "raised", "sys.exit(3)"),
    "exits_hard": ("import os\ndef main():\n    os._exit(7)", "crashed", "7"),
    "segfaults": ("import ctypes\ndef main():\n    ctypes.string_at(0)", "crashed", "SIGSEGV"),
    "kills_itself": ("import os\ndef main():\n    os.kill(os.getpid(), 9)", "crashed", "SIGKILL"),
    "syntax_error": ("def main()\n    return []", "raised", "syntax_error.py:1: expected ':'"),
    "no_main": ("def run():\n    return []", "missing", "def main"),
    "no_module": ("import pandasss\ndef main():\n    return []", "raised", "No module named 'pandasss'"),
    "missing_file": (None, "missing", "missing_file.py"),
    "wrong_arguments": ("def main(table: str):\n    return []", "arguments", "table"),
    "wrong_type": ("def main(*, limit: int = 'many'):\n    return [] + limit", "raised", "TypeError"),
}  # fmt: skip


@pytest.mark.long
async def test_bad_scripts_fail_alone_and_lose_nothing_when_they_are_mended(world: World) -> None:
    names = set(SCRIPTS)
    for name in names:
        world.watch(name, f'timeout = "{"30s" if name == "forks" else "4s"}"\nmemory_limit = "64MB"')
        world.lists(name, 1)
    world.watch("prints", 'timeout = "60s"')
    world.lists("prints", 1)
    world.service.start()
    await world.service.ready()
    assert await until(lambda: world.received() == {(name, "0"): 1 for name in names | {"prints"}}, 60), (
        world.service.tail()
    )
    before = world.states()

    for name, (text, _, _) in SCRIPTS.items():
        if text is None:
            (world.where / f"{name}.py").unlink()
        else:
            world.script(name, text)
    world.script(
        "prints",
        "import os\ndef main():\n    for _ in range(1024): os.write(1, b'x' * 1048576)\n    raise ValueError('enough')",
    )
    await all_failed(world, names | {"prints"})
    await on_time(world)

    status = await world.status()
    told = {event["watcher"]: event for event in world.service.events("watcher.failing")}
    for name, (_, kind, said) in SCRIPTS.items():
        assert (name, said in status[name]["reason"]) == (name, True), status[name]
        assert (name, told[name]["kind"], said in told[name]["error"]) == (name, kind, True), told[name]
        run = next(run for run in await world.ask("runs", name=name, limit=1, before=None))
        assert (run["outcome"], run["error_kind"]) == ("failed", kind)
    assert status["good"]["condition"] == "ok"
    run = (await world.ask("runs", name="prints", limit=1, before=None))[0]
    details = await world.ask("run_details", id=run["id"])
    assert "bytes left out" in details["logs"]
    assert len(details["logs"]) < 70_000
    assert {name: world.states()[name] for name in names} == {name: before[name] for name in names}
    assert await until(lambda: not napping(), 30), "each run takes with it what it started, sooner or later"
    assert not [line for line in errors(world.where / "service.log") if line["event"] == "run.crashed"]

    code, out, _ = await world.type("status")
    assert code == 0
    assert "there is no price" in out
    code, out, _ = await world.type("runs", "raises")
    assert (code, "ValueError: there is no price" in out) == (0, True)

    for name in names | {"prints"}:
        world.lists(name, 3)
    await healed(world, names | {"prints"}, 3)
    assert await world.service.stop() == 0


@pytest.mark.long
async def test_a_hundred_thousand_items_disturb_no_other_watcher(world: World) -> None:
    world.watch("many", "max_items = 1000\nmax_change = 200000", every="1h")
    world.lists("many", 100_000)
    world.service.start()
    await world.service.ready()
    assert await until(lambda: (world.states().get("many") or (0,))[0] == 1, 120), world.service.tail()
    assert world.rows("SELECT count(*), count(DISTINCT id) FROM item") == [(100_000, 100_000)]
    await on_time(world)
    sent = "SELECT count(*) FROM delivery WHERE status = 1"
    assert await until(lambda: world.rows(sent)[0][0] >= 1000, 60), world.service.tail()
    assert await world.service.stop() == 0
    released = world.rows("SELECT count(*) FROM delivery WHERE status = 1")[0][0]
    assert released == 1000, "the rest is owed and released interval by interval"


# --- sources ----------------------------------------------------------------------------------------------------------


@functools.cache
def bomb() -> s.Answer:
    return s.bomb("gzip", 1 << 30)


def sources() -> dict[str, tuple[s.Answer, str, str]]:
    """What the site answers; the kind of the failure; what the user reads."""
    return {
        "oops": (s.error(500), "http", "500"),
        "login_page": (s.html(), "junk", "an HTML page (a login or an error page?)"),
        "truncated": (s.truncated([{"id": n} for n in range(100)]), "junk", "not with JSON"),
        "cut_short": (s.cut_short(b'[{"id": 1}', 1000), "unreachable", "the connection broke"),
        "endless": (s.endless(), "too_large", "[http] max_body"),
        "endless_chunks": (s.endless(chunked=True), "too_large", "[http] max_body"),
        "drip": (s.drip(b"[" + b" " * 100_000, 0.05), "timeout", "no whole answer within 2 s"),
        "silent": (s.silent(), "timeout", "no whole answer within 2 s"),
        "broken": (s.broken(), "unreachable", "the connection broke"),
        "garbage": (s.garbage(), "unreachable", "not HTTP"),
        "not_a_list": (s.json({"error": "quota"}), "junk", "dict"),
        "nothing": (s.Answer(200, b""), "junk", "not with JSON"),
        "gone": (s.error(404), "http", "404"),
        "forbidden": (s.error(403), "http", "403"),
        "bomb": (bomb(), "too_large", "[http] max_body"),
    }


@pytest.mark.parametrize("where", ["loop", pytest.param("worker", marks=pytest.mark.long)])
async def test_bad_sources_fail_alone_and_lose_nothing_when_they_heal(world: World, where: str) -> None:
    answers = sources()
    names = set(answers)
    refused = free_port()
    world.service.config += '\n[http]\ntimeout = "2s"\nat_once_per_host = 100\n'
    for name in names | {"dns", "refused"}:
        url = world.site.on(f"/{name}", listed(1))
        script = "http_json" if where == "loop" else ""
        world.watch(name, f'with = {{ url = "{url}" }}\ntimeout = "8s"', trigger=script)
        world.script(name, FETCHING)
    world.service.start()
    await world.service.ready()
    everyone = names | {"dns", "refused"}
    assert await until(lambda: world.received() == {(name, "0"): 1 for name in everyone}, 60), world.service.tail()
    before = world.states()

    for name, (answer, _, _) in answers.items():
        world.site.on(f"/{name}", answer)
    world.service.write(
        world.service.config.replace(f"{world.site.url}/dns", "http://no-such-host.invalid/x").replace(
            f"{world.site.url}/refused", f"http://127.0.0.1:{refused}/x"
        )
    )
    await world.service.event("config.in_force")
    await all_failed(world, everyone)
    await on_time(world)
    status = await world.status()
    told = {event["watcher"]: event for event in world.service.events("watcher.failing")}
    expected = {
        **answers,
        "dns": (None, "unreachable", "no-such-host.invalid"),
        "refused": (None, "unreachable", f"127.0.0.1:{refused}"),
    }
    for name, (_, kind, said) in expected.items():
        assert (name, told[name]["kind"], said in told[name]["error"]) == (name, kind, True), told[name]
        assert said in status[name]["reason"]
    assert {name: world.states()[name] for name in everyone} == {name: before[name] for name in everyone}

    for name in everyone:
        world.site.on(f"/{name}", listed(3))
    world.service.write(
        world.service.config.replace("http://no-such-host.invalid/x", f"{world.site.url}/dns").replace(
            f"http://127.0.0.1:{refused}/x", f"{world.site.url}/refused"
        )
    )
    await world.service.event("config.in_force", 2)
    await healed(world, everyone, 3)
    assert await world.service.stop() == 0


async def test_429_with_retry_after_on_the_very_first_poll(world: World) -> None:
    url = world.site.on("/slow_down", s.too_many(2), listed(2))
    world.watch("limited", f'with = {{ url = "{url}" }}', trigger="http_json", every="500ms")
    world.service.start()
    await world.service.ready()
    failing = await world.service.event("watcher.failing")
    assert "429" in failing["error"]
    assert await until(lambda: set(world.received()) >= {("limited", "0"), ("limited", "1")}, 20)
    first, second, *_ = world.polls("/slow_down")
    assert second - first >= 2, "not before it was allowed"
    assert second - first < 4
    await world.service.event("watcher.recovered")
    assert (await world.status())["limited"]["condition"] == "ok"


# --- ourselves --------------------------------------------------------------------------------------------------------


@pytest.fixture
async def bench(sqlite_db: Database, tmp_path: Path, now: datetime) -> AsyncIterator[Bench]:
    async with running(sqlite_db, tmp_path, now) as bench:
        yield bench


async def test_a_fault_of_ours_is_a_failed_run_that_is_shown_and_tried_again_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.run(a(1))
    before = await bench.memory()
    with monkeypatch.context() as patch:
        patch.setattr(diff, "compare", lambda *_, **__: {}["no such thing"])
        record = await bench.run(a(1), a(2), tick=True)
        assert (record.outcome, record.error_kind) == ("failed", "bug")
        assert "a fault of watcher itself (KeyError: 'no such thing')" in record.error
        assert "please report it" in record.error
        assert "no such thing" in record.detail
        await bench.run(tick=True)
        status = await bench.status()
        assert (status.failures, status.last_error) == (2, record.error)
        assert status.backoff_until is not None
        assert status.backoff_until > bench.now + timedelta(minutes=1)
        waits = await bench.run(tick=True)
        assert "tried again from" in waits.warnings[0]
    assert await bench.memory() == before
    await bench.run()
    assert await bench.keys() == ["2"]
    assert (await bench.status()).failures == 0


# --- what other products lost or repeated, at the real service --------------------------------------------------------


async def test_a_stop_while_seven_of_ten_are_delivered_sends_the_other_three_after_the_restart(world: World) -> None:
    url = world.site.on("/ten", listed(10))
    world.watch("ten", f'with = {{ url = "{url}" }}', trigger="http_json")
    world.service.config = world.service.config.replace('order = "none"', 'order = "watcher"\nat_once = 1')
    world.receiver.decide = lambda request: "ok" if len(world.receiver.received) <= 7 else "status/503"
    world.service.start()
    await world.service.ready()
    await world.receiver.wait(8)
    assert await world.service.stop() == 0
    assert world.rows("SELECT status, count(*) FROM delivery GROUP BY status") == [(0, 3), (1, 7)]
    first = {request.id for request in world.receiver.received}
    world.receiver.decide = None
    world.service.start()
    await world.service.ready()
    assert (await world.type("resume", "sink", "--flow"))[0] == 0
    assert await until(lambda: not world.rows("SELECT 1 FROM delivery WHERE status = 0"), 90), world.service.tail()
    ids = [request.id for request in world.receiver.received]
    assert len(set(ids)) == 10
    assert len(first) == 8, "the eighth was tried before"
    assert len(ids) == 11
    assert await world.service.stop() == 0


async def test_a_token_that_was_rotated_on_disk_is_used_by_the_next_poll_and_the_next_delivery(world: World) -> None:
    (world.where / "token").write_text("first-secret-token\n")
    url = world.site.on("/private", listed(1))
    arguments = f'with = {{ url = "{url}", token = "$file:{world.where}/token" }}'
    world.watch("private", arguments, trigger="http_json", every="200ms")
    world.service.config = world.service.config.replace(
        'order = "none"', f'order = "none"\ntoken = "$file:{world.where}/token"'
    )
    world.service.start()
    await world.service.ready()
    assert await until(lambda: ("private", "0") in world.received()), world.service.tail()
    (world.where / "token").write_text("second-secret-token\n")
    world.site.on("/private", listed(2))
    assert await until(lambda: ("private", "1") in world.received()), world.service.tail()
    asked = [one.headers["authorization"] for one in world.site.asked_for("/private")]
    assert (asked[0], asked[-1]) == ("Bearer first-secret-token", "Bearer second-secret-token")
    sent = [request.headers["authorization"] for request in world.receiver.received]
    assert (sent[0], sent[-1]) == ("Bearer first-secret-token", "Bearer second-secret-token")
    assert await world.service.stop() == 0
    assert "secret-token" not in (world.where / "service.log").read_text()
