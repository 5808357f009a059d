"""The kinds of flow: one preset per file, each a pure pair of request and judge."""

from __future__ import annotations

from watcher.flows import http, windmill
from watcher.flows.preset import Preset

presets: dict[str, Preset] = {"http": http.preset, "windmill": windmill.preset}
