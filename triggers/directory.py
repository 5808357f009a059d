"""New, changed and removed files of a folder, each when it has been written to its end.

    [watchers.inbox]
    trigger = "directory"
    every = "5s"
    flow = "import"
    with = { path = "/srv/inbox", pattern = "*.csv", settle = 10 }

A file that was touched within the last ``settle`` seconds is still being written: a new one is not listed yet, a
known one is listed as it was before. A folder that is gone is an error, never a folder without files.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from watcher import get_state, set_state, trigger


@trigger(key="path", on=("new", "changed", "removed"))
def main(
    path: str,
    pattern: str = "*",
    recursive: bool = True,
    hidden: bool = False,
    settle: float = 2.0,
    digest: bool = False,
) -> list[dict[str, Any]]:
    """List the files of a folder, newest first.

    Args:
        path: the folder.
        pattern: which files, "*.csv" by name or "in/*.csv" by path below the folder; "*" stands for any characters.
        recursive: folders below it too. Links to folders are not followed.
        hidden: also what starts with a dot: often a copy under way.
        settle: seconds without a change after which a file counts as written.
        digest: also compare the content (SHA-256), for files that change but keep size and time.
    """
    folder = Path(path).expanduser()
    known: dict[str, list[Any]] = get_state() or {}
    now = time.time()
    listed: dict[str, list[Any]] = {}
    for raw, stat in files(folder, recursive=recursive, hidden=hidden):
        name = readable(raw)
        if not fnmatchcase(name if "/" in pattern else name.rpartition("/")[2], pattern):
            continue
        facts = [stat.st_size, stat.st_mtime_ns, ""]
        if abs(now - max(stat.st_mtime, stat.st_ctime)) < settle:
            if name in known:
                listed[name] = known[name]
            continue
        if digest:
            facts[2] = sha256(folder / raw)
            if facts[2] is None:
                continue
        listed[name] = facts
    if listed != known:
        set_state(listed)
    newest_first = sorted(listed.items(), key=lambda file: (-file[1][1], file[0]))
    return [item(folder, name, *facts) for name, facts in newest_first]


def files(folder: Path, *, recursive: bool, hidden: bool) -> Iterator[tuple[str, os.stat_result]]:
    """Each file below a folder, by its path from there. A folder that cannot be read is an error."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            entries = list(os.scandir(folder / below))
        except FileNotFoundError:
            if below:
                continue  # it went away while we looked
            raise FileNotFoundError(f"there is no folder {str(folder)!r}: check `path`") from None
        for entry in entries:
            if entry.name.startswith(".") and not hidden:
                continue
            name = f"{below}/{entry.name}" if below else entry.name
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting += [name] if recursive else []
                elif entry.is_file():
                    yield name, entry.stat()
            except FileNotFoundError:
                continue


def item(folder: Path, name: str, size: int, mtime_ns: int, digest: str) -> dict[str, Any]:
    """What a flow is told of one file."""
    facts = {
        "path": name,
        "file": f"{readable(str(folder.absolute()))}/{name}",
        "name": name.rpartition("/")[2],
        "size": size,
        "modified": datetime.fromtimestamp(mtime_ns / 1e9, UTC).isoformat(),
    }
    return {**facts, "sha256": digest} if digest else facts


def readable(name: str) -> str:
    """A file name may be any bytes; those that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def sha256(file: Path) -> str | None:
    """The digest of a file's content, or None if it went away."""
    try:
        with file.open("rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()
    except FileNotFoundError:
        return None
