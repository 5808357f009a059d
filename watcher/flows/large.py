"""Items that are too large for their flow: the largest parts stay behind as objects, and references travel."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace

from watcher.flows import envelope
from watcher.values import Delivery, Flow, Json

Stow = Callable[[bytes], Awaitable[Json]]
"""Keeps bytes and gives a reference to them; the same one for the same bytes."""


def too_large(flow: Flow, delivery: Delivery, usual: int | None) -> bool:
    """Whether what is found goes by reference. A `body` says by itself what is sent, and how much."""
    most = usual if flow.max_item is None else flow.max_item
    return most is not None and flow.body is None and len(delivery.payload) > most


async def by_reference(flow: Flow, delivery: Delivery, usual: int | None, stow: Stow) -> Delivery:
    """The delivery with references in the place of `item`, `previous` and `patch`, the largest first, as many as it
    takes. Raises whatever ``stow`` does."""
    payload: dict[str, Json] = json.loads(delivery.payload)
    parts = {name: envelope.dump(value) for name, value in payload.items()}
    most = usual if flow.max_item is None else flow.max_item
    size = len(delivery.payload)
    for name in sorted(parts, key=lambda part: -len(parts[part])):
        if most is None or size <= most:
            break
        payload[name] = await stow(parts[name])
        size += len(envelope.dump(payload[name])) - len(parts[name])
    return replace(delivery, payload=envelope.dump(payload))
