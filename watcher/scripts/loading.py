"""A script file as a module with a main, and its errors as the author should read them."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from watcher.errors import TriggerError
from watcher.scripts.arguments import Arguments
from watcher.trigger import Marked, marked
from watcher.values import Label

MODULE = "watcher_script_"  # begins the name of every script's module
DETAIL = 8 * 1024  # characters of a traceback that are kept

Version = tuple[int, int, int]
"""What changes when a file is edited or replaced: time of modification in nanoseconds, size, inode."""


def version(path: Path) -> Version:
    """The version of the file at a path. TriggerError of kind ``missing`` if there is none."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise TriggerError(f"{path}: cannot read the script: {error.strerror}", kind="missing") from error
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@dataclass(frozen=True, slots=True)
class Code:
    """A script's text and its compiled code."""

    path: Path
    version: Version
    text: str
    code: types.CodeType


def read(path: Path) -> Code:
    """Read and compile a script. TriggerError with the place of a syntax error."""
    found = version(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TriggerError(f"{path}: cannot read the script: {error.strerror}", kind="missing") from error
    try:
        code = compile(raw, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{path.name}:{line}" if line else path.name
        text = "".join(traceback.format_exception_only(error))
        raise TriggerError(f"{where}: {getattr(error, 'msg', error)}", kind="raised", detail=text) from None
    return Code(path, found, raw.decode("utf-8", "replace"), code)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A script whose module was executed, in a namespace of its own."""

    path: Path
    module: types.ModuleType
    main: Callable[..., Any]
    marked: Marked
    arguments: Arguments

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.module) or inspect.getdoc(self.main) or ""

    @property
    def label(self) -> Label:
        return replace(self.marked.label, doc=self.doc)


def load(code: Code) -> Loaded:
    """Execute a script in a fresh namespace. What it raises comes through as it is."""
    # The name keeps clear of the standard library's: a script may well be called git.py or json.py.
    name = f"{MODULE}{code.path.stem}"
    module = types.ModuleType(name)
    module.__file__ = str(code.path)
    sys.modules[name] = module  # pydantic and dataclasses look annotations up there
    exec(code.code, module.__dict__)  # noqa: S102  (running scripts is what this is for)
    main = getattr(module, "main", None)
    if not callable(main):
        raise TriggerError(
            f"{code.path.name} has no main: define `def main(...)` or `async def main(...)` in it", kind="missing"
        )
    return Loaded(code.path, module, main, marked(main), Arguments(main, code.text))


def failure(error: BaseException, path: Path) -> TriggerError:
    """What a script raised, as the error that its author reads."""
    if isinstance(error, TriggerError):
        if not error.detail:
            error.detail = _traceback(error, path)
        return error
    if isinstance(error, MemoryError):
        message, kind = "out of memory: the script needs more than its memory_limit", "memory"
    elif isinstance(error, SystemExit):
        message, kind = f"the script called sys.exit({error.code!r}): return a list, or raise an error", "raised"
    else:
        message, kind = _one_line(error), "raised"
    return TriggerError(message, kind=kind, detail=_traceback(error, path))


def _one_line(error: BaseException) -> str:
    try:
        text = str(error).strip()
    except Exception:  # an exception's own __str__ is the script's code too
        text = ""
    first = text.splitlines()[0][:500] if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _traceback(error: BaseException, path: Path) -> str:
    """The traceback from the script's own first line on, its middle left out if it is long."""
    start = error.__traceback__
    while start is not None and start.tb_frame.f_code.co_filename != str(path):
        start = start.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, start or error.__traceback__))
    except Exception:
        text = type(error).__name__
    return text if len(text) <= DETAIL else f"{text[: DETAIL // 4]}\n[…]\n{text[-(DETAIL * 3 // 4 - 8) :]}"
