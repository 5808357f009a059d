"""Filters, bodies and headers written by users: what they may say, and what an item can never make them do."""

from __future__ import annotations

import json
import resource
import time
from typing import Any

import pytest

from tests.support.deliveries import delivery, find, resolved
from watcher.errors import DeliveryError
from watcher.flows import envelope, presets, sandbox, shape
from watcher.values import Flow


def flow(**more: Any) -> Flow:
    return Flow("hook", url="http://127.0.0.1/", **more)


@pytest.mark.parametrize(
    ("text", "item", "passes"),
    [
        ("item.points > 100", {"points": 101}, True),
        ("item.points > 100", {"points": 100}, False),
        ("item.items == 3", {"items": 3}, True),  # the key, not the method of a dict
        ("item.get == 1 and item.keys is none", {"get": 1, "keys": None}, True),
        ("item.missing.deep", {}, False),
        ("item.missing is none", {}, False),  # undefined is not none; `is defined` asks for it
        ("item.missing is defined", {}, False),
        ("change == 'new' and watcher == 'news' and key == '7'", {"id": 7}, True),
        ("previous.price < item.price", {"price": 2}, True),
        ("'sqlite' in item.title | lower", {"title": "SQLite 4"}, True),
        ("item['a b'] and item.tags[0] == 'x'", {"a b": 1, "tags": ["x"]}, True),
    ],
)
def test_a_filter_reads_the_item_by_its_keys(text: str, item: dict[str, Any], passes: bool) -> None:
    assert shape.accepts(flow(filter=text), find(item, previous={"price": 1}), "news") is passes


def test_a_flow_without_a_filter_takes_everything() -> None:
    assert shape.accepts(flow(), find({"id": 1}), "news")


@pytest.mark.parametrize(
    "text",
    [
        "item.title > 3",
        "item.missing > 3",
        "item.tags.append(1)",
        "item.__class__.__mro__",
        "item.title.format.__globals__.os",
        "1 / item.zero",
        "item.title()",
    ],
)
def test_a_filter_that_fails_says_so_and_names_its_flow(text: str) -> None:
    item = {"title": "x", "tags": [], "zero": 0}
    try:
        assert not shape.accepts(flow(filter=text), find(item), "news")  # an attribute that is not there is no value
    except DeliveryError as error:
        assert "flows.hook.filter" in str(error)  # noqa: PT017
    else:
        assert "__" in text


def test_text_of_an_item_is_never_compiled() -> None:
    attack = "{{ 7 * 7 }} {% for a in ().__class__ %}{% endfor %}"
    made = shape.body(flow(body={"text": "{{ item.title }}!"}), delivery({"title": attack}))
    assert made == {"text": attack + "!"}


def test_a_body_keeps_its_shape_and_a_lone_expression_keeps_its_type() -> None:
    template = {
        "text": "{{ item.title }} by {{ watcher }}",
        "points": "{{ item.points }}",
        "whole": "{{ item }}",
        "none": "{{ item.missing }}",
        "number-like": "{{ item.version }}",
        "list": ["{{ key }}", 1, True, None, {"deep": "{{- change -}}"}],
        "two": "{{ 1 }}{{ 2 }}",
        "braces": '{{ "}}" }}',
        "plain": "no template",
    }
    item = {"title": "T", "points": 3, "version": "1e5"}
    assert shape.body(flow(body=template), delivery(item)) == {
        "text": "T by news",
        "points": 3,
        "whole": item,
        "none": None,
        "number-like": "1e5",
        "list": ["1", 1, True, None, {"deep": "new"}],
        "two": "12",
        "braces": "}}",
        "plain": "no template",
    }


def test_a_body_that_is_one_string_is_sent_as_text_and_one_value_as_json() -> None:
    said = envelope.body(flow(body="New: {{ item.title }}"), delivery({"title": "Zürich"}), "envelope")
    assert said == ("New: Zürich".encode(), "text/plain; charset=utf-8")
    made = envelope.body(flow(body="{{ item }}"), delivery({"title": "Zürich"}), "envelope")
    assert made == ('{"title":"Zürich"}'.encode(), "application/json")


