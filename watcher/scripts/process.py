"""One process that runs scripts, as the service sees it: started, spoken to, drained, killed with all it started."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from watcher.errors import TriggerError
from watcher.scripts import frames
from watcher.scripts.warden import descendants

LOGS = 64 * 1024 - 100  # bytes of a run's output that are kept: its end, less the line on what was left out
START = 60.0  # seconds that a worker may take to start on a busy machine
GRACE = 0.5  # seconds in which a worker that hung up may end by itself
END = 10.0  # seconds that a warden may take to kill what is left
HARMLESS = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR")

_PACKAGE = Path(__file__).resolve().parent.parent
# -I: neither the user's site nor PYTHON* variables decide what a worker runs. The package is loaded from its file, so
# that no other installation of it is found instead, and nothing that lies beside it. An environment of a script's own
# need not have JMESPath, which keys and cursors are written in: then the service's is used. Of the package of scripts a
# worker needs modules, but not what the service does with them, so its __init__ is not run.
_START = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
def spec(name, folder):
    return spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
class Last:
    folder = sys.argv[2]
    def find_spec(self, name, path=None, target=None):
        return spec(name, self.folder) if name == "jmespath" else None
sys.meta_path.append(Last())
ours = spec("watcher", sys.argv[1])
sys.modules["watcher"] = module_from_spec(ours)
ours.loader.exec_module(sys.modules["watcher"])
sys.modules["watcher.scripts"] = module_from_spec(spec("watcher.scripts", sys.argv[1] + "/scripts"))
from watcher.scripts.warden import main
main(*map(int, sys.argv[3:]))
"""


@functools.cache
def _jmespath() -> str:
    found = find_spec("jmespath")
    return str(Path(found.origin).parent) if found and found.origin else ""


class Died(Exception):
    """The worker ended while the service waited for it. ``how`` is what its warden said."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


def environment(source: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    """A worker's environment: what is harmless, and what the configuration names."""
    kept = {name: source[name] for name in (*HARMLESS, *names) if name in source}
    # Each further arena of malloc would reserve 64 MB of the address space that is limited.
    return {"PATH": os.defpath, "LANG": "C.UTF-8", **kept, "MALLOC_ARENA_MAX": "1"}


