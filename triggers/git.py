"""New commits of a local git repository, on any branch, each exactly once: after a merge, a force push, a rebase too.

    [watchers.commits]
    trigger = "git"
    every = "10s"
    flow = "announce"
    with = { repo = "/srv/git/project.git", branch = "main" }   # no branch: all of them

It asks git for what can be reached from the branches now and could not be reached at the last run, so a run costs
about what is new, and the date of a commit means nothing. The repository is only read; to follow a remote one, let a
timer run ``git fetch`` in it. What a shallow clone does not hold cannot be found.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from watcher import get_state, set_state, trigger

BATCH = 5000  # commits of one run; what is more comes with the next ones, oldest first
MEETING = 10  # known commits listed again, so that it shows where new meets old
FIELDS = ("%H", "%P", "%an", "%ae", "%aI", "%cn", "%cI", "%s", "%b")
LONGEST_MESSAGE = 20_000  # characters


@trigger(key="sha")
def main(repo: str, branch: str | None = None) -> list[dict[str, Any]]:
    """List the commits that came since the last run; at the first run the newest ones, newest first.

    Args:
        repo: the repository's folder, with or without a working tree.
        branch: only this branch ("main", "origin/main") or other name of a commit. Default: every local and
            remote-tracking branch and HEAD.
    """
    git = Git(repo)
    tips = git.tips(branch)
    before = get_state()
    if before is None:
        set_state(tips)
        return git.log("--date-order", f"--max-count={BATCH}", commits=tips)
    if tips == before:
        return []
    met = git.existing(before)
    found = git.new(tips, met)
    some = found[:BATCH]
    set_state(tips if len(some) == len(found) else frontier(met, some))
    fresh = git.log("--no-walk=unsorted", commits=[sha for sha, _ in some])
    return fresh + git.log("--no-walk=sorted", f"--max-count={MEETING}", commits=met)


def frontier(met: list[str], some: list[tuple[str, list[str]]]) -> list[str]:
    """What is reached when only the first of the new commits are taken: parents come before their children."""
    parents = {parent for _, of in some for parent in of}
    return sorted({*(sha for sha, _ in some), *met} - parents)


class Git:
    """One repository, asked through the git command: nothing that its own configuration names is run."""

    def __init__(self, repo: str) -> None:
        self.repo = Path(repo).expanduser()
        if not self.repo.is_dir():
            raise FileNotFoundError(f"there is no folder {str(self.repo)!r}: check `repo`")

    def tips(self, branch: str | None) -> list[str]:
        """The commits at which the branches stand; none in a repository without commits."""
        if branch is not None:
            found = self.run(
                "rev-parse", "--verify", "--quiet", "--end-of-options", f"{branch}^{{commit}}", codes=(0, 1)
            )
            if not found and self.tips(None):
                raise LookupError(f"{self.repo} has no branch {branch!r}: check `branch`")
            return found.split()
        listed = self.run("for-each-ref", "--format=%(objectname)", "refs/heads", "refs/remotes").split()
        head = self.run("rev-parse", "--verify", "--quiet", "HEAD^{commit}", codes=(0, 1)).split()
        return sorted({*listed, *head})

    def existing(self, commits: list[str]) -> list[str]:
        """Those that are still there: after a force push, git throws away what no branch holds."""
        answers = self.run("cat-file", "--batch-check", stdin=commits).splitlines()
        return [sha for sha, answer in zip(commits, answers, strict=True) if answer.split()[1:2] == ["commit"]]

    def new(self, tips: list[str], met: list[str]) -> list[tuple[str, list[str]]]:
        """Commits and their parents, of all that can be reached from `tips` and not from `met`, parents first."""
        lines = self.run(
            "rev-list", "--topo-order", "--reverse", "--parents", "--stdin", stdin=[*tips, *(f"^{sha}" for sha in met)]
        ).splitlines()
        return [(line.split()[0], line.split()[1:]) for line in lines]

    def log(self, *options: str, commits: list[str]) -> list[dict[str, Any]]:
        """What there is to say about commits."""
        if not commits:
            return []
        text = self.run("log", "-z", f"--format={'%x00'.join(FIELDS)}", *options, "--stdin", stdin=commits)
        fields = text.split("\0")
        rows = [fields[at : at + len(FIELDS)] for at in range(0, len(fields) - 1, len(FIELDS))]
        return [
            {
                "sha": sha,
                "parents": parents.split(),
                "author": {"name": author, "email": email, "date": authored},
                "committer": {"name": committer, "date": committed},
                "subject": subject,
                "body": body.strip()[:LONGEST_MESSAGE],
            }
            for sha, parents, author, email, authored, committer, committed, subject, body in rows
        ]

    def run(self, *arguments: str, stdin: list[str] | None = None, codes: tuple[int, ...] = (0,)) -> str:
        """The output of one git command. RuntimeError says what git said."""
        safe = ["-c", "core.fsmonitor=false", "-c", "log.showSignature=false", "-c", "core.quotePath=false"]
        try:
            done = subprocess.run(
                ["git", "--no-pager", "-C", str(self.repo), *safe, *arguments],
                input="\n".join([*(stdin or []), ""]).encode() if stdin is not None else None,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                check=False,
            )
        except FileNotFoundError as error:
            raise RuntimeError("the git command is not installed, or not on PATH") from error
        if done.returncode not in codes:
            said = done.stderr.decode("utf-8", "replace").strip()
            raise RuntimeError(f"git cannot read {self.repo}: {said or f'exit code {done.returncode}'}")
        return done.stdout.decode("utf-8", "replace")
