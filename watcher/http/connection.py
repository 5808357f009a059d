"""aiohttp's end of one connection, taught where an answer without a body ends and which connections had gone stale."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import Any, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler

_BODILESS = re.compile(rb"HTTP/1\.[01] (?:204|304) ")
_STATUS_LINE = len(b"HTTP/1.1 204 ")
_PROMISES_BODY = re.compile(rb"\r\n(?:content-length:[ \t]*0*[1-9]|transfer-encoding:)", re.IGNORECASE)
_LONGEST_HEAD = 64 * 1024


class Connection(ResponseHandler):
    """A connection that knows whether it served before, and drops the body that a 204 must not have.

    aiohttp takes such a body for the start of another answer, and the answer itself is lost with it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._requests = 0
        self._heard = False  # something came since the last request
        self._head: bytes | None = None  # of the answer that is awaited, for as long as it may be one without a body

    def set_response_params(self, **more: Any) -> None:
        """A request is about to be written."""
        self._requests += 1
        self._heard = False
        self._head = b""
        super().set_response_params(**more)

    def data_received(self, data: bytes) -> None:
        if data:
            self._heard = True
        if self._head is not None:
            data = self._without_body(data)
        super().data_received(data)

    def set_exception(self, exc: Any, *more: Any) -> None:
        """A kept connection that breaks before a byte of the answer came was most likely closed while it lay idle."""
        if self._requests > 1 and not self._heard and isinstance(exc, BaseException):
            exc.stale = True  # type: ignore[attr-defined]
        super().set_exception(exc, *more)

    def _without_body(self, data: bytes) -> bytes:
        """What of ``data`` belongs to the answer."""
        before = self._head or b""
        head = before + data
        if len(head) < _STATUS_LINE:
            self._head = head
            return data
        end = head.find(b"\r\n\r\n") + 4
        if not _BODILESS.match(head) or (end < 4 and len(head) > _LONGEST_HEAD):
            self._head = None
            return data
        if end < 4:
            self._head = head
            return data
        self._head = None
        if len(head) > end or _PROMISES_BODY.search(head, 0, end):
            self.force_close()  # more of the body may follow, and would be taken for the next answer
        return data[: end - len(before)]


class Connector(aiohttp.TCPConnector):
    """Makes such connections."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self._factory = cast(Any, partial(Connection, loop=self._loop))


def is_stale(error: BaseException) -> bool:
    """Whether this was raised because a kept connection had been closed by the other side meanwhile."""
    return getattr(error, "stale", False) is True
