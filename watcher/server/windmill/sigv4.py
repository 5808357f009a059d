"""AWS's Signature Version 4 as S3 uses it: requests and chunked bodies, checked and signed. Pure.

Source: the S3 API reference, "Authenticating Requests (AWS Signature Version 4)".
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Protocol
from urllib.parse import quote, unquote_to_bytes

ALGORITHM = "AWS4-HMAC-SHA256"
UNSIGNED = "UNSIGNED-PAYLOAD"
SIGNED_CHUNKS = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
SIGNED_CHUNKS_TRAILER = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
UNSIGNED_CHUNKS_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
CHUNKED = (SIGNED_CHUNKS, SIGNED_CHUNKS_TRAILER, UNSIGNED_CHUNKS_TRAILER)

SKEW = timedelta(minutes=15)
LONGEST = timedelta(days=7)
"""How long a presigned request may be good for."""

EMPTY = hashlib.sha256(b"").hexdigest()
_LONGEST_LINE = 16 * 1024  # bytes of a chunk's head, or of all trailers
_MOST_DIGITS = 10  # of a chunk's size in hex
_TIME = "%Y%m%dT%H%M%SZ"
_HEX = re.compile(r"[0-9a-f]{64}")
_SPACES = re.compile(r" +")

Pairs = Sequence[tuple[str, str]]


class Refusal(Exception):
    """What S3 would refuse, by its own code: ``SignatureDoesNotMatch``, ``RequestTimeTooSkewed`` …"""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came: the path still percent-encoded, header names in lower case, nothing decoded."""

    method: str
    path: str
    query: str
    headers: Pairs

    def header(self, name: str) -> str | None:
        """The first of that name."""
        return next((value for key, value in self.headers if key == name), None)


@dataclass(frozen=True, slots=True)
class Claim:
    """Who a request says it is from, and what it was signed with. Nothing of it is proven yet.

    ``payload`` is the SHA-256 of the body in hex, or one of the words of this module. ``expires``: of a presigned URL.
    """

    access_key: str
    at: datetime
    scope: str
    signed: tuple[str, ...]
    signature: str
    payload: str
    expires: timedelta | None = None

    @property
    def region(self) -> str:
        return self.scope.split("/")[1]


# --- reading ----------------------------------------------------------------------------------------------------------


def pairs(query: str) -> list[tuple[str, str]]:
    """Names and values of a query, decoded; what is not UTF-8 is kept as surrogates."""
    return [
        (_decoded(name), _decoded(value))
        for name, _, value in (part.partition("=") for part in query.split("&") if part)
    ]


def _decoded(text: str) -> str:
    return unquote_to_bytes(text.replace("+", " ")).decode("utf-8", "surrogateescape")


def claim(asked: Asked) -> Claim | None:
    """What the request says of itself; None when it is not signed at all. Raises Refusal."""
    query = dict(pairs(asked.query))
    given = asked.header("authorization")
    if given is not None and given.startswith(ALGORITHM):
        if "X-Amz-Signature" in query:
            raise Refusal("InvalidArgument", "a request is signed in its header or in its query, not in both")
        return _from_header(asked, given)
    if "X-Amz-Signature" in query or "X-Amz-Algorithm" in query:
        return _from_query(asked, query)
    return None


def _from_header(asked: Asked, given: str) -> Claim:
    parts = {
        name.strip(): value.strip()
        for name, _, value in (part.partition("=") for part in given.removeprefix(ALGORITHM).split(","))
    }
    if not {"Credential", "SignedHeaders", "Signature"} <= parts.keys():
        raise Refusal("AuthorizationHeaderMalformed", "Authorization needs Credential, SignedHeaders and Signature")
    payload = asked.header("x-amz-content-sha256")
    if payload is None:
        raise Refusal("InvalidRequest", "the header x-amz-content-sha256 is missing")
    at = asked.header("x-amz-date")
    if at is None:
        raise Refusal("AccessDenied", "the header x-amz-date is missing")
    return _claim(asked, parts["Credential"], at, parts["SignedHeaders"], parts["Signature"], payload)


