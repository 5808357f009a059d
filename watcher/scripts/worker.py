"""The process in which scripts run: takes a call, runs main in a fresh namespace, sends back what it found."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import inspect
import io
import itertools
import os
import queue
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from watcher import context
from watcher.errors import TriggerError
from watcher.scripts import frames
from watcher.scripts.entries import Picked, to_json
from watcher.scripts.listing import Row, Sink, drain, drain_sync
from watcher.scripts.loading import MODULE, Code, Loaded, failure, load, read, version
from watcher.scripts.warden import ALLOWANCE, FILE_SIZE, OPEN_FILES, limit
from watcher.values import UNSET, Json

CHUNK = 256 * 1024  # characters of entries in one message: the service decodes one in a few milliseconds
PROF_CLOCK = -8  # MAKE_PROCESS_CPUCLOCK(0, CPUCLOCK_PROF): what RLIMIT_CPU goes by; getrusage can be far behind it
FORGETFUL = ("wmill",)  # modules that keep a run's token in a global: imported anew by every run

Message = dict[str, Any]


class Pipe:
    """The worker's end of the channel. Any thread may ask; one thread listens."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._sending = threading.Lock()
        self._asked: dict[int, Future[tuple[Message, bytes]]] = {}
        self._ids = itertools.count(1)
        self._orders: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="watcher", daemon=True).start()

    def order(self) -> Message:
        """Wait for the next thing to do."""
        return self._orders.get()

    def send(self, text: str, blob: bytes = b"") -> None:
        data = frames.pack_text(text, blob)
        with self._sending:
            self._channel.sendall(data)

    def ask(self, message: Mapping[str, Json], blob: bytes = b"") -> Future[tuple[Message, bytes]]:
        """Ask the service. The future raises the TriggerError with which it answers."""
        number, answer = self._expect()
        self.send(frames.dump({**message, "id": number}), blob)
        return answer

    def page(self, text: str) -> bool:
        """Send the end of a page, and wait to hear whether another one is wanted."""
        number, answer = self._expect()
        self.send(f'{{"op":"page","id":{number},"entries":{text}}}')
        return bool(answer.result()[0]["go"])

    def _expect(self) -> tuple[int, Future[tuple[Message, bytes]]]:
        number = next(self._ids)
        answer: Future[tuple[Message, bytes]] = Future()
        self._asked[number] = answer
        return number, answer

    def _listen(self) -> NoReturn:
        try:
            while True:
                text, blob = frames.lengths(self._exactly(frames.HEAD.size))
                message = frames.unpack(self._exactly(text))
                self._take(message, self._exactly(blob))
        finally:
            os._exit(0)  # the service is gone, or the script closed the channel: nobody waits for this process

    def _take(self, message: Message, blob: bytes) -> None:
        if message["op"] != "answer":
            self._orders.put(message)
            return
        answer = self._asked.pop(message["id"])
        if error := message.get("error"):
            answer.set_exception(
                TriggerError(error["message"], kind=error["kind"], retry_after=error.get("retry_after"))
            )
        else:
            answer.set_result((message, blob))

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self._channel.recv(min(size - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)


class Pages:
    """Entries on their way to the service, in messages of bounded size."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._rows: list[str] = []
        self._size = 0
        self.sink: Sink | None = None

    def keep(self, row: Row) -> None:
        key, cursor, item = row
        self._rows.append(f"[{frames.dump(key)},{frames.dump(cursor)},{item}]")
        self._size += len(item)
        if self._size >= CHUNK:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._pipe.send(f'{{"op":"page","entries":{self._text()}}}')

    def turn(self) -> bool:
        assert self.sink
        self.sink.waiting = 0
        return self._pipe.page(self._text())

    async def aturn(self) -> bool:
        return self.turn()

    def _text(self) -> str:
        text = f"[{','.join(self._rows)}]"
        self._rows.clear()
        self._size = 0
        return text


class Worker:
    """Runs one order after another, each in a fresh namespace, and leaves the process as it was."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._code: Code | None = None

    def serve(self) -> NoReturn:
        does: dict[str, Callable[[Message, Loaded], Message]] = {
            "describe": self._describe,
            "check": self._check,
            "call": self._call,
            "step": self._step,
        }
        while True:
            order = self._pipe.order()
            path = Path(order["script"])
            try:
                with _as_it_was(order):
                    done = does[order["op"]](order, load(self._read(path)))
                answer = frames.dump({"op": "done", **done, **_health()})
            except BaseException as error:
                wrong = failure(error, path)
                answer = frames.dump({"op": "failed", **_wrong(wrong), **_health()})
                del wrong, error
            self._pipe.send(answer)

    def _read(self, path: Path) -> Code:
        if self._code is None or self._code.path != path or self._code.version != version(path):
            self._code = read(path)
        return self._code

    def _describe(self, order: Message, script: Loaded) -> Message:
        arguments = script.arguments
        return {
            "label": _label(script),
            "doc": script.doc,
            "schema": arguments.schema(),
            "takes_since": arguments.takes_since,
            "pages": inspect.isgeneratorfunction(script.main) or inspect.isasyncgenfunction(script.main),
        }

    def _check(self, order: Message, script: Loaded) -> Message:
        script.arguments.bind(order["args"])
        return {}

    def _call(self, order: Message, script: Loaded) -> Message:
        bound = script.arguments.bind(order["args"], order.get("since", UNSET))
        pages = Pages(self._pipe)
        picked = Picked(script.marked, order["key"], order["cursor"])
        pages.sink = sink = Sink(picked, order["max_items"], order["max_bytes"], pages.keep)
        unchanged = False
        with context.use(self._context(order), everywhere=True) as reach:
            try:
                result = script.main(**bound)
                if inspect.isawaitable(result) or inspect.isasyncgen(result):
                    asyncio.run(reach.closing(drain(result, sink, pages.aturn)))
                else:
                    drain_sync(result, sink, pages.turn)
            except context.Unchanged:
                unchanged = True
        pages.flush()
        complete, capped = sink.complete and not reach.capped, sink.capped or reach.capped
        facts = {"unchanged": unchanged, "complete": complete, "capped": capped, "gap": reach.gap}
        staged = {} if reach.staged is UNSET else {"state": reach.staged}
        return {"label": _label(script), **facts, **staged, "warnings": picked.warnings()}

    def _step(self, order: Message, script: Loaded) -> Message:
        bound = script.arguments.bind_step(order["args"])
        with context.use(self._context(order), everywhere=True) as reach:
            result = script.main(**bound)
            if inspect.isawaitable(result):
                result = asyncio.run(reach.closing(_awaited(result)))
        if reach.staged is not UNSET:  # nobody keeps it
            raise TriggerError("set_state: a step of a flow keeps no state: return what matters", kind="arguments")
        text = to_json(result, "the result")
        if len(text) > order["max_bytes"]:
            raise TriggerError(f"the result is larger than {order['max_bytes']:,} bytes", kind="too_large")
        return {"result": frames.load(text)}

    def _context(self, order: Message) -> context.RemoteContext:
        return context.RemoteContext(
            self._pipe,
            state=order.get("state", UNSET),
            kept=order["kept"],
            state_path=order["state_path"],
            workspace=order["workspace"],
            job_id=order["job_id"],
        )


def _label(script: Loaded) -> Message:
    label = script.marked.label
    return {name: getattr(label, name) for name in ("style", "key", "cursor", "lookback", "on", "loop")}


def _wrong(error: TriggerError) -> Message:
    return {"message": str(error), "kind": error.kind, "detail": error.detail, "retry_after": error.retry_after}


async def _awaited(result: Any) -> Any:
    return await result


@contextmanager
def _as_it_was(order: Message) -> Iterator[None]:
    """Set up the process for one order, and undo afterwards what the script changed in it."""
    environment, path, streams = dict(os.environ), list(sys.path), (sys.stdin, sys.stdout, sys.stderr)
    modules, folder = set(sys.modules), str(Path(order["script"]).parent)
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    _soft_limit(resource.RLIMIT_CPU, int(time.clock_gettime(PROF_CLOCK)) + 1 + order["cpu"])
    try:
        os.environ.update(order["env"])
        sys.argv = [order["script"]]
        sys.path.append(folder)  # last: a helper beside the script can be imported, but hides nothing
        if order["cwd"]:
            os.chdir(order["cwd"])
        yield
    finally:
        _soft_limit(resource.RLIMIT_CPU, resource.RLIM_INFINITY)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = streams
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if _is_of_one_run(name, sys.modules[name], folder):
                del sys.modules[name]
        if os.environ != environment:
            os.environ.clear()
            os.environ.update(environment)
        os.fchdir(here)
        os.close(here)


def _soft_limit(kind: int, soft: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _is_of_one_run(name: str, module: ModuleType | None, folder: str) -> bool:
    """The script, and a helper beside it: the next run must see them as they are by then."""
    top = name.partition(".")[0]
    if top in FORGETFUL or top.startswith(MODULE):
        return True
    # A package in an environment below the folder (.venv) is no helper of the script.
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and file.startswith(os.path.join(folder, top))


def _health() -> Message:
    """What tells the service whether this process may run another script."""
    with open("/proc/self/statm", "rb") as statm:
        resident = int(statm.read().split()[1]) * resource.getpagesize()
    return {"resident": resident, "dirty": threading.active_count() > 2 or _left_behind()}


def _left_behind() -> bool:
    """Whether the run left a process: a child of this one, or an orphan that the warden inherited."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return True
    except ChildProcessError:
        pass
    warden = os.getppid()
    try:
        with open(f"/proc/{warden}/task/{warden}/children", "rb") as children:
            return len(children.read().split()) > 1
    except OSError:  # a kernel without that file: the warden still ends them together with this worker
        return False


def _limit(memory: int) -> None:
    """Limits for the life of this process, and for every process that a script starts."""
    with open("/proc/self/statm", "rb") as statm:
        idle = int(statm.read().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, idle + ALLOWANCE + memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
    ):
        limit(kind, most)


def main(channel: socket.socket, memory: int) -> NoReturn:
    """Serve for ever, with ``memory`` bytes for scripts."""
    sys.dont_write_bytecode = True
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # a crash keeps what was printed
    faulthandler.enable()
    pipe = Pipe(channel)
    _limit(memory)
    gc.freeze()
    pipe.send('{"op":"ready"}')
    Worker(pipe).serve()
