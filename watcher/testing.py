"""For trigger authors: run a script against a fake site, and make sure that it finds each thing exactly once."""

from __future__ import annotations

import asyncio
import inspect
import json
import random
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qsl, urlsplit

from watcher import diff, ids
from watcher.context import Context, Unchanged, use
from watcher.errors import TriggerError
from watcher.http import FetchOptions
from watcher.http.fetcher import name_of
from watcher.scripts.entries import Picked, entries
from watcher.scripts.listing import Row, Sink, drain, drain_sync
from watcher.scripts.loading import Loaded, failure, load, read
from watcher.values import UNSET, Diff, Entry, FirstRun, Json, Listing, MaxChange, Memory, Request, Response, Seen
from watcher.values import Watcher as _Watcher

__all__ = ["FakeSource", "Result", "Trial", "conform", "request_params", "run"]

T = TypeVar("T")

Answer = Json | str | bytes | Response | BaseException | Callable[[Request], Any]
"""What a fake site gives: text, bytes, a `watcher.values.Response`, an error to raise, a function of the request that
gives one of these, or any other JSON value."""

Site = Mapping[str, Answer] | Callable[[Request], Answer]
"""Answers by URL, with or without its query; or one function for every request."""

_MOST_ITEMS = 100_000
_MOST_BYTES = 64 * 1024 * 1024
_BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


# --- one call ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """What one call of a script came to."""

    listing: Listing
    requests: tuple[Request, ...]  # in the order in which they were made

    @property
    def items(self) -> list[Json]:
        return [entry.item for entry in self.listing.entries]

    @property
    def keys(self) -> list[str]:
        return [diff.key_of(entry) for entry in self.listing.entries]

    @property
    def state(self) -> Json:
        """What the script set, or `watcher.values.UNSET`."""
        return self.listing.state

    @property
    def unchanged(self) -> bool:
        """The source said that nothing moved."""
        return self.listing.unchanged


def run(
    script: str | Path | Callable[..., Any],
    args: Mapping[str, Json] | None = None,
    *,
    state: Json = UNSET,
    since: Json = None,
    site: Site | None = None,
    resources: Mapping[str, Json] | None = None,
    variables: Mapping[str, str] | None = None,
    key: str | None = None,
    cursor: str | None = None,
) -> Result:
    """Call a trigger once, here in this process, without the network and without a database.

        result = run("triggers/releases.py", {"repo": "a/b"}, site={"https://api.example.com/releases": [{"id": 1}]})
        assert result.keys == ["1"]

    ``script`` is a file, or a main. ``state`` is what `get_state` gives; ``key`` and ``cursor`` are those of the
    configuration, before the label's. What the script raises comes out as TriggerError.
    """
    trial = Trial(script, args, site=site, resources=resources, variables=variables, key=key, cursor=cursor)
    trial.memory = replace(trial.memory, state=state)
    return trial.call(since)


