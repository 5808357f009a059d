"""The JSON Schema of the configuration file, for editors: each option with its meaning and its default."""

from __future__ import annotations

from typing import Any

from watcher import flows
from watcher.config import model


def json_schema() -> dict[str, Any]:
    """JSON Schema 2020-12. A flow may have the options of any preset: which ones fit, `watcher check` says."""
    schema = model.Settings.model_json_schema()
    tables = schema["$defs"]
    flow = tables["Flow"]
    flow["additionalProperties"] = False
    flow["properties"]["preset"]["enum"] = sorted(flows.presets)
    for name, preset in sorted(flows.presets.items()):
        for option, says in preset.settings.model_json_schema().get("properties", {}).items():
            says["description"] = f"{says['description']} ({name})"
            flow["properties"][option] = _both(flow["properties"].get(option), says)
    for title, noun in _TABLES.items():
        _put_right(tables[title], noun)
    _put_right(schema, model.Settings)
    for named, pattern in (
        ("flows", model.NAME),
        ("watchers", model.NAME),
        ("resources", model.PATH),
        ("variables", model.PATH),
    ):
        schema["properties"][named]["propertyNames"] = {"pattern": pattern}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "watcher.schema.json", **schema}


def _both(one: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    """An option that several presets have: all meanings, and only those bounds that they share."""
    if one is None:
        return other
    told = {"description": f"{one['description']} {other['description']}"}
    return {name: value for name, value in one.items() if other.get(name) == value} | told


_TABLES: dict[str, type[Any]] = {
    table.__name__: table
    for table in (
        model.Server, model.Http, model.Scripts, model.Delivery, model.Logging, model.Resource, model.Batch,
        model.Flow, model.Watcher, model.StorageRule, model.SecondaryStorage, model.Storage,
    )
}  # fmt: skip


def _put_right(table: dict[str, Any], noun: type[Any]) -> None:
    """TOML has no null, durations have our form, and a title that repeats the name helps nobody."""
    shown = {info.alias or name: default_of(noun, name) for name, info in noun.model_fields.items()}
    for option, says in table["properties"].items():
        says.pop("title", None)
        says.pop("default", None)
        kinds = [kind for kind in says.get("anyOf", []) if kind != {"type": "null"}]
        if len(kinds) < len(says.get("anyOf", [])):
            del says["anyOf"]
            says.update(kinds[0] if len(kinds) == 1 else {"anyOf": kinds})
        for bound in ("ge", "le"):
            for kind in (says, *says.get("anyOf", [])):
                kind.pop(bound, None)
        if shown.get(option) is not None:
            says["default"] = shown[option]
        says["description"] = " ".join(says["description"].split())


def default_of(noun: type[Any], name: str) -> Any:
    """An option's default as it would be written; None when it has none or is a table."""
    info = noun.model_fields[name]
    if info.is_required() or (info.annotation in _TABLES.values()):
        return None
    value = noun.model_construct().model_dump(mode="json", include={name}, warnings=False)[name]
    return None if value in ({}, []) else value
