"""From merged settings to the frozen Config: what pydantic cannot see is checked here, each mistake with its place."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from zoneinfo import available_timezones

import jmespath
from cronsim import CronSim, CronSimError
from jmespath.exceptions import JMESPathError
from pydantic import ValidationError

from watcher import flows as presets
from watcher import values
from watcher.config import model, storages, units
from watcher.config.positions import Loc
from watcher.config.sources import MAX_VALUE, Problem, Sources, beside, is_late, leaves, read_bounded, reference
from watcher.flows import shape, sign
from watcher.log import is_secret_name, register
from watcher.scripts import builtins

CRON_ALIASES = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
LEASE_MARGIN = timedelta(seconds=5)
"""What a claimed delivery needs beside the request itself: to wait for its turn, and to be settled."""

_MEANT = {
    "interval": "every", "schedule": "cron", "args": "with", "arguments": "with", "parameters": "with",
    "flows": "flow", "target": "flow", "script": "trigger", "source": "trigger", "disabled": "enabled",
    "tz": "timezone", "concurrency": "at_once", "secrets": "secret", "template": "body", "condition": "filter",
    "uri": "url", "endpoint": "url", "type": "preset", "renamed_from": "was", "host": "bind", "port": "bind",
}  # fmt: skip
"""What people call an option elsewhere."""


class Builder:
    """One pass over the settings. ``problems`` and ``warnings`` grow; nothing is raised."""

    def __init__(self, sources: Sources, environ: Mapping[str, str]) -> None:
        self.sources = sources
        self.environ = environ
        self.problems = list(sources.problems)
        self.warnings = list(sources.warnings)
        self.stored_elsewhere: dict[str, tuple[str, str]] = {}  # warning → what must be in the database
        self.broken: set[Loc] = set()  # what stands here was complained about
        self.built_in = built_in_triggers()

    def build(self) -> values.Config | None:
        """The configuration, or None when there are problems."""
        settings = self._validated()
        if settings is None:
            return None
        config = self._config(settings)
        return None if self.problems else config

    def wrong(self, loc: Loc, message: str, hint: str = "", at: str = "value") -> None:
        if loc[:3] not in self.broken:
            self.problems.append(Problem(loc, message, hint, at))

    # --- shape: what pydantic finds -------------------------------------------------------------------------------

    def _validated(self) -> model.Settings | None:
        """The settings. What is broken is left out, or stands in for, so that the rest is still checked for meaning."""
        tree = self.sources.tree
        self._unknown_in_flows(tree)
        for _ in range(2):
            try:
                return model.Settings(**tree)
            except ValidationError as error:
                for found in error.errors(include_url=False):
                    self._translate(found)
                    loc = found["loc"]
                    depth = 1 if loc[0] not in _NAMED else 2 if "[key]" in loc[:3] else 3
                    self.broken.add(tuple(loc[:depth]))
                tree = _without(tree, self.broken)
        return None

    def _unknown_in_flows(self, tree: Mapping[str, Any]) -> None:
        known = _options(("flows",))
        flows = tree.get("flows")
        for name, table in flows.items() if isinstance(flows, dict) else ():
            for option in table if isinstance(table, dict) else ():
                if option not in known:
                    self._unknown(("flows", name, option))

    def _translate(self, found: Any) -> None:
        loc: Loc = tuple(name for name in found["loc"] if name != "[key]")
        kind, given = found["type"], found.get("ctx", {})
        if kind == "extra_forbidden":
            self._unknown(loc)
        elif kind == "missing":
            self.wrong(loc, f"`{loc[-1]}` is required", _EXAMPLES.get(str(loc[-1]), ""), at="missing")
        elif kind == "literal_error":
            allowed = re.findall(r"'([^']*)'", given["expected"])
            value = found["input"] if isinstance(found["input"], str) else ""
            self.wrong(loc, "must be one of " + ", ".join(f'"{name}"' for name in allowed), near(value, allowed))
        elif kind == "value_error":
            self.wrong(loc, str(given["error"]), at="key" if "[key]" in found["loc"] else "value")
        elif kind in _BOUNDS:
            self.wrong(loc, _BOUNDS[kind].format(bound=_bound(loc, kind, given)))
        else:
            self.wrong(loc, _TYPES.get(kind, found["msg"].lower()))

    def _unknown(self, loc: Loc) -> None:
        names = _options(loc[:-1])
        meant = _MEANT.get(str(loc[-1]), "")
        hint = f"did you mean {meant}?" if meant in names else near(str(loc[-1]), names)
        if not hint and len(loc) == 1:
            hint = "known are " + ", ".join(sorted(names))
        self.wrong(loc, "there is no such option", hint, at="key")

    # --- meaning ----------------------------------------------------------------------------------------------------

    def _config(self, settings: model.Settings) -> values.Config:
        file = self.sources.file
        state = self.environ.get("STATE_DIRECTORY", "").partition(":")[0]
        home = Path(state) if state else None
        server = self._server(settings)
        flows = {name: self._flow(name, table, settings) for name, table in settings.flows.items()}
        watchers = {name: self._watcher(name, table, settings) for name, table in settings.watchers.items()}
        self._names_before(settings)
        self._references()
        data = beside(file, settings.data) if settings.data else home or beside(file, "watcher-data")
        built = values.Config(
            file=file.absolute() if file else None,
            database=self._database(settings.database or f"sqlite:///{home or '.'}/watcher.db"),
            data=data,
            workspace=settings.server.workspace if settings.server else "main",
            server=server,
            http=values.HttpSettings(**dict(settings.http)),
            scripts=values.ScriptSettings(
                **{**dict(settings.scripts), "environment": tuple(settings.scripts.environment)}
            ),
            delivery=values.DeliverySettings(
                **{**dict(settings.delivery), "schedule": tuple(settings.delivery.schedule)}
            ),
            flows=flows,
            watchers={name: watcher for name, watcher in watchers.items() if watcher},
            resources={path: values.FileResource(r.type, r.value) for path, r in settings.resources.items()},
            variables=settings.variables,
            storages=storages.build(self, settings, data),
            max_upload=settings.storage.max_upload,
            secret_key_file=beside(file, settings.secret_key_file) if settings.secret_key_file else None,
            log_level=settings.logging.level,
            log_format=settings.logging.format,
        )
        return _with_digest(built)

    def _database(self, url: str) -> str:
        loc: Loc = ("database",)
        if url.startswith("sqlite:///"):
            path = url.removeprefix("sqlite:///")
            if not path or path.endswith("/") or ":memory:" in path or "?" in path or "\0" in path:
                self.wrong(loc, "must name a file", 'write it like "sqlite:///watcher.db"')
                return url
            return "sqlite:///" + str(beside(self.sources.file, path))
        if url.startswith(("postgresql://", "postgres://")):
            try:
                parts = urlsplit(url)
                parts.port  # noqa: B018  (raises for a port that is none)
            except ValueError:
                self.wrong(loc, "is not an address of a PostgreSQL database", "postgresql://user@host:5432/name")
                return url
            if parts.password:
                register(parts.password)
            if not parts.path.strip("/") and "dbname=" not in parts.query:
                self.wrong(loc, "names no database", "postgresql://user@host/name")
            return "postgresql://" + url.partition("://")[2]
        self.wrong(loc, "must begin with sqlite:/// or postgresql://", near(url, ["sqlite:///", "postgresql://"]))
        return url

    def _server(self, settings: model.Settings) -> values.Server | None:
        if settings.server is None:
            return None
        bind = settings.server.bind
        host, colon, port = bind.rpartition(":")
        bare = host.strip("[]")
        if not colon or not port.isdecimal() or int(port) > 65535 or not re.fullmatch(r"[A-Za-z0-9.:%_-]+", bare):
            self.wrong(("server", "bind"), "must be host:port", 'such as "127.0.0.1:8321" or "[::1]:8321"')
        elif ":" in bare and not host.startswith("["):
            self.wrong(("server", "bind"), "an IPv6 address stands in brackets", f'"[{bare}]:{port}"')
        elif bare not in ("localhost", "::1") and not bare.startswith("127."):
            self.warnings.append(f"server.bind: {bind} is reachable from other machines: put TLS in front of it")
        return values.Server(bind, tuple(settings.server.hosts))

    # --- flows ------------------------------------------------------------------------------------------------------

    def _flow(self, name: str, table: model.Flow, settings: model.Settings) -> values.Flow:
        loc: Loc = ("flows", name)
        extra = dict(table.model_extra or {})
        preset = presets.presets.get(table.preset) if table.steps is None else None
        built = values.Flow(
            name=name, preset=table.preset, url=table.url or (preset.url if preset else ""), method=table.method,
            token=table.token, secrets=tuple(table.secret or ()), headers=table.headers, format=table.format,
            map=table.map, body=table.body, filter=table.filter, timeout=table.timeout, at_once=table.at_once,
            rate=table.rate or (preset.rate if preset else None), order=table.order,
            hours=table.deliver_between and dataclasses.replace(table.deliver_between, timezone=table.timezone),
            batch=values.Batch(**dict(table.batch)) if table.batch else None,
            max_item=table.max_item, private_addresses=table.private_addresses, trust_env=table.trust_env,
            enabled=table.enabled, steps=tuple(beside(self.sources.file, step) for step in table.steps or ()),
            settings=extra,
        )  # fmt: skip
        if table.steps is not None:
            self._local_flow(loc, table, built, settings)
        else:
            self._remote_flow(loc, table, extra)
        self._pace(loc, table)
        for option, message in shape.check(built):
            said, _, hint = message.removesuffix(")").partition(" (did you mean ")
            where = tuple(int(part) if part.isdecimal() else part for part in option.split("."))
            self.wrong((*loc, *where), said if hint else message, f"did you mean {hint}" if hint else "")
        for index, secret in enumerate(built.secrets):
            self._signing_secret((*loc, "secret"), index, secret)
        if table.steps is None and table.timeout + LEASE_MARGIN > settings.delivery.lease:
            least = units.show_duration(table.timeout + LEASE_MARGIN)
            self.wrong(
                (*loc, "timeout") if "timeout" in table.model_fields_set else ("delivery", "lease"),
                f"a lease of {units.show_duration(settings.delivery.lease)} ends before a request of flow {name} may",
                f'set delivery.lease to "{least}" or more',
            )
        return built

    def _pace(self, loc: Loc, table: model.Flow) -> None:
        if table.timezone not in _timezones():
            hint = near(table.timezone, _timezones()) or 'write it like "Europe/Paris"'
            self.wrong((*loc, "timezone"), f"no such time zone: {units.shortened(table.timezone)}", hint)
        elif table.deliver_between is None and "timezone" in table.model_fields_set:
            self.wrong((*loc, "timezone"), "a time zone means nothing without deliver_between", "remove it", at="key")
        if table.batch is None:
            return
        preset = presets.presets.get(table.preset)
        if table.steps is not None or (preset and not preset.batch):
            self.wrong((*loc, "batch"), "only the preset http sends several items at once", "remove it", at="key")
        elif table.format == "cloudevents":
            self.wrong((*loc, "format"), "one request has the headers of one event", '"cloudevents-structured"')
        elif table.order == "watcher":
            self.wrong((*loc, "order"), "items that go one after another never share a request", '"key" or "none"')
        for name in (name for name, text in table.headers.items() if "{" in text):
            self.wrong((*loc, "headers", name), "one request for many items has no template headers", "use `body`")

    def _local_flow(self, loc: Loc, table: model.Flow, built: values.Flow, settings: model.Settings) -> None:
        if table.url is not None:
            self.wrong(
                (*loc, "url"), "a flow has either url or steps", "a local flow is called at [server].bind", at="key"
            )
        if table.preset != "http":
            self.wrong((*loc, "preset"), "a local flow has no preset", "leave it out", at="key")
        for option in table.model_extra or {}:
            if option in _options(("flows",)):
                self.wrong((*loc, option), "a local flow has no preset's options", "leave it out", at="key")
        if settings.server is None and "server" not in self.sources.tree:
            self.wrong(
                (*loc, "steps"), "a local flow needs the [server] table", 'add [server] and bind = "127.0.0.1:8321"'
            )
        for index, step in enumerate(built.steps):
            self._script((*loc, "steps", index), step, (table.steps or [])[index])

    def _remote_flow(self, loc: Loc, table: model.Flow, extra: Mapping[str, Any]) -> None:
        preset = presets.presets.get(table.preset)
        if table.url is None:
            if preset is None or not preset.url:
                self.wrong((*loc, "url"), "`url` is required", "or steps, for a local flow", at="missing")
        elif reference(table.url) is None:
            wrong = _wrong_url(table.url)
            if wrong:
                self.wrong((*loc, "url"), *wrong)
            elif preset and preset.secret_url:
                register(table.url)
        if preset is None:
            known = ", ".join(sorted(presets.presets))
            hint = near(table.preset, presets.presets) or f"known are {known}"
            self.wrong((*loc, "preset"), f"no such preset: {units.shortened(table.preset)}", hint)
            return
        if table.format is not None and table.format not in preset.formats:
            hint = ("it can be " + ", ".join(f'"{f}"' for f in preset.formats)) if preset.formats else "use `body`"
            self.wrong((*loc, "format"), f"the preset {table.preset} cannot send that", hint)
        some = set(_options(("flows",)))
        try:
            preset.settings(**{option: value for option, value in extra.items() if option in some})
        except ValidationError as error:
            for found in error.errors(include_url=False):
                self._translate({**found, "loc": (*loc, *found["loc"])})

    def _signing_secret(self, loc: Loc, index: int, secret: str) -> None:
        where = (*loc, index) if isinstance(_at(self.sources.tree, loc), list) else loc
        found = reference(secret)
        if found is not None and found[0] == "env":
            secret = self.environ.get(found[1], "")
        elif found is not None:
            return
        try:
            if secret:
                register(secret)
                sign.check_secret(secret)
        except ValueError as error:
            self.wrong(where, str(error))

    # --- watchers ---------------------------------------------------------------------------------------------------

    def _watcher(self, name: str, table: model.Watcher, settings: model.Settings) -> values.Watcher | None:
        loc: Loc = ("watchers", name)
        self._schedule(loc, table)
        for index, flow in enumerate(table.flow):
            if flow not in settings.flows and _at(self.sources.tree, ("flows", flow)) is None:
                where = (
                    (*loc, "flow", index)
                    if isinstance(_at(self.sources.tree, (*loc, "flow")), list)
                    else (*loc, "flow")
                )
                hint = near(flow, settings.flows) or "add a table for it: [flows.NAME]"
                if where[:3] not in self.broken:
                    self.problems.append(Problem(where, f"no such flow: {units.shortened(flow)}", hint, absent=True))
        if len(set(table.flow)) < len(table.flow):
            self.wrong((*loc, "flow"), "the same flow twice", "name it once: each item goes to it once")
        if table.on is not None and len(set(table.on)) < len(table.on):
            self.wrong((*loc, "on"), "the same change twice")
        for option in ("key", "cursor"):
            self._jmespath((*loc, option), getattr(table, option))
        script = self._trigger((*loc, "trigger"), table.trigger)
        if script is None:
            return None
        return values.Watcher(
            name=name, script=script, flows=tuple(table.flow), args=table.with_,
            on=tuple(table.on) if table.on else None, **{option: getattr(table, option) for option in _SAME},
        )  # fmt: skip

    def _schedule(self, loc: Loc, table: model.Watcher) -> None:
        if table.every is not None and table.cron is not None:
            self.wrong((*loc, "cron"), "a watcher has either every or cron, not both", "remove one", at="key")
        elif table.every is None and table.cron is None and not self.broken & {(*loc, "every"), (*loc, "cron")}:
            self.wrong((*loc, "every"), "`every` or `cron` is required", 'such as every = "5m"', at="missing")
        if table.cron is not None:
            wrong = _wrong_cron(table.cron)
            if wrong:
                self.wrong((*loc, "cron"), *wrong)
        if table.timezone not in _timezones():
            hint = near(table.timezone, _timezones()) or 'write it like "Europe/Paris"'
            self.wrong((*loc, "timezone"), f"no such time zone: {units.shortened(table.timezone)}", hint)
        elif table.cron is None and "timezone" in table.model_fields_set:
            self.wrong((*loc, "timezone"), "a time zone means nothing without cron", "remove it", at="key")
        if table.every is not None and table.jitter >= table.every:
            self.wrong((*loc, "jitter"), "must be shorter than `every`")

    def _jmespath(self, loc: Loc, text: str | None) -> None:
        try:
            if text is not None:
                jmespath.compile(text)
        except JMESPathError as error:
            said = str(error).partition(", for expression")[0].partition("\n")[0]
            self.wrong(loc, f"is not a JMESPath expression: {said}", _JMESPATH)

    def _trigger(self, loc: Loc, text: str) -> Path | None:
        if "/" in text or text.endswith(".py"):
            file = beside(self.sources.file, text)
            return file if self._script(loc, file, text) else None
        if text in self.built_in:
            return self.built_in[text]
        if beside(self.sources.file, text + ".py").is_file():
            self.wrong(loc, f"no such built-in trigger: {text}", f'did you mean "./{text}.py"?')
        else:
            hint = near(text, self.built_in) or "known are " + ", ".join(self.built_in)
            self.wrong(loc, f"no such trigger: {units.shortened(text)}", hint)
        return None

    def _script(self, loc: Loc, file: Path, text: str) -> bool:
        if "\0" not in text and file.is_file() and os.access(file, os.R_OK):
            return True
        if "\0" not in text and file.is_dir():
            self.wrong(loc, f"{units.shortened(text)} is a directory, not a script")
        elif "\0" not in text and file.is_file():
            self.wrong(loc, f"{units.shortened(text)} cannot be read", "check its permissions")
        else:
            near_by = [p.name for p in sorted(file.parent.glob("*.py"))[:1000]] if "\0" not in text else []
            close = difflib.get_close_matches(file.name, near_by, 1)
            hint = (
                f"did you mean {text.removesuffix(file.name)}{close[0]}?"
                if close
                else "paths are relative to this file"
            )
            self.wrong(loc, f"there is no such file: {units.shortened(text)}", hint)
        return False

    def _names_before(self, settings: model.Settings) -> None:
        taken: dict[str, str] = {}
        for name, table in settings.watchers.items():
            loc = ("watchers", name, "was")
            if table.was is None:
                continue
            if table.was == name:
                self.wrong(loc, "a watcher cannot have been called what it is called", "remove it")
            elif table.was in settings.watchers:
                self.wrong(loc, f"{table.was} is still a watcher of its own", "two watchers cannot share one memory")
            elif table.was in taken:
                self.wrong(loc, f"{taken[table.was]} was {table.was} too", "only one of them can have its memory")
            taken[table.was] = name

    # --- references and secrets -------------------------------------------------------------------------------------

    def _references(self) -> None:
        """Follow references as far as can be known now; and what stands here in the clear must not reach a log."""
        for loc, value in leaves(self.sources.tree):
            if not isinstance(value, str):
                continue
            found = reference(value)
            if found is None:
                if is_secret(loc):
                    register(value)
            elif is_late(loc):
                self._reference(loc, *found)

    def _reference(self, loc: Loc, kind: str, name: str) -> None:
        off = loc[0] in ("flows", "watchers") and _at(self.sources.tree, (*loc[:2], "enabled")) is False
        if kind == "env" and name not in self.environ and not off:
            self.wrong(loc, f"the environment variable {name} is not set")
        elif kind == "file" and not off:
            try:
                read_bounded(beside(self.sources.file, name), MAX_VALUE)
            except ValueError as error:
                self.wrong(loc, f"{units.shortened(name)} {error}")
        elif kind in ("var", "res"):
            self.stored(loc, kind, name)

    def stored(self, loc: Loc, kind: str, name: str) -> None:
        known = _at(self.sources.tree, ({"var": "variables", "res": "resources"}[kind],)) or {}
        if name in known:
            return
        if not units.matches(model.PATH, name):
            self.wrong(loc, f"{units.shortened(name)} is not a path", f'write it like "${kind}:u/admin/name"')
            return
        close = difflib.get_close_matches(name, known, 1, 0.85)
        hint = f" (did you mean {close[0]}?)" if close else ""
        told = f"{dotted(loc)}: ${kind}:{name} is not in this file, so it must be in the database{hint}"
        self.stored_elsewhere[told] = kind, name
        self.warnings.append(told)


_SAME = (
    "trigger", "every", "cron", "timezone", "jitter", "timeout", "first_run", "key", "cursor", "lookback",
    "max_change", "max_items", "memory_limit", "forget_after", "silent_after", "max_backlog", "keep_history",
    "keep_runs", "enabled", "was",
)  # fmt: skip
"""Options of a watcher that mean the same in values.Watcher."""

_HIDDEN = frozenset().union(*(preset.settings.hidden for preset in presets.presets.values()))
_NAMED = frozenset({"flows", "watchers", "resources", "variables"})
_TYPES = {
    "string_type": 'must be text, in quotes: "…"',
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_type": "must be true or false",
    "list_type": "must be a list: [ … ]",
    "dict_type": "must be a table: { … }",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
}
_BOUNDS = {
    "greater_than_equal": "must be {bound} or more",
    "less_than_equal": "must be {bound} or less",
    "string_too_short": "must not be empty",
    "string_too_long": "must be at most {bound} characters long",
    "too_short": "must not be empty",
    "too_long": "must hold no more than {bound}",
    "string_pattern_mismatch": "must match {bound}",
}
_EXAMPLES = {
    "trigger": 'a built-in such as "git", or the path of a script',
    "flow": "name one of the [flows.…] tables",
    "type": 'such as "postgresql"',
    "path": 'such as "f/news/summarise"',
}
_JMESPATH = 'such as id, commit.sha or `"my key"`'


def dotted(loc: Loc) -> str:
    """``flows.notify.headers.X-Name``, with quotes where TOML wants them."""
    return ".".join(str(n) if re.fullmatch(r"[\w-]+", str(n)) else f'"{n}"' for n in loc)


def near(text: str, names: Iterable[str]) -> str:
    """``did you mean …?``, or nothing when nothing is near."""
    by_folded = {name.lower(): name for name in names}
    close = difflib.get_close_matches(text.lower()[:100], by_folded, 1, 0.6)
    return f"did you mean {by_folded[close[0]]}?" if close else ""


def is_secret(loc: Loc) -> bool:
    """Whether what stands here must not be shown: by what the option is for, or by its name."""
    words = [name for name in loc if isinstance(name, str)]
    if len(words) > 2 and words[0] == "flows" and (words[2] in ("token", "secret") or words[2] in _HIDDEN):
        return True
    if words and words[0] == "variables":
        return is_secret_name(words[-1].rpartition("/")[2])
    return bool(words) and len(words) > 2 and any(is_secret_name(name) for name in words[2:])


def built_in_triggers() -> dict[str, Path]:
    """Name → script of the triggers that come with watcher."""
    return {file.stem: file for file in sorted(builtins().glob("*.py")) if not file.stem.startswith("_")}


_TABLES: dict[str | int, Any] = {
    "server": model.Server, "http": model.Http, "scripts": model.Scripts, "delivery": model.Delivery,
    "logging": model.Logging, "resources": model.Resource, "storage": model.Storage, "flows": model.Flow,
    "watchers": model.Watcher,
}  # fmt: skip


def _options(loc: Loc) -> list[str]:
    """The names that may stand at this place."""
    table = _TABLES.get(loc[0], model.Settings) if loc else model.Settings
    if len(loc) == 3 and loc[2] == "batch":
        table = model.Batch
    if loc and loc[0] == "storage" and len(loc) > 1:
        table = model.StorageRule if "permissions" in loc else model.SecondaryStorage
    names = [info.alias or name for name, info in table.model_fields.items()]
    if table is model.Flow:
        names += {name for preset in presets.presets.values() for name in preset.settings.model_fields}
    return names


def _bound(loc: Loc, kind: str, given: Mapping[str, Any]) -> str:
    """The bound that was crossed, as it would be written. pydantic tells a duration's in words of its own."""
    fields = _TABLES[loc[0]].model_fields if loc[0] in _TABLES else {}
    info = next((fields[name] for name in loc[1:3] if name in fields), None)
    rules = info.metadata if info else ()
    side = {"greater_than_equal": "ge", "less_than_equal": "le"}.get(kind, "")
    bound = next(
        (getattr(rule, side) for rule in rules if side and hasattr(rule, side)), next(iter(given.values()), "")
    )
    if isinstance(bound, timedelta):
        return units.show_duration(bound)
    if loc[-1] in ("max_body", "max_result", "memory_limit", "max_upload") and isinstance(bound, int):
        return units.show_size(bound)
    return str(bound)


