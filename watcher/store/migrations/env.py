"""How Alembic runs here: on a connection that is given to it, inside the transaction that is already open."""

from typing import Any, Literal

from alembic import context
from sqlalchemy import types
from sqlmodel import AutoString

from watcher.failpoint import failpoint
from watcher.models import Instant, metadata


def _render(kind: str, value: Any, _context: Any) -> str | Literal[False]:
    """Migrations name SQLAlchemy's own types only: what they made must not change when our types do."""
    if kind == "type" and isinstance(value, Instant):
        return "sa.BigInteger()"
    if kind == "type" and isinstance(value, AutoString) and not isinstance(value, types.Text):
        return "sa.String()"
    return False


def _after_each(*_: Any, **__: Any) -> None:
    failpoint("mid_migration")


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_item=_render,
    render_as_batch=True,
    transactional_ddl=True,
    on_version_apply=_after_each,
)
with context.begin_transaction():
    context.run_migrations()
