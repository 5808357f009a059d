"""What all of Windmill's endpoints share: who may, which workspace, JSON in, plain text out."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from watcher.errors import Conflict, ResolveError, SecretError, StoreError
from watcher.objects import EVERY, Who
from watcher.resource_types import Unfit
from watcher.server.guard import Principal
from watcher.staging import Changed, Ended, Refused
from watcher.values import Json

if TYPE_CHECKING:
    from watcher.jobs import Jobs
    from watcher.objects import Objects
    from watcher.resolve import Resolver
    from watcher.secrets import Key
    from watcher.staging import Session, Sessions, States
    from watcher.store.db import Database
    from watcher.values import Config

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]

LARGE = 256 * 1024  # bytes; larger bodies are parsed beside the loop, so that no other request is late
LONGEST_PATH = 255
_FOLDER = {kind: re.compile(rf"resources:{kind}:f/([^/*]+)(?:/\*)?") for kind in ("read", "write")}
_FORBIDDEN = re.compile(r"[?#%\\\x00-\x1f\x7f\ud800-\udfff]")
_HUGE = re.compile(rb"[eE]\+?\d{3}|\d{309}")
"""Where a number may be that floats do not hold."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What the endpoints work on."""

    config: Callable[[], Config]
    db: Database
    clock: Callable[[], datetime]
    jobs: Jobs
    resolver: Resolver
    key: Key | None = None
    draining: Callable[[], bool] = lambda: False
    objects: Objects = field(kw_only=True)

    @property
    def states(self) -> States:
        return self.jobs.states

    @property
    def sessions(self) -> Sessions:
        return self.jobs.sessions

    def route(self, path: str, endpoint: Endpoint, need: str | None, *methods: str) -> BaseRoute:
        """A route under ``/api/w/{workspace}``; any other workspace is 404.

        ``need`` is the scope it takes; ``{path}`` in it is that of the request. None: whoever has a token.
        """

        async def checked(request: Request) -> Response:
            if request.path_params["workspace"] != self.config().workspace:
                raise HTTPException(404, "there is no such workspace")
            path = str(request.path_params.get("path", ""))
            path = path.removeprefix("$res:").removeprefix("$var:")  # which some versions of the clients leave there
            request.path_params["path"] = path
            if need is not None:
                self.require(request, need.replace("{path}", path))
            return await answered(endpoint(request))

        return Route(f"/api/w/{{workspace}}{path}", checked, methods=[*methods] or ["GET"])

    def require(self, request: Request, need: str) -> None:
        """Raise 403 unless the token is good for this."""
        if not who(request).may(need):
            raise HTTPException(403, f"this token may not {need}")


def who(request: Request) -> Principal:
    """Whoever asks."""
    principal: Principal = request.scope["principal"]
    return principal


def who_is(principal: Principal) -> Who:
    """Somebody as the permissions of object storage see them: folders are those in which the token's scopes let it
    read or write resources."""
    name = "watcher" if principal.session is not None else principal.name
    folders: dict[str, list[str]] = {"read": [], "write": []}
    for kind, names in folders.items():
        if principal.may(f"resources:{kind}:f"):
            names.append(EVERY)
        else:
            names += [found[1] for scope in principal.scopes if (found := _FOLDER[kind].fullmatch(scope))]
    return Who(
        name,
        admin=principal.may("*"),
        job=principal.session is not None,
        folders_read=tuple(folders["read"]),
        folders_write=tuple(folders["write"]),
    )


def job(request: Request) -> Session | None:
    """The running job that asks, if it is one."""
    return who(request).session


def changing(request: Request) -> Session | None:
    """The same, before something is changed at once: refused to a job that only looks, or is over."""
    session = job(request)
    if session is not None:
        session.check()
        if session.dry:
            raise Changed("this job only looks (`watcher plan`): nothing is changed, created or started by it")
    return session


async def answered(work: Awaitable[Response]) -> Response:
    """The response, or the error as Windmill's status for it."""
    try:
        return await work
    except (Ended, Conflict) as error:
        raise HTTPException(409, str(error)) from error
    except (Changed, Refused) as error:
        raise HTTPException(403, str(error)) from error
    except Unfit as error:
        raise HTTPException(400, str(error)) from error
    except ResolveError as error:
        raise HTTPException(404 if error.kind == "missing" else 400, str(error)) from error
    except SecretError as error:
        raise HTTPException(500, str(error)) from error
    except StoreError:
        raise  # 503: never what a client would take for "there is nothing"


async def body(request: Request) -> Json:
    """The body as JSON; nothing is an empty object. 400 when it is something else, NaN among it."""
    raw = await request.body()
    return await asyncio.to_thread(parse, raw) if len(raw) > LARGE else parse(raw)


def parse(raw: bytes) -> Json:
    whole = _number if _HUGE.search(raw) else None  # which a few bodies need and all others would pay for
    try:
        return json.loads(raw or b"{}", parse_constant=_no_constant, parse_float=whole)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from error


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is larger than any number here")
    return number


class Answer(JSONResponse):
    """JSON. A text that somebody cut within a character is given back as it was, since "cannot be read" would be
    taken for "there is none"."""

    def render(self, content: Json) -> bytes:
        try:
            return super().render(content)
        except UnicodeEncodeError:
            return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


async def fields(request: Request) -> dict[str, Json]:
    """The body, which must be an object."""
    found = await body(request)
    if not isinstance(found, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return found


def text_of(found: dict[str, Json], name: str, default: str | None = None) -> str:
    """A field that must be text, fit for both databases."""
    value = found.get(name, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, str):
        raise HTTPException(400, f"{name} must be text")
    if "\x00" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise HTTPException(400, f"{name} has a character that no database keeps")
    return value


def new_path(text: str) -> str:
    """A path as it may be created. 400 for one that Windmill's clients could not ask for again."""
    if not text or len(text) > LONGEST_PATH:
        raise HTTPException(400, f"a path has 1 to {LONGEST_PATH} characters")
    if _FORBIDDEN.search(text):
        raise HTTPException(
            400, f"{text!r}: a path without ? # % \\ and control characters: clients would cut it there"
        )
    if text.startswith("$"):
        raise HTTPException(400, f"{text!r}: a path, and not a reference to one")
    if {"", ".", ".."} & {*text.split("/")}:
        raise HTTPException(400, f"{text!r}: each part of a path has a name, and . and .. are none")
    return text


def known_query(request: Request, *names: str) -> None:
    """Refuse other parameters. Clients put paths into URLs as they are: what follows a ``?`` in one would come here,
    and a resource of a shorter path would be read or written."""
    odd = set(request.query_params) - {"token", *names}
    if odd:
        raise HTTPException(400, f"unknown parameter {sorted(odd)[0]!r}: a path must not hold a ?")


def page(request: Request, rows: list[T]) -> list[T]:
    """The part that ``page`` (from 1) and ``per_page`` ask for."""
    try:
        number = max(1, int(request.query_params.get("page", "1")))
        size = min(max(1, int(request.query_params.get("per_page", "1000"))), 1000)
    except ValueError:
        raise HTTPException(400, "page and per_page are numbers") from None
    return rows[(number - 1) * size : number * size]


def said(text: str, status: int = 200) -> Response:
    """What Windmill answers to a write: a sentence."""
    return PlainTextResponse(text, status)


def when(at: datetime | None) -> str | None:
    """An instant as Windmill writes it."""
    return at.isoformat().replace("+00:00", "Z") if at else None
