"""Page by page through a listing, safe against a listing that moves meanwhile.

Each function is an async generator of pages (lists of items) for an ``async def main``; `watcher.http.sync.pages` has
the same for a plain ``def main``. A page is asked for when the one before has been taken, so a script that yields
each page to the service stops where everything is known:

    @trigger(key="id")
    async def main(repo: str):
        async for page in http.pages.link(f"https://api.github.com/repos/{repo}/issues"):
            yield page
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from typing import ParamSpec

from watcher.context import current
from watcher.http import paging
from watcher.http.reach import ask

__all__ = ["cursor", "link", "listed", "numbered", "offset"]

P = ParamSpec("P")
listed = paging.listed


def _asking(steps: Callable[P, paging.Steps]) -> Callable[P, AsyncIterator[paging.Page]]:
    @functools.wraps(steps)
    async def pages(*args: P.args, **kwargs: P.kwargs) -> AsyncIterator[paging.Page]:
        walk = steps(*args, **kwargs)
        try:
            step = next(walk)
            while True:
                if isinstance(step, list):
                    yield step
                    step = next(walk)
                else:
                    step = walk.send(await ask(*step, True))
        except StopIteration:
            return
        except paging.TooMany:
            current().capped = True

    return pages


link = _asking(paging.link)
numbered = _asking(paging.numbered)
offset = _asking(paging.offset)
cursor = _asking(paging.cursor)
