"""The tables of the configuration file: every option with its type, its default, its bounds and what it means."""

from __future__ import annotations

import dataclasses
import math
from datetime import date, datetime, time, timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from watcher import values
from watcher.config import units
from watcher.flows import hours

# --- how values are written -------------------------------------------------------------------------------------------

Duration = Annotated[
    timedelta,
    BeforeValidator(units.duration),
    PlainSerializer(units.show_duration),
    WithJsonSchema({"type": "string", "pattern": units.DURATION_PATTERN}),
]
Size = Annotated[
    int,
    BeforeValidator(units.size),
    PlainSerializer(units.show_size),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": units.SIZE_PATTERN}, {"type": "integer", "minimum": 0}]}),
]
Rate = Annotated[
    tuple[int, timedelta],
    BeforeValidator(units.rate),
    PlainSerializer(units.show_rate),
    WithJsonSchema({"type": "string", "pattern": units.RATE_PATTERN}),
]


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


OneOrMany = Annotated[
    list[str],
    BeforeValidator(_one_or_many),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]


def _first_run(value: Any) -> values.FirstRun:
    if isinstance(value, values.FirstRun):
        return value
    policy, _, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if value in ("baseline", "all"):
        return values.FirstRun(value)
    if policy == "newest" and rest.isdecimal() and 1 <= int(rest) <= 1_000_000:
        return values.FirstRun("newest", newest=int(rest))
    if policy == "since" and rest.strip():
        return values.FirstRun("since", since=rest.strip())
    raise ValueError('must be "baseline", "all", "newest:N" (N from 1 on) or "since:" with a point of the cursor')


def _show_first_run(value: values.FirstRun) -> str:
    return {"newest": f"newest:{value.newest}", "since": f"since:{value.since}"}.get(value.policy, value.policy)


FirstRun = Annotated[
    values.FirstRun,
    BeforeValidator(_first_run),
    PlainSerializer(_show_first_run),
    WithJsonSchema({"type": "string", "pattern": r"^(baseline|all|newest:\d+|since:.+)$"}),
]


def _max_change(value: Any) -> values.MaxChange:
    if isinstance(value, values.MaxChange):
        return value
    if value == "off":
        return values.MaxChange(share=None, count=None)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return values.MaxChange(share=None, count=value, floor=0)
    if isinstance(value, str) and value.endswith("%") and value[:-1].isdecimal() and 1 <= int(value[:-1]) <= 100:
        return values.MaxChange(share=int(value[:-1]) / 100)
    raise ValueError('must be a share of the known keys ("50%"), a number of changes (200), or "off"')


def _show_max_change(value: values.MaxChange) -> str | int:
    if value.count is not None:
        return value.count
    return "off" if value.share is None else f"{round(value.share * 100)}%"


MaxChange = Annotated[
    values.MaxChange,
    BeforeValidator(_max_change),
    PlainSerializer(_show_max_change),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": r"^(\d{1,3}%|off)$"}, {"type": "integer", "minimum": 1}]}),
]


def _lookback(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        try:
            units.duration(value)
        except ValueError:
            pass
        else:
            return value
    raise ValueError('must be a duration ("15m"), or a number when the cursor is a number')


Lookback = Annotated[
    str,
    BeforeValidator(_lookback),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": units.DURATION_PATTERN}, {"type": "number", "minimum": 0}]}
    ),
]


def _silent_after(value: Any) -> timedelta | str:
    if value in ("auto", "off"):
        return str(value)
    try:
        span = units.duration(value)
    except ValueError:
        raise ValueError('must be a duration ("2d"), "auto" or "off"') from None
    if span < timedelta(minutes=1):
        raise ValueError("must be a minute at least")
    return span


SilentAfter = Annotated[
    timedelta | Literal["auto", "off"],
    BeforeValidator(_silent_after),
    PlainSerializer(lambda value: value if isinstance(value, str) else units.show_duration(value)),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": units.DURATION_PATTERN}, {"enum": ["auto", "off"]}]}),
]


def _plain(value: Any, depth: int = 0) -> Any:
    """TOML has dates and infinities, JSON has not: dates become text, infinities are a mistake."""
    if depth > 32:
        raise ValueError("is nested too deep (at most 32 levels)")
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("nan and inf cannot be sent as JSON")
    if isinstance(value, dict):
        return {name: _plain(inner, depth + 1) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, depth + 1) for inner in value]
    return value


