"""`watcher object` and what `watcher doctor` says of storages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import cli
from tests.support.cli import Desk

ARCHIVE = """
[storage.secondary.archive]
path = "archive"
"""


@pytest.fixture
def watcher(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    found = cli.desk(tmp_path, capfd, monkeypatch)
    found.configure(ARCHIVE)
    return found


def test_a_file_goes_in_and_comes_out(watcher: Desk) -> None:
    Path("file.csv").write_text("a,b\n")
    watcher("object", "put", "reports/1.csv", "file.csv")
    assert "reports/1.csv: 4 B" in watcher.err
    watcher("object", "put", "other", "file.csv", "--storage", "archive")
    assert (watcher.where / "archive/other").read_text() == "a,b\n"
    assert watcher("object", "get", "reports/1.csv") == "a,b\n"
    watcher("object", "get", "reports/1.csv", "copy.csv")
    assert Path("copy.csv").read_text() == "a,b\n"
    assert [row["key"] for row in watcher.json("object", "ls", "rep")] == ["reports/1.csv"]
    assert "reports/1.csv" in watcher("object", "ls")
    watcher("object", "put", "reports/1.csv", "file.csv", "--new", expect=1)
    assert "already" in watcher.err
    watcher("object", "rm", "reports/1.csv")
    watcher("object", "rm", "reports/1.csv", expect=1)
    assert "there is no object reports/1.csv" in watcher.err
    watcher("object", "ls", "--storage", "backup", expect=1)
    assert "[storage.secondary.backup] (known: archive)" in watcher.err


def test_what_is_missing_here_leaves_no_file_there(watcher: Desk) -> None:
    watcher("object", "get", "none", "copy.csv", expect=1)
    assert not Path("copy.csv").exists()
    watcher("object", "put", "none", "no-such-file", expect=1)
    assert watcher.json("object", "ls") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_puts_belongs_to_the_services_user(watcher: Desk) -> None:
    os.chown(watcher.where, 65534, 65534)
    Path("file").write_text("x")
    watcher("object", "put", "a/b", "file")
    objects = watcher.where / "watcher-data" / "objects"
    assert {path.stat().st_uid for path in (objects, *objects.rglob("*"))} == {65534}


def test_the_doctor_asks_each_storage(watcher: Desk) -> None:
    watcher.configure(
        ARCHIVE + '[storage.secondary.lake]\nkind = "s3"\nresource = "u/admin/lake"\n'
        '[resources."u/admin/lake"]\ntype = "s3"\nvalue = { bucket = "b", accessKey = "k", '
        'secretKey = "shown-to-nobody", '
        'endPoint = "http://127.0.0.1:9" }\n'
    )
    found = {finding["what"]: finding for finding in watcher.json("doctor", expect=1)}
    assert [found[name]["level"] for name in ("storage", "storage archive", "storage lake")] == ["OK", "OK", "FAIL"]
    assert found["storage lake"]["found"] == "bucket b: http://127.0.0.1:9: cannot be reached"
    assert found["storage lake"]["fix"] == "correct [storage.secondary.lake] or its resource"
