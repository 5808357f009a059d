"""TOML and environment in, a frozen Config out: the only reader of either, which finds every mistake at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from watcher.config import arguments
from watcher.config.build import Builder, dotted
from watcher.config.positions import Positions
from watcher.config.report import locate, render
from watcher.config.schema import json_schema
from watcher.config.sources import Problem, Sources, find, gather, leaves
from watcher.errors import ConfigError, Mistake
from watcher.scripts import Scripts
from watcher.values import Config

__all__ = ["Loaded", "check", "find", "json_schema", "load", "read", "render"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration with what is worth telling about it."""

    config: Config
    warnings: tuple[str, ...]
    sources: Sources
    stored_elsewhere: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Those of the warnings that say of a variable (``var``) or resource (``res``) that it must be in the database."""

    @property
    def origins(self) -> dict[str, str]:
        """Option → ``watcher.toml:12``, ``WATCHER_SERVER__BIND``, ``$env:NAME``, a secret's file, or ``flag``."""
        return _origins(self.sources)


def load(
    file: Path | None, *, environ: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """The configuration, whole and valid. Raises ConfigError with all mistakes.

    ``overrides`` are flags, as dotted options: ``{"server.bind": "127.0.0.1:0"}``. Precedence: flag, environment
    (``WATCHER_SERVER__BIND``), secrets directory, file, default. Without ``file`` the usual places are looked at.
    """
    return read(file, environ=environ, overrides=overrides).config


def read(
    file: Path | None, *, environ: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Loaded:
    """As `load`, with warnings and origins."""
    environ = os.environ if environ is None else environ
    file = find(environ) if file is None else file
    if file is None:
        raise ConfigError([_no_file()])
    sources = gather(file, environ, overrides)
    builder = Builder(sources, environ)
    config = builder.build()
    if config is None:
        raise ConfigError(locate(builder.problems, sources))
    return Loaded(config, tuple(builder.warnings), sources, builder.stored_elsewhere)


async def check(config: Config, scripts: Scripts) -> list[str]:
    """Hold each watcher against its script: its arguments, and what needs a cursor; load each step. Answers warnings.

    Raises ConfigError with all mistakes. Scripts are loaded, in their worker processes, and what they import is
    fetched; none is run. A watcher that is switched off only warns: what its trigger needs may not be installed yet.
    """
    problems: list[Problem] = []
    warnings: list[str] = []
    for watcher in config.watchers.values():
        found = await arguments.mistakes(watcher, scripts)
        if watcher.enabled:
            problems += found
        else:
            warnings += [f"{dotted(p.loc)}: {p.message}" + (f" ({p.hint})" if p.hint else "") for p in found]
    for flow in config.flows.values():
        if flow.enabled:
            problems += await arguments.step_mistakes(flow, scripts)
    if problems:
        raise ConfigError(locate(problems, gather(config.file, {}, None) if config.file else Sources(None)))
    return warnings


def _no_file() -> Mistake:
    return Mistake(
        "configuration",
        "there is no configuration file",
        hint="write one with `watcher init`, or name it with --config",
    )


def _origins(sources: Sources) -> dict[str, str]:
    positions = Positions(sources.text)
    origins = {}
    for loc, _ in leaves(sources.tree):
        place = positions.value(loc)
        written = f"{sources.file}:{place.line}" if place else str(sources.file)
        given = next((sources.origins[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in sources.origins), None)
        origins[dotted(loc)] = given or written
    return origins
