"""The nouns as stored: SQLModel tables without behaviour.

Times are UTC instants, stored as whole microseconds since 1970 so that both databases compare them alike and fast.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, SmallInteger, Text, TypeDecorator, text
from sqlalchemy.engine import Dialect
from sqlmodel import Field, SQLModel

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

metadata = SQLModel.metadata
metadata.naming_convention = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Instant(TypeDecorator[datetime]):
    """An aware UTC datetime as an integer of microseconds. A naive one is an error, never a guess."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        return None if value is None else _EPOCH + timedelta(microseconds=value)


# A 64-bit key that SQLite still takes for its rowid.
_Serial = BigInteger().with_variant(Integer, "sqlite")


def _serial() -> Any:
    return Field(default=None, sa_column=Column(_Serial, primary_key=True, autoincrement=True))


def _instant(*, null: bool = True, **more: Any) -> Any:
    return Field(default=None, sa_type=Instant, nullable=null, **more)


def _text(default: str = "") -> Any:
    return Field(default=default, sa_type=Text, nullable=False)


def _bytes(*, null: bool = False, **more: Any) -> Any:
    return Field(default=None if null else b"", sa_type=LargeBinary, nullable=null, **more)


class MetaRow(SQLModel, table=True):
    """Facts about this database: `epoch` (renewed by a restore), `created_at`, `key_check`."""

    __tablename__ = "meta"
    name: str = Field(primary_key=True)
    value: str = _text()


class WatcherRow(SQLModel, table=True):
    """One watcher that this database knows, in the configuration or no longer."""

    __tablename__ = "watcher"
    id: int | None = _serial()
    name: str = Field(unique=True)
    origin: str  # the name it was first known by: item ids survive a renaming
    paused_at: datetime | None = _instant()
    pause_reason: str = _text()
    quarantined_at: datetime | None = _instant()
    quarantine_reason: str = _text()
    quarantine_run: int | None = Field(default=None, sa_type=BigInteger)
    failures: int = 0  # in a row
    failing_since: datetime | None = _instant()
    last_error: str = _text()
    backoff_until: datetime | None = _instant()
    tick_at: datetime | None = _instant()  # the last tick that was taken, by whichever process
    checked_at: datetime | None = _instant()  # end of the last run
    success_at: datetime | None = _instant()
    found_at: datetime | None = _instant()
    quiet_runs: int = Field(default=0, sa_type=BigInteger)  # runs that found nothing and left no row
    skipped_ticks: int = Field(default=0, sa_type=BigInteger)  # the run before still went on
    missed_ticks: int = Field(default=0, sa_type=BigInteger)  # nobody was there to take them
    gone_at: datetime | None = _instant()  # no longer in the configuration since


class StateRow(SQLModel, table=True):
    """The memory of one watcher, newest version; `sha256` is verified by every read."""

    __tablename__ = "state"
    watcher_id: int = Field(primary_key=True, sa_type=BigInteger)
    version: int = Field(sa_type=BigInteger)
    body: bytes = _bytes()
    sha256: bytes = _bytes()
    run_id: int | None = Field(default=None, sa_type=BigInteger)
    at: datetime = _instant(null=False)


class StateHistoryRow(SQLModel, table=True):
    """Earlier versions (and the newest) of a watcher's memory."""

    __tablename__ = "state_history"
    watcher_id: int = Field(primary_key=True, sa_type=BigInteger)
    version: int = Field(primary_key=True, sa_type=BigInteger)
    body: bytes = _bytes()
    sha256: bytes = _bytes()
    run_id: int | None = Field(default=None, sa_type=BigInteger)
    at: datetime = _instant(null=False)
    note: str = _text()


