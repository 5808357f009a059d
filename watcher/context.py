"""What a script may reach while it runs: its state, resources, variables and the web."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from watcher.errors import TriggerError
from watcher.values import UNSET, Entry, Json, Request, Response

if TYPE_CHECKING:
    import asyncio

    from watcher.http import FetchOptions

T = TypeVar("T")

TO_CLOSE = 5.0  # seconds that one client may take to say goodbye


class Unchanged(Exception):
    """Ends a run early: the source itself answered that it is as it was."""


class Host(Protocol):
    """What the service answers to a running script. Errors are raised as TriggerError and reach the script as such."""

    async def fetch(self, request: Request, options: FetchOptions) -> Response:
        """Ask a source, with the politeness and the limits of the service."""

    async def resource(self, path: str) -> Json:
        """The value of a resource; TriggerError of kind ``missing`` if there is none."""

    async def variable(self, path: str) -> str:
        """The value of a variable; TriggerError of kind ``missing`` if there is none."""

    async def page(self, entries: Sequence[Entry]) -> bool:
        """One page of a generator has come; False asks it to stop, since all further pages are known."""


class Keeper(Host, Protocol):
    """A host that keeps states itself, in one place with what the script writes over HTTP."""

    async def state(self, path: str) -> Json:
        """The state at a path, with what this run wrote; UNSET if there is none."""

    async def stage(self, path: str, value: Json) -> None:
        """Write a state, to be kept if the run succeeds."""


class Context(ABC):
    """What one run of one script can reach. Staged state is kept only if the run's items are committed."""

    def __init__(self, *, state: Json = UNSET, state_path: str = "", workspace: str = "main", job_id: str = "") -> None:
        self.state_path = state_path
        self.workspace = workspace
        self.job_id = job_id
        self.capped = False  # http.pages met its limit before the end of a listing
        self.gap = ""  # what the script says it could not see
        self._state = None if state is UNSET else json.dumps(state)
        self._staged: str | None = None
        self._to_close: list[tuple[Callable[[], Any], asyncio.AbstractEventLoop | None]] = []

    def get_state(self, path: str | None = None) -> Json:
        """What was set last, or None. Another ``path`` reads the state that is kept there, as a resource."""
        if path and path != self.state_path:
            try:
                return self.get_resource(path)
            except TriggerError as error:
                if error.kind == "missing":  # only what is truly absent is "no state": trouble must stay an error
                    return None
                raise
        text = self._state if self._staged is None else self._staged
        return None if text is None else json.loads(text)

    def set_state(self, value: Json, path: str | None = None) -> None:
        """Stage the next state. TriggerError of kind ``junk`` when it is not JSON."""
        if path and path != self.state_path:
            raise TriggerError(
                f"set_state: a run writes its own state only, {self.state_path!r} and not {path!r}: leave out `path`",
                kind="arguments",
            )
        self._staged = _state_text(value)

    def at_end(self, close: Callable[[], Any]) -> None:
        """Call this when the run ends, whatever ends it; in the loop that is running now, if there is one."""
        from asyncio import _get_running_loop

        self._to_close.append((close, _get_running_loop()))

    async def closing(self, work: Awaitable[T]) -> T:
        """Do the work, then close what was opened in this loop, the newest first."""
        import asyncio

        try:
            return await work
        finally:
            here = asyncio.get_running_loop()
            mine, self._to_close = (
                [close for close, loop in self._to_close if loop is here],
                [kept for kept in self._to_close if kept[1] is not here],
            )
            for close in reversed(mine):
                with suppress(Exception):  # the run is judged by what it did, not by how a server took its leave
                    async with asyncio.timeout(TO_CLOSE):
                        await close()

    def close(self) -> None:
        """Close what was opened outside of a loop, or in one that is over, the newest first."""
        kept, self._to_close = self._to_close, []
        for close, loop in reversed(kept):
            with suppress(Exception):
                left = close()
                if loop is not None:
                    import asyncio

                    asyncio.run(left)

    @property
    def staged(self) -> Json:
        """What the script set, or UNSET."""
        return UNSET if self._staged is None else json.loads(self._staged)

    @abstractmethod
    def get_resource(self, path: str) -> Json: ...

    @abstractmethod
    def get_variable(self, path: str) -> str: ...

    def shared(self) -> Path:
        """The job's shared directory. TriggerError of kind ``arguments`` where there is none."""
        raise TriggerError("shared: this call has no directory of its own", kind="arguments")

    @abstractmethod
    async def fetch(self, request: Request, options: FetchOptions) -> Response: ...

    @abstractmethod
    def fetch_sync(self, request: Request, options: FetchOptions) -> Response: ...


class LoopContext(Context):
    """The context of a built-in that runs in the service's own loop, where nothing may block."""

    def __init__(self, host: Host, **rest: Any) -> None:
        super().__init__(**rest)
        self._host = host

    def get_resource(self, path: str) -> Json:
        raise TriggerError(f'in the loop a resource comes as an argument: "$res:{path}"', kind="arguments")

    def get_variable(self, path: str) -> str:
        raise TriggerError(f'in the loop a variable comes as an argument: "$var:{path}"', kind="arguments")

    def shared(self) -> Path:
        raise TriggerError("in the loop nothing is written to a disk: leave out `loop=True`", kind="arguments")

    async def fetch(self, request: Request, options: FetchOptions) -> Response:
        return await self._host.fetch(request, options)

    def fetch_sync(self, request: Request, options: FetchOptions) -> Response:
        raise TriggerError("in the loop only `await http.get(...)` is possible, http.sync is not", kind="arguments")


