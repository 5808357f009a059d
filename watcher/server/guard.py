"""Who may ask: host, size, token and scope are checked before any route sees a request."""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from hashlib import sha256

from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from watcher.errors import StoreError
from watcher.staging import Ended, Session
from watcher.values import SCOPES

MAX_BODY = 2 * 1024 * 1024  # bytes; Windmill's own limit
MAX_STATE = 64 * 1024 * 1024  # bytes of the request that writes a state or a resource
STREAMED = re.compile(r"/api/w/[^/]+/(?:s3_proxy/.*|job_helpers/upload_s3_file)", re.DOTALL)
"""Paths whose bodies are objects: of any size, and read by the route itself, which bounds them."""
SIGNED = re.compile(r"/api/w/[^/]+/s3_proxy/.*", re.DOTALL)
"""Paths whose requests carry a signature of their own instead of a token. The route checks it."""
JOB_SCOPES = SCOPES
"""What a running script may do by its token."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks, and what that token is for: ``jobs:run:flows:summarise``, ``jobs:run``, ``jobs``, ``*``.

    ``session`` is the running job that asks, when it is one.
    """

    name: str
    scopes: tuple[str, ...] = ()
    session: Session | None = None

    def may(self, need: str) -> bool:
        """Whether one of the scopes covers ``need``: the same words, or their beginning up to a colon or slash.

        ``resources:write:f/a`` covers ``resources:read:f/a`` too.
        """
        domain, _, rest = need.partition(":")
        needs = [need, f"{domain}:write{rest.removeprefix('read')}"] if rest.startswith("read") else [need]
        return any(
            scope == "*" or each == scope or each.startswith((f"{scope}:", f"{scope}/"))
            for scope in (s.removesuffix("/*").removesuffix(":*") for s in self.scopes)
            for each in needs
        )

    def may_give(self, scope: str) -> bool:
        """Whether a token with this scope could do nothing that this one cannot."""
        return self.may(scope.removesuffix("/*").removesuffix(":*"))


Authenticate = Callable[[str], Awaitable[Principal | None]]


def same(given: str, expected: str) -> bool:
    """Whether two tokens are equal, in a time that tells nothing about how much of them is."""
    digests = (sha256(text.encode("utf-8", "surrogatepass")).digest() for text in (given, expected))
    return hmac.compare_digest(*digests)


def unavailable(error: StoreError) -> PlainTextResponse:
    """Never 401 or 404 for a database in trouble: Windmill's clients would take it for "there is nothing"."""
    return PlainTextResponse(str(error), 503, {"retry-after": "10"})


class Guard:
    """Deny by default: what is neither ``public`` nor SIGNED needs a bearer token, known or not as a path.

    ``hosts`` are the names by which a browser may reach us (against DNS rebinding); None allows any.
    """

    def __init__(
        self, app: ASGIApp, *, authenticate: Authenticate, public: Collection[str], hosts: Collection[str] | None
    ) -> None:
        self._app = app
        self._authenticate = authenticate
        self._public = frozenset(public)
        self._hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        waits = any(name == b"expect" for name, _ in scope["headers"])
        wire = receive

        async def came() -> Message:
            nonlocal waits
            waits = False
            return await wire()

        if waits:
            receive = came

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ())]
                given = {name for name, _ in headers}
                message["headers"] = headers + [header for header in _HEADERS if header[0] not in given]
                if waits:  # for a go-ahead, and never got it: what it asks next would be taken for its body
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        connection = HTTPConnection(scope)
        try:
            refusal = self._refuse_host(connection) or await self._refuse_token(connection)
        except StoreError as error:
            refusal = unavailable(error)
        except Ended as error:
            refusal = PlainTextResponse(str(error), 409)
        if refusal is None and not STREAMED.fullmatch(connection.scope["path"]):
            most = _most(connection.scope["path"])
            try:
                body = await _body(connection, receive, most)
            except ClientDisconnect:
                return  # what it wanted is not known: taken as empty, it would start a job without its arguments
            if body is None:
                refusal = PlainTextResponse(f"more than {most} bytes", 413, {"connection": "close"})
            else:
                receive = _once(body, receive)
        await (refusal or self._app)(scope, receive, answer)

    def _refuse_host(self, connection: HTTPConnection) -> PlainTextResponse | None:
        host = connection.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._hosts is None or name.strip("[]").lower() in self._hosts:
            return None
        return PlainTextResponse("this server has another name", 421)

    async def _refuse_token(self, connection: HTTPConnection) -> PlainTextResponse | None:
        if connection.scope["path"] in self._public or SIGNED.fullmatch(connection.scope["path"]):
            return None
        kind, _, token = connection.headers.get("authorization", "").partition(" ")
        if not kind:  # webhook callers that can set no header
            kind, token = "bearer", connection.query_params.get("token", "")
        principal = await self._authenticate(token.strip()) if kind.lower() == "bearer" and token.strip() else None
        if principal is None:
            return PlainTextResponse("a valid bearer token is needed", 401, {"www-authenticate": "Bearer"})
        connection.scope["principal"] = principal
        return None


def _most(path: str) -> int:
    return MAX_STATE if "/resources/" in path else MAX_BODY


async def _body(connection: HTTPConnection, receive: Receive, most: int) -> bytes | None:
    """The whole body, or None when it is too large. Raises ClientDisconnect when the asker went away before its end."""
    length = connection.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > most:
        return None
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            if length == "0" and "transfer-encoding" not in connection.headers:
                return b""  # there was none to come
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > most:
            return None
        if not message.get("more_body"):
            return b"".join(chunks)


def _once(body: bytes, receive: Receive) -> Receive:
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay
