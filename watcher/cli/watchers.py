"""The daily verbs: look at watchers, runs, items and deliveries, run them, and steer them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from watcher.cli import options, show
from watcher.cli.connect import call
from watcher.cli.options import AsJson, Before, ConfigFile, Limit, MaybeName, Name, Yes
from watcher.errors import WatcherError
from watcher.values import Json

ASK_ABOVE = 20
_BATCH = 1000
_LINES = "\n\t"

IsFlow = Annotated[bool, typer.Option("--flow", help="NAME is a flow, not a watcher.")]
OfFlow = Annotated[str | None, typer.Option("--flow", metavar="FLOW", help="Only of this flow.")]
OfWatcher = Annotated[str | None, typer.Option("--watcher", "-w", metavar="NAME", help="Only of this watcher.")]


app = typer.Typer(**options.STYLE)


# --- running ----------------------------------------------------------------------------------------------------------


@app.command()
def plan(
    name: Name,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep the plan for `run --plan`.")] = None,
    record: Annotated[Path | None, typer.Option("--record", help="Keep what the source answered, for `test`.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run would send, item by item, with the reason. Nothing is saved or sent."""
    found = call(config, "plan", name=name, record=record is not None)
    plan = found["plan"]
    if record is not None:
        _write(record, found["recording"])
        show.words(f"kept in {record}: `watcher test {name} --recording {record}` runs against it")
    if out is not None:
        _write(out, plan)
        show.words(f"kept in {out}: `watcher run {name} --plan {out}` commits exactly this")
    show.give(plan, as_json, _plan)