class _Reach(Context):
    """What a script reaches during a test: the fake site, and what the test gave it."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(state=trial.memory.state, state_path="f/watchers/test")
        self._trial = trial
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def shared(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="watcher-test-")
        return Path(self._folder.name)

    def close(self) -> None:
        super().close()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def get_resource(self, path: str) -> Json:
        return _given(self._trial.resources, path.removeprefix("$res:"), "resource")

    def get_variable(self, path: str) -> str:
        return str(_given(self._trial.variables, path.removeprefix("$var:"), "variable"))

    async def fetch(self, request: Request, options: FetchOptions) -> Response:
        return self.fetch_sync(request, options)

    def fetch_sync(self, request: Request, options: FetchOptions) -> Response:
        return self._trial.answer(request, options)


def _given(values: Mapping[str, Any], path: str, what: str) -> Any:
    if path not in values:
        raise TriggerError(f"the test gives no {what} {path}: add it to `{what}s`", kind="missing")
    return values[path]


class Trial:
    """A watcher of one script that lives in memory: `poll` runs it, works out what is new, and remembers it.

    trial = Trial("my_trigger.py", site=lambda request: todays_answer, on=("new", "changed"))
    trial.poll()                              # the baseline
    assert [find.key for find in trial.poll().finds] == ["42"]
    """

    def __init__(
        self,
        script: str | Path | Callable[..., Any],
        args: Mapping[str, Json] | None = None,
        *,
        site: Site | None = None,
        resources: Mapping[str, Json] | None = None,
        variables: Mapping[str, str] | None = None,
        first_run: Literal["baseline", "all"] = "baseline",
        **watcher: Any,
    ) -> None:
        self._loaded = _load(script)
        self.args = dict(args or {})
        self.site: Site = site if site is not None else {}
        self.resources = resources or {}
        self.variables = variables or {}
        self.watcher = _Watcher(
            **{
                "name": "test",
                "trigger": str(self._loaded.path),
                "script": self._loaded.path,
                "first_run": FirstRun(first_run),
                "max_change": MaxChange(share=None),
                **watcher,
            }
        )
        self.label = diff.effective(self.watcher, self._loaded.label)
        self.memory = Memory()
        self.seen: dict[bytes, Seen] = {}
        self.now = _BEGIN
        self._requests: list[Request] = []
        self._validators: dict[str, Mapping[str, str]] = {}
        self._recent: list[Entry] = []

    def call(self, since: Json = None) -> Result:
        """Call the script; remember nothing."""
        self._requests, self._validators, self._recent = [], {}, []
        return Result(self._listing(since), tuple(self._requests))

    def poll(self) -> Diff:
        """One run, committed. What the script or the source did wrong comes out as TriggerError, and changes nothing.

        AssertionError if the run would have been quarantined.
        """
        listing = self.call(diff.floor(self.label, self.memory)).listing
        known = self._known(diff.hashes(self.watcher, self._loaded.label, self.memory, listing))
        if "removed" in self.label.on and listing.complete:
            known |= {key: row for key, row in self.seen.items() if row.present}
        proposed = diff.compare(self.watcher, self._loaded.label, self.memory, listing, known, self.now)
        assert not proposed.quarantine, proposed.quarantine
        if not listing.unchanged:
            self.memory = proposed.memory
            self.seen |= {row.key_hash: row for row in proposed.learn}
        return proposed

    def answer(self, request: Request, options: FetchOptions) -> Response:
        """What the fake site says to a request; 304 where the script asked for it and nothing moved."""
        self._requests.append(request)
        response = _as_response(_find_answer(self.site, request), request)
        if not options.stop_if_unchanged or response.status != 200:
            return response
        name, validators = name_of(request), {"digest": ids.content_hash(response.body.hex()).hex()}
        self._validators[name] = validators
        if self.memory.validators.get(name) == validators:
            return replace(response, status=304, body=b"")
        return response

    def _listing(self, since: Json) -> Listing:
        loaded, rows = self._loaded, list[Row]()
        picked = Picked(loaded.marked, self.watcher.key, self.watcher.cursor)
        sink = Sink(picked, _MOST_ITEMS, _MOST_BYTES, rows.append)
        turned = 0

        def turn() -> bool:
            nonlocal turned
            page, turned = _entries(rows[turned:]), len(rows)
            sink.waiting = 0
            return self._goes_on(page)

        async def turn_in_loop() -> bool:
            return turn()

        reach, unchanged = _Reach(self), False
        try:
            with use(reach):
                result = loaded.main(**loaded.arguments.bind(self.args, since))
                if inspect.isasyncgen(result) or inspect.isawaitable(result):
                    _wait(_in_context(reach, reach.closing(drain(result, sink, turn_in_loop))))
                else:
                    drain_sync(result, sink, turn)
        except Unchanged:
            unchanged = True
        except Exception as error:
            raise failure(error, loaded.path) from error
        found = () if unchanged else _entries(rows)
        return Listing(
            loaded.label, found, unchanged, sink.complete, sink.capped, reach.staged, dict(self._validators),
            warnings=picked.warnings(), gap=reach.gap,
        )  # fmt: skip

    def _goes_on(self, page: Sequence[Entry]) -> bool:
        self._recent = [*self._recent, *page][-max(len(page), 10) :]
        known = self._known([ids.key_hash(diff.key_of(entry)) for entry in self._recent])
        return len(self._recent) < 10 or diff.window(self.label, self.memory, self._recent, known)

    def _known(self, hashes: Sequence[bytes]) -> dict[bytes, Seen]:
        return {key: self.seen[key] for key in hashes if key in self.seen}


def _load(script: str | Path | Callable[..., Any]) -> Loaded:
    if not callable(script):
        path = Path(script)
        try:
            return load(read(path))
        except Exception as error:
            raise failure(error, path) from error
    from watcher.scripts.arguments import Arguments
    from watcher.trigger import marked

    module = inspect.getmodule(script)
    assert module is not None
    path = Path(inspect.getsourcefile(script) or "main.py")
    return Loaded(path, module, script, marked(script), Arguments(script))


def _entries(rows: Sequence[Row]) -> list[Entry]:
    return entries([[key, cursor, json.loads(text)] for key, cursor, text in rows])


async def _in_context(reach: Context, work: Coroutine[Any, Any, None]) -> None:
    with use(reach):
        await work


def _wait(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also inside a test that has a loop of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    outcome: list[T | BaseException] = []

    def in_thread() -> None:
        try:
            outcome.append(asyncio.run(work))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def request_params(request: Request) -> dict[str, str]:
    """The query of a request's URL."""
    return dict(parse_qsl(urlsplit(request.url).query, keep_blank_values=True))


