"""A watcher in a few lines: a real script, a real fetcher, a ledger of keys in memory."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from watcher.http import Fetcher, FetchOptions
from watcher.scripts import Call, Scripts, builtins
from watcher.values import UNSET, Entry, HttpSettings, Json, Listing, Request, Response

TRIGGERS = builtins()


@dataclass
class Web:
    """The service as a script sees it: it fetches, and stops paging where a whole page is known."""

    fetcher: Fetcher
    known: MutableMapping[str | None, Json] = field(default_factory=dict)
    validators: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    learnt: dict[str, Mapping[str, str]] = field(default_factory=dict)
    patient: bool = False  # never stops paging

    async def fetch(self, request: Request, options: FetchOptions) -> Response:
        return await self.fetcher.fetch(request, options, self.validators, self.learnt)

    async def resource(self, path: str) -> Json:
        raise AssertionError(path)

    async def variable(self, path: str) -> str:
        raise AssertionError(path)

    async def page(self, entries: Sequence[Entry]) -> bool:
        return self.patient or not all(entry.key in self.known for entry in entries)


class Watching:
    """Polls one trigger with one set of arguments; ``poll`` gives what it has not given before."""

    def __init__(self, scripts: Scripts, fetcher: Fetcher, trigger: str, **args: Any) -> None:
        self.scripts = scripts
        self.web = Web(fetcher)
        self.script = TRIGGERS / f"{trigger}.py"
        self.args = args
        self.state: Json = UNSET
        self.listing: Listing | None = None

    async def look(self, *, cwd: Path | None = None) -> Listing:
        """One run, and nothing remembered of it but the state and the validators."""
        self.web.learnt = {}
        listing = await self.scripts.call(Call(self.script, self.args, state=self.state, cwd=cwd), self.web)
        if listing.state is not UNSET:
            self.state = listing.state
        self.web.validators = dict(self.web.learnt)
        self.listing = listing
        return listing

    async def poll(self) -> list[Any]:
        """The new items of one run."""
        found = []
        for entry in (await self.look()).entries:
            if entry.key not in self.web.known:
                found.append(entry.item)
            self.web.known[entry.key] = entry.item
        return found

    async def changes(self) -> list[tuple[str, str]]:
        """Change and key of everything that differs from the run before."""
        before = dict(self.web.known)
        listed = {entry.key: entry.item for entry in (await self.look()).entries}
        self.web.known = dict(listed)
        found = [
            ("new" if key not in before else "changed", str(key)) for key in listed if before.get(key) != listed[key]
        ]
        return sorted(found + [("removed", str(key)) for key in before if key not in listed])


def fetcher(**settings: Any) -> Fetcher:
    return Fetcher(HttpSettings(**settings), lambda: datetime.now(UTC))
