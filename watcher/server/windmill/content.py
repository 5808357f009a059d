"""Objects on their way out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from watcher import log
from watcher.errors import ObjectsError
from watcher.objects import Reading

_log = log.get("server")


class Content(Response):
    """The bytes of an object: a chunk is sent while the next is read, no faster than the client takes them, and no
    longer than it is there. However it ends, the object is let go. Without ``reading`` there are only the headers."""

    def __init__(self, status: int, headers: Mapping[str, str], reading: Reading | None) -> None:
        super().__init__(status_code=status)
        self.raw_headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        self._reading = reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if self._reading is not None and not await self._sent(self._reading, receive, send):
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if self._reading is not None:
                self._reading.close()

    async def _sent(self, reading: Reading, receive: Receive, send: Send) -> bool:
        """Whether all of it was."""
        gone = asyncio.ensure_future(_gone(receive))
        chunks = aiter(reading)
        following = asyncio.ensure_future(anext(chunks, None))
        try:
            while (chunk := await following) is not None and not gone.done():
                following = asyncio.ensure_future(anext(chunks, None))
                # A view: what the socket does not take at once is not copied to be kept.
                await send({"type": "http.response.body", "body": memoryview(chunk), "more_body": True})
        except ObjectsError as error:
            # The connection closes before the length that was announced is reached, which no client takes for the end.
            _log.warning("object.cut", key=reading.meta.key, error=str(error))
            return False
        finally:
            gone.cancel()
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await chunks.aclose()
        return True


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
