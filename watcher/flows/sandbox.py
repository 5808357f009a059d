"""Jinja2 in a box: what users wrote in the configuration, compiled once, and bounded in time and size at each use."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any

from jinja2 import (
    ChainableUndefined,
    TemplateError,
    TemplateSyntaxError,
    Undefined,
    meta,
    nodes,
    pass_context,
    pass_environment,
)
from jinja2.filters import make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from watcher.errors import DeliveryError
from watcher.values import Json

MAX_OUTPUT = 1024 * 1024
"""Bytes of one rendered body, and of one rendered header; characters of any text made on the way."""
MAX_STEPS = 100_000
"""Turns of loops and calls of one template, all together."""
MAX_SECONDS = 0.5
"""Processor time that loops and calls of one template may take: nothing else runs meanwhile."""
MAX_BITS = 4096
"""Of a number."""

Render = Callable[[dict[str, Any]], Any]

_BARE = re.compile(r"\s*\{\{-?\s*(.*?)\s*-?\}\}\s*", re.DOTALL)
_WIDE = re.compile(r"\d{6}|%[-+ #0]*\*")  # a width of a million, or one that comes from elsewhere
_SPENT = " spent"  # no name of a template's has a space
_GROWS = ("center", "ljust", "rjust", "zfill", "expandtabs", "replace", "join")
_NEVER = ("encode", "translate", "to_bytes")  # bytes, which JSON has not; a text of any length for each character
_PLAIN = frozenset((str, int, float, bool, type(None), dict, list))


# --- bounds -----------------------------------------------------------------------------------------------------------


class _Spent:
    """What one rendering has used up of its time."""

    def __init__(self) -> None:
        self.steps = 0
        self.until = 0.0

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise DeliveryError(f"loops or calls more than {MAX_STEPS} times")
        now = time.thread_time()
        self.until = self.until or now + MAX_SECONDS
        if now > self.until:
            raise DeliveryError(f"takes more than {MAX_SECONDS:g} s")


@pass_context
def _counted(context: Context, iterable: Iterable[Any]) -> Iterator[Any]:
    spent = context.parent[_SPENT]
    for each in iterable:
        spent.step()
        yield each


def _short(*given: Any) -> None:
    """Refuse an argument that makes a text of any length out of a short one."""
    for each in given:
        if (isinstance(each, str) and len(each) > MAX_OUTPUT) or (isinstance(each, int) and abs(each) > MAX_OUTPUT):
            raise DeliveryError(f"makes a text of more than {MAX_OUTPUT} characters")


def _bounded_filter(function: Callable[..., Any], bound: Callable[..., None]) -> Callable[..., Any]:
    @wraps(function)  # with Jinja's mark that it wants the context or the environment first
    def bounded(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if hasattr(function, "jinja_pass_arg") else args
        bound(*given, **kwargs)
        return function(*args, **kwargs)

    return bounded


def _weight(value: Any, at_most: int) -> int:
    """Characters of a value as text, about; no further than ``at_most``."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, Mapping | list | tuple):
        return 8
    weight = 0
    for each in value:
        weight += 2 + _weight(each, at_most) + (_weight(value[each], at_most) if isinstance(value, Mapping) else 0)
        if weight > at_most:
            break
    return weight


def _longest(values: Iterable[Any]) -> int:
    return max((_weight(value, MAX_OUTPUT) for value in values), default=0)


