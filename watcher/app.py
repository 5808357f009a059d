"""Everything put together: what a command needs to run a watcher, and the whole service."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import secrets
import signal
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from starlette.applications import Starlette

from watcher import config as configuration
from watcher import control, log, metrics
from watcher.dispatch import Dispatcher
from watcher.engine import silence
from watcher.engine.backlog import Backlog
from watcher.engine.brake import Brake
from watcher.engine.embedded import Embedded
from watcher.errors import Damaged, ObjectsError, StoreError, TriggerError, WatcherError
from watcher.failpoint import failpoint
from watcher.http.fetcher import Fetcher
from watcher.http.sender import Sender
from watcher.jobs import Jobs
from watcher.notify import Notifier
from watcher.objects import Objects
from watcher.objects.stow import ITEMS, STATES, UNWANTED, Stowage
from watcher.operations import Operator
from watcher.resolve import Resolver
from watcher.run import Runner
from watcher.schedule import Clock
from watcher.scripts import Scripts
from watcher.secrets import exposed, from_elsewhere, load_key, require
from watcher.server import Listener, api, bind, site, windmill
from watcher.server import url as url_of
from watcher.server.figures import Figures
from watcher.server.guard import JOB_SCOPES, Principal, same
from watcher.server.windmill.signing import LONGEST as LONGEST_LINK
from watcher.server.windmill.signing import Signing
from watcher.staging import Sessions
from watcher.store import db as store_db
from watcher.store import meta, migrate, retention
from watcher.store import resources as resource_store
from watcher.store import states as stored_states
from watcher.store import tokens as token_store
from watcher.store import variables as variable_store
from watcher.store import watchers as watcher_store
from watcher.values import Config, Flow, Json, Server

_log = log.get("app")

GRACE = 25.0  # seconds that a stop waits for what is in flight
FLUSH_EVERY = 60.0
PRUNE_EVERY = 3600.0
LOOK_AT_FILE_EVERY = 3000  # milliseconds
KEEP_JOBS = timedelta(days=30)
CHECK_EVERY = 24 * 3600.0
STILL = timedelta(seconds=10)  # while migrating, systemd hears that often that we are alive


def now() -> datetime:
    """The wall clock, aware and in UTC."""
    return datetime.now(UTC)


# --- what a run needs -------------------------------------------------------------------------------------------------


class Runtime:
    """The database and all that runs a watcher: for one command, or inside the service.

    ``async with Runtime(config) as runtime``. Whoever opens one on SQLite holds `store.db.lock` around it.
    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Callable[[], datetime] = now,
        environ: Mapping[str, str] = os.environ,
        opening: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.clock = clock
        self.environ = environ
        self.committed: Callable[[Collection[str]], None] = lambda flows: None
        self._opening = opening  # called now and then while the database is checked and migrated
        self._exit = AsyncExitStack()
        self.url = ""  # where scripts reach us
        self._opening_door = asyncio.Lock()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._open(stack)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exit.aclose()

    async def _open(self, stack: AsyncExitStack) -> None:
        config = self.config
        config.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.db = await store_db.Database.open(config.database)
        stack.push_async_callback(self.db.close)
        await self._while_telling(migrate.upgrade(self.db, backup_to=config.data / "backups", now=self.clock()))
        await self.follow(config)
        self.key = load_key(self.environ, config.secret_key_file)
        self._signing = Signing(self.db, self.key)
        self.resolver = Resolver(lambda: self.config, self.db, self.key)
        self.objects = Objects(lambda: self.config, self.resolver.resource)
        self.stowage = Stowage(
            self.objects, self.clock, lambda: self.config.delivery.keep_dead, self._link if config.server else None
        )
        self.db.attic = self.stowage
        self.fetcher = Fetcher(config.http, self.clock)
        stack.push_async_callback(self.fetcher.close)
        self.sessions = Sessions(self._reachable)
        self.scripts = Scripts(config.scripts, data=config.data)
        await self.scripts.start()
        stack.push_async_callback(self.scripts.close)
        self.runner = Runner(
            lambda: self.config,
            self.db,
            self.scripts,
            self.fetcher,
            self.resolver,
            self.clock,
            lambda flows: self.committed(flows),
            self.sessions,
        )
        self.jobs = Jobs(
            lambda: self.config,
            self.db,
            self.scripts,
            self.fetcher,
            self.resolver,
            self.clock,
            sessions=self.sessions,
        )
        stack.push_async_callback(self._flush)

    async def _link(self, storage: str, key: str) -> str:
        """The query that opens an object for a week. It is the same all day, so that attempts send the same."""
        today = self.clock().replace(hour=0, minute=0, second=0, microsecond=0)
        return (await self._signing.ring()).link(storage, key, today + timedelta(days=1), LONGEST_LINK)

    async def _reachable(self) -> str:
        """Where scripts reach us: the service's own address, or a door of their own on loopback, opened when needed."""
        async with self._opening_door:
            if not self.url:
                listener = bind("127.0.0.1", 0)
                self.url = url_of(listener)
                door = Listener(
                    site.application(
                        windmill.routes(self.desk()), authenticate=self.job_of, public=(), hosts=site.hosts(None)
                    ),
                    listener,
                )
                await door.start()
                self._exit.push_async_callback(door.stop)
        return self.url

    def desk(self) -> windmill.Desk:
        """What Windmill's endpoints work on."""
        return windmill.Desk(
            lambda: self.config, self.db, self.clock, self.jobs, self.resolver, self.key, objects=self.objects
        )

    async def job_of(self, token: str) -> Principal | None:
        """The running job that this token was given to. Raises Ended when it is over."""
        session = self.sessions.find(token)
        return None if session is None else Principal(f"job {session.job_id}", JOB_SCOPES, session)

    async def _while_telling(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        while not task.done():
            self._opening()
            await asyncio.wait({task}, timeout=STILL.total_seconds() / 2)
        task.result()

    async def _flush(self) -> None:
        try:
            await self.runner.flush()
        except StoreError as error:
            _log.warning("flush.failed", error=str(error))  # only when the last quiet runs were is lost

    async def follow(self, config: Config) -> None:
        """Make the database's watchers those of ``config``."""
        names = {name: watcher.was for name, watcher in config.watchers.items()}
        at = self.clock()

        async def sync(tx: store_db.Tx) -> None:
            await watcher_store.sync(tx, names, at)
            await watcher_store.rewind(tx, at)

        await self.db.write(sync)

    def operator(self) -> Operator:
        """What the verbs of the command line work on."""
        return Operator(lambda: self.config, self.db, self.clock, runner=self.runner, key=self.key)


def local_flows(config: Config, url: str, token: str) -> Config:
    """The same configuration as the dispatcher sees it: a local flow is a Windmill at our own address."""

    def outbound(flow: Flow) -> Flow:
        if not flow.steps:
            return flow
        settings = {"path": flow.name, "workspace": config.workspace, "kind": "flow"}
        timeout = Flow(name="").timeout  # of the request; the flow's own timeout is that of each step
        return replace(flow, preset="windmill", url=url, token=token, steps=(), settings=settings, timeout=timeout)

    return replace(config, flows={name: outbound(flow) for name, flow in config.flows.items()})


Stamp = tuple[int, int, int] | None


def _stamp(file: Path) -> Stamp:
    """What tells one saved version of a file from the next; None while there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


# --- the service ------------------------------------------------------------------------------------------------------


async def serve(file: Path, *, environ: Mapping[str, str] = os.environ) -> int:
    """The whole service, until SIGTERM or SIGINT. Returns the exit code. Raises ConfigError and StoreError at start."""
    _keep_memory_to_ourselves()
    stamp = _stamp(file)
    loaded = configuration.read(file, environ=environ)
    config = loaded.config
    log.configure(config.log_level, config.log_format)
    notifier = Notifier(environ)
    with store_db.lock(config.database):
        async with Runtime(config, environ=environ, opening=lambda: notifier.extend(STILL)) as runtime:
            await _open_secrets(runtime)
            await tell_warnings(loaded, runtime)
            return await Service(file, stamp, runtime, notifier).run()


def _keep_memory_to_ourselves() -> None:
    """No other process of this user, a script's for one, may read our memory, our environment or our open files.

    PR_SET_DUMPABLE of prctl(2). What we start by exec, every script, is dumpable again.
    """
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)


async def _open_secrets(runtime: Runtime) -> None:
    """Refuse to start with secrets that no key opens: it would show at the first delivery. Raises SecretError."""
    if told := exposed(None if from_elsewhere(runtime.environ) else runtime.config.secret_key_file):
        _log.warning("key.exposed", reason=told)
    async with runtime.db.read() as tx:
        stored = {row.path: row.value for row in await variable_store.list(tx) if row.is_secret}
    require(runtime.key, stored)


async def tell_warnings(loaded: configuration.Loaded, runtime: Runtime) -> None:
    """Log what `watcher check` would warn of; of what must be in the database only what is not there."""
    async with runtime.db.read() as tx:
        there = {("var", row.path) for row in await variable_store.list(tx)}
        there |= {("res", row.path) for row in await resource_store.list(tx)}
    for warning in loaded.warnings:
        named = loaded.stored_elsewhere.get(warning)
        if named is None:
            _log.warning("config.warning", warning=warning)
        elif named not in there:
            noun = "variable" if named[0] == "var" else "resource"
            _log.warning("config.unresolved", warning=f"{warning}, and is not: `watcher {noun} set {named[1]}`")


def spare_the_collector() -> None:
    """Keep the cycle collector from walking again and again over what lives as long as the service.

    Deliveries make and drop objects by the thousand: with Python's defaults a tenth of all processor time went into
    looking at imported modules.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


class Service:
    """One running service: its parts in the order in which they start, and stop in reverse."""

    def __init__(self, file: Path, stamp: Stamp, runtime: Runtime, notifier: Notifier) -> None:
        self.file = file
        self.runtime = runtime
        self.notifier = notifier
        self.started_at = runtime.clock()
        self.up = asyncio.Event()  # everything runs
        self.stop = asyncio.Event()  # asked to stop: no new ticks, claims or jobs
        self.reload_error = ""
        self.needs_restart: tuple[str, ...] = ()  # options of the file that are not in force
        self.damage = ""
        self._stamp = stamp  # of the file when it was read last
        self._reloading = asyncio.Lock()
        self._asides: set[asyncio.Task[None]] = set()
        self._token = secrets.token_urlsafe(32)  # with which our own dispatcher starts our own local flows
        log.register(self._token)
        self._tokens = token_store.Lookup(runtime.db)

        config, db, clock = runtime.config, runtime.db, runtime.clock
        self.listener = bind(config.server.host, config.server.port) if config.server else None
        self.url = url_of(self.listener) if self.listener else ""
        self.outbound = local_flows(config, self.url, self._token)
        self.sender = Sender()
        self.dispatcher = Dispatcher(
            lambda: self.outbound, db, self.sender, runtime.resolver, clock, runtime.stowage.item
        )
        runtime.committed = self.dispatcher.wake
        runtime.url = self.url
        self.jobs = runtime.jobs
        self.jobs.nudge = self._nudge
        self.brake = Brake(db, clock)
        self.backlog = Backlog(db, lambda: runtime.config)
        self.silence = silence.Listener(db, lambda: runtime.config)
        self.engine = Embedded(
            runtime.runner, db, clock, lambda: self.brake.reason, self.brake.full, self.backlog.holds
        )
        self.clock = Clock(clock, self.engine.tick, jumped=self._jumped)
        self.figures = Figures(db, clock, lambda: runtime.config, self.clock.next_run)

    async def run(self) -> int:
        """Start everything, wait, drain. A part that dies takes the service with it, to be started again."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._asked_to_stop)
        loop.add_signal_handler(signal.SIGINT, self._asked_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._asked_to_reload)
        try:
            async with asyncio.TaskGroup() as parts:
                await self._live(parts)
        except ExceptionGroup as group:
            foreseen, unforeseen = group.split(WatcherError)
            if unforeseen is None and foreseen is not None:
                raise foreseen.exceptions[0] from group
            _log.critical("service.died", exc_info=unforeseen)
            return 1
        finally:
            await self.sender.close()
            control.path(self.runtime.config.data).unlink(missing_ok=True)
        _log.info("service.stopped")
        return 0

    async def _live(self, parts: asyncio.TaskGroup) -> None:
        commands = control.listen(control.path(self.runtime.config.data))
        listeners = [Listener(control.application(self._operator()), commands)]
        if self.listener:
            listeners.append(Listener(self._application(), self.listener))
        for listener in listeners:
            await listener.start()
        work = [
            parts.create_task(self.dispatcher.serve(self.stop), name="dispatcher"),
            parts.create_task(self.jobs.serve(self.stop), name="jobs"),
        ]
        await self._start_clock()
        chores = [parts.create_task(chore, name=name) for name, chore in self._chores().items()]
        self._ready()
        await self.stop.wait()
        self.notifier.stopping()
        self.clock.stop()
        for chore in chores:
            chore.cancel()
        await self._drain(work)
        for listener in listeners:
            await listener.stop()

    def _chores(self) -> dict[str, Coroutine[Any, Any, None]]:
        return {
            "brake": self.brake.watch(),
            "backlog": self.backlog.watch(),
            "silence": self.silence.watch(),
            "flush": self._each(FLUSH_EVERY, self.runtime._flush),
            "prune": self._each(PRUNE_EVERY, self._prune),
            "check": self._each(CHECK_EVERY, self._check_database),
            "watchdog": self._feed_watchdog(),
            "reload": self._reload_on_save(),
        }

    async def _start_clock(self) -> None:
        async with self.runtime.db.read() as tx:
            known = {status.name: status.tick_at for status in await watcher_store.everyone(tx)}
        self.clock.start()
        self.clock.set(self.runtime.config.watchers.values(), known)

    def _ready(self) -> None:
        spare_the_collector()
        config = self.runtime.config
        metrics.reload_ok.set(1)
        _log.info(
            "service.ready",
            url=self.url or None,
            watchers=len(config.watchers),
            flows=len(config.flows),
            database=self.runtime.db.dialect,
        )
        self.up.set()
        self.notifier.ready(f"{len(config.watchers)} watchers, {len(config.flows)} flows")

    async def _drain(self, work: Sequence[asyncio.Task[None]]) -> None:
        """End what is in flight: runs, deliveries and jobs; what cannot end in time is given back."""
        _log.info("service.draining", runs=len(self.engine.running()))
        dispatcher, jobs = work
        await dispatcher  # it claims no more, and requests are in flight
        await asyncio.gather(
            self.engine.drain(GRACE), self.dispatcher.drain(timedelta(seconds=GRACE)), self.jobs.drain(GRACE)
        )
        await jobs

    async def _nudge(self, name: str) -> Json:
        """Run a watcher because a job asks for it, and say how it went."""
        record = await self.engine.nudge(name)
        if record.outcome in ("failed", "conflict"):
            raise TriggerError(record.error, kind=record.error_kind or "raised", detail=record.detail)
        return {"watcher": name, "outcome": record.outcome, "counts": dict(record.counts), "note": record.error}

    # --- signals ---

    def _asked_to_stop(self) -> None:
        if self.stop.is_set():
            _log.warning("service.stopped_at_once")
            os._exit(1)  # asked twice: now. What is not finished is found again at the next start
        self.stop.set()

    def _asked_to_reload(self) -> None:
        self._aside(self._try_reload(), "reload on SIGHUP")

    def _jumped(self, seconds: float) -> None:
        """The wall clock was moved. What is due is judged by it, so look again."""
        self.dispatcher.wake(list(self.outbound.flows))
        if seconds < 0:
            self._aside(self._rewind(), "rewind")

    async def _rewind(self) -> None:
        at = self.runtime.clock()
        await self.runtime.db.write(lambda tx: watcher_store.rewind(tx, at))

    def _aside(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Do something beside the rest; its failure is logged and nothing more."""

        def ended(task: asyncio.Task[None]) -> None:
            self._asides.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.error("aside.failed", work=name, error=str(error))

        task = asyncio.get_running_loop().create_task(work, name=name)
        self._asides.add(task)
        task.add_done_callback(ended)

    # --- configuration ---

    async def reload(self) -> Sequence[str]:
        """Validate the file whole, then swap; a bad one leaves the old in force. Raises ConfigError, StoreError.

        Returns the options that take a restart.
        """
        await self.up.wait()
        async with self._reloading:
            self.notifier.reloading()
            self._stamp = _stamp(self.file)
            try:
                loaded = await asyncio.to_thread(configuration.read, self.file, environ=self.runtime.environ)
                changed = loaded.config.digest != self.runtime.config.digest
                await self._swap(loaded.config)
                if changed:
                    await tell_warnings(loaded, self.runtime)
            except WatcherError as error:
                if str(error) != self.reload_error:
                    _log.error("config.rejected", error=str(error))
                self.reload_error = str(error)
                metrics.reload_ok.set(0)
                raise
            finally:
                self.notifier.ready()
        return self.needs_restart

    async def _swap(self, config: Config) -> None:
        old = self.runtime.config
        kept = {name: getattr(old, name) for name in ("database", "data", "server", "workspace", "scripts")}
        needs = tuple(name for name, value in kept.items() if value != getattr(config, name))
        for name in needs if needs != self.needs_restart else ():
            _log.warning("config.needs_restart", option=name)
        self.needs_restart = needs
        config = replace(config, **kept)
        if config.server is None and any(flow.steps for flow in config.flows.values()):
            raise WatcherError("a local flow needs [server], and a new [server] takes a restart of the service")
        failpoint("mid_reload")
        await self.runtime.follow(config)
        self.runtime.config = config
        self.outbound = local_flows(config, self.url, self._token)
        self.runtime.fetcher.configure(config.http)
        self.clock.set(config.watchers.values(), dict.fromkeys(config.watchers.keys() - old.watchers.keys()))
        for name in old.watchers.keys() - config.watchers.keys():
            metrics.forget_watcher(name)
        log.configure(config.log_level, config.log_format)
        self.dispatcher.wake(list(config.flows))
        self.reload_error = ""
        metrics.reload_ok.set(1)
        if config.digest != old.digest:
            _log.info("config.in_force", watchers=len(config.watchers), flows=len(config.flows))

    async def _try_reload(self) -> None:
        try:
            await self.reload()
        except WatcherError:
            pass  # logged, and shown in /readyz and /metrics

    async def _reload_on_save(self) -> None:
        import watchfiles

        # The directory is watched and not the file: editors and mounted secrets replace it. And it is looked at every
        # few seconds all the same, for file systems that tell nothing.
        async for _ in watchfiles.awatch(
            self.file.absolute().parent,
            debounce=200,
            rust_timeout=LOOK_AT_FILE_EVERY,
            yield_on_timeout=True,
            recursive=False,
            stop_event=self.stop,
        ):
            if _stamp(self.file) != self._stamp:
                await self._try_reload()

    # --- chores ---

    async def _each(self, seconds: float, chore: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await chore()
            except StoreError as error:
                _log.error("chore.failed", error=str(error))

    async def _prune(self) -> None:
        """Drop what is old, a little at a time, so that a commit never waits long behind it."""
        db, at = self.runtime.db, self.runtime.clock()
        dead = self.runtime.config.delivery.keep_dead
        for watcher in list(self.runtime.config.watchers.values()):

            async def prune(tx: store_db.Tx, name: str = watcher.name, keep: timedelta = watcher.keep_runs) -> bool:
                return (await retention.prune(tx, name, keep_runs=keep, now=at, keep_dead=dead)).total > 0

            while await db.write(prune):
                pass
            if watcher.forget_after:
                while await retention.forget(db, watcher.name, forget_after=watcher.forget_after):
                    pass
        while (await db.write(lambda tx: retention.prune_jobs(tx, keep=KEEP_JOBS, now=at))).total:
            pass
        try:
            await self.runtime.stowage.collect(ITEMS, dead)
            await self.runtime.stowage.collect(STATES, UNWANTED, lambda: stored_states.stowed(db))
        except ObjectsError as error:
            if error.kind != "no_storage":
                _log.warning("collect.failed", error=str(error))
        await self.jobs.sweep()
        await windmill.forget_uploads(self.runtime.config.data, at)

    async def _check_database(self) -> None:
        try:
            await migrate.quick_check(self.runtime.db)
        except Damaged as error:
            self.damage = str(error)
            _log.critical("database.damaged", error=str(error))

    async def _feed_watchdog(self) -> None:
        """Only while the loop turns and the database answers: a service that does neither had better be restarted."""
        every = self.notifier.watchdog_every
        while every is not None:
            try:
                async with asyncio.timeout(every.total_seconds()):
                    await self._ask_database()
                self.notifier.watchdog()
            except (StoreError, TimeoutError) as error:
                _log.error("watchdog.not_fed", error=str(error))
            await asyncio.sleep(every.total_seconds())

    async def _ask_database(self) -> None:
        async with self.runtime.db.read() as tx:
            await meta.epoch(tx)

    # --- answering ---

    def _application(self) -> Starlette:
        config = self.runtime.config
        desk = replace(self.runtime.desk(), draining=self.stop.is_set)
        return site.application(
            [*api.routes(self.readiness, self.figures.text), *windmill.routes(desk)],
            authenticate=self.authenticate,
            hosts=site.hosts(config.server or Server()),
        )

    def _operator(self) -> Operator:
        return replace(
            self.runtime.operator(),
            wake=self.dispatcher.wake,
            reload=self.reload,
            next_run=self.clock.next_run,
            silences=lambda: self.silence.silent,
            outbound=lambda: self.outbound,
            started_at=self.started_at,
        )

    async def authenticate(self, token: str) -> Principal | None:
        """Whose bearer token this is: our own dispatcher's, a running job's, or one that was created for the API."""
        if same(token, self._token):
            return Principal("watcher", ("*",))
        if (job := await self.runtime.job_of(token)) is not None:
            return job
        digest = sha256(token.encode("utf-8", "surrogatepass")).digest()
        row = await self._tokens.get(digest, self.runtime.clock())
        if row is None:
            return None
        return Principal(row.label, row.scopes or ("*",))  # a token made without scopes may do everything

    async def readiness(self) -> tuple[bool, Json]:
        """Whether requests and ticks are served, and in detail what keeps them from it."""
        database = self.damage or "ok"
        try:
            async with asyncio.timeout(5):
                await self._ask_database()
        except (StoreError, TimeoutError) as error:
            database = str(error) or "no answer within 5 s"
        running = self.up.is_set() and not self.stop.is_set()
        fine = running and database == "ok" and not self.brake.reason
        return fine, {
            "ready": fine,
            "database": database,
            "runs": self.brake.reason or "ok",
            "config": self.reload_error or "ok",
            "stopping": self.stop.is_set(),
            "watchers": len(self.runtime.config.watchers),
            "started_at": self.started_at.isoformat(),
        }