@pytest.mark.parametrize(
    "text",
    ["x{{ 'a' * 2000000 }}", "{{ 'a' * 2000000 }}", "{% for a in item.many %}{{ 'aaaaaaaaaa' * 1000 }}{% endfor %}"],
)
def test_a_body_that_grows_without_end_is_stopped(text: str) -> None:
    with pytest.raises(DeliveryError, match="renders"):
        envelope.body(flow(body={"text": text}), delivery({"many": list(range(10_000))}), "envelope")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{{ 'a' * 100000000 }}", "renders more"),
        ("{{ 'a' * item.n }}", "renders more"),
        ("{{ item.many * item.n }}", "renders more"),
        ("{{ 9 ** 9 ** 9 ** 9 ** 9 }}", "bits"),
        ("{{ item.n * item.n ** 40 * item.n ** 99 * item.n ** 99 }}", "bits"),
        ("{{ 'a' | center(item.n) }}", "makes a text"),
        ("{{ 'a'.ljust(item.n) }}", "makes a text"),
        ("{{ 'a'.replace('', 'b' * 900000).replace('b', 'c' * 900000) }}", "renders more"),
        ("{{ '%100000000d' % 1 }}", "width"),
        ("{{ '%*d' % (item.n, 1) }}", "width"),
        ("{{ '%*d' | format(item.n, 1) }}", "makes a text"),
        ("{{ '%*d' | format(9, 1) }}", "width"),
        ("{{ '{:{}}'.format(1, item.n) }}", "width"),
        ("{{ '{:100000000}'.format(1) }}", "width"),
        ("{% for a in item.many %}{% for b in item.many %}{% for c in item.many %}{% endfor %}{% endfor %}{% endfor %}",
         "loops or calls more than"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
         "(loops or calls|takes) more than"),
        ("{% macro f(s) %}{{ f(s ~ s) }}{% endmacro %}{{ f('ab') }}", "makes a text"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
        ("{{ item.many | join('x' * 1000000) }}", "renders more"),
        ("{{ (item.many * 100) | map('string') | join }}", "renders more"),
        ("{{ ('a' * 1000000).join('a' * 1000000) }}", "renders more"),
        ("{{ ([('a' * 1000000)] * item.n) | join }}", "renders more"),
        ("{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}", "renders more"),
        ("{{ ('\\n' * 500000) | indent(1000000, true) }}", "renders more"),
        ("{{ 'a b' | wordwrap(1, wrapstring='c' * 1000000) }}", "renders more"),
        ("{{ item.many | tojson(1000000) }}", "indents"),
        ("{{ ('http://a.b ' * 80000) | urlize(target='a' * 1000000) }}", "attribute"),
        ("{{ ('%(a)s' * 20000) % {'a': 'a' * 1000000} }}", "renders more"),
        ("{{ ('{0}' * 30000).format('a' * 1000000) }}", "renders more"),
        ("{{ ('\\t' * 1000000).expandtabs(1000000) }}", "renders more"),
        ("{{ (5).to_bytes(1000000000, 'big') }}", "no template may"),
        ("{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}", "no template may"),
        ("{{ item.title.encode() }}", "no template may"),
        ("{{ item.title.upper }}", "which JSON has not"),
        ("{{ 1e308 * 10 }}", "JSON cannot hold"),
    ],
)  # fmt: skip
def test_a_template_that_loops_or_makes_a_hundred_megabytes_is_stopped_early(text: str, says: str) -> None:
    item = {"many": list(range(2000)), "n": 10**9, "title": "x"}
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(DeliveryError, match=says):
        envelope.body(flow(body={"text": text}), delivery(item), "envelope")
    assert time.thread_time() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_loop_that_takes_its_time_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.01)
    text = "{% for a in item.many %}{{ item.many | sort | length }}{% endfor %}"
    with pytest.raises(DeliveryError, match="takes more than"):
        shape.body(flow(body=text), delivery({"many": list(range(20_000))}))


def test_loops_know_where_they_are_and_filters_give_lists() -> None:
    body = {
        "said": "{% for t in item.tags %}{{ loop.index }}/{{ loop.length }}{{ t }} {% endfor %}",
        "upper": "{{ item.tags | map('upper') }}",
        "joined": "{{ ', '.join(item.tags) }}!",
        "size": "{{ 'ab' * 3 }}",
        "loud": "{{ 'a'.center(5, '-') }}",
    }  # fmt: skip
    assert shape.body(flow(body=body), delivery({"tags": ["a", "b"]})) == {
        "said": "1/2a 2/2b ", "upper": ["A", "B"], "joined": "a, b!", "size": "ababab", "loud": "--a--"
    }  # fmt: skip


def test_filters_that_are_bounded_still_do_what_they_did() -> None:
    body = {
        "wrapped": "{{ item.text | wordwrap(9) }}",
        "columns": "{{ item.tags | slice(2) | list }}",
        "rows": "{{ item.tags | batch(2) | list }}",
        "joined": "{{ item.people | join('/', attribute='name') }}",
        "plain": "{{ item.tags | join }}",
        "replaced": "{{ item.text | replace('lazy', 'quick') }}",
        "indented": "{{ item.text | indent(2, true) }}",
        "json": "{{ item.people | tojson(1) | length }}",
        "percent": "{{ '%s %5.1f %%' % (item.text, 2) }}",
        "format": "{{ '{} {x}'.format(1, x='y') }}",
        "tabs": "{{ 'a\\tb'.expandtabs(4) }}",
        "list": "{{ [1, 2] * 2 }}",
    }
    item = {"text": "lazy dog sleeps", "tags": ["a", "b", "c"], "people": [{"name": "ada"}, {"name": "bob"}]}
    assert shape.body(flow(body=body), delivery(item)) == {
        "wrapped": "lazy dog\nsleeps", "columns": [["a", "b"], ["c"]], "rows": [["a", "b"], ["c"]],
        "joined": "ada/bob", "plain": "abc", "replaced": "quick dog sleeps", "indented": "  lazy dog sleeps",
        "json": 48, "percent": "lazy dog sleeps   2.0 %", "format": "1 y", "tabs": "a   b", "list": [1, 2, 1, 2],
    }  # fmt: skip


