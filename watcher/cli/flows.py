"""What can be asked of flows alone."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from watcher.cli import options, show
from watcher.cli.connect import call
from watcher.cli.options import AsJson, ConfigFile
from watcher.values import Json

app = typer.Typer(**options.STYLE)


@app.callback()
def _group() -> None:
    """Keeps a single command a command of its own name."""


@app.command("test-flow")
def send_sample(
    name: Annotated[str, typer.Argument(help="The flow.")],
    item: Annotated[str | None, typer.Option("--item", help="The item to send, as JSON, instead of a sample.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Send a marked sample event to a flow and show its answer. Exit code 1 when it did not take it."""
    try:
        given = None if item is None else json.loads(item)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--item") from error
    found = call(config, "sample_flow", name=name, item=given)
    show.give(found, as_json, _shown)
    if found["verdict"] not in ("delivered", "duplicate"):
        raise typer.Exit(1)


def _shown(found: Json) -> None:
    status = f", status {found['status_code']}" if found["status_code"] else ""
    note = f": {found['note']}" if found["note"] else ""
    print(f"{found['flow']}: {found['verdict']}{status}{note}")
    if found["answer"]:
        print(show.clean(found["answer"]))
