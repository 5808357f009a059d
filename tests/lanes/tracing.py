"""strace around a program of ours: to see the order of its system calls, and to let one of them fail."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest


@cache
def _works() -> bool:
    strace = shutil.which("strace")
    return strace is not None and subprocess.run([strace, "-qq", "-o", "/dev/null", "true"]).returncode == 0


def needed() -> None:
    """Skip, unless this machine has strace and lets it trace."""
    if not _works():
        pytest.skip("needs strace (apt-get install strace) and the right to trace")


def traced(into: Path, *options: str) -> list[str]:
    """The command that goes before the program's own."""
    return ["strace", "-f", "-qq", "-o", str(into), *options, "--"]
