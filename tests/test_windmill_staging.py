"""What a run writes meanwhile, without a client: paths, tokens, the one commit, and a database in trouble."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support import running
from tests.support.running import ALL, Bench
from watcher.errors import StoreError
from watcher.resolve import Resolver
from watcher.run import Runner
from watcher.staging import Ended, Session, Sessions, schedule_path, script_path, state_path, step_id
from watcher.store import resources
from watcher.store.db import Database
from watcher.values import Watcher

AT = datetime(2026, 3, 1, tzinfo=UTC)
FILE = Path("/etc/watcher/watcher.toml")


@pytest.mark.parametrize(
    ("name", "trigger", "path"),
    [
        ("news", "hacker_news", "f/triggers/hacker_news/schedule-f-watchers-news"),
        ("news", "./my.py", "f/my/schedule-f-watchers-news"),
        ("every5", "./f/a/watch.py", "f/a/watch/schedule-f-watchers-every5"),
        ("f/a/every5", "./f/a/watch.bun.ts", "f/a/watch/schedule-f-a-every5"),
        ("u/me/x", "./u/me/x.py", "u/me/x/schedule-u-me-x"),
        ("a b?c", "./w#1.py", "f/w_1/schedule-f-watchers-a_b_c"),
    ],
)
def test_the_path_of_a_state_is_windmills_with_the_watcher_as_the_schedule(name: str, trigger: str, path: str) -> None:
    script = Path("/usr/lib/triggers/hacker_news.py") if "/" not in trigger else FILE.parent / trigger[2:]
    watcher = Watcher(name=name, trigger=trigger, script=script)
    assert state_path(watcher, FILE) == path
    assert path.startswith(script_path(watcher, FILE))
    assert schedule_path(name).startswith(("f/", "u/"))


def test_steps_have_letters_and_then_two() -> None:
    assert [step_id(n) for n in (0, 25, 26, 27, 701, 702)] == ["a", "z", "aa", "ab", "zz", "aaa"]


def test_a_token_is_good_for_one_job_until_it_ends() -> None:
    sessions, session = Sessions(), Session("watcher", "w", "f/w", AT)
    with sessions.open(session) as token:
        assert sessions.find(token) is session
        assert sessions.find("wtc_of_somebody") is None
        with pytest.raises(Ended):
            sessions.find(f"{token}x")
        sessions.supersede("w")
        with pytest.raises(Ended):
            sessions.find(token)
        with pytest.raises(Ended):
            session.stage("f/w", 1)
    assert sessions.all() == []


@pytest.fixture
async def bench(db: Database, tmp_path: Path, now: datetime) -> AsyncIterator[Bench]:
    async with running.running(db, tmp_path, now) as found:
        yield found


async def test_a_state_at_another_path_is_committed_with_the_items_or_not_at_all(bench: Bench) -> None:
    bench.configure(first_run=ALL)
    bench.script("""
        from watcher import get_state, set_state
        def main(url: str):
            n = (get_state("u/me/n") or 0) + 1
            set_state(n, "u/me/n")
            set_state(n)
            return [{"id": n}]
    """)
    await bench.sync()
    assert (await bench.run()).outcome == "ok"
    assert (await bench.run()).outcome == "ok"
    async with bench.db.read() as tx:
        row = await resources.get(tx, "u/me/n")
    assert row is not None
    assert (row.value, row.type, row.created_by) == (2, "state", "watchers.w")
    assert (await bench.memory()).state == 2

    plan = await bench.runner.plan("w")
    assert [(s.path, s.value, s.expected) for s in plan.proposal.states] == [("u/me/n", 3, 2)]
    assert type(plan).from_json(plan.to_json()).proposal.states == list(plan.proposal.states)
    await bench.db.write(lambda tx: resources.put(tx, "u/me/n", "state", 50, bench.now))
    assert (await bench.runner.apply(plan)).outcome == "conflict"
    assert (await bench.memory()).state == 2  # its own state moved as little as the other
    assert await bench.keys() == ["1", "2"]


async def test_a_run_whose_state_could_not_be_read_commits_nothing_whatever_its_script_made_of_it(
    sqlite_db: Database, tmp_path: Path, now: datetime
) -> None:
    async with running.running(sqlite_db, tmp_path, now) as bench:
        bench.configure(first_run=ALL)
        bench.script("""
            from watcher import get_state, set_state
            def main(url: str):
                try:
                    last = get_state("u/me/n")
                except Exception:
                    last = None
                set_state("first!")
                return [{"id": 1}]
        """)
        await bench.sync()
        runner = Runner(
            lambda: bench.config, bench.db, bench.scripts, bench.fetcher,
            Resolver(lambda: bench.config, bench.db, None, environ={}), lambda: bench.now, lambda flows: None,
            Sessions(patience=0.3),
        )  # fmt: skip
        with closing(sqlite3.connect(tmp_path / "watcher.db", isolation_level=None, timeout=30)) as db:
            db.execute("ALTER TABLE resource RENAME TO away")
            with pytest.raises(StoreError, match="could not be read"):
                await runner.run("w")
            db.execute("ALTER TABLE away RENAME TO resource")
        assert (await bench.keys(), (await bench.memory()).version) == ([], 0)
        assert (await runner.run("w")).outcome == "ok"


async def test_a_superseded_run_is_told_so_and_keeps_nothing(bench: Bench, tmp_path: Path) -> None:
    bench.configure(first_run=ALL)
    gate = tmp_path / "gate"
    bench.script(f"""
        import time
        from pathlib import Path
        from watcher import get_state, set_state
        def main(url: str):
            first = get_state() is None and not Path({str(gate)!r}).exists()
            Path({str(gate)!r}).touch()
            while first and not Path({str(tmp_path / "go")!r}).exists():
                time.sleep(0.01)
            set_state("slow" if first else "fast")
            return [{{"id": "slow" if first else "fast"}}]
    """)
    await bench.sync()
    slow = asyncio.create_task(bench.runner.run("w"))
    while not gate.exists():
        await asyncio.sleep(0.01)
    assert (await bench.runner.run("w")).outcome == "ok"
    (tmp_path / "go").touch()
    record = await slow
    assert record.outcome == "conflict"
    assert await bench.keys() == ["fast"]
