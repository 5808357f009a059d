"""Local flows: claim a job, run its steps one after another in one directory, keep what they returned."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from watcher import log
from watcher.errors import StoreError, TriggerError, WatcherError
from watcher.ids import canonical
from watcher.staging import Session, Sessions, States, schedule_path, script_path, step_id
from watcher.store import jobs as job_store
from watcher.store import resources as resource_store
from watcher.values import Config, Entry, Flow, JobStatus, Json, Request, Response, StagedState

if TYPE_CHECKING:
    from watcher.http import FetchOptions
    from watcher.http.fetcher import Fetcher
    from watcher.resolve import Resolver
    from watcher.scripts import Scripts
    from watcher.store.db import Database, Tx
    from watcher.store.jobs import Job
    from watcher.store.writer import Operation

_log = log.get("jobs")

LEASE = timedelta(seconds=30)
BEAT = 10.0  # seconds between two renewals of the leases
RECONCILE = 1.0  # seconds until we look without being woken
MOST_STARTS = 3
STEP_TIMEOUT = timedelta(minutes=10)
"""For a step of a flow whose ``timeout`` was left alone: that one is meant for a web request."""
LEFT_ALONE = 3600.0  # seconds in which a job's directory is nobody's business
MOST_SAID = 500  # characters of what a job printed that go into the log; its row keeps 64 kB


class _Superseded(Exception):
    """Somebody else has the job now, or it was canceled: nothing more of it is ours to write."""


SCRIPTS = (".py", ".ts", ".bun.ts", ".deno.ts", ".js", ".sh")


class NoSuchFlow(WatcherError):
    """The configuration has no local flow, watcher or script of that name."""


@dataclass(slots=True)
class _Running:
    """One job that this process works on."""

    task: asyncio.Task[None]
    path: str
    lost: bool = False  # another process took it over, or it was canceled


@dataclass(slots=True)
class _Host:
    """What the service answers to a running step."""

    fetcher: Fetcher
    resolver: Resolver
    states: States
    session: Session

    async def fetch(self, request: Request, options: FetchOptions) -> Response:
        return await self.fetcher.fetch(request, options, {}, {})

    async def state(self, path: str) -> Json:
        return await self.states.read(path, self.session)

    async def stage(self, path: str, value: Json) -> None:
        await self.states.write(path, value, self.session)

    async def resource(self, path: str) -> Json:
        return await self.resolver.resource(path)

    async def variable(self, path: str) -> str:
        return await self.resolver.variable(path)

    async def page(self, entries: Sequence[Entry]) -> bool:
        return True


@dataclass(slots=True)
class Jobs:
    """The jobs of this process: local flows, scripts by their path, and runs of watchers that somebody asked for.

    ``nudge`` runs a watcher and says how it went.
    """

    config: Callable[[], Config]
    db: Database
    scripts: Scripts
    fetcher: Fetcher
    resolver: Resolver
    clock: Callable[[], datetime]
    sessions: Sessions = field(default_factory=Sessions)
    nudge: Callable[[str], Awaitable[Json]] | None = None
    owner: str = field(default_factory=lambda: f"{os.uname().nodename}:{os.getpid()}:{secrets.token_hex(4)}")
    states: States = field(init=False)
    _running: dict[str, _Running] = field(default_factory=dict)
    _woken: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.states = States(self.config, self.db, self.resolver, self.clock, patience=self.sessions.patience)

    # --- asking for jobs ---

    async def create(
        self,
        id: str,
        path: str,
        args: Mapping[str, Json],
        *,
        kind: str = "flow",
        parent: str | None = None,
        root: str | None = None,
        due_at: datetime | None = None,
    ) -> bool:
        """Store a job for the local flow, script or watcher ``path``, to be started at ``due_at`` (now).

        False when that id is there already. Raises NoSuchFlow.
        """
        if kind != "watcher":
            self._flow(path, kind)
        body = canonical(args)
        create = partial(job_store.create, id=id, kind=kind, path=path, args=body, now=self.clock())
        new = await self.db.write(partial(create, parent=parent, root=root, due_at=due_at))
        if new:
            self._woken.set()
        return new

    async def get(self, id: str) -> Job | None:
        async with self.db.read() as tx:
            return await job_store.get(tx, id)

    async def cancel(self, id: str, reason: str) -> bool:
        """Stop a job, running or not. False when it had ended before."""
        now = self.clock()
        canceled = await self.db.write(lambda tx: job_store.cancel(tx, id, reason, now))
        if (running := self._running.get(id)) is not None:
            running.lost = True
            running.task.cancel()
        return canceled

    def kind_of(self, path: str) -> tuple[str, str]:
        """What a path that is to be run as a script is: a watcher, or a script beside the configuration file, and
        under which name. Raises NoSuchFlow."""
        config = self.config()
        for name, watcher in config.watchers.items():
            if path in (name, schedule_path(name), script_path(watcher, config.file)):
                return "watcher", name
        self._script(path)
        return "script", path

    def _script(self, path: str) -> Path:
        """The file of a script that is known by its Windmill path: below the configuration file's folder."""
        file = self.config().file
        safe = path.startswith(("f/", "u/")) and not {"", ".", ".."} & {*path.split("/")} and "\0" not in path
        if file is not None and safe:
            folder, _, name = path.rpartition("/")
            for suffix in SCRIPTS:
                found = file.parent / folder / f"{name}{suffix}"
                if found.is_file():
                    return found
        raise NoSuchFlow(f"{path}: there is no watcher and no script of that path")

    def _flow(self, path: str, kind: str = "flow") -> Flow:
        if kind == "script":
            return Flow(name=path, steps=(self._script(path),))
        flow = self.config().flows.get(path)
        if flow is None or not flow.steps:
            raise NoSuchFlow(f"flows.{path}: there is no local flow of that name")
        return flow

    # --- running them ---

    async def serve(self, stop: asyncio.Event) -> None:
        """Work on what is queued until ``stop``; then take no new job. `drain` ends those that run."""
        await self._take_over()
        beat = asyncio.create_task(self._beat(), name="jobs-heartbeat")
        stopping = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                self._woken.clear()
                try:
                    took = await self._claim()
                except StoreError as error:
                    _log.error("jobs.claim_failed", error=str(error))
                    took = 0
                if took:
                    continue
                woken = asyncio.create_task(self._woken.wait())
                await asyncio.wait({woken, stopping}, timeout=RECONCILE, return_when=asyncio.FIRST_COMPLETED)
                woken.cancel()
        finally:
            stopping.cancel()
            if stop.is_set() and self._running:  # leases are renewed until the last of them has ended
                await asyncio.wait([job.task for job in self._running.values()])
            beat.cancel()

    async def _take_over(self) -> None:
        """A SQLite database has one service: what another left running is nobody's."""
        if self.db.dialect == "sqlite":
            now = self.clock()
            await self.db.write(lambda tx: job_store.abandon(tx, now))

    async def drain(self, grace: float) -> None:
        """Give what runs ``grace`` seconds, then interrupt it; the interrupted step is run again at the next start."""
        tasks = [job.task for job in self._running.values()]
        if not tasks:
            return
        await asyncio.wait(tasks, timeout=grace)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _claim(self) -> int:
        free = self.config().scripts.workers - len(self._running)
        if free <= 0:
            return 0
        now = self.clock()
        async with self.db.read() as tx:
            due = await job_store.next_due(tx, now)
        if due is None or due > now:
            return 0  # found out by a read: to look takes no write transaction
        claimed = await self.db.write(lambda tx: self._take(tx, free, now))
        for job in claimed:
            task = asyncio.create_task(self._run(job), name=f"job {job.id}")
            self._running[job.id] = _Running(task, job.path)
            task.add_done_callback(partial(self._ended, job.id))
        return len(claimed)

    async def _take(self, tx: Tx, free: int, now: datetime) -> Sequence[Job]:
        """Claim what there is room for: of a flow no more than its ``at_once``."""
        config, claim = self.config(), partial(job_store.claim, tx, self.owner, now=now, lease=LEASE)
        most = config.scripts.workers
        few = {name: flow.at_once for name, flow in config.flows.items() if flow.steps and flow.at_once < most}
        taken = [*await claim(limit=free, without=few.keys())]
        for path, at_once in few.items():
            room = min(at_once - sum(job.path == path for job in self._running.values()), free - len(taken))
            if room > 0:
                taken += await claim(limit=room, only=path)
        return taken

    def _ended(self, id: str, _: asyncio.Task[None]) -> None:
        self._running.pop(id, None)
        self._woken.set()

    async def _run(self, job: Job) -> None:
        """All steps that are left, to the end of the job."""
        folder = self._folder(job.id)
        try:
            if job.starts > MOST_STARTS:
                raise TriggerError(f"given up: it was started {job.starts - 1} times and never ended", kind="crashed")
            if job.kind == "watcher":
                result, logs = await self._poll(job), ""
            else:
                result, logs = await self._with_token(job, folder)
            await self._finish(job, JobStatus.SUCCEEDED, result, logs=logs)
        except asyncio.CancelledError:
            if not self._running[job.id].lost:
                await self._give_back(job)
                return
        except _Superseded:
            _log.warning("job.superseded", job=job.id, path=job.path)
        except WatcherError as error:
            kind = getattr(error, "kind", "failed")
            await self._fail(job, f"{kind}: {error}", getattr(error, "detail", ""), getattr(error, "logs", ""))
        except Exception:
            # An accident of ours: the lease runs out and the job is started again, a few times at most.
            _log.exception("job.crashed", job=job.id, path=job.path)
            return
        await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _give_back(self, job: Job) -> None:
        """For the next start to go on with; the directory stays."""
        try:
            await self.db.write(lambda tx: job_store.release(tx, [job.id], self.owner))
        except StoreError as error:
            _log.error("job.not_given_back", job=job.id, error=str(error))  # its lease runs out instead

    async def _poll(self, job: Job) -> bytes:
        """Run a watcher because somebody asked for it."""
        if self.nudge is None:
            raise TriggerError("this process runs no watchers", kind="missing")
        return canonical(await self.nudge(job.path))

    async def _with_token(self, job: Job, folder: Path) -> tuple[bytes, str]:
        """All steps, while whoever has the job's token may ask for things in its name."""
        session = Session(
            "flow", job.path, "", self.clock(), job_id=job.id, parent=job.parent, root=job.root, own=False
        )
        with self.sessions.open(session) as token:
            return await self._steps(job, folder, session, token)

    async def _steps(self, job: Job, folder: Path, session: Session, token: str) -> tuple[bytes, str]:
        results: list[Json] = json.loads(job.results or b"[]")
        step = job.step
        if await asyncio.to_thread(_prepare, folder) and step:
            step, results = 0, []  # what the earlier steps left in ./shared is gone
        value: Json = results[-1] if results else json.loads(job.args or b"{}")
        logs = job.logs
        while True:
            flow = self._flow(job.path, job.kind)
            if step >= len(flow.steps):
                return canonical(value), logs
            try:
                value, said = await self._step(job, flow, step, value, folder, session, token)
            except TriggerError as error:
                error.logs = _joined(logs, error.logs)
                raise
            logs = _joined(logs, said)
            results.append(value)
            await self._persist(partial(self._note, job, step, canonical(results), logs, session.taken()[1]))
            session.staged.clear()
            step += 1

    async def _note(
        self, job: Job, step: int, results: bytes, logs: str, states: Sequence[StagedState], tx: Tx
    ) -> bool:
        """The end of one step, and in the same transaction the states that it wrote."""
        now = self.clock()
        ours = await job_store.step_done(tx, job.id, self.owner, step, results, logs, now, LEASE)
        if ours:
            # Many jobs of a flow run at once and share a state, as in Windmill: the last one to end wins.
            latest = [replace(state, expected=None) for state in states]
            await resource_store.put_states(tx, latest, now, by=f"flows.{job.path}")
        return ours

    async def _persist(self, operation: Operation[bool]) -> None:
        """Write what was done, however long the database is in trouble: a step is not run twice for that."""
        pause = 0.5
        while True:
            try:
                ours = await self.db.write(operation)
                break
            except StoreError as error:
                _log.error("job.not_stored", error=str(error))
                await asyncio.sleep(pause)
                pause = min(pause * 2, 10.0)
        if not ours:
            raise _Superseded

    async def _step(
        self, job: Job, flow: Flow, step: int, value: Json, folder: Path, session: Session, token: str
    ) -> tuple[Json, str]:
        script, letter = flow.steps[step], step_id(step)
        in_flow = job.kind == "flow"
        session.state_path = f"{job.path}/{letter}_user" if in_flow else f"{job.path}/user"
        session.staged.clear()
        more = {"WM_FLOW_PATH": job.path, "WM_FLOW_JOB_ID": job.id, "WM_FLOW_STEP_ID": letter} if in_flow else {}
        more |= {"WM_ROOT_FLOW_JOB_ID": job.root or job.id}
        try:
            done = await self.scripts.step(
                script,
                value,
                cwd=folder,
                env=await self.sessions.environment(session, token, self.config().workspace, more),
                timeout=STEP_TIMEOUT if flow.timeout == Flow(name="").timeout else flow.timeout,
                host=_Host(self.fetcher, self.resolver, self.states, session),
            )
        except TriggerError as error:
            told = f"step {script.name}: {error}"
            raise TriggerError(told, kind=error.kind, detail=error.detail, logs=log.mask(error.logs)) from error
        return done.result, log.mask(done.logs)

    async def _fail(self, job: Job, error: str, detail: str, logs: str) -> None:
        error, detail = log.mask(error), log.mask(detail)
        try:
            await self._finish(job, JobStatus.FAILED, error=error, detail=detail, logs=logs)
        except _Superseded:
            _log.warning("job.superseded", job=job.id, path=job.path)

    async def _finish(
        self,
        job: Job,
        status: JobStatus,
        result: bytes | None = None,
        *,
        error: str = "",
        detail: str = "",
        logs: str = "",
    ) -> None:
        now, owner = self.clock(), self.owner
        told = {"error": error, "detail": detail, "logs": logs}
        await self._persist(lambda tx: job_store.finish(tx, job.id, owner, status, result=result, now=now, **told))
        said = {"said": logs.rstrip()[-MOST_SAID:]} if logs.strip() else {}
        if status is JobStatus.FAILED:
            _log.warning("job.failed", job=job.id, path=job.path, error=error, **said)
        else:
            _log.info("job.succeeded", job=job.id, path=job.path, **said)

    async def _beat(self) -> None:
        """Renew the leases of what runs; what was canceled or taken over elsewhere is stopped."""
        while True:
            await asyncio.sleep(BEAT)
            ids = list(self._running)
            if not ids:
                continue
            until = self.clock() + LEASE
            try:
                ours = await self.db.write(partial(job_store.heartbeat, ids=ids, owner=self.owner, until=until))
            except StoreError as error:
                _log.error("jobs.heartbeat_failed", error=str(error))
                continue
            for id in set(ids) - set(ours):
                if (running := self._running.get(id)) is not None:
                    running.lost = True
                    running.task.cancel()

    async def sweep(self) -> None:
        """Remove the directories of jobs that are over or forgotten: those of a process that was killed, mostly."""
        old = await asyncio.to_thread(_older, self.config().data / "jobs", time.time() - LEFT_ALONE)
        for start in range(0, len(old), 500):
            async with self.db.read() as tx:
                known = await job_store.some(tx, [folder.name for folder in old[start : start + 500]])
            for folder in old[start : start + 500]:
                job = known.get(folder.name)
                if job is None or job.status not in (JobStatus.QUEUED, JobStatus.RUNNING):
                    await asyncio.to_thread(shutil.rmtree, folder, True)

    def _folder(self, id: str) -> Path:
        return self.config().data / "jobs" / id


def _joined(before: str, said: str) -> str:
    """What one step printed, after what the steps before it printed; each begins on a line of its own."""
    return before + "\n" + said if before and said and not before.endswith("\n") else before + said


def _older(folder: Path, than: float) -> list[Path]:
    """What is in a directory and was not touched since."""
    try:
        with os.scandir(folder) as entries:
            return [Path(one) for one in entries if one.stat(follow_symlinks=False).st_mtime < than]
    except FileNotFoundError:
        return []


def _prepare(folder: Path) -> bool:
    """Make a job's directory with its ./shared. True: it was not there."""
    fresh = not folder.exists()
    (folder / "shared").mkdir(mode=0o700, parents=True, exist_ok=True)
    return fresh
