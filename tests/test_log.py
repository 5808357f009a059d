"""Logs: readable or JSON, constant event names, and never a secret, however it is written."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from watcher import log

CANARY = 'cAnary/secret+värde=1 "q"'


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root, kept = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    structlog.configure(**kept)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def said(**values: Any) -> dict[str, Any]:
    stream = io.StringIO()
    log.configure("debug", stream=stream, environ={})
    log.get("test").info("thing.happened", **values)
    return lines(stream)[0]


# --- form -------------------------------------------------------------------------------------------------------------


def test_off_a_terminal_each_event_is_one_json_line() -> None:
    found = said(watcher="hn", found=3, key="a\nb", on=("new",), none=None, path=Path("/x"))
    assert list(found)[:4] == ["ts", "level", "event", "logger"]
    assert found["ts"].endswith("Z")
    assert {k: v for k, v in found.items() if k != "ts"} == {
        "level": "info", "event": "thing.happened", "logger": "test",
        "watcher": "hn", "found": 3, "key": "a\nb", "on": ["new"], "none": None, "path": "/x",
    }  # fmt: skip


def test_on_a_terminal_it_is_readable_and_colourful_unless_told_not_to() -> None:
    for environ, colour in (({}, True), ({"NO_COLOR": "1"}, False)):
        stream = Terminal()
        log.configure(stream=stream, environ=environ)
        log.get("test").info("thing.happened", watcher="hn")
        assert ("\x1b[" in stream.getvalue()) is colour
        assert "thing.happened" in stream.getvalue()
    assert "watcher=hn" in stream.getvalue()


def test_the_form_can_be_chosen() -> None:
    stream = Terminal()
    log.configure(format="json", stream=stream, environ={})
    log.get("test").info("thing.happened")
    assert lines(stream)[0]["event"] == "thing.happened"
    plain = io.StringIO()
    log.configure(format="console", stream=plain, environ={})
    log.get("test").info("thing.happened")
    assert "[info     ] thing.happened" in plain.getvalue()
    assert "\x1b" not in plain.getvalue()


def test_less_important_events_are_left_out() -> None:
    stream = io.StringIO()
    log.configure("warning", stream=stream, environ={})
    logger = log.get("test")
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    logging.getLogger("library").info("d")
    logging.getLogger("library").error("e")
    assert [(line["event"], line["level"]) for line in lines(stream)] == [
        ("c", "warning"),
        ("library.message", "error"),
    ]


def test_a_logger_made_before_the_set_up_follows_it() -> None:
    logger = log.get("early")
    stream = io.StringIO()
    log.configure(stream=stream, environ={})
    logger.info("thing.happened")
    again = io.StringIO()
    log.configure(stream=again, environ={})
    logger.info("thing.happened")
    assert len(lines(stream)) == len(lines(again)) == 1


def test_without_set_up_nothing_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    log._events(logging.WARNING, [log._mask_event, *log._rendering(readable=False, color=False)], None)
    log.get("test").info("a")
    log.get("test").warning("b", token="hunter2hunter2")
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["event"] == "b"
    assert "hunter2" not in err


def test_libraries_speak_through_the_same_door() -> None:
    stream = io.StringIO()
    log.configure("debug", stream=stream, environ={})
    logging.getLogger("uvicorn.error").warning("listening on %s", "127.0.0.1")
    logging.getLogger("apscheduler.scheduler").info("chatter")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old thing", DeprecationWarning, stacklevel=1)
    found = lines(stream)
    assert [(line["event"], line["logger"]) for line in found] == [
        ("library.message", "uvicorn.error"),
        ("library.message", "py.warnings"),
    ]
    assert found[0]["message"] == "listening on 127.0.0.1"


def test_an_exception_is_told_with_its_traceback() -> None:
    stream = io.StringIO()
    log.configure(stream=stream, environ={})
    try:
        raise ValueError("boom")
    except ValueError:
        log.get("test").exception("thing.failed")
        logging.getLogger("library").exception("oh")
    for line in lines(stream):
        assert "ValueError: boom" in line["exception"]


def test_under_systemd_each_line_carries_its_priority(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w+") as stream:
        status = os.fstat(stream.fileno())
        log.configure("debug", stream=stream, environ={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        for level in ("debug", "info", "warning", "error"):
            getattr(log.get("test"), level)("thing.happened")
        stream.flush()
        assert [line[:4] for line in Path(stream.name).read_text().splitlines()] == ["<7>{", "<6>{", "<4>{", "<3>{"]


def test_what_came_from_outside_cannot_steer_the_terminal_nor_break_a_line() -> None:
    stream = Terminal()
    log.configure(stream=stream, environ={"NO_COLOR": "1"})
    log.get("test").info("thing.happened", title="\x1b[2J\x07\x9b31m\r\nfake line", more="\x00\ud800ü日")
    text = stream.getvalue()
    assert not {"\x1b", "\x07", "\x9b", "\r", "\x00"} & set(text)
    assert "ü日" in text
    assert text.count("\n") == 1


def test_what_cannot_be_written_as_json_is_written_as_text() -> None:
    circle: list[Any] = []
    circle.append(circle)
    found = said(thing=object, circle=circle, nan=float("nan"), raw=b"\xff\x00", deep={"a": {1: {2}}})
    assert found["raw"] == "�\\x00"
    assert found["deep"] == {"a": {"1": [2]}}


# --- masking ----------------------------------------------------------------------------------------------------------


def written(secret: str) -> dict[str, str]:
    raw = secret.encode()
    wrapped = base64.encodebytes(b"user:" + raw * 3).decode()
    return {
        "plain": secret,
        "within words": f"the{secret}is",
        "base64": base64.b64encode(raw).decode(),
        "base64 for URLs": base64.urlsafe_b64encode(raw).decode(),
        "base64 after a user's name": base64.b64encode(b"user:" + raw).decode(),
        "base64 after two letters": base64.b64encode(b"ab" + raw + b"cd").decode(),
        "base64 after one letter": base64.b64encode(b"a" + raw + b"bcd").decode(),
        "hex": f"digest {raw.hex()}",
        "hex in capitals": raw.hex().upper(),
        "URL-encoded": f"https://a.example/?q={quote(secret, safe='')}&b=1",
        "URL-encoded for a form": f"q={quote_plus(secret)}",
        "URL-encoded as a path": quote(secret),
        "JSON": json.dumps({"a": secret}),
        "JSON without escapes": json.dumps({"a": secret}, ensure_ascii=False),
        "over two lines": secret[:5] + "\n" + secret[5:],
        "over many lines": "\r\n  ".join(secret),
        "base64 over lines": wrapped,
        "over lines in JSON": json.dumps(secret[:5] + "\n" + secret[5:]),
    }


def core(secret: str) -> set[str]:
    """Anything that would give the middle of the secret away."""
    middle = secret[3:-3]
    raw = middle.encode()
    bits = {base64.b64encode(b"\0" * n + raw).decode()[4:-4] for n in range(3)}
    return {middle, quote(middle, safe=""), json.dumps(middle)[1:-1], raw.hex(), raw.hex().upper(), *bits}


@pytest.mark.parametrize("form", written(CANARY))
def test_a_registered_secret_is_masked_however_it_is_written(form: str) -> None:
    log.register(CANARY)
    shown = log.mask(written(CANARY)[form])
    assert log.MASK in shown
    joined = "".join(shown.split()).replace("\\n", "")
    assert not [part for part in core(CANARY) if part and "".join(part.split()) in joined], shown


@given(st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="*"), min_size=8, max_size=40))
def test_no_registered_secret_is_ever_shown(secret: str) -> None:
    log.register(secret)
    for text in written(secret).values():
        assert secret not in log.mask(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Bearer abcdef123456", "Authorization: Bearer *****"),
        ("authorization: abcdef123456", "authorization: *****"),
        ("{'Authorization': 'Basic dXNlcjpwYXNz'}", "{'Authorization': 'Basic *****'}"),
        ('{"authorization": "Token abc"}', '{"authorization": "Token *****"}'),
        ("sent Bearer abcdef123456, failed", "sent Bearer *****, failed"),
        ("secret whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw.", "secret whsec_*****."),
        ("secret whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbc=", "secret whsk_*****"),
        ("token wtc_abcDEF123", "token wtc_*****"),
        ("postgresql://me:pw@host/db", "postgresql://*****@host/db"),
        ("https://token@host/x", "https://*****@host/x"),
        ("https://h/x?token=abc&a=1", "https://h/x?token=*****&a=1"),
        ("https://h/x?a=1&api_key=abc#f", "https://h/x?a=1&api_key=*****#f"),
        ("https://h/x?access_token=a&client-secret=b", "https://h/x?access_token=*****&client-secret=*****"),
        ("https://h/x?X-Amz-Signature=abc", "https://h/x?X-Amz-Signature=*****"),
        ("https://h/x?sig=abc&key=def&pwd=ghi", "https://h/x?sig=*****&key=*****&pwd=*****"),
    ],
)
def test_what_looks_like_a_secret_is_masked(text: str, shown: str) -> None:
    assert log.mask(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "Basic authentication failed",
        "the token expired",
        "bearer of news",
        "https://h/x?page=2&query=token",
        "mail to me@example.com",
        "key=value",
        "tokens used: 3",
        "http://h:80/a@b",
    ],
)
def test_what_does_not_is_left_alone(text: str) -> None:
    assert log.mask(text) == text


def test_a_field_that_is_called_like_a_secret_is_masked_whatever_it_holds() -> None:
    found = said(token="a", api_key="b", Authorization="c", headers={"Cookie": "d", "x": "e"}, key="f", n_tokens=3)
    assert found["headers"] == {"Cookie": log.MASK, "x": "e"}
    assert [found[name] for name in ("token", "api_key", "Authorization", "key", "n_tokens")] == ["*****"] * 3 + [
        "f",
        3,
    ]


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_canary_in_any_place_of_an_event(form: Any) -> None:
    canary = "canary-0123456789"
    log.register(canary)

    class Thing:
        def __repr__(self) -> str:
            return f"Thing({canary})"

    stream = io.StringIO()
    log.configure("debug", form, stream=stream, environ={})
    logger = log.get("test").bind(bound=canary)
    try:
        raise ValueError(canary)
    except ValueError as error:
        logger.exception(f"event {canary}", cause=error)
        logging.getLogger("library").exception("%s and %r", canary, Thing())
    logger.info("a", thing=Thing(), raw=canary.encode(), d={canary: [canary, (canary, {canary})]}, e={"x": Thing()})
    structlog.contextvars.bind_contextvars(context=canary)
    logger.info("b")
    structlog.contextvars.clear_contextvars()
    assert len(stream.getvalue()) > 500
    assert canary not in stream.getvalue()


def test_short_values_are_not_masked() -> None:
    log.register("eu")
    log.register("")
    assert log.mask("europe") == "europe"


def test_the_list_of_secrets_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_forms", {})
    monkeypatch.setattr(log, "_unbroken", {})
    monkeypatch.setattr(log, "_MOST_SECRETS", 50)
    for number in range(200):
        log.register(f"secret-number-{number}")
    assert len(log._forms) == 50
    assert log.mask("secret-number-199") == log.MASK


def test_masking_a_long_text_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text from outside may hold the service up: what would make a careless pattern explode is tried here."""
    monkeypatch.setattr(log, "_forms", {})
    monkeypatch.setattr(log, "_unbroken", {})
    for number in range(100):
        log.register(f"secret-number-{number}")
    for text in (
        "a" * 100_000, "?" * 100_000, "&a" * 50_000, "://" * 30_000, "Bearer " * 15_000, "authorization" * 8_000,
        "authorization:" + " " * 100_000, "-token" * 15_000 + "=", "x\n" * 50_000, "?" + "a-" * 50_000,
        "a://" + "b" * 100_000,
    ):  # fmt: skip
        began = time.process_time()
        log.mask(text)
        assert time.process_time() - began < 2, text[:20]
