"""What a script asks a source and what it hears back, as values and pure functions."""

from __future__ import annotations

import base64
import json as json_module
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urljoin, urlsplit, urlunsplit

from watcher import values
from watcher.errors import TriggerError
from watcher.values import Json, Request

Params = Mapping[str, Any] | Sequence[tuple[str, Any]]
Auth = str | tuple[str, str]
"""A bearer token, or user and password."""

_DETAIL = 2000  # characters of an unexpected answer that an error shows
_LONGEST_WAIT = 24 * 3600.0
_SECRET_NAME = re.compile(r"token|secret|passw|key|auth|sig|credential|session", re.I)
_CHARSET = re.compile(r"charset\s*=\s*\"?([\w.:-]+)", re.I)
_NO_HOST = re.compile(r"[\s\\\x00-\x1f\x7f]|%00")
_LINK = re.compile(r"<([^>]*)>((?:\s*;\s*[\w!#$&+.^`|~*-]+\s*(?:=\s*(?:\"[^\"]*\"|[^\s;,\"]*))?)*)")
_REL = re.compile(r";\s*rel\s*=\s*(?:\"([^\"]*)\"|([^\s;,\"]+))", re.I)


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """How one request is made. The service's own limits are the upper bounds."""

    timeout: float | None = None  # seconds for everything, redirects included; None: `[http].timeout`
    max_body: int | None = None  # bytes after decompression; None: `[http].max_body`
    redirects: bool = True
    stop_if_unchanged: bool = False  # answer 304 when nothing moved since the last committed run
    fresh: bool = False  # never from memory, even where Cache-Control would allow it


PLAIN = FetchOptions()


class Response(values.Response):
    """One answer of a source. Header names are lower case; ``url`` is where the redirects ended."""

    __slots__ = ()

    @property
    def text(self) -> str:
        """The body as text, by the charset of its Content-Type, else UTF-8. What cannot be decoded becomes U+FFFD."""
        named = _CHARSET.search(self.headers.get("content-type", ""))
        try:
            return self.body.decode(named[1] if named else "utf-8-sig", "replace")
        except LookupError:
            return self.body.decode("utf-8-sig", "replace")

    def json(self) -> Json:
        """The body as JSON. Raises TriggerError when it is anything else: a login page, half an answer, NaN."""
        try:
            return json_module.loads(self.body.decode("utf-8-sig"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            start = self.text[:200].strip()
            kind = self.headers.get("content-type", "no content type")
            looks = "an HTML page (a login or an error page?)" if start.lower().startswith("<") else f"{kind}: {error}"
            raise TriggerError(
                f"{redacted(self.url)} answered {self.status}, but not with JSON: {looks}",
                kind="junk",
                detail=self.text[:_DETAIL],
            ) from error

    def raise_for_status(self) -> Response:
        """This answer, if its status is 2xx. Otherwise TriggerError of kind ``http`` that says what to do."""
        if 200 <= self.status < 300:
            return self
        raise TriggerError(
            f"{redacted(self.url)} answered {self.status}{_advice(self.status)}",
            kind="http",
            detail=self.text[:_DETAIL],
            retry_after=retry_after(self.headers) if self.status in (429, 503) else None,
        )

    @property
    def links(self) -> dict[str, str]:
        """The Link header (RFC 8288): relation → absolute URL."""
        found: dict[str, str] = {}
        for target, rest in _LINK.findall(self.headers.get("link", "")):
            rel = _REL.search(rest)
            for name in ((rel[1] or rel[2]) if rel else "").lower().split():
                found.setdefault(name, urljoin(self.url, target))
        return found


def build(
    method: str,
    url: str,
    *,
    params: Params | None = None,
    headers: Mapping[str, str] | None = None,
    auth: Auth | None = None,
    json: Json = values.UNSET,
    data: Mapping[str, Any] | None = None,
    body: bytes | str | None = None,
) -> Request:
    """The request that these arguments mean. Raises TriggerError (kind ``arguments``) for a URL that is none."""
    try:
        url, userinfo = without_userinfo(with_params(url, params))
    except ValueError as error:
        raise TriggerError(str(error), kind="arguments") from error
    sent = {name.lower(): str(value) for name, value in (headers or {}).items()}
    if json is not values.UNSET:
        content = json_module.dumps(json, ensure_ascii=False, allow_nan=False).encode()
        sent.setdefault("content-type", "application/json")
    elif data is not None:
        content = urlencode(_pairs(data)).encode()
        sent.setdefault("content-type", "application/x-www-form-urlencoded")
    else:
        content = body.encode() if isinstance(body, str) else body or b""
    credentials = auth if auth is not None else userinfo
    if credentials:
        sent["authorization"] = (
            f"Bearer {credentials}" if isinstance(credentials, str) else basic(credentials[0], credentials[1])
        )
    return Request(method.upper(), url, sent, content)


def with_params(url: str, params: Params | None) -> str:
    """The URL with these query parameters added; one that is there already is replaced."""
    if not params:
        return url
    added = _pairs(params)
    names = {name for name, _ in added}
    parts = urlsplit(url)
    kept = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if pair[0] not in names]
    return urlunsplit(parts._replace(query=urlencode(kept + added, quote_via=quote)))


def without_userinfo(url: str) -> tuple[str, tuple[str, str] | None]:
    """``https://user:password@host/`` as a URL without a secret, and the pair.

    Raises ValueError for what is no http(s) URL, or means different hosts to different parsers.
    """
    parts = urlsplit(url)
    host, _ = parts.hostname, parts.port  # a port that is none raises
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"not an http or https URL: {redacted(url)!r}")
    if _NO_HOST.search(parts.netloc):
        raise ValueError(f"there are characters in the host that do not belong there: {redacted(url)!r}")
    if "@" not in parts.netloc:
        return url, None
    userinfo, _, netloc = parts.netloc.rpartition("@")
    user, _, password = userinfo.partition(":")
    return urlunsplit(parts._replace(netloc=netloc)), (unquote(user), unquote(password))


