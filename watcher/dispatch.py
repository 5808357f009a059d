"""Outbox to flows: claim, deliver, settle.

Deliveries wait in the database, which alone decides what may be sent: only the head of a lane can be claimed, so a
lane's next delivery starts when the one before is settled. What is held here is what is in flight, and hints.

One turn settles what ended and claims what may start, in one transaction; between turns requests run by themselves.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from watcher import log as logs
from watcher import metrics
from watcher.errors import StoreError, WatcherError
from watcher.failpoint import failpoint
from watcher.flows.attempt import Courier, Made, Resolver, Sender, Tried, longest, resolve, resolved_for_good
from watcher.flows.hours import opens_in
from watcher.flows.large import Stow
from watcher.flows.preset import Resolved
from watcher.flows.retry import MAX_ANSWER, Window, conclude, probe_after
from watcher.store import deliveries, flows
from watcher.store.db import Database, Tx
from watcher.values import Config, Delivery, Flow, Judgement, Response, Settlement, Verdict

log = logs.get("dispatch")

LINGER = 0.02  # seconds; how long an outcome may wait for others to be settled with
RECONCILE = 2.0  # seconds; wake-ups are only hints, so the database is asked now and then
SURVEY = 60.0  # seconds; how often pending deliveries of unknown flows are looked for
BUSY_PAUSE = 300.0  # seconds; a flow that answers 429 is left alone for as long as it asks, but no longer than this
BROKEN = 20  # attempts in a row that failed: the flow rests, and is then asked with one request at a time
REST = (1.0, 60.0)  # seconds; its first rest and its longest
REST_GROWTH = 1.25  # each rest is a quarter of the outage so far: a flow that is back waits no longer than that
MARGIN = timedelta(seconds=15)  # between the end of the slowest request and the end of its lease
FRESH = 1.0  # seconds; for so long a request that was made ahead may be sent
MAKING = 0.02  # seconds; how long the loop may make requests ahead in one go
STORE_PAUSE = (0.5, 10.0)  # seconds; first and longest pause when the database cannot be written

NO_SUCH_FLOW = "no such flow in the configuration"

_OUTCOMES = {Verdict.DELIVERED: "delivered", Verdict.DUPLICATE: "duplicate", Verdict.TARGET: "held"}


class _Target:
    """A configured flow and what is known of it at the moment."""

    def __init__(self, flow: Flow, courier: Courier) -> None:
        self.hungry = True  # there may be something to claim
        self.closed_until = 0.0  # monotonic; it said that it is too busy, or rests
        self.failures = 0  # attempts in a row that met passing trouble
        self.rests = 0  # in a row
        self.held = False
        self.paused = False
        self.probing = False
        self.probes = 0
        self.probe_at: datetime | None = None
        self.gathering: _Gathering | None = None
        self.ready: deque[_Ready] = deque()  # claimed ahead: each starts when a request of this flow ends
        self.ended = 0  # requests since the last claim
        self.freed = 0  # slots since the last turn that nothing was ready for
        self.adopt(flow, courier)

    def adopt(self, flow: Flow, courier: Courier) -> None:
        """Go by the flow's new configuration; what is known of it stays."""
        self.flow = flow
        self.courier = courier
        self.window = Window(*flow.rate) if flow.rate else None
        self.resolved = resolved_for_good(flow)
        self.hungry = True

    @property
    def broken(self) -> bool:
        """Whether it failed so often in a row that it is asked for a sign of life only."""
        return self.failures >= BROKEN

    def closed(self, now: datetime) -> timedelta:
        """How long until the hours begin in which it may be sent to."""
        return opens_in(self.flow.hours, now) if self.flow.hours else timedelta()


# Three of these are made for each delivery: a frozen dataclass takes three times as long.
class _Outcome(NamedTuple):
    """How one attempt went."""

    judgement: Judgement
    started_at: datetime
    ended_at: datetime
    response: Response | None = None
    seconds: float | None = None  # by the monotonic clock, where it had a request to itself


