"""Built-in triggers that only await `http`, in the service's own loop."""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections.abc import Mapping
from pathlib import Path

from watcher import context
from watcher.context import Host, LoopContext
from watcher.errors import TriggerError
from watcher.scripts.calls import Call, Described
from watcher.scripts.entries import Picked
from watcher.scripts.frames import load as parse
from watcher.scripts.listing import Row, Sink, drain
from watcher.scripts.loading import Loaded, failure, load, read, version
from watcher.values import Entry, Json, Listing, ScriptSettings, StepResult


def wants_loop(script: Path) -> bool:
    """Whether the text of a script says ``@trigger(…, loop=True)``: known without running it."""
    try:
        tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    return any(
        keyword.arg == "loop" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        for node in tree.body
        if isinstance(node, ast.AsyncFunctionDef) and node.name == "main"
        for call in node.decorator_list
        if isinstance(call, ast.Call)
        for keyword in call.keywords
    )


class Loop:
    """The runtime of built-ins that say ``loop=True``. Their modules are loaded once, and again when edited."""

    def __init__(self, settings: ScriptSettings) -> None:
        self._settings = settings
        self._loaded: dict[Path, tuple[tuple[int, int, int], Loaded]] = {}

    async def describe(self, script: Path) -> Described:
        loaded = self._load(script)
        return Described(
            loaded.label, loaded.doc, loaded.arguments.schema(), loaded.arguments.takes_since,
            inspect.isasyncgenfunction(loaded.main),
        )  # fmt: skip

    async def check(self, script: Path, args: Mapping[str, Json]) -> None:
        self._load(script).arguments.bind(args)

    async def call(self, call: Call, host: Host) -> Listing:
        loaded = self._load(call.script)
        found: list[Entry] = []
        turned = 0

        def keep(row: Row) -> None:
            found.append(Entry(parse(row[2]), row[0], row[1]))

        async def turn() -> bool:
            nonlocal turned
            page, turned = found[turned:], len(found)
            sink.waiting = 0
            return await host.page(page)

        reach = LoopContext(
            host, state=call.state, state_path=call.state_path, workspace=call.workspace, job_id=call.job_id
        )
        seconds, unchanged = call.timeout.total_seconds(), False
        try:
            picked = Picked(loaded.marked, call.key, call.cursor)
            sink = Sink(picked, self._settings.max_items, self._settings.max_result, keep)
            with context.use(reach):
                async with asyncio.timeout(seconds) as limit:
                    result = loaded.main(**loaded.arguments.bind(call.args, call.since))
                    await reach.closing(drain(result, sink, turn))
        except context.Unchanged:
            unchanged = True
        except Exception as error:
            if isinstance(error, TimeoutError) and limit.expired():
                message = f"{call.script.name} did not finish within {seconds:g} s: give it a longer timeout"
                raise TriggerError(message, kind="timeout") from None
            raise failure(error, call.script) from error
        complete, capped = sink.complete and not reach.capped, sink.capped or reach.capped
        return Listing(
            loaded.label, () if unchanged else found, unchanged, complete, capped, reach.staged,
            warnings=picked.warnings(), gap=reach.gap,
        )  # fmt: skip

    async def step(self, call: Call, host: Host) -> StepResult:
        raise TriggerError(f"{call.script.name} is a trigger, and no step of a flow", kind="arguments")

    def _load(self, script: Path) -> Loaded:
        now = version(script)
        known = self._loaded.get(script)
        if known and known[0] == now:
            return known[1]
        try:
            loaded = load(read(script))
        except Exception as error:
            raise failure(error, script) from error
        self._loaded[script] = now, loaded
        return loaded
