"""A good configuration to spoil, and the mistakes of a spoilt one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from watcher import config
from watcher.errors import ConfigError, Mistake

GOOD = """\
database = "sqlite:///w.db"

[server]
bind = "127.0.0.1:0"

[flows.notify]
url = "https://hooks.example.com/notify"

[watchers.commits]
trigger = "git"
every = "5m"
flow = "notify"
with = { repo = "." }
"""


def write(folder: Path, text: str | bytes = GOOD) -> Path:
    file = folder / "watcher.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def load(folder: Path, text: str = GOOD, environ: Mapping[str, str] | None = None, **flags: Any) -> config.Loaded:
    return config.read(write(folder, text), environ=environ or {}, overrides=flags or None)


def mistakes(folder: Path, text: str | bytes, environ: Mapping[str, str] | None = None, **flags: Any) -> list[Mistake]:
    file = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        config.read(file, environ=environ or {}, overrides=flags or None)
    assert caught.value.exit_code == 78
    return caught.value.mistakes
