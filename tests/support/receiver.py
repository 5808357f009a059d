"""A scripted receiver of webhooks on loopback, with 24 ways to behave; also a process of its own that logs to a file.

The first part of the path chooses the behaviour: ``/ok``, ``/reset``, ``/flaky/10`` (503 for 10 of 100 attempts).
``/scripted`` takes the next name from `Receiver.script` and is ``ok`` when that is empty. As a process::

    python -m tests.support.receiver --log received.jsonl        # prints its port, serves until killed

Every request is logged, one JSON object a line, before it is answered: ``{"at", "method", "path", "id", "attempt",
"headers", "body"}``. The log is opened for appending, so it outlives whoever is being killed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass(frozen=True, slots=True)
class Received:
    """One request, as it came."""

    at: float  # seconds since 1970
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def id(self) -> str:
        return self.headers.get("webhook-id", "")

    @property
    def attempt(self) -> int:
        return int(self.headers.get("x-watcher-attempt", "0"))

    def json(self) -> Any:
        return json.loads(self.body)


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    """The bytes of one answer. Underscores in header names become dashes."""
    lines = [f"HTTP/1.1 {status} Scripted", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Receiver:
    """The receiver in this process: ``async with Receiver() as receiver: receiver.url + "/ok"``."""

    log: Path | None = None
    keep: bool = True  # remember what came; off for benchmarks
    port: int = 0
    decide: Callable[[Received], str | bytes] | None = None  # a behaviour's name, or the answer itself; beats the path
    script: deque[str] = field(default_factory=deque)
    received: list[Received] = field(default_factory=list)
    connections: int = 0
    at_once: int = 0  # requests being answered now
    most_at_once: int = 0
    _server: asyncio.Server | None = None
    _open: set[_Connection] = field(default_factory=set)
    _log: int | None = None
    _came: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Receiver:
        loop = asyncio.get_running_loop()
        if self.log:
            self._log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server
        self._server.close()
        for connection in list(self._open):
            connection.abort()
        await self._server.wait_closed()
        if self._log is not None:
            os.close(self._log)

    async def wait(self, count: int) -> None:
        """Until so many requests have come."""
        while len(self.received) < count:
            self._came.clear()
            await self._came.wait()

    def note(self, request: Received) -> None:
        if self.keep:
            self.received.append(request)
            self._came.set()
        if self._log is not None:
            line = {
                "at": request.at,
                "method": request.method,
                "path": request.path,
                "id": request.id,
                "attempt": request.attempt,
                "headers": request.headers,
                "body": request.body.decode("utf-8", "replace"),
            }
            os.write(self._log, json.dumps(line).encode() + b"\n")

    def behaviour(self, request: Received) -> str | bytes:
        if self.decide:
            return self.decide(request)
        name = request.path.partition("?")[0].strip("/") or "ok"
        if name == "scripted":
            return self.script.popleft() if self.script else "ok"
        return name


class _Connection(asyncio.Protocol):
    """One connection: enough HTTP/1.1 to read requests with a content-length, and any answer at all."""

    transport: asyncio.Transport

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.buffer = b""
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.receiver._open.add(self)
        self.receiver.connections += 1

    def connection_lost(self, error: Exception | None) -> None:
        self.receiver._open.discard(self)
        if self.task:
            self.task.cancel()

    def abort(self) -> None:
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.buffer.startswith(b"\x16\x03"):  # TLS: a server that speaks none answers in plain text
            self.transport.write(answer(400, b"plain HTTP here"))
            self.transport.close()
            return
        while not self.task:
            request = self._next()
            if request is None:
                return
            self.receiver.note(request)
            self._answer(request)

    def _next(self) -> Received | None:
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return None
        self.buffer = rest[length:]
        method, path, _ = first.split(" ", 2)
        return Received(time.time(), method, path, headers, rest[:length])

    def _answer(self, request: Received) -> None:
        chosen = self.receiver.behaviour(request)
        if isinstance(chosen, bytes):
            self.transport.write(chosen)
            return
        name, _, rest = chosen.partition("/")
        behave = BEHAVIOURS.get(name) or EXTRAS.get(name) or BEHAVIOURS["not_found"]
        if isinstance(behave, bytes):
            self.transport.write(behave)
            return
        receiver = self.receiver
        receiver.at_once += 1
        receiver.most_at_once = max(receiver.most_at_once, receiver.at_once)
        self.task = asyncio.create_task(behave(self, request, rest))
        self.task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self.receiver.at_once -= 1
        self.task = None
        if not task.cancelled():
            task.result()
        if not self.transport.is_closing():
            self.data_received(b"")


async def _silent(connection: _Connection, request: Received, rest: str) -> None:
    await asyncio.Event().wait()


async def _slow_head(connection: _Connection, request: Received, rest: str) -> None:
    connection.transport.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.transport.write(b"x-more: 1\r\n")
        await asyncio.sleep(0.05)


async def _slow_body(connection: _Connection, request: Received, rest: str) -> None:
    connection.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    while True:
        connection.transport.write(b".")
        await asyncio.sleep(0.05)


async def _reset(connection: _Connection, request: Received, rest: str) -> None:
    _send_reset(connection)


async def _reset_in_body(connection: _Connection, request: Received, rest: str) -> None:
    connection.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf")
    await asyncio.sleep(0.05)  # let the first half arrive: a reset throws away what was not read yet
    _send_reset(connection)


async def _half_close(connection: _Connection, request: Received, rest: str) -> None:
    connection.transport.write(b"HTTP/1.1 200 OK\r\ncontent-le")
    connection.transport.write_eof()


async def _garbage(connection: _Connection, request: Received, rest: str) -> None:
    connection.transport.write(b"\x16\x03\x01 this is not HTTP \xff\xfe\r\n\r\n")


async def _endless(connection: _Connection, request: Received, rest: str) -> None:
    connection.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
    for _ in range(1000):
        connection.transport.write(b"x" * 1_000_000)
        while connection.transport.get_write_buffer_size() > 1_000_000:
            await asyncio.sleep(0.01)


async def _unavailable(connection: _Connection, request: Received, rest: str) -> None:
    connection.transport.write(answer(503, b"later", retry_after=formatdate(time.time() + 120, usegmt=True)))


async def _flaky(connection: _Connection, request: Received, rest: str) -> None:
    share = zlib.crc32(f"{request.id}|{request.attempt}".encode()) % 100
    connection.transport.write(answer(503 if share < int(rest or 10) else 200))


async def _delay(connection: _Connection, request: Received, rest: str) -> None:
    await asyncio.sleep(float(rest or 0.05))
    connection.transport.write(answer(200))


async def _status(connection: _Connection, request: Received, rest: str) -> None:
    connection.transport.write(answer(int(rest)))


def _send_reset(connection: _Connection) -> None:
    # SO_LINGER with zero seconds turns the close into an RST.
    sock = connection.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.transport.abort()


BEHAVIOURS: dict[str, Any] = {
    "ok": answer(200, b"ok"),
    "created": answer(201, b'{"id":1}', content_type="application/json"),
    "no_content": answer(204),
    "no_content_with_body": answer(204, b"surprise"),
    "redirect": answer(302, location="http://127.0.0.1:1/elsewhere"),
    "bad_request": answer(400, b"no such field"),
    "unauthorized": answer(401),
    "forbidden": answer(403),
    "not_found": answer(404),
    "request_timeout": answer(408),
    "gone": answer(410),
    "too_large": answer(413),
    "unprocessable": answer(422),
    "too_many": answer(429, retry_after="7"),
    "error": answer(500, b"x" * 10_000),
    "unavailable": _unavailable,
    "silent": _silent,
    "slow_head": _slow_head,
    "slow_body": _slow_body,
    "reset": _reset,
    "reset_in_body": _reset_in_body,
    "half_close": _half_close,
    "garbage": _garbage,
    "endless": _endless,
}
"""The 24: an answer, or a coroutine that answers."""

EXTRAS: dict[str, Any] = {"flaky": _flaky, "delay": _delay, "status": _status}


async def _serve(log: Path | None, ports: list[int]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(Receiver(log, keep=False, port=port)) for port in ports]
        sys.stdout.write(" ".join(str(receiver.port) for receiver in opened) + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def receiver_process(log: Path | None = None, port: int = 0, ports: int = 1) -> AsyncIterator[list[str]]:
    """The receiver as a process of its own, on ``ports`` ports; gives its URLs, kills it at the end."""
    command = [sys.executable, "-m", "tests.support.receiver", "--port", str(port), "--ports", str(ports)]
    command += ["--log", str(log)] if log else []
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert process.stdout
        yield [f"http://127.0.0.1:{number}" for number in (await process.stdout.readline()).decode().split()]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, default=None)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ports", type=int, default=1, help="how many; all but the first are chosen by the system")
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(given.log, [given.port, *[0] * (given.ports - 1)]))


if __name__ == "__main__":
    main()