class Channel(Protocol):
    """The worker's end of the pipe to the service."""

    def ask(self, message: Mapping[str, Json], blob: bytes = b"") -> Future[tuple[dict[str, Json], bytes]]: ...


class RemoteContext(Context):
    """The context inside a worker process: whatever it lacks it asks of the service. Safe to use from any thread.

    ``kept``: the service keeps the states, and is asked for them each time, since the script may also write them over
    HTTP with Windmill's client.
    """

    def __init__(self, channel: Channel, *, kept: bool = False, **rest: Any) -> None:
        super().__init__(**rest)
        self._channel = channel
        self._kept = kept
        self._shared: Path | None = None

    def get_state(self, path: str | None = None) -> Json:
        if not self._kept:
            return super().get_state(path)
        return self._channel.ask({"op": "state", "path": path or self.state_path}).result()[0].get("value")

    def set_state(self, value: Json, path: str | None = None) -> None:
        if not self._kept:
            super().set_state(value, path)
            return
        value = json.loads(_state_text(value))  # junk is told here, where the script's own line is to blame
        self._channel.ask({"op": "stage", "path": path or self.state_path, "value": value}).result()

    def get_resource(self, path: str) -> Json:
        return self._channel.ask({"op": "resource", "path": _path(path, "$res:")}).result()[0]["value"]

    def get_variable(self, path: str) -> str:
        return str(self._channel.ask({"op": "variable", "path": _path(path, "$var:")}).result()[0]["value"])

    def shared(self) -> Path:
        if self._shared is None:
            self._shared = Path(self._channel.ask({"op": "shared"}).result()[0]["value"])
        return self._shared

    async def fetch(self, request: Request, options: FetchOptions) -> Response:
        import asyncio

        return _response(*await asyncio.wrap_future(self._fetch(request, options)))

    def fetch_sync(self, request: Request, options: FetchOptions) -> Response:
        return _response(*self._fetch(request, options).result())

    def _fetch(self, request: Request, options: FetchOptions) -> Future[tuple[dict[str, Json], bytes]]:
        head = {"method": request.method, "url": request.url, "headers": dict(request.headers)}
        return self._channel.ask({"op": "fetch", "request": head, "options": asdict(options)}, request.body)


def _state_text(value: Json) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TriggerError(f"set_state: the state is not JSON: {error}", kind="junk") from error


def _path(path: str, prefix: str) -> str:
    return str(path).removeprefix(prefix)


def _response(answer: Mapping[str, Json], body: bytes) -> Response:
    return Response(answer["status"], answer["headers"], body, answer["url"])


_current: ContextVar[Context | None] = ContextVar("watcher_context", default=None)
_everywhere: Context | None = None  # in a worker: threads that a script starts do not inherit its context variables


def current() -> Context:
    """The context of the run that is going on. RuntimeError outside one."""
    context = _current.get() or _everywhere
    if context is None:
        raise RuntimeError(
            "no run is going on: this can only be called by a script that watcher runs; "
            "to call main() yourself, in a test for example, use watcher.testing.run"
        )
    return context


@contextmanager
def use(context: Context, *, everywhere: bool = False) -> Iterator[Context]:
    """Make a context the current one, and close at the end what was opened in it.

    ``everywhere``: for every thread of this process too.
    """
    global _everywhere
    token = _current.set(context)
    if everywhere:
        _everywhere = context
    try:
        yield context
    finally:
        context.close()
        _current.reset(token)
        if everywhere:
            _everywhere = None


def get_state(path: str | None = None) -> Json:
    """What `set_state` kept at the end of the last run that was committed, or None at the first."""
    return current().get_state(path)


def set_state(value: Json, path: str | None = None) -> None:
    """Remember a JSON value. It is staged, and kept only if the items of this run are committed."""
    current().set_state(value, path)


def gap(text: str) -> None:
    """Tell that something may have been missed, and why: the run is marked with it, and a warning is logged."""
    reach = current()
    reach.gap = f"{reach.gap}; {text}" if reach.gap else str(text)


def shared() -> Path:
    """An empty directory that is this run's own and goes with it; the steps of a flow share one. Where a script starts
    in a directory of its own, it is that one's ``./shared``."""
    return current().shared()


def get_state_path() -> str:
    """The path that names this script's state."""
    return current().state_path


def get_resource(path: str) -> Any:
    """The value of the resource at a path, references in it resolved. An object may be awaited too, for those who write
    ``await`` before everything that comes from elsewhere."""
    value = current().get_resource(path)
    return _Object(value) if isinstance(value, dict) else value


class _Object(dict[str, Any]):
    def __await__(self) -> Generator[Any, None, dict[str, Any]]:
        return self
        yield


def get_variable(path: str) -> str:
    """The value of the variable at a path."""
    return current().get_variable(path)
