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
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Protocol

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncConnection

from watcher import log as logs
from watcher import metrics
from watcher.errors import DeliveryError, StoreError, WatcherError
from watcher.failpoint import failpoint
from watcher.flows import presets
from watcher.flows.preset import Resolved
from watcher.flows.retry import MAX_ANSWER, Window, conclude, probe_after
from watcher.store import deliveries, flows
from watcher.store.db import Database
from watcher.values import Config, Delivery, Flow, Judgement, Request, Response, Settlement, Verdict

log = logs.get("dispatch")

LINGER = 0.01  # seconds; how long an outcome may wait for others to be settled with
RECONCILE = 2.0  # seconds; wake-ups are only hints, so the database is asked now and then
SURVEY = 60.0  # seconds; how often pending deliveries of unknown flows are looked for
BUSY_PAUSE = 300.0  # seconds; a flow that answers 429 is left alone for as long as it asks, but no longer than this
MARGIN = timedelta(seconds=15)  # between the end of the slowest request and the end of its lease
STORE_PAUSE = (0.5, 10.0)  # seconds; first and longest pause when the database cannot be written

NO_SUCH_FLOW = "no such flow in the configuration"

_OUTCOMES = {Verdict.DELIVERED: "delivered", Verdict.DUPLICATE: "duplicate", Verdict.TARGET: "held"}


class Sender(Protocol):
    """What sends one request; `watcher.http.Sender`."""

    async def send(
        self,
        request: Request,
        *,
        timeout: timedelta,  # noqa: ASYNC109 -- of everything, from the look-up to the last byte kept
        private_addresses: bool = True,
        trust_env: bool = False,
    ) -> Response: ...


class Resolver(Protocol):
    """What follows one reference; `watcher.resolve.Resolver`."""

    async def text(self, ref: str) -> str: ...


class _Target:
    """A configured flow and what is known of it at the moment."""

    def __init__(self, flow: Flow) -> None:
        self.hungry = True  # there may be something to claim
        self.closed_until = 0.0  # monotonic; it said that it is too busy
        self.held = False
        self.paused = False
        self.probing = False
        self.probes = 0
        self.probe_at: datetime | None = None
        self.adopt(flow)

    def adopt(self, flow: Flow) -> None:
        """Go by the flow's new configuration; what is known of it stays."""
        self.flow = flow
        self.preset = presets[flow.preset]
        self.window = Window(*flow.rate) if flow.rate else None
        self.resolved = _resolved_for_good(flow)
        self.hungry = True


@dataclass(frozen=True, slots=True)
class _Ended:
    """One delivery that is no longer in flight: how it went, or None when it goes back unsent."""

    delivery: Delivery
    settlement: Settlement | None
    probe: bool = False