class _Ended(NamedTuple):
    """One delivery that is no longer in flight: how it went, or None when it goes back unsent.

    What that means for the delivery is worked out when it is settled, for many at once: one after the other they cost
    a fraction of what each costs between two requests.
    """

    delivery: Delivery
    outcome: _Outcome | None
    probe: bool = False


@dataclass(frozen=True, slots=True)
class _Claim:
    target: _Target
    room: int  # how many requests may start at once
    limit: int  # how many deliveries are asked for
    lease: timedelta
    probe: bool


class _Ready(NamedTuple):
    """A delivery that was claimed and not yet started."""

    claim: _Claim
    delivery: Delivery
    resolved: Resolved
    expires: float  # monotonic; it may not start later
    made: Made | None = None  # its request, if that was made ahead
    stale: float = 0.0  # monotonic; from then on it has to be made anew: it bears a time


@dataclass(slots=True)
class _Gathering:
    """Deliveries that wait for others to share their request. They count as one request in flight."""

    claim: _Claim
    expires: float  # monotonic; no request about them may start later
    members: list[Delivery] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _Turn:
    """What one transaction settles and asks for."""

    settlements: list[Settlement] = field(default_factory=list)
    unsent: list[int] = field(default_factory=list)
    hold: dict[str, tuple[str, datetime]] = field(default_factory=dict)  # flow → reason, next probe
    resume: list[str] = field(default_factory=list)
    claims: list[_Claim] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.settlements or self.unsent or self.hold or self.resume or self.claims)


@dataclass(slots=True)
class _Done:
    """What the transaction brought."""

    fenced: set[int] = field(default_factory=set)
    held: list[str] = field(default_factory=list)  # newly
    claimed: list[Sequence[Delivery]] = field(default_factory=list)  # one for each claim


