"""From a command to an operation: through the running service, or on the database itself when there is none."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from watcher import control
from watcher.errors import ConfigError, Mistake, StoreError
from watcher.values import Config, Json

if TYPE_CHECKING:
    from watcher.objects import Objects, Storage
    from watcher.operations import Operator
    from watcher.store.db import Database

T = TypeVar("T")

_DATA = re.compile(r"""^data[ \t]*=[ \t]*(["'])([^"'\\\n]+)\1""", re.MULTILINE)
"""The top-level option `data` in a TOML file that may be damaged elsewhere."""

_RUNNING = {"plan", "run", "apply", "test", "approve"}
"""Verbs that call scripts."""


def file(given: Path | None) -> Path:
    """The configuration file: the flag's, else $WATCHER_CONFIG's, else that of the usual places."""
    from watcher import config

    found = given or config.find(os.environ)
    if found is None:
        raise ConfigError(
            [
                Mistake(
                    "configuration", "there is none here", hint="name one with --config, or write one: `watcher init`"
                )
            ]
        )
    return found


def load(given: Path | None) -> Config:
    """The configuration, whole and valid. Raises ConfigError with every mistake."""
    from watcher import config

    return config.load(file(given), environ=os.environ)


def call(given: Path | None, verb: str, **arguments: Any) -> Json:
    """One operation, wherever the database can be reached."""
    if (at := _running(given)) is not None:
        return control.call(at, verb, arguments)
    config = load(given)
    at = control.path(config.data)
    if control.alive(at):
        return control.call(at, verb, arguments)
    return wait(_directly(config, verb, arguments))


def _running(given: Path | None) -> Path | None:
    """The control socket of the running service, found without a valid configuration.

    A mistake in the file must not keep anybody from looking at the service, which goes on with the old one. It is also
    quicker. Where `data` comes from a secrets directory this finds nothing, and the whole configuration is loaded.
    """
    named = given or (Path(os.environ["WATCHER_CONFIG"]) if os.environ.get("WATCHER_CONFIG") else Path("watcher.toml"))
    try:
        written = _DATA.search(named.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    state = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    data = os.environ.get("WATCHER_DATA") or (written[2] if written else state or "watcher-data")
    at = control.path(named.absolute().parent / Path(data).expanduser())
    return at if control.alive(at) else None


def wait(work: Coroutine[Any, Any, T]) -> T:
    """Do it in a loop of its own. (asyncio is imported late: most of a `--help` would be its import.)"""
    import asyncio

    return asyncio.run(work)


async def _directly(config: Config, verb: str, arguments: dict[str, Any]) -> Json:
    from watcher import operations
    from watcher.store import migrate, watchers

    async def act(db: Database) -> Json:
        await migrate.upgrade(db, backup_to=config.data / "backups", now=now())
        names = {watcher.name: watcher.was for watcher in config.watchers.values()}
        await db.write(lambda tx: watchers.sync(tx, names, now()))
        return await operations.VERBS[verb](_operator(config, db), **arguments)

    if verb in operations.READS:
        read = await _read_only(config)
        if read is not None:
            try:
                return await operations.VERBS[verb](_operator(config, read), **arguments)
            finally:
                await read.close()
    if verb not in _RUNNING:
        return await _alone(config, act)
    from watcher.app import Runtime
    from watcher.store import db as store_db

    with store_db.lock(config.database):
        try:
            async with Runtime(config) as runtime:
                return await operations.VERBS[verb](runtime.operator(), **arguments)
        finally:
            hand_over(config)


async def _read_only(config: Config) -> Database | None:
    """The database as it is, when it is there and of this version; readers need no lock."""
    from watcher.store import db as store_db
    from watcher.store import migrate

    path = sqlite_file(config.database)
    if path is not None and not path.exists():
        return None
    db = await store_db.Database.open(config.database, read_only=True)
    if await migrate.check(db) == "current":
        return db
    await db.close()
    return None


def _operator(config: Config, db: Database) -> Operator:
    from watcher.objects import Objects
    from watcher.objects.stow import Stowage
    from watcher.operations import Operator
    from watcher.resolve import Resolver
    from watcher.secrets import load_key

    key = load_key(os.environ, config.secret_key_file)
    objects = Objects(lambda: config, Resolver(lambda: config, db, key).resource)
    db.attic = Stowage(objects, now, lambda: config.delivery.keep_dead)
    return Operator(config=lambda: config, db=db, clock=now, key=key)


def reading(config: Config, work: Callable[[Database], Awaitable[T]]) -> T:
    """Do something with the database opened read-only, whether a service runs or not."""

    async def open_and_work() -> T:
        db = await _read_only(config)
        if db is None:
            raise StoreError(
                f"{shown(config.database)} is not there, or of an older version: `watcher serve` creates or upgrades it"
            )
        try:
            return await work(db)
        finally:
            await db.close()

    return wait(open_and_work())


def storages(config: Config, name: str | None, work: Callable[[Storage], Awaitable[T]]) -> T:
    """Do something with one storage of the workspace, whether a service runs or not. Raises ObjectsError."""

    async def open_and_work() -> T:
        async with opened(config) as objects:
            return await work(await objects.storage(name))

    return wait(open_and_work())


@asynccontextmanager
async def opened(config: Config) -> AsyncIterator[Objects]:
    """The storages. Without a database yet, a resource of theirs must stand in the configuration file."""
    from watcher.errors import ResolveError
    from watcher.objects import Objects
    from watcher.resolve import Resolver
    from watcher.secrets import load_key

    db = await _read_only(config)
    key = load_key(os.environ, config.secret_key_file)

    class NoDatabase:
        def read(self) -> None:
            raise ResolveError("it is not in the configuration file, and there is no database yet")

    resolver = Resolver(lambda: config, db or cast("Database", NoDatabase()), key)
    try:
        yield Objects(lambda: config, resolver.resource)
    finally:
        if db is not None:
            await db.close()


def alone(config: Config, work: Callable[[Database], Awaitable[T]]) -> T:
    """Do something with the database, as it is or made empty, while nobody else may use it."""
    return wait(_alone(config, work))


async def _alone(config: Config, work: Callable[[Database], Awaitable[T]]) -> T:
    from watcher.store import db as store_db

    with store_db.lock(config.database):
        db = await store_db.Database.open(config.database)
        try:
            return await work(db)
        finally:
            await db.close()
            hand_over(config)


def refuse_while_running(config: Config) -> None:
    """Raises StoreError when a service answers on the control socket."""
    if control.alive(control.path(config.data)):
        raise StoreError("the service is running: stop it first (`systemctl stop watcher`), then try again")


def hand_over(config: Config) -> None:
    """Give what root made in the service's directories to the service's own user, who could not write it otherwise."""
    if os.geteuid() != 0:
        return
    path = sqlite_file(config.database)
    home = config.data if path is None else path.parent
    if not home.exists():
        return
    made = [] if path is None else list(home.glob(f"{path.name}*"))
    if config.data.is_relative_to(home):
        made += [config.data / "backups", *(config.data / "backups").glob("*")]
        made += [config.data] if config.data != home else []
    owner = home.stat()
    for each in made:
        if each.exists():
            os.chown(each, owner.st_uid, owner.st_gid)


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite database, None for PostgreSQL."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite") else None


def shown(url: str) -> str:
    """A database's address without its password."""
    from watcher.log import mask

    return mask(url)


def now() -> datetime:
    """This instant, UTC."""
    return datetime.now(UTC)
