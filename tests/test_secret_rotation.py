"""The key of the secrets is changed by the real command, killed at each place where that could hurt."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support import command

ROOT = Path(__file__).parent.parent


def watcher(where: Path, *arguments: str, given: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": str(where), **environ}
    return command.run(["--config", str(where / "watcher.toml"), *arguments], cwd=ROOT, env=env, given=given)


@pytest.fixture
def where(tmp_path: Path) -> Path:
    (tmp_path / "watcher.toml").write_text(f'database = "sqlite:///{tmp_path}/w.db"\nsecret_key_file = "key"\n')
    assert watcher(tmp_path, "secret", "new-key", str(tmp_path / "key")).returncode == 0
    for n in range(3):
        done = watcher(tmp_path, "variable", "set", f"u/me/s{n}", "--secret", given=f"secret {n}")
        assert done.returncode == 0, done.stderr
    return tmp_path


def secrets(where: Path) -> list[str]:
    return [watcher(where, "variable", "get", f"u/me/s{n}").stdout for n in range(3)]


WANTED = [f"secret {n}\n" for n in range(3)]


def test_a_rotation_leaves_one_new_key_that_opens_everything(where: Path) -> None:
    old = (where / "key").read_text()
    done = watcher(where, "secret", "rotate-key")
    assert done.returncode == 0, done.stderr
    assert "3 of 3" in done.stderr
    new = (where / "key").read_text()
    assert (len(new.split()), new != old) == (1, True)
    assert stat.S_IMODE((where / "key").stat().st_mode) == 0o600
    assert secrets(where) == WANTED
    (where / "key").write_text(old)
    refused = watcher(where, "variable", "get", "u/me/s0")
    assert refused.returncode != 0
    assert "another key" in refused.stderr


@pytest.mark.long
@pytest.mark.parametrize("at", ["key_written", "before_commit_of_keys", "key_in_use"])
def test_a_crash_in_the_middle_loses_no_secret_and_the_next_rotation_finishes_it(where: Path, at: str) -> None:
    if at == "before_commit_of_keys":  # the file has both keys, some secrets the one and some the other
        assert watcher(where, "secret", "rotate-key", WATCHER_TEST="1", WATCHER_FAILPOINT="key_written:kill").returncode
        assert watcher(where, "variable", "set", "u/me/s1", "--secret", given="secret 1").returncode == 0
    else:
        dead = watcher(where, "secret", "rotate-key", WATCHER_TEST="1", WATCHER_FAILPOINT=f"{at}:kill")
        assert dead.returncode == -9
    assert len((where / "key").read_text().split()) == 2
    assert secrets(where) == WANTED
    assert watcher(where, "secret", "rotate-key").returncode == 0
    assert len((where / "key").read_text().split()) == 1
    assert secrets(where) == WANTED


def test_a_key_from_elsewhere_is_changed_by_its_owner(where: Path) -> None:
    old = (where / "key").read_text().strip()
    (where / "watcher.toml").write_text(f'database = "sqlite:///{where}/w.db"\n')
    new = watcher(where, "secret", "new-key").stdout.strip()
    done = watcher(where, "secret", "rotate-key", WATCHER_SECRET_KEY=f"{new}\n{old}")
    assert done.returncode == 0, done.stderr
    assert "remove" in done.stderr
    assert watcher(where, "variable", "get", "u/me/s2", WATCHER_SECRET_KEY=new).stdout == "secret 2\n"


def test_a_flipped_byte_in_a_stored_secret_is_told_and_nothing_is_rotated(where: Path) -> None:
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(where / "w.db")) as db, db:
        (value,) = db.execute("SELECT value FROM variable WHERE path = 'u/me/s1'").fetchone()
        flipped = value[:-6] + ("A" if value[-6] != "A" else "B") + value[-5:]
        db.execute("UPDATE variable SET value = ? WHERE path = 'u/me/s1'", (flipped,))
    done = watcher(where, "secret", "rotate-key")
    assert done.returncode == 78
    assert "u/me/s1" in done.stderr
    assert watcher(where, "variable", "get", "u/me/s0").stdout == "secret 0\n"
