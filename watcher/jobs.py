"""Local flows: claim a job, run its steps one after another in one directory, keep what they returned."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from watcher import log
from watcher.errors import StoreError, TriggerError, WatcherError
from watcher.ids import canonical
from watcher.store import jobs as job_store
from watcher.values import Config, Entry, Flow, JobStatus, Json, Request, Response

if TYPE_CHECKING:
    from watcher.http import FetchOptions
    from watcher.http.fetcher import Fetcher
    from watcher.resolve import Resolver
    from watcher.scripts import Scripts
    from watcher.store.db import Database, Operation
    from watcher.store.jobs import Job

_log = log.get("jobs")

LEASE = timedelta(seconds=30)
BEAT = 10.0  # seconds between two renewals of the leases
RECONCILE = 1.0  # seconds until we look without being woken
MOST_STARTS = 3
STEP_TIMEOUT = timedelta(minutes=10)
"""For a step of a flow whose ``timeout`` was left alone: that one is meant for a web request."""


class _Superseded(Exception):
    """Somebody else has the job now, or it was canceled: nothing more of it is ours to write."""


class NoSuchFlow(WatcherError):
    """The configuration has no local flow of that name."""


@dataclass(slots=True)
class _Running:
    """One job that this process works on."""

    task: asyncio.Task[None]
    token: str
    lost: bool = False  # another process took it over, or it was canceled


@dataclass(slots=True)
class _Host:
    """What the service answers to a running step."""

    fetcher: Fetcher
    resolver: Resolver

    async def fetch(self, request: Request, options: FetchOptions) -> Response:
        return await self.fetcher.fetch(request, options, {}, {})

    async def resource(self, path: str) -> Json:
        return await self.resolver.resource(path)

    async def variable(self, path: str) -> str:
        return await self.resolver.variable(path)

    async def page(self, entries: Sequence[Entry]) -> bool:
        return True


@dataclass(slots=True)
class Jobs:
    """The local flows of this process. ``base_url`` is where its own server answers, for scripts that call it."""

    config: Callable[[], Config]
    db: Database
    scripts: Scripts
    fetcher: Fetcher
    resolver: Resolver
    clock: Callable[[], datetime]
    base_url: str = ""
    owner: str = field(default_factory=lambda: f"{os.uname().nodename}:{os.getpid()}:{secrets.token_hex(4)}")
    _running: dict[str, _Running] = field(default_factory=dict)
    _woken: asyncio.Event = field(default_factory=asyncio.Event)

    # --- asking for jobs ---

    async def create(
        self, id: str, path: str, args: Mapping[str, Json], *, parent: str | None = None, root: str | None = None
    ) -> bool:
        """Store a job for the local flow ``path``; False when that id is there already. Raises NoSuchFlow."""
        self._flow(path)
        body = canonical(args)
        now = self.clock()
        new = await self.db.write(
            lambda tx: job_store.create(tx, id, "flow", path, body, now, parent=parent, root=root)
        )
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

    def owner_of(self, token: str) -> str | None:
        """The running job that this token was given to."""
        return next((id for id, job in self._running.items() if secrets.compare_digest(job.token, token)), None)

    def _flow(self, path: str) -> Flow:
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
        claimed = await self.db.write(partial(job_store.claim, owner=self.owner, limit=free, now=now, lease=LEASE))
        for job in claimed:
            task = asyncio.create_task(self._run(job), name=f"job {job.id}")
            self._running[job.id] = _Running(task, token=f"wtj_{secrets.token_urlsafe(32)}")
            task.add_done_callback(partial(self._ended, job.id))
        return len(claimed)

    def _ended(self, id: str, _: asyncio.Task[None]) -> None:
        self._running.pop(id, None)
        self._woken.set()

    async def _run(self, job: Job) -> None:
        """All steps that are left, to the end of the job."""
        folder = self._folder(job.id)
        try:
            if job.starts > MOST_STARTS:
                raise TriggerError(f"given up: it was started {job.starts - 1} times and never ended", kind="crashed")
            result, logs = await self._steps(job, folder)
            await self._finish(job, JobStatus.SUCCEEDED, result, logs=logs)
        except asyncio.CancelledError:
            if not self._running[job.id].lost:
                await self._give_back(job)
                return
        except _Superseded:
            _log.warning("job.superseded", job=job.id, path=job.path)
        except WatcherError as error:
            kind = getattr(error, "kind", "failed")
            await self._fail(job, f"{kind}: {error}", getattr(error, "detail", ""))
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

    async def _steps(self, job: Job, folder: Path) -> tuple[bytes, str]:
        results: list[Json] = json.loads(job.results or b"[]")
        step = job.step
        if await asyncio.to_thread(_prepare, folder) and step:
            step, results = 0, []  # what the earlier steps left in ./shared is gone
        value: Json = results[-1] if results else json.loads(job.args or b"{}")
        logs = job.logs
        while True:
            flow = self._flow(job.path)
            if step >= len(flow.steps):
                return canonical(value), logs
            value, logs = await self._step(job, flow, step, value, folder)
            results.append(value)
            await self._persist(
                partial(
                    job_store.step_done,
                    id=job.id,
                    owner=self.owner,
                    step=step,
                    results=canonical(results),
                    logs=logs,
                    now=self.clock(),
                    lease=LEASE,
                )
            )
            step += 1

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

    async def _step(self, job: Job, flow: Flow, step: int, value: Json, folder: Path) -> tuple[Json, str]:
        script = flow.steps[step]
        try:
            done = await self.scripts.step(
                script,
                value,
                cwd=folder,
                env=self._environment(job, step),
                timeout=STEP_TIMEOUT if flow.timeout == Flow(name="").timeout else flow.timeout,
                host=_Host(self.fetcher, self.resolver),
            )
        except TriggerError as error:
            raise TriggerError(f"step {script.name}: {error}", kind=error.kind, detail=error.detail) from error
        return done.result, done.logs

    def _environment(self, job: Job, step: int) -> dict[str, str]:
        """What Windmill's clients read. WM_STATE_PATH_NEW is left out: they would prefer it, even empty."""
        letter = chr(ord("a") + step % 26)
        return {
            "BASE_INTERNAL_URL": self.base_url,
            "WM_BASE_URL": self.base_url,
            "BASE_URL": self.base_url,
            "WM_TOKEN": self._running[job.id].token,
            "WM_WORKSPACE": self.config().workspace,
            "WM_JOB_ID": job.id,
            "WM_JOB_PATH": job.path,
            "WM_FLOW_PATH": job.path,
            "WM_FLOW_JOB_ID": job.id,
            "WM_ROOT_FLOW_JOB_ID": job.root or job.id,
            "WM_FLOW_STEP_ID": letter,
            "WM_STATE_PATH": f"{job.path}/{letter}_user",
        }

    async def _fail(self, job: Job, error: str, detail: str) -> None:
        try:
            await self._finish(job, JobStatus.FAILED, error=log.mask(error), detail=log.mask(detail))
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
        if status is JobStatus.FAILED:
            _log.warning("job.failed", job=job.id, path=job.path, error=error)
        else:
            _log.info("job.succeeded", job=job.id, path=job.path)

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

    def _folder(self, id: str) -> Path:
        return self.config().data / "jobs" / id


def _prepare(folder: Path) -> bool:
    """Make a job's directory with its ./shared. True: it was not there."""
    fresh = not folder.exists()
    (folder / "shared").mkdir(mode=0o700, parents=True, exist_ok=True)
    return fresh
