"""Sources, asked politely: conditional requests, redirects by hand, limits, one fetch for many watchers."""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from urllib.parse import urljoin, urlsplit

from watcher import values
from watcher.errors import TriggerError
from watcher.http.message import PLAIN, FetchOptions, basic, http_date, redacted, without_userinfo
from watcher.http.politeness import Manners
from watcher.http.wire import LookUp, WireError, Wires, headers_of, read
from watcher.values import HttpSettings, Request

Validators = Mapping[str, str]
"""What a source gave to recognise an answer by: ``etag``, ``last_modified``, and our own ``digest`` of the body."""

_REDIRECTS = 5
_REDIRECT_STATUS = (301, 302, 303, 307, 308)
# All that goes along to another host: a token can hide in any other header.
_HARMLESS = ("accept", "accept-encoding", "accept-language", "content-type", "user-agent")
_KEPT_BODIES = 32 * 1024 * 1024  # bytes in memory, all sources together
_KEPT_BODY = 4 * 1024 * 1024
_LONGEST_FRESH = 300.0  # seconds; a watcher that believed a year of max-age would be blind
_LONGEST_VALIDATOR = 1024
_ADVICE = {
    "too_large": ": ask for less at once, or raise [http] max_body",
    "dns": ": check the name, and whether this machine can look names up",
    "refused": ": is the source up, and is that its address?",
    "reset": ": the next run tries again",
}
_KINDS = {"too_large": "too_large", "coding": "junk", "timeout": "timeout", "invalid": "arguments"}
_MAX_AGE = re.compile(r"(?:^|[,\s])max-age\s*=\s*\"?(\d{1,9})")


@dataclass(frozen=True, slots=True)
class _Kept:
    """An answer in memory, to be given again when the source says that it still holds."""

    response: values.Response
    validators: Validators
    fresh_until: float  # on the timer


@dataclass
class _Shared:
    task: asyncio.Task[values.Response]
    waiters: int = 0


