"""Names of objects: keys, references to objects in every form that Windmill's clients write, and keys made up here."""

from __future__ import annotations

import mimetypes
import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote

from watcher.errors import ObjectsError
from watcher.values import Json

PRIMARY = "_default_"
"""The name of the primary storage, where a name must be given."""
LONGEST_KEY = 1024
"""Bytes of a key in UTF-8: S3's own limit."""
LONGEST_NAME = 100

_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_STORAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def parse_key(text: Json) -> str:
    """A key as every kind of storage takes it. Raises ObjectsError, kind ``bad_key``, that says what is wrong with it.

    No leading or trailing slash, no empty part, no ``.`` or ``..``, no control characters, no backslash (Azure takes
    it for a slash, which would step around permissions), at most 1024 bytes.
    """
    if not isinstance(text, str):
        raise _bad("a key is text, such as reports/2026.csv")
    if not text:
        raise _bad("a key must not be empty")
    if _CONTROL.search(text):
        raise _bad("a key has no control characters", text)
    if len(text.encode()) > LONGEST_KEY:
        raise _bad(f"a key has at most {LONGEST_KEY} bytes", text)
    if text.startswith("/"):
        raise _bad(f"a key does not begin with a slash: write {_shown(text.lstrip('/'))}", text)
    if text.endswith("/"):
        raise _bad("a key does not end with a slash: that would be a folder", text)
    if "\\" in text:
        raise _bad("a key has no backslash", text)
    parts = text.split("/")
    if "" in parts:
        raise _bad("a key has no empty part", text)
    if {".", ".."} & {*parts}:
        raise _bad("the parts of a key have names, and . and .. are none", text)
    return text


def parse_prefix(text: str) -> str:
    """What keys may begin with: a key, cut anywhere. Raises ObjectsError, kind ``bad_key``."""
    folder, _, last = text.rpartition("/")
    if folder or text.startswith("/"):
        parse_key(folder or text)
    if last:
        parse_key(last + "x")  # the beginning of a name: . and .. may be one
    return text


@dataclass(frozen=True, slots=True)
class S3Object:
    """A reference to an object, as Windmill's clients pass it on. ``storage`` None is the primary one."""

    s3: str
    storage: str | None = None
    presigned: str | None = None
    filename: str | None = None

    @classmethod
    def parse(cls, given: Json) -> S3Object:
        """From ``{"s3": KEY, "storage"?, "presigned"?, "filename"?}``, ``s3://STORAGE/KEY`` or ``s3:///KEY``.

        Raises ObjectsError, kind ``bad_key``.
        """
        if isinstance(given, S3Object):
            return given
        if isinstance(given, str):
            scheme, _, rest = given.partition("://")
            storage, slash, key = rest.partition("/")
            if scheme != "s3" or not slash:
                raise _bad('write an object as {"s3": "KEY"}, s3://STORAGE/KEY or s3:///KEY', given)
            return cls(parse_key(key), parse_name(storage or None))
        if not isinstance(given, dict) or "s3" not in given:
            raise _bad('write an object as {"s3": "KEY"}, s3://STORAGE/KEY or s3:///KEY')
        presigned, filename = given.get("presigned"), given.get("filename")
        for name, value in (("presigned", presigned), ("filename", filename)):
            if value is not None and (not isinstance(value, str) or len(value) > 4000):
                raise _bad(f"{name} of an object is text")
        return cls(parse_key(given["s3"]), parse_name(given.get("storage")), presigned, filename)

    def json(self) -> dict[str, str]:
        """As JSON; what is not set is left out, since clients put a null into addresses as text."""
        named = {"s3": self.s3, "storage": self.storage, "presigned": self.presigned, "filename": self.filename}
        return {name: value for name, value in named.items() if value is not None}

    def __str__(self) -> str:
        return f"s3://{self.storage or ''}/{self.s3}"


def parse_name(text: Json) -> str | None:
    """A storage's name; None for the primary one, however it is written. Raises ObjectsError, kind ``bad_key``."""
    if text in (None, "", PRIMARY):
        return None
    if not isinstance(text, str) or not _STORAGE.fullmatch(text):
        raise _bad("a storage has a name of letters, digits, _ - and .", text if isinstance(text, str) else "")
    return text


def new_key(now: datetime, *, extension: str | None = None, content_type: str | None = None) -> str:
    """A key that nobody has used: ``windmill_uploads/upload_{milliseconds}_{random}.{extension}``, as Windmill's."""
    guessed = mimetypes.guess_extension((content_type or "").partition(";")[0].strip()) or ""
    ending = extension or guessed.lstrip(".") or "file"
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,20}", ending):
        ending = "file"
    return f"windmill_uploads/upload_{int(now.timestamp() * 1000)}_{secrets.randbits(64)}.{ending}"


def nameable(name: str) -> bool:
    """Whether a file's name can be a part of a key."""
    return not _CONTROL.search(name) and "\\" not in name


def quoted(key: str) -> str:
    """A key as it stands in the path of an address."""
    return quote(key, safe="/~")


def _bad(message: str, text: str = "") -> ObjectsError:
    return ObjectsError(f"{_shown(text)}: {message}" if text else message, kind="bad_key")


def _shown(text: str) -> str:
    cut = text if len(text) <= 80 else f"{text[:77]}…"
    return _CONTROL.sub("\ufffd", cut)
