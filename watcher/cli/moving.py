"""A folder made by Windmill's `wmill sync pull`, read and turned into a configuration, files and states."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from watcher.errors import WatcherError
from watcher.values import Json

LARGEST = 16 * 1024 * 1024  # bytes of one file
LANGUAGES = {
    "python3": (".py",),
    "deno": (".deno.ts", ".ts"),
    "bun": (".ts", ".bun.ts"),
    "nativets": (".fetch.ts", ".ts"),
}
OTHERS = (".sh", ".go", ".ps1", ".php", ".rs", ".cs", ".sql", ".gql", ".nu", ".yml", ".rb", ".java", ".duckdb.sql")

_ITEM = re.compile(r"^flow_input\.iter\.value((?:\.[A-Za-z_]\w*|\[\d+\]|\[\"[^\"]*\"\])*)$")
_RESULT = re.compile(r"^results\.([A-Za-z_]\w*)((?:\.[A-Za-z_]\w*|\[\d+\]|\[\"[^\"]*\"\])*)$")
_INPUT = re.compile(r"^flow_input\.([A-Za-z_]\w*)$")
_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[(\d+)\]|\[\"([^\"]*)\"\]")
_WORKSPACE_IMPORT = re.compile(r"(?m)^\s*from\s+[fu]\.|from\s+[\"']/[fu]/")
_IGNORED = (".yaml", ".lock", ".md")

ADAPTER = '''"""Gives step {step} of the Windmill flow {flow} its arguments, as its input transforms did there."""

import json
from pathlib import Path

INPUTS = json.loads({inputs!r})
BEFORE = {before!r}
SHARED = Path("shared/windmill.json")


def main(value):
    """``value`` is the item, for the first step, or what the step before returned."""
    known = json.loads(SHARED.read_text()) if BEFORE else {{"item": value, "results": {{}}}}
    if BEFORE:
        known["results"][BEFORE] = value
    SHARED.write_text(json.dumps(known))
    return {{name: given(known, source) for name, source in INPUTS.items()}}


def given(known, source):
    if "static" in source:
        return source["static"]
    found = known["results"][source["result"]] if "result" in source else known["item"]
    for part in source["path"]:
        found = found[part]
    return found
'''


@dataclass(slots=True)
class Moved:
    """What a folder becomes. ``left``: what could not be carried over, by file, and why."""

    watchers: dict[str, dict[str, Json]] = field(default_factory=dict)
    flows: dict[str, dict[str, Json]] = field(default_factory=dict)
    resources: dict[str, dict[str, Json]] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    types: dict[str, tuple[Json, str]] = field(default_factory=dict)
    states: dict[str, Json] = field(default_factory=dict)  # by watcher
    other_states: dict[str, Json] = field(default_factory=dict)  # by path
    files: dict[str, str] = field(default_factory=dict)  # relative to the configuration
    left: list[tuple[str, str]] = field(default_factory=list)


def read(folder: Path) -> Moved:
    """Read a whole folder; nothing is written. WatcherError if it is not one of Windmill's."""
    return _Reader(folder).read()


