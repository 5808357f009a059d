"""References followed: "$var:PATH", "$res:PATH", "$env:NAME" and "$file:PATH" become the values that they name."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from watcher.errors import ResolveError, SecretError
from watcher.log import is_secret_name, register
from watcher.secrets import Key
from watcher.store import resources, variables
from watcher.store.db import Database
from watcher.values import Config, Json

MAX_DEPTH = 32
"""References that lead to references."""
MAX_REFERENCES = 1000
MAX_BYTES = 16 * 1024 * 1024
"""Of one value with everything in it: a resource that names another one twice grows twofold at each step."""
MAX_FILE = 1024 * 1024
MAX_LIST = 1000
"""Longer lists are left as they are, as Windmill leaves them: they are data, not settings."""

STATE = "state"
"""The resource type whose values are never followed: they hold what the outside world said."""


@dataclass(frozen=True, slots=True)
class _Path:
    """How we got here. ``trusted``: the text was written in the configuration file, so it may name variables and files
    of this machine; what scripts and API users stored may not."""

    trusted: bool
    through: tuple[str, ...] = ()


@dataclass(slots=True)
class _Budget:
    references: int = MAX_REFERENCES
    bytes: int = MAX_BYTES

    def spend(self, references: int, size: int) -> None:
        self.references -= references
        self.bytes -= size
        if self.references < 0:
            raise ResolveError(f"more than {MAX_REFERENCES} references in one value")
        if self.bytes < 0:
            raise ResolveError(f"a value with its references followed is larger than {MAX_BYTES // 1024**2} MiB")


class Resolver:
    """Follows references, in the configuration first and in the database second, anew at each use.

    The rules are Windmill's: a reference is a whole string, never a part of one; objects are followed at any depth;
    a resource's own references are followed too. Beyond Windmill's: lists are followed at any depth, circles and
    growth are errors. Every secret that passes is masked from then on.
    """

    def __init__(
        self,
        config: Callable[[], Config],
        db: Database,
        key: Key | None,
        *,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._config = config
        self._db = db
        self._key = key
        self._environ = os.environ if environ is None else environ

    async def text(self, ref: str) -> str:
        """What one reference of the configuration names, which must be text. Raises ResolveError."""
        value = await self._string(ref, _Path(trusted=True), _Budget())
        if not isinstance(value, str):
            raise ResolveError(f"{ref} is not text, but {_kind(value)}")
        register(value)
        return value

    async def value(self, value: Json) -> Json:
        """A value of the configuration with all its references followed. Raises ResolveError.

        Never give it what came from outside: an item titled "$env:…" must stay a title.
        """
        return await self._follow(value, _Path(trusted=True), _Budget())

    async def resource(self, path: str) -> Json:
        """The resource at ``path``, its references followed. Raises ResolveError, kind ``missing`` if there is none."""
        try:
            return await self._resource(path, _Path(trusted=False), _Budget())
        except RecursionError:
            raise ResolveError(f"resource {path} is nested too deep for references in it to be followed") from None

    async def variable(self, path: str) -> str:
        """The variable at ``path``, decrypted. Raises ResolveError, kind ``missing`` if there is none."""
        return await self._variable(path, _Path(trusted=False), _Budget())

    async def _follow(self, value: Json, path: _Path, budget: _Budget) -> Json:
        if isinstance(value, str):
            return await self._string(value, path, budget)
        if isinstance(value, Mapping):
            return {name: await self._follow(inner, path, budget) for name, inner in value.items()}
        if isinstance(value, list | tuple) and len(value) <= MAX_LIST:
            return [await self._follow(inner, path, budget) for inner in value]
        return value

    async def _string(self, text: str, path: _Path, budget: _Budget) -> Json:
        kind, colon, name = text.partition(":")
        if not colon or kind not in ("$var", "$res", "$env", "$file"):
            return text
        if kind in ("$env", "$file") and not path.trusted:
            return text
        if text in path.through:
            raise ResolveError(f"references lead in a circle: {' → '.join([*path.through, text])}")
        if len(path.through) >= MAX_DEPTH:
            raise ResolveError(
                f"more than {MAX_DEPTH} references lead from one to the next, beginning {path.through[0]}"
            )
        budget.spend(1, 0)
        within = replace(path, through=(*path.through, text))
        try:
            match kind:
                case "$var":
                    return await self._variable(name, within, budget)
                case "$res":
                    return await self._resource(name, within, budget)
                case "$env":
                    return self._env(name, budget)
                case _:
                    return await self._file(name, budget)
        except ResolveError as error:
            if path.through and error.kind == "missing":
                # To the reader of a state "missing" means a first run; a value that is there is not missing.
                raise ResolveError(f"{path.through[-1]}: {error}") from error
            raise

    async def _variable(self, path: str, within: _Path, budget: _Budget) -> str:
        fixed = self._config().variables.get(path)
        if fixed is not None:
            found = await self._string(fixed, replace(within, trusted=True), budget)
            if not isinstance(found, str):
                raise ResolveError(f"$var:{path} is not text, but {_kind(found)}")
            if found != fixed or is_secret_name(path.rpartition("/")[2]):
                register(found)
        else:
            found = await self._stored_variable(path)
        budget.spend(0, len(found))
        return found

    async def _stored_variable(self, path: str) -> str:
        async with self._db.read() as tx:
            row = await variables.get(tx, path)
        if row is None:
            raise ResolveError(
                f"there is no variable {path}: add it with `watcher variable set {path}`, or to [variables]",
                missing=True,
            )
        if not row.is_secret:
            return row.value
        if self._key is None:
            raise ResolveError(f"variable {path} is encrypted, and there is no key: see `watcher doctor`")
        try:
            value = self._key.decrypt(path, row.value)
        except SecretError as error:
            raise ResolveError(str(error)) from error
        register(value)
        return value

    async def _resource(self, path: str, within: _Path, budget: _Budget) -> Json:
        fixed = self._config().resources.get(path)
        if fixed is not None:
            kind, value, within = fixed.type, fixed.value, replace(within, trusted=True)
        else:
            async with self._db.read() as tx:
                row = await resources.get(tx, path)
            if row is None:
                raise ResolveError(
                    f"there is no resource {path}: add it with `watcher resource set {path}`, or to [resources]",
                    missing=True,
                )
            kind, value, within = row.type, row.value, replace(within, trusted=False)
        budget.spend(0, len(json.dumps(value)))
        if kind == STATE:
            return value
        if not within.through:
            within = replace(within, through=(f"$res:{path}",))
        followed = await self._follow(value, within, budget)
        _register_secrets(followed)
        return followed

    def _env(self, name: str, budget: _Budget) -> str:
        value = self._environ.get(name)
        if value is None:
            raise ResolveError(f"the environment variable {name} is not set")
        budget.spend(0, len(value))
        register(value)
        return value

    async def _file(self, name: str, budget: _Budget) -> str:
        config = self._config()
        base = config.file.parent if config.file else Path.cwd()
        try:
            raw = await asyncio.to_thread(_read, base, name)
            value = raw.decode()
        except (OSError, ValueError) as error:
            raise ResolveError(f"$file:{name}: {getattr(error, 'strerror', None) or error}") from error
        budget.spend(0, len(value))
        register(value.removesuffix("\n"))
        return value.removesuffix("\n")


def _read(base: Path, name: str) -> bytes:
    file = base / Path(name).expanduser()
    if not file.is_file():
        raise ValueError("there is no such file" if not file.exists() else "is not a regular file")
    with file.open("rb") as stream:
        raw = stream.read(MAX_FILE + 1)
    if len(raw) > MAX_FILE:
        raise ValueError(f"is larger than {MAX_FILE // 1024} kB")
    return raw


def _register_secrets(value: Any, name: str = "") -> None:
    if isinstance(value, str) and is_secret_name(name):
        register(value)
    elif isinstance(value, Mapping):
        for inner_name, inner in value.items():
            _register_secrets(inner, inner_name)
    elif isinstance(value, list):
        for inner in value:
            _register_secrets(inner, name)


def _kind(value: Json) -> str:
    return {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}.get(type(value), "a number")
