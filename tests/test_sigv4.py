"""Signature Version 4: AWS's own published examples, botocore's signer, and everything that is not quite right."""

from __future__ import annotations

import base64
import hashlib
import sys
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlsplit

import pytest

from watcher.server.windmill import sigv4
from watcher.server.windmill.sigv4 import Asked, Body, Claim, Refusal

KEY = "AKIAIOSFODNN7EXAMPLE"
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
AT = datetime(2013, 5, 24, tzinfo=UTC)
HOST = ("host", "examplebucket.s3.amazonaws.com")
DATE = ("x-amz-date", "20130524T000000Z")
SCOPE = "20130524/us-east-1/s3/aws4_request"

# "Examples: Signature Calculations" of the S3 API reference.
EXAMPLES = {
    "get": (
        Asked("GET", "/test.txt", "", [HOST, ("range", "bytes=0-9"), DATE, ("x-amz-content-sha256", sigv4.EMPTY)]),
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
    ),
    "put": (
        Asked(
            "PUT",
            "/test%24file.text",
            "",
            [
                HOST,
                ("date", "Fri, 24 May 2013 00:00:00 GMT"),
                DATE,
                ("x-amz-storage-class", "REDUCED_REDUNDANCY"),
                ("x-amz-content-sha256", hashlib.sha256(b"Welcome to Amazon S3.").hexdigest()),
            ],
        ),
        "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
    ),
    "lifecycle": (
        Asked("GET", "/", "lifecycle", [HOST, DATE, ("x-amz-content-sha256", sigv4.EMPTY)]),
        "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
    ),
    "list": (
        Asked("GET", "/", "max-keys=2&prefix=J", [HOST, DATE, ("x-amz-content-sha256", sigv4.EMPTY)]),
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
    ),
}


def signed(asked: Asked, signature: str) -> Asked:
    names = ";".join(sorted(name for name, _ in asked.headers))
    given = f"AWS4-HMAC-SHA256 Credential={KEY}/{SCOPE},SignedHeaders={names},Signature={signature}"
    return Asked(asked.method, asked.path, asked.query, [*asked.headers, ("authorization", given)])


def claimed(asked: Asked) -> Claim:
    found = sigv4.claim(asked)
    assert found is not None
    return found


def refused(asked: Asked, *, now: datetime = AT, secret: str = SECRET) -> str:
    """The code with which a request is refused; empty when it is not."""
    try:
        found = claimed(asked)
        sigv4.check_time(found, now)
        sigv4.check(asked, found, secret)
    except Refusal as refusal:
        return refusal.code
    return ""


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_published_examples_have_the_published_signatures(name: str) -> None:
    asked, right = EXAMPLES[name]
    asked = signed(asked, right)
    assert sigv4.signature(asked, claimed(asked), SECRET) == right
    assert refused(asked) == ""
    assert refused(asked, secret=SECRET[:-1]) == "SignatureDoesNotMatch"


def test_the_published_presigned_url_is_good_for_a_day() -> None:
    credential = quote(f"{KEY}/{SCOPE}", safe="")
    query = (
        f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={credential}&X-Amz-Date=20130524T000000Z"
        "&X-Amz-Expires=86400&X-Amz-SignedHeaders=host"
        "&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
    )
    asked = Asked("GET", "/test.txt", query, [HOST])
    assert refused(asked, now=AT + timedelta(hours=23)) == ""
    assert refused(asked, now=AT + timedelta(hours=24)) == "AccessDenied"
    assert refused(asked, now=AT - timedelta(minutes=16)) == "AccessDenied"
    for tampered in (
        Asked("PUT", "/test.txt", query, [HOST]),
        Asked("GET", "/test.tx", query, [HOST]),
        Asked("GET", "/test.txt", query.replace("86400", "86401"), [HOST]),
        Asked("GET", "/test.txt", f"{query}&x=1", [HOST]),
        Asked("GET", "/test.txt", query, [("host", "other")]),
    ):
        assert refused(tampered) == "SignatureDoesNotMatch"
    assert refused(Asked("GET", "/test.txt", query.replace("86400", "604801"), [HOST])).startswith("Authorization")
    assert refused(Asked("GET", "/test.txt", query.replace("Expires", "Expire"), [HOST])).startswith("Authorization")


# --- chunked bodies ---------------------------------------------------------------------------------------------------

