"""`watcher state`: what a watcher remembers, its history, and the ways to put it right by hand."""

from __future__ import annotations

import difflib
import json
import sys
from typing import Annotated

import typer

from watcher.cli import options, show
from watcher.cli.connect import call
from watcher.cli.options import AsJson, ConfigFile, Name, Yes
from watcher.values import Json

_GIVEN = Annotated[int | None, typer.Option("--version", "-v", help="An earlier version.")]


app = typer.Typer(**options.STYLE)
state = typer.Typer(no_args_is_help=True, help="What a watcher remembers: look, change, go back.")
app.add_typer(state, name="state")


@state.command("get")
def get(name: Name, version: _GIVEN = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Print the script's state; --json adds the cursor, the version and the rest of the memory."""

    def render(memory: Json) -> None:
        known = show.count(memory["known"], "key")
        show.words(f"version {memory['version']}, cursor {json.dumps(memory['cursor'])}, {known} known")
        print(json.dumps(memory["state"], indent=2, ensure_ascii=False))

    show.give(call(config, "state_get", name=name, version=version), as_json, render)


@state.command("set")
def put(
    name: Name,
    value: Annotated[str | None, typer.Argument(metavar="JSON", help="The state; - or nothing: from stdin.")] = None,
    cursor: Annotated[
        str | None, typer.Option("--cursor", help="Move the cursor (JSON or text), not the state.")
    ] = None,
    if_version: Annotated[int | None, typer.Option("--if-version", help="Only if it is still at this version.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Put another state, or another cursor, in place; the one before stays in the history."""
    if cursor is not None:
        done = call(config, "state_set", name=name, cursor=_loosely(cursor), move=True, expected=if_version)
    else:
        text = sys.stdin.read() if value in (None, "-") else value
        try:
            state = json.loads(text or "")
        except ValueError as error:
            raise typer.BadParameter(f"this is not JSON: {error}", param_hint="JSON") from error
        done = call(config, "state_set", name=name, value=state, expected=if_version)
    show.give(done, as_json, lambda memory: show.words(f"{name} is at version {memory['version']}"))


def _loosely(text: str) -> Json:
    """A number or other JSON as such; anything else is the text itself, since cursors mostly are times."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@state.command("history")
def history(
    name: Name,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="How many.")] = 20,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """The versions that are kept, newest first."""
    found = call(config, "state_history", name=name, limit=limit)
    columns: show.Columns = {
        "version": "version",
        "at": lambda r: show.when(r["at"]),
        "run": "run_id",
        "bytes": "size",
        "note": "note",
    }
    show.give(found, as_json, lambda rows: show.table(rows, columns, f"{name} remembers nothing yet"))


@state.command("diff")
def diff(
    name: Name,
    old: Annotated[int | None, typer.Argument(help="A version (default: the one before).")] = None,
    new: Annotated[int | None, typer.Argument(help="A version (default: the newest).")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """What changed between two versions; --json gives both and a JSON Patch."""

    def render(found: Json) -> None:
        old, new = (
            json.dumps(found[side], indent=2, sort_keys=True, ensure_ascii=False).splitlines()
            for side in ("old", "new")
        )
        titles = (f"version {found[side]['version']}" for side in ("old", "new"))
        for line in difflib.unified_diff(old, new, next(titles), next(titles), lineterm=""):
            print(show.paint(line, {"+": "green", "-": "red", "@": "dim"}.get(line[:1], ""), sys.stdout))

    show.give(call(config, "state_diff", name=name, old=old, new=new), as_json, render)


@state.command("rollback")
def rollback(
    name: Name,
    version: Annotated[int, typer.Argument(help="The version to go back to.")],
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Put an earlier memory in force again, as a new version. Keys that were seen stay seen."""
    done = call(config, "state_rollback", name=name, version=version)
    show.give(done, as_json, lambda memory: show.words(f"{name} is at version {memory['version']}, as {version} was"))


@state.command("reset")
def reset(name: Name, yes: Yes = False, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Forget the memory and every seen key: the next run is a first run."""
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("this forgets every key that was seen: add --yes")
        typer.confirm(f"Forget everything that {name} has seen?", abort=True, err=True)
    show.give(call(config, "state_reset", name=name), as_json, lambda _: show.words(f"{name} starts anew"))
