"""Messages between the service and a worker: JSON with an attachment, both with a checked length, never pickle."""

from __future__ import annotations

import json
import struct
from typing import Any, NoReturn

from watcher.values import Json

HEAD = struct.Struct("!II")  # bytes of JSON, bytes of attachment


class FrameError(ValueError):
    """What came through the channel is not a message: its length, its encoding or its shape is wrong."""


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


# Made once: for a small value, json.dumps spends most of its time on making an encoder.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_decode = json.JSONDecoder(parse_constant=_refuse).decode


def dump(value: Json) -> str:
    """JSON text. ValueError for NaN and cycles, TypeError for what JSON does not know, RecursionError when too deep."""
    return _encode(value)


def load(text: str) -> Json:
    """The value of a JSON text, strictly: ValueError for NaN too."""
    return _decode(text)


def pack(message: dict[str, Any], blob: bytes = b"") -> bytes:
    """One message as bytes."""
    return pack_text(dump(message), blob)


def pack_text(text: str, blob: bytes = b"") -> bytes:
    """One message, whose JSON is ready, as bytes."""
    # A lone surrogate is a legal JSON string, so it must travel.
    body = text.encode("utf-8", "surrogatepass")
    return b"".join((HEAD.pack(len(body), len(blob)), body, blob))


def lengths(head: bytes, limit: int = 1 << 33) -> tuple[int, int]:
    """How many bytes of JSON and of attachment follow. FrameError above ``limit`` bytes together."""
    text, blob = HEAD.unpack(head)
    if text + blob > limit:
        raise FrameError(f"a message of {text + blob} bytes, where {limit} are allowed")
    return text, blob


def unpack(body: bytes) -> dict[str, Any]:
    """The message in its JSON. FrameError if it is not a JSON object."""
    try:
        message = load(body.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"not JSON: {error}") from error
    if not isinstance(message, dict):
        raise FrameError("not a JSON object")
    return message
