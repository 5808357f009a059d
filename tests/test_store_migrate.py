"""The schema: it is what the models say, it comes up to date safely, and an older program leaves it alone."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, inspect, text

from tests.support.store import NOW, commit, ended, know, new_item, start_python
from watcher.errors import DatabaseTooNew, StoreError
from watcher.models import metadata
from watcher.store import meta, migrate, runs
from watcher.store.db import Database

NEXT = '''
"""A step that only the tests know."""
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{head}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table("later", sa.Column("id", sa.Integer(), primary_key=True))
    with op.batch_alter_table("item") as batch:
        batch.add_column(sa.Column("later", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_table("later")
    with op.batch_alter_table("item") as batch:
        batch.drop_column("later")
'''


@pytest.fixture
def newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The migrations of a version of the program that is one step ahead."""
    folder = tmp_path / "migrations"
    shutil.copytree(migrate._FOLDER, folder)
    (folder / "versions" / "9999_next.py").write_text(NEXT.format(head=migrate.head()))
    monkeypatch.setattr(migrate, "_FOLDER", folder)
    return folder


async def columns_of(db: Database, table: str) -> set[str]:
    async with db.read() as tx:
        return await tx.run_sync(lambda c: {column["name"] for column in inspect(c).get_columns(table)})


async def test_empty_database_gets_the_schema_and_an_epoch(database_url: str) -> None:
    db = await Database.open(database_url)
    assert await migrate.check(db) == "empty"
    assert await migrate.upgrade(db, backup_to=None, now=NOW) == "empty"
    assert await migrate.upgrade(db, backup_to=None, now=NOW) == "current"
    async with db.read() as tx:
        assert len(await meta.epoch(tx)) == 16
        assert await meta.get(tx, "created_at") == NOW.isoformat()
    await db.close()


async def test_migrations_make_what_the_models_say(db: Database) -> None:
    def differences(connection: Connection) -> list[object]:
        return [*compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata)]

    async with db.read() as tx:
        assert await tx.run_sync(differences) == []


async def test_migrations_make_the_same_sqlite_tables_as_the_models(sqlite_db: Database, tmp_path: Path) -> None:
    """Comparison by Alembic does not see WITHOUT ROWID or the condition of a partial index."""
    engine = create_engine(f"sqlite:///{tmp_path / 'models.db'}")
    metadata.create_all(engine)
    engine.dispose()

    def schema(file: Path) -> dict[str, list[str]]:
        with sqlite3.connect(file) as connection:
            rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        connection.close()
        words = {name: sorted(sql.replace(",", " ").replace('"', "").replace("\n", " ").split()) for name, sql in rows}
        return {name: words for name, words in words.items() if name != "alembic_version"}

    assert schema(tmp_path / "watcher.db") == schema(tmp_path / "models.db")


async def test_older_schema_is_backed_up_then_brought_up_to_date(db: Database, newer: Path, tmp_path: Path) -> None:
    await know(db, "w")
    await commit(db, [new_item("a", 1)])
    assert await migrate.check(db) == "older"
    assert await migrate.upgrade(db, backup_to=tmp_path / "backups", now=NOW) == "older"
    assert await migrate.check(db) == "current"
    assert "later" in await columns_of(db, "item")
    async with db.read() as tx:
        assert len(await runs.list(tx, "w")) == 1
    (copy,) = (tmp_path / "backups").iterdir()
    assert copy.name.startswith("before-upgrade-20260301T120000")
    if db.dialect == "sqlite":
        with sqlite3.connect(copy) as connection:
            assert connection.execute("SELECT key FROM item").fetchall() == [("a",)]
            assert "later" not in {row[1] for row in connection.execute("PRAGMA table_info(item)")}
        connection.close()
    else:
        assert '"later"' not in copy.read_text()


async def test_backup_that_cannot_be_written_stops_the_upgrade(
    sqlite_db: Database, newer: Path, tmp_path: Path
) -> None:
    (tmp_path / "backups").write_text("in the way")
    with pytest.raises(StoreError, match="nothing was backed up"):
        await migrate.upgrade(sqlite_db, backup_to=tmp_path / "backups", now=NOW)
    assert await migrate.check(sqlite_db) == "older"


UPGRADE = """
import asyncio, sys
from pathlib import Path
from tests.support.store import NOW
from watcher.store import migrate
from watcher.store.db import Database

async def main():
    migrate._FOLDER = Path(sys.argv[2])
    db = await Database.open(sys.argv[1])
    print(await migrate.upgrade(db, backup_to=None, now=NOW))
    await db.close()

asyncio.run(main())
"""


async def test_process_killed_in_the_middle_of_a_migration_leaves_the_old_schema(db: Database, newer: Path) -> None:
    await know(db, "w")
    before = await columns_of(db, "item")
    env = {"WATCHER_TEST": "1", "WATCHER_FAILPOINT": "mid_migration:kill"}
    code, _, err = await ended(start_python(UPGRADE, db.url, str(newer), env=env))
    assert code == -9, err
    assert await columns_of(db, "item") == before
    assert await migrate.check(db) == "older"
    await migrate.upgrade(db, backup_to=None, now=NOW)
    assert await columns_of(db, "item") == before | {"later"}


async def test_two_processes_that_migrate_at_once_migrate_once(db: Database, newer: Path) -> None:
    results = await asyncio.gather(*(ended(start_python(UPGRADE, db.url, str(newer))) for _ in range(2)))
    assert [code for code, _, _ in results] == [0, 0], results
    assert await migrate.check(db) == "current"


async def test_two_processes_that_set_up_one_database_agree_on_its_epoch(database_url: str) -> None:
    folder = str(migrate._FOLDER)
    results = await asyncio.gather(*(ended(start_python(UPGRADE, database_url, folder)) for _ in range(2)))
    assert [code for code, _, _ in results] == [0, 0], results


async def test_newer_database_is_refused_and_left_untouched(db: Database) -> None:
    await db.write(lambda tx: tx.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    with pytest.raises(DatabaseTooNew, match="newer than this program") as caught:
        await migrate.upgrade(db, backup_to=None, now=NOW)
    assert caught.value.exit_code == 78
    async with db.read() as tx:
        assert (await tx.execute(text("SELECT version_num FROM alembic_version"))).scalar_one() == "9999"


async def test_somebody_elses_database_is_refused(database_url: str) -> None:
    db = await Database.open(database_url)
    await db.write(lambda tx: tx.execute(text("CREATE TABLE guests (name text)")))
    with pytest.raises(StoreError, match="a database of its own"):
        await migrate.upgrade(db, backup_to=None, now=NOW)
    await db.close()


async def test_every_step_can_be_undone(sqlite_db: Database, newer: Path) -> None:
    from alembic import command

    await migrate.upgrade(sqlite_db, backup_to=None, now=NOW)
    await sqlite_db.write(
        lambda tx: tx.run_sync(lambda c: command.downgrade(migrate.alembic_config(c), "base")), alone=True
    )
    assert await migrate.check(sqlite_db) == "empty"


async def test_migrations_are_in_the_package() -> None:
    assert (migrate._FOLDER / "env.py").is_file()
    assert (migrate._FOLDER / "script.py.mako").is_file()
    assert "0001" in [*migrate.revisions()]