def _hours(value: Any) -> values.Hours:
    if isinstance(value, values.Hours):
        return value
    if not isinstance(value, str):
        raise ValueError('hours are text, such as "08:00-20:00" or "mon-fri 08:00-18:00"')
    return hours.parse(value)


Hours = Annotated[
    values.Hours,
    BeforeValidator(_hours),
    PlainSerializer(hours.show),
    WithJsonSchema({"type": "string", "pattern": hours.PATTERN}),
]
AnyJson = Annotated[Any, BeforeValidator(_plain), WithJsonSchema({})]
JsonObject = Annotated[dict[str, Any], BeforeValidator(_plain)]

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
PATH = r"^[A-Za-z0-9_.@-]+(/[A-Za-z0-9_.@-]+)+$"


def _name(value: str) -> str:
    if not units.matches(NAME, value):
        raise ValueError(
            f'"{units.shortened(value)}" is not a name: use letters, digits, "_", "-" and "." (at most 100)'
        )
    return value


def _path(value: str) -> str:
    if not units.matches(PATH, value) or len(value) > 255:
        raise ValueError(f'"{units.shortened(value)}" is not a path: write it like "u/admin/github" or "f/news/token"')
    return value


def _host(value: str) -> str:
    if not units.matches(r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$", value):
        raise ValueError(f'"{units.shortened(value)}" is not the name of a host: write it like "watcher.example.com"')
    return value.lower()


Name = Annotated[str, AfterValidator(_name)]
HostName = Annotated[str, AfterValidator(_host)]
Path = Annotated[str, AfterValidator(_path)]


# --- tables -----------------------------------------------------------------------------------------------------------


def _of(noun: type, field: str) -> Any:
    """The default that the noun in values.py has: said once."""
    return next(f.default for f in dataclasses.fields(noun) if f.name == field)


class Table(BaseModel):
    """What all tables share: nothing is coerced, nothing unknown passes."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


class Server(Table):
    """The web server. Without this table there is no API, no health check and no local flow."""

    bind: str = _of(values.Server, "bind")
    """Address and port to listen on. Port 0 takes a free one."""
    hosts: list[HostName] = Field(default_factory=list, max_length=100)
    """Further names by which the server may be asked, such as that of a reverse proxy in front of it. Without them one
    that listens on loopback answers only to `localhost` and its address, and any other answers to every name."""
    workspace: str = Field(default=_of(values.Config, "workspace"), pattern=r"^[A-Za-z0-9_-]{1,50}$")
    """The workspace in the addresses of Windmill's API: `/api/w/{workspace}/…`."""


class Http(Table):
    """How sources are asked. All watchers share these limits."""

    at_once_per_host: int = Field(default=_of(values.HttpSettings, "at_once_per_host"), ge=1, le=1000)
    """Requests in flight to one host, whichever watchers they come from."""
    timeout: Duration = Field(default=_of(values.HttpSettings, "timeout"), ge=timedelta(milliseconds=100))
    """Total time for one request, from name look-up to the last byte."""
    max_body: Size = Field(default=_of(values.HttpSettings, "max_body"), ge=1024)
    """Longest answer that is read, counted after decompression. A longer one is an error of that run."""
    private_addresses: bool = _of(values.HttpSettings, "private_addresses")
    """Whether sources may be on loopback, private and link-local addresses. Turn off when strangers choose URLs."""
    trust_env: bool = _of(values.HttpSettings, "trust_env")
    """Whether `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` count."""
    user_agent: str = Field(default=_of(values.HttpSettings, "user_agent"), min_length=1, max_length=200)
    """How the service introduces itself to sources."""


class Scripts(Table):
    """The worker processes that trigger scripts and steps run in."""

    workers: int = Field(default=_of(values.ScriptSettings, "workers"), ge=1, le=1000)
    """Worker processes at once. Further runs wait for one."""
    max_runs: int = Field(default=_of(values.ScriptSettings, "max_runs"), ge=1)
    """After so many runs a worker is replaced by a fresh one."""
    max_result: Size = Field(default=_of(values.ScriptSettings, "max_result"), ge=1024)
    """Longest result of one run, as JSON."""
    max_items: int = Field(default=_of(values.ScriptSettings, "max_items"), ge=1)
    """Most items that one run may return."""
    environment: list[str] = Field(default_factory=list)
    """Names of environment variables that scripts may see. They see no others."""


class Delivery(Table):
    """How deliveries are sent and retried."""

    at_once: int = Field(default=_of(values.DeliverySettings, "at_once"), ge=1, le=10_000)
    """Requests in flight, all flows together."""
    schedule: list[Duration] = Field(
        default=list(_of(values.DeliverySettings, "schedule")), min_length=1, max_length=100
    )
    """How long after each failure the next attempt is due, first to last; the true wait is random up to that. When
    the list ends the delivery is a dead letter, kept for replay."""
    lease: Duration = Field(
        default=_of(values.DeliverySettings, "lease"), ge=timedelta(seconds=2), le=timedelta(hours=1)
    )
    """How long a claimed delivery belongs to one process. Must exceed the longest flow timeout by five seconds."""
    keep_dead: Duration = Field(default=_of(values.DeliverySettings, "keep_dead"), ge=timedelta(days=1))
    """How long a dead letter is kept for a look and a retry."""


class Logging(Table):
    """What is logged, and in which form."""

    level: Literal["debug", "info", "warning", "error"] = _of(values.Config, "log_level")
    """The least important level that is written."""
    format: Literal["auto", "json", "console"] = _of(values.Config, "log_format")
    """`auto` is readable on a terminal and JSON lines elsewhere."""


class Resource(Table):
    """One `[resources."PATH"]` table: a typed JSON object that triggers, flows and steps may name as `$res:PATH`."""

    type: str = Field(min_length=1, max_length=100)
    """The resource type, such as `github` or `postgresql`."""
    value: AnyJson
    """The object. Texts in it may be `$env:`, `$file:`, `$var:` and `$res:` references."""


def _allow(value: Any) -> frozenset[str]:
    if isinstance(value, frozenset):
        return value
    words = [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else ["?"]
    if not {*words} <= {*_ACTIONS}:
        raise ValueError('must be some of read, write, delete and list, such as "read,list"; empty is nothing')
    return frozenset(words)


_ACTIONS = ("read", "write", "delete", "list")
Allow = Annotated[
    frozenset[str],
    BeforeValidator(_allow),
    PlainSerializer(lambda value: ",".join(word for word in _ACTIONS if word in value)),
    WithJsonSchema({"type": "string", "pattern": r"^((read|write|delete|list)( *, *(read|write|delete|list))*)?$"}),
]


class StorageRule(Table):
    """One rule of a storage: what may be done with keys of this form."""

    pattern: str = Field(min_length=1, max_length=1000)
    """A glob over the whole key: `**`, `*`, `?`, `{a,b}`, and the variables `{username}`, `{group}`, `{folder_read}`
    and `{folder_write}`."""
    allow: Allow
    """Some of `read`, `write`, `delete` and `list`, with commas; an empty text is nothing."""


class SecondaryStorage(Table):
    """One `[storage.secondary.NAME]` table: object storage beside the primary one."""

    kind: Literal["folder", "s3", "azure_blob", "gcs"] = "folder"
    """What it is."""
    path: str | None = Field(default=None, min_length=1, max_length=4000)
    """The directory of a folder. Required for a secondary one; by default `objects` in `data`."""
    resource: str | None = Field(default=None, min_length=1, max_length=300)
    """The path of the resource with address and keys, of a type that is called like the kind."""
    public: bool = _of(values.StorageSettings, "public")
    """Whether everybody with a token may ask for the settings and keys of the connection (`polars_connection_settings`
    and the like), without the right to read its resource."""
    permissions: list[StorageRule] | None = Field(default=None, max_length=100)
    """Rules, of which the first that matches a key decides; what none matches is denied. Tokens that may do everything
    are not held to them."""


class Storage(SecondaryStorage):
    """Object storage: large files that scripts and flows share. Without this table it is a folder in `data`."""

    kind: Literal["folder", "s3", "azure_blob", "gcs", "none"] = "folder"  # type: ignore[assignment]
    """What it is; `none` switches it off."""
    max_upload: Size = Field(default=_of(values.Config, "max_upload"), ge=1024)
    """Largest object that the server takes."""
    secondary: dict[Name, SecondaryStorage] = Field(default_factory=dict)
    """Further storages by name, as tables `[storage.secondary.NAME]` with the same options."""


class Batch(Table):
    """Several items in one request."""

    size: int = Field(ge=2, le=1000)
    """Items in one request at most."""
    within: Duration = Field(default=_of(values.Batch, "within"), ge=timedelta(), le=timedelta(minutes=10))
    """How long the first item may wait for others."""


class Flow(Table):
    """One `[flows.NAME]` table: where items go."""

    model_config = ConfigDict(extra="allow")  # what only a preset knows; validated by the preset

    preset: str = _of(values.Flow, "preset")
    """What stands behind the URL; decides the form of the request and the meaning of the answer."""
    url: str | None = Field(default=None, max_length=4000)
    """Where to send. Required, except for a local flow and for presets that know the address."""
    steps: OneOrMany | None = Field(default=None, min_length=1, max_length=100)
    """A local flow: scripts that run here, one after another, in one `./shared` directory. The first gets the item,
    each further one the result of the step before. Paths are relative to the configuration file."""
    method: Literal["POST", "PUT", "PATCH", "DELETE", "GET"] = _of(values.Flow, "method")
    """The HTTP method."""
    token: str | None = Field(default=None, min_length=1)
    """Bearer token, or a reference to it, which is read anew at each attempt."""
    secret: OneOrMany | None = Field(default=None, min_length=1, max_length=5)
    """Standard Webhooks signing secret (`whsec_…`), or a reference to one. A list signs with each of them, so that a
    secret can be replaced without a gap."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Further request headers. Values are templates, or whole references."""
    format: Literal["envelope", "plain", "cloudevents", "cloudevents-structured"] | None = None
    """What to send: the Standard Webhooks `envelope` with type, time and data, the `plain` item, or a CloudEvent, with
    its attributes in headers or (`-structured`) around the data. The preset decides when this is left out."""
    map: AnyJson = None
    """A template of what is sent in the item's place, such as `{ title = "{{ item.title }}" }`; `body` and `headers`
    then see that."""
    body: AnyJson = None
    """A template of the body: any shape, whose texts may hold `{{ item.title }}`."""
    filter: str | None = Field(default=None, min_length=1, max_length=10_000)
    """A sandboxed expression over `item`, `key`, `change`, `previous` and `watcher`; what is not true is not sent."""
    timeout: Duration = Field(
        default=_of(values.Flow, "timeout"), ge=timedelta(milliseconds=100), le=timedelta(days=1)
    )  # fmt: skip
    """Total time for one attempt. Of a local flow: for each step, ten minutes when this is left out."""
    at_once: int = Field(default=_of(values.Flow, "at_once"), ge=1, le=10_000)
    """Requests in flight to this flow; of a local flow, also the jobs that one service works on at once."""
    rate: Rate | None = None
    """Never more attempts than this in the span."""
    order: Literal["key", "watcher", "none"] = _of(values.Flow, "order")
    """What goes out one after another: deliveries about one item key, all of one watcher, or nothing."""
    deliver_between: Hours | None = None
    """Hours in which to send, such as `"08:00-20:00"` or `"mon-fri 22:00-06:00"`. Outside of them deliveries wait, and
    no attempt is counted."""
    timezone: str = "UTC"
    """The time zone that `deliver_between` is read in."""
    batch: Batch | None = None
    """Send up to `size` items in one request, as a list, at the latest `within` that time after the first. Of the
    preset `http` alone."""
    max_item: Size | None = Field(default=None, ge=1024)
    """An item that is larger than this stays in the object storage, and `{ s3 = "…" }` is sent in its place. By default
    what the engine behind the preset takes."""
    private_addresses: bool = _of(values.Flow, "private_addresses")
    """Whether the flow may be on a loopback, private or link-local address."""
    trust_env: bool = _of(values.Flow, "trust_env")
    """Whether `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` count."""
    enabled: bool = _of(values.Flow, "enabled")
    """A flow that is switched off gets no new deliveries."""


class Watcher(Table):
    """One `[watchers.NAME]` table: which trigger, when, with what arguments, to which flows."""

    trigger: str = Field(min_length=1, max_length=1000)
    """A built-in trigger's name, or the path of a script, relative to the configuration file."""
    every: Duration | None = Field(default=None, ge=timedelta(milliseconds=100), le=timedelta(days=366))
    """Run at this interval. Watchers of one interval are spread over it."""
    cron: str | None = Field(default=None, min_length=1, max_length=200)
    """Run at these times: five fields (minute, hour, day, month, weekday) or `@hourly`, `@daily`, `@weekly`,
    `@monthly`, `@yearly`. Either `every` or `cron`."""
    timezone: str = _of(values.Watcher, "timezone")
    """The time zone that `cron` is read in."""
    jitter: Duration = Field(default=_of(values.Watcher, "jitter"), ge=timedelta())
    """Delay each tick by a random time up to this."""
    flow: OneOrMany = Field(min_length=1, max_length=100)
    """The flow that each item goes to, or a list of flows."""
    with_: JsonObject = Field(default_factory=dict, alias="with")
    """Arguments of the trigger. `$res:`, `$var:`, `$env:` and `$file:` references are read anew at each run."""
    first_run: FirstRun = Field(default_factory=values.FirstRun)
    """What the first sight of a source sends: nothing (`baseline`), `all`, `newest:N`, or what lies after a point of
    the cursor (`since:2026-01-01`)."""
    timeout: Duration = Field(
        default=_of(values.Watcher, "timeout"), ge=timedelta(milliseconds=100), le=timedelta(days=1)
    )
    """Total time for one run; then the script is stopped."""
    key: str | None = Field(default=None, min_length=1, max_length=1000)
    """What identifies an item, as a JMESPath expression. Overrides the script's own."""
    cursor: str | None = Field(default=None, min_length=1, max_length=1000)
    """What orders items in time, as a JMESPath expression. Overrides the script's own."""
    lookback: Lookback | None = None
    """How far behind the cursor late items are still looked for."""
    on: list[Literal["new", "changed", "removed"]] | None = Field(default=None, min_length=1, max_length=3)
    """Which changes become items."""
    max_change: MaxChange = Field(default_factory=values.MaxChange)
    """When more changes at once, the run is quarantined until approved. A share does not count below 100 changes."""
    max_items: int = Field(default=_of(values.Watcher, "max_items"), ge=1, le=1_000_000)
    """Items released to flows per run; the surplus follows in later intervals."""
    memory_limit: Size = Field(default=_of(values.Watcher, "memory_limit"), ge=16 * 1024 * 1024)
    """Memory that the script may take beyond an idle worker's."""
    forget_after: Duration | None = Field(default=None, ge=timedelta(days=1))
    """Forget keys that the source has not listed for so long. Without it nothing is forgotten."""
    silent_after: SilentAfter = _of(values.Watcher, "silent_after")
    """When nothing was found for so long, that is told once: a duration, `auto` (three times as long as it ever took
    between two finds, an hour at least, once there were ten), or `off`."""
    max_backlog: int = Field(default=_of(values.Watcher, "max_backlog"), ge=1)
    """When more deliveries of this watcher than this wait to be sent, its source is not asked until fewer do."""
    keep_history: int = Field(default=_of(values.Watcher, "keep_history"), ge=1, le=100_000)
    """Versions of the state that are kept."""
    keep_runs: Duration = Field(default=_of(values.Watcher, "keep_runs"), ge=timedelta(hours=1))
    """How long runs are kept, and items that are no longer owed."""
    enabled: bool = _of(values.Watcher, "enabled")
    """A watcher that is switched off does not run; it keeps its memory."""
    was: str | None = None
    """The name that this watcher had before; its memory is carried over."""


class Settings(BaseSettings):
    """The configuration of watcher."""

    model_config = SettingsConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True,
        env_prefix="watcher\x1f", env_nested_delimiter="\x1f",
    )  # fmt: skip

    database: str | None = None
    """Where everything is kept: `sqlite:///PATH`, relative to the configuration file, or `postgresql://…`. By default
    `watcher.db` in `$STATE_DIRECTORY`, or beside the configuration file."""
    data: str | None = None
    """Directory for jobs, backups and the control socket. By default `$STATE_DIRECTORY`, or `watcher-data` beside the
    configuration file."""
    secret_key_file: str | None = None
    """File with the key that encrypts secret variables. systemd's credential `watcher-key` goes before it."""
    server: Server | None = None
    """The web server."""
    http: Http = Http()
    """How sources are asked."""
    scripts: Scripts = Scripts()
    """Worker processes."""
    delivery: Delivery = Delivery()
    """Sending and retrying."""
    logging: Logging = Logging()
    """Logs."""
    variables: dict[Path, str] = Field(default_factory=dict)
    """Named texts, used as `$var:PATH`: `"u/admin/token" = "$env:TOKEN"`. They go before those in the database."""
    resources: dict[Path, Resource] = Field(default_factory=dict)
    """Typed objects, used as `$res:PATH`. They go before those in the database."""
    storage: Storage = Storage()
    """Object storage."""
    flows: dict[Name, Flow] = Field(default_factory=dict)
    """Where items go."""
    watchers: dict[Name, Watcher] = Field(default_factory=dict)
    """What is watched."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `sources` has merged: it knows where each value came from."""
        return (init_settings,)