def _from_query(asked: Asked, query: Mapping[str, str]) -> Claim:
    missing = {"X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-SignedHeaders"}
    if missing := {*missing, "X-Amz-Signature"} - query.keys():
        raise Refusal("AuthorizationQueryParametersError", f"{min(missing)} is missing")
    if query["X-Amz-Algorithm"] != ALGORITHM:
        raise Refusal("AuthorizationQueryParametersError", f"X-Amz-Algorithm must be {ALGORITHM}")
    seconds = query["X-Amz-Expires"]
    if not seconds.isascii() or not seconds.isdigit() or not 0 < int(seconds[:9]) <= LONGEST.total_seconds():
        raise Refusal("AuthorizationQueryParametersError", "X-Amz-Expires is a number of seconds, a week at most")
    payload = query.get("X-Amz-Content-Sha256") or asked.header("x-amz-content-sha256") or UNSIGNED
    return _claim(
        asked,
        query["X-Amz-Credential"],
        query["X-Amz-Date"],
        query["X-Amz-SignedHeaders"],
        query["X-Amz-Signature"],
        payload,
        timedelta(seconds=int(seconds)),
    )


def _claim(
    asked: Asked,
    credential: str,
    date: str,
    signed_headers: str,
    signature: str,
    payload: str,
    expires: timedelta | None = None,
) -> Claim:
    access_key, _, scope = credential.partition("/")
    parts = scope.split("/")
    code = "AuthorizationHeaderMalformed" if expires is None else "AuthorizationQueryParametersError"
    if not access_key or len(parts) != 4 or parts[2:] != ["s3", "aws4_request"]:
        raise Refusal(code, "the credential must be KEY/DATE/REGION/s3/aws4_request")
    try:
        at = datetime.strptime(date, _TIME).replace(tzinfo=UTC)
    except ValueError:
        raise Refusal("AccessDenied", "the date must be like 20260101T000000Z") from None
    if parts[0] != date[:8]:
        raise Refusal(code, f"the credential is for {parts[0]} and the request for {date[:8]}")
    if not (_HEX.fullmatch(payload) or payload == UNSIGNED or payload in CHUNKED):
        raise Refusal("InvalidArgument", "x-amz-content-sha256 must be the SHA-256 of the body, or UNSIGNED-PAYLOAD")
    signed = tuple(signed_headers.split(";"))
    bare = {name for name, _ in asked.headers if name == "host" or name.startswith("x-amz-")} - {*signed}
    if expires is not None and payload == UNSIGNED:
        bare.discard("x-amz-content-sha256")
    if bare:
        raise Refusal("AccessDenied", f"the header {min(bare)} was not signed")
    return Claim(access_key, at, scope, signed, signature, payload, expires)


# --- checking ---------------------------------------------------------------------------------------------------------


def check_time(claimed: Claim, now: datetime) -> None:
    """Raise Refusal for a request that is too old or from the future. Needs no secret."""
    if claimed.expires is None:
        if abs(now - claimed.at) > SKEW:
            raise Refusal("RequestTimeTooSkewed", "the clock of the client is more than 15 minutes off")
    elif now < claimed.at - SKEW:
        raise Refusal("AccessDenied", "Request is not valid yet")
    elif now >= claimed.at + claimed.expires:
        raise Refusal("AccessDenied", "Request has expired")


def check(asked: Asked, claimed: Claim, secret: str) -> None:
    """Raise Refusal unless the request was signed with this secret, in a time that tells nothing about it."""
    if not hmac.compare_digest(
        signature(asked, claimed, secret).encode(), claimed.signature.encode("utf-8", "replace")
    ):
        raise Refusal(
            "SignatureDoesNotMatch",
            "the signature is not the one that this request has with the secret of that access key",
        )


