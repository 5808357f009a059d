"""What systemd is told, word for word."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest

from watcher.notify import Notifier


@pytest.mark.parametrize("abstract", [False, True])
def test_each_message_is_one_datagram(tmp_path: Path, abstract: bool) -> None:
    name = f"@watcher-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        notifier = Notifier({"NOTIFY_SOCKET": name})
        notifier.ready("12 watchers")
        notifier.watchdog()
        notifier.reloading()
        notifier.extend(timedelta(seconds=60))
        notifier.stopping()
        messages = [manager.recv(4096).decode() for _ in range(5)]
    assert messages[0] == "READY=1\nSTATUS=12 watchers"
    assert messages[1] == "WATCHDOG=1"
    assert messages[2].startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert messages[2].rpartition("=")[2].isdigit()
    assert messages[3:] == ["EXTEND_TIMEOUT_USEC=60000000", "STOPPING=1"]


def test_without_a_manager_nothing_is_said_and_nothing_fails() -> None:
    notifier = Notifier({})
    notifier.ready()
    notifier.stopping()
    assert notifier.watchdog_every is None


def test_a_manager_that_went_away_is_no_reason_to_stop(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).watchdog()


def test_the_watchdog_is_fed_three_times_in_its_patience_and_only_when_it_watches_us() -> None:
    watched = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "60000000"}
    assert Notifier(watched).watchdog_every == timedelta(seconds=20)
    assert Notifier(watched | {"WATCHDOG_PID": str(os.getpid())}).watchdog_every == timedelta(seconds=20)
    assert Notifier(watched | {"WATCHDOG_PID": "1"}).watchdog_every is None
