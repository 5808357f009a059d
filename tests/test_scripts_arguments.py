"""Arguments from the signature: the schema that the configuration is checked against, and what main is given."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime
from typing import Annotated, Any, Literal, TypedDict

import pytest
from pydantic import Field

from watcher.errors import TriggerError
from watcher.scripts.arguments import Arguments
from watcher.scripts.loading import Code, load
from watcher.values import UNSET


def mains(text: str) -> Arguments:
    from pathlib import Path

    return load(
        Code(Path("script.py"), (0, 0, 0), text, compile(text, "script.py", "exec", dont_inherit=True))
    ).arguments


def refused(arguments: Arguments, given: dict[str, Any]) -> str:
    with pytest.raises(TriggerError) as caught:
        arguments.bind(given)
    assert caught.value.kind == "arguments"
    return str(caught.value)


def test_a_main_without_parameters_takes_nothing() -> None:
    def main() -> None: ...

    arguments = Arguments(main)
    assert arguments.schema() == {"type": "object", "properties": {}, "additionalProperties": False}
    assert arguments.bind({}) == {}
    assert refused(arguments, {"a": 1}) == "arguments: a: main takes no such argument (it takes none)"


def test_types_defaults_and_choices_are_in_the_schema() -> None:
    def main(
        name: str,
        kind: Literal["a", "b"] = "a",
        size: Annotated[int, Field(ge=1, description="How many.")] = 10,
        tags: list[str] | None = None,
        anything: object = None,
        since: str | None = None,
    ) -> None: ...

    schema = Arguments(main).schema()
    assert schema["required"] == ["name"]
    assert schema["additionalProperties"] is False
    properties = schema["properties"]
    assert list(properties) == ["name", "kind", "size", "tags", "anything"]
    assert properties["kind"]["enum"] == ["a", "b"]
    assert properties["size"] == {
        "default": 10,
        "description": "How many.",
        "minimum": 1,
        "title": "Size",
        "type": "integer",
    }


def test_values_are_coerced_and_what_is_not_given_is_left_to_main() -> None:
    def main(day: date, at: datetime, n: int, ratio: float = 0.5, flag: bool = False) -> None: ...

    bound = Arguments(main).bind({"day": "2026-01-02", "at": "2026-01-02T03:04:05Z", "n": "7", "flag": "true"})
    assert bound["day"] == date(2026, 1, 2)
    assert bound["at"].tzinfo is not None
    assert (bound["n"], bound["flag"], "ratio" in bound) == (7, True, False)


def test_every_mistake_is_named_at_once() -> None:
    def main(query: str, limit: int = 10, options: dict[str, int] | None = None) -> None: ...

    said = refused(Arguments(main), {"qery": "x", "limit": "many", "options": {"a": "b"}})
    assert "query is missing" in said
    assert "qery: main takes no such argument (did you mean query?)" in said
    assert "limit: input should be a valid integer" in said
    assert "options.a" in said


@pytest.mark.parametrize("name", ["json", "schema", "copy", "model_config", "_private", "class_", "self"])
def test_any_name_is_fine_for_a_parameter(name: str) -> None:
    arguments = mains(f"def main({name}: int): ...")
    assert arguments.bind({name: "3"}) == {name: 3}
    assert list(arguments.schema()["properties"]) == [name]


def test_further_keywords_are_taken_when_main_takes_them() -> None:
    def main(a: int, **rest: Any) -> None: ...

    arguments = Arguments(main)
    assert arguments.bind({"a": "1", "b": [2]}) == {"a": 1, "b": [2]}
    assert arguments.schema()["additionalProperties"] is True


def test_positional_only_parameters_cannot_be_given() -> None:
    def main(a: int, /) -> None: ...

    with pytest.raises(TriggerError, match="take out the `/`"):
        Arguments(main)


def test_annotations_as_text_are_read_in_the_script() -> None:
    arguments = mains("from __future__ import annotations\nfrom datetime import date\ndef main(day: date): ...")
    assert arguments.bind({"day": "2026-01-02"}) == {"day": date(2026, 1, 2)}


def test_an_annotation_of_nothing_is_an_error() -> None:
    arguments = mains("from __future__ import annotations\ndef main(day: nothing): ...")
    assert "an annotation cannot be read: name 'nothing' is not defined" in refused(arguments, {"day": 1})


def test_a_default_that_json_does_not_know_is_no_trouble() -> None:
    def main(a: Any = object()) -> None: ...  # noqa: B008

    assert Arguments(main).schema()["type"] == "object"
    assert Arguments(main).bind({}) == {}


# --- resources ---


@pytest.mark.parametrize("declared", ["class postgresql(TypedDict):\n    host: str", "postgresql = dict"])
def test_a_resource_type_is_a_format_as_in_windmill(declared: str) -> None:
    arguments = mains(f"from typing import TypedDict\n{declared}\ndef main(db: postgresql, other: dict): ...")
    properties = arguments.schema()["properties"]
    assert properties["db"]["format"] == "resource-postgresql"
    assert "format" not in properties["other"]
    assert arguments.bind({"db": {"host": "h"}, "other": {}}) == {"db": {"host": "h"}, "other": {}}


def test_a_resource_of_the_wrong_shape_is_told_by_its_field() -> None:
    arguments = mains("from typing import TypedDict\nclass smtp(TypedDict):\n    port: int\ndef main(mail: smtp): ...")
    assert "mail.port" in refused(arguments, {"mail": {"port": "x"}})
    assert arguments.bind({"mail": {"port": 25, "user": "u"}}) == {"mail": {"port": 25, "user": "u"}}


def test_resources_within_other_types() -> None:
    text = (
        "from typing import NotRequired, Optional, TypedDict\n"
        "class s3(TypedDict):\n    a: int\n    b: NotRequired[str]\n"
        "def main(x: Optional[s3] = None, y: list[s3] = [], z: 's3 | None' = None): ..."
    )
    given = {"x": {"a": 1}, "y": [{"a": 2, "b": "c"}], "z": None}
    assert mains(text).bind(given) == given
    assert "y.0.a is missing" in refused(mains(text), {"y": [{}]})


ODD = """
class Odd:
    @classmethod
    def __get_pydantic_core_schema__(cls, *_):
        raise ValueError("odd")

