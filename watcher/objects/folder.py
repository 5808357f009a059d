"""A folder as object storage: keys are paths in it, writes are atomic and durable, and nothing leads out of it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mimetypes
import os
import re
import secrets
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

from watcher.errors import ObjectsError
from watcher.objects.keys import nameable
from watcher.objects.meta import CHUNK, OWN, SAID, Body, Level, Meta, Reading

T = TypeVar("T")

UPLOADS = ".uploads"
"""Where uploads stand until they are whole; no key can begin with it."""
_TYPE = "user.mime_type"
"""The extended attribute for a content type. Source: freedesktop.org's shared MIME-info specification."""
_DISPOSITION = "user.content_disposition"
_SAID = {name: f"user.{name.replace('-', '_')}" for name in SAID}
_OWN = "user.meta."
_KNOWN = {_TYPE, _DISPOSITION, *_SAID.values()}
_HEADER = re.compile(re.escape(_OWN) + r"[a-z0-9!#$%&'*+.^_`|~-]+")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Folder:
    """The objects under ``root``, which is made when it is first written to.

    Paths are walked from folder to folder without following a symbolic link, so that no link in it, whoever made it,
    leads out. An upload is a file of its own until it is whole and on disk, then renamed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._swept = False

    async def put(
        self,
        key: str,
        body: Body,
        *,
        content_type: str | None,
        content_disposition: str | None,
        attributes: Mapping[str, str],
        if_absent: bool,
    ) -> Meta:
        said = {_SAID.get(name) or _OWN + name.removeprefix(OWN): value for name, value in attributes.items()}
        upload = _Upload(key, if_absent, {_TYPE: content_type, _DISPOSITION: content_disposition, **said})
        try:
            await _thread(key, self._begin, upload)
            await _fill(key, upload.stream, body)
            return await _thread(key, self._finish, upload)
        finally:
            upload.forget()

    async def get(self, key: str, *, start: int, end: int | None) -> Reading:
        file, meta = await _thread(key, self._open, key)
        until = meta.size if end is None else min(end, meta.size)
        if start >= until and (start or end is not None):
            file.close()
            raise ObjectsError(f"{key} is shorter than that", kind="bad_range")
        return Reading(meta, start, until, _chunks(key, file, start, until), file.close)

    async def head(self, key: str) -> Meta:
        def look() -> Meta:
            file, meta = self._open(key)
            file.close()
            return meta

        return await _thread(key, look)

    async def delete(self, key: str) -> None:
        await _thread(key, self._delete, key)

    async def list(self, prefix: str, *, after: str | None, limit: int) -> list[Meta]:
        def walk() -> list[Meta]:
            with suppress(FileNotFoundError):
                return list(islice(_below(self._walk([]), "", prefix, after or ""), limit))
            return []

        return await _thread(prefix, walk)

    async def level(self, prefix: str, *, after: str | None, limit: int) -> Level:
        return await _thread(prefix, self._level, prefix, after or "", limit)

    # --- in a thread ------------------------------------------------------------------------------------------------

    def _begin(self, upload: _Upload) -> None:
        if upload.key.partition("/")[0] == UPLOADS:
            raise ObjectsError(f"{upload.key}: a key does not begin with {UPLOADS}", kind="bad_key")
        self._make_root()
        uploads = upload.uploads = self._walk([UPLOADS], make=True)
        if not self._swept:
            _sweep(uploads)
            self._swept = True
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            upload.file = file = os.fdopen(os.open(upload.name, flags, 0o600, dir_fd=uploads), "wb", buffering=0)
            _like(uploads, file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX)  # in use: see _sweep
            if os.fstat(file.fileno()).st_nlink:
                return
            file.close()  # swept by another process between the two calls

    def _finish(self, upload: _Upload) -> Meta:
        file = upload.stream.fileno()
        for attribute, value in upload.attributes.items():
            if value is not None:
                with suppress(OSError):  # a file system without them: the content type is then guessed by the name
                    os.setxattr(file, attribute, value.encode())
        os.fsync(file)
        folders, last = _parts(upload.key)
        for _ in range(10):
            with suppress(FileNotFoundError):  # a deletion may take the empty folder away in between
                at = self._walk(folders, make=True)
                try:
                    upload.place(at, last)
                    os.fsync(at)
                    return _meta(upload.key, file)
                finally:
                    os.close(at)
        raise ObjectsError(f"{upload.key}: its folder is deleted again and again", kind="unreachable")

    def _open(self, key: str) -> tuple[IO[bytes], Meta]:
        folders, last = _parts(key)
        try:
            at = self._walk(folders)
        except NotADirectoryError:
            raise FileNotFoundError(key) from None
        try:
            descriptor = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
        finally:
            os.close(at)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileNotFoundError(key)
        return os.fdopen(descriptor, "rb", buffering=0), _meta(key, descriptor)

    def _delete(self, key: str) -> None:
        folders, last = _parts(key)
        opened: list[int] = []
        try:
            for depth in range(len(folders) + 1):
                opened.append(self._walk(folders[:depth]))
            os.unlink(last, dir_fd=opened[-1])
            os.fsync(opened[-1])
            # Folders are there for their objects: an empty one would show in no listing and could never be deleted.
            for parent, name in zip(reversed(opened[:-1]), reversed(folders), strict=True):
                os.rmdir(name, dir_fd=parent)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ELOOP):
                raise
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _make_root(self) -> None:
        for folder in reversed([self.root, *self.root.parents]):
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
                parent, made = (os.open(each, _FOLDER & ~os.O_NOFOLLOW) for each in (folder.parent, folder))
                try:
                    _like(parent, made)
                finally:
                    os.close(parent)
                    os.close(made)

    def _walk(self, folders: Sequence[str], *, make: bool = False) -> int:
        """A descriptor of the folder under the root, for the caller to close."""
        at = os.open(self.root, _FOLDER & ~os.O_NOFOLLOW)  # the root itself may be a link: its owner chose it
        for name in folders:
            try:
                made = make and _made(name, at)
                below = os.open(name, _FOLDER, dir_fd=at)
                if made:
                    _like(at, below)
            finally:
                os.close(at)
            at = below
        return at

    def _level(self, prefix: str, after: str, limit: int) -> Level:
        parent = prefix.rpartition("/")[0]
        try:
            at = self._walk(parent.split("/") if parent else [])
        except (FileNotFoundError, NotADirectoryError):
            return Level(())
        objects: list[Meta] = []
        folders: list[str] = []
        try:
            for key, entry in _entries(at, parent + "/" if parent else ""):
                if not key.startswith(prefix) or key <= after:
                    continue
                meta = None if key.endswith("/") else _seen(key, entry)
                if meta is None and not (key.endswith("/") and _holds_any(at, key, entry)):
                    continue
                if len(objects) + len(folders) == limit:
                    return Level(tuple(objects), tuple(folders), max([*(o.key for o in objects), *folders]))
                if meta is None:
                    folders.append(key)
                else:
                    objects.append(meta)
        finally:
            os.close(at)
        return Level(tuple(objects), tuple(folders))


class _Upload:
    """A file under way: locked by its writer, gone if it was not placed."""

    def __init__(self, key: str, if_absent: bool, attributes: dict[str, str | None]) -> None:
        self.key = key
        self.if_absent = if_absent
        self.attributes = attributes
        self.name = secrets.token_hex(16)
        self.uploads: int | None = None
        self.file: IO[bytes] | None = None

    @property
    def stream(self) -> IO[bytes]:
        assert self.file is not None
        return self.file

    def place(self, at: int, last: str) -> None:
        put = os.link if self.if_absent else os.rename
        put(self.name, last, src_dir_fd=self.uploads, dst_dir_fd=at)

    def forget(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.uploads is not None:
            with suppress(FileNotFoundError):
                os.unlink(self.name, dir_fd=self.uploads)
            os.close(self.uploads)


# --- bytes ------------------------------------------------------------------------------------------------------------


async def _fill(key: str, file: IO[bytes], body: Body) -> None:
    if isinstance(body, bytes):
        await _thread(key, _write, file, [body])
        return
    waiting, size = [], 0
    async for chunk in body:
        waiting.append(chunk)
        size += len(chunk)
        if size >= CHUNK:
            await _thread(key, _write, file, waiting)
            waiting, size = [], 0
    await _thread(key, _write, file, waiting)


def _write(file: IO[bytes], chunks: list[bytes]) -> None:
    for chunk in chunks:
        view = memoryview(chunk)
        while view:
            view = view[file.write(view) :]


async def _chunks(key: str, file: IO[bytes], start: int, end: int) -> AsyncIterator[bytes]:
    def read(at: int) -> bytes:
        return os.pread(file.fileno(), min(CHUNK, end - at), at)

    while start < end:
        chunk = await _thread(key, read, start)
        if not chunk:
            raise ObjectsError(f"{key} became shorter while it was read", kind="unreachable")
        start += len(chunk)
        yield chunk


def _made(name: str, parent: int) -> bool:
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        return False
    os.fsync(parent)
    return True


def _like(parent: int, made: int) -> None:
    """What root makes (at the command line) belongs to whom the folder around it belongs to, who could not read it
    otherwise."""
    owner = os.fstat(parent)
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.fchown(made, owner.st_uid, owner.st_gid)


def _sweep(uploads: int) -> None:
    """Remove what a process that was killed left behind; what is being written is locked by its writer."""
    for name in os.listdir(uploads):
        with suppress(OSError):
            descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=uploads)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=uploads)
            finally:
                os.close(descriptor)


# --- names ------------------------------------------------------------------------------------------------------------


def _parts(key: str) -> tuple[list[str], str]:
    *folders, last = key.split("/")
    if key.partition("/")[0] == UPLOADS:
        raise FileNotFoundError(key)
    return folders, last


def _meta(key: str, file: int) -> Meta:
    found = _attributes(file)
    kind = found.pop(_TYPE, None) or mimetypes.guess_type(key)[0] or "application/octet-stream"
    disposition = found.pop(_DISPOSITION, None)
    said = {name: found.pop(ours) for name, ours in _SAID.items() if ours in found}
    own = {OWN + name.removeprefix(_OWN): value for name, value in found.items()}
    return replace(
        _described(key, os.fstat(file)), content_type=kind, content_disposition=disposition, attributes=said | own
    )


def _attributes(file: int) -> dict[str, str]:
    """The extended attributes that mean something here, as far as they are fit to become headers: other programs set
    some as well."""
    try:
        names = [name for name in os.listxattr(file) if name in _KNOWN or _HEADER.fullmatch(name)]
        found = {name: os.getxattr(file, name).decode("utf-8", "replace") for name in names}
    except OSError:
        return {}
    return {name: value for name, value in found.items() if value.isprintable()}


def _described(key: str, found: os.stat_result) -> Meta:
    etag = f'"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"'
    modified = datetime.fromtimestamp(found.st_mtime, UTC)
    return Meta(key, found.st_size, etag, modified)


def _seen(key: str, entry: os.DirEntry[str]) -> Meta | None:
    try:
        return _described(key, entry.stat(follow_symlinks=False))
    except FileNotFoundError:  # deleted meanwhile
        return None


def _entries(folder: int, start: str) -> list[tuple[str, os.DirEntry[str]]]:
    """What lies right in a folder, in the order of keys: a folder sorts by its name with the slash."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if (start == "" and entry.name == UPLOADS) or not nameable(entry.name):
                continue  # no key could name it
            if entry.is_dir(follow_symlinks=False):
                found.append((f"{start}{entry.name}/", entry))
            elif entry.is_file(follow_symlinks=False):
                found.append((start + entry.name, entry))
    return sorted(found, key=lambda each: each[0])


