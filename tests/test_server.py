"""The HTTP side: who may ask what, and Windmill's endpoints as its clients know them."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.support.scripts import write
from watcher.errors import StoreError
from watcher.http.fetcher import Fetcher
from watcher.jobs import Jobs
from watcher.objects import Objects
from watcher.resolve import Resolver
from watcher.scripts import Scripts
from watcher.server import CannotListen, Listener, api, bind, site, url, windmill
from watcher.server.figures import Figures
from watcher.server.guard import MAX_BODY, Principal, same
from watcher.server.windmill import Desk
from watcher.store import jobs as job_store
from watcher.store.db import Database
from watcher.values import Config, Flow, HttpSettings, JobStatus, Json, ScriptSettings, Server

T = TypeVar("T")
TOKENS = {
    "all": Principal("all", ("*",)),
    "runner": Principal("runner", ("jobs:run:flows:announce",)),
    "reader": Principal("reader", ("jobs:read",)),
    "nobody": Principal("nobody", ()),
}


def now() -> datetime:
    return datetime.now(UTC)


async def authenticate(token: str) -> Principal | None:
    if token == "broken":
        raise StoreError("the database does not answer")
    return TOKENS.get(token)


class Site:
    """The application without a socket, and the jobs behind it; nothing runs them unless a test does."""

    def __init__(
        self, db: Database, where: Path, scripts: Scripts, fetcher: Fetcher, hosts: Collection[str] | None
    ) -> None:
        steps = (write(where, "def main(item): return item", "echo.py"),)
        flows = {name: Flow(name=name, steps=steps) for name in ("announce", "f/news/summarise")}
        self.config = Config(
            file=None, database=db.url, data=where / "data", flows={**flows, "web": Flow(name="web", url="http://x")}
        )
        resolver = Resolver(lambda: self.config, db, None, environ={})
        self.db = db
        self.jobs = Jobs(lambda: self.config, db, scripts, fetcher, resolver, now)
        self.ready: tuple[bool, Json] = (True, {"ready": True})
        figures = Figures(db, now, lambda: self.config, lambda name: None)
        objects = Objects(lambda: self.config, resolver.resource)
        desk = Desk(lambda: self.config, db, now, self.jobs, resolver, objects=objects)
        self.application = site.application(
            [
                *api.routes(self.readiness, figures.text),
                *windmill.routes(desk),
            ],
            authenticate=authenticate,
            hosts=hosts,
        )
        self.client = self.as_("all")

    async def readiness(self) -> tuple[bool, Json]:
        return self.ready

    def as_(self, token: str | None) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.application, raise_app_exceptions=False),
            base_url="http://127.0.0.1",
            headers={"authorization": f"Bearer {token}"} if token else {},
        )


@pytest.fixture
async def here(sqlite_db: Database, tmp_path: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        scripts, fetcher = Scripts(ScriptSettings(workers=2)), Fetcher(HttpSettings(), now)
        stack.push_async_callback(scripts.close)
        stack.push_async_callback(fetcher.close)
        found = Site(sqlite_db, tmp_path, scripts, fetcher, site.hosts(Server()))
        stack.push_async_callback(found.client.aclose)
        yield found


RUN = "/api/w/main/jobs/run/f/announce"


# --- how it is ---


async def test_health_needs_no_token_and_readiness_says_why_not(here: Site) -> None:
    anybody = here.as_(None)
    assert (await anybody.get("/healthz")).text == "ok"
    assert (await anybody.get("/readyz")).status_code == 200
    here.ready = (False, {"ready": False, "database": "full"})
    answer = await anybody.get("/readyz")
    assert (answer.status_code, answer.json()["database"]) == (503, "full")


async def test_metrics_name_every_flow_even_one_that_is_owed_nothing(here: Site) -> None:
    answer = await here.as_(None).get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'watcher_outbox_pending{flow="announce"} 0.0' in answer.text
    assert "watcher_database_up 1.0" in answer.text


async def test_metrics_survive_a_database_that_does_not_answer(here: Site) -> None:
    await here.db._readers.dispose()
    here.db.path.rename(here.db.path.with_suffix(".gone"))
    answer = await here.as_(None).get("/metrics")
    assert answer.status_code == 200
    assert "watcher_database_up 0.0" in answer.text
    here.db.path.with_suffix(".gone").rename(here.db.path)


# --- who may ---


@pytest.mark.parametrize("path", [RUN, "/api/w/main/jobs_u/get/x", "/", "/nowhere", "/metrics/", "/healthz/x"])
@pytest.mark.parametrize("header", [None, "Bearer", "Bearer ", "Bearer wrong", "Basic YTph", "wrong", "bearer  "])
async def test_everything_else_is_denied_without_a_token_whether_it_exists_or_not(
    here: Site, path: str, header: str | None
) -> None:
    headers = {"authorization": header} if header is not None else {}
    for method in ("GET", "POST"):
        answer = await here.as_(None).request(method, path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["content-type"].startswith("text/plain")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("token", "path", "status"),
    [
        ("runner", RUN, 201),
        ("runner", "/api/w/main/jobs/run/f/f/news/summarise", 403),
        ("reader", RUN, 403),
        ("nobody", RUN, 403),
        ("all", RUN, 201),
    ],
)
async def test_a_token_runs_only_what_it_is_for(here: Site, token: str, path: str, status: int) -> None:
    assert (await here.as_(token).post(path, json={})).status_code == status


@pytest.mark.parametrize(("token", "status"), [("reader", 404), ("runner", 403), ("all", 404)])
async def test_a_token_reads_only_when_it_may(here: Site, token: str, status: int) -> None:
    assert (await here.as_(token).get(f"/api/w/main/jobs_u/get/{uuid4()}")).status_code == status


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        (["jobs:run:flows:a"], True),
        (["jobs:run"], True),
        (["jobs:run:flows:*"], True),
        (["jobs:run:flows:aa"], False),
        (["jobs:ru"], False),
        (["job"], False),
        ([""], False),
        (["jobs:read"], False),
        ([], False),
        (["*"], True),
    ],
)
def test_a_scope_covers_what_begins_with_it_word_by_word(scopes: list[str], allowed: bool) -> None:
    assert Principal("t", tuple(scopes)).may("jobs:run:flows:a") is allowed


def test_a_scope_of_a_folder_covers_what_is_in_it() -> None:
    folder = Principal("t", ("jobs:run:flows:f/news/*",))
    assert folder.may("jobs:run:flows:f/news/summarise")
    assert not folder.may("jobs:run:flows:f/newspaper")


def test_tokens_are_compared_whole() -> None:
    assert same("a" * 40, "a" * 40)
    assert not same("a" * 40, "a" * 39)
    assert not same("\udc80", "a")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil:80", "[::2]"])
async def test_a_browser_that_was_led_here_by_another_name_is_refused(here: Site, host: str) -> None:
    answer = await here.client.get("/healthz", headers={"host": host})
    assert answer.status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8321", "[::1]:8321", "LOCALHOST"])
async def test_our_own_names_are_answered(here: Site, host: str) -> None:
    assert (await here.client.get("/healthz", headers={"host": host})).status_code == 200


def test_a_server_that_listens_to_the_world_has_any_name() -> None:
    assert site.hosts(Server("0.0.0.0:80")) is None
    assert {*(site.hosts(Server("127.0.0.1:80", ("watcher.example.com",))) or ())} >= {
        "localhost",
        "watcher.example.com",
    }
    assert "any.example.com" not in (site.hosts(Server("0.0.0.0:80", ("watcher.example.com",))) or ())
    assert site.hosts(Server("[::1]:80")) is not None


async def test_a_database_that_does_not_answer_is_503_and_not_no_such_thing(here: Site) -> None:
    answer = await here.as_("broken").post(RUN, json={})
    assert answer.status_code == 503
    assert "does not answer" in answer.text


# --- what comes in ---


async def test_a_body_of_two_megabytes_is_taken_and_a_larger_one_is_not(here: Site) -> None:
    fits = json.dumps({"text": "x" * (MAX_BODY - 20)}).encode()
    assert (await here.client.post(RUN, content=fits)).status_code == 201
    answer = await here.client.post(RUN, content=b"x" * (MAX_BODY + 1))
    assert answer.status_code == 413

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 65536

    assert (await here.client.post(RUN, content=chunks())).status_code == 413


async def test_headers_without_end_are_cut_off_and_large_bodies_are_not(here: Site) -> None:
    listener = bind("127.0.0.1", 0)
    server = Listener(here.application, listener)
    await server.start()
    try:
        reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n")
        writer.write(b"".join(b"x-%d: %b\r\n" % (n, b"x" * 8000) for n in range(9)))
        assert (await reader.read()).startswith(b"HTTP/1.1 431 ")
        writer.close()
        async with httpx.AsyncClient(base_url=url(listener), headers={"authorization": "Bearer all"}) as client:
            for size in (10, 70_000, 500_000, 10):  # one connection: what a body held is not taken for headers
                answer = await client.post(RUN, content=json.dumps({"text": "x" * size}).encode())
                assert answer.status_code == 201
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/w/main/attics/list"),
        ("GET", "/api/w/main/resources"),
        ("GET", "/api/w/main"),
        ("GET", "/api/w//resources/list"),
        ("GET", "/api/workspaces"),
        ("PUT", "/api/w/main/resources/create"),
        ("GET", "/api/x/main/resources/list"),
    ],
)
async def test_what_watcher_has_not_is_told_in_words(here: Site, method: str, path: str) -> None:
    answer = await here.client.request(method, path)
    assert (answer.status_code, answer.text) == (404, f"watcher has no {method} {path}: see docs/windmill.md")


async def test_a_method_that_a_route_has_not_and_a_workspace_that_is_not_here(here: Site) -> None:
    assert (await here.client.options("/api/w/main/resources/list")).status_code == 405
    answer = await here.client.get("/api/w/elsewhere/resources/list")
    assert (answer.status_code, answer.text) == (404, "there is no such workspace")


async def answered_by(application: ASGIApp, ask: Callable[[socket.socket], T]) -> T:
    """What somebody makes of the answers on one connection, in a thread of its own."""
    listener = bind("127.0.0.1", 0)
    server = Listener(application, listener)
    await server.start()
    try:

        def talk() -> T:
            with socket.create_connection(listener.getsockname()[:2], timeout=20) as connection:
                return ask(connection)

        return await asyncio.to_thread(talk)
    finally:
        await server.stop()


async def test_a_short_answer_is_one_segment_on_the_wire(here: Site) -> None:
    def ask(connection: socket.socket) -> list[int]:
        pieces = []
        for method, wanted in (("GET", b"ok"), ("HEAD", b"\r\n\r\n"), ("GET", b"ok")):
            before = data_segments(connection)
            connection.sendall(f"{method} /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
            answer = b""
            while not answer.endswith(wanted):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")
            pieces.append(data_segments(connection) - before)
        return pieces

    assert await answered_by(here.application, ask) == [1, 1, 1]


async def test_whoever_waits_for_a_go_ahead_and_is_refused_gets_a_new_connection(here: Site) -> None:
    """What such a client asks next would be taken for the body that it never sent."""

    def ask(token: str, body: bytes) -> Callable[[socket.socket], list[bytes]]:
        def asked(connection: socket.socket) -> list[bytes]:
            head = f"POST {RUN} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {token}\r\ncontent-length: 2\r\n"
            connection.sendall(head.encode() + b"expect: 100-continue\r\n\r\n")
            said = [connection.recv(65536)]
            connection.sendall(body)
            said.append(connection.recv(65536))
            return said

        return asked

    refused, end = await answered_by(here.application, ask("unknown", b""))
    assert refused.startswith(b"HTTP/1.1 401 ")
    assert b"\r\nconnection: close\r\n" in refused.lower()
    assert end == b""
    go_on, done = await answered_by(here.application, ask("all", b"{}"))
    assert go_on.startswith(b"HTTP/1.1 100 ")
    assert done.startswith(b"HTTP/1.1 201 ")
    assert b"connection: close" not in done.lower()


def data_segments(connection: socket.socket) -> int:
    """How many segments with data a connection received: tcpi_data_segs_in of the kernel's struct tcp_info."""
    return int.from_bytes(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)[152:156], sys.byteorder)