class _Reader:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._moved = Moved()
        self._states: dict[str, Json] = {}
        self._used: set[str] = set()

    def read(self) -> Moved:
        if not self._folder.is_dir():
            raise WatcherError(f"{self._folder} is not a folder: give the one that `wmill sync pull` wrote")
        schedules = self._named("schedule")
        if not schedules and not self._named("script") and not list(self._flows()):
            raise WatcherError(f"{self._folder} holds nothing of Windmill's: no schedule, script or flow")
        for path, file, resource in self._named("resource"):
            self._resource(path, file, resource)
        for path, file, variable in self._named("variable"):
            self._variable(path, file, variable)
        for path, _, kind in self._named("resource-type"):
            name = PurePosixPath(path).name
            self._moved.types[name] = kind.get("schema") or {"type": "object"}, str(kind.get("description") or "")
        for path, file, schedule in schedules:
            try:
                self._schedule(path, file, schedule)
            except _Left as why:
                self._leave(file, str(why))
        for path, _file, _ in self._named("script"):
            if path not in self._used:
                source = self._source(path)
                where = source.relative_to(self._folder).as_posix() if source else path
                self._leave(where, "no schedule runs it: it stays where it is")
        self._leave_the_rest()
        for path, value in self._states.items():
            self._moved.other_states[path] = value
        return self._moved

    def _leave_the_rest(self) -> None:
        """Say of everything else that it stays where it is."""
        for file in self._flows():
            path = file.parent.relative_to(self._folder).as_posix()
            if path.removesuffix(".flow").removesuffix("__flow") not in self._used:
                self._leave(file, "no schedule runs it: it stays where it is")
        for file in sorted(self._folder.rglob("*_trigger.yaml")):
            self._leave(file, "it waits to be called: here a webhook starts a flow, see docs/windmill.md")
        for kind in ("app", "raw_app"):
            for folder in sorted((*self._folder.rglob(f"*.{kind}"), *self._folder.rglob(f"*__{kind}"))):
                self._leave(folder, "apps have no counterpart here")

    # --- files

    def _leave(self, file: Path | str, why: str) -> None:
        shown = file if isinstance(file, str) else file.relative_to(self._folder).as_posix()
        self._moved.left.append((shown, why))

    def _named(self, kind: str) -> list[tuple[str, Path, dict[str, Any]]]:
        """All ``*.KIND.yaml`` files: Windmill's path, the file and what is in it."""
        found = []
        for file in sorted(self._folder.rglob(f"*.{kind}.yaml")):
            content = self._yaml(file)
            if isinstance(content, dict):
                path = file.relative_to(self._folder).as_posix().removesuffix(f".{kind}.yaml")
                found.append((path, file, content))
        return found

    def _yaml(self, file: Path) -> Any:
        try:
            import yaml
        except ImportError:
            raise WatcherError("reading Windmill's files needs change-watcher[windmill-import]: install it") from None
        try:
            return yaml.load(self._text(file), Loader=_loader(yaml))  # noqa: S506 -- a SafeLoader that keeps dates text
        except (yaml.YAMLError, RecursionError) as error:
            self._leave(file, f"it is not YAML: {str(error).splitlines()[0]}")
            return None

    def _text(self, file: Path) -> str:
        if file.stat().st_size > LARGEST:
            raise WatcherError(f"{file} is larger than {LARGEST:,} bytes")
        return file.read_text(encoding="utf-8", errors="replace")

    def _source(self, path: str) -> Path | None:
        """The file of a script's code."""
        for suffix in dict.fromkeys(s for suffixes in LANGUAGES.values() for s in suffixes):
            file = self._inside(path + suffix)
            if file and file.is_file():
                return file
        return next((f for s in OTHERS if (f := self._inside(path + s)) and f.is_file()), None)

    def _inside(self, path: str) -> Path | None:
        """A file of the folder: a path that leads out of it is none."""
        file = (self._folder / path).resolve()
        return self._folder / path if file.is_relative_to(self._folder.resolve()) else None

    def _flows(self) -> Iterator[Path]:
        yield from sorted(self._folder.rglob("*.flow/flow.yaml"))
        yield from sorted(self._folder.rglob("*__flow/flow.yaml"))

    # --- resources and variables

    def _resource(self, path: str, file: Path, resource: Mapping[str, Any]) -> None:
        kind, value = str(resource.get("resource_type") or "any"), resource.get("value")
        if kind == "state":
            self._states[path] = value
        elif isinstance(value, dict):
            if _dropped_nulls(value) != value:
                self._leave(file, "its nulls are left out, since TOML has none")
            self._moved.resources[path] = {"type": kind, "value": _dropped_nulls(value)}
        else:
            self._leave(file, "its value is no object")

    def _variable(self, path: str, file: Path, variable: Mapping[str, Any]) -> None:
        value = variable.get("value")
        if variable.get("is_secret"):
            self._leave(file, f"it is secret: set it here with `watcher variable set {path} --secret`")
        elif isinstance(value, str):
            self._moved.variables[path] = value.replace("$", "$$", 1) if value.startswith("$env:") else value
        else:
            self._leave(file, "it has no value")

    # --- schedules

    def _schedule(self, path: str, file: Path, schedule: Mapping[str, Any]) -> None:
        target = str(schedule.get("script_path") or "")
        args = schedule.get("args") or {}
        table: dict[str, Json] = {}
        if schedule.get("is_flow"):
            step = self._flow(path, target, args, table, file)
            state = f"{target}/{step}"
            state += "_" if step else ""
        else:
            table |= {"trigger": self._script(target), "flow": self._sink(file)}
            if args:
                table["with"] = _dropped_nulls(args)
            state = f"{target}/"
        table |= _times(schedule)
        if schedule.get("enabled") is False:
            table["enabled"] = False
        name = _name(path, self._moved.watchers)
        self._moved.watchers[name] = table
        key = f"{state}schedule-{path.replace('/', '-')}"
        if key in self._states:
            self._moved.states[name] = self._states.pop(key)
        else:
            self._leave(file, f"there is no state at {key}: its first run sends nothing and remembers what is there")
        for option in ("on_failure", "on_recovery", "on_success", "retry", "dynamic_skip", "paused_until"):
            if schedule.get(option):
                self._leave(file, f"{option} has no counterpart here")

    def _sink(self, file: Path) -> str:
        """A flow for the items of a schedule that runs a script alone: Windmill kept its result and did nothing."""
        self._moved.files.setdefault("keep.py", _KEEP)
        self._moved.flows.setdefault("keep", {"steps": ["keep.py"]})
        self._leave(
            file, "its items go to the local flow `keep`, which prints them, since nothing followed: name yours"
        )
        return "keep"

    def _script(self, path: str) -> str:
        """Carry a script over, its lock too. What to write for it in the configuration."""
        if path.startswith("hub/"):
            raise _Left(f"the script {path} lies in Windmill's hub: save it in your workspace first")
        source = self._source(path)
        if source is None:
            raise _Left(f"there is no script {path}")
        self._used.add(path)
        return self._carry(source, lock=path + ".script.lock")

    def _carry(self, source: Path, *, lock: str) -> str:
        where = source.relative_to(self._folder).as_posix()
        if source.suffix not in (".py", ".ts"):
            raise _Left(f"{where}: only Python and TypeScript are run as Windmill runs them")
        text = self._text(source)
        if _WORKSPACE_IMPORT.search(text):
            raise _Left(f"{where} imports another script of the workspace: put what it needs beside it")
        self._moved.files[where] = text
        locked = self._inside(lock)
        if source.suffix == ".py" and locked and locked.is_file():
            stem = where.removesuffix(".py")
            self._moved.files[f"{stem}.script.lock"] = self._text(locked)
        return f"./{where}"

    # --- flows

    def _flow(self, path: str, target: str, args: Mapping[str, Json], table: dict[str, Json], file: Path) -> str:
        """Turn a flow into a trigger and a local flow. The id of its trigger step, which its state is named after."""
        folder = next((f for s in (".flow", "__flow") if (f := self._inside(target + s)) and f.is_dir()), None)
        content = self._yaml(folder / "flow.yaml") if folder and (folder / "flow.yaml").is_file() else None
        if folder is None or not isinstance(content, dict):
            raise _Left(f"there is no flow {target}")
        self._used.add(target)
        modules = (content.get("value") or {}).get("modules") or []
        if len(modules) != 2 or _kind(modules[1]) != "forloopflow":
            raise _Left(f"the flow {target} is not a trigger step followed by one loop over what it found")
        first, loop = modules
        iterator = (loop["value"].get("iterator") or {}).get("expr", "")
        if iterator.strip() != f"results.{first.get('id')}":
            raise _Left(f"the loop of {target} goes over {iterator!r}, not over what its first step found")
        table["trigger"] = self._code(folder, first, target)
        table["with"] = _static(first["value"].get("input_transforms") or {}, args, target)
        if not table["with"]:
            del table["with"]
        steps = self._steps(folder, loop["value"].get("modules") or [], args, target)
        name = _name(target, self._moved.flows)
        self._moved.flows[name] = {"steps": steps} | ({} if loop["value"].get("parallel") else {"at_once": 1})
        table["flow"] = name
        for module in modules[:1] + (loop["value"].get("modules") or []):
            for option in ("sleep", "suspend", "retry", "cache_ttl", "mock"):
                if module.get(option):
                    self._leave(file, f"{option} of step {module.get('id')} of {target} has no counterpart here")
        return str(first.get("id") or "nostep")

    def _code(self, folder: Path, module: Mapping[str, Any], target: str) -> str:
        """The script of one step: of its own, in the flow's folder, or one of the workspace."""
        value = module["value"]
        if value.get("type") == "script":
            return self._script(str(value.get("path")))
        if value.get("type") != "rawscript" or value.get("language") not in LANGUAGES:
            what = value.get("language") or value.get("type")
            raise _Left(f"step {module.get('id')} of {target} is {what}: only Python and TypeScript are carried over")
        inline = str(value.get("content") or "")
        suffix = LANGUAGES[value["language"]][0].rpartition(".")[2]
        if inline.startswith("!inline "):
            source = self._inside(f"{folder.relative_to(self._folder).as_posix()}/{inline.removeprefix('!inline ')}")
            if source is None or not source.is_file():
                raise _Left(f"step {module.get('id')} of {target}: there is no file {inline.removeprefix('!inline ')}")
            lock = str(value.get("lock") or "").removeprefix("!inline ")
            return self._carry(source, lock=f"{folder.relative_to(self._folder).as_posix()}/{lock}")
        where = f"{folder.relative_to(self._folder).as_posix()}/{module.get('id')}.{suffix}"
        self._moved.files[where] = inline
        return f"./{where}"

    def _steps(self, folder: Path, modules: list[Any], args: Mapping[str, Json], target: str) -> list[Json]:
        steps: list[Json] = []
        before = ""
        for module in modules:
            code = self._code(folder, module, target)
            inputs = {
                name: _source(transform, args, f"step {module.get('id')} of {target}: {name}")
                for name, transform in (module["value"].get("input_transforms") or {}).items()
            }
            adapter = f"{folder.relative_to(self._folder).as_posix()}/{module.get('id')}_arguments.py"
            self._moved.files[adapter] = ADAPTER.format(
                step=module.get("id"), flow=target, inputs=json.dumps(inputs), before=before
            )
            steps += [f"./{adapter}", code]
            before = str(module.get("id"))
        if not steps:
            raise _Left(f"the loop of {target} is empty")
        return steps


