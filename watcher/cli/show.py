"""How results reach a person or a program: JSON or tables on stdout, words on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import IO, Any

from watcher.errors import ConfigError
from watcher.values import Json

Row = Mapping[str, Any]
Columns = Mapping[str, str | Callable[[Row], str]]
"""Title → the name of a field, or what to make of a row."""

_UNITS = ((90, "s", 1), (5400, "m", 60), (129600, "h", 3600), (float("inf"), "d", 86400))
_PAINT = {"red": "31", "green": "32", "yellow": "33", "dim": "2", "bold": "1"}
_COLOURS = {
    "ok": "green", "delivered": "green", "succeeded": "green", "OK": "green",
    "failed": "red", "failing": "red", "dead": "red", "quarantined": "red", "FAIL": "red",
    "held": "yellow", "retrying": "yellow", "silent": "yellow", "closed": "yellow",
    "paused": "yellow", "conflict": "yellow", "gone": "yellow", "WARN": "yellow",
    "disabled": "dim", "quiet": "dim", "seen": "dim",
}  # fmt: skip


def colour_of(word: str) -> str:
    """The colour of a condition, outcome or status; empty for other words."""
    return _COLOURS.get(word, "")


def colourful(stream: IO[str]) -> bool:
    """Colour is for people at a terminal who did not refuse it (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: IO[str]) -> str:
    return f"\x1b[{_PAINT[colour]}m{text}\x1b[0m" if colour and colourful(stream) else text


def words(text: str) -> None:
    """A sentence for the person, out of the way of the data."""
    print(text, file=sys.stderr)


def error(text: str) -> None:
    """What went wrong, without any secret that this process has met."""
    from watcher.log import mask

    print(f"{paint('error:', 'red', sys.stderr)} {mask(text)}", file=sys.stderr)


def mistakes(error: ConfigError) -> None:
    """Every mistake of a configuration, each with its line and a caret."""
    from watcher import config

    words(config.render(error, colourful(sys.stderr)))


def give(value: Json, as_json: bool, render: Callable[[Json], None]) -> None:
    """The result of a command: as JSON when asked for, else as ``render`` prints it."""
    if as_json:
        print(json.dumps(value, indent=2, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))
    else:
        render(value)


def table(rows: Sequence[Row], columns: Columns, nothing: str) -> None:
    """Aligned columns . The last column is cut to the terminal, never in a pipe."""
    if not rows:
        words(nothing)
        return
    cells = [[title.upper() for title in columns]]
    for row in rows:
        cells.append([_cell(row.get(c) if isinstance(c, str) else c(row)) for c in columns.values()])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    limit = _width()
    for number, line in enumerate(cells):
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        padded[-1] = line[-1]
        room = limit - sum(len(text) + 2 for text in padded[:-1]) if limit else 0
        if limit and room > 8 and len(padded[-1]) > room:
            padded[-1] = padded[-1][: room - 1] + "…"
        colours = ["bold" if number == 0 else colour_of(text.strip()) for text in line]
        print("  ".join(paint(t, c, sys.stdout) for t, c in zip(padded, colours, strict=True)).rstrip())


def fields(pairs: Iterable[tuple[str, Any]]) -> None:
    """One thing, a line per fact; facts that are empty are left out."""
    kept = [(name, _cell(value)) for name, value in pairs if value not in (None, "", [], {})]
    width = max((len(name) for name, _ in kept), default=0)
    for name, text in kept:
        print(f"{paint(name.ljust(width), 'bold', sys.stdout)}  {paint(text, _COLOURS.get(text, ''), sys.stdout)}")


def _width() -> int:
    return os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 0


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def clean(text: str, keep: str = "") -> str:
    """Without control characters: what a source wrote must not steer the reader's terminal."""
    return "".join(c if c.isprintable() or c in keep else f"\\x{ord(c):02x}" for c in text)


def when(text: str | None) -> str:
    """``2026-11-25 19:54:27Z`` out of RFC 3339."""
    return "-" if text is None else text[:19].replace("T", " ") + "Z"


def ago(text: str | None) -> str:
    """``12s ago`` or ``in 3m``."""
    if text is None:
        return "-"
    seconds = (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()
    size = abs(seconds)
    unit, length = next((u, n) for limit, u, n in _UNITS if size < limit)
    amount = f"{size / length:.0f}{unit}"
    return f"in {amount}" if seconds < 0 else f"{amount} ago"


def count(number: int, noun: str) -> str:
    """``1 item``, ``2 items``."""
    many = noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"
    return f"{number} {noun if number == 1 else many}"


def size(count: int) -> str:
    """``12.3 MB`` (1 MB = 10⁶ bytes)."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"