def signature(asked: Asked, claimed: Claim, secret: str) -> str:
    """The right signature of a request, in hex."""
    canonical = canonical_request(asked, claimed).encode("utf-8", "surrogateescape")
    text = f"{ALGORITHM}\n{claimed.at:{_TIME}}\n{claimed.scope}\n{hashlib.sha256(canonical).hexdigest()}"
    return _mac(signing_key(secret, claimed.scope), text).hex()


def canonical_request(asked: Asked, claimed: Claim) -> str:
    """The text that stands for the whole request."""
    headers = "".join(f"{name}:{_values(asked.headers, name)}\n" for name in claimed.signed)
    query = canonical_query(asked.query)
    return "\n".join(
        [asked.method, canonical_path(asked.path), query, headers, ";".join(claimed.signed), claimed.payload]
    )


def canonical_path(path: str) -> str:
    """Encoded once, as S3 alone does it; neither ``//`` nor ``..`` is folded."""
    return quote(unquote_to_bytes(path), safe="/-_.~") or "/"


def canonical_query(query: str) -> str:
    """Sorted and encoded, without the signature itself."""
    encoded = [
        (quote(name, safe="-_.~", errors="surrogateescape"), quote(value, safe="-_.~", errors="surrogateescape"))
        for name, value in pairs(query)
    ]
    return "&".join(f"{name}={value}" for name, value in sorted(encoded) if name != "X-Amz-Signature")


def _values(headers: Pairs, name: str) -> str:
    return ",".join(_SPACES.sub(" ", value.strip()) for key, value in headers if key == name)


def _mac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode("utf-8", "surrogateescape"), "sha256")


@lru_cache(maxsize=256)
def signing_key(secret: str, scope: str) -> bytes:
    """The key of one day, region and service, from ``20130524/us-east-1/s3/aws4_request``."""
    key = f"AWS4{secret}".encode("utf-8", "surrogateescape")
    for part in scope.split("/"):
        key = _mac(key, part)
    return key


# --- signing ----------------------------------------------------------------------------------------------------------


def sign(asked: Asked, access_key: str, secret: str, at: datetime, *, region: str, payload: str = EMPTY) -> Pairs:
    """The headers of a request with those that sign it. ``host`` must be among them already."""
    scope = f"{at:%Y%m%d}/{region}/s3/aws4_request"
    headers = [*asked.headers, ("x-amz-date", f"{at:{_TIME}}"), ("x-amz-content-sha256", payload)]
    signed = tuple(sorted({name for name, _ in headers}))
    claimed = Claim(access_key, at, scope, signed, "", payload)
    right = signature(Asked(asked.method, asked.path, asked.query, headers), claimed, secret)
    credential = f"Credential={access_key}/{scope}, SignedHeaders={';'.join(signed)}, Signature={right}"
    return [*headers, ("authorization", f"{ALGORITHM} {credential}")]


# --- bodies -----------------------------------------------------------------------------------------------------------


class Summed(Protocol):
    """A checksum in the making."""

    def update(self, data: bytes, /) -> object: ...

    def digest(self) -> bytes: ...


class _Crc:
    def __init__(self, of: Callable[[bytes, int], int], size: int) -> None:
        self._of = of
        self._size = size  # bytes
        self._sum = 0

    def update(self, data: bytes) -> None:
        self._sum = self._of(data, self._sum)

    def digest(self) -> bytes:
        return self._sum.to_bytes(self._size, "big")


def _amazons(name: str, size: int) -> Summed | None:
    """By Amazon's own library: in Python alone either would be a hundred times slower than the upload."""
    try:
        from awscrt import checksums  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        return None
    return _Crc(getattr(checksums, name), size)


SUMS: Mapping[str, Callable[[], Summed | None]] = {
    "content-md5": lambda: hashlib.md5(usedforsecurity=False),
    "x-amz-checksum-sha1": lambda: hashlib.sha1(usedforsecurity=False),
    "x-amz-checksum-sha256": hashlib.sha256,
    "x-amz-checksum-crc32": lambda: _Crc(zlib.crc32, 4),
    "x-amz-checksum-crc32c": lambda: _amazons("crc32c", 4),
    "x-amz-checksum-crc64nvme": lambda: _amazons("crc64nvme", 8),
}
"""The checksums that are verified; None without the library for it: such a body is held to its signature and length."""


