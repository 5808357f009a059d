"""`watcher doctor`: look at everything watcher leans on, and say how to put right what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from watcher import control
from watcher.cli import connect, show
from watcher.errors import ConfigError, SecretError, WatcherError
from watcher.values import Config, Flow, Json, StorageSettings

if TYPE_CHECKING:
    from watcher.objects import Objects
    from watcher.secrets import Key
    from watcher.store.db import Database

Level = Literal["OK", "WARN", "FAIL"]

_LITTLE = 256 * 1024 * 1024  # bytes of free disk, under which SQLite soon cannot commit
_CONNECT_SECONDS = 3.0
_STORAGE_SECONDS = 40.0  # a server that is away is asked several times, for half a minute
_FIXED_SQLITE = ((3, 51, 3), (3, 50, 7), (3, 44, 6))
"""The first good version of each line in which the WAL-reset bug was fixed (https://sqlite.org/wal.html)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at, what was found, and what to do when it is not well."""

    level: Level
    what: str
    found: str
    fix: str = ""
    exit_code: int = 0

    @property
    def colour(self) -> str:
        return {"OK": "green", "WARN": "yellow", "FAIL": "red"}[self.level]

    def to_json(self) -> Json:
        return {"level": self.level, "what": self.what, "found": self.found, "fix": self.fix}


def ok(what: str, found: str) -> Finding:
    return Finding("OK", what, found)


def warn(what: str, found: str, fix: str) -> Finding:
    return Finding("WARN", what, found, fix)


def fail(what: str, found: str, fix: str, exit_code: int = 1) -> Finding:
    return Finding("FAIL", what, found, fix, exit_code)


def examine(given: Path | None) -> list[Finding]:
    """All findings, in the order in which to put things right."""
    findings = [_clock()]
    try:
        config = connect.load(given)
    except ConfigError as error:
        first = str(error).splitlines()[0]
        findings.append(fail("configuration", first, "`watcher check` shows every mistake with its place", 78))
        return findings
    counts = f"{show.count(len(config.watchers), 'watcher')}, {show.count(len(config.flows), 'flow')}"
    findings.append(ok("configuration", f"{config.file}: {counts}"))
    if connect.sqlite_file(config.database):
        findings.append(_sqlite(sqlite3.sqlite_version_info))
    findings += [_service(config), *_key_and_database(config), *_disk(config), *_tools()]
    return findings + _triggers(config) + asyncio.run(_outside(config))


# --- this machine -----------------------------------------------------------------------------------------------------


def _sqlite(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    fixed = version >= _FIXED_SQLITE[0] or any(version[:2] == good[:2] and version >= good for good in _FIXED_SQLITE)
    if version < (3, 35):
        return fail("SQLite", f"{text} is too old", "use a Python with SQLite 3.35 or newer")
    if not fixed:
        return warn(
            "SQLite",
            f"{text} has the WAL-reset bug, which harms databases that several connections write",
            "watcher writes through one connection, so it is safe; let no other program write to its database",
        )
    return ok("SQLite", text)


def _clock() -> Finding:
    """Whether the kernel says that the clock is kept in step: the mark that NTP and chrony set (adjtimex)."""
    if Path("/run/systemd/timesync/synchronized").exists():
        return ok("clock", "synchronised")
    try:
        done = subprocess.run(
            ["timedatectl", "show", "--property=NTPSynchronized", "--value"],
            capture_output=True, text=True, timeout=3, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is not None and done.stdout.strip() == "yes":
        return ok("clock", "synchronised")
    return warn(
        "clock",
        "nothing says that it is synchronised",
        "turn on systemd-timesyncd or chrony: signatures and cron times depend on it",
    )


def _tools() -> Iterator[Finding]:
    from watcher.scripts.engines import find

    for name, use in (("uv", "scripts with dependencies of their own"), ("deno", "scripts in TypeScript")):
        path = find(name)
        yield ok(name, path) if path else ok(name, f"not found, needed only for {use}")


# --- this installation ------------------------------------------------------------------------------------------------


def _service(config: Config) -> Finding:
    at = control.path(config.data)
    if not control.alive(at):
        return ok("service", "not running here")
    try:
        found = control.call(at, "status", {})["service"]
    except WatcherError as error:
        return fail("service", str(error), "look into its log: `journalctl -u watcher`", 69)
    return ok("service", f"running as process {found['pid']} since {found['started_at']}")


def _key_and_database(config: Config) -> list[Finding]:
    from watcher import secrets

    try:
        key = secrets.load_key(os.environ, config.secret_key_file)
    except WatcherError as error:
        return [fail("key", str(error), "without the key of this database its secrets cannot be read", 78)]
    if key is None:
        found = ok("key", "none: secret variables cannot be stored (`watcher doctor --new-key` makes one)")
    else:
        found = ok("key", f"{key.current}, and {len(key.keys) - 1} older" if len(key.keys) > 1 else key.current)
    if told := secrets.exposed(None if secrets.from_elsewhere(os.environ) else config.secret_key_file):
        file, _, fix = told.partition(": ")
        found = warn("key", file, fix)
    return [found, *asyncio.run(_database(config, key))]


async def _database(config: Config, key: Key | None) -> list[Finding]:
    from watcher.store import db as store_db
    from watcher.store import migrate

    where = connect.shown(config.database)
    file = connect.sqlite_file(config.database)
    if file is not None and not file.exists():
        return [ok("database", f"{where}: not there yet, made at the first start")]
    try:
        db = await store_db.Database.open(config.database, read_only=True)
        try:
            state = await migrate.check(db)
            findings = [_schema(where, state)]
            if state == "current":
                findings += await _contents(db, key)
            return findings
        finally:
            await db.close()
    except WatcherError as error:
        return [fail("database", str(error), "docs/operations.md, When something is wrong", error.exit_code)]


def _schema(where: str, state: str) -> Finding:
    if state == "older":
        return warn("database", f"{where}: of an older version", "`watcher serve` upgrades it, with a backup first")
    if state == "empty":
        return ok("database", f"{where}: empty, filled at the first start")
    return ok("database", f"{where}: of this version")


async def _contents(db: Database, key: Key | None) -> list[Finding]:
    from watcher.secrets import require
    from watcher.store import deliveries, variables, watchers

    async with db.read() as tx:
        stored = {row.path: row.value for row in await variables.list(tx) if row.is_secret}
        troubled = [row.name for row in await watchers.everyone(tx) if row.quarantined_at]
        dead = sum(row.dead for row in (await deliveries.pending(tx)).values())
    findings = []
    fix = "give the service its key again: docs/operations.md, Secrets"
    if stored and key is None:
        findings.append(fail("secrets", f"{len(stored)} are stored and there is no key to read them", fix, 78))
    else:
        try:
            require(key, stored)
        except SecretError as error:
            findings.append(fail("secrets", str(error), f"{fix}; or `watcher variable set PATH --secret`", 78))
    if troubled:
        fix = "`watcher status` says why; then `watcher approve` or `watcher resume`"
        findings.append(warn("watchers", f"in quarantine: {', '.join(troubled)}", fix))
    if dead:
        findings.append(
            warn("deliveries", f"{dead} are dead", "`watcher deliveries --status dead`, then `watcher retry`")
        )
    return findings


def _disk(config: Config) -> Iterator[Finding]:
    file = connect.sqlite_file(config.database)
    places = {config.data} | ({file.parent} if file else set())
    for place in sorted(places):
        there = next(parent for parent in (place, *place.parents) if parent.exists())
        if not os.access(there, os.W_OK):
            yield fail(
                "disk", f"{place}: this user cannot write there", "correct its owner, or run as the service's user"
            )
            continue
        usage = shutil.disk_usage(there)
        found = f"{place}: {usage.free // 1_000_000} MB free"
        if usage.free < max(_LITTLE, usage.total // 20):
            yield warn("disk", found, "make room: when the disk is full, runs and deliveries pause")
        else:
            yield ok("disk", found)


# --- triggers and flows -----------------------------------------------------------------------------------------------


def _triggers(config: Config) -> list[Finding]:
    from watcher.cli import checking

    try:
        checking.deeper(config)
    except ConfigError as error:
        return [
            fail("trigger", f"{m.where}: {m.message}", m.hint or "`watcher check` shows the place", 78)
            for m in error.mistakes
        ]
    return [ok("triggers", f"{len(config.watchers)} can be called with their arguments")]


async def _outside(config: Config) -> list[Finding]:
    return [*await _flows(config), *await _storages(config)]


async def _storages(config: Config) -> list[Finding]:
    """Whether each storage lists, and a folder takes what is written into it."""
    async with connect.opened(config) as objects:
        return list(await asyncio.gather(*(_storage(objects, settings) for settings in config.storages.values())))


async def _storage(objects: Objects, settings: StorageSettings) -> Finding:
    table = "[storage]" if settings.name == "_default_" else f"[storage.secondary.{settings.name}]"
    what = "storage" if settings.name == "_default_" else f"storage {settings.name}"
    try:
        async with asyncio.timeout(_STORAGE_SECONDS):
            storage = await objects.storage(settings.name)
            await storage.list(limit=1)
    except TimeoutError:
        return fail(what, f"no answer within {_STORAGE_SECONDS:g} s", f"correct {table} or its resource, or a firewall")
    except WatcherError as error:
        return fail(what, str(error), f"correct {table} or its resource")
    if settings.path is None:
        return ok(what, f"{settings.kind} {settings.resource} answers")
    there = next(parent for parent in (settings.path, *settings.path.parents) if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return fail(what, f"{there}: this user cannot write there", "correct its owner, or run as the service's user")
    return ok(what, f"folder {settings.path}")


async def _flows(config: Config) -> list[Finding]:
    remote = [flow for flow in config.flows.values() if flow.enabled and not flow.steps]
    return list(await asyncio.gather(*(_flow(flow) for flow in remote)))


async def _flow(flow: Flow) -> Finding:
    """Whether a TCP connection can be made; nothing is sent, since many flows start at any request."""
    what = f"flow {flow.name}"
    parts = urlsplit(flow.url)
    if parts.hostname is None:
        return warn(what, "its address is only known when it is sent to", "nothing to do if it is a reference")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    where = f"{parts.hostname}:{port}"
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(parts.hostname, port), _CONNECT_SECONDS)
    except socket.gaierror:
        return warn(what, f"{parts.hostname} has no address", "correct the flow's url, or this machine's DNS")
    except TimeoutError:
        return warn(
            what, f"{where} did not answer within {_CONNECT_SECONDS:g} s", "a firewall? Deliveries wait meanwhile"
        )
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else "connection failed"
        return warn(what, f"{where}: {reason}", "is it running? Deliveries wait and are retried meanwhile")
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return ok(what, f"{where} is reachable")
