"""What can be asked of jobs: the runs of local flows and scripts, and what they printed."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated

import typer

from watcher.cli import options, show
from watcher.cli.connect import call
from watcher.cli.options import AsJson, ConfigFile, Limit
from watcher.values import Json

app = typer.Typer(**options.STYLE)

_LINES = "\n\t"
_STATUSES = ("queued", "running", "succeeded", "failed", "canceled")


@app.command()
def jobs(
    flow: Annotated[str | None, typer.Argument(metavar="FLOW", help="A local flow (default: all).")] = None,
    status: Annotated[str | None, typer.Option("--status", "-s", help=", ".join(_STATUSES) + ".")] = None,
    limit: Limit = 20,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """The newest jobs of local flows: how they ended, and how long they took."""
    if status not in (None, *_STATUSES):
        raise typer.BadParameter(", ".join(_STATUSES), param_hint="--status")
    found = call(config, "jobs", flow=flow, status=status, limit=limit)
    columns: show.Columns = {
        "id": "id",
        "flow": "path",
        "status": "status",
        "when": lambda r: show.when(r["finished_at"] or r["started_at"] or r["created_at"]),
        "took": _took,
        "error": lambda r: r["error"] or r["cancel_reason"] or "-",
    }
    show.give(found, as_json, lambda rows: show.table(rows, columns, "no jobs"))


@app.command()
def job(
    id: Annotated[str, typer.Argument(metavar="ID", help="A job, or the delivery that started it.")],
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """One job: what it printed, its result, its error."""
    show.give(call(config, "job", id=id), as_json, _job)


def _took(job: Json) -> str:
    if not (job["started_at"] and job["finished_at"]):
        return "-"
    seconds = (datetime.fromisoformat(job["finished_at"]) - datetime.fromisoformat(job["started_at"])).total_seconds()
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _job(job: Json) -> None:
    steps = f"{job['step']} of {job['steps']} done" if job["steps"] else ""
    show.fields(
        [
            ("job", job["id"]),
            (job["kind"], job["path"]),
            ("status", job["status"]),
            ("steps", steps),
            ("started", job["started_at"] and show.when(job["started_at"])),
            ("took", _took(job).strip("-")),
            ("starts", job["starts"] if job["starts"] > 1 else None),
            ("canceled", job["cancel_reason"]),
            ("error", job["error"]),
        ]
    )
    for title, text in (("detail", job["detail"]), ("printed", job["logs"]), ("result", _result(job["result"]))):
        if text:
            print(f"\n{title}:\n{show.clean(text, keep=_LINES).rstrip()}")


def _result(result: Json) -> str:
    return "" if result is None else json.dumps(result, indent=2, ensure_ascii=False)