class _Left(Exception):
    """Something that cannot be carried over, and why."""


_KEEP = '''"""Print what was found."""

import json


def main(item):
    print(json.dumps(item))
    return item
'''


def _loader(yaml: Any) -> Any:
    """Dates stay text, as they are in JSON, and ``!inline`` is text too."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is an extra, so that mypy may not see it
        """YAML as JSON has it."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_constructor("!inline", lambda loader, node: f"!inline {loader.construct_scalar(node)}")
    return Loader


def _kind(module: Any) -> str:
    value = module.get("value") if isinstance(module, dict) else None
    return str(value.get("type")) if isinstance(value, dict) else ""


def _name(path: str, taken: Mapping[str, Any]) -> str:
    """A name for the configuration: the last part of a path, with more of it where that is taken."""
    parts = [re.sub(r"[^A-Za-z0-9_.-]", "_", part) for part in path.split("/")]
    for count in range(1, len(parts) + 1):
        name = "_".join(parts[-count:])[:100]
        if name not in taken:
            return name
    return next(name for n in range(2, 10_000) if (name := f"{parts[-1][:90]}_{n}") not in taken)


def _static(transforms: Mapping[str, Any], args: Mapping[str, Json], target: str) -> dict[str, Json]:
    """Arguments of a trigger step, which only the flow's own arguments can decide."""
    found = {}
    for name, transform in transforms.items():
        source = _source(transform, args, f"the trigger step of {target}: {name}")
        if "static" not in source:
            raise _Left(f"the trigger step of {target} takes {name} from {transform.get('expr')!r}")
        if source["static"] is not None:
            found[name] = source["static"]
    return found


