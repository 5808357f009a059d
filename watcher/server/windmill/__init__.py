"""Windmill's own endpoints, as its clients and its webhooks use them: text/plain errors, ids as bare text.

Source: the wire as Windmill's published clients speak it.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from watcher.server.windmill import jobs, objects, resources, s3_access, s3_proxy, types, users, variables
from watcher.server.windmill.desk import Desk
from watcher.server.windmill.s3_parts import forget_uploads

__all__ = ["Desk", "forget_uploads", "routes"]


def routes(desk: Desk) -> list[BaseRoute]:
    """All routes under ``/api``; what Windmill has and we have not is 404, and says so."""
    return [
        *s3_proxy.routes(desk),  # routes are tried in order: first what is asked most, objects and states
        *resources.routes(desk),
        *variables.routes(desk),
        *users.routes(desk),
        *types.routes(desk),
        *jobs.routes(desk),
        *objects.routes(desk),
        *s3_access.routes(desk),
        Route("/api/{rest:path}", _unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    ]


async def _unknown(request: Request) -> Response:
    return PlainTextResponse(f"watcher has no {request.method} {request.url.path}: see docs/windmill.md", 404)
