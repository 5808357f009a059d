"""The verbs around the service: set up, check, start, reload, describe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sized
from pathlib import Path
from typing import Annotated

import typer

from watcher import control
from watcher.cli import connect, options, show, unit
from watcher.cli.options import AsJson, ConfigFile
from watcher.errors import ConfigError
from watcher.values import Json

app = typer.Typer(**options.STYLE)


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Where (made if missing).")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
) -> None:
    """Write a first configuration that works at once, offline."""
    from watcher import config
    from watcher.cli import example

    files = example.files() | {"watcher.schema.json": json.dumps(config.json_schema(), indent=2) + "\n"}
    there = [name for name in files if (directory / name).exists()]
    if there and not force:
        raise typer.BadParameter(f"{directory}: already there: {', '.join(there)}; --force writes over them")
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
        print(directory / name)
    where = "" if directory == Path(".") else f"cd {directory} && "
    show.words(f"now: {where}watcher serve    (then put a file into {directory / 'inbox'})")


@app.command()
def check(
    config: ConfigFile = None,
    show_origin: Annotated[bool, typer.Option("--show-origin", help="Where each value comes from.")] = False,
    as_json: AsJson = False,
) -> None:
    """Validate the whole configuration, scripts and their arguments too: all mistakes at once."""
    from watcher.cli import checking

    try:
        good = checking.check(config)
    except ConfigError as error:
        if not as_json:
            raise
        print(json.dumps({"ok": False, "mistakes": [checking.mistake(m) for m in error.mistakes]}, indent=2))
        raise typer.Exit(error.exit_code) from error
    loaded = good.config
    for warning in good.warnings:
        show.words(f"{show.paint('warning:', 'yellow', sys.stderr)} {warning}")
    origins = dict(good.origins) if show_origin else {}
    found = {"ok": True, "watchers": sorted(loaded.watchers), "flows": sorted(loaded.flows), "warnings": good.warnings}

    def render(_: Json) -> None:
        for name, source in origins.items():
            print(f"{name}  {source}")
        show.words(f"{loaded.file}: good: {_count(loaded.watchers, 'watcher')}, {_count(loaded.flows, 'flow')}")

    show.give(found | ({"origins": origins} if show_origin else {}), as_json, render)


def _count(things: Sized, noun: str) -> str:
    return show.count(len(things), noun)


@app.command()
def serve(config: ConfigFile = None) -> None:
    """Run the service in the foreground. SIGTERM drains and exits 0; SIGHUP reads the configuration again."""
    import asyncio

    from watcher.cli.lean import lean

    with lean():
        from watcher import app

    raise typer.Exit(asyncio.run(app.serve(connect.file(config))))


@app.command()
def reload(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Let the running service read its configuration again; a bad one is shown here and changes nothing."""
    loaded = connect.load(config)
    at = control.path(loaded.data)
    if not control.alive(at):
        raise control.Refused("no service is running here, so there is nothing to reload", 69)
    done = control.call(at, "reload", {})
    if waits := done["needs_restart"]:
        warning = show.paint("warning:", "yellow", sys.stderr)
        show.words(f"{warning} these take a restart of the service: {', '.join(waits)}")
    show.give(
        done,
        as_json,
        lambda d: show.words(
            f"in force: {_count(range(d['watchers']), 'watcher')}, {_count(range(d['flows']), 'flow')}"
        ),
    )


@app.command()
def doctor(
    config: ConfigFile = None,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Print a new key for secrets, and do nothing else.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look for whatever would keep watcher from working here, and say how to put it right."""
    if new_key:
        from watcher import secrets

        print(secrets.new_key())
        return
    from watcher.cli import doctor as examination

    findings = examination.examine(config)

    def render(_: Json) -> None:
        for finding in findings:
            level = show.paint(finding.level.ljust(4), finding.colour, sys.stdout)
            print(f"{level}  {finding.what}: {show.clean(finding.found)}")
            if finding.fix:
                print(f"      {finding.fix}")

    show.give([finding.to_json() for finding in findings], as_json, render)
    worst = max((finding.exit_code for finding in findings), default=0)
    if worst:
        raise typer.Exit(worst)


@app.command("systemd-unit")
def systemd_unit(
    config: ConfigFile = None,
    command: Annotated[Path | None, typer.Option("--command", help="The watcher command (default: this one).")] = None,
    credential: Annotated[
        Path | None,
        typer.Option("--credential", help=f"The encrypted key (default: {unit.CREDENTIAL}, if it is there)."),
    ] = None,
    backup_service: Annotated[
        bool, typer.Option("--backup-service", help="Instead, the unit of one backup (watcher-backup.service).")
    ] = False,
    backup_timer: Annotated[
        bool, typer.Option("--backup-timer", help="Instead, the timer of a backup each night (watcher-backup.timer).")
    ] = False,
) -> None:
    """Print a hardened unit for this installation: `watcher systemd-unit > /etc/systemd/system/watcher.service`."""
    if backup_timer:
        print(unit.TIMER, end="")
        return
    file = (config or Path(os.environ.get("WATCHER_CONFIG") or unit.CONFIG)).absolute()
    program = (command or unit.this_command()).absolute()
    if backup_service:
        print(unit.backup(program, file), end="")
        return
    key = credential or (unit.CREDENTIAL if unit.CREDENTIAL.exists() else None)
    print(unit.text(program, file, key), end="")
    python = [] if command else [Path(sys.executable).resolve()]
    for warning in [*unit.warnings(program, file, *python), *_elsewhere(file)]:
        show.words(f"{show.paint('warning:', 'yellow', sys.stderr)} {warning}")


def _elsewhere(file: Path) -> list[str]:
    """A service finds its data in $STATE_DIRECTORY; commands started by hand have no such variable."""
    try:
        loaded = connect.load(file)
    except ConfigError:
        return []
    places = [loaded.data, connect.sqlite_file(loaded.database) or unit.STATE]
    if all(place.is_relative_to(unit.STATE) for place in places):
        return []
    return [
        f'write database = "sqlite:///{unit.STATE}/watcher.db" and data = "{unit.STATE}" into {file}: '
        "the service can write nowhere else, and the other commands then look there too"
    ]


@app.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file, for editors."""
    from watcher import config

    print(json.dumps(config.json_schema(), indent=2))


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    import platform
    import sqlite3
    from importlib import metadata

    found = {
        "watcher": metadata.version("change-watcher"),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
    }
    show.give(found, as_json, lambda f: print(f"watcher {f['watcher']} (Python {f['python']}, SQLite {f['sqlite']})"))


@app.command()
def completion(
    shell: Annotated[str | None, typer.Argument(help="bash, zsh or fish (default: $SHELL).")] = None,
) -> None:
    """Print a shell's completion script; for bash: `eval "$(watcher completion bash)"`."""
    from typer._completion_shared import get_completion_script

    wanted = shell or Path(os.environ.get("SHELL", "bash")).name
    if wanted not in ("bash", "zsh", "fish"):
        raise typer.BadParameter("bash, zsh or fish", param_hint="SHELL")
    print(get_completion_script(prog_name="watcher", complete_var="_WATCHER_COMPLETE", shell=wanted))