@dataclass(frozen=True, slots=True)
class _Claim:
    target: _Target
    limit: int
    lease: timedelta
    probe: bool


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
    ) -> None:
        self._configured = config
        self._db = db
        self._sender = sender
        self._resolver = resolver
        self._clock = clock
        self._token = uuid.uuid4().hex
        self._config: Config | None = None
        self._targets: dict[str, _Target] = {}
        self._ended: list[_Ended] = []
        self._known: set[int] = set()  # claimed and not yet settled: a lapsed lease must not send them twice at once
        self._flying: Counter[str] = Counter()  # requests in flight, by flow
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
        return self._flying.total()

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
            for task in self._tasks:
                task.cancel()
            raise
        finally:
            stopped.cancel()

    async def drain(self, grace: timedelta) -> None:
        """Let what is in flight end, for ``grace`` at most, settle it, and give everything else back."""
        until = time.monotonic() + grace.total_seconds()
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
            done = await self._db.write(lambda tx: self._exchange(tx, turn, now))
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

    async def _exchange(self, tx: AsyncConnection, turn: _Turn, now: datetime) -> _Done:
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
            await flows.resume(tx, name, now)
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
            if target.held:
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
            target = self._targets[name] = before.get(name) or _Target(flow)
            if target.flow != flow:
                target.adopt(flow)
        self._reconcile_at = self._survey_at = 0.0

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

        async def write(tx: AsyncConnection) -> None:
            for name in gone:
                await flows.hold(tx, name, NO_SUCH_FLOW, None, now)
            for name in back:
                await flows.resume(tx, name, now)

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
            if each.settlement is None:
                turn.unsent.append(each.delivery.seq)
                continue
            turn.settlements.append(each.settlement)
            at_fault = each.settlement.verdict is Verdict.TARGET
            if target and at_fault and (each.probe or not target.held) and target.flow.name not in turn.hold:
                probes = target.probes + 1 if target.held else 0
                turn.hold[target.flow.name] = (each.settlement.note, now + probe_after(probes))
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
            own = max(0, part - self._flying[target.flow.name])
            room = min(free, own + max(0, free - reserved), self._room(target, now))
            if room <= 0 or target.flow.name in but:
                continue
            free -= room
            reserved -= min(own, room)
            target.hungry, target.probing = False, target.held
            lease = max(settings.lease, 2 * target.flow.timeout + MARGIN)  # twice: an answer may need a look-up
            chosen.append(_Claim(target, room, lease, target.held))
        return chosen

    def _room(self, target: _Target, now: datetime) -> int:
        """How many deliveries this flow would take now if it were alone."""
        instant = time.monotonic()
        if not target.hungry or target.paused or instant < target.closed_until:
            return 0
        room = target.flow.at_once - self._flying[target.flow.name]
        if target.window:
            room = min(room, target.window.free(instant))
        if target.held:
            due = target.probe_at is not None and target.probe_at <= now
            return min(room, 1) if due and not target.probing else 0
        return room

    def _note(self, turn: _Turn) -> None:
        """Which flows are held from now on, and which no longer."""
        for name, (_, probe_at) in turn.hold.items():
            target = self._targets[name]
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
            if wanted.target.window:
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
            self._flying[wanted.target.flow.name] += len(mine)
            expires = instant + wanted.lease.total_seconds() - MARGIN.total_seconds() / 2
            if wanted.target.resolved:
                for delivery in mine:
                    self._spawn(self._deliver(wanted, delivery, wanted.target.resolved, expires))
            else:
                self._spawn(self._resolve_and_deliver(wanted, mine, expires))

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _resolve_and_deliver(self, wanted: _Claim, batch: Sequence[Delivery], expires: float) -> None:
        """References are followed at each use: a token that was rotated is used at once."""
        flow, now = wanted.target.flow, self._clock()
        judgement = None
        try:
            resolved = await resolve(flow, self._resolver)
        except (asyncio.CancelledError, StoreError):  # the database's trouble is not the flow's
            pass
        except WatcherError as error:
            judgement = Judgement(Verdict.TARGET, str(error))
        except Exception as error:
            log.error("delivery.error", flow=flow.name, exc_info=True)
            judgement = Judgement(Verdict.PASSING, f"{type(error).__name__} while following the flow's references")
        else:
            for delivery in batch:
                self._spawn(self._deliver(wanted, delivery, resolved, expires))
            return
        for delivery in batch:
            settlement = self._conclude(wanted, delivery, judgement, now, None) if judgement else None
            self._end(wanted, _Ended(delivery, settlement, wanted.probe))

    async def _deliver(self, wanted: _Claim, delivery: Delivery, resolved: Resolved, expires: float) -> None:
        """Send one delivery and note how it ended. Never raises: what is not known is tried again."""
        started_at, begun = self._clock(), time.monotonic()
        settlement = None
        try:
            if begun < expires:  # else this process was asleep past its lease, and others may be sending
                judgement, response = await self._attempt(wanted.target, delivery, resolved, started_at)
                settlement = self._conclude(wanted, delivery, judgement, started_at, response)
                metrics.delivery_seconds.observe(time.monotonic() - begun)
        except asyncio.CancelledError:
            pass  # at the end of the grace of a drain: it goes back and will be sent again under the same id
        except Exception as error:
            log.error("delivery.error", flow=delivery.flow, delivery=delivery.id, exc_info=True)
            judgement = Judgement(Verdict.PASSING, f"{type(error).__name__} while sending")
            settlement = self._conclude(wanted, delivery, judgement, started_at, None)
        self._end(wanted, _Ended(delivery, settlement, wanted.probe))

    async def _attempt(
        self, target: _Target, delivery: Delivery, resolved: Resolved, now: datetime
    ) -> tuple[Judgement, Response | None]:
        flow, preset = target.flow, target.preset
        try:
            request = preset.request(flow, delivery, resolved, now)
        except DeliveryError as error:
            return Judgement(Verdict.ITEM, str(error)), None
        except ValueError as error:  # a signing secret that cannot sign
            return Judgement(Verdict.TARGET, str(error)), None
        failpoint("before_send")
        try:
            response = await self._send(flow, request)
        except DeliveryError as error:
            return Judgement(blame(error), str(error)), None
        failpoint("after_send")
        judgement = preset.judge(flow, delivery, resolved, response, self._clock())
        if judgement.look_up and preset.judge_look_up:
            try:
                found = await self._send(flow, judgement.look_up)
            except DeliveryError as error:
                return Judgement(Verdict.PASSING, f"{judgement.note}; cannot be looked up: {error}"), response
            judgement = preset.judge_look_up(flow, delivery, response, found)
        if response.status == 429 and judgement.retry_after:
            target.closed_until = time.monotonic() + min(judgement.retry_after, BUSY_PAUSE)
        return judgement, response

    async def _send(self, flow: Flow, request: Request) -> Response:
        return await self._sender.send(
            request, timeout=flow.timeout, private_addresses=flow.private_addresses, trust_env=flow.trust_env
        )

    def _conclude(
        self, wanted: _Claim, delivery: Delivery, judgement: Judgement, started_at: datetime, response: Response | None
    ) -> Settlement:
        assert self._config
        # It may quote an address or an answer, and an answer may echo what it was sent.
        if judgement.note and (note := logs.mask(judgement.note)) != judgement.note:
            judgement = replace(judgement, note=note)
        if response and response.body and (answer := _masked(response.body[:MAX_ANSWER])) != response.body:
            response = replace(response, body=answer)
        return conclude(
            delivery,
            judgement,
            schedule=self._config.delivery.schedule,
            started_at=started_at,
            now=self._clock(),
            chance=random.random(),  # noqa: S311
            probe=wanted.probe,
            response=response,
        )

    def _end(self, wanted: _Claim, ended: _Ended) -> None:
        """Outcomes are settled together: when half of what was in flight has ended, or after a short while."""
        self._flying[ended.delivery.flow] -= 1
        if ended.probe:
            wanted.target.probing = False
        self._ended.append(ended)
        if len(self._ended) >= self.in_flight:
            self._event.set()
        elif self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(LINGER, self._flush_now)

    def _flush_now(self) -> None:
        self._flush = None
        self._event.set()


