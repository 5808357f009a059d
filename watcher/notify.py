"""Tells systemd how the service is: sd_notify(3), one datagram per message."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta


class Notifier:
    """Speaks to the socket that ``NOTIFY_SOCKET`` names; says nothing when there is none."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # "@" stands for an abstract socket, whose name begins with a null byte.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        meant_for_us = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = int(environ.get("WATCHDOG_USEC", "0") or 0) if meant_for_us else 0
        self.watchdog_every = timedelta(microseconds=microseconds) / 3 if microseconds and address else None
        """How often systemd wants to hear from us (a third of its patience), or None."""

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(1)
            try:
                sock.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                pass  # a manager that went away is no reason to stop the work

    def ready(self, status: str = "") -> None:
        """The database is open, the configuration is in force, and requests are answered."""
        self._send("READY=1", *([f"STATUS={status}"] if status else []))

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send(f"STATUS={text}")

    def watchdog(self) -> None:
        """We are alive and well."""
        self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """A new configuration is being read; ``ready`` must follow."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """We were asked to stop and are draining."""
        self._send("STOPPING=1")

    def extend(self, by: timedelta) -> None:
        """Starting or stopping takes longer: be patient for ``by`` from now on."""
        self._send(f"EXTEND_TIMEOUT_USEC={by // timedelta(microseconds=1)}")