async def test_a_head_does_not_wait_for_a_body_that_is_long_in_coming() -> None:
    go_on = threading.Event()

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        head = [(b"content-type", b"application/octet-stream"), (b"content-length", b"300000")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await asyncio.to_thread(go_on.wait)  # until the head was seen
        for _ in range(2):
            await send({"type": "http.response.body", "body": b"x" * 150_000, "more_body": True})
        await send({"type": "http.response.body"})

    def ask(connection: socket.socket) -> tuple[bytes, bytes]:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        head = connection.recv(65536)
        go_on.set()
        rest = b""
        while part := connection.recv(65536):
            rest += part
        return head, rest

    head, rest = await answered_by(application, ask)
    assert head.endswith(b"\r\n\r\n")
    assert rest == b"x" * 300_000


@pytest.mark.parametrize("came", [b"", b'{"id": ', b'{"id": "k1"}'], ids=["nothing", "half", "all but its end"])
async def test_a_sender_that_dies_before_its_body_is_read_starts_nothing(here: Site, came: bytes) -> None:
    id, whole = str(uuid4()), b'{"id": "k1"}'
    messages = [{"type": "http.request", "body": came, "more_body": True}] if came else []
    told = []

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        told.append(message)

    head = {"host": "127.0.0.1", "authorization": "Bearer all", "content-length": str(len(whole))}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": RUN,
        "raw_path": RUN.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": f"job_id={id}".encode(),
        "headers": [(name.encode(), value.encode()) for name, value in head.items()],
    }
    await here.application(scope, receive, send)
    assert not told
    again = await here.client.post(RUN, params={"job_id": id}, content=whole)
    assert again.status_code == 201, "the same request, sent again, is the first that is known"
    assert (await here.client.get(f"/api/w/main/jobs_u/get/{id}")).json()["args"] == {"id": "k1"}