@app.command()
def run(
    name: Name,
    plan: Annotated[Path | None, typer.Option("--plan", help="Commit exactly this plan, made by `plan --out`.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Run a watcher now and commit what it finds; the service sends it."""
    verb, more = ("run", {}) if plan is None else ("apply", {"plan": _json_file(plan, "--plan")})
    record = call(config, verb, name=name, **more)
    show.give(record, as_json, _record)
    _exit_by(record)


@app.command("test")
def offline(
    name: Name,
    recording: Annotated[Path, typer.Option("--recording", "-r", help="What `plan --record` kept.")],
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Run a watcher offline against a recorded answer and show what it would send. Nothing is asked, saved or sent."""
    plan = call(config, "test", name=name, recording=_json_file(recording, "--recording"))
    show.give(plan, as_json, _plan)


@app.command()
def approve(name: Name, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Commit the plan of a watcher in quarantine, and let it run again."""
    record = call(config, "approve", name=name)
    show.give(record, as_json, _record)
    _exit_by(record)


def _exit_by(record: Json) -> None:
    if record["outcome"] in ("failed", "quarantined", "conflict"):
        raise typer.Exit(1)


# --- looking ----------------------------------------------------------------------------------------------------------


@app.command()
def status(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Every watcher and flow: its condition, why, and what waits."""
    show.give(call(config, "status"), as_json, _status)


@app.command()
def runs(
    name: MaybeName = None,
    id: Annotated[int | None, typer.Option("--id", help="One run, with its error and its log.")] = None,
    limit: Limit = 20,
    before: Before = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """The newest runs that found something or failed. Quiet ones are only counted."""
    if id is not None:
        show.give(call(config, "run_details", id=id), as_json, _record)
        return
    found = call(config, "runs", name=name, limit=limit, before=before)
    columns: show.Columns = {
        "id": "id",
        "watcher": "watcher",
        "when": lambda r: show.when(r["finished_at"]),
        "outcome": "outcome",
        "what": lambda r: r["error"] or r["gap"] or _counts(r["counts"]),
    }
    show.give(found, as_json, lambda rows: show.table(rows, columns, "no runs yet, or only quiet ones"))


@app.command()
def items(
    name: MaybeName = None,
    limit: Limit = 20,
    before: Before = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """The newest items."""
    found = call(config, "items", name=name, limit=limit, before=before)
    columns: show.Columns = {
        "seq": "seq",
        "watcher": "watcher",
        "found": lambda r: show.when(r["found_at"]),
        "change": "change",
        "key": "key",
        "item": lambda r: json.dumps((r["payload"] or {}).get("item"), ensure_ascii=False),
    }
    show.give(found, as_json, lambda rows: show.table(rows, columns, "no items yet"))


@app.command()
def deliveries(
    name: MaybeName = None,
    flow: OfFlow = None,
    status: Annotated[str | None, typer.Option("--status", "-s", help="pending, delivered or dead.")] = None,
    limit: Limit = 20,
    before: Before = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """The newest deliveries: what is owed, what was answered, what is dead."""
    if status not in (None, "pending", "delivered", "dead"):
        raise typer.BadParameter("pending, delivered or dead", param_hint="--status")
    found = call(config, "deliveries", name=name, flow=flow, status=status, limit=limit, before=before)
    columns: show.Columns = {
        "id": "id",
        "watcher": "watcher",
        "flow": "flow",
        "status": "status",
        "tries": "attempts",
        "when": lambda r: show.when(r["settled_at"] or r["due_at"]),
        "key": "key",
        "answer": lambda r: " ".join(str(v) for v in (r["status_code"], r["note"]) if v) or "-",
    }
    show.give(found, as_json, lambda rows: show.table(rows, columns, "no deliveries"))


@app.command()
def why(key: str, watcher: OfWatcher = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Everything ever decided about one item key (or item or delivery id)."""
    found = call(config, "why", key=key, name=watcher)
    show.give(found, as_json, _why)


# --- steering ---------------------------------------------------------------------------------------------------------


@app.command()
def retry(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Deliveries or items.")] = None,
    flow: OfFlow = None,
    watcher: OfWatcher = None,
    since: Annotated[
        str | None, typer.Option("--since", help="Only items found since then (2026-11-25T10:00Z, or 3h ago: 3h).")
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Every dead delivery.")] = False,
    pending: Annotated[bool, typer.Option("--pending", help="Those that wait for their turn, not the dead.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the request of one delivery as it would be made now; send nothing.")
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the retry of many that another process is at.")] = False,
    yes: Yes = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Make dead deliveries due again, or pending ones due now: those named, or all that match.

    What is sent is made anew from the item, by the flow's `map`, `body` and `headers` as they are now.
    """
    if stop:
        told = call(config, "retry_stop")
        show.give(told, as_json, lambda t: show.words(_stopped(t) if t["stopped"] else "no retry of many is at work"))
        return
    if dry_run:
        if len(ids or []) != 1:
            raise typer.BadParameter("--dry-run takes the id of one delivery")
        show.give(call(config, "rendered", id=(ids or [])[0]), as_json, _request)
        return
    if not (ids or flow or watcher or since or all):
        raise typer.BadParameter("name deliveries, or say which with --flow, --watcher, --since or --all")
    status = "pending" if pending else "dead"
    found = ids or call(config, "owed", flow=flow, name=watcher, since=_instant(since), status=status)["ids"]
    if len(found) > ASK_ABOVE and not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter(f"that is {len(found)} deliveries: add --yes")
        typer.confirm(f"Retry {len(found)} deliveries?", abort=True, err=True)
    done = call(config, "retry", ids=found)["retried"] if len(found) <= _BATCH else _retry_many(config, found)
    if ids and not done:
        raise WatcherError("no such delivery or item: `watcher deliveries --status dead` lists what is dead")
    show.give({"retried": done}, as_json, lambda _: show.words(_retried(done, pending)))


def _retry_many(config: Path | None, ids: list[str]) -> int:
    """Part by part, telling how far it is; Ctrl-C and `watcher retry --stop` end it between two parts."""
    bulk = call(config, "retry_begin", total=len(ids))["bulk"]
    stopped = interrupted = False
    done = 0
    try:
        for start in range(0, len(ids), _BATCH):
            part = call(config, "retry", ids=ids[start : start + _BATCH], bulk=bulk)
            done += int(part["retried"])
            stopped = bool(part["stopped"])
            if stopped:
                break
            show.words(f"{done} of {len(ids)}")
    except KeyboardInterrupt:
        interrupted = True
    finally:
        done = max(done, int(call(config, "retry_end", bulk=bulk)["retried"]))
    if stopped or interrupted:
        show.words(_stopped({"retried": done, "total": len(ids)}))
        raise typer.Exit(130 if interrupted else 1)
    return done


def _stopped(told: Json) -> str:
    return f"stopped: {told['retried']} of {told['total']} are due again, the rest stays as it was"


def _request(found: Json) -> None:
    print(f"{found['method']} {show.clean(found['url'])}")
    for name, value in found["headers"].items():
        print(f"{name}: {show.clean(value)}")
    print(f"\n{show.clean(found['body'], keep=_LINES)}")


def _retried(done: int, pending: bool) -> str:
    if not done:
        return (
            "no delivery matches" if pending else "no dead delivery matches (with --pending those that wait are meant)"
        )
    return f"{show.count(done, 'delivery')} {'is' if done == 1 else 'are'} due again"


@app.command()
def pause(
    name: Annotated[str, typer.Argument(help="A watcher, or a flow with --flow.")],
    flow: IsFlow = False,
    reason: Annotated[str, typer.Option("--reason", help="Shown by `status`.")] = "",
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Stop running a watcher, or sending to a flow, until resumed. Nothing is lost."""
    done = call(config, "pause", name=name, flow=flow, reason=reason)
    show.give(done, as_json, lambda _: show.words(f"{name} is paused: `watcher resume {name}` goes on"))


@app.command()
def resume(
    name: Annotated[str, typer.Argument(help="A watcher, or a flow with --flow.")],
    flow: IsFlow = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Go on after a pause, a quarantine (its plan is dropped), failures or a hold."""
    done = call(config, "resume", name=name, flow=flow)
    show.give(done, as_json, lambda _: show.words(f"{name} goes on"))


def _instant(text: str | None) -> str | None:
    """RFC 3339 out of an instant or of a duration back from now."""
    if text is None:
        return None
    from datetime import UTC, datetime

    from watcher.config import units

    try:
        return (datetime.now(UTC) - units.duration(text)).isoformat()
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter("an instant (2026-11-25T10:00Z) or a duration (3h)", param_hint="--since") from error
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).isoformat()


def _json_file(path: Path, option: str) -> Json:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise typer.BadParameter(f"{path} is not there", param_hint=option) from error
    except ValueError as error:
        raise typer.BadParameter(f"{path} is not what it should be: {error}", param_hint=option) from error


def _write(path: Path, value: Json) -> None:
    """For this user alone: answers of a source may hold what is not for everybody."""
    with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump(value, file)


# --- for people -------------------------------------------------------------------------------------------------------


def _counts(counts: Json) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in counts.items() if number) or "nothing"


def _status(found: Json) -> None:
    service = found["service"]
    show.words(f"service: running, process {service['pid']}" if service["running"] else "service: not running")
    if bulk := found["retry"]:
        show.words(f"retry of many: {bulk['done']} of {bulk['total']}; `watcher retry --stop` stops it")
    watchers: show.Columns = {
        "watcher": "name",
        "condition": "condition",
        "schedule": lambda r: r["schedule"] or "-",
        "checked": lambda r: show.ago(r.get("checked_at")),
        "next": lambda r: show.ago(r["next_at"]),
        "found": lambda r: show.ago(r.get("found_at")),
        "reason": lambda r: r["reason"] or "-",
    }
    show.table(found["watchers"], watchers, "no watchers: add a [watchers.NAME] table to the configuration")
    if found["flows"]:
        print()
    flows: show.Columns = {
        "flow": "name",
        "condition": "condition",
        "pending": "pending",
        "oldest": lambda r: show.ago(r["oldest_at"]),
        "dead": "dead",
        "delivered": lambda r: show.ago(r["delivered_at"]),
        "reason": lambda r: r["reason"] or _failed_jobs(r) or "-",
    }
    show.table(found["flows"], flows, "no flows: add a [flows.NAME] table to the configuration")


def _failed_jobs(flow: Json) -> str:
    count = flow["failed_jobs"]
    told = f"{show.count(count, 'job')} failed in the last day"
    return f"{told}: `watcher jobs {flow['name']} --status failed`" if count else ""


def _record(run: Json) -> None:
    show.fields(
        [
            ("run", run.get("id")),
            ("watcher", run["watcher"]),
            ("outcome", run["outcome"]),
            ("finished", show.when(run["finished_at"])),
            ("counts", _counts(run["counts"])),
            ("gap", run["gap"]),
            ("warnings", run["warnings"]),
            ("error", run["error"]),
        ]
    )
    for title in ("detail", "logs"):
        if run[title]:
            print(f"\n{title}:\n{show.clean(run[title], keep=_LINES).rstrip()}")
    for item in run.get("items", []):
        print(f"  {item['change']:8}{show.clean(item['key'])}{_noted(item['note'])}")
    if run["outcome"] == "quarantined":
        show.words(f"`watcher approve {run['watcher']}` commits this, `watcher resume {run['watcher']}` drops it")


def _noted(note: str) -> str:
    return f"  ({show.clean(note)})" if note else ""


def _why(stories: Json) -> None:
    if not stories:
        show.words("nothing is known about that key: it was never listed, or `watcher runs` shows why a run failed")
    for story in stories:
        _story(story)


def _story(story: Json) -> None:
    print(show.paint(f"{story['watcher']}: {show.clean(story['key'])}", "bold", sys.stdout))
    seen = story["seen"]
    if seen is None:
        print("  not in the ledger: it was forgotten")
    else:
        listed = "listed" if seen["present"] else "no longer listed"
        produced = (
            f"revision {seen['revision']}" if story["items"] else "no item: it was there at the first run, or is old"
        )
        print(f"  seen, {listed}, {produced}")
    for item in story["items"]:
        revision = f"{item['change']}, revision {item['revision']}, run {item['run_id']}"
        print(f"  {show.when(item['found_at'])}  {revision}, {item['id']}{_noted(item['note'])}")
        for delivery in (d for d in story["deliveries"] if d["item_seq"] == item["seq"]):
            _delivery(delivery, [a for a in story["attempts"] if a["delivery_seq"] == delivery["seq"]])


def _delivery(delivery: Json, attempts: Json) -> None:
    status = show.paint(delivery["status"], show.colour_of(delivery["status"]), sys.stdout)
    print(f"    to {delivery['flow']}: {status}, {delivery['id']}{_noted(delivery['note'])}")
    for attempt in attempts:
        code = f" {attempt['status_code']}" if attempt["status_code"] else ""
        took = f"{attempt['duration_ms']} ms"
        print(f"      {show.when(attempt['started_at'])}  {attempt['verdict']}{code}, {took}{_noted(attempt['note'])}")
        if attempt["answer"] and attempt["answer"] != delivery["id"]:
            print(f"        answer: {show.clean(attempt['answer'][:200])}")
    if job := delivery["job"]:
        job_status = show.paint(job["status"], show.colour_of(job["status"]), sys.stdout)
        print(f"      its job {job_status}{_noted(job['error'])}: `watcher job {job['id']}`")
    if delivery["waits"]:
        print(f"      waits: its flow is {delivery['waits']}")
    elif delivery["status"] == "pending":
        print(f"      due {show.ago(delivery['due_at'])}")


def _plan(plan: Json) -> None:
    """One line per key: what was decided and why, and where the item would go."""
    items = {item["key"]: item for item in plan["items"]}
    columns: show.Columns = {
        "key": "key",
        "decision": "reason",
        "flows": lambda d: _flows(items.get(d["key"]), d["reason"]),
        "note": lambda d: d["note"] or "-",
    }
    show.table(plan["decisions"], columns, "the source listed nothing, or said that nothing changed")
    for name in ("gap", "quarantine"):
        if plan[name]:
            show.words(f"{name}: {plan[name]}")
    for warning in plan["warnings"]:
        show.words(f"warning: {warning}")
    owed = sum(len(item["deliveries"]) for item in plan["items"])
    sent = f"{show.count(len(plan['items']), 'item')}, {show.count(owed, 'delivery')}"
    show.words(f"{_counts(plan['counts'])}: {sent}; nothing was saved")


def _flows(item: Json, reason: str) -> str:
    if item is None or reason in ("seen", "boundary", "baseline", "duplicate", "filtered"):
        return "-"
    flows = [f"{d['flow']} (dead: {d['dead']})" if d["dead"] else d["flow"] for d in item["deliveries"]]
    return ", ".join(flows) or item["note"] or "-"
