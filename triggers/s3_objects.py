"""New, changed and removed objects of a bucket: S3 and what speaks it, Google's, the workspace's own storage.

    [watchers.uploads]
    trigger = "s3_objects"
    every = "1m"
    flow = "import"
    with = { storage = "$res:u/me/bucket", prefix = "inbox/", pattern = "*.csv" }

The whole prefix is listed each time. A listing comes in the order of names, so no time and no last name could say where
to go on: a large upload is dated when it began, and a new key may sort before the last one. An object that is written
again has another ETag, and is ``changed``; with ``removed`` in ``on`` those that are gone are told too.

Stores show an object when it is complete. Where a writer makes it in several steps, as when it is appended to or is
made empty first, ``settle`` waits until it has not been touched for a while.

Needs obstore: ``pip install 'change-watcher[objects]'``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

from watcher import get_state, objects, set_state, trigger

MOST = 100_000  # objects


@trigger(key="key", on=("new", "changed"))
def main(
    storage: str | dict[str, Any] | None = None,
    prefix: str = "",
    pattern: str = "*",
    settle: float = 0.0,
) -> list[dict[str, Any]]:
    """List the objects, the newest first.

    Args:
        storage: a resource of type s3 or gcs ("$res:u/me/bucket"), its path, or the name of a storage of the workspace;
            left out, its primary one.
        prefix: only keys that begin so.
        pattern: which objects, "*.csv" by name or "in/*.csv" by what follows the prefix; "*" stands for any characters.
        settle: seconds without a change after which an object counts as written. Until then a known one is listed as it
            was: what is listed is kept in the state, so this is for thousands of objects and not for hundreds of
            thousands.
    """
    return listed(storage, prefix, pattern, settle)


def listed(storage: str | dict[str, Any] | None, prefix: str, pattern: str, settle: float) -> list[dict[str, Any]]:
    """What a flow is told of each object, as far as it is written to its end."""
    known: dict[str, dict[str, Any]] = (get_state() or {}) if settle > 0 else {}
    now, found = datetime.now(UTC), dict[str, dict[str, Any]]()
    for meta in everything(objects(storage), prefix):
        key = meta["path"]
        rest = key.removeprefix(prefix)
        if key.endswith("/") or not fnmatchcase(rest if "/" in pattern else rest.rpartition("/")[2], pattern):
            continue
        if abs((now - meta["last_modified"]).total_seconds()) < settle:
            if key in known:
                found[key] = known[key]
            continue
        found[key] = facts(meta, storage)
        if len(found) > MOST:
            raise ValueError(f"there are more than {MOST:,} objects: choose a longer `prefix`, or a narrower `pattern`")
    if settle > 0 and found != known:
        set_state(found)
    return sorted(found.values(), key=lambda one: (one["modified"], one["key"]), reverse=True)


def everything(store: Any, prefix: str) -> Iterator[dict[str, Any]]:
    """Every object below a prefix, to the last page. RuntimeError in a sentence, without what the request held."""
    try:
        for page in store.list(prefix.rpartition("/")[0] or None, chunk_size=1000):
            yield from (meta for meta in page if meta["path"].startswith(prefix))
    except Exception as error:  # each kind of answer is an exception of its own there
        said = str(error)
        code = re.search(r"<Code>([\w.-]{1,80})</Code>(?:.{0,5}<Message>([^<]{1,300}))?", said, re.DOTALL)
        status = re.search(r"status code: (\d{3})", said)
        words = ": ".join(filter(None, code.groups())) if code else f"it answers {status[1]}" if status else ""
        hint = "check the name of the bucket, the keys in the resource, and what they may do"
        raise RuntimeError(f"the storage cannot be listed: {words or 'it cannot be reached'} ({hint})") from None


def facts(meta: dict[str, Any], storage: str | dict[str, Any] | None) -> dict[str, Any]:
    """What is told of one object. ``s3`` and ``storage`` are an S3Object for Windmill's functions."""
    told = {
        "key": meta["path"],
        "name": meta["path"].rpartition("/")[2],
        "size": meta["size"],
        "etag": (meta["e_tag"] or "").strip('"'),
        "modified": meta["last_modified"].astimezone(UTC).isoformat().replace("+00:00", "Z"),
        "s3": meta["path"],
    }
    if meta["version"]:
        told["version"] = meta["version"]
    if isinstance(storage, str) and "/" not in storage:
        told["storage"] = storage
    return told
