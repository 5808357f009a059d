"""Mistakes as people read them: file, line, column, the line itself with a caret, and what would be right."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from watcher.config.build import dotted, is_secret
from watcher.config.positions import Place, Positions
from watcher.config.sources import Problem, Sources
from watcher.errors import ConfigError, Mistake
from watcher.log import MASK, is_secret_name, mask

_WIDTH = 110
"""Columns of a source line that are shown around the caret."""

_KEY = re.compile(r"([\w./@-]+)[\"']?\s*=")
_ASSIGNED = re.compile(r"""([\w./@-]+)(["']?\s*=\s*)("(?:[^"\\]|\\.)*"?|'[^']*'?)""")


def locate(problems: list[Problem], sources: Sources) -> list[Mistake]:
    """The mistakes in file order, those without a place first; what parsing half a text made up is left out."""
    positions = Positions(sources.text) if sources.text else None
    kept = [p for p in problems if not (sources.recovered and (p.absent or p.at == "missing"))]
    mistakes = {_located(problem, sources, positions): None for problem in kept}
    return sorted(mistakes, key=lambda m: (m.line, m.column))


def _located(problem: Problem, sources: Sources, positions: Positions | None) -> Mistake:
    origin = problem.source or next(
        (
            sources.origins[problem.loc[:n]]
            for n in range(len(problem.loc), 0, -1)
            if problem.loc[:n] in sources.origins
        ),
        "",
    )
    where = dotted(problem.loc) or problem.source or (str(sources.file) if sources.file else "configuration")
    if origin and origin not in where:
        where = f"{where} ({origin})"
    place = None
    if problem.line:
        place = Place(problem.line, problem.column, problem.column + 1)
    elif positions is not None and problem.loc and (not origin or origin.startswith("$")):
        place = _place(problem, positions)
    if place is None or positions is None:
        return Mistake(where, mask(problem.message), sources.file, hint=mask(problem.hint))
    line = _without_secrets(positions.lines[place.line - 1], place, problem)
    return Mistake(
        where, mask(problem.message), sources.file, place.line, place.column, line, mask(problem.hint)
    )  # fmt: skip


def _place(problem: Problem, positions: Positions) -> Place | None:
    if problem.at == "key":
        return positions.key(problem.loc) or positions.nearest(problem.loc)
    if problem.at == "missing":
        return positions.nearest(problem.loc[:-1])
    return positions.value(problem.loc) or positions.nearest(problem.loc)


def _without_secrets(line: str, place: Place, problem: Problem) -> str:
    """The line as it may be shown: the mistaken value blanked if it is a secret, and every other secret on the line."""

    def blank(found: re.Match[str]) -> str:
        name = found[1].rpartition("/")[2].rpartition(".")[2]
        hidden = is_secret_name(name) and not re.match(r"[\"']\$(env|var|res|file):", found[3])
        return f"{found[1]}{found[2]}{found[3][0]}{MASK}{found[3][0]}" if hidden else found[0]

    if not problem.loc:  # it could not be parsed: whatever follows a secret's name may be the secret
        ends = [key.end() for key in _KEY.finditer(line) if is_secret_name(key[1].rpartition(".")[2])]
        return mask(f"{line[: ends[0]]} {MASK}" if ends else line)
    secret = is_secret(problem.loc) and problem.at == "value"
    head, shown, tail = line[: place.column - 1], line[place.column - 1 : place.end - 1], line[place.end - 1 :]
    if secret and not re.match(r"[\"']?\$(env|var|res|file):", shown):
        return _ASSIGNED.sub(blank, head) + f'"{MASK}"' + mask(_ASSIGNED.sub(blank, tail))
    return mask(_ASSIGNED.sub(blank, line))


def render(error: ConfigError, color: bool = False) -> str:
    """All mistakes as text, each with its source line and a caret under the place."""
    return "\n".join(_shown(mistake, color) for mistake in error.mistakes) + "\n" + _count(error)


def _shown(mistake: Mistake, color: bool) -> str:
    bold, red, blue, dim, end = ("\033[1m", "\033[31m", "\033[36m", "\033[2m", "\033[0m") if color else ("",) * 5
    place = f"{_short(mistake.file)}:{mistake.line}:{mistake.column}: " if mistake.line else ""
    subject = "" if mistake.file and mistake.where == str(mistake.file) and mistake.line else f"{mistake.where}: "
    lines = [f"{bold}{place}{subject}{end}{red}{mistake.message}{end}"]
    if mistake.source.strip():
        source, column = _window(mistake.source, mistake.column)
        number = f"{mistake.line:5}"
        lines.append(f"{dim}{number} |{end} {source}")
        lines.append(
            f"{dim}      |{end} {_padding(source, column)}{red}^{end}"
            + (f" {blue}{mistake.hint}{end}" if mistake.hint else "")
        )
    elif mistake.hint:
        lines[0] += f" {blue}({mistake.hint}){end}"
    return "\n".join(lines)


def _count(error: ConfigError) -> str:
    number = len(error.mistakes)
    return f"{number} mistake{'s' if number > 1 else ''}.\n"


def _short(file: Path | None) -> str:
    try:
        return str(file.absolute().relative_to(Path.cwd())) if file else ""
    except ValueError:
        return str(file)


def _window(source: str, column: int) -> tuple[str, int]:
    """The part of a long line around the caret, control characters made visible."""
    safe = "".join(c if c == "\t" or c.isprintable() else "�" for c in source)
    start = max(0, min(column - 1 - _WIDTH // 2, len(safe) - _WIDTH))
    cut = safe[start : start + _WIDTH]
    return ("…" + cut[1:] if start else cut) + ("…" if start + _WIDTH < len(safe) else ""), column - start


def _padding(source: str, column: int) -> str:
    """What brings the caret under its column: tabs stay tabs, wide characters take two."""
    before = source[: column - 1].ljust(column - 1)
    return "".join("\t" if c == "\t" else "  " if unicodedata.east_asian_width(c) in "WF" else " " for c in before)