def sums(names: Iterable[str]) -> dict[str, Summed]:
    """Those of these headers that are checksums, to be fed."""
    made = {name: SUMS[name]() for name in names if name in SUMS}
    return {name: each for name, each in made.items() if each is not None}


def check_sums(fed: Mapping[str, Summed], given: Mapping[str, str]) -> None:
    """Raise Refusal unless each is what was given."""
    for name, each in fed.items():
        if not _equal(given.get(name, ""), each.digest()):
            raise Refusal("BadDigest", f"the body does not have the {name} that was sent with it")


class Body:
    """The bytes of a signed request as they come in: unwrapped, counted and verified.

    `feed` gives what is the object's, `finish` raises Refusal unless all of it came and was what the client signed and
    summed. Nothing may be kept before `finish` has returned.
    """

    def __init__(self, asked: Asked, claimed: Claim, secret: str) -> None:
        self._payload = claimed.payload
        self._size = _size(asked, claimed.payload in CHUNKED)
        self._seen = 0
        self._sha = hashlib.sha256() if _HEX.fullmatch(claimed.payload) else None
        self._wanted = {name: value for name, value in asked.headers if name in SUMS}
        self._chunks: Chunks | None = None
        names = [*self._wanted]
        if claimed.payload in CHUNKED:
            signs = None
            if claimed.payload != UNSIGNED_CHUNKS_TRAILER:
                signs = Signs(signing_key(secret, claimed.scope), claimed)
            self._chunks = Chunks(signs, trailer=claimed.payload != SIGNED_CHUNKS)
            names += [name.strip().lower() for name in (asked.header("x-amz-trailer") or "").split(",")]
        self._sums = sums(names)

    @property
    def size(self) -> int | None:
        """Bytes of the object, when the request says so."""
        return self._size

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What came off the wire → what belongs to the object. Raises Refusal."""
        for piece in self._chunks.feed(data) if self._chunks else (data,):
            self._seen += len(piece)
            if self._size is not None and self._seen > self._size:
                raise Refusal("IncompleteBody", "the body is longer than was announced")
            if self._sha is not None:
                self._sha.update(piece)
            for each in self._sums.values():
                each.update(piece)
            yield piece

    def finish(self) -> None:
        """The end of the body. Raises Refusal: broken off, or something else than was signed."""
        trailers = self._chunks.finish() if self._chunks else {}
        if self._size is not None and self._seen != self._size:
            raise Refusal("IncompleteBody", f"the body broke off after {self._seen} of {self._size} bytes")
        if self._sha is not None and not hmac.compare_digest(self._sha.hexdigest(), self._payload):
            raise Refusal("XAmzContentSHA256Mismatch", "the body is not the one that was signed")
        check_sums(self._sums, {**self._wanted, **trailers})


def _size(asked: Asked, chunked: bool) -> int | None:
    text = asked.header("x-amz-decoded-content-length" if chunked else "content-length")
    if text is None:
        if chunked:
            raise Refusal("MissingContentLength", "the header x-amz-decoded-content-length is missing")
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise Refusal("InvalidArgument", "the length of the body is not a number")
    return int(text)


def _equal(text: str, digest: bytes) -> bool:
    try:
        return hmac.compare_digest(base64.b64decode(text.strip(), validate=True), digest)
    except (binascii.Error, ValueError):
        return False


class Signs:
    """The chain of signatures that holds the chunks of one body together."""

    def __init__(self, key: bytes, claimed: Claim) -> None:
        self._key = key
        self._middle = f"{claimed.at:{_TIME}}\n{claimed.scope}"
        self._last = claimed.signature

    def next(self, sha: str) -> str:
        """The signature of the next chunk."""
        self._last = _mac(self._key, f"{ALGORITHM}-PAYLOAD\n{self._middle}\n{self._last}\n{EMPTY}\n{sha}").hex()
        return self._last

    def trailer(self, sha: str) -> str:
        """The signature of what follows the last one."""
        return _mac(self._key, f"AWS4-HMAC-SHA256-TRAILER\n{self._middle}\n{self._last}\n{sha}").hex()


class Chunks:
    """aws-chunked: ``SIZE;chunk-signature=…`` CRLF data CRLF … ``0`` CRLF trailers CRLF, as it comes in.

    ``signs`` is None when chunks carry no signatures.
    """

    def __init__(self, signs: Signs | None, *, trailer: bool) -> None:
        self._signs = signs
        self._trailer = trailer
        self._buffer = b""  # what may be a head, an end of line or trailers: never an object's bytes
        self._left = 0  # bytes of the chunk that are still to come
        self._sha = hashlib.sha256()
        self._given = ""  # the signature that the head of this chunk gave
        self._state = "head"  # head, data, end (of the data), trailers

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The object's bytes in these. A chunk that was not signed raises Refusal at its end."""
        at = 0
        while at < len(data):
            if self._state == "data":
                piece = data if at == 0 and len(data) <= self._left else data[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                if self._signs:
                    self._sha.update(piece)
                if not self._left:
                    self._state = "end"
                yield piece
            elif self._state == "trailers":
                self._buffer += data[at:]
                at = len(data)
                self._bounded()
            else:
                at = self._line(data, at)

    def _line(self, data: bytes, at: int) -> int:
        end = data.find(b"\n", at)
        stop = len(data) if end < 0 else end + 1
        self._buffer += data[at:stop]
        self._bounded()
        if end >= 0:
            line, self._buffer = self._buffer, b""
            if not line.endswith(b"\r\n"):
                raise Refusal("IncompleteBody", "a line of the chunked body does not end as it should")
            self._head(line[:-2]) if self._state == "head" else self._ended(line[:-2])
        return stop

    def _bounded(self) -> None:
        if len(self._buffer) > _LONGEST_LINE:
            raise Refusal("InvalidRequest", "a chunk's head or the trailers are too long")

    def _head(self, line: bytes) -> None:
        size, _, extension = line.partition(b";")
        name, _, self._given = extension.decode("latin-1").partition("=")
        if not size or len(size) > _MOST_DIGITS or not re.fullmatch(rb"[0-9a-fA-F]+", size):
            raise Refusal("InvalidRequest", "a chunk begins with its size in hex")
        if self._signs and name != "chunk-signature":
            raise Refusal("SignatureDoesNotMatch", "a chunk has no signature")
        self._left = int(size, 16)
        self._sha = hashlib.sha256()
        if self._left:
            self._state = "data"
        else:
            self._verify()
            self._state = "trailers"

    def _ended(self, line: bytes) -> None:
        if line:
            raise Refusal("IncompleteBody", "a chunk is longer than its head says")
        self._verify()
        self._state = "head"

    def _verify(self) -> None:
        if self._signs and not hmac.compare_digest(
            self._signs.next(self._sha.hexdigest()).encode(), self._given.encode("utf-8", "replace")
        ):
            raise Refusal("SignatureDoesNotMatch", "a chunk of the body is not the one that was signed")

    def finish(self) -> dict[str, str]:
        """The trailers. Raises Refusal when the body broke off, or they are not the ones that were signed."""
        if self._state != "trailers":
            raise Refusal("IncompleteBody", "the body broke off before its last chunk")
        lines = [line for line in self._buffer.replace(b"\r\n", b"\n").split(b"\n") if line]
        found = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.decode("latin-1").partition(":") for line in lines)
        }
        given = found.pop("x-amz-trailer-signature", None)
        if self._signs and self._trailer:
            text = "".join(f"{name}:{value}\n" for name, value in found.items())
            right = self._signs.trailer(hashlib.sha256(text.encode("latin-1")).hexdigest())
            if given is None or not hmac.compare_digest(right.encode(), given.encode("utf-8", "replace")):
                raise Refusal("SignatureDoesNotMatch", "the trailers are not the ones that were signed")
        return found
