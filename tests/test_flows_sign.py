"""Signatures: the vectors of Standard Webhooks, secrets that are refused, and the official library as the judge."""

from __future__ import annotations

import base64
import json
import secrets
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook

from tests.support.deliveries import delivery, resolved
from watcher.flows import presets
from watcher.flows.sign import check_secret, sign
from watcher.values import Flow

FIRST = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SECOND = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
ED25519 = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
MESSAGE = "msg_p5jXN8AQM9LWM0D4loKWxJek"

VECTORS = [
    (FIRST, MESSAGE, 1614265330, '{"test": 2432232314}', "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="),
    (
        SECOND,
        "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk",
        1649367553,
        '{"email":"test@example.com","username":"test_user"}',
        "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=",
    ),
    (
        ED25519,
        MESSAGE,
        1614265330,
        '{"test": 2432232314}',
        "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg==",
    ),
    (FIRST, "msg_unicode", 1614265330, '{"city":"Zürich ☃"}', "v1,FnrFq0cch3B7D92YZHacr1uBRVGRZF+Cqu0/8yy2uxU="),
]


@pytest.mark.parametrize(("secret", "message", "at", "body", "signature"), VECTORS)
def test_known_messages_get_their_known_signatures(
    secret: str, message: str, at: int, body: str, signature: str
) -> None:
    assert sign([secret], message, datetime.fromtimestamp(at, UTC), body.encode()) == signature


def test_a_rotated_secret_signs_beside_the_old_one() -> None:
    at = datetime.fromtimestamp(1614265330, UTC)
    both = sign([FIRST, SECOND], MESSAGE, at, b"{}")
    assert both.split(" ") == [sign([FIRST], MESSAGE, at, b"{}"), sign([SECOND], MESSAGE, at, b"{}")]


def test_a_secret_without_prefix_or_padding_is_the_same_secret() -> None:
    at = datetime.fromtimestamp(1614265330, UTC)
    key = base64.b64encode(b"k" * 32).decode()
    spellings = [key, key.rstrip("="), f"whsec_{key}", f"whsec_{key.rstrip('=')}"]
    assert len({sign([spelling], MESSAGE, at, b"{}") for spelling in spellings}) == 1


@pytest.mark.parametrize(
    "secret", ["", "whsec_", "whsec_YQ==", "whsec_AAAA", "whsec_not base64 at all!!", "whsk_AAAA", "x" * 200]
)
def test_a_secret_that_cannot_sign_is_refused_without_being_shown(secret: str) -> None:
    with pytest.raises(ValueError, match="sign") as error:
        check_secret(secret)
    assert len(secret) < 8 or secret not in str(error.value)


def test_what_is_sent_verifies_with_the_official_library_and_every_retry_signs_its_own_time() -> None:
    flow = Flow("hook", url="http://127.0.0.1/", secrets=(FIRST,))
    now = datetime.now(UTC)
    seen = set()
    for attempt in (1, 2, 3):
        at = now + timedelta(seconds=attempt)
        request = presets["http"].request(flow, delivery(attempt=attempt), resolved(flow), at)
        Webhook(FIRST).verify(request.body, dict(request.headers))
        seen.add((request.headers["webhook-id"], request.headers["webhook-timestamp"], request.body))
    assert len({each[0] for each in seen}) == len({each[2] for each in seen}) == 1
    assert len({each[1] for each in seen}) == 3


@given(
    item=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    ),
    key=st.text(max_size=30),
)
@settings(max_examples=1000, deadline=None)
def test_any_item_signs_and_verifies_and_comes_out_as_it_went_in(item: object, key: str) -> None:
    flow = Flow(
        "hook", url="http://127.0.0.1/", secrets=("whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),)
    )
    request = presets["http"].request(flow, delivery({"it": item}, key=key), resolved(flow), datetime.now(UTC))
    sent = Webhook(flow.secrets[0]).verify(request.body, dict(request.headers))
    assert sent["data"]["item"] == json.loads(json.dumps({"it": item}))
    assert sent["data"]["key"] == key


def test_the_same_instant_in_another_time_zone_signs_the_same() -> None:
    at = datetime.fromtimestamp(1614265330, UTC)
    elsewhere = at.astimezone(timezone(timedelta(hours=5)))
    assert sign([FIRST], MESSAGE, elsewhere, b"{}") == sign([FIRST], MESSAGE, at, b"{}")
