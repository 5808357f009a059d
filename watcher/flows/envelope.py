"""The body of a request about one item and the headers that name and sign it, as Standard Webhooks 1.0.0 asks."""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from json.encoder import encode_basestring_ascii as _quote
from urllib.parse import quote

from watcher.errors import DeliveryError
from watcher.flows import sandbox, shape
from watcher.flows.preset import Resolved
from watcher.flows.sign import sign
from watcher.values import Delivery, Flow, Format, Json

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
CLOUDEVENT = "application/cloudevents+json; charset=utf-8"


def body(flow: Flow, delivery: Delivery, default: Format) -> tuple[bytes, str]:
    """What is sent, the same bytes at every attempt, and its content type."""
    form = flow.format or default
    if flow.body is not None:
        filled = shape.body(flow, delivery)
        if form == "cloudevents-structured":
            return _structured(delivery, dumped(flow, filled)), CLOUDEVENT
        if isinstance(filled, str):
            return _bounded(flow, filled.encode("utf-8", "replace")), TEXT
        return dumped(flow, filled), JSON
    if form == "plain":
        return plain(delivery), JSON
    if form == "cloudevents":
        return _data(delivery), JSON
    if form == "cloudevents-structured":
        return _structured(delivery, _data(delivery)), CLOUDEVENT
    return envelope(delivery), JSON


def embedded(flow: Flow, delivery: Delivery, default: Format) -> bytes:
    """The same as JSON, to stand in a field of an engine's own request: a text becomes a JSON string."""
    content, kind = body(flow, delivery, default)
    return dump(content.decode()) if kind == TEXT else content


def arguments(flow: Flow, delivery: Delivery, default: Format) -> bytes:
    """The same as a JSON object, for engines that take nothing else: ``{"body": …}`` around what is none."""
    content = embedded(flow, delivery, default)
    return content if content.startswith(b"{") else b'{"body":%b}' % content


def envelope(delivery: Delivery) -> bytes:
    """``{"type": "watcher.item.new", "timestamp": …, "data": {"watcher", "run_id", "item_id", "key", …, "item", …}}``.

    ``data`` ends with what the item carries: ``item``, and for a change ``previous`` and ``patch`` (RFC 6902).
    """
    head = f'{{"type":"watcher.item.{delivery.change}","timestamp":"{shape.rfc3339(delivery.found_at)}","data":'
    return b"%b%b}" % (head.encode(), _data(delivery))


def _data(delivery: Delivery) -> bytes:
    head = (
        f'{{"watcher":{_quote(delivery.watcher)},"run_id":{delivery.run_id},"item_id":{_quote(delivery.item_id)},'
        f'"key":{_quote(delivery.key)},"change":"{delivery.change}","revision":{delivery.revision},'
    )
    # The payload is a JSON object already, checked by its checksum: it is spliced in, not parsed and written again.
    return b"%b%b" % (head.encode(), _utf8(delivery.payload)[1:])


def plain(delivery: Delivery) -> bytes:
    """The item alone. One that is no object comes as ``{"body": item}``, which is what Windmill makes of it too."""
    item = json.loads(delivery.payload)["item"]
    return dump(item if isinstance(item, dict) else {"body": item})


def _attributes(delivery: Delivery) -> dict[str, str]:
    """The attributes of a CloudEvent (CloudEvents 1.0.2, 3). ``source`` and ``id`` are the same at every attempt."""
    return {
        "specversion": "1.0",
        "id": delivery.id,
        "source": f"/watchers/{quote(delivery.watcher)}",
        "type": f"watcher.item.{delivery.change}",
        "time": shape.rfc3339(delivery.found_at),
        **({"subject": delivery.key} if delivery.key else {}),  # an attribute must not be empty
    }


def _structured(delivery: Delivery, data: bytes) -> bytes:
    return b'%b,"datacontenttype":"application/json","data":%b}' % (dump(_attributes(delivery))[:-1], data)


def _binary(delivery: Delivery) -> dict[str, str]:
    """Attributes as headers; what no header may hold is percent-encoded (HTTP binding 1.0.2, 3.1.3.2)."""
    safe = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')
    return {f"ce-{name}": quote(value, safe=safe, errors="replace") for name, value in _attributes(delivery).items()}


def headers(
    flow: Flow, delivery: Delivery, resolved: Resolved, now: datetime, body: bytes, content_type: str
) -> dict[str, str]:
    """The user's own headers, then ours; a signature when the flow has secrets. ``now`` is this attempt's time."""
    found = {
        "content-type": content_type,
        "user-agent": _user_agent(),
        "traceparent": _traceparent(delivery),
    }
    if flow.headers:
        own = {**shape.headers(flow, delivery, but=resolved.headers), **resolved.headers}
        found |= {name.lower(): value for name, value in own.items()}
    found["webhook-id"] = delivery.id
    found["webhook-timestamp"] = str(int(now.timestamp()))
    found["x-watcher-attempt"] = str(delivery.attempt)
    if flow.format == "cloudevents":
        found |= _binary(delivery)
    if resolved.secrets:
        found["webhook-signature"] = sign(resolved.secrets, delivery.id, now, body)
    return found


def _traceparent(delivery: Delivery) -> str:
    """W3C Trace Context: the delivery is the trace, the same for all its attempts, and each attempt a span of it."""
    trace = delivery.id.replace("-", "")
    return f"00-{trace}-{int(trace[:16], 16) ^ delivery.attempt:016x}-01"


_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode  # dumps makes one a time


def dump(value: Json) -> bytes:
    """Compact JSON. Lone surrogates, which UTF-8 cannot hold, stay escaped as JSON has them."""
    try:
        return _encode(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _utf8(payload: bytes) -> bytes:
    try:
        payload.decode()
    except UnicodeDecodeError:
        return dump(json.loads(payload.decode("utf-8", "surrogatepass")))
    return payload


def dumped(flow: Flow, filled: Json) -> bytes:
    """What the flow's body template gave, as JSON. Raises DeliveryError when JSON cannot hold it."""
    try:
        return _bounded(flow, dump(filled))
    except (ValueError, TypeError, RecursionError) as error:
        raise DeliveryError(f"flows.{flow.name}.body gives what JSON cannot hold: {error}") from error


def _bounded(flow: Flow, content: bytes) -> bytes:
    if len(content) > sandbox.MAX_OUTPUT:
        raise DeliveryError(
            f"flows.{flow.name}.body renders {len(content)} bytes; at most {sandbox.MAX_OUTPUT} are sent"
        )
    return content


@cache
def _user_agent() -> str:
    try:
        return f"watcher/{version('change-watcher')}"
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "watcher"
