"""API tokens, known by their hash alone."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete as delete_from
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher.errors import StoreError
from watcher.store.tables import token


@dataclass(frozen=True, slots=True)
class Token:
    """One token, without the token."""

    sha256: bytes
    prefix: str
    label: str
    scopes: tuple[str, ...]
    job_id: str | None
    created_at: datetime
    expires_at: datetime | None
    used_at: datetime | None


def _token(row: Any) -> Token:
    return Token(**{**row._mapping, "sha256": bytes(row.sha256), "scopes": tuple(json.loads(row.scopes))})


async def create(
    tx: AsyncConnection,
    sha256: bytes,
    prefix: str,
    now: datetime,
    *,
    label: str = "",
    scopes: Collection[str] = (),
    job_id: str | None = None,
    expires_at: datetime | None = None,
) -> None:
    """Let whoever knows the text behind ``sha256`` in; ``prefix`` are its first characters."""
    await tx.execute(
        insert(token).values(
            sha256=sha256,
            prefix=prefix,
            label=label,
            scopes=json.dumps(sorted(scopes)),
            job_id=job_id,
            created_at=now,
            expires_at=expires_at,
        )
    )


async def get(tx: AsyncConnection, sha256: bytes, now: datetime) -> Token | None:
    """The token with this hash, unless it has expired."""
    row = (await tx.execute(select(token).where(token.c.sha256 == sha256))).first()
    if row is None or (row.expires_at is not None and row.expires_at <= now):
        return None
    return _token(row)


async def list(tx: AsyncConnection) -> Sequence[Token]:
    """All that no job owns, oldest first."""
    statement = select(token).where(token.c.job_id.is_(None)).order_by(token.c.created_at, token.c.prefix)
    return [_token(row) for row in await tx.execute(statement)]


async def used(tx: AsyncConnection, sha256: bytes, now: datetime) -> None:
    await tx.execute(update(token).where(token.c.sha256 == sha256).values(used_at=now))


async def delete(tx: AsyncConnection, prefix: str) -> bool:
    """Revoke the one token that begins like this. False: there is none. Raises StoreError when there are several."""
    found = [
        *(await tx.execute(select(token.c.sha256).where(token.c.prefix.startswith(prefix, autoescape=True)))).scalars()
    ]
    if len(found) > 1:
        raise StoreError(f"{len(found)} tokens begin with {prefix}: give more of it")
    return bool(found) and bool((await tx.execute(delete_from(token).where(token.c.sha256 == found[0]))).rowcount)


async def delete_of_job(tx: AsyncConnection, job_id: str) -> None:
    await tx.execute(delete_from(token).where(token.c.job_id == job_id))
