"""The storages of the workspace: opened when first needed, from the configuration and the resources that it names."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from watcher.errors import ObjectsError, ResolveError
from watcher.objects import permissions
from watcher.objects.folder import Folder
from watcher.objects.keys import PRIMARY, parse_key, parse_name, parse_prefix
from watcher.objects.meta import Backend, Body, Level, Meta, Reading
from watcher.objects.permissions import Action, Who
from watcher.values import Config, Json, StorageRule, StorageSettings

Kind = Literal["folder", "s3", "azure_blob", "gcs"]
MAX_LIST = 1000
"""Objects of one listing."""
_OPEN = 64
"""Storages that are kept open, with their connections."""


@dataclass(frozen=True, slots=True)
class Storage:
    """One storage. Its operations check keys, and not permissions: ask `check` first on behalf of somebody.

    ``resource`` is the value of the resource behind it, credentials included; None for a folder.
    """

    name: str
    kind: Kind
    backend: Backend = field(repr=False)
    public: bool = False
    permissions: tuple[StorageRule, ...] = permissions.DEFAULT
    resource: Json = field(default=None, repr=False)

    def allows(self, who: Who, key: str, action: Action) -> bool:
        """Whether somebody may do this with an object."""
        usual = self.permissions is permissions.DEFAULT and who.job
        return permissions.allowed(permissions.FOR_JOBS if usual else self.permissions, who, key, action)

    def check(self, who: Who, key: str, action: Action) -> None:
        """Raise ObjectsError, kind ``denied``, unless somebody may do this with an object."""
        if not self.allows(who, key, action):
            table = "storage" if self.name == PRIMARY else f"storage.secondary.{self.name}"
            raise ObjectsError(
                f"{who.name or 'this token'} may not {action} {key} in storage {self.name}: no rule allows it "
                f"(permissions in [{table}])",
                kind="denied",
            )

    async def put(
        self,
        key: str,
        body: Body,
        *,
        content_type: str | None = None,
        content_disposition: str | None = None,
        attributes: Mapping[str, str] | None = None,
        if_absent: bool = False,
    ) -> Meta:
        """Store an object, whole or not at all; a stream at constant memory. If ``body`` raises, nothing is stored.

        With ``if_absent`` an object that is there already stays, and ObjectsError, kind ``exists``, is raised.
        """
        return await self.backend.put(
            parse_key(key),
            body,
            content_type=content_type,
            content_disposition=content_disposition,
            attributes=attributes or {},
            if_absent=if_absent,
        )

    async def get(self, key: str, *, start: int = 0, end: int | None = None) -> Reading:
        """Read an object, or the bytes from ``start`` up to and without ``end``. Raises ObjectsError (``missing``)."""
        return await self.backend.get(parse_key(key), start=start, end=end)

    async def head(self, key: str) -> Meta:
        """What is known of an object. Raises ObjectsError, kind ``missing``."""
        return await self.backend.head(parse_key(key))

    async def delete(self, key: str) -> None:
        """Delete an object; nothing happens when there is none."""
        await self.backend.delete(parse_key(key))

    async def list(self, prefix: str = "", *, after: str | None = None, limit: int = MAX_LIST) -> list[Meta]:
        """The objects whose keys begin with ``prefix`` and come behind ``after``, in the order of keys."""
        return await self.backend.list(parse_prefix(prefix), after=after, limit=_bound(limit))

    async def level(self, prefix: str = "", *, after: str | None = None, limit: int = MAX_LIST) -> Level:
        """The objects and folders right under ``prefix``, which is empty or ends with a slash or in a name's middle."""
        return await self.backend.level(parse_prefix(prefix), after=after, limit=_bound(limit))


class Objects:
    """All storages of the workspace. ``resource`` gives the value of the resource at a path, and its type."""

    def __init__(self, config: Callable[[], Config], resource: Callable[[str], Awaitable[Json]]) -> None:
        self._config = config
        self._resource = resource
        self._open: dict[tuple[str, str], Backend] = {}

    async def storage(self, name: str | None = None) -> Storage:
        """The storage of this name; None and ``_default_`` are the primary one.

        Raises ObjectsError: ``no_storage`` when there is none at all, ``no_such_storage``, ``unreachable``.
        """
        name = parse_name(name) or PRIMARY
        storages = self._config().storages
        settings = storages.get(name)
        if settings is None:
            if name != PRIMARY:
                known = ", ".join(sorted(each for each in storages if each != PRIMARY)) or "none"
                raise ObjectsError(
                    f"there is no storage {name}: add [storage.secondary.{name}] (known: {known})",
                    kind="no_such_storage",
                )
            # Windmill's own sentence: scripts look for it.
            raise ObjectsError("No files storage resource defined at the workspace level", kind="no_storage")
        rules = permissions.DEFAULT if settings.permissions is None else settings.permissions
        if settings.path is not None:
            path = settings.path
            backend = self._opened(("folder", str(path)), lambda: Folder(path))
            return Storage(name, "folder", backend, settings.public, rules)
        value = await self._value(settings)
        backend = self._cloud(settings.kind, value)
        return Storage(name, settings.kind, backend, settings.public, rules, value)

    async def of_resource(self, value: Json, type_: str) -> Storage:
        """The storage that a resource of type ``s3``, ``azure_blob`` or ``gcs`` describes. Raises ObjectsError.

        Its permissions are those of whoever may read the resource, so that everything is allowed here.
        """
        if type_ not in ("s3", "azure_blob", "gcs"):
            raise ObjectsError(
                f"a resource of type {type_} is no object storage: s3, azure_blob or gcs", kind="no_such_storage"
            )
        if isinstance(value, dict) and value.get("federatedTokenFile"):
            raise ObjectsError("a file of this machine is named in [storage] only", kind="unreachable")
        kind: Kind = type_  # type: ignore[assignment]
        everything = (StorageRule("**/*", frozenset(permissions.ACTIONS)),)
        return Storage(PRIMARY, kind, self._cloud(kind, value), False, everything, value)

    async def _value(self, settings: StorageSettings) -> Json:
        try:
            return await self._resource(settings.resource)
        except ResolveError as error:
            raise ObjectsError(f"the resource of storage {settings.name}: {error}", kind="unreachable") from error

    def _cloud(self, kind: str, value: Json) -> Backend:
        from watcher.objects import cloud

        return self._opened((kind, json.dumps(value, sort_keys=True)), lambda: cloud.Cloud(kind, value))

    def _opened(self, key: tuple[str, str], opening: Callable[[], Backend]) -> Backend:
        backend = self._open.pop(key, None) or opening()
        self._open[key] = backend  # the last one again
        while len(self._open) > _OPEN:
            del self._open[next(iter(self._open))]
        return backend


def _bound(limit: int) -> int:
    return max(1, min(limit, MAX_LIST))


async def bounded(body: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    """The same stream. Raises ObjectsError, kind ``too_large``, when it turns out longer than ``most`` bytes."""
    size = 0
    async for chunk in body:
        size += len(chunk)
        if size > most:
            raise ObjectsError(f"more than {most} bytes: raise max_upload in [storage]", kind="too_large")
        yield chunk
