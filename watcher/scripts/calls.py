"""What is asked of a script and what is known of one, as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from watcher.context import Host
from watcher.values import UNSET, Json, Label, Listing, StepResult, Style

MEMORY = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one trigger's main. References in ``args`` are resolved already."""

    script: Path
    args: Mapping[str, Json] = field(default_factory=dict)
    state: Json = UNSET
    state_path: str = ""
    env: Mapping[str, str] = field(default_factory=dict)  # for this run only: WM_TOKEN and its like
    timeout: timedelta = timedelta(seconds=60)
    cpu_limit: timedelta | None = None  # of each process; None: what all cores could do within ``timeout``
    memory_limit: int = MEMORY  # bytes above an idle worker's own
    key: str | None = None  # JMESPath; before the label's
    cursor: str | None = None
    since: Json = None  # given to a main that declares it: the furthest point reached, None at first
    cwd: Path | None = None  # None: the service's own
    shared: Callable[[], Path] | None = None  # the job's shared directory, which may be made when it is asked for
    workspace: str = "main"
    job_id: str = ""


@dataclass(frozen=True, slots=True)
class Described:
    """What a script says of itself. ``label.key`` is None where the key is a callable."""

    label: Label
    doc: str
    arguments_schema: Mapping[str, Json]  # JSON Schema of an object; resources have the format ``resource-TYPE``
    takes_since: bool = False
    pages: bool = False  # main is a generator

    @property
    def style(self) -> Style:
        return self.label.style


class Runtime(Protocol):
    """One way to run a file. Every method raises TriggerError, and leaves nothing behind that runs."""

    async def describe(self, script: Path) -> Described: ...

    async def check(self, script: Path, args: Mapping[str, Json]) -> None:
        """Raise TriggerError of kind ``arguments`` if main would not take them."""

    async def call(self, call: Call, host: Host) -> Listing: ...

    async def step(self, call: Call, host: Host) -> StepResult:
        """Run main for its result, any JSON value."""
