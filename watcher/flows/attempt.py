"""One attempt to give deliveries to their flow, from the preliminary request to the verdict: the presets' edge."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from watcher.errors import DeliveryError, ObjectsError
from watcher.failpoint import failpoint
from watcher.flows import batch, large, presets, shape
from watcher.flows.preset import Preset, Resolved
from watcher.log import register
from watcher.values import REFERENCES, Delivery, Flow, Judgement, Request, Response, Verdict

KEEP = 4096
"""Bytes that are read of the answer to a delivery."""
KEEP_MORE = 1024 * 1024
"""Bytes that are read of an answer that must be understood: to a preliminary request, a look-up, a batch."""
AHEAD = 16 * 1024
"""Bytes of the largest item whose request is made before its turn; templates over larger ones are left to a thread."""
LONG = 0.02
"""Seconds of processor time. When a template takes longer, so are those over the next `WARY` items of its flow."""
WARY = 1000

T = TypeVar("T")

Made = Request | Judgement
"""A request, or why it cannot be made."""


class Sender(Protocol):
    """What sends one request; `watcher.http.Sender`."""

    async def send(
        self,
        request: Request,
        *,
        timeout: timedelta,  # noqa: ASYNC109 -- of everything, from the look-up to the last byte kept
        private_addresses: bool = True,
        trust_env: bool = False,
        keep: int = KEEP,
    ) -> Response: ...


class Resolver(Protocol):
    """What follows one reference; `watcher.resolve.Resolver`."""

    async def text(self, ref: str) -> str: ...


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of one delivery of a batch; no judgement: there was no time to send it."""

    delivery: Delivery
    judgement: Judgement | None
    response: Response | None = None


