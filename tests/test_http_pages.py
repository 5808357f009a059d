"""Paging through a listing that moves while it is read: nothing is missed, and it always ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import site as s
from tests.support.site import Listing, Site
from tests.support.watching import Web, fetcher
from watcher import context, http
from watcher.errors import TriggerError


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site() as site:
        yield site


@pytest.fixture
async def reach() -> AsyncIterator[context.Context]:
    """The context of a run, with a real fetcher behind it."""
    web = Web(fetcher(at_once_per_host=100))
    with context.use(context.LoopContext(web), everywhere=True) as reach:
        yield reach
    await web.fetcher.close()


def numbers(*values: int) -> list[dict[str, int]]:
    return [{"id": value} for value in values]


async def flat(pages: AsyncIterator[list[Any]]) -> list[int]:
    return [item["id"] async for page in pages for item in page]


def remove(*values: int) -> Callable[[Listing], None]:
    def change(listing: Listing) -> None:
        listing.items = [item for item in listing.items if item["id"] not in values]

    return change


def add(*values: int) -> Callable[[Listing], None]:
    def change(listing: Listing) -> None:
        listing.items = numbers(*values) + listing.items

    return change


WAYS: dict[str, Callable[[str], AsyncIterator[list[Any]]]] = {
    "link": lambda url: http.pages.link(url),
    "numbered": lambda url: http.pages.numbered(url),
    "offset": lambda url: http.pages.offset(url, size=3, items="items"),
}


def way(name: str, listing: Listing) -> Any:
    return listing.link if name == "link" else listing.numbered if name == "numbered" else listing.offset


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 6, 7, 10])
async def test_every_item_once_whatever_the_number(site: Site, reach: Any, name: str, count: int) -> None:
    listing = Listing(numbers(*range(count)), 3)
    assert await flat(WAYS[name](site.on("/a", way(name, listing)))) == list(range(count))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("at", range(1, 6))
async def test_items_removed_while_paging_make_no_other_slip_by(site: Site, reach: Any, name: str, at: int) -> None:
    listing = Listing(numbers(*range(12)), 3)
    listing.after = {at: remove(0, 1)}
    found = await flat(WAYS[name](site.on("/a", way(name, listing))))
    assert sorted(set(found) | {0, 1}) == list(range(12))
    assert len(found) == len(set(found))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("at", range(1, 6))
async def test_items_added_while_paging_shift_the_others_and_none_is_lost(
    site: Site, reach: Any, name: str, at: int
) -> None:
    listing = Listing(numbers(*range(12)), 3)
    listing.after = {at: add(100, 101)}
    found = await flat(WAYS[name](site.on("/a", way(name, listing))))
    assert set(range(12)) <= set(found)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("name", WAYS)
async def test_more_removed_than_a_page_holds(site: Site, reach: Any, name: str) -> None:
    listing = Listing(numbers(*range(20)), 3)
    listing.after = {3: remove(*range(7))}
    found = await flat(WAYS[name](site.on("/a", way(name, listing))))
    assert set(range(7, 20)) <= set(found)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(WAYS)),
    count=st.integers(0, 20),
    adds=st.booleans(),
    changes=st.dictionaries(st.integers(1, 12), st.integers(0, 19), max_size=4),
)
def test_whatever_moves_what_stays_is_found_once(name: str, count: int, adds: bool, changes: dict[int, int]) -> None:
    listing = Listing(numbers(*range(count)), 3)
    stays = set(range(count))
    for at, what in changes.items():
        if adds:
            listing.after[at] = add(1000 + what)
        else:
            listing.after[at] = remove(what)
            stays.discard(what)

    async def read() -> list[int]:
        web = Web(fetcher())
        async with Site() as site:
            with context.use(context.LoopContext(web)):
                found = await flat(WAYS[name](site.on("/a", way(name, listing))))
        await web.fetcher.close()
        return found

    found = asyncio.run(read())
    assert stays <= set(found)
    assert len(found) == len(set(found))


async def test_a_cursor_moves_with_the_listing(site: Site, reach: Any) -> None:
    listing = Listing([{"id": str(n)} for n in range(10)], 3)
    listing.after = {2: remove("0", "1")}  # type: ignore[arg-type]
    url = site.on("/a", listing.cursor)
    pages = [page async for page in http.pages.cursor(url, param="after", next="next", items="items")]
    assert [item["id"] for page in pages for item in page] == [str(n) for n in range(10)]


async def test_a_cursor_that_comes_twice(site: Site, reach: Any) -> None:
    url = site.on("/a", s.json({"items": [1], "next": "x"}))
    with pytest.raises(TriggerError, match="the same cursor came twice"):
        [_ async for _ in http.pages.cursor(url, param="after", next="next", items="items")]


async def test_links_in_a_circle(site: Site, reach: Any) -> None:
    url = site.on("/a", s.json([], link='</b>; rel="next"'))
    site.on("/b", s.json([], link='</a>; rel="next"'))
    with pytest.raises(TriggerError, match="circle"):
        [_ async for _ in http.pages.link(url)]


async def test_a_link_to_another_host_gets_no_token(site: Site, reach: Any) -> None:
    async with Site() as other:
        url = site.on("/a", s.json([], link=f'<{other.url}/b>; rel="next"'))
        with pytest.raises(TriggerError, match="on another host"):
            [_ async for _ in http.pages.link(url, auth="secret")]
        assert other.asked == []


async def test_the_next_page_may_stand_in_the_body(site: Site, reach: Any) -> None:
    url = site.on("/a", s.json({"data": numbers(1), "paging": {"next": "/b?x=1"}}))
    site.on("/b", s.json({"data": numbers(2), "paging": {}}))
    assert await flat(http.pages.link(url, items="data", next="paging.next")) == [1, 2]


@pytest.mark.parametrize("name", WAYS)
async def test_a_listing_without_end_is_capped_and_says_so(site: Site, reach: Any, name: str) -> None:
    count = 0

    def answer(asked: s.Asked) -> s.Answer:
        nonlocal count
        start = int(asked.params.get("offset", (int(asked.params.get("page", "1")) - 1) * 3))
        page = int(asked.params.get("page", "1"))
        found = numbers(*range(start, start + 3))
        return s.json({"items": found} if name == "offset" else found, link=f'<?page={page + 1}>; rel="next"')

    url = site.on("/a", answer)
    pages = {
        "link": lambda: http.pages.link(url, max_pages=5),
        "numbered": lambda: http.pages.numbered(url, max_pages=5),
        "offset": lambda: http.pages.offset(url, max_pages=5, size=3, items="items"),
    }[name]()
    assert len(await flat(pages)) >= 11
    assert reach.capped


async def test_a_script_that_stops_early_asks_no_further(site: Site, reach: Any) -> None:
    listing = Listing(numbers(*range(100)), 3)
    async for _ in http.pages.numbered(site.on("/a", listing.numbered)):
        break
    assert len(site.asked) == 1


async def test_the_number_of_pages_spares_the_last_request(site: Site, reach: Any) -> None:
    url = site.on("/a", s.json({"hits": numbers(1), "pages": 1}))
    assert await flat(http.pages.numbered(url, items="hits", last="pages")) == [1]
    assert len(site.asked) == 1


async def test_items_that_change_while_paging_keep_their_identity(site: Site, reach: Any) -> None:
    listing = Listing([{"id": n, "views": 0} for n in range(9)], 3)

    def viewed(listing: Listing) -> None:
        listing.items = [{**item, "views": item["views"] + 1} for item in listing.items]

    listing.after = dict.fromkeys(range(1, 20), viewed)
    found = await flat(http.pages.offset(site.on("/a", listing.offset), size=3, items="items"))
    assert found == list(range(9))


async def test_an_offset_listing_that_never_rests(site: Site, reach: Any) -> None:
    fresh = iter(range(10**6))
    url = site.on("/a", lambda asked: s.json(numbers(*(next(fresh) for _ in range(3)))))
    with pytest.raises(TriggerError, match="moved faster than it could be read"):
        await flat(http.pages.offset(url, size=3))


@pytest.mark.parametrize("value", [{"items": None}, {"error": "x"}, {}, {"items": {"a": 1}}, 5, None])
async def test_no_list_where_items_should_be_is_no_empty_list(site: Site, reach: Any, value: Any) -> None:
    with pytest.raises(TriggerError, match="no list of items at 'items'") as caught:
        await flat(http.pages.numbered(site.on("/a", s.json(value)), items="items"))
    assert caught.value.kind == "junk"


async def test_an_expression_that_is_none(site: Site, reach: Any) -> None:
    with pytest.raises(TriggerError, match="is not JMESPath"):
        await flat(http.pages.numbered(site.on("/a", s.json({})), items="items["))


async def test_the_first_page_may_say_that_nothing_moved(site: Site) -> None:
    web = Web(fetcher())
    url = site.on("/a", s.conditional(b'[{"id": 1}]', etag='"v1"'))
    with context.use(context.LoopContext(web)):
        assert await flat(http.pages.numbered(url, stop_if_unchanged=True)) == [1]
        web.validators = dict(web.learnt)
        with pytest.raises(http.Unchanged):
            await flat(http.pages.numbered(url, stop_if_unchanged=True))
    await web.fetcher.close()


def test_the_same_for_a_plain_function() -> None:
    class Here(context.LoopContext):
        def fetch_sync(self, request: Any, options: Any) -> Any:
            async def once() -> Any:
                one = fetcher()
                try:
                    return await one.fetch(request, options)
                finally:
                    await one.close()

            return asyncio.run(once())

    with s.in_a_thread() as site, context.use(Here(None)) as here:  # type: ignore[arg-type]
        listing = Listing(numbers(*range(7)), 3)
        pages = http.sync.pages.numbered(site.on("/a", listing.numbered))
        assert [item["id"] for page in pages for item in page] == list(range(7))
        assert list(http.sync.pages.numbered(site.url + "/a", max_pages=1)) == [numbers(0, 1, 2)]
        assert here.capped
        assert http.sync.get(site.url + "/a").json() == numbers(0, 1, 2)
