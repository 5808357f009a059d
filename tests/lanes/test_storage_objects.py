"""Object storage on real servers: every kind alike, Windmill's own clients over the service, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import windmill
from tests.support.servers import PASSWORD, Azurite, SeaweedFS
from tests.support.windmill import NEWEST, VERSIONS, Place, node, on_deno, python
from watcher.errors import ObjectsError
from watcher.objects import Objects, Storage, cloud
from watcher.objects.folder import Folder
from watcher.values import Config

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

MB = 1_000_000
PART = cloud.PART


async def stream(size: int, chunk: int = 65_536, then: BaseException | None = None) -> AsyncIterator[bytes]:
    for at in range(0, size, chunk):
        yield b"x" * min(chunk, size - at)
    if then is not None:
        raise then


async def refused(work: Any) -> ObjectsError:
    with pytest.raises(ObjectsError) as caught:
        await work
    assert PASSWORD not in str(caught.value)
    return caught.value


# --- every kind alike -------------------------------------------------------------------------------------------------


class Kind:
    """One storage of a kind, and a place in it that no other test uses."""

    def __init__(self, storage: Storage, left_over: Callable[[], list[Any]]) -> None:
        self.storage = storage
        self.left_over = left_over  # parts of uploads, with this prefix, that are no objects
        self.at = f"test-{uuid.uuid4().hex}/"

    async def keys(self) -> list[str]:
        return [meta.key.removeprefix(self.at) for meta in await self.storage.list(self.at)]


def on_s3(server: SeaweedFS, storage: Storage) -> Kind:
    def left_over() -> list[Any]:
        found = server.client().list_multipart_uploads(Bucket=server.bucket).get("Uploads", [])
        return [upload["Key"] for upload in found if upload["Key"].startswith(kind.at)]

    kind = Kind(storage, left_over)
    return kind


async def opened(value: Any, type: str) -> Storage:
    async def none(_: str) -> Any:
        raise AssertionError

    return await Objects(lambda: Config(None, "", Path()), none).of_resource(value, type)


@pytest.fixture(params=["folder", "s3", "azure_blob"])
async def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    if request.param == "s3":
        server = request.getfixturevalue("seaweedfs")
        return on_s3(server, await opened(server.resource, "s3"))
    if request.param == "azure_blob":
        azurite: Azurite = request.getfixturevalue("azurite")
        value = azurite.create()
        storage = await opened(value, "azure_blob")

        def blocks() -> list[Any]:
            """Azure drops uncommitted blocks by itself, and lists them only when it is asked to."""
            with azurite.client().get_container_client(value["containerName"]) as client:
                listed = {blob.name for blob in client.list_blobs()}
            return sorted(name for name in listed if name.endswith("broken"))

        return Kind(storage, blocks)
    folder = tmp_path / "objects"
    return Kind(Storage("_default_", "folder", Folder(folder)), lambda: os.listdir(folder / ".uploads"))


async def test_an_object_goes_in_and_out_whole_and_in_parts(kind: Kind) -> None:
    key = f"{kind.at}a/ü ~%20+#?&=.txt"
    put = await kind.storage.put(key, b"hello world", content_type="text/x-odd", content_disposition="inline")
    found = await kind.storage.head(key)
    assert (found.key, found.size, found.etag, found.content_type) == (key, 11, put.etag, "text/x-odd")
    assert abs((found.modified - put.modified).total_seconds()) < 60
    assert await (await kind.storage.get(key)).all() == b"hello world"
    part = await kind.storage.get(key, start=6, end=8)
    assert (part.start, part.end, part.meta.size, await part.all()) == (6, 8, 11, b"wo")
    assert await (await kind.storage.get(key, start=6)).all() == b"world"
    error = await refused(kind.storage.get(key, start=11, end=12))
    assert error.kind == "bad_range", error.__cause__
    await kind.storage.delete(key)
    await kind.storage.delete(key)
    assert (await refused(kind.storage.get(key))).kind == "missing"
    assert (await refused(kind.storage.head(key))).kind == "missing"


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART + 17])
async def test_a_stream_of_any_length_comes_back_byte_for_byte(kind: Kind, size: int) -> None:
    key = f"{kind.at}stream"
    given, found = hashlib.sha256(), hashlib.sha256()

    async def numbers() -> AsyncIterator[bytes]:
        left = size
        while left:
            chunk = os.urandom(min(left, 100_003))
            given.update(chunk)
            left -= len(chunk)
            yield chunk

    assert (await kind.storage.put(key, numbers())).size == size
    async for chunk in await kind.storage.get(key):
        found.update(chunk)
    assert found.digest() == given.digest()
    assert (await kind.storage.head(key)).size == size


@pytest.mark.parametrize("size", [10, PART + 1])
async def test_what_is_there_stays_with_if_absent(kind: Kind, size: int) -> None:
    key = f"{kind.at}once"
    await kind.storage.put(key, stream(size), if_absent=True)
    assert (await refused(kind.storage.put(key, b"other", if_absent=True))).kind == "exists"
    assert (await refused(kind.storage.put(key, stream(2 * PART), if_absent=True))).kind == "exists"
    assert (await kind.storage.head(key)).size == size
    assert kind.left_over() == []


@pytest.mark.parametrize("size", [10, 3 * PART])
async def test_a_broken_stream_leaves_nothing_and_the_old_object_stays(kind: Kind, size: int) -> None:
    old, new = f"{kind.at}old", f"{kind.at}broken"
    await kind.storage.put(old, b"old")
    for key in (old, new):
        with pytest.raises(ConnectionResetError):
            await kind.storage.put(key, stream(size, then=ConnectionResetError()))
    assert await kind.keys() == ["old"]
    assert await (await kind.storage.get(old)).all() == b"old"
    assert kind.left_over() == []


async def test_a_cancelled_upload_leaves_nothing(kind: Kind) -> None:
    far = asyncio.Event()

    async def forever() -> AsyncIterator[bytes]:
        async for chunk in stream(3 * PART):
            yield chunk
        far.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(kind.storage.put(f"{kind.at}broken", forever()))
    await far.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await kind.keys() == []
    assert kind.left_over() == []


async def test_listings_go_on_where_they_ended(kind: Kind) -> None:
    keys = ["a.txt", "a/b", "a/c/d", "a0", "b/x", "ab", "ü"]
    for key in keys:
        await kind.storage.put(kind.at + key, b"1")
    for prefix in ("", "a", "a/", "a/c/", "ü", "nothing"):
        found: list[str] = []
        after = None
        while page := await kind.storage.list(kind.at + prefix, after=after, limit=2):
            assert len(page) <= 2
            found += [meta.key.removeprefix(kind.at) for meta in page]
            after = page[-1].key
        assert sorted(found) == sorted(key for key in keys if key.startswith(prefix)), prefix
        assert len(found) == len({*found})
    top = await kind.storage.level(kind.at)
    assert [meta.key.removeprefix(kind.at) for meta in top.objects] == ["a.txt", "a0", "ab", "ü"]
    assert [folder.removeprefix(kind.at) for folder in top.folders] == ["a/", "b/"]
    first = await kind.storage.level(kind.at, limit=3)
    rest = await kind.storage.level(kind.at, after=first.after)
    assert {*first.objects, *rest.objects} == {*top.objects}
    assert sorted([*first.folders, *rest.folders]) == [*top.folders]


# --- what is wrong with a server --------------------------------------------------------------------------------------

Broken = Callable[[Storage], Any]
OPERATIONS: dict[str, Broken] = {
    "put": lambda storage: storage.put("a/b", b"1"),
    "stream": lambda storage: storage.put("a/b", stream(2 * PART)),
    "get": lambda storage: storage.get("a/b"),
    "head": lambda storage: storage.head("a/b"),
    "list": lambda storage: storage.list(),
    "level": lambda storage: storage.level(),
    "delete": lambda storage: storage.delete("a/b"),
}


@pytest.mark.parametrize("operation", [*OPERATIONS])
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"secretKey": "wrong"}, "access is refused"),
        ({"accessKey": "nobody"}, "access is refused"),
        ({"port": 9, "endPoint": "127.0.0.1"}, "cannot be reached"),
        ({"endPoint": "there.is.no.such.host.invalid"}, "cannot be reached"),
    ],
)
async def test_a_bucket_that_cannot_be_used_is_said_with_its_name(
    seaweedfs: SeaweedFS, changed: dict[str, Any], says: str, operation: str
) -> None:
    storage = await opened({**seaweedfs.resource, **changed}, "s3")
    error = await refused(OPERATIONS[operation](storage))
    assert error.kind == "unreachable"
    assert str(error).startswith(f"bucket {seaweedfs.bucket}: ")
    assert says in str(error)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "delete"])
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"containerName": "none"}, "there is no container none"),
        ({"accessKey": "d3Jvbmc="}, "access is refused"),
        ({"endpoint": "http://127.0.0.1:9/watchertests"}, "cannot be reached"),
    ],
)
async def test_a_container_that_cannot_be_used_is_said_with_its_name(
    azurite: Azurite, changed: dict[str, Any], says: str, operation: str
) -> None:
    storage = await opened({**azurite.create(), **changed}, "azure_blob")
    error = await refused(OPERATIONS[operation](storage))
    assert error.kind == "unreachable", error
    assert says in str(error)


async def test_a_bucket_that_goes_away_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    server = SeaweedFS()
    try:
        server.start()
        storage = await opened(server.resource, "s3")

        async def then_killed() -> AsyncIterator[bytes]:
            async for chunk in stream(3 * PART):
                yield chunk
            await asyncio.to_thread(server.kill)
            async for chunk in stream(3 * PART):
                yield chunk

        error = await refused(storage.put("big", then_killed()))
        assert (error.kind, str(error)) == ("unreachable", f"bucket lake: {server.url}: cannot be reached")
        server.start()
        assert [meta.key for meta in await storage.list()] == ["ready"]
    finally:
        server.close()


# --- Windmill's own clients -------------------------------------------------------------------------------------------

STORAGES = """
[storage]
kind = "s3"
resource = "u/admin/lake"
[storage.secondary.azure]
kind = "azure_blob"
resource = "$res:u/admin/azure"
[storage.secondary.archive]
kind = "folder"
path = "archive"
[storage.secondary.locked]
kind = "s3"
resource = "u/admin/locked"
[storage.secondary.gone]
kind = "azure_blob"
resource = "u/admin/gone"
[resources."u/admin/lake"]
type = "s3"
[resources."u/admin/lake".value]
bucket = "{bucket}"
region = "us-east-1"
endPoint = "{s3}"
useSSL = false
accessKey = "{key}"
secretKey = "$env:S3_SECRET"
[resources."u/admin/locked"]
type = "s3"
[resources."u/admin/locked".value]
bucket = "{bucket}"
region = "us-east-1"
endPoint = "{s3}"
useSSL = false
accessKey = "{key}"
secretKey = "not-the-secret"
[resources."u/admin/azure"]
type = "azure_blob"
[resources."u/admin/azure".value]
accountName = "{account}"
accessKey = "$env:AZURE_KEY"
endpoint = "{azure}"
containerName = "{container}"
[resources."u/admin/gone"]
type = "azure_blob"
[resources."u/admin/gone".value]
accountName = "{account}"
accessKey = "$env:AZURE_KEY"
endpoint = "{azure}"
containerName = "no-such-container"
"""


def configured(s3: SeaweedFS, azure: Azurite) -> str:
    places = {
        "bucket": s3.bucket, "s3": f"127.0.0.1:{s3.port}", "key": s3.access_key,
        "account": azure.ACCOUNT, "container": azure.create()["containerName"], "azure": azure.url,
    }  # fmt: skip
    return windmill.CONFIG + STORAGES.format(**places)


def secrets_of(azure: Azurite) -> dict[str, str]:
    return {"S3_SECRET": PASSWORD, "AZURE_KEY": azure.KEY}


@pytest.fixture
async def here(tmp_path: Path, seaweedfs: SeaweedFS, azurite: Azurite) -> AsyncIterator[Place]:
    async with windmill.place(tmp_path, configured(seaweedfs, azurite), **secrets_of(azurite)) as found:
        yield found


PYTHON = """
import io, os, wmill, uuid
from wmill import S3Object
at = f"f/tests/{uuid.uuid4().hex}"
def failure(work):
    try: work()
    except Exception as error: return str(error)
    return "nothing"
