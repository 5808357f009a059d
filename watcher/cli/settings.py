"""`watcher variable`, `resource` and `token`: what scripts and API clients are given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from watcher.cli import options, show
from watcher.cli.connect import call
from watcher.cli.options import AsJson, ConfigFile
from watcher.values import Json

Where = Annotated[str, typer.Argument(metavar="PATH", help="Such as u/admin/github.")]
Description = Annotated[str, typer.Option("--description", help="What it is for.")]


app = typer.Typer(**options.STYLE)
variable = typer.Typer(no_args_is_help=True, help="Named strings at a path, maybe secret.")
resource = typer.Typer(no_args_is_help=True, help="Typed JSON objects at a path.")
token = typer.Typer(no_args_is_help=True, help="Tokens for the HTTP API.")
for _group, _name in ((variable, "variable"), (resource, "resource"), (token, "token")):
    app.add_typer(_group, name=_name)


# --- variables --------------------------------------------------------------------------------------------------------


@variable.command("list")
def variable_list(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Every variable; secret values are left out."""
    columns: show.Columns = {
        "path": "path",
        "source": "source",
        "value": lambda r: "(secret)" if r["is_secret"] else r["value"],
        "description": lambda r: r.get("description") or "-",
    }
    show.give(call(config, "variable_list"), as_json, lambda rows: show.table(rows, columns, "no variables"))