DATA = b"a" * 66560
CHUNKS = [  # "Transferring Payload in Multiple Chunks"
    (65536, "ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648"),
    (1024, "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497"),
    (0, "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9"),
]
TRAILED = [  # the same with a trailer
    (65536, "b474d8862b1487a5145d686f57f013e54db672cee1c953b3010fb58501ef5aa2"),
    (1024, "1c1344b170168f8e65b41376b44b20fe354e373826ccbbe2c1d40a8cae51e5c7"),
    (0, "2ca2aba2005185cf7159c6277faf83795951dd77a3a99e6e65d5c9f85863f992"),
]
TRAILER_SIGNATURE = "d81f82fc3505edab99d459891051a732e8730629a2e4a59689829ca17fe2e435"


def chunked(payload: str, *more: tuple[str, str]) -> Asked:
    headers = [
        ("host", "s3.amazonaws.com"),
        DATE,
        ("x-amz-storage-class", "REDUCED_REDUNDANCY"),
        ("x-amz-content-sha256", payload),
        ("content-encoding", "aws-chunked"),
        ("x-amz-decoded-content-length", "66560"),
        *more,
    ]
    return Asked("PUT", "/examplebucket/chunkObject.txt", "", headers)


def plain_chunks() -> Asked:
    asked = chunked(sigv4.SIGNED_CHUNKS, ("content-length", "66824"))
    return signed(asked, "4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9")


def trailing_chunks() -> Asked:
    asked = chunked(sigv4.SIGNED_CHUNKS_TRAILER, ("x-amz-trailer", "x-amz-checksum-crc32c"))
    return signed(asked, "106e2a8a18243abcf37539882f36619c00e2dfc72633413f02d3b74544bfeb8e")


def wire(chunks: list[tuple[int, str]], trailer: bytes = b"\r\n", data: bytes = DATA) -> bytes:
    out, at = b"", 0
    for size, signature in chunks:
        out += f"{size:x};chunk-signature={signature}\r\n".encode()
        out += data[at : at + size] + b"\r\n" if size else b""
        at += size
    return out + trailer


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def read(asked: Asked, data: bytes, size: int = 1000) -> bytes:
    body = Body(asked, claimed(asked), SECRET)
    found = b"".join(piece for each in pieces(data, size) for piece in body.feed(each))
    body.finish()
    return found


@pytest.mark.parametrize("size", [1, 7, 1000, 70_000])
def test_signed_chunks_are_unwrapped_however_they_arrive(size: int) -> None:
    assert refused(plain_chunks()) == ""
    assert read(plain_chunks(), wire(CHUNKS), size) == DATA


TRAILER = b"x-amz-checksum-crc32c:sOO8/Q==\n\r\nx-amz-trailer-signature:" + TRAILER_SIGNATURE.encode() + b"\r\n\r\n"


@pytest.mark.parametrize("size", [29, 70_000])
def test_a_signed_trailer_is_checked(size: int) -> None:
    assert refused(trailing_chunks()) == ""
    assert read(trailing_chunks(), wire(TRAILED, TRAILER), size) == DATA
    for wrong in (TRAILER.replace(b"sOO8", b"sOO9"), TRAILER.replace(b"d81f", b"d81e"), b"\r\n"):
        with pytest.raises(Refusal, match="trailers"):
            read(trailing_chunks(), wire(TRAILED, wrong), size)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (wire(CHUNKS, data=b"b" + DATA[1:]), "SignatureDoesNotMatch"),
        (wire([(65536, CHUNKS[0][1]), (1024, CHUNKS[0][1])]), "SignatureDoesNotMatch"),
        (wire(CHUNKS[:2], b""), "IncompleteBody"),
        (wire(CHUNKS[:1], b""), "IncompleteBody"),
        (wire(CHUNKS)[:30_000], "IncompleteBody"),
        (b"", "IncompleteBody"),
        (b"zz;chunk-signature=1\r\n", "InvalidRequest"),
        (b"10000000000000000;chunk-signature=1\r\n", "InvalidRequest"),
        (b"5\r\nhello\r\n0\r\n\r\n", "SignatureDoesNotMatch"),
        (b"1;" + b"x" * 20_000, "InvalidRequest"),
        (wire(CHUNKS, b"x" * 20_000), "InvalidRequest"),
    ],
)
def test_a_chunked_body_that_is_not_as_it_was_signed_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(Refusal) as refusal:
        read(plain_chunks(), data)
    assert refusal.value.code == code