def _source(transform: Any, args: Mapping[str, Json], where: str) -> dict[str, Json]:
    """Where an argument of a step comes from."""
    transform = transform if isinstance(transform, dict) else {}
    if transform.get("type") == "static":
        return {"static": transform.get("value")}
    text = str(transform.get("expr") or "").strip().rstrip(";")
    if found := _ITEM.match(text):
        return {"path": _path(found[1])}
    if found := _RESULT.match(text):
        return {"result": found[1], "path": _path(found[2])}
    if found := _INPUT.match(text):
        return {"static": args.get(found[1])}
    try:
        return {"static": json.loads(text)}
    except ValueError:
        raise _Left(f"{where} is worked out by {text!r}: only items, results and constants are carried over") from None


def _path(text: str) -> list[Json]:
    return [int(number) if number else name or quoted for name, number, quoted in _STEP.findall(text)]


def _dropped_nulls(value: Json) -> Json:
    """Without what TOML has no word for."""
    if isinstance(value, dict):
        return {name: _dropped_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_dropped_nulls(one) for one in value if one is not None]
    return value


def _times(schedule: Mapping[str, Any]) -> dict[str, Json]:
    """Windmill's cron has seconds in front, and counted the days of the week from Sunday as 1 in its first version."""
    fields = str(schedule.get("schedule") or "").split()
    zone = str(schedule.get("timezone") or "UTC")
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) == 7:
        fields = fields[:6]  # the year
    if len(fields) != 6:
        raise _Left(f"the schedule {schedule.get('schedule')!r} is not cron")
    second, *rest = ["*" if one == "?" else one for one in fields]
    if all(one == "*" for one in rest):
        if found := re.fullmatch(r"(?:\*|0)/(\d+)", second):
            return {"every": f"{found[1]}s"}
        if second == "*":
            return {"every": "1s"}
    if not second.isdecimal():
        raise _Left(f"the schedule {schedule.get('schedule')!r} is finer than a minute")
    if schedule.get("cron_version") != "v2":
        rest[4] = re.sub(r"(?<![#/\d])\d", lambda day: str((int(day[0]) - 1) % 7), rest[4])
    return {"cron": " ".join(rest), "timezone": zone}


# --- writing it down --------------------------------------------------------------------------------------------------


def toml(moved: Moved) -> str:
    """The configuration file."""
    lines = ["#:schema ./watcher.schema.json", 'database = "sqlite:///watcher.db"', ""]
    if moved.flows:
        lines += ["[server]  # local flows are called here", 'bind = "127.0.0.1:8321"', ""]
    for kind, tables in (("flows", moved.flows), ("watchers", moved.watchers), ("resources", moved.resources)):
        for name, table in tables.items():
            lines += [f"[{kind}.{_key(name)}]", *(f"{_key(key)} = {_value(value)}" for key, value in table.items()), ""]
    if moved.variables:
        lines += ["[variables]", *(f"{_key(path)} = {_value(value)}" for path, value in moved.variables.items()), ""]
    return "\n".join(lines)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: Json) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(str(name))} = {_value(one)}" for name, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    return json.dumps(value)
