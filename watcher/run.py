"""One run of one watcher: load, call, diff, commit."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

from cronsim import CronSim

from watcher import diff, ids, log, metrics
from watcher.diff.plan import Plan, dump, optional, written
from watcher.diff.recording import Recording
from watcher.errors import Conflict, Damaged, DeliveryError, StoreError, TriggerError, WatcherError
from watcher.failpoint import failpoint
from watcher.flows import shape
from watcher.http import FetchOptions
from watcher.http.fetcher import Fetcher
from watcher.resolve import Resolver
from watcher.scripts import Call, Scripts, shared
from watcher.staging import Session, Sessions, States, state_path
from watcher.store import meta, past, runs, seen, states, watchers
from watcher.store.db import Database
from watcher.store.watchers import Quiet, WatcherStatus
from watcher.values import (
    UNSET,
    Config,
    Decision,
    Diff,
    Entry,
    Find,
    Flow,
    Json,
    Label,
    Listing,
    Memory,
    NewDelivery,
    NewItem,
    Outcome,
    Proposal,
    Request,
    Response,
    RunRecord,
    Seen,
    StagedState,
    Watcher,
)

__all__ = ["Plan", "Runner"]

T = TypeVar("T")

_log = log.get("run")

_LONGEST_BACKOFF = timedelta(hours=1)
_LONGEST_WAIT = timedelta(days=1)  # that a source may ask for with Retry-After
_NO_SCHEDULE = timedelta(minutes=5)  # what counts as the interval of a watcher that is only run by hand
_SWEEP = timedelta(hours=1)
_LARGE = 1000  # entries
_AFTERWARDS = "everything was committed before this"
_SMALL_PAGE = 10  # pages of fewer entries are looked at together


class _Edited(TriggerError):
    """A script was replaced after it was described and before it ran."""


# --- what a script may ask during a run -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Host:
    """What the service answers to the script of one run."""

    fetcher: Fetcher
    resolver: Resolver
    db: Database
    watcher: Watcher
    label: Label  # the effective one
    memory: Memory
    validators_in: Mapping[str, Mapping[str, str]]
    states: States
    session: Session  # where what the script sets is staged
    whole: bool = False  # list everything this time, though the first page be known
    recording: Recording | None = None
    replay: bool = False  # answer from the recording
    validators: dict[str, Mapping[str, str]] = field(default_factory=dict)
    recent: list[Entry] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    async def fetch(self, request: Request, options: FetchOptions) -> Response:
        if self.replay and self.recording:
            return self.recording.answer(request)
        if self.recording is None:
            return await self.fetcher.fetch(request, options, self.validators_in, self.validators)
        response = await self.fetcher.fetch(request, replace(options, fresh=True), {}, self.validators)
        self.recording.add(request, response)
        return response

    async def resource(self, path: str) -> Json:
        return await self.resolver.resource(path)

    async def variable(self, path: str) -> str:
        return await self.resolver.variable(path)

    async def state(self, path: str) -> Json:
        """The state at a path, as this run wrote or would find it; UNSET if there is none."""
        return await self.states.read(path, self.session)

    async def stage(self, path: str, value: Json) -> None:
        await self.states.write(path, value, self.session)

    async def page(self, entries: Sequence[Entry]) -> bool:
        """Whether the next page is wanted."""
        if diff.whole_listing_needed(self.label):
            return True
        if self.memory.version == 0 or self.whole:
            # However long the source is, the run must end in time: half of it is for this, the rest for the last page.
            return time.monotonic() - self.began < self.watcher.timeout.total_seconds() / 2
        self.recent = [*self.recent, *entries][-max(len(entries), _SMALL_PAGE) :]
        if len(self.recent) < _SMALL_PAGE:
            return True
        hashes = [ids.key_hash(diff.key_of(entry)) for entry in self.recent]
        if self.replay and self.recording:
            known: Mapping[bytes, Seen] = self.recording.known
        else:
            async with self.db.read() as tx:
                known = await seen.probe(tx, self.watcher.name, hashes)
        return diff.window(self.label, self.memory, self.recent, known)


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Before:
    """What is known before a run."""

    status: WatcherStatus
    memory: Memory
    epoch: str
    newest: int  # the highest version that was ever given, also if it was forgotten by a reset


@dataclass(frozen=True, slots=True)
class _Looked:
    """What a run saw and what it would do about it."""

    before: _Before
    listing: Listing
    diff: Diff
    plan: Plan
    started_at: datetime


@dataclass(frozen=True, slots=True)
class _Recent:
    """What a quiet run learnt that is worth no commit."""

    version: int
    script: str
    validators: Mapping[str, Mapping[str, str]]


class Runner:
    """Runs watchers. Any number of runs may go on at once; two of one watcher end in one commit and one conflict."""

    def __init__(
        self,
        config: Callable[[], Config],
        db: Database,
        scripts: Scripts,
        fetcher: Fetcher,
        resolver: Resolver,
        clock: Callable[[], datetime],
        committed: Callable[[Collection[str]], None],
        sessions: Sessions | None = None,
    ) -> None:
        self.quiet: dict[str, Quiet] = {}  # what runs left that is not worth a transaction of its own
        self._config = config
        self._db = db
        self._scripts = scripts
        self._fetcher = fetcher
        self._resolver = resolver
        self._clock = clock
        self._committed = committed
        self._sessions = sessions or Sessions()
        self._states = States(config, db, resolver, clock, patience=self._sessions.patience)
        self._recent: dict[str, _Recent] = {}
        self._swept: dict[str, datetime] = {}  # when a watcher's source was last listed without stopping early
        self._warned: dict[str, tuple[str, ...]] = {}

    # --- the verbs

    async def run(self, name: str, *, tick_at: datetime | None = None, record: Path | None = None) -> RunRecord:
        """Run a watcher once and commit what it finds. ``tick_at`` is None for a run by hand, which waits for nothing.

        A script that fails, a source that is down, a doubt or a conflict is told by the record's outcome. Raises
        StoreError when the database cannot be read or written: nothing was committed then.
        """
        watcher, started = self._watcher(name), self._clock()
        with metrics.run_seconds.time():
            try:
                outcome = await self._run(watcher, started, tick_at, record)
            except WatcherError:
                raise
            except Exception as error:
                outcome = await self._broke(watcher, error, started, tick_at)
        metrics.runs.labels(name, outcome.outcome).inc()
        return outcome

    async def plan(self, name: str, *, record: Path | None = None) -> Plan:
        """What a run would commit now. Nothing is saved; ``record`` keeps what the source answered.

        Raises TriggerError, StoreError.
        """
        watcher, started = self._watcher(name), self._clock()
        before = await self._load(name)
        recording = None if record is None else Recording(name, started, before.memory)
        looked = await self._look(watcher, before, started, recording, conditional=False, dry=True)
        if recording is not None and record is not None:
            _keep(recording, record)
        return looked.plan

    async def test(self, name: str, recording: Path) -> Plan:
        """What the watcher, as it is now, would have found in a recorded run. Asks no source, saves nothing.

        Raises TriggerError, StoreError.
        """
        watcher, kept = self._watcher(name), _kept(recording)
        status, epoch = WatcherStatus(id=0, name=name, origin=name), "test"
        before = _Before(status, kept.memory, epoch, kept.memory.version)
        return (await self._look(watcher, before, kept.made_at, kept, conditional=False, replay=True, dry=True)).plan

    async def apply(self, plan: Plan) -> RunRecord:
        """Commit exactly what a plan says. Outcome ``conflict`` if anything was committed since it was made."""
        return await self._apply(plan, "approved" if plan.quarantine else "ok")

    async def approve(self, name: str) -> RunRecord:
        """Commit exactly what a quarantined run found, and let the watcher run again."""
        self._watcher(name)
        async with self._db.read() as tx:
            status = await watchers.get(tx, name)
            if status.quarantined_at is None:
                raise WatcherError(f"watchers.{name} is not in quarantine: there is nothing to approve")
            if status.quarantine_run is None:
                raise WatcherError(
                    f"watchers.{name} is in quarantine without a plan ({status.quarantine_reason}): "
                    f"see `watcher state history {name}`, then `state rollback` or `state reset`, then `resume`"
                )
            packed = await runs.plan(tx, status.quarantine_run)
        return await self._apply(Plan.unpack(packed), "approved")

    def note_ticks(self, name: str, *, skipped: int = 0, missed: int = 0) -> None:
        """Count ticks that led to no run."""
        self._note(name, Quiet(skipped=skipped, missed=missed))

    async def flush(self) -> None:
        """Write what quiet runs left in memory. Raises StoreError; nothing is forgotten then."""
        quiet, self.quiet = self.quiet, {}
        if not quiet:
            return
        now = self._clock()
        try:
            await self._db.write(lambda tx: watchers.flush(tx, quiet, now))
        except BaseException:
            for name, left in quiet.items():
                self._note(name, left)
            raise

    # --- one run

    async def _run(
        self, watcher: Watcher, started: datetime, tick_at: datetime | None, record: Path | None
    ) -> RunRecord:
        name = watcher.name
        try:
            before = await self._load(name)
        except Damaged as error:
            return await self._quarantine_damaged(watcher, error, started, tick_at)
        if waits := _why_not(before.status, started, tick_at):
            return RunRecord(name, "quiet", started, self._clock(), tick_at, warnings=(waits,))
        if before.status.quarantined_at is not None:
            reason = before.status.quarantine_reason
            return RunRecord(name, "quarantined", started, self._clock(), tick_at, error=reason)
        if tick_at is not None:
            self._note(name, Quiet(tick_at=tick_at))
        recording = None if record is None else Recording(name, started, before.memory)
        try:
            looked = await self._look(watcher, before, started, recording)
        except Damaged as error:
            return await self._quarantine_damaged(watcher, error, started, tick_at)
        except Conflict as error:
            return await self._lose(RunRecord(name, "conflict", started, self._clock(), tick_at, error=str(error)))
        except StoreError:
            raise
        except WatcherError as error:
            return await self._fail(watcher, before.status, error, started, tick_at)
        finally:
            if recording is not None and record is not None and recording.answers:
                _keep(recording, record)
        self._warn(name, looked.plan.proposal.run.warnings)
        if looked.plan.quarantine:
            return await self._quarantine(looked, tick_at)
        silent = diff.silent(before.memory, looked.diff) and not looked.plan.proposal.states
        if silent or (looked.listing.unchanged and before.memory.version == 0):
            return await self._be_quiet(looked, tick_at)
        return await self._commit(looked, tick_at)

    async def _load(self, name: str) -> _Before:
        async with self._db.read() as tx:
            status = await watchers.get(tx, name)
            memory = await states.load(tx, name)
            history = [] if memory.version else await states.history(tx, name, 1)
            newest = history[0].version if history else memory.version
            epoch = await meta.epoch(tx)
        return _Before(status, await states.whole(self._db, memory), epoch, newest)

    async def _look(
        self, watcher: Watcher, before: _Before, started: datetime, recording: Recording | None = None, **how: bool
    ) -> _Looked:
        """Call the script and diff what it lists. Writes nothing. ``how``: as `_look_once`."""
        try:
            return await self._look_once(watcher, before, started, recording, **how)
        except _Edited:
            return await self._look_once(watcher, before, started, recording, **how)

    async def _look_once(
        self,
        watcher: Watcher,
        before: _Before,
        started: datetime,
        recording: Recording | None,
        *,
        conditional: bool = True,
        replay: bool = False,
        dry: bool = False,
    ) -> _Looked:
        """Raises _Edited when the script that ran is not the one that was described: by the one's label the other's
        items would be diffed wrongly, a whole list taken for new ones."""
        memory = before.memory
        described = await self._scripts.describe(watcher.script)
        label = diff.effective(watcher, described.label)
        fingerprint = _fingerprint(watcher, label)
        whole = not replay and label.style == "listing" and self._sweep_is_due(watcher.name, started)
        file = self._config().file
        session = Session("watcher", watcher.name, state_path(watcher, file), started, state=memory.state, dry=dry)
        host = _Host(
            self._fetcher, self._resolver, self._db, watcher, label, memory,
            self._validators(watcher, memory, fingerprint, whole) if conditional else {},
            self._states, session, whole, recording, replay,
        )  # fmt: skip
        own_folder = described.style == "windmill" and watcher.script.parent != self._scripts.triggers
        call = Call(
            script=watcher.script,
            args=await self._resolver.value(dict(watcher.args)),
            state=memory.state,
            state_path=session.state_path,
            timeout=watcher.timeout,
            memory_limit=watcher.memory_limit,
            key=watcher.key,
            cursor=watcher.cursor if label.style == "cursor" else None,
            since=diff.floor(label, memory),
            cwd=None if own_folder else file and file.parent,  # where relative paths in `with` start
            workspace=self._config().workspace,
            job_id=session.job_id,
        )
        if own_folder:
            async with shared.own_folder() as folder:
                here = replace(call, cwd=folder, shared=lambda: folder / "shared")
                listing, staged = await self._call(here, host, session)
        else:
            async with shared.on_demand() as made:
                listing, staged = await self._call(replace(call, shared=made), host, session)
        if replace(listing.label, doc="") != replace(described.label, doc=""):
            raise _Edited(
                f"{watcher.script.name} was edited while it ran: the next run takes it as it is", kind="edited"
            )
        failpoint("after_fetch")
        listing = replace(listing, validators=host.validators)
        if whole and not listing.unchanged:
            self._swept[watcher.name] = started
        known, found_before = await self._known(watcher, label, memory, listing, before, recording, replay)
        rewound = memory.version > 0 and (
            bool(memory.policy.get("rewound")) or memory.policy.get("at", memory.version) != memory.version
        )

        def decide() -> tuple[Diff, tuple[NewItem, ...], list[Decision]]:
            try:
                proposed = diff.compare(
                    watcher, described.label, memory, listing, known, started, past=found_before, rewound=rewound
                )
                return proposed, *self._items(watcher, proposed.finds, before, started)
            except RecursionError as error:
                raise TriggerError("an item is nested too deeply", kind="junk") from error

        proposed, items, filtered = await _aside(len(listing.entries), decide)
        proposed = await self._remembered(watcher, before, proposed, fingerprint, replay)
        failpoint("after_diff")
        plan = self._plan(watcher, before, listing, proposed, items, filtered, started, staged)
        return _Looked(before, listing, proposed, plan, started)

    async def _call(self, call: Call, host: _Host, session: Session) -> tuple[Listing, tuple[StagedState, ...]]:
        """Call the script while it may come back by its token, and gather what it wrote meanwhile.

        Raises StoreError when it asked for a state that could not be read: its script may have taken that for none.
        """
        with self._sessions.open(session) as token:
            if not self._scripts.in_loop(call.script):
                call = replace(call, env=await self._sessions.environment(session, token, call.workspace))
            try:
                listing = await self._scripts.call(call, host)
            except TriggerError as error:
                if session.over:  # what it wrote was refused, and that is what it failed of
                    raise Conflict(f"watchers.{session.path}: another run was committed meanwhile") from error
                raise
            own, others = session.taken()
        return (listing if own is UNSET else replace(listing, state=own)), others

    async def _known(
        self,
        watcher: Watcher,
        label: Label,
        memory: Memory,
        listing: Listing,
        before: _Before,
        recording: Recording | None,
        replay: bool,
    ) -> tuple[Mapping[bytes, Seen], Mapping[bytes, Seen]]:
        """The ledger rows that the diff needs, and what was found before about keys that it no longer holds."""
        if replay and recording is not None:
            return recording.known, {}
        if listing.unchanged:
            return {}, {}
        hashes = await _aside(len(listing.entries), lambda: diff.hashes(watcher, label, memory, listing))
        found_before: Mapping[bytes, Seen] = {}
        async with self._db.read() as tx:
            known: dict[bytes, Seen] = {}
            if "removed" in label.on and label.style == "listing" and listing.complete and memory.version:
                known = await seen.present(tx, watcher.name)
            known |= await seen.probe(tx, watcher.name, [h for h in hashes if h not in known])
            if watcher.forget_after or memory.policy.get("reset") or (not memory.version and before.newest):
                found_before = await past.latest(tx, watcher.name, [h for h in hashes if h not in known])
        if recording is not None:
            recording.known = dict(known)
        return known, found_before

    async def _remembered(
        self, watcher: Watcher, before: _Before, proposed: Diff, fingerprint: str, replay: bool
    ) -> Diff:
        """The diff with what only a run knows: which version it makes, by which script, what was listed today."""
        touch = proposed.touch
        if touch and not replay:
            learnt = {row.key_hash for row in proposed.learn}
            async with self._db.read() as tx:
                today = seen.day_of(self._clock())
                old = await seen.listed_before(tx, watcher.name, [h for h in touch if h not in learnt], today)
            touch = tuple(h for h in touch if h in old or h in learnt)
        memory = proposed.memory
        policy = {**memory.policy, "at": before.newest + 1}
        if before.newest and not before.memory.version:
            policy["reset"] = True
        return replace(proposed, touch=touch, memory=replace(memory, script=fingerprint, policy=policy))

    def _plan(
        self,
        watcher: Watcher,
        before: _Before,
        listing: Listing,
        proposed: Diff,
        items: tuple[NewItem, ...],
        filtered: list[Decision],
        started: datetime,
        staged: tuple[StagedState, ...] = (),
    ) -> Plan:
        decisions = (*proposed.decisions, *filtered)
        record = RunRecord(
            watcher=watcher.name,
            outcome="ok",
            started_at=started,
            finished_at=self._clock(),
            counts=Counter(decision.reason for decision in decisions),
            logs=_words(listing.logs),
            gap=_words(proposed.gap),
            warnings=tuple(_words(warning) for warning in proposed.warnings),
        )
        proposal = Proposal(
            watcher=watcher.name,
            expected=before.memory.version,
            memory=proposed.memory,
            items=items,
            learn=proposed.learn,
            touch=proposed.touch,
            run=record,
            keep_history=watcher.keep_history,
            states=staged,
        )
        memory = before.memory
        return Plan(
            watcher.name, before.epoch, started, proposal, decisions, proposed.quarantine, memory.state, memory.cursor
        )

    # --- items and deliveries

    def _items(
        self, watcher: Watcher, finds: Sequence[Find], before: _Before, now: datetime
    ) -> tuple[tuple[NewItem, ...], list[Decision]]:
        """Items with what is owed of them; above ``max_items`` a delivery is due later, interval by interval."""
        flows = self._config().flows
        owed = [flows.get(name) or Flow(name) for name in watcher.flows]  # one that is gone will be held, and told
        enabled = [flow for flow in owed if flow.enabled]
        disabled = [f"disabled: {flow.name}" for flow in owed if not flow.enabled]
        interval, origin, epoch = _interval(watcher, now), before.status.origin, before.epoch
        filtered: list[Decision] = []
        items = []
        for first in range(0, len(finds), watcher.max_items):
            due_at = now + first // watcher.max_items * interval
            for find in finds[first : first + watcher.max_items]:
                item = ids.item_id(epoch, origin, find.key_hash, find.revision, find.content, find.change)
                deliveries, notes = [], disabled
                for flow in enabled:
                    dead = ""
                    try:
                        if not shape.accepts(flow, find, watcher.name):
                            notes = [*notes, f"filtered: {flow.name}"]
                            filtered.append(Decision(find.key, "filtered", flow.name))
                            continue
                    except DeliveryError as error:
                        dead = _words(str(error))
                    lane = ids.lane(flow.order, origin, find.key_hash, item)
                    deliveries.append(NewDelivery(ids.delivery_id(item, flow.name), flow.name, lane, due_at, dead))
                items.append(
                    NewItem(
                        item, find.key, find.key_hash, find.change, find.revision, find.content, _payload(find),
                        tuple(deliveries), ", ".join(notes),
                    )
                )  # fmt: skip
        return tuple(items), filtered

    # --- how it ends

    async def _commit(self, looked: _Looked, tick_at: datetime | None) -> RunRecord:
        plan = looked.plan
        record = replace(plan.proposal.run, tick_at=tick_at, finished_at=self._clock())
        return await self._write(replace(plan.proposal, run=record), recovered=looked.before.status.failures > 0)

    async def _apply(self, plan: Plan, outcome: Outcome) -> RunRecord:
        self._watcher(plan.watcher)
        now = self._clock()
        record = replace(plan.proposal.run, outcome=outcome, finished_at=now)
        async with self._db.read() as tx:
            status = await watchers.get(tx, plan.watcher)
            if await meta.epoch(tx) != plan.epoch:
                error = "the database was restored from a backup since this plan was made: make a new one"
                return replace(record, outcome="conflict", error=error)
        return await self._write(replace(plan.proposal, run=record), recovered=status.failures > 0)

    async def _write(self, proposal: Proposal, *, recovered: bool) -> RunRecord:
        """The one transaction. What quiet runs left goes along with it."""
        record = proposal.run
        proposal = replace(proposal, memory=await states.apart(self._db, proposal.memory))
        failpoint("before_begin")
        done, _ = await asyncio.gather(
            self._db.write(lambda tx: runs.commit(tx, proposal)), self.flush(), return_exceptions=True
        )
        if isinstance(done, Conflict):
            return await self._lose(replace(record, outcome="conflict", error=str(done), counts={}))
        if isinstance(done, BaseException):
            raise done
        try:
            self._committed_well(proposal, done, recovered)
        except Exception as error:
            error.add_note(_AFTERWARDS)
            raise
        return record

    def _committed_well(self, proposal: Proposal, done: runs.Committed, recovered: bool) -> None:
        """What follows from a commit. A crash before this, or a fault in it, loses nothing: the rows are the truth."""
        name, record = proposal.watcher, proposal.run
        failpoint("after_commit")
        self._sessions.supersede(name)
        self._recent.pop(name, None)
        self._well(name, record.finished_at, recovered)
        for change, count in Counter(item.change for item in proposal.items).items():
            metrics.items.labels(name, change).inc(count)
        self._committed({d.flow for item in proposal.items for d in item.deliveries})
        _log.info(
            "run.committed", watcher=name, outcome=record.outcome, run=done.run_id, items=done.items,
            deliveries=done.deliveries, **{k: v for k, v in record.counts.items() if k not in ("seen", "new")},
        )  # fmt: skip
        if record.gap:
            metrics.gaps.labels(name).inc()
            _log.warning("run.gap", watcher=name, gap=record.gap)

    async def _lose(self, record: RunRecord) -> RunRecord:
        """Note a run that another one was faster than."""
        await self._db.write(lambda tx: runs.record(tx, record))
        _log.warning("run.conflict", watcher=record.watcher, error=record.error)
        return record

    async def _be_quiet(self, looked: _Looked, tick_at: datetime | None) -> RunRecord:
        """Nothing new: nothing is written, but the validators make the next answer shorter."""
        name, now = looked.plan.watcher, self._clock()
        memory, status = looked.diff.memory, looked.before.status
        if not looked.listing.unchanged or looked.listing.validators:
            self._recent[name] = _Recent(looked.before.memory.version, memory.script, looked.listing.validators)
        recovered = status.failures > 0
        self._note(name, Quiet(now, now, tick_at, quiet_runs=1, recovered=recovered))
        self._well(name, now, recovered)
        if recovered:
            await self.flush()
        _log.debug("run.quiet", watcher=name, unchanged=looked.listing.unchanged)
        return replace(looked.plan.proposal.run, outcome="quiet", tick_at=tick_at, finished_at=now)

    def _well(self, name: str, at: datetime, recovered: bool) -> None:
        metrics.last_success.labels(name).set(at.timestamp())
        metrics.failing.labels(name).set(0)
        if recovered:
            _log.info("watcher.recovered", watcher=name)

    async def _fail(
        self, watcher: Watcher, status: WatcherStatus, error: WatcherError, started: datetime, tick_at: datetime | None
    ) -> RunRecord:
        """Note the failure; the state stays as it was."""
        name, now = watcher.name, self._clock()
        trigger = error if isinstance(error, TriggerError) else TriggerError(str(error), kind="arguments")
        record = RunRecord(
            watcher=name,
            outcome="failed",
            started_at=started,
            finished_at=now,
            tick_at=tick_at,
            error_kind=trigger.kind,
            error=_words(str(trigger)),
            detail=_words(trigger.detail),
            logs=_words(trigger.logs),
        )
        backoff_until = _backoff(_interval(watcher, now), status.failures + 1, trigger.retry_after, now)

        async def note(tx: Any) -> int:
            await runs.record(tx, record)
            return await watchers.failed(tx, name, record.error, backoff_until, now)

        failures = await self._db.write(note)
        metrics.failing.labels(name).set(failures)
        told = _log.error if failures == 1 else _log.warning
        told(
            "watcher.failing" if failures == 1 else "run.failed", watcher=name, kind=record.error_kind,
            error=record.error, failures=failures, again_at=written(backoff_until) if backoff_until else None,
        )  # fmt: skip
        return record

    async def _broke(
        self, watcher: Watcher, error: Exception, started: datetime, tick_at: datetime | None
    ) -> RunRecord:
        """A fault of ours is a failed run like any other: shown, counted, and tried again more and more seldom."""
        _log.exception("run.crashed", watcher=watcher.name)
        after = _AFTERWARDS in getattr(error, "__notes__", ())
        so = "what was found is committed and will be sent" if after else "nothing was changed"
        told = f"a fault of watcher itself ({type(error).__name__}: {error}): {so}; please report it"
        trace = "".join(traceback.format_exception(error))[-8_000:]
        async with self._db.read() as tx:
            status = await watchers.get(tx, watcher.name)
        return await self._fail(watcher, status, TriggerError(told, kind="bug", detail=trace), started, tick_at)

    async def _quarantine(self, looked: _Looked, tick_at: datetime | None) -> RunRecord:
        """Keep the plan, and let nobody but a human commit it."""
        plan = looked.plan
        packed = await asyncio.to_thread(plan.pack)
        reason = _words(plan.quarantine)
        record = replace(
            plan.proposal.run, outcome="quarantined", tick_at=tick_at, error=reason, plan=packed,
            finished_at=self._clock(),
        )  # fmt: skip
        await self._hold_back(record, with_plan=True)
        return replace(record, plan=b"")

    async def _quarantine_damaged(
        self, watcher: Watcher, error: Damaged, started: datetime, tick_at: datetime | None
    ) -> RunRecord:
        """What was read is not what was written: nothing may be compared with it."""
        now = self._clock()
        record = RunRecord(watcher.name, "quarantined", started, now, tick_at, error_kind="damaged", error=str(error))
        async with self._db.read() as tx:
            known = (await watchers.get(tx, watcher.name)).quarantined_at is not None
        if not known:
            await self._hold_back(record, with_plan=False)
        return record

    async def _hold_back(self, record: RunRecord, *, with_plan: bool) -> None:
        async def write(tx: Any) -> None:
            number = await runs.record(tx, record)
            await watchers.quarantine(
                tx, record.watcher, record.error, number if with_plan else None, record.finished_at
            )

        await self._db.write(write)
        _log.error("watcher.quarantined", watcher=record.watcher, reason=record.error)

    # --- small things

    def _watcher(self, name: str) -> Watcher:
        watcher = self._config().watchers.get(name)
        if watcher is None:
            raise WatcherError(f"no such watcher: {name}: is it in the configuration?")
        return watcher

    def _note(self, name: str, left: Quiet) -> None:
        self.quiet[name] = _both(self.quiet.get(name, Quiet()), left)

    def _warn(self, name: str, warnings: tuple[str, ...]) -> None:
        """Say each warning when it first comes up, and not at every run."""
        if warnings and self._warned.get(name) != warnings:
            _log.warning("run.warnings", watcher=name, warnings=list(warnings))
        self._warned[name] = warnings

    def _sweep_is_due(self, name: str, now: datetime) -> bool:
        """Without a cursor nobody knows whether a source lists the newest first: now and then all pages are read."""
        last = self._swept.get(name)
        return last is None or abs(now - last) >= _SWEEP

    def _validators(
        self, watcher: Watcher, memory: Memory, fingerprint: str, whole: bool
    ) -> Mapping[str, Mapping[str, str]]:
        """What lets the source answer "unchanged": only what the same script saw with the same arguments, and only
        after a success, because else the answer would hide what was never committed."""
        if whole and watcher.forget_after:
            return {}  # an "unchanged" would not say which keys are still listed
        recent = self._recent.get(watcher.name)
        if recent and recent.version == memory.version and recent.script == fingerprint:
            return recent.validators
        return memory.validators if memory.version and memory.script == fingerprint else {}


def _keep(recording: Recording, file: Path) -> None:
    """Write a recording, readable by this user alone. Raises StoreError."""
    whole = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with os.fdopen(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            out.write(dump(recording.to_json()))
        whole.replace(file)
    except OSError as error:
        whole.unlink(missing_ok=True)
        raise StoreError(f"{file}: cannot write the recording: {error.strerror}") from error


def _kept(file: Path) -> Recording:
    """Read a recording. Raises StoreError."""
    try:
        return Recording.from_json(json.loads(file.read_bytes()))
    except OSError as error:
        raise StoreError(f"{file}: cannot read the recording: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{file} is no recording ({error}): `watcher plan NAME --record FILE` makes one") from error


def _words(text: str) -> str:
    """What a script or a source said, fit to be stored and shown: no secret, nothing that a database refuses."""
    return diff.storable(log.mask(text))


async def _aside(entries: int, work: Callable[[], T]) -> T:
    """Work on so many entries: beside the loop if they are many, so that no other watcher's tick is late."""
    return work() if entries <= _LARGE else await asyncio.to_thread(work)


