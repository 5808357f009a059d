"""The unit that `watcher systemd-unit` prints, as systemd itself reads it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from watcher.cli import main, unit

ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not on this machine")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A unit for a command and a configuration whose paths need care."""
    command = tmp_path / "opt 50%" / "watcher"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    file = tmp_path / "watcher.service"
    file.write_text(unit.text(command, tmp_path / "a $b.toml", Path("/etc/watcher/key 1%.cred")))
    return file


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert ANALYZE
    return subprocess.run([ANALYZE, *arguments], capture_output=True, text=True, check=False, timeout=60)


@needs_systemd
def test_systemd_finds_nothing_to_say_about_the_unit(written: Path) -> None:
    done = analyze("verify", str(written))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_the_unit_leaves_the_service_little_to_harm(written: Path) -> None:
    done = analyze("security", "--offline=true", "--threshold=15", "--no-pager", str(written))
    assert done.returncode == 0, done.stdout[-500:]


@needs_systemd
def test_an_unhardened_unit_would_not_pass(tmp_path: Path) -> None:
    bare = tmp_path / "bare.service"
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    assert analyze("security", "--offline=true", "--threshold=15", "--no-pager", str(bare)).returncode != 0


def test_paths_are_written_as_systemd_reads_them(written: Path) -> None:
    lines = written.read_text().splitlines()
    start = next(line for line in lines if line.startswith("ExecStart="))
    assert '/opt 50%%/watcher" serve --config "' in start
    assert start.endswith('/a $$b.toml"')
    assert "LoadCredentialEncrypted=watcher-key:/etc/watcher/key 1%%.cred" in lines


def test_the_unit_says_what_the_service_needs() -> None:
    lines = unit.text(Path("/opt/watcher/bin/watcher"), unit.CONFIG, None).splitlines()
    for line in (
        "Type=notify",
        "NotifyAccess=main",
        "DynamicUser=yes",
        "StateDirectory=watcher",
        "WatchdogSec=60s",
        "RestartPreventExitStatus=78",
        "ExecStart=/opt/watcher/bin/watcher serve --config /etc/watcher/watcher.toml",
    ):
        assert line in lines
    assert not any(line.startswith("LoadCredential") for line in lines)


def test_a_backup_each_night_has_a_unit_and_a_timer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["systemd-unit", "-c", "/etc/watcher/watcher.toml", "--command", "/opt/watcher/bin/watcher"]
    assert main([*arguments, "--backup-service"]) == 0
    service = capsys.readouterr().out
    assert "ExecStart=/opt/watcher/bin/watcher backup --keep 14 --config /etc/watcher/watcher.toml\n" in service
    assert main(["systemd-unit", "--backup-timer"]) == 0
    timer = capsys.readouterr().out
    assert "OnCalendar=*-*-* 03:00\n" in timer
    if ANALYZE is None:
        return
    (tmp_path / "watcher-backup.service").write_text(service.replace("/opt/watcher/bin/watcher", "/bin/true"))
    (tmp_path / "watcher-backup.timer").write_text(timer)
    done = analyze("verify", str(tmp_path / "watcher-backup.timer"), str(tmp_path / "watcher-backup.service"))
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_prints_the_unit_of_this_installation(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert main(["systemd-unit", "-c", str(tmp_path / "none.toml"), "--command", "/opt/watcher/bin/watcher"]) == 0
    out, err = capsys.readouterr()
    assert f"ExecStart=/opt/watcher/bin/watcher serve --config {tmp_path}/none.toml\n" in out
    assert "does not exist yet" in err
    assert "warning" not in out


@pytest.mark.parametrize("hidden", ["/home/ada/bin/watcher", "/root/.local/bin/watcher", "/tmp/watcher"])
def test_a_command_that_the_service_could_not_see_is_warned_about(hidden: str) -> None:
    found = unit.warnings(Path(hidden), Path("/etc/hostname"))
    assert len(found) >= 1
    assert "cannot see" in found[0]


def test_data_in_another_place_than_the_service_s_own_is_warned_about(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    file = tmp_path / "watcher.toml"
    file.write_text("")
    assert main(["systemd-unit", "-c", str(file), "--command", "/opt/watcher/bin/watcher"]) == 0
    assert 'write database = "sqlite:////var/lib/watcher/watcher.db"' in capsys.readouterr().err
    file.write_text('database = "sqlite:////var/lib/watcher/watcher.db"\ndata = "/var/lib/watcher"\n')
    assert main(["systemd-unit", "-c", str(file), "--command", "/opt/watcher/bin/watcher"]) == 0
    assert "database" not in capsys.readouterr().err
