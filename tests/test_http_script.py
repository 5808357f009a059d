"""What a script asks with and what it reads: requests from arguments, answers that are not what they should be."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from watcher import context, http, values
from watcher.errors import TriggerError
from watcher.http import Response
from watcher.http.message import build, redacted
from watcher.values import Request


class Canned(context.Context):
    """A context whose every request gets one answer."""

    def __init__(self, answer: values.Response) -> None:
        super().__init__()
        self.answer = answer
        self.asked: list[tuple[Request, http.FetchOptions]] = []

    def get_resource(self, path: str) -> Any:
        raise NotImplementedError

    def get_variable(self, path: str) -> str:
        raise NotImplementedError

    async def fetch(self, request: Request, options: http.FetchOptions) -> values.Response:
        return self.fetch_sync(request, options)

    def fetch_sync(self, request: Request, options: http.FetchOptions) -> values.Response:
        self.asked.append((request, options))
        return self.answer


def answer(body: bytes = b"", status: int = 200, **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status, named, body, "https://example.com/things?page=1")


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "params", "whole"),
    [
        ("https://x/a", {"q": "a b&c"}, "https://x/a?q=a%20b%26c"),
        ("https://x/a?p=1&q=2", {"p": 3}, "https://x/a?q=2&p=3"),
        ("https://x/a", {"tag": ["a", "b"], "none": None, "yes": True}, "https://x/a?tag=a&tag=b&yes=true"),
        ("https://x/a?e=", [("q", "ü")], "https://x/a?e=&q=%C3%BC"),
        ("https://x/a?keep=%2F", None, "https://x/a?keep=%2F"),
        ("https://x/a", {}, "https://x/a"),
    ],
)
def test_parameters_join_the_query(url: str, params: Any, whole: str) -> None:
    assert build("GET", url, params=params).url == whole


def test_a_token_or_a_user_becomes_a_header() -> None:
    assert build("GET", "https://x/", auth="t").headers["authorization"] == "Bearer t"
    assert build("GET", "https://x/", auth=("u", "p")).headers["authorization"] == "Basic dTpw"
    assert build("GET", "https://u:p@x/").headers["authorization"] == "Basic dTpw"
    assert build("GET", "https://u:p@x/").url == "https://x/"


def test_a_body_says_what_it_is() -> None:
    json = build("POST", "https://x/", json={"ü": [1]})
    assert (json.body, json.headers["content-type"]) == ('{"ü": [1]}'.encode(), "application/json")
    assert build("POST", "https://x/", json=None).body == b"null"
    form = build("POST", "https://x/", data={"a": "1 2", "b": ["x", "y"]})
    assert (form.body, form.headers["content-type"]) == (b"a=1+2&b=x&b=y", "application/x-www-form-urlencoded")
    assert build("PUT", "https://x/", body="ü").body == "ü".encode()
    assert build("POST", "https://x/", json=1, headers={"Content-Type": "x/y"}).headers == {"content-type": "x/y"}


@pytest.mark.parametrize("url", ["x", "ftp://x", "https://", "https://[x", "https://x:port/", "https://a\\@b/", ""])
def test_what_is_no_url_is_said_before_it_is_asked(url: str) -> None:
    with pytest.raises(TriggerError) as caught:
        build("GET", url)
    assert caught.value.kind == "arguments"


async def test_every_option_reaches_the_service() -> None:
    with context.use(Canned(answer())) as reach:
        await http.get("https://x/", timeout=5, max_body=9, redirects=False, fresh=True)
        await http.post("https://x/", json=1, timeout=6)
        await http.request("DELETE", "https://x/")
        http.sync.get("https://x/", stop_if_unchanged=True)
        http.sync.post("https://x/", data={"a": 1})
    assert isinstance(reach, Canned)
    assert [request.method for request, _ in reach.asked] == ["GET", "POST", "DELETE", "GET", "POST"]
    assert [options for _, options in reach.asked] == [
        http.FetchOptions(5, 9, False, False, True),
        http.FetchOptions(timeout=6),
        http.FetchOptions(),
        http.FetchOptions(stop_if_unchanged=True),
        http.FetchOptions(),
    ]


def test_outside_a_run_it_says_how_to_test_a_script() -> None:
    with pytest.raises(RuntimeError, match=r"watcher\.testing\.run"):
        http.sync.get("https://x/")


async def test_nothing_moved() -> None:
    with context.use(Canned(answer(status=304))), pytest.raises(http.Unchanged):
        await http.get("https://x/", stop_if_unchanged=True)


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (304, "nothing was asked conditionally"),
        (302, "a redirect that was not followed"),
        (400, "check the arguments"),
        (401, "check the token"),
        (403, "check the token"),
        (404, "check the URL"),
        (429, "poll less often"),
        (500, "a fault of its own"),
    ],
)
async def test_a_status_that_is_no_success_is_an_error_with_advice(status: int, says: str) -> None:
    with context.use(Canned(answer(b"because", status, retry_after="7"))):
        with pytest.raises(TriggerError, match=f"answered {status}.*{says}") as caught:
            await http.get("https://x/")
        assert (await http.get("https://x/", check=False)).status == status
    assert (caught.value.kind, caught.value.detail) == ("http", "because")
    assert caught.value.retry_after == (7 if status == 429 else None)


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        (b"<!doctype html><title>Log in</title>", "text/html", "an HTML page"),
        (b"  <html>", "application/json", "an HTML page"),
        (b'[{"id": 1}, {"id"', "application/json", "application/json: Expecting"),
        (b"", "application/json", "Expecting value"),
        (b"[NaN]", "application/json", "NaN is not JSON"),
        (b"[-Infinity]", "application/json", "Infinity is not JSON"),
        (b"\xff\xfe[1]", "application/json", "decode"),
        (b"[" * 100_000, "application/json", "recursion"),
        (b"[" + b"9" * 5000 + b"]", "application/json", "digits"),
    ],
)
def test_200_with_something_that_is_no_json(body: bytes, kind: str, says: str) -> None:
    with pytest.raises(TriggerError, match=says) as caught:
        answer(body, content_type=kind).json()
    assert caught.value.kind == "junk"
    assert "https://example.com/things?page=1 answered 200, but not with JSON" in str(caught.value)


def test_json_with_a_byte_order_mark() -> None:
    assert answer(b"\xef\xbb\xbf[1]").json() == [1]


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (b"\xfc", "text/plain; charset=iso-8859-1", "ü"),
        (b"\xc3\xbc", "text/plain", "ü"),
        (b"\xfc", "text/plain", "\ufffd"),
        (b"\xc3\xbc", 'text/plain; charset="no-such"', "ü"),
        (b"\xef\xbb\xbfx", "", "x"),
    ],
)
def test_text_by_its_charset(body: bytes, kind: str, text: str) -> None:
    assert answer(body, content_type=kind).text == text


def test_links_to_other_pages() -> None:
    header = (
        '<https://example.com/things?page=2>; rel="next", </things?page=9,10>; rel="last"; title="a, b",'
        ' <?page=1>; rel=prev, <x>; rel="first up", <nothing>; title="no rel"'
    )
    assert answer(link=header).links == {
        "next": "https://example.com/things?page=2",
        "last": "https://example.com/things?page=9,10",
        "prev": "https://example.com/things?page=1",
        "first": "https://example.com/x",
        "up": "https://example.com/x",
    }
    assert answer(link="<" * 5000 + ";" * 3000).links == {}
    assert answer().links == {}


NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("120", 120),
        ("1.5", 1.5),
        ("999999999", 86400),
        (format_datetime(NOW + timedelta(minutes=2), usegmt=True), 120),
        (format_datetime(NOW - timedelta(minutes=2), usegmt=True), 0),
        (format_datetime(NOW + timedelta(days=99), usegmt=True), 86400),
        ("Wednesday, 25-Nov-26 12:02:00 GMT", 120),
        ("-1", None),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after_in_both_forms(text: str, seconds: float | None) -> None:
    assert http.retry_after({"retry-after": text}, NOW) == seconds


def test_secrets_in_a_url_are_not_shown() -> None:
    url = "https://u:pw@x/a?access_token=t&api_key=k&sig=s&page=2&q=a%20b#frag"
    assert redacted(url) == "https://x/a?access_token=***&api_key=***&sig=***&page=2&q=a%20b"
    assert redacted("https://[") == "(not a URL)"


def test_a_script_loads_no_http_client() -> None:
    code = (
        "import sys, watcher.http as http; http.pages.link; http.sync.pages.link;"
        "print('httpx' in sys.modules, 'aiohttp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
