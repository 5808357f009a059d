"""What a trigger script imports: ``from watcher import http, trigger``, and for Windmill's way ``get_state``."""

from watcher.context import get_resource, get_state, get_state_path, get_variable, set_state
from watcher.trigger import trigger

__all__ = ["get_resource", "get_state", "get_state_path", "get_variable", "http", "set_state", "trigger"]
