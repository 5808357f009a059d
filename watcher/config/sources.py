"""Where settings come from: flags, the environment, a secrets directory and the TOML file, merged in that order."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import tomli
from pydantic import BaseModel
from pydantic_settings import EnvSettingsSource, SettingsError

from watcher.config.model import Flow, Settings
from watcher.config.positions import Loc
from watcher.log import register

MAX_FILE = 16 * 1024 * 1024
"""Bytes of a configuration file: a hundred thousand watchers."""
MAX_VALUE = 1024 * 1024
"""Bytes of one value from a secrets directory or a ``$file:``."""
MAX_SYNTAX_ERRORS = 20

PREFIX = "WATCHER_"
SYSTEM = "/etc/watcher"
NOT_SETTINGS = frozenset(
    PREFIX + name for name in ("CONFIG", "SECRETS_DIR", "SECRET_KEY", "URL", "TOKEN", "TEST", "FAILPOINT", "LONG")
)
"""Variables that begin like settings and are read by others."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake, before it is known where in the text it stands."""

    loc: Loc
    message: str
    hint: str = ""
    at: str = "value"  # or "key", "missing"
    source: str = ""  # where the value came from, when not from the file
    line: int = 0
    column: int = 0
    absent: bool = False  # says that something is not there: doubtful when parts of the text were left out


@dataclass
class Sources:
    """What all sources gave, merged into one tree."""

    file: Path | None
    text: str = ""
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Loc, str] = field(default_factory=dict)  # of values that are not from the file
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    recovered: bool = False  # parts of the text were left out because of syntax errors


def gather(file: Path | None, environ: Mapping[str, str], overrides: Mapping[str, Any] | None) -> Sources:
    """Read everything, lowest precedence first. Nothing is raised: mistakes are in ``problems``."""
    sources = Sources(file)
    if file is not None:
        _from_file(sources, file)
        _expand(sources, environ)
    for where, text, origin in _secret_files(sources, environ):
        _give(sources, where, text, origin, complain="directory" if environ.get("WATCHER_SECRETS_DIR") else "")
    for name, text in sorted(environ.items()):
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            _give(sources, name.removeprefix(PREFIX), text, name, complain="variable")
    for name, value in (overrides or {}).items():
        _put(sources, tuple(name.split(".")), value, f"flag {name}")
    return sources


def find(environ: Mapping[str, str]) -> Path | None:
    """The configuration file when none is named: ``WATCHER_CONFIG``, or ``watcher.toml`` in the usual places."""
    if environ.get("WATCHER_CONFIG"):
        return Path(environ["WATCHER_CONFIG"])
    home = environ.get("XDG_CONFIG_HOME") or (environ["HOME"] + "/.config" if environ.get("HOME") else "")
    places = [environ.get("CONFIGURATION_DIRECTORY", ""), ".", home + "/watcher" if home else "", SYSTEM]
    return next(
        (Path(place, "watcher.toml") for place in places if place and Path(place, "watcher.toml").exists()), None
    )


# --- the file ---------------------------------------------------------------------------------------------------------


