"""Windmill's endpoints for files over a folder, without a socket: who may, what is answered, what is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from watcher.objects import Objects
from watcher.resolve import Resolver
from watcher.server import site, windmill
from watcher.server.guard import JOB_SCOPES, Principal
from watcher.server.windmill import Desk
from watcher.staging import Session
from watcher.store import resources
from watcher.store.db import Database
from watcher.values import Config, FileResource, StorageRule, StorageSettings


def now() -> datetime:
    return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def job(**changes: Any) -> Session:
    return Session("watcher", "w", "w/state", now(), **changes)


TOKENS = {
    "root": Principal("root", ("*",)),
    "anna": Principal("anna", ("objects", "resources:write:f/news")),
    "reader": Principal("reader", ("objects:read", "resources:read")),
    "other": Principal("other", ("jobs",)),
    "job": Principal("job 1", JOB_SCOPES, job()),
    "plan": Principal("job 2", JOB_SCOPES, job(dry=True)),
    "over": Principal("job 3", JOB_SCOPES, job(over=True)),
}


async def authenticate(token: str) -> Principal | None:
    return TOKENS.get(token)


class Place:
    """The endpoints over two folders. Nearly all of them need no database: it takes a second to make."""

    def __init__(self, where: Path, db: Database | None = None) -> None:
        self.root, self.archive = where / "objects", where / "archive"
        everybody = (StorageRule("open/**", frozenset({"read", "list"})),)
        self.config = Config(
            None, "", where,
            storages={
                "_default_": StorageSettings("_default_", path=self.root),
                "archive": StorageSettings("archive", path=self.archive, permissions=everybody),
            },
            resources={"u/admin/db": FileResource("postgresql", {}), "f/news/s3": FileResource("s3", {})},
            max_upload=1_000_000,
        )  # fmt: skip
        database = cast(Database, db)
        resolver = Resolver(lambda: self.config, database, None, environ={})
        objects = Objects(lambda: self.config, resolver.resource)
        desk = Desk(lambda: self.config, database, now, cast(Any, None), resolver, objects=objects)
        self.application = site.application(
            windmill.routes(desk), authenticate=authenticate, public=(), hosts=site.hosts(None)
        )

    async def ask(self, token: str, method: str, path: str, body: Any = None, **params: str) -> httpx.Response:
        transport = httpx.ASGITransport(self.application, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(
                method,
                f"/api/w/main/job_helpers/{path}",
                content=body,
                params=params,
                headers={"authorization": f"Bearer {token}"},
            )

    async def put(self, token: str, key: str, body: Any = b"x", **params: str) -> httpx.Response:
        return await self.ask(token, "POST", "upload_s3_file", body, file_key=key, **params)

    async def get(self, token: str, key: str, **params: str) -> httpx.Response:
        return await self.ask(token, "GET", "download_s3_file", file_key=key, **params)

    def files(self) -> list[str]:
        return sorted(str(file.relative_to(self.root)) for file in self.root.rglob("*") if file.is_file())


@pytest.fixture
def here(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def test_what_was_uploaded_comes_back_with_its_type_and_never_as_a_page(here: Place) -> None:
    done = await here.put("root", "a/ü.html", b"<h1>", content_type="text/html")
    assert (done.status_code, done.json()) == (200, {"file_key": "a/ü.html"})
    got = await here.get("root", "a/ü.html")
    assert (got.content, got.headers["content-type"], got.headers["content-length"]) == (b"<h1>", "text/html", "4")
    assert got.headers["content-disposition"].startswith("attachment")
    assert "sandbox" in got.headers["content-security-policy"]
    head = await here.ask("root", "HEAD", "download_s3_file", file_key="a/ü.html")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "4")


async def test_a_key_is_made_up_when_there_is_none(here: Place) -> None:
    done = await here.ask("job", "POST", "upload_s3_file", b"1,2", content_type="text/csv")
    key = done.json()["file_key"]
    assert key.startswith("windmill_uploads/upload_1767323045000_")
    assert key.endswith(".csv")
    assert (await here.get("job", key)).content == b"1,2"


@pytest.mark.parametrize("key", ["/a", "../a", "a/../../b", "a//b", "a/", "a\\b", "a\x00b", "x" * 1025])
async def test_a_key_that_leads_elsewhere_is_400_as_text(here: Place, key: str) -> None:
    for answer in (await here.put("root", key), await here.get("root", key)):
        assert answer.status_code == 400, key
        assert answer.headers["content-type"].startswith("text/plain")
    assert not here.root.exists()


async def test_a_missing_object_is_404_however_it_is_asked_for(here: Place) -> None:
    for method, path in (
        ("GET", "download_s3_file"), ("GET", "load_file_metadata"), ("GET", "load_file_preview"),
        ("DELETE", "delete_s3_file"),
    ):  # fmt: skip
        answer = await here.ask("root", method, path, file_key="a/b")
        assert (answer.status_code, answer.text) == (404, "there is no object a/b"), path


async def test_no_storage_and_no_such_storage(here: Place) -> None:
    answer = await here.get("root", "a", storage="backup")
    assert (answer.status_code, answer.text) == (
        404, "there is no storage backup: add [storage.secondary.backup] (known: archive)",
    )  # fmt: skip
    here.config = Config(None, "", here.root)
    answer = await here.get("root", "a")
    assert (answer.status_code, answer.text) == (500, "No files storage resource defined at the workspace level")


@pytest.mark.parametrize("name", ["_default_", "", "null", "undefined", "None"])
async def test_what_is_no_name_is_the_primary_storage(here: Place, name: str) -> None:
    await here.put("root", "a", b"1", storage=name)
    assert here.files() == ["a"]


async def test_a_secondary_storage_by_its_name(here: Place) -> None:
    await here.put("root", "open/a", b"1", storage="archive")
    assert (here.archive / "open/a").read_bytes() == b"1"
    assert (await here.get("anna", "open/a", storage="archive")).content == b"1"
    answer = await here.put("anna", "open/a", b"2", storage="archive")
    assert answer.status_code == 403
    assert "anna may not write open/a in storage archive" in answer.text
    assert "[storage.secondary.archive]" in answer.text


@pytest.mark.parametrize(
    ("token", "key", "put", "got"),
    [
        ("anna", "u/anna/x", 200, 200),
        ("anna", "u/root/x", 403, 403),
        ("anna", "f/news/x", 200, 200),
        ("anna", "f/other/x", 403, 403),
        ("anna", "x", 403, 403),
        ("reader", "f/news/x", 403, 200),
        ("reader", "u/reader/x", 403, 200),
        ("other", "u/other/x", 403, 403),
        ("job", "f/news/x", 200, 200),
        ("job", "u/watcher/x", 200, 200),
        ("job", "g/all/x", 200, 200),
        ("job", "output/result.parquet", 200, 200),
        ("job", "u/anna/x", 403, 403),
        ("job", "watcher/states/x", 403, 403),
        ("plan", "f/news/x", 403, 200),
        ("over", "f/news/x", 409, 200),
    ],
)
async def test_who_may(here: Place, token: str, key: str, put: int, got: int) -> None:
    await here.put("root", key, b"old")
    assert (await here.put(token, key, b"new")).status_code == put
    assert (await here.get(token, key)).status_code == got
    kept = await here.get("root", key)
    assert kept.content == (b"new" if put == 200 else b"old")
    assert (await here.ask(token, "DELETE", "delete_s3_file", file_key=key)).status_code == put


async def test_listings_show_what_the_token_may_list(here: Place) -> None:
    for key in ("u/anna/a", "u/anna/b", "u/anna/c/d", "u/root/a", "windmill_uploads/x"):
        await here.put("root", key)
    answer = await here.ask("anna", "GET", "list_stored_files", max_keys="2")
    assert answer.json() == {
        "windmill_large_files": [{"s3": "u/anna/a"}, {"s3": "u/anna/b"}],
        "restricted_access": False,
        "next_marker": "u/anna/b",
    }
    rest = await here.ask("anna", "GET", "list_stored_files", max_keys="2", marker="u/anna/b")
    assert rest.json() == {"windmill_large_files": [{"s3": "u/anna/c/d"}], "restricted_access": False}
    by_root = await here.ask("root", "GET", "list_stored_files", max_keys="10", prefix="u/r")
    assert by_root.json()["windmill_large_files"] == [{"s3": "u/root/a"}]
    level = (await here.ask("anna", "GET", "list_stored_files_paged", prefix="u/anna/")).json()
    assert level["folders"] == [{"prefix": "u/anna/c/", "name": "c"}]
    assert [file["name"] for file in level["files"]] == ["a", "b"]
    above = (await here.ask("anna", "GET", "list_stored_files_paged", prefix="u/")).json()
    assert [folder["name"] for folder in above["folders"]] == ["anna"]
    assert (await here.ask("root", "GET", "list_stored_files", prefix="../")).status_code == 400


async def test_metadata_and_the_start_of_a_text(here: Place) -> None:
    await here.put("root", "a.csv", b"a,b\n1,2\n")
    meta = (await here.ask("root", "GET", "load_file_metadata", file_key="a.csv")).json()
    assert (meta["size_in_bytes"], meta["mime_type"]) == (8, "text/csv")
    shown = await here.ask("root", "GET", "load_file_preview", file_key="a.csv", read_bytes_length="3")
    assert shown.json() == {"content_type": "Csv", "content": "a,b", "msg": None}
    await here.put("root", "x.bin", b"\0\1")
    assert (await here.ask("root", "GET", "load_file_preview", file_key="x.bin")).json()["content_type"] == "Unknown"
    await here.put("root", "empty", b"")
    assert (await here.ask("root", "GET", "load_file_preview", file_key="empty")).json()["content"] == ""


async def test_an_object_moves_where_the_token_may_write(here: Place) -> None:
    await here.put("anna", "u/anna/a", b"1", content_type="text/x-odd")
    moved = await here.ask("anna", "GET", "move_s3_file", src_file_key="u/anna/a", dest_file_key="f/news/a")
    assert moved.status_code == 200
    assert here.files() == ["f/news/a"]
    assert (await here.get("root", "f/news/a")).headers["content-type"] == "text/x-odd"
    refused = await here.ask("anna", "GET", "move_s3_file", src_file_key="f/news/a", dest_file_key="u/root/a")
    assert refused.status_code == 403
    assert here.files() == ["f/news/a"]


async def test_an_upload_above_the_bound_is_413_and_leaves_nothing(here: Place) -> None:
    told = await here.put("root", "a", b"x" * 1_000_001)

    async def untold() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x" * 100_000

    streamed = await here.put("root", "b", untold())
    for answer in (told, streamed):
        assert (answer.status_code, answer.text) == (413, "more than 1000000 bytes: raise max_upload in [storage]")
    assert here.files() == []
    assert (await here.put("root", "c", b"x" * 1_000_000)).status_code == 200


async def test_a_client_that_goes_away_in_the_middle_leaves_nothing(here: Place) -> None:
    await here.put("root", "a", b"old")
    messages = [
        {"type": "http.request", "body": b"x" * 400_000, "more_body": True},
        {"type": "http.request", "body": b"x" * 400_000, "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def send(_: Any) -> None:
        pass

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/api/w/main/job_helpers/upload_s3_file", "raw_path": b"", "query_string": b"file_key=a",
        "headers": [(b"host", b"127.0.0.1"), (b"authorization", b"Bearer root")],
    }  # fmt: skip
    async with asyncio.timeout(10):
        await here.application(scope, receive, send)
    assert here.files() == ["a"]
    assert (await here.get("root", "a")).content == b"old"


@pytest.mark.parametrize("value", ["a\nb: c", "ü", "x" * 1001])
async def test_a_type_that_is_no_header_is_400(here: Place, value: str) -> None:
    assert (await here.put("root", "a", content_type=value)).status_code == 400


async def test_a_storage_by_its_resource_takes_the_right_to_read_it(sqlite_db: Database, tmp_path: Path) -> None:
    here = Place(tmp_path, sqlite_db)

    async def asked(token: str, path: str) -> tuple[int, str]:
        answer = await here.get(token, "a", s3_resource_path=path)
        return answer.status_code, answer.text

    assert (await asked("anna", "$res:u/admin/db")) == (403, "this token may not resources:read:u/admin/db")
    assert (await asked("root", "u/admin/db"))[1] == (
        "a resource of type postgresql is no object storage: s3, azure_blob or gcs"
    )
    assert (await asked("root", "u/admin/none")) == (404, "there is no resource u/admin/none")
    assert (await asked("anna", "f/news/s3")) == (502, "the resource of the storage has no bucket")
    await sqlite_db.write(lambda tx: resources.put(tx, "u/me/s3", "s3", {"bucket": 3}, now()))
    assert (await asked("job", "u/me/s3"))[0] == 502


async def test_another_workspace_and_no_token_are_refused(here: Place) -> None:
    assert (await here.get("nobody", "a")).status_code == 401
    assert (await here.ask("root", "GET", "nothing_of_the_kind")).status_code == 404


async def test_a_connection_is_tested(here: Place) -> None:
    answer = await here.ask("reader", "GET", "test_connection", storage="archive")
    assert (answer.status_code, answer.text) == (200, "the storage archive (folder) answers")
