"""Windmill's own clients, unmodified, in processes of their own, with the environment of a job that really runs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import secrets
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.service import Service
from watcher.scripts import engines
from watcher.store import migrate, tokens
from watcher.store.db import Database

NEWEST = "1.850.0"
VERSIONS = (NEWEST, "1.460.0", "1.297.0")
OLDEST = "1.60.0"
"""By its old endpoints: ``get`` instead of ``get_value_interpolated``, and all of `windmill_api` around it."""
NPM = "1.818.0"
BUN = "1.4.4"
OLDER_NPM = ("1.623.0", "1.394.6", "1.339.1")

CACHE = Path(os.environ.get("WATCHER_TEST_CACHE") or Path(__file__).parent.parent / ".cache")


def client(version: str) -> Path:
    """A folder with this version of wmill and what it needs, from PyPI the first time. Skips without a registry."""
    folder = CACHE / f"wmill-{version}"
    if not folder.exists():
        part = CACHE / f"wmill-{version}.{os.getpid()}.part"
        _fetch([*_installer(), "--target", str(part), f"wmill=={version}"])
        _settle(part, folder)
    return folder


def npm_client() -> Path:
    """A folder with node_modules/windmill-client, from npm the first time. Skips without npm."""
    folder = CACHE / f"windmill-client-{NPM}"
    if not folder.exists():
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed: deno runs the same client in other tests")
        part = CACHE / f"windmill-client-{NPM}.{os.getpid()}.part"
        part.mkdir(parents=True)
        (part / "package.json").write_text("{}")
        _fetch(["npm", "install", "--silent", "--prefix", str(part), f"windmill-client@{NPM}"])
        _settle(part, folder)
    return folder


def deno() -> str:
    """A deno binary: the environment's, the machine's, or that of PyPI's package."""
    if found := engines.find("deno"):
        return found
    folder = CACHE / "deno"
    if not folder.exists():
        part = CACHE / f"deno.{os.getpid()}.part"
        _fetch([*_installer(), "--target", str(part), "deno"])
        _settle(part, folder)
    binary = folder / "bin" / "deno"
    binary.chmod(0o755)
    return str(binary)


def bun() -> Path:
    """The folder of a bun binary, which npm has as a package and deno can install."""
    package = f"@oven/bun-linux-{'aarch64' if platform.machine() == 'aarch64' else 'x64-baseline'}"
    folder = CACHE / "bun"
    if not folder.exists():
        part = CACHE / f"bun.{os.getpid()}.part"
        part.mkdir(parents=True)
        (part / "package.json").write_text(json.dumps({"dependencies": {package: BUN}}))
        _fetch([deno(), "install", "--quiet"], _deno_env(os.environ), cwd=part)
        _settle(part, folder)
    return folder / "node_modules" / package / "bin"


def _deno_env(env: Mapping[str, str]) -> dict[str, str]:
    return {
        **_bare(env),
        **network(),
        "DENO_DIR": str(CACHE / "deno-dir"),
        "DENO_NO_UPDATE_CHECK": "1",
        "NO_COLOR": "1",
    }


def network() -> dict[str, str]:
    """What this machine needs to reach the package indexes."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("SSL_CERT", "UV_INDEX", "UV_DEFAULT", "NPM_CONFIG", "NODE_EXTRA", "PIP_"))
        or name.upper().endswith("_PROXY")
    }


def _installer() -> list[str]:
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    if Path(uv).exists():
        return [uv, "pip", "install", "-q", "--python", sys.executable]
    return [sys.executable, "-m", "pip", "install", "-q", "--no-input"]


def _fetch(command: list[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
    """Have a package from its registry. Without one the test is skipped, and fails where CI=true promises it."""
    CACHE.mkdir(exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env, cwd=cwd)
    if done.returncode != 0:
        missing = f"{command[0]}: not to be had here: {done.stderr.strip()[-300:]}"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)


def _settle(part: Path, folder: Path) -> None:
    try:
        part.rename(folder)
    except OSError:  # another worker was faster
        shutil.rmtree(part)


# --- a service with one watcher whose run waits until the test lets it go ---------------------------------------------

WAITING = """
import json, os, time
from pathlib import Path

