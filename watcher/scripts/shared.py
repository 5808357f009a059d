"""Which scripts look for a directory that jobs share, and where it is for them."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from watcher.scripts.loading import Version, version

LINK = "/proc/self/cwd/shared"
"""What ``/shared`` is, for each process its own."""


def looks_for_shared(script: Path) -> bool:
    """Whether a script says ``shared`` at all: only such a one gets a view of the machine with ``/shared`` in it."""
    return _says(script, version(script))


@functools.lru_cache(maxsize=256)
def _says(script: Path, _: Version) -> bool:
    try:
        return b"shared" in script.read_bytes().lower()
    except OSError:
        return False


def places(cwd: Path | None) -> list[Path]:
    """What is shared by the steps of a job that runs in ``cwd``; ``/shared`` too, unless it is something else here."""
    if cwd is None:
        return []
    root = Path("/shared")
    ours = not os.path.lexists(root) or (root.is_symlink() and os.readlink(root) == LINK)
    return [cwd / "shared", *([root] if ours else [])]


@asynccontextmanager
async def own_folder() -> AsyncIterator[Path]:
    """A directory for one run, with ``./shared`` in it, as every job of Windmill's has; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="watcher-run-"))
    shared = folder / "shared"
    shared.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        try:
            os.rmdir(shared)
            os.rmdir(folder)
        except OSError:  # the script left something
            await asyncio.to_thread(shutil.rmtree, folder, True)
