"""The command line: arguments in, tables or JSON out, and an exit code."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, cast

import typer
from typer.core import TyperGroup

from watcher.cli import show
from watcher.cli.options import ConfigFile
from watcher.errors import ConfigError, WatcherError

VERBS = {
    "init": ("service", "Write a first configuration that works offline"),
    "check": ("service", "Validate the configuration, scripts and arguments too"),
    "serve": ("service", "Run the service in the foreground"),
    "status": ("watchers", "Every watcher and flow: condition, reason, backlog"),
    "plan": ("watchers", "Show what a run would send, and why; save nothing"),
    "run": ("watchers", "Run a watcher now and commit what it finds"),
    "test": ("watchers", "Run a watcher offline against a recorded answer"),
    "runs": ("watchers", "The newest runs that found something or failed"),
    "items": ("watchers", "The newest items"),
    "deliveries": ("watchers", "The newest deliveries and their answers"),
    "jobs": ("jobs", "The newest jobs of local flows and how they ended"),
    "job": ("jobs", "One job: what it printed, its result, its error"),
    "why": ("watchers", "Everything ever decided about one item"),
    "test-flow": ("flows", "Send a marked sample event to a flow"),
    "retry": ("watchers", "Make dead deliveries due again"),
    "approve": ("watchers", "Commit what a quarantined run found"),
    "pause": ("watchers", "Stop a watcher or a flow until resumed"),
    "resume": ("watchers", "Go on after a pause, a quarantine or a hold"),
    "state": ("state", "What a watcher remembers: look, change, go back"),
    "variable": ("settings", "Named strings at a path, maybe secret"),
    "resource": ("settings", "Typed JSON objects at a path"),
    "object": ("objects", "Files in object storage: list, get, put, delete"),
    "token": ("settings", "Tokens for the HTTP API"),
    "secret": ("secret", "The key of secret variables: make one, change it"),
    "doctor": ("service", "Look for whatever would keep watcher from working"),
    "reload": ("service", "Let the running service read its configuration"),
    "backup": ("data", "Write a consistent copy of the database"),
    "restore": ("data", "Put a backup in place of the database"),
    "export": ("data", "Write everything as JSON lines"),
    "import": ("data", "Read what export wrote into an empty database"),
    "systemd-unit": ("service", "Print a hardened systemd unit"),
    "schema": ("service", "Print the JSON Schema of the configuration file"),
    "completion": ("service", "Print a shell's completion script"),
    "version": ("service", "Print the version"),
}
"""Each verb's module and its line in the overview. Only the module of the verb that is used gets loaded."""


class _Verbs(TyperGroup):
    """A group that knows its commands' names before it loads them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = cast(Any, dict.fromkeys(VERBS))

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = import_module(f"watcher.cli.{VERBS[cmd_name][0]}")
        group = typer.main.get_command(module.app)
        return cast(TyperGroup, group).commands[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])


app = typer.Typer(
    name="watcher",
    cls=_Verbs,
    help="Polls systems that cannot call you, works out what is new, and starts one flow run per new item.",
    epilog="Exit codes: 0 ok, 1 a run or delivery failed, 2 usage, 69 service or database unreachable, 78 bad config.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(config: ConfigFile = None) -> None:
    if config is not None:
        os.environ["WATCHER_CONFIG"] = str(config)  # where every command looks when it has no option of its own


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Nobody but a developer (PYTHONDEVMODE=1) reads a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # half a surrogate pair in a key is no reason to fail
    if "_WATCHER_COMPLETE" in os.environ:
        typer.completion.get_completion_inspect_parameters()  # which teaches Typer the shells
    try:
        typer.main.get_command(app).main(args=arguments, prog_name="watcher")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except ConfigError as error:
        show.mistakes(error)
        return error.exit_code
    except WatcherError as error:
        show.error(str(error))
        return error.exit_code
    except OSError as error:
        if sys.flags.dev_mode:
            raise
        show.error(f"{error.filename or 'system'}: {error.strerror or error}")
        return 1
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        show.error(
            f"this should not happen: {type(error).__name__}: {error}\n"
            "Please report it, with what `PYTHONDEVMODE=1 watcher …` prints for the same command."
        )
        return 1
    return 0


__all__ = ["app", "main"]
