"""The storages of the configuration, each mistake with its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from watcher import values
from watcher.config import model
from watcher.config.positions import Loc
from watcher.config.sources import beside, reference
from watcher.objects import permissions
from watcher.objects.keys import PRIMARY

if TYPE_CHECKING:
    from watcher.config.build import Builder


def build(builder: Builder, settings: model.Settings, data: Path) -> dict[str, values.StorageSettings]:
    """The storages by name, the primary one as ``_default_`` unless it is switched off."""
    primary = settings.storage
    built: dict[str, values.StorageSettings] = {}
    loc: Loc = ("storage",)
    if primary.kind == "none":
        for option in ("path", "resource", "public", "permissions"):
            if option in primary.model_fields_set:
                builder.wrong((*loc, option), "means nothing where there is no storage", "remove it", at="key")
    else:
        built[PRIMARY] = _storage(builder, loc, PRIMARY, primary, settings, data / "objects")
    for name, table in primary.secondary.items():
        where: Loc = (*loc, "secondary", name)
        built[name] = _storage(builder, where, name, table, settings, None)
    _apart(builder, built, data)
    return built


def _apart(builder: Builder, built: dict[str, values.StorageSettings], data: Path) -> None:
    """A folder holds objects alone: whoever may write all of them must not reach the service's own files through it,
    nor another storage around that one's rules."""
    file = builder.sources.file
    for name, storage in built.items():
        if storage.path is None:
            continue
        loc: Loc = ("storage", "path") if name == PRIMARY else ("storage", "secondary", name, "path")
        if data.is_relative_to(storage.path) or (file is not None and file.absolute().is_relative_to(storage.path)):
            builder.wrong(loc, "holds the service's own files", "give objects a directory of their own")
        for other in built.values():
            if other.path is not None and other.path != storage.path and other.path.is_relative_to(storage.path):
                builder.wrong(loc, f"holds the storage {other.name} too", "put them side by side")


def _storage(
    builder: Builder,
    loc: Loc,
    name: str,
    table: model.SecondaryStorage,
    settings: model.Settings,
    default: Path | None,
) -> values.StorageSettings:
    path, resource = None, ""
    if table.kind == "folder":
        path = _folder(builder, loc, table, default)
    else:
        resource = _resource(builder, loc, table, settings)
    return values.StorageSettings(
        name=name,
        kind=table.kind,
        path=path,
        resource=resource,
        public=table.public,
        permissions=_rules(builder, (*loc, "permissions"), table.permissions),
    )


def _folder(builder: Builder, loc: Loc, table: model.SecondaryStorage, default: Path | None) -> Path | None:
    if table.resource is not None:
        builder.wrong((*loc, "resource"), "a folder has a path and no resource", 'or is kind = "s3" meant?', at="key")
    if table.path is None:
        if default is None:
            builder.wrong((*loc, "path"), "`path` is required", "the directory of this folder", at="missing")
        return default
    if "\0" in table.path:
        builder.wrong((*loc, "path"), "has a NUL byte")
        return default
    path = beside(builder.sources.file, table.path)
    there = next((place for place in (path, *path.parents) if place.exists()), path)
    if there.exists() and not there.is_dir():
        builder.wrong((*loc, "path"), f"{there} is a file, not a directory")
    return path


def _resource(builder: Builder, loc: Loc, table: model.SecondaryStorage, settings: model.Settings) -> str:
    where: Loc = (*loc, "resource")
    if table.path is not None:
        builder.wrong(
            (*loc, "path"), f"{table.kind} has a resource and no path", 'or is kind = "folder" meant?', at="key"
        )
    if table.resource is None:
        hint = f"the path of a resource of type {table.kind}, such as u/admin/bucket"
        builder.wrong(where, "`resource` is required", hint, at="missing")
        return ""
    found = reference(table.resource)
    if found is not None and found[0] != "res":
        builder.wrong(where, f"${found[0]}: names no resource", "name it by its path: u/admin/bucket")
        return ""
    name = found[1] if found else table.resource
    if found is None:
        builder.stored(where, "res", name)  # a reference was looked for with all others
    fixed = settings.resources.get(name)
    if fixed is not None and fixed.type != table.kind:
        builder.wrong(where, f"is a resource of type {fixed.type}, not {table.kind}")
    return name


def _rules(
    builder: Builder, loc: Loc, rules: Sequence[model.StorageRule] | None
) -> tuple[values.StorageRule, ...] | None:
    if rules is None:
        return None
    for index, rule in enumerate(rules):
        if wrong := permissions.check(rule.pattern):
            hint = "known are {username}, {group}, {folder_read} and {folder_write}" if "variable" in wrong else ""
            builder.wrong((*loc, index, "pattern"), wrong, hint)
    return tuple(values.StorageRule(rule.pattern, rule.allow) for rule in rules)