def _why_not(status: WatcherStatus, now: datetime, tick_at: datetime | None) -> str:
    """Why a tick leads to no run; a run by hand is never refused for these."""
    if tick_at is None:
        return ""
    if status.paused_at is not None:
        return f"paused: {status.pause_reason}" if status.pause_reason else "paused"
    if status.backoff_until is not None and now < status.backoff_until:
        return f"failed {status.failures} times: tried again from {written(status.backoff_until)} on"
    return ""


def _fingerprint(watcher: Watcher, label: Label) -> str:
    """Of what decides how a source is read: the script's text, its arguments, the label in force."""
    try:
        text = watcher.script.read_bytes()
    except OSError as error:
        raise TriggerError(f"{watcher.script}: cannot read the script: {error.strerror}", kind="missing") from error
    rest = [label.style, label.key, label.cursor, label.lookback, list(label.on), dict(watcher.args)]
    return hashlib.blake2b(text + b"\0" + ids.canonical(rest), digest_size=16).hexdigest()


def _payload(find: Find) -> bytes:
    return dump({"item": find.item, **optional("previous", find.previous), **optional("patch", find.patch)})


def _interval(watcher: Watcher, now: datetime) -> timedelta:
    """How far apart two runs are."""
    if watcher.every is not None:
        return watcher.every
    if watcher.cron is None:
        return _NO_SCHEDULE
    zone = ZoneInfo(watcher.timezone)
    times: Iterator[datetime] = CronSim(_ALIASES.get(watcher.cron, watcher.cron), now.astimezone(zone))
    first, second = next(times, None), next(times, None)
    return second.astimezone(UTC) - first.astimezone(UTC) if first and second else _NO_SCHEDULE


_ALIASES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}


def _backoff(interval: timedelta, failures: int, retry_after: float | None, now: datetime) -> datetime | None:
    """When a failing watcher may be tried again: the interval, doubled with each failure, up to an hour.

    Half an interval is taken off, so that the tick at which it is due is not missed by a hair.
    """
    until = None
    if failures > 1 and interval < _LONGEST_BACKOFF:
        until = now + min(interval * 2.0 ** min(failures - 1, 30), _LONGEST_BACKOFF) - interval / 2
    if retry_after is not None and retry_after > 0:
        asked = now + min(timedelta(seconds=retry_after), _LONGEST_WAIT)
        until = asked if until is None else max(until, asked)
    return until


def _both(one: Quiet, other: Quiet) -> Quiet:
    return Quiet(
        checked_at=_later(one.checked_at, other.checked_at),
        success_at=_later(one.success_at, other.success_at),
        tick_at=_later(one.tick_at, other.tick_at),
        quiet_runs=one.quiet_runs + other.quiet_runs,
        skipped=one.skipped + other.skipped,
        missed=one.missed + other.missed,
        recovered=one.recovered or other.recovered,
    )


def _later(one: datetime | None, other: datetime | None) -> datetime | None:
    return max(one, other) if one and other else one or other
