"""The label that ``@trigger`` puts on a script's main."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from watcher.values import Change, Label, Style

Main = TypeVar("Main", bound=Callable[..., Any])
Picker = str | Callable[[Any], Any] | None
"""How to find a key or a cursor in an item: JMESPath, or a callable that takes the item."""

CHANGES: tuple[Change, ...] = ("new", "changed", "removed")
_ATTRIBUTE = "__watcher_trigger__"


@dataclass(frozen=True, slots=True)
class Marked:
    """What ``@trigger`` was given: the label, and the pickers in their own form."""

    label: Label
    key: Picker = None
    cursor: Picker = None


@overload
def trigger(main: Main, /) -> Main: ...


@overload
def trigger(
    *,
    key: Picker = None,
    cursor: Picker = None,
    lookback: str | float | None = None,
    on: str | tuple[str, ...] = ("new",),
    loop: bool = False,
) -> Callable[[Main], Main]: ...


def trigger(
    main: Any = None,
    /,
    *,
    key: Picker = None,
    cursor: Picker = None,
    lookback: str | float | None = None,
    on: str | tuple[str, ...] = ("new",),
    loop: bool = False,
) -> Any:
    """Label a main that describes the world: what it lists, not what is new. Returns the function unchanged.

    Args:
        key: what identifies an item, as JMESPath or a callable; without one an item's whole content does.
        cursor: what orders items, as JMESPath or a callable. ``main`` may then take ``since``, the furthest point
            reached so far or None, and list only from there on, inclusively.
        lookback: how far behind the furthest point late records may appear: "15m", or a number for numeric cursors.
        on: which of "new", "changed", "removed" become items.
        loop: the script only awaits `http`. Built-ins only; everything else runs in a worker process.

    Raises:
        ValueError: ``on`` names something else.
    """
    changes = (on,) if isinstance(on, str) else tuple(on)
    if not changes or not set(changes) <= set(CHANGES):
        raise ValueError(f'@trigger(on={on!r}): it is one or more of "new", "changed", "removed"')
    style: Style = "listing" if cursor is None else "cursor"
    label = Label(
        style=style,
        key=key if isinstance(key, str) else None,
        cursor=cursor if isinstance(cursor, str) else None,
        lookback=None if lookback is None else str(lookback),
        on=tuple(change for change in CHANGES if change in changes),
        loop=loop,
    )

    def mark(function: Main) -> Main:
        setattr(function, _ATTRIBUTE, Marked(label, key, cursor))
        return function

    return mark if main is None else mark(main)


def marked(main: Any) -> Marked:
    """What a main was labelled with. An unlabelled one is a Windmill script: what it returns is what is new."""
    found = getattr(main, _ATTRIBUTE, None)
    return found if isinstance(found, Marked) else Marked(Label(style="windmill"))
