"""Where each key and value of a TOML text stands, so that a mistake can be pointed at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import tree_sitter
import tree_sitter_toml

Loc = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """A stretch of one line. Line and column count from 1, in characters; ``end`` is one past the last column."""

    line: int
    column: int
    end: int


class Positions:
    """The places of a whole text, found once."""

    def __init__(self, text: str) -> None:
        self._raw = text.encode("utf-8", "surrogatepass").split(b"\n")
        self.lines = text.split("\n")
        self._keys: dict[Loc, tree_sitter.Node] = {}
        self._values: dict[Loc, tree_sitter.Node] = {}
        parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_toml.language()))
        self._tree = parser.parse(text.encode("utf-8", "surrogatepass"))
        self._document(self._tree.root_node)

    def key(self, loc: Loc) -> Place | None:
        """Where the key, or the header of the table, stands. None if the text has none."""
        return self._place(self._keys.get(loc))

    def value(self, loc: Loc) -> Place | None:
        """Where the value stands; of a table, its header."""
        return self._place(self._values.get(loc) or self._keys.get(loc))

    def nearest(self, loc: Loc) -> Place | None:
        """Where the innermost table stands that is there: the place for something that is missing."""
        while loc:
            place = self.key(loc)
            if place is not None:
                return place
            loc = loc[:-1]
        return None

    def _place(self, node: tree_sitter.Node | None) -> Place | None:
        if node is None:
            return None
        row, start = node.start_point
        raw = self._raw[row]
        stop = node.end_point[1] if node.end_point[0] == row else len(raw)
        first, last = (len(raw[:at].decode("utf-8", "replace")) for at in (start, stop))
        return Place(row + 1, first + 1, max(last, first + 1) + 1)

    def _document(self, root: tree_sitter.Node) -> None:
        counts: dict[Loc, int] = {}
        for node in root.children:
            if node.type == "pair":
                self._pair(node, ())
            elif node.type in ("table", "table_array_element"):
                header = next((child for child in node.children if child.type.endswith("key")), None)
                if header is None:
                    continue
                base: Loc = ()
                for name in _names(header):
                    base = (*base, name)
                    if base in counts and base != tuple(_names(header)):
                        base = (*base, counts[base] - 1)
                    self._keys.setdefault(base, header)
                if node.type == "table_array_element":
                    counts[base] = counts.get(base, 0) + 1
                    base = (*base, counts[base] - 1)
                self._keys[base] = header
                for child in node.children:
                    if child.type == "pair":
                        self._pair(child, base)

    def _pair(self, node: tree_sitter.Node, base: Loc) -> None:
        key, value = node.children[0], node.children[-1]
        loc = base
        for name in _names(key):
            loc = (*loc, name)
            self._keys.setdefault(loc, key)
        self._value(value, loc)

    def _value(self, node: tree_sitter.Node, loc: Loc) -> None:
        self._values.setdefault(loc, node)
        if node.type == "inline_table":
            for child in node.children:
                if child.type == "pair":
                    self._pair(child, loc)
        elif node.type == "array":
            elements = (child for child in node.children if child.type not in ("[", "]", ",", "comment"))
            for index, child in enumerate(elements):
                self._keys.setdefault((*loc, index), child)
                self._value(child, (*loc, index))


def _names(key: tree_sitter.Node) -> Iterator[str]:
    if key.type == "dotted_key":
        for child in key.children:
            if child.type != ".":
                yield from _names(child)
        return
    text = (key.text or b"").decode("utf-8", "replace")
    if key.type == "bare_key":
        yield text
    elif text.startswith("'"):
        yield text[1:-1]
    else:
        yield _unescaped(text)


def _unescaped(text: str) -> str:
    """TOML's basic strings are JSON's but for ``\\U`` and ``\\e``, which no key of ours needs."""
    try:
        return str(json.loads(text))
    except ValueError:
        return text[1:-1]
