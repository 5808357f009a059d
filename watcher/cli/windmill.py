"""`watcher import windmill`: move from Windmill, with what its scripts remember."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from watcher.cli import connect, show
from watcher.errors import WatcherError
from watcher.values import Json, Memory

if TYPE_CHECKING:
    from watcher.cli.moving import Moved
    from watcher.store.db import Database


def move(folder: Path, to: Path, as_json: bool) -> None:
    """Read what `wmill sync pull` wrote, write a configuration with its files, and put the states into its database."""
    from watcher.cli import moving

    moved = moving.read(folder)
    if not moved.watchers:
        for where, why in moved.left:
            show.words(f"{where}: {why}")
        raise WatcherError(f"{folder} holds no schedule that could become a watcher")
    file = to / "watcher.toml"
    if file.exists():
        raise WatcherError(f"{file} is already there: give another directory with --to")
    _write(moved, to, file, moving.toml(moved))
    _remember(moved, file)
    done: Json = {
        "file": str(file),
        "watchers": sorted(moved.watchers),
        "flows": sorted(moved.flows),
        "states": len(moved.states) + len(moved.other_states),
        "left": [{"file": where, "why": why} for where, why in moved.left],
    }
    show.give(done, as_json, _told)


def _write(moved: Moved, to: Path, file: Path, text: str) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for where, content in moved.files.items():
        path = to / where
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != content:
            raise WatcherError(f"{path} is already there, and is another file: give another directory with --to")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    private = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # resources may hold what nobody else may see
    with open(private, "w", encoding="utf-8") as out:
        out.write(text)


def _remember(moved: Moved, file: Path) -> None:
    from watcher.store import migrate, resources, states, watchers

    config = connect.load(file)

    async def work(db: Database) -> None:
        await migrate.upgrade(db, backup_to=config.data / "backups", now=connect.now())
        names = {watcher.name: watcher.was for watcher in config.watchers.values()}
        await db.write(lambda tx: watchers.sync(tx, names, connect.now()))
        for name, value in moved.states.items():
            memory = Memory(version=1, state=value)
            await db.write(
                lambda tx, name=name, memory=memory: states.put(  # type: ignore[misc]  # defaults bind the loop's values
                    tx, name, memory, 0, connect.now(), note="from Windmill"
                )
            )
        for path, value in moved.other_states.items():
            await db.write(
                lambda tx, path=path, value=value: resources.put(  # type: ignore[misc]
                    tx, path, resources.STATE, value, connect.now(), description="from Windmill"
                )
            )
        for name, (schema, about) in moved.types.items():
            await db.write(
                lambda tx, name=name, schema=schema, about=about: resources.put_type(  # type: ignore[misc]
                    tx, name, schema, connect.now(), description=about
                )
            )

    connect.alone(config, work)


def _told(done: Json) -> None:
    for left in done["left"]:
        show.words(f"{left['file']}: {left['why']}")
    show.words(
        f"{done['file']}: {len(done['watchers'])} watchers, {len(done['flows'])} local flows, {done['states']} states; "
        f"look at it, then `watcher check -c {done['file']}`"
    )
