"""Filters, bodies and headers that a user wrote as Jinja2, evaluated in a sandbox over one item."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import ChainableUndefined, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from watcher.errors import DeliveryError
from watcher.values import UNSET, Delivery, Find, Flow, Json

MAX_OUTPUT = 1024 * 1024
"""Bytes of one rendered body, and of one rendered header."""

FILTER_NAMES = frozenset({"item", "key", "change", "previous", "patch", "watcher"})
TEMPLATE_NAMES = FILTER_NAMES | {"id", "item_id", "run_id", "revision", "found_at"}

RESERVED_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "connection", "expect", "upgrade", "te"})

Render = Callable[[Mapping[str, Any]], Any]

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_BARE = re.compile(r"\s*\{\{-?\s*(.*?)\s*-?\}\}\s*", re.DOTALL)


class _Sandbox(ImmutableSandboxedEnvironment):
    """`item.items` is the key "items" of the item, never the method of a dict."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, Mapping):
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


# Nothing is escaped: what comes out is JSON or plain text, never HTML.
_sandbox = _Sandbox(undefined=ChainableUndefined, autoescape=False)
_sandbox.globals.clear()


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
        return bool(_expression(flow.filter)(names))
    except Exception as error:  # whatever an expression over foreign data may raise
        raise DeliveryError(f"flows.{flow.name}.filter failed: {_words(error)}") from error


def body(flow: Flow, delivery: Delivery) -> Json:
    """The flow's body template, filled in: the same shape with every string rendered.

    A string that is nothing but ``{{ … }}`` becomes the value itself (a number stays a number, an object an object).
    Raises DeliveryError when a template fails or grows beyond `MAX_OUTPUT`.
    """
    names = names_of(delivery)
    return _fill(flow.body, lambda text: _rendered(f"flows.{flow.name}.body", text, names))


def mapped(flow: Flow, delivery: Delivery) -> Delivery:
    """The delivery with what the flow's ``map`` makes of its item in the item's place, without `previous` and `patch`.

    Everything after it, body and headers too, sees the new item. Raises DeliveryError when a template fails.
    """
    if flow.map is None:
        return delivery
    names = names_of(delivery)
    item = _fill(flow.map, lambda text: _rendered(f"flows.{flow.name}.map", text, names))
    try:
        payload = json.dumps({"item": item}, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:
        raise DeliveryError(f"flows.{flow.name}.map gives what JSON cannot hold: {error}") from error
    if len(payload) > MAX_OUTPUT:
        raise DeliveryError(f"flows.{flow.name}.map gives {len(payload)} bytes; at most {MAX_OUTPUT} are sent")
    return replace(delivery, payload=payload)


def headers(flow: Flow, delivery: Delivery, *, but: Mapping[str, str]) -> dict[str, str]:
    """The flow's header templates, filled in, without those in ``but``, which were references and are never compiled.

    Raises DeliveryError when a template fails or gives something that no header may hold.
    """
    templates = {name: text for name, text in flow.headers.items() if name not in but}
    if not any("{" in text for text in templates.values()):
        return templates
    names = names_of(delivery)
    filled = {}
    for name, text in templates.items():
        value = str(_rendered(f"flows.{flow.name}.headers.{name}", text, names))
        if not value.isprintable() or not value.isascii():
            raise DeliveryError(
                f"flows.{flow.name}.headers.{name}: a header holds printable ASCII only; "
                "add the filter `urlencode` or leave the value to the body"
            )
        filled[name] = value
    return filled


def names_of(delivery: Delivery) -> dict[str, Any]:
    """What a template may speak of. The same at every attempt, so that every attempt sends the same."""
    payload = json.loads(delivery.payload)
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
        mistakes += [("filter", said) for said in _mistakes(flow.filter, FILTER_NAMES, expression=True)]
    for where, text in (*_strings(flow.map, "map"), *_strings(flow.body, "body")):
        mistakes += [(where, said) for said in _mistakes(text, TEMPLATE_NAMES)]
    for name, text in flow.headers.items():
        where = f"headers.{name}"
        if not _HEADER_NAME.fullmatch(name):
            mistakes.append((where, "not the name of a header: letters, digits and - only"))
        elif name.lower() in RESERVED_HEADERS or name.lower().startswith("webhook-"):
            mistakes.append((where, "watcher sets this header itself: leave it out"))
        if not text.startswith("$"):
            if not text.isprintable():
                mistakes.append((where, "a header holds no line breaks and no control characters"))
            mistakes += [(where, said) for said in _mistakes(text, TEMPLATE_NAMES)]
    return mistakes


def _mistakes(text: str, known: frozenset[str], *, expression: bool = False) -> Iterator[str]:
    try:
        tree = _parse_expression(text) if expression else _sandbox.parse(text)
        _sandbox.compile(tree)
        used = meta.find_undeclared_variables(tree)
    except TemplateError as error:
        yield _words(error)
        return
    for name in sorted(used - known):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(sorted(known))
        yield f"no such name: {name} ({hint})"


def _parse_expression(text: str) -> nodes.Template:
    parser = Parser(_sandbox, text, state="variable")
    tree = parser.parse_expression()
    if not parser.stream.eos:
        raise TemplateSyntaxError("unexpected text after the expression", parser.stream.current.lineno)
    template = nodes.Template([nodes.Output([tree], lineno=1)], lineno=1)
    template.set_environment(_sandbox)
    return template


def _strings(value: Json, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _strings(inner, f"{where}.{index}")


def _fill(value: Json, render: Callable[[str], Json]) -> Json:
    if isinstance(value, str):
        return render(value)
    if isinstance(value, Mapping):
        return {key: _fill(inner, render) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_fill(inner, render) for inner in value]
    return value


def _rendered(where: str, text: str, names: Mapping[str, Any]) -> Json:
    try:
        return _template(text)(names)
    except DeliveryError as error:
        raise DeliveryError(f"{where}: {error}") from error
    except Exception as error:  # whatever a template over foreign data may raise
        raise DeliveryError(f"{where} failed: {_words(error)}") from error


@lru_cache(maxsize=1024)
def _expression(text: str) -> Render:
    evaluate = _sandbox.compile_expression(text, undefined_to_none=True)
    return lambda names: evaluate(names)


@lru_cache(maxsize=1024)
def _template(text: str) -> Render:
    """A function that renders one string; only what users wrote in the configuration ever comes here."""
    if "{" not in text:
        return lambda names: text
    bare = _BARE.fullmatch(text)
    if bare and _is_one_expression(text):
        return _expression(bare[1])
    template = _sandbox.from_string(text)

    def render(names: Mapping[str, Any]) -> str:
        parts, size = [], 0
        for part in template.generate(names):
            size += len(part)
            if size > MAX_OUTPUT:
                raise DeliveryError(f"renders more than {MAX_OUTPUT} characters")
            parts.append(part)
        return "".join(parts)

    return render


def _is_one_expression(text: str) -> bool:
    content = _sandbox.parse(text.strip()).body
    return len(content) == 1 and isinstance(content[0], nodes.Output) and len(content[0].nodes) == 1


def _words(error: Exception) -> str:
    said = " ".join(str(error).split())[:500] or type(error).__name__
    return said if isinstance(error, TemplateError) else f"{type(error).__name__}: {said}"
