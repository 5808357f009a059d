"""Workspace object storage: a folder, S3 and all that speak it, Azure Blob and Google's, behind one small face.

Nothing here imports a cloud's client until a storage of that kind is opened.
"""

from watcher.objects.keys import PRIMARY, S3Object, new_key, parse_key, parse_name, parse_prefix, quoted
from watcher.objects.meta import Level, Meta, Reading
from watcher.objects.permissions import ACTIONS, DEFAULT, EVERY, Action, Who, allowed
from watcher.objects.storage import MAX_LIST, Objects, Storage, bounded

__all__ = [
    "ACTIONS",
    "DEFAULT",
    "EVERY",
    "MAX_LIST",
    "PRIMARY",
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
