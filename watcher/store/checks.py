"""Checksums, by which a damaged row is told from a changed one: SQLite itself does not notice a flipped bit."""

from __future__ import annotations

import hashlib


def of_item(id: str, key: str, change: str, revision: int, payload: bytes) -> bytes:
    """Covers all that a flow is told of an item."""
    head = f"{id}|{change}|{revision}|{len(key)}|{key}|".encode("utf-8", "surrogatepass")
    return hashlib.sha256(head + payload).digest()


def of_state(version: int, body: bytes) -> bytes:
    """Covers a memory and its version."""
    return hashlib.sha256(b"%d|" % version + body).digest()


def of_value(value: bytes) -> bytes:
    """The content hash of an item, from its canonical JSON: what the ledger holds beside it."""
    return hashlib.blake2b(value, digest_size=16).digest()
