"""Deliveries and flows for tests, with everything that a test does not care about filled in."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from watcher import ids
from watcher.flows import presets
from watcher.flows.preset import Resolved
from watcher.values import UNSET, Delivery, Find, Flow

NOW = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)


def delivery(item: Any = None, *, previous: Any = UNSET, patch: Any = UNSET, **more: Any) -> Delivery:
    """One delivery of ``item`` to the flow ``hook``."""
    payload = {"item": {"id": 1, "title": "Hello"} if item is None else item}
    payload |= {} if previous is UNSET else {"previous": previous}
    payload |= {} if patch is UNSET else {"patch": patch}
    given: dict[str, Any] = {
        "seq": 1,
        "id": "7d444840-9dc0-51d1-b245-5ffdce74fad2",
        "flow": "hook",
        "attempt": 1,
        "first_failed_at": None,
        "item_id": "itm_abc",
        "watcher": "news",
        "run_id": 7,
        "key": "1",
        "change": "new",
        "revision": 1,
        "found_at": NOW,
        "payload": json.dumps(payload, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass"),
    }
    return Delivery(**{**given, **more})


def find(item: Any, **more: Any) -> Find:
    key = str(item.get("id", "")) if isinstance(item, dict) else str(item)
    given: dict[str, Any] = {
        "key": key,
        "key_hash": ids.key_hash(key),
        "change": "new",
        "revision": 1,
        "content": ids.content_hash(item),
        "item": item,
    }
    return Find(**{**given, **more})


def resolved(flow: Flow, **more: Any) -> Resolved:
    """The flow's own values, as if none were a reference."""
    preset = presets[flow.preset]
    given: dict[str, Any] = {
        "url": flow.url,
        "token": flow.token,
        "secrets": flow.secrets,
        "settings": preset.settings.model_validate(dict(flow.settings)),
    }
    return Resolved(**{**given, **more})
