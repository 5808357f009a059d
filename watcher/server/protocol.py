"""HTTP/1.1 by llhttp, a third of the cost of h11, with a bound on what comes before a body."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 1024
"""Bytes of a request line and its headers; more is answered 431 and closed."""

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Bounded(HttpToolsProtocol):
    """uvicorn's protocol, which would itself gather headers for as long as somebody sends some."""

    _head = 0  # bytes of the head that is arriving, as far as it is known not to have ended
    _inside = False  # a body

    def data_received(self, data: bytes) -> None:
        self._head += len(data)
        super().data_received(data)
        if self._head > MAX_HEAD and not self._inside and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._head, self._inside = 0, True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._head, self._inside = 0, False
        super().on_message_complete()