def redacted(url: str) -> str:
    """A URL as it may stand in a log: no user, no password, no query value whose name smells of a secret."""
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return "(not a URL)"
    shown = "&".join(f"{name}={'***' if _SECRET_NAME.search(name) else quote(value)}" for name, value in query)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=shown, fragment=""))[:500]


def basic(user: str, password: str) -> str:
    """The Authorization header of RFC 7617."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds to wait, by a Retry-After header in either of its forms (RFC 9110 10.2.3), at most a day.

    A date counts from the answer's own Date header where there is one: two clocks rarely agree. Header names are
    lower case. None when there is no such header or it makes no sense.
    """
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,12}(\.\d+)?", text):
        return min(float(text), _LONGEST_WAIT)
    until = http_date(text)
    if until is None:
        return None
    since = http_date(headers.get("date", "")) or now or datetime.now(UTC)
    return min(max((until - since).total_seconds(), 0.0), _LONGEST_WAIT)


def http_date(text: str) -> datetime | None:
    """An HTTP date as an aware UTC instant, or None."""
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _pairs(params: Params) -> list[tuple[str, str]]:
    """Query pairs: a list repeats its name, None is left out, booleans are ``true`` and ``false``."""
    pairs: list[tuple[str, str]] = []
    for name, value in params.items() if isinstance(params, Mapping) else params:
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None:
                pairs.append((name, str(one).lower() if isinstance(one, bool) else str(one)))
    return pairs


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _advice(status: int) -> str:
    """What the reader of an error may do about a status."""
    if status in (401, 403):
        return ": the source refuses the credentials; check the token and what it may read"
    if status in (404, 410):
        return ": there is nothing at this address (a private thing without a token looks the same); check the URL"
    if status == 429:
        return ": too many requests; poll less often"
    if status == 304:
        return " although nothing was asked conditionally"
    if 300 <= status < 400:
        return ": a redirect that was not followed"
    if status >= 500:
        return ": the source has a fault of its own; the next run tries again"
    return ": the source refuses the request; check the arguments"
