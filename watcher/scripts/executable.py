"""Any executable file: JSON on its standard input, JSON or JSON lines on its standard output, words on the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from watcher.context import Host
from watcher.errors import TriggerError
from watcher.ids import canonical
from watcher.scripts import command, found
from watcher.scripts.calls import Call, Described
from watcher.scripts.marks import HEAD, mark
from watcher.scripts.pool import Pool
from watcher.trigger import Marked
from watcher.values import UNSET, Json, Listing, ScriptSettings, StepResult


class Executable:
    """The runtime of files that can be executed. They take what arguments they like."""

    def __init__(self, settings: ScriptSettings, pool: Pool) -> None:
        self._settings = settings
        self._pool = pool

    async def describe(self, script: Path) -> Described:
        label = _mark(script).label
        schema: dict[str, Json] = {"type": "object", "properties": {}, "additionalProperties": True}
        return Described(label, "", schema, takes_since=label.style == "cursor")

    async def check(self, script: Path, args: Mapping[str, Json]) -> None:
        _mark(script)

    async def call(self, call: Call, host: Host) -> Listing:
        marked = _mark(call.script)
        given = {"args": dict(call.args), "since": call.since, "state": None if call.state is UNSET else call.state}
        ran = await self._run(call, canonical(given))
        return await found.listing(call, marked, self._settings, ran.output, ran.logs, envelope=True)

    async def step(self, call: Call, host: Host) -> StepResult:
        ran = await self._run(call, canonical(call.args))
        return StepResult(found.result(ran.output, call.script.name), ran.logs)

    async def _run(self, call: Call, given: bytes) -> command.Ran:
        ran = await command.run(call, self._pool, [str(call.script)], given, most=self._settings.max_result, env={})
        if ran.status:
            last = next((line.strip() for line in reversed(ran.logs.splitlines()) if line.strip()), "")
            said = f": {last[:500]}" if last else ""
            raise TriggerError(
                f"{call.script.name} ended with status {ran.status}{said}", detail=ran.logs[-8192:], logs=ran.logs
            )
        return ran


def _mark(script: Path) -> Marked:
    try:
        with script.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise TriggerError(f"{script}: cannot read the script: {error.strerror}", kind="missing") from error
    return mark(head.decode("utf-8", "replace"), script.name)