@pytest.mark.parametrize("body", [b"{", b"[1,", b"nul", b"\xff", b'{"a": NaN}', b"[" * 100_000])
async def test_a_body_that_is_not_json_is_told_so(here: Site, body: bytes) -> None:
    answer = await here.client.post(RUN, content=body)
    assert answer.status_code == 400
    assert "JSON" in answer.text


@pytest.mark.parametrize(
    ("body", "args"),
    [(b'{"a": 1}', {"a": 1}), (b"", {}), (b"[1]", {"body": [1]}), (b'"x"', {"body": "x"}), (b"null", {"body": None})],
)
async def test_what_is_no_object_becomes_the_argument_body(here: Site, body: bytes, args: Json) -> None:
    answer = await here.client.post(RUN, content=body)
    job = await here.jobs.get(answer.text)
    assert job is not None
    assert json.loads(job.args) == args


# --- windmill ---


async def test_a_new_job_is_201_with_its_bare_id_and_the_same_id_again_200(here: Site) -> None:
    id = str(uuid4())
    first = await here.client.post(f"{RUN}?job_id={id}", json={"n": 1})
    again = await here.client.post(f"{RUN}?job_id={id.upper()}", json={"n": 2})
    assert (first.status_code, first.text) == (201, id)
    assert (again.status_code, again.text) == (200, id)
    assert first.headers["content-type"].startswith("text/plain")
    job = await here.jobs.get(id)
    assert job is not None
    assert json.loads(job.args) == {"n": 1}


