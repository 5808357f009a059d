"""Jobs at the command line: how they ended, and what their steps printed."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.cli import Desk, desk
from watcher.store import jobs as job_store
from watcher.store import migrate
from watcher.store.db import Database
from watcher.values import JobStatus

FLOW = """
[server]
bind = "127.0.0.1:0"

[flows.announce]
steps = ["announce.py", "record.py"]
"""
LEASE = timedelta(seconds=30)


@pytest.fixture
def watcher(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    for name in ("announce", "record"):
        (tmp_path / f"{name}.py").write_text("def main(item):\n    print(item)")
    new = desk(tmp_path, capsys, monkeypatch)
    new.configure(FLOW)
    asyncio.run(some_jobs(tmp_path))
    return new


async def some_jobs(where: Path) -> None:
    now = datetime.now(UTC)
    db = await Database.open(f"sqlite:///{where / 'watcher.db'}")
    await migrate.upgrade(db, backup_to=None, now=now)
    for id, status in (("good", JobStatus.SUCCEEDED), ("bad", JobStatus.FAILED), ("waiting", None)):

        async def work(tx: object, id: str = id, status: JobStatus | None = status) -> None:
            await job_store.create(tx, id, "flow", "announce", b'{"title": "news"}', now)  # type: ignore[arg-type]
            if status is None:
                return
            await job_store.claim(tx, "us", limit=1, now=now, lease=LEASE)  # type: ignore[arg-type]
            await job_store.finish(
                tx, id, "us", status, result=b'{"posted": true}' if id == "good" else None,  # type: ignore[arg-type]
                error="" if id == "good" else "raised: step record.py: ValueError: no room",
                detail="" if id == "good" else "Traceback\n  line 2", logs="it says\x1b[31m news\n", now=now,
            )  # fmt: skip

        await db.write(work)
    await db.close()


def test_the_newest_jobs_are_listed_with_how_they_ended(watcher: Desk) -> None:
    lines = {line.split()[0]: line for line in watcher("jobs").splitlines()}
    assert "succeeded" in lines["good"]
    assert "ValueError: no room" in lines["bad"]
    assert "queued" in lines["waiting"]
    assert [job["id"] for job in watcher.json("jobs", "announce", "--status", "failed")] == ["bad"]
    assert "args" not in watcher.json("jobs")[0]


def test_one_job_shows_what_its_steps_printed_and_cannot_steer_the_terminal(watcher: Desk) -> None:
    out = watcher("job", "good")
    assert "printed:\nit says\\x1b[31m news\n" in out
    assert '"posted": true' in out
    out = watcher("job", "bad")
    assert "no room" in out
    assert "line 2" in out
    job = watcher.json("job", "good")
    assert (job["args"], job["result"], job["steps"]) == ({"title": "news"}, {"posted": True}, 2)


def test_the_status_counts_the_jobs_that_failed(watcher: Desk) -> None:
    assert "1 job failed in the last day: `watcher jobs announce --status failed`" in watcher("status")


def test_wrong_names_are_refused_with_what_there_is(watcher: Desk) -> None:
    watcher("jobs", "anounce", expect=2)
    assert "did you mean announce" in watcher.err
    watcher("jobs", "sink", expect=2)
    assert "`watcher deliveries --flow sink`" in watcher.err
    watcher("jobs", "--status", "lost", expect=2)
    watcher("job", "nope", expect=2)
    assert "`watcher jobs` lists them" in watcher.err
