"""API tokens, known by their hash alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy import delete as delete_from
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


_EACH = select(token).where(token.c.sha256.in_(bindparam("each", expanding=True)))


class Readable(Protocol):
    """A database, as far as it is needed here."""

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]: ...


class Lookup:
    """Finds tokens for many who ask at once: one read answers all who asked before it began.

    Nothing is remembered, so that a token that was revoked is known to be when anybody asks again, whoever revoked it.
    """

    def __init__(self, db: Readable) -> None:
        self._db = db
        self._asked: dict[bytes, asyncio.Future[Token | None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def get(self, sha256: bytes, now: datetime) -> Token | None:
        """The token with this hash, unless it has expired. Raises StoreError."""
        answer = self._asked.get(sha256)
        if answer is None:
            answer = self._asked[sha256] = asyncio.get_running_loop().create_future()
            if self._task is None:
                self._task = asyncio.create_task(self._work(), name="tokens")
        found = await asyncio.shield(answer)  # which is not this one's alone
        return None if found is None or (found.expires_at is not None and found.expires_at <= now) else found

    async def _work(self) -> None:
        try:
            while self._asked:
                # Whoever asks from here on is answered by the next read: this one may have begun already.
                asked, self._asked = self._asked, {}
                await self._answer(asked)
        finally:
            self._task = None

    async def _answer(self, asked: Mapping[bytes, asyncio.Future[Token | None]]) -> None:
        try:
            async with self._db.read() as tx:
                found = {each.sha256: each for each in map(_token, await tx.execute(_EACH, {"each": [*asked]}))}
        except Exception as error:
            for answer in asked.values():
                answer.set_exception(error)
                answer.exception()  # whoever waited may have gone
        except BaseException:
            for answer in asked.values():
                answer.cancel()
            raise
        else:
            for sha256, answer in asked.items():
                answer.set_result(found.get(sha256))


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
