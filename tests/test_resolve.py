"""References: Windmill's rules, and what Windmill lacks: circles, growth, and the line to the outside world."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from watcher import log
from watcher.errors import ResolveError
from watcher.resolve import Resolver
from watcher.secrets import Key, load_key, new_key
from watcher.store import resources, variables
from watcher.store.db import Database
from watcher.values import Config, FileResource, Json


class World:
    """A configuration and a database to refer to."""

    def __init__(self, db: Database, folder: Path, now: datetime) -> None:
        self.db, self.folder, self.now = db, folder, now
        self.environ: dict[str, str] = {}
        self.variables: dict[str, str] = {}
        self.resources: dict[str, FileResource] = {}
        self.key: Key | None = load_key({"WATCHER_SECRET_KEY": new_key()})

    @property
    def resolver(self) -> Resolver:
        return Resolver(self.config, self.db, self.key, environ=self.environ)

    def config(self) -> Config:
        return Config(
            self.folder / "watcher.toml", "sqlite:///x", self.folder, resources=self.resources, variables=self.variables
        )

    async def resource(self, path: str, value: Json, type: str = "any") -> None:
        await self.db.write(lambda tx: resources.put(tx, path, type, value, self.now))

    async def variable(self, path: str, value: str, secret: bool = False) -> None:
        stored = self.key.encrypt(path, value) if secret and self.key else value
        await self.db.write(lambda tx: variables.put(tx, path, stored, self.now, is_secret=secret))

    async def refused(self, value: Json, kind: str = "arguments") -> str:
        with pytest.raises(ResolveError) as caught:
            await self.resolver.value(value)
        assert caught.value.kind == kind
        return str(caught.value)


@pytest.fixture
def world(sqlite_db: Database, tmp_path: Path, now: datetime) -> World:
    return World(sqlite_db, tmp_path, now)


async def test_each_kind_of_reference(world: World) -> None:
    world.environ["TOKEN"] = "from the environment"
    (world.folder / "token.txt").write_text("from a file\n")
    await world.variable("u/me/v", "from a variable")
    await world.variable("u/me/s", "from a secret one", secret=True)
    await world.resource("u/me/r", {"host": "h"})
    given = {"e": "$env:TOKEN", "f": "$file:token.txt", "v": "$var:u/me/v", "s": "$var:u/me/s", "r": "$res:u/me/r"}
    assert await world.resolver.value(given) == {
        "e": "from the environment",
        "f": "from a file",
        "v": "from a variable",
        "s": "from a secret one",
        "r": {"host": "h"},
    }


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 1.5, "", "$", "$var", "$varu/a/b", "Bearer $var:u/me/v", " $var:u/me/v", "$WM_TOKEN", "var:u/me/v"],
)
async def test_all_else_stays_as_it_is(world: World, value: Json) -> None:
    assert await world.resolver.value({"x": [value]}) == {"x": [value]}


async def test_any_depth_of_objects_and_lists(world: World) -> None:
    await world.variable("u/me/v", "x")
    deep: Any = "$var:u/me/v"
    for _ in range(50):
        deep = {"a": [deep]}
    assert json.dumps(await world.resolver.value(deep)).count('"x"') == 1


async def test_a_long_list_is_data(world: World) -> None:
    await world.variable("u/me/v", "x")
    assert await world.resolver.value(["$var:u/me/v"] * 1000) == ["x"] * 1000
    assert await world.resolver.value(["$var:u/me/v"] * 1001) == ["$var:u/me/v"] * 1001


async def test_a_resource_is_followed_into_its_own_references(world: World) -> None:
    await world.variable("u/me/pw", "hunter2", secret=True)
    await world.resource("u/me/inner", {"password": "$var:u/me/pw"})
    await world.resource("u/me/outer", {"db": "$res:u/me/inner", "all": ["$var:u/me/pw"]})
    followed = {"db": {"password": "hunter2"}, "all": ["hunter2"]}
    assert await world.resolver.value("$res:u/me/outer") == followed
    assert await world.resolver.resource("u/me/outer") == followed


async def test_the_file_goes_before_the_database(world: World) -> None:
    await world.variable("u/me/v", "database")
    await world.resource("u/me/r", "database")
    world.variables["u/me/v"] = "file"
    world.resources["u/me/r"] = FileResource("any", "file")
    assert await world.resolver.value(["$var:u/me/v", "$res:u/me/r"]) == ["file", "file"]


async def test_a_rotated_token_is_used_at_the_next_use(world: World) -> None:
    await world.variable("u/me/v", "old", secret=True)
    assert await world.resolver.text("$var:u/me/v") == "old"
    await world.variable("u/me/v", "new", secret=True)
    assert await world.resolver.text("$var:u/me/v") == "new"
    (world.folder / "t").write_text("old")
    assert await world.resolver.text("$file:t") == "old"
    (world.folder / "t").write_text("new")
    assert await world.resolver.text("$file:t") == "new"


# --- what came from outside -------------------------------------------------------------------------------------------


async def test_a_state_is_never_followed(world: World) -> None:
    """An item titled "$var:u/admin/key", remembered in a state, would leak that secret into the next run."""
    await world.variable("u/admin/key", "hunter2", secret=True)
    state = {"last": "$var:u/admin/key", "seen": ["$res:u/admin/other"]}
    await world.resource("u/me/state", state, type="state")
    assert await world.resolver.resource("u/me/state") == state
    assert await world.resolver.value("$res:u/me/state") == state


async def test_what_was_stored_may_not_name_this_machine(world: World) -> None:
    """Scripts and API users store resources; the environment and the files are the administrator's."""
    world.environ["WATCHER_SECRET_KEY"] = "hunter2"
    (world.folder / "key").write_text("hunter2")
    theirs = {"a": "$env:WATCHER_SECRET_KEY", "b": "$file:key", "c": "$file:/etc/shadow"}
    await world.resource("u/me/theirs", theirs)
    await world.variable("u/me/v", "$env:WATCHER_SECRET_KEY")
    world.resources["u/me/ours"] = FileResource("any", {"theirs": "$res:u/me/theirs", "ours": "$file:key"})
    assert await world.resolver.resource("u/me/theirs") == theirs
    assert await world.resolver.value("$res:u/me/ours") == {"theirs": theirs, "ours": "hunter2"}
    assert await world.resolver.value("$var:u/me/v") == "$env:WATCHER_SECRET_KEY"


