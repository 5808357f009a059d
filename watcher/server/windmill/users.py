"""Who is asking, tokens, and what this server is."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime
from functools import partial

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from watcher.log import register
from watcher.server.windmill.desk import Desk, Endpoint, answered, changing, fields, said, text_of, when, who
from watcher.store import audit
from watcher.store import tokens as store
from watcher.store.db import Tx
from watcher.values import Json

_HOST = "localhost"
_LONGEST = 200  # characters of a scope


def routes(desk: Desk) -> list[BaseRoute]:
    """``/api/version``, ``/api/users`` and ``/api/w/{workspace}/users``."""

    def everywhere(path: str, endpoint: Endpoint, need: str | None, method: str = "GET") -> Route:
        async def checked(request: Request) -> Response:
            if need is not None:
                desk.require(request, need)
            return await answered(endpoint(request))

        return Route(f"/api{path}", checked, methods=[method])

    return [
        everywhere("/version", version, None),
        everywhere("/users/whoami", whoami, None),
        everywhere("/users/tokens/create", partial(create_token, desk), "users:write", "POST"),
        everywhere("/users/tokens/list", partial(list_tokens, desk), "users:read"),
        everywhere("/users/tokens/delete/{prefix}", partial(delete_token, desk), "users:write", "DELETE"),
        desk.route("/users/whoami", partial(whoami_here, desk), None),
        desk.route("/users/username_to_email/{path}", username_to_email, None),
        desk.route("/oidc/token/{path}", no_oidc, None, "POST"),
    ]


async def version(_: Request) -> Response:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        number = installed("change-watcher")
    except PackageNotFoundError:  # a clone that was not installed
        number = "0"
    return PlainTextResponse(f"watcher v{number}")


async def whoami(request: Request) -> Response:
    """As Windmill's GlobalUserInfo."""
    everything = who(request).may("*")
    return JSONResponse(
        {
            "email": _email(request),
            "username": _username(request),
            "name": who(request).name,
            "company": None,
            "login_type": "password",
            "super_admin": everything,
            "devops": False,
            "verified": True,
            "first_time_user": False,
            "operator_only": False,
            "role_source": "manual",
            "disabled": False,
        }
    )


async def whoami_here(desk: Desk, request: Request) -> Response:
    """As Windmill's User of one workspace."""
    everything = who(request).may("*")
    return JSONResponse(
        {
            "workspace_id": desk.config().workspace,
            "email": _email(request),
            "username": _username(request),
            "name": who(request).name,
            "is_admin": everything,
            "is_super_admin": everything,
            "is_service_account": False,
            "created_at": when(desk.clock()),
            "operator": False,
            "disabled": False,
            "role": "admin" if everything else "user",
            "groups": ["all"],
            "folders": [],
            "folders_read": [],
            "folders_owners": [],
        }
    )


def _username(request: Request) -> str:
    return "watcher" if who(request).session is not None else who(request).name or "watcher"


def _email(request: Request) -> str:
    return f"{_username(request)}@{_HOST}"


async def username_to_email(request: Request) -> Response:
    return PlainTextResponse(f"{request.path_params['path']}@{_HOST}")


async def no_oidc(request: Request) -> Response:
    raise HTTPException(404, "watcher issues no OIDC tokens")


async def create_token(desk: Desk, request: Request) -> Response:
    """201 and the token. It can do no more than the one with which it was made, and lives no longer than is asked."""
    changing(request)
    given, now = await fields(request), desk.clock()
    expires = _instant(given.get("expiration"))
    if expires is not None and expires <= now:
        raise HTTPException(400, "this expiration is over already")
    asked = given.get("scopes")
    scopes = _scopes(asked) if asked else who(request).scopes
    if too_much := [scope for scope in scopes if not who(request).may_give(scope)]:
        raise HTTPException(403, f"this token may not give away {too_much[0]}")
    token = f"wtc_{secrets.token_urlsafe(32)}"
    while token.startswith("wtc_job_"):
        token = f"wtc_{secrets.token_urlsafe(32)}"
    register(token)
    digest, label, by = hashlib.sha256(token.encode()).digest(), text_of(given, "label", ""), who(request).name

    async def put(tx: Tx) -> None:
        await store.create(tx, digest, token[:10], now, label=label, scopes=scopes, expires_at=expires)
        await audit.note(tx, "token.create", token[:10], now, actor=by, note=label)

    await desk.db.write(put)
    return said(token, 201)


def _scopes(asked: Json) -> tuple[str, ...]:
    if not isinstance(asked, list) or not all(isinstance(s, str) and 0 < len(s) <= _LONGEST for s in asked):
        raise HTTPException(400, "scopes is a list of texts such as jobs:run:flows:f/news/summarise")
    return tuple(asked)


def _instant(text: Json) -> datetime | None:
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise HTTPException(400, "expiration is an instant such as 2030-01-01T00:00:00Z") from None
    return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)


async def list_tokens(desk: Desk, request: Request) -> Response:
    async with desk.db.read() as tx:
        rows = await store.list(tx)
    return JSONResponse(
        [
            {
                "label": row.label,
                "token_prefix": row.prefix,
                "expiration": when(row.expires_at),
                "created_at": when(row.created_at),
                "last_used_at": when(row.used_at or row.created_at),
                "scopes": list(row.scopes),
                "email": f"watcher@{_HOST}",
            }
            for row in rows
        ]
    )


async def delete_token(desk: Desk, request: Request) -> Response:
    changing(request)
    prefix = request.path_params["prefix"]
    if len(prefix) < 8 or not await desk.db.write(lambda tx: store.delete(tx, prefix)):
        raise HTTPException(404, f"there is no token that begins with {prefix}")
    return said("tokens deleted")
