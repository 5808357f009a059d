"""What a trigger script imports: ``from watcher import http, trigger``, and for Windmill's way ``get_state``."""

from typing import TYPE_CHECKING, Any

from watcher.context import gap, get_resource, get_state, get_state_path, get_variable, set_state, shared
from watcher.trigger import trigger

if TYPE_CHECKING:
    from watcher.connections.helpers import mongo, mysql, postgres, redis

__all__ = [
    "gap",
    "get_resource",
    "get_state",
    "get_state_path",
    "get_variable",
    "http",
    "mongo",
    "mysql",
    "objects",
    "postgres",
    "redis",
    "set_state",
    "shared",
    "trigger",
]


def __getattr__(name: str) -> Any:
    """Loaded when a script asks for it: most never do."""
    if name in ("mongo", "mysql", "postgres", "redis"):
        from watcher.connections import helpers

        return getattr(helpers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
