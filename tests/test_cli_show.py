"""What a person or a program reads: tables, colours, exit codes and errors of the command line."""

from __future__ import annotations

import io
import json
import os
import pty
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from watcher.cli import VERBS, _Verbs, app, main, show

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", "COLUMNS": "100"}


def watcher(*arguments: str, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "watcher", *arguments],
        capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT | more, check=False, timeout=60,
    )  # fmt: skip


def test_help_is_there_before_anybody_waits() -> None:
    """Under 0.3 s: of the processor, since others may be at work here, and the best of several for the same reason."""
    costs = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = watcher("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
    assert min(costs) < 0.3
    assert all(f"  {verb} " in done.stdout for verb in VERBS)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from watcher.cli import main; main(['--help'], );"
        "print([m for m in ('asyncio', 'pydantic', 'sqlalchemy', 'http.client', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_of_the_overview_is_there_and_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: watcher {verb}")
    if "Commands:" not in out and verb not in ("init", "serve", "schema", "systemd-unit", "completion", "export"):
        assert "--json" in out


def test_no_verb_is_missing_from_the_overview() -> None:
    import importlib

    import typer

    there = set()
    for module in {module for module, _ in VERBS.values()}:
        group = typer.main.get_command(importlib.import_module(f"watcher.cli.{module}").app)
        there |= set(group.commands)  # type: ignore[attr-defined]
    assert there == set(VERBS)
    assert isinstance(typer.main.get_command(app), _Verbs)


def test_a_wrong_verb_is_a_usage_error_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statsu"]) == 2
    err = capsys.readouterr().err
    assert "No such command 'statsu'. Did you mean 'status'" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["retry"], "name deliveries"),
        (["deliveries", "--status", "lost"], "pending, delivered or dead"),
        (["variable", "set", "u/a/b", "hunter2", "--secret"], "can be read by others"),
        (["retry", "--since", "yesterday"], "a duration"),
        (["completion", "powershell"], "bash, zsh or fish"),
        (["runs", "--limit", "0"], "greater than or equal to 1"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_right(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""


def test_a_missing_configuration_exits_78_and_says_how_to_get_one(tmp_path: Path) -> None:
    done = watcher("status", cwd=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 78
    assert "watcher init" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_nobody_reads_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from watcher.cli import connect

    def broken(given: Path | None) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(connect, "load", broken)
    assert main(["reload"]) == 1
    err = capsys.readouterr().err
    assert "this should not happen: ZeroDivisionError: by zero" in err
    assert "Traceback" not in err


def test_completion_knows_the_verbs() -> None:
    done = watcher(_WATCHER_COMPLETE="complete_bash", COMP_WORDS="watcher st", COMP_CWORD="1")
    assert done.stdout.split() == ["status", "state"]
    assert "_WATCHER_COMPLETE=complete_bash" in watcher("completion", "bash").stdout


# --- tables


ROWS: list[show.Row] = [
    {"name": "one", "condition": "ok", "reason": "", "count": 3},
    {"name": "a much longer name", "condition": "failing", "reason": "x" * 200, "count": None},
]
COLUMNS: show.Columns = {"name": "name", "condition": "condition", "count": "count", "reason": "reason"}


def test_columns_are_aligned_and_nothing_is_cut_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    show.table(ROWS, COLUMNS, "nothing")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NAME                CONDITION  COUNT  REASON"
    assert lines[1] == "one                 ok         3"
    assert lines[2] == "a much longer name  failing    -      " + "x" * 200


def test_an_empty_table_is_a_sentence_beside_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    show.table([], COLUMNS, "no watchers")
    assert capsys.readouterr() == ("", "no watchers\n")


def test_what_a_source_wrote_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show.table([{"name": "\x1b]0;evil\x07\x9b31m\r\nfine"}], {"name": "name"}, "nothing")
    assert capsys.readouterr().out.splitlines()[1] == r"\x1b]0;evil\x07\x9b31m\x0d\x0afine"


def at_a_terminal(code: str, **environment: str) -> str:
    """What a program prints when its output is a terminal of 40 columns."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
        env = {**ENVIRONMENT, "TERM": "xterm", **environment}
        process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=env)
        os.close(theirs)
        text = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:
                break
            if not chunk:
                break
            text += chunk
        assert process.wait(30) == 0
        return text.decode()
    finally:
        os.close(ours)


CODE = (
    "from watcher.cli import show;"
    "show.table([{'c': 'ok', 'r': 'y' * 90}], {'c': 'c', 'reason': 'r'}, '')"
)  # fmt: skip


def test_at_a_terminal_there_is_colour_and_lines_fit() -> None:
    lines = at_a_terminal(CODE).splitlines()
    assert lines[1] == "\x1b[32mok\x1b[0m  " + "y" * 35 + "…"


def test_whoever_wants_no_colour_gets_none() -> None:
    assert "\x1b" not in at_a_terminal(CODE, NO_COLOR="1")
    assert "\x1b" not in at_a_terminal(CODE, TERM="dumb")
    assert not show.colourful(io.StringIO())


def test_instants_are_told_as_people_tell_them() -> None:
    from datetime import UTC, datetime, timedelta

    now = datetime.now(UTC)
    assert show.ago(None) == "-"
    assert show.ago((now - timedelta(seconds=30)).isoformat()) == "30s ago"
    assert show.ago((now + timedelta(minutes=10, seconds=1)).isoformat()) == "in 10m"
    assert show.ago((now - timedelta(days=3)).isoformat()) == "3d ago"
    assert show.when("2026-11-25T19:54:27.123456Z") == "2026-11-25 19:54:27Z"


def test_half_a_character_in_a_key_is_shown_and_is_still_json() -> None:
    code = "import sys; from watcher.cli import main, show; main(['version']); show.give(['\\ud800é😀'], True, print)"
    for encoding in ("utf-8", "ascii"):
        env = ENVIRONMENT | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=True)
        assert json.loads(done.stdout.decode(encoding).partition("\n")[2]) == ["\ud800é😀"]
