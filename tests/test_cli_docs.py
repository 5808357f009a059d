"""What docs/operations.md says to type can be typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from watcher import metrics
from watcher.cli import VERBS, main

TEXT = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
COMMANDS = sorted(set(re.findall(r"(?:^|[`|(;&] ?|bin/)watcher ((?:[a-z-]+ ?)+)((?:[^`\n#]*))", TEXT, re.M)))


@pytest.mark.parametrize(("words", "rest"), COMMANDS)
def test_a_command_of_the_operations_page_exists(words: str, rest: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb = words.split()[0]
    assert verb in VERBS
    group = [verb, *words.split()[1:2]] if verb in ("state", "variable", "resource", "token") else [verb]
    assert main([*group, "--help"]) == 0
    shown = capsys.readouterr().out
    for option in re.findall(r"(?<!\S)--?[a-z-]+", words + rest):
        assert option in shown, f"watcher {words}{rest}: {option}"


def test_the_page_was_read() -> None:
    assert len(COMMANDS) > 20


def test_every_verb_is_told_of_somewhere_in_the_page() -> None:
    untold = {verb for verb in VERBS if f"watcher {verb}" not in TEXT}
    assert untold <= {"test", "completion", "version", "schema", "resource", "token", "pause", "items"}


def test_the_metrics_to_alert_on_exist() -> None:
    there = {sample.name for metric in metrics.registry.collect() for sample in [metric]}
    for name in re.findall(r"watcher_[a-z_]+", TEXT):
        assert name in there
