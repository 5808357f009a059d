"""The whole application: guarded routes, errors as Windmill words them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute

from watcher import log
from watcher.errors import StoreError
from watcher.server import api
from watcher.server.guard import LOOPBACK, Authenticate, Guard, unavailable

if TYPE_CHECKING:
    from watcher.values import Server

_log = log.get("server")


def application(
    routes: Collection[BaseRoute],
    *,
    authenticate: Authenticate,
    public: Collection[str] = api.PUBLIC,
    hosts: Collection[str] | None,
) -> Starlette:
    """Routes behind the guard. A database that cannot answer is 503; an error that nobody foresaw is 500 and logged."""
    return Starlette(
        routes=list(routes),
        middleware=[Middleware(Guard, authenticate=authenticate, public=public, hosts=hosts)],
        exception_handlers={HTTPException: _refused, StoreError: _unavailable, Exception: _failed},
    )


def hosts(server: Server | None) -> Collection[str] | None:
    """The names we answer to: only local ones when we listen locally, for a browser can be led here by any other.

    ``server.hosts`` are further ones, of a reverse proxy in front of us. None: all.
    """
    if server is None or server.host in LOOPBACK:
        return (*LOOPBACK, *(server.hosts if server else ()))
    return (*LOOPBACK, server.host.lower(), *server.hosts) if server.hosts else None


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(error.detail, error.status_code, error.headers)


async def _unavailable(_: Request, error: Exception) -> Response:
    assert isinstance(error, StoreError)
    return unavailable(error)


async def _failed(request: Request, error: Exception) -> Response:
    _log.error("request.failed", path=request.url.path, exc_info=error)
    return PlainTextResponse("something unforeseen went wrong: the log has the details", 500)