def main(a: Odd): ...
"""


def test_an_annotation_that_pydantic_cannot_use_is_an_error() -> None:
    assert "an annotation cannot be used: odd" in refused(mains(ODD), {"a": 1})


# --- since ---


@pytest.mark.parametrize(
    ("main", "since", "bound"),
    [
        (lambda since: since, None, {"since": None}),
        (lambda since: since, "x", {"since": "x"}),
        (lambda since="start": since, None, {}),
        (lambda since="start": since, 3, {"since": 3}),
        (lambda: None, "x", {}),
        (lambda since: since, UNSET, {}),
    ],
)
def test_since_is_the_engine_s_own(main: Callable[..., Any], since: object, bound: dict[str, Any]) -> None:
    assert Arguments(main).bind({}, since) == bound


def test_since_cannot_be_configured() -> None:
    def main(a: int, since: str | None = None) -> None: ...

    assert "since: main takes no such argument" in refused(Arguments(main), {"a": 1, "since": "x"})


# --- reuse between runs ---


def test_a_model_of_standard_types_is_made_once() -> None:
    text = "def main(reused: list[int] | None = None): ..."
    assert mains(text).model is mains(text).model


OWN = """
from pydantic import BaseModel

class Own(BaseModel):
    a: int

def main(x: list[Own]):
    return isinstance(x[0], Own)
"""


def test_a_model_with_a_script_s_own_class_is_made_anew() -> None:
    for _ in range(2):
        arguments = mains(OWN)
        assert arguments._main(**arguments.bind({"x": [{"a": 1}]}))


# --- steps ---


def test_a_step_takes_what_it_names() -> None:
    def main(a: int, b: int = 2) -> None: ...

    assert Arguments(main).bind_step({"a": 1, "c": 3}) == {"a": 1}


class Both(TypedDict):
    a: int


def test_a_step_with_one_argument_takes_the_whole() -> None:
    def main(result: Any) -> None: ...

    assert Arguments(main).bind_step({"a": 1}) == {"result": {"a": 1}}
    assert Arguments(main).bind_step({"result": 1, "a": 1}) == {"result": 1}
    assert Arguments(main).bind_step([1]) == {"result": [1]}
