"""Any program as one run: JSON in, bounded output out, and nothing of it left afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from watcher.errors import TriggerError
from watcher.scripts import warden
from watcher.scripts.calls import Call
from watcher.scripts.ends import death, processor_time, too_slow
from watcher.scripts.pool import Pool
from watcher.scripts.process import Child
from watcher.scripts.shared import looks_for_shared

WATCH = 0.25  # seconds after which a run's processes are counted and weighed
CHUNK = 256 * 1024


class TooMuch(Exception):
    """A program wrote more than it may."""


class Command(Child):
    """A program under a warden. Made by `start`, ended by `kill`."""

    def __init__(
        self, popen: subprocess.Popen[bytes], control: socket.socket, output: int, pipes: tuple[int, int]
    ) -> None:
        super().__init__(popen, control, output)
        self._stdin, self._stdout = pipes

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        *,
        memory: int,
        cpu: float,
        env: Mapping[str, str],
        cwd: Path | None = None,
        shared: bool = False,
    ) -> Command:
        """Start a program, whose processes may use ``memory`` bytes together and ``cpu`` seconds each.

        ``shared``: it looks for ``/shared``.
        """
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            control, their_control = socket.socketpair()
            ours.enter_context(control)
            theirs.enter_context(their_control)
            control.setblocking(False)
            their_stdin, stdin = os.pipe()
            stdout, their_stdout = os.pipe()
            output, their_output = os.pipe()
            for stack, *ends in ((ours, stdin, stdout, output), (theirs, their_stdin, their_stdout, their_output)):
                for end in ends:
                    stack.callback(os.close, end)
            for end in (stdin, stdout, output):
                os.set_blocking(end, False)
            limits = (their_control.fileno(), memory, math.ceil(cpu), int(shared))
            popen = subprocess.Popen(  # noqa: ASYNC220 -- a millisecond; asyncio's way costs a thread per process
                [sys.executable, "-I", "-S", warden.__file__, *map(str, limits), *command],
                stdin=their_stdin,
                stdout=their_stdout,
                stderr=their_output,
                pass_fds=(their_control.fileno(),),
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )
            ours.pop_all()
            return cls(popen, control, output, (stdin, stdout))

    async def talk(self, given: bytes, most: int) -> bytes:
        """Give it its input, and return what it writes, until it ends. TooMuch above ``most`` bytes."""
        feeding = asyncio.create_task(self._feed(given))
        try:
            found = await self._read(most)
            await self._hear()
            return found
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    async def _feed(self, given: bytes) -> None:
        rest = memoryview(given)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._stdin, rest[:CHUNK]) :]
                except BlockingIOError:
                    await _ready(self._stdin, write=True)
        except BrokenPipeError:
            pass  # it does not want its input
        finally:
            os.close(self._stdin)
            self._stdin = -1

    async def _read(self, most: int) -> bytes:
        found = bytearray()
        while True:
            try:
                part = os.read(self._stdout, CHUNK)
            except BlockingIOError:
                await _ready(self._stdout)
                continue
            if not part:
                return bytes(found)
            found += part
            if len(found) > most:
                raise TooMuch

    def _close(self) -> None:
        for end in (self._stdin, self._stdout):
            if end >= 0:
                os.close(end)


async def _ready(fd: int, *, write: bool = False) -> None:
    """Wait until a pipe can be read or written."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        remove(fd)


@dataclass(frozen=True, slots=True)
class Ran:
    """How a program ended: its exit status, what it wrote to its standard output, and the end of what it said."""

    status: int
    output: bytes
    logs: str


async def run(
    call: Call,
    pool: Pool,
    command: Sequence[str],
    given: bytes,
    *,
    most: int,
    env: Mapping[str, str],
    allowance: int = 0,
) -> Ran:
    """Run a program as one run of ``call``, which sets its limits. TriggerError for any end but an exit of its own.

    ``allowance``: bytes above the call's memory limit, for what the language itself takes.
    """
    seconds = call.timeout.total_seconds()

    async def start() -> Command:
        return await Command.start(
            command,
            memory=call.memory_limit + allowance,
            cpu=processor_time(call),
            env={**pool.env, **env, **({"WM_SHARED": str(call.shared())} if call.shared else {}), **call.env},
            cwd=call.cwd,
            shared=looks_for_shared(call.script),
        )

    async with pool.command(call.script, seconds, start) as process:
        watching = asyncio.get_running_loop().call_later(WATCH, process.watch)
        try:
            async with asyncio.timeout(seconds) as limit:
                output = await process.talk(given, most)
        except TimeoutError:
            if not limit.expired():
                raise
            await process.kill()
            raise too_slow(call, process.logs()) from None
        except TooMuch:
            await process.kill()
            raise TriggerError(
                f"{call.script.name} wrote more than {most:,} bytes: list less, or raise [scripts] max_result",
                kind="too_large",
                logs=process.logs(),
            ) from None
        finally:
            watching.cancel()
        how = await process.kill()
        logs = process.logs()
    what, _, status = how.partition(" ")
    if what == "exited":
        return Ran(int(status), output, logs)
    message, kind = death(how, call)
    raise TriggerError(message, kind=kind, detail=logs[-8192:], logs=logs)