def unsigned_chunks(*headers: tuple[str, str]) -> tuple[Asked, Claim]:
    asked = Asked("PUT", "/b/k", "", [HOST, ("x-amz-trailer", "x-amz-checksum-crc32"), *headers])
    return asked, Claim(KEY, AT, SCOPE, ("host",), "", sigv4.UNSIGNED_CHUNKS_TRAILER)


def test_chunks_without_signatures_are_held_to_their_checksum() -> None:
    sum = base64.b64encode(zlib.crc32(b"hello").to_bytes(4, "big"))
    for trailer, good in ((sum, True), (b"AAAAAA==", False), (b"?", False)):
        body = Body(*unsigned_chunks(("x-amz-decoded-content-length", "5")), SECRET)
        assert b"".join(body.feed(b"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:" + trailer + b"\r\n\r\n")) == b"hello"
        if good:
            body.finish()
        else:
            with pytest.raises(Refusal, match="checksum"):
                body.finish()


def test_a_chunked_body_must_say_how_long_it_is() -> None:
    with pytest.raises(Refusal, match="decoded-content-length"):
        Body(*unsigned_chunks(), SECRET)
    with pytest.raises(Refusal, match="number"):
        Body(*unsigned_chunks(("x-amz-decoded-content-length", "-1")), SECRET)


def code_of(finish: Callable[[], None]) -> str:
    try:
        finish()
    except Refusal as refusal:
        return refusal.code
    return ""


def whole(payload: str, *headers: tuple[str, str]) -> Body:
    asked = Asked("PUT", "/b/k", "", [HOST, *headers])
    return Body(asked, Claim(KEY, AT, SCOPE, ("host",), "", payload), SECRET)


def test_a_body_is_held_to_its_hash_and_its_length() -> None:
    sha = hashlib.sha256(b"hello").hexdigest()
    md5 = base64.b64encode(hashlib.md5(b"hello").digest()).decode()
    for headers, data, code in (
        ([], b"hello", ""),
        ([], b"hallo", "XAmzContentSHA256Mismatch"),
        ([("content-length", "5")], b"hell", "IncompleteBody"),
        ([("content-md5", md5)], b"hello", ""),
        ([("content-md5", "AAAA")], b"hello", "BadDigest"),
        ([("x-amz-checksum-sha256", "AAAA")], b"hello", "BadDigest"),
        ([("x-amz-checksum-crc32", "NhCmhg==")], b"hello", ""),
        ([("x-amz-checksum-crc32c", "mnG7TA==")], b"hello", ""),
        ([("x-amz-checksum-crc32c", "mnG7TQ==")], b"hello", "BadDigest"),
        ([("x-amz-checksum-crc64nvme", "M3eFcAZSQlc=")], b"hello", ""),
        ([("x-amz-checksum-crc64nvme", "M3eFcAZSQlg=")], b"hello", "BadDigest"),
        ([("x-amz-checksum-crc64nvme", "NhCmhg==")], b"hello", "BadDigest"),
    ):
        body = whole(sha, *headers)
        assert b"".join(body.feed(data)) == data
        assert code_of(body.finish) == code
    with pytest.raises(Refusal, match="longer"):
        list(whole(sigv4.UNSIGNED, ("content-length", "4")).feed(b"hello"))


def test_without_the_library_for_them_two_checksums_are_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "awscrt", None)
    for name in ("crc32c", "crc64nvme"):
        body = whole(hashlib.sha256(b"hello").hexdigest(), (f"x-amz-checksum-{name}", "AAAA"))
        assert b"".join(body.feed(b"hello")) == b"hello"
        body.finish()


def test_a_checksum_that_was_announced_must_come() -> None:
    for trailer in (b"", b"x-amz-checksum-sha1:AAAA\r\n"):
        body = Body(*unsigned_chunks(("x-amz-decoded-content-length", "5")), SECRET)
        list(body.feed(b"5\r\nhello\r\n0\r\n" + trailer + b"\r\n"))
        assert code_of(body.finish) == "BadDigest"


# --- what is not quite right ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minutes", "code"), [(10, ""), (-10, ""), (20, "RequestTimeTooSkewed")])
def test_a_clock_may_be_off_by_a_quarter_of_an_hour(minutes: int, code: str) -> None:
    asked, right = EXAMPLES["get"]
    assert refused(signed(asked, right), now=AT + timedelta(minutes=minutes)) == code
    assert refused(signed(asked, right), now=AT - timedelta(minutes=minutes)) == code


