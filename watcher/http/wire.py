"""Requests onto real sockets: httpx's requests and answers over aiohttp's connections, with the address guard."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import aiohttp.abc
import httpx
from httpx_aiohttp import AiohttpTransport

from watcher.http import guard
from watcher.http.connection import Connector, is_stale
from watcher.http.inflate import Body, NotDecodable, TooLarge
from watcher.values import Request

T = TypeVar("T")
LookUp = Callable[..., list[Any]]
"""`socket.getaddrinfo`, or a test's own."""

_CONNECT_SECONDS = 5.0
# Below the idle time of common servers (5 s), so that a request rarely meets a connection that is just being closed.
_KEEPALIVE_SECONDS = 4.0
_LOOK_UPS_AT_ONCE = 64
_AUTOMATIC = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


class WireError(Exception):
    """A request got no answer. ``kind``: dns, tls, refused, timeout, reset, guard, invalid, too_large or coding.

    ``stale``: it was sent on a connection that the other side had closed meanwhile, and can go out again on another.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.stale = False


class Wire:
    """Connections of one kind: guarded or not, through the environment's proxy or not.

    They are never shared between kinds: a guarded request must not ride on a connection that nobody checked.
    """

    def __init__(self, *, private_addresses: bool, trust_env: bool, look_up: LookUp = socket.getaddrinfo) -> None:
        self._guarded = not private_addresses
        self._trust_env = trust_env
        self._look_up = look_up
        self._transport: AiohttpTransport | None = None
        self._unkept: AiohttpTransport | None = None

    async def send(self, request: Request, *, anew: bool = False) -> httpx.Response:
        """Send and await the head of the answer; its body is read by `read`. Raises WireError. Follows nothing.

        ``anew``: on a connection of its own, not on one that was kept.
        """
        try:
            asked = httpx.Request(request.method, _url(request.url), headers=request.headers, content=request.body)
            if self._guarded and self._trust_env:
                _refuse_proxy(request.url)
            return await self._way(anew).handle_async_request(asked)
        except _TROUBLE as error:
            raise explain(error) from error

    async def close(self) -> None:
        for transport in (self._transport, self._unkept):
            if transport is not None:
                await transport.aclose()
        self._transport = self._unkept = None

    def _way(self, anew: bool) -> AiohttpTransport:
        if anew:
            self._unkept = self._unkept or self._open(force_close=True)
            return self._unkept
        self._transport = self._transport or self._open(keepalive_timeout=_KEEPALIVE_SECONDS)
        return self._transport

    def _open(self, **keeping: Any) -> AiohttpTransport:
        connector = Connector(
            limit=0,  # callers limit themselves: a request must never queue in here, where nobody counts it
            ssl=_tls(),
            resolver=_Resolver(self._look_up, self._guarded),
            socket_factory=_checked_socket if self._guarded else None,
            **keeping,
        )
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_AUTOMATIC,
            trust_env=self._trust_env,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        )
        return AiohttpTransport(verify=_tls(), client=session)


class Wires:
    """The wires of one service, opened when first needed."""

    def __init__(self, look_up: LookUp = socket.getaddrinfo) -> None:
        self._look_up = look_up
        self._open: dict[tuple[bool, bool], Wire] = {}

    def get(self, *, private_addresses: bool, trust_env: bool) -> Wire:
        kind = (private_addresses, trust_env)
        wire = self._open.get(kind)
        if wire is None:
            wire = Wire(private_addresses=private_addresses, trust_env=trust_env, look_up=self._look_up)
            self._open[kind] = wire
        return wire

    async def close(self) -> None:
        for wire in self._open.values():
            await wire.close()
        self._open.clear()


def headers_of(response: httpx.Response) -> dict[str, str]:
    """The headers with lower-case names; one that comes more than once is joined by commas (RFC 9110 5.3)."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in response.headers.raw:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


async def read(response: httpx.Response, coding: str, limit: int) -> bytes:
    """The whole body, decompressed, of at most ``limit`` bytes. Raises WireError."""
    try:
        body = Body(coding, limit)
        async for chunk in response.stream:  # type: ignore[union-attr]  # always an async stream here
            body.feed(chunk)
        return body.finish()
    except TooLarge as error:
        raise WireError("too_large", f"the answer is larger than {limit} bytes") from error
    except NotDecodable as error:
        raise WireError("coding", f"the answer cannot be decoded: {error}") from error
    except _TROUBLE as error:
        raise explain(error) from error


def start_of(coding: str, keep: int) -> Body:
    """Room for the first ``keep`` bytes of a body, decompressed if that is possible."""
    try:
        return Body(coding, keep)
    except NotDecodable:
        return Body("", keep)


async def read_start(response: httpx.Response, into: Body) -> None:
    """As much of the body as fits ``into``, and no more. Never raises for the body's sake.

    It is shown to people, not understood: the status has been heard, and a body that breaks off changes nothing.
    """
    try:
        async for chunk in response.stream:  # type: ignore[union-attr]
            into.feed(chunk)
    except (TooLarge, NotDecodable, *_TROUBLE):
        pass


