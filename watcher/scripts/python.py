"""Python scripts in warm worker processes that can be killed, each in the environment that it asks for."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from watcher.context import Host, Keeper
from watcher.errors import TriggerError
from watcher.http import FetchOptions
from watcher.scripts.calls import Call, Described
from watcher.scripts.ends import death, processor_time, too_slow
from watcher.scripts.entries import entries
from watcher.scripts.environments import Environments
from watcher.scripts.frames import FrameError
from watcher.scripts.pool import GROWTH, Pool
from watcher.scripts.process import Died, Process
from watcher.values import UNSET, Entry, Json, Label, Listing, Request, ScriptSettings, StepResult

WATCH = 0.25  # seconds after which a run's processes are counted and weighed
AT_ONCE = 64  # requests of one script that are in the works
TIME_TO_DESCRIBE = timedelta(seconds=30)

Message = dict[str, Any]


class Python:
    """The runtime of ``*.py``."""

    def __init__(self, settings: ScriptSettings, pool: Pool, environments: Environments) -> None:
        self._settings = settings
        self._pool = pool
        self._environments = environments

    async def describe(self, script: Path) -> Described:
        done = await self._ask("describe", Call(script, timeout=TIME_TO_DESCRIBE), _Nobody())
        facts = done.message
        try:
            return Described(
                _label(facts["label"], facts["doc"]),
                facts["doc"],
                facts["schema"],
                facts["takes_since"],
                facts["pages"],
            )
        except (KeyError, TypeError) as error:
            raise _not_ours(script) from error

    async def check(self, script: Path, args: Mapping[str, Json]) -> None:
        await self._ask("check", Call(script, args, timeout=TIME_TO_DESCRIBE), _Nobody())

    async def call(self, call: Call, host: Host) -> Listing:
        done = await self._ask("call", call, host)
        facts = done.message
        try:
            return Listing(
                label=_label(facts["label"], ""),
                entries=done.entries,
                unchanged=bool(facts["unchanged"]),
                complete=bool(facts["complete"]),
                capped=bool(facts["capped"]),
                gap=str(facts["gap"]),
                state=facts.get("state", UNSET),
                logs=done.logs,
                warnings=tuple(map(str, facts["warnings"])),
            )
        except (KeyError, TypeError) as error:
            raise _not_ours(call.script) from error

    async def step(self, call: Call, host: Host) -> StepResult:
        done = await self._ask("step", call, host)
        return StepResult(done.message.get("result"), done.logs)

    async def _ask(self, op: str, call: Call, host: Host) -> _Talk:
        """One order to one worker, from finding it to judging it afterwards."""
        seconds = call.timeout.total_seconds()
        interpreter = await self._environments.of_script(call.script)
        async with self._pool.process(call.script, call.memory_limit, seconds, interpreter) as process:
            talk = _Talk(process, call, host, self._settings)
            order = self._order(op, call) | {"kept": talk.keeper is not None}
            loop = asyncio.get_running_loop()
            watching = loop.call_later(WATCH, process.watch)
            try:
                async with asyncio.timeout(seconds) as limit:
                    await talk.hold(order)
            except TimeoutError:
                if not limit.expired():
                    raise  # the service's own trouble
                await process.kill()
                raise too_slow(call, process.logs()) from None
            except Died as died:
                logs = process.logs()
                message, kind = death(died.how, call)
                raise TriggerError(message, kind=kind, detail=logs[-8192:], logs=logs) from None
            except FrameError as error:
                await process.kill()
                raise _not_ours(call.script, str(error)) from error
            finally:
                watching.cancel()
            if watching.when() <= loop.time():
                process.unwatch()
            talk.logs = process.logs()
            process.fit = _fit(process, talk.message)
            if talk.message["op"] == "failed":
                raise _failed(talk)
            return talk

    def _order(self, op: str, call: Call) -> Message:
        order = {
            "op": op, "script": str(call.script), "args": call.args, "since": call.since,
            "key": call.key, "cursor": call.cursor, "state_path": call.state_path, "workspace": call.workspace,
            "job_id": call.job_id, "env": dict(call.env), "cwd": str(call.cwd) if call.cwd else None,
            "cpu": math.ceil(processor_time(call)),
            "max_items": self._settings.max_items, "max_bytes": self._settings.max_result,
        }  # fmt: skip
        return order if call.state is UNSET else {**order, "state": call.state}


class _Talk:
    """The exchange of one run: what the script asks is answered, what it lists is gathered. It is never trusted."""

    def __init__(self, process: Process, call: Call, host: Host, settings: ScriptSettings) -> None:
        self.message: Message = {}
        self.entries: list[Entry] = []
        self.logs = ""
        self._process = process
        self._shared = call.shared
        self._host = host
        self.keeper: Keeper | None = cast(Keeper, host) if hasattr(host, "stage") else None
        self._settings = settings
        self._page: list[Entry] = []
        self._answering: set[asyncio.Task[None]] = set()

    async def hold(self, order: Message) -> None:
        """From the order until the worker is done. Raises Died, FrameError, or TriggerError of kind ``too_large``."""
        self._process.received = 0
        try:
            await self._process.send(order)
            while True:
                message, blob = await self._process.receive()
                try:
                    if await self._take(message, blob):
                        return
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise FrameError(f"an unexpected message: {error!r}") from error
        finally:
            for task in self._answering:
                task.cancel()
            await asyncio.gather(*self._answering, return_exceptions=True)

    async def _take(self, message: Message, blob: bytes) -> bool:
        """Deal with one message; True after the last."""
        match message["op"]:
            case "page":
                await self._entries(message)
            case "fetch" | "resource" | "variable" | "state" | "stage" | "shared":
                if len(self._answering) >= AT_ONCE:
                    await asyncio.wait(self._answering, return_when=asyncio.FIRST_COMPLETED)
                task = asyncio.create_task(self._answer(message, blob))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
            case "done" | "failed":
                self.message = message
                return True
            case other:
                raise FrameError(f"an unknown message: {other!r:.40}")
        return False

    async def _entries(self, message: Message) -> None:
        new = entries(message["entries"])
        self.entries += new
        self._page += new
        if len(self.entries) > self._settings.max_items or self._process.received > 2 * self._settings.max_result:
            raise FrameError("more items than were allowed")
        if "id" in message:
            page, self._page = self._page, []
            await self._process.send({"op": "answer", "id": message["id"], "go": await self._host.page(page)})

    async def _answer(self, message: Message, blob: bytes) -> None:
        answer: Message = {"op": "answer", "id": message["id"]}
        body = b""
        try:
            if message["op"] == "fetch":
                asked = message["request"]
                request = Request(str(asked["method"]), str(asked["url"]), dict(asked["headers"]), blob)
                response = await self._host.fetch(request, FetchOptions(**message["options"]))
                answer |= {"status": response.status, "headers": dict(response.headers), "url": response.url}
                body = response.body
            elif message["op"] == "resource":
                answer["value"] = await self._host.resource(str(message["path"]))
            elif message["op"] == "shared":
                if self._shared is None:
                    raise TriggerError("shared: this call has no directory of its own", kind="arguments")
                answer["value"] = str(self._shared())
            elif message["op"] == "state" and self.keeper is not None:
                value = await self.keeper.state(str(message["path"]))
                answer |= {} if value is UNSET else {"value": value}
            elif message["op"] == "stage" and self.keeper is not None:
                await self.keeper.stage(str(message["path"]), message["value"])
            else:
                answer["value"] = await self._host.variable(str(message["path"]))
        except Exception as error:  # whatever it is, the script that asked must hear it, or it would wait for ever
            kind, after = getattr(error, "kind", "raised"), getattr(error, "retry_after", None)
            answer["error"] = {"message": str(error), "kind": kind, "retry_after": after}
        with suppress(Died):  # `hold` sees that too
            await self._process.send(answer, body)


class _Nobody:
    """The host of a script that is only looked at: while it is imported it can ask for nothing."""

    async def fetch(self, request: Request, options: FetchOptions) -> Any:
        raise TriggerError("a script may ask for something in main only, not while it is imported", kind="arguments")

    async def resource(self, path: str) -> Json:
        raise TriggerError("a script may ask for something in main only, not while it is imported", kind="arguments")

    async def variable(self, path: str) -> str:
        raise TriggerError("a script may ask for something in main only, not while it is imported", kind="arguments")

    async def page(self, entries: Any) -> bool:
        return True


def _label(facts: Mapping[str, Any], doc: str) -> Label:
    return Label(**{**facts, "on": tuple(facts["on"]), "doc": doc})


def _fit(process: Process, message: Message) -> bool:
    """Whether the worker may run another script, by what it says of itself."""
    resident = message.get("resident")
    if not isinstance(resident, int) or message.get("dirty") or message.get("kind") == "memory":
        return False
    if not process.first_resident:
        process.first_resident = resident
    return resident <= process.first_resident + GROWTH


def _failed(talk: _Talk) -> TriggerError:
    message = talk.message
    after = message.get("retry_after")
    return TriggerError(
        str(message.get("message")),
        kind=str(message.get("kind")),
        detail=str(message.get("detail"))[:8192],
        retry_after=float(after) if isinstance(after, int | float) else None,
        logs=talk.logs,
    )


def _not_ours(script: Path, why: str = "") -> TriggerError:
    return TriggerError(
        f"{script.name} wrote into watcher's own channel{f' ({why})' if why else ''}: "
        "a script must leave alone the files that it has not opened",
        kind="junk",
    )
