"""Logs for people and for machines: constant event names, one line each, and no secret in any of them."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, TextIO, cast
from urllib.parse import quote, quote_plus

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

# --- masking ----------------------------------------------------------------------------------------------------------

MASK = "*****"
SHORTEST = 6
"""Shorter values are not masked: replacing every "eu" would make the log unreadable and hide nothing."""
_MOST_SECRETS = 10_000

_forms: dict[str, tuple[str, ...]] = {}
"""Secret → the ways it may be written, longest first. Oldest first, so that rotation cannot grow it for ever."""
_unbroken: dict[str, tuple[str, ...]] = {}
"""The same without white space, to be found in a text without white space."""


def register(value: str) -> None:
    """Mask ``value`` from now on, wherever it appears: plain, base64, hex, URL-encoded or JSON-escaped."""
    if len(value) < SHORTEST or value in _forms:
        return
    while len(_forms) >= _MOST_SECRETS:
        oldest = next(iter(_forms))
        del _forms[oldest], _unbroken[oldest]
    forms = _written(value)
    joined = (_BREAKS.sub("", form) for form in forms)
    _unbroken[value] = tuple(form for form in joined if len(form) >= SHORTEST)
    _forms[value] = forms
    _mask_short.cache_clear()


def forget_secrets() -> None:
    """Mask no registered value any more. For tests; a service never forgets one."""
    _forms.clear()
    _unbroken.clear()
    _mask_short.cache_clear()


def _written(value: str) -> tuple[str, ...]:
    raw = value.encode("utf-8", "surrogatepass")
    forms = {value, quote(value, safe="", errors="replace"), quote_plus(value, errors="replace")}
    forms |= {raw.hex(), raw.hex().upper()}
    forms |= {quote(value, errors="replace"), json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for shift in range(3):
            # Inside a longer text ("user:secret") the secret starts at any of three places of a base64 group: the
            # characters in the middle depend on the secret alone.
            text = encode(b"\0" * shift + raw).decode().rstrip("=")
            forms.add(text[(0, 2, 3)[shift] : len(text) - (len(text) % 4 != 0)])
    return tuple(sorted((form for form in forms if len(form) >= SHORTEST), key=len, reverse=True))


_SENSITIVE = (
    r"(?:[\w.-]*(?:token|secret|passw(?:or)?d|passphrase|credential|api[_-]?key|access[_-]?key|private[_-]?key"
    r"|authorization|signature|cookie)s?|sig|auth|pwd|key)"
)
_PATTERNS = (
    (
        re.compile(r"(authorization[\"']?\s*[:=]\s*[\"']?)((?:Bearer|Basic|Token|Digest)\s+)?[^\s\"',;]+", re.I),
        rf"\1\2{MASK}",
    ),
    (re.compile(r"\b(Bearer\s+)[^\s\"',;]{6,}", re.I), rf"\1{MASK}"),
    (re.compile(r"\b(Basic\s+)(?=[a-z]*[0-9A-Z+/=])[A-Za-z0-9+/=]{6,}"), rf"\1{MASK}"),
    (re.compile(r"\bwh(sec|sk)_[A-Za-z0-9+/=_-]+"), rf"wh\1_{MASK}"),
    (re.compile(r"\bwtc_[A-Za-z0-9_-]+"), f"wtc_{MASK}"),
    (re.compile(r"([a-z][a-z0-9+.-]{0,20}://)[^\s/@?#\"'<>]+@", re.I), rf"\1{MASK}@"),
    (re.compile(rf"([?&;]{_SENSITIVE}=)[^&\s\"'#<>;]+", re.I), rf"\1{MASK}"),
)
_SECRET_NAME = re.compile(rf"{_SENSITIVE}\Z", re.I)
_BREAKS = re.compile(r"(?:\\[nr]|\s)+")


def mask(text: str) -> str:
    """The text with every registered secret, and everything that looks like one, replaced by ``*****``.

    Registered secrets are found plain, base64, hex, URL-encoded, JSON-escaped, and broken over several lines.
    """
    return _mask_short(text) if len(text) < 200 else _mask(text)


def _mask(text: str) -> str:
    for forms in list(_forms.values()):
        for form in forms:
            if form in text:
                text = text.replace(form, MASK)
    if "\n" in text or "\\n" in text:
        text = _mask_broken(text)
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


_mask_short = lru_cache(maxsize=4096)(_mask)
"""Names of events, watchers and flows come again and again."""


def _mask_broken(text: str) -> str:
    """Mask secrets that were wrapped: find them in the text without white space, and blank where they stood."""
    kept: list[str] = []
    places: list[int] = []
    end = 0
    for gap in _BREAKS.finditer(text):
        kept.append(text[end : gap.start()])
        places.extend(range(end, gap.start()))
        end = gap.end()
    kept.append(text[end:])
    places.extend(range(end, len(text)))
    joined = "".join(kept)
    hidden: list[tuple[int, int]] = []
    for forms in list(_unbroken.values()):
        for form in forms:
            at = joined.find(form)
            while at >= 0:
                hidden.append((places[at], places[at + len(form) - 1] + 1))
                at = joined.find(form, at + 1)
    shown, end = "", 0
    for start, stop in sorted(hidden):
        if start >= end:
            shown += text[end:start] + MASK
        end = max(end, stop)
    return shown + text[end:]


def is_secret_name(name: str) -> bool:
    """Whether a field of this name holds a secret: ``token``, ``api_key``, ``Authorization`` …"""
    return _SECRET_NAME.match(name) is not None and name.lower() != "key"  # an item has one


# --- set-up -----------------------------------------------------------------------------------------------------------

Format = Literal["auto", "json", "console"]
_QUIET = ("apscheduler", "aiosqlite", "asyncio", "alembic", "httpx", "httpcore", "watchfiles", "sqlalchemy")
"""Libraries whose chatter says nothing that our own events do not: heard from `warning` on."""

_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def get(name: str) -> FilteringBoundLogger:
    """The logger of one part: ``log = log.get("dispatch")``, then ``log.info("delivery.dead", flow=…)``.

    The first argument is a constant name, never a sentence with values inside.
    """
    logger: FilteringBoundLogger = structlog.get_logger(part=name)  # `logger` is a parameter of structlog's own
    return logger


def configure(
    level: str = "info",
    format: Format = "auto",
    *,
    stream: TextIO | None = None,
    environ: Mapping[str, str] | None = None,
) -> None:
    """Send all logs, those of libraries too, to ``stream`` (standard error by default), masked.

    ``auto`` is readable on a terminal and JSON otherwise. Under systemd each line carries its priority. May be called
    again, after a reload.
    """
    environ = os.environ if environ is None else environ
    number = logging.getLevelNamesMapping()[level.upper()]
    terminal = (stream or sys.stderr).isatty()
    readable = format == "console" or (format == "auto" and terminal)
    after: list[Any] = [_mask_event, *_rendering(readable, terminal and "NO_COLOR" not in environ)]
    if _writes_to_journal(stream or sys.stderr, environ):
        after.append(_with_priority)
    _events(number, after, stream)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*_BEFORE, _library],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *after],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    logging.captureWarnings(True)


class _Steadfast:
    """A stream whose failures are nobody's: a log on a full disk must not end the service that would tell of it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # no room, or closed
            pass

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            pass


