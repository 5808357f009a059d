"""The S3 API in front of a folder, connection settings and signed links: as asked by clients, good and bad."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.s3 import AT, ROOM, Place, code, value
from watcher.objects import PRIMARY, Objects, Storage
from watcher.secrets import load_key, new_key
from watcher.server import windmill
from watcher.server.windmill import s3_proxy, sigv4
from watcher.server.windmill.signing import Ring
from watcher.store import tokens
from watcher.store.db import Database
from watcher.values import StorageRule


@pytest.fixture
async def place(sqlite_db: Database, tmp_path: Path) -> AsyncIterator[Place]:
    found = Place(sqlite_db, tmp_path)
    yield found
    await found.http.aclose()


def stored(where: Path) -> list[str]:
    """All files under the storages and the places where uploads wait."""
    return sorted(
        str(file.relative_to(where)) for file in where.rglob("*") if file.is_file() and "watcher.db" not in file.name
    )


# --- objects ----------------------------------------------------------------------------------------------------------


async def test_an_object_is_written_read_in_ranges_and_deleted(place: Place) -> None:
    s3 = await place.client()
    assert s3.bucket == "objects"
    etag = await s3.put("reports/a b+ü.txt", b"hello world", content_type="text/plain")
    key = quote("reports/a b+ü.txt")
    answer = await s3("GET", key)
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (200, b"hello world", etag)
    assert answer.headers["content-type"] == "text/plain"
    assert "sandbox" in answer.headers["content-security-policy"]
    for span, status, content, said in (
        ("bytes=0-4", 206, b"hello", "bytes 0-4/11"),
        ("bytes=6-", 206, b"world", "bytes 6-10/11"),
        ("bytes=-3", 206, b"rld", "bytes 8-10/11"),
        ("bytes=-99", 206, b"hello world", "bytes 0-10/11"),
        ("bytes=9-99", 206, b"ld", "bytes 9-10/11"),
        ("bytes=5-2", 200, b"hello world", None),
        ("bytes=0-1,3-4", 200, b"hello world", None),
    ):
        answer = await s3("GET", key, range=span)
        assert (answer.status_code, answer.content, answer.headers.get("content-range")) == (status, content, said)
    assert code(await s3("GET", key, range="bytes=11-")) == (416, "InvalidRange")
    answer = await s3("HEAD", key)
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "11", b"")
    assert (await s3("DELETE", key)).status_code == 204
    assert (await s3("DELETE", key)).status_code == 204
    assert code(await s3("GET", key)) == (404, "NoSuchKey")
    assert (await s3("HEAD", key)).status_code == 404


async def test_conditions_hold(place: Place) -> None:
    s3 = await place.client()
    etag = await s3.put("a")
    assert (await s3("GET", "a", if_none_match=etag)).status_code == 304
    assert (await s3("GET", "a", if_none_match='"other"')).status_code == 200
    assert (await s3("GET", "a", if_match=etag)).status_code == 200
    assert code(await s3("GET", "a", if_match='"other"')) == (412, "PreconditionFailed")
    assert (await s3("GET", "a", if_modified_since="Fri, 01 Jan 2100 00:00:00 GMT")).status_code == 304
    assert code(await s3("GET", "a", if_unmodified_since="Thu, 01 Jan 1970 00:00:00 GMT"))[0] == 412
    assert code(await s3("PUT", "a", body=b"x", if_none_match="*")) == (412, "PreconditionFailed")
    assert (await s3("PUT", "b", body=b"x", if_none_match="*")).status_code == 200
    assert code(await s3("PUT", "b", body=b"x", if_match=etag)) == (501, "NotImplemented")


async def test_an_object_is_copied_within_its_bucket(place: Place) -> None:
    s3 = await place.client()
    await s3.put("a b", b"hello", content_type="text/x-mine")
    answer = await s3("PUT", "c", x_amz_copy_source="/objects/a%20b")
    assert value(answer, "ETag").startswith('"')
    answer = await s3("GET", "c")
    assert (answer.content, answer.headers["content-type"]) == (b"hello", "text/x-mine")
    assert code(await s3("PUT", "c", x_amz_copy_source="/other/a")) == (404, "NoSuchBucket")
    assert code(await s3("PUT", "c", x_amz_copy_source="/objects/gone")) == (404, "NoSuchKey")


async def test_what_a_client_says_of_its_object_is_kept(place: Place) -> None:
    s3 = await place.client()
    said = {
        "x-amz-meta-source": "a b, c=d",
        "x-amz-meta-run-no": "7",
        "cache-control": "max-age=60",
        "content-encoding": "gzip",
        "content-language": "de",
    }
    headers = {name.replace("-", "_"): value for name, value in said.items()}
    sent = headers | {"content_encoding": "gzip,aws-chunked"}
    assert (await s3("PUT", "a", body=b"x", **sent)).status_code == 200
    upload = value(await s3("POST", "parts", query="uploads", **headers), "UploadId")
    etag = (await s3("PUT", "parts", query=f"partNumber=1&uploadId={upload}", body=b"x")).headers["etag"]
    wanted = (
        f"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>{etag}</ETag></Part></CompleteMultipartUpload>"
    )
    assert (await s3("POST", "parts", query=f"uploadId={upload}", body=wanted.encode())).status_code == 200
    assert (await s3("PUT", "copy", x_amz_copy_source="/objects/a")).status_code == 200
    for key in ("a", "parts", "copy"):
        answer = await s3("HEAD", key)
        assert {name: answer.headers.get(name) for name in said} == said, key
    assert (await s3("HEAD", "a", query="response-cache-control=no-cache")).headers["cache-control"] == "no-cache"

    other = {"x_amz_metadata_directive": "REPLACE", "x_amz_meta_source": "new"}
    assert (await s3("PUT", "a", x_amz_copy_source="/objects/a", **other)).status_code == 200
    answer = await s3("HEAD", "a")
    assert answer.headers["x-amz-meta-source"] == "new"
    assert not {"x-amz-meta-run-no", "content-encoding"} & {*answer.headers}
    assert answer.headers["cache-control"] == "no-store"

    await s3("PUT", "a", body=b"y")  # is another object
    assert "x-amz-meta-source" not in (await s3("HEAD", "a")).headers


async def test_a_promise_that_nobody_keeps_is_not_made(place: Place) -> None:
    s3 = await place.client()
    for vow in (
        {"x_amz_server_side_encryption_customer_algorithm": "AES256"},
        {"x_amz_server_side_encryption": "aws:kms"},
        {"x_amz_object_lock_mode": "GOVERNANCE"},
    ):
        assert code(await s3("PUT", "a", body=b"x", **vow)) == (501, "NotImplemented")
        assert code(await s3("POST", "a", query="uploads", **vow)) == (501, "NotImplemented")
    assert (await s3("PUT", "a", body=b"x", x_amz_server_side_encryption="AES256")).status_code == 200


async def test_what_no_client_could_read_back_is_refused(place: Place) -> None:
    s3 = await place.client()
    assert code(await s3("PUT", "a", body=b"x", x_amz_meta_a="x" * 2048)) == (400, "MetadataTooLarge")
    assert code(await s3("PUT", "a", body=b"x", x_amz_meta_a="a\tb")) == (400, "InvalidArgument")
    assert (await s3("HEAD", "a")).status_code == 404


async def test_many_are_deleted_at_once_and_each_failure_is_told(place: Place) -> None:
    s3 = await place.client()
    await s3.put("a")
    await s3.put("b")
    body = (
        b"<Delete><Object><Key>a</Key></Object><Object><Key>b</Key></Object><Object><Key>../x</Key></Object></Delete>"
    )
    answer = await s3("POST", query="delete", body=body)
    assert answer.text.count("<Deleted>") == 2
    assert value(answer, "Code") == "InvalidArgument"
    assert await s3.keys() == []
    for bad in (b"", b"<Delete>", b'<!DOCTYPE a [<!ENTITY b "c">]><Delete/>', b"<Delete/>"):
        assert code(await s3("POST", query="delete", body=bad)) == (400, "MalformedXML")


async def test_listings_have_pages_folders_and_odd_names(place: Place) -> None:
    s3 = await place.client()
    names = ["a.txt", "b/1", "b/2", "c & <d>+é", "e"]
    for name in names:
        await s3.put(name)
    assert await s3.keys() == names
    assert await s3.keys("") == names
    assert await s3.keys("list-type=2&delimiter=%2F") == ["a.txt", "c & <d>+é", "e", "b/"]
    assert await s3.keys("list-type=2&prefix=b%2F") == ["b/1", "b/2"]
    assert await s3.keys("list-type=2&prefix=b%2F&delimiter=%2F") == ["b/1", "b/2"]
    assert await s3.keys("list-type=2&start-after=b%2F1") == ["b/2", "c & <d>+é", "e"]
    assert await s3.keys("marker=b%2F1") == ["b/2", "c & <d>+é", "e"]
    assert await s3.keys("list-type=2&encoding-type=url") == ["a.txt", "b/1", "b/2", "c%20%26%20%3Cd%3E%2B%C3%A9", "e"]
    assert await s3.keys("list-type=2&max-keys=0") == []
    for start in ("list-type=2&max-keys=2", "list-type=2&max-keys=2&delimiter=%2F"):
        found, query = [], start
        while query:
            answer = await s3("GET", query=query)
            found += await s3.keys(query)
            more = value(answer, "IsTruncated") == "true"
            query = f"{start}&continuation-token={quote(value(answer, 'NextContinuationToken'))}" if more else ""
        assert sorted(found) == (names if "delimiter" not in start else ["a.txt", "b/", "c & <d>+é", "e"])
    for odd in ("list-type=2&delimiter=x", "list-type=2&max-keys=-1", "list-type=2&continuation-token=%FF", "versions"):
        assert code(await s3("GET", query=odd))[0] in (400, 501)


async def test_a_bucket_answers_for_itself(place: Place) -> None:
    s3 = await place.client()
    assert (await s3("HEAD")).status_code == 200
    assert "us-east-1" in (await s3("GET", query="location")).text
    assert value(await s3("GET", bucket=""), "Name") == "objects"
    assert code(await s3("PUT")) == (405, "MethodNotAllowed")
    assert code(await s3("GET", "a", query="acl")) == (501, "NotImplemented")
    assert code(await s3("GET", "a", query="tagging=")) == (501, "NotImplemented")


# --- who may ----------------------------------------------------------------------------------------------------------


async def test_a_clock_may_be_ten_minutes_off_and_not_twenty(place: Place) -> None:
    s3 = await place.client()
    for minutes, right in ((10, True), (-10, True), (20, False), (-20, False)):
        s3.late = timedelta(minutes=minutes)
        answer = await s3("PUT", "a", body=b"x")
        if right:
            assert answer.status_code == 200
        else:
            assert code(answer) == (403, "RequestTimeTooSkewed")


async def test_whoever_is_not_known_is_refused(place: Place) -> None:
    s3 = await place.client()
    right, s3.secret = s3.secret, "0" * 64
    assert code(await s3("GET", "a")) == (403, "SignatureDoesNotMatch")
    s3.secret = right
    mine, s3.access_key = s3.access_key, s3.access_key[:-1] + "0"
    assert code(await s3("GET", "a"))[0] == 403
    for odd in ("AKIAIOSFODNN7EXAMPLE", "WTJ", "WTT" + "z" * 64, mine.lower()):
        s3.access_key = odd
        assert code(await s3("GET", "a")) == (403, "InvalidAccessKeyId")
    for headers in ({}, {"authorization": f"Bearer {place.token}"}, {"authorization": "AWS4-HMAC-SHA256 x"}):
        answer = await place.http.get(f"{ROOM}/_default_/objects/a", headers=headers)
        assert answer.status_code in (400, 403)


async def test_the_key_of_a_job_ends_with_the_job(place: Place) -> None:
    s3 = await place.client()
    await s3.put("a")
    place.opened.__exit__(None, None, None)
    assert code(await s3("GET", "a")) == (400, "ExpiredToken")
    assert code(await s3("PUT", "a", body=b"x")) == (400, "ExpiredToken")


async def test_an_operators_token_stands_behind_a_key_until_it_is_revoked(place: Place) -> None:
    digest = hashlib.sha256(b"operator").digest()
    await place.db.write(lambda tx: tokens.create(tx, digest, "operator", AT, label="ops"))
    s3 = await place.client(token="operator")
    await s3.put("a")
    await place.db.write(lambda tx: tokens.delete(tx, "operator"))
    assert code(await s3("GET", "a")) == (400, "ExpiredToken")


async def test_a_token_without_the_scope_gets_no_settings_and_its_key_no_objects(place: Place) -> None:
    assert "may not objects:read" in await place.ask("job_helpers/v2/s3_resource_info", {}, token="nobody", want=403)
    s3 = await place.client()
    s3.access_key, s3.secret = Ring((b"",)).credentials("nobody", job=False)
    assert (await s3("GET", "a")).status_code == 403


async def test_rules_decide_over_each_object_and_hide_the_others(place: Place) -> None:
    s3 = await place.client()
    for name in ("in/a", "out/b", "secret/c"):
        await s3.put(name)
    rules = (StorageRule("in/*", frozenset({"read", "list"})), StorageRule("out/*", frozenset({"write"})))
    place.storage(permissions=rules)
    assert (await s3("GET", "in/a")).status_code == 200
    assert (await s3("PUT", "out/b", body=b"x")).status_code == 200
    for method, key in (
        ("PUT", "in/a"),
        ("DELETE", "in/a"),
        ("GET", "out/b"),
        ("GET", "secret/c"),
        ("DELETE", "out/b"),
    ):
        assert code(await s3(method, key)) == (403, "AccessDenied")
    assert code(await s3("PUT", "out/x", x_amz_copy_source="/objects/secret/c")) == (403, "AccessDenied")
    assert code(await s3("POST", "in/x", "uploads")) == (403, "AccessDenied")
    assert await s3.keys() == ["in/a"]
    assert await s3.keys("list-type=2&delimiter=%2F") == ["in/"]
    answer = await s3("POST", query="delete", body=b"<Delete><Object><Key>in/a</Key></Object></Delete>")
    assert value(answer, "Code") == "AccessDenied"


async def test_a_job_that_only_looks_changes_nothing(place: Place) -> None:
    s3 = await place.client()
    await s3.put("a")
    place.session.dry = True
    assert (await s3("GET", "a")).status_code == 200
    for method, query in (("PUT", ""), ("DELETE", ""), ("POST", "uploads")):
        assert code(await s3(method, "a", query)) == (403, "AccessDenied")


async def test_there_is_one_bucket_and_no_way_out_of_it(place: Place, tmp_path: Path) -> None:
    s3 = await place.client()
    assert code(await s3("GET", "a", bucket="other")) == (404, "NoSuchBucket")
    (tmp_path / "outside").write_text("x")
    for key in (
        "%2E%2E/outside",
        "a/%2E%2E/%2E%2E/outside",
        "%2Fetc/passwd",
        "a%00b",
        "a//b",
        "%5C..%5Coutside",
        "%FF",
    ):
        for method in ("GET", "PUT", "DELETE"):
            assert (await s3(method, key)).status_code == 400, key
    s3.room = f"{ROOM}/unknown"
    assert code(await s3("GET", "a")) == (404, "NoSuchBucket")
    s3.room = "/api/w/other/s3_proxy/_wm_bucket_/_default_"
    assert code(await s3("GET", "a")) == (404, "NoSuchBucket")
    assert stored(tmp_path) == ["outside"]


async def test_each_storage_has_an_endpoint(place: Place, tmp_path: Path) -> None:
    await (await place.client(storage="cold")).put("a")
    assert stored(tmp_path) == ["cold/a"]


async def test_a_client_that_takes_the_endpoint_for_a_host_signs_as_well(place: Place) -> None:
    s3 = await place.client()
    asked = sigv4.Asked("GET", f"/{s3.bucket}", "list-type=2", [("host", s3.host + s3.room)])
    headers = dict(sigv4.sign(asked, s3.access_key, s3.secret, AT, region="x")) | {"host": s3.host}
    answer = await place.http.get(f"http://{s3.host}{s3.room}/{s3.bucket}?list-type=2", headers=headers)
    assert answer.status_code == 200


async def test_a_content_disposition_is_kept_and_copied(place: Place) -> None:
    s3, name = await place.client(), 'attachment; filename="sales.csv"'
    await s3.put("a", content_disposition=name)
    copied = await s3("PUT", "b", x_amz_copy_source=f"/{s3.bucket}/a")
    assert copied.status_code == 200, copied.text
    assert [(await s3("GET", key)).headers["content-disposition"] for key in ("a", "b")] == [name, name]
    other = await s3("GET", "a", "response-content-disposition=inline")
    assert other.headers["content-disposition"] == "inline"


# --- bodies -----------------------------------------------------------------------------------------------------------


async def breaking(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    raise ConnectionResetError


@pytest.mark.parametrize("size", [100, s3_proxy.SMALL + 1])
async def test_a_body_that_is_not_what_was_signed_leaves_nothing(place: Place, tmp_path: Path, size: int) -> None:
    s3, body = await place.client(), bytes(size)
    answer = await s3("PUT", "a", body=body, payload=hashlib.sha256(b"else").hexdigest())
    assert code(answer) == (400, "XAmzContentSHA256Mismatch")
    wrong = base64.b64encode(bytes(16)).decode()
    assert code(await s3("PUT", "a", body=body, content_md5=wrong)) == (400, "BadDigest")
    answer = await s3("PUT", "a", body=body, x_amz_checksum_crc32="AAAAAA==", payload=sigv4.UNSIGNED)
    assert code(answer) == (400, "BadDigest")
    assert stored(tmp_path) == []


@pytest.mark.parametrize("size", [100, s3_proxy.SMALL + 1])
async def test_a_connection_that_breaks_in_the_middle_leaves_nothing(place: Place, tmp_path: Path, size: int) -> None:
    s3 = await place.client()
    upload = value(await s3("POST", "b", "uploads"), "UploadId")
    for key, query in (("a", ""), ("b", f"partNumber=1&uploadId={upload}")):
        headers = {"content_length": str(2 * size)}
        path = f"{s3.room}/{s3.bucket}/{key}"
        given = [("host", s3.host), ("content-length", headers["content_length"])]
        asked = sigv4.Asked("PUT", path, query, given)
        signed = sigv4.sign(asked, s3.access_key, s3.secret, AT, region="x", payload=sigv4.UNSIGNED)
        messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": bytes(size), "more_body": True},
            {"type": "http.disconnect"},
        ]
        sent: list[Any] = []

        async def receive(messages: list[dict[str, Any]] = messages) -> Any:
            return messages.pop(0) if len(messages) > 1 else messages[0]

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "PUT",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.encode(), text.encode()) for name, text in signed],
            "client": None,
            "server": None,
        }
        await place.application(scope, receive, send)
        assert sent[0]["status"] == 400
    assert stored(tmp_path) == [f"data/uploads/{upload}/upload.json"]


async def test_an_object_may_not_be_larger_than_the_configuration_says(place: Place, tmp_path: Path) -> None:
    place.config = replace(place.config, max_upload=10)
    s3 = await place.client()

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"xx"

    assert code(await s3("PUT", "a", body=b"x" * 11)) == (400, "EntityTooLarge")
    assert code(await s3("PUT", "a", body=endless())) == (400, "EntityTooLarge")
    assert (await s3("PUT", "a", body=b"x" * 10)).status_code == 200


# --- uploads in parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["crc32", "crc32c", "crc64nvme", "sha1", "sha256"])
async def test_the_checksum_of_a_whole_upload_is_the_objects(place: Place, tmp_path: Path, kind: str) -> None:
    s3, name = await place.client(), f"x_amz_checksum_{kind}"
    upload = value(await s3("POST", "a", query="uploads"), "UploadId")
    tags = []
    for number, body in ((1, b"hello "), (2, b"world")):
        answer = await s3("PUT", "a", query=f"partNumber={number}&uploadId={upload}", body=body)
        tags.append(f"<Part><PartNumber>{number}</PartNumber><ETag>{answer.headers['etag']}</ETag></Part>")
    wanted = f"<CompleteMultipartUpload>{''.join(tags)}</CompleteMultipartUpload>".encode()
    sum = sigv4.SUMS[name.replace("_", "-")]()
    assert sum is not None
    sum.update(b"hello world")
    right = base64.b64encode(sum.digest()).decode()
    wrong = base64.b64encode(bytes(len(sum.digest()))).decode()
    answer = await s3("POST", "a", query=f"uploadId={upload}", body=wanted, **{name: wrong})
    assert code(answer) == (400, "BadDigest")
    assert (await s3("HEAD", "a")).status_code == 404
    answer = await s3("POST", "a", query=f"uploadId={upload}", body=wanted, **{name: right})
    assert answer.status_code == 200, answer.text
    assert (await s3("GET", "a")).content == b"hello world"


async def test_the_checksum_of_checksums_is_not_taken_for_the_objects(place: Place) -> None:
    s3 = await place.client()
    upload = value(await s3("POST", "a", query="uploads"), "UploadId")
    etag = (await s3("PUT", "a", query=f"partNumber=1&uploadId={upload}", body=b"x")).headers["etag"]
    wanted = f"<Upload><Part><PartNumber>1</PartNumber><ETag>{etag}</ETag></Part></Upload>".encode()
    answer = await s3("POST", "a", query=f"uploadId={upload}", body=wanted, x_amz_checksum_crc32="AAAAAA==-1")
    assert answer.status_code == 200, answer.text


def complete(*parts: tuple[int, str]) -> bytes:
    inside = "".join(f"<Part><PartNumber>{n}</PartNumber><ETag>{etag}</ETag></Part>" for n, etag in parts)
    return f"<CompleteMultipartUpload>{inside}</CompleteMultipartUpload>".encode()


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder looks like a storage that is far away, to which parts go on while they come in."""
    storage = Objects.storage

    async def told(self: Objects, name: str | None = None) -> Storage:
        return replace(await storage(self, name), kind="s3")

    monkeypatch.setattr(Objects, "storage", told)


