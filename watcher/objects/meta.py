"""What is known of an object, and an object while it is read."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

CHUNK = 2 * 1024 * 1024
"""Bytes that are read or written at once."""

SAID = ("cache-control", "content-encoding", "content-language")
"""What a writer can say of an object besides type and disposition, by the names of headers."""
OWN = "x-amz-meta-"
"""What the names of a writer's own attributes begin with."""

Body = bytes | AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class Meta:
    """What is known of one object. Listings tell nothing of what its writer said: ``content_type``,
    ``content_disposition`` and ``attributes``, which are those of SAID and OWN."""

    key: str
    size: int  # bytes
    etag: str
    modified: datetime  # UTC
    content_type: str | None = None
    content_disposition: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a storage: the objects right under a prefix, and the folders there, each with its closing slash.

    ``after`` is where to go on, None when this was all.
    """

    objects: tuple[Meta, ...]
    folders: tuple[str, ...] = ()
    after: str | None = None


class Reading:
    """The bytes from ``start`` up to and without ``end`` of one object: ``async for chunk in reading``, once.

    Whoever does not read to the end calls `close`.
    """

    def __init__(
        self,
        meta: Meta,
        start: int,
        end: int,
        chunks: AsyncIterator[bytes],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.meta = meta
        self.start = start
        self.end = end
        self._chunks = chunks
        self._close = close

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self._chunks:
                yield chunk
        finally:
            self._close()

    async def all(self) -> bytes:
        """Everything at once, for objects known to be small."""
        return b"".join([chunk async for chunk in self])

    def close(self) -> None:
        """Let go of the object."""
        self._close()


class Backend(Protocol):
    """What each kind of storage can do. Keys and prefixes were checked before. All raise ObjectsError."""

    async def put(
        self,
        key: str,
        body: Body,
        *,
        content_type: str | None,
        content_disposition: str | None,
        attributes: Mapping[str, str],
        if_absent: bool,
    ) -> Meta: ...

    async def get(self, key: str, *, start: int, end: int | None) -> Reading: ...

    async def head(self, key: str) -> Meta: ...

    async def delete(self, key: str) -> None: ...

    async def list(self, prefix: str, *, after: str | None, limit: int) -> list[Meta]: ...

    async def level(self, prefix: str, *, after: str | None, limit: int) -> Level: ...