def _bound_width(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    _multiplied(str(text).count("\n") + 1, len(width) if isinstance(width, str) else int(width))


def _bound_center(text: Any, width: int = 80, *_: Any, **__: Any) -> None:
    _short(width)


def _bound_format(text: Any, *args: Any, **kwargs: Any) -> None:
    _short(*args, *kwargs.values())
    _bound_percent(str(text), [*args, *kwargs.values()])


def _bound_percent(text: str, values: Iterable[Any]) -> None:
    if _WIDE.search(text):
        raise DeliveryError("formats with a width that is too large, or that is an argument")
    _multiplied(text.count("%"), _longest(values))


def _bound_columns(values: Any, count: int, fill_with: Any = None, *_: Any, **__: Any) -> None:
    _short(count)


def _bound_wordwrap(
    text: Any, width: int = 79, break_long_words: bool = True, wrapstring: str | None = None, *_: Any, **__: Any
) -> None:
    _multiplied(len(str(text)), len(wrapstring or ""))


def _bound_replace(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
    _multiplied(str(text).count(str(old)), len(str(new)))


def _bound_json(value: Any, indent: int | None = None) -> None:
    if indent and indent > 16:
        raise DeliveryError("indents by more than 16")


def _bound_links(text: Any, *args: Any, **kwargs: Any) -> None:
    if any(isinstance(each, str) and len(each) > 100 for each in (*args, *kwargs.values())):
        raise DeliveryError("gives links an attribute of more than 100 characters")


@pass_environment
def _join(environment: Any, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    """Jinja's `join`, bounded."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return str(d).join(_joined(str(d), value))


def _joined(between: str, value: Iterable[Any]) -> list[str]:
    parts, size = [], 0
    for each in value:
        parts.append(str(each))
        size += len(parts[-1]) + len(between)
        if size > MAX_OUTPUT:
            raise DeliveryError(f"renders more than {MAX_OUTPUT} characters")
    return parts


class _Sandbox(ImmutableSandboxedEnvironment):
    """`item.items` is the key "items" of the item, never the method of a dict; nothing grows or runs without end."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict or isinstance(obj, Mapping):
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __context.parent[_SPENT].step()
        _short(*(each for each in (*args, *kwargs.values()) if isinstance(each, str)))
        name, text = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", "")
        if name in _NEVER:
            raise DeliveryError(f"calls {name}(), which no template may")
        if name in _GROWS:
            _short(*args, *kwargs.values())
            if name == "replace" and args and isinstance(args[-1], str):
                _multiplied(len(text) + 1, len(args[-1]))
            elif name == "join" and args:
                args = (_joined(text, args[0]),)
            elif name == "expandtabs" and (args or kwargs):
                _multiplied(text.count("\t"), *args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if isinstance(left, str):
                values = (
                    right.values() if isinstance(right, Mapping) else right if isinstance(right, tuple) else (right,)
                )
                _bound_percent(left, values)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise DeliveryError(f"makes a number of more than {MAX_BITS} bits")
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(times, int):
                    _multiplied(_weight(text, MAX_OUTPUT), times)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        if _WIDE.search(value.__self__) or re.search(r":[^}]*\{", value.__self__):
            raise DeliveryError("formats with a width that is too large, or that is an argument")

        def bounded(*args: Any, **kwargs: Any) -> str:
            _multiplied(value.__self__.count("{"), _longest((*args, *kwargs.values())))
            return wrapped(*args, **kwargs)

        return bounded


def _multiplied(length: int, times: int) -> None:
    if length * times > MAX_OUTPUT:
        raise DeliveryError(f"renders more than {MAX_OUTPUT} characters")


def _json(value: Any) -> Json:
    """An expression's value as JSON has it: nothing for what is not there, a list for what `map` and `select` give."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, str | int | float | dict | list):
        return value
    if isinstance(value, Undefined):
        return None
    if isinstance(value, Iterator):
        spent, found = _Spent(), []
        for each in value:
            spent.step()
            found.append(each)
        return found
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        return [*value]
    raise DeliveryError(f"gives a {type(value).__name__}, which JSON has not")


class _Context(Context):
    """Jinja's, made in a third of the time: an expression has no blocks, no globals and never escapes anything."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.parent = names
        self.vars = {}
        self.environment = _sandbox
        self.eval_ctx = _EVAL
        self.exported_vars = set()
        self.name = None
        self.globals_keys = set()
        self.blocks = {}


# Nothing is escaped: what comes out is JSON or plain text, never HTML.
_sandbox = _Sandbox(undefined=ChainableUndefined, autoescape=False)
_sandbox.globals.clear()
_EVAL = EvalContext(_sandbox)
_sandbox.filters["counted"] = _counted
_sandbox.filters["json_value"] = _json
_sandbox.filters["join"] = _join
_BOUNDS: dict[str, Callable[..., None]] = {
    "batch": _bound_columns,
    "center": _bound_center,
    "format": _bound_format,
    "indent": _bound_width,
    "replace": _bound_replace,
    "slice": _bound_columns,
    "tojson": _bound_json,
    "urlize": _bound_links,
    "wordwrap": _bound_wordwrap,
}
for _name, _bound in _BOUNDS.items():
    _sandbox.filters[_name] = _bounded_filter(_sandbox.filters[_name], _bound)


# --- rendering --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def expression(text: str) -> Render:
    """A function that evaluates one expression; what is not there is None."""
    tree = _parse_expression(text)
    return _evaluator(tree.body[0].nodes[0])  # type: ignore[attr-defined]


def compiled(template: Json) -> Render:
    """A function that fills in a template of any JSON shape; made once for each.

    A string that is nothing but ``{{ … }}`` becomes the value itself (a number stays a number, an object an object).
    The function raises DeliveryError beyond the bounds of this module, and whatever a template over foreign data may.
    """
    known = _compiled.get(id(template))
    if known is None or known[0] is not template:
        if len(_compiled) >= 1024:
            _compiled.clear()
        known = _compiled[id(template)] = template, _compile(template)
    return known[1]


_compiled: dict[int, tuple[Json, Render]] = {}  # each with its template, so that no other can have its id


def _compile(template: Json) -> Render:
    whole = _node(template)
    if whole is not None:
        return _evaluator(whole)
    parts = _parts(template)
    return lambda names: _filled(parts, names)


def _node(template: Json) -> nodes.Expr | None:
    """The whole as one expression, which costs a fraction of one per string; None when a string has statements."""
    if isinstance(template, str):
        return _node_of_text(template)
    if isinstance(template, Mapping):
        pairs = [(nodes.Const(key), _node(inner)) for key, inner in template.items()]
        return None if any(n is None for _, n in pairs) else nodes.Dict([nodes.Pair(k, n) for k, n in pairs if n])
    if isinstance(template, list | tuple):
        items = [_node(inner) for inner in template]
        return None if None in items else nodes.List([item for item in items if item])
    return nodes.Const(template)


def _node_of_text(text: str) -> nodes.Expr | None:
    if "{" not in text:
        return nodes.Const(text)
    bare = _BARE.fullmatch(text)
    if bare:
        content = _parse(text.strip()).body
        if len(content) == 1 and isinstance(content[0], nodes.Output) and len(content[0].nodes) == 1:
            return nodes.Filter(content[0].nodes[0], "json_value", [], [], None, None)
    content = _parse(text).body
    if not all(isinstance(part, nodes.Output) for part in content):
        return None
    said = [each for part in content if isinstance(part, nodes.Output) for each in part.nodes]
    return nodes.Concat(
        [nodes.Const(each.data) if isinstance(each, nodes.TemplateData) else each for each in said] or [nodes.Const("")]
    )


def _parts(template: Json) -> Json:
    """The same shape with a function in the place of every string that says something."""
    if isinstance(template, str):
        return _generator(template) if _node_of_text(template) is None else _evaluator(_node_of_text(template))
    if isinstance(template, Mapping):
        return {key: _parts(inner) for key, inner in template.items()}
    if isinstance(template, list | tuple):
        return [_parts(inner) for inner in template]
    return template


def _filled(parts: Json, names: dict[str, Any]) -> Json:
    if callable(parts):
        return parts(names)
    if isinstance(parts, dict):
        return {key: _filled(inner, names) for key, inner in parts.items()}
    if isinstance(parts, list):
        return [_filled(inner, names) for inner in parts]
    return parts


def _evaluator(tree: nodes.Expr | None) -> Render:
    assert tree is not None
    tree.set_environment(_sandbox)
    template = _sandbox.from_string(_made([nodes.Assign(nodes.Name("result", "store"), tree, lineno=1)]))
    root = template.root_render_func
    spends = tree.find(nodes.Call) is not None or isinstance(tree, nodes.Call)

    def evaluate(names: dict[str, Any]) -> Any:
        context = _Context({**names, _SPENT: _Spent()} if spends else names)
        for _ in root(context):
            pass
        value = context.vars["result"]
        return None if isinstance(value, Undefined) else value

    return evaluate


def _generator(text: str) -> Render:
    """With statements in it: rendered piece by piece, and stopped when it grows too long."""
    template = _sandbox.from_string(_made(_parse(text).body))

    def render(names: dict[str, Any]) -> str:
        parts, size = [], 0
        for part in template.generate({**names, _SPENT: _Spent()}):
            size += len(part)
            if size > MAX_OUTPUT:
                raise DeliveryError(f"renders more than {MAX_OUTPUT} characters")
            parts.append(part)
        return "".join(parts)

    return render


def _made(body: Sequence[nodes.Node]) -> nodes.Template:
    template = nodes.Template([*body], lineno=1)
    template.set_environment(_sandbox)
    for loop in template.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno, environment=_sandbox)
    return template


# --- checking ---------------------------------------------------------------------------------------------------------


def mistakes(text: str, known: frozenset[str], *, as_expression: bool = False) -> Iterator[str]:
    """What is wrong with a template or an expression that may use these names, and what to do."""
    try:
        tree = _parse_expression(text) if as_expression else _parse(text)
        _sandbox.compile(tree)
        used = meta.find_undeclared_variables(tree)
    except TemplateError as error:
        yield words(error) + _meant(str(error))
        return
    for name in sorted(used - known):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(sorted(known))
        yield f"no such name: {name} ({hint})"


def unknown_fields(text: str, name: str, known: Collection[str]) -> Iterator[str]:
    """What a template asks of a variable whose fields are known, and which it has not."""
    try:
        tree = _parse(text)
    except TemplateError:
        return
    if any(each.name == name and each.ctx != "load" for each in tree.find_all(nodes.Name)):
        return  # it has one of its own by that name
    asked: list[tuple[nodes.Node, Any]] = [(each.node, each.attr) for each in tree.find_all(nodes.Getattr)]
    asked += [(each.node, getattr(each.arg, "value", None)) for each in tree.find_all(nodes.Getitem)]
    for of, field in asked:
        if not isinstance(of, nodes.Name) or of.name != name:
            continue
        if isinstance(field, str) and field not in known:
            near = difflib.get_close_matches(field, known, 1)
            hint = f"did you mean {near[0]}?" if near else "it makes " + ", ".join(sorted(known))
            yield f"`map` makes no {field} ({hint})"


def _meant(said: str) -> str:
    """``No filter named 'truncat'.`` or ``No test named …``: which one was meant."""
    missing = re.match(r"No (filter|test) named '(\w+)'", said)
    if not missing:
        return ""
    near = difflib.get_close_matches(missing[2], _sandbox.filters if missing[1] == "filter" else _sandbox.tests, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def words(error: Exception) -> str:
    """What a template's error says, in one line."""
    said = " ".join(str(error).split())[:500] or type(error).__name__
    return said if isinstance(error, TemplateError) else f"{type(error).__name__}: {said}"


def _parse(text: str) -> nodes.Template:
    return _sandbox.parse(text)


def _parse_expression(text: str) -> nodes.Template:
    parser = Parser(_sandbox, text, state="variable")
    tree = parser.parse_expression()
    if not parser.stream.eos:
        raise TemplateSyntaxError("unexpected text after the expression", parser.stream.current.lineno)
    template = nodes.Template([nodes.Output([tree], lineno=1)], lineno=1)
    template.set_environment(_sandbox)
    return template
