"""The options that many commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

STYLE: dict[str, Any] = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
"""Of every group: plain help, and our own way with errors."""

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="The configuration (default: $WATCHER_CONFIG, ./watcher.toml)."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A watcher.")]
MaybeName = Annotated[str | None, typer.Argument(metavar="NAME", help="A watcher (default: all).")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="How many, newest first.")]
Before = Annotated[int | None, typer.Option("--before", metavar="ID", help="Go on below this id.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
