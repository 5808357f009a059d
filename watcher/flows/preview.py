"""What would be sent of one delivery, for people to read: no reference is followed, nothing is signed or sent. Pure."""

from __future__ import annotations

from datetime import datetime

from watcher.errors import DeliveryError
from watcher.flows import presets, shape
from watcher.flows.attempt import build, is_reference
from watcher.values import Delivery, Flow, Json

MASK = "*****"
MAX_BODY = 1024 * 1024
"""Bytes of a body that are shown."""


def request(flow: Flow, delivery: Delivery, now: datetime) -> dict[str, Json]:
    """``{"flow", "method", "url", "headers", "body"}``. Raises DeliveryError when a template fails or the engine takes
    no message of that size: what the next attempt would meet."""
    preset = presets[flow.preset]
    hidden = {name: MASK for name in flow.settings if name in preset.settings.hidden}
    resolved = build(
        flow,
        url=flow.url if is_reference(flow.url) or not preset.secret_url else MASK,
        token=None if flow.token is None else MASK,
        headers={name: MASK for name, text in flow.headers.items() if is_reference(text)},
        settings={**flow.settings, **hidden},
    )
    try:
        made = preset.request(flow, shape.mapped(flow, delivery), resolved, now)
    except ValueError as error:
        raise DeliveryError(str(error)) from error
    headers = dict(made.headers)
    if flow.secrets:
        headers["webhook-signature"] = "made at each attempt"
    if "authorization" in headers:
        headers["authorization"] = headers["authorization"].partition(" ")[0] + f" {MASK}"
    return {
        "flow": flow.name,
        "method": made.method,
        "url": made.url,
        "headers": headers,
        "body": made.body[:MAX_BODY].decode("utf-8", "replace"),
    }
