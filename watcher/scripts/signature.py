"""The arguments of a TypeScript main, read from its text: nothing of the script is run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from watcher.errors import TriggerError
from watcher.values import Json

if TYPE_CHECKING:
    from tree_sitter import Node

_SIMPLE: dict[str, dict[str, Json]] = {
    "string": {"type": "string"},
    "number": {"type": "number"},
    "bigint": {"type": "integer"},
    "boolean": {"type": "boolean"},
    "object": {"type": "object"},
    "null": {"type": "null"},
    "undefined": {"type": "null"},
    "Date": {"type": "string", "format": "date-time"},
    "Base64": {"type": "string", "contentEncoding": "base64"},
    "Email": {"type": "string", "format": "email"},
    "Sql": {"type": "string", "format": "sql"},
}
_FUNCTIONS = ("arrow_function", "function_expression", "generator_function")
_DEPTH = 8  # of types that name themselves


@dataclass(frozen=True, slots=True)
class Signature:
    """What a script's text says of its main."""

    names: tuple[str, ...]  # in order: they are given by position
    schema: dict[str, Json]  # JSON Schema of an object
    doc: str
    pages: bool  # a generator
    imports: tuple[str, ...]  # what it imports, as written


def signature(text: str, name: str) -> Signature:
    """Read a script. TriggerError if it has no exported main, or if its language's grammar is not installed."""
    root = _parse(text, name).root_node
    types = dict(_types(root))
    imports = tuple(dict.fromkeys(_imports(root)))
    for node in root.named_children:
        function = _main(node)
        if function is None:
            continue
        parameters = function.child_by_field_name("parameters")
        fields: dict[str, Json] = {}
        required = []
        for index, one in enumerate(p for p in parameters.named_children if p.type != "comment") if parameters else ():
            called, shape, needed = _parameter(one, index, types)
            fields[called] = shape
            if needed:
                required.append(called)
        schema: dict[str, Json] = {"type": "object", "properties": fields, "additionalProperties": False}
        if required:
            schema["required"] = required
        pages = function.type == "generator_function_declaration"
        return Signature(tuple(fields), schema, _doc(root, node), pages, imports)
    raise TriggerError(f"{name} has no main: export it, `export async function main(...)`", kind="missing")


def imported(text: str, name: str) -> tuple[str, ...]:
    """What any script imports, as written."""
    return tuple(dict.fromkeys(_imports(_parse(text, name).root_node)))


def _parse(text: str, name: str) -> Any:
    try:
        import tree_sitter
        import tree_sitter_typescript
    except ImportError:
        raise TriggerError(
            f"{name}: reading TypeScript needs change-watcher[typescript]: install it", kind="missing"
        ) from None
    jsx = name.endswith(("x",))
    language = tree_sitter_typescript.language_tsx() if jsx else tree_sitter_typescript.language_typescript()
    tree = tree_sitter.Parser(tree_sitter.Language(language)).parse(text.encode())
    if tree.root_node.has_error:
        wrong = next(_broken(tree.root_node), tree.root_node)
        raise TriggerError(f"{name}:{wrong.start_point[0] + 1}: this is not TypeScript", kind="raised")
    return tree


def _broken(node: Node) -> Iterator[Node]:
    if node.type == "ERROR" or node.is_missing:
        yield node
    for child in node.children:
        if child.has_error:
            yield from _broken(child)


def _text(node: Node | None) -> str:
    return node.text.decode("utf-8", "replace") if node is not None and node.text else ""


def _main(node: Node) -> Node | None:
    """The function of ``export [async] function main``, or of ``export const main = …``."""
    if node.type != "export_statement":
        return None
    declared = node.child_by_field_name("declaration")
    if declared is None:
        return None
    if declared.type in ("function_declaration", "generator_function_declaration"):
        return declared if _text(declared.child_by_field_name("name")) == "main" else None
    for one in declared.named_children:
        value = one.child_by_field_name("value")
        named = _text(one.child_by_field_name("name")) == "main"
        if named and value is not None and value.type in _FUNCTIONS:
            return value
    return None


def _types(root: Node) -> Iterator[tuple[str, Node]]:
    for node in root.named_children:
        declared = node.child_by_field_name("declaration") if node.type == "export_statement" else node
        if declared is None:
            continue
        body = {"type_alias_declaration": "value", "interface_declaration": "body"}.get(declared.type)
        name, value = declared.child_by_field_name("name"), declared.child_by_field_name(body or "body")
        if body and name is not None and value is not None:
            yield _text(name), value


def _imports(root: Node) -> Iterator[str]:
    for node in root.named_children:
        source = node.child_by_field_name("source")
        if source is not None and not _text(node).startswith("import type"):
            yield _text(source)[1:-1]
    yield from _calls(root)


def _calls(node: Node) -> Iterator[str]:
    """Of ``import("…")``, as far as it names a text."""
    todo = [node]
    while todo:
        at = todo.pop()
        if at.type == "call_expression" and _text(at.child_by_field_name("function")) == "import":
            given = at.child_by_field_name("arguments")
            first = given.named_children[0] if given is not None and given.named_children else None
            if first is not None and first.type == "string":
                yield _text(first)[1:-1]
        todo += at.named_children


