"""Messages between service and worker: they come out as they went in, and nothing else comes out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.scripts import frames

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), json_values, max_size=5), st.binary())
def test_a_message_comes_out_as_it_went_in(message: dict[str, Any], blob: bytes) -> None:
    data = frames.pack(message, blob)
    text, rest = frames.lengths(data[: frames.HEAD.size], len(data))
    body = data[frames.HEAD.size :]
    assert frames.unpack(body[:text]) == message
    assert body[text : text + rest] == blob
    assert len(body) == text + rest


def test_a_lone_surrogate_travels() -> None:
    assert frames.unpack(frames.pack({"a": "\ud800"})[frames.HEAD.size :]) == {"a": "\ud800"}


@given(st.binary(max_size=200))
def test_noise_is_a_frame_error_or_an_object(noise: bytes) -> None:
    try:
        assert isinstance(frames.unpack(noise), dict)
    except frames.FrameError:
        pass


@pytest.mark.parametrize(
    "body", [b'{"a":NaN}', b'{"a":-Infinity}', b"[]", b"3", b"\xff", b'{"a":1', b"[" * 100_000, b""]
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(frames.FrameError):
        frames.unpack(body)


def test_a_length_above_the_limit_is_refused_before_anything_is_read() -> None:
    with pytest.raises(frames.FrameError, match="4294967296 bytes, where 1000 are allowed"):
        frames.lengths(frames.HEAD.pack(2**32 - 1, 1), 1000)
    assert frames.lengths(frames.HEAD.pack(999, 1), 1000) == (999, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_only_json_is_sent(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        frames.pack({"a": value})
