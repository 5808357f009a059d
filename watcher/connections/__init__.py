"""Connection strings and the resources that they stand for, both ways. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from watcher.connections import mongodb, mysql, postgresql, redis, upstash
from watcher.connections.text import Split, Typo, blanked, split
from watcher.values import Json

__all__ = [
    "TYPES", "Connection", "Typo", "apart", "parse", "secrets", "shown", "suggested_path", "without_key", "write",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Kind:
    schemes: Mapping[str, str]
    read: Callable[[Split], dict[str, Json]]
    write: Callable[[Mapping[str, Any]], str]
    secrets: tuple[str, ...]  # fields that hold one; a dot leads into an object
    harmless: tuple[str, ...]  # parameters whose values may be shown


TYPES: Mapping[str, _Kind] = {
    name: _Kind(module.SCHEMES, module.read, module.write, module.SECRETS, module.HARMLESS)
    for name, module in {
        "postgresql": postgresql, "mysql": mysql, "mongodb": mongodb, "redis": redis, "upstash": upstash
    }.items()
}  # fmt: skip
"""The resource types that have a connection string."""

_OTHERS = {scheme: name for name, kind in TYPES.items() for scheme in kind.schemes}
_HARMLESS = frozenset(name.lower() for kind in TYPES.values() for name in kind.harmless)


@dataclass(frozen=True, slots=True)
class Connection:
    """What a connection string says: a resource's type and value, its secrets still in it."""

    type: str
    value: Mapping[str, Json]
    notes: tuple[str, ...] = ()  # what was left out, and why

    def __repr__(self) -> str:
        return f"Connection({self.type})"


def parse(type: str, given: str) -> Connection:
    """The resource that a connection string stands for. Raises Typo, which shows each mistake and no secret.

        parse("postgresql", "postgres://me:secret@db.example.com/shop?sslmode=require").value
        # {"host": "db.example.com", "port": 5432, "user": "me", "password": "secret", "dbname": "shop", "sslmode": …}

    Whatever a client's own parameters say beyond the type's fields is kept as a field of the parameter's name.
    Upstash's ``rediss://`` gives a resource of type ``redis``, which is what it speaks there.
    """
    notes: tuple[str, ...] = ()
    if type == "upstash":
        given = upstash.of_lines(given) or given
        if given.strip().lower().startswith(("rediss://", "redis://")):
            type, notes = "redis", ("this is Redis's own protocol: a resource of type redis",)
    kind = TYPES[type]
    found = split(type, given, kind.schemes, _OTHERS, _HARMLESS)
    value = kind.read(found)
    found.done()
    return Connection(type, value, (*notes, *found.notes))


def write(type: str, value: Mapping[str, Any]) -> str:
    """The connection string of a resource, with its secrets in it: for a client, never for a reader."""
    return TYPES[type].write(value)


def shown(type: str, value: Mapping[str, Any]) -> str:
    """The same for a reader: without secrets."""
    return blanked(write(type, value), _HARMLESS)[0]


def secrets(type: str, value: Mapping[str, Any]) -> dict[str, str]:
    """Where the secrets of a resource stand → what they are. For values without references: "$ecret" is one, too."""
    found = {}
    for field in TYPES[type].secrets:
        inner: Any = value
        for name in field.split("."):
            inner = inner.get(name) if isinstance(inner, Mapping) else None
        if isinstance(inner, str) and inner:
            found[field] = inner
    return found


def apart(path: str, found: Connection) -> tuple[dict[str, Json], dict[str, str]]:
    """The value as it is stored, and the secret variables that it then names: their paths and texts."""
    value, variables = dict(found.value), {}
    for field, secret in secrets(found.type, found.value).items():
        name = f"{path}_{field.rpartition('.')[2]}"
        variables[name] = secret
        value = _with(value, field.split("."), f"$var:{name}")
    return value, variables


def _with(value: Mapping[str, Any], field: Sequence[str], new: str) -> dict[str, Json]:
    first, *rest = field
    return {**value, first: _with(value[first], rest, new) if rest else new}


def suggested_path(found: Connection) -> str:
    """Where a resource goes that was given no path: ``u/admin/NAME_OF_THE_DATABASE``."""
    value = found.value
    name = str(
        value.get("dbname") or value.get("database") or (value.get("db") if found.type == "mongodb" else "") or ""
    )
    return f"u/admin/{re.sub(r'[^A-Za-z0-9_]+', '_', name).strip('_') or found.type}"


def without_key(path: str, found: Connection) -> str:
    """What to do where nothing can be encrypted, without the secrets."""
    value = dict(found.value)
    names = []
    for field in secrets(found.type, value):
        names.append(re.sub(r"\W", "_", f"{path.rpartition('/')[2]}_{field.rpartition('.')[2]}").upper())
        value = _with(value, field.split("."), f"$env:{names[-1]}")
    return (
        "there is no key to encrypt the password with. Make one (`watcher secret new-key FILE`, then "
        'secret_key_file = "FILE" in the configuration) and add it again; or leave the password in the environment of '
        f"the service, as {' and '.join(names)}, and write into the configuration\n\n"
        f'[resources."{path}"]\ntype = "{found.type}"\nvalue = {_toml(value)}\n'
    )


def _toml(value: Json) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{name} = {_toml(each)}' for name, each in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
