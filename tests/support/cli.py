"""The command line called in this process, in a directory of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from watcher.cli import main

CONFIG = """\
[flows.sink]
url = "http://127.0.0.1:1/"

[watchers.one]
trigger = "./listing.py"
every = "1h"
flow = "sink"
first_run = "all"
with = { file = "LISTED" }
"""

LISTING = '''"""Everything that a file lists."""
import json

from watcher import trigger


@trigger(key="id", on=("new", "changed", "removed"))
def main(file: str) -> list[dict]:
    with open(file) as listed:
        return json.load(listed)
'''


@dataclass
class Desk:
    """One installation, and somebody who types commands."""

    where: Path
    capture: pytest.CaptureFixture[str]
    code: int = 0
    out: str = ""
    err: str = ""

    def __call__(self, *arguments: str, expect: int = 0) -> str:
        """Type one command; its standard output."""
        self.capture.readouterr()
        self.code = main(list(arguments))
        self.out, self.err = self.capture.readouterr()
        assert self.code == expect, f"watcher {' '.join(arguments)}: exit {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err
        return self.out

    def json(self, *arguments: str, expect: int = 0) -> Any:
        """Type one command with --json; what it printed."""
        return json.loads(self(*arguments, "--json", expect=expect))

    def lists(self, *items: Any) -> None:
        """Let the source list these from now on."""
        (self.where / "listed.json").write_text(json.dumps(items))

    def configure(self, extra: str = "", change: Callable[[str], str] = lambda text: text) -> None:
        text = CONFIG.replace("LISTED", str(self.where / "listed.json"))
        (self.where / "watcher.toml").write_text(change(text) + extra)


def desk(where: Path, capture: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A configured installation without a database yet, in the current directory."""
    monkeypatch.chdir(where)
    for name in ("WATCHER_CONFIG", "STATE_DIRECTORY", "WATCHER_SECRET_KEY", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    new = Desk(where, capture)
    new.configure()
    (where / "listing.py").write_text(LISTING)
    new.lists({"id": "a", "n": 1}, {"id": "b", "n": 1})
    return new
