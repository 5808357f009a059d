"""The arguments of a main, from its signature: their JSON Schema, and given values checked and coerced."""

from __future__ import annotations

import ast
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from watcher.errors import TriggerError
from watcher.scripts import plain
from watcher.values import UNSET, Json

MODELS = 64  # kept between runs: making one costs a hundred times what using it does
STANDARD = {"builtins", "typing", "types", "datetime", "decimal", "uuid", "pathlib", "collections.abc"}
SINCE = "since"  # the engine's own argument: the furthest point reached
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_models: dict[str, Any] = {}  # by the script's text


class Arguments:
    """The parameters of one main. Building it may import pydantic; a main without parameters needs none of it."""

    def __init__(self, main: Callable[..., Any], source: str = "") -> None:
        parameters = inspect.signature(main).parameters
        if any(p.kind is p.POSITIONAL_ONLY for p in parameters.values()):
            raise TriggerError("main: arguments are given by name: take out the `/`", kind="arguments")
        self.names = tuple(n for n, p in parameters.items() if p.kind not in _VARIABLE and n != SINCE)
        self.open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.takes_since = SINCE in parameters
        self._main = main
        self._parameters = parameters
        self._source = source
        self._model: Any = None

    @property
    def model(self) -> Any:
        """A pydantic model whose fields are ``p0``, ``p1``…, since any name is fine for a parameter."""
        if self._model is None:
            self._model = _models.get(self._source) or self._build()
        return self._model

    def _build(self) -> Any:
        import pydantic

        hints = _hints(self._main)
        kinds = _resource_kinds(self._source)
        fields: dict[str, Any] = {}
        for index, name in enumerate(self.names):
            default = self._parameters[name].default
            more: Any = {"json_schema_extra": {"format": f"resource-{kinds[name]}"}} if name in kinds else {}
            default = ... if default is inspect.Parameter.empty else default
            fields[f"p{index}"] = (_open(hints.get(name, Any)), pydantic.Field(default, alias=name, **more))
        config = pydantic.ConfigDict(extra="ignore" if self.open else "forbid", arbitrary_types_allowed=True)
        try:
            model = pydantic.create_model("Arguments", __config__=config, **fields)
        except Exception as error:  # whatever an annotation of the script's own makes of it
            said = str(error).partition("\n")[0]
            raise TriggerError(f"main: an annotation cannot be used: {said}", kind="arguments") from error
        if self._source and all(map(_is_everywhere_the_same, hints.values())):
            if len(_models) >= MODELS:
                _models.clear()
            _models[self._source] = model
        return model

    def schema(self) -> dict[str, Json]:
        """The JSON Schema of the arguments, as an object."""
        if not self.names:
            return {"type": "object", "properties": {}, "additionalProperties": self.open}
        if not _has_pydantic():
            return plain.schema(self._hints(), self._parameters, self.open, _resource_kinds(self._source))
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a default that JSON does not know is left out of the schema
            schema: dict[str, Json] = self.model.model_json_schema()
        schema.pop("title", None)
        schema["additionalProperties"] = self.open
        return schema

    def bind(self, given: Mapping[str, Json], since: Json = UNSET) -> dict[str, Any]:
        """What to call main with. TriggerError of kind ``arguments`` names every mistake at once."""
        bound = dict(given) if self.open else {}
        if self.names:
            bound |= self._validated(given)
        elif given and not self.open:
            raise TriggerError("arguments: " + "; ".join(_unknown(name, ()) for name in given), kind="arguments")
        if self.takes_since and since is not UNSET:
            optional = self._parameters[SINCE].default is not inspect.Parameter.empty
            if since is not None or not optional:
                bound[SINCE] = since
        return bound

    def bind_step(self, given: Json) -> dict[str, Any]:
        """What to call a step's main with: what it asks for by name, or the whole value if it takes one argument."""
        by_name = given if isinstance(given, dict) else {}
        if len(self.names) == 1 and self.names[0] not in by_name:
            by_name = {self.names[0]: given}
        return self.bind(by_name if self.open else {n: v for n, v in by_name.items() if n in self.names})

    def _hints(self) -> dict[str, Any]:
        hints = _hints(self._main)
        return {name: hints.get(name, Any) for name in self.names}

    def _validated(self, given: Mapping[str, Json]) -> dict[str, Any]:
        if not _has_pydantic():
            wrong = plain.mistakes(self.schema(), given, self.names)
            if wrong:
                raise TriggerError("arguments: " + "; ".join(wrong), kind="arguments")
            return {name: plain.coerced(hint, given[name]) for name, hint in self._hints().items() if name in given}
        import pydantic

        try:
            model = self.model.model_validate(dict(given))
        except pydantic.ValidationError as error:
            mistakes = error.errors(include_url=False, include_input=False, include_context=False)
            raise TriggerError(
                "arguments: " + "; ".join(_mistake(m, self.names) for m in mistakes), kind="arguments"
            ) from None
        # What was not given is left to main's own default.
        return {name: getattr(model, f"p{i}") for i, name in enumerate(self.names) if name in given}