@pytest.mark.parametrize(
    "path", ["/api/w/main/jobs/run/f/f/news/summarise", "/api/w/main/jobs/run/f/f%2Fnews%2Fsummarise"]
)
async def test_a_path_with_slashes_is_found_however_it_is_written(here: Site, path: str) -> None:
    assert (await here.client.post(path, json={})).status_code == 201


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/w/other/jobs/run/f/announce", 404),
        ("/api/w/main/jobs/run/f/nowhere", 404),
        ("/api/w/main/jobs/run/f/web", 404),
        (f"{RUN}?job_id=7", 400),
        ("/api/w/main/jobs/run/p/announce", 404),
    ],
)
async def test_what_cannot_be_run_is_refused_in_plain_text(here: Site, path: str, status: int) -> None:
    answer = await here.client.post(path, json={})
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/plain")


async def test_a_job_is_described_while_it_waits_and_after_it_ended(here: Site) -> None:
    id = str(uuid4())
    await here.client.post(f"{RUN}?job_id={id}", json={"n": 1})
    waiting = (await here.client.get(f"/api/w/main/jobs_u/get/{id}")).json()
    assert (waiting["type"], waiting["running"], waiting["parent_job"]) == ("QueuedJob", False, None)
    maybe = (await here.client.get(f"/api/w/main/jobs_u/completed/get_result_maybe/{id}")).json()
    assert maybe == {"started": False, "completed": False, "success": None, "result": None}
    assert (await here.client.get(f"/api/w/main/jobs_u/completed/get_result/{id}")).status_code == 404

    stop = asyncio.Event()
    serving = asyncio.create_task(here.jobs.serve(stop))
    async with asyncio.timeout(30):
        while not maybe["completed"]:
            maybe = (await here.client.get(f"/api/w/main/jobs_u/completed/get_result_maybe/{id}")).json()
            await asyncio.sleep(0.02)
    stop.set()
    await serving
    assert maybe == {"started": True, "completed": True, "success": True, "result": {"n": 1}}
    done = (await here.client.get(f"/api/w/main/jobs_u/get/{id}")).json()
    assert (done["type"], done["success"], done["result"]) == ("CompletedJob", True, {"n": 1})
    assert done["duration_ms"] >= 0
    assert (await here.client.get(f"/api/w/main/jobs_u/completed/get_result/{id}")).json() == {"n": 1}