async def test_a_stored_variable_is_text_not_a_reference(world: World) -> None:
    await world.variable("u/me/a", "$var:u/me/b")
    await world.variable("u/me/b", "x")
    assert await world.resolver.value("$var:u/me/a") == "$var:u/me/b"


# --- what cannot be followed ------------------------------------------------------------------------------------------


async def test_nothing_at_the_path_is_missing(world: World) -> None:
    assert "watcher variable set u/me/v" in await world.refused("$var:u/me/v", "missing")
    assert "watcher resource set u/me/r" in await world.refused("$res:u/me/r", "missing")
    with pytest.raises(ResolveError) as caught:
        await world.resolver.variable("u/me/v")
    assert caught.value.kind == "missing"


async def test_a_value_that_refers_to_nothing_is_not_missing_itself(world: World) -> None:
    """Windmill answers 404 here, and both its clients take that for a first run."""
    await world.resource("u/me/r", {"a": "$var:u/me/nothing"})
    assert "$res:u/me/r" in await world.refused("$res:u/me/r")
    with pytest.raises(ResolveError) as caught:
        await world.resolver.resource("u/me/r")
    assert caught.value.kind == "arguments"


async def test_a_circle_is_told(world: World) -> None:
    await world.resource("u/me/a", {"x": "$res:u/me/b"})
    await world.resource("u/me/b", ["$res:u/me/a"])
    assert "$res:u/me/a → $res:u/me/b → $res:u/me/a" in await world.refused("$res:u/me/a")
    with pytest.raises(ResolveError, match="circle"):
        await world.resolver.resource("u/me/a")


