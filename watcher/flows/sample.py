"""A marked sample event: for trying a flow before anything real is owed to it."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from datetime import datetime

from watcher.values import Delivery, Flow, Json

NAME = "watcher-test"
"""The watcher and the key that a sample says it is of."""


def delivery(flow: Flow, now: datetime, item: Json = None) -> Delivery:
    """One delivery that is in no database; its id is new each time."""
    shown = {
        "id": NAME,
        "title": "A test event from watcher",
        "url": "https://example.com/watcher-test",
        "watcher_test": True,
    }
    payload = {"item": shown if item is None else item}
    return Delivery(
        seq=0,
        id=str(uuid.uuid4()),
        flow=flow.name,
        attempt=1,
        first_failed_at=None,
        item_id="itm_test",
        watcher=NAME,
        run_id=0,
        key=NAME,
        change="new",
        revision=1,
        found_at=now,
        payload=json.dumps(payload, separators=(",", ":")).encode(),
    )


def marked(flow: Flow) -> Flow:
    """The flow with a header that tells a sample from the real thing, whatever its format."""
    return replace(flow, headers={**flow.headers, "X-Watcher-Test": "true"})
