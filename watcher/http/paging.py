"""How listings are read page by page although they move meanwhile: pure steps that ask, look and go on.

Two things happen between two pages of a listing that is newest first. Something is added: what was on this page slides
to the next one and is met twice, which harms nobody. Something is removed: what would have been next slides to a page
that was read already, and whoever only goes forward never sees it. So positions are checked against their neighbours.
(What slides back and forth again between two requests can still dodge; it is where it was, and the next run finds it.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urljoin, urlsplit

from watcher.errors import TriggerError
from watcher.http.message import Auth, FetchOptions, Params, Response, build, redacted
from watcher.values import Json, Request

Page = list[Json]
Pick = str | Callable[[Any], Any] | None
"""Where the items are in an answer's JSON: JMESPath or a callable; None: it is the list itself."""

Steps = Generator["tuple[Request, FetchOptions] | Page", Response, None]
"""Asks by yielding a request, which is answered by `send`; gives by yielding a page, which is answered by nothing."""

_POSITIONS = {"page", "p", "page_number", "pagenumber", "offset", "start", "startindex", "start_index", "skip"}
_FURTHEST_BACK = 10  # pages


@dataclass
class _Walk:
    """One reading of one listing."""

    headers: Mapping[str, str] | None
    auth: Auth | None
    items: Pick
    key: str
    max_pages: int
    stop_if_unchanged: bool
    asked: int = 0
    met: set[str] = field(default_factory=set)

    def ask(self, url: str, params: Params | None) -> Generator[Any, Response, Response]:
        """One page. Only the first may come from memory: pages of different age do not fit together."""
        first = self.asked == 0
        self.asked += 1
        options = FetchOptions(stop_if_unchanged=first and self.stop_if_unchanged, fresh=not first)
        answer = yield build("GET", url, params=params, headers=self.headers, auth=self.auth), options
        return answer

    def page(self, answer: Response) -> Page:
        return listed(answer, self.items)

    def name(self, item: Json) -> str:
        """What tells an item from another while pages are compared."""
        name = item.get(self.key) if isinstance(item, dict) else None
        return json.dumps(item if name is None else name, sort_keys=True)

    def names(self, page: Page) -> list[str]:
        return [self.name(item) for item in page]

    def unmet(self, page: Page) -> Page:
        """Those that no page has brought before."""
        fresh = {self.name(item): item for item in page}
        found = [item for name, item in fresh.items() if name not in self.met]
        self.met.update(fresh)
        return found

    def meets(self, page: Page) -> bool:
        return any(self.name(item) in self.met for item in page)

    def restless(self, url: str) -> TriggerError:
        return TriggerError(
            f"{redacted(url)}: the listing moved faster than it could be read; nothing was taken, the next run tries"
            " again",
            kind="http",
        )


class TooMany(Exception):
    """There are more pages than may be read. What was read counts, what is absent proves nothing."""


def link(
    url: str,
    *,
    params: Params | None = None,
    headers: Mapping[str, str] | None = None,
    auth: Auth | None = None,
    items: Pick = None,
    key: str = "id",
    next: str | None = None,
    max_pages: int = 100,
    stop_if_unchanged: bool = False,
) -> Steps:
    """Follow each page's link to the next one: the Link header (GitHub, GitLab), or a URL in the body.

    Args:
        items: where the list of items is in an answer.
        key: the field that tells items apart while pages are compared.
        next: JMESPath to the next page's URL in the body, where there is no Link header.
        max_pages: read no further.
        stop_if_unchanged: the run ends when the first page is as it was; for listings that are newest first.
    """
    walk = _Walk(headers, auth, items, key, max_pages, stop_if_unchanged)
    answer = yield from walk.ask(url, params)
    trail = [answer.url or url]
    while True:
        found = walk.page(answer)
        slid: Page = []
        if len(trail) > 1 and _positional(trail[-1]):
            slid, _ = yield from _slid(walk, [(one, None) for one in trail[-2::-1]])
        yield slid + walk.unmet(found)
        target = search(next, answer.json()) if next else answer.links.get("next")
        if not target:
            return
        target = urljoin(answer.url, str(target))
        if target in trail:
            raise TriggerError(f"{redacted(target)}: the pages link in a circle", kind="junk")
        if len(trail) >= max_pages:
            raise TooMany
        if _host(target) != _host(url):
            raise TriggerError(
                f"the next page is on another host, {_host(target)}: the credentials do not go there", kind="junk"
            )
        trail.append(target)
        answer = yield from walk.ask(target, None)


def numbered(
    url: str,
    *,
    page: str = "page",
    first: int = 1,
    last: str | None = None,
    params: Params | None = None,
    headers: Mapping[str, str] | None = None,
    auth: Auth | None = None,
    items: Pick = None,
    key: str = "id",
    max_pages: int = 100,
    stop_if_unchanged: bool = False,
) -> Steps:
    """Read ``?page=1``, ``?page=2`` and so on, until a page is empty or the last one comes again.

    Args:
        page: the name of the parameter.
        first: the number of the first page.
        last: JMESPath to the number of pages, where the answer tells.
        items, key, max_pages, stop_if_unchanged: as in `link`.
    """
    walk = _Walk(headers, auth, items, key, max_pages, stop_if_unchanged)
    for number in range(max_pages):
        answer = yield from walk.ask(url, _with(params, page, first + number))
        found = walk.page(answer)
        slid: Page = []
        over = not found
        if number:
            before = range(first + number - 1, first - 1, -1)
            slid, neighbour = yield from _slid(walk, [(url, _with(params, page, one)) for one in before])
            over = over or walk.names(neighbour) == walk.names(found)  # beyond the end it gives the last page again
        yield slid + walk.unmet(found)
        pages = search(last, answer.json()) if last else None
        if over or (isinstance(pages, int) and number + 1 >= pages):
            return
    raise TooMany


