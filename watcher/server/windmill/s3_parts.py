"""Parts of uploads that are not complete yet: files in a directory of ours, gone after a day.

Parts come in any order, again and at the same time, and no kind of storage but S3 could take them so. Here they cost
disk and no memory, and until an upload is completed the storage knows nothing of it.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from io import FileIO
from pathlib import Path
from typing import Literal, TypeVar

from watcher.errors import ObjectsError
from watcher.server.windmill.s3_xml import MOST_PARTS
from watcher.server.windmill.sigv4 import Refusal

T = TypeVar("T")

LIFETIME = timedelta(days=1)
"""Of an upload, since its last part."""
MOST_UPLOADS = 1000
CHUNK = 1024 * 1024
_ID = re.compile(r"[0-9a-f]{32}")
_PART = re.compile(r"(\d{5})-([0-9a-f]{32})")


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload that has begun: for which object, and by whom."""

    storage: str
    key: str
    by: str
    content_type: str | None = None
    content_disposition: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes that came under one number. A new ETag is made for each that comes, so that it alone names them."""

    number: int
    etag: str
    size: int  # bytes
    at: datetime = field(compare=False)  # by the clock, or by the file's, which is behind it


class Parts:
    """All uploads under ``root``, which is made when it is first needed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    async def begin(self, upload: Upload, now: datetime) -> str:
        """A new upload; its id. Those that nobody went on with for a day are removed."""
        return await _thread(self._begin, upload, now)

    def _begin(self, upload: Upload, now: datetime) -> str:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep(now)
        if len(os.listdir(self._root)) >= MOST_UPLOADS:
            raise ObjectsError(f"{MOST_UPLOADS} uploads have begun: complete or abort some", kind="full")
        id = secrets.token_hex(16)
        draft = self._root / f"{id}.new"
        draft.mkdir(mode=0o700)
        (draft / "upload.json").write_text(json.dumps(asdict(upload)))
        draft.rename(self._root / id)
        return id

    async def sweep(self, now: datetime) -> None:
        """Remove the uploads that nobody went on with for a day."""
        await _thread(self._sweep, now)

    def _sweep(self, now: datetime) -> None:
        with suppress(FileNotFoundError):
            for entry in os.scandir(self._root):
                with suppress(FileNotFoundError):
                    if datetime.fromtimestamp(entry.stat().st_mtime, UTC) < now - LIFETIME:
                        shutil.rmtree(entry.path, ignore_errors=True)

    async def of(self, id: str, storage: str, key: str) -> Upload:
        """The upload of this id. Raises Refusal: there is none for this object."""
        upload = await _thread(self._of, id)
        if upload is None or (upload.storage, upload.key) != (storage, key):
            raise Refusal("NoSuchUpload", "there is no such upload: it was completed, aborted, or is over a day old")
        return upload

    def _of(self, id: str) -> Upload | None:
        if not _ID.fullmatch(id):
            return None
        try:
            return Upload(**json.loads((self._root / id / "upload.json").read_text()))
        except FileNotFoundError:
            return None

    async def add(self, id: str, number: int, body: AsyncIterator[bytes]) -> Part:
        """Keep a part; one of the same number is replaced. If ``body`` raises, nothing is kept of it."""
        if not 1 <= number <= MOST_PARTS:
            raise Refusal("InvalidArgument", f"parts have the numbers 1 to {MOST_PARTS}")
        etag = secrets.token_hex(16)
        folder = self._root / id
        draft = folder / f"{etag}.new"
        file = _open(draft, "xb")
        try:
            size = await _fill(file.write, body)
            return await _thread(self._keep, folder, draft, number, etag, size)
        finally:
            file.close()
            with suppress(FileNotFoundError):
                os.unlink(draft)

    def _keep(self, folder: Path, draft: Path, number: int, etag: str, size: int) -> Part:
        older = [part for part in self._parts(folder) if part.number == number]
        draft.rename(folder / f"{number:05}-{etag}")
        for part in older:
            with suppress(FileNotFoundError):
                os.unlink(folder / f"{number:05}-{part.etag}")
        return Part(number, etag, size, datetime.now(UTC))

    async def kept(self, id: str) -> list[Part]:
        """In order of their numbers."""
        return await _thread(self._parts, self._root / id)

    def _parts(self, folder: Path) -> list[Part]:
        found = []
        for entry in os.scandir(folder):
            if name := _PART.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    at = datetime.fromtimestamp(status.st_mtime, UTC)
                    found.append(Part(int(name[1]), name[2], status.st_size, at))
        return sorted(found, key=lambda part: part.number)

    async def all(self) -> list[tuple[str, Upload, datetime]]:
        """Id, what it is for, and since when, of every upload."""
        return await _thread(self._all)

    def _all(self) -> list[tuple[str, Upload, datetime]]:
        found = []
        with suppress(FileNotFoundError):
            for entry in os.scandir(self._root):
                with suppress(FileNotFoundError):
                    if (upload := self._of(entry.name)) is not None:
                        at = os.stat(self._root / entry.name / "upload.json").st_mtime
                        found.append((entry.name, upload, datetime.fromtimestamp(at, UTC)))
        return sorted(found, key=lambda each: each[1].key)

    async def chosen(self, id: str, wanted: Sequence[tuple[int, str]]) -> list[Part]:
        """The parts of these numbers and ETags. Raises Refusal: one of them is not there."""
        there = {(part.number, part.etag): part for part in await self.kept(id)}
        if missing := [number for number, etag in wanted if (number, etag) not in there]:
            raise Refusal("InvalidPart", f"part {missing[0]} is not there, or has another ETag")
        return [there[each] for each in wanted]

    async def read(self, id: str, parts: Sequence[Part]) -> AsyncGenerator[bytes, None]:
        """Their bytes, one after the other."""
        for part in parts:
            file = _open(self._root / id / f"{part.number:05}-{part.etag}", "rb")
            try:
                while chunk := await _thread(file.read, CHUNK):
                    yield chunk
            finally:
                file.close()

    async def remove(self, id: str) -> None:
        """Forget an upload and its parts."""
        await _thread(shutil.rmtree, self._root / id, True)


