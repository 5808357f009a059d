"""The real service in a process of its own, over one private directory; start and kill it as often as you like."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import command

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Service:
    """``watcher serve`` on ``config``, in which ``{port}`` and ``{where}`` are filled in. Logs are JSON."""

    where: Path
    config: str
    port: int = field(default_factory=free_port)
    environ: Mapping[str, str] = field(default_factory=dict)
    process: command.Process | subprocess.Popen[bytes] | None = None
    anew: bool = False  # started as a user starts it, and not forked from a process that has imported everything

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def write(self, config: str | None = None) -> Path:
        """Save the configuration, the way an editor does: whole or not at all."""
        self.config = config or self.config
        text = self.config.replace("{port}", str(self.port)).replace("{where}", str(self.where))
        draft, file = self.where / "watcher.toml~", self.where / "watcher.toml"
        draft.write_text(text)
        draft.replace(file)
        return file

    def start(self, **environ: str) -> command.Process | subprocess.Popen[bytes]:
        file = self.write()
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.where),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "WATCHER_LOGGING__FORMAT": "json",
        }
        with (self.where / "service.log").open("ab") as log:
            environment |= {**self.environ, **environ}
            # What is loaded before a program starts takes a program that starts anew.
            start = command.anew if self.anew or "LD_PRELOAD" in environment else command.Process
            arguments = ["serve", "--config", str(file)]
            self.process = start(arguments, cwd=self.where, env=environment, stdout=log, stderr=log)
        return self.process

    async def ready(self, seconds: float = 60) -> None:
        """Wait until /readyz says so. AssertionError with the log when it ends before, or takes too long."""
        assert self.process is not None
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if (await self.get("/readyz"))[0] == 200:
                    return
            await asyncio.sleep(0.02)  # another process: there is nothing to await
        raise AssertionError(f"not ready (exit code {self.process.poll()}):\n{self.tail()}")

    async def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Status and text of one request."""

        def send() -> tuple[int, str]:
            request = urllib.request.Request(self.url + path, body, dict(headers or {}), method=method)
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        return await asyncio.to_thread(send)

    async def get(self, path: str) -> tuple[int, str]:
        return await self.ask("GET", path)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def ended(self, seconds: float = 40) -> int:
        """The exit code."""
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, seconds)

    async def stop(self, seconds: float = 40) -> int:
        """Ask it to drain, and wait."""
        self.signal(signal.SIGTERM)
        return await self.ended(seconds)

    def kill(self) -> None:
        """As a power cut does."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """What was logged, over all starts; all events or those of one name."""
        events = []
        for line in (self.where / "service.log").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
        return [event for event in events if name is None or event.get("event") == name]

    async def event(self, name: str, count: int = 1, seconds: float = 30) -> dict[str, Any]:
        """Wait for the ``count``-th event of that name."""
        assert self.process is not None
        until, running = time.monotonic() + seconds, True
        while running and time.monotonic() < until:
            running = self.process.poll() is None
            if len(found := self.events(name)) >= count:
                return found[count - 1]
            await asyncio.sleep(0.02)
        raise AssertionError(f"{name} was not logged {count} times:\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        return "\n".join((self.where / "service.log").read_text(errors="replace").splitlines()[-lines:])
