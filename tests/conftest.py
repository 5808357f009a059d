"""Fixtures that every test may use: a database of each kind, empty or set up, and one instant to call now."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support.postgres import Postgres
from watcher import log
from watcher.store import migrate
from watcher.store.db import Database

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def now() -> datetime:
    return NOW


@pytest.fixture(autouse=True)
def no_secret_of_another_test() -> Iterator[None]:
    """What one test registered as a secret is not masked in the next."""
    yield
    log.forget_secrets()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server of our own. It starts when the first test asks it for a database."""
    server = Postgres()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty database, once for each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'watcher.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    url = server.create()
    yield url
    server.drop(url)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """An open database of each kind, set up."""
    database = await Database.open(database_url)
    await migrate.upgrade(database, backup_to=None, now=NOW)
    yield database
    await database.close()


@pytest.fixture
async def sqlite_db(tmp_path: Path) -> AsyncIterator[Database]:
    """An open SQLite database, set up, for tests that have nothing to learn from the other kind."""
    database = await Database.open(f"sqlite:///{tmp_path / 'watcher.db'}")
    await migrate.upgrade(database, backup_to=None, now=NOW)
    yield database
    await database.close()


@pytest.fixture
async def postgres_db(postgres: Postgres) -> AsyncIterator[Database]:
    """An open PostgreSQL database, set up."""
    url = postgres.create()
    database = await Database.open(url)
    await migrate.upgrade(database, backup_to=None, now=NOW)
    yield database
    await database.close()
    postgres.drop(url)
