"""Deliveries onto the wire: one request, one short answer, no redirects, no cookies, no patience."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from datetime import timedelta

import httpx

from watcher.errors import DeliveryError
from watcher.http.message import basic, redacted, without_userinfo
from watcher.http.wire import LookUp, Wire, WireError, Wires, headers_of, read_start, start_of
from watcher.values import Request, Response


class Sender:
    """All flows' way to their targets."""

    def __init__(self, *, look_up: LookUp = socket.getaddrinfo) -> None:
        self._wires = Wires(look_up)

    async def send(
        self,
        request: Request,
        *,
        timeout: timedelta,  # noqa: ASYNC109 -- of everything, from the look-up to the last byte kept
        private_addresses: bool = True,
        trust_env: bool = False,
        keep: int = 4096,
    ) -> Response:
        """Send once. Any status is an answer, and at most ``keep`` bytes of its body are read.

        Raises DeliveryError, whose ``kind`` is dns, tls, refused, timeout, reset, guard or invalid.
        """
        try:
            request = _without_userinfo(request)
        except ValueError as error:
            raise DeliveryError(str(error), kind="invalid") from error
        wire = self._wires.get(private_addresses=private_addresses, trust_env=trust_env)
        answer = None
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                answer = await _sent(wire, request)
                headers = headers_of(answer)
                body = start_of(headers.get("content-encoding", ""), keep)
                await read_start(answer, body)
        except TimeoutError as error:
            if answer is None:
                raise DeliveryError(
                    f"{redacted(request.url)}: no answer within {timeout.total_seconds():g} s", kind="timeout"
                ) from error
        except WireError as error:
            raise DeliveryError(f"{redacted(request.url)}: {error}", kind=error.kind) from error
        finally:
            if answer is not None:
                await answer.aclose()
        return Response(answer.status_code, headers, bytes(body.data), request.url)

    async def close(self) -> None:
        await self._wires.close()


async def _sent(wire: Wire, request: Request) -> httpx.Response:
    """Once more, at once, when a kept connection turns out to be closed: a request with an id may go out again."""
    try:
        return await wire.send(request)
    except WireError as error:
        if not error.stale:
            raise
    return await wire.send(request, anew=True)


def _without_userinfo(request: Request) -> Request:
    """``https://user:password@host/`` as an Authorization header. Raises ValueError for what is no URL."""
    url, userinfo = without_userinfo(request.url)
    if userinfo is None:
        return request
    if any(name.lower() == "authorization" for name in request.headers):
        return replace(request, url=url)
    return replace(request, url=url, headers={**request.headers, "authorization": basic(*userinfo)})
