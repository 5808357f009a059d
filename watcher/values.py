"""The nouns as they travel between modules: frozen values without behaviour, I/O or a dependency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any, Literal

Json = Any
"""A JSON value: None, bool, int, float (never NaN or infinite), str, list or dict with str keys."""

Change = Literal["new", "changed", "removed"]
Order = Literal["key", "watcher", "none"]
Format = Literal["envelope", "plain", "cloudevents", "cloudevents-structured"]
Style = Literal["listing", "cursor", "windmill"]
"""How a script works: it describes the world, describes it from a cursor on, or returns what is new by itself."""

REFERENCES = ("$var:", "$res:", "$env:", "$file:")
"""How a text begins that stands for another value, which is looked up at each use."""

SCOPES = ("jobs", "resources", "resource_types", "variables", "users", "objects")
"""How the scope of a token begins: what it is for."""


# --- what the configuration says ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FirstRun:
    """What to send at the first sight of a source: nothing, everything, the newest N, or what came after an instant."""

    policy: Literal["baseline", "all", "newest", "since"] = "baseline"
    newest: int = 0
    since: str = ""  # compared with the cursor, in the cursor's own form


@dataclass(frozen=True, slots=True)
class MaxChange:
    """Above this many changes one run is quarantined. A share is of the known keys; ``floor`` is always allowed."""

    share: float | None = 0.5
    count: int | None = None
    floor: int = 100


@dataclass(frozen=True, slots=True)
class Watcher:
    """One ``[watchers.NAME]`` table."""

    name: str
    trigger: str  # as written: a built-in's name, or a path
    script: Path  # where that is, absolute
    flows: tuple[str, ...] = ()
    args: Mapping[str, Json] = field(default_factory=dict)  # references ("$res:…", "$var:…") not yet resolved
    every: timedelta | None = None
    cron: str | None = None
    timezone: str = "UTC"
    jitter: timedelta = timedelta()
    timeout: timedelta = timedelta(seconds=60)
    first_run: FirstRun = FirstRun()
    key: str | None = None  # JMESPath; overrides the script's label
    cursor: str | None = None
    lookback: str | None = None  # "15m", or a number for numeric cursors
    on: tuple[Change, ...] | None = None
    max_change: MaxChange = MaxChange()
    max_items: int = 1000  # deliveries released per run; the surplus is stored and released in later intervals
    memory_limit: int = 512 * 1024 * 1024  # bytes of address space above an idle worker's own
    forget_after: timedelta | None = None  # a key that the source has not listed for so long is forgotten
    silent_after: timedelta | Literal["auto", "off"] = "auto"  # having found nothing for so long is told of
    max_backlog: int = 100_000  # so many of its deliveries wait: it is not polled until fewer do
    keep_history: int = 100  # versions of the state
    keep_runs: timedelta = timedelta(days=30)  # runs, and items that are no longer owed
    enabled: bool = True
    was: str | None = None


@dataclass(frozen=True, slots=True)
class Hours:
    """When a flow may be sent to: on these weekdays (Monday is 0), from ``start`` for ``length`` on the local clock."""

    days: tuple[int, ...]
    start: timedelta  # after midnight
    length: timedelta  # at most a day; may go past midnight
    timezone: str = "UTC"


@dataclass(frozen=True, slots=True)
class Batch:
    """Several items in one request: as soon as there are ``size``, and at the latest ``within`` after the first."""

    size: int
    within: timedelta = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class Flow:
    """One ``[flows.NAME]`` table: a named target."""

    name: str
    preset: str = "http"
    url: str = ""
    method: str = "POST"
    token: str | None = None  # may be a reference: "$var:…", "$env:…", "$file:…"; resolved at each use
    secrets: tuple[str, ...] = ()  # Standard Webhooks signing secrets or references to them; all sign
    headers: Mapping[str, str] = field(default_factory=dict)  # templates
    format: Format | None = None  # None: what the preset sends by default
    map: Json = None  # a template of what stands in the place of the item; None sends the item as it was found
    body: Json = None  # a template: any JSON shape whose strings are Jinja2; None sends `format`
    filter: str | None = None  # a Jinja2 expression over `item`, `key`, `change`, `previous`, `watcher`
    timeout: timedelta = timedelta(seconds=30)
    at_once: int = 8
    rate: tuple[int, timedelta] | None = None  # so many per span
    order: Order = "key"
    hours: Hours | None = None  # outside of them deliveries wait
    batch: Batch | None = None
    max_item: int | None = None  # bytes; a larger one goes by reference. None: what the preset's engine takes
    private_addresses: bool = True  # False: refuse to send to loopback, private and link-local addresses
    trust_env: bool = False  # use HTTP(S)_PROXY
    steps: tuple[Path, ...] = ()  # a local flow
    settings: Mapping[str, Json] = field(default_factory=dict)  # what only this preset knows, validated by it
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class Server:
    """The ``[server]`` table."""

    bind: str = "127.0.0.1:8321"
    hosts: tuple[str, ...] = ()  # further names that we are asked by, lower case

    @property
    def host(self) -> str:
        return self.bind.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.bind.rpartition(":")[2])


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """The ``[http]`` table: how sources are asked."""

    at_once_per_host: int = 4
    timeout: timedelta = timedelta(seconds=30)  # total, for one request
    max_body: int = 10 * 1024 * 1024  # bytes after decompression
    private_addresses: bool = True
    trust_env: bool = False
    user_agent: str = "watcher"


@dataclass(frozen=True, slots=True)
class ScriptSettings:
    """The ``[scripts]`` table: the worker processes."""

    workers: int = 16  # processes at once
    max_runs: int = 1000  # a worker is replaced after so many
    max_result: int = 64 * 1024 * 1024  # bytes of one result
    max_items: int = 100_000  # items of one run
    environment: tuple[str, ...] = ()  # names of variables that scripts may see


@dataclass(frozen=True, slots=True)
class DeliverySettings:
    """The ``[delivery]`` table."""

    at_once: int = 64  # requests in flight, all flows together
    schedule: tuple[timedelta, ...] = tuple(
        timedelta(seconds=s) for s in (0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
    )
    lease: timedelta = timedelta(seconds=90)
    keep_dead: timedelta = timedelta(days=90)  # how long a dead letter can be looked at and retried


@dataclass(frozen=True, slots=True)
class FileResource:
    """One ``[resources."PATH"]`` table."""

    type: str
    value: Json


@dataclass(frozen=True, slots=True)
class StorageRule:
    """One rule of a storage: what may be done with keys like this. An empty ``allow`` is nothing at all."""

    pattern: str  # a glob with {username}, {group}, {folder_read}, {folder_write}
    allow: frozenset[str]  # of "read", "write", "delete", "list"


@dataclass(frozen=True, slots=True)
class StorageSettings:
    """``[storage]``, or one ``[storage.secondary.NAME]`` table."""

    name: str  # "_default_": the primary one
    kind: Literal["folder", "s3", "azure_blob", "gcs"] = "folder"
    path: Path | None = None  # of a folder
    resource: str = ""  # the path of a resource, for the others
    public: bool = False
    permissions: tuple[StorageRule, ...] | None = None  # None: Windmill's own


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration, validated, defaults filled in, paths absolute."""

    file: Path | None
    database: str  # "sqlite:////absolute/watcher.db" or "postgresql://…"
    data: Path  # directory for jobs, backups and the control socket
    workspace: str = "main"
    server: Server | None = None
    http: HttpSettings = HttpSettings()
    scripts: ScriptSettings = ScriptSettings()
    delivery: DeliverySettings = DeliverySettings()
    flows: Mapping[str, Flow] = field(default_factory=dict)
    watchers: Mapping[str, Watcher] = field(default_factory=dict)
    resources: Mapping[str, FileResource] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    storages: Mapping[str, StorageSettings] = field(default_factory=dict)  # by name; "_default_" is the primary one
    max_upload: int = 10 * 1024**3  # bytes of one object that comes through the server
    secret_key_file: Path | None = None
    log_level: str = "info"
    log_format: Literal["auto", "json", "console"] = "auto"
    digest: str = ""  # of everything above: two equal digests are the same configuration


