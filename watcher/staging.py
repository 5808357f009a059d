"""Jobs while they run: what each may reach by its token, and the states it wrote, kept only if it succeeds."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from watcher.errors import Damaged, StoreError, WatcherError
from watcher.store import resources, states
from watcher.values import UNSET, Config, Json, Memory, StagedState, Watcher

if TYPE_CHECKING:
    from watcher.resolve import Resolver
    from watcher.store.db import Database, Tx

T = TypeVar("T")

TOKEN_PREFIX = "wtc_job_"  # noqa: S105  (what a job's token starts with, so that one of an ended job is told apart)
MAX_STATES = 1000
"""Staged by one job."""

_CUT = re.compile(r"[?#%\\\s\x00-\x1f\x7f\ud800-\udfff]")
"""Windmill's clients put paths into URLs as they are."""


class Ended(WatcherError):
    """The job of this token is over, or another run took its place: nothing it does counts any more."""


class Changed(WatcherError):
    """A job that only looks (`watcher plan`) wanted to change something."""


@dataclass(slots=True)
class Session:
    """One running job as the API sees it.

    ``state`` is what the watcher remembered before, served at ``state_path``; a step of a local flow has none
    (``own`` is False) and keeps its state as a resource. ``dry``: nothing of it will be kept.
    """

    kind: Literal["watcher", "flow"]
    path: str
    state_path: str
    started_at: datetime
    job_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    parent: str | None = None
    root: str | None = None
    own: bool = True
    state: Json = UNSET
    dry: bool = False
    staged: dict[str, Json] = field(default_factory=dict)  # UNSET: deleted
    versions: dict[str, int] = field(default_factory=dict)  # of other states, as they were read
    trouble: str = ""  # why nothing of this job may be kept, whatever its script made of the error
    waiting: int = 0  # reads that the database has not answered yet
    over: bool = False
    progress: int | None = None
    user_states: dict[str, Json] = field(default_factory=dict)
    audited: set[str] = field(default_factory=set)  # secrets whose reading was noted

    def owns(self, path: str) -> bool:
        """Whether a path is this watcher's own memory."""
        return self.own and path == self.state_path

    def read(self, path: str) -> Json:
        """What this job would read there, as far as it is known here: UNSET if there is nothing. KeyError: ask the
        store."""
        if path in self.staged:
            return self.staged[path]
        if self.owns(path):
            return self.state
        raise KeyError(path)

    def stage(self, path: str, value: Json) -> None:
        """Write a state. Raises Ended, StoreError when there are too many."""
        self.check()
        if path not in self.staged and len(self.staged) >= MAX_STATES:
            raise StoreError(f"a job writes {MAX_STATES} states at most")
        self.staged[path] = value

    def check(self) -> None:
        """Raise Ended when nothing that this job does counts any more."""
        if self.over:
            raise Ended(f"job {self.job_id} is over, or was superseded: nothing it writes is kept")

    def fail(self, why: str) -> None:
        """Let the job fail at its end. Windmill's Python client takes every error for "there is no state"."""
        self.trouble = self.trouble or why

    @contextmanager
    def asking(self) -> Iterator[None]:
        """While a read goes on. A script that ends meanwhile did not get what it asked for."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def taken(self) -> tuple[Json, tuple[StagedState, ...]]:
        """The watcher's own next state (UNSET: not written) and the others, to be committed. Raises StoreError."""
        trouble = self.trouble or ("its script did not wait for what it asked for" if self.waiting else "")
        if trouble:
            raise StoreError(f"nothing of this run is kept: {trouble}")
        others = tuple(
            StagedState(path, value, self.versions.get(path))
            for path, value in self.staged.items()
            if not self.owns(path)
        )
        own = self.staged.get(self.state_path, UNSET) if self.own else UNSET
        return own, others