HERE = Path(__file__).parent

def main():
    (HERE / "env.tmp").write_text(json.dumps(dict(os.environ)))
    (HERE / "env.tmp").replace(HERE / "env.json")
    while not (HERE / "go").exists():
        time.sleep(0.01)
    found = json.loads((HERE / "go").read_text())
    (HERE / "go").unlink()
    if found == "fail":
        raise RuntimeError("the source is gone")
    return found
"""

CONFIG = """
database = "sqlite:///{where}/watcher.db"
[server]
bind = "127.0.0.1:{port}"
[flows.sink]
url = "http://127.0.0.1:9/"
[flows.add]
steps = ["add.py"]
[flows.slow]
steps = ["slow.py"]
[flows.broken]
steps = ["broken.py"]
[watchers.waiting]
trigger = "./waiting.py"
cron = "0 0 29 2 *"
flow = "sink"
timeout = "100s"
[watchers.plain]
trigger = "./plain.py"
first_run = "all"
cron = "0 0 29 2 *"
flow = "sink"
[resources."u/admin/fixed"]
type = "github"
value = { token = "$env:FIXED_TOKEN" }
[variables]
"u/admin/fixed" = "written in the file"
"""

SCRIPTS = {
    "waiting.py": WAITING,
    "plain.py": "def main():\n    return [{'id': 1}]\n",
    "add.py": "def main(a, b=0):\n    return {'sum': a + b}\n",
    "slow.py": "import time\ndef main():\n    time.sleep(30)\n",
    "broken.py": "def main():\n    raise ValueError('no such luck')\n",
    "f/tools/double.py": "def main(n: int):\n    return n * 2\n",
}


@dataclass
class Place:
    """A running service, and a job of its watcher ``waiting`` that goes on until `let_go`."""

    service: Service
    env: dict[str, str]

    @property
    def where(self) -> Path:
        return self.service.where

    async def job(self) -> dict[str, str]:
        """Start a run of ``waiting`` by a webhook; its environment."""
        (self.where / "env.json").unlink(missing_ok=True)
        self.nudge = await self.api("POST", "jobs/run/p/waiting", {})
        for _ in range(3000):
            if (self.where / "env.json").exists():
                self.env = json.loads((self.where / "env.json").read_text())
                return self.env
            await asyncio.sleep(0.01)  # another process: there is nothing to await
        raise AssertionError(f"the run did not begin:\n{self.service.tail()}")

    async def let_go(self, found: Any = ()) -> dict[str, Any]:
        """Let the run return these items (or ``fail``); how the job ended, as get_result_maybe says it."""
        draft = self.where / "go.tmp"
        draft.write_text(json.dumps(found))
        draft.replace(self.where / "go")
        for _ in range(3000):
            maybe = json.loads(await self.api("GET", f"jobs_u/completed/get_result_maybe/{self.nudge}"))
            if maybe["completed"]:
                return dict(maybe)
            await asyncio.sleep(0.01)
        raise AssertionError(f"the run did not end:\n{self.service.tail()}")

    async def api(self, method: str, path: str, body: Any = None, *, token: str | None = None, want: int = 0) -> str:
        """One request with the operator's token, or another one; ``want``: the status (0: a success)."""
        raw = None if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {token or self.token}", "content-type": "application/json"}
        url = path if path.startswith("/") else f"/api/w/main/{path}"
        status, text = await self.service.ask(method, url, raw, headers)
        assert status == want or (not want and status < 300), f"{method} {path}: {status} {text}"
        return text

    token: str = ""
    nudge: str = ""