said = {}
for storage in (None, "azure", "archive"):
    obj = S3Object(s3=f"{at}/ü file.txt", storage=storage) if storage else S3Object(s3=f"{at}/ü file.txt")
    back = wmill.write_s3_file(obj, b"hello", content_type="text/x-odd")
    assert back["s3"] == obj["s3"], back
    assert wmill.load_s3_file(back) == b"hello"
    uri = f"s3://{storage or ''}/{at}/ü file.txt"
    if NEW: assert wmill.load_s3_file(uri) == b"hello"
    big = os.urandom(3_000_000)
    no_key = S3Object(s3="", storage=storage) if storage else None
    made = wmill.write_s3_file(no_key, io.BufferedReader(io.BytesIO(big)))
    assert made["s3"].startswith("windmill_uploads/upload_"), made
    with wmill.load_s3_file_reader(S3Object(s3=made["s3"], storage=storage) if storage else made) as reader:
        if NEW: assert reader.read(10) == big[:10]
        assert reader.read() == (big[10:] if NEW else big)
    if NEW:
        wmill.delete_s3_object(back)
        said[str(storage)] = [failure(lambda: wmill.load_s3_file(back)), failure(lambda: wmill.delete_s3_object(back))]
direct = wmill.write_s3_file(S3Object(s3=f"{at}/direct"), b"by resource", s3_resource_path="u/admin/azure")
assert wmill.load_s3_file(S3Object(s3=f"{at}/direct", storage="azure")) == b"by resource"
assert wmill.load_s3_file(S3Object(s3=f"{at}/direct"), "$res:u/admin/azure") == b"by resource"
show(said)
"""


@pytest.mark.parametrize("version", [NEWEST, "1.460.0"])
async def test_files_in_python_in_three_storages(here: Place, version: str) -> None:
    env = await here.job()
    said = (await python(version, f"NEW = {version == NEWEST}\n" + PYTHON, env)).value
    for loaded, deleted in said.values():
        assert "Failed to load S3 file: 404" in loaded
        assert "there is no object f/tests/" in loaded
        assert ": 404, there is no object f/tests/" in deleted
    await here.let_go()


async def test_files_in_an_old_python_client(here: Place) -> None:
    """It knew one storage, and no types."""
    code = """
    import wmill
    from wmill import S3Object
    back = wmill.write_s3_file(S3Object(s3="f/tests/old"), b"hello")
    made = wmill.write_s3_file(None, b"made")
    show([back, wmill.load_s3_file(back).decode(), wmill.load_s3_file(made).decode()])
    """
    env = await here.job()
    assert (await python(VERSIONS[-1], code, env)).value == [{"s3": "f/tests/old"}, "hello", "made"]
    await here.let_go()


SCRIPT = """
const at = "f/tests/" + crypto.randomUUID();
const said = [];
for (const storage of [undefined, "azure", "archive"]) {
  const obj = storage ? { s3: at + "/ü file.txt", storage } : { s3: at + "/ü file.txt" };
  const back = await wmill.writeS3File(obj, "hello", undefined, "text/x-odd");
  said.push(JSON.stringify(back) === JSON.stringify(obj));
  said.push(new TextDecoder().decode(await wmill.loadS3File(back)));
  const blob = await wmill.loadS3FileStream(`s3://${storage ?? ""}/${at}/ü file.txt`);
  said.push(blob.type, await blob.text());
  const big = new Uint8Array(3_000_000).fill(7);
  const made = await wmill.writeS3File(storage ? { s3: "", storage } : undefined, new Blob([big]));
  said.push(made.s3.startsWith("windmill_uploads/upload_"), (await wmill.loadS3File(made)).length);
  await named.deleteS3File(back);
  said.push((await failure(() => wmill.loadS3File(back))).replace(at, "AT"));
}
const direct = await wmill.writeS3File({ s3: at + "/direct" }, "by resource", "u/admin/azure");
said.push(new TextDecoder().decode(await wmill.loadS3File({ s3: at + "/direct", storage: "azure" })));
said.push((await failure(() => wmill.loadS3File({ s3: at + "/none", storage: null }))).replace(at, "AT"));
said.push((await failure(() => wmill.loadS3File({ s3: "f/tests/x", storage: "nowhere" }))));
said.push((await failure(() => wmill.writeS3File({ s3: "f/tests/../x" }, "x"))).slice(0, 40));
show(said);
"""


@pytest.mark.parametrize("run", [node, on_deno], ids=["node", "deno"])
async def test_files_in_typescript_in_three_storages(here: Place, run: Callable[..., Any]) -> None:
    env = await here.job()
    gone = "Failed to load S3 file: 404 Not Found - there is no object AT/ü file.txt"
    one = [True, "hello", "text/x-odd", "hello", True, 3_000_000, gone]
    said = (await run(SCRIPT, env)).value
    assert said[:21] == one * 3
    assert said[21:23] == ["by resource", gone.replace("ü file.txt", "none")]
    assert said[23] == (
        "Failed to load S3 file: 404 Not Found - there is no storage nowhere: add [storage.secondary.nowhere] "
        "(known: archive, azure, gone, locked)"
    )
    assert "Bad Request" in said[24] or "400" in said[24] or "parts of a key" in said[24], said[24]
    await here.let_go()


FAILURES = """
import wmill
from wmill import S3Object
def failure(work):
    try: work()
    except Exception as error:
        while error.__cause__ is not None and not hasattr(error, "response"): error = error.__cause__
        return str(error)
    return "nothing"