def _parameter(node: Node, index: int, types: dict[str, Node]) -> tuple[str, dict[str, Json], bool]:
    """Name, schema, and whether it must be given."""
    pattern = node.child_by_field_name("pattern")
    name = _text(pattern) if pattern is not None and pattern.type == "identifier" else f"argument{index + 1}"
    if pattern is not None and pattern.type == "rest_pattern":
        raise TriggerError("main: arguments are given by name: take out the `...`", kind="arguments")
    annotation = node.child_by_field_name("type")
    kind = annotation.named_children[0] if annotation is not None else None
    shape = {} if kind is None else _shape(kind, types, 0)
    if kind is not None and kind.type == "type_identifier" and (resource := _resource(_text(kind), types)):
        shape = {**shape, "type": "object", "format": f"resource-{resource}"}
    value = node.child_by_field_name("value")
    if value is not None:
        default = _literal(value)
        shape = {**shape, **({} if default is ... else {"default": default})}
        if kind is None and default is not ... and default is not None:
            shape = {**_of_value(default), **shape}
    return name, shape, node.type == "required_parameter" and value is None


def _resource(name: str, types: dict[str, Node]) -> str:
    """Windmill's rule: a type with an upper-case name that is an object is the resource type in snake case."""
    body = types.get(name)
    if body is None or body.type not in ("object_type", "interface_body"):
        return ""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _shape(node: Node, types: dict[str, Node], depth: int) -> dict[str, Json]:
    """The JSON Schema of a type; ``{}``, anything, for those that JSON cannot tell apart."""
    if depth > _DEPTH:
        return {}
    text, parts = _text(node), node.named_children
    match node.type:
        case "predefined_type" | "literal_type" if text in _SIMPLE:
            return dict(_SIMPLE[text])
        case "literal_type":
            value = _literal(parts[0]) if parts else ...
            return {} if value is ... else {"enum": [value]}
        case "type_identifier":
            if text in types:
                return _shape(types[text], types, depth + 1)
            return dict(_SIMPLE.get(text, {}))
        case "nested_type_identifier":
            return dict(_SIMPLE.get(text.rpartition(".")[2], {}))
        case "array_type":
            return {"type": "array", "items": _shape(parts[0], types, depth + 1)}
        case "tuple_type":
            return {"type": "array"}
        case "parenthesized_type" | "readonly_type":
            return _shape(parts[0], types, depth + 1)
        case "generic_type":
            name = _text(node.child_by_field_name("name"))
            arguments = node.child_by_field_name("type_arguments")
            inner = arguments.named_children if arguments is not None else []
            if name in ("Array", "ReadonlyArray") and inner:
                return {"type": "array", "items": _shape(inner[0], types, depth + 1)}
            return {"type": "object"} if name in ("Record", "Partial", "Required", "Pick", "Omit") else {}
        case "union_type":
            return _union([_shape(part, types, depth + 1) for part in parts])
        case "object_type" | "interface_body":
            return _object(node, types, depth)
    return {}


def _union(shapes: list[dict[str, Json]]) -> dict[str, Json]:
    if any(not shape for shape in shapes):
        return {}
    if all(set(shape) == {"enum"} for shape in shapes):
        return {"enum": [value for shape in shapes for value in shape["enum"]]}
    return {"anyOf": [one for shape in shapes for one in shape.get("anyOf", [shape])]}


def _object(node: Node, types: dict[str, Node], depth: int) -> dict[str, Json]:
    fields: dict[str, Json] = {}
    required = []
    for member in node.named_children:
        if member.type != "property_signature":
            continue
        name = _text(member.child_by_field_name("name")).strip("\"'")
        annotation = member.child_by_field_name("type")
        fields[name] = _shape(annotation.named_children[0], types, depth + 1) if annotation is not None else {}
        if not any(child.type == "?" for child in member.children):
            required.append(name)
    found: dict[str, Json] = {"type": "object", "properties": fields}
    return found | ({"required": required} if required else {})


def _literal(node: Node) -> Any:
    """The value of a literal that JSON knows; ``...`` for any other expression."""
    text = _text(node)
    if node.type == "string":
        inner = text[1:-1]
        try:
            return json.loads(f'"{inner}"') if text[0] == '"' else json.loads(json.dumps(inner))
        except ValueError:
            return inner
    if text in ("undefined", "null"):
        return None
    if node.type in ("true", "false", "number", "array", "object", "unary_expression"):
        try:
            return json.loads(text)
        except ValueError:
            return ...
    return ...


def _of_value(value: Json) -> dict[str, Json]:
    kinds: tuple[tuple[type, str], ...] = (
        (bool, "boolean"), (int, "number"), (float, "number"), (str, "string"), (list, "array"), (dict, "object"),
    )  # fmt: skip
    return next(({"type": name} for kind, name in kinds if isinstance(value, kind)), {})


def _doc(root: Node, main: Node) -> str:
    """The comment that opens the file, or else that of main."""
    first = root.named_children[0]
    before = main.prev_named_sibling
    for node in (first, before):
        if node is not None and node.type == "comment":
            lines = (re.sub(r"^\s*(/\*+|\*+/|\*|//)\s?|\s*\*+/\s*$", "", line) for line in _text(node).splitlines())
            return "\n".join(line.rstrip() for line in lines if not line.lstrip().startswith("@trigger")).strip()
    return ""
