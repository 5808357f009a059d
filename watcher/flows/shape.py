"""Filters, bodies and headers that a user wrote as Jinja2, evaluated in a sandbox over one item."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from typing import Any

from watcher.errors import DeliveryError
from watcher.flows import sandbox
from watcher.flows.sandbox import MAX_OUTPUT
from watcher.values import REFERENCES, UNSET, Delivery, Find, Flow, Json

FILTER_NAMES = frozenset({"item", "key", "change", "previous", "patch", "watcher"})
TEMPLATE_NAMES = FILTER_NAMES | {"id", "item_id", "run_id", "revision", "found_at"}

RESERVED_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "connection", "expect", "upgrade", "te"})

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def accepts(flow: Flow, find: Find, watcher: str) -> bool:
    """Whether the flow's filter lets this find through. Raises DeliveryError when the filter itself fails."""
    if flow.filter is None:
        return True
    names = {
        "item": find.item,
        "key": find.key,
        "change": find.change,
        "previous": None if find.previous is UNSET else find.previous,
        "patch": None if find.patch is UNSET else find.patch,
        "watcher": watcher,
    }
    try:
        return bool(sandbox.expression(flow.filter)(names))
    except DeliveryError as error:
        raise DeliveryError(f"flows.{flow.name}.filter: {error}") from error
    except Exception as error:  # whatever an expression over foreign data may raise
        raise DeliveryError(f"flows.{flow.name}.filter failed: {sandbox.words(error)}") from error


def body(flow: Flow, delivery: Delivery) -> Json:
    """The flow's body template, filled in: the same shape with every string rendered.

    A string that is nothing but ``{{ … }}`` becomes the value itself (a number stays a number, an object an object).
    Raises DeliveryError when a template fails or grows beyond `MAX_OUTPUT`.
    """
    return _rendered(f"flows.{flow.name}.body", flow.body, names_of(delivery))


def mapped(flow: Flow, delivery: Delivery) -> Delivery:
    """The delivery with what the flow's ``map`` makes of its item in the item's place, without `previous` and `patch`.

    Everything after it, body and headers too, sees the new item. Raises DeliveryError when a template fails.
    """
    if flow.map is None:
        return delivery
    item = _rendered(f"flows.{flow.name}.map", flow.map, names_of(delivery))
    try:
        payload = json.dumps({"item": item}, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise DeliveryError(f"flows.{flow.name}.map gives what JSON cannot hold: {error}") from error
    if len(payload) > MAX_OUTPUT:
        raise DeliveryError(f"flows.{flow.name}.map gives {len(payload)} bytes; at most {MAX_OUTPUT} are sent")
    return replace(delivery, payload=payload)


def headers(flow: Flow, delivery: Delivery, *, but: Mapping[str, str]) -> dict[str, str]:
    """The flow's header templates, filled in, without those in ``but``, which were references and are never compiled.

    Raises DeliveryError when a template fails or gives something that no header may hold.
    """
    templates = {name: text for name, text in flow.headers.items() if name not in but} if but else flow.headers
    if not any("{" in text for text in templates.values()):
        return {**templates}
    filled = _filled(flow, templates, names_of(delivery))
    for name, value in filled.items():
        if not value.isprintable() or not value.isascii():
            raise DeliveryError(
                f"flows.{flow.name}.headers.{name}: a header holds printable ASCII only; "
                "add the filter `urlencode` or leave the value to the body"
            )
    return filled


def _filled(flow: Flow, templates: Mapping[str, str], names: dict[str, Any]) -> dict[str, str]:
    """All headers as one template, which costs less; one by one when that fails, to say which it was."""
    values: Any = None
    if templates is flow.headers:  # else it is made anew for each item, and so would its compiled form be
        with contextlib.suppress(Exception):
            values = sandbox.compiled(templates)(names)
    if values is None:
        values = {name: _rendered(f"flows.{flow.name}.headers.{name}", text, names) for name, text in templates.items()}
    return {name: value if isinstance(value, str) else str(value) for name, value in values.items()}


def names_of(delivery: Delivery) -> dict[str, Any]:
    """What a template may speak of. The same at every attempt, so that every attempt sends the same."""
    global _last
    last = _last  # looked at once: a thread may be at work on another delivery
    if last[0] is not delivery:
        last = _last = delivery, _names(delivery)
    return last[1]


_decode = json.JSONDecoder().raw_decode
_last: tuple[Delivery | None, dict[str, Any]] = None, {}  # body and headers are filled in one after the other


def _names(delivery: Delivery) -> dict[str, Any]:
    payload = _decode(delivery.payload.decode("utf-8", "surrogatepass"))[0]  # our own JSON: nothing stands around it
    return {
        "item": payload.get("item"),
        "previous": payload.get("previous"),
        "patch": payload.get("patch"),
        "key": delivery.key,
        "change": delivery.change,
        "watcher": delivery.watcher,
        "id": delivery.id,
        "item_id": delivery.item_id,
        "run_id": delivery.run_id,
        "revision": delivery.revision,
        "found_at": rfc3339(delivery.found_at),
    }


@lru_cache(256)  # items of one run share their instant
def rfc3339(at: datetime) -> str:
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def check(flow: Flow) -> list[tuple[str, str]]:
    """Every mistake in the flow's expressions and header names, as (option, what is wrong and what to do).

    The option is a path below the flow's table: ``filter``, ``map``, ``body.text``, ``headers.X-Name``.
    """
    mistakes = []
    if flow.filter is not None:
        mistakes += [("filter", said) for said in sandbox.mistakes(flow.filter, FILTER_NAMES, as_expression=True)]
    for where, text in (*_strings(flow.map, "map"), *_strings(flow.body, "body")):
        mistakes += [(where, said) for said in sandbox.mistakes(text, TEMPLATE_NAMES)]
    if isinstance(flow.map, Mapping):
        for where, text in (*_strings(flow.body, "body"), *_strings(flow.headers, "headers")):
            if not text.startswith(REFERENCES):
                mistakes += [(where, said) for said in sandbox.unknown_fields(text, "item", flow.map)]
    for name, text in flow.headers.items():
        where = f"headers.{name}"
        if not _HEADER_NAME.fullmatch(name):
            mistakes.append((where, "not the name of a header: letters, digits and - only"))
        elif name.lower() in RESERVED_HEADERS or name.lower().startswith("webhook-"):
            mistakes.append((where, "watcher sets this header itself: leave it out"))
        if not text.startswith(REFERENCES):
            if not text.isprintable():
                mistakes.append((where, "a header holds no line breaks and no control characters"))
            mistakes += [(where, said) for said in sandbox.mistakes(text, TEMPLATE_NAMES)]
    return mistakes


def _strings(value: Json, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _strings(inner, f"{where}.{index}")


def _rendered(where: str, template: Json, names: dict[str, Any]) -> Json:
    try:
        return sandbox.compiled(template)(names)
    except DeliveryError as error:
        raise DeliveryError(f"{where}: {error}") from error
    except Exception as error:  # whatever a template over foreign data may raise
        raise DeliveryError(f"{where} failed: {sandbox.words(error)}") from error
