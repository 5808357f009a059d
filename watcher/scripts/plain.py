"""Arguments where pydantic is not at hand: JSON Schema from annotations, and values held against it."""

from __future__ import annotations

import datetime
import decimal
import difflib
import enum
import inspect
import pathlib
import types
import typing
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from watcher.values import Json

_SIMPLE: dict[Any, dict[str, Json]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    bytes: {"type": "string", "format": "binary"},
    type(None): {"type": "null"},
    datetime.datetime: {"type": "string", "format": "date-time"},
    datetime.date: {"type": "string", "format": "date"},
    datetime.time: {"type": "string", "format": "time"},
    uuid.UUID: {"type": "string", "format": "uuid"},
    pathlib.Path: {"type": "string", "format": "path"},
    decimal.Decimal: {"type": ["number", "string"]},
    list: {"type": "array"},
    tuple: {"type": "array"},
    set: {"type": "array"},
    dict: {"type": "object"},
}
_FROM_TEXT: dict[Any, Any] = {
    datetime.datetime: datetime.datetime.fromisoformat,
    datetime.date: datetime.date.fromisoformat,
    datetime.time: datetime.time.fromisoformat,
    uuid.UUID: uuid.UUID,
    pathlib.Path: pathlib.Path,
    decimal.Decimal: lambda value: decimal.Decimal(str(value)),
    bytes: lambda value: value.encode(),
    float: float,
}


def schema(
    hints: Mapping[str, Any],
    parameters: Mapping[str, inspect.Parameter],
    open_: bool,
    resources: Mapping[str, str],
) -> dict[str, Json]:
    """The JSON Schema of a main's arguments, as an object. What an annotation means beyond that is left to main."""
    properties: dict[str, Json] = {}
    required = []
    for name, hint in hints.items():
        properties[name] = of_hint(hint)
        if name in resources:
            properties[name] |= {"format": f"resource-{resources[name]}"}
        default = parameters[name].default
        if default is inspect.Parameter.empty:
            required.append(name)
        elif isinstance(default, str | int | float | bool | list | dict | None):
            properties[name] |= {"default": default}
    found: dict[str, Json] = {"type": "object", "properties": properties, "additionalProperties": open_}
    return found | ({"required": required} if required else {})


def of_hint(hint: Any) -> dict[str, Json]:
    """The JSON Schema of one annotation; ``{}``, anything, for those that JSON cannot tell apart."""
    if hint in _SIMPLE:
        return dict(_SIMPLE[hint])
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return of_hint(parts[0])
    if origin is typing.Literal:
        return {"enum": list(parts)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [of_hint(part) for part in parts]}
    if origin in (list, set, tuple, Sequence):
        return {"type": "array", "items": of_hint(parts[0]) if origin is not tuple or parts[1:] == (...,) else {}}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": of_hint(parts[1])}
    if typing.is_typeddict(hint):
        fields = {name: of_hint(kind) for name, kind in typing.get_type_hints(hint).items()}
        return {"type": "object", "properties": fields, "required": sorted(hint.__required_keys__)}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    return {}


def mistakes(schema: Mapping[str, Any], given: Mapping[str, Json], names: Sequence[str]) -> list[str]:
    """What is wrong with the arguments, one text each, as ``name: what``."""
    known: Mapping[str, Any] = schema.get("properties", {})
    wrong = [f"{name} is missing" for name in schema.get("required", ()) if name not in given]
    for name, value in given.items():
        if name in known:
            wrong += _wrong(known[name], value, name)
        elif not schema.get("additionalProperties", True):
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(names) or 'none'}"
            wrong.append(f"{name}: main takes no such argument ({hint})")
    return wrong


def _wrong(schema: Mapping[str, Any], value: Json, where: str) -> list[str]:
    if "anyOf" in schema:
        tried = [_wrong(one, value, where) for one in schema["anyOf"]]
        return [] if not all(tried) else tried[0]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: input should be one of {', '.join(map(repr, schema['enum']))}"]
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if kinds and not any(_is(kind, value) for kind in kinds):
        return [f"{where}: input should be {' or '.join(map(_called, kinds))}"]
    wrong: list[str] = []
    if isinstance(value, list) and "items" in schema:
        for index, one in enumerate(value):
            wrong += _wrong(schema["items"], one, f"{where}.{index}")
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        wrong += [f"{where}.{name} is missing" for name in schema.get("required", ()) if name not in value]
        rest = schema.get("additionalProperties")
        for name, one in value.items():
            inside = fields.get(name, rest if isinstance(rest, dict) else {})
            wrong += _wrong(inside, one, f"{where}.{name}")
    return wrong


def _is(kind: str, value: Json) -> bool:
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    types_: dict[str, type] = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}
    return isinstance(value, types_[kind])


def _called(kind: str) -> str:
    return f"a{'n' if kind[0] in 'aio' else ''} {kind}" if kind != "null" else "null"


def coerced(hint: Any, value: Json) -> Any:
    """The value as its annotation has it, where JSON has only a text or a list for that."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return coerced(parts[0], value)
    if origin in (typing.Union, types.UnionType):
        fits = [part for part in parts if not _wrong(of_hint(part), value, "")]
        return coerced(fits[0], value) if fits else value
    if hint in _FROM_TEXT:
        return _FROM_TEXT[hint](value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if origin in (set, tuple) or hint in (set, tuple):
        return (origin or hint)(value)
    return value
