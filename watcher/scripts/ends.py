"""How a run may end that its script did not mean: what that is called, and what its author can do about it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from watcher.errors import TriggerError
from watcher.scripts.calls import Call


def processor_time(call: Call) -> float:
    """Seconds that a process may use: by default what all cores could do until the timeout."""
    return (call.cpu_limit or call.timeout * (os.cpu_count() or 1)).total_seconds()


def too_slow(call: Call, logs: str) -> TriggerError:
    """The error of a run that met its timeout."""
    return TriggerError(
        f"{call.script.name} did not finish within {call.timeout.total_seconds():g} s and was stopped: "
        "give it a longer timeout, or less to do",
        kind="timeout",
        logs=logs,
    )


def death(how: str, call: Call) -> tuple[str, str]:
    """What a process's end means, as its warden told it: a message, and the kind of error."""
    name = call.script.name
    what, _, number = how.partition(" ")
    if what == "memory":
        return f"{name} and its processes used more than memory_limit: {call.memory_limit:,} bytes", "memory"
    if what == "processes":
        return f"{name} started more processes than are allowed at once, and was stopped with all of them", "crashed"
    if how == f"killed {signal.SIGXCPU:d}":
        return f"{name} used more than {processor_time(call):g} s of processor time and was stopped", "cpu"
    if what == "killed":
        with suppress(ValueError):
            number = signal.Signals(int(number)).name
        hint = ": the machine may be out of memory" if number == "SIGKILL" else ""
        return f"{name} crashed its process ({number}){hint}", "crashed"
    if what == "exited":
        return f"{name} ended its own process (status {number}): return from main instead", "crashed"
    return f"{name} closed its connection to the service", "crashed"
