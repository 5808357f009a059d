"""Windmill's own endpoints, as its clients and its webhooks use them: text/plain errors, ids as bare text.

Source: the wire as Windmill's published clients speak it.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from watcher.jobs import NoSuchFlow
from watcher.values import JobStatus, Json

if TYPE_CHECKING:
    from watcher.jobs import Jobs
    from watcher.store.jobs import Job

Endpoint = Callable[[Request], Awaitable[Response]]
_FINISHED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELED)


def routes(jobs: Jobs, workspace: Callable[[], str]) -> list[BaseRoute]:
    """The routes under ``/api/w/{workspace}``; any other workspace is 404."""

    def within(scope: Callable[[Request], str], endpoint: Endpoint) -> Endpoint:
        async def checked(request: Request) -> Response:
            if request.path_params["workspace"] != workspace():
                raise HTTPException(404, "there is no such workspace")
            if not request.scope["principal"].may(scope(request)):
                raise HTTPException(403, f"this token may not {scope(request)}")
            return await endpoint(request)

        return checked

    async def run_flow(request: Request) -> Response:
        job_id = _uuid(request.query_params.get("job_id") or str(uuid4()))
        try:
            new = await jobs.create(
                job_id,
                request.path_params["path"],
                _arguments(await request.body()),
                parent=request.query_params.get("parent_job"),
                root=request.query_params.get("root_job"),
            )
        except NoSuchFlow as error:
            raise HTTPException(404, str(error)) from error
        return PlainTextResponse(job_id, 201 if new else 200)

    async def get(request: Request) -> Response:
        return JSONResponse(_described(await found(request), workspace()))

    async def get_result(request: Request) -> Response:
        job = await found(request)
        if job.status not in _FINISHED:
            raise HTTPException(404, "the job is not completed yet")
        return JSONResponse(_result(job))

    async def get_result_maybe(request: Request) -> Response:
        job = await found(request)
        completed = job.status in _FINISHED
        return JSONResponse(
            {
                "started": job.started_at is not None,
                "completed": completed,
                "success": job.status == JobStatus.SUCCEEDED if completed else None,
                "result": _result(job) if completed else None,
            }
        )

    async def found(request: Request) -> Job:
        job = await jobs.get(_uuid(request.path_params["id"]))
        if job is None:
            raise HTTPException(404, "there is no such job")
        return job

    def run(request: Request) -> str:
        return f"jobs:run:flows:{request.path_params['path']}"

    def read(_: Request) -> str:
        return "jobs:read"

    base = "/api/w/{workspace}"
    return [
        Route(f"{base}/jobs/run/f/{{path:path}}", within(run, run_flow), methods=["POST"]),
        Route(f"{base}/jobs_u/get/{{id}}", within(read, get)),
        Route(f"{base}/jobs_u/completed/get_result/{{id}}", within(read, get_result)),
        Route(f"{base}/jobs_u/completed/get_result_maybe/{{id}}", within(read, get_result_maybe)),
    ]


def _uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        raise HTTPException(400, "a job id is a UUID") from None


def _arguments(body: bytes) -> dict[str, Json]:
    """The body as named arguments; a value that is no object becomes the argument ``body``, as in Windmill."""
    try:
        value = json.loads(body or b"{}", parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from error
    return value if isinstance(value, dict) else {"body": value}


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")


def _result(job: Job) -> Json:
    if job.status == JobStatus.SUCCEEDED:
        return json.loads(job.result or b"null")
    name = "Canceled" if job.status == JobStatus.CANCELED else "ExecutionErr"
    return {"error": {"name": name, "message": job.error or job.cancel_reason or ""}}


def _described(job: Job, workspace: str) -> Json:
    completed = job.status in _FINISHED
    described = {
        "id": job.id,
        "type": "CompletedJob" if completed else "QueuedJob",
        "workspace_id": workspace,
        "job_kind": job.kind,
        "script_path": job.path,
        "args": json.loads(job.args or b"{}"),
        "created_by": "watcher",
        "created_at": _time(job.created_at),
        "started_at": _time(job.started_at),
        "running": job.status == JobStatus.RUNNING,
        "canceled": job.status == JobStatus.CANCELED,
        "canceled_reason": job.cancel_reason,
        "parent_job": job.parent,
        "root_job": job.root,
        "logs": job.logs,
    }
    if completed:
        took = job.finished_at - job.started_at if job.finished_at and job.started_at else None
        described |= {
            "success": job.status == JobStatus.SUCCEEDED,
            "result": _result(job),
            "duration_ms": round(took.total_seconds() * 1000) if took else 0,
        }
    return described


def _time(at: datetime | None) -> str | None:
    return at.isoformat().replace("+00:00", "Z") if at else None