@variable.command("get")
def variable_get(path: Where, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Print a value, a secret one too (which is noted in the audit list)."""
    show.give(call(config, "variable_get", path=path), as_json, lambda found: print(found["value"]))


@variable.command("set")
def variable_set(
    path: Where,
    value: Annotated[str | None, typer.Argument(help="Leave it out, and always for secrets: read from stdin.")] = None,
    secret: Annotated[bool, typer.Option("--secret", help="Store it encrypted.")] = False,
    description: Description = "",
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Create or replace a variable, from standard input."""
    if secret and value is not None:
        raise typer.BadParameter("a secret on the command line can be read by others: leave it out, give it on stdin")
    text = value if value is not None else _from_stdin(secret)
    done = call(config, "variable_set", path=path, value=text, secret=secret, description=description)
    show.give(done, as_json, lambda _: show.words(f"{path} is set"))


def _from_stdin(hidden: bool) -> str:
    """All of standard input without the one line end that shells add; at a terminal one line, unseen if secret."""
    if sys.stdin.isatty():
        text: str = typer.prompt("Value", hide_input=hidden, err=True)
        return text
    return sys.stdin.read().removesuffix("\n")


@variable.command("delete")
def variable_delete(path: Where, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Delete a variable."""
    done = call(config, "variable_delete", path=path)
    show.give(done, as_json, lambda _: show.words(f"{path} is deleted"))


# --- resources --------------------------------------------------------------------------------------------------------


@resource.command("list")
def resource_list(
    type: Annotated[str | None, typer.Option("--type", help="Only of this type.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Every resource; values are left out."""
    columns: show.Columns = {"path": "path", "type": "type", "source": "source"}
    found = call(config, "resource_list", type=type)
    show.give(found, as_json, lambda rows: show.table(rows, columns, "no resources"))


@resource.command("get")
def resource_get(path: Where, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Print a resource's value as it is stored: "$var:…" in it stays as it is."""
    found = call(config, "resource_get", path=path)
    show.give(found, as_json, lambda r: print(json.dumps(r["value"], indent=2, ensure_ascii=False)))


@resource.command("set")
def resource_set(
    path: Where,
    type: Annotated[str, typer.Option("--type", help="Its resource type, such as github.")],
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="JSON (default: standard input).")] = None,
    description: Description = "",
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Create or replace a resource from JSON; keep secrets in it as "$var:PATH" of a secret variable."""
    value = _json(sys.stdin.read() if file is None or str(file) == "-" else file.read_text("utf-8"))
    done = call(config, "resource_set", path=path, type=type, value=value, description=description)
    show.give(done, as_json, lambda _: show.words(f"{path} is set"))


@resource.command("add")
def resource_add(
    type: Annotated[str, typer.Argument(metavar="TYPE", help="postgresql, mysql, mongodb, redis or upstash.")],
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help="A connection string; leave it out to type or pipe it unseen.")
    ] = None,
    path: Annotated[str | None, typer.Option("--path", help="Such as u/admin/db (default: by its database).")] = None,
    description: Description = "",
    replace: Annotated[bool, typer.Option("--replace", help="Put it in place of the one that is there.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a resource out of a connection string; its password becomes a secret variable."""
    given = url if url is not None else _from_stdin(True)
    done = call(config, "resource_add", type=type, url=given, path=path, description=description, replace=replace)

    def render(done: Json) -> None:
        for note in done["notes"]:
            show.words(f"note: {note}")
        for name in done["variables"]:
            show.words(f"{name} holds the secret, encrypted")
        if url is not None and done["variables"]:
            show.words("the shell's history holds it too: next time leave out the URL, and you are asked for it")
        show.words(f"{done['path']} is set; try it with `watcher resource test {done['path']}`")

    show.give(done, as_json, render)


@resource.command("url")
def resource_url(path: Where, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Print the connection string of a resource with its secrets (which is noted in the audit list)."""
    show.give(call(config, "resource_url", path=path), as_json, lambda found: print(found["url"]))


@resource.command("test")
def resource_test(
    path: Where,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, max=300, help="Seconds.")] = 10.0,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Connect to what a resource describes. Exit code 1, and what to do, when something is wrong."""
    done = call(config, "resource_test", path=path, timeout=timeout)

    def render(done: Json) -> None:
        word = "OK" if done["ok"] else "FAIL"
        print(f"{show.paint(word, show.colour_of(word), sys.stdout)}  {done['said']}")
        if done["do"]:
            print(f"      {done['do']}")

    show.give(done, as_json, render)
    if not done["ok"]:
        raise typer.Exit(1)


def _json(text: str) -> Json:
    try:
        return json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"this is not JSON: {error}", param_hint="FILE") from error


@resource.command("delete")
def resource_delete(path: Where, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Delete a resource."""
    done = call(config, "resource_delete", path=path)
    show.give(done, as_json, lambda _: show.words(f"{path} is deleted"))


# --- tokens -----------------------------------------------------------------------------------------------------------


@token.command("list")
def token_list(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """The tokens that people made; never the tokens themselves."""
    columns: show.Columns = {
        "token": lambda r: f"{r['prefix']}…",
        "label": "label",
        "scopes": "scopes",
        "expires": lambda r: show.when(r["expires_at"]),
        "used": lambda r: show.when(r["used_at"]),
    }
    show.give(call(config, "token_list"), as_json, lambda rows: show.table(rows, columns, "no tokens"))


@token.command("create")
def token_create(
    label: Annotated[str, typer.Argument(help="What it is for.")],
    scope: Annotated[list[str] | None, typer.Option("--scope", help="What it may do (default: everything).")] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="For how long it is good, such as 30d.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a token and print it, once: only its hash is kept."""
    done = call(config, "token_create", label=label, scopes=scope or [], expires_in=_seconds(expires))

    def render(found: Json) -> None:
        show.words("keep it now: it cannot be shown again")
        print(found["token"])

    show.give(done, as_json, render)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    from watcher.config import units

    try:
        return units.duration(text).total_seconds()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--expires") from error


@token.command("revoke")
def token_revoke(
    token: Annotated[str, typer.Argument(help="Its first characters or its label, as `token list` shows them.")],
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a token at once."""
    done = call(config, "token_revoke", prefix=token)
    show.give(done, as_json, lambda r: show.words(f"{r['revoked']}… ({r['label']}) is revoked"))