def _open(file: Path, mode: Literal["rb", "xb"]) -> FileIO:
    """Not in a thread: whoever waits for one may be cancelled, and nobody would close it."""
    with _errors():
        return file.open(mode, buffering=0)


def room(data: Path) -> Path:
    """Where the parts are, in the service's ``data``."""
    return data / "uploads"


async def forget_uploads(data: Path, now: datetime) -> None:
    """Remove the uploads that nobody went on with for a day. Raises ObjectsError."""
    await Parts(room(data)).sweep(now)


async def _fill(write: Callable[[memoryview], int], body: AsyncIterator[bytes]) -> int:
    waiting: list[bytes] = []
    size = total = 0
    async for chunk in body:
        waiting.append(chunk)
        size += len(chunk)
        if size >= CHUNK:
            total += size
            await _thread(_write, write, waiting)
            waiting, size = [], 0
    await _thread(_write, write, waiting)
    return total + size


def _write(write: Callable[[memoryview], int], chunks: list[bytes]) -> None:
    for chunk in chunks:
        view = memoryview(chunk)
        while view:
            view = view[write(view) :]


async def _thread(work: Callable[..., T], *given: object) -> T:
    """Do it in a thread, to the end also when cancelled: the file is closed then. Raises ObjectsError and Refusal."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *given))
    with _errors():
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()
            raise


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise Refusal("NoSuchUpload", "the upload was completed or aborted meanwhile") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        where = "no space is left for parts of uploads" if full else "parts of uploads cannot be kept"
        raise ObjectsError(f"{where}: {error.strerror}", kind="full" if full else "unreachable") from error
