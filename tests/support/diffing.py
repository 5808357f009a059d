"""A watcher's memory and ledger in a few lines: what `diff.compare` proposes, applied as a commit would."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from watcher import diff
from watcher.values import Diff, Entry, Find, Json, Label, Listing, Memory, Seen, Watcher

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)

KEYED = Label(style="listing", key="id")
DATED = Label(style="cursor", key="id", cursor="at")
WINDMILL = Label(style="windmill")


def watching(**options: Any) -> Watcher:
    return Watcher(**{"name": "w", "trigger": "./t.py", "script": Path("/t.py"), **options})


def entry(item: Json, label: Label = KEYED) -> Entry:
    """An item as a worker hands it over, with the label's plain names for key and cursor."""
    if not isinstance(item, dict):
        return Entry(item, None)
    key = item.get(label.key or "id")
    return Entry(item, None if key is None else str(key), item.get(label.cursor) if label.cursor else None)


@dataclass
class Ledger:
    """One watcher over many runs. ``see`` is one run: probe, compare, commit."""

    watcher: Watcher = field(default_factory=watching)
    label: Label = KEYED
    memory: Memory = field(default_factory=Memory)
    seen: dict[bytes, Seen] = field(default_factory=dict)
    now: datetime = NOW
    past: Mapping[bytes, Seen] = field(default_factory=dict)
    rewound: bool = False

    def look(self, items: Iterable[Json], **listing: Any) -> Diff:
        """What one run would propose."""
        label = diff.effective(self.watcher, self.label)
        what = Listing(self.label, [entry(item, label) for item in items], **listing)
        hashes = diff.hashes(self.watcher, self.label, self.memory, what)
        known = {h: self.seen[h] for h in hashes if h in self.seen}
        if "removed" in label.on and what.complete:
            known |= {h: row for h, row in self.seen.items() if row.present}
        return diff.compare(
            self.watcher, self.label, self.memory, what, known, self.now, past=self.past, rewound=self.rewound
        )

    def commit(self, proposed: Diff) -> None:
        assert proposed.memory.version == self.memory.version + 1
        self.memory = proposed.memory
        self.seen |= {row.key_hash: row for row in proposed.learn}

    def see(self, *items: Json, **listing: Any) -> Diff:
        """One run that is committed if it has anything to write. Raises AssertionError if it would be quarantined."""
        proposed = self.look(items, **listing)
        assert not proposed.quarantine, proposed.quarantine
        if not diff.silent(self.memory, proposed):
            self.commit(proposed)
        return proposed

    def configure(self, **options: Any) -> None:
        self.watcher = replace(self.watcher, **options)


def told(proposed: Diff) -> list[tuple[str, str]]:
    """Change and key of each item."""
    return [(find.change, find.key) for find in proposed.finds]


def keys(proposed: Diff) -> list[str]:
    return [find.key for find in proposed.finds]


def reasons(proposed: Diff) -> dict[str, str]:
    """Key → the last thing decided about it."""
    return {decision.key: decision.reason for decision in proposed.decisions}


def ids_of(finds: Iterable[Find]) -> list[tuple[str, int, bytes, str]]:
    """What an item's id is made of."""
    return [(find.key, find.revision, find.content, find.change) for find in finds]
