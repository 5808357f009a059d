"""Python environments that scripts ask for: resolved once by uv, locked, made once, used without it from then on."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from watcher.errors import TriggerError
from watcher.scripts.command import Command
from watcher.scripts.dependencies import Needs, metadata, needs
from watcher.scripts.engines import find
from watcher.scripts.loading import Version, read, version
from watcher.scripts.process import HARMLESS

TIME_TO_MAKE = 900.0  # seconds, for all that uv does for one environment
MEMORY = 8 << 30  # bytes for uv and the compilers that it may start
DAY = 86400.0  # seconds
UNUSED = 30 * DAY  # seconds after which an environment that nobody used is removed
_READY = "ready"  # a file in an environment that is complete; its time is that of the last use
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")


class Environments:
    """All environments below one folder, one per set of requirements; scripts that need the same share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Path, tuple[tuple[Version, ...], str]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def of_script(self, script: Path) -> str:
        """The interpreter that a script needs: the service's own unless it asks for something.

        Makes the environment the first time, which may take minutes. TriggerError says what uv said.
        """
        now = (version(script), *_versions(script))
        known = self._known.get(script)
        if known is None or known[0] != now or not _in_use(known[1]):
            wanted = needs(script, read(script).text)
            python = sys.executable if wanted is None else await self._python(wanted, script.name)
            known = self._known[script] = now, python
        return known[1]

    async def of_requirements(self, requirements: list[str], what: str) -> Path:
        """The folder of the programs (``bin``) of an environment with these requirements."""
        return Path(await self._python(Needs(metadata(requirements)), what)).parent

    async def _python(self, wanted: Needs, what: str) -> str:
        digest = _digest(wanted)
        folder = self._folder / "python" / digest
        async with self._locks.setdefault(digest, asyncio.Lock()):
            if not (folder / _READY).exists():
                folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                async with _alone(folder.with_name(f"{digest}.lock")):
                    if not (folder / _READY).exists():
                        await self._make(wanted, folder, what)
        python = str(folder / "venv" / "bin" / "python")
        _in_use(python)
        return python

    async def _make(self, wanted: Needs, folder: Path, what: str) -> None:
        from watcher import log  # not at the top: workers load this module's package, and structlog is heavy

        logger = log.get("scripts")
        uv = find_uv()
        if uv is None:
            raise TriggerError(
                f"{what} asks for packages of its own, which uv installs, and there is no uv: "
                "install change-watcher[scripts], or uv itself",
                kind="missing",
            )
        logger.info("environment.making", script=what, folder=str(folder))
        began = time.monotonic()
        await asyncio.to_thread(_prepare, folder, wanted)
        offline = bool(wanted.lock or wanted.pinned) or (folder / "script.py.lock").exists()
        try:
            async with asyncio.timeout(TIME_TO_MAKE):
                if not (offline and await self._try(uv, folder, wanted)):
                    await self._steps(uv, folder, wanted, what, {})
        except TimeoutError:
            raise TriggerError(f"{what}: uv did not finish within {TIME_TO_MAKE:g} s", kind="timeout") from None
        (folder / _READY).touch()
        logger.info("environment.ready", script=what, seconds=round(time.monotonic() - began, 1))
        await asyncio.to_thread(_sweep, folder.parent, time.time() - UNUSED)
        await asyncio.to_thread(hand_over, self._folder)

    async def _try(self, uv: str, folder: Path, wanted: Needs) -> bool:
        """Whether what is in uv's cache is enough."""
        try:
            await self._steps(uv, folder, wanted, "", {"UV_OFFLINE": "1"})
        except TriggerError:
            return False
        return True

    async def _steps(self, uv: str, folder: Path, wanted: Needs, what: str, env: Mapping[str, str]) -> None:
        script, listed, venv = str(folder / "script.py"), str(folder / "requirements.txt"), str(folder / "venv")
        python = ["--python", sys.executable] if "requires-python" not in wanted.metadata else []
        steps: list[list[str]] = []
        if not wanted.pinned:
            if not wanted.lock:
                steps.append(["lock", *python, "--script", script])
            steps.append(["export", *python, "--locked", "--no-header", "--script", script, "-o", listed])
        steps.append(["venv", "--clear", *(python or _range(wanted)), venv])
        steps.append(["pip", "sync", "--allow-empty-requirements", "--python", f"{venv}/bin/python", listed])
        for step in steps:
            await self._uv([uv, "--quiet", "--no-progress", *step], folder, what, env)

    async def _uv(self, command: list[str], folder: Path, what: str, env: Mapping[str, str]) -> None:
        process = await Command.start(
            command, memory=MEMORY, cpu=TIME_TO_MAKE * (os.cpu_count() or 1), env={**self._env(), **env}, cwd=folder
        )
        try:
            await process.talk(b"", 1 << 24)
        finally:
            how = await process.kill()
        if how != "exited 0":
            said = process.logs().strip()
            first = next((line.strip() for line in said.splitlines() if line.strip(" ×│├╰▶─")), how)
            raise TriggerError(f"{what}: uv {command[3]}: {first[:500]}", kind="missing", detail=said[-8192:])

    def _env(self) -> dict[str, str]:
        """uv is the service's own program: it sees its own settings, the proxies, and what is harmless."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in HARMLESS or name.startswith("UV_") or name.upper() in _PROXIES
        }
        ours = {"UV_CACHE_DIR": str(self._folder / "uv"), "UV_PYTHON_DOWNLOADS": "never"}
        return {"PATH": os.defpath, **kept, **ours}


def hand_over(folder: Path) -> None:
    """Give what root made (`watcher check`, run by an administrator) to whom the directory above belongs."""
    if os.geteuid() != 0:
        return
    owner = folder.parent.stat()
    if owner.st_uid == 0:
        return
    for path in (folder, *folder.rglob("*")):
        with suppress(OSError):
            os.lchown(path, owner.st_uid, owner.st_gid)


def find_uv() -> str | None:
    """The uv of the package, else one on the PATH."""
    with suppress(ImportError, FileNotFoundError):
        from uv import find_uv_bin

        return str(find_uv_bin())
    return find("uv")


def _in_use(python: str) -> bool:
    """Whether an interpreter is still there; if so, its environment counts as used today."""
    if python == sys.executable:
        return True
    ready = Path(python).parent.parent.parent / _READY
    try:
        if ready.stat().st_mtime < time.time() - DAY:
            os.utime(ready)
    except OSError:
        return False
    return True


def _range(wanted: Needs) -> list[str]:
    import tomllib

    asked = tomllib.loads(wanted.metadata).get("requires-python")
    return ["--python", str(asked)] if asked else []


def _versions(script: Path) -> list[Version]:
    """Of the lock files beside a script, since they too decide what it gets."""
    found = []
    for name in (script.name + ".lock", script.stem + ".script.lock"):
        with suppress(TriggerError):
            found.append(version(script.with_name(name)))
    return found


def _digest(wanted: Needs) -> str:
    """Another interpreter makes another environment: an upgrade of Python needs no cleaning up."""
    about = "\0".join((wanted.metadata, wanted.lock, wanted.pinned, sys.version, sys.executable))
    return hashlib.sha256(about.encode()).hexdigest()[:20]


def _prepare(folder: Path, wanted: Needs) -> None:
    """A folder without the remains of an attempt that was interrupted; a lock that was made stays."""
    shutil.rmtree(folder / "venv", ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    block = "\n".join(f"# {line}" if line else "#" for line in wanted.metadata.splitlines())
    (folder / "script.py").write_text(f"# /// script\n{block}\n# ///\n", encoding="utf-8")
    if wanted.lock:
        (folder / "script.py.lock").write_text(wanted.lock, encoding="utf-8")
    if wanted.pinned:
        (folder / "requirements.txt").write_text(wanted.pinned, encoding="utf-8")


def _sweep(folder: Path, before: float) -> None:
    """Remove what nobody has used for long."""
    for ready in folder.glob(f"*/{_READY}"):
        with suppress(OSError):
            if ready.stat().st_mtime < before:
                ready.unlink()  # first: what is half gone must not look complete
                shutil.rmtree(ready.parent, ignore_errors=True)


@asynccontextmanager
async def _alone(file: Path) -> AsyncIterator[None]:
    """Keep other processes from making the same thing at the same time."""
    with file.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(0.1)
        yield
