"""Good manners towards hosts, for all watchers together: so many requests at once, and none before Retry-After."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime

from watcher.errors import TriggerError
from watcher.http.message import retry_after

_UNSAID_WAIT = 60.0  # seconds after a 429 that does not say how long
_LONGEST_WAIT = 24 * 3600.0


@dataclass
class _Host:
    slots: asyncio.Semaphore
    busy: int = 0  # requests under way or waiting
    blocked_until: float = 0.0  # on the timer
    status: int = 0  # the answer that blocked it


@dataclass
class Manners:
    """What each host asked of us. ``timer`` counts seconds and never jumps."""

    at_once: int
    clock: Callable[[], datetime]
    timer: Callable[[], float]
    _hosts: dict[str, _Host] = field(default_factory=dict)

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Wait for a free place at this host. Raises TriggerError at once while the host wants to be left alone."""
        self._refuse_blocked(name)
        host = self._hosts.get(name)
        if host is None:
            self._forget_idle()
            host = self._hosts[name] = _Host(asyncio.Semaphore(self.at_once))
        host.busy += 1
        try:
            async with host.slots:
                self._refuse_blocked(name)  # the one before us may have been told to stop
                yield
        finally:
            host.busy -= 1

    def heard(self, name: str, status: int, headers: Mapping[str, str]) -> None:
        """Remember what an answer says about the next request to its host."""
        wait = asked_wait(status, headers, self.clock())
        host = self._hosts.get(name)
        if wait is not None and host is not None:
            host.blocked_until = max(host.blocked_until, self.timer() + wait)
            host.status = status

    def _refuse_blocked(self, name: str) -> None:
        host = self._hosts.get(name)
        left = host.blocked_until - self.timer() if host else 0.0
        if host and left > 0:
            raise TriggerError(
                f"{name} answered {host.status} and asked to be left alone for another {left:.0f} s;"
                " the next run after that tries again",
                kind="http",
                retry_after=left,
            )

    def _forget_idle(self) -> None:
        now = self.timer()
        for name in [name for name, host in self._hosts.items() if not host.busy and host.blocked_until <= now]:
            del self._hosts[name]


def asked_wait(status: int, headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds that an answer asks us to stay away, or None. Header names are lower case.

    429 and 503 by Retry-After; a used-up quota as GitHub and many others tell it (X-RateLimit-Remaining: 0 with
    X-RateLimit-Reset in seconds since 1970).
    """
    if status not in (403, 429, 503):
        return None
    wait = retry_after(headers, now)
    if wait is None and headers.get("x-ratelimit-remaining", "").strip() == "0":
        try:
            wait = float(headers.get("x-ratelimit-reset", "")) - now.timestamp()
        except ValueError:
            wait = None
    if wait is None:
        return _UNSAID_WAIT if status == 429 else None
    return min(max(wait, 0.0), _LONGEST_WAIT)
