"""Jobs: local flows, scripts and runs of watchers, started, waited for, described and canceled."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from datetime import datetime, timedelta
from functools import partial
from uuid import UUID, uuid4

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute

from watcher.jobs import NoSuchFlow
from watcher.server.windmill.desk import Answer, Desk, body, changing, fields, job, said, when, who
from watcher.server.windmill.webhooks import arguments
from watcher.staging import Session
from watcher.store import jobs as store
from watcher.store import meta
from watcher.store.db import Tx
from watcher.store.jobs import Job
from watcher.values import JobStatus, Json

FINISHED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELED)
WAIT = 600.0  # seconds that run_wait_result waits, unless the caller says less
PREVIEWS = ("run/preview", "run/preview_flow", "run_wait_result/preview", "run_inline/{path:path}")
MAX_USER_STATE = 64 * 1024  # characters of one value of a flow's user state


def routes(desk: Desk) -> list[BaseRoute]:
    """Under ``/jobs``, ``/jobs_u`` and ``/job_metrics``."""
    rooms = [
        ("/jobs/run/f/{path:path}", run_flow, "run:flows:{path}", "POST"),
        ("/jobs/run/p/{path:path}", run_script, "run:scripts:{path}", "POST"),
        ("/jobs/run/h/{path}", run_hash, None, "POST"),
        ("/jobs/run_wait_result/f/{path:path}", wait_flow, "run:flows:{path}", "POST"),
        ("/jobs/run_wait_result/p/{path:path}", wait_script, "run:scripts:{path}", "POST"),
        ("/jobs/run_wait_result/p/{path:path}", wait_script, "run:scripts:{path}", "GET"),
        ("/jobs/list", list_, "read", "GET"),
        ("/jobs/worker_is_draining/{id}", is_draining, None, "GET"),
        ("/jobs/resume_urls/{path:path}", no_approvals, None, "GET"),
        ("/jobs/job_signature/{path:path}", no_approvals, None, "GET"),
        *((f"/jobs/{path}", no_inline, None, "POST") for path in PREVIEWS),
        ("/jobs/flow/user_states/{id}/{key:path}", get_user_state, "read", "GET"),
        ("/jobs/flow/user_states/{id}/{key:path}", set_user_state, "write", "POST"),
        ("/jobs_u/get/{id}", get, "read", "GET"),
        ("/jobs_u/get_root_job_id/{id}", get_root, "read", "GET"),
        ("/jobs_u/completed/get/{id}", get_completed, "read", "GET"),
        ("/jobs_u/completed/get_result/{id}", get_result, "read", "GET"),
        ("/jobs_u/completed/get_result_maybe/{id}", get_result_maybe, "read", "GET"),
        ("/jobs_u/queue/cancel/{id}", cancel, "write", "POST"),
        ("/job_metrics/set_progress/{id}", set_progress, "write", "POST"),
        ("/job_metrics/get_progress/{id}", get_progress, "read", "GET"),
    ]
    return [
        desk.route(path, partial(endpoint, desk), need and f"jobs:{need}", method)
        for path, endpoint, need, method in rooms
    ]


# --- starting ---------------------------------------------------------------------------------------------------------


async def run_flow(desk: Desk, request: Request) -> Response:
    """201 and the bare id; 200 when a job of that ``job_id`` is there already, whatever became of it."""
    id, new = await _create(desk, request, "flow", request.path_params["path"], await arguments(desk, request))
    return PlainTextResponse(id, 201 if new else 200)


async def run_script(desk: Desk, request: Request) -> Response:
    """The same for a script, or for a watcher: "poll now"."""
    kind, path = _runnable(desk, request.path_params["path"])
    id, new = await _create(desk, request, kind, path, await arguments(desk, request))
    return PlainTextResponse(id, 201 if new else 200)


async def run_hash(desk: Desk, request: Request) -> Response:
    """The same for what has this hash: the first 16 digits of the SHA-256 of the script's text."""
    kind, path = await asyncio.to_thread(_hashed, desk, request.path_params["path"].lower())
    desk.require(request, f"jobs:run:scripts:{path}")
    id, new = await _create(desk, request, kind, path, await arguments(desk, request))
    return PlainTextResponse(id, 201 if new else 200)


