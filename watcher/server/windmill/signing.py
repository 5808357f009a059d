"""What this installation signs: links to objects, and the S3 keys that stand for tokens.

Both are made from a secret in the database and the installation's key, if it has one, so that they outlive a restart
and a copy of the database alone is not enough to forge them. Nothing is stored for either.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from urllib.parse import parse_qs

from watcher.secrets import Key
from watcher.store import meta
from watcher.store.db import Database

SHORTEST, USUAL, LONGEST = timedelta(seconds=60), timedelta(hours=12), timedelta(days=7)
"""How long a link may be good for. Source: Windmill's ``sign_s3_objects``."""

_SECRET = "signing_secret"  # noqa: S105  (the name of a row)
_JOB, _TOKEN = "WTJ", "WTT"


class Signing:
    """The secrets behind `Ring`, read from the database once."""

    def __init__(self, db: Database, key: Key | None) -> None:
        self._db = db
        self._key = key
        self._ring: Ring | None = None

    async def ring(self) -> Ring:
        """Raises StoreError."""
        if self._ring is None:
            async with self._db.read() as tx:
                secret = await meta.get(tx, _SECRET)
            if secret is None:
                new = secrets.token_hex(32)
                secret = await self._db.write(lambda tx: meta.keep(tx, _SECRET, new))
            keys = {} if self._key is None else self._key.keys
            first = "" if self._key is None else self._key.current
            self._ring = Ring.of(secret, keys, first)
        return self._ring


@dataclass(frozen=True, slots=True)
class Ring:
    """The newest secret, with which is signed, and older ones, which are still good. ``repr`` shows none."""

    secrets: Sequence[bytes]

    def __repr__(self) -> str:
        return f"Ring({len(self.secrets)})"

    @classmethod
    def of(cls, secret: str, keys: Mapping[str, bytes], current: str) -> Ring:
        """From the database's secret and the installation's keys, ``current`` first."""
        ordered = [keys[current], *(key for name, key in keys.items() if name != current)] if keys else [b""]
        return cls(tuple(hmac.digest(key, f"watcher signing {secret}".encode(), "sha256") for key in ordered))

    def sign(self, text: str) -> str:
        return hmac.digest(self.secrets[0], text.encode("utf-8", "surrogatepass"), "sha256").hex()

    def signed(self, text: str, signature: str) -> bool:
        """Whether we signed this, in a time that tells nothing."""
        right = [hmac.digest(each, text.encode("utf-8", "surrogatepass"), "sha256").hex() for each in self.secrets]
        given = signature.encode("utf-8", "replace")
        return any([hmac.compare_digest(each.encode(), given) for each in right])  # noqa: C419  (all of them)

    # --- S3 keys ---

    def credentials(self, token: str, *, job: bool) -> tuple[str, str]:
        """The access key and the secret by which an S3 client is the holder of this token."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
        access_key = (_JOB if job else _TOKEN) + digest.upper()
        return access_key, self.secrets_of(access_key)[0]

    def secrets_of(self, access_key: str) -> Sequence[str]:
        """The secrets that belong to an access key, the newest first, whether or not it stands for anybody."""
        return _secrets_of(tuple(self.secrets), access_key)

    # --- links ---

    def link(self, storage: str, key: str, now: datetime, lifetime: timedelta = USUAL) -> str:
        """The query that lets whoever has it read this one object, for as long as the lifetime says (within limits)."""
        until = int((now + min(max(lifetime, SHORTEST), LONGEST)).timestamp())
        return f"exp={until}&sig={self.sign(_link(storage, key, until))}"

    def opens(self, storage: str, key: str, query: str, now: datetime) -> bool | None:
        """Whether a query lets this object be read; None when it did, and its time is over."""
        given = parse_qs(query, keep_blank_values=True)
        until, signature = given.get("exp", [""])[0], given.get("sig", [""])[0]
        if not (until.isascii() and until.isdigit() and len(until) < 15 and sum(map(len, given.values())) == 2):
            return False
        if not self.signed(_link(storage, key, int(until)), signature):
            return False
        return True if now < datetime.fromtimestamp(int(until), UTC) else None


@lru_cache(maxsize=1024)
def _secrets_of(secrets: tuple[bytes, ...], access_key: str) -> Sequence[str]:
    text = f"s3 key {access_key}".encode("utf-8", "surrogatepass")
    return [hmac.digest(each, text, "sha256").hex() for each in secrets]


def _link(storage: str, key: str, until: int) -> str:
    return f"link\n{until}\n{storage}\n{key}"  # a key is last: it may hold anything but a line's end


@dataclass(frozen=True, slots=True)
class Stands:
    """Whom an access key stands for: a running job or a token, by its SHA-256."""

    job: bool
    digest: bytes


def stands_for(access_key: str) -> Stands | None:
    """None for what is no access key of ours."""
    kind, digest = access_key[:3], access_key[3:]
    if kind not in (_JOB, _TOKEN) or len(digest) != 64:
        return None
    try:
        return Stands(kind == _JOB, bytes.fromhex(digest))
    except ValueError:
        return None
