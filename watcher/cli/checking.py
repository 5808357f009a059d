"""The deep check of a configuration: its tables, then each script with its arguments."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from watcher.errors import Mistake
from watcher.values import Config, Json


@dataclass(frozen=True, slots=True)
class Checked:
    """A good configuration with what is worth telling about it; ``origins``: option → where its value came from."""

    config: Config
    warnings: list[str]
    origins: Mapping[str, str]


def check(file: Path | None) -> Checked:
    """Everything that can be known without asking a source or a flow. Raises ConfigError with every mistake."""
    from watcher import config

    loaded = config.read(file, environ=os.environ)
    return Checked(loaded.config, [*loaded.warnings, *deeper(loaded.config)], loaded.origins)


def deeper(loaded: Config) -> list[str]:
    """Describe every script and hold each watcher's arguments against it. Raises ConfigError."""
    from watcher import config
    from watcher.scripts import Scripts

    async def work() -> list[str]:
        scripts = Scripts(loaded.scripts, data=loaded.data)
        await scripts.start()
        try:
            return list(await config.check(loaded, scripts))
        finally:
            await scripts.close()

    return asyncio.run(work())


def mistake(found: Mistake) -> Json:
    """One mistake as JSON."""
    return {
        "file": str(found.file) if found.file else None,
        "line": found.line,
        "column": found.column,
        "where": found.where,
        "message": found.message,
        "hint": found.hint,
    }
