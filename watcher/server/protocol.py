"""HTTP/1.1 by llhttp, a third of the cost of h11, with a bound on what comes before a body."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 1024
"""Bytes of a request line and its headers; more is answered 431 and closed."""
SHORT = 64 * 1024
"""Bytes that are copied to go out in one piece; longer ones go out as they are."""

MAX_WAITING = 256 * 1024
"""Bytes of a body that wait for the application before no more are read."""

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Joined:
    """A transport that sends the head of an answer together with its body, where that follows at once.

    uvicorn writes them one after the other: two system calls, two segments, and a client that is woken twice.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._held = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if len(data) > SHORT:
            self._flush()
            self._transport.write(data)
        elif self._held:
            held, self._held = self._held, b""
            self._transport.write(held + data)
        else:
            self._held = data
            self._loop.call_soon(self._flush)  # once the task that wrote it waits: its body may be long in coming

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held)


class Bounded(HttpToolsProtocol):
    """uvicorn's protocol, which would itself gather headers for as long as somebody sends some."""

    _head = 0  # bytes of the head that is arriving, as far as it is known not to have ended
    _inside = False  # a body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, Joined(transport))

    def data_received(self, data: bytes) -> None:
        self._head += len(data)
        super().data_received(data)
        if self._head > MAX_HEAD and not self._inside and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._head, self._inside = 0, True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """As uvicorn does it, which copies each piece twice and stops reading behind each: files come this way."""
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body = cycle.body + body if cycle.body else body  # type: ignore[assignment]  # it is only read
        if len(cycle.body) > MAX_WAITING:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._head, self._inside = 0, False
        super().on_message_complete()
