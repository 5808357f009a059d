"""TypeScript and JavaScript: an exported main, called by deno or bun in a process of its own for each run."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from watcher.context import Host
from watcher.errors import TriggerError
from watcher.ids import canonical
from watcher.scripts import command, found, plain
from watcher.scripts.calls import Call, Described
from watcher.scripts.command import Ran
from watcher.scripts.engines import Engine, engine
from watcher.scripts.environments import hand_over
from watcher.scripts.loading import Version, version
from watcher.scripts.marks import mark
from watcher.scripts.pool import Pool
from watcher.scripts.signature import Signature, imported, signature
from watcher.trigger import Marked
from watcher.values import Json, Label, Listing, ScriptSettings, StepResult

SUFFIXES = (".ts", ".mts", ".tsx", ".js", ".mjs", ".jsx")
RUNTIME = 160 * 1024 * 1024  # bytes that an engine itself takes, above a script's memory limit
LOGS = 1024 * 1024  # bytes that a script may write to its standard output beside its result
FILES = 1000  # that one script may import of its own
SINCE = "since"

_BUILT_IN = (  # modules of Node
    "assert async_hooks buffer child_process cluster console constants crypto dgram diagnostics_channel dns domain "
    "events fs http http2 https inspector module net os path perf_hooks process punycode querystring readline repl "
    "stream string_decoder sys timers tls tty url util v8 vm wasi worker_threads zlib"
)

# Whatever the script prints goes to the log; the result follows a mark that it cannot know beforehand.
_RUNNER = """
import * as script from {script};
import {{ writeSync }} from "node:fs";
import process from "node:process";
const deno = globalThis.Deno;
const text = await new Response(deno ? deno.stdin.readable : Bun.stdin.stream()).text();
const {{ given, mark }} = JSON.parse(text);
for (const name of ["log", "info", "debug", "dir", "table"]) console[name] = console.error;
const answer = {{}};
try {{
  if (typeof script.main !== "function") throw new Error("no main is exported");
  let result = await script.main(...given.map((value) => value === null ? undefined : value.value));
  if (result && typeof result === "object" && typeof result[Symbol.asyncIterator] === "function") {{
    const items = [];
    for await (const piece of result) Array.isArray(piece) ? items.push(...piece) : items.push(piece);
    result = items;
  }}
  answer.result = result ?? null;
  answer.text = JSON.stringify(answer.result);
}} catch (error) {{
  const known = error instanceof Error;
  answer.text = undefined;
  answer.error = {{
    name: known ? error.name : "Error", message: String(known ? error.message : error), stack: known ? error.stack : "",
  }};
}}
const tail = answer.error ? JSON.stringify({{ error: answer.error }}) : `{{"result":${{answer.text}}}}`;
const bytes = new TextEncoder().encode(mark + tail);
for (let at = 0; at < bytes.length;) {{
  const part = bytes.subarray(at);
  at += deno ? deno.stdout.writeSync(part) : writeSync(1, part);
}}
process.exit(0);
"""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A script that can be run: its packages are there."""

    versions: tuple[tuple[Path, Version], ...]  # of every file of it
    signature: Signature
    marked: Marked
    folder: Path
    engine: Engine


