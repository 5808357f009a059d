"""The real `watcher` command in processes of its own that start at once: forked from one that has imported everything.

To import the service costs a second of the processor, and the tests start it and the other verbs hundreds of times.
Each process here has its own session, directory, environment and streams, and runs `watcher.cli.main` as
``python -m watcher`` does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent.parent


class Process:
    """What `subprocess.Popen` would give for ``python -m watcher ARGUMENTS``."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: int | IO[Any],
        stderr: int | IO[Any],
        stdin: int | IO[Any] | None = None,
    ) -> None:
        self.returncode: int | None = None
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.connect(address())
        request = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}
        with open(os.devnull) as nothing:
            wanted = (stdin or nothing, stdout, stderr)
            streams = [stream if isinstance(stream, int) else stream.fileno() for stream in wanted]
            socket.send_fds(self._line, [json.dumps(request).encode()], streams)
        self.pid = int(self._line.recv(64))

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                answer = self._line.recv(64, socket.MSG_DONTWAIT)
                self.returncode = int(answer)
                self._line.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"watcher, process {self.pid}", timeout or 0)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        self._line.close()  # which ends the process, if it still runs


def anew(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: IO[Any], stderr: IO[Any]
) -> subprocess.Popen[bytes]:
    """The same in a Python that starts for it."""
    return subprocess.Popen(
        [sys.executable, "-m", "watcher", *arguments],
        cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True,
    )  # fmt: skip


def run(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], given: str = "", timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        stdin.write(given.encode())
        stdin.seek(0)
        process = Process(arguments, cwd=cwd, env=env, stdin=stdin, stdout=out, stderr=err)
        code = process.wait(timeout)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(["watcher", *arguments], code, out.read().decode(), err.read().decode())


def script() -> str:
    """The text of an executable file that stands for the `watcher` command, for a shell's PATH."""
    return f"#!{sys.executable} -SE\n{_SCRIPT.replace('ADDRESS', repr(address()))}"


_SCRIPT = """\
import json, os, signal, socket, sys
line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
line.connect(ADDRESS)
request = {"arguments": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}
socket.send_fds(line, [json.dumps(request).encode()], [0, 1, 2])
pid = int(line.recv(64))
signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
sys.exit(int(line.recv(64)))
"""


@functools.cache
def address() -> str:
    """Where the process listens that the others are forked from. It is started when it is first needed."""
    folder = tempfile.mkdtemp(prefix="watcher-command-")
    at = f"{folder}/socket"
    ours, theirs = socket.socketpair()  # closed when this process ends, however it does
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.support.command", at, str(theirs.fileno())],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    theirs.close()
    assert ours.recv(16) == b"ready", "the process that the commands are forked from did not start"

    def stop() -> None:
        ours.close()
        parent.wait(20)
        Path(at).unlink(missing_ok=True)
        Path(folder).rmdir()

    atexit.register(stop)
    return at


# --- the process that is forked ---------------------------------------------------------------------------------------


def _import_everything() -> None:
    from importlib import import_module

    import aiosqlite  # noqa: F401
    import alembic.command  # noqa: F401
    import anyio._backends._asyncio  # noqa: F401
    import psycopg  # noqa: F401
    import sqlalchemy.dialects.postgresql.psycopg
    import sqlalchemy.dialects.sqlite.aiosqlite  # noqa: F401
    import typer  # noqa: F401
    import uvicorn.lifespan.on
    import uvicorn.protocols.http.auto  # noqa: F401

    from watcher.cli import VERBS
    from watcher.cli.lean import lean

    with lean():
        from watcher import app  # noqa: F401
        from watcher.cli import checking, doctor, example  # noqa: F401

        for module in {module for module, _ in VERBS.values()}:
            import_module(f"watcher.cli.{module}")


def _fork(request: Mapping[str, Any], streams: Sequence[int]) -> int:
    """The child's number; the child itself does not return."""
    if pid := os.fork():
        for stream in streams:
            os.close(stream)
        return pid
    code = 70
    try:
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
        os.closerange(3, 1024)
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        code = _become(request["arguments"])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _become(arguments: Sequence[str]) -> int:
    from watcher import failpoint
    from watcher.cli import main

    failpoint._points = failpoint._armed()
    sys.argv = ["watcher", *arguments]
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    try:
        return main(arguments)
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


def _serve(at: str, parent: int) -> None:
    """Fork for whoever asks; say how each process ended. All of them end with the tests that asked for them."""
    _import_everything()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(at)
    listener.listen(64)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(parent, selectors.EVENT_READ)
    running: dict[socket.socket, int] = {}
    os.write(parent, b"ready")
    while True:
        for key, _ in waiting.select():
            if key.fileobj is listener:
                waiting.register(listener.accept()[0], selectors.EVENT_READ)
            elif key.fileobj == parent:
                for pid in running.values():
                    os.kill(pid, signal.SIGKILL)
                return
            elif key.data is not None:  # a process ended
                pid, line = key.data
                _, status = os.waitpid(pid, 0)
                waiting.unregister(key.fileobj)
                os.close(int(key.fd))
                del running[line]
                waiting.unregister(line)
                with contextlib.suppress(OSError):
                    line.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                line.close()
            elif (line := key.fileobj) in running:  # nobody waits for it any more
                os.kill(running[line], signal.SIGKILL)
            else:
                assert isinstance(line, socket.socket)
                message, streams, _, _ = socket.recv_fds(line, 1 << 20, 3)
                if not streams:
                    waiting.unregister(line)
                    line.close()
                    continue
                running[line] = pid = _fork(json.loads(message), streams)
                line.sendall(str(pid).encode())
                waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, line))


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
