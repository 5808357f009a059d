"""The deep check of a configuration: its tables, then each script with its arguments."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from watcher.errors import Mistake
from watcher.values import Config, Json


def check(file: Path) -> tuple[Config, list[str]]:
    """The configuration and its warnings. Raises ConfigError with every mistake."""
    from watcher import config

    loaded = config.load(file, environ=os.environ)
    return loaded, deeper(loaded)


def deeper(loaded: Config) -> list[str]:
    """Describe every script and hold each watcher's arguments against it. Raises ConfigError."""
    from watcher import config
    from watcher.scripts import Scripts

    async def work() -> list[str]:
        scripts = Scripts(loaded.scripts)
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
