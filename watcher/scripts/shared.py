"""The directory of a job: where it is for its scripts, which of them look for ``/shared``, and how it goes."""

from __future__ import annotations

import asyncio
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from watcher.scripts.calls import Call
from watcher.scripts.loading import Version, version

PREFIX = "watcher-run-"
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


def places(call: Call) -> list[Path]:
    """What a run may write: its shared directory; ``/shared`` too where that is the same."""
    if call.shared is None:
        return []
    shared, root = call.shared(), Path("/shared")
    ours = not os.path.lexists(root) or (root.is_symlink() and os.readlink(root) == LINK)
    return [shared, *([root] if ours and shared.parent == call.cwd else [])]


@asynccontextmanager
async def own_folder() -> AsyncIterator[Path]:
    """A directory for one run, with ``./shared`` in it, as every job of Windmill's has; gone afterwards."""
    folder, lock = _make()
    try:
        yield folder
    finally:
        await _remove(folder, lock)


@asynccontextmanager
async def on_demand() -> AsyncIterator[Callable[[], Path]]:
    """A shared directory for a run that starts elsewhere, made when it is asked for first: most runs never do, and to
    make one can take longer than they do. Gone afterwards."""
    made: list[tuple[Path, int]] = []

    def shared() -> Path:
        if not made:
            made.append(_make())
        return made[0][0] / "shared"

    try:
        yield shared
    finally:
        for folder, lock in made:
            await _remove(folder, lock)


def _make() -> tuple[Path, int]:
    """A new directory, and its lock, by which `sweep` knows that it is in use."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with suppress(FileNotFoundError):  # swept before it was locked
            lock = _lock(folder)
            if lock is not None:
                try:
                    (folder / "shared").mkdir(mode=0o700)
                except BaseException:
                    os.close(lock)
                    raise
                return folder, lock


async def _remove(folder: Path, lock: int) -> None:
    try:
        os.rmdir(folder / "shared")
        os.rmdir(folder)
    except OSError:  # the script left something
        await asyncio.to_thread(shutil.rmtree, folder, True)
    finally:
        os.close(lock)


def sweep() -> None:
    """Remove what runs of a process that was killed left behind."""
    with suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with suppress(OSError):  # somebody else's, or no directory
                if folder.lstat().st_uid == os.geteuid() and (lock := _lock(folder)) is not None:
                    shutil.rmtree(folder, True)
                    os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a directory for as long as the descriptor is open. None when somebody holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
