"""Local flows: steps in order, one directory, a result, and a job that survives whoever ran it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from unittest.mock import Mock
from uuid import uuid4

import pytest

from tests.support.scripts import until, write
from watcher import log
from watcher.errors import StoreError
from watcher.http.fetcher import Fetcher
from watcher.jobs import Jobs, NoSuchFlow
from watcher.resolve import Resolver
from watcher.scripts import Scripts
from watcher.staging import Ended, Sessions
from watcher.store import jobs as job_store
from watcher.store.db import Database
from watcher.store.jobs import Job
from watcher.values import Config, Flow, HttpSettings, JobStatus, ScriptSettings


def now() -> datetime:
    return datetime.now(UTC)


async def _nowhere() -> str:
    return "http://127.0.0.1:1"


class Bench:
    """A directory with steps, and the jobs of one process over a database."""

    def __init__(self, db: Database, where: Path, stack: AsyncExitStack) -> None:
        self.db = db
        self.where = where
        self.stack = stack
        self.config = Config(file=None, database=db.url, data=where / "data", flows={})
        self.scripts = Scripts(ScriptSettings(workers=4))
        stack.push_async_callback(self.scripts.close)

    def flow(self, name: str, **steps: str) -> None:
        paths = tuple(write(self.where, text, f"{step}.py") for step, text in steps.items())
        flow = Flow(name=name, steps=paths, timeout=timedelta(seconds=20))
        self.config = replace(self.config, flows={**self.config.flows, name: flow})

    def jobs(self) -> Jobs:
        fetcher = Fetcher(HttpSettings(), now)
        self.stack.push_async_callback(fetcher.close)
        resolver = Resolver(lambda: self.config, self.db, None, environ={})
        return Jobs(lambda: self.config, self.db, self.scripts, fetcher, resolver, now, sessions=Sessions(_nowhere))

    @asynccontextmanager
    async def serving(self, jobs: Jobs) -> AsyncIterator[Jobs]:
        stop = asyncio.Event()
        task = asyncio.create_task(jobs.serve(stop))
        try:
            yield jobs
        finally:
            stop.set()
            await jobs.drain(5)
            await task

    async def ended(self, jobs: Jobs, id: str) -> Job:
        async with asyncio.timeout(30):
            while True:
                job = await jobs.get(id)
                assert job is not None
                if job.status not in (JobStatus.QUEUED, JobStatus.RUNNING):
                    return job
                await asyncio.sleep(0.02)  # another task ends it; its row is all that tells


@pytest.fixture
async def bench(db: Database, tmp_path: Path) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        yield Bench(db, tmp_path, stack)


FETCH = """
    from pathlib import Path

    def main(item: dict):
        Path("shared/note.txt").write_text(item["title"])
        print("fetched", item["title"])
        return {"title": item["title"], "length": len(item["title"])}
"""
POST = """
    from pathlib import Path

    def main(title: str, length: int):
        return f"{title}:{length}:{Path('shared/note.txt').read_text()}"
