"""Write the next migration, from what the models say beyond the newest: ``python -m watcher.store.migrations WHY``."""

import sys
import tempfile
from pathlib import Path

from alembic import command
from sqlalchemy import create_engine

from watcher.store import migrate


def main(why: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        engine = create_engine(f"sqlite:///{Path(folder) / 'head.db'}")
        with engine.begin() as connection:
            config = migrate.alembic_config(connection)
            command.upgrade(config, "head")
            number = sum(1 for _ in migrate.revisions()) + 1
            command.revision(config, why, autogenerate=True, rev_id=f"{number:04d}")
        engine.dispose()


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "change")
