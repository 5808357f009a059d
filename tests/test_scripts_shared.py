"""The directory of a job: ./shared for each, /shared where the machine lets a process have its own view of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.scripts import FakeHost, write
from watcher.errors import TriggerError
from watcher.scripts import Call, Scripts
from watcher.scripts.shared import looks_for_shared, on_demand, own_folder, places
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


LABELLED = """
    import os
    from pathlib import Path
    from watcher import shared, trigger

    LABEL
    def main(name: str):
        again = shared() / "before"
        found = again.exists(), os.listdir(shared()), Path("words.txt").read_text()
        again.write_text(name)
        Path(name).write_text("kept")
        return [{"id": 1, "found": found, "shared": str(shared()), "same": shared() == again.parent}]
    """


@pytest.mark.parametrize("label", ['@trigger(key="id")', '@trigger(key="id", cursor="id")', ""])
async def test_each_run_of_a_labelled_script_has_a_directory_of_its_own_beside_the_relative_paths_it_reads(
    scripts: Scripts, tmp_path: Path, label: str
) -> None:
    (tmp_path / "words.txt").write_text("words")
    script = write(tmp_path, LABELLED.replace("LABEL", label))
    for name in ("first", "second"):  # the same warm worker
        async with on_demand() as shared:
            call = Call(script, {"name": name}, cwd=tmp_path, shared=shared)
            (entry,) = (await scripts.call(call, FakeHost())).entries
            assert entry.item["found"] == [False, [], "words"]
            assert entry.item["shared"] == str(shared())
            assert entry.item["same"]
            assert (tmp_path / name).read_text() == "kept"  # what it writes beside it stays
        assert not shared().parent.exists()


async def test_the_directory_of_a_script_that_hangs_or_dies_goes_too(scripts: Scripts, tmp_path: Path) -> None:
    for ending, kind in (("time.sleep(60)", "timeout"), ("os._exit(3)", "crashed")):
        script = write(tmp_path, f"""
            import os, time
            from watcher import shared, trigger
            @trigger(key="id")
            def main():
                (shared() / "left").write_text("x")
                (shared() / "dir").mkdir()
                {ending}
            """)  # fmt: skip
        async with on_demand() as shared:
            with pytest.raises(TriggerError) as caught:
                await scripts.call(Call(script, shared=shared, timeout=timedelta(seconds=2)), FakeHost())
            assert caught.value.kind == kind
            assert (shared() / "left").exists()
        assert not shared().parent.exists()


async def test_nothing_is_made_for_a_script_that_does_not_ask(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "def main(): return []\n")
    asked = []

    def shared() -> Path:
        asked.append(1)
        return tmp_path

    await scripts.call(Call(script, shared=shared), FakeHost())
    assert asked == []


async def test_other_languages_are_told_where_it_is(scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("words")
    shell = write(tmp_path, """
        #!/bin/sh
        # @trigger(key="id")
        touch "$WM_SHARED/new" && printf '{"id": "%s", "words": "%s"}' "$WM_SHARED" "$(cat words.txt)"
        """.strip(), "shell")  # fmt: skip
    shell.write_text("\n".join(line.strip() for line in shell.read_text().splitlines()))
    shell.chmod(0o755)
    typescript = write(tmp_path, """
        // @trigger(key="id")
        export async function main() {
            const shared = Deno.env.get("WM_SHARED");
            await Deno.writeTextFile(`${shared}/new`, "x");
            const refused = await Deno.writeTextFile("new", "x").then(() => false, () => true);
            return [{ id: shared, words: await Deno.readTextFile("words.txt"), refused }];
        }
        """, "it.ts")  # fmt: skip
    for script, more in ((shell, {}), (typescript, {"refused": True})):
        async with on_demand() as shared:
            call = Call(script, cwd=tmp_path, shared=shared, timeout=SECONDS)
            (entry,) = (await scripts.call(call, FakeHost())).entries
            assert entry.item == {"id": str(shared()), "words": "words", **more}
            assert (shared() / "new").exists()
        assert not shared().parent.exists()


async def test_the_steps_of_a_job_share_what_they_find_by_either_name(scripts: Scripts, tmp_path: Path) -> None:
    first = write(tmp_path, """
        from watcher import shared
        def main(item):
            (shared() / "a").write_text("from a call")
        """, "first.py")  # fmt: skip
    second = write(tmp_path, "def main(item):\n    return open('./shared/a').read()\n", "second.py")
    async with own_folder() as job:
        await scripts.step(first, {"item": 1}, cwd=job, host=FakeHost())
        assert (await scripts.step(second, {"item": 1}, cwd=job, host=FakeHost())).result == "from a call"


async def test_what_a_killed_service_left_is_removed_at_the_next_start_and_what_is_in_use_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import asyncio, os; from watcher.scripts.shared import own_folder\n"
    code += "async def main():\n async with own_folder() as f:\n  (f/'shared'/'x').write_text('x'); os._exit(9)\n"
    subprocess.run(
        [sys.executable, "-c", f"{code}asyncio.run(main())"],
        cwd=Path(__file__).parent.parent, check=False, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    (left,) = tmp_path.iterdir()
    (tmp_path / "watcher-run-link").symlink_to(tmp_path.parent)
    (tmp_path / "watcher-run-file").write_text("somebody's")
    (tmp_path / "another").mkdir()
    async with own_folder() as used:
        scripts = Scripts(ScriptSettings(), data=tmp_path / "data")
        await scripts.start()
        await scripts.close()
        assert (used / "shared").is_dir()
    assert not left.exists()
    assert {path.name for path in tmp_path.iterdir()} >= {"watcher-run-link", "watcher-run-file", "another"}


def test_only_a_script_that_says_shared_gets_a_view_of_its_own(tmp_path: Path) -> None:
    script = write(tmp_path, "def main(): return []\n")
    assert not looks_for_shared(script)
    script.write_text("from wmill import set_shared_state\n")
    assert looks_for_shared(script)
    script.write_text("import { SHARED_FOLDER } from 'windmill-client'\n")
    assert looks_for_shared(script)
    assert places(Call(script)) == []
    assert tmp_path / "shared" in places(Call(script, cwd=tmp_path, shared=lambda: tmp_path / "shared"))
    assert places(Call(script, cwd=tmp_path, shared=lambda: tmp_path / "x" / "shared")) == [tmp_path / "x" / "shared"]
