"""How a trigger asks a source: ``await http.get(url)``, ``http.sync.get(url)`` and ``http.pages``.

Every request goes through the service, which is polite on behalf of all watchers: limits, Retry-After, conditional
requests. A script process itself opens no connection and loads no HTTP client.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from watcher import values
from watcher.context import Unchanged
from watcher.http import pages, sync
from watcher.http.message import (
    PLAIN,
    Auth,
    FetchOptions,
    Params,
    Response,
    build,
    redacted,
    retry_after,
)
from watcher.http.reach import ask
from watcher.values import Json

if TYPE_CHECKING:  # the service's side, loaded only by the service
    from watcher.http.fetcher import Fetcher as Fetcher
    from watcher.http.sender import Sender as Sender

__all__ = [
    "FetchOptions",
    "Fetcher",
    "Response",
    "Sender",
    "Unchanged",
    "get",
    "pages",
    "post",
    "redacted",
    "request",
    "retry_after",
    "sync",
]


async def get(
    url: str,
    *,
    params: Params | None = None,
    headers: Mapping[str, str] | None = None,
    auth: Auth | None = None,
    stop_if_unchanged: bool = False,
    timeout: float | None = None,  # noqa: ASYNC109 -- kept by the service, which may be in another process
    max_body: int | None = None,
    redirects: bool = True,
    fresh: bool = False,
    check: bool = True,
) -> Response:
    """Fetch a URL. Raises TriggerError for any status but 2xx, unless ``check`` is False.

    ``auth`` is a bearer token or (user, password). With ``stop_if_unchanged`` the run ends here, by `Unchanged`, when
    the source answers 304 or the same bytes as in the last committed run.

        page = await http.get("https://example.com/api/things", params={"state": "open"})
        return page.json()["items"]
    """
    options = FetchOptions(timeout, max_body, redirects, stop_if_unchanged, fresh)
    return await ask(build("GET", url, params=params, headers=headers, auth=auth), options, check)


async def post(
    url: str,
    *,
    json: Json = values.UNSET,
    data: Mapping[str, Any] | None = None,
    body: bytes | str | None = None,
    params: Params | None = None,
    headers: Mapping[str, str] | None = None,
    auth: Auth | None = None,
    timeout: float | None = None,  # noqa: ASYNC109 -- kept by the service, which may be in another process
    max_body: int | None = None,
    redirects: bool = True,
    check: bool = True,
) -> Response:
    """Ask by POST: a search, a GraphQL query. Give one of ``json``, ``data`` (a form) and ``body``."""
    return await request(
        "POST", url, json=json, data=data, body=body, params=params, headers=headers, auth=auth,
        options=FetchOptions(timeout, max_body, redirects), check=check,
    )  # fmt: skip


async def request(
    method: str,
    url: str,
    *,
    json: Json = values.UNSET,
    data: Mapping[str, Any] | None = None,
    body: bytes | str | None = None,
    params: Params | None = None,
    headers: Mapping[str, str] | None = None,
    auth: Auth | None = None,
    options: FetchOptions = PLAIN,
    check: bool = True,
) -> Response:
    """Ask by any method."""
    asked = build(method, url, params=params, headers=headers, auth=auth, json=json, data=data, body=body)
    return await ask(asked, options, check)


def __getattr__(name: str) -> Any:
    if name == "Fetcher":
        from watcher.http.fetcher import Fetcher

        return Fetcher
    if name == "Sender":
        from watcher.http.sender import Sender

        return Sender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