# --- what a script gives back ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Label:
    """What ``@trigger`` says of a script. ``key`` and ``cursor`` are JMESPath; None here when they are callables."""

    style: Style = "windmill"
    key: str | None = None
    cursor: str | None = None
    lookback: str | None = None
    on: tuple[Change, ...] = ("new",)
    doc: str = ""
    loop: bool = False  # only awaits `http`: may run in the service's own loop (honoured for built-ins only)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that a script listed. ``key`` and ``cursor`` are None when the item has none."""

    item: Json
    key: str | None
    cursor: Json = None


UNSET: Any = type("Unset", (), {"__repr__": lambda _: "UNSET", "__bool__": lambda _: False})()
"""No value at all, where None is a value."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What one call of a script brought back.

    ``unchanged`` says that the source itself answered that nothing moved (304, or the same bytes): `entries` is empty
    and means nothing. ``complete`` is False when paging was stopped early, so that absence proves nothing.
    ``capped`` says that paging hit a limit before it met anything known. ``gap``: what the script says it could not
    see.
    """

    label: Label
    entries: Sequence[Entry] = ()
    unchanged: bool = False
    complete: bool = True
    capped: bool = False
    state: Json = UNSET  # staged by set_state
    validators: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by request
    logs: str = ""  # the tail of what the script printed, secrets masked
    warnings: tuple[str, ...] = ()
    gap: str = ""