class Dispatcher:
    """Delivers what is owed. ``config`` is asked again at every turn, so a reload needs no restart.

    `wake` says that something was committed; `serve` runs until told to stop; `drain` lets what is in flight end.
    """

    def __init__(
        self,
        config: Callable[[], Config],
        db: Database,
        sender: Sender,
        resolver: Resolver,
        clock: Callable[[], datetime],
        stow: Stow | None = None,
    ) -> None:
        self._configured = config
        self._db = db
        self._sender = sender
        self._resolver = resolver
        self._clock = clock
        self._stow = stow
        self._token = uuid.uuid4().hex
        self._config: Config | None = None
        self._targets: dict[str, _Target] = {}
        self._ended: list[_Ended] = []
        self._known: set[int] = set()  # claimed and not yet settled: a lapsed lease must not send them twice at once
        self._flying: Counter[str] = Counter()  # requests in flight, by flow
        self._in_flight = 0  # of all flows
        self._tasks: set[asyncio.Task[None]] = set()
        self._event = asyncio.Event()
        self._flush: asyncio.TimerHandle | None = None
        self._turns = 0
        self._reconcile_at = 0.0  # monotonic
        self._survey_at = 0.0
        self._not_before = 0.0
        self._failures = 0

    # --- what others call

    @property
    def in_flight(self) -> int:
        """Deliveries that are being sent, of all flows."""
        return self._in_flight

    def wake(self, flows: Collection[str]) -> None:
        """A hint that these flows are owed something."""
        for name in flows:
            if target := self._targets.get(name):
                target.hungry = True
        self._event.set()

    async def serve(self, stop: asyncio.Event) -> None:
        """Claim and deliver until ``stop``; then return at once, with requests possibly still in flight."""
        stopped = asyncio.create_task(self._notice(stop))
        try:
            await self._take_over()
            while not stop.is_set():
                await self._guarded(claim=True)
                if not stop.is_set():
                    await self._rest(self._idle())
        except asyncio.CancelledError:
            for target in self._targets.values():
                target.ready.clear()
            for task in self._tasks:
                task.cancel()
            raise
        finally:
            stopped.cancel()

    async def drain(self, grace: timedelta) -> None:
        """Let what is in flight end, for ``grace`` at most, settle it, and give everything else back."""
        until = time.monotonic() + grace.total_seconds()
        for target in self._targets.values():
            self._give_back(target)
        while self._tasks and (left := until - time.monotonic()) > 0:
            await self._guarded(claim=False)
            await self._rest(min(left, 1.0) if self._tasks else 0.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        failpoint("lease_release")
        self._not_before = 0.0
        await self._guarded(claim=False)

    async def _notice(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._event.set()

    async def _take_over(self) -> None:
        """A SQLite database has one service: what another left leased is nobody's, and is due at once."""
        if self._db.dialect == "sqlite":
            now = self._clock()
            await self._db.write(lambda tx: deliveries.abandon(tx, now))

    # --- the loop

    async def _guarded(self, *, claim: bool) -> None:
        """One turn. Trouble with the database pauses dispatch and loses nothing: outcomes wait for the next turn."""
        if time.monotonic() < self._not_before:
            return
        try:
            if self._failures:  # should the claim be at fault, outcomes are written all the same
                await self._turn(claim=False)
            await self._turn(claim=claim)
        except Exception as error:
            self._failures += 1
            pause = min(STORE_PAUSE[0] * 2 ** min(self._failures - 1, 10), STORE_PAUSE[1])
            self._not_before = time.monotonic() + pause
            unforeseen = not isinstance(error, StoreError)
            if self._failures == 1 or unforeseen:
                log.error("dispatch.failed", error=str(error), again_in=pause, exc_info=unforeseen)
        else:
            if self._failures:
                log.info("dispatch.recovered", failures=self._failures)
                self._failures = 0

    async def _turn(self, *, claim: bool) -> None:
        now = self._clock()
        self._follow(self._configured())
        if claim and time.monotonic() >= self._reconcile_at:
            await self._reconcile(now)
        ended, self._ended = self._ended, []
        turn = self._prepare(ended, now)
        if claim:
            turn.claims = self._choose(now, but={*turn.hold, *turn.resume})
        if not turn:
            return
        try:
            if turn.settlements:
                failpoint("before_settle")
            done = await self._db.write(lambda tx: self._exchange(tx, turn, now), short=True)
        except BaseException:
            self._ended[:0] = ended
            for wanted in turn.claims:
                wanted.target.hungry, wanted.target.probing = True, False
            raise
        self._known.difference_update(each.delivery.seq for each in ended)
        self._note(turn)
        self._tell(turn, done)
        self._start(turn.claims, done.claimed)
        if turn.settlements:
            failpoint("after_settle")

    async def _exchange(self, tx: Tx, turn: _Turn, now: datetime) -> _Done:
        """Settle first: what that lets go can be claimed in the same breath."""
        done = _Done()
        if turn.settlements:
            done.fenced = await deliveries.settle(tx, self._token, turn.settlements, now)
        if turn.unsent:
            await deliveries.release(tx, self._token, turn.unsent, now)
        for name, (reason, probe_at) in turn.hold.items():
            if await flows.hold(tx, name, reason, probe_at, now):
                done.held.append(name)
        for name in turn.resume:
            await flows.end_hold(tx, name, now)
        for wanted in turn.claims:
            done.claimed.append(
                await deliveries.claim(
                    tx, wanted.target.flow.name, limit=wanted.limit, now=now, lease=wanted.lease, token=self._token
                )
            )
        return done

    async def _rest(self, seconds: float) -> None:
        """Until an outcome has waited long enough, somebody wakes us, or the time is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            pass
        self._event.clear()

    def _idle(self) -> float:
        """Seconds for which there is nothing to do unless something happens."""
        now, wall = time.monotonic(), self._clock()
        if now < self._not_before:
            return self._not_before - now
        until = self._reconcile_at
        for target in self._targets.values():
            if not target.hungry or target.paused or target.probing:
                continue
            if closed := target.closed(wall):
                until = min(until, now + closed.total_seconds())
            elif target.held:
                if target.probe_at:
                    until = min(until, now + (target.probe_at - wall).total_seconds())
            else:
                opens = max(target.closed_until, now + target.window.opens(now) if target.window else 0.0)
                until = min(until, opens) if opens > now else until
        return max(until - now, 0.0)

    # --- what the configuration and the database say

    def _follow(self, config: Config) -> None:
        if config is self._config:
            return
        self._config = config
        before, self._targets = self._targets, {}
        for name, flow in config.flows.items():
            target = self._targets[name] = before.pop(name) if name in before else _Target(flow, self._courier(flow))
            if target.flow != flow:
                self._give_back(target)
                target.adopt(flow, self._courier(flow))
        for gone in before.values():
            self._give_back(gone)
        self._reconcile_at = self._survey_at = 0.0

    def _courier(self, flow: Flow) -> Courier:
        return Courier(flow, self._sender, self._clock, self._stow)

    async def _reconcile(self, now: datetime) -> None:
        """Ask the database what is due and which flows are held, and find the deliveries of flows that are gone."""
        names = [name for name, target in self._targets.items() if target.flow.enabled]
        survey = time.monotonic() >= self._survey_at
        async with self._db.read() as tx:
            statuses = {status.name: status for status in await flows.all(tx)}
            due = await deliveries.due(tx, names, now)
            next_due = await deliveries.next_due(tx, [name for name in names if name not in due], now)
            owed = await deliveries.pending(tx) if survey else {}
        for name, target in self._targets.items():
            status = statuses.get(name)
            target.held = status is not None and status.held_since is not None
            target.paused = status is not None and status.paused_at is not None
            target.probe_at = status.probe_at if status else None
            target.probes = status.probes if status else 0
            target.hungry = target.hungry or name in due
            if target.held or target.paused or not target.flow.enabled or target.closed(now):
                self._give_back(target)
        soon = (next_due - now).total_seconds() if next_due else RECONCILE
        self._reconcile_at = time.monotonic() + min(RECONCILE, max(0.05, soon))
        if survey:
            self._survey_at = time.monotonic() + SURVEY
            await self._sort_out_unknown(
                [name for name in owed if name not in self._targets and not _is_held(statuses.get(name))],
                [n for n, s in statuses.items() if n in self._targets and s.held_reason == NO_SUCH_FLOW],
                now,
            )

    async def _sort_out_unknown(self, gone: Sequence[str], back: Sequence[str], now: datetime) -> None:
        """Deliveries of a flow that is no longer configured wait for it, and everybody can see why."""
        if not gone and not back:
            return

        async def write(tx: Tx) -> None:
            for name in gone:
                await flows.hold(tx, name, NO_SUCH_FLOW, None, now)
            for name in back:
                await flows.end_hold(tx, name, now)

        await self._db.write(write)
        for name in gone:
            log.warning("flow.held", flow=name, reason=NO_SUCH_FLOW)
        for name in back:
            self._targets[name].held = False
            self._targets[name].hungry = True
            log.info("flow.resumed", flow=name)

    # --- deciding what to settle and what to claim

    def _prepare(self, ended: Iterable[_Ended], now: datetime) -> _Turn:
        turn = _Turn()
        for each in ended:
            target = self._targets.get(each.delivery.flow)
            if target:
                target.hungry = True  # its lane may go on
            if each.outcome is None:
                turn.unsent.append(each.delivery.seq)
                continue
            settlement = self._settled(each.delivery, each.outcome, each.probe)
            turn.settlements.append(settlement)
            at_fault = settlement.verdict is Verdict.TARGET
            if target and at_fault and (each.probe or not target.held) and target.flow.name not in turn.hold:
                probes = target.probes + 1 if target.held else 0
                turn.hold[target.flow.name] = (settlement.note, now + probe_after(probes))
            elif target and each.probe and not at_fault:
                turn.resume.append(target.flow.name)
        return turn

    def _choose(self, now: datetime, *, but: Collection[str]) -> list[_Claim]:
        """How many deliveries each flow may start, but those that are held or let go in this very turn.

        Half of all slots are shared by everybody; the other half is kept in equal parts, one part per flow, so that a
        flow that hangs on all it could get still leaves room for every other one.
        """
        assert self._config
        settings = self._config.delivery
        targets = [target for target in self._targets.values() if target.flow.enabled]
        if not targets:
            return []
        part = max(1, settings.at_once // (2 * len(targets))) if len(targets) > 1 else settings.at_once
        free = settings.at_once - self.in_flight
        reserved = sum(max(0, part - self._flying[target.flow.name]) for target in targets)
        self._turns += 1
        first = self._turns % len(targets)
        chosen = []
        for target in [*targets[first:], *targets[:first]]:
            target.freed = 0
            own = max(0, part - self._flying[target.flow.name])
            wish = self._room(target, now)
            room = max(0, min(free, own + max(0, free - reserved), wish or 0))
            limit = _members(target) if room and _members(target) else room + _ahead(target)
            if wish is None or limit <= 0 or target.flow.name in but:
                continue
            free -= room
            reserved -= min(own, room)
            target.hungry, target.probing = False, target.held
            lease = max(settings.lease, longest(target.flow) + MARGIN)
            target.ended = 0
            chosen.append(_Claim(target, room, limit, lease, target.held))
        return chosen

    def _room(self, target: _Target, now: datetime) -> int | None:
        """How many requests to this flow could start now if it were alone; None when nothing may be claimed for it."""
        instant = time.monotonic()
        if not target.hungry or target.paused or instant < target.closed_until or target.closed(now):
            return None
        if target.gathering and not target.held:
            return 1
        room = target.flow.at_once - self._flying[target.flow.name]
        if target.flow.batch:
            room = min(room, 1)
        if target.window:
            room = min(room, target.window.free(instant))
        if target.broken:
            room = min(room, 1 - self._flying[target.flow.name])
        if target.held:
            due = target.probe_at is not None and target.probe_at <= now
            return min(room, 1) if due and not target.probing else None
        return room

    def _note(self, turn: _Turn) -> None:
        """Which flows are held from now on, and which no longer."""
        for name, (_, probe_at) in turn.hold.items():
            target = self._targets[name]
            self._give_back(target)
            target.held, target.probe_at, target.probes = True, probe_at, target.probes + 1 if target.held else 0
        for name in turn.resume:
            target = self._targets[name]
            target.held, target.probe_at, target.probes = False, None, 0
            self._event.set()  # all that waited for the probe may go

    def _tell(self, turn: _Turn, done: _Done) -> None:
        """One line per flow and outcome, not per delivery; one when a flow is held, one when it goes on."""
        counts: Counter[tuple[str, str, bool]] = Counter()
        notes: dict[tuple[str, str, bool], Settlement] = {}
        for settlement in turn.settlements:
            if settlement.delivery.seq in done.fenced:
                log.warning("delivery.fenced", flow=settlement.delivery.flow, delivery=settlement.delivery.id)
                continue
            outcome = "dead" if settlement.dead else _OUTCOMES.get(settlement.verdict, "retry")
            kind = (settlement.delivery.flow, outcome, settlement.dead)
            counts[kind] += 1
            notes.setdefault(kind, settlement)
        for kind, count in counts.items():
            flow, outcome, dead = kind
            metrics.deliveries.labels(flow, outcome).inc(count)
            if outcome in ("delivered", "duplicate"):
                log.info("delivery.delivered", flow=flow, count=count)
            else:
                event = "delivery.dead" if dead else f"delivery.{outcome}"
                said = notes[kind]
                log.warning(event, flow=flow, count=count, delivery=said.delivery.id, reason=said.note)
        for name in done.held:
            log.warning("flow.held", flow=name, reason=turn.hold[name][0])
        for name in turn.resume:
            log.info("flow.resumed", flow=name)

    # --- sending

    def _start(self, claims: Sequence[_Claim], claimed: Sequence[Sequence[Delivery]]) -> None:
        instant = time.monotonic()
        started: list[tuple[_Claim, list[Delivery]]] = []
        for wanted, batch in zip(claims, claimed, strict=True):
            mine = [delivery for delivery in batch if delivery.seq not in self._known]
            self._known.update(delivery.seq for delivery in mine)
            if len(batch) == wanted.limit:
                wanted.target.hungry = True
            if wanted.target.window and not wanted.target.flow.batch:
                wanted.target.window.take(len(mine), instant)
            if wanted.probe and not mine:
                wanted.target.probing = False
            if mine:
                started.append((wanted, mine))
        if not started:
            return
        try:
            failpoint("after_claim")
        except BaseException:
            self._ended += [_Ended(delivery, None) for _, mine in started for delivery in mine]
            raise
        for wanted, mine in started:
            if wanted.target.flow.batch:
                self._gather(wanted, mine, instant)
                continue
            expires = instant + (wanted.lease - longest(wanted.target.flow) - MARGIN / 2).total_seconds()
            if resolved := wanted.target.resolved:
                wanted.target.ready += self._made_ahead(wanted, mine, resolved, expires)
                for _ in range(min(wanted.room + wanted.target.freed, len(wanted.target.ready))):
                    self._spawn(self._deliver_on(self._next(wanted.target)))
            else:
                self._count(wanted.target, len(mine))
                self._spawn(self._resolve_and_deliver(wanted, mine, expires))

    def _made_ahead(
        self, wanted: _Claim, mine: Sequence[Delivery], resolved: Resolved, expires: float
    ) -> Iterator[_Ready]:
        now, instant, courier = self._clock(), time.monotonic(), wanted.target.courier
        for delivery in mine:
            in_time = time.monotonic() < instant + MAKING
            made = courier.made_ahead(delivery, resolved, now) if in_time else None
            yield _Ready(wanted, delivery, resolved, expires, made, instant + FRESH)

    def _next(self, target: _Target) -> _Ready | None:
        """The next delivery that is ready, its slot taken; None leaves the slot to whoever is chosen next."""
        if not target.ready:
            target.freed += 1
            return None
        self._count(target, 1)
        return target.ready.popleft()

    def _count(self, target: _Target, requests: int) -> None:
        self._flying[target.flow.name] += requests
        self._in_flight += requests

    def _gather(self, wanted: _Claim, mine: Sequence[Delivery], instant: float) -> None:
        """Put deliveries to those that wait already; send when there are enough or the first has waited long enough."""
        target, batch = wanted.target, wanted.target.flow.batch
        assert batch
        gathering = target.gathering
        if gathering is None:
            expires = instant + (wanted.lease - MARGIN / 2 - target.flow.timeout).total_seconds()
            gathering = target.gathering = _Gathering(wanted, expires)
            self._count(target, 1)
            if target.window:
                target.window.take(1, instant)
            wait = batch.within.total_seconds()
            gathering.timer = asyncio.get_running_loop().call_later(wait, self._send_gathered, target)
        gathering.members += mine
        if wanted.probe or len(gathering.members) >= batch.size:
            self._send_gathered(target)

    def _send_gathered(self, target: _Target) -> None:
        gathering, target.gathering = target.gathering, None
        if gathering and gathering.timer:
            gathering.timer.cancel()
            target.hungry = True  # there may be a slot for the next request
            self._event.set()
            self._spawn(self._deliver_together(gathering))

    def _give_back(self, target: _Target) -> None:
        """What was claimed for this flow and not sent goes back."""
        if target.ready:
            self._ended += [_Ended(each.delivery, None, each.claim.probe) for each in target.ready]
            target.ready.clear()
            self._event.set()
        gathering, target.gathering = target.gathering, None
        if gathering and gathering.timer:
            gathering.timer.cancel()
            self._end(gathering.claim, [_Ended(each, None, gathering.claim.probe) for each in gathering.members])

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _resolve_and_deliver(self, wanted: _Claim, batch: Sequence[Delivery], expires: float) -> None:
        """References are followed at each use: a token that was rotated is used at once."""
        now = self._clock()
        resolved = await self._resolve(wanted.target.flow)
        for delivery in batch:
            if isinstance(resolved, Resolved):
                self._spawn(self._deliver_on(_Ready(wanted, delivery, resolved, expires)))
            else:
                outcome = _Outcome(resolved, now, self._clock()) if resolved else None
                self._end(wanted, [_Ended(delivery, outcome, wanted.probe)])

    async def _resolve(self, flow: Flow) -> Resolved | Judgement | None:
        """With references followed, or why that failed; None when it is not the flow's fault."""
        try:
            return await resolve(flow, self._resolver)
        except (asyncio.CancelledError, StoreError):  # the database's trouble is not the flow's
            return None
        except WatcherError as error:
            return Judgement(Verdict.TARGET, str(error))
        except Exception as error:
            log.error("delivery.error", flow=flow.name, exc_info=True)
            return Judgement(Verdict.PASSING, f"{type(error).__name__} while following the flow's references")

    async def _deliver_on(self, ready: _Ready | None) -> None:
        """Deliver one after another, for as long as there is something ready: a task for each would cost more."""
        while ready:
            await self._deliver(ready)
            ready = self._next(ready.claim.target)

    async def _deliver(self, ready: _Ready) -> None:
        """Send one delivery and note how it ended. Never raises: what is not known is tried again."""
        wanted, delivery, started_at, begun = ready.claim, ready.delivery, self._clock(), time.monotonic()
        outcome = None
        try:
            if begun < ready.expires:  # else this process was asleep past its lease, and others may be sending
                judgement, response = await wanted.target.courier.attempt(
                    delivery, ready.resolved, started_at, ready.made if begun < ready.stale else None
                )
                self._mind(wanted.target, judgement, response, begun)
                outcome = _Outcome(judgement, started_at, self._clock(), response, time.monotonic() - begun)
        except asyncio.CancelledError:
            pass  # at the end of the grace of a drain: it goes back and will be sent again under the same id
        except Exception as error:
            log.error("delivery.error", flow=delivery.flow, delivery=delivery.id, exc_info=True)
            outcome = _Outcome(_unforeseen(error), started_at, self._clock())
        self._end(wanted, [_Ended(delivery, outcome, wanted.probe)])

    async def _deliver_together(self, gathering: _Gathering) -> None:
        """Send deliveries in one request and note how each of them ended. Never raises."""
        wanted, members, started_at, begun = gathering.claim, gathering.members, self._clock(), time.monotonic()
        outcomes: dict[int, _Outcome] = {}
        try:
            resolved = wanted.target.resolved or await self._resolve(wanted.target.flow)
            if isinstance(resolved, Resolved):
                tried = await wanted.target.courier.attempt_many(members, resolved, started_at, gathering.expires)
            else:
                tried = [Tried(each, resolved) for each in members]
            for each in tried:
                if each.judgement:
                    self._mind(wanted.target, each.judgement, each.response, begun)
                    outcomes[each.delivery.seq] = _Outcome(each.judgement, started_at, self._clock(), each.response)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            log.error("delivery.error", flow=wanted.target.flow.name, exc_info=True)
            outcomes = {each.seq: _Outcome(_unforeseen(error), started_at, self._clock()) for each in members}
        metrics.delivery_seconds.observe(time.monotonic() - begun)
        self._end(wanted, [_Ended(each, outcomes.get(each.seq), wanted.probe) for each in members])

    def _mind(self, target: _Target, judgement: Judgement, response: Response | None, begun: float) -> None:
        """Leave a flow alone that says that it is too busy, or fails again and again."""
        if response and response.status == 429 and judgement.retry_after:
            target.closed_until = time.monotonic() + min(judgement.retry_after, BUSY_PAUSE)
            self._give_back(target)
        if judgement.verdict is Verdict.PASSING:
            target.failures += 1
            if target.broken and begun >= target.closed_until:  # what began before the rest says nothing about it now
                self._let_rest(target, judgement.note)
        elif target.failures and judgement.verdict is not Verdict.TARGET:
            if target.broken:
                log.info("flow.recovered", flow=target.flow.name, failures=target.failures)
                self._event.set()
            target.failures = target.rests = 0

    def _let_rest(self, target: _Target, reason: str) -> None:
        """A flow that only fails is spared, and so are the attempts of what waits for it."""
        rest = min(REST[0] * REST_GROWTH ** min(target.rests, 100), REST[1])
        if not target.rests:
            log.warning("flow.broken", flow=target.flow.name, failures=target.failures, reason=logs.mask(reason))
        target.rests += 1
        target.closed_until = time.monotonic() + rest
        self._give_back(target)

    def _settled(self, delivery: Delivery, outcome: _Outcome, probe: bool) -> Settlement:
        """What an outcome means. Never raises: what is not understood must not keep others from being settled."""
        if outcome.seconds is not None:
            metrics.delivery_seconds.observe(outcome.seconds)
        try:
            return self._conclude(delivery, outcome, probe)
        except Exception as error:
            log.error("delivery.error", flow=delivery.flow, delivery=delivery.id, exc_info=True)
            return self._conclude(delivery, outcome._replace(judgement=_unforeseen(error), response=None), probe)

    def _conclude(self, delivery: Delivery, outcome: _Outcome, probe: bool) -> Settlement:
        assert self._config
        judgement, response = outcome.judgement, outcome.response
        # It may quote an address or an answer, and an answer may echo what it was sent.
        if judgement.note and (note := logs.mask(judgement.note)) != judgement.note:
            judgement = replace(judgement, note=note)
        if response and response.body and (answer := _masked(response.body[:MAX_ANSWER])) != response.body:
            response = replace(response, body=answer)
        return conclude(
            delivery,
            judgement,
            schedule=self._config.delivery.schedule,
            started_at=outcome.started_at,
            now=outcome.ended_at,
            chance=random.random(),  # noqa: S311
            probe=probe,
            response=response,
        )

    def _end(self, wanted: _Claim, ended: Sequence[_Ended]) -> None:
        """One request ended. Outcomes are settled together: when half of what was in flight has ended, or after a short
        while."""
        self._count(wanted.target, -1)
        wanted.target.ended += 1
        if wanted.probe:
            wanted.target.probing = False
        self._ended += ended
        if len(self._ended) >= self._in_flight:
            self._event.set()
        elif self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(LINGER, self._flush_now)

    def _flush_now(self) -> None:
        self._flush = None
        self._event.set()


def _ahead(target: _Target) -> int:
    """How many deliveries to claim beyond what can start, so that a request never waits for a commit.

    Twice as many as ended since the last claim, for those that end until the next one is committed. A slow flow holds
    nothing that others, or the next process, could send.
    """
    if target.held or target.broken or target.window or target.flow.batch or target.resolved is None:
        return 0
    return 2 * min(target.ended, target.flow.at_once) - len(target.ready)


def _members(target: _Target) -> int:
    """How many deliveries the next request of a batch still takes; none for a flow that gets them one by one."""
    if target.flow.batch is None or target.held:
        return 0
    return target.flow.batch.size - (len(target.gathering.members) if target.gathering else 0)


def _unforeseen(error: Exception) -> Judgement:
    return Judgement(Verdict.PASSING, f"{type(error).__name__} while sending")


def _masked(body: bytes) -> bytes:
    text = body.decode("utf-8", "replace")
    masked = logs.mask(text)
    return body if masked == text else masked.encode()


def _is_held(status: Any) -> bool:
    return status is not None and status.held_since is not None