def test_a_filter_is_bounded_as_well() -> None:
    with pytest.raises(DeliveryError, match=r"flows\.hook\.filter: renders more"):
        shape.accepts(flow(filter="'a' * item.n == 'b'"), find({"n": 10**9}), "news")


def test_a_body_template_that_fails_names_its_flow() -> None:
    with pytest.raises(DeliveryError, match=r"flows\.hook\.body failed: TypeError"):
        shape.body(flow(body={"sum": "{{ item.title + 1 }}"}), delivery({"title": "x"}))


def test_header_templates_are_filled_in_and_references_are_sent_as_they_are() -> None:
    made = flow(headers={"X-Key": "k-{{ key }}", "X-Api": "$env:KEY", "X-Fixed": "1"})
    request = presets["http"].request(
        made, delivery(), resolved(made, headers={"X-Api": "{{ not.a.template }}"}), delivery().found_at
    )
    assert request.headers["x-key"] == "k-1"
    assert request.headers["x-api"] == "{{ not.a.template }}"
    assert request.headers["x-fixed"] == "1"


@pytest.mark.parametrize("title", ["a\r\nX-Evil: 1", "a\x00b", "line\nbreak", "snow ☃", "tab\there"])
def test_an_item_cannot_write_a_header_of_its_own(title: str) -> None:
    with pytest.raises(DeliveryError, match=r"flows\.hook\.headers\.X-Title"):
        shape.headers(flow(headers={"X-Title": "{{ item.title }}"}), delivery({"title": title}), but={})
    assert shape.headers(flow(headers={"X-Title": "{{ item.title | urlencode }}"}), delivery({"title": title}), but={})


def test_check_finds_every_mistake_with_its_place_and_a_suggestion() -> None:
    wrong = flow(
        filter="itme.points > 1",
        body={"text": "{{ item.title", "more": [{"x": "{{ wachter }}"}], "fine": "{{ run_id }} {{ found_at }}"},
        headers={"Webhook-Id": "1", "Content-Length": "3", "bad name": "x", "X-Ok": "{{ key }}", "X-Break": "a\nb"},
    )
    found = dict(shape.check(wrong))
    assert found["filter"] == "no such name: itme (did you mean item?)"
    assert "unexpected" in found["body.text"]
    assert found["body.more.0.x"] == "no such name: wachter (did you mean watcher?)"
    assert set(found) == {
        "filter",
        "body.text",
        "body.more.0.x",
        "headers.Webhook-Id",
        "headers.Content-Length",
        "headers.bad name",
        "headers.X-Break",
    }


@pytest.mark.parametrize(
    "text", ["item.points >", "item.a | nofilter", "item.a is notest", "a b", "item.a; item.b", ""]
)
def test_check_refuses_an_expression_that_does_not_compile(text: str) -> None:
    assert shape.check(flow(filter=text))


def test_check_knows_which_filter_was_meant_and_reads_a_header_that_begins_with_a_dollar() -> None:
    assert shape.check(flow(body="{{ item.title | trunctate(9) }}", headers={"X-A": "$5 {{ itm.title }}"})) == [
        ("body", "No filter named 'trunctate'. (did you mean truncate?)"),
        ("headers.X-A", "no such name: itm (did you mean item?)"),
    ]


def test_check_knows_what_map_makes() -> None:
    mapped = {"title": "{{ item.name }}", "points": "{{ item.n }}"}
    body = {
        "a": "{{ item.titel }}",
        "b": "{{ item['points'] }}",
        "c": "{% for item in item.points %}{{ item.x }}{% endfor %}",
    }
    assert shape.check(flow(map=mapped, body=body, headers={"X-A": "{{ item.n }}", "X-B": "$var:u/a/b"})) == [
        ("body.a", "`map` makes no titel (did you mean title?)"),
        ("headers.X-A", "`map` makes no n (it makes points, title)"),
    ]
    assert shape.check(flow(map="{{ item.author }}", body={"a": "{{ item.titel }}"})) == []


def test_check_is_content_with_what_works() -> None:
    assert (
        shape.check(
            flow(filter="item.a and (previous or patch)", body={"x": "{% for t in item.t %}{{ t }}{% endfor %}"})
        )
        == []
    )


def test_names_hold_what_changed() -> None:
    changed = delivery(
        {"p": 2}, previous={"p": 1}, patch=[{"op": "replace", "path": "/p", "value": 2}], change="changed"
    )
    made = shape.body(flow(body={"was": "{{ previous.p }}", "is": "{{ item.p }}", "patch": "{{ patch }}"}), changed)
    assert made == {"was": 1, "is": 2, "patch": json.loads(changed.payload)["patch"]}
