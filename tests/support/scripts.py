"""Scripts written by a test, the service that answers them, and a look at what they leave behind."""

from __future__ import annotations

import asyncio
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from watcher.errors import TriggerError
from watcher.http import FetchOptions
from watcher.values import Entry, Json, Request, Response


@dataclass
class FakeHost:
    """What the service answers. ``pages`` gathers what it was shown; paging stops after ``enough`` of them."""

    answers: dict[str, Response] = field(default_factory=dict)
    resources: dict[str, Json] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    enough: int = 1000
    pages: list[list[Entry]] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    options: list[FetchOptions] = field(default_factory=list)
    delay: float = 0.0

    async def fetch(self, request: Request, options: FetchOptions) -> Response:
        self.asked.append(request)
        self.options.append(options)
        await asyncio.sleep(self.delay)
        if request.url not in self.answers:
            raise TriggerError(f"{request.url}: refused", kind="unreachable", retry_after=7.5)
        return self.answers[request.url]

    async def resource(self, path: str) -> Json:
        if path not in self.resources:
            raise TriggerError(f"no such resource: {path}", kind="missing")
        return self.resources[path]

    async def variable(self, path: str) -> str:
        if path not in self.variables:
            raise TriggerError(f"no such variable: {path}", kind="missing")
        return self.variables[path]

    async def page(self, entries: Sequence[Entry]) -> bool:
        self.pages.append(list(entries))
        return len(self.pages) < self.enough


def write(folder: Path, text: str, name: str = "script.py") -> Path:
    """A script in a folder."""
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be collected does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def noted(file: Path) -> list[int]:
    """The process ids that a script noted, one a line."""
    return [int(line) for line in file.read_text().split()] if file.exists() else []


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait for what another process does; there is nothing to await."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True