def _below(folder: int, start: str, prefix: str, after: str) -> Iterator[Meta]:
    """Everything in a folder, in the order of keys, that begins with ``prefix`` and is behind ``after``. Only what is
    on the way is read; the descriptor is closed."""
    try:
        for key, entry in _entries(folder, start):
            if key.endswith("/"):
                leads = key.startswith(prefix) or prefix.startswith(key)
                if leads and (key > after or after.startswith(key)):
                    with suppress(FileNotFoundError, NotADirectoryError):
                        yield from _below(os.open(entry.name, _FOLDER, dir_fd=folder), key, prefix, after)
            elif key.startswith(prefix) and key > after and (meta := _seen(key, entry)) is not None:
                yield meta
    finally:
        os.close(folder)


def _holds_any(parent: int, key: str, entry: os.DirEntry[str]) -> bool:
    with suppress(FileNotFoundError, NotADirectoryError):
        return next(_below(os.open(entry.name, _FOLDER, dir_fd=parent), key, key, ""), None) is not None
    return False


# --- errors -----------------------------------------------------------------------------------------------------------


async def _thread(key: str, work: Callable[..., T], *given: object) -> T:
    """Do it in a thread; what the operating system says becomes an ObjectsError.

    A cancelled caller waits for the thread all the same: it works on files that the caller is about to close.
    """
    task = asyncio.ensure_future(asyncio.to_thread(work, *given))
    try:
        return await asyncio.shield(task)
    except OSError as error:
        raise _said(key, error) from error
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # seen: nobody is left to tell
        raise


def _said(key: str, error: OSError) -> ObjectsError:
    reason = (error.strerror or str(error)).lower()
    match error.errno:
        case None | errno.ENOENT | errno.ELOOP:
            return ObjectsError(f"there is no object {key}", kind="missing")
        case errno.EEXIST:
            return ObjectsError(f"there is an object {key} already", kind="exists")
        case errno.ENOTDIR:
            return ObjectsError(f"{key}: a part of it is an object, and no folder", kind="bad_key")
        case errno.EISDIR | errno.ENAMETOOLONG | errno.EINVAL:
            return ObjectsError(f"{key}: cannot be a file in this storage's folder: {reason}", kind="bad_key")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return ObjectsError(f"the storage's folder: {reason}: correct its owner", kind="unreachable")
        case number if number in _FULL:
            return ObjectsError(f"the storage is full: {reason}", kind="full")
        case _:
            return ObjectsError(f"the storage's folder: {reason}", kind="unreachable")