def read_bounded(file: Path, limit: int) -> bytes:
    """The bytes of a regular file. Raises ValueError that says why not: nothing is read without a bound."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would hang
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise ValueError("is a directory, not a file")
        if not stat.S_ISREG(mode):
            raise ValueError("is not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            raw = stream.read(limit + 1)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)
    if len(raw) > limit:
        raise ValueError(f"is larger than {limit // 1024} kB")
    return raw


def _from_file(sources: Sources, file: Path) -> None:
    try:
        raw = read_bounded(file, MAX_FILE)
    except ValueError as error:
        gone = "no such file" in str(error)
        told = "there is no such configuration file" if gone else f"the configuration file {error}"
        hint = "write one with `watcher init`, or name it with --config" if gone else ""
        sources.problems.append(Problem((), told, hint))
        return
    try:
        sources.text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line = before.count(b"\n") + 1
        column = len(before.rpartition(b"\n")[2].decode("utf-8", "replace")) + 1
        sources.text = raw.decode("utf-8", "replace")
        sources.problems.append(Problem((), "is not UTF-8 text", "save it as UTF-8", line=line, column=column))
        return
    _parse(sources)


def _parse(sources: Sources) -> None:
    """Parse; after a mistake leave out what it spoils, and look for the next one."""
    lines = sources.text.split("\n")
    for _ in range(MAX_SYNTAX_ERRORS):
        try:
            sources.tree = tomli.loads("\n".join(lines))
        except tomli.TOMLDecodeError as error:
            line, column = min(error.lineno, len(lines)), error.colno
            if error.msg.startswith("Cannot"):  # tomli tells where the key or the header ends
                column = len(lines[line - 1]) - len(lines[line - 1].lstrip(" \t[")) + 1
            message, hint = _said(error.msg, lines, line)
            sources.problems.append(Problem((), message, hint, line=line, column=max(column, 1)))
            if not _leave_out(lines, line, column, error.msg):
                return
            sources.recovered = True
        except RecursionError:
            sources.problems.append(Problem((), "is nested too deep"))
            return
        else:
            return


_HEADER = re.compile(r"\s*\[")
_PAIR = re.compile(r"""\s*(?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*\s*=""")


def _leave_out(lines: list[str], line: int, column: int, message: str) -> bool:
    """Blank one broken statement, if it is plain where it begins and ends."""
    text = lines[line - 1]
    if message.startswith("Cannot declare"):
        lines[line - 1] = ""
        for after in range(line, len(lines)):
            if _HEADER.match(lines[after]):
                break
            lines[after] = ""
        return True
    pair = _PAIR.match(text)
    whole = pair is not None and (column >= pair.end() or message.startswith("Cannot overwrite"))
    if not (whole or (message.startswith("Expected '='") and not _HEADER.match(text))) or text.count('"""') == 1:
        return False
    lines[line - 1] = ""
    return True


def _said(message: str, lines: list[str], line: int) -> tuple[str, str]:
    """tomli's message in our words, with what to do about it."""
    twice = re.match(r"Cannot declare \((.*?),?\) twice", message)
    if twice:
        name = ".".join(re.findall(r"'([^']*)'", twice[1]))
        first = next((n for n, text in enumerate(lines, 1) if _names(text, name)), 0)
        return f"the table [{name}] is there twice", f"the first one is on line {first}" if first < line else ""
    if message.startswith("Cannot overwrite"):
        return "this key was given a value before", "keep one of them"
    if message.startswith("Expected '='"):
        return "a key without a value", "write it as key = value"
    if message.startswith("Invalid value"):
        return "not a TOML value", 'texts stand in quotes: "…"'
    return message[0].lower() + message[1:], ""


def _names(header: str, name: str) -> bool:
    return re.sub(r"[\s\"'\[\]]", "", header.partition("#")[0]) == name and _HEADER.match(header) is not None


# --- references that are read at once ---------------------------------------------------------------------------------

LATE = frozenset({"url", "token", "secret", "headers"})
"""Options of a flow whose references are followed at each attempt; so are those of its preset."""


def is_late(loc: Loc) -> bool:
    """Whether a reference at this place is followed at each use, not when the configuration is loaded."""
    if loc[0] == "flows" and len(loc) > 2:
        return loc[2] in LATE or loc[2] not in Flow.model_fields
    if loc[0] == "storage":
        return loc[-1] == "resource"
    return loc[0] in ("variables", "resources") or (loc[0] == "watchers" and len(loc) > 2 and loc[2] == "with")


def is_template(loc: Loc) -> bool:
    """Whether the text is the user's own words for an item, in which a dollar sign means nothing."""
    return loc[0] == "flows" and len(loc) > 2 and loc[2] in ("map", "body", "filter")


def leaves(value: Any, loc: Loc = ()) -> Iterator[tuple[Loc, Any]]:
    """Every value that is not a table or a list, with its place."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*loc, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*loc, index))
    else:
        yield loc, value


def reference(text: Any) -> tuple[str, str] | None:
    """``("env", "TOKEN")`` for ``"$env:TOKEN"``; None for anything that is not a whole reference."""
    if not isinstance(text, str) or not text.startswith("$"):
        return None
    found = re.fullmatch(r"\$(env|file|var|res):(.+)", text, re.DOTALL)
    return (found[1], found[2]) if found else None


def _expand(sources: Sources, environ: Mapping[str, str]) -> None:
    for loc, value in list(leaves(sources.tree)):
        found = reference(value)
        if found is None or is_late(loc) or is_template(loc):
            continue
        kind, name = found
        if kind == "env" and name in environ:
            _put(sources, loc, environ[name], f"${kind}:{name}")
        elif kind == "file":
            try:
                text = read_bounded(beside(sources.file, name), MAX_VALUE).decode().removesuffix("\n")
            except ValueError as error:
                sources.problems.append(Problem(loc, f"{name} {error}"))
            else:
                _put(sources, loc, text, f"${kind}:{name}")
        elif kind == "env":
            sources.problems.append(Problem(loc, f"the environment variable {name} is not set"))
        else:
            sources.problems.append(
                Problem(loc, f"${kind}: cannot be used here, since the database is not open yet", "use $env: or $file:")
            )


def beside(file: Path | None, name: str) -> Path:
    """A path as the configuration file means it: relative to itself."""
    return Path(os.path.normpath((file.parent if file else Path.cwd()).absolute() / Path(name).expanduser()))


# --- flags, variables and secret files -------------------------------------------------------------------------------


class _One(EnvSettingsSource):
    """One variable whose path is already known, converted to what its option wants by pydantic-settings."""

    def __init__(self, loc: Loc, text: str) -> None:
        self._given = {"watcher\x1f" + "\x1f".join(map(str, loc)): text}
        super().__init__(Settings)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._given


def _give(sources: Sources, name: str, text: str, origin: str, *, complain: str) -> None:
    """Find the option that a variable's name means, ignoring case, and set it."""
    parts = [part for part in re.split(r"__+", name) if part]
    loc, known, kind = _spelled(parts, sources.tree)
    if loc is not None and kind == "option":
        if is_late(loc):
            register(text)
        _put(sources, loc, text, origin)
    elif kind == "table":
        sources.problems.append(
            Problem(
                (),
                f"{origin} names a whole table",
                f"name one option, such as {origin}__{known.upper()}",
                source=origin,
            )
        )
    elif complain:
        near = difflib.get_close_matches(parts[-1].lower() if parts else "", known.split(), 1, 0.75)
        hint = f"did you mean {origin[: len(origin) - len(parts[-1])]}{near[0].upper()}?" if near else ""
        if near or (len(parts) > 1 and parts[0].lower() in Settings.model_fields):
            sources.problems.append(Problem((), f"{origin} is no option", hint, source=origin))
        else:
            sources.warnings.append(f"{origin} begins like one of watcher's variables but is none: ignored")


def _spelled(parts: list[str], tree: Any) -> tuple[Loc | None, str, str]:
    """The path that a variable means, in its true spelling.

    Answers (path, names known at the end, "option" or "table"); the path is None when there is no such option.
    """
    loc: list[str] = []
    kind: Any = Settings
    for part in parts:
        model, inner = _shape(kind)
        if model is not None:
            names = {info.alias or name: info.annotation for name, info in model.model_fields.items()}
            spelled = next((name for name in names if name.lower() == part.lower()), None)
            if spelled is None and model is not Flow:
                return None, " ".join(names), ""
            spelled = spelled or part.lower()
            kind = names.get(spelled, str)
        elif inner is not None:
            there = tree if isinstance(tree, dict) else {}
            spelled = next((name for name in there if _folded(name) == _folded(part)), part.lower())
            kind = inner
        else:
            return None, "", ""
        loc.append(spelled)
        tree = tree.get(spelled) if isinstance(tree, dict) else None
    model, inner = _shape(kind)
    if model is not None or (inner is not None and inner is not Any and loc[0] in ("flows", "watchers", "resources")):
        return tuple(loc), next(iter(model.model_fields)) if model else "name", "table" if model else "option"
    return tuple(loc), "", "option"


def _folded(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", name.lower())


def _shape(kind: Any) -> tuple[type[BaseModel] | None, Any]:
    """(the model that a type is, what a dict type holds), seen through Optional and Annotated."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _shape(get_args(kind)[0])
    if origin in (Union, UnionType):
        return next((shape for shape in map(_shape, get_args(kind)) if shape != (None, None)), (None, None))
    if origin is dict:
        return None, get_args(kind)[1]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind, None
    return None, None


def _put(sources: Sources, loc: Loc, value: Any, origin: str) -> None:
    if isinstance(value, str):
        value = _converted(loc, value)
    here: Any = sources.tree
    for name in loc[:-1]:
        here = here[int(name)] if isinstance(here, list) else here.setdefault(name, {})
        if not isinstance(here, dict | list):
            return  # the file has something else here; its own mistake is reported
    here[loc[-1]] = value
    sources.origins[loc] = origin


def _converted(loc: Loc, text: str) -> Any:
    preset_only = loc[0] == "flows" and len(loc) > 2 and loc[2] not in Flow.model_fields
    if preset_only or any(isinstance(name, int) for name in loc):
        return text
    try:
        value: Any = _One(loc, text)()
    except SettingsError:  # not JSON: one text of a list, or a mistake that validation tells better
        return text
    for name in loc:
        value = value.get(name) if isinstance(value, dict) else None
    return text if value is None else value


def _secret_files(sources: Sources, environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(name, text, where) of each file in systemd's credentials directory, then in ``WATCHER_SECRETS_DIR``."""
    for variable in ("CREDENTIALS_DIRECTORY", "WATCHER_SECRETS_DIR"):
        folder = environ.get(variable)
        if not folder:
            continue
        try:
            files = sorted(path for path in Path(folder).iterdir() if not path.name.startswith(".") and path.is_file())
        except OSError as error:
            sources.problems.append(Problem((), f"{folder}: {error.strerror}", source=variable))
            continue
        for path in files:
            if variable == "CREDENTIALS_DIRECTORY" and "__" not in path.name and path.name not in Settings.model_fields:
                continue  # credentials that are not settings, such as the key
            try:
                text = read_bounded(path, MAX_VALUE).decode().removesuffix("\n")
            except ValueError as error:
                sources.problems.append(Problem((), f"{path} {error}", source=str(path)))
                continue
            name = path.name[len(PREFIX) :] if path.name.upper().startswith(PREFIX) else path.name
            yield name, text, str(path)
