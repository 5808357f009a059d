"""The way from a script to the service: one request out, one answer back, checked."""

from __future__ import annotations

from watcher import context, values
from watcher.http.message import FetchOptions, Response
from watcher.values import Request


async def ask(request: Request, options: FetchOptions, check: bool) -> Response:
    """Through the running script's context. Raises what `checked` raises."""
    return checked(await context.current().fetch(request, options), options, check)


def ask_sync(request: Request, options: FetchOptions, check: bool) -> Response:
    """The same for a plain ``def main``."""
    return checked(context.current().fetch_sync(request, options), options, check)


def checked(answer: values.Response, options: FetchOptions, check: bool) -> Response:
    """The answer as a script sees it. Raises Unchanged, and TriggerError for a status that nobody expects."""
    if options.stop_if_unchanged and answer.status == 304:
        raise context.Unchanged(answer.url)
    response = Response(answer.status, answer.headers, answer.body, answer.url)
    return response.raise_for_status() if check else response