def blame(error: DeliveryError) -> Verdict:
    """Whose fault it is that a request could not be sent."""
    return Verdict.PASSING if error.kind in ("refused", "timeout", "reset") else Verdict.TARGET


async def resolve(flow: Flow, resolver: Resolver) -> Resolved:
    """The flow with its references followed. Raises WatcherError, without a secret in it, when one leads nowhere."""

    async def follow(value: Any) -> Any:
        return await resolver.text(value) if _is_reference(value) else value

    settings = {name: await follow(value) for name, value in flow.settings.items()}
    return _build(
        flow,
        url=await follow(flow.url),
        token=await follow(flow.token),
        secrets=tuple([await follow(secret) for secret in flow.secrets]),
        headers={name: await follow(text) for name, text in flow.headers.items() if _is_reference(text)},
        settings=settings,
    )


def _resolved_for_good(flow: Flow) -> Resolved | None:
    """None when there is something to follow, or to complain about, at each use."""
    values = [flow.url, flow.token, *flow.secrets, *flow.headers.values(), *flow.settings.values()]
    if any(_is_reference(value) for value in values):
        return None
    try:
        return _build(flow, url=flow.url, token=flow.token, secrets=flow.secrets, settings=dict(flow.settings))
    except DeliveryError:
        return None


def _build(flow: Flow, *, settings: Mapping[str, Any], **values: Any) -> Resolved:
    try:
        return Resolved(settings=presets[flow.preset].settings.model_validate(settings), **values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise DeliveryError(f"flows.{flow.name}: {wrong}") from None


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("$var:", "$res:", "$env:", "$file:"))


def _masked(body: bytes) -> bytes:
    text = body.decode("utf-8", "replace")
    masked = logs.mask(text)
    return body if masked == text else masked.encode()


def _is_held(status: Any) -> bool:
    return status is not None and status.held_since is not None
