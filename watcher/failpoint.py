"""Named places where a test may make the process die, fail or hang; inert unless WATCHER_TEST=1."""

from __future__ import annotations

import os
import signal
import time

NAMES = (
    "after_fetch", "after_diff", "before_begin", "after_state_write", "mid_outbox", "before_commit", "after_commit",
    "after_claim", "before_send", "after_send", "before_settle", "after_settle", "lease_release",
    "mid_migration", "mid_checkpoint", "mid_reload",
    "key_written", "key_in_use",
)  # fmt: skip


class FailpointReached(RuntimeError):
    """Raised by ``WATCHER_FAILPOINT=name:raise``."""


def _armed() -> dict[str, tuple[str, int]]:
    """``WATCHER_FAILPOINT=after_send:kill`` or ``after_send:kill@3`` (the third time it is reached)."""
    if os.environ.get("WATCHER_TEST") != "1":
        return {}
    armed = {}
    for part in filter(None, os.environ.get("WATCHER_FAILPOINT", "").split(",")):
        name, _, action = part.partition(":")
        action, _, nth = action.partition("@")
        if name not in NAMES or action not in ("kill", "raise", "hang"):
            raise ValueError(f"WATCHER_FAILPOINT: no such failpoint or action: {part}")
        armed[name] = (action, int(nth or 1))
    return armed


_points = _armed()
_reached: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Do nothing, unless a test armed this place for this process."""
    if not _points or name not in _points:
        return
    action, nth = _points[name]
    _reached[name] = _reached.get(name, 0) + 1
    if _reached[name] != nth:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        while True:  # a hang is a process that does nothing more until somebody kills it
            time.sleep(60)
    raise FailpointReached(name)
