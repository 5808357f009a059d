"""What trigger authors get: one call, a watcher in memory, and a source that does its worst."""

from __future__ import annotations

import textwrap
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from watcher import get_resource, get_state, get_variable, http, set_state, shared, trigger
from watcher.errors import TriggerError
from watcher.testing import FakeSource, Trial, conform, request_params, run
from watcher.values import UNSET, Json, Request, Response

URL = "https://api.example.com/things"


@trigger(key="id")
async def listing(url: str = URL) -> list[Json]:
    return list((await http.get(url)).json())


@trigger(key="id", on=("new", "changed", "removed"))
def whole(url: str = URL) -> list[Json]:
    return list(http.sync.get(url).json())


@trigger(key="id")
async def pages(url: str = URL) -> AsyncIterator[list[Json]]:
    number = 1
    while items := (await http.get(url, params={"page": number})).json():
        yield items
        number += 1


@trigger(key="id", cursor="at", lookback="10m")
async def since_then(url: str = URL, since: str | None = None) -> AsyncIterator[list[Json]]:
    async for page in http.pages.offset(url, params={"since": since} if since else {}, size=20, key="id"):
        yield page


@trigger(key="id")
async def patient(url: str = URL) -> list[Json]:
    return list((await http.get(url, stop_if_unchanged=True)).json())


def windmill(url: str = URL) -> list[Json]:
    last = get_state() or ""
    rows = [row for row in http.sync.get(url).json() if row["at"] > last]
    if rows:
        set_state(max(row["at"] for row in rows))
    return rows


# --- one call ---------------------------------------------------------------------------------------------------------


def test_a_script_is_called_with_a_site_and_a_state() -> None:
    site = {URL: [{"id": 1, "at": "a"}, {"id": 2, "at": "b"}]}
    result = run(windmill, site=site, state="a")
    assert result.items == [{"id": 2, "at": "b"}]
    assert result.keys == ["2"]
    assert result.state == "b"
    assert [request.url for request in result.requests] == [URL]
    assert run(windmill, site=site, state="b").state is UNSET


async def test_a_script_is_called_from_an_async_test_too() -> None:
    assert run(listing, site={URL: [{"id": 1}]}).keys == ["1"]


def test_a_script_file_is_called_with_checked_arguments(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        textwrap.dedent(
            """
            from watcher import http, trigger

            @trigger(key="id")
            async def main(query: str, count: int = 2):
                page = await http.get("https://api.example.com/search", params={"q": query})
                return page.json()[:count]
            """
        )
    )
    asked: list[str] = []

    def site(request: Request) -> Json:
        asked.append(request_params(request)["q"])
        return [{"id": n} for n in range(5)]

    assert run(script, {"query": "x", "count": "3"}, site=site).keys == ["0", "1", "2"]
    assert asked == ["x"]
    with pytest.raises(TriggerError) as caught:
        run(script, {"qery": "x"}, site=site)
    assert caught.value.kind == "arguments"


def test_resources_and_variables_are_given_by_the_test() -> None:
    def main() -> list[Json]:
        return [get_resource("u/a/db")["host"], get_variable("u/a/token")]

    assert run(main, resources={"u/a/db": {"host": "h"}}, variables={"u/a/token": "t"}).items == ["h", "t"]
    with pytest.raises(TriggerError, match="the test gives no resource u/a/db"):
        run(main)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("text", "text"),
        (b"bytes", "bytes"),
        ([1], "[1]"),
        (Response(200, {}, b"whole"), "whole"),
        (lambda request: {"method": request.method}, '{"method": "GET"}'),
    ],
)
def test_a_site_answers_with_whatever_is_handy(answer: Any, expected: str) -> None:
    async def main() -> list[Json]:
        return [(await http.get(URL)).text]

    assert run(main, site={URL: answer}).items == [expected]


def test_what_goes_wrong_comes_out_as_an_error() -> None:
    with pytest.raises(TriggerError, match="answered 500"):
        run(listing, site={URL: Response(500)})
    with pytest.raises(TriggerError, match="refused"):
        run(listing, site={URL: TriggerError("refused", kind="unreachable")})
    with pytest.raises(TriggerError, match="the test's site has no"):
        run(listing, site={"https://elsewhere.example.com/": []})
    with pytest.raises(TriggerError, match="an HTML page"):
        run(listing, site={URL: "<html>log in"})


# --- a watcher in memory ----------------------------------------------------------------------------------------------


