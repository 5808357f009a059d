"""Every named failpoint, with kill, raise and hang: the service is started again and the promise still holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lanes.harness import compare, query, stage, until
from watcher.failpoint import NAMES

AFTER_START = ("mid_reload",)


@pytest.mark.long
@pytest.mark.timeout(180)
@pytest.mark.parametrize("action", ["kill", "raise", "hang"])
@pytest.mark.parametrize("name", NAMES)
def test_the_promise_holds_after(name: str, action: str, tmp_path: Path) -> None:
    database = tmp_path / "watcher.db"
    with stage(tmp_path) as (service, source, receiver):
        source.grow(30, 0)
        # The second time it is reached, where it is reached often: the first commit is then already behind us.
        nth = 1 if name in ("mid_migration", "mid_checkpoint", "mid_reload", "lease_release") else 2
        process = service.start(failpoint=f"{name}:{action}@{nth}")
        if name == "mid_migration":
            if action == "hang":
                until(lambda: "failpoint" in service.tail() or database.exists(), 20, "the migration begins")
        else:
            assert service.ready(), service.tail()
        for _ in range(4):
            if process.poll() is not None:
                break
            source.grow(3, 2)
            if name == "mid_reload":
                service.write("watcher.toml", service.config + "\n# touched\n[http]\ntimeout = '20s'\n")
            size = receiver.log.stat().st_size
            # Whatever the failpoint did, give the service the chance to go on from it.
            try:
                until(lambda size=size: receiver.log.stat().st_size > size or process.poll() is not None, 1.5, "news")
            except AssertionError:
                break
        if name in ("mid_checkpoint", "lease_release") and process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except Exception:
                assert action == "hang", service.tail()
        service.kill()

        source.grow(3, 3)
        service.start()
        assert service.ready(), service.tail()
        until(
            lambda: (
                len(query(database, "SELECT 1 FROM seen")) == len(source.items)
                and not query(database, "SELECT 1 FROM delivery WHERE status = 0")
                and compare(database, receiver, source).stale == 0
            ),
            seconds=60,
            what="the backlog drains",
            every=0.1,
        )
        assert service.stop() == 0, service.tail()
        report = compare(database, receiver, source)
        assert report.clean, report
