"""Workspace object storage: a folder, S3 and all that speak it, Azure Blob and Google's, behind one small face.

Nothing here imports a cloud's client until a storage of that kind is opened.
"""

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from watcher.objects.keys import PRIMARY, S3Object, new_key, parse_key, parse_name, parse_prefix, quoted
from watcher.objects.meta import OWN, SAID, Level, Meta, Reading
from watcher.objects.permissions import ACTIONS, DEFAULT, EVERY, Action, Who, allowed
from watcher.objects.storage import MAX_LIST, Objects, Storage, bounded

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from watcher.values import Json

__all__ = [
    "ACTIONS",
    "DEFAULT",
    "EVERY",
    "MAX_LIST",
    "OWN",
    "PRIMARY",
    "SAID",
    "Action",
    "Level",
    "Meta",
    "Objects",
    "Reading",
    "S3Object",
    "Storage",
    "Who",
    "allowed",
    "bounded",
    "new_key",
    "parse_key",
    "parse_name",
    "parse_prefix",
    "quoted",
]


class _Callable(ModuleType):
    """``from watcher import objects`` gives this package, and scripts call it: ``objects("secondary")``."""

    def __call__(self, storage: "str | Mapping[str, Json] | None" = None) -> "ObjectStore":
        from watcher.connections import helpers

        return helpers.objects(storage)


sys.modules[__name__].__class__ = _Callable