def offset(
    url: str,
    *,
    offset: str = "offset",
    limit: str = "limit",
    size: int = 100,
    start: int = 0,
    overlap: int = 1,
    params: Params | None = None,
    headers: Mapping[str, str] | None = None,
    auth: Auth | None = None,
    items: Pick = None,
    key: str = "id",
    max_pages: int = 100,
    stop_if_unchanged: bool = False,
) -> Steps:
    """Read by ``?offset=0&limit=100``: each page begins with the end of the one before, which proves that none slid by.

    Args:
        offset, limit: the names of the parameters.
        size: how many to ask for.
        start: the first offset.
        overlap: how many items of the page before to ask for again.
        items, key, max_pages, stop_if_unchanged: as in `link`.
    """
    walk = _Walk(headers, auth, items, key, max_pages, stop_if_unchanged)
    at, back = start, 0
    for number in range(max_pages):
        answer = yield from walk.ask(url, _with(_with(params, limit, size), offset, at))
        found = walk.page(answer)
        if number and not walk.meets(found) and at > start:  # something before was removed: look where it slid to
            back += 1
            if back > _FURTHEST_BACK:
                raise walk.restless(url)
            at = max(start, at - size)
            continue
        yield walk.unmet(found)
        if len(found) <= overlap and (number or not found):
            return
        at += max(len(found) - overlap, 0)
    raise TooMany


def cursor(
    url: str,
    *,
    param: str,
    next: str,
    params: Params | None = None,
    headers: Mapping[str, str] | None = None,
    auth: Auth | None = None,
    items: Pick = None,
    max_pages: int = 100,
    stop_if_unchanged: bool = False,
) -> Steps:
    """Hand each answer's cursor back until there is none: a place in the listing, which moves with it.

    Args:
        param: the parameter that takes the cursor.
        next: JMESPath to the next cursor in the answer.
        items, max_pages, stop_if_unchanged: as in `link`.
    """
    walk = _Walk(headers, auth, items, "", max_pages, stop_if_unchanged)
    asked: set[str] = set()
    answer = yield from walk.ask(url, params)
    while True:
        yield walk.page(answer)
        at = search(next, answer.json())
        if at in (None, "", False):
            return
        if str(at) in asked:
            raise TriggerError(f"{redacted(url)}: the same cursor came twice, paging would never end", kind="junk")
        asked.add(str(at))
        if len(asked) >= max_pages:
            raise TooMany
        answer = yield from walk.ask(url, _with(params, param, at))


def _slid(walk: _Walk, before: Sequence[tuple[str, Params | None]]) -> Generator[Any, Response, tuple[Page, Page]]:
    """What slid back to pages that were read already, the last of them first: on until one holds something known.

    Returns that, and the page just before as it is now.
    """
    slid: Page = []
    neighbour: Page | None = None
    for url, params in before[:_FURTHEST_BACK]:
        found = walk.page((yield from walk.ask(url, params)))
        neighbour = found if neighbour is None else neighbour
        known = walk.meets(found)
        slid = walk.unmet(found) + slid
        if known:
            break
    return slid, neighbour or []


def listed(answer: Response, items: Pick = None) -> Page:
    """The list of items in an answer. TriggerError (kind ``junk``) for anything else: it is no empty list."""
    value = answer.json()
    found = search(items, value)
    if isinstance(found, list):
        return found
    where = f"at {items!r}" if isinstance(items, str) else "where they should be"
    raise TriggerError(
        f"{redacted(answer.url)}: there is no list of items {where}, but {_kind(found)}: check `items`",
        kind="junk",
        detail=answer.text[:2000],
    )


def search(pick: Pick, value: Json) -> Any:
    """What a JMESPath or a callable finds. TriggerError (kind ``arguments``) for an expression that is none."""
    if not isinstance(pick, str):
        return pick(value) if pick else value
    import jmespath
    from jmespath.exceptions import JMESPathError

    try:
        return jmespath.search(pick, value)
    except JMESPathError as error:
        raise TriggerError(f"{pick!r} is not JMESPath, or does not fit: {error}", kind="arguments") from error


def _with(params: Params | None, name: str, value: Any) -> list[tuple[str, Any]]:
    pairs = list(params.items() if isinstance(params, Mapping) else params or ())
    return [*(pair for pair in pairs if pair[0] != name), (name, value)]


def _positional(url: str) -> bool:
    """Whether a link counts items or pages, so that it means something else when the listing has moved."""
    return any(name.lower() in _POSITIONS and value.isdigit() for name, value in parse_qsl(urlsplit(url).query))


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2].lower()


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