class Fetcher:
    """All watchers' way to their sources."""

    def __init__(
        self,
        settings: HttpSettings,
        clock: Callable[[], datetime],
        *,
        timer: Callable[[], float] = time.monotonic,
        look_up: LookUp = socket.getaddrinfo,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._timer = timer
        self._wires = Wires(look_up)
        self._manners = Manners(settings.at_once_per_host, clock, timer)
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._shared: dict[str, _Shared] = {}

    def configure(self, settings: HttpSettings) -> None:
        """Take new settings into use; requests under way end under the old ones."""
        self._settings = settings
        self._manners.at_once = settings.at_once_per_host

    async def close(self) -> None:
        for shared in self._shared.values():
            shared.task.cancel()
        await self._wires.close()

    async def fetch(
        self,
        request: Request,
        options: FetchOptions = PLAIN,
        validators_in: Mapping[str, Validators] | None = None,
        validators_out: MutableMapping[str, Mapping[str, str]] | None = None,
    ) -> values.Response:
        """Ask a source. Any status is an answer; TriggerError says why there is none.

        ``validators_in`` are those of the last committed run, ``validators_out`` takes those of this one; both by
        `name_of` the request and only with ``stop_if_unchanged``, which turns an answer that did not change since
        into an empty one of status 304.
        """
        request = self._prepared(request)
        name = name_of(request)
        known = (validators_in or {}).get(name, {}) if options.stop_if_unchanged else {}
        response = await self._answer(request, options, known)
        if not options.stop_if_unchanged or response.status not in (200, 304):
            return response
        now_known = dict(known) if response.status == 304 else _validators(response)
        if validators_out is not None:
            validators_out[name] = now_known
        if response.status == 304 or (known and known.get("digest") == now_known["digest"]):
            return values.Response(304, response.headers, b"", response.url)
        return response

    def _prepared(self, request: Request) -> Request:
        """With our own headers where the script set none, and no secret in the URL."""
        try:
            url, userinfo = without_userinfo(request.url)
        except ValueError as error:
            raise TriggerError(str(error), kind="arguments") from error
        headers = {
            "user-agent": self._settings.user_agent,
            "accept": "*/*",
            **({"authorization": basic(*userinfo)} if userinfo else {}),
            **{name.lower(): value for name, value in request.headers.items()},
            "accept-encoding": "gzip, deflate",
        }
        return replace(request, url=url, headers=headers)

    async def _answer(self, request: Request, options: FetchOptions, known: Validators) -> values.Response:
        """From memory, from a fetch that is under way already, or from the source."""
        if request.method not in ("GET", "HEAD") or request.body:
            return await self._travel(request, options)
        identity = _digest(request.method, request.url, repr(sorted(request.headers.items())), repr(options.redirects))
        kept = self._kept.get(identity)
        if kept and kept.fresh_until > self._timer() and not options.fresh:
            return kept.response
        conditions = _conditions(kept.validators if kept else known)
        asked = replace(request, headers={**request.headers, **conditions})
        key = _digest(identity, repr(conditions), repr((options.timeout, options.max_body)))
        response = await self._share(key, lambda: self._travel(asked, options))
        if response.status == 304 and kept:
            response = replace(kept.response, headers={**kept.response.headers, **_renewed(response.headers)})
        if response.status == 200:
            self._keep(identity, response)
        return response

    async def _share(self, key: str, work: Callable[[], Awaitable[values.Response]]) -> values.Response:
        """One fetch for all that want the same at the same time. It is given up when the last of them is gone."""
        shared = self._shared.get(key)
        if shared is None:
            shared = self._shared[key] = _Shared(asyncio.ensure_future(_awaited(work())))
            shared.task.add_done_callback(lambda task: self._settled(key, task))
        shared.waiters += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiters -= 1
            if not shared.waiters:
                self._drop(key, shared.task)  # at once: nobody may join what is being given up
                shared.task.cancel()

    def _settled(self, key: str, task: asyncio.Task[values.Response]) -> None:
        self._drop(key, task)
        if not task.cancelled():
            task.exception()  # looked at, even when everybody who waited is gone

    def _drop(self, key: str, task: asyncio.Task[values.Response]) -> None:
        if key in self._shared and self._shared[key].task is task:
            del self._shared[key]

    async def _travel(self, request: Request, options: FetchOptions) -> values.Response:
        """To the source and along its redirects."""
        seconds = self._settings.timeout.total_seconds()
        left = seconds if options.timeout is None else min(options.timeout, 10 * seconds)
        for _ in range(_REDIRECTS + 1):
            response, spent = await self._visit(request, options, left)
            left -= spent
            target = response.headers.get("location", "")
            if response.status not in _REDIRECT_STATUS or not target or not options.redirects:
                return response
            try:
                request = _redirected(request, response.status, urljoin(request.url, target))
            except ValueError as error:
                raise TriggerError(f"{redacted(request.url)} redirects to nowhere: {error}", kind="http") from error
        raise TriggerError(f"{redacted(request.url)}: more than {_REDIRECTS} redirects; check the URL", kind="http")

    async def _visit(self, request: Request, options: FetchOptions, seconds: float) -> tuple[values.Response, float]:
        """One request, one answer, one host; and the seconds it took, without those of waiting for a turn."""
        settings = self._settings
        limit = settings.max_body if options.max_body is None else min(options.max_body, settings.max_body)
        wire = self._wires.get(private_addresses=settings.private_addresses, trust_env=settings.trust_env)
        host = urlsplit(request.url).netloc.lower()
        try:
            async with self._manners.turn(host), asyncio.timeout(max(seconds, 0)):
                start = self._timer()
                answer = await wire.send(request)
                try:
                    headers = headers_of(answer)
                    self._manners.heard(host, answer.status_code, headers)
                    body = await read(answer, headers.get("content-encoding", ""), limit)
                finally:
                    await answer.aclose()
        except TimeoutError as error:
            late = f"no whole answer within {seconds:.3g} s: the next run tries again; [http] timeout gives it longer"
            raise TriggerError(f"{redacted(request.url)}: {late}", kind="timeout") from error
        except WireError as error:
            told = f"{redacted(request.url)}: {error}{_ADVICE.get(error.kind, '')}"
            raise TriggerError(told, kind=_KINDS.get(error.kind, "unreachable")) from error
        return values.Response(answer.status_code, headers, body, request.url), self._timer() - start

    def _keep(self, identity: str, response: values.Response) -> None:
        """Remember an answer, if there is a way to learn whether it still holds."""
        old = self._kept.pop(identity, None)
        if old:
            self._kept_bytes -= len(old.response.body)
        control = response.headers.get("cache-control", "").lower()
        conditions = _conditions(_validators(response, digest=False))
        fresh = 0.0 if "no-cache" in control else _fresh(control, response.headers.get("age", ""))
        if "no-store" in control or len(response.body) > _KEPT_BODY or not (conditions or fresh):
            return
        self._kept[identity] = _Kept(response, _validators(response, digest=False), self._timer() + fresh)
        self._kept_bytes += len(response.body)
        while self._kept_bytes > _KEPT_BODIES:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped.response.body)