def explain(error: BaseException) -> WireError:
    """What a library's exception means for whoever asked."""
    meaning = _meaning(error)
    meaning.stale = any(is_stale(cause) for cause in _causes(error))
    return meaning


def _meaning(error: BaseException) -> WireError:
    for cause in _causes(error):
        if isinstance(cause, guard.Denied):
            return WireError("guard", str(cause))
        if isinstance(cause, aiohttp.ClientConnectorDNSError | socket.gaierror):
            return WireError("dns", f"the name cannot be resolved: {_short(cause)}")
        if isinstance(cause, aiohttp.ClientSSLError | ssl.SSLError | ssl.CertificateError):
            return WireError("tls", f"no secure connection: {_short(cause)}")
        if isinstance(cause, TimeoutError | httpx.TimeoutException) and not isinstance(cause, httpx.ConnectTimeout):
            return WireError("timeout", "no answer in time")
        if isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ClientProxyConnectionError):
            return WireError("refused", f"no connection: {_short(cause)}")
        if isinstance(cause, httpx.InvalidURL | httpx.UnsupportedProtocol | aiohttp.InvalidURL):
            return WireError("invalid", f"the request cannot be sent: {_short(cause)}")
        if isinstance(cause, aiohttp.ClientResponseError):
            return WireError("reset", f"what came back is not HTTP: {_short(cause)}")
        if isinstance(cause, aiohttp.ClientError | ConnectionError):
            return WireError("reset", f"the connection broke: {_broke(cause)}")
    if isinstance(error, ValueError | TypeError):  # a header with a line break, a name that no IDNA knows
        return WireError("invalid", f"the request cannot be sent: {_short(error)}")
    return WireError("reset", f"the connection broke: {_short(error)}")


_TROUBLE = (
    httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, aiohttp.ClientError, guard.Denied, OSError, ValueError,
    TypeError,
)  # fmt: skip


class _Resolver(aiohttp.abc.AbstractResolver):
    """Names to addresses, each lookup in a thread of its own: one dead name server must not hold up the others."""

    def __init__(self, look_up: LookUp, guarded: bool) -> None:
        self._look_up = look_up
        self._guarded = guarded
        self._turns = asyncio.Semaphore(_LOOK_UPS_AT_ONCE)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[aiohttp.abc.ResolveResult]:
        async with self._turns:
            infos = await _in_thread(lambda: self._look_up(host, port, family, socket.SOCK_STREAM))
        results: list[aiohttp.abc.ResolveResult] = []
        for found, _, proto, _, sockaddr in infos:
            address = f"{sockaddr[0]}%{sockaddr[3]}" if len(sockaddr) > 3 and sockaddr[3] else str(sockaddr[0])
            if self._guarded:  # all of them: a name with one private address is not to be trusted with the others
                guard.check(host, address, port)
            results.append(
                aiohttp.abc.ResolveResult(
                    hostname=host, host=address, port=port, family=found, proto=proto,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )  # fmt: skip
        return results

    async def close(self) -> None:
        pass


def _checked_socket(info: Any) -> socket.socket:
    """The socket for one address, checked at the last moment: whatever spelling led here, this is what it meant."""
    family, kind, proto, _, sockaddr = info
    guard.check(str(sockaddr[0]), str(sockaddr[0]), sockaddr[1])
    return socket.socket(family, kind, proto)


async def _in_thread(work: Callable[[], T]) -> T:
    """Run in a daemon thread, which an exiting process does not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error else future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="look-up", daemon=True).start()
    return await future


@functools.lru_cache(1024)
def _url(url: str) -> httpx.URL:
    """Parsing costs as much as the rest of the request, and there are few destinations."""
    return httpx.URL(url)


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all connections: it takes 20 ms to read the certificates. SSL_CERT_FILE and SSL_CERT_DIR are honoured."""
    return httpx.create_ssl_context()


def _refuse_proxy(url: str) -> None:
    """Behind a proxy nobody here sees the address that is reached."""
    parts = urlsplit(url)
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or ""):
        raise guard.Denied(
            "a proxy from the environment would connect where no guard looks: set trust_env = false, or"
            " private_addresses = true"
        )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, what caused it, and what those groups hold."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, BaseExceptionGroup):
            waiting.extend(one.exceptions)
        else:
            yield one
        waiting.extend((one.__cause__, one.__context__))


def _broke(error: BaseException) -> str:
    """aiohttp's own words for the first of these quote the whole address, with whatever secret is in it."""
    if isinstance(error, aiohttp.ClientOSError) and "write request body" in str(error):
        return "the other side closed it before it had read the whole request"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the other side closed it without an answer"
    return _short(error)


def _short(error: BaseException) -> str:
    """The library's words without its wrapping."""
    inner = getattr(error, "os_error", None) or error
    text = getattr(inner, "strerror", None) or getattr(inner, "message", None) or str(inner) or type(inner).__name__
    number = getattr(inner, "errno", None)
    if number and str(text).startswith("Connect call failed"):
        text = os.strerror(number).lower()  # asyncio's words hide why
    return str(text).splitlines()[0][:200].rstrip(": ")