def _runnable(desk: Desk, path: str) -> tuple[str, str]:
    try:
        return desk.jobs.kind_of(path)
    except NoSuchFlow as error:
        raise HTTPException(404, str(error)) from error


def _hashed(desk: Desk, hash: str) -> tuple[str, str]:
    for name, watcher in desk.config().watchers.items():
        try:
            if hashlib.sha256(watcher.script.read_bytes()).hexdigest()[:16] == hash:
                return "watcher", name
        except OSError:
            continue
    raise HTTPException(404, f"there is no script of the hash {hash}")


async def _create(desk: Desk, request: Request, kind: str, path: str, args: Json) -> tuple[str, bool]:
    changing(request)
    query = request.query_params
    if query.get("retry"):
        raise HTTPException(400, "retry: jobs are not retried here: start it again, with another job_id")
    id = _uuid(query.get("job_id") or str(uuid4()))
    try:
        new = await desk.jobs.create(
            id,
            path,
            args,
            kind=kind,
            parent=query.get("parent_job"),
            root=query.get("root_job"),
            due_at=_due(query.get("scheduled_for"), query.get("scheduled_in_secs"), desk.clock()),
        )
    except NoSuchFlow as error:
        raise HTTPException(404, str(error)) from error
    return id, new


def _due(at: str | None, seconds: str | None, now: datetime) -> datetime | None:
    try:
        if at:
            due = datetime.fromisoformat(at)
            return max(now, due if due.tzinfo else due.replace(tzinfo=now.tzinfo))
        return now + timedelta(seconds=min(max(int(seconds), 0), 10**9)) if seconds else None
    except (ValueError, OverflowError):
        raise HTTPException(400, "scheduled_for is an instant, scheduled_in_secs a number") from None


def _uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        raise HTTPException(400, "a job id is a UUID") from None


# --- starting and waiting ---------------------------------------------------------------------------------------------


async def wait_flow(desk: Desk, request: Request) -> Response:
    """The result itself: 200, 204 when there is none, 422 when the job failed."""
    return await _wait(desk, request, "flow", request.path_params["path"])


async def wait_script(desk: Desk, request: Request) -> Response:
    return await _wait(desk, request, *_runnable(desk, request.path_params["path"]))


async def _wait(desk: Desk, request: Request, kind: str, path: str) -> Response:
    id, _ = await _create(desk, request, kind, path, await arguments(desk, request))
    began, pause = time.monotonic(), 0.02
    while True:
        row = await desk.jobs.get(id)
        if row is None or row.status in FINISHED:
            break
        if time.monotonic() - began > WAIT:
            raise HTTPException(500, f"timeout after {WAIT:g}s")
        if await request.is_disconnected():
            await desk.jobs.cancel(id, "whoever waited for it went away")
            break
        await asyncio.sleep(pause)
        pause = 0.05 if time.monotonic() - began < 2 else 0.2
    if row is None or row.status is not JobStatus.SUCCEEDED:
        return Answer(_result(row) if row else None, 422)
    return _shaped(_result(row))


def _shaped(result: Json) -> Response:
    """A result may say itself with which status and type it is to be answered."""
    if isinstance(result, dict) and {"windmill_status_code", "wm_status_code"} & result.keys():
        status = result.get("windmill_status_code", result.get("wm_status_code"))
        kind = result.get("windmill_content_type", result.get("wm_content_type"))
        inner = result.get("result")
        if not (isinstance(status, int) and 200 <= status <= 599):
            raise HTTPException(500, "windmill_status_code is no HTTP status")
        if isinstance(kind, str) and isinstance(inner, str):
            return Response(inner, status, media_type=kind)
        return Answer(inner, status) if inner is not None else Response(status_code=status)
    return Response(status_code=204) if result is None else Answer(result)


# --- looking ----------------------------------------------------------------------------------------------------------


async def get(desk: Desk, request: Request) -> Response:
    return Answer(_described(await _found(desk, request), desk.config().workspace))


