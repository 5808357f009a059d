"""The control socket: who may use it, and what a caller reads when something is wrong."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import uvicorn

from watcher import control, operations
from watcher.errors import StoreError, WatcherError
from watcher.operations import Operator
from watcher.values import Json

NOBODY = cast(Operator, object())  # the verbs of these tests do not look at it


@asynccontextmanager
async def served(at: Path) -> AsyncIterator[None]:
    config = uvicorn.Config(control.application(NOBODY), log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    listener = control.listen(at)
    task = asyncio.create_task(server._serve([listener]))
    while not server.started:
        await asyncio.sleep(0.001)
    try:
        yield
    finally:
        server.should_exit = True
        await task
        listener.close()


async def ask(at: Path, verb: str, **arguments: Any) -> Json:
    return await asyncio.to_thread(control.call, at, verb, arguments)


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def echo(op: Operator, **arguments: Json) -> Json:
        return arguments

    async def refuse(op: Operator) -> Json:
        raise StoreError("the database is locked: wait")

    async def explode(op: Operator) -> Json:
        raise RuntimeError("secret-detail")

    monkeypatch.setattr(operations, "VERBS", {"echo": echo, "refuse": refuse, "explode": explode})


@pytest.mark.usefixtures("verbs")
async def test_arguments_and_result_arrive_whole(tmp_path: Path) -> None:
    value = {"text": "é\u2028\x00", "list": [1, 2.5, None, True], "big": "x" * 3_000_000}
    async with served(tmp_path / "control.sock"):
        assert await ask(tmp_path / "control.sock", "echo", **value) == value


@pytest.mark.usefixtures("verbs")
async def test_an_error_keeps_its_words_and_its_exit_code(tmp_path: Path) -> None:
    async with served(tmp_path / "control.sock"):
        with pytest.raises(WatcherError, match="the database is locked: wait") as caught:
            await ask(tmp_path / "control.sock", "refuse")
    assert caught.value.exit_code == 69


@pytest.mark.usefixtures("verbs")
async def test_a_bug_in_the_service_is_told_without_its_details(tmp_path: Path) -> None:
    async with served(tmp_path / "control.sock"):
        with pytest.raises(WatcherError, match="RuntimeError in the service: its log has the details") as caught:
            await ask(tmp_path / "control.sock", "explode")
    assert "secret-detail" not in str(caught.value)


@pytest.mark.usefixtures("verbs")
async def test_a_verb_of_another_version_is_refused_with_advice(tmp_path: Path) -> None:
    async with served(tmp_path / "control.sock"):
        with pytest.raises(WatcherError, match="restart it"):
            await ask(tmp_path / "control.sock", "conquer")


@pytest.mark.usefixtures("verbs")
async def test_more_than_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_BODY", 1000)
    async with served(tmp_path / "control.sock"):
        with pytest.raises(WatcherError):
            await ask(tmp_path / "control.sock", "echo", text="x" * 2000)
        assert await ask(tmp_path / "control.sock", "echo", text="x") == {"text": "x"}


def test_only_its_owner_can_open_the_socket(tmp_path: Path) -> None:
    listener = control.listen(tmp_path / "control.sock")
    try:
        assert stat.S_IMODE(os.stat(tmp_path / "control.sock").st_mode) == 0o600
    finally:
        listener.close()


def test_a_socket_that_a_dead_service_left_is_not_alive_and_is_replaced(tmp_path: Path) -> None:
    at = tmp_path / "control.sock"
    assert not control.alive(at)
    control.listen(at).close()
    assert at.exists()
    assert not control.alive(at)
    listener = control.listen(at)
    try:
        assert control.alive(at)
    finally:
        listener.close()


@pytest.mark.usefixtures("verbs")
async def test_a_path_too_long_for_the_kernel_works_all_the_same(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60) / "control.sock"
    async with served(deep):
        assert control.alive(deep)
        assert await ask(deep, "echo", a=1) == {"a": 1}


def test_a_service_that_dies_in_the_middle_is_told_apart_from_an_answer(tmp_path: Path) -> None:
    at = tmp_path / "control.sock"
    listener = control.listen(at)
    listener.setblocking(True)

    def hang_up() -> None:
        connection, _ = listener.accept()
        connection.recv(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()

    async def both() -> None:
        await asyncio.gather(asyncio.to_thread(hang_up), ask(at, "echo", text="x" * 100_000))

    try:
        with pytest.raises(StoreError, match="went away before it answered"):
            asyncio.run(both())
    finally:
        listener.close()


def test_a_second_service_does_not_take_the_socket_away(tmp_path: Path) -> None:
    listener = control.listen(tmp_path / "control.sock")
    try:
        with pytest.raises(StoreError, match="another service answers"):
            control.listen(tmp_path / "control.sock")
        assert control.alive(tmp_path / "control.sock")
    finally:
        listener.close()
