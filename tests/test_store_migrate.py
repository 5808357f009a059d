"""The schema: it is what the models say, it comes up to date safely, and never goes back in silence."""

from __future__ import annotations

from watcher.store import migrate
from watcher.store.db import Database


async def test_empty_database_gets_the_schema_and_an_epoch(db: Database) -> None:
    assert await migrate.check(db) == "current"