def replaced(asked: Asked, name: str, value: str | None) -> Asked:
    headers = [(key, value if key == name and value is not None else old) for key, old in asked.headers]
    return Asked(asked.method, asked.path, asked.query, [h for h in headers if value is not None or h[0] != name])


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("x-amz-date", None, "AccessDenied"),
        ("x-amz-date", "yesterday", "AccessDenied"),
        ("x-amz-date", "20130525T000000Z", "AuthorizationHeaderMalformed"),
        ("x-amz-content-sha256", None, "InvalidRequest"),
        ("x-amz-content-sha256", "STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD", "InvalidArgument"),
        ("x-amz-content-sha256", "0" * 64, "SignatureDoesNotMatch"),
        ("range", "bytes=0-10", "SignatureDoesNotMatch"),
        ("authorization", "AWS4-HMAC-SHA256 nonsense", "AuthorizationHeaderMalformed"),
        ("authorization", "AWS4-HMAC-SHA256 Credential=k/x,SignedHeaders=host,Signature=s", "AuthorizationHeaderMal"),
        (
            "authorization",
            f"AWS4-HMAC-SHA256 Credential={KEY}/20130524/us-east-1/iam/aws4_request,SignedHeaders=host,Signature=s",
            "AuthorizationHeaderMalformed",
        ),
    ],
)
def test_a_header_that_is_missing_or_other_is_refused(name: str, value: str | None, code: str) -> None:
    asked, right = EXAMPLES["get"]
    assert refused(replaced(signed(asked, right), name, value)).startswith(code)


def test_a_header_of_amazons_that_was_not_signed_is_refused() -> None:
    asked, right = EXAMPLES["get"]
    asked = signed(asked, right)
    more = Asked("GET", asked.path, "", [*asked.headers, ("x-amz-copy-source", "/other/secret")])
    assert refused(more) == "AccessDenied"


def test_a_request_without_a_signature_claims_nothing() -> None:
    assert sigv4.claim(Asked("GET", "/b/k", "prefix=a", [HOST])) is None
    assert sigv4.claim(Asked("GET", "/b/k", "", [HOST, ("authorization", "Bearer x")])) is None


def test_our_own_signature_is_one_that_we_accept() -> None:
    asked = Asked("PUT", "/bucket/a%20key", "uploadId=a%2Bb&partNumber=1", [("host", "localhost:1")])
    headers = sigv4.sign(asked, KEY, SECRET, AT, region="auto", payload=sigv4.UNSIGNED)
    assert refused(Asked(asked.method, asked.path, asked.query, headers)) == ""


ODD_KEYS = ["a b", "a+b", "ünï/cödé", "a%20b", "a//b", "q?x=1&y", "~tilde'()*!", "=;,:@$", "..", "\U0001f600"]


@pytest.mark.parametrize("key", ODD_KEYS)
def test_what_botocore_signs_is_accepted(key: str) -> None:
    auth = pytest.importorskip("botocore.auth")
    awsrequest = pytest.importorskip("botocore.awsrequest")
    credentials = pytest.importorskip("botocore.credentials").Credentials(KEY, SECRET)
    url = f"http://127.0.0.1:8321/api/w/main/s3_proxy/{quote(key, safe='/~')}?list-type=2&prefix={quote(key, safe='')}"
    now = datetime.now(UTC)

    request = awsrequest.AWSRequest("PUT", url, data=b"hello", headers={"X-Amz-Meta-Name": "two  spaces "})
    request.context["payload_signing_enabled"] = True
    auth.S3SigV4Auth(credentials, "s3", "eu-west-3").add_auth(request)
    parts = urlsplit(request.url)
    headers = [(name.lower(), value) for name, value in request.headers.items()] + [("host", parts.netloc)]
    assert refused(Asked("PUT", parts.path, parts.query, headers), now=now) == ""

    request = awsrequest.AWSRequest("GET", url)
    auth.S3SigV4QueryAuth(credentials, "s3", "eu-west-3", expires=60).add_auth(request)
    parts = urlsplit(request.url)
    assert refused(Asked("GET", parts.path, parts.query, [("host", parts.netloc)]), now=now) == ""