def _find_answer(site: Site, request: Request) -> Answer:
    if callable(site):
        return site(request)
    bare = request.url.partition("?")[0]
    for url in (request.url, bare):
        if url in site:
            found = site[url]
            return found(request) if callable(found) else found
    raise TriggerError(f"the test's site has no {bare}: it has {', '.join(site) or 'nothing'}", kind="unreachable")


def _as_response(answer: Answer, request: Request) -> Response:
    if isinstance(answer, BaseException):
        raise answer
    if isinstance(answer, Response):
        return replace(answer, url=answer.url or request.url)
    if isinstance(answer, bytes):
        return Response(200, {}, answer, request.url)
    if isinstance(answer, str):
        return Response(200, {"content-type": "text/plain; charset=utf-8"}, answer.encode(), request.url)
    return Response(200, {"content-type": "application/json"}, json.dumps(answer).encode(), request.url)


# --- the conformance kit ----------------------------------------------------------------------------------------------

Trouble = Literal["ties", "lag", "edits", "deletions", "reorder", "drift", "errors"]
TROUBLES: tuple[Trouble, ...] = ("ties", "lag", "edits", "deletions", "reorder", "drift", "errors")


@dataclass(slots=True)
class Record:
    """One thing in a fake source."""

    number: int
    at: datetime  # when it was made, as the source says
    version: int = 0
    visible: datetime | None = None  # when the source's index has it


def _plain(record: Record) -> Json:
    return {"id": record.number, "at": record.at.isoformat().replace("+00:00", "Z"), "version": record.version}


