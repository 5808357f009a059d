"""A watcher's options held against what its script says of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from watcher.config.build import near
from watcher.config.sources import Problem, leaves, reference
from watcher.errors import TriggerError
from watcher.scripts import Described, Scripts
from watcher.values import Flow, Watcher


async def mistakes(watcher: Watcher, scripts: Scripts) -> list[Problem]:
    """What the script would refuse. Nothing of it is run but its import."""
    at = ("watchers", watcher.name)
    try:
        script = await scripts.describe(watcher.script)
    except TriggerError as error:
        return [Problem((*at, "trigger"), str(error))]
    found = [*_cursor(watcher, script), *_names(watcher, script)]
    return found or await _types(watcher, scripts)


async def step_mistakes(flow: Flow, scripts: Scripts) -> list[Problem]:
    """Why steps of a local flow could not be run: they are loaded, and what they import is fetched."""
    found = []
    for index, step in enumerate(flow.steps):
        try:
            await scripts.describe(step)
        except TriggerError as error:
            found.append(Problem(("flows", flow.name, "steps", index), str(error)))
    return found


def _cursor(watcher: Watcher, script: Described) -> Iterator[Problem]:
    at = ("watchers", watcher.name)
    if watcher.cursor is not None or script.label.style == "cursor":
        return
    hint = 'add cursor = "…", a JMESPath expression'
    if watcher.lookback is not None:
        yield Problem((*at, "lookback"), "the trigger has no cursor to look back from", hint)
    if watcher.first_run.policy == "since":
        yield Problem((*at, "first_run"), "the trigger has no cursor to begin from", hint)


def _names(watcher: Watcher, script: Described) -> Iterator[Problem]:
    at = ("watchers", watcher.name, "with")
    schema = script.arguments_schema
    known: Mapping[str, Any] = schema.get("properties", {})
    if not schema.get("additionalProperties", False):
        for name in watcher.args:
            if name not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                yield Problem((*at, name), f"the trigger has no argument {name}", near(name, known) or takes, "key")
    missing = [name for name in schema.get("required", []) if name not in watcher.args]
    if missing:
        shown = ", ".join(f"{name} = …" for name in missing)
        yield Problem(
            (*at, missing[0]), f"the trigger needs {' and '.join(missing)}", f"with = {{ {shown} }}", "missing"
        )


async def _types(watcher: Watcher, scripts: Scripts) -> list[Problem]:
    """References are not followed yet, so an argument that holds one is taken on trust."""
    try:
        await scripts.check(watcher.script, watcher.args)
    except TriggerError as error:
        trusted = {name for name, value in watcher.args.items() if any(reference(text) for _, text in leaves(value))}
        return [
            problem for problem in _split(watcher, str(error)) if len(problem.loc) < 4 or problem.loc[3] not in trusted
        ]
    return []


def _split(watcher: Watcher, message: str) -> Iterator[Problem]:
    for part in message.removeprefix("arguments: ").split("; "):
        where, _, said = part.partition(": ")
        path = tuple(int(name) if name.isdecimal() else name for name in where.split("."))
        if said and path[0] in watcher.args:
            yield Problem(("watchers", watcher.name, "with", *path), said.removeprefix("value error, "))
        else:
            yield Problem(("watchers", watcher.name, "with"), part)
