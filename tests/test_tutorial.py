"""The tutorial, run as it is printed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import command

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"<!-- (?P<what>run|background|file|append)(?:: (?P<more>[^>]*?))? -->\n```\w+\n(?P<text>.*?)```", re.S
)


def blocks() -> Iterator[tuple[str, str, str]]:
    for found in BLOCK.finditer((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")):
        yield found["what"], found["more"] or "", found["text"]


def free_ports(many: int) -> list[int]:
    with contextlib.ExitStack() as open_:
        sockets = [open_.enter_context(socket.socket()) for _ in range(many)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def run(line: str, where: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=where,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return f"{done.stdout}\nexit {done.returncode}"


def shows(out: str, words: list[str]) -> bool:
    """Whether an output holds all these, however wide its columns are."""
    return all(word in " ".join(out.split()) for word in words)


@pytest.mark.timeout(240)
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    """Ports are replaced by free ones; a command that looks is repeated until it shows what the page says."""
    ports = dict(zip(("8321", "8642", "8643"), map(str, free_ports(3)), strict=True))
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "watcher").write_text(command.script())
    (commands / "watcher").chmod(0o755)
    (commands / "python3").symlink_to(sys.executable)
    env = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "LANG": "C.UTF-8",
    }
    background: list[subprocess.Popen[bytes]] = []
    log = open(tmp_path / "background.log", "wb")  # noqa: SIM115
    seen = set()
    try:
        for what, more, text in blocks():
            seen.add(what)
            for port, free in ports.items():
                text = text.replace(port, free)
            if what == "file":
                (tmp_path / more).parent.mkdir(parents=True, exist_ok=True)
                again = (tmp_path / more).exists()
                (tmp_path / more).write_text(text, encoding="utf-8")
                if again:  # a web server tells changes by the second, and a test is faster than a reader
                    os.utime(tmp_path / more, (time.time() + 2, time.time() + 2))
            elif what == "append":
                with open(tmp_path / more, "a", encoding="utf-8") as file:
                    file.write("\n" + text)
            elif what == "background":
                background.append(
                    subprocess.Popen(
                        ["bash", "-c", text.replace("&& ", "&& exec ")],
                        cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True,
                    )
                )  # fmt: skip
            else:
                expected = [f"exit {0}", *filter(None, more.split(", "))]
                deadline = time.monotonic() + 40
                while not shows(out := run(text, tmp_path, env), expected):
                    behind = (tmp_path / "background.log").read_text(errors="replace")
                    assert time.monotonic() < deadline, f"{text}\nexpected {expected}\n{out}\n{behind}"
            if "init" in text and what == "run":
                config = tmp_path / "news" / "watcher.toml"
                config.write_text(config.read_text().replace("8321", ports["8321"]))
    finally:
        for process in background:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(40)
        log.close()
    assert seen == {"run", "background", "file", "append"}
