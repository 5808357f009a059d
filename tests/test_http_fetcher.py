"""The Fetcher against a site that misbehaves: what a source does, and what a run is told of it."""

from __future__ import annotations

import asyncio
import functools
import resource
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from tests.support import site as s
from tests.support.site import Answer, Asked, Site
from watcher.errors import TriggerError
from watcher.http import Fetcher, FetchOptions
from watcher.http.fetcher import name_of
from watcher.values import HttpSettings, Request

Make = Callable[..., Fetcher]


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site() as site:
        yield site


class Timer:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Fetcher] = []

    def make(timer: Timer | None = None, **settings: Any) -> Fetcher:
        more = {} if timer is None else {"timer": timer}
        made.append(Fetcher(HttpSettings(**settings), lambda: datetime.now(UTC), **more))
        return made[-1]

    yield make
    for fetcher in made:
        await fetcher.close()


def get(url: str, **headers: str) -> Request:
    return Request("GET", url, headers)


async def trouble(fetcher: Fetcher, url: str, options: FetchOptions = FetchOptions()) -> TriggerError:  # noqa: B008
    with pytest.raises(TriggerError) as caught:
        await fetcher.fetch(get(url), options)
    return caught.value


# --- one request ------------------------------------------------------------------------------------------------------


async def test_an_answer_with_its_headers(site: Site, make: Make) -> None:
    response = await make().fetch(get(site.on("/x", s.json([1], X_Thing="A"))))
    assert (response.status, response.body, response.headers["x-thing"]) == (200, b"[1]", "A")
    assert response.url == site.url + "/x"
    sent = site.asked[0].headers
    assert sent["user-agent"] == "watcher"
    assert sent["accept-encoding"] == "gzip, deflate"


async def test_any_status_is_an_answer(site: Site, make: Make) -> None:
    for status in (204, 404, 500):
        assert (await make().fetch(get(site.on("/x", s.error(status, b""))))).status == status


async def test_a_post_with_a_body(site: Site, make: Make) -> None:
    url = site.on("/x", s.json({}))
    await make().fetch(Request("POST", url, {"content-type": "text/x"}, b"hello"))
    assert (site.asked[0].method, site.asked[0].body) == ("POST", b"hello")
    assert site.asked[0].headers["content-type"] == "text/x"


async def test_a_password_in_the_url_goes_into_a_header_and_into_no_error(site: Site, make: Make) -> None:
    site.on("/x", s.broken())
    url = f"http://user:hunter2@127.0.0.1:{site.port}/x?api_key=hunter3&page=1"
    error = await trouble(make(), url)
    assert site.asked[0].headers["authorization"] == "Basic dXNlcjpodW50ZXIy"
    assert "hunter" not in str(error)
    assert "page=1" in str(error)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "raw"])
async def test_a_compressed_answer(site: Site, make: Make, coding: str) -> None:
    response = await make().fetch(get(site.on("/x", s.compressed([1, 2], coding))))
    assert response.body == b"[1, 2]"


async def test_gzip_in_several_members_with_padding(site: Site, make: Make) -> None:
    one, two = s.compressed([1]), s.compressed([2])
    answer = Answer(200, one.body + two.body + bytes(100), {"content-encoding": "gzip"})
    assert (await make().fetch(get(site.on("/x", answer)))).body == b"[1][2]"


@pytest.mark.parametrize("url", ["ftp://x/", "http:///x", "http://[::1", "http://a b/", "http://x:99999/", "x", ""])
async def test_what_is_no_url(make: Make, url: str) -> None:
    assert (await trouble(make(), url)).kind == "arguments"


async def test_a_header_with_a_line_break_is_not_sent(site: Site, make: Make) -> None:
    with pytest.raises(TriggerError) as caught:
        await make().fetch(get(site.on("/x", s.json(1)), a="b\r\nc: d"))
    assert caught.value.kind == "arguments"
    assert site.asked == []


# --- limits -----------------------------------------------------------------------------------------------------------


