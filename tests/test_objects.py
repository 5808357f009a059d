"""Object storage without a cloud: keys, permissions, the folder kind, and how resources and errors are read."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from watcher.errors import ObjectsError, ResolveError
from watcher.objects import DEFAULT, EVERY, S3Object, Who, allowed, bounded, cloud, new_key, parse_key, parse_prefix
from watcher.objects import permissions as rules
from watcher.objects.folder import UPLOADS, Folder
from watcher.objects.storage import Objects, Storage
from watcher.values import Config, StorageRule, StorageSettings

# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a", "a/b.txt", "ü/日本 ~%20+?#.x", ".hidden/..a/b..", "a" * 1024])
def test_a_key_that_every_storage_takes(key: str) -> None:
    assert parse_key(key) == key


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("", "empty"),
        ("/path/to/file.txt", "write path/to/file.txt"),
        ("a/", "folder"),
        ("a//b", "empty part"),
        ("..", "none"),
        ("a/../b", "none"),
        ("./a", "none"),
        ("a\\..\\b", "backslash"),
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("a\ud800b", "control"),
        ("é" * 513, "1024"),
        (None, "text"),
        (3, "text"),
    ],
)
def test_a_key_that_none_takes_says_why(key: Any, says: str) -> None:
    with pytest.raises(ObjectsError, match=says) as caught:
        parse_key(key)
    assert caught.value.kind == "bad_key"


@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/b", "a/.", "a/.."])
def test_a_prefix_is_a_key_cut_anywhere(prefix: str) -> None:
    assert parse_prefix(prefix) == prefix


@pytest.mark.parametrize("prefix", ["/", "/a", "../", "a/../b", "a//", "a\0"])
def test_a_prefix_leads_no_further_than_a_key(prefix: str) -> None:
    with pytest.raises(ObjectsError):
        parse_prefix(prefix)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"s3": "a/b"}, {"s3": "a/b"}),
        ({"s3": "a", "storage": None}, {"s3": "a"}),
        ({"s3": "a", "storage": "_default_"}, {"s3": "a"}),
        ({"s3": "a", "storage": "x", "presigned": "q=1", "filename": "f"}, None),
        ("s3://x/a/b", {"s3": "a/b", "storage": "x"}),
        ("s3:///a/b", {"s3": "a/b"}),
    ],
)
def test_an_object_in_every_form(given: Any, expected: dict[str, str] | None) -> None:
    assert S3Object.parse(given).json() == (given if expected is None else expected)


@pytest.mark.parametrize(
    "given", ["a", "s3://a", "s3://", "s3:///", "http://x/a", {}, {"s3": 1}, None, {"s3": "/a"}, 7]
)
def test_what_is_no_object(given: Any) -> None:
    with pytest.raises(ObjectsError) as caught:
        S3Object.parse(given)
    assert caught.value.kind == "bad_key"


def test_a_key_made_up_here_has_the_ending_of_its_type() -> None:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    assert new_key(at).startswith("windmill_uploads/upload_1767312000000_")
    assert new_key(at).endswith(".file")
    assert new_key(at, content_type="text/csv; charset=utf-8").endswith(".csv")
    assert new_key(at, extension="parquet").endswith(".parquet")
    assert new_key(at, extension="../../x").endswith(".file")
    assert len({new_key(at) for _ in range(100)}) == 100


# --- permissions ------------------------------------------------------------------------------------------------------

ANNA = Who("anna", groups=("all", "news"), folders_read=("shared",), folders_write=("mine",))


@pytest.mark.parametrize(
    ("key", "actions"),
    [
        ("windmill_uploads/x.csv", "read write delete"),
        ("windmill_uploads/deeper/x.csv", ""),
        ("u/anna/x", "read write delete list"),
        ("u/anna/deeper/x", "read write delete list"),
        ("u/bert/x", ""),
        ("u/anna", ""),
        ("g/news/x", "read write delete list"),
        ("g/sports/x", ""),
        ("f/mine/x", "read write delete list"),
        ("f/shared/x", "read list"),
        ("f/other/x", ""),
        ("x", ""),
        ("a/b/c", ""),
    ],
)
def test_windmills_own_rules(key: str, actions: str) -> None:
    found = {action for action in rules.ACTIONS if allowed(DEFAULT, ANNA, key, action)}
    assert found == {*actions.split()}


def test_the_first_rule_that_matches_decides_and_nothing_matched_is_denied() -> None:
    order = (
        StorageRule("a/secret/**", frozenset()),
        StorageRule("a/**", frozenset({"read"})),
        StorageRule("**", frozenset({"list"})),
    )
    assert not allowed(order, ANNA, "a/secret/x", "read")
    assert allowed(order, ANNA, "a/x", "read")
    assert not allowed(order, ANNA, "a/x", "list")
    assert allowed(order, ANNA, "b", "list")
    assert not allowed(order[:2], ANNA, "b", "list")
    assert not allowed((), ANNA, "b", "list")
    assert allowed((), Who("root", admin=True), "b", "delete")


@pytest.mark.parametrize(
    ("pattern", "matches", "not_matches"),
    [
        ("*.csv", ["a.csv", ".csv"], ["a/b.csv", "a.csvx"]),
        ("**/*.csv", ["a.csv", "a/b/c.csv"], ["a.txt"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "ab"]),
        ("a/**/z", ["a/z", "a/b/c/z"], ["a/zz", "az"]),
        ("?/x", ["a/x"], ["/x", "aa/x"]),
        ("{a,b}/x{1,22}", ["a/x1", "b/x22"], ["c/x1", "a/x2"]),
        ("a.b(c)[d]+", ["a.b(c)[d]+"], ["axb(c)[d]+"]),
        ("a,b", ["a,b"], ["a", "b"]),
    ],
)
def test_globs(pattern: str, matches: list[str], not_matches: list[str]) -> None:
    rule = (StorageRule(pattern, frozenset({"read"})),)
    assert [key for key in matches + not_matches if allowed(rule, ANNA, key, "read")] == matches


@pytest.mark.parametrize("name", ["*", "a*", "{anna,bert}", "**", "?", "a/b", "", "a\\"])
def test_a_name_is_never_a_glob(name: str) -> None:
    rule = (StorageRule("u/{username}/**", frozenset({"read"})),)
    assert not allowed(rule, Who(name), "u/bert/x", "read")
    if name and "/" not in name:
        assert allowed(rule, Who(name), f"u/{name}/x", "read")


def test_a_job_has_every_folder_but_no_part_above() -> None:
    job = Who("watcher", folders_write=(EVERY,))
    assert allowed(DEFAULT, job, "f/news/x", "write")
    assert not allowed(DEFAULT, job, "f/x", "write")


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("/a", "slash"), ("a/{user}/x", "no variable"), ("a/{b", "brace"), ("}{", "brace"), ("*/" * 11, "wildcards")],
)
def test_a_pattern_that_is_none(pattern: str, says: str) -> None:
    assert says in rules.check(pattern)
    assert not any(rules.check(rule.pattern) for rule in DEFAULT)


# --- a folder ---------------------------------------------------------------------------------------------------------


async def stream(*chunks: bytes, then: BaseException | None = None) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    if then is not None:
        raise then


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "objects"


@pytest.fixture
def storage(root: Path) -> Storage:
    return Storage("_default_", "folder", Folder(root))


async def refused(work: Any) -> str:
    with pytest.raises(ObjectsError) as caught:
        await work
    return caught.value.kind


def files(root: Path) -> list[str]:
    return sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file() or file.is_symlink())


async def test_what_was_put_is_there_whole_and_in_parts(storage: Storage) -> None:
    put = await storage.put("a/ü b.txt", b"hello world", content_type="text/x-odd")
    assert (put.size, put.content_type) == (11, "text/x-odd")
    assert await storage.head("a/ü b.txt") == put
    assert await (await storage.get("a/ü b.txt")).all() == b"hello world"
    reading = await storage.get("a/ü b.txt", start=6, end=100)
    assert (reading.start, reading.end, await reading.all()) == (6, 11, b"world")
    assert await refused(storage.get("a/ü b.txt", start=11)) == "bad_range"
    assert await refused(storage.get("a/ü b.txt", start=3, end=3)) == "bad_range"


async def test_a_stream_is_kept_in_order_and_an_empty_one_is_an_object(storage: Storage) -> None:
    chunks = [bytes([n]) * 300_000 for n in range(12)]
    assert (await storage.put("big", stream(*chunks))).size == 3_600_000
    assert await (await storage.get("big")).all() == b"".join(chunks)
    await storage.put("empty", stream())
    assert await (await storage.get("empty")).all() == b""


async def test_an_object_is_replaced_whole_while_it_is_read(storage: Storage) -> None:
    await storage.put("a", b"x" * 3_000_000)
    reading = await storage.get("a")
    first = await storage.head("a")
    second = await storage.put("a", b"y")
    assert await reading.all() == b"x" * 3_000_000
    assert first.etag != second.etag


async def test_an_object_that_is_there_stays_with_if_absent(storage: Storage, root: Path) -> None:
    await storage.put("a", b"1", if_absent=True)
    assert await refused(storage.put("a", stream(b"2"), if_absent=True)) == "exists"
    assert await (await storage.get("a")).all() == b"1"
    assert files(root) == ["a"]


@pytest.mark.parametrize(
    "trouble", [RuntimeError("gone"), OSError(errno.ECONNRESET, "reset"), asyncio.CancelledError()]
)
async def test_an_upload_that_breaks_off_leaves_nothing(storage: Storage, root: Path, trouble: BaseException) -> None:
    await storage.put("a/old", b"old")
    with pytest.raises(type(trouble)):
        await storage.put("a/old", stream(b"x" * 3_000_000, then=trouble))
    with pytest.raises(type(trouble)):
        await storage.put("b/new", stream(b"x" * 3_000_000, then=trouble))
    assert files(root) == ["a/old"]
    assert await (await storage.get("a/old")).all() == b"old"


async def test_a_cancelled_upload_leaves_nothing(storage: Storage, root: Path) -> None:
    waiting = asyncio.Event()

    async def forever() -> AsyncIterator[bytes]:
        yield b"x" * 3_000_000
        waiting.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(storage.put("a", forever()))
    await waiting.wait()
    assert len(files(root)) == 1  # under way
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert files(root) == []


async def test_what_a_killed_process_left_is_swept_and_what_another_writes_is_not(root: Path) -> None:
    uploads = root / UPLOADS
    uploads.mkdir(parents=True)
    (uploads / "left").write_bytes(b"x")
    hold = (
        "import fcntl,sys; f=open(sys.argv[1],'wb'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(uploads / "held")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    await Folder(root).put("a", b"1", content_type=None, content_disposition=None, attributes={}, if_absent=False)
    assert files(root) == [f"{UPLOADS}/held", "a"]
    other.communicate(b"\n", 10)


async def test_a_full_disk_is_told_and_leaves_nothing(storage: Storage, root: Path) -> None:
    """RLIMIT_FSIZE stands in for the disk: the kernel's answer comes from the same write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, hard))
    try:
        assert await refused(storage.put("a", stream(*[b"x" * 400_000] * 8))) == "full"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(root) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_no_space_is_full(storage: Storage, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("watcher.objects.folder.os.fsync", fsync)
    assert await refused(storage.put("a", b"1")) == "full"


async def test_a_missing_object_and_a_missing_folder_are_missing(storage: Storage) -> None:
    for key in ("a", "a/b/c"):
        assert await refused(storage.get(key)) == "missing"
        assert await refused(storage.head(key)) == "missing"
        await storage.delete(key)
    assert await storage.list() == []
    assert (await storage.level()).objects == ()
    await storage.put("a", b"")
    assert await refused(storage.get("a/b")) == "missing"
    assert await refused(storage.put("a/b", b"")) == "bad_key"
    await storage.put("d/e", b"")
    assert await refused(storage.get("d")) == "missing"
    assert await refused(storage.put("d", b"")) == "bad_key"
    assert await refused(storage.put("x" * 300, b"")) == "bad_key"


async def test_an_emptied_folder_disappears_and_a_full_one_stays(storage: Storage, root: Path) -> None:
    for key in ("a/b/c", "a/d"):
        await storage.put(key, b"")
    await storage.delete("a/b/c")
    assert not (root / "a/b").exists()
    assert (root / "a/d").exists()
    await storage.delete("a/d")
    assert not (root / "a").exists()
    assert root.exists()


async def test_links_lead_nowhere(storage: Storage, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    await storage.put("a/b", b"1")
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "a" / "up").symlink_to("..")
    for key in ("folder/secret", "file", "a/up/a/b"):
        assert await refused(storage.get(key)) == "missing", key
    assert [meta.key for meta in await storage.list()] == ["a/b"]
    assert await storage.list("folder/") == []
    assert (await storage.level("folder/")).objects == ()
    assert (await storage.level()).folders == ("a/",)
    assert await refused(storage.put("folder/new", b"1")) == "bad_key"
    await storage.put("file", b"2")  # the link is replaced, not followed
    await storage.delete("folder/secret")
    assert sorted(os.listdir(outside)) == ["secret"]
    assert (outside / "secret").read_text() == "secret"


async def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    storage = Storage("_default_", "folder", Folder(tmp_path / "link"))
    await storage.put("a/b", b"1")
    assert (tmp_path / "there/a/b").read_bytes() == b"1"


async def test_uploads_under_way_are_no_objects(storage: Storage) -> None:
    await storage.put("a", b"")
    assert await refused(storage.put(f"{UPLOADS}/a", b"")) == "bad_key"
    assert await refused(storage.get(f"{UPLOADS}/a")) == "missing"
    assert [meta.key for meta in await storage.list()] == ["a"]
    assert (await storage.level()).folders == ()


async def test_a_pipe_or_a_device_is_no_object_and_blocks_nobody(storage: Storage, root: Path) -> None:
    await storage.put("a", b"")
    os.mkfifo(root / "pipe")
    assert await refused(storage.get("pipe")) == "missing"
    assert [meta.key for meta in await storage.list()] == ["a"]


KEYS = ["a", "a.txt", "a/b", "a/b/c", "a/b.c", "a0", "b/x", "ab", "ü"]


async def test_listings_come_in_the_order_of_keys_page_by_page(storage: Storage) -> None:
    keys = [key for key in KEYS if key not in ("a", "a/b")]  # which are folders here
    for key in keys:
        await storage.put(key, b"")
    assert [meta.key for meta in await storage.list()] == sorted(keys)
    for prefix in ("", "a", "a/", "a/b", "a/b/", "ü", "nothing", "b/x"):
        found, after = [], None
        while page := await storage.list(prefix, after=after, limit=2):
            assert len(page) <= 2
            found += [meta.key for meta in page]
            after = found[-1]
        assert found == sorted(key for key in keys if key.startswith(prefix)), prefix


async def test_a_level_shows_folders_and_objects_and_goes_on_where_it_ended(storage: Storage) -> None:
    for key in ("a/b", "a/c/d", "b", "c/d/e", "d"):
        await storage.put(key, b"")
    top = await storage.level()
    assert ([meta.key for meta in top.objects], top.folders, top.after) == (["b", "d"], ("a/", "c/"), None)
    first = await storage.level(limit=2)
    assert ([meta.key for meta in first.objects], first.folders, first.after) == (["b"], ("a/",), "b")
    rest = await storage.level(after=first.after, limit=2)
    assert ([meta.key for meta in rest.objects], rest.folders, rest.after) == (["d"], ("c/",), None)
    below = await storage.level("a/")
    assert ([meta.key for meta in below.objects], below.folders) == (["a/b"], ("a/c/",))


async def test_files_whose_names_are_no_keys_are_not_shown(storage: Storage, root: Path) -> None:
    await storage.put("a", b"")
    for name in (b"b\nc", b"b\\c", b"\xff"):
        (root / os.fsdecode(name)).write_bytes(b"")
    assert [meta.key for meta in await storage.list()] == ["a"]


async def test_deleting_and_putting_in_one_folder_at_once(storage: Storage) -> None:
    async def work(name: int) -> None:
        for _ in range(30):
            await storage.put(f"a/b/{name}", b"1")
            await storage.delete(f"a/b/{name}")

    await asyncio.gather(*map(work, range(6)))
    assert await storage.list() == []


async def test_a_stream_above_the_bound_leaves_nothing(storage: Storage, root: Path) -> None:
    assert await refused(storage.put("a", bounded(stream(b"123", b"456"), 5))) == "too_large"
    assert (await storage.put("b", bounded(stream(b"123", b"45"), 5))).size == 5
    assert files(root) == ["b"]


async def test_a_reading_that_is_given_up_closes_its_file(storage: Storage) -> None:
    await storage.put("a", b"x" * 3_000_000)
    before = len(os.listdir("/proc/self/fd"))
    reading = await storage.get("a")
    reading.close()
    async for _ in (other := await storage.get("a")):
        break
    other.close()
    assert len(os.listdir("/proc/self/fd")) == before


# --- which storage ----------------------------------------------------------------------------------------------------


def objects(**storages: StorageSettings) -> Objects:
    config = Config(
        None, "", Path(), storages={name.replace("primary", "_default_"): s for name, s in storages.items()}
    )

    async def value(path: str) -> Any:
        if path == "u/admin/broken":
            return {"accessKey": "AKIA-not-to-be-shown", "secretKey": "s"}
        raise ResolveError(f"there is no resource {path}", missing=True)

    return Objects(lambda: config, value)


async def test_no_storage_is_windmills_own_sentence() -> None:
    with pytest.raises(ObjectsError, match=r"^No files storage resource defined at the workspace level$") as caught:
        await objects().storage()
    assert caught.value.kind == "no_storage"


async def test_a_storage_by_its_name_in_every_form(tmp_path: Path) -> None:
    found = objects(
        primary=StorageSettings("_default_", path=tmp_path / "a"),
        archive=StorageSettings("archive", path=tmp_path / "b", public=True, permissions=()),
    )
    for name in (None, "", "_default_"):
        assert (await found.storage(name)).name == "_default_"
    archive = await found.storage("archive")
    assert (archive.name, archive.public, archive.permissions) == ("archive", True, ())
    assert (await found.storage("archive")).backend is archive.backend
    for name in ("other", "arch ive", "../archive", "x" * 200):
        assert await refused(found.storage(name)) in ("no_such_storage", "bad_key")


async def test_a_resource_that_is_missing_or_broken_is_said_without_its_secrets() -> None:
    found = objects(
        primary=StorageSettings("_default_", "s3", resource="u/admin/none"),
        broken=StorageSettings("broken", "s3", resource="u/admin/broken"),
    )
    with pytest.raises(ObjectsError, match="there is no resource u/admin/none"):
        await found.storage()
    with pytest.raises(ObjectsError, match="bucket") as caught:
        await found.storage("broken")
    assert "AKIA" not in str(caught.value)
    assert await refused(found.of_resource({}, "postgresql")) == "no_such_storage"


# --- resources of clouds ----------------------------------------------------------------------------------------------

S3: dict[str, Any] = {"bucket": "b", "region": "eu-1", "endPoint": "s3.example.com"}


@pytest.mark.parametrize(
    ("changed", "address"),
    [
        ({}, "https://s3.example.com"),
        ({"useSSL": False}, "http://s3.example.com"),
        ({"endPoint": "http://s3.example.com/", "useSSL": True}, "http://s3.example.com"),
        ({"port": 9000}, "https://s3.example.com:9000"),
        ({"endPoint": "s3.example.com:9000", "port": 9}, "https://s3.example.com:9000"),
        ({"pathStyle": False}, "https://b.s3.example.com"),
        ({"pathStyle": False, "endPoint": "b.s3.example.com"}, "https://b.s3.example.com"),
        ({"endPoint": ""}, "https://s3.eu-1.amazonaws.com"),
        ({"endPoint": None, "region": None}, "https://s3.us-east-1.amazonaws.com"),
        (
            {"endPoint": "https://acc.r2.cloudflarestorage.com", "region": "auto"},
            "https://acc.r2.cloudflarestorage.com",
        ),
    ],
)
def test_the_address_of_an_s3_resource(changed: dict[str, Any], address: str) -> None:
    assert cloud.endpoint({**S3, **changed}) == address


def test_resources_as_windmill_writes_them() -> None:
    made = cloud.s3({**S3, "accessKey": "k", "secretKey": "s", "token": "t", "pathStyle": False})
    assert made.settings["virtual_hosted_style_request"]
    assert made.credentials is not None
    assert made.credentials() == {
        "access_key_id": "k", "secret_access_key": "s", "token": "t", "expires_at": None,
    }  # fmt: skip
    assert not made.http
    made = cloud.azure(
        {"accountName": "a", "containerName": "c", "accessKey": "k", "endpoint": "127.0.0.1:1/a", "useSSL": False}
    )
    assert (made.settings["endpoint"], made.http) == ("http://127.0.0.1:1/a", True)
    made = cloud.azure({"accountName": "a", "containerName": "c", "tenantId": "t", "clientId": "c"})
    assert made.settings["endpoint"] == "https://a.blob.core.windows.net"
    assert (made.settings["tenant_id"], made.settings["skip_signature"]) == ("t", False)
    made = cloud.gcs({"bucket": "b", "serviceAccountKey": {"type": "service_account"}})
    assert made.settings["service_account_key"] == '{"type": "service_account"}'


def test_keys_are_never_taken_from_the_services_environment(tmp_path: Path) -> None:
    """obstore would: and send them wherever the resource of an API user points to."""
    code = """
import asyncio, http.server, threading
from watcher.objects import cloud
import obstore
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print(self.path, {k.lower(): v for k, v in self.headers.items()})
        self.send_response(404); self.send_header("content-length", "0"); self.end_headers()
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
at = f"http://127.0.0.1:{server.server_port}"
async def main():
    for kind, value in [
        ("s3", {"bucket": "b", "endPoint": at}),
        ("s3", {"bucket": "b", "endPoint": at, "accessKey": "own", "secretKey": "own"}),
        ("azure_blob", {"accountName": "own", "containerName": "b", "endpoint": at}),
        ("azure_blob", {"accountName": "own", "containerName": "b", "accessKey": "b3du", "endpoint": at}),
    ]:
        try: await obstore.get_async(cloud.store(kind, value), "x")
        except FileNotFoundError: pass
asyncio.run(main())
"""
    environ = {
        "AWS_ACCESS_KEY_ID": "foreign", "AWS_SECRET_ACCESS_KEY": "foreign", "AWS_SESSION_TOKEN": "foreign",
        "AWS_REQUEST_PAYER": "true", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true", "AWS_ENDPOINT": "http://127.0.0.1:9",
        "AZURE_STORAGE_ACCOUNT_KEY": "Zm9yZWlnbg==", "AZURE_STORAGE_TOKEN": "foreign",
        "AZURE_STORAGE_SAS_KEY": "sig=foreign", "AZURE_CLIENT_ID": "foreign", "AZURE_STORAGE_USE_EMULATOR": "true",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, text=True, timeout=60,
        check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    bare, signed, azure_bare, azure_signed = done.stdout.splitlines()
    for line in done.stdout.splitlines():
        assert "foreign" not in line
        assert "payer" not in line
    assert "authorization" not in bare
    assert "authorization" not in azure_bare
    assert "Credential=own/" in signed
    assert "x-amz-security-token" not in signed
    assert "SharedKey own:" in azure_signed


@pytest.mark.parametrize(
    ("kind", "value"), [("s3", {}), ("s3", "x"), ("azure_blob", {"accountName": "a"}), ("gcs", {})]
)
def test_a_resource_that_lacks_something_is_said(kind: str, value: Any) -> None:
    with pytest.raises(ObjectsError) as caught:
        cloud.store(kind, value)
    assert caught.value.kind == "unreachable"


class Answer(Exception):
    """As obstore raises it."""


REFUSED = """Error performing GET http://k:9/b/x in 1ms - Server returned non-2xx status code: 403 Forbidden: <?xml?>
<Error><Code>SignatureDoesNotMatch</Code><Message>The signature is wrong.</Message>
<StringToSign>what-was-signed</StringToSign></Error>"""


def test_of_a_servers_answer_only_code_and_message_are_told() -> None:
    found = cloud.told("bucket b", "x", Answer(REFUSED))
    assert str(found) == (
        "bucket b: access is refused (SignatureDoesNotMatch: The signature is wrong.): "
        "check the keys of its resource, and what they may do"
    )


def test_what_is_not_found_by_a_write_is_the_bucket() -> None:
    found = cloud.told("bucket b", "x", FileNotFoundError("404 Not Found"), writing=True)
    assert (found.kind, str(found)) == ("unreachable", "there is no bucket b: create it, or correct the resource")


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (FileNotFoundError("Object at location x not found"), "missing", "there is no object x"),
        (FileNotFoundError("404: <Code>NoSuchBucket</Code>"), "unreachable", "there is no bucket b"),
        (Answer("status code: 404 Not Found: <Code>ContainerNotFound</Code>"), "unreachable", "there is no bucket b"),
        (Answer("status code: 507 Insufficient Storage: <Code>XMinioStorageFull</Code>"), "full", "is full"),
        (Answer("status code: 416 Range Not Satisfiable"), "bad_range", "shorter"),
        (Answer("status code: 500 Oh: <Code>InternalError</Code>"), "unreachable", "answers 500: InternalError"),
        (
            Answer("Error performing PUT http://h:1/b/x?sig=abc in 5ms, after 3 - HTTP error: error sending request"),
            "unreachable",
            "bucket b: http://h:1: cannot be reached",
        ),
    ],
)
def test_what_clouds_say(error: Exception, kind: str, says: str) -> None:
    found = cloud.told("bucket b", "x", error)
    assert found.kind == kind
    assert says in str(found)
    assert "sig=abc" not in str(found)


def test_the_clouds_clients_are_imported_when_they_are_needed() -> None:
    code = "import sys; import watcher.objects; sys.exit('obstore' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
