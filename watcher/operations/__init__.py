"""What an operator may do: each verb one function over an Operator, with plain JSON in and out."""

from watcher.operations import looking, remembering, running, settings, steering
from watcher.operations.operator import READS, VERBS, Operator, Rejected, Unknown, Unsuited
from watcher.operations.settings import rotate_key

__all__ = [
    "READS",
    "VERBS",
    "Operator",
    "Rejected",
    "Unknown",
    "Unsuited",
    "looking",
    "remembering",
    "rotate_key",
    "running",
    "settings",
    "steering",
]