async def test_a_variable_of_the_file_that_names_itself(world: World) -> None:
    world.variables["u/me/v"] = "$var:u/me/v"
    assert "circle" in await world.refused("$var:u/me/v")


async def test_the_same_resource_twice_is_no_circle(world: World) -> None:
    await world.resource("u/me/a", 1)
    assert await world.resolver.value(["$res:u/me/a", {"b": "$res:u/me/a"}]) == [1, {"b": 1}]


async def test_a_chain_without_end_is_cut(world: World) -> None:
    for number in range(40):
        world.resources[f"u/me/r{number}"] = FileResource("any", f"$res:u/me/r{number + 1}")
    assert "more than 32 references" in await world.refused("$res:u/me/r0")


async def test_growth_is_cut(world: World) -> None:
    """Twenty resources that each name the next one twice would be a million."""
    for number in range(20):
        world.resources[f"u/me/r{number}"] = FileResource("any", [f"$res:u/me/r{number + 1}"] * 2)
    world.resources["u/me/r20"] = FileResource("any", "x")
    assert "more than 1000 references" in await world.refused("$res:u/me/r0")


async def test_size_is_cut(world: World) -> None:
    world.resources["u/me/big"] = FileResource("any", "x" * 1_000_000)
    assert "larger than 16 MiB" in await world.refused(["$res:u/me/big"] * 20)


async def test_text_must_be_text(world: World) -> None:
    await world.resource("u/me/r", {"a": 1})
    with pytest.raises(ResolveError, match="is not text, but an object"):
        await world.resolver.text("$res:u/me/r")
    world.variables["u/me/v"] = "$res:u/me/r"
    with pytest.raises(ResolveError, match="is not text"):
        await world.resolver.text("$var:u/me/v")


async def test_an_unset_variable_and_a_file_that_is_not_there(world: World) -> None:
    assert "NOTHING is not set" in await world.refused("$env:NOTHING")
    assert "no such file" in await world.refused("$file:nothing")
    assert "not a regular file" in await world.refused("$file:.")
    (world.folder / "big").write_bytes(b"x" * (1024 * 1024 + 1))
    assert "larger than 1024 kB" in await world.refused("$file:big")


async def test_a_secret_without_its_key(world: World) -> None:
    await world.variable("u/me/s", "hunter2", secret=True)
    world.key = None
    assert "there is no key" in await world.refused("$var:u/me/s")
    world.key = load_key({"WATCHER_SECRET_KEY": new_key()})
    assert "another key" in await world.refused("$var:u/me/s")


async def test_every_secret_that_passes_is_masked(world: World) -> None:
    world.environ["A"] = "canary-environment"
    (world.folder / "b").write_text("canary-file\n")
    await world.variable("u/me/c", "canary-variable", secret=True)
    await world.resource("u/me/d", {"password": "canary-resource", "host": "not-a-canary"})
    await world.resolver.value({"a": "$env:A", "b": "$file:b", "c": "$var:u/me/c", "d": "$res:u/me/d"})
    world.variables["u/me/e"] = "canary-flow-token"
    await world.resolver.text("$var:u/me/e")
    said = log.mask("canary-environment canary-file canary-variable canary-resource canary-flow-token not-a-canary")
    assert said == "***** ***** ***** ***** ***** not-a-canary"


async def test_it_works_the_same_on_both_databases(db: Database, tmp_path: Path, now: datetime) -> None:
    world = World(db, tmp_path, now)
    await world.variable("u/me/s", "hunter2", secret=True)
    await world.resource("u/me/r", {"password": "$var:u/me/s"})
    assert await world.resolver.value("$res:u/me/r") == {"password": "hunter2"}
