"""What can go wrong, one family: each message says what happened and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


class WatcherError(Exception):
    """The root of every error that watcher raises on purpose."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Mistake:
    """One mistake in a configuration file, where it stands and what would be right.

    ``line`` and ``column`` count from 1; 0 means that the mistake has no place in the file (an environment
    variable, a missing file).
    """

    where: str
    message: str
    file: Path | None = None
    line: int = 0
    column: int = 0
    source: str = ""
    hint: str = ""


@dataclass
class ConfigError(WatcherError):
    """The configuration cannot be used. ``mistakes`` holds all of them, in file order."""

    mistakes: list[Mistake] = field(default_factory=list)
    exit_code = 78

    def __str__(self) -> str:
        return "\n".join(f"{m.where}: {m.message}" + (f" ({m.hint})" if m.hint else "") for m in self.mistakes)


class TriggerError(WatcherError):
    """A trigger script, or the system it looks at, did not give a usable answer.

    ``kind`` is one of ``raised``, ``timeout``, ``memory``, ``cpu``, ``crashed``, ``junk`` (not JSON, NaN, a cycle),
    ``too_large``, ``missing``, ``edited`` (while it ran), ``arguments``, ``http``, ``unreachable`` and ``bug`` (a fault
    of ours); ``detail`` is the script's own traceback or the start of the answer, at most 8 KB.
    ``retry_after`` (seconds) is set when the source itself said when to come back. ``logs`` is the tail of what the
    script printed, at most 64 KB.
    """

    def __init__(
        self, message: str, *, kind: str = "raised", detail: str = "", retry_after: float | None = None, logs: str = ""
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.detail = detail
        self.retry_after = retry_after
        self.logs = logs


class StoreError(WatcherError):
    """The database could not do what was asked of it: locked, full, damaged, unreachable or newer than this program."""

    exit_code = 69


class Conflict(StoreError):
    """Somebody else committed first: the state is no longer the one that was read. Nothing was written."""

    exit_code = 1


class Damaged(StoreError):
    """A checksum does not match: what was read is not what was written. It is never diffed and never sent."""


class DatabaseFull(StoreError):
    """No space is left for the database. Everything was rolled back; work resumes by itself when there is space."""


class DatabaseTooNew(StoreError):
    """The database was written by a newer version of watcher. It is left untouched."""

    exit_code = 78


class DeliveryError(WatcherError):
    """A request to a flow could not be built or sent.

    ``kind`` is one of ``dns``, ``tls``, ``refused``, ``timeout``, ``reset``, ``guard`` and ``invalid``.
    """

    def __init__(self, message: str, *, kind: str = "invalid") -> None:
        super().__init__(message)
        self.kind = kind


class SecretError(WatcherError):
    """A secret cannot be read: there is no key, it is another key, or the stored value was altered."""

    exit_code = 78


class ResolveError(TriggerError):
    """A ``$var:``, ``$res:``, ``$env:`` or ``$file:`` cannot be followed.

    Its kind is ``missing`` only when nothing stands at the very path that was asked for; a value that is there and
    refers to one that is not, a circle, and a value that is too large are ``arguments``.
    """

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message, kind="missing" if missing else "arguments")


class ObjectsError(WatcherError):
    """Workspace object storage could not do what was asked of it.

    ``kind`` is one of ``no_storage`` (none is configured), ``no_such_storage``, ``missing``, ``denied``, ``bad_key``,
    ``bad_range``, ``exists``, ``too_large``, ``broken`` (the stream ended before it was whole), ``full`` and
    ``unreachable`` (also for wrong credentials and a bucket that is not there).
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.exit_code = 69 if kind in ("unreachable", "full") else 1