class Courier:
    """Makes the attempts of one flow; remembers, in memory alone, what its preset learned beforehand."""

    def __init__(
        self, flow: Flow, sender: Sender, clock: Callable[[], datetime], stow: large.Stow | None = None
    ) -> None:
        self.flow = flow
        self.preset = presets[flow.preset]
        self._sender = sender
        self._clock = clock
        self._stow = stow  # where what is too large for the flow stays behind
        self._learned: tuple[Resolved, str] | None = None  # by which settings, and what
        self._failed: tuple[float, Judgement] | None = None  # when (monotonic) and why nothing was learned
        self._learning = asyncio.Lock()
        self._making = asyncio.Lock()
        self._wary = 0  # over how many more items templates are left to a thread
        self._templates = flow.map is not None or flow.body is not None or bool(flow.headers)

    def made_ahead(self, delivery: Delivery, resolved: Resolved, now: datetime) -> Made | None:
        """The request of an attempt that starts within the second, or why there can be none; None to have it made then.

        Made one after the other, requests cost a fraction of what each costs between two others that are sent.
        """
        if self.preset.preliminary or len(delivery.payload) > AHEAD or self._wary or not self._is_sent_whole(delivery):
            return None
        return self._minded(partial(self._made, delivery, resolved, now))

    async def attempt(
        self, delivery: Delivery, resolved: Resolved, now: datetime, made: Made | None = None
    ) -> tuple[Judgement, Response | None]:
        """Send one delivery. Never raises DeliveryError: a request that cannot be made or sent is a judgement too."""
        ready = await self._prepared(resolved) if self.preset.preliminary else resolved
        if isinstance(ready, Judgement):
            return ready, None
        if delivery.attempt > 1 or delivery.first_failed_at is not None:
            before = await self._came_before(delivery, ready)
            if before is not None:
                return before, None
        judgement, response = await self._exchange(delivery, ready, now, made)
        if not judgement.stale:
            return judgement, response
        self._forget(ready.learned)
        ready = await self._prepared(resolved)
        if isinstance(ready, Judgement):
            return ready, response
        judgement, response = await self._exchange(delivery, ready, self._clock())
        if judgement.stale:
            self._forget(ready.learned)
        return judgement, response

    async def attempt_many(
        self, deliveries: Sequence[Delivery], resolved: Resolved, now: datetime, expires: float
    ) -> list[Tried]:
        """Send deliveries together. When the flow blames the items, the guilty are found by halves, until ``expires``
        (monotonic)."""
        fit, tried = await self._fit(deliveries)
        waiting = batch.by_size(fit)
        while waiting:
            group = waiting.pop(0)
            members = [delivery for delivery, _ in group]
            if time.monotonic() >= expires:
                tried += [Tried(delivery, None) for delivery in members]
                continue
            judgements, response = await self._exchange_many(group, resolved, now)
            if len(group) > 1 and all(judgement.verdict is Verdict.ITEM for judgement in judgements):
                waiting[:0] = [group[: len(group) // 2], group[len(group) // 2 :]]
            else:
                tried += [Tried(d, j, response) for d, j in zip(members, judgements, strict=True)]
        return tried

    async def _fit(self, deliveries: Sequence[Delivery]) -> tuple[list[batch.Rendered], list[Tried]]:
        """Deliveries with what is sent of them, and those whose template fails."""
        fit: list[batch.Rendered] = []
        unfit: list[Tried] = []
        for delivery in deliveries:
            try:
                shaped = await self._shaped(delivery)
                fit.append((delivery, await self._make(shaped, partial(batch.rendered, self.flow, shaped))))
            except DeliveryError as error:
                unfit.append(Tried(delivery, Judgement(Verdict.ITEM, str(error))))
            except ObjectsError as error:
                unfit.append(Tried(delivery, _not_stowed(error)))
        return fit, unfit

    async def _exchange_many(
        self, group: Sequence[batch.Rendered], resolved: Resolved, now: datetime
    ) -> tuple[Sequence[Judgement], Response | None]:
        assert self.preset.batch
        try:
            request = self.preset.batch(self.flow, group, resolved, now)
        except ValueError as error:  # a signing secret that cannot sign
            return [Judgement(Verdict.TARGET, str(error))] * len(group), None
        failpoint("before_send")
        try:
            response = await self._send(request, KEEP_MORE)
        except DeliveryError as error:
            return [Judgement(blame(error), str(error))] * len(group), None
        failpoint("after_send")
        return batch.judge(self.preset, self.flow, group, resolved, response, self._clock()), response

    async def _exchange(
        self, delivery: Delivery, resolved: Resolved, now: datetime, made: Made | None = None
    ) -> tuple[Judgement, Response | None]:
        preset = self.preset
        if made is None:
            try:
                shaped = delivery if self._is_sent_whole(delivery) else await self._shaped(delivery)
            except DeliveryError as error:
                return Judgement(Verdict.ITEM, str(error)), None
            except ObjectsError as error:
                return _not_stowed(error), None
            made = await self._make(shaped, partial(self._made, shaped, resolved, now))
        if isinstance(made, Judgement):
            return made, None
        failpoint("before_send")
        try:
            response = await self._send(made)
        except DeliveryError as error:
            return Judgement(blame(error), str(error)), None
        failpoint("after_send")
        judgement = preset.judge(self.flow, delivery, resolved, response, self._clock())
        if judgement.look_up and preset.judge_look_up:
            try:
                found = await self._send(judgement.look_up, KEEP_MORE)
            except DeliveryError as error:
                return Judgement(Verdict.PASSING, f"{judgement.note}; cannot be looked up: {error}"), response
            judgement = preset.judge_look_up(self.flow, delivery, response, found)
        return judgement, response

    def _made(self, shaped: Delivery, resolved: Resolved, now: datetime) -> Made:
        try:
            return self.preset.request(self.flow, shaped, resolved, now)
        except DeliveryError as error:
            return Judgement(Verdict.ITEM, str(error))
        except ValueError as error:  # a signing secret that cannot sign
            return Judgement(Verdict.TARGET, str(error))

    async def _make(self, delivery: Delivery, make: Callable[[], T]) -> T:
        """What ``make`` returns. Where a template may take long it is left to a thread, so that others are sent to."""
        if not self._wary and not (self._templates and len(delivery.payload) > AHEAD):
            return self._minded(make)
        async with self._making:  # one thread for each such flow: more would only take turns
            self._wary = max(0, self._wary - 1)
            return await asyncio.to_thread(self._measured, make)

    def _minded(self, make: Callable[[], T]) -> T:
        begun = time.perf_counter()
        try:
            return make()
        finally:
            if self._templates and time.perf_counter() - begun > LONG:
                self._wary = max(self._wary, 1)  # or others had the processor: the next one will tell

    def _measured(self, make: Callable[[], T]) -> T:
        begun = time.thread_time()
        try:
            return make()
        finally:
            if time.thread_time() - begun > LONG:
                self._wary = WARY

    def _is_sent_whole(self, delivery: Delivery) -> bool:
        """Whether nothing has to be shaped: true of nearly all, which are spared the rest."""
        return self.flow.map is None and not (self._stow and large.too_large(self.flow, delivery, self.preset.max_item))

    async def _shaped(self, delivery: Delivery) -> Delivery:
        """The delivery as the flow maps it, with references in the place of what is too large."""
        mapped, usual = await self._make(delivery, partial(shape.mapped, self.flow, delivery)), self.preset.max_item
        if self._stow is None or not large.too_large(self.flow, mapped, usual):
            return mapped
        try:
            return await large.by_reference(self.flow, mapped, usual, self._stow)
        except ObjectsError as error:
            if error.kind == "no_storage":
                return mapped
            raise

    async def _came_before(self, delivery: Delivery, resolved: Resolved) -> Judgement | None:
        """Whether an earlier attempt that seemed to fail came through, where the engine can be asked."""
        request = self.preset.look_before(self.flow, delivery, resolved) if self.preset.look_before else None
        if request is None or self.preset.already is None:
            return None
        try:
            found = await self._send(request, KEEP_MORE)
        except DeliveryError as error:
            return Judgement(blame(error), f"cannot ask whether it came through before: {error}")
        return Judgement(Verdict.DUPLICATE) if self.preset.already(self.flow, delivery, found) else None

    async def _prepared(self, resolved: Resolved) -> Resolved | Judgement:
        """With what the preset learns beforehand; asked once, whoever waits for it."""
        preliminary = self.preset.preliminary
        request = preliminary.request(self.flow, resolved) if preliminary else None
        if preliminary is None or request is None:
            return resolved
        begun = time.monotonic()
        async with self._learning:
            if self._learned is None or self._learned[0] != resolved:
                if self._failed and self._failed[0] >= begun:
                    return self._failed[1]
                found = await self._learn(preliminary.learn, resolved, request)
                if isinstance(found, Judgement):
                    self._failed = (time.monotonic(), found)
                    return found
                if preliminary.secret:
                    register(found)
                self._learned = (resolved, found)
            return replace(resolved, learned=self._learned[1])

    async def _learn(
        self, learn: Callable[..., str | Judgement], resolved: Resolved, request: Request
    ) -> str | Judgement:
        try:
            response = await self._send(request, KEEP_MORE)
        except DeliveryError as error:
            return Judgement(blame(error), str(error))
        return learn(self.flow, resolved, response, self._clock())

    def _forget(self, learned: str) -> None:
        """Unless somebody has learned anew already."""
        if self._learned and self._learned[1] == learned:
            self._learned = None

    def _send(self, request: Request, keep: int = KEEP) -> Awaitable[Response]:
        flow = self.flow
        return self._sender.send(
            request,
            timeout=flow.timeout,
            private_addresses=flow.private_addresses,
            trust_env=flow.trust_env,
            keep=keep,
        )


def _not_stowed(error: ObjectsError) -> Judgement:
    return Judgement(Verdict.PASSING, f"too large to be sent whole, and cannot be stored: {error}")


def longest(flow: Flow) -> timedelta:
    """How long one attempt may take: every request that its preset may make, and the wait for a batch."""
    preset = presets[flow.preset]
    requests = 2 + (1 if preset.look_before else 0) + (3 if preset.preliminary else 0)
    return requests * flow.timeout + (flow.batch.within if flow.batch else timedelta())


def blame(error: DeliveryError) -> Verdict:
    """Whose fault it is that a request could not be sent."""
    return Verdict.PASSING if error.kind in ("refused", "timeout", "reset") else Verdict.TARGET


async def resolve(flow: Flow, resolver: Resolver) -> Resolved:
    """The flow with its references followed. Raises WatcherError, without a secret in it, when one leads nowhere."""

    async def follow(value: Any) -> Any:
        return await resolver.text(value) if is_reference(value) else value

    settings = {name: await follow(value) for name, value in flow.settings.items()}
    return build(
        flow,
        url=await follow(flow.url),
        token=await follow(flow.token),
        secrets=tuple([await follow(secret) for secret in flow.secrets]),
        headers={name: await follow(text) for name, text in flow.headers.items() if is_reference(text)},
        settings=settings,
    )


def resolved_for_good(flow: Flow) -> Resolved | None:
    """None when there is something to follow, or to complain about, at each use."""
    values = [flow.url, flow.token, *flow.secrets, *flow.headers.values(), *flow.settings.values()]
    if any(is_reference(value) for value in values):
        return None
    try:
        return build(flow, url=flow.url, token=flow.token, secrets=flow.secrets, settings=dict(flow.settings))
    except DeliveryError:
        return None


def build(flow: Flow, *, settings: Mapping[str, Any], **values: Any) -> Resolved:
    """The flow with these values, its settings validated. Raises DeliveryError."""
    preset: Preset = presets[flow.preset]
    try:
        return Resolved(settings=preset.settings.model_validate(settings), **values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise DeliveryError(f"flows.{flow.name}: {wrong}") from None


def is_reference(value: Any) -> bool:
    """Whether a value stands for another one that is looked up at each use."""
    return isinstance(value, str) and value.startswith(REFERENCES)
