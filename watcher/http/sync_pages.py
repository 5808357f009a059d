"""`watcher.http.pages` for scripts whose ``main`` is a plain function: ``http.sync.pages``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec

from watcher.context import current
from watcher.http import paging
from watcher.http.reach import ask_sync

__all__ = ["cursor", "link", "listed", "numbered", "offset"]

P = ParamSpec("P")
listed = paging.listed


def _asking(steps: Callable[P, paging.Steps]) -> Callable[P, Iterator[paging.Page]]:
    @functools.wraps(steps)
    def pages(*args: P.args, **kwargs: P.kwargs) -> Iterator[paging.Page]:
        walk = steps(*args, **kwargs)
        try:
            step = next(walk)
            while True:
                if isinstance(step, list):
                    yield step
                    step = next(walk)
                else:
                    step = walk.send(ask_sync(*step, True))
        except StopIteration:
            return
        except paging.TooMany:
            current().capped = True

    return pages


link = _asking(paging.link)
numbered = _asking(paging.numbered)
offset = _asking(paging.offset)
cursor = _asking(paging.cursor)
