"""The git trigger: each commit exactly once, whatever happens to the branches."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.watching import Watching, fetcher
from watcher.errors import TriggerError
from watcher.scripts import Scripts
from watcher.values import ScriptSettings

WHO = {
    "GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.com", "GIT_COMMITTER_NAME": "C",
    "GIT_COMMITTER_EMAIL": "c@example.com", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null",
}  # fmt: skip


class Repo:
    def __init__(self, path: Path, *clone: str) -> None:
        self.path = path
        self.git("init", "-q", "-b", "main", str(path), at=path.parent) if not clone else self.git(
            "clone", "-q", *clone, str(path), at=path.parent
        )

    def git(self, *arguments: str, at: Path | None = None, stdin: bytes = b"", **env: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=at or self.path, env={**os.environ, **WHO, **env}, input=stdin, check=True,
            capture_output=True,
        )  # fmt: skip
        return done.stdout.decode("utf-8", "replace").strip()

    def commit(self, subject: str, **env: str) -> str:
        self.git("commit", "-q", "--allow-empty", "-m", subject, **env)
        return self.git("rev-parse", "HEAD")

    def import_commits(self, count: int, branch: str = "main") -> None:
        """Many at once: a commit command for each would take minutes."""
        lines = []
        for number in range(count):
            message = f"commit {number}"
            lines.append(
                f"commit refs/heads/{branch}\ncommitter C <c@example.com> {1700000000 + number} +0000\n"
                f"data {len(message)}\n{message}\n"
            )
        self.git("fast-import", "--quiet", "--force", stdin="".join(lines).encode())


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return Repo(tmp_path / "repo")


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scripts() -> AsyncIterator[Scripts]:
    scripts = Scripts(ScriptSettings())
    await scripts.start()
    yield scripts
    await scripts.close()


def watching(scripts: Scripts, repo: Repo, **args: Any) -> Watching:
    return Watching(scripts, fetcher(), "git", repo=str(repo.path), **args)


def subjects(items: list[Any]) -> list[str]:
    return [item["subject"] for item in items]


async def test_each_new_commit_is_found_once_oldest_first(scripts: Scripts, repo: Repo) -> None:
    repo.commit("one")
    w = watching(scripts, repo)
    assert subjects(await w.poll()) == ["one"]
    repo.commit("two")
    repo.commit("three")
    assert subjects(await w.poll()) == ["two", "three"]
    assert await w.poll() == []


async def test_the_first_run_lists_the_newest_first(scripts: Scripts, repo: Repo) -> None:
    for name in ("one", "two", "three"):
        repo.commit(name)
    assert subjects(await watching(scripts, repo).poll()) == ["three", "two", "one"]


async def test_an_item_says_what_git_knows(scripts: Scripts, repo: Repo) -> None:
    first = repo.commit("one")
    sha = repo.commit("zwei: «ü»\n\nLonger.\n\nAnd more.", GIT_AUTHOR_DATE="2020-01-02T03:04:05+02:00")
    (item,) = [item for item in await watching(scripts, repo).poll() if item["sha"] == sha]
    assert item["subject"] == "zwei: «ü»"
    assert item["body"] == "Longer.\n\nAnd more."
    assert item["author"] == {"name": "A", "email": "a@example.com", "date": "2020-01-02T03:04:05+02:00"}
    assert item["committer"]["name"] == "C"
    assert item["parents"] == [first]


async def test_a_repository_without_commits_then_its_first(scripts: Scripts, repo: Repo) -> None:
    w = watching(scripts, repo)
    assert await w.poll() == []
    repo.commit("one")
    assert subjects(await w.poll()) == ["one"]


async def test_a_merged_branch_brings_commits_older_than_what_was_seen(
    scripts: Scripts, repo: Repo, tmp_path: Path
) -> None:
    repo.commit("base")
    elsewhere = Repo(tmp_path / "elsewhere", str(repo.path))
    elsewhere.commit("long ago", GIT_COMMITTER_DATE="2001-01-01T00:00:00Z")
    repo.commit("today")
    w = watching(scripts, repo, branch="main")
    await w.poll()
    repo.git("fetch", "-q", str(elsewhere.path), "main")
    repo.git("merge", "-q", "-m", "merge", "FETCH_HEAD")
    assert sorted(subjects(await w.poll())) == ["long ago", "merge"]


async def test_a_new_branch_is_found_and_a_deleted_one_is_nothing(scripts: Scripts, repo: Repo) -> None:
    repo.commit("base")
    w = watching(scripts, repo)
    await w.poll()
    repo.git("checkout", "-q", "-b", "side")
    repo.commit("aside")
    repo.git("checkout", "-q", "main")
    assert subjects(await w.poll()) == ["aside"]
    repo.git("branch", "-q", "-D", "side")
    assert await w.poll() == []
    repo.commit("on")
    assert subjects(await w.poll()) == ["on"]


async def test_a_force_push_finds_only_what_is_new(scripts: Scripts, repo: Repo) -> None:
    repo.commit("one")
    old = repo.commit("two")
    w = watching(scripts, repo)
    await w.poll()
    repo.git("reset", "-q", "--hard", "HEAD~1")
    repo.commit("two, better")
    assert subjects(await w.poll()) == ["two, better"]
    repo.git("reset", "-q", "--hard", old)
    assert await w.poll() == []  # the old one is back: it was found before


async def test_what_a_force_push_left_behind_is_thrown_away(scripts: Scripts, repo: Repo) -> None:
    repo.commit("one")
    repo.commit("two")
    w = watching(scripts, repo)
    await w.poll()
    repo.git("reset", "-q", "--hard", "HEAD~1")
    repo.commit("two, better")
    repo.git("reflog", "expire", "--expire=now", "--all")
    repo.git("gc", "-q", "--prune=now")
    assert subjects(await w.poll()) == ["two, better"]
    assert await w.poll() == []


async def test_many_commits_between_two_runs_come_in_batches_and_all(scripts: Scripts, repo: Repo) -> None:
    repo.commit("base")
    w = watching(scripts, repo)
    await w.poll()
    repo.import_commits(12_000, "other")
    found = [subjects(await w.poll()) for _ in range(4)]
    assert [len(one) for one in found] == [5000, 5000, 2000, 0]
    assert [subject for one in found for subject in one] == [f"commit {n}" for n in range(12_000)]


async def test_a_listing_reaches_back_to_what_is_known(scripts: Scripts, repo: Repo) -> None:
    """Else it would look as if something had been missed."""
    known = repo.commit("base")
    w = watching(scripts, repo)
    await w.poll()
    for number in range(20):
        repo.commit(str(number))
    assert known in [entry.key for entry in (await w.look()).entries]


async def test_a_shallow_clone(scripts: Scripts, repo: Repo, tmp_path: Path) -> None:
    for number in range(5):
        repo.commit(f"old {number}")
    clone = Repo(tmp_path / "clone", "--depth=1", f"file://{repo.path}")
    w = watching(scripts, clone)
    assert subjects(await w.poll()) == ["old 4"]
    repo.commit("new 1")
    repo.commit("new 2")
    clone.git("fetch", "-q")
    assert subjects(await w.poll()) == ["new 1", "new 2"]
    repo.commit("new 3")
    clone.git("fetch", "-q", "--depth=1")
    assert subjects(await w.poll()) == ["new 3"]
    clone.git("fetch", "-q", "--unshallow")
    assert await w.poll() == []


async def test_a_bare_repository_and_a_detached_head(scripts: Scripts, repo: Repo, tmp_path: Path) -> None:
    repo.commit("one")
    bare = Repo(tmp_path / "bare.git", "--bare", str(repo.path))
    assert subjects(await watching(scripts, bare).poll()) == ["one"]
    w = watching(scripts, repo)
    await w.poll()
    repo.git("checkout", "-q", "--detach")
    repo.commit("off every branch")
    assert subjects(await w.poll()) == ["off every branch"]


async def test_only_the_branch_asked_for(scripts: Scripts, repo: Repo) -> None:
    repo.commit("base")
    w = watching(scripts, repo, branch="main")
    await w.poll()
    repo.git("checkout", "-q", "-b", "side")
    repo.commit("aside")
    assert await w.poll() == []
    repo.git("checkout", "-q", "main")
    repo.git("merge", "-q", "--ff-only", "side")
    assert subjects(await w.poll()) == ["aside"]


@pytest.mark.parametrize(
    ("path", "branch", "says"),
    [
        ("nowhere", None, "there is no folder"),
        ("folder", None, "not a git repository"),
        ("repo", "mian", "no branch 'mian'"),
        ("repo", "--upload-pack=x", "no branch"),
    ],
)
async def test_what_cannot_be_read_is_an_error_that_names_it(
    scripts: Scripts, repo: Repo, tmp_path: Path, path: str, branch: str | None, says: str
) -> None:
    repo.commit("one")
    (tmp_path / "folder").mkdir()
    w = Watching(scripts, fetcher(), "git", repo=str(tmp_path / path), branch=branch)
    with pytest.raises(TriggerError, match=says) as caught:
        await w.poll()
    assert path in str(caught.value)


async def test_what_the_repository_configures_is_not_run(scripts: Scripts, repo: Repo, tmp_path: Path) -> None:
    repo.commit("one")
    mark = tmp_path / "mark"
    for name in ("core.pager", "core.fsmonitor", "gpg.program", "core.sshCommand", "diff.external"):
        repo.git("config", name, f"touch {mark}; false")
    repo.git("config", "log.showSignature", "true")
    w = watching(scripts, repo)
    assert subjects(await w.poll()) == ["one"]
    repo.git("-c", "core.fsmonitor=", "commit", "-q", "--allow-empty", "-m", "two")
    assert subjects(await w.poll()) == ["two"]
    assert not mark.exists()


async def test_a_message_with_a_line_for_every_field(scripts: Scripts, repo: Repo) -> None:
    repo.commit("s\n\n\x01a\n\ncommit deadbeef\n%x00%H\n")
    (item,) = await watching(scripts, repo).poll()
    assert item["body"] == "\x01a\n\ncommit deadbeef\n%x00%H"