@dataclass
class FakeSource:
    """A source that does what sources do: ties instants, lags, edits, deletes, sorts anew, shifts its pages, fails.

    It answers any URL with its records, newest first, as JSON. Tell it how the API that the script expects looks:

    Args:
        item: one record as the API shows it; its number must be in the key, its version in the rest.
        wrap: the whole answer around a page of items.
        size: items on a page.
        page, first_page: the name of the page number's parameter, and the number of the first page.
        offset: the name of the offset's parameter, where there are no page numbers.
        since: the name of the parameter that asks for what is not older than an instant (RFC 3339).
        oldest_first: how it sorts.
    """

    item: Callable[[Record], Json] = _plain
    wrap: Callable[[list[Json]], Json] = list
    size: int = 20
    page: str | None = None
    first_page: int = 1
    offset: str | None = None
    since: str | None = None
    oldest_first: bool = False
    now: datetime = _BEGIN
    records: list[Record] = field(default_factory=list)
    deleted: set[int] = field(default_factory=set)
    fails: bool = False
    shuffles: random.Random | None = None  # answers in any order
    between: Callable[[], None] | None = None  # called after each page: the listing shifts under the reader
    _next: int = 0

    def add(self, count: int = 1, *, late: timedelta = timedelta(), hidden: timedelta = timedelta()) -> list[Record]:
        """New records. ``late`` dates them back; ``hidden`` keeps them out of the index for so long."""
        made = []
        for _ in range(count):
            made.append(Record(self._next, self.now - late, visible=self.now + hidden))
            self._next += 1
        self.records += made
        return made

    def edit(self, record: Record) -> None:
        record.version += 1

    def delete(self, record: Record) -> None:
        self.records.remove(record)
        self.deleted.add(record.number)

    def listed(self) -> list[Record]:
        """What the index has now, in the source's order."""
        found = [record for record in self.records if record.visible is None or record.visible <= self.now]
        return sorted(found, key=lambda r: (r.at, r.number), reverse=not self.oldest_first)

    def __call__(self, request: Request) -> Answer:
        """Answer one request."""
        if self.fails:
            return Response(500, {"content-type": "text/html"}, b"<h1>Internal Server Error</h1>")
        asked = request_params(request)
        found = self.listed()
        if self.since and asked.get(self.since):
            earliest = datetime.fromisoformat(asked[self.since])
            found = [record for record in found if record.at >= earliest]
        start = 0
        if self.page:
            start = (int(asked.get(self.page, self.first_page)) - self.first_page) * self.size
        elif self.offset:
            start = int(asked.get(self.offset, 0))
        page = found[start : start + self.size]
        if self.shuffles:
            self.shuffles.shuffle(page)
        answer = self.wrap([self.item(record) for record in page])
        if self.between:
            self.between()
        return answer


def conform(
    script: str | Path | Callable[..., Any],
    args: Mapping[str, Json] | None = None,
    *,
    source: Callable[[], FakeSource] = FakeSource,
    troubles: Sequence[Trouble] = TROUBLES,
    lag: timedelta = timedelta(),
    burst: int = 5,
    rounds: int = 40,
    seeds: Sequence[int] = range(10),
    **watcher: Any,
) -> int:
    """Run a script against a source full of trouble; AssertionError unless each thing is found exactly once.

        conform("my_trigger.py", {"url": "https://api.example.com/things"}, source=lambda: FakeSource(page="page"))

    Args:
        source: makes a fresh source that speaks the API of the script.
        troubles: what the source does. Without a whole listing deletions only shift what is left.
        lag: how late a record may appear, with the date of when it was made. A script with a cursor finds it only
            within its `lookback`.
        burst: records made between two runs, at most. More than the script's listing reaches back are lost, by any
            script.
        seeds: one history each; a failure names its own.
        watcher: `key`, `cursor`, `lookback`, `on` as in the configuration.

    Returns:
        How many items were found, over all histories.
    """
    return sum(
        _History(script, args, source(), set(troubles), lag, burst, seed, watcher).play(rounds) for seed in seeds
    )


