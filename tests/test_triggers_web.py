"""The built-in triggers that ask the web, against a fake site on a real socket."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support import site as s
from tests.support.site import Answer, Listing, Site
from tests.support.watching import TRIGGERS, Watching, fetcher
from watcher.errors import TriggerError
from watcher.scripts import Scripts
from watcher.values import ScriptSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def site() -> AsyncIterator[Site]:
    async with Site() as site:
        yield site


class Maker:
    """Watchers that share one runtime and one fetcher."""

    def __init__(self) -> None:
        self.scripts = Scripts(ScriptSettings())
        self.fetcher = fetcher()

    def __call__(self, trigger: str, **args: Any) -> Watching:
        return Watching(self.scripts, self.fetcher, trigger, **args)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watch() -> AsyncIterator[Maker]:
    maker = Maker()
    await maker.scripts.start()
    yield maker
    await maker.fetcher.close()
    await maker.scripts.close()


async def test_every_trigger_says_what_it_does_and_what_it_takes(watch: Maker) -> None:
    for script in sorted(TRIGGERS.glob("*.py")):
        described = await watch.scripts.describe(script)
        assert described.doc.splitlines()[0].endswith("."), script
        if script.stem != "redis_list":  # what is taken out of a queue is new, whatever it is
            assert described.label.style != "windmill", f"{script} does not say what identifies an item"
        assert f'trigger = "{script.stem}"' in script.read_text(), f"{script} shows no example"


# --- Hacker News ------------------------------------------------------------------------------------------------------


def hits(*ids: int) -> list[dict[str, Any]]:
    return [{"objectID": str(n), "title": f"story {n}", "points": n, "_highlightResult": {}} for n in ids]


async def test_new_stories_once(site: Site, watch: Maker) -> None:
    url = site.on("/s", s.json({"hits": hits(2, 1), "nbPages": 1}), s.json({"hits": hits(3, 2, 1), "nbPages": 1}))
    w = watch("hacker_news", query="sqlite", min_points=5, url=url)
    assert [item["objectID"] for item in await w.poll()] == ["2", "1"]
    (item,) = await w.poll()
    assert item == {
        "objectID": "3",
        "title": "story 3",
        "points": 3,
        "discussion": "https://news.ycombinator.com/item?id=3",
    }
    assert site.asked[0].params == {
        "query": "sqlite", "tags": "story", "hitsPerPage": "100", "numericFilters": "points>=5", "page": "0",
    }  # fmt: skip


async def test_a_burst_of_stories_over_several_pages(site: Site, watch: Maker) -> None:
    listing = Listing(hits(*range(1, 4)), 3)

    def answer(asked: s.Asked) -> Answer:
        page = int(asked.params["page"])
        pages = -(-len(listing.items) // 3)
        return s.json({"hits": listing.items[page * 3 : page * 3 + 3], "nbPages": pages})

    w = watch("hacker_news", url=site.on("/s", answer))
    await w.poll()
    listing.items = hits(*range(20, 3, -1)) + listing.items
    site.asked.clear()
    assert sorted(int(item["objectID"]) for item in await w.poll()) == list(range(4, 21))
    site.asked.clear()
    assert await w.poll() == []
    assert len(site.asked) == 1


# --- GitHub -----------------------------------------------------------------------------------------------------------


def release(number: int, **more: Any) -> dict[str, Any]:
    assets = [{"name": "a.zip", "download_count": number}]
    return {"id": number, "tag_name": f"v{number}", "draft": False, "prerelease": False, "assets": assets, **more}


PATH = "/repos/o/r/releases"


async def test_releases_with_drafts_left_out_until_they_are_published(site: Site, watch: Maker) -> None:
    site.on(PATH, s.json([release(2, draft=True), release(1)]), s.json([release(2), release(1)]))
    w = watch("github_releases", repo="o/r", token="t0ken", api=site.url)
    assert [item["id"] for item in await w.poll()] == [1]
    assert [item["id"] for item in await w.poll()] == [2]
    assert site.asked[0].headers["authorization"] == "Bearer t0ken"
    assert site.asked[0].headers["accept"] == "application/vnd.github+json"


async def test_a_304_costs_no_quota_and_ends_the_run(site: Site, watch: Maker) -> None:
    site.on(PATH, s.conditional(json.dumps([release(1)]).encode(), etag='"v1"'))
    w = watch("github_releases", repo="o/r", api=site.url)
    await w.poll()
    listing = await w.look()
    assert listing.unchanged
    assert site.asked[1].headers["if-none-match"] == '"v1"'


async def test_downloads_and_reactions_are_no_change_of_a_release(site: Site, watch: Maker) -> None:
    more = {"assets": [{"name": "a.zip", "download_count": 999}], "reactions": {"+1": 5}}
    site.on(PATH, s.json([release(1)]), s.json([release(1, **more)]), s.json([release(1, name="edited")]))
    w = watch("github_releases", repo="o/r", api=site.url)
    assert await w.changes() == [("new", "1")]
    assert await w.changes() == []
    assert await w.changes() == [("changed", "1")]


async def test_prereleases_can_be_left_out(site: Site, watch: Maker) -> None:
    site.on(PATH, s.json([release(2, prerelease=True), release(1)]))
    assert [i["id"] for i in await watch("github_releases", repo="o/r", api=site.url, prereleases=False).poll()] == [1]


async def test_a_repository_that_is_not_there(site: Site, watch: Maker) -> None:
    with pytest.raises(TriggerError, match=r"answered 404.*a private thing without a token looks the same"):
        await watch("github_releases", repo="o/r", api=site.url).poll()


async def test_stars_are_read_from_the_end(site: Site, watch: Maker) -> None:
    stars = [{"starred_at": f"2026-01-01T00:00:{n:02}Z", "user": {"id": n}} for n in range(1, 6)]

    def answer(asked: s.Asked) -> Answer:
        page, last = int(asked.params["page"]), -(-len(stars) // 2)
        link = f'<{asked.path}?page={last}>; rel="last"' if page < last else ""
        return s.json(stars[page * 2 - 2 : page * 2], link=link)

    site.on("/repos/o/r/stargazers", answer)
    w = watch("github_stars", repo="o/r", api=site.url)
    assert [item["user"]["id"] for item in await w.poll()] == [5, 4, 3, 2, 1]
    assert await w.poll() == []
    stars[:1] = []  # the first one takes the star away, two more come
    stars += [{"starred_at": "2026-01-02T00:00:00Z", "user": {"id": n}} for n in (6, 7)]
    assert [item["user"]["id"] for item in await w.poll()] == [7, 6]
    stars.append({"starred_at": "2026-01-03T00:00:00Z", "user": {"id": 1}})
    assert await w.poll() == []  # it is back: known


# --- any JSON ---------------------------------------------------------------------------------------------------------


async def test_a_list_that_is_the_answer(site: Site, watch: Maker) -> None:
    w = watch("http_json", url=site.on("/a", s.json([{"id": 1}]), s.json([{"id": 1}, {"id": 2}])), params={"x": "y"})
    assert await w.poll() == [{"id": 1}]
    assert await w.poll() == [{"id": 2}]
    assert site.asked[0].params == {"x": "y"}


async def test_a_list_inside_the_answer_with_user_and_password(site: Site, watch: Maker) -> None:
    url = site.on("/a", s.json({"data": {"orders": [{"id": 1}]}}))
    assert await watch("http_json", url=url, items="data.orders", user="u", password="p").poll() == [{"id": 1}]
    assert site.asked[0].headers["authorization"] == "Basic dTpw"


@pytest.mark.parametrize("pages", ["link", "number", "offset", "cursor"])
async def test_every_way_of_paging(site: Site, watch: Maker, pages: str) -> None:
    listing = Listing([{"id": str(n)} for n in range(10)], 3)
    answer = {"link": listing.link, "number": listing.numbered, "offset": listing.offset, "cursor": listing.cursor}[
        pages
    ]
    args = {
        "link": {},
        "number": {},
        "offset": {"items": "items", "page_size": 3},
        "cursor": {"items": "items", "page_param": "after", "next": "next"},
    }[pages]
    w = watch("http_json", url=site.on("/a", answer), pages=pages, **args)
    assert [item["id"] for item in await w.poll()] == [str(n) for n in range(10)]
    listing.items.insert(0, {"id": "new"})
    assert [item["id"] for item in await w.poll()] == ["new"]


async def test_graphql_errors_with_status_200_are_no_empty_list(site: Site, watch: Maker) -> None:
    url = site.on(
        "/a", s.json({"data": {"things": [{"id": 1}]}}), s.json({"errors": [{"message": "no"}], "data": None})
    )
    w = watch("http_json", url=url, items="data.things", json={"query": "{ things { id } }"})
    assert await w.poll() == [{"id": 1}]
    assert site.asked[0].json() == {"query": "{ things { id } }"}
    with pytest.raises(TriggerError, match="answered with errors"):
        await w.poll()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (s.html(), "junk"),
        (s.truncated([{"id": n} for n in range(10)]), "junk"),
        (s.json({"message": "please log in"}), "junk"),
        (s.json(None), "junk"),
        (s.error(500), "http"),
        (s.too_many(30), "http"),
        (s.broken(), "unreachable"),
    ],
)
async def test_no_trouble_of_a_source_looks_like_an_empty_list(
    site: Site, watch: Maker, answer: Answer, kind: str
) -> None:
    w = watch("http_json", url=site.on("/a", answer), items="data")
    with pytest.raises(TriggerError) as caught:
        await w.poll()
    assert caught.value.kind == kind


# --- feeds ------------------------------------------------------------------------------------------------------------


def rss(*entries: str, kind: str = "application/rss+xml") -> Answer:
    items = "".join(f"<item>{entry}</item>" for entry in entries)
    text = f'<?xml version="1.0"?><rss version="2.0"><channel><title>T</title>{items}</channel></rss>'
    return Answer(200, text.encode(), {"content-type": kind})


def entry(guid: str = "", link: str = "", title: str = "", date: str = "", text: str = "") -> str:
    parts = {"guid": guid, "link": link, "title": title, "pubDate": date, "description": text}
    return "".join(f"<{name}>{value}</{name}>" for name, value in parts.items() if value)


DAY = "Mon, 02 Nov 2026 10:00:00 GMT"


async def polls(site: Site, watch: Maker, *answers: Answer) -> list[list[str]]:
    """The titles that are new at each poll."""
    w = watch("rss", url=site.on("/f", *answers))
    return [[item["title"] for item in await w.poll()] for _ in answers]


async def test_new_entries_of_a_feed(site: Site, watch: Maker) -> None:
    one, two = entry("1", "http://x/1", "one", DAY, "text"), entry("2", "http://x/2", "two", DAY)
    assert await polls(site, watch, rss(one), rss(two, one), rss(two, one)) == [["one"], ["two"], []]


async def test_an_entry_says_what_the_feed_says(site: Site, watch: Maker) -> None:
    (item,) = await watch("rss", url=site.on("/f", rss(entry("1", "/1", "one &amp; 1", DAY, "text")))).poll()
    assert item["id"] == item["guid"] == "1"
    assert (item["title"], item["link"]) == ("one & 1", site.url + "/1")
    assert (item["published"], item["summary"]) == ("2026-11-02T10:00:00+00:00", "text")


async def test_all_entries_share_one_guid(site: Site, watch: Maker) -> None:
    def one(n: int) -> str:
        return entry("same", f"http://x/{n}", str(n), DAY)

    answers = [rss(*map(one, range(9, 0, -1))), rss(*map(one, range(10, 0, -1)))]
    assert await polls(site, watch, *answers) == [list("987654321"), ["10"]]


async def test_a_guid_shared_only_now_and_then(site: Site, watch: Maker) -> None:
    one, two = entry("same", "http://x/1", "one", DAY), entry("same", "http://x/2", "two", DAY)
    assert await polls(site, watch, rss(one), rss(two, one), rss(two)) == [["one"], ["two"], []]


async def test_a_guid_that_is_another_one_at_every_fetch(site: Site, watch: Maker) -> None:
    def now(n: int, *titles: str) -> Answer:
        return rss(*(entry(f"{n}-{title}", f"http://x/{title}", title, DAY) for title in titles))

    answers = [now(1, "a", "b"), now(2, "a", "b"), now(3, "c", "a", "b"), now(4, "c", "a")]
    assert await polls(site, watch, *answers) == [["a", "b"], [], ["c"], []]


async def test_the_same_link_every_day_is_not_the_same_entry(site: Site, watch: Maker) -> None:
    """A picture of the day: one address, one title, a new guid and date each time."""
    days = [
        rss(entry(str(n), "http://x/today", "Picture of the day", f"Mon, 0{n} Nov 2026 10:00:00 GMT"))
        for n in (1, 2, 3)
    ]
    assert await polls(site, watch, *days) == [["Picture of the day"]] * 3


async def test_no_date_no_guid_and_a_date_in_the_future(site: Site, watch: Maker) -> None:
    undated, bare = entry("1", "http://x/1", "undated"), entry(title="bare", text="only text")
    future = entry("3", "http://x/3", "future", "Mon, 02 Nov 2099 10:00:00 GMT")
    later = entry("4", "http://x/4", "later", DAY)
    answers = [rss(undated, bare, future), rss(later, undated, bare, future)]
    assert await polls(site, watch, *answers) == [["undated", "bare", "future"], ["later"]]


async def test_edited_entries_are_the_same_entries(site: Site, watch: Maker) -> None:
    before = entry("1", "http://x/1", "one", DAY, "text")
    after = entry("1", "http://x/1?utm=2", "one, corrected", "Tue, 03 Nov 2026 10:00:00 GMT", "better text")
    assert await polls(site, watch, rss(before), rss(after)) == [["one"], []]


async def test_an_empty_feed_is_a_feed(site: Site, watch: Maker) -> None:
    assert await polls(site, watch, rss(), rss(entry("1", title="one"))) == [[], ["one"]]


@pytest.mark.parametrize("answer", [s.html(), s.json({"a": 1}), Answer(body=b""), Answer(body=b"nothing at all")])
async def test_what_is_no_feed_is_an_error_and_not_an_empty_one(site: Site, watch: Maker, answer: Answer) -> None:
    with pytest.raises(TriggerError, match=r"is not a feed|no JSON Feed"):
        await watch("rss", url=site.on("/f", answer)).poll()


async def test_a_feed_that_is_cut_in_the_middle_still_gives_what_is_whole(site: Site, watch: Maker) -> None:
    whole = rss(*(entry(str(n), f"http://x/{n}", str(n), DAY) for n in range(9)))
    found = await polls(site, watch, Answer(200, whole.body[:-120], whole.headers))
    assert found[0][:7] == list("0123456")


async def test_an_atom_feed(site: Site, watch: Maker) -> None:
    text = """<feed xmlns="http://www.w3.org/2005/Atom"><title>T</title><entry><id>urn:1</id><title>one</title>
    <link href="http://x/1"/><updated>2026-11-02T10:00:00Z</updated><content type="html">&lt;p&gt;Hi&lt;/p&gt;</content>
    <author><name>Ann</name></author><category term="a"/></entry></feed>"""
    (item,) = await watch("rss", url=site.on("/f", Answer(body=text.encode()))).poll()
    assert (item["id"], item["link"], item["content"], item["author"]) == ("urn:1", "http://x/1", "<p>Hi</p>", "Ann")
    assert (item["updated"], item["tags"]) == ("2026-11-02T10:00:00+00:00", ["a"])


async def test_a_json_feed(site: Site, watch: Maker) -> None:
    feed = {
        "version": "https://jsonfeed.org/version/1.1",
        "items": [{"id": 1, "url": "http://x/1", "content_text": "Hi", "date_published": "2026-11-02T10:00:00Z",
                   "authors": [{"name": "Ann"}, {}]}],
    }  # fmt: skip
    (item,) = await watch("rss", url=site.on("/f", s.json(feed))).poll()
    assert (item["id"], item["link"], item["content"], item["author"]) == ("1", "http://x/1", "Hi", "Ann")


async def test_a_feed_that_did_not_move_is_not_even_read(site: Site, watch: Maker) -> None:
    w = watch("rss", url=site.on("/f", rss(entry("1", title="one"))))
    await w.poll()
    assert (await w.look()).unchanged


async def test_a_feed_that_moved_for_good(site: Site, watch: Maker) -> None:
    site.on("/new", rss(entry("1", title="one")))
    assert await polls(site, watch, s.redirect("/new", 301)) == [["one"]]


ENTITIES = "".join(f'<!ENTITY z{n} "{f"&z{n - 1};" * 10 if n else "ha" * 10}">' for n in range(10))
LAUGHS = (
    f'<?xml version="1.0"?><!DOCTYPE lolz [{ENTITIES}]><rss version="2.0"><channel><item>'
    "<title>&z9;</title></item></channel></rss>"
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        '<?xml version="1.0"?><!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><rss version="2.0"><channel><item>'
        "<guid>1</guid><title>&x;</title></item></channel></rss>",
        "<rss version='2.0'><channel><item><title>" + "<a>" * 20_000 + "</title></item></channel></rss>",
    ],
    ids=["laughs", "file", "deep"],
)
async def test_a_feed_that_attacks_its_reader(site: Site, watch: Maker, text: str) -> None:
    w = watch("rss", url=site.on("/f", Answer(200, text.encode(), {"content-type": "application/xml"})))
    try:
        items = await w.poll()
    except TriggerError:
        return
    assert "root:" not in json.dumps(items)
    assert len(json.dumps(items)) < 1_000_000


async def test_without_feedparser_the_error_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['feedparser'] = None; sys.path.insert(0, sys.argv[1]); import rss\n"
        "from watcher.http import Response\n"
        "try: rss.read_xml(Response(200, {}, b'<rss/>', 'http://x/'))\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(TRIGGERS)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "the rss trigger needs feedparser: pip install 'change-watcher[feeds]'"