"""


async def test_steps_run_in_order_in_one_directory_that_is_gone_afterwards(bench: Bench) -> None:
    bench.flow("announce", fetch=FETCH, post=POST)
    id = str(uuid4())
    async with bench.serving(bench.jobs()) as jobs:
        assert await jobs.create(id, "announce", {"title": "news"})
        job = await bench.ended(jobs, id)
        assert (job.status, job.error) == (JobStatus.SUCCEEDED, "")
        assert json.loads(job.result or b"") == "news:4:news"
        assert json.loads(job.results) == [{"title": "news", "length": 4}, "news:4:news"]
        assert await until(lambda: not (bench.config.data / "jobs" / id).exists())


async def test_directories_that_nobody_needs_are_swept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.flow("announce", fetch=FETCH)
    jobs = bench.jobs()
    await jobs.create("waits", "announce", {"title": "a"})
    await jobs.create("over", "announce", {"title": "b"})
    await jobs.cancel("over", "")
    folders = [bench.config.data / "jobs" / name for name in ("waits", "over", "forgotten")]
    for folder in folders:
        folder.mkdir(parents=True)
    await jobs.sweep()
    assert all(folder.exists() for folder in folders), "they are fresh"
    monkeypatch.setattr("watcher.jobs.LEFT_ALONE", -1.0)
    await jobs.sweep()
    assert [folder.exists() for folder in folders] == [True, False, False]


async def test_the_same_id_again_is_the_same_job(bench: Bench) -> None:
    bench.flow("announce", fetch=FETCH)
    jobs = bench.jobs()
    id = str(uuid4())
    assert await jobs.create(id, "announce", {"title": "a"})
    assert not await jobs.create(id, "announce", {"title": "b"})
    async with bench.serving(jobs):
        job = await bench.ended(jobs, id)
    assert json.loads(job.args) == {"title": "a"}


async def test_a_flow_that_is_not_there_is_an_error_that_names_it(bench: Bench) -> None:
    with pytest.raises(NoSuchFlow, match=r"flows\.nowhere"):
        await bench.jobs().create(str(uuid4()), "nowhere", {})


async def test_what_all_steps_printed_is_kept_also_when_one_fails_and_its_end_is_logged(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.register("hunter2-hunter2")
    talks = "def main(item):\n    print('fetched', item['a'], 'with hunter2-hunter2')\n    return item"
    bench.flow("well", first=talks, second="def main(a):\n    print('posted' + '.' * 2000 + 'end')")
    bench.flow("broken", talk=talks, fail="def main(a):\n    print('trying')\n    raise ValueError('no room')")
    logger = Mock()
    monkeypatch.setattr("watcher.jobs._log", logger)
    async with bench.serving(bench.jobs()) as jobs:
        for name in ("well", "broken"):
            await jobs.create(name, name, {"a": 1})
            job = await bench.ended(jobs, name)
            assert job.logs.startswith("fetched 1 with *****\n" + ("posted" if name == "well" else "trying"))
    (well,), (broken,) = logger.info.call_args_list, logger.warning.call_args_list
    assert (well.args, broken.args) == (("job.succeeded",), ("job.failed",))
    assert well.kwargs["said"].endswith("..end")
    assert len(well.kwargs["said"]) == 500
    assert broken.kwargs["said"] == "fetched 1 with *****\ntrying"


async def test_a_step_that_fails_fails_the_job_with_its_own_words(bench: Bench) -> None:
    bench.flow("broken", first="def main(item): return 1", second="def main(x): raise ValueError('no such room')")
    id = str(uuid4())
    async with bench.serving(bench.jobs()) as jobs:
        await jobs.create(id, "broken", {"a": 1})
        job = await bench.ended(jobs, id)
    assert job.status is JobStatus.FAILED
    assert "second.py" in job.error
    assert "no such room" in job.error
    assert "ValueError" in job.detail
    assert await until(lambda: not (bench.config.data / "jobs" / id).exists())


async def test_a_step_finds_what_windmills_clients_look_for(bench: Bench) -> None:
    bench.flow(
        "environment",
        show="""
            import os

            def main(item):
                names = [n for n in os.environ if n.startswith("WM_") or n.startswith("BASE")]
                return {n: os.environ[n] for n in names}
        """,
    )
    id = str(uuid4())
    async with bench.serving(bench.jobs()) as jobs:
        await jobs.create(id, "environment", {})
        job = await bench.ended(jobs, id)
    seen = json.loads(job.result or b"")
    assert seen["BASE_INTERNAL_URL"] == "http://127.0.0.1:1"
    assert (seen["WM_WORKSPACE"], seen["WM_JOB_ID"], seen["WM_STATE_PATH"]) == ("main", id, "environment/a_user")
    assert seen["WM_TOKEN"].startswith("wtc_job_")
    assert "WM_STATE_PATH_NEW" not in seen


async def test_a_jobs_token_is_known_while_it_runs_and_not_after(bench: Bench) -> None:
    bench.flow(
        "token",
        show="""
            import os, time
            from pathlib import Path

            def main(where: str):
                Path(where).write_text(os.environ["WM_TOKEN"])
                while Path(where).exists():
                    time.sleep(0.01)
        """,
    )
    id, told = str(uuid4()), bench.where / "token"
    async with bench.serving(bench.jobs()) as jobs:
        await jobs.create(id, "token", str(told))  # type: ignore[arg-type]
        assert await until(lambda: told.exists() and bool(told.read_text()))
        token = told.read_text()
        session = jobs.sessions.find(token)
        assert session is not None
        assert session.job_id == id
        assert jobs.sessions.find("wtc_another") is None
        told.unlink()
        await bench.ended(jobs, id)
        with pytest.raises(Ended):
            jobs.sessions.find(token)


WAIT = """
    import time
    from pathlib import Path

    def main(item: dict):
        folder = Path(item["folder"])
        (folder / "starts").open("a").write("x")
        while (folder / "wait").exists():
            time.sleep(0.01)
        return Path("shared/first").read_text()
