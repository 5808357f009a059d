"""What is said of the options: in the schema, in docs/config.md, in the example, each one, and truly."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.support.config import load, write
from watcher import config, flows
from watcher.config import model, units
from watcher.config.schema import default_of

ROOT = Path(__file__).parent.parent
TABLES: dict[str, type[BaseModel]] = {
    "## The top of the file": model.Settings,
    "## [server]": model.Server,
    "## [http]": model.Http,
    "## [scripts]": model.Scripts,
    "## [delivery]": model.Delivery,
    "## [logging]": model.Logging,
    '## [resources."PATH"]': model.Resource,
    "## [storage]": model.Storage,
    "## [flows.NAME]": model.Flow,
    "## [watchers.NAME]": model.Watcher,
    **{f'### preset = "{name}"': preset.settings for name, preset in flows.presets.items()},
}


def options() -> Iterator[tuple[str, type[BaseModel], str]]:
    for heading, table in TABLES.items():
        for name, info in table.model_fields.items():
            if table is not model.Settings or name in ("database", "data", "secret_key_file"):
                yield heading, table, info.alias or name


def section(heading: str) -> str:
    text = (ROOT / "docs/config.md").read_text()
    assert f"\n{heading}\n" in text, f"docs/config.md has no section {heading}"
    return re.split(r"\n###? ", text.partition(f"\n{heading}\n")[2])[0]


@pytest.mark.parametrize(("heading", "table", "option"), [*options()], ids=lambda x: x if isinstance(x, str) else "")
def test_every_option_is_in_the_docs_with_its_default(heading: str, table: type[BaseModel], option: str) -> None:
    row = next((line for line in section(heading).splitlines() if line.startswith(f"| `{option}` |")), None)
    assert row is not None, f"docs/config.md, {heading}: {option} is missing"
    field = {info.alias or name: name for name, info in table.model_fields.items()}[option]
    told = row.split(" | ")[2]
    if table.model_fields[field].is_required():
        assert told == "required"
    else:
        default = default_of(table, field)
        assert told == ("" if default is None else f"`{json.dumps(default)}`"), f"{option} is {default!r}"


def test_the_docs_name_no_option_that_is_gone() -> None:
    for heading, table in TABLES.items():
        known = {info.alias or name for name, info in table.model_fields.items()}
        assert set(re.findall(r"^\| `(\w+)` \|", section(heading), re.M)) <= known, heading


@pytest.mark.parametrize("table", [*TABLES.values()], ids=lambda table: f"{table.__module__}.{table.__name__}")
def test_every_option_is_described(table: type[BaseModel]) -> None:
    for name, info in table.model_fields.items():
        assert info.description, name
        assert info.description.rstrip().endswith((".", "`.")), name


# --- the example ------------------------------------------------------------------------------------------------------


def test_the_example_is_good_and_needs_nothing() -> None:
    loaded = config.read(ROOT / "config.example.toml", environ={})
    assert loaded.warnings == ()
    on = {name for name, watcher in loaded.config.watchers.items() if watcher.enabled}
    assert on == {"commits", "files"}
    assert all(loaded.config.watchers[name].first_run.newest == 3 for name in on)


def test_the_example_shows_every_option_in_place() -> None:
    """Commented out or not: what is uncommented must be a good configuration too."""
    text = (ROOT / "config.example.toml").read_text()
    parts = re.split(r"^\[(\w+)", text, flags=re.M)
    shown: dict[str, set[str]] = {"": set(re.findall(r"^(?:# )?(\w+) = ", parts[0], re.M))}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        shown.setdefault(name, set()).update(re.findall(r"^(?:# )?(\w+) = ", body, re.M))
    names = {"resources": "resources", "flows": "flows", "watchers": "watchers"}
    for heading, table, option in options():
        of = "flows" if heading.startswith("###") else next(iter(re.findall(r"\[(\w+)", heading)), "")
        assert option in shown[names.get(of, of)], f"config.example.toml does not show {of}.{option} ({table.__name__})"


@pytest.mark.parametrize("table", ["logging", "http", "scripts", "delivery"])
def test_the_defaults_that_the_example_tells_are_the_defaults(table: str) -> None:
    body = (ROOT / "config.example.toml").read_text().partition(f"\n[{table}]")[2].partition("\n\n\n")[0]
    told = tomli.loads("\n".join(re.findall(r"^# (\w+ = .*)$", body, re.M)))
    noun: Any = {"logging": model.Logging, "http": model.Http, "scripts": model.Scripts, "delivery": model.Delivery}
    assert noun[table](**told) == noun[table]()


def test_the_comments_of_the_example_say_what_a_watcher_does_by_default(tmp_path: Path) -> None:
    text = (ROOT / "config.example.toml").read_text()
    body = text.partition("[watchers.commits]")[2].partition("\n\n")[0]
    told = tomli.loads("\n".join(re.findall(r"^# (\w+ = .*)$", body, re.M)))
    for option in ("cursor", "lookback", "forget_after", "was", "key", "on"):
        told.pop(option)  # these have no default, or the trigger's
    plain = {"trigger": "git", "every": "3s", "flow": "announce"}
    assert model.Watcher(**plain, **told) == model.Watcher(**plain)  # type: ignore[arg-type]


# --- the schema -------------------------------------------------------------------------------------------------------


def test_the_schema_is_one_and_takes_the_example() -> None:
    schema = config.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(tomli.loads((ROOT / "config.example.toml").read_text()), schema)


@pytest.mark.parametrize(
    "text",
    [
        "databse = 'x'",
        "[server]\nbind = 3",
        "[flows.x]\nat_onec = 3",
        "[flows.x]\npreset = 'webhok'",
        "[watchers.x]\nevery = '5m'",
        "[watchers.x]\ntrigger = 'git'\nflow = 'x'\nevery = '5 minutes'",
        "[watchers.'a b']\ntrigger = 'git'\nflow = 'x'",
    ],
)
def test_an_editor_sees_the_mistake_by_the_schema_alone(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tomli.loads(text), config.json_schema())


def test_the_schema_describes_every_option() -> None:
    schema = config.json_schema()
    for name, table in schema["$defs"].items():
        for option, says in table.get("properties", {}).items():
            assert says.get("description"), f"{name}.{option}"
    assert schema["$defs"]["Watcher"]["properties"]["timeout"]["default"] == "1m"
    assert schema["$defs"]["Flow"]["properties"]["workspace"]["description"] == "The Windmill workspace. (windmill)"
    assert "null" not in json.dumps(schema)


def test_the_schema_of_the_repository_is_fresh() -> None:
    assert json.loads((ROOT / "watcher.schema.json").read_text()) == config.json_schema(), (
        "run `watcher schema > watcher.schema.json`"
    )


# --- how values are written -------------------------------------------------------------------------------------------


@given(st.timedeltas(min_value=timedelta(), max_value=timedelta(days=3650)))
def test_a_duration_is_read_back_as_it_was_written(value: timedelta) -> None:
    whole = value - timedelta(microseconds=value.microseconds % 1000)
    assert units.duration(units.show_duration(whole)) == whole


@given(st.integers(0, 10**15))
def test_a_size_is_read_back_as_it_was_written(value: int) -> None:
    assert units.size(units.show_size(value)) == value


@given(st.integers(1, 10**6 - 1), st.integers(1, 9999), st.sampled_from("smhd"))
def test_a_rate_is_read_back_as_it_was_written(count: int, spans: int, unit: str) -> None:
    if unit == "d" and spans > 3650:
        return
    rate = units.rate(f"{count}/{spans}{unit}")
    assert units.rate(units.show_rate(rate)) == rate


@given(st.text(max_size=30))
def test_no_text_surprises_the_readers(text: str) -> None:
    for read in (units.duration, units.size, units.rate):
        with suppress(ValueError):
            read(text)


@given(st.recursive(st.none() | st.text(max_size=5) | st.integers() | st.booleans(), lambda x: st.lists(x, max_size=3)))
def test_no_value_surprises_a_table(value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        model.Watcher(trigger=value, every=value, flow=value, cron=3)  # type: ignore[arg-type]


def test_a_configuration_of_many_watchers_is_read_in_seconds(tmp_path: Path) -> None:
    text = '[flows.n]\nurl = "https://a.example/"\n' + "".join(
        f'[watchers.w{number}]\ntrigger = "git"\nevery = "5m"\nflow = "n"\nwith = {{ repo = "." }}\n'
        for number in range(1000)
    )
    assert len(load(tmp_path, text).config.watchers) == 1000
    assert write(tmp_path, text).stat().st_size < 100_000