def _events(level: int, after: list[Any], stream: TextIO | None) -> None:
    structlog.configure(
        processors=[*_BEFORE, *after],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.WriteLogger(cast(TextIO, _Steadfast(stream or sys.stderr))),
        cache_logger_on_first_use=False,
    )


def _rendering(readable: bool, color: bool) -> list[Any]:
    if readable:
        return [
            structlog.dev.ConsoleRenderer(
                colors=color, timestamp_key="ts", exception_formatter=structlog.dev.plain_traceback
            )
        ]
    return [_in_order, structlog.processors.JSONRenderer(ensure_ascii=False, default=repr)]


def _named(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    if "part" in event:
        event["logger"] = event.pop("part")
    return event


_BEFORE: list[Any] = [
    structlog.contextvars.merge_contextvars,
    _named,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    structlog.processors.StackInfoRenderer(),
    structlog.processors.format_exc_info,
]


def _in_order(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    first = {name: event.pop(name) for name in ("ts", "level", "event", "logger") if name in event}
    return {**first, **event}


def _library(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """A library's sentence becomes the message of one constant event."""
    record = event.get("_record")
    event["logger"] = record.name if record else "library"
    event["message"] = event["event"]
    event["event"] = "library.message"
    return event


def _with_priority(_: WrappedLogger, level: str, line: str) -> str:
    return f"<{_PRIORITY.get(level, 6)}>{line}"


def _writes_to_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """systemd tells the device and inode of the journal's socket; anything else is a file or a pipe (systemd.exec)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


_OURS = frozenset({"ts", "level"})  # written by us alone, and new each time


def _mask_event(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {str(name): value if name in _OURS else _masked(str(name), value, 0) for name, value in event.items()}


def _masked(name: str, value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if is_secret_name(name):
        return MASK
    if isinstance(value, str):
        return _printable(mask(value))
    if isinstance(value, bytes):
        return _printable(mask(value.decode("utf-8", "replace")))
    if depth < 8 and isinstance(value, Mapping):
        return {_printable(mask(str(k))): _masked(str(k), v, depth + 1) for k, v in value.items()}
    if depth < 8 and isinstance(value, list | tuple | set | frozenset):
        return [_masked("", v, depth + 1) for v in value]
    return _printable(mask(str(value)))


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def _printable(text: str) -> str:
    """What came from outside must neither steer a terminal nor fail to be written."""
    if text.isascii() and text.isprintable():
        return text
    return text.translate(_CONTROLS).encode("utf-8", "backslashreplace").decode()


# Until the service or a command says otherwise only what is wrong is told, and never on standard output: data is there.
_events(logging.WARNING, [_mask_event, *_rendering(readable=False, color=False)], None)