@asynccontextmanager
async def place(where: Path, config: str = CONFIG, **environ: str) -> AsyncIterator[Place]:
    """Start the service in ``where``, with an operator's token and nothing running."""
    for name, text in SCRIPTS.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text)
    key = "bm90IGEgc2VjcmV0LCBidXQgMzIgYnl0ZXMgbG9uZyE="
    service = Service(where, config, environ={"FIXED_TOKEN": "ghp_fixed_fixed", "WATCHER_SECRET_KEY": key, **environ})
    (where / "watcher.db").write_bytes(await _fresh_database())
    found = Place(service, {})
    service.start()
    try:
        await service.ready()
        found.token = await _operator(where / "watcher.db")
        yield found
    finally:
        service.kill()


_databases: list[bytes] = []


async def _fresh_database() -> bytes:
    """The file of a database that holds nothing yet: made once, since to make it takes a second."""
    if not _databases:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "watcher.db"
            db = await Database.open(f"sqlite:///{file}")
            await migrate.upgrade(db, backup_to=None, now=datetime.now(UTC))
            await db.close()
            with closing(sqlite3.connect(file)) as whole:
                whole.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            _databases.append(file.read_bytes())
    return _databases[0]


async def _operator(file: Path) -> str:
    """A token that may do everything, as `watcher token create` makes it."""
    token = f"wtc_{secrets.token_urlsafe(32)}"
    db = await Database.open(f"sqlite:///{file}")
    now, digest = datetime.now(UTC), hashlib.sha256(token.encode()).digest()
    await db.write(lambda tx: tokens.create(tx, digest, token[:10], now, label="tests", scopes=("*",), expires_at=None))
    await db.close()
    return token


@dataclass(frozen=True)
class Said:
    """What a client's process printed as its last line, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out.strip().splitlines()[-1])


async def python(version: str, code: str, env: Mapping[str, str], seconds: float = 60) -> Said:
    """Run Python code with this version of wmill. ``show(value)`` prints what `Said.value` reads."""
    prelude = "import json\ndef show(value): print(json.dumps(value))\n"
    environment = {**_bare(env), "PYTHONPATH": str(client(version)), "PYTHONWARNINGS": "ignore"}
    return await _run([sys.executable, "-c", prelude + textwrap.dedent(code)], environment, seconds)


async def node(code: str, env: Mapping[str, str], seconds: float = 60) -> Said:
    """Run JavaScript with windmill-client under node. ``wmill`` is its default export, ``show(value)`` prints."""
    binary = shutil.which("node")
    if binary is None:
        pytest.skip("node is not installed")
    return await _run([binary, "--input-type=module", "-e", _module(code)], _bare(env), seconds, cwd=npm_client())


async def on_deno(code: str, env: Mapping[str, str], seconds: float = 60, version: str = NPM) -> Said:
    """The same under deno, with any version of windmill-client."""
    program = deno()
    package = f"npm:windmill-client@{version}"
    ready = CACHE / f"{package.replace(':', '-')}.ready"
    if not ready.exists():
        _fetch([program, "cache", "--quiet", "--no-config", "--no-lock", package], _deno_env(env))
        ready.touch()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "script.mjs"
        file.write_text(_module(code).replace('"windmill-client"', json.dumps(package)))
        options = ["--quiet", "--no-config", "--no-lock", "--cached-only", "--node-modules-dir=none"]
        return await _run([program, "run", "-A", *options, str(file)], _deno_env(env), seconds)


def _module(code: str) -> str:
    return (
        'import wmill, * as named from "windmill-client";\n'
        "const show = (value) => console.log(JSON.stringify(value === undefined ? 'undefined' : value));\n"
        "const failure = async (work) => "
        "{ try { await work(); return null } catch (e) { return String(e.message ?? e) } };\n" + textwrap.dedent(code)
    )


def _bare(env: Mapping[str, str]) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": env.get("HOME", "/"), **{k: v for k, v in env.items() if k != "HOME"}}


async def _run(command: list[str], env: Mapping[str, str], seconds: float, cwd: Path | None = None) -> Said:
    process = await asyncio.create_subprocess_exec(
        *command,
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return Said(process.returncode, out.decode(), err.decode())