class Sessions:
    """The jobs that run in this process. Of a token only the hash is kept, and no longer than the job runs."""

    def __init__(self, url: Callable[[], Awaitable[str]] | None = None, *, patience: float = 60.0) -> None:
        self.url = url  # where this process answers; None: nowhere
        self.patience = patience  # seconds that a read waits for a database in trouble
        self._live: dict[bytes, Session] = {}

    @contextmanager
    def open(self, session: Session) -> Iterator[str]:
        """Let a job in, by the token that this gives, until it ends."""
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        digest = _digest(token)
        self._live[digest] = session
        try:
            yield token
        finally:
            session.over = True
            del self._live[digest]

    def find(self, token: str) -> Session | None:
        """The running job that this token was given to. Raises Ended for the token of one that is over."""
        if not token.startswith(TOKEN_PREFIX):
            return None
        session = self._live.get(_digest(token))
        if session is None or session.over:
            raise Ended("the job of this token is over, or was superseded: nothing it asks for is done any more")
        return session

    def of_digest(self, sha256: bytes) -> Session | None:
        """The running job whose token has this hash."""
        session = self._live.get(sha256)
        return None if session is None or session.over else session

    def get(self, job_id: str) -> Session | None:
        """The running job of this id."""
        return next((s for s in self._live.values() if s.job_id == job_id), None)

    def all(self) -> list[Session]:
        """Those that run, oldest first."""
        return [session for session in self._live.values() if not session.over]

    def supersede(self, path: str) -> None:
        """Another run of this watcher was committed: what others of it still write could only end in a conflict."""
        for session in self._live.values():
            if session.kind == "watcher" and session.path == path and not session.dry:
                session.over = True

    async def environment(
        self, session: Session, token: str, workspace: str, more: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """What Windmill's clients and scripts read. Empty when there is nowhere to reach us.

        WM_STATE_PATH_NEW is left out: the clients would prefer it, even empty.
        """
        if self.url is None:
            return {}
        url = await self.url()
        schedule = schedule_path(session.path) if session.kind == "watcher" else ""
        return {
            "BASE_INTERNAL_URL": url,
            "WM_BASE_URL": url,
            "BASE_URL": url,
            "WM_TOKEN": token,
            "WM_WORKSPACE": workspace,
            "WM_STATE_PATH": session.state_path,
            "WM_JOB_ID": session.job_id,
            "WM_JOB_PATH": session.path,
            "WM_ROOT_JOB_ID": session.root or session.job_id,
            "WM_SCHEDULE_PATH": schedule,
            "WM_SCHEDULED_FOR": session.started_at.isoformat().replace("+00:00", "Z"),
            "WM_USERNAME": "watcher",
            "WM_EMAIL": "watcher@localhost",
            "WM_PERMISSIONED_AS": "u/watcher",
            "WM_OBJECT_PATH": "",
            "WM_WORKER_GROUP": "default",
            "WM_RUNNABLE_ID": "",
            "WM_END_USER_EMAIL": "",
            "WM_FLOW_PATH": "",
            "WM_FLOW_JOB_ID": "",
            "WM_ROOT_FLOW_JOB_ID": "",
            "WM_FLOW_STEP_ID": "",
            **(more or {}),
        }


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


# --- states ---------------------------------------------------------------------------------------------------------


class Refused(WatcherError):
    """This path is not for this caller to write."""


class States:
    """Everything that is kept as a state: what the watchers remember, and resources of type ``state``.

    A running job (``session``) sees what it wrote itself, and writes are staged; whoever has no session writes at
    once.
    """

    def __init__(
        self,
        config: Callable[[], Config],
        db: Database,
        resolver: Resolver,
        clock: Callable[[], datetime],
        *,
        patience: float = 60.0,
    ) -> None:
        self._config = config
        self._db = db
        self._resolver = resolver
        self._clock = clock
        self._patience = patience
        self._owners: tuple[Config | None, Mapping[str, str]] = (None, {})

    def owner(self, path: str) -> str | None:
        """The watcher whose memory is served at this path."""
        config = self._config()
        if self._owners[0] is not config:
            paths = {state_path(watcher, config.file): name for name, watcher in config.watchers.items()}
            self._owners = config, paths
        return self._owners[1].get(path)

    async def read(self, path: str, session: Session | None = None, *, followed: bool = True) -> Json:
        """The value at a path, UNSET if there is none; references in it ``followed``, but never in a state.

        A database in trouble is waited for: Windmill's Python client takes every error for "there is no state". When
        it does not recover in time the job fails at its end, whatever its script makes of the error.

        Raises StoreError, ResolveError.
        """
        if session is not None:
            with suppress(KeyError):
                return session.read(path)
        return await self.patiently(lambda: self._read(path, session, followed), session)

    async def patiently(self, read: Callable[[], Awaitable[T]], session: Session | None) -> T:
        """Read, waiting for a database in trouble; see `read`."""
        until, pause = time.monotonic() + self._patience, 0.05
        with session.asking() if session is not None else nullcontext():
            while True:
                try:
                    return await read()
                except StoreError as error:
                    if isinstance(error, Damaged) or time.monotonic() >= until:
                        if session is not None:
                            session.fail(f"its script asked for what could not be read: {error}")
                        raise
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)

    async def _read(self, path: str, session: Session | None, followed: bool) -> Json:
        if (name := self.owner(path)) is not None:
            async with self._db.read() as tx:
                memory = await states.load(tx, name)
            return (await states.whole(self._db, memory)).state
        if path in self._config().resources:
            return await self._resolver.resource(path) if followed else self._config().resources[path].value
        async with self._db.read() as tx:
            row = await resources.get(tx, path)
        if row is not None and followed and row.type != resources.STATE:
            return await self._resolver.resource(path)
        if session is not None and (row is None or row.type == resources.STATE):
            session.versions.setdefault(path, row.version if row else 0)
        return row.value if row is not None else UNSET

    async def write(self, path: str, value: Json, session: Session | None = None, *, note: str = "api") -> None:
        """Write a state (UNSET: delete it). Raises Refused, Ended, Conflict, StoreError."""
        if session is not None and session.owns(path):
            session.stage(path, value)
            return
        if (name := self.owner(path)) is not None:
            if session is not None:
                raise Refused(f"{path} is the memory of watchers.{name}: its own runs alone write it")
            await self._remember(name, value, note)
            return
        if path in self._config().resources:
            raise Refused(f"resources.{path} stands in the configuration file: change it there")
        if session is not None:
            session.stage(path, value)
            return
        now = self._clock()
        await self._db.write(lambda tx: resources.put_states(tx, [StagedState(path, value)], now, by=note))

    async def _remember(self, name: str, value: Json, note: str) -> None:
        now = self._clock()
        new = await states.apart(self._db, Memory(state=value))

        async def put(tx: Tx) -> None:
            memory = await states.load(tx, name)
            changed = replace(memory, state=new.state, state_at=new.state_at)
            await states.put(tx, name, changed, memory.version, now, note=note)

        await self._db.write(put)