# --- memory and diff --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """What a watcher remembers between runs, all but the seen keys. Version 0: nothing was ever committed."""

    version: int = 0
    state: Json = UNSET  # what the script set
    cursor: Json = None  # the furthest point reached
    known: int = 0  # keys in the ledger that the source still lists
    validators: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    script: str = ""  # fingerprint of script and arguments: validators of another script prove nothing
    origin: Json = None  # the lowest cursor of the first run: what lies below was there before us
    policy: Mapping[str, Json] = field(default_factory=dict)  # label in force, and `first_run` at the baseline
    state_at: str = ""  # as stored: the object that holds the state, when it is too large to stand here


@dataclass(frozen=True, slots=True)
class Seen:
    """One row of the ledger: a key that the watcher has met."""

    key_hash: bytes  # 16 bytes, `ids.key_hash`
    content: bytes  # 16 bytes, `ids.content_hash` of the item when last met
    revision: int = 1  # how many items this key has produced
    present: bool = True  # the source listed it when last looked at in full
    key: str | None = None  # kept, with `value`, only where `on` asks for changes or removals
    value: Json = UNSET


@dataclass(frozen=True, slots=True)
class Find:
    """One item that a diff proposes."""

    key: str
    key_hash: bytes
    change: Change
    revision: int
    content: bytes
    item: Json  # for `removed`: what it was
    previous: Json = UNSET
    patch: Json = UNSET  # RFC 6902, from `previous` to `item`