show([
    failure(lambda: wmill.load_s3_file(S3Object(s3=key, storage=storage)))
    for key, storage in [
        ("f/x/y", "locked"), ("f/x/y", "gone"), ("f/x/y", "nowhere"), ("/f/x/y", None), ("f/../y", None),
        ("u/somebody/y", None), ("f/x/none", None),
    ]
] + [failure(lambda: wmill.write_s3_file(S3Object(s3="/f/x"), b"x")),
     failure(lambda: wmill.write_s3_file(S3Object(s3="f/x/y", storage="gone"), b"x"))])
"""


async def test_what_is_wrong_reaches_a_script_as_text_and_without_secrets(here: Place) -> None:
    env = await here.job()
    ran = await python(NEWEST, FAILURES, env)
    said = ran.value
    for text, (status, words) in zip(
        said,
        [
            (502, "bucket lake: access is refused (SignatureDoesNotMatch"),
            (502, "there is no container no-such-container: create it, or correct the resource"),
            (404, "there is no storage nowhere: add [storage.secondary.nowhere]"),
            (400, "/f/x/y: a key does not begin with a slash: write f/x/y"),
            (400, "f/../y: the parts of a key have names, and . and .. are none"),
            (403, "watcher may not read u/somebody/y in storage _default_: no rule allows it"),
            (404, "there is no object f/x/none"),
        ],
        strict=False,
    ):
        assert f": {status} " in text, text
        assert words in text
    assert [*map(type, said[7:])] == [str, str]
    assert "nothing" not in said
    for text in (*said, ran.err, here.service.tail(100_000)):
        assert PASSWORD not in text
        assert "not-the-secret" not in text
    await here.let_go()


# --- large files ------------------------------------------------------------------------------------------------------


def resident(pid: int) -> int:
    """Bytes of memory that a process has had at most since `reset`."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