class Child:
    """A warden with what it watches over, and the tail of what that prints."""

    def __init__(self, popen: subprocess.Popen[bytes], control: socket.socket, output: int) -> None:
        self.pid = popen.pid
        self._popen = popen
        self._control = control
        self._output = output
        self._tail = bytearray()
        self._dropped = 0
        self._said = ""  # how it ended, once the warden has told
        self._ended: asyncio.Task[str] | None = None
        asyncio.get_running_loop().add_reader(output, self._drain)

    def watch(self) -> None:
        """Have the warden look at how many processes there are, and how large: worth it for a run that lasts."""
        self._tell(b"w")

    def unwatch(self) -> None:
        self._tell(b"s")

    def _tell(self, order: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, which `receive` will notice
            self._control.send(order)

    async def kill(self, *, after: float = 0.0) -> str:
        """End the worker and everything it started, and say how it ended. Waits until it is gone; safe to repeat.

        ``after``: seconds in which it may still end by itself, and so tell why.
        """
        if self._ended is None:
            self._ended = asyncio.create_task(self._end(after))
        return await asyncio.shield(self._ended)

    async def _end(self, after: float) -> str:
        loop = asyncio.get_running_loop()
        order = loop.call_later(after, self._control.shutdown, socket.SHUT_WR)  # to the warden: kill
        try:
            async with asyncio.timeout(after + END):
                await self._hear()
                await _gone(self.pid)
        except (TimeoutError, OSError):
            for pid in (*descendants(self.pid), self.pid):  # the script stopped its own warden
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            await _gone(self.pid)
        order.cancel()
        self._popen.wait()
        for _ in range(4):
            self._drain()
        loop.remove_reader(self._output)
        os.close(self._output)
        self._control.close()
        self._close()
        return self._said or "killed 9"

    async def _hear(self) -> None:
        """Wait for the warden to tell how it ended."""
        if not self._said:
            self._said = (await asyncio.get_running_loop().sock_recv(self._control, 64)).decode("ascii", "replace")

    def _close(self) -> None:
        """Close what else there is between the service and the process."""

    def _drain(self) -> None:
        """Take what was printed. A script that prints a gigabyte is read, and its beginning forgotten."""
        try:
            part = os.read(self._output, LOGS)
        except BlockingIOError:
            return
        if not part:
            asyncio.get_running_loop().remove_reader(self._output)
            return
        self._tail += part
        if (over := len(self._tail) - LOGS) > LOGS:
            self._dropped += over
            del self._tail[:over]

    def logs(self) -> str:
        """The tail of what was printed since the last call."""
        if self._ended is None:
            for _ in range(4):  # as much as a pipe holds, in case the loop has not come to it yet
                self._drain()
        over = max(0, len(self._tail) - LOGS)
        dropped, text = self._dropped + over, bytes(self._tail[over:]).decode("utf-8", "replace")
        self._tail.clear()
        self._dropped = 0
        return f"[{dropped:,} bytes left out]\n{text}" if dropped else text


class Process(Child):
    """A warm worker of Python. Made by `Process.start`, ended by `kill`, and never used by two runs at once."""

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        channel: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        control: socket.socket,
        output: int,
        limit: int,
    ) -> None:
        super().__init__(popen, control, output)
        self.runs = 0
        self.fit = False  # set by a run that left the worker as it was
        self.received = 0  # bytes of JSON, since the run began
        self.first_resident = 0  # bytes after the first run
        self.idle_since = 0.0
        self._reader, self._writer = channel
        self._limit = limit

    @classmethod
    async def start(
        cls, *, memory: int, limit: int, env: Mapping[str, str], interpreter: str = sys.executable, shared: bool = False
    ) -> Process:
        """Start a worker with ``memory`` bytes for scripts, whose messages have ``limit`` bytes at most.

        ``interpreter``: the Python of the environment that the script needs. ``shared``: it looks for ``/shared``.
        """
        process = await cls._spawn(memory, limit, env, interpreter, shared)
        try:
            async with asyncio.timeout(START):
                message, _ = await process.receive()
        except (Died, TimeoutError, frames.FrameError) as error:
            await process.kill()
            raise TriggerError(
                f"a worker process did not start: {error or 'it took too long'}", kind="crashed", logs=process.logs()
            ) from error
        except BaseException:
            await process.kill()
            raise
        assert message["op"] == "ready"
        return process

    @classmethod
    async def _spawn(cls, memory: int, limit: int, env: Mapping[str, str], interpreter: str, shared: bool) -> Process:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            channel, their_channel = socket.socketpair()
            control, their_control = socket.socketpair()
            output, their_output = os.pipe()
            for stack, *ends in ((ours, channel, control), (theirs, their_channel, their_control)):
                for end in ends:
                    stack.enter_context(end)
            ours.callback(os.close, output)
            theirs.callback(os.close, their_output)
            for end in (channel, control):
                end.setblocking(False)
            os.set_blocking(output, False)
            reader, writer = await asyncio.open_connection(sock=channel)
            ours.callback(writer.close)
            fds = (their_channel.fileno(), their_control.fileno())
            numbers = map(str, (*fds, memory, int(shared)))
            popen = subprocess.Popen(  # noqa: ASYNC220 -- a millisecond; asyncio's way costs a thread per process
                [interpreter, "-I", "-X", "utf8", "-c", _START, str(_PACKAGE), _jmespath(), *numbers],
                stdin=subprocess.DEVNULL,
                stdout=their_output,
                stderr=their_output,
                pass_fds=fds,
                env=dict(env),
                start_new_session=True,
            )
            ours.pop_all()
            return cls(popen, (reader, writer), control, output, limit)

    async def send(self, message: dict[str, Any], blob: bytes = b"") -> None:
        """Send one message. Died if nobody listens any more."""
        try:
            self._writer.write(frames.pack(message, blob))
            await self._writer.drain()
        except ConnectionError:
            raise Died(await self.kill(after=GRACE)) from None

    async def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next message. Died when the worker ended, FrameError for what is no message."""
        try:
            text, blob = frames.lengths(await self._reader.readexactly(frames.HEAD.size), self._limit)
            self.received += text
            return frames.unpack(await self._reader.readexactly(text)), await self._reader.readexactly(blob)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise Died(await self.kill(after=GRACE)) from None

    @property
    def ended(self) -> bool:
        return self._ended is not None or self._reader.at_eof()

    def _close(self) -> None:
        self._writer.close()


async def _gone(pid: int) -> None:
    """Wait for a child to end, without collecting it."""
    loop = asyncio.get_running_loop()
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = loop.create_future()
    loop.add_reader(fd, lambda: None if ended.done() else ended.set_result(None))
    try:
        await ended
    finally:
        loop.remove_reader(fd)
        os.close(fd)
