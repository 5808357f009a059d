"""The directory of a job: ./shared for each, /shared where the machine lets a process have its own view of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.scripts import FakeHost, write
from watcher.scripts import Call, Scripts
from watcher.scripts.shared import looks_for_shared, own_folder, places
from watcher.values import ScriptSettings

SECONDS = timedelta(seconds=60)
SEEN = subprocess.run(
    [sys.executable, "-c", "import os; from watcher.scripts.warden import *; show_shared(); os.readlink('/shared')"],
    cwd=Path(__file__).parent.parent, check=False, stderr=subprocess.DEVNULL,
).returncode == 0  # fmt: skip

everywhere = pytest.mark.skipif(not SEEN, reason="nobody may have a mount namespace on this machine")


@pytest.fixture
async def scripts(tmp_path: Path) -> AsyncIterator[Scripts]:
    found = Scripts(ScriptSettings(workers=2), data=tmp_path / "data")
    yield found
    await found.close()


@everywhere
async def test_the_steps_of_a_job_find_each_others_files_in_shared_by_windmills_own_helpers(
    scripts: Scripts, tmp_path: Path
) -> None:
    first = write(tmp_path, """
        import wmill
        def main(n: int):
            wmill.set_shared_state({"n": n})
            wmill.set_shared_state_pickle({n}, "more.pickle")
            open("./shared/plain", "w").write("p" * n)
        """, "first.py")  # fmt: skip
    second = write(tmp_path, """
        export async function main() {
            await Deno.writeTextFile("/shared/from_ts", "t");
            return JSON.parse(await Deno.readTextFile("/shared/state.json"));
        }
        """, "second.ts")  # fmt: skip
    third = write(tmp_path, "#!/bin/sh\nprintf '\"%s%s\"' $(cat /shared/plain) $(cat ./shared/from_ts)\n", "third")
    third.chmod(0o755)
    last = write(tmp_path, """
        import os, wmill
        def main():
            return [wmill.get_shared_state(), list(wmill.get_shared_state_pickle("more.pickle")), os.getcwd()]
        """, "last.py")  # fmt: skip
    for n in (2, 3):  # two jobs, and the same warm workers
        async with own_folder() as job:
            done = [
                (await scripts.step(script, {"n": n}, cwd=job, timeout=SECONDS, host=FakeHost())).result
                for script in (first, second, third, last)
            ]
            assert done == [None, {"n": n}, "p" * n + "t", [{"n": n}, [n], str(job)]]
        assert not job.exists()
    assert not os.path.lexists("/shared")  # nobody else sees anything of it


@everywhere
async def test_the_rest_of_the_machine_looks_as_it_is_and_its_root_cannot_be_written(
    scripts: Scripts, tmp_path: Path
) -> None:
    script = write(tmp_path, """
        import os
        def main():  # shared
            def try_(work):
                try: return work()
                except OSError as error: return error.strerror
            return [{
                "id": 1, "root": sorted(os.listdir("/")), "write": try_(lambda: open("/new", "w")),
                "tmp": sorted(os.listdir("/tmp")), "user": os.getuid(), "here": try_(lambda: os.listdir("/shared")),
            }]
        """)  # fmt: skip
    (listing,) = (await scripts.call(Call(script, cwd=tmp_path), FakeHost())).entries
    root = sorted({*os.listdir("/"), "shared"})
    assert listing.item["root"] == root
    assert listing.item["write"] == "Read-only file system"
    assert {path.name for path in tmp_path.parents if path.parent == Path("/tmp")} <= {*listing.item["tmp"]}
    assert listing.item["user"] == os.getuid()
    assert listing.item["here"] == "No such file or directory"


async def test_a_folder_of_its_own_is_gone_whatever_was_left_in_it() -> None:
    async with own_folder() as empty:
        assert [path.name for path in empty.iterdir()] == ["shared"]
    async with own_folder() as full:
        (full / "shared" / "a" / "b").mkdir(parents=True)
    assert not empty.exists()
    assert not full.exists()


def test_only_a_script_that_says_shared_gets_a_view_of_its_own(tmp_path: Path) -> None:
    script = write(tmp_path, "def main(): return []\n")
    assert not looks_for_shared(script)
    script.write_text("from wmill import set_shared_state\n")
    assert looks_for_shared(script)
    script.write_text("import { SHARED_FOLDER } from 'windmill-client'\n")
    assert looks_for_shared(script)
    assert places(None) == []
    assert tmp_path / "shared" in places(tmp_path)
