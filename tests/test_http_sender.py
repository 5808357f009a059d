"""The Sender against receivers of every kind: one request, one answer or one reason."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support import site as s
from tests.support.site import Answer, Site
from watcher.errors import DeliveryError
from watcher.http import Sender
from watcher.http.wire import explain
from watcher.values import Request

BRIEF = timedelta(seconds=0.3)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site() as site:
        yield site


@pytest.fixture
async def sender() -> AsyncIterator[Sender]:
    sender = Sender()
    yield sender
    await sender.close()


def post(url: str, body: bytes = b'{"a":1}', **headers: str) -> Request:
    return Request("POST", url, {"Content-Type": "application/json", **headers}, body)


async def kind(sender: Sender, request: Request, **options: Any) -> str:
    with pytest.raises(DeliveryError) as caught:
        await sender.send(request, timeout=timedelta(seconds=5), **options)
    assert len(str(caught.value)) < 500
    return caught.value.kind


async def test_exactly_what_was_asked_for_is_sent(site: Site, sender: Sender) -> None:
    response = await sender.send(post(site.on("/x", s.json("ok", 201, Location="/y"))), timeout=BRIEF)
    assert (response.status, response.body, response.headers["location"]) == (201, b'"ok"', "/y")
    (asked,) = site.asked
    assert (asked.method, asked.target, asked.body) == ("POST", "/x", b'{"a":1}')
    assert asked.headers == {
        "host": f"127.0.0.1:{site.port}",
        "content-type": "application/json",
        "content-length": "7",
    }


async def test_a_get_without_a_body(site: Site, sender: Sender) -> None:
    await sender.send(Request("GET", site.on("/x", s.json(1))), timeout=BRIEF)
    assert (site.asked[0].method, site.asked[0].body) == ("GET", b"")


async def test_one_connection_serves_many_deliveries(site: Site, sender: Sender) -> None:
    url = site.on("/x", s.json(1))
    for _ in range(20):
        await sender.send(post(url), timeout=BRIEF)
    assert site.connections == 1


@pytest.mark.parametrize("status", [200, 204, 301, 302, 307, 400, 404, 409, 410, 429, 500, 503])
async def test_every_status_is_an_answer_and_no_redirect_is_followed(site: Site, sender: Sender, status: int) -> None:
    answer = Answer(status, b"", {"location": site.url + "/elsewhere", "retry-after": "7"})
    response = await sender.send(post(site.on("/x", answer)), timeout=BRIEF)
    assert (response.status, response.headers["retry-after"]) == (status, "7")
    assert len(site.asked) == 1


async def test_cookies_are_not_kept(site: Site, sender: Sender) -> None:
    url = site.on("/x", s.json(1, set_cookie="a=b"))
    for _ in range(2):
        await sender.send(post(url), timeout=BRIEF)
    assert "cookie" not in site.asked[1].headers


@pytest.mark.parametrize("answer", [Answer(body=b"x" * 1_000_000), s.endless(), s.endless(chunked=True)])
async def test_of_a_long_answer_the_start_is_kept(site: Site, sender: Sender, answer: Answer) -> None:
    response = await sender.send(post(site.on("/x", answer)), timeout=timedelta(seconds=5), keep=100)
    assert response.body == b"x" * 100 or response.body.endswith(b"x" * 90)
    assert len(response.body) == 100


async def test_an_answer_of_exactly_what_is_kept(site: Site, sender: Sender) -> None:
    response = await sender.send(post(site.on("/x", Answer(body=b"x" * 100))), timeout=BRIEF, keep=100)
    assert response.body == b"x" * 100


async def test_a_bomb_is_not_unpacked(site: Site, sender: Sender) -> None:
    response = await sender.send(post(site.on("/x", s.bomb(inflated=1 << 26))), timeout=timedelta(seconds=5))
    assert response.body == bytes(4096)


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (s.drip(b"x" * 1000, 0.05), b"x"),
        (s.cut_short(b"half", 100), b"half"),
        (Answer(200, b"\xff\x00", {"content-encoding": "br"}), b"\xff\x00"),
        (Answer(200, b"not gzip", {"content-encoding": "gzip"}), b""),
    ],
)
async def test_the_status_counts_even_if_the_body_breaks_off(
    site: Site, sender: Sender, answer: Answer, body: bytes
) -> None:
    """The receiver has said that it has the item: a second delivery would be a duplicate."""
    response = await sender.send(post(site.on("/x", answer)), timeout=BRIEF)
    assert response.status == 200
    assert response.body.startswith(body)


async def test_a_receiver_that_is_silent(site: Site, sender: Sender) -> None:
    loop = asyncio.get_running_loop()
    start = loop.time()
    with pytest.raises(DeliveryError, match=r"no answer within 0\.3 s") as caught:
        await sender.send(post(site.on("/x", s.silent())), timeout=BRIEF)
    assert caught.value.kind == "timeout"
    assert loop.time() - start < 1.3


async def test_a_head_that_drips(site: Site, sender: Sender) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for byte in b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n":
            yield bytes([byte])
            await asyncio.sleep(0.05)

    with pytest.raises(DeliveryError) as caught:
        await sender.send(post(site.on("/x", Answer(raw=b"", parts=parts))), timeout=BRIEF)
    assert caught.value.kind == "timeout"


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"HTTP/1.1 200", b"garbage\r\n\r\n", b"\x00" * 100, b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 1_000_000 + b"\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000,
    ],
)  # fmt: skip
async def test_what_comes_back_is_not_http(site: Site, sender: Sender, raw: bytes) -> None:
    assert await kind(sender, post(site.on("/x", Answer(raw=raw)))) == "reset"


async def test_nobody_listens(sender: Sender) -> None:
    assert await kind(sender, post("http://127.0.0.1:1/")) == "refused"


async def test_nobody_has_that_name(sender: Sender) -> None:
    assert await kind(sender, post("http://nowhere.invalid/")) == "dns"


@pytest.mark.parametrize(
    "request_",
    [
        post("ftp://127.0.0.1/"), post("http:///x"), post("nonsense"), post("http://a b/"), post("http://[::1"),
        post("http://x:99999/"), post("http://127.0.0.1/", x="a\r\nb: c"), post("http://127.0.0.1/", x="a\0b"),
        post("http://127.0.0.1/", **{"bad name\r\n": "x"}), post("http://127.0.0.1/", x="naïve ☃"),
        Request("PO ST", "http://127.0.0.1/"), Request("POST\r\nx: y", "http://127.0.0.1/"),
        post("http://" + "a" * 300 + ".example/"),
    ],
)  # fmt: skip
async def test_a_request_that_cannot_be_sent(site: Site, sender: Sender, request_: Request) -> None:
    request_ = replace(request_, url=request_.url.replace("127.0.0.1", f"127.0.0.1:{site.port}"))
    assert await kind(sender, request_) in ("invalid", "dns")
    assert site.asked == []


async def test_a_password_in_the_url_goes_into_a_header_and_into_no_error(site: Site, sender: Sender) -> None:
    site.on("/x", s.broken())
    with pytest.raises(DeliveryError) as caught:
        await sender.send(post(f"http://user:hunter2@127.0.0.1:{site.port}/x?token=hunter3"), timeout=BRIEF)
    assert site.asked[0].headers["authorization"] == "Basic dXNlcjpodW50ZXIy"
    assert "hunter" not in str(caught.value)


async def test_a_receiver_that_hangs_holds_up_no_other(site: Site, sender: Sender) -> None:
    hung = [asyncio.create_task(sender.send(post(site.on("/hung", s.silent())), timeout=BRIEF)) for _ in range(200)]
    url = site.on("/quick", s.json(1))
    answers = await asyncio.gather(*(sender.send(post(url), timeout=timedelta(seconds=5)) for _ in range(50)))
    assert {answer.status for answer in answers} == {200}
    ended = await asyncio.gather(*hung, return_exceptions=True)
    assert {error.kind for error in ended if isinstance(error, DeliveryError)} == {"timeout"}


async def test_a_connection_that_the_receiver_closed_meanwhile(site: Site, sender: Sender) -> None:
    url = site.on("/x", Answer(body=b"1", close=True))
    for _ in range(5):
        assert (await sender.send(post(url), timeout=BRIEF)).status == 200
    assert site.connections == 5


class Raw:
    """A server that answers the n-th request of a connection with whatever the test gives, or hangs up."""

    def __init__(self, *answers: Sequence[bytes] | None) -> None:
        self.answers = answers  # in pieces; None closes the connection instead
        self.asked: list[bytes] = []
        self.connections = 0
        self.serving: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Raw:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/x"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for task in self.serving:
            task.cancel()
        await asyncio.gather(*self.serving, return_exceptions=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.serving.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            await self.answer(reader, writer)
        finally:
            writer.transport.abort()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            for pieces in self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head.lower())
                self.asked.append(await reader.readexactly(int(length[1])) if length else b"")
                if pieces is None:
                    break
                for piece in pieces:
                    writer.write(piece)
                    await asyncio.sleep(0.01 if len(pieces) > 1 else 0)
            writer.close()
            await writer.wait_closed()


FULL = b"HTTP/1.1 204 No Content\r\ncontent-length: 8\r\n\r\nsurprise"


@pytest.mark.parametrize(
    "pieces",
    [[FULL], [FULL[:5], FULL[5:]], [FULL[:30], FULL[30:]], [FULL[:-8], FULL[-8:]], [FULL[:-10], FULL[-10:]],
     [bytes([byte]) for byte in FULL],
     [b"HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked\r\n\r\n8\r\nsurprise\r\n0\r\n\r\n"]],
)  # fmt: skip
async def test_a_204_with_a_body_is_a_success_and_spoils_no_other(sender: Sender, pieces: list[bytes]) -> None:
    async with Raw(pieces, pieces) as raw:
        for number in range(3):
            assert (await sender.send(post(raw.url), timeout=timedelta(seconds=2))).status == 204
            assert len(raw.asked) == number + 1


async def test_an_answer_whose_body_reads_like_a_204_is_kept_whole(sender: Sender) -> None:
    body = FULL * 3
    async with Raw([b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body), body]) as raw:
        assert (await sender.send(post(raw.url), timeout=BRIEF)).body == body


async def test_a_kept_connection_that_is_closed_costs_no_attempt(sender: Sender) -> None:
    async with Raw([b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"], None) as raw:
        for _ in range(5):
            assert (await sender.send(post(raw.url), timeout=timedelta(seconds=2))).status == 200
        assert raw.connections == 5
        assert len(raw.asked) == 7  # two of them met a closed connection, and went out again on one of their own


async def test_a_receiver_that_hangs_up_on_a_fresh_connection_is_not_asked_twice(sender: Sender) -> None:
    async with Raw(None) as raw:
        with pytest.raises(DeliveryError, match="closed it without an answer") as caught:
            await sender.send(post(raw.url), timeout=timedelta(seconds=2))
        assert (caught.value.kind, len(raw.asked)) == ("reset", 1)


def test_a_receiver_that_does_not_read_to_the_end_is_told_without_the_address() -> None:
    broken = aiohttp.ClientOSError(32, "Can not write request body for http://127.0.0.1/services/s3cret")
    error = explain(broken)
    assert error.kind == "reset"
    assert str(error) == "the connection broke: the other side closed it before it had read the whole request"


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def secure(tmp_path: Path) -> AsyncIterator[Site]:
    """A site with a certificate that nobody vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    (tmp_path / "c.pem").write_bytes(certificate.public_bytes(pem))
    (tmp_path / "k.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "c.pem", tmp_path / "k.pem")
    async with Site(context) as site:
        yield site


async def test_a_certificate_that_nobody_vouches_for(secure: Site, sender: Sender) -> None:
    assert await kind(sender, post(secure.on("/x", s.json(1)))) == "tls"
    assert secure.asked == []


async def test_tls_to_a_receiver_that_speaks_none(site: Site, sender: Sender) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        assert await kind(sender, post(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/")) == "tls"
