"""Trigger scripts and flow steps: found, described, called, each by the runtime that its file needs."""

from __future__ import annotations

import asyncio
import difflib
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from watcher.context import Host
from watcher.errors import TriggerError
from watcher.scripts.calls import Call, Described, Runtime
from watcher.scripts.environments import Environments
from watcher.scripts.executable import Executable
from watcher.scripts.loading import Version, version
from watcher.scripts.loop import Loop, wants_loop
from watcher.scripts.pool import Pool
from watcher.scripts.python import Python
from watcher.scripts.shared import sweep
from watcher.scripts.typescript import SUFFIXES, TypeScript
from watcher.values import Json, Listing, ScriptSettings, StepResult

__all__ = ["Call", "Described", "Runtime", "Scripts", "builtins"]


def builtins() -> Path:
    """The folder of the triggers that come with watcher: inside the package once installed, beside it in a clone."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "triggers"
    return inside if inside.is_dir() else package.parent / "triggers"


class Scripts:
    """Every way to run a script, and which file is run how."""

    def __init__(self, settings: ScriptSettings, *, triggers: Path | None = None, data: Path | None = None) -> None:
        """``data``: the service's directory, where what scripts ask for is kept; else the user's cache."""
        self.triggers = (triggers or builtins()).resolve()
        kept = (data or _cache()) / "scripts"
        self._pool = Pool(settings)
        self._loop = Loop(settings)
        self._environments = Environments(kept)
        self._python = Python(settings, self._pool, self._environments)
        self._typescript = TypeScript(settings, self._pool, kept)
        self._executable = Executable(settings, self._pool)
        self._wants_loop: dict[Path, tuple[Version, bool]] = {}
        self._describing: dict[Path, asyncio.Lock] = {}
        self._described: dict[Path, tuple[Version, Described]] = {}

    async def start(self) -> None:
        """Nothing is started before it is needed; what a killed process left behind is removed."""
        await asyncio.to_thread(sweep)

    async def close(self) -> None:
        """End every worker process, and whatever the scripts in them started."""
        await self._pool.close()

    def locate(self, trigger: str, base: Path) -> Path:
        """The file of a trigger: a built-in's name, or a path relative to ``base``. TriggerError says what exists."""
        return locate(trigger, base, self.triggers)

    async def describe(self, script: Path) -> Described:
        """What a script says of itself; asked anew only when the file was edited."""
        async with self._describing.setdefault(script, asyncio.Lock()):  # a hundred watchers may start with one script
            now = version(script)
            known = self._described.get(script)
            if known is None or known[0] != now:
                known = self._described[script] = now, await self._runtime(script).describe(script)
            return known[1]

    async def check(self, script: Path, args: Mapping[str, Json]) -> None:
        """Raise TriggerError of kind ``arguments``, with every mistake, if main would not take these."""
        await self._runtime(script).check(script, await self._with_tap(script, args))

    async def call(self, call: Call, host: Host) -> Listing:
        """Run a trigger once."""
        args = await self._with_tap(call.script, call.args)
        return await self._runtime(call.script).call(call if args is call.args else replace(call, args=args), host)

    async def step(
        self,
        script: Path,
        args: Json,
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: timedelta = timedelta(hours=1),  # noqa: ASYNC109 -- kept by the runtime, which also kills
        host: Host,
    ) -> StepResult:
        """Run one step of a flow. Its main is given what it names of ``args``; all of it if it takes one argument."""
        shared = None if cwd is None else lambda: cwd / "shared"
        call = Call(script, args, env=env or {}, timeout=timeout, cwd=cwd, shared=shared)
        return await self._runtime(script).step(call, host)

    async def _with_tap(self, script: Path, args: Mapping[str, Json]) -> Mapping[str, Json]:
        """The arguments of the built-in for Singer taps, its tap installed; those of any other script as they are."""
        listed, tap = args.get("requirements"), args.get("tap")
        if script != self.triggers / "singer.py" or not listed or not isinstance(listed, list) or not tap:
            return args
        programs = await self._environments.of_requirements(list(map(str, listed)), str(tap))
        return {**args, "tap": str(programs / str(tap))}

    def _runtime(self, script: Path) -> Runtime:
        """The runtime that a file needs. Another language is another line here."""
        if script.suffix == ".py":
            return self._loop if self.in_loop(script) else self._python
        if script.suffix in SUFFIXES:
            return self._typescript
        if os.access(script, os.X_OK):
            return self._executable
        version(script)  # one that is not there at all says so
        raise TriggerError(
            f"{script.name}: nothing here can run it: scripts end in .py, .ts or .js; "
            f"any other program must be executable (chmod +x {script.name})",
            kind="missing",
        )

    def in_loop(self, script: Path) -> bool:
        """Whether a script runs in our own loop. Built-ins alone may: they could block every other watcher."""
        if script.resolve().parent != self.triggers:
            return False
        now = version(script)
        known = self._wants_loop.get(script)
        if known is None or known[0] != now:
            known = self._wants_loop[script] = now, wants_loop(script)
        return known[1]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "watcher"


def locate(trigger: str, base: Path, triggers: Path | None = None) -> Path:
    """As `Scripts.locate`, without a service."""
    folder = triggers or builtins()
    if "/" in trigger or trigger.endswith(".py"):
        path = (base / trigger).resolve()
        if path.is_file():
            return path
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.*")], 1)
        hint = f" (did you mean {path.parent / near[0]}?)" if near else ""
        raise TriggerError(f"no such script: {path}{hint}", kind="missing")
    path = folder / f"{trigger}.py"
    names = sorted(p.stem for p in folder.glob("*.py"))
    if trigger in names:
        return path
    near = difflib.get_close_matches(trigger, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names) or 'none'}; a file is ./{trigger}.py"
    raise TriggerError(f"no such trigger: {trigger} ({hint})", kind="missing")
