"""How the service is: alive, ready, and in figures."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from watcher.values import Json

PUBLIC = ("/healthz", "/readyz", "/metrics")

Ready = Callable[[], Awaitable[tuple[bool, Json]]]


def routes(ready: Ready, metrics: Callable[[], Awaitable[bytes]]) -> list[BaseRoute]:
    """``/healthz`` (the loop turns), ``/readyz`` (200 or 503, with the reasons) and ``/metrics`` (Prometheus)."""

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(_: Request) -> Response:
        fine, detail = await ready()
        return JSONResponse(detail, 200 if fine else 503)

    async def figures(_: Request) -> Response:
        return Response(await metrics(), media_type=CONTENT_TYPE_LATEST)

    return [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", figures)]