"""
FIRST = """
    from pathlib import Path

    def main(item: dict):
        (Path(item["folder"]) / "firsts").open("a").write("x")
        Path("shared/first").write_text("one")
        return item
"""


async def _abandon(bench: Bench, id: str) -> None:
    """Leave a job in its second step, as a process that was killed would."""
    stop = asyncio.Event()
    jobs = bench.jobs()
    await jobs.create(id, "long", {"folder": str(bench.where)})
    task = asyncio.create_task(jobs.serve(stop))
    assert await until(lambda: (bench.where / "starts").exists())
    running = jobs._running[id].task
    jobs._running[id].lost = True  # nothing is given back
    folder = bench.config.data / "jobs" / id
    kept = folder.with_name("kept")
    os.rename(folder, kept)
    running.cancel()
    await asyncio.wait([running])
    os.rename(kept, folder)
    stop.set()
    await task
    await bench.db.write(lambda tx: job_store.abandon(tx, now() - timedelta(minutes=1)))


async def test_a_job_whose_process_died_goes_on_at_the_interrupted_step(bench: Bench) -> None:
    bench.flow("long", first=FIRST, second=WAIT)
    (bench.where / "wait").touch()
    id = str(uuid4())
    await _abandon(bench, id)
    (bench.where / "wait").unlink()
    async with bench.serving(bench.jobs()) as jobs:
        job = await bench.ended(jobs, id)
    assert job.status is JobStatus.SUCCEEDED
    assert json.loads(job.result or b"") == "one"
    assert job.starts == 2
    assert (bench.where / "firsts").read_text() == "x"


async def test_a_job_whose_directory_is_gone_begins_again(bench: Bench) -> None:
    bench.flow("long", first=FIRST, second=WAIT)
    (bench.where / "wait").touch()
    id = str(uuid4())
    await _abandon(bench, id)
    (bench.where / "wait").unlink()
    os.rename(bench.config.data / "jobs" / id, bench.where / "elsewhere")
    async with bench.serving(bench.jobs()) as jobs:
        job = await bench.ended(jobs, id)
    assert job.status is JobStatus.SUCCEEDED
    assert (bench.where / "firsts").read_text() == "xx"


async def test_a_job_that_kills_its_process_each_time_is_given_up(bench: Bench) -> None:
    bench.flow("deadly", only="def main(item): return 1")
    id = str(uuid4())
    jobs = bench.jobs()
    await jobs.create(id, "deadly", {})
    for ago in (3, 2, 1):
        past, lease = now() - timedelta(minutes=ago), timedelta(seconds=1)
        claim = partial(job_store.claim, owner="dead", limit=1, now=past, lease=lease)
        assert [job.id for job in await bench.db.write(claim)] == [id]
    async with bench.serving(jobs):
        job = await bench.ended(jobs, id)
    assert job.status is JobStatus.FAILED
    assert "crashed" in job.error
    assert "3 times" in job.error


async def test_a_stop_gives_the_job_back_and_does_not_count_its_start(bench: Bench) -> None:
    bench.flow("long", first=FIRST, second=WAIT)
    (bench.where / "wait").touch()
    id = str(uuid4())
    jobs, stop = bench.jobs(), asyncio.Event()
    await jobs.create(id, "long", {"folder": str(bench.where)})
    task = asyncio.create_task(jobs.serve(stop))
    assert await until(lambda: (bench.where / "starts").exists())
    stop.set()
    await jobs.drain(0.05)
    await task
    job = await jobs.get(id)
    assert job is not None
    assert (job.status, job.starts, job.step) == (JobStatus.QUEUED, 0, 1)
    (bench.where / "wait").unlink()
    async with bench.serving(bench.jobs()) as later:
        assert (await bench.ended(later, id)).status is JobStatus.SUCCEEDED
    assert (bench.where / "firsts").read_text() == "x"


async def test_a_canceled_job_stops_and_stays_canceled(bench: Bench) -> None:
    bench.flow("long", first=FIRST, second=WAIT)
    (bench.where / "wait").touch()
    id = str(uuid4())
    async with bench.serving(bench.jobs()) as jobs:
        await jobs.create(id, "long", {"folder": str(bench.where)})
        assert await until(lambda: (bench.where / "starts").exists())
        assert await jobs.cancel(id, "no longer wanted")
        assert not await jobs.cancel(id, "twice")
        assert await until(lambda: not jobs._running)
        job = await jobs.get(id)
    assert job is not None
    assert (job.status, job.cancel_reason) == (JobStatus.CANCELED, "no longer wanted")


async def test_two_processes_share_the_jobs_and_run_each_once(bench: Bench) -> None:
    bench.flow(
        "count",
        only="""
            from pathlib import Path

            def main(item: dict):
                Path(item["file"]).open("a").write("x")
        """,
    )
    ids = [str(uuid4()) for _ in range(12)]
    async with bench.serving(bench.jobs()) as one, bench.serving(bench.jobs()) as two:
        for id in ids:
            await one.create(id, "count", {"file": str(bench.where / id)})
            two._woken.set()
        for id in ids:
            assert (await bench.ended(one, id)).status is JobStatus.SUCCEEDED
    assert {(bench.where / id).read_text() for id in ids} == {"x"}


async def test_a_step_is_not_run_twice_because_the_database_was_in_trouble(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.flow("long", first=FIRST, second="def main(item): return 'done'")
    step_done, troubles = job_store.step_done, ["locked", "full"]

    async def troubled(*args: object, **more: object) -> bool:
        if troubles:
            raise StoreError(troubles.pop())
        return await step_done(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(job_store, "step_done", troubled)
    id = str(uuid4())
    async with bench.serving(bench.jobs()) as jobs:
        await jobs.create(id, "long", {"folder": str(bench.where)})
        job = await bench.ended(jobs, id)
    assert job.status is JobStatus.SUCCEEDED
    assert (bench.where / "firsts").read_text() == "x"
    assert not troubles


async def test_a_job_that_another_process_took_over_writes_nothing_more(bench: Bench) -> None:
    bench.flow("long", first=FIRST, second=WAIT)
    (bench.where / "wait").touch()
    id = str(uuid4())
    async with bench.serving(bench.jobs()) as jobs:
        await jobs.create(id, "long", {"folder": str(bench.where)})
        assert await until(lambda: (bench.where / "starts").exists())
        late, lease = now() + timedelta(hours=1), timedelta(hours=1)
        taken = await bench.db.write(partial(job_store.claim, owner="another", limit=1, now=late, lease=lease))
        assert [job.id for job in taken] == [id]
        (bench.where / "wait").unlink()
        assert await until(lambda: not jobs._running)
        job = await jobs.get(id)
    assert job is not None
    assert (job.status, job.owner, job.step) == (JobStatus.RUNNING, "another", 1)


async def test_jobs_of_a_flow_take_turns_where_it_says_so(bench: Bench) -> None:
    """Each then sees the state that the one before left; those of another flow do not wait for them."""
    count = "from watcher import get_state, set_state\ndef main():\n    n = (get_state() or 0) + 1\n"
    bench.flow("turns", count=f"{count}    __import__('time').sleep(0.1)\n    set_state(n)\n    return n\n")
    bench.flow("other", other="def main(): return 'done'")
    flows = {**bench.config.flows, "turns": replace(bench.config.flows["turns"], at_once=1)}
    bench.config = replace(bench.config, flows=flows)
    jobs, ids = bench.jobs(), [str(uuid4()) for _ in range(5)]
    for id in ids:
        await jobs.create(id, "turns", {})
    await jobs.create(other := str(uuid4()), "other", {})
    async with bench.serving(jobs):
        assert (await bench.ended(jobs, other)).result == b'"done"'
        results = [(await bench.ended(jobs, id)).result for id in ids]
    assert results == [b"1", b"2", b"3", b"4", b"5"]
