"""`watcher object`: look into the storages of the workspace, and move files in and out of them."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, TypeVar

import typer

from watcher.cli import options, show
from watcher.cli.connect import load, storages
from watcher.cli.options import AsJson, ConfigFile
from watcher.values import Json

if TYPE_CHECKING:
    from watcher.objects import Meta, Storage

T = TypeVar("T")

app = typer.Typer(**options.STYLE)
group = typer.Typer(no_args_is_help=True, help="Files in object storage.")
app.add_typer(group, name="object")

Of = Annotated[str | None, typer.Option("--storage", "-s", metavar="NAME", help="A secondary storage.")]
Key = Annotated[str, typer.Argument(metavar="KEY", help="As in s3://STORAGE/KEY.")]
_CHUNK = 1024 * 1024


def _with(config: Path | None, name: str | None, work: Callable[[Storage], Awaitable[T]]) -> T:
    return storages(load(config), name, work)


@group.command("ls")
def ls(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Only keys that begin like this.")] = "",
    storage: Of = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1_000_000, help="How many, by key.")] = 1000,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """List objects, those in folders too."""

    async def work(found: Storage) -> list[Json]:
        rows: list[Json] = []
        after = None
        while len(rows) < limit and (page := await found.list(prefix, after=after, limit=min(1000, limit - len(rows)))):
            rows += map(_row, page)
            after = page[-1].key
        return rows

    columns: show.Columns = {
        "modified": lambda row: show.when(row["modified"]),
        "size": lambda row: show.size(row["size"]),
        "key": "key",
    }
    rows = _with(config, storage, work)
    show.give(rows, as_json, lambda rows: show.table(rows, columns, "no objects"))


def _row(meta: Meta) -> Json:
    return {"key": meta.key, "size": meta.size, "modified": meta.modified.isoformat(), "etag": meta.etag}


@group.command("get")
def get(
    key: Key,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="Where to (default: stdout).")] = None,
    storage: Of = None,
    config: ConfigFile = None,
) -> None:
    """Read an object."""

    async def work(found: Storage) -> None:
        reading = await found.get(key)
        to: IO[bytes] = sys.stdout.buffer if file is None else file.open("wb")
        try:
            async for chunk in reading:
                to.write(chunk)
            to.flush()
        finally:
            if file is not None:
                to.close()

    _with(config, storage, work)


@group.command("put")
def put(
    key: Key,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="What (default: stdin).")] = None,
    storage: Of = None,
    content_type: Annotated[str | None, typer.Option("--type", help="Such as text/csv.")] = None,
    new: Annotated[bool, typer.Option("--new", help="Only if there is none yet.")] = False,
    config: ConfigFile = None,
) -> None:
    """Store an object, whole or not at all."""

    async def work(found: Storage) -> Meta:
        source: IO[bytes] = sys.stdin.buffer if file is None else file.open("rb")
        try:
            return await found.put(key, _chunks(source), content_type=content_type, if_absent=new)
        finally:
            if file is not None:
                source.close()

    meta = _with(config, storage, work)
    show.words(f"{meta.key}: {show.size(meta.size)}")


async def _chunks(source: IO[bytes]) -> AsyncIterator[bytes]:
    while chunk := source.read(_CHUNK):
        yield chunk


@group.command("rm")
def rm(key: Key, storage: Of = None, config: ConfigFile = None) -> None:
    """Delete an object."""

    async def work(found: Storage) -> None:
        await found.head(key)  # which says that there is none
        await found.delete(key)

    _with(config, storage, work)
    show.words(f"{key} is deleted")