_STAND_IN: dict[str, Any] = {"trigger": "-", "flow": ["-"], "type": "-", "value": {}}
"""For required options that are missing or broken."""


def _without(tree: Mapping[str, Any], broken: set[Loc]) -> dict[str, Any]:
    kept = {name: value for name, value in tree.items() if (name,) not in broken}
    for loc in broken:
        if len(loc) < 2 or loc[0] not in kept:
            continue
        tables = kept[str(loc[0])] = dict(kept[str(loc[0])])
        table = tables.get(loc[1])
        if len(loc) == 2 or not isinstance(table, dict):
            tables.pop(loc[1], None)
            continue
        table = tables[loc[1]] = dict(table)
        table.pop(loc[2], None)
        if loc[2] in _STAND_IN and loc[0] != "flows":
            table[loc[2]] = _STAND_IN[loc[2]]
    return kept


def _at(tree: Any, loc: Loc) -> Any:
    for name in loc:
        try:
            tree = tree[name]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _wrong_url(url: str) -> tuple[str, str] | None:
    """What is wrong with a flow's address, and what to do; None if nothing is."""
    if not url.isprintable() or " " in url:
        return "holds spaces or control characters", "encode them: " + units.shortened(
            quote(url, safe="/:?&=%#@[]+,;~")
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"is not a URL: {str(error).lower()}", ""
    if parts.scheme not in ("http", "https"):
        return "must begin with https:// or http://", "" if "://" in url else f"https://{units.shortened(url)}"
    if not parts.hostname or port == 0:
        return "names no host", "https://host/path"
    if parts.username is not None:
        return "holds a user name or a password", "give them as `user` and `password`, or as `token`"
    if parts.fragment:
        return "has a #fragment, which is never sent", "remove it"
    return None


def _wrong_cron(text: str) -> tuple[str, str] | None:
    if text.startswith("@"):
        if text.lower() in CRON_ALIASES:
            return None
        return f"no such word: {text}", near(text, CRON_ALIASES) or "known are " + ", ".join(CRON_ALIASES)
    fields = text.split()
    if len(fields) != 5:
        hint = 'seconds cannot be given: use every = "30s"' if len(fields) == 6 else "minute hour day month weekday"
        return f"cron has five fields, this has {len(fields)}", hint
    try:
        next(CronSim(text, datetime(2024, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        name = str(error).removeprefix("Bad ")
        index = next((i for i, word in enumerate(_CRON_FIELDS) if word == name), None)
        shown = f" ({fields[index]})" if index is not None else ""
        return f"the {name}{shown} is not valid", "such as */10 * * * * or 30 9 * * mon-fri"
    except StopIteration:
        return "there is no such day, ever", ""
    return None


_CRON_FIELDS = ("minute", "hour", "day-of-month", "month", "day-of-week")


@lru_cache(maxsize=1)
def _timezones() -> set[str]:
    return available_timezones()


def _with_digest(config: values.Config) -> values.Config:
    text = repr(dataclasses.replace(config, file=None))
    return dataclasses.replace(config, digest=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16])