@functools.cache
def bomb(coding: str) -> Answer:
    return s.bomb(coding, 1 << 30 if coding == "gzip" else 1 << 28)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "raw"])
async def test_a_bomb_is_put_out_within_50_megabytes(site: Site, make: Make, coding: str) -> None:
    url, fetcher = site.on("/x", bomb(coding)), make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = await trouble(fetcher, url)
    assert error.kind == "too_large"
    assert "larger than 10485760 bytes" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_without_an_end(site: Site, make: Make, chunked: bool) -> None:
    assert (await trouble(make(), site.on("/x", s.endless(chunked)))).kind == "too_large"


async def test_a_script_may_want_less_but_not_more(site: Site, make: Make) -> None:
    fetcher, url = (
        make(max_body=10),
        site.on("/x", Answer(body=b"x" * 8), Answer(body=b"x" * 8), Answer(body=b"x" * 11)),
    )
    assert (await fetcher.fetch(get(url))).status == 200
    assert (await trouble(fetcher, url, FetchOptions(max_body=7))).kind == "too_large"
    assert (await trouble(fetcher, url, FetchOptions(max_body=100))).kind == "too_large"


@pytest.mark.parametrize("answer", [s.silent(), s.drip(b"x" * 1000, 0.05)])
async def test_a_source_that_is_silent_or_drips_is_given_up_in_time(site: Site, make: Make, answer: Answer) -> None:
    url, loop = site.on("/x", answer), asyncio.get_running_loop()
    start = loop.time()
    error = await trouble(make(timeout=timedelta(seconds=0.3)), url)
    assert error.kind == "timeout"
    assert loop.time() - start < 1.3


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (s.broken(), "unreachable"),
        (s.garbage(), "unreachable"),
        (s.cut_short(b"[1, 2", 100), "unreachable"),
        (Answer(raw=b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n"), "unreachable"),
        (Answer(raw=b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab"), "unreachable"),
        (Answer(raw=b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\nab"), "unreachable"),
        (Answer(raw=b"HTTP/1.1 200 OK\r\nx: " + b"y" * 10_000_000 + b"\r\n\r\n"), "unreachable"),
        (Answer(raw=b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1_000_000 + b"\r\n"), "unreachable"),
        (Answer(body=b"x", headers={"content-encoding": "br"}), "junk"),
        (Answer(body=b"x", headers={"content-encoding": "gzip, gzip"}), "junk"),
        (Answer(body=b"not gzip", headers={"content-encoding": "gzip"}), "junk"),
        (Answer(body=s.compressed([1] * 1000).body[:-20], headers={"content-encoding": "gzip"}), "junk"),
    ],
)
async def test_an_answer_that_is_none(site: Site, make: Make, answer: Answer, kind: str) -> None:
    error = await trouble(make(), site.on("/x", answer))
    assert error.kind == kind
    assert site.url in str(error)
    assert len(str(error)) < 500


async def test_nobody_listens_and_nobody_has_that_name(make: Make) -> None:
    assert "no connection" in str(await trouble(make(), "http://127.0.0.1:1/"))
    assert "cannot be resolved" in str(await trouble(make(), "http://nowhere.invalid/"))


# --- redirects --------------------------------------------------------------------------------------------------------


async def test_redirects_are_followed_to_their_end(site: Site, make: Make) -> None:
    site.on("/c", s.json("end"))
    site.on("/b", s.redirect("c", 308))
    response = await make().fetch(get(site.on("/a", s.redirect("/b", 301))))
    assert (response.body, response.url) == (b'"end"', site.url + "/c")


async def test_a_circle_of_redirects_ends(site: Site, make: Make) -> None:
    error = await trouble(make(), site.on("/a", s.redirect("/a")))
    assert error.kind == "http"
    assert len(site.asked) == 6


async def test_redirects_that_a_script_wants_to_see(site: Site, make: Make) -> None:
    response = await make().fetch(get(site.on("/a", s.redirect("/b"))), FetchOptions(redirects=False))
    assert (response.status, response.headers["location"]) == (302, "/b")


async def test_credentials_do_not_go_to_another_host(site: Site, make: Make) -> None:
    async with Site() as other:
        url = site.on("/a", s.redirect(other.on("/b", s.json(1))))
        await make().fetch(get(url, Authorization="Bearer x", Cookie="y", **{"X-Api-Key": "z", "Accept": "text/x"}))
        assert site.asked[0].headers["x-api-key"] == "z"
        assert not {"authorization", "cookie", "x-api-key"} & set(other.asked[0].headers)
        assert other.asked[0].headers["accept"] == "text/x"


async def test_credentials_stay_on_the_same_host(site: Site, make: Make) -> None:
    site.on("/b", s.json(1))
    await make().fetch(get(site.on("/a", s.redirect("/b")), authorization="Bearer x"))
    assert site.asked[1].headers["authorization"] == "Bearer x"


@pytest.mark.parametrize(("status", "method"), [(301, "GET"), (302, "GET"), (303, "GET"), (307, "POST"), (308, "POST")])
async def test_what_a_redirect_makes_of_a_post(site: Site, make: Make, status: int, method: str) -> None:
    site.on("/b", s.json(1))
    await make().fetch(Request("POST", site.on("/a", s.redirect("/b", status)), {"content-type": "x/y"}, b"body"))
    assert site.asked[1].method == method
    assert site.asked[1].body == (b"body" if method == "POST" else b"")


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://x/", "http://[::1", "javascript:1"])
async def test_a_redirect_out_of_the_web(site: Site, make: Make, to: str) -> None:
    error = await trouble(make(), site.on("/a", s.redirect(to)))
    assert error.kind == "http"
    assert "redirects to nowhere" in str(error)


# --- politeness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_holds_back_every_watcher_of_the_host(site: Site, make: Make, status: int) -> None:
    timer = Timer()
    fetcher = make(timer)
    site.on("/b", s.json(1))
    assert (await fetcher.fetch(get(site.on("/a", s.too_many(120, status))))).status == status
    error = await trouble(fetcher, site.url + "/b")
    assert (error.kind, error.retry_after) == ("http", 120)
    assert f"answered {status}" in str(error)
    timer.now += 121
    assert (await fetcher.fetch(get(site.url + "/b"))).status == 200
    assert len(site.asked) == 2


async def test_retry_after_as_a_date_counts_from_the_answers_own_date(site: Site, make: Make) -> None:
    ahead = datetime.now(UTC) + timedelta(days=3)  # the site's clock is three days ahead
    headers = {
        "date": format_datetime(ahead, usegmt=True),
        "retry-after": format_datetime(ahead + timedelta(seconds=90), usegmt=True),
    }
    fetcher = make(Timer())
    await fetcher.fetch(get(site.on("/a", Answer(429, headers=headers))))
    assert (await trouble(fetcher, site.url + "/a")).retry_after == pytest.approx(90, abs=1)


@pytest.mark.parametrize("text", ["soon", "-5", "1e9", "", "99999999999999999999"])
async def test_a_retry_after_that_makes_no_sense(site: Site, make: Make, text: str) -> None:
    fetcher = make(Timer())
    await fetcher.fetch(get(site.on("/a", Answer(429, headers={"retry-after": text}))))
    wait = (await trouble(fetcher, site.url + "/a")).retry_after
    assert wait == 60  # what a 429 means that does not say how long


async def test_a_quota_that_is_used_up(site: Site, make: Make) -> None:
    reset = datetime.now(UTC) + timedelta(minutes=10)
    headers = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(reset.timestamp()))}
    fetcher = make(Timer())
    assert (await fetcher.fetch(get(site.on("/a", Answer(403, headers=headers))))).status == 403
    assert (await trouble(fetcher, site.url + "/a")).retry_after == pytest.approx(600, abs=2)


async def test_an_ordinary_403_or_503_holds_nobody_back(site: Site, make: Make) -> None:
    fetcher = make()
    for status in (403, 503):
        site.on("/a", s.error(status))
        assert (await fetcher.fetch(get(site.url + "/a"))).status == status
    assert (await fetcher.fetch(get(site.on("/a", s.json(1))))).status == 200


async def test_another_host_is_not_held_back(site: Site, make: Make) -> None:
    async with Site() as other:
        fetcher = make()
        await fetcher.fetch(get(site.on("/a", s.too_many(120))))
        assert (await fetcher.fetch(get(other.on("/a", s.json(1))))).status == 200


async def test_never_more_at_once_to_one_host_than_allowed(site: Site, make: Make) -> None:
    gate = asyncio.Event()
    fetcher = make(at_once_per_host=3)
    urls = [site.on(f"/{n}", Answer(before=gate)) for n in range(10)]
    tasks = [asyncio.create_task(fetcher.fetch(get(url))) for url in urls]
    while site.at_once < 3:
        await asyncio.sleep(0.001)
    gate.set()
    await asyncio.gather(*tasks)
    assert site.most_at_once == 3


async def test_waiting_for_a_turn_does_not_use_up_the_time_of_a_request(site: Site, make: Make) -> None:
    fetcher = make(at_once_per_host=1, timeout=timedelta(seconds=0.5))
    urls = [site.on(f"/{n}", s.drip(b"12345", 0.04)) for n in range(6)]
    answers = await asyncio.gather(*(fetcher.fetch(get(url)) for url in urls))
    assert {answer.body for answer in answers} == {b"12345"}


async def test_those_who_wait_for_their_turn_hear_of_a_429(site: Site, make: Make) -> None:
    fetcher = make(at_once_per_host=1)
    site.on("/a", s.too_many(60))
    answers = await asyncio.gather(*(fetcher.fetch(get(f"{site.url}/a?{n}")) for n in range(5)), return_exceptions=True)
    assert len(site.asked) == 1
    assert sum(isinstance(answer, TriggerError) for answer in answers) == 4


# --- one fetch for many -----------------------------------------------------------------------------------------------


async def test_watchers_on_one_url_share_one_request(site: Site, make: Make) -> None:
    fetcher, url = make(), site.on("/a", s.json([1]))
    answers = await asyncio.gather(*(fetcher.fetch(get(url)) for _ in range(20)))
    assert len(site.asked) == 1
    assert {answer.body for answer in answers} == {b"[1]"}
    await fetcher.fetch(get(url))
    assert len(site.asked) == 2  # shared while under way, and no longer


async def test_another_token_is_another_request(site: Site, make: Make) -> None:
    fetcher, url = make(), site.on("/a", lambda asked: s.json(asked.headers["authorization"]))
    one, two = await asyncio.gather(*(fetcher.fetch(get(url, authorization=token)) for token in ("a", "b")))
    assert (one.body, two.body) == (b'"a"', b'"b"')


async def test_a_watcher_that_gives_up_does_not_take_the_others_answer(site: Site, make: Make) -> None:
    gate = asyncio.Event()
    fetcher, url = make(), site.on("/a", Answer(body=b"1", before=gate))
    one, two = (asyncio.create_task(fetcher.fetch(get(url))) for _ in range(2))
    while not site.at_once:
        await asyncio.sleep(0.001)
    one.cancel()
    await asyncio.gather(one, return_exceptions=True)
    gate.set()
    assert (await two).body == b"1"
    assert one.cancelled()


async def test_when_all_give_up_the_request_ends(site: Site, make: Make) -> None:
    fetcher, url = make(), site.on("/a", s.silent())
    tasks = [asyncio.create_task(fetcher.fetch(get(url))) for _ in range(3)]
    while not site.at_once:
        await asyncio.sleep(0.001)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not fetcher._shared
    site.on("/a", s.json(1))
    assert (await fetcher.fetch(get(url))).status == 200


async def test_a_failure_is_told_to_all_who_share(site: Site, make: Make) -> None:
    fetcher, url = make(), site.on("/a", s.broken())
    answers = await asyncio.gather(*(fetcher.fetch(get(url)) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(answer, TriggerError) for answer in answers)


async def test_posts_are_never_shared(site: Site, make: Make) -> None:
    fetcher, url = make(), site.on("/a", s.json(1))
    await asyncio.gather(*(fetcher.fetch(Request("POST", url, {}, b"x")) for _ in range(3)))
    assert len(site.asked) == 3


# --- conditional requests ---------------------------------------------------------------------------------------------

OLD = "Mon, 02 Nov 2026 10:00:00 GMT"
LATER = "Mon, 02 Nov 2026 11:00:00 GMT"
STOP = FetchOptions(stop_if_unchanged=True)


async def test_a_304_gives_the_body_again_to_a_script_that_wants_it(site: Site, make: Make) -> None:
    fetcher, url = make(), site.on("/a", s.conditional(b"[1]", etag='"v1"'))
    bodies = [(await fetcher.fetch(get(url))).body for _ in range(3)]
    assert bodies == [b"[1]"] * 3
    assert [asked.headers.get("if-none-match") for asked in site.asked] == [None, '"v1"', '"v1"']


async def test_a_304_ends_the_run_of_a_script_that_stops_if_unchanged(site: Site, make: Make) -> None:
    url = site.on("/a", s.conditional(b"[1]", etag='"v1"'))
    learnt: dict[str, Any] = {}
    assert (await make().fetch(get(url), STOP, {}, learnt)).status == 200
    again: dict[str, Any] = {}
    restarted = make()  # a new process: nothing in memory
    assert (await restarted.fetch(get(url), STOP, learnt, again)).status == 304
    assert site.asked[1].headers["if-none-match"] == '"v1"'
    assert again == learnt


async def test_the_same_bytes_without_validators_are_unchanged_too(site: Site, make: Make) -> None:
    fetcher, url, learnt = make(), site.on("/a", s.json([1]), s.json([1]), s.json([2])), {}
    statuses = []
    for _ in range(3):
        now: dict[str, Any] = {}
        statuses.append((await fetcher.fetch(get(url), STOP, learnt, now)).status)
        learnt = now
    assert statuses == [200, 304, 200]


async def test_without_stop_if_unchanged_no_validator_of_the_last_run_is_used(site: Site, make: Make) -> None:
    """After a restart a 304 would leave the script without a body."""
    url = site.on("/a", s.conditional(b"[1]", etag='"v1"'))
    request = get(url)
    known = {name_of(request): {"etag": '"v1"', "digest": "x"}}
    assert (await make().fetch(request, FetchOptions(), known)).body == b"[1]"


async def test_validators_of_a_run_that_was_not_committed_prove_nothing(site: Site, make: Make) -> None:
    fetcher, url = make(), site.on("/a", s.conditional(b"[1]", etag='"v1"'))
    lost: dict[str, Any] = {}
    await fetcher.fetch(get(url), STOP, {}, lost)
    assert (await fetcher.fetch(get(url), STOP, {}, {})).body == b"[1]"  # this watcher has not seen it


async def test_last_modified_is_used(site: Site, make: Make) -> None:
    fetcher, url = make(), site.on("/a", s.conditional(b"[1]", last_modified=OLD, date=LATER))
    await fetcher.fetch(get(url))
    assert (await fetcher.fetch(get(url))).body == b"[1]"
    assert site.asked[1].headers["if-modified-since"] == OLD


async def test_last_modified_in_the_second_of_the_answer_is_not_trusted(site: Site, make: Make) -> None:
    """What changes twice in a second would be seen once."""
    fetcher, url = make(), site.on("/a", s.conditional(b"[1]", last_modified=OLD, date=OLD))
    await fetcher.fetch(get(url))
    await fetcher.fetch(get(url))
    assert "if-modified-since" not in site.asked[1].headers


async def test_a_changed_answer_after_a_kept_one(site: Site, make: Make) -> None:
    fetcher, url = make(), site.on("/a", s.conditional(b"[1]", etag='"v1"'))
    await fetcher.fetch(get(url))
    site.on("/a", s.conditional(b"[2]", etag='"v2"'))
    assert (await fetcher.fetch(get(url))).body == b"[2]"
    assert (await fetcher.fetch(get(url))).body == b"[2]"
    assert [asked.headers.get("if-none-match") for asked in site.asked] == [None, '"v1"', '"v2"']


async def test_a_body_kept_for_one_token_is_not_shown_to_another(site: Site, make: Make) -> None:
    fetcher, url = (
        make(),
        site.on("/a", lambda asked: Answer(200, asked.headers["authorization"].encode(), {"etag": '"v"'})),
    )
    assert (await fetcher.fetch(get(url, authorization="a"))).body == b"a"
    assert (await fetcher.fetch(get(url, authorization="b"))).body == b"b"
    assert "if-none-match" not in site.asked[1].headers


async def test_a_renewed_token_keeps_the_validators(site: Site) -> None:
    assert name_of(get("http://x/", authorization="a")) == name_of(get("http://x/", authorization="b"))
    assert name_of(get("http://x/")) != name_of(get("http://x/?page=2"))


async def test_cache_control_lets_an_answer_be_used_again_for_minutes_at_most(site: Site, make: Make) -> None:
    timer = Timer()
    fetcher, url = make(timer), site.on("/a", s.json([1], cache_control="public, max-age=31536000"))
    for _ in range(3):
        await fetcher.fetch(get(url))
    assert len(site.asked) == 1
    await fetcher.fetch(get(url), FetchOptions(fresh=True))
    assert len(site.asked) == 2
    timer.now += 301
    await fetcher.fetch(get(url))
    assert len(site.asked) == 3


@pytest.mark.parametrize(
    "control", ["no-store, max-age=60", "no-cache, max-age=60", "max-age=0", "s-maxage=60", "max-age=x"]
)
async def test_cache_control_that_wants_every_request(site: Site, make: Make, control: str) -> None:
    fetcher, url = make(), site.on("/a", s.json([1], cache_control=control))
    await fetcher.fetch(get(url))
    await fetcher.fetch(get(url))
    assert len(site.asked) == 2


async def test_time_spent_in_other_caches_counts(site: Site, make: Make) -> None:
    fetcher, url = make(), site.on("/a", s.json([1], cache_control="max-age=60", age="60"))
    await fetcher.fetch(get(url))
    await fetcher.fetch(get(url))
    assert len(site.asked) == 2


async def test_errors_are_not_kept(site: Site, make: Make) -> None:
    fetcher = make()
    url = site.on("/a", Answer(500, b"x", {"cache-control": "max-age=60", "etag": '"e"'}), s.json([1]))
    assert (await fetcher.fetch(get(url))).status == 500
    assert (await fetcher.fetch(get(url))).status == 200


async def test_what_is_kept_in_memory_is_bounded(site: Site, make: Make) -> None:
    def answer(asked: Asked) -> Answer:
        return Answer(200, bytes(3 << 20), {"etag": f'"{asked.target}"'})

    fetcher = make()
    site.on("/a", answer)
    for number in range(20):
        await fetcher.fetch(get(f"{site.url}/a?{number}"))
    assert fetcher._kept_bytes == sum(len(kept.response.body) for kept in fetcher._kept.values()) <= 32 << 20


async def test_settings_can_change_while_it_runs(site: Site, make: Make) -> None:
    fetcher, url = make(), site.on("/a", s.json(1))
    await fetcher.fetch(get(url))
    fetcher.configure(HttpSettings(user_agent="other", private_addresses=False))
    with pytest.raises(TriggerError, match="private address"):
        await fetcher.fetch(get(url))
    fetcher.configure(HttpSettings(user_agent="other"))
    await fetcher.fetch(get(url))
    assert site.asked[-1].headers["user-agent"] == "other"


async def test_a_head_request(site: Site, make: Make) -> None:
    response = await make().fetch(Request("HEAD", site.on("/a", s.json([1, 2, 3]))))
    assert (response.status, response.body) == (200, b"")
