"""A scripted web site on a real loopback socket: what a source can do to whoever asks it."""

from __future__ import annotations

import asyncio
import gzip
import json as json_module
import ssl
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, urlsplit

REASONS = {200: "OK", 301: "Moved", 302: "Found", 304: "Not Modified", 404: "Not Found", 429: "Too Many", 500: "Oops"}


@dataclass(frozen=True)
class Asked:
    """One request as it came in. Header names are lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""
    at: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def params(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    def json(self) -> Any:
        return json_module.loads(self.body)


@dataclass(frozen=True)
class Answer:
    """One answer. ``parts`` replaces ``body`` by whatever an async iterator gives, sent as it comes and unframed."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    parts: Callable[[], AsyncIterator[bytes]] | None = None
    raw: bytes | None = None  # sent instead of everything else, then the connection closes
    close: bool = False
    before: asyncio.Event | None = None  # awaited before a byte is sent

    def bytes(self) -> bytes:
        headers = {name.lower(): value for name, value in self.headers.items()}
        if self.parts is None and self.status != 304:
            headers.setdefault("content-length", str(len(self.body)))
        if self.close or self.parts is not None:
            headers.setdefault("connection", "close")
        lines = [f"HTTP/1.1 {self.status} {REASONS.get(self.status, 'Whatever')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if self.parts else self.body)


Reply = Answer | Callable[[Asked], Answer]


class Site:
    """``async with Site() as site: site.on("/x", json([1]), error(500))``; the last answer of a path repeats."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.asked: list[Asked] = []
        self._tls = tls
        self.at_once = 0  # requests being answered now
        self.most_at_once = 0
        self.connections = 0
        self._answers: dict[str, list[Reply]] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Site:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20, ssl=self._tls)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def port(self) -> int:
        assert self._server
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}"

    def on(self, path: str, *answers: Reply) -> str:
        """Script a path; returns its URL."""
        self._answers[path] = list(answers)
        return self.url + path

    def asked_for(self, path: str) -> list[Asked]:
        return [one for one in self.asked if one.path == path]

    def _answer(self, asked: Asked) -> Answer:
        answers = self._answers.get(asked.path)
        if not answers:
            return error(404)
        reply = answers.pop(0) if len(answers) > 1 else answers[0]
        return reply(asked) if callable(reply) else reply

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        asked = await _read(reader)
        self.asked.append(asked)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            answer = self._answer(asked)
            if answer.before:
                await answer.before.wait()
            if asked.method == "HEAD":
                answer = replace(
                    answer, parts=None, headers={"content-length": str(len(answer.body)), **answer.headers}
                )
                writer.write(answer.bytes().partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
            else:
                writer.write(answer.bytes() if answer.raw is None else answer.raw)
            await writer.drain()
            if answer.parts is not None and asked.method != "HEAD":
                async for part in answer.parts():
                    writer.write(part)
                    await writer.drain()
        finally:
            self.at_once -= 1
        return not (answer.close or answer.parts is not None or answer.raw is not None)


async def _read(reader: asyncio.StreamReader) -> Asked:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Asked(method, target, headers, body)


@contextmanager
def in_a_thread(prepare: Callable[[Site], None] = lambda site: None) -> Iterator[Site]:
    """The site in a thread of its own, for tests that block or run commands."""
    loop = asyncio.new_event_loop()
    site = Site()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(site.__aenter__(), loop).result(10)
    try:
        prepare(site)
        yield site
    finally:
        asyncio.run_coroutine_threadsafe(site.__aexit__(None, None, None), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


# --- what a site may answer -------------------------------------------------------------------------------------------


def json(value: Any, status: int = 200, **headers: str) -> Answer:
    """JSON; header names with underscores: ``json([], etag='"1"', last_modified=…)``."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(status, json_module.dumps(value).encode(), {"content-type": "application/json", **named})


def html(text: str = "<!doctype html><title>Please log in</title>", status: int = 200) -> Answer:
    return Answer(status, text.encode(), {"content-type": "text/html; charset=utf-8"})


def error(status: int = 500, body: bytes = b"something is wrong here") -> Answer:
    return Answer(status, body, {"content-type": "text/plain"})


def too_many(wait: int | datetime, status: int = 429) -> Answer:
    """429 with Retry-After in seconds, or as a date (with the site's own Date beside it)."""
    now = format_datetime(datetime.now(UTC), usegmt=True)
    text = str(wait) if isinstance(wait, int) else format_datetime(wait, usegmt=True)
    return Answer(status, b"slow down", {"retry-after": text, "date": now})


def redirect(to: str, status: int = 302) -> Answer:
    return Answer(status, b"over there", {"location": to})


def truncated(value: Any) -> Answer:
    """The first half of a JSON text, with a Content-Length that agrees."""
    text = json_module.dumps(value).encode()
    return Answer(200, text[: len(text) // 2], {"content-type": "application/json"})


def cut_short(body: bytes, promised: int) -> Answer:
    """Fewer bytes than Content-Length says, then the end."""
    return Answer(200, body, {"content-length": str(promised)}, close=True)


def endless(chunked: bool = False) -> Answer:
    """A body that never ends."""

    async def parts() -> AsyncIterator[bytes]:
        block = b"x" * 65536
        while True:
            yield b"10000\r\n" + block + b"\r\n" if chunked else block

    return Answer(200, headers={"transfer-encoding": "chunked"} if chunked else {}, parts=parts)


def drip(body: bytes, seconds: float) -> Answer:
    """One byte at a time, ``seconds`` between them."""

    async def parts() -> AsyncIterator[bytes]:
        for byte in body:
            yield bytes([byte])
            await asyncio.sleep(seconds)

    return Answer(200, headers={"content-length": str(len(body))}, parts=parts)


def silent() -> Answer:
    """The request is taken and never answered."""

    async def parts() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    return Answer(before=asyncio.Event(), parts=parts)


def broken() -> Answer:
    """The connection ends without an answer."""
    return Answer(raw=b"")


def garbage(raw: bytes = b"SSH-2.0-OpenSSH_9.2\r\n\r\n") -> Answer:
    return Answer(raw=raw)


def compressed(value: Any, coding: str = "gzip") -> Answer:
    """JSON in a content coding: gzip, deflate, or raw (a deflate stream without zlib's header)."""
    text = json_module.dumps(value).encode()
    if coding == "gzip":
        body = gzip.compress(text)
    elif coding == "deflate":
        body = zlib.compress(text)
    else:
        packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        body, coding = packer.compress(text) + packer.flush(), "deflate"
    return Answer(200, body, {"content-type": "application/json", "content-encoding": coding})


def bomb(coding: str = "gzip", inflated: int = 1 << 30) -> Answer:
    """About a thousandth of ``inflated`` bytes on the wire."""
    wbits = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS, "raw": -zlib.MAX_WBITS}[coding]
    packer = zlib.compressobj(9, wbits=wbits)
    block = bytes(1 << 20)
    body = b"".join(packer.compress(block) for _ in range(inflated >> 20)) + packer.flush()
    return Answer(200, body, {"content-encoding": coding.replace("raw", "deflate")})


def conditional(body: bytes, etag: str = "", last_modified: str = "", **headers: str) -> Reply:
    """200 with validators, and 304 to whoever shows them."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    given = {**({"etag": etag} if etag else {}), **({"last-modified": last_modified} if last_modified else {}), **named}

    def answer(asked: Asked) -> Answer:
        shown = asked.headers.get("if-none-match"), asked.headers.get("if-modified-since")
        if (etag and shown[0] == etag) or (not shown[0] and last_modified and shown[1] == last_modified):
            return Answer(304, headers=given)
        return Answer(200, body, given)

    return answer


class Listing:
    """Items in pages that can change while they are read: newest first, as most APIs list them."""

    def __init__(self, items: Sequence[Any], size: int) -> None:
        self.items = list(items)
        self.size = size
        self.after: dict[int, Callable[[Listing], None]] = {}  # after the nth request the list changes
        self.count = 0

    def _moved(self) -> None:
        self.count += 1
        if self.count in self.after:
            self.after[self.count](self)

    def numbered(self, asked: Asked) -> Answer:
        """``?page=1``."""
        page = int(asked.params.get("page", "1"))
        answer = json(self.items[(page - 1) * self.size : page * self.size])
        self._moved()
        return answer

    def offset(self, asked: Asked) -> Answer:
        """``?offset=0&limit=N``."""
        start, limit = int(asked.params.get("offset", "0")), int(asked.params.get("limit", self.size))
        answer = json({"items": self.items[start : start + limit]})
        self._moved()
        return answer

    def link(self, asked: Asked) -> Answer:
        """``?page=1`` and a Link header."""
        page = int(asked.params.get("page", "1"))
        more = page * self.size < len(self.items)
        answer = json(self.items[(page - 1) * self.size : page * self.size])
        if more:
            answer = replace(answer, headers={**answer.headers, "link": f'<{asked.path}?page={page + 1}>; rel="next"'})
        self._moved()
        return answer

    def cursor(self, asked: Asked) -> Answer:
        """``?after=KEY``: from a place in the list, which does not move with it. Items are {"id": …}."""
        after = asked.params.get("after")
        ids = [item["id"] for item in self.items]
        start = ids.index(after) + 1 if after in ids else 0
        page = self.items[start : start + self.size]
        more = start + self.size < len(self.items)
        answer = json({"items": page, "next": page[-1]["id"] if more else None})
        self._moved()
        return answer


@asynccontextmanager
async def site_with(path: str, *answers: Reply) -> AsyncIterator[tuple[Site, str]]:
    """A site with one path, and its URL."""
    async with Site() as site:
        yield site, site.on(path, *answers)
