"""Who may do what with which keys: ordered rules with globs, of which the first that matches decides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from watcher.values import StorageRule

Action = Literal["read", "write", "delete", "list"]
ACTIONS: tuple[Action, ...] = get_args(Action)

_ALL = frozenset(ACTIONS)
DEFAULT: tuple[StorageRule, ...] = (
    StorageRule("windmill_uploads/*", _ALL - {"list"}),
    StorageRule("u/{username}/**/*", _ALL),
    StorageRule("g/{group}/**/*", _ALL),
    StorageRule("f/{folder_write}/**/*", _ALL),
    StorageRule("f/{folder_read}/**/*", frozenset({"read", "list"})),
    StorageRule("**/*", frozenset()),
)
"""Windmill's own. Source: its documentation of advanced object storage permissions."""

FOR_JOBS: tuple[StorageRule, ...] = (
    *DEFAULT[:-1],
    StorageRule("{u,g,watcher}/**/*", frozenset()),  # other people's, and what the service itself keeps
    StorageRule("**/*", _ALL),
)
"""The same for jobs, whose scripts the operator chose: as in Windmill without advanced permissions, a script may use
keys such as ``output/result.parquet``."""

EVERY = "*"
"""In the place of a folder's name: all folders."""


@dataclass(frozen=True, slots=True)
class Who:
    """Somebody as the rules see them. An admin may do everything."""

    name: str
    admin: bool = False
    job: bool = False
    groups: tuple[str, ...] = ("all",)
    folders_read: tuple[str, ...] = ()
    folders_write: tuple[str, ...] = ()


def allowed(permissions: Sequence[StorageRule], who: Who, key: str, action: Action) -> bool:
    """Whether ``who`` may do this with the object ``key``. What no rule speaks of is denied."""
    if who.admin:
        return True
    for rule in permissions:
        if any(_glob(pattern).fullmatch(key) for pattern in _filled_in(rule.pattern, who)):
            return action in rule.allow
    return False


_VARIABLE = re.compile(r"\{(username|group|folder_read|folder_write)\}")


def _filled_in(pattern: str, who: Who) -> Iterator[str]:
    """The pattern for each value of its variables; none at all when a variable has no value."""
    found = _VARIABLE.search(pattern)
    if found is None:
        yield pattern
        return
    values = {
        "username": (who.name,),
        "group": who.groups,
        "folder_read": (*who.folders_read, *who.folders_write),
        "folder_write": who.folders_write,
    }[found[1]]
    for value in values:
        if value == EVERY and found[1].startswith("folder"):
            plain = EVERY
        elif not value or "/" in value:
            continue  # a name that would be more than one part of a key
        else:
            plain = "".join(f"\\{letter}" if letter in r"*?{},\\" else letter for letter in value)
        yield from _filled_in(pattern[: found.start()] + plain + pattern[found.end() :], who)


def check(pattern: str) -> str:
    """What is wrong with a pattern; empty if nothing is."""
    if pattern.startswith("/"):
        return "a key does not begin with a slash"
    plain = _VARIABLE.sub("x", pattern)
    if plain.count("{") != plain.count("}") or "}" in plain.partition("{")[0]:
        return "a brace without its other half"
    unknown = re.search(r"\{([^{},]*)\}", plain)
    if unknown:
        return f"there is no variable {{{unknown[1]}}}"
    if len(re.findall(r"\*+|\{", plain)) > 10:
        return "more than ten wildcards"
    return ""


@lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    """``**`` any number of parts, ``*`` and ``?`` within one part, ``{a,b}`` either; a backslash takes the meaning."""
    out, at, depth = [], 0, 0
    while at < len(pattern):
        letter = pattern[at]
        if pattern.startswith("**/", at) and (at == 0 or pattern[at - 1] == "/"):
            out.append("(?:[^/]+/)*")
            at += 3
            continue
        if pattern.startswith("**", at):
            out.append(".*")
            at += 2
            continue
        if letter == "\\" and at + 1 < len(pattern):
            out.append(re.escape(pattern[at + 1]))
            at += 2
            continue
        depth += {"{": 1, "}": -1}.get(letter, 0)
        alternatives = {"{": "(?:", "}": ")", ",": "|" if depth else ","}
        out.append({"*": "[^/]*", "?": "[^/]"}.get(letter) or alternatives.get(letter) or re.escape(letter))
        at += 1
    return re.compile("".join(out), re.DOTALL)
