"""The same as `watcher.http` for scripts whose ``main`` is a plain function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from watcher import values
from watcher.http import sync_pages as pages
from watcher.http.message import Auth, FetchOptions, Params, Response, build
from watcher.http.reach import ask_sync
from watcher.values import Json

__all__ = ["get", "pages", "post"]


def get(
    url: str,
    *,
    params: Params | None = None,
    headers: Mapping[str, str] | None = None,
    auth: Auth | None = None,
    stop_if_unchanged: bool = False,
    timeout: float | None = None,
    max_body: int | None = None,
    redirects: bool = True,
    fresh: bool = False,
    check: bool = True,
) -> Response:
    """Fetch a URL; see `watcher.http.get`."""
    options = FetchOptions(timeout, max_body, redirects, stop_if_unchanged, fresh)
    return ask_sync(build("GET", url, params=params, headers=headers, auth=auth), options, check)


def post(
    url: str,
    *,
    json: Json = values.UNSET,
    data: Mapping[str, Any] | None = None,
    body: bytes | str | None = None,
    params: Params | None = None,
    headers: Mapping[str, str] | None = None,
    auth: Auth | None = None,
    timeout: float | None = None,
    max_body: int | None = None,
    redirects: bool = True,
    check: bool = True,
) -> Response:
    """Ask by POST; see `watcher.http.post`."""
    asked = build("POST", url, params=params, headers=headers, auth=auth, json=json, data=data, body=body)
    return ask_sync(asked, FetchOptions(timeout, max_body, redirects), check)