async def get_completed(desk: Desk, request: Request) -> Response:
    found = await _found(desk, request)
    if isinstance(found, Session) or found.status not in FINISHED:
        raise HTTPException(404, "the job is not completed yet")
    return Answer(_described(found, desk.config().workspace))


async def get_root(desk: Desk, request: Request) -> Response:
    """A JSON string: bare text breaks both clients."""
    found = await _found(desk, request)
    return Answer(found.root or (found.job_id if isinstance(found, Session) else found.id))


async def get_result(desk: Desk, request: Request) -> Response:
    found = await _found(desk, request)
    if isinstance(found, Session) or found.status not in FINISHED:
        raise HTTPException(404, "the job is not completed yet")
    return Answer(_result(found))


async def get_result_maybe(desk: Desk, request: Request) -> Response:
    """All four keys, always; 404 for an unknown job, or clients would ask for ever."""
    found = await _found(desk, request)
    if isinstance(found, Session):
        return Answer({"started": True, "completed": False, "success": None, "result": None})
    completed = found.status in FINISHED
    return Answer(
        {
            "started": found.started_at is not None,
            "completed": completed,
            "success": found.status == JobStatus.SUCCEEDED if completed else None,
            "result": _result(found) if completed else None,
        }
    )


async def list_(desk: Desk, request: Request) -> Response:
    """Newest first; ``running``, ``success`` and ``script_path_exact`` choose."""
    query, config = request.query_params, desk.config()
    path = query.get("script_path_exact")
    wanted = {
        JobStatus.RUNNING: query.get("running") == "true",
        JobStatus.QUEUED: query.get("running") == "false",
        JobStatus.SUCCEEDED: query.get("success") == "true",
        JobStatus.FAILED: query.get("success") == "false",
    }
    async with desk.db.read() as tx:
        rows = await store.list(tx, path=path, limit=_number(query.get("per_page"), 100))
    polled = {session.path for session in desk.sessions.all() if session.kind == "watcher"}
    found: list[Json] = [
        _described(row, config.workspace)
        for row in rows
        if (not any(wanted.values()) or wanted.get(row.status))
        # The job that asked for a run is that run: a script that cancels "the others" would cancel itself.
        and not (row.kind == "watcher" and row.status is JobStatus.RUNNING and row.path in polled)
    ]
    known = {each["id"] for each in found}
    if query.get("running") != "false" and "success" not in query:
        for session in desk.sessions.all():
            if session.job_id not in known and path in (None, session.path):
                found.insert(0, _described(session, config.workspace))
    return Answer(found)


def _number(text: str | None, most: int) -> int:
    return min(max(int(text), 1), most) if text and text.isdigit() else most


async def is_draining(desk: Desk, request: Request) -> Response:
    """Whether the service is about to stop, so that a long script may end early."""
    return Answer(desk.draining())


async def no_approvals(desk: Desk, request: Request) -> Response:
    raise HTTPException(404, "watcher has no approvals: a local flow never waits for anybody, so nothing resumes it")


async def no_inline(desk: Desk, request: Request) -> Response:
    raise HTTPException(404, "watcher runs no code out of a request: a script is a file beside the configuration")


async def _found(desk: Desk, request: Request) -> Job | Session:
    id = _uuid(request.path_params["id"])
    row = await desk.states.patiently(partial(desk.jobs.get, id), None)
    if row is not None:
        return row
    if (session := desk.sessions.get(id)) is not None:
        return session
    raise HTTPException(404, "there is no such job")


def _result(found: Job) -> Json:
    if found.status == JobStatus.SUCCEEDED:
        return json.loads(found.result or b"null")
    name = "Canceled" if found.status == JobStatus.CANCELED else "ExecutionErr"
    return {"error": {"name": name, "message": found.error or found.cancel_reason or ""}}


_KINDS = {"flow": "flow", "script": "script", "watcher": "script"}