class _History:
    """One history of one source, from one seed."""

    def __init__(
        self,
        script: str | Path | Callable[..., Any],
        args: Mapping[str, Json] | None,
        source: FakeSource,
        troubles: set[Trouble],
        lag: timedelta,
        burst: int,
        seed: int,
        watcher: Mapping[str, Any],
    ) -> None:
        self.random = random.Random(seed)  # noqa: S311  (a history that can be repeated)
        self.source = source
        self.troubles = troubles
        self.lag = lag
        self.burst = burst
        self.seed = seed
        self.trial = Trial(script, args, site=source, **watcher)
        self.told: list[str] = []
        self.mirror: dict[str, Json] = {}  # what a reader of the items believes
        self.counts: dict[str, int] = {}  # how often each key was found as new
        self.expected: dict[str, int] = {}  # key → the record's number, of all that had to be found
        self.baseline: set[str] = set()

    def play(self, rounds: int) -> int:
        self.source.add(self.random.randint(0, self.source.size))
        self.source.now += timedelta(minutes=1)
        self.baseline = set(map(self._key, self.source.records))
        self._poll()
        assert not self.counts, self._story("the first run must be a baseline")
        for _ in range(rounds):
            with self._trouble():
                self._poll()
        self.source.now += self.lag + timedelta(minutes=1)
        for _ in range(3):  # in peace what is still missing must come
            self._poll()
        self._judge()
        return len(self.counts)

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        """A while passes, and the next run has a bad day."""
        source, chance = self.source, self.random.random
        if "ties" not in self.troubles or chance() < 0.6:
            source.now += timedelta(seconds=self.random.randint(1, 90))
        self._grow(self.random.randint(0, self.burst))
        alive = [record for record in source.listed() if self._key(record) in self.trial_keys()]
        if alive and "edits" in self.troubles and chance() < 0.3:
            source.edit(self.random.choice(alive))
            self.told.append("edited one")
        if len(alive) > 1 and "deletions" in self.troubles and chance() < 0.3:
            source.delete(self.random.choice(alive))
            self.told.append("deleted one")
        source.fails = "errors" in self.troubles and chance() < 0.2
        source.shuffles = self.random if "reorder" in self.troubles and chance() < 0.3 else None
        source.between = (lambda: self._grow(self.random.randint(0, 1))) if "drift" in self.troubles else None
        yield
        source.fails, source.shuffles, source.between = False, None, None

    def _grow(self, count: int) -> None:
        for _ in range(count):
            hidden = self.lag * self.random.random() if "lag" in self.troubles and self.random.random() < 0.5 else None
            (record,) = self.source.add(hidden=hidden or timedelta())
            self.expected[self._key(record)] = record.number
        if count:
            self.told.append(f"made {count}")

    def trial_keys(self) -> set[str]:
        """What may be edited or deleted: only what was met already, for nobody can find what came and went unseen."""
        return set(self.counts) | self.baseline

    def _key(self, record: Record) -> str:
        pick = Picked(self.trial._loaded.marked, self.trial.watcher.key, None)
        (key, _, _) = pick.entry(self.source.item(record))
        assert key is not None, "FakeSource.item gives no key that the script's `key` finds"
        return key

    def _poll(self) -> None:
        self.trial.now = self.source.now
        before = (self.trial.memory, dict(self.trial.seen))
        trouble: TriggerError | None = None
        try:
            proposed = self.trial.poll()
        except TriggerError as error:
            trouble = error
        if trouble:
            assert self.source.fails, self._story(f"the script failed: {trouble}")
            assert before == (self.trial.memory, self.trial.seen), self._story("a failed run must change nothing")
            self.told.append("run: failed")
            return
        self.told.append("run: " + (", ".join(f"{f.change} {f.key}" for f in proposed.finds) or "quiet"))
        for find in proposed.finds:
            if find.change == "new":
                self.counts[find.key] = self.counts.get(find.key, 0) + 1
                assert find.key not in self.baseline, self._story(f"{find.key} was there at the first run")
                assert self.counts[find.key] == 1, self._story(f"{find.key} was found twice")
            if find.change == "removed":
                self.mirror.pop(find.key, None)
            else:
                self.mirror[find.key] = find.item

    def _judge(self) -> None:
        missing = sorted(set(self.expected) - set(self.counts))
        assert not missing, self._story(f"never found: {', '.join(missing)}")
        if "changed" in self.trial.label.on:
            now = {self._key(record): self.source.item(record) for record in self.source.listed()}
            stale = [key for key, item in self.mirror.items() if key in now and now[key] != item]
            assert not stale, self._story(f"changes were missed: {', '.join(stale)}")
        if "removed" in self.trial.label.on:
            alive = {self._key(record) for record in self.source.listed()}
            assert set(self.mirror) <= alive, self._story(f"removals were missed: {set(self.mirror) - alive}")

    def _story(self, what: str) -> str:
        return f"seed {self.seed}: {what}. What happened:\n" + "\n".join(f"  {line}" for line in self.told[-40:])
