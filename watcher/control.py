"""The unix socket between the command line and a running service: one POST per verb, nothing else."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from watcher.errors import StoreError, WatcherError
from watcher.values import Json

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from watcher.operations import Operator

MAX_BODY = 96 * 1024 * 1024  # bytes: a whole state (64 MB) or plan, with room for JSON's escapes
_LONGEST = 100  # bytes of a path that every kernel takes for a unix socket (its limit is 107)


class Refused(WatcherError):
    """The service said no; the message and the exit code are its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def path(data: Path) -> Path:
    """Where the socket of a service with this data directory is."""
    return data / "control.sock"


# --- the service's side -----------------------------------------------------------------------------------------------


def listen(at: Path) -> socket.socket:
    """A listening socket that only this user can connect to; a socket that a dead service left behind is replaced.

    Bound here and not by the web server, which would open it to everybody.
    """
    if alive(at):
        raise StoreError(f"another service answers on {at}: give each service a `data` directory of its own")
    at.parent.mkdir(parents=True, exist_ok=True)
    at.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _address(at) as address:
            mask = os.umask(0o177)
            try:
                listener.bind(address)
            finally:
                os.umask(mask)
        listener.listen(64)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def application(operator: Operator) -> Starlette:
    """The ASGI application to serve on that socket: ``POST /VERB`` with the arguments as a JSON object.

    200 with ``{"result": …}``, or 422 with ``{"error": …, "exit_code": …}``. Anything unforeseen is 500 in the same
    shape, and its traceback goes to the service's log and not to the caller.
    """
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from watcher import log
    from watcher.operations import VERBS

    logger = log.get("watcher.control")

    def answer(value: Json, status: int = 200) -> Response:
        # As ASCII: an item whose text was cut within a character has no UTF-8, and is shown all the same.
        return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")

    def refuse(status: int, error: str, exit_code: int) -> Response:
        return answer({"error": error, "exit_code": exit_code}, status)

    async def call(request: Request) -> Response:
        name = request.path_params["verb"]
        verb = VERBS.get(name)
        if verb is None:
            return refuse(422, f"this service knows no {name!r}: restart it, it may be of another version", 2)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                return refuse(413, f"more than {MAX_BODY // 1024 // 1024} MB at once", 2)
        try:
            result = await verb(operator, **json.loads(bytes(body) or b"{}"))
        except WatcherError as error:
            return refuse(422, str(error), error.exit_code)
        except Exception as error:
            logger.exception("control.failed", verb=name)
            return refuse(500, f"{type(error).__name__} in the service: its log has the details", 1)
        return answer({"result": result})

    return Starlette(routes=[Route("/{verb}", call, methods=["POST"])])


# --- the command's side -----------------------------------------------------------------------------------------------


def alive(at: Path) -> bool:
    """Whether somebody listens there. Raises StoreError when this user may not ask."""
    try:
        _connect(at).close()
    except PermissionError as error:
        raise StoreError(f"{at} belongs to the service's user: run this command as that user, or as root") from error
    except OSError:
        return False
    return True


def call(at: Path, verb: str, arguments: dict[str, Any]) -> Json:
    """Ask the service, and wait for as long as it works on it. Raises Refused, or StoreError when it goes away."""
    import http.client

    connection = http.client.HTTPConnection("localhost")
    try:
        connection.sock = _connect(at)
        connection.request("POST", f"/{verb}", json.dumps(arguments), {"content-type": "application/json"})
        answer = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise StoreError(
            f"the service at {at} went away before it answered ({type(error).__name__}); "
            "see `watcher status`, then try again"
        ) from error
    finally:
        connection.close()
    if "error" in answer:
        raise Refused(answer["error"], answer["exit_code"])
    return answer["result"]


def _connect(at: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _address(at) as address:
            connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _address(at: Path) -> Iterator[str]:
    """The socket's path, by way of an open directory when it is too long for the kernel."""
    if len(os.fsencode(at)) <= _LONGEST:
        yield str(at)
        return
    directory = os.open(at.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{at.name}"
    finally:
        os.close(directory)
