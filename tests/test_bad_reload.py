"""Sixty bad configurations in a row under traffic: each is told, none is taken, and no tick is missed."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.support.receiver import Receiver
from tests.support.scripts import until
from tests.support.site import Site
from tests.support.trouble import World, listed

pytestmark = pytest.mark.timeout(300)

TEXTS: dict[str, Callable[[str], str]] = {
    # name: the good text made bad
    "not TOML": lambda text: text + "\n[watchers.x\n",
    "half written": lambda text: text[: text.index("[watchers.own]") + 40],
    "an open string": lambda text: text.replace('every = "200ms"', 'every = "200ms', 1),
    "a key twice": lambda text: text + '\nevery = "1m"\nevery = "2m"\n',
    "a table twice": lambda text: text + '\n[server]\nbind = "127.0.0.1:1"\n',
    "a NUL byte": lambda text: text + "\0",
    "an unknown table": lambda text: text + "\n[wachters.x]\n",
    "an unknown option": lambda text: text + "\nevrey = 3\n",
    "no such flow": lambda text: text.replace('flow = "sink"', 'flow = "snik"', 1),
    "no such trigger": lambda text: text.replace('"http_json"', '"http_jsn"', 1),
    "no such script": lambda text: text.replace('"./own.py"', '"./gone.py"'),
    "no trigger": lambda text: text.replace('trigger = "http_json"\n', "", 1),
    "no flow": lambda text: text.replace('flow = "sink"\n', "", 1),
    "no schedule of sense": lambda text: text.replace('"200ms"', '"soon"', 1),
    "a negative interval": lambda text: text.replace('"200ms"', '"-5s"', 1),
    "an interval of nothing": lambda text: text.replace('"200ms"', '"0s"', 1),
    "a number for a duration": lambda text: text.replace('"200ms"', "{}", 1),
    "every and cron": lambda text: text.replace('every = "200ms"', 'every = "1m"\ncron = "* * * * *"', 1),
    "a bad cron": lambda text: text.replace('every = "200ms"', 'cron = "61 * * * *"', 1),
    "a cron of six fields": lambda text: text.replace('every = "200ms"', 'cron = "* * * * * *"', 1),
    "a cron that never comes": lambda text: text.replace('every = "200ms"', 'cron = "0 0 31 2 *"', 1),
    "no such time zone": lambda text: text.replace('every = "200ms"', 'cron = "* * * * *"\ntimezone = "Mars"', 1),
    "no such variable of the environment": lambda text: text + '\n[variables]\n"u/a/b" = "$env:NOT_THERE"\n',
    "no such file of a secret": lambda text: text + '\n[variables]\n"u/a/b" = "$file:/no/such/file"\n',
    "a path of a variable with a blank": lambda text: text + '\n[variables]\n"u a" = "x"\n',
    "a flow without an address": lambda text: text + "\n[flows.other]\n",
    "a flow of two kinds": lambda text: text + '\n[flows.other]\nurl = "http://h/"\nsteps = ["own.py"]\n',
    "an address of no kind": lambda text: text + '\n[flows.other]\nurl = "ftp://h/"\n',
    "an address without a host": lambda text: text + '\n[flows.other]\nurl = "http://"\n',
    "no such preset": lambda text: text + '\n[flows.other]\npreset = "windmil"\nurl = "http://h/"\n',
    "a preset without its option": lambda text: text + '\n[flows.other]\npreset = "windmill"\nurl = "http://h/"\n',
    "a bad rate": lambda text: text + '\n[flows.other]\nurl = "http://h/"\nrate = "fast"\n',
    "none at once": lambda text: text + '\n[flows.other]\nurl = "http://h/"\nat_once = 0\n',
    "a bad filter": lambda text: text + '\n[flows.other]\nurl = "http://h/"\nfilter = "item.a >"\n',
    "a filter of an unknown name": lambda text: text + '\n[flows.other]\nurl = "http://h/"\nfilter = "itm.a"\n',
    "a bad template": lambda text: text + '\n[flows.other]\nurl = "http://h/"\nbody = { a = "{{ item" }\n',
    "a bad signing secret": lambda text: text + '\n[flows.other]\nurl = "http://h/"\nsecret = "whsec_!"\n',
    "a bad header": lambda text: text + '\n[flows.other]\nurl = "http://h/"\nheaders = { "a b" = "c" }\n',
    "a step that is not there": lambda text: text + '\n[flows.other]\nsteps = ["gone.py"]\n',
    "a bad key": lambda text: text.replace('flow = "sink"', 'flow = "sink"\nkey = "a ["', 1),
    "a bad cursor": lambda text: text.replace('flow = "sink"', 'flow = "sink"\ncursor = "a ||"', 1),
    "a bad first run": lambda text: text.replace('flow = "sink"', 'flow = "sink"\nfirst_run = "newest"', 1),
    "a bad change": lambda text: text.replace('flow = "sink"', 'flow = "sink"\non = ["nwe"]', 1),
    "no change": lambda text: text.replace('flow = "sink"', 'flow = "sink"\non = []', 1),
    "a bad share": lambda text: text.replace('flow = "sink"', 'flow = "sink"\nmax_change = "150%"', 1),
    "a bad size": lambda text: text.replace('flow = "sink"', 'flow = "sink"\nmemory_limit = "a lot"', 1),
    "too little memory": lambda text: text.replace('flow = "sink"', 'flow = "sink"\nmemory_limit = "1kB"', 1),
    "a bad name": lambda text: text.replace("[watchers.own]", '[watchers."own goal!"]'),
    "a bad workspace": lambda text: text.replace("[scripts]", '[logging]\nlevel = "loud"\n\n[scripts]'),
    "a bad address to listen on": lambda text: text.replace("bind = ", 'bind = "here"#'),
    "a bad database": lambda text: text.replace("sqlite:///watcher.db", "mysql://h/d"),
    "a number for a text": lambda text: text.replace('flow = "sink"', "flow = 3", 1),
    "a text for a table": lambda text: text.replace("with = {", 'with = "{', 1).replace(" }\n", ' }"\n', 1),
    "an argument of no use": lambda text: text + "\n[watchers.x]\n",
}  # fmt: skip


def loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def huge(file: Path) -> None:
    with file.open("ab") as text:
        text.write(b"\n#")
        text.truncate(100_000_000)


FILES: dict[str, Callable[[Path], None]] = {
    "gone": Path.unlink,
    "a link to itself": loop,
    "a link to nowhere": dangling,
    "a directory": directory,
    "a hundred megabytes": huge,
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe" + file.read_bytes()),
    "a device": lambda file: (file.unlink(), file.symlink_to("/dev/zero"))[0],
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file))[0],
}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with Site() as site, Receiver() as receiver:
        world = World(tmp_path, site, receiver)
        yield world
        world.service.kill()


def clear(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)


async def condition(world: World) -> str:
    """What the service says about its configuration."""
    return str(json.loads((await world.service.get("/readyz"))[1])["config"])


@pytest.mark.long
async def test_sixty_bad_configurations_under_traffic(world: World) -> None:
    process = world.service.start()
    await world.service.ready()
    good, file = world.service.config, world.where / "watcher.toml"
    assert len(TEXTS) + len(FILES) >= 60
    said: dict[str, str] = {}
    for name in [*TEXTS, *FILES]:
        if name in TEXTS:
            bad = TEXTS[name](good)
            assert bad != good, name
            world.service.write(bad)
        else:
            FILES[name](file)
        began = time.monotonic()
        while (told := await condition(world)) in ("ok", *said.values()) and time.monotonic() < began + 20:
            await asyncio.sleep(0.05)  # another process: there is nothing to await
        assert told != "ok", name
        said[name] = told
        assert process.poll() is None, name
        clear(file)
        world.service.write(good)
        assert await until_ok(world), name
        world.site.on("/good", listed(len(said) + 1))
    wanted = {("good", str(n)) for n in range(1, len(said) + 1)}
    assert await until(lambda: wanted <= set(world.received()), 30), world.service.tail()
    assert process.poll() is None
    metrics = (await world.service.get("/metrics"))[1].splitlines()
    missed = [line for line in metrics if line.startswith("watcher_missed_ticks_total")]
    assert all(line.endswith(" 0.0") for line in missed), missed
    assert len(set(said.values())) >= len(said) - 2, "each says what is wrong with it"
    assert not [name for name, text in said.items() if "Traceback" in text or "Error(" in text]
    assert await world.service.stop() == 0


async def until_ok(world: World, seconds: float = 20) -> bool:
    began = time.monotonic()
    while await condition(world) != "ok":
        if time.monotonic() > began + seconds:
            return False
        await asyncio.sleep(0.05)  # another process: there is nothing to await
    return True
