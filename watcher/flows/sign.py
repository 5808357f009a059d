"""Signs a message as Standard Webhooks 1.0.0 asks, with every secret given, so that secrets can be rotated."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Signer = Callable[[bytes], str]


def sign(secrets: Sequence[str], message: str, now: datetime, body: bytes) -> str:
    """The ``webhook-signature`` header: one signature per secret, space-separated.

    ``message`` is the ``webhook-id`` and holds no ``.``; ``now`` is aware UTC and this attempt's time; ``body`` are
    the very bytes that are sent, UTF-8. Raises ValueError for a secret that cannot sign, without showing it.
    """
    signed = b"%b.%d.%b" % (message.encode(), now.timestamp(), body)
    return " ".join([_signer(secret)(signed) for secret in secrets])


def check_secret(secret: str) -> None:
    """Raise ValueError, saying what a good secret looks like, when this one cannot sign."""
    _signer(secret)


@lru_cache(maxsize=256)
def _signer(secret: str) -> Signer:
    if secret.startswith("whsk_"):
        return _ed25519(secret.removeprefix("whsk_"))
    key = _decode(secret.removeprefix("whsec_"))
    if not 24 <= len(key) <= 64:
        raise ValueError(f"a signing secret holds 24 to 64 random bytes, this one {len(key)}: make one with {_RECIPE}")

    keyed = hmac.new(key, digestmod="sha256")

    def v1(signed: bytes) -> str:
        mac = keyed.copy()
        mac.update(signed)
        return "v1," + binascii.b2a_base64(mac.digest(), newline=False).decode()

    return v1


def _ed25519(text: str) -> Signer:
    key = _decode(text)
    if len(key) not in (32, 64):  # the seed, or the seed and the public key
        raise ValueError(f"an ed25519 signing key is whsk_ and base64 of 32 or 64 bytes, this one holds {len(key)}")
    private = Ed25519PrivateKey.from_private_bytes(key[:32])

    def v1a(signed: bytes) -> str:
        return "v1a," + base64.b64encode(private.sign(signed)).decode()

    return v1a


_RECIPE = "echo whsec_$(openssl rand -base64 32)"


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"a signing secret is whsec_ and base64: make one with {_RECIPE}") from None
