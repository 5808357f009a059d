"""The HTTP side of the service, a leaf: without it the engine still works."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from watcher.errors import WatcherError
from watcher.server.protocol import Bounded


class CannotListen(WatcherError):
    """The address is taken, not ours, or not allowed."""

    exit_code = 69


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Port 0 takes a free one. Raises CannotListen that says what to change."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host or "127.0.0.1", port, type=socket.SOCK_STREAM)[0]
        # The protocol is named for asyncio, which sets TCP_NODELAY only then: else every answer would be 40 ms late.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise CannotListen(f"server.bind: {host}:{port}: {error.strerror or error}: choose another address") from error
    return listener


def url(listener: socket.socket) -> str:
    """How this machine reaches the socket: ``http://127.0.0.1:8321``."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.leaving = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals belong to the service, which drains before it stops answering

    async def main_loop(self) -> None:
        # uvicorn's own wakes up ten times a second to see whether it should leave.
        while not await self.on_tick(0):  # 0: a new second, and a new Date
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self.leaving.wait()


class Listener:
    """One application behind one socket, until told to stop."""

    def __init__(self, application: ASGIApp, sock: socket.socket) -> None:
        self._socket = sock
        self._server = _Uvicorn(
            uvicorn.Config(
                application,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                http=Bounded,
                loop="none",
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=5,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when requests are answered."""
        self._task = asyncio.create_task(self._server.serve([self._socket]), name="listener")
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise CannotListen("the HTTP server stopped before it started")
            await asyncio.sleep(0.001)  # uvicorn tells nobody when it has started

    async def stop(self) -> None:
        """Answer what is being asked, then close."""
        if self._task is not None:
            self._server.should_exit = True
            self._server.leaving.set()
            await self._task
            self._task = None
        self._socket.close()
