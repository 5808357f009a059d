"""Fixtures that every test may use: a database of each kind, empty or set up, and one instant to call now."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support.postgres import Postgres
from watcher import log
from watcher.store import migrate
from watcher.store.db import Database

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)

# Whoever starts Python in a test would compile all of watcher anew each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def set_up(url: str) -> None:
    async def work() -> None:
        database = await Database.open(url)
        await migrate.upgrade(database, backup_to=None, now=NOW)
        await database.close()

    with ThreadPoolExecutor() as beside:  # whether or not a loop runs in this thread
        beside.submit(asyncio.run, work()).result()


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


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SQLite database, set up once: to copy it costs a tenth of setting up another."""
    file = tmp_path_factory.mktemp("template") / "watcher.db"
    set_up(f"sqlite:///{file}")
    return file.read_bytes()


@pytest.fixture(scope="session")
def postgres_template(postgres: Postgres) -> str:
    """The name of a PostgreSQL database, set up once."""
    url = postgres.create()
    set_up(url)
    return postgres.name(url)


@pytest.fixture
def sqlite_url(tmp_path: Path, sqlite_template: bytes) -> str:
    """The address of a SQLite database, set up."""
    (tmp_path / "watcher.db").write_bytes(sqlite_template)
    return f"sqlite:///{tmp_path / 'watcher.db'}"


@pytest.fixture
def postgres_url(postgres: Postgres, postgres_template: str) -> Iterator[str]:
    """The address of a PostgreSQL database, set up."""
    url = postgres.create(postgres_template)
    yield url
    postgres.drop(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def url_of_each(request: pytest.FixtureRequest) -> str:
    """The address of a database, set up, once for each kind."""
    return str(request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url"))


@pytest.fixture
async def db(url_of_each: str) -> AsyncIterator[Database]:
    """An open database of each kind, set up."""
    database = await Database.open(url_of_each)
    yield database
    await database.close()


@pytest.fixture
async def sqlite_db(sqlite_url: str) -> AsyncIterator[Database]:
    """An open SQLite database, set up, for tests that have nothing to learn from the other kind."""
    database = await Database.open(sqlite_url)
    yield database
    await database.close()


@pytest.fixture
async def postgres_db(postgres_url: str) -> AsyncIterator[Database]:
    """An open PostgreSQL database, set up."""
    database = await Database.open(postgres_url)
    yield database
    await database.close()
