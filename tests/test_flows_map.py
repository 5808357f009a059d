"""`map`: another item in the place of the one that was found, for every preset and format alike."""

from __future__ import annotations

import json

import pytest

from tests.support.deliveries import delivery
from watcher.errors import DeliveryError
from watcher.flows import envelope, shape
from watcher.values import Flow

STORY = {"id": 7, "title": "Wal mode", "points": 120, "author": {"name": "ada"}, "html": "<p>…</p>"}


def flow(**more: object) -> Flow:
    return Flow("news", url="https://flow.example.com", **more)  # type: ignore[arg-type]


def test_the_mapped_item_stands_in_the_envelope_with_its_types() -> None:
    news = flow(map={"title": "{{ item.title }}", "points": "{{ item.points }}", "by": "by {{ item.author.name }}"})
    mapped = shape.mapped(news, delivery(item=STORY))
    data = json.loads(envelope.body(news, mapped, "envelope")[0])["data"]
    assert data["item"] == {"title": "Wal mode", "points": 120, "by": "by ada"}
    assert data["key"] == delivery(item=STORY).key


def test_one_expression_picks_a_part() -> None:
    mapped = shape.mapped(flow(map="{{ item.author }}"), delivery(item=STORY))
    assert json.loads(mapped.payload) == {"item": {"name": "ada"}}


def test_what_a_change_was_before_is_not_sent_unmapped() -> None:
    changed = delivery(item=STORY, change="changed", previous=STORY | {"points": 1}, patch=[])
    mapped = shape.mapped(flow(map={"was": "{{ previous.points }}", "now": "{{ item.points }}"}), changed)
    assert json.loads(mapped.payload) == {"item": {"was": 1, "now": 120}}


def test_the_body_template_sees_the_mapped_item() -> None:
    news = flow(map={"line": "{{ item.title }}"}, body={"text": "{{ item.line }}"})
    assert json.loads(envelope.body(news, shape.mapped(news, delivery(item=STORY)), "envelope")[0]) == {
        "text": "Wal mode"
    }


def test_without_map_nothing_is_touched() -> None:
    found = delivery(item=STORY)
    assert shape.mapped(flow(), found) is found


def test_a_map_that_fails_says_where() -> None:
    with pytest.raises(DeliveryError, match=r"flows\.news\.map"):
        shape.mapped(flow(map={"x": "{{ item.points / 0 }}"}), delivery(item=STORY))


def test_a_map_with_a_typo_is_found_beforehand() -> None:
    assert shape.check(flow(map={"x": "{{ itm.title }}"})) == [("map.x", "no such name: itm (did you mean item?)")]