async def test_a_failed_job_has_the_result_that_windmills_clients_expect(here: Site) -> None:
    id = str(uuid4())
    await here.client.post(f"{RUN}?job_id={id}", json={})
    await here.db.write(lambda tx: job_store.claim(tx, "me", limit=1, now=now(), lease=timedelta(minutes=1)))
    await here.db.write(lambda tx: job_store.finish(tx, id, "me", JobStatus.FAILED, error="raised: no", now=now()))
    maybe = (await here.client.get(f"/api/w/main/jobs_u/completed/get_result_maybe/{id}")).json()
    assert maybe["success"] is False
    assert maybe["result"] == {"error": {"name": "ExecutionErr", "message": "raised: no"}}


# --- the socket ---


async def test_the_listener_answers_over_a_real_socket_and_stops(here: Site) -> None:
    sock = bind("127.0.0.1", 0)
    listener = Listener(here.application, sock)
    await listener.start()
    address = url(sock)
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{address}/healthz")).text == "ok"
    await listener.stop()
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{address}/healthz")


@pytest.mark.parametrize(("host", "start"), [("0.0.0.0", "http://127.0.0.1:"), ("127.0.0.1", "http://127.0.0.1:")])
def test_this_machine_reaches_a_server_that_listens_everywhere(host: str, start: str) -> None:
    with bind(host, 0) as sock:
        assert url(sock).startswith(start)


def test_an_address_that_is_taken_or_not_ours_is_told_with_the_option_to_change() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(CannotListen, match=r"server\.bind.*in use"):
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(CannotListen, match=r"server\.bind"):
        bind("192.0.2.1", 0)


def test_an_ipv6_address_is_written_in_brackets() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        sock = bind("::1", 0)
    except CannotListen:
        pytest.skip("no IPv6 loopback here")
    with sock:
        assert url(sock).startswith("http://[::1]:")