def _described(found: Job | Session, workspace: str) -> Json:
    if isinstance(found, Session):  # a watcher's run, which is recorded when it ends
        return {
            "id": found.job_id,
            "type": "QueuedJob",
            "workspace_id": workspace,
            "job_kind": _KINDS[found.kind],
            "script_path": found.path,
            "args": {},
            "created_by": "watcher",
            "created_at": when(found.started_at),
            "started_at": when(found.started_at),
            "running": True,
            "canceled": False,
            "parent_job": found.parent,
            "root_job": found.root or found.job_id,
            **_constant(),
        }
    completed = found.status in FINISHED
    described = {
        "id": found.id,
        "type": "CompletedJob" if completed else "QueuedJob",
        "workspace_id": workspace,
        "job_kind": _KINDS.get(found.kind, found.kind),
        "script_path": found.path,
        "args": json.loads(found.args or b"{}"),
        "created_by": "watcher",
        "created_at": when(found.created_at),
        "scheduled_for": when(found.lease_until or found.created_at),
        "started_at": when(found.started_at),
        "running": found.status == JobStatus.RUNNING,
        "additional_properties": {"running": found.status == JobStatus.RUNNING},  # where wmill 1.297 looks for it
        "canceled": found.status == JobStatus.CANCELED,
        "canceled_reason": found.cancel_reason,
        "parent_job": found.parent,
        "root_job": found.root,
        "logs": found.logs,
        **_constant(),
    }
    if completed:
        took = found.finished_at - found.started_at if found.finished_at and found.started_at else None
        described |= {
            "success": found.status == JobStatus.SUCCEEDED,
            "result": _result(found),
            "duration_ms": round(took.total_seconds() * 1000) if took else 0,
        }
    return described


def _constant() -> dict[str, Json]:
    """What older clients insist on, and is always the same here."""
    return {
        "permissioned_as": "u/watcher",
        "is_flow_step": False,
        "is_skipped": False,
        "email": "watcher@localhost",
        "visible_to_owner": True,
        "tag": "default",
    }


# --- changing ---------------------------------------------------------------------------------------------------------


async def cancel(desk: Desk, request: Request) -> Response:
    """200 with the id; 404 for an unknown job. A watcher's own run cannot be canceled: it ends by its timeout."""
    changing(request)
    given = await fields(request)
    found = await _found(desk, request)
    if isinstance(found, Session):
        raise HTTPException(400, "this is a watcher's run: `watcher pause` keeps it from starting again")
    if not await desk.jobs.cancel(found.id, str(given.get("reason") or f"canceled by {who(request).name}")[:500]):
        return said(f"job {found.id} was over already")
    return said(found.id)


async def set_progress(desk: Desk, request: Request) -> Response:
    """0 to 100, kept with the job."""
    percent = (await fields(request)).get("percent")
    if not isinstance(percent, int) or isinstance(percent, bool) or not 0 <= percent <= 100:
        raise HTTPException(400, "percent is a whole number from 0 to 100")
    found = await _found(desk, request)
    if isinstance(found, Session):
        found.check()
        found.progress = percent
        return Answer(None)
    changing(request)
    await desk.db.write(lambda tx: store.set_progress(tx, found.id, percent))
    return Answer(None)


async def get_progress(desk: Desk, request: Request) -> Response:
    return Answer((await _found(desk, request)).progress)


async def set_user_state(desk: Desk, request: Request) -> Response:
    """What the jobs of one root tell each other. Gone when the root job is pruned."""
    value, key, found = await body(request), request.path_params["key"], await _found(desk, request)
    text = json.dumps(value)
    if len(text) > MAX_USER_STATE:
        raise HTTPException(400, f"a user state has {MAX_USER_STATE} characters at most")
    if isinstance(found, Session):
        found.check()
        found.user_states[key] = value
        return said("flow user state updated")
    if (session := job(request)) is not None:
        session.check()
    name = _user_state(found.id, key)

    async def put(tx: Tx) -> None:
        await meta.put(tx, name, text)

    await desk.db.write(put)
    return said("flow user state updated")


async def get_user_state(desk: Desk, request: Request) -> Response:
    """null when nothing was set."""
    key, found = request.path_params["key"], await _found(desk, request)
    if isinstance(found, Session):
        return Answer(found.user_states.get(key))
    async with desk.db.read() as tx:
        text = await meta.get(tx, _user_state(found.id, key))
    return Answer(json.loads(text) if text else None)


def _user_state(id: str, key: str) -> str:
    return f"user_state:{id}:{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"
