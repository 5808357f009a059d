"""What is too large for its place, kept as objects: named by content, verified when read, collected when old."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable, Collection
from datetime import datetime, timedelta

from watcher.errors import Damaged, ObjectsError
from watcher.objects.keys import S3Object
from watcher.objects.storage import MAX_LIST, Objects, Storage

ITEMS = "windmill_uploads/watcher_item_"
"""Where the usual rules let every token read one whose name it knows."""
STATES = "watcher/states/"
"""Where the usual rules let nobody but an administrator."""
AGAIN = timedelta(hours=1)
UNWANTED = timedelta(days=7)
"""How long a state stays that no version of any memory speaks of."""
LARGEST = 256 * 1024 * 1024
"""Bytes of one that are read back."""

Wanted = Callable[[], Awaitable[Collection[str]]]
Link = Callable[[str, str], Awaitable[str]]
"""The query that opens one object, by storage and key, to whoever has it."""


class Stowage:
    """Objects of ours in the primary storage. ``keep`` says how long an item is kept after it was stowed last."""

    def __init__(
        self,
        objects: Objects,
        clock: Callable[[], datetime],
        keep: Callable[[], timedelta],
        link: Link | None = None,
    ) -> None:
        self._objects = objects
        self._clock = clock
        self._keep = keep
        self._link = link
        self._recent: dict[str, datetime] = {}  # states that were stowed lately

    async def item(self, body: bytes) -> dict[str, str]:
        """Stow a part of an item. Returns the reference to send: ``{"s3": KEY}``, with ``presigned`` where links work.

        Raises ObjectsError, of kind ``no_storage`` when there is none.
        """
        storage = await self._objects.storage()
        key = f"{ITEMS}{hashlib.sha256(body).hexdigest()}.json"
        await self._put(storage, key, body, self._clock() - self._keep() / 2)
        link = await self._link(storage.name, key) if self._link else None
        return S3Object(key, presigned=link).json()

    async def state(self, body: bytes) -> str:
        """Stow a state. Returns its key. Raises ObjectsError.

        A key is given once and then again for an hour at most, and a state is kept for longer than that before anybody
        asks whether it is wanted: what is about to be committed is never collected.
        """
        storage = await self._objects.storage()
        digest, now = hashlib.sha256(body).hexdigest(), self._clock()
        self._recent = {key: at for key, at in self._recent.items() if now - at < AGAIN}
        for key in self._recent:
            if digest in key:
                return key
        key = f"{STATES}{digest}-{secrets.token_hex(4)}.json"
        await storage.put(key, body, content_type="application/json")
        self._recent[key] = now
        return key

    async def whole(self, key: str) -> bytes:
        """Read back what was stowed. Raises ObjectsError, and Damaged when it is not what was written."""
        reading = await (await self._objects.storage()).get(key)
        if reading.meta.size > LARGEST:
            raise ObjectsError(f"{key} is larger than {LARGEST} bytes: it is not ours", kind="too_large")
        body = b"".join([chunk async for chunk in reading])
        if hashlib.sha256(body).hexdigest() not in key:
            raise Damaged(f"{key} in the object storage is not what was written. Nothing was compared with it")
        return body

    async def collect(self, prefix: str, older: timedelta, wanted: Wanted | None = None) -> int:
        """Delete what was stowed before ``older`` and nobody wants, who is asked only when there is something old.

        Returns how many. Raises ObjectsError, and whatever ``wanted`` does.
        """
        storage = await self._objects.storage()
        before, last, deleted = self._clock() - older, None, 0
        keep: Collection[str] | None = None
        while page := await storage.list(prefix, after=last, limit=MAX_LIST):
            last = page[-1].key
            old = [meta.key for meta in page if meta.modified < before]
            if old and keep is None:
                keep = await wanted() if wanted else ()
            for key in old:
                if key not in (keep or ()):
                    await storage.delete(key)
                    deleted += 1
        return deleted

    async def _put(self, storage: Storage, key: str, body: bytes, fresh: datetime) -> None:
        """Unless it is there, and will be for a while: whoever was sent the reference has time to read it."""
        try:
            if (await storage.head(key)).modified > fresh:
                return
        except ObjectsError as error:
            if error.kind != "missing":
                raise
        await storage.put(key, body, content_type="application/json")
