"""The label of a script in another language: ``@trigger(…)`` in one of its first comments."""

from __future__ import annotations

import ast
import re
from typing import Any

from watcher.errors import TriggerError
from watcher.trigger import Marked, marked, trigger

HEAD = 16 * 1024  # characters in which the label must stand

_MARK = re.compile(r"(?m)^[ \t]*(?:#|//|--|;|\*|/\*+)[ \t]*@(?P<call>trigger\(.*\))[ \t]*(?:\*/)?[ \t]*$")


def mark(text: str, name: str) -> Marked:
    """What a script was labelled with; without a label it says itself what is new. TriggerError for a bad one."""
    found = _MARK.search(text[:HEAD])
    if found is None:
        return marked(None)
    try:
        call = ast.parse(found["call"], mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args:
            raise ValueError("it takes named arguments only")
        given: dict[str, Any] = {word.arg or "**": ast.literal_eval(word.value) for word in call.keywords}
        return marked(trigger(**given)(_main()))
    except (SyntaxError, ValueError, TypeError, AssertionError) as error:
        raise TriggerError(f"{name}: the comment @{found['call']} cannot be read: {error}", kind="raised") from None


def _main() -> Any:
    def main() -> None:
        """A thing to put the label on."""

    return main