class SeenRow(SQLModel, table=True):
    """The ledger: one row per key that a watcher has met. Its primary key is the table itself on SQLite."""

    __tablename__ = "seen"
    __table_args__ = {"sqlite_with_rowid": False}
    watcher_id: int = Field(primary_key=True, sa_type=BigInteger)
    key_hash: bytes = _bytes(primary_key=True)
    content: bytes = _bytes()
    revision: int = 1
    present: bool = True
    listed_day: int = 0  # days since 1970, renewed rarely and only where `forget_after` is set
    key: str | None = Field(default=None, sa_type=Text)
    value: bytes | None = _bytes(null=True)


class RunRow(SQLModel, table=True):
    """One run that found something, failed or was quarantined. Quiet runs are only counted."""

    __tablename__ = "run"
    __table_args__ = (Index("ix_run_watcher_id_id", "watcher_id", "id"), Index("ix_run_finished_at", "finished_at"))
    id: int | None = _serial()
    watcher_id: int = Field(sa_type=BigInteger)
    outcome: str
    started_at: datetime = _instant(null=False)
    finished_at: datetime = _instant(null=False)
    tick_at: datetime | None = _instant()
    state_version: int | None = Field(default=None, sa_type=BigInteger)
    counts: str = _text("{}")  # JSON: reason → how many
    error_kind: str = _text()
    error: str = _text()
    detail: str = _text()
    logs: str = _text()
    gap: str = _text()
    warnings: str = _text("[]")  # JSON: list of sentences
    plan: bytes | None = _bytes(null=True)


class ItemRow(SQLModel, table=True):
    """One thing found."""

    __tablename__ = "item"
    __table_args__ = (
        Index("ix_item_watcher_id_key_hash", "watcher_id", "key_hash"),
        Index("ix_item_run_id", "run_id"),
    )
    seq: int | None = _serial()
    id: str = Field(unique=True)
    watcher_id: int = Field(sa_type=BigInteger)
    run_id: int = Field(sa_type=BigInteger)
    key: str = _text()
    key_hash: bytes = _bytes()
    change: str
    revision: int
    content: bytes = _bytes()
    payload: bytes = _bytes()
    sha256: bytes = _bytes()
    note: str = _text()
    found_at: datetime = _instant(null=False)


# On PostgreSQL too, by the migrations: to name that dialect here would load it at every start, a twentieth of it.
_PENDING = text("status = 0")
_HEAD = text("status = 0 AND head")


class DeliveryRow(SQLModel, table=True):
    """One item owed to one flow.

    ``head`` says that no earlier delivery of its flow and lane is pending: only heads are claimed, so that a claim
    costs what it claims, with 100,000 deliveries waiting in one lane as with 100,000 lanes.
    A claim moves ``due_at`` to the end of its lease: what nobody settled is due again by itself.
    """

    __tablename__ = "delivery"
    __table_args__ = (
        Index("ix_delivery_due", "flow", "due_at", "seq", sqlite_where=_HEAD),
        Index("ix_delivery_lane", "flow", "lane", "seq", sqlite_where=_PENDING),
        Index("ix_delivery_item_seq", "item_seq"),
        Index("ix_delivery_dead", "flow", "seq", sqlite_where=text("status = 2")),
    )
    seq: int | None = _serial()
    id: str = Field(unique=True)
    item_seq: int = Field(sa_type=BigInteger)
    watcher_id: int = Field(sa_type=BigInteger)
    flow: str
    lane: bytes = _bytes()
    status: int = Field(default=0, sa_type=SmallInteger)
    head: bool = True
    attempts: int = 0  # how far in the retry schedule
    starts: int = 0  # since the last outcome: an item that kills the process must not be tried for ever
    due_at: datetime = _instant(null=False)
    lease_until: datetime | None = _instant()
    token: str | None = None
    first_failed_at: datetime | None = _instant()
    settled_at: datetime | None = _instant()
    verdict: str = _text()
    status_code: int | None = None
    note: str = _text()