Reason = Literal["new", "changed", "removed", "seen", "boundary", "baseline", "filtered", "over_cap", "duplicate"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about one key in one run, and why. Shown by `plan` and `why`."""

    key: str
    reason: Reason
    note: str = ""


@dataclass(frozen=True, slots=True)
class Diff:
    """The items and the next memory that a run proposes."""

    finds: tuple[Find, ...] = ()
    memory: Memory = Memory()
    learn: tuple[Seen, ...] = ()  # ledger rows to write (insert or replace)
    touch: tuple[bytes, ...] = ()  # key hashes whose `last listed` day must be renewed
    decisions: tuple[Decision, ...] = ()
    gap: str = ""  # not empty: something may have been missed, and why we think so
    quarantine: str = ""  # not empty: too much changed at once; nothing may be committed until approved
    warnings: tuple[str, ...] = ()

    @property
    def quiet(self) -> bool:
        """Nothing to write."""
        return not (self.finds or self.learn or self.touch)


# --- commit -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewDelivery:
    """One delivery to create with its item."""

    id: str  # UUID, `ids.delivery_id`
    flow: str
    lane: bytes  # deliveries of one flow and one lane go out in order
    due_at: datetime
    dead: str = ""  # not empty: it is dead from the start, and why (its filter failed)


@dataclass(frozen=True, slots=True)
class NewItem:
    """One item to create."""

    id: str  # `ids.item_id`
    key: str
    key_hash: bytes
    change: Change
    revision: int
    content: bytes
    payload: bytes  # JSON object {"item":…, "previous":…?, "patch":…?}, UTF-8
    deliveries: tuple[NewDelivery, ...] = ()
    note: str = ""  # why it goes to fewer flows than configured: "filtered: summarise"


@dataclass(frozen=True, slots=True)
class StagedState:
    """A state at a path of its own, to be written with the items: a resource of type ``state``."""

    path: str
    value: Json  # UNSET: to be deleted
    expected: int | None = None  # the version that was read; None: it was not looked at


@dataclass(frozen=True, slots=True)
class Proposal:
    """All that one run wants to write, in one transaction, if the state is still at ``expected``."""

    watcher: str
    expected: int  # memory version that was read
    memory: Memory  # its version is expected + 1
    items: Sequence[NewItem]
    learn: Sequence[Seen]
    touch: Sequence[bytes]
    run: RunRecord
    keep_history: int = 100
    states: Sequence[StagedState] = ()


Outcome = Literal["ok", "quiet", "failed", "quarantined", "conflict", "approved"]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run, as it is recorded."""

    watcher: str
    outcome: Outcome
    started_at: datetime
    finished_at: datetime
    tick_at: datetime | None = None  # None: started by hand
    counts: Mapping[str, int] = field(default_factory=dict)  # reason → how many
    error_kind: str = ""
    error: str = ""
    detail: str = ""  # traceback or the start of the answer, ≤ 8 KB
    logs: str = ""  # ≤ 64 KB
    gap: str = ""
    warnings: tuple[str, ...] = ()
    plan: bytes = b""  # a quarantined run's proposal, to be approved


# --- dispatch ---------------------------------------------------------------------------------------------------------


class Status(IntEnum):
    """The only state machine: pending → delivered | dead."""

    PENDING = 0
    DELIVERED = 1
    DEAD = 2


@dataclass(frozen=True, slots=True)
class Delivery:
    """One item owed to one flow, claimed and ready to be sent."""

    seq: int
    id: str  # UUID; the same for every attempt
    flow: str
    attempt: int  # 1 for the first
    first_failed_at: datetime | None
    item_id: str
    watcher: str
    run_id: int
    key: str
    change: Change
    revision: int
    found_at: datetime
    payload: bytes  # as NewItem.payload; its checksum was verified by the claim


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request, to a source or to a flow."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP answer. ``body`` may have been cut; header names are lower case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    url: str = ""


class Verdict(StrEnum):
    """What an answer means for the delivery."""

    DELIVERED = "delivered"
    DUPLICATE = "duplicate"  # the flow already has it: a success
    ITEM = "item"  # the item's fault: dead at once
    TARGET = "target"  # the target's fault: hold the flow, burn no attempt
    PASSING = "passing"  # try again later


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict with its reason; ``look_up`` asks for one more request before the verdict can be given."""

    verdict: Verdict
    note: str = ""
    retry_after: float | None = None  # seconds
    look_up: Request | None = None
    stale: bool = False  # what was learned beforehand no longer holds: learn it anew and try once more


@dataclass(frozen=True, slots=True)
class Settlement:
    """How one attempt ended, ready to be written."""

    delivery: Delivery
    verdict: Verdict
    started_at: datetime
    duration_ms: int
    status_code: int | None = None
    note: str = ""
    answer: bytes = b""  # ≤ 4 KB
    due_at: datetime | None = None  # when to try again (passing, target)
    dead: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step of a job returned."""

    result: Json
    logs: str = ""


class JobStatus(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