class TypeScript:
    """The runtime of ``*.ts`` and ``*.js``. One process per run: the official client reads its token once only."""

    def __init__(self, settings: ScriptSettings, pool: Pool, folder: Path) -> None:
        self._settings = settings
        self._pool = pool
        self._folder = folder
        self._loaded: dict[Path, Loaded] = {}
        self._locks: dict[Path, asyncio.Lock] = {}

    async def describe(self, script: Path) -> Described:
        loaded = await self._load(script)
        return Described(
            _label(loaded), loaded.signature.doc, _schema(loaded.signature), SINCE in loaded.signature.names
        )

    async def check(self, script: Path, args: Mapping[str, Json]) -> None:
        self._given(await self._load(script), args)

    async def call(self, call: Call, host: Host) -> Listing:
        loaded = await self._load(call.script)
        given = self._given(loaded, call.args, since=call.since)
        answer, logs = await self._run(call, loaded, given)
        marked = Marked(_label(loaded), loaded.marked.key, loaded.marked.cursor)
        return await found.listing(call, marked, self._settings, answer, logs, envelope=False)

    async def step(self, call: Call, host: Host) -> StepResult:
        loaded = await self._load(call.script)
        names = [name for name in loaded.signature.names if name != SINCE]
        by_name = call.args if isinstance(call.args, dict) else {}
        if len(names) == 1 and names[0] not in by_name:
            by_name = {names[0]: call.args}
        given = self._given(loaded, {name: by_name[name] for name in names if name in by_name})
        answer, logs = await self._run(call, loaded, given)
        return StepResult(found.result(answer, call.script.name), logs)

    def _given(self, loaded: Loaded, args: Mapping[str, Json], since: Json = None) -> list[Json]:
        """The arguments in order, each wrapped, so that one which is not given takes main's default."""
        schema = _schema(loaded.signature)
        names = loaded.signature.names
        wrong = plain.mistakes(schema, args, [name for name in names if name != SINCE])
        if wrong:
            raise TriggerError("arguments: " + "; ".join(wrong), kind="arguments")
        every = {**args, SINCE: since} if since is not None else args
        return [{"value": every[name]} if name in every else None for name in names]

    async def _run(self, call: Call, loaded: Loaded, given: list[Json]) -> tuple[bytes, str]:
        """The JSON that main returned, and what was printed."""
        nonce = f"\n{secrets.token_hex(16)}\n"
        order = canonical({"given": given, "mark": nonce})
        most = self._settings.max_result + LOGS
        try:
            ran = await command.run(
                call,
                self._pool,
                loaded.engine.command(call, loaded.folder),
                order,
                most=most,
                env=loaded.engine.env(),
                allowance=RUNTIME,
            )
        except TriggerError as error:
            if error.kind == "crashed" and "out of memory" in error.logs:
                error.kind = "memory"
            raise
        printed, marked, tail = ran.output.rpartition(nonce.encode())
        logs = printed[-64 * 1024 :].decode("utf-8", "replace") + ran.logs
        if not marked:
            raise _broken_off(call, ran, logs)
        if tail.startswith(b'{"result":'):
            return tail[len(b'{"result":') : -1], logs
        raised = json.loads(tail)["error"]
        raise TriggerError(
            f"{raised['name']}: {str(raised['message'])[:500]}", detail=str(raised["stack"] or "")[:8192], logs=logs
        )

    # --- loading

    async def _load(self, script: Path) -> Loaded:
        """Read a script and have its packages fetched, once for each edit of it."""
        async with self._locks.setdefault(script, asyncio.Lock()):
            known = self._loaded.get(script)
            if known is None or any(version(path) != then for path, then in known.versions):
                known = self._loaded[script] = await self._fetch(script)
            return known

    async def _fetch(self, script: Path) -> Loaded:
        from watcher import log

        runs = engine(script, self._folder)
        files = dict(_files(script))
        versions = tuple((path, version(path)) for path in files)
        text = files[script]
        read = signature(text, script.name)
        names = {name for path, content in files.items() for name in imported(content, path.name)}
        imports = dict(sorted(_mapped(names)))
        folder = self._folder / "typescript" / _digest(script, imports)
        loaded = Loaded(versions, read, mark(text, script.name), folder, runs)
        await asyncio.to_thread(_prepare, folder, script)
        if imports and not (folder / "ready").exists():
            log.get("scripts").info("packages.fetching", script=script.name, packages=sorted(imports.values()))
        began = time.monotonic()
        if said := await runs.fetch(folder, imports):
            first = next((line for line in said.splitlines() if line.startswith("error")), said)
            message = first.removeprefix("error: ")[:500]
            raise TriggerError(
                f"{script.name}: what it imports cannot be had: {message}", kind="missing", detail=said[-8192:]
            )
        if imports and not (folder / "ready").exists():
            seconds = round(time.monotonic() - began, 1)
            log.get("scripts").info("packages.ready", script=script.name, seconds=seconds)
        (folder / "ready").touch()
        await asyncio.to_thread(hand_over, self._folder)
        return loaded


def _label(loaded: Loaded) -> Label:
    return replace(loaded.marked.label, doc=loaded.signature.doc)


def _schema(read: Signature) -> dict[str, Json]:
    """Without the engine's own argument."""
    fields = {name: shape for name, shape in read.schema["properties"].items() if name != SINCE}
    required = [name for name in read.schema.get("required", ()) if name != SINCE]
    return {**read.schema, "properties": fields, "required": required}


def _files(script: Path) -> Iterator[tuple[Path, str]]:
    """The script and what it imports of the files around it, each with its text."""
    todo, met = [script], {script}
    while todo:
        path = todo.pop()
        version(path)  # says so if it is not there
        text = path.read_text(encoding="utf-8", errors="replace")
        yield path, text
        if path.suffix not in SUFFIXES:
            continue
        for name in imported(text, path.name):
            near = Path(os.path.normpath(path.parent / name))
            if name.startswith(("./", "../")) and near not in met and near.is_file() and len(met) < FILES:
                met.add(near)
                todo.append(near)


def _mapped(names: set[str]) -> Iterator[tuple[str, str]]:
    """What a bare name stands for: a module of Node's, or the package of that name, as bun has it."""
    for name in names:
        if name.startswith((".", "/", "#")) or ":" in name:
            continue
        if name.partition("/")[0] in _BUILT_IN.split():
            yield name, f"node:{name}"
        else:
            yield name, f"npm:{name}"


def _digest(script: Path, imports: Mapping[str, str]) -> str:
    return hashlib.sha256(canonical([str(script), dict(imports)])).hexdigest()[:20]


def _prepare(folder: Path, script: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "run.mjs").write_text(_RUNNER.format(script=json.dumps(script.as_uri())), encoding="utf-8")


def _broken_off(call: Call, ran: Ran, logs: str) -> TriggerError:
    """The error of a run without a result: it could not be loaded, or it ended its own process."""
    lines = [line.strip() for line in logs.splitlines() if line.strip()]
    first = next((line for line in lines if line.startswith(("error", "Uncaught"))), "")
    message = first.removeprefix("error: ") if first else f"it ended its own process (status {ran.status})"
    with suppress(ValueError):
        message = message[message.index("Uncaught") :]
    return TriggerError(f"{call.script.name}: {message[:500]}", detail=logs[-8192:], logs=logs)