@pytest.mark.parametrize("where", ["near", "far"])
async def test_parts_come_in_any_order_and_again(
    place: Place, tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    if where == "far":
        request.getfixturevalue("far")
    s3 = await place.client()
    upload = value(await s3("POST", "a", "uploads", content_type="text/x-mine"), "UploadId")
    etags = {}
    for number, body in ((3, b"three"), (1, b"old"), (1, b"one,"), (2, b"two,")):
        answer = await s3("PUT", "a", f"partNumber={number}&uploadId={upload}", body=body)
        etags[number] = answer.headers["etag"]
    assert await s3.keys() == []
    assert [
        upload in (await s3("GET", query="uploads")).text,
        (await s3("GET", "a", f"uploadId={upload}")).text.count("<Part>"),
    ] == [True, 3]
    done = f"uploadId={upload}"
    assert code(await s3("POST", "a", done, body=complete((1, '"0"')))) == (400, "InvalidPart")
    assert code(await s3("POST", "a", done, body=complete((2, etags[2]), (1, etags[1])))) == (400, "InvalidPartOrder")
    assert code(await s3("POST", "b", done, body=complete((1, etags[1])))) == (404, "NoSuchUpload")
    answer = await s3("POST", "a", done, body=complete(*sorted(etags.items())))
    assert value(answer, "ETag") == (await s3("HEAD", "a")).headers["etag"]
    answer = await s3("GET", "a")
    assert (answer.content, answer.headers["content-type"]) == (b"one,two,three", "text/x-mine")
    assert code(await s3("POST", "a", done, body=complete((1, etags[1])))) == (404, "NoSuchUpload")
    assert value(await s3("POST", "a", done, body=complete(*sorted(etags.items()))), "ETag")  # its answer was lost
    assert stored(tmp_path) == ["objects/a"]


async def test_a_part_is_a_copy_of_a_range(place: Place) -> None:
    s3 = await place.client()
    await s3.put("a", b"hello world")
    upload = value(await s3("POST", "b", "uploads"), "UploadId")
    part = f"partNumber=1&uploadId={upload}"
    copy = {"x_amz_copy_source": "/objects/a", "x_amz_copy_source_range": "bytes=6-10"}
    etag = value(await s3("PUT", "b", part, **copy), "ETag")
    await s3("POST", "b", f"uploadId={upload}", body=complete((1, etag)))
    assert (await s3("GET", "b")).content == b"world"


@pytest.mark.usefixtures("far")
async def test_parts_go_on_to_the_storage_while_others_come_in(place: Place, tmp_path: Path) -> None:
    s3 = await place.client()
    upload = value(await s3("POST", "a", "uploads"), "UploadId")
    etags = []
    for number in (1, 2):
        part = bytes([number]) * (2 * s3_proxy.SMALL)
        etags.append((await s3("PUT", "a", f"partNumber={number}&uploadId={upload}", body=part)).headers["etag"])
        for _ in range(1000):
            waiting = [file.stat().st_size for file in (tmp_path / "objects" / ".uploads").iterdir()]
            if waiting == [number * 2 * s3_proxy.SMALL]:
                break
            await asyncio.sleep(0.005)  # written in a thread
        assert waiting == [number * 2 * s3_proxy.SMALL]
    assert await s3.keys() == []
    await s3("POST", "a", f"uploadId={upload}", body=complete((1, etags[0]), (2, etags[1])))
    assert (await s3("HEAD", "a")).headers["content-length"] == str(4 * s3_proxy.SMALL)
    upload = value(await s3("POST", "b", "uploads"), "UploadId")
    await s3("PUT", "b", f"partNumber=1&uploadId={upload}", body=b"x")
    assert (await s3("DELETE", "b", f"uploadId={upload}")).status_code == 204
    assert stored(tmp_path) == ["objects/a"]


async def test_an_upload_that_is_given_up_leaves_nothing(place: Place, tmp_path: Path) -> None:
    s3 = await place.client()
    for _ in range(2):
        upload = value(await s3("POST", "a", "uploads"), "UploadId")
        assert (await s3("PUT", "a", f"partNumber=1&uploadId={upload}", body=b"x")).status_code == 200
    assert (await s3("DELETE", "a", f"uploadId={upload}")).status_code == 204
    assert code(await s3("PUT", "a", f"partNumber=2&uploadId={upload}", body=b"x")) == (404, "NoSuchUpload")
    assert len(stored(tmp_path)) == 2  # the other one
    data = tmp_path / "data"
    await windmill.forget_uploads(data, datetime.now(UTC) + timedelta(hours=23))
    assert len(stored(tmp_path)) == 2
    await windmill.forget_uploads(data, datetime.now(UTC) + timedelta(hours=25))
    assert stored(tmp_path) == []
    await windmill.forget_uploads(tmp_path / "never", AT)


async def test_a_part_needs_a_number_and_an_upload_that_began(place: Place) -> None:
    s3 = await place.client()
    for id in ("../../x", "", "0" * 32):
        answer = await s3("PUT", "a", f"partNumber=1&uploadId={id}", body=b"x")
        assert code(answer) == (404, "NoSuchUpload")
    upload = value(await s3("POST", "a", "uploads"), "UploadId")
    for number in ("", "0", "10001", "x", "-1"):
        answer = await s3("PUT", "a", f"partNumber={number}&uploadId={upload}", body=b"x")
        assert code(answer) == (400, "InvalidArgument")


async def test_who_waits_long_for_an_upload_hears_blanks_and_then_how_it_went(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = await place.client()
    monkeypatch.setattr(s3_proxy, "PATIENCE", 0.0)
    for key, want in (("a", "CompleteMultipartUploadResult"), ("a", "Error")):
        upload = value(await s3("POST", key, "uploads"), "UploadId")
        etag = (await s3("PUT", key, f"partNumber=1&uploadId={upload}", body=b"x")).headers["etag"]
        answer = await s3("POST", key, f"uploadId={upload}", body=complete((1, etag)), if_none_match="*")
        assert answer.status_code == 200
        assert answer.text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n ')
        assert f"<{want}" in answer.text


# --- links ------------------------------------------------------------------------------------------------------------


async def link(place: Place, object: Any, **more: Any) -> str:
    [found] = await place.ask("apps/sign_s3_objects", {"s3_objects": [object], **more})
    assert None not in found.values()  # the Python client would make the word None of it
    return f"/api/w/main/s3_proxy/{found.get('storage', '_default_')}/{found['s3']}?{found['presigned']}"


async def test_a_link_lets_anybody_read_one_object_for_a_while(place: Place) -> None:
    await (await place.client()).put("a b", b"hello")
    url = await link(place, {"s3": "a b"})
    answer = await place.http.get(url)
    assert (answer.status_code, answer.content) == (200, b"hello")
    assert (await place.http.get(url, headers={"range": "bytes=1-2"})).content == b"el"
    assert (await place.http.head(url)).headers["content-length"] == "5"
    assert (await place.http.put(url, content=b"x")).status_code in (404, 405)
    place.now += timedelta(hours=12, seconds=-1)
    assert (await place.http.get(url)).status_code == 200
    place.now += timedelta(seconds=1)
    assert code(await place.http.get(url)) == (403, "AccessDenied")


async def test_a_link_that_was_tampered_with_is_refused(place: Place) -> None:
    s3 = await place.client()
    for name in ("a", "b"):
        await s3.put(name)
    await (await place.client(storage="cold")).put("a")
    url = await link(place, "s3:///a")
    path, _, query = url.partition("?")
    signature = query.partition("sig=")[2]
    for wrong in (
        url.replace("/a?", "/b?"),
        url.replace("/_default_/", "/cold/"),
        url.replace("exp=", "exp=1"),
        f"{url}0",
        url[:-1],
        path,
        f"{path}?sig={signature}",
        f"{path}?exp=x&sig={signature}",
        f"{url}&exp=9999999999",
        f"{path}?exp=9999999999&sig=ü",
    ):
        assert code(await place.http.get(wrong)) == (403, "AccessDenied"), wrong


async def test_how_long_a_link_lives_has_limits(place: Place) -> None:
    for seconds, lives in ((1, 60), (-5, 60), (3600, 3600), (10**12, 604800), (None, 43200)):
        url = await link(place, {"s3": "a"}, **({} if seconds is None else {"expiry_secs": seconds}))
        assert int(url.partition("exp=")[2].partition("&")[0]) == AT.timestamp() + lives
    for bad in ({"s3_objects": "a"}, {}, {"s3_objects": [{"s3": "../a"}]}, {"s3_objects": ["a"]}):
        await place.ask("apps/sign_s3_objects", bad, want=400)
    await place.ask("apps/sign_s3_objects", {"s3_objects": [], "expiry_secs": "1"}, want=400)
    await place.ask("apps/sign_s3_objects", {"s3_objects": [{"s3": "a", "storage": "gone"}]}, want=404)


async def test_who_may_not_read_an_object_may_sign_no_link_to_it(place: Place) -> None:
    place.storage(permissions=())
    assert "may not read a" in await place.ask("apps/sign_s3_objects", {"s3_objects": [{"s3": "a"}]}, want=403)


async def test_links_and_keys_outlive_a_restart_and_a_new_secret_key(sqlite_db: Database, tmp_path: Path) -> None:
    old, new = new_key(), new_key()
    first = Place(sqlite_db, tmp_path, key=load_key({"WATCHER_SECRET_KEY": old}))
    await (await first.client()).put("a")
    url = await link(first, {"s3": "a"})
    for lines, right in ((old, True), (f"{new}\n{old}", True), (new, False)):
        again = Place(sqlite_db, tmp_path, key=load_key({"WATCHER_SECRET_KEY": lines}))
        assert (await again.http.get(url)).status_code == (200 if right else 403)


# --- settings ---------------------------------------------------------------------------------------------------------


async def test_settings_lead_to_the_proxy_and_show_no_credentials(place: Place) -> None:
    place.storage(PRIMARY, kind="s3", path=None, resource="u/admin/s3")
    for name in ("s3_resource_info", "polars_connection_settings", "duckdb_connection_settings"):
        text = str(await place.ask(f"job_helpers/v2/{name}", {}))
        assert "here:8321/api/w/main/s3_proxy/_wm_bucket_/_default_" in text
        assert "lake" in text  # the bucket's own name, which scripts put into addresses
        assert "hush" not in text
        assert place.token not in text
    assert await place.ask("job_helpers/v2/s3_proxy_bucket") == {"bucket": "lake"}


async def test_a_public_storage_is_reached_directly(place: Place) -> None:
    place.storage(PRIMARY, kind="s3", path=None, resource="u/admin/s3", public=True)
    found = await place.ask("job_helpers/v2/s3_resource_info", {})
    assert (found["endPoint"], found["secretKey"]) == ("s3.example.com", "hush")
    place.storage(PRIMARY, kind="azure_blob", resource="u/admin/azure_blob")
    assert "az_secret" in str(await place.ask("job_helpers/v2/duckdb_connection_settings", {}))
    assert "s3_proxy" in str(await place.ask("job_helpers/v2/polars_connection_settings", {}))


async def test_a_resource_is_reached_with_its_own_credentials_by_whoever_may_read_it(place: Place) -> None:
    for path in ("u/admin/s3", "$res:u/admin/s3"):
        found = await place.ask("job_helpers/v2/polars_connection_settings", {"s3_resource_path": path})
        assert found["storage_options"]["aws_secret_access_key"] == "hush"
    place.principals["objects"] = replace(place.principals["nobody"], scopes=("objects",))
    asked = {"s3_resource_path": "u/admin/s3"}
    await place.ask("job_helpers/v2/polars_connection_settings", asked, token="objects", want=403)
    await place.ask("job_helpers/v2/polars_connection_settings", {"s3_resource_path": "u/gone"}, want=404)
    for path in ("u/admin/azure_blob", "u/admin/gcs"):
        said = await place.ask("job_helpers/v2/s3_resource_info", {"s3_resource_path": path}, want=400)
        assert "does not speak S3" in said
    duck = await place.ask("job_helpers/v2/duckdb_connection_settings", {"s3_resource_path": "u/admin/azure_blob"})
    assert duck["azure_container_path"] == "az://lake"
    first = await place.ask("job_helpers/polars_connection_settings", {"s3_resource": {"bucket": "b"}})
    assert first["s3_bucket"] == "b"


async def test_without_a_storage_windmills_own_sentence_is_said(place: Place) -> None:
    place.config = replace(place.config, storages={})
    for name in ("s3_resource_info", "polars_connection_settings", "duckdb_connection_settings"):
        said = await place.ask(f"job_helpers/v2/{name}", {}, want=404)
        assert said == "No datasets storage resource defined at the workspace level"
    await place.ask("job_helpers/v2/s3_proxy_bucket", want=404)


async def test_requests_at_once_do_not_disturb_each_other(place: Place) -> None:
    s3 = await place.client()
    await asyncio.gather(*(s3.put(f"n/{n}", bytes([n]) * 1000) for n in range(50)))
    assert len(await s3.keys()) == 50
    answers = await asyncio.gather(*(s3("GET", f"n/{n}") for n in range(50)))
    assert [answer.content for answer in answers] == [bytes([n]) * 1000 for n in range(50)]
