"""Which worker process serves which script: warm ones kept, room shared so that hung scripts starve no other."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

from watcher.errors import TriggerError
from watcher.scripts.process import Child, Process, environment
from watcher.scripts.shared import looks_for_shared
from watcher.values import ScriptSettings

SLOW = 0.5  # seconds after which a run no longer counts against [scripts] workers: it waits or hangs, others go on
OVERFLOW = 4  # times [scripts] workers: how many may run in all, the slow ones included
IDLE = 600.0  # seconds after which an unused worker is ended
GROWTH = 64 * 1024 * 1024  # bytes that a worker may grow after its first run
FRAME = 1024 * 1024  # bytes that a message may be longer than the largest result


Ran = TypeVar("Ran", bound=Child)

_Use = tuple[Path, int, str, bool]
"""What a worker can be used for again: a script, a memory limit, an interpreter, and whether it sees ``/shared``."""


class Pool:
    """Worker processes, each bound to one script file."""

    def __init__(self, settings: ScriptSettings) -> None:
        self.settings = settings
        self.env = environment(os.environ, settings.environment)
        self._idle: list[tuple[_Use, Process]] = []  # oldest first
        self._busy: set[Child] = set()
        self._swift = asyncio.Semaphore(settings.workers)
        self._all = asyncio.Semaphore(settings.workers * OVERFLOW)
        self._of_script: dict[Path, asyncio.Semaphore] = {}
        self._inside: list[Path] = []  # scripts that have room, their process started or not
        self._ending: set[asyncio.Task[str]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False  # no worker is kept any more

    @asynccontextmanager
    async def process(
        self, script: Path, memory: int, patience: float, interpreter: str = sys.executable
    ) -> AsyncIterator[Process]:
        """A worker for one run. It is killed afterwards unless the run set ``fit``.

        TriggerError of kind ``timeout`` when no room is found within ``patience`` seconds.
        """
        shared = looks_for_shared(script)
        use = script, memory, interpreter, shared
        async with self._room(script, patience):
            process = self._take(use) or await Process.start(
                memory=memory,
                limit=self.settings.max_result + FRAME,
                env=self.env,
                interpreter=interpreter,
                shared=shared,
            )
            process.fit = False
            try:
                with self._counted(script, process):
                    yield process
            finally:
                process.runs += 1
                if self._closed or not process.fit or process.ended or process.runs >= self.settings.max_runs:
                    await process.kill()
                else:
                    self._keep(use, process)

    @asynccontextmanager
    async def command(self, script: Path, patience: float, start: Callable[[], Awaitable[Ran]]) -> AsyncIterator[Ran]:
        """A process for one run that is never used again, with the same claim to room as a worker."""
        async with self._room(script, patience):
            process = await start()
            try:
                with self._counted(script, process):
                    yield process
            finally:
                await process.kill()

    @contextmanager
    def _counted(self, script: Path, process: Child) -> Iterator[None]:
        if self._closed:
            raise TriggerError(f"{script.name} was not run: the service is stopping", kind="crashed")
        self._busy.add(process)
        try:
            yield
        finally:
            self._busy.remove(process)

    @asynccontextmanager
    async def _room(self, script: Path, patience: float) -> AsyncIterator[None]:
        """Room for one more run: of this script (half of all), in all, and among the swift."""
        of_script = self._of_script.setdefault(script, asyncio.Semaphore(max(1, self.settings.workers * OVERFLOW // 2)))
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(patience):
                    for room in (of_script, self._all):
                        await stack.enter_async_context(room)
                    await self._swift.acquire()
            except TimeoutError:
                raise TriggerError(self._full(patience), kind="timeout") from None
            give_back = _once(self._swift.release)
            slow = asyncio.get_running_loop().call_later(SLOW, give_back)
            self._inside.append(script)
            try:
                yield
            finally:
                self._inside.remove(script)
                slow.cancel()
                give_back()

    def _full(self, patience: float) -> str:
        running = sorted({path.name for path in self._inside})
        return (
            f"no worker process was free within {patience:g} s: {len(self._inside)} runs are going on "
            f"({', '.join(running[:5])}): give slow scripts a shorter timeout, or raise [scripts] workers"
        )

    def _take(self, use: _Use) -> Process | None:
        for index in range(len(self._idle) - 1, -1, -1):
            kept, process = self._idle[index]
            if process.ended:
                del self._idle[index]
                self._end(process)
            elif kept == use:
                del self._idle[index]
                return process
        return None

    def _keep(self, use: _Use, process: Process) -> None:
        loop = asyncio.get_running_loop()
        process.idle_since = loop.time()
        self._idle.append((use, process))
        if len(self._idle) > self.settings.workers:
            self._end(self._idle.pop(0)[1])
        if self._sweeper is None:
            self._sweeper = loop.call_later(IDLE, self._sweep)

    def _sweep(self) -> None:
        """End what nobody used for long."""
        loop = asyncio.get_running_loop()
        while self._idle and self._idle[0][1].idle_since <= loop.time() - IDLE:
            self._end(self._idle.pop(0)[1])
        wait = self._idle[0][1].idle_since + IDLE - loop.time() if self._idle else None
        self._sweeper = None if wait is None else loop.call_later(wait + 1, self._sweep)

    def _end(self, process: Child) -> None:
        ending = asyncio.create_task(process.kill())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """End every worker and all that they started. Runs that are going on fail."""
        self._closed = True
        if self._sweeper:
            self._sweeper.cancel()
        idle, self._idle = self._idle, []
        for process in (*(process for _, process in idle), *self._busy):
            self._end(process)
        await asyncio.gather(*self._ending)


def _once(do: Callable[[], None]) -> Callable[[], None]:
    """A callable that does it the first time only."""
    todo = [do]
    return lambda: todo.pop()() if todo else None
