"""New, changed and removed blobs of a container in Azure Blob Storage, as `s3_objects` finds those of a bucket.

    [watchers.uploads]
    trigger = "azure_blobs"
    every = "1m"
    flow = "import"
    with = { container = "$res:u/me/blobs", prefix = "inbox/", pattern = "*.csv", settle = 10 }

A blob that is written in blocks, or appended to, is there before it is complete: ``settle`` waits until it has not been
touched for a while. The code is that of `s3_objects.py`, which lies beside this file.

Needs obstore: ``pip install 'change-watcher[objects]'``.
"""

from typing import Any

from s3_objects import listed

from watcher import trigger


@trigger(key="key", on=("new", "changed"))
def main(
    container: str | dict[str, Any],
    prefix: str = "",
    pattern: str = "*",
    settle: float = 2.0,
) -> list[dict[str, Any]]:
    """List the blobs, the newest first.

    Args:
        container: a resource of type azure_blob ("$res:u/me/blobs"), its path, or the name of a storage of the
            workspace.
        prefix: only names that begin so.
        pattern: which blobs, "*.csv" by name or "in/*.csv" by what follows the prefix; "*" stands for any characters.
        settle: seconds without a change after which a blob counts as written. What is listed is kept in the state, so
            that a known one is listed as it was until then; 0 keeps nothing.
    """
    return listed(container, prefix, pattern, settle)