def name_of(request: Request) -> str:
    """What the validators of a request are kept under. Its credentials do not count: a new token is the same source."""
    headers = sorted((k.lower(), v) for k, v in request.headers.items() if k.lower() in ("accept", "accept-language"))
    return _digest(request.method, request.url, repr(headers), request.body.hex())


async def _awaited(work: Awaitable[values.Response]) -> values.Response:
    return await work


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _validators(response: values.Response, *, digest: bool = True) -> dict[str, str]:
    """What to recognise this answer by."""
    found = {"digest": hashlib.blake2b(response.body, digest_size=16).hexdigest()} if digest else {}
    etag, modified = response.headers.get("etag", ""), response.headers.get("last-modified", "")
    if etag and len(etag) <= _LONGEST_VALIDATOR:
        found["etag"] = etag
    if modified and _trustworthy(modified, response.headers.get("date", "")):
        found["last_modified"] = modified
    return found


def _trustworthy(modified: str, date: str) -> bool:
    """Last-Modified counts seconds: what was made within the answer's own may still change (RFC 9110 8.8.2.2)."""
    changed, answered = http_date(modified), http_date(date)
    return changed is not None and answered is not None and answered - changed > timedelta(seconds=1)


def _conditions(known: Validators) -> dict[str, str]:
    """The headers of a conditional request (RFC 9110 13.1)."""
    names = {"etag": "if-none-match", "last_modified": "if-modified-since"}
    return {header: known[name] for name, header in names.items() if known.get(name)}


def _renewed(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a 304 that take the place of the old ones (RFC 9110 15.4.5)."""
    names = ("age", "cache-control", "date", "etag", "expires", "last-modified")
    return {name: headers[name] for name in names if name in headers}


def _fresh(control: str, age: str) -> float:
    """Seconds that Cache-Control (lower case) lets an answer be used without asking again."""
    said = _MAX_AGE.search(control)
    spent = int(age) if age.isdigit() and len(age) < 10 else 0
    return min(max(int(said[1]) - spent, 0), _LONGEST_FRESH) if said else 0.0


def _redirected(request: Request, status: int, url: str) -> Request:
    """The request that a redirect asks for (RFC 9110 15.4), without credentials if it leaves the origin."""
    url, _ = without_userinfo(url)
    method, body, headers = request.method, request.body, dict(request.headers)
    if status == 303 or (status in (301, 302) and method == "POST"):
        method, body = ("HEAD" if method == "HEAD" else "GET"), b""
        headers.pop("content-type", None)
    if _origin(url) != _origin(request.url):
        headers = {name: value for name, value in headers.items() if name in _HARMLESS}
    return Request(method, url, headers, body)


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
