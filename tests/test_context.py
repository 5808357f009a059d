"""What a script may reach, and the label that it wears."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest

import watcher
from tests.support.scripts import FakeHost
from watcher import context, get_state, set_state, trigger
from watcher.context import LoopContext
from watcher.errors import TriggerError
from watcher.trigger import marked
from watcher.values import UNSET


def loop_context(**rest: Any) -> LoopContext:
    return LoopContext(FakeHost(), **rest)


def test_outside_a_run_there_is_nothing_to_reach() -> None:
    with pytest.raises(RuntimeError, match=r"watcher\.testing\.run"):
        get_state()


def test_state_is_staged_and_read_back() -> None:
    with context.use(loop_context(state={"n": 1})) as reach:
        assert get_state() == {"n": 1}
        set_state({"n": 2})
        assert get_state() == {"n": 2}
        assert reach.staged == {"n": 2}
    with pytest.raises(RuntimeError):
        get_state()


def test_no_state_is_none_and_nothing_is_staged() -> None:
    with context.use(loop_context()) as reach:
        assert get_state() is None
        assert reach.staged is UNSET
        set_state(None)
        assert reach.staged is None


def test_what_is_staged_does_not_change_with_the_script_s_own_value() -> None:
    kept: dict[str, Any] = {"n": [1]}
    with context.use(loop_context(state=kept)) as reach:
        get_state()["n"].append(2)
        assert get_state() == {"n": [1]}
        set_state(kept)
        kept["n"].append(3)
        assert reach.staged == {"n": [1]}


@pytest.mark.parametrize("value", [float("nan"), {1}, b"x", object()])
def test_a_state_that_is_not_json_is_refused_where_it_is_set(value: Any) -> None:
    with context.use(loop_context()), pytest.raises(TriggerError, match="the state is not JSON") as caught:
        set_state(value)
    assert caught.value.kind == "junk"


def test_only_the_own_state_is_written() -> None:
    with context.use(loop_context(state_path="f/mine")) as reach:
        set_state(1, path="f/mine")
        assert reach.staged == 1
        with pytest.raises(TriggerError, match="its own state only"):
            set_state(2, path="f/theirs")


def test_threads_of_a_worker_reach_the_same_context() -> None:
    seen: list[Any] = []
    with context.use(loop_context(state=5), everywhere=True):
        thread = threading.Thread(target=lambda: seen.append(get_state()))
        thread.start()
        thread.join()
    assert seen == [5]


# --- the label ---


def test_a_labelled_main_is_the_same_function() -> None:
    def main(n: int) -> list[int]:
        return [n]

    assert trigger(main) is main
    assert trigger(key="id")(main) is main
    assert main(3) == [3]
    assert marked(main).label.key == "id"


def test_the_label_says_how_a_script_works() -> None:
    @trigger(key="id", cursor=len, lookback=5, on=("removed", "new"))
    def main() -> None: ...

    label = marked(main).label
    assert (label.style, label.key, label.cursor, label.lookback) == ("cursor", "id", None, "5")
    assert label.on == ("new", "removed")
    assert marked(main).cursor is len


def test_a_main_without_a_label_is_windmill_s() -> None:
    def main() -> None: ...

    assert marked(main).label.style == "windmill"
    assert marked(trigger(main)).label.style == "listing"


@pytest.mark.parametrize("on", ["newer", ("new", "gone"), ()])
def test_a_change_that_does_not_exist_is_refused(on: Any) -> None:
    with pytest.raises(ValueError, match='"new", "changed", "removed"'):
        trigger(on=on)


def test_what_a_script_imports_is_all_there_and_light() -> None:
    for name in watcher.__all__:
        code = f"from watcher import {name}"
        subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, watcher; print(len([m for m in sys.modules if m.startswith(('asyncio', 'pydantic', 'sql'))]))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "0\n"


def test_a_built_in_in_the_loop_has_no_shared_directory() -> None:
    with context.use(loop_context()), pytest.raises(TriggerError, match="in the loop nothing is written to a disk"):
        watcher.shared()
