"""What was found before about keys that the ledger no longer knows."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.store import watchers
from watcher.store.tables import item
from watcher.values import Seen

_AT_ONCE = 500


async def latest(tx: AsyncConnection, name: str, hashes: Collection[bytes]) -> dict[bytes, Seen]:
    """The last item of each of these keys, as the ledger row that it left: after a reset its revision still counts."""
    number = await watchers.ident(tx, name)
    i = item.c
    ordered = sorted(hashes)
    found: dict[bytes, Seen] = {}
    for start in range(0, len(ordered), _AT_ONCE):
        some = ordered[start : start + _AT_ONCE]
        rows = await tx.execute(
            select(i.key_hash, i.content, i.revision).where(i.watcher_id == number, i.key_hash.in_(some))
        )
        for key_hash, content, revision in rows:
            key = bytes(key_hash)
            if key not in found or found[key].revision < revision:
                found[key] = Seen(key, bytes(content), revision, present=False)
    return found