def test_a_trial_remembers_from_poll_to_poll() -> None:
    items = [{"id": 1}]
    trial = Trial(listing, site={URL: lambda request: items})
    assert [find.key for find in trial.poll().finds] == []
    items.insert(0, {"id": 2})
    assert [find.key for find in trial.poll().finds] == ["2"]
    assert [find.key for find in trial.poll().finds] == []


def test_a_trial_of_a_source_that_did_not_move_ends_early() -> None:
    trial = Trial(patient, site={URL: [{"id": 1}]})
    trial.poll()
    assert trial.call().unchanged
    assert trial.poll().finds == ()
    trial.site = {URL: [{"id": 1}, {"id": 2}]}
    assert [find.key for find in trial.poll().finds] == ["2"]


# --- the conformance kit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "source", "more"),
    [
        (listing, lambda: FakeSource(size=1000), {"lag": timedelta(minutes=5)}),
        (patient, lambda: FakeSource(size=1000), {}),
        (whole, lambda: FakeSource(size=1000), {"lag": timedelta(minutes=5)}),
        (pages, lambda: FakeSource(page="page"), {"burst": 60}),
        (listing, lambda: FakeSource(size=1000), {"key": None, "troubles": ("ties", "lag", "reorder", "errors")}),
        (since_then, lambda: FakeSource(offset="offset", since="since"), {"burst": 60, "lag": timedelta(minutes=9)}),
        (
            since_then,
            lambda: FakeSource(offset="offset", since="since", oldest_first=True),
            {"burst": 60, "lag": timedelta(minutes=9), "troubles": ("ties", "lag", "edits", "reorder", "errors")},
        ),
    ],
    ids=["listing", "conditional", "whole", "pages", "without key", "cursor", "cursor, oldest first"],
)
def test_a_script_that_describes_the_world_finds_each_thing_once(script: Any, source: Any, more: Any) -> None:
    assert conform(script, source=source, seeds=range(3), rounds=25, **more) > 50


def test_a_script_that_compares_instants_loses_what_shares_one() -> None:
    with pytest.raises(AssertionError, match=r"seed \d+: never found"):
        conform(windmill, source=lambda: FakeSource(size=1000), troubles=("ties",))


def test_a_script_that_forgets_its_last_run_repeats_itself() -> None:
    def forgetful(url: str = URL) -> list[Json]:
        return list(http.sync.get(url).json())

    with pytest.raises(AssertionError, match=r"was there at the first run|was found twice"):
        conform(forgetful, source=lambda: FakeSource(size=1000))


def test_a_script_that_reads_one_page_loses_what_is_on_the_second() -> None:
    with pytest.raises(AssertionError, match="never found"):
        conform(listing, source=lambda: FakeSource(size=20), burst=60)


def test_a_lag_longer_than_the_lookback_loses_records() -> None:
    with pytest.raises(AssertionError, match="never found"):
        conform(
            since_then,
            source=lambda: FakeSource(offset="offset", since="since"),
            lag=timedelta(hours=3),
            troubles=("lag",),
        )


def test_a_script_that_swallows_errors_is_caught_where_absence_counts() -> None:
    @trigger(key="id", on=("new", "removed"))
    async def careless(url: str = URL) -> list[Json]:
        answer = await http.get(url, check=False)
        return list(answer.json()) if answer.status == 200 else []

    with pytest.raises(AssertionError, match=r"found twice|was there at the first run"):
        conform(careless, source=lambda: FakeSource(size=1000), troubles=("errors",))


def test_a_failure_names_its_seed_and_tells_its_story() -> None:
    with pytest.raises(AssertionError) as caught:
        conform(windmill, source=lambda: FakeSource(size=1000), troubles=("ties",), seeds=[3])
    assert str(caught.value).startswith("seed 3: ")
    assert "made " in str(caught.value)


def test_a_script_finds_an_empty_shared_directory_in_each_call_of_a_test_too() -> None:
    @trigger(key="id")
    async def main(fails: bool = False) -> list[Json]:
        assert list(shared().iterdir()) == []
        (shared() / "a").write_text("a")
        if fails:
            raise OSError(str(shared()))
        return [{"id": str(shared())}]

    (first,), (second,) = run(main).keys, run(main).keys
    assert first != second
    assert not Path(first).exists()
    with pytest.raises(TriggerError) as caught:
        run(main, {"fails": True})
    assert not Path(str(caught.value.__cause__)).exists()
