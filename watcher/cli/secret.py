"""`watcher secret`: the key that secret variables are encrypted with, made and changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from watcher.cli import options, show
from watcher.cli.connect import alone, load, now, refuse_while_running
from watcher.cli.options import AsJson, ConfigFile
from watcher.values import Json

app = typer.Typer(**options.STYLE)
secret = typer.Typer(no_args_is_help=True, help="The key of secret variables.")
app.add_typer(secret, name="secret")


@secret.command("new-key")
def new_key(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="Write it there (default: print it).")] = None,
) -> None:
    """Make a key, for a file that only the service may read or for a systemd credential."""
    from watcher import secrets

    key = secrets.new_key()
    if file is None:
        print(key)
        return
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(f"{key}\n")
    show.words(f"{file} holds a new key: name it in secret_key_file, and keep a copy away from the database")


@secret.command("rotate-key")
def rotate_key(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Encrypt every secret variable with a new key. Whatever crashes in between, running it again finishes it.

    With secret_key_file the new key is made and written here. A key from elsewhere (a systemd credential, the
    environment) you change yourself: add the new one as its first line, start every service anew, and run this.
    """
    from watcher import operations

    found = load(config)
    refuse_while_running(found)
    done = alone(found, lambda db: operations.rotate_key(db, os.environ, found.secret_key_file, now()))

    def render(done: Json) -> None:
        show.words(f"{done['encrypted']} of {done['secrets']} secrets were encrypted anew, with key {done['key']}")
        if done["old_keys"]:
            show.words(f"no longer needed, but for older backups: {', '.join(done['old_keys'])}: remove these lines")

    show.give(done, as_json, render)
