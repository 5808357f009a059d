"""Tables of before and after: what is new, changed and removed, and what is remembered."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import jsonpatch
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.diffing import DATED, KEYED, NOW, WINDMILL, Ledger, entry, ids_of, keys, reasons, told, watching
from watcher import diff, ids
from watcher.errors import TriggerError
from watcher.values import UNSET, FirstRun, Label, Listing, MaxChange, Memory, Seen

CHANGES = ("new", "changed")
ALL = ("new", "changed", "removed")


def a(id: Any, **rest: Any) -> dict[str, Any]:
    return {"id": id, **rest}


# --- the first sight --------------------------------------------------------------------------------------------------


def test_the_first_sight_of_a_source_is_a_baseline() -> None:
    ledger = Ledger()
    first = ledger.see(a(1), a(2))
    assert keys(first) == []
    assert reasons(first) == {"1": "baseline", "2": "baseline"}
    assert keys(ledger.see(a(3), a(1), a(2))) == ["3"]


@pytest.mark.parametrize(
    ("first_run", "expected"),
    [
        (FirstRun(), []),
        (FirstRun("all"), ["1", "2", "3"]),
        (FirstRun("newest", newest=2), ["2", "3"]),
        (FirstRun("newest", newest=0), []),
        (FirstRun("newest", newest=9), ["1", "2", "3"]),
        (FirstRun("since", since="2026-02-02"), ["2", "3"]),
        (FirstRun("since", since="2026-02-02T00:00:01Z"), ["3"]),
    ],
)
def test_first_run_says_what_is_sent_at_first_sight(first_run: FirstRun, expected: list[str]) -> None:
    ledger = Ledger(watching(first_run=first_run), DATED)
    page = [a(n, at=f"2026-02-0{n}T00:00:00Z") for n in (3, 1, 2)]
    assert keys(ledger.see(*page)) == expected
    assert keys(ledger.see(*page)) == []


def test_newest_without_a_cursor_means_the_first_listed() -> None:
    assert keys(Ledger(watching(first_run=FirstRun("newest", newest=2))).see(a("x"), a("y"), a("z"))) == ["x", "y"]


def test_first_run_since_without_a_cursor_is_a_mistake_that_says_what_to_do() -> None:
    for label in (KEYED, WINDMILL):
        with pytest.raises(TriggerError, match="needs a cursor") as caught:
            Ledger(watching(first_run=FirstRun("since", since="2026-01-01")), label).see(a(1))
        assert caught.value.kind == "arguments"


def test_an_empty_source_has_been_seen_too() -> None:
    ledger = Ledger()
    assert not diff.silent(ledger.memory, ledger.look([]))
    ledger.see()
    assert keys(ledger.see(a(1))) == ["1"]


def test_first_run_changed_after_the_baseline_has_no_effect_and_is_reported() -> None:
    ledger = Ledger()
    ledger.see(a(1))
    ledger.configure(first_run=FirstRun("all"))
    again = ledger.see(a(1))
    assert keys(again) == []
    assert 'first_run = "all" has no effect' in again.warnings[0]
    assert diff.silent(ledger.memory, again)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_an_item_without_a_key_is_known_by_its_content() -> None:
    ledger = Ledger()
    ledger.see({"text": "one"})
    found = ledger.see({"text": "one"}, {"text": "two"}, {"text": "two"})
    assert keys(found) == ["#" + ids.content_hash({"text": "two"}).hex()]


def test_one_key_listed_twice_is_one_item() -> None:
    ledger = Ledger(watching(first_run=FirstRun("all")))
    found = ledger.see(a(1), a(2), a(1))
    assert keys(found) == ["1", "2"]
    assert Counter(d.reason for d in found.decisions) == {"new": 2, "duplicate": 1}
    assert found.warnings == ()


def test_different_items_under_one_key_are_reported() -> None:
    found = Ledger(watching(first_run=FirstRun("all"))).see(a(1, t="x"), a(1, t="y"), a(1, t="z"), a(2))
    assert keys(found) == ["1", "2"]
    assert "'1' for 3" in found.warnings[0]


def test_a_shared_key_does_not_flap_with_the_order_of_the_listing() -> None:
    ledger = Ledger(watching(on=CHANGES))
    ledger.see(a(1, t="x"), a(1, t="y"))
    assert keys(ledger.see(a(1, t="y"), a(1, t="x"))) == []


def test_of_two_versions_in_one_listing_the_further_one_counts() -> None:
    ledger = Ledger(watching(on=CHANGES), DATED)
    ledger.see(a(1, at=1, v="old"))
    found = ledger.see(a(1, at=2, v="new"), a(1, at=1, v="old"))
    assert [find.item["v"] for find in found.finds] == ["new"]


# --- changed and removed ----------------------------------------------------------------------------------------------


def test_a_change_carries_the_value_before_and_a_patch() -> None:
    ledger = Ledger(watching(on=CHANGES))
    ledger.see(a(1, price=10))
    (find,) = ledger.see(a(1, price=12)).finds
    assert (find.change, find.previous, find.item) == ("changed", a(1, price=10), a(1, price=12))
    assert find.patch == [{"op": "replace", "path": "/price", "value": 12}]


def test_a_to_b_to_a_is_two_changes_with_ids_of_their_own() -> None:
    ledger = Ledger(watching(on=CHANGES))
    ledger.see(a(1, price=10))
    found = [find for price in (12, 10, 12) for find in ledger.see(a(1, price=price)).finds]
    assert [find.change for find in found] == ["changed"] * 3
    assert len(set(ids_of(found))) == 3


def test_a_change_is_not_an_item_where_only_new_ones_are_asked_for() -> None:
    ledger = Ledger()
    ledger.see(a(1, price=10))
    edited = ledger.see(a(1, price=12))
    assert keys(edited) == []
    assert diff.silent(ledger.memory, edited)


def test_what_is_no_longer_listed_is_removed_once_and_new_when_it_comes_back() -> None:
    ledger = Ledger(watching(on=ALL))
    ledger.see(a(1, t="x"), a(2))
    gone = ledger.see(a(2))
    assert told(gone) == [("removed", "1")]
    assert gone.finds[0].item == a(1, t="x")
    assert told(ledger.see(a(2))) == []
    back = ledger.see(a(1, t="x"), a(2))
    assert told(back) == [("new", "1")]
    assert back.finds[0].revision == 2


@pytest.mark.parametrize("listing", [{"complete": False}, {"capped": True, "complete": False}])
def test_a_listing_that_is_not_whole_removes_nothing(listing: dict[str, bool]) -> None:
    ledger = Ledger(watching(on=ALL))
    ledger.see(a(1), a(2))
    assert told(ledger.see(a(2), **listing)) == []
    assert told(ledger.see(a(2))) == [("removed", "1")]


def test_a_script_that_could_list_from_a_cursor_on_is_asked_for_everything_where_removals_count() -> None:
    ledger = Ledger(watching(on=ALL), DATED)
    ledger.see(a(1, at=1), a(2, at=2))
    assert diff.floor(diff.effective(ledger.watcher, DATED), ledger.memory) is None
    assert told(ledger.see(a(2, at=2))) == [("removed", "1")]


def test_removals_cannot_be_seen_from_a_configured_cursor_on() -> None:
    ledger = Ledger(watching(on=ALL, cursor="at"), DATED)
    ledger.see(a(1, at=1), a(2, at=2))
    found = ledger.see(a(2, at=2))
    assert told(found) == []
    assert "leave out `cursor`" in found.warnings[0]


def test_what_a_script_could_not_see_is_the_gap_of_its_run() -> None:
    ledger = Ledger(watching())
    ledger.see(a(1), gap="3 entries were trimmed")
    assert ledger.look([a(1)], gap="3 entries were trimmed").gap == "3 entries were trimmed"


def test_where_only_removals_count_they_carry_the_last_value() -> None:
    ledger = Ledger(watching(on=("removed",)))
    ledger.see(a(1, v=1), a(2))
    ledger.see(a(1, v=2), a(2), a(3))
    gone = ledger.see(a(2), a(3))
    assert [(find.change, find.item) for find in gone.finds] == [("removed", a(1, v=2))]


def test_an_unchanged_source_proposes_nothing() -> None:
    ledger = Ledger(watching(on=ALL))
    ledger.see(a(1))
    proposed = ledger.look([], unchanged=True)
    assert diff.silent(ledger.memory, proposed)
    assert proposed.memory.known == 1


@pytest.mark.parametrize(
    ("previous", "item"),
    [
        (1, 2),
        ({"a": 1}, {"a": True}),
        ({"a": [1, 2, 3]}, {"a": [3, 1]}),
        ([], {}),
        ({"~/": 1}, {"~/": {"": None}}),
        ({"big": "x" * 300_000}, {"big": "y" * 300_000}),
        ("a", {"b": 1}),
    ],
)
def test_the_patch_leads_from_the_value_before_to_the_value_now(previous: Any, item: Any) -> None:
    ledger = Ledger(watching(on=CHANGES))
    ledger.see(a(1, v=previous))
    (find,) = ledger.see(a(1, v=item)).finds
    assert ids.canonical(jsonpatch.JsonPatch(find.patch).apply(find.previous)) == ids.canonical(find.item)


# --- the cursor -------------------------------------------------------------------------------------------------------


def test_a_second_record_in_the_same_instant_is_found() -> None:
    ledger = Ledger(label=DATED)
    ledger.see(a(1, at=100))
    assert keys(ledger.see(a(1, at=100), a(2, at=100))) == ["2"]


def test_what_is_unknown_below_the_cursor_is_boundary_and_stays_unknown() -> None:
    ledger = Ledger(label=DATED)
    ledger.see(a(5, at=5))
    slid = ledger.see(a(5, at=5), a(4, at=4))
    assert reasons(slid) == {"5": "seen", "4": "boundary"}
    assert diff.silent(ledger.memory, slid)


def test_a_late_record_within_the_lookback_is_found() -> None:
    ledger = Ledger(watching(lookback="15m"), DATED)
    ledger.see(a(0, at="2026-03-01T10:00:00Z"))
    ledger.see(a(1, at="2026-03-01T11:00:00Z"))
    assert diff.floor(diff.effective(ledger.watcher, DATED), ledger.memory) == "2026-03-01T10:45:00Z"
    late = ledger.see(a(1, at="2026-03-01T11:00:00Z"), a(2, at="2026-03-01T10:50:00Z"), a(3, at="2026-03-01T10:44:59Z"))
    assert keys(late) == ["2"]
    assert ledger.memory.cursor == "2026-03-01T11:00:00Z"


def test_a_lookback_does_not_reach_behind_the_baseline() -> None:
    ledger = Ledger(watching(lookback="100"), DATED)
    ledger.see(a(9, at=109), a(8, at=108))
    older = ledger.see(a(9, at=109), a(8, at=108), a(7, at=107))
    assert reasons(older)["7"] == "boundary"


def test_a_date_in_the_future_is_an_item_and_does_not_drag_the_cursor_along() -> None:
    ledger = Ledger(label=DATED)
    ledger.see(a(1, at="2026-03-01T11:00:00Z"))
    future = a(2, at="2099-01-01T00:00:00Z")
    assert keys(ledger.see(future, a(1, at="2026-03-01T11:00:00Z"))) == ["2"]
    assert ledger.memory.cursor == "2026-03-01T11:00:00Z"
    assert keys(ledger.see(future, a(3, at="2026-03-01T11:30:00Z"), a(1, at="2026-03-01T11:00:00Z"))) == ["3"]


def test_an_entry_without_a_date_is_told_by_its_key_alone() -> None:
    ledger = Ledger(label=DATED)
    ledger.see(a(1, at=100), a(2))
    assert keys(ledger.see(a(1, at=100), a(2), a(3))) == ["3"]
    assert ledger.memory.cursor == 100


def test_the_cursor_never_goes_back() -> None:
    ledger = Ledger(label=DATED)
    ledger.see(a(1, at=100))
    ledger.see(a(0, at=50))
    assert ledger.memory.cursor == 100


def test_items_come_oldest_first_by_the_cursor() -> None:
    ledger = Ledger(watching(first_run=FirstRun("all")), DATED)
    assert keys(ledger.see(a("c", at="3"), a("x"), a("b", at="20"), a("a", at="1"))) == ["a", "c", "b", "x"]


def test_two_kinds_of_cursor_are_an_error_and_change_nothing() -> None:
    ledger = Ledger(label=DATED)
    with pytest.raises(TriggerError, match=r"sometimes a number \(1\) and sometimes a date") as caught:
        ledger.see(a(1, at=1), a(2, at="2026-01-01T00:00:00Z"))
    assert caught.value.kind == "junk"
    assert ledger.memory == Memory()


def test_a_cursor_of_another_kind_than_the_one_remembered_says_what_to_do() -> None:
    ledger = Ledger(label=DATED)
    ledger.see(a(1, at=1))
    with pytest.raises(TriggerError, match="watcher state reset"):
        ledger.see(a(2, at="2026-01-01"))


# --- doubts -----------------------------------------------------------------------------------------------------------


def test_an_empty_page_does_not_look_like_removals() -> None:
    ledger = Ledger(watching(on=ALL))
    ledger.see(a(1), a(2), a(3))
    assert "listed nothing at all" in ledger.look([]).quarantine


def test_an_empty_page_is_believed_where_max_change_allows_all() -> None:
    ledger = Ledger(watching(on=ALL, max_change=MaxChange(share=1.0)))
    ledger.see(a(1), a(2))
    assert told(ledger.see()) == [("removed", "1"), ("removed", "2")]


def test_an_empty_page_means_nothing_where_removals_do_not_count() -> None:
    ledger = Ledger()
    ledger.see(a(1), a(2))
    empty = ledger.see()
    assert diff.silent(ledger.memory, empty)
    assert keys(ledger.see(a(1), a(2))) == []


@pytest.mark.parametrize(
    ("limit", "known", "changes", "held"),
    [
        (MaxChange(), 100, 100, False),  # the floor
        (MaxChange(), 100, 101, True),
        (MaxChange(), 1000, 500, False),  # the share
        (MaxChange(), 1000, 501, True),
        (MaxChange(share=None), 100, 5000, False),
        (MaxChange(share=None, count=3), 100, 3, False),
        (MaxChange(share=None, count=3), 100, 4, True),
        (MaxChange(share=0.1, floor=0), 100, 11, True),
    ],
)
def test_more_changes_than_allowed_are_held_back(limit: MaxChange, known: int, changes: int, held: bool) -> None:
    ledger = Ledger(watching(max_change=limit))
    ledger.see(*(a(n) for n in range(known)))
    proposed = ledger.look([*(a(n) for n in range(known)), *(a(f"new {n}") for n in range(changes))])
    assert bool(proposed.quarantine) is held
    assert len(proposed.finds) == changes


def test_a_backlog_after_the_cursor_is_no_upheaval() -> None:
    ledger = Ledger(label=DATED)
    ledger.see(a(0, at=0))
    backlog = ledger.look([a(n, at=n) for n in range(1, 2000)])
    assert backlog.quarantine == ""
    renamed = ledger.look([a(f"x{n}", at=0) for n in range(2000)])
    assert "2000 changes at once" in renamed.quarantine


def test_a_page_without_anything_known_is_a_gap() -> None:
    ledger = Ledger()
    ledger.see(*(a(n) for n in range(20)))
    assert ledger.see(*(a(n) for n in range(10, 30))).gap == ""
    assert "none of the 20" in ledger.see(*(a(n) for n in range(100, 120))).gap


@pytest.mark.parametrize(
    ("listed", "listing", "gap"),
    [
        (range(119, 99, -1), {}, True),  # newest first, and it does not reach the floor
        (range(119, 99, -1), {"capped": True, "complete": False}, True),
        (range(119, 8, -1), {"capped": True, "complete": False}, False),  # it reaches the floor
        (range(100, 120), {}, False),  # oldest first: the rest comes next time
        (range(100, 120), {"capped": True, "complete": False}, False),
        (range(12, 9, -1), {}, False),  # hardly a full page
    ],
)
def test_with_a_cursor_a_gap_is_a_page_that_does_not_reach_the_floor(
    listed: range, listing: dict[str, bool], gap: bool
) -> None:
    ledger = Ledger(label=DATED)
    ledger.see(*(a(n, at=n) for n in range(10)))
    assert bool(ledger.see(*(a(n, at=n) for n in listed), **listing).gap) is gap


# --- the cap ----------------------------------------------------------------------------------------------------------


def test_above_the_cap_items_are_committed_and_sent_later() -> None:
    ledger = Ledger(watching(first_run=FirstRun("all"), max_items=2))
    found = ledger.see(*(a(n) for n in range(5)))
    assert len(found.finds) == 5
    assert [(d.reason, d.note) for d in found.decisions] == [
        ("new", ""), ("new", ""),
        ("over_cap", "new; sent 1 interval later"), ("over_cap", "new; sent 1 interval later"),
        ("over_cap", "new; sent 2 intervals later"),
    ]  # fmt: skip
    assert keys(ledger.see(*(a(n) for n in range(5)))) == []


# --- Windmill scripts -------------------------------------------------------------------------------------------------


def test_what_a_windmill_script_returns_is_new_even_when_it_returns_it_again() -> None:
    ledger = Ledger(label=WINDMILL)
    ledger.see()
    found = [find for _ in range(3) for find in ledger.see(a("disk", full=True)).finds]
    assert [find.revision for find in found] == [1, 2, 3]
    twice = ledger.see(a("disk", full=True), a("disk", full=False))
    assert [find.revision for find in twice.finds] == [4, 5]


def test_the_state_of_a_windmill_script_is_kept_even_if_it_found_nothing() -> None:
    ledger = Ledger(label=WINDMILL)
    ledger.see(state={"last": 1})
    assert ledger.memory.state == {"last": 1}
    assert diff.silent(ledger.memory, ledger.look([], state={"last": 1}))
    moved = ledger.see(state={"last": 2})
    assert not diff.silent(replace(ledger.memory, state={"last": 1}), moved)
    assert ledger.memory.state == {"last": 2}


def test_state_one_and_true_are_two_states() -> None:
    ledger = Ledger(label=WINDMILL)
    ledger.see(state=1)
    assert not diff.silent(ledger.memory, ledger.look([], state=True))


def test_a_rewound_windmill_script_finds_the_same_items_under_the_same_ids() -> None:
    ledger = Ledger(label=WINDMILL)
    ledger.see()
    rows = [a(n, v=n) for n in range(6)]
    first = ledger.see(*rows)
    ledger.rewound = True
    again = [find for half in (rows[:3], rows[3:]) for find in ledger.see(*half).finds]
    assert ids_of(again) == ids_of(first.finds)
    assert ledger.memory.policy["rewound"] is True
    beyond = ledger.see(a(5, v=5), a(6, v=6))
    assert ids_of(beyond.finds) == [*ids_of(first.finds[5:]), ("6", 1, ids.content_hash(a(6, v=6)), "new")]
    assert "rewound" not in ledger.memory.policy


# --- configuration that is edited between two runs --------------------------------------------------------------------


def test_a_changed_key_carries_over_what_was_known_under_the_former_one() -> None:
    ledger = Ledger(watching(on=ALL))
    ledger.see(*(a(n, slug=f"s{n}", v=0) for n in range(3)))
    ledger.configure(key="slug")
    rows = [a(0, slug="s0", v=0), a(1, slug="s1", v=1), a(9, slug="s9", v=0)]
    assert told(ledger.see(*rows)) == [("changed", "s1"), ("new", "s9"), ("removed", "2")]
    assert told(ledger.see(*rows)) == []
    assert told(ledger.see(*rows[:2])) == [("removed", "s9")]


def test_a_changed_key_under_which_nothing_is_recognised_is_held_back() -> None:
    ledger = Ledger(label=Label(style="listing"))  # a callable key, of which only the author knows
    ledger.see(*(a(n) for n in range(3)))
    ledger.label = KEYED
    ledger.seen = {ids.key_hash(f"odd {n}"): replace(row) for n, row in enumerate(ledger.seen.values())}
    assert "`key` was changed" in ledger.look([a(1), a(2)]).quarantine


def test_an_item_without_key_is_recognised_when_it_gets_one() -> None:
    ledger = Ledger(label=Label(style="listing"))
    ledger.seen = {}
    ledger.see({"n": 1}, {"n": 2})
    ledger.configure(key="n")
    assert keys(ledger.see({"n": 1}, {"n": 2}, {"n": 3})) == ["3"]


def test_a_windmill_script_that_was_labelled_later_does_not_flood() -> None:
    ledger = Ledger(label=WINDMILL)
    ledger.see()
    ledger.label = KEYED
    assert "used to say itself what is new" in ledger.look([a(1)]).quarantine
    assert ledger.look([]).quarantine == ""


def test_widening_on_learns_values_without_sending_anything() -> None:
    ledger = Ledger()
    ledger.see(a(1, v=1), a(2, v=1))
    ledger.configure(on=ALL)
    assert keys(ledger.see(a(1, v=2))) == []  # nobody can say what 1 was, and 2 is gone unnamed
    assert told(ledger.see(a(1, v=3))) == [("changed", "1")]


def test_a_new_key_that_on_does_not_ask_for_is_learnt() -> None:
    ledger = Ledger(watching(on=("changed",)))
    ledger.see(a(1, v=1))
    assert keys(ledger.see(a(1, v=1), a(2, v=1))) == []
    assert told(ledger.see(a(1, v=1), a(2, v=2))) == [("changed", "2")]


# --- what the ledger forgot -------------------------------------------------------------------------------------------


def test_after_a_reset_no_id_is_given_to_another_thing() -> None:
    ledger = Ledger(watching(on=CHANGES))
    ledger.see(a(1, v=10))
    before = [find for v in (12, 10) for find in ledger.see(a(1, v=v)).finds]
    ledger.past = {find.key_hash: Seen(find.key_hash, find.content, find.revision, False) for find in before}
    ledger.memory, ledger.seen = Memory(), {}
    ledger.see(a(1, v=10))
    after = [find for v in (12, 10) for find in ledger.see(a(1, v=v)).finds]
    assert not set(ids_of(before)) & set(ids_of(after))


def test_after_a_reset_the_same_thing_keeps_its_id() -> None:
    for label in (KEYED, WINDMILL):
        ledger = Ledger(watching(first_run=FirstRun("all")), label)
        before = ledger.see(a(1)).finds
        ledger.past = {find.key_hash: Seen(find.key_hash, find.content, find.revision, False) for find in before}
        ledger.memory, ledger.seen = Memory(), {}
        assert ids_of(ledger.see(a(1)).finds) == ids_of(before)


def test_what_is_still_listed_is_touched_where_keys_are_forgotten() -> None:
    ledger = Ledger(watching(forget_after=timedelta(days=30)))
    assert len(ledger.see(a(1), a(2)).touch) == 2
    assert ledger.look([a(1), a(3)]).touch == (ids.key_hash("1"), ids.key_hash("3"))
    ledger.configure(forget_after=None)
    assert ledger.look([a(1)]).touch == ()


# --- paging -----------------------------------------------------------------------------------------------------------


def goes_on(ledger: Ledger, *items: Any) -> bool:
    label = diff.effective(ledger.watcher, ledger.label)
    return diff.window(label, ledger.memory, [entry(item, label) for item in items], ledger.seen)


def test_paging_goes_on_until_a_whole_page_is_known() -> None:
    ledger = Ledger()
    assert goes_on(ledger, a(1))  # the first run
    ledger.see(a(1), a(2), a(3))
    assert goes_on(ledger, a(4), a(5))
    assert goes_on(ledger, a(1), a(5))  # a pinned item is no end
    assert not goes_on(ledger, a(1), a(2))
    assert goes_on(ledger)


def test_with_a_cursor_paging_stops_only_below_the_floor() -> None:
    ledger = Ledger(label=DATED)
    ledger.see(*(a(n, at=n) for n in range(1, 10)))
    assert not goes_on(ledger, a(9, at=9), a(8, at=8))
    assert goes_on(ledger, a(10, at=10), a(9, at=9))  # more may share the instant
    assert goes_on(ledger, a(8, at=8), a(9, at=9))  # oldest first: what is new comes on a later page
    assert goes_on(ledger, a(9, at=9))
    ledger.configure(lookback="3")
    assert goes_on(ledger, a(9, at=9), a(8, at=8))  # a late record may stand behind known ones
    assert not goes_on(ledger, a(9, at=9), a(5, at=5))


def test_paging_never_stops_early_where_absence_counts_or_an_edit_may_stand_anywhere() -> None:
    for watcher, label in [
        (watching(on=ALL), KEYED), (watching(on=CHANGES), KEYED), (watching(), WINDMILL),
    ]:  # fmt: skip
        ledger = Ledger(watcher, label)
        ledger.see(a(1), a(2))
        assert goes_on(ledger, a(1), a(2))


# --- properties -------------------------------------------------------------------------------------------------------

ITEMS = st.lists(st.integers(0, 12), max_size=14)
VERSIONS = st.dictionaries(st.integers(0, 8), st.integers(0, 2), max_size=9)
UNLIMITED = MaxChange(share=None)


@settings(deadline=None, max_examples=200)
@given(st.lists(ITEMS, max_size=12))
def test_each_key_is_found_exactly_once_whatever_is_listed_when(listings: list[list[int]]) -> None:
    ledger = Ledger(watching(first_run=FirstRun("all")))
    found: Counter[str] = Counter()
    for listing in listings:
        found.update(keys(ledger.see(*(a(n) for n in listing))))
    assert found == Counter({str(n) for listing in listings for n in listing})


@settings(deadline=None, max_examples=200)
@given(ITEMS, st.lists(ITEMS, max_size=8))
def test_the_baseline_is_never_sent(first: list[int], listings: list[list[int]]) -> None:
    ledger = Ledger()
    ledger.see(*(a(n) for n in first))
    found: Counter[str] = Counter()
    for listing in listings:
        found.update(keys(ledger.see(*(a(n) for n in listing))))
    assert found == Counter({str(n) for listing in listings for n in listing} - {str(n) for n in first})


@settings(deadline=None, max_examples=200)
@given(st.lists(VERSIONS, max_size=12))
def test_replaying_the_changes_rebuilds_the_source(snapshots: list[dict[int, int]]) -> None:
    ledger = Ledger(watching(on=ALL, first_run=FirstRun("all"), max_change=UNLIMITED))
    mirror: dict[str, Any] = {}
    sent = []
    for snapshot in snapshots:
        proposed = ledger.see(*(a(n, v=v) for n, v in snapshot.items()))
        for find in proposed.finds:
            if find.change == "removed":
                assert mirror.pop(find.key) == find.item
            elif find.change == "changed":
                assert mirror[find.key] == find.previous
                assert jsonpatch.JsonPatch(find.patch).apply(find.previous) == find.item
                mirror[find.key] = find.item
            else:
                assert find.key not in mirror
                mirror[find.key] = find.item
        assert mirror == {str(n): a(n, v=v) for n, v in snapshot.items()}
        assert proposed.memory.known == len(mirror)
        sent += ids_of(proposed.finds)
    assert len(sent) == len(set(sent)), "no id is given twice"


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_late_and_tied_records_arrive_once_within_the_lookback(data: st.DataObject) -> None:
    ledger = Ledger(watching(lookback="5"), DATED)
    label = diff.effective(ledger.watcher, DATED)
    world = {0: 100}
    ledger.see(a(0, at=100))
    found: Counter[str] = Counter()
    clock = 100
    for n in range(1, data.draw(st.integers(1, 25))):
        clock += data.draw(st.integers(0, 2))
        world[n] = max(clock - data.draw(st.integers(0, 5)), 100)  # indexed late, and often in the same instant
        if data.draw(st.booleans()):
            since = diff.floor(label, ledger.memory)
            page = [a(k, at=at) for k, at in world.items() if at >= since]
            found.update(keys(ledger.see(*data.draw(st.permutations(page)))))
    found.update(keys(ledger.see(*(a(k, at=at) for k, at in world.items()))))
    late = {str(k) for k, at in world.items() if k and str(k) not in found}
    assert found == Counter({str(k) for k in world if k} - late)
    assert late == set()


@settings(deadline=None, max_examples=100)
@given(st.lists(ITEMS, min_size=1, max_size=6))
def test_a_run_repeated_after_a_crash_proposes_the_same(listings: list[list[int]]) -> None:
    ledger = Ledger(watching(first_run=FirstRun("all"), on=CHANGES))
    for listing in listings:
        items = [a(n, v=len(listing)) for n in listing]
        assert ledger.look(items) == ledger.look(items)
        ledger.see(*items)


def test_listing_one_hundred_thousand_items_is_a_matter_of_seconds() -> None:
    ledger = Ledger(watching(first_run=FirstRun("all")))
    listing = Listing(KEYED, [entry(a(n, title=f"number {n}")) for n in range(100_000)])
    proposed = diff.compare(ledger.watcher, KEYED, Memory(), listing, {}, NOW)
    assert len(proposed.finds) == 100_000
    assert proposed.memory.state is UNSET