# --- paths, as Windmill makes them ------------------------------------------------------------------------------------


def schedule_path(watcher: str) -> str:
    """A watcher is to its script what a schedule is in Windmill."""
    return watcher if watcher.startswith(("f/", "u/")) else f"f/watchers/{watcher}"


def script_path(watcher: Watcher, file: Path | None) -> str:
    """The path that the script would have in Windmill: that below the configuration file, without the suffix."""
    script = watcher.script
    if "/" not in watcher.trigger and not script.suffixes[1:] and watcher.trigger == script.stem:
        return _clean(f"f/triggers/{script.stem}")
    base = file.parent if file is not None else script.parent
    inside = script.relative_to(base) if script.is_relative_to(base) else Path(script.name)
    plain = inside.with_name(inside.name.split(".")[0] or inside.name).as_posix()
    return _clean(plain if plain.startswith(("f/", "u/")) else f"f/{plain}")


def state_path(watcher: Watcher, file: Path | None) -> str:
    """Where the state of a watcher's script is: ``{script path}/schedule-{schedule path with dashes}``."""
    return _clean(f"{script_path(watcher, file)}/schedule-{schedule_path(watcher.name).replace('/', '-')}")


def step_id(number: int) -> str:
    """The letter of a flow's step: a … z, aa, ab …"""
    letters = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return letters


def _clean(path: str) -> str:
    return _CUT.sub("_", path)
