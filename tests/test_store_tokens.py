"""Tokens looked up many at a time, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.support.store import NOW
from watcher.errors import StoreError
from watcher.store import tokens
from watcher.store.db import Database

A, B = b"a" * 32, b"b" * 32


class Gated:
    """A database whose reads are counted, and wait while ``gate`` is closed."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.reads = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.came = asyncio.Event()
        self.error: Exception | None = None

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        self.reads += 1
        async with self._db.read() as tx:
            self.came.set()
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            yield tx


@pytest.fixture
async def gated(db: Database) -> Gated:
    for digest in (A, B):
        await db.write(lambda tx, d=digest: tokens.create(tx, d, f"wtc_{d[:1].decode()}", NOW, scopes=("jobs",)))
    return Gated(db)


async def test_those_who_ask_at_once_share_a_read(gated: Gated) -> None:
    lookup = tokens.Lookup(gated)
    found = await asyncio.gather(*(lookup.get(digest, NOW) for digest in (A, B, b"?" * 32) * 100))
    assert [token and token.prefix for token in found] == ["wtc_a", "wtc_b", None] * 100
    assert gated.reads == 1
    assert await lookup.get(A, NOW) == found[0]
    assert gated.reads == 2  # nothing is remembered


async def test_whoever_asks_after_a_token_was_revoked_is_not_let_in(gated: Gated, db: Database) -> None:
    lookup = tokens.Lookup(gated)
    gated.gate.clear()
    before = asyncio.ensure_future(lookup.get(B, NOW))
    await gated.came.wait()
    await db.write(lambda tx: tokens.delete(tx, "wtc_a"))
    after = [asyncio.ensure_future(lookup.get(digest, NOW)) for digest in (A, A, B)]
    gated.gate.set()
    assert (await before) is not None
    assert [token and token.prefix for token in await asyncio.gather(*after)] == [None, None, "wtc_b"]
    assert gated.reads == 2


async def test_a_token_that_expires_does_so_for_each_who_asks(db: Database) -> None:
    await db.write(lambda tx: tokens.create(tx, A, "wtc_a", NOW, expires_at=NOW + timedelta(seconds=9)))
    lookup = tokens.Lookup(db)
    found = await asyncio.gather(*(lookup.get(A, NOW + timedelta(seconds=late)) for late in (0, 8, 9, 10)))
    assert [token is not None for token in found] == [True, True, False, False]


async def test_an_error_reaches_all_who_wait_and_nobody_after_them(gated: Gated) -> None:
    lookup = tokens.Lookup(gated)
    gated.error = StoreError("no answer")
    found = await asyncio.gather(*(lookup.get(digest, NOW) for digest in (A, B, A)), return_exceptions=True)
    assert found == [gated.error] * 3
    gated.error = None
    assert await lookup.get(A, NOW) is not None


async def test_one_who_goes_away_takes_nobody_along(gated: Gated) -> None:
    lookup = tokens.Lookup(gated)
    gated.gate.clear()
    gone, stays = (asyncio.ensure_future(lookup.get(A, NOW)) for _ in range(2))
    await gated.came.wait()
    gone.cancel()
    await asyncio.wait({gone})
    gated.gate.set()
    assert await stays is not None
    assert gone.cancelled()