def reset(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


LARGE = 300 * MB if os.environ.get("WATCHER_LONG") != "1" else 3000 * MB
STREAM = """
import hashlib, io, time, wmill
from wmill import S3Object
class Source(io.RawIOBase):
    left = SIZE
    def readable(self): return True
    def readinto(self, buffer):
        size = min(len(buffer), self.left)
        buffer[:size] = PATTERN[:size]
        self.left -= size
        return size
PATTERN = bytes(range(256)) * 4096
obj = S3Object(s3="f/tests/large", storage=STORAGE)
began = time.monotonic()
wmill.write_s3_file(obj, io.BufferedReader(Source(), 1_048_576))
written = time.monotonic()
size = 0
with wmill.load_s3_file_reader(obj) as reader:
    while chunk := reader.read1(1_048_576): size += len(chunk)
show([size, round(written - began, 1), round(time.monotonic() - written, 1)])
"""


@pytest.mark.parametrize("storage", ["_default_", "azure", "archive"])
async def test_a_large_file_streams_at_constant_memory(here: Place, storage: str) -> None:
    env = await here.job()
    assert here.service.process is not None
    pid = here.service.process.pid
    small = STREAM.replace("SIZE", str(20 * MB)).replace("STORAGE", repr(storage))
    await python(NEWEST, small, env, 300)
    reset(pid)
    before = resident(pid)
    large = STREAM.replace("SIZE", str(LARGE)).replace("STORAGE", repr(storage))
    size, up, down = (await python(NEWEST, large, env, 500)).value
    grown = resident(pid) - before
    print(f"{storage}: {LARGE // MB} MB up in {up} s, down in {down} s, memory +{grown // MB} MB")
    assert size == LARGE
    assert grown < 100 * MB
    await here.let_go()


async def test_a_client_that_goes_away_leaves_nothing_behind(here: Place, seaweedfs: SeaweedFS) -> None:
    for storage in ("_default_", "azure", "archive"):
        reader, writer = await asyncio.open_connection("127.0.0.1", here.service.port)
        writer.write(
            f"POST /api/w/main/job_helpers/upload_s3_file?file_key=f/tests/cut&storage={storage} HTTP/1.1\r\n"
            f"host: 127.0.0.1\r\nauthorization: Bearer {here.token}\r\ncontent-length: {100 * MB}\r\n\r\n".encode()
        )
        for _ in range(40):
            writer.write(b"x" * MB)
            await writer.drain()
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await reader.read()
    path = "job_helpers/download_s3_file?file_key=f/tests/cut&storage="
    for _ in range(300):
        uploads = seaweedfs.client().list_multipart_uploads(Bucket=seaweedfs.bucket).get("Uploads", [])
        left = [upload for upload in uploads if upload["Key"] == "f/tests/cut"]
        if not left and not os.listdir(here.where / "archive/.uploads"):
            break
        await asyncio.sleep(0.1)  # another process: there is nothing to await
    else:
        raise AssertionError("parts of the uploads are still there")
    for storage in ("_default_", "azure", "archive"):
        await here.api("GET", path + storage, want=404)
    assert "request.failed" not in here.service.tail(100_000)


async def test_a_refused_upload_is_told_before_its_bytes_are_sent(here: Place) -> None:
    """`Expect: 100-continue`: whoever may not write is not asked for 100 MB."""
    reader, writer = await asyncio.open_connection("127.0.0.1", here.service.port)
    env = await here.job()
    writer.write(
        f"POST /api/w/main/job_helpers/upload_s3_file?file_key=u/somebody/x HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        f"authorization: Bearer {env['WM_TOKEN']}\r\ncontent-length: {100 * MB}\r\n"
        "expect: 100-continue\r\n\r\n".encode()
    )
    async with asyncio.timeout(10):
        answer = await reader.readuntil(b"\r\n")
    assert b" 403 " in answer
    writer.close()
    await here.let_go()


async def test_a_bucket_that_goes_away_in_the_middle_of_a_download_never_looks_like_the_end(
    tmp_path: Path, azurite: Azurite
) -> None:
    server = SeaweedFS()
    try:
        server.start()
        server.client().put_object(Bucket=server.bucket, Key="f/tests/large", Body=b"x" * 200 * MB)
        async with windmill.place(tmp_path, configured(server, azurite), **secrets_of(azurite)) as here:
            reader, writer = await asyncio.open_connection("127.0.0.1", here.service.port)
            writer.write(
                "GET /api/w/main/job_helpers/download_s3_file?file_key=f/tests/large HTTP/1.1\r\nhost: 127.0.0.1\r\n"
                f"authorization: Bearer {here.token}\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            assert f"content-length: {200 * MB}".encode() in head.lower()
            await reader.readexactly(MB)
            await asyncio.to_thread(server.kill)
            rest = 0
            with contextlib.suppress(ConnectionError):
                while chunk := await reader.read(MB):
                    rest += len(chunk)
            assert rest < 199 * MB
            await here.service.event("object.cut")
            assert (await here.service.get("/readyz"))[0] == 200
            writer.close()
    finally:
        server.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes, where the storage `archive` is."""
    disk = tmp_path / "archive"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24M", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may mount; RLIMIT_FSIZE stands for it in test_objects.py")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


FULL = """
import io, wmill
from wmill import S3Object
def failure(work):
    try: work()
    except Exception as error: return str(error)
    return "nothing"
def at(key): return S3Object(s3="f/tests/" + key, storage="archive")
wmill.write_s3_file(at("small"), b"small")
show([
    failure(lambda: wmill.write_s3_file(at("big"), b"x" * 60_000_000)),
    failure(lambda: wmill.write_s3_file(at("big"), io.BufferedReader(io.BytesIO(b"x" * 60_000_000)))),
    failure(lambda: wmill.write_s3_file(at("small"), b"x" * 60_000_000)),
    wmill.load_s3_file(at("small")).decode(),
    failure(lambda: wmill.write_s3_file(at("fits"), b"x" * 1_000_000)),
])
"""
FULL_TS = """
const big = new Blob([new Uint8Array(30_000_000)]);
show(await failure(() => wmill.writeS3File({ s3: "f/tests/big", storage: "archive" }, big)));
"""


async def test_a_full_disk_is_an_error_to_the_script_and_leaves_nothing(small_disk: Path, here: Place) -> None:
    env = await here.job()
    said = (await python(NEWEST, FULL, env)).value
    assert said == [*["Could not write file to S3"] * 3, "small", "nothing"]
    assert (await node(FULL_TS, env)).value != "null"
    found = sorted(str(file.relative_to(small_disk)) for file in small_disk.rglob("*") if file.is_file())
    assert found == ["f/tests/fits", "f/tests/small"]
    body, headers = b"x" * 15 * MB, {"authorization": f"Bearer {here.token}"}
    (small_disk / "filler").write_bytes(b"x" * 10 * MB)
    path = "/api/w/main/job_helpers/upload_s3_file?storage=archive&file_key=f/tests/big"
    status, text = await here.service.ask("POST", path, body, headers)
    assert (status, text) == (507, "the storage is full: no space left on device")
    assert not [*(small_disk / ".uploads").iterdir()]
    await here.let_go()
