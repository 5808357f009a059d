"""The whole service, from outside: it starts, delivers, reloads, drains, and comes back after a kill."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.postgres import Postgres
from tests.support.receiver import Receiver
from tests.support.scripts import until, write
from tests.support.service import Service
from watcher import control
from watcher.secrets import new_key

CONFIG = """
database = "sqlite:///watcher.db"

[server]
bind = "127.0.0.1:{port}"

[flows.announce]
steps = ["record.py"]

[watchers.folder]
trigger = "./folder.py"
every = "100ms"
flow = "announce"
first_run = "all"
with = { path = "{where}/inbox" }
"""
FOLDER = """
    from pathlib import Path
    from watcher import trigger

    @trigger(key="name")
    def main(path: str):
        return [{"name": file.name} for file in sorted(Path(path).iterdir())]
"""
RECORD = """
    import os
    from pathlib import Path

    def main(item: dict):
        place = Path(os.environ["HOME"], "announced") / f"{item['name']}.{os.environ['WM_JOB_ID']}"
        with place.open("a") as file:
            file.write("x")
        return item["name"]
"""

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    for folder in ("inbox", "announced"):
        (tmp_path / folder).mkdir()
    write(tmp_path, FOLDER, "folder.py")
    write(tmp_path, RECORD, "record.py")
    service = Service(tmp_path, CONFIG)
    yield service
    service.kill()


def announced(service: Service) -> list[str]:
    return sorted(file.name.partition(".")[0] for file in (service.where / "announced").iterdir())


async def arrive(service: Service, *names: str) -> None:
    assert await until(lambda: announced(service) == sorted(names), 60), service.tail()


def rows(service: Service, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(f"file:{service.where / 'watcher.db'}?mode=ro", uri=True)) as db:
        return db.execute(sql).fetchall()


async def test_a_new_file_becomes_one_run_of_a_local_flow(service: Service) -> None:
    (service.where / "inbox" / "one").touch()
    service.start()
    await service.ready()
    await arrive(service, "one")
    (service.where / "inbox" / "two").touch()
    await arrive(service, "one", "two")
    assert await until(lambda: rows(service, "SELECT count(*) FROM delivery WHERE status = 0") == [(0,)])
    assert await until(lambda: rows(service, "SELECT DISTINCT status FROM job") == [("succeeded",)])
    status, metrics = await service.get("/metrics")
    assert status == 200
    assert 'watcher_items_total{change="new",watcher="folder"} 2.0' in metrics
    assert 'watcher_outbox_pending{flow="announce"} 0.0' in metrics
    assert "watcher_database_up 1.0" in metrics
    assert "watcher_config_last_reload_successful 1.0" in metrics
    assert 'watcher_next_run_timestamp_seconds{watcher="folder"}' in metrics
    assert await service.stop() == 0
    assert announced(service) == ["one", "two"]


async def test_sigterm_drains_and_leaves_no_lease_and_no_wal(service: Service) -> None:
    for n in range(30):
        (service.where / "inbox" / f"f{n}").touch()
    service.start()
    await service.ready()
    assert await until(lambda: len(announced(service)) > 3), service.tail()
    assert await service.stop() == 0
    assert rows(service, "SELECT count(*) FROM delivery WHERE lease_until IS NOT NULL AND status = 0") == [(0,)]
    assert rows(service, "SELECT count(*) FROM job WHERE status = 'running'") == [(0,)]
    wal = service.where / "watcher.db-wal"
    assert not wal.exists() or wal.stat().st_size == 0
    assert not (service.where / "watcher-data" / "control.sock").exists()
    assert service.events()[-1]["event"] == "service.stopped"
    service.start()
    await service.ready()
    await arrive(service, *(f"f{n}" for n in range(30)))
    assert await service.stop() == 0


async def test_kill_9_loses_nothing_and_starts_no_job_twice(service: Service) -> None:
    for round in range(4):
        for n in range(5):
            (service.where / "inbox" / f"r{round}n{n}").touch()
        service.start()
        await service.ready()
        await asyncio.sleep(0.1 * round)  # the moment of the kill is what differs
        service.kill()
    service.start()
    await service.ready()
    await arrive(service, *(f"r{r}n{n}" for r in range(4) for n in range(5)))
    assert rows(service, "SELECT count(*), count(DISTINCT id) FROM job") == [(20, 20)]
    assert await service.stop() == 0


async def test_a_second_service_on_the_same_database_refuses_and_names_the_first(service: Service) -> None:
    first = service.start()
    await service.ready()
    other = Service(service.where, service.config, environ={"WATCHER_SERVER__BIND": "127.0.0.1:0"})
    other.start()
    assert await other.ended() == 69
    assert str(first.pid) in service.tail()
    assert (await service.get("/readyz"))[0] == 200


async def test_an_address_that_is_taken_is_told_and_ends_the_start(service: Service) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", service.port))
        taken.listen()
        service.start()
        assert await service.ended() == 69
    assert "server.bind" in service.tail()
    assert "Traceback" not in service.tail()


# --- reload ---


async def test_a_saved_file_is_in_force_at_once_and_a_bad_one_is_not(service: Service) -> None:
    service.start()
    await service.ready()
    second = (
        '[watchers.second]\ntrigger = "./folder.py"\nevery = "1h"\nflow = "announce"\nwith = { path = "{where}" }\n'
    )
    more = service.config + second
    service.write(more)
    await service.event("config.in_force")
    assert json.loads((await service.get("/readyz"))[1])["watchers"] == 2

    service.write(more.replace('every = "1h"', 'evry = "1h"'))
    rejected = await service.event("config.rejected")
    assert "evry" in rejected["error"]
    status, detail = await service.get("/readyz")
    assert status == 200, "the old configuration is in force"
    assert "evry" in json.loads(detail)["config"]
    assert "watcher_config_last_reload_successful 0.0" in (await service.get("/metrics"))[1]
    service.signal(signal.SIGHUP)
    (service.where / "inbox" / "still").touch()
    await arrive(service, "still")
    assert len(service.events("config.rejected")) == 1, "told once, not at every look"

    service.write(CONFIG)
    await service.event("config.in_force", 2)
    assert json.loads((await service.get("/readyz"))[1])["config"] == "ok"
    assert "watcher_config_last_reload_successful 1.0" in (await service.get("/metrics"))[1]
    assert await service.stop() == 0


async def test_sighup_reads_the_file_again(service: Service) -> None:
    service.start()
    await service.ready()
    service.write(service.config.replace('every = "100ms"', 'every = "200ms"'))
    service.signal(signal.SIGHUP)
    await service.event("config.in_force")
    (service.where / "inbox" / "one").touch()
    await arrive(service, "one")


async def test_what_needs_a_restart_says_so_and_keeps_working(service: Service) -> None:
    service.start()
    await service.ready()
    service.write(service.config.replace("watcher.db", "other.db"))
    service.signal(signal.SIGHUP)
    assert (await service.event("config.needs_restart"))["option"] == "database"
    (service.where / "inbox" / "one").touch()
    await arrive(service, "one")
    assert not (service.where / "other.db").exists()
    told = await asyncio.to_thread(control.call, service.where / "watcher-data" / "control.sock", "reload", {})
    assert told["needs_restart"] == ["database"]
    assert len(service.events("config.needs_restart")) == 1, "told once"


async def test_what_is_amiss_with_secrets_is_told_at_the_start(service: Service) -> None:
    (service.where / "key").write_text(new_key())
    (service.where / "key").chmod(0o644)
    service.config = 'secret_key_file = "key"\n' + service.config
    service.config += '\n[flows.other]\nurl = "http://127.0.0.1:1/"\ntoken = "$var:u/me/token"\n'
    service.start()
    await service.ready()
    assert "chmod 600" in (await service.event("key.exposed"))["reason"]
    assert "`watcher variable set u/me/token`" in (await service.event("config.unresolved"))["warning"]
    at = service.where / "watcher-data" / "control.sock"
    stored = {"path": "u/me/token", "value": "hunter2", "secret": True}
    await asyncio.to_thread(control.call, at, "variable_set", stored)
    assert await service.stop() == 0

    service.start()
    await service.ready()
    assert await service.stop() == 0
    assert len(service.events("config.unresolved")) == 1, "now it is there"

    service.config = service.config.replace('secret_key_file = "key"\n', "")
    service.start()
    assert await service.ended() == 78
    assert "variable u/me/token is encrypted, and there is no key" in service.tail(3)


def test_no_other_process_of_the_user_may_read_the_service_s_memory() -> None:
    code = "import ctypes; from watcher import app; app._keep_memory_to_ourselves(); print(ctypes.CDLL(None).prctl(3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


async def test_a_bad_configuration_at_start_is_exit_78(service: Service) -> None:
    service.config = service.config.replace('flow = "announce"', 'flow = "anounce"')
    service.start()
    assert await service.ended() == 78
    assert "did you mean" in service.tail()


# --- systemd ---


async def test_systemd_hears_ready_watchdog_reloading_and_stopping_in_order(service: Service) -> None:
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(service.where / "notify"))
        manager.setblocking(False)
        loop = asyncio.get_running_loop()

        async def listen() -> None:
            while True:
                heard.append((await loop.sock_recv(manager, 4096)).decode())

        listening = asyncio.create_task(listen())

        def said(word: str) -> Callable[[], bool]:
            return lambda: any(message.startswith(word) for message in heard)

        service.start(NOTIFY_SOCKET=str(service.where / "notify"), WATCHDOG_USEC="300000")
        await service.ready()
        assert await until(said("WATCHDOG=1"))
        assert heard.index("WATCHDOG=1") > next(i for i, m in enumerate(heard) if m.startswith("READY=1"))
        before = len(heard)
        service.signal(signal.SIGHUP)
        assert await until(lambda: any(m.startswith("READY=1") for m in heard[before:]))
        reload = [m.partition("\n")[0] for m in heard[before:] if not m.startswith("WATCHDOG")]
        assert reload[:2] == ["RELOADING=1", "READY=1"]
        assert await service.stop() == 0
        assert await until(said("STOPPING=1"))
        listening.cancel()
    starting = [m for m in heard if m.startswith("EXTEND_TIMEOUT_USEC")]
    assert starting, "a long migration must not look like a hang"
    assert heard[-1].startswith("STOPPING=1")


# --- trouble ---


async def test_a_second_sigterm_ends_at_once(service: Service) -> None:
    write(service.where, "import time\ndef main(item):\n    time.sleep(60)\n", "record.py")
    (service.where / "inbox" / "one").touch()
    service.start()
    await service.ready()
    assert await until(lambda: bool(rows(service, "SELECT 1 FROM job WHERE status = 'running'")))
    service.signal(signal.SIGTERM)
    await service.event("service.draining")
    begun = time.monotonic()
    service.signal(signal.SIGTERM)
    assert await service.ended() == 1
    assert time.monotonic() - begun < 5


async def test_without_server_there_is_no_api_and_the_rest_works(service: Service) -> None:
    async with Receiver() as receiver:
        local = 'steps = ["record.py"]'
        service.config = service.config.replace('[server]\nbind = "127.0.0.1:{port}"\n', "").replace(
            local, f'url = "{receiver.url}/ok"'
        )
        (service.where / "inbox" / "one").touch()
        service.start()
        await service.event("service.ready", seconds=60)
        await receiver.wait(1)
        with pytest.raises(OSError):
            await service.get("/healthz")
        assert await service.stop() == 0


async def test_a_file_that_is_no_database_is_refused_with_advice(service: Service) -> None:
    (service.where / "watcher.db").write_bytes(b"not a database, by any means" * 100)
    service.start()
    assert await service.ended() == 69
    assert "restore" in service.tail()
    assert "Traceback" not in service.tail()


async def test_a_disk_without_room_pauses_runs_and_lets_them_go_by_itself(service: Service) -> None:
    process = service.start()
    await service.ready()
    (service.where / "inbox" / "before").touch()
    await arrive(service, "before")
    size = (service.where / "watcher.db-wal").stat().st_size
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))  # no file may grow any more
    for n in range(80):
        (service.where / "inbox" / f"during{n}").write_text("x" * 100)
    paused = await service.event("runs.paused")
    assert "free some space" in paused["reason"]
    status, detail = await service.get("/readyz")
    assert status == 503
    assert "free some space" in json.loads(detail)["runs"]
    assert rows(service, "SELECT count(*) FROM item") == [(1,)], "all or nothing"
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    await service.event("runs.resumed", seconds=15)
    assert await until(lambda: rows(service, "SELECT count(*) FROM item") == [(81,)])
    assert (await service.get("/readyz"))[0] == 200


# --- several processes ---


async def test_two_services_on_one_postgresql_take_each_tick_once(
    service: Service, postgres: Postgres, tmp_path: Path
) -> None:
    url = postgres.create()
    service.config = service.config.replace("sqlite:///watcher.db", url).replace('"100ms"', '"400ms"')
    counting = "def main(path):\n    open(f'{path}/../runs', 'a').write('x\\n')\n    return []\n"
    write(service.where, counting, "folder.py")
    (service.where / "second").mkdir()
    for name in ("folder.py", "record.py"):
        (service.where / "second" / name).write_text((service.where / name).read_text())
    other = Service(service.where / "second", service.config.replace("{where}", str(service.where)))
    try:
        service.start()
        other.start()
        await asyncio.gather(service.ready(), other.ready())
        runs = service.where / "runs"
        runs.touch()
        assert await until(lambda: len(runs.read_text().splitlines()) >= 3, 30)
        begun, count = time.monotonic(), len(runs.read_text().splitlines())
        assert await until(lambda: len(runs.read_text().splitlines()) >= count + 8, 30)
        took = time.monotonic() - begun
        assert len(runs.read_text().splitlines()) - count <= took / 0.4 + 2, "no tick was taken twice"
        other.kill()
        count = len(runs.read_text().splitlines())
        assert await until(lambda: len(runs.read_text().splitlines()) >= count + 3, 30), "one goes on alone"
        assert await service.stop() == 0
    finally:
        other.kill()
        service.kill()
        postgres.drop(url)