@functools.cache
def _has_pydantic() -> bool:
    """Whether there is one to use: an environment that a script asks for has what the script named, and no more."""
    try:
        import pydantic
    except ImportError:
        return False
    return not pydantic.VERSION.startswith("1.")


def _open(hint: Any) -> Any:
    """The same type, its TypedDicts open to fields that they do not declare, as a resource may well have.

    Before Python 3.12 pydantic takes those of typing_extensions only.
    """
    if typing.is_typeddict(hint):
        import typing_extensions

        fields = {
            name: _open(kind) if name in hint.__required_keys__ else typing_extensions.NotRequired[_open(kind)]
            for name, kind in typing.get_type_hints(hint).items()
        }
        make: Any = typing_extensions.TypedDict  # mypy takes it with literal names only
        made = make(hint.__name__, fields)
        made.__pydantic_config__ = {"extra": "allow"}
        return made
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(_open, parts))]  # noqa: UP007 -- made from a tuple
    if origin in (list, dict, tuple, set):
        return origin[tuple(map(_open, parts))]
    return hint


def _is_everywhere_the_same(hint: Any) -> bool:
    """Whether a type belongs to the standard library, and not to one run's namespace of a script."""
    parts = typing.get_args(hint)
    if parts:
        return all(map(_is_everywhere_the_same, parts))
    return not callable(hint) or getattr(hint, "__module__", "") in STANDARD


def _hints(main: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(main, include_extras=True)
    except Exception as error:
        raise TriggerError(f"main: an annotation cannot be read: {error}", kind="arguments") from error


def _mistake(mistake: Mapping[str, Any], names: tuple[str, ...]) -> str:
    where = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        return _unknown(where, names)
    if mistake["type"] == "missing":
        return f"{where} is missing"
    return f"{where}: {mistake['msg'][:1].lower()}{mistake['msg'][1:]}"


def _unknown(name: str, names: tuple[str, ...]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, 1)
    if close:
        return f"{name}: main takes no such argument (did you mean {close[0]}?)"
    return f"{name}: main takes no such argument (it takes {', '.join(names) or 'none'})"


def _resource_kinds(source: str) -> dict[str, str]:
    """Parameters whose annotation is a resource type, as Windmill has it: a lower-case class or alias of the script.

    ``class postgresql(TypedDict): …`` or ``postgresql = dict``, then ``def main(db: postgresql)``. The text of the
    script tells more than the annotation does, since an alias of dict is just dict.
    """
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return {}
    types = {node.name for node in body if isinstance(node, ast.ClassDef)}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id == "dict":
            types |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    mains = [n for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == "main"]
    if not mains:
        return {}
    every = [*mains[-1].args.args, *mains[-1].args.kwonlyargs]
    kinds = {a.arg: a.annotation.id for a in every if isinstance(a.annotation, ast.Name)}
    return {name: kind for name, kind in kinds.items() if kind in types and kind == kind.lower()}