class AttemptRow(SQLModel, table=True):
    """One attempt of a delivery, with the start of the answer (4 KB at most)."""

    __tablename__ = "attempt"
    __table_args__ = (Index("ix_attempt_delivery_seq", "delivery_seq"),)
    id: int | None = _serial()
    delivery_seq: int = Field(sa_type=BigInteger)
    number: int
    started_at: datetime = _instant(null=False)
    duration_ms: int = 0
    verdict: str
    status_code: int | None = None
    note: str = _text()
    answer: bytes = _bytes()


class FlowRow(SQLModel, table=True):
    """What is known of a flow beyond its configuration: whether it is held or paused, and why."""

    __tablename__ = "flow"
    name: str = Field(primary_key=True)
    held_since: datetime | None = _instant()
    held_reason: str = _text()
    probe_at: datetime | None = _instant()
    probes: int = 0
    paused_at: datetime | None = _instant()
    pause_reason: str = _text()
    delivered_at: datetime | None = _instant()


class JobRow(SQLModel, table=True):
    """One run of a local script or flow."""

    __tablename__ = "job"
    __table_args__ = (
        Index("ix_job_status_created_at", "status", "created_at"),
        Index("ix_job_path_created_at", "path", "created_at"),
    )
    id: str = Field(primary_key=True)  # UUID
    kind: str  # flow, script
    path: str
    status: str
    args: bytes = _bytes()  # JSON object
    result: bytes | None = _bytes(null=True)  # JSON
    error: str = _text()
    detail: str = _text()
    step: int = 0  # the step that runs, or that runs next
    results: bytes = _bytes()  # JSON: the results of the steps before
    starts: int = 0
    logs: str = _text()
    created_at: datetime = _instant(null=False)
    started_at: datetime | None = _instant()
    finished_at: datetime | None = _instant()
    lease_until: datetime | None = _instant()
    owner: str | None = None
    parent: str | None = None
    root: str | None = None
    cancel_reason: str | None = None
    progress: int | None = None


class ResourceRow(SQLModel, table=True):
    """A typed JSON object at a path."""

    __tablename__ = "resource"
    path: str = Field(primary_key=True)
    resource_type: str
    value: bytes = _bytes()  # JSON; sha256 below is of these bytes
    sha256: bytes = _bytes()
    version: int = 1
    description: str = _text()
    created_by: str = _text()
    edited_at: datetime = _instant(null=False)


class ResourceHistoryRow(SQLModel, table=True):
    """Earlier values of a resource."""

    __tablename__ = "resource_history"
    path: str = Field(primary_key=True)
    version: int = Field(primary_key=True)
    resource_type: str
    value: bytes = _bytes()
    edited_at: datetime = _instant(null=False)


class ResourceTypeRow(SQLModel, table=True):
    """A resource type of the user's own: a JSON Schema."""

    __tablename__ = "resource_type"
    name: str = Field(primary_key=True)
    json_schema: bytes = _bytes()
    description: str = _text()
    edited_at: datetime = _instant(null=False)


class VariableRow(SQLModel, table=True):
    """A named string at a path, encrypted when it is secret."""

    __tablename__ = "variable"
    path: str = Field(primary_key=True)
    value: str = _text()  # plain, or "v1:<key id>:<base64 of nonce and ciphertext>"
    is_secret: bool = False
    description: str = _text()
    edited_at: datetime = _instant(null=False)


class TokenRow(SQLModel, table=True):
    """An API token: only its hash is kept."""

    __tablename__ = "token"
    sha256: bytes = _bytes(primary_key=True)
    prefix: str  # the first characters, to recognise it by
    label: str = _text()
    scopes: str = _text("[]")  # JSON list
    job_id: str | None = None
    created_at: datetime = _instant(null=False)
    expires_at: datetime | None = _instant()
    used_at: datetime | None = _instant()


class AuditRow(SQLModel, table=True):
    """Who read or changed what: secrets read, state edited, deliveries retried."""

    __tablename__ = "audit"
    id: int | None = _serial()
    at: datetime = _instant(null=False)
    actor: str = _text()
    action: str
    subject: str = _text()
    note: str = _text()
