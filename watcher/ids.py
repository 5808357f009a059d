"""Names that two crashes apart come out the same: keys, contents, items and deliveries as hashes."""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from typing import Any

from watcher.values import Change

_DELIVERY_NAMESPACE = uuid.UUID("7b0f7d6e-5f43-5c0b-9d7c-0b6f0f3f9a11")


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no white space, UTF-8. Raises ValueError for NaN and for cycles."""
    return _encode(value).encode("utf-8", "surrogatepass")


def key_hash(key: str) -> bytes:
    """16 bytes that stand for a key in the ledger. Collision-resistant: a hostile source chooses its keys."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def content_hash(item: Any) -> bytes:
    """16 bytes that change when the item changes."""
    return hashlib.blake2b(canonical(item), digest_size=16).digest()


def item_id(epoch: str, watcher: str, key: bytes, revision: int, content: bytes, change: Change) -> str:
    """The same for a run repeated after a crash, a rollback or a replay; another after a restore from backup.

    ``watcher`` is the name under which the watcher was first known, ``key`` is the key's hash. The text holds no
    ``.``, as Standard Webhooks asks of a message id.
    """
    text = f"{epoch}|{watcher}|{key.hex()}|{revision}|{content.hex()}|{change}"
    # 26 digits of base 32 are in the first 20 bytes; to encode all 32 would take half as long again.
    return "itm_" + base64.b32encode(hashlib.sha256(text.encode()).digest()[:20])[:26].decode().lower()


def delivery_id(item: str, flow: str) -> str:
    """A UUID (version 5): Windmill's ``job_id``, ``webhook-id`` and every other idempotency key."""
    # What uuid.uuid5 does (RFC 9562 5.5), at a third of its cost: there is one for every item.
    digest = hashlib.sha1(_DELIVERY_NAMESPACE.bytes + f"{item}|{flow}".encode(), usedforsecurity=False).hexdigest()
    variant = "89ab"[int(digest[16], 16) & 3]
    return f"{digest[:8]}-{digest[8:12]}-5{digest[13:16]}-{variant}{digest[17:20]}-{digest[20:32]}"


def lane(order: str, watcher: str, key: bytes, item: str) -> bytes:
    """8 bytes: deliveries of one flow that share it go out one after another, in the order they were committed."""
    text = {"key": f"{watcher}|{key.hex()}", "watcher": watcher, "none": item}[order]
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
