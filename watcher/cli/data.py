"""`watcher backup`, `restore`, `export` and `import`: the whole database, out and in again."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from watcher.cli import connect, options, show
from watcher.cli.options import AsJson, ConfigFile, Yes
from watcher.errors import WatcherError

if TYPE_CHECKING:
    from watcher.store.db import Database

_REPORT_EACH = 10_000  # lines
_BACKUP = "watcher-????????T??????Z"  # how `backup` names its files, in the order of time


app = typer.Typer(**options.STYLE)


@app.command()
def backup(
    to: Annotated[Path | None, typer.Argument(metavar="FILE", help="Default: in the backup directory.")] = None,
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, help="Then remove all but so many of those that this command named.")
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Write a consistent copy of the database; the service may go on meanwhile."""
    from watcher.store import backup as store_backup

    if keep is not None and to is not None:
        raise typer.BadParameter("it counts those in the backup directory: leave out FILE", param_hint="--keep")
    loaded = connect.load(config)
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    suffix = ".db" if connect.sqlite_file(loaded.database) else ".jsonl"
    file = to or loaded.data / "backups" / f"watcher-{stamp}{suffix}"
    if file.exists():
        raise WatcherError(f"{file} is already there: name another file, or move that one away")
    show.words(f"backing up {connect.shown(loaded.database)} …")
    connect.reading(loaded, lambda db: store_backup.backup(db, file))
    connect.hand_over(loaded)
    for old in sorted(file.parent.glob(f"{_BACKUP}{suffix}"))[:-keep] if keep else ():
        old.unlink()
        show.words(f"removed {old.name}")
    done = {"file": str(file), "bytes": file.stat().st_size}
    show.give(done, as_json, lambda found: print(found["file"]))


@app.command()
def restore(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="What `backup` wrote.")],
    yes: Yes = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Put a backup in place of the database, while no service runs; the old one is kept aside."""
    from watcher.store import backup as store_backup

    loaded = connect.load(config)
    if not source.exists():
        raise WatcherError(f"{source} is not there")
    connect.refuse_while_running(loaded)
    if not yes:
        _confirm(f"Put {source} in place of {connect.shown(loaded.database)}?")
    aside = connect.wait(store_backup.restore(loaded.database, source, connect.now()))
    connect.hand_over(loaded)
    done = {"database": connect.shown(loaded.database), "aside": str(aside) if aside else None}
    show.words("restored; what is found from now on gets new ids, so that receivers do not take it for old")
    show.give(done, as_json, lambda d: show.words(f"the old database is kept as {d['aside']}") if d["aside"] else None)


@app.command()
def export(
    to: Annotated[Path | None, typer.Argument(metavar="FILE", help="Default: standard output.")] = None,
    config: ConfigFile = None,
) -> None:
    """Write everything as JSON lines, for another database or another program. Secrets stay encrypted."""
    from watcher.store import backup as store_backup

    loaded = connect.load(config)

    async def work(db: Database) -> int:
        count = 0
        with _out(to) as stream:
            async for line in store_backup.export(db):
                stream.write(line.rstrip("\n") + "\n")
                count += 1
                if count % _REPORT_EACH == 0:
                    show.words(f"{count} lines")
        return count

    show.words(f"{connect.reading(loaded, work)} lines written")


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="What `export` wrote; - for standard input; or the word windmill.")
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="After windmill: what `wmill sync pull` wrote.")
    ] = None,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where to put what was Windmill's.")] = Path("."),
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Read what `export` wrote into an empty database, with the service stopped; or move over from Windmill."""
    from watcher.store import backup as store_backup

    if folder is not None:
        if str(source) != "windmill":
            raise WatcherError(f"only windmill has a folder to import, not {source}")
        from watcher.cli import windmill

        windmill.move(folder, to, as_json)
        return
    loaded = connect.load(config)
    connect.refuse_while_running(loaded)

    async def work(db: Database, lines: Iterable[str]) -> int:
        return await store_backup.import_(db, lines)

    if str(source) == "-":
        rows = connect.alone(loaded, lambda db: work(db, sys.stdin))
    else:
        with source.open(encoding="utf-8") as stream:
            rows = connect.alone(loaded, lambda db: work(db, stream))
    connect.hand_over(loaded)
    done = {"database": connect.shown(loaded.database), "rows": rows}
    show.give(done, as_json, lambda d: show.words(f"{rows} rows are in {d['database']}"))


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"{question} Add --yes to say so.")
    typer.confirm(question, abort=True, err=True)


@contextmanager
def _out(to: Path | None) -> Iterator[IO[str]]:
    if to is None:
        yield sys.stdout
        return
    try:
        stream = to.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise WatcherError(f"{to} is already there: name another file, or move that one away") from error
    to.chmod(0o600)
    with stream:
        yield stream
