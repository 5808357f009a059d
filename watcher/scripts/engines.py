"""What runs JavaScript: deno, or bun where there is no deno; each fetches packages its own way and locks them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from watcher.errors import TriggerError
from watcher.scripts.calls import Call
from watcher.scripts.command import Command
from watcher.scripts.process import HARMLESS
from watcher.scripts.shared import places

TIME_TO_FETCH = 600.0  # seconds for all packages of one script, once
MEMORY = 4 << 30  # bytes for doing so
NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
           "NPM_CONFIG_REGISTRY", "DENO_CERT", "DENO_TLS_CA_STORE", "NODE_EXTRA_CA_CERTS")  # fmt: skip


class Engine(Protocol):
    """A program that runs ``run.mjs`` of a folder, in which it also keeps what it needs for that."""

    def env(self) -> Mapping[str, str]:
        """Its own environment variables."""

    async def fetch(self, folder: Path, imports: Mapping[str, str]) -> str:
        """Have everything there that is imported. What it says if that cannot be had; the empty text if it is there.

        ``imports``: what bare names stand for, as ``npm:…`` or ``node:…``.
        """

    def command(self, call: Call, folder: Path) -> list[str]:
        """How to run it for one call, without the network for packages."""


class Deno:
    """With permissions: the network, the script's own folder and the job's shared directory."""

    def __init__(self, program: str, folder: Path) -> None:
        self._program = program
        self._folder = folder

    def env(self) -> Mapping[str, str]:
        return {"DENO_DIR": str(self._folder), "DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}

    async def fetch(self, folder: Path, imports: Mapping[str, str]) -> str:
        (folder / "imports.json").write_text(json.dumps({"imports": dict(imports)}), encoding="utf-8")
        cache = [self._program, "cache", "--quiet", *_deno_options(folder)]
        run = str(folder / "run.mjs")
        known = (folder / "deno.lock").exists()
        if known and not await _done([*cache, "--cached-only", "--frozen", run], folder, self.env()):
            return ""
        return await _done([*cache, run], folder, self.env())

    def command(self, call: Call, folder: Path) -> list[str]:
        shared = places(call)
        heap = max(16, call.memory_limit // (1024 * 1024))
        return [
            self._program, "run", "--quiet", "--no-prompt", "--cached-only", "--frozen", *_deno_options(folder),
            f"--v8-flags=--max-old-space-size={heap}",
            "--allow-net", "--allow-env",  # the environment holds nothing but what the script may see
            f"--allow-read={_paths(call.script.parent, *shared)}",
            *([f"--allow-write={_paths(*shared)}"] if shared else []),
            str(folder / "run.mjs"),
        ]  # fmt: skip


class Bun:
    """Without permissions, which bun does not have."""

    def __init__(self, program: str, folder: Path) -> None:
        self._program = program
        self._folder = folder

    def env(self) -> Mapping[str, str]:
        return {"BUN_INSTALL_CACHE_DIR": str(self._folder), "DO_NOT_TRACK": "1", "NO_COLOR": "1"}

    async def fetch(self, folder: Path, imports: Mapping[str, str]) -> str:
        wanted = dict(_package(name.removeprefix("npm:")) for name in imports.values() if name.startswith("npm:"))
        if not wanted:
            return ""
        package = json.dumps({"dependencies": wanted})
        file = folder / "package.json"
        if file.exists() and file.read_text(encoding="utf-8") == package and (folder / "installed").exists():
            return ""
        file.write_text(package, encoding="utf-8")
        install = [self._program, "install", "--ignore-scripts", "--no-progress", "--silent"]
        said = await _done(install, folder, self.env())
        if not said:
            (folder / "installed").touch()
        return said

    def command(self, call: Call, folder: Path) -> list[str]:
        modules = f"NODE_PATH={folder / 'node_modules'}"
        return ["/usr/bin/env", modules, self._program, "run", "--no-install", "--smol", str(folder / "run.mjs")]


def find(name: str) -> str | None:
    """A program of a package that is installed beside us, else one on the PATH."""
    beside = Path(sysconfig.get_path("scripts")) / name
    return str(beside) if beside.is_file() else shutil.which(name)


def engine(script: Path, folder: Path) -> Engine:
    """What runs a script: deno, or bun, which ``*.bun.ts`` asks for. TriggerError if there is neither."""
    deno, bun = find("deno"), find("bun")
    if bun and (deno is None or ".bun." in script.name):
        return Bun(bun, folder / "bun")
    if deno:
        return Deno(deno, folder / "deno")
    raise TriggerError(
        f"{script.name} is run by deno, and there is none: install change-watcher[typescript], or deno itself",
        kind="missing",
    )


def _deno_options(folder: Path) -> list[str]:
    return [
        "--no-config", "--node-modules-dir=none",
        f"--import-map={folder / 'imports.json'}", f"--lock={folder / 'deno.lock'}",
    ]  # fmt: skip


def _paths(*paths: Path) -> str:
    return ",".join(str(path).replace(",", ",,") for path in paths)


def _package(name: str) -> tuple[str, str]:
    """A package and its version, of what is imported: ``@scope/name@1.2/inside``."""
    scope, _, rest = name.rpartition("@") if "@" in name[1:] else (name, "", "")
    package, version = scope, rest.partition("/")[0] or "*"
    parts = package.split("/")
    return "/".join(parts[: 2 if package.startswith("@") else 1]), version


async def _done(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> str:
    """Run an engine's own command. What it said if it failed, else the empty text."""
    kept = {name: os.environ[name] for name in (*HARMLESS, *NETWORK) if name in os.environ}
    process = await Command.start(
        command, memory=MEMORY, cpu=TIME_TO_FETCH, env={"PATH": os.defpath, **kept, **env}, cwd=folder
    )
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(TIME_TO_FETCH):
                await process.talk(b"", 1 << 20)
    finally:
        how = await process.kill()
    return "" if how == "exited 0" else process.logs().strip() or how
