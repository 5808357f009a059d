"""The verbs while no service runs: they open the database themselves, under its lock."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.cli import Desk, desk
from tests.support.postgres import Postgres
from watcher import secrets
from watcher.store import db as store_db


@pytest.fixture
def watcher(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    return desk(tmp_path, capsys, monkeypatch)


Typed = Callable[..., None]


class Terminal(io.StringIO):
    """Somebody at a keyboard."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Typed:
    """What arrives on standard input: from a pipe, or from a person."""

    def give(text: str, person: bool = False) -> None:
        monkeypatch.setattr("sys.stdin", Terminal(text) if person else io.StringIO(text))

    return give


# --- looking at an installation that never ran


def test_before_the_first_run_everything_is_there_to_see(watcher: Desk) -> None:
    found = watcher.json("status")
    assert found["service"] == {"running": False, "pid": None, "started_at": None}
    assert [(w["name"], w["condition"], w["schedule"]) for w in found["watchers"]] == [("one", "new", "every 1h")]
    assert [(f["name"], f["condition"], f["pending"]) for f in found["flows"]] == [("sink", "ok", 0)]
    assert watcher.json("runs") == watcher.json("items") == watcher.json("deliveries") == watcher.json("why", "a") == []
    assert watcher.json("state", "get", "one")["version"] == 0
    assert watcher.json("state", "history", "one") == []


def test_a_name_that_nobody_had_is_a_usage_error_with_a_suggestion(watcher: Desk) -> None:
    watcher("runs", "onee", expect=2)
    assert watcher.err == "error: no such watcher: onee (did you mean one?)\n"
    watcher("deliveries", "--flow", "sinc", expect=2)
    assert "no such flow: sinc (did you mean sink?)" in watcher.err
    watcher("state", "reset", "two", "--yes", expect=2)
    watcher("pause", "two", expect=2)


# --- running


def test_a_plan_says_what_would_be_sent_and_saves_nothing(watcher: Desk) -> None:
    out = watcher("plan", "one")
    assert "new" in out
    assert "a" in out
    assert "sink" in out
    assert watcher.json("items") == []
    assert watcher.json("state", "get", "one")["version"] == 0


def test_a_run_commits_and_its_deliveries_wait_for_the_service(watcher: Desk) -> None:
    record = watcher.json("run", "one")
    assert (record["outcome"], record["watcher"]) == ("ok", "one")
    assert {item["key"] for item in watcher.json("items")} == {"a", "b"}
    assert {d["status"] for d in watcher.json("deliveries", "one")} == {"pending"}
    watcher("items")
    assert '{"id": "a", "n": 1}' in watcher.out
    watcher("deliveries")
    watcher("runs")
    assert "ok" in watcher.out
    details = watcher.json("runs", "--id", str(watcher.json("runs")[0]["id"]))
    assert {item["key"] for item in details["items"]} == {"a", "b"}


def test_exactly_the_plan_is_committed_even_if_the_source_went_on(watcher: Desk) -> None:
    watcher("plan", "one", "--out", "plan.json")
    watcher.lists({"id": "a", "n": 1}, {"id": "b", "n": 1}, {"id": "c", "n": 1})
    assert watcher.json("run", "one", "--plan", "plan.json")["outcome"] == "ok"
    assert {item["key"] for item in watcher.json("items")} == {"a", "b"}
    record = watcher.json("run", "one", "--plan", "plan.json", expect=1)
    assert record["outcome"] == "conflict"


def test_what_is_no_plan_is_refused(watcher: Desk) -> None:
    Path("plan.json").write_text('{"watcher": "one"}')
    watcher("run", "one", "--plan", "plan.json", expect=2)
    assert "that is no plan" in watcher.err
    watcher("run", "one", "--plan", "missing.json", expect=2)
    Path("plan.json").write_text("{")
    watcher("run", "one", "--plan", "plan.json", expect=2)


def test_a_run_that_fails_exits_1_and_shows_the_script_s_own_error(watcher: Desk) -> None:
    Path("listed.json").write_text("[")
    record = watcher.json("run", "one", expect=1)
    assert record["outcome"] == "failed"
    watcher("run", "one", expect=1)
    assert "JSONDecodeError" in watcher.out
    found = watcher.json("status")["watchers"][0]
    assert found["condition"] == "failing"
    assert found["failures"] == 2
    watcher("resume", "one")
    assert watcher.json("status")["watchers"][0]["failures"] == 0


def test_too_much_at_once_is_approved_by_hand(watcher: Desk) -> None:
    watcher.configure(change=lambda text: text.replace('first_run = "all"', "max_change = 2"))
    watcher("run", "one")
    watcher.lists(*({"id": str(n), "n": n} for n in range(10)))
    assert watcher.json("run", "one", expect=1)["outcome"] == "quarantined"
    assert watcher.json("status")["watchers"][0]["condition"] == "quarantined"
    assert watcher.json("items") == []
    assert watcher.json("approve", "one")["outcome"] == "approved"
    assert len(watcher.json("items")) == 12  # ten are new, two are gone
    assert watcher.json("status")["watchers"][0]["condition"] == "ok"


def test_why_tells_the_whole_story_of_a_key(watcher: Desk) -> None:
    watcher("run", "one")
    watcher.lists({"id": "a", "n": 2}, {"id": "b", "n": 1})
    watcher("run", "one")
    out = watcher("why", "a")
    assert "one: a" in out
    assert "new, revision 1" in out
    assert "changed, revision 2" in out
    assert "to sink: pending" in out
    item = watcher.json("why", "a")[0]["items"][0]["id"]
    assert watcher("why", item).splitlines()[:3] == out.splitlines()[:3]
    watcher("why", "nothing")
    assert "nothing is known" in watcher.err


class Site:
    """A source that answers as long as it is there."""

    def __init__(self, items: object) -> None:
        body = json.dumps(items).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


FETCHING = '''"""What a site lists."""
from watcher import http, trigger


@trigger(key="id")
async def main(url: str) -> list[dict]:
    return (await http.get(url)).json()
'''


def test_a_recorded_answer_is_run_against_without_the_source(watcher: Desk) -> None:
    site = Site([{"id": "x"}, {"id": "y"}])
    try:
        Path("fetching.py").write_text(FETCHING)
        url = f"http://127.0.0.1:{site.server.server_port}/"
        watcher.configure(
            f'\n[watchers.site]\ntrigger = "./fetching.py"\nevery = "1h"\nflow = "sink"\nfirst_run = "all"\n'
            f'with = {{ url = "{url}" }}\n'
        )
        planned = watcher.json("plan", "site", "--record", "recording.json")
    finally:
        site.close()
    assert "`watcher test site --recording recording.json`" in watcher.err
    tested = watcher.json("test", "site", "--recording", "recording.json")
    assert [(d["key"], d["reason"]) for d in tested["decisions"]] == [("x", "new"), ("y", "new")]
    assert tested["decisions"] == planned["decisions"]
    watcher("plan", "site", expect=1)
    assert "127.0.0.1" in watcher.err
    watcher("test", "site", "--recording", "listing.py", expect=2)


# --- deliveries


def kill_deliveries(where: Path) -> None:
    with sqlite3.connect(where / "watcher.db") as db:
        db.execute("UPDATE delivery SET status = 2, head = 0")
    db.close()


def test_a_dead_delivery_is_owed_again(watcher: Desk) -> None:
    watcher("run", "one")
    kill_deliveries(watcher.where)
    dead = watcher.json("deliveries", "--status", "dead")
    assert len(dead) == 2
    assert watcher.json("retry", dead[0]["id"]) == {"retried": 1}
    assert watcher.json("status")["flows"][0]["dead"] == 1
    assert watcher.json("retry", dead[1]["item_id"]) == {"retried": 1}
    assert watcher.json("deliveries", "--status", "dead") == []
    watcher("retry", "no-such-id", expect=1)
    assert "no such delivery" in watcher.err


def test_a_bulk_retry_asks_before_more_than_twenty(watcher: Desk, typed: Typed) -> None:
    watcher.lists(*({"id": str(n), "n": n} for n in range(25)))
    watcher("run", "one")
    kill_deliveries(watcher.where)
    typed("")
    watcher("retry", "--flow", "sink", expect=2)
    assert "25 deliveries: add --yes" in watcher.err
    typed("n\n", person=True)
    watcher("retry", "--flow", "sink", expect=1)
    assert "Retry 25 deliveries?" in watcher.err
    assert len(watcher.json("deliveries", "--status", "dead", "--limit", "100")) == 25
    assert watcher.json("retry", "--watcher", "one", "--since", "1h", "--yes") == {"retried": 25}
    assert watcher.json("retry", "--all") == {"retried": 0}


def test_a_paused_flow_and_a_paused_watcher_say_why(watcher: Desk) -> None:
    watcher("pause", "sink", "--flow", "--reason", "they move house")
    watcher("pause", "one", "--reason", "lunch")
    found = watcher.json("status")
    assert (found["flows"][0]["condition"], found["flows"][0]["reason"]) == ("paused", "they move house")
    assert (found["watchers"][0]["condition"], found["watchers"][0]["reason"]) == ("paused", "lunch")
    watcher("resume", "sink", "--flow")
    watcher("resume", "one")
    assert watcher.json("status")["flows"][0]["condition"] == "ok"


# --- state


def test_state_is_set_compared_rolled_back_and_reset(watcher: Desk, typed: Typed) -> None:
    watcher("state", "set", "one", '{"page": 1}')
    typed('{"page": 2}')
    watcher("state", "set", "one", "--if-version", "1")
    assert json.loads(watcher("state", "get", "one")) == {"page": 2}
    assert "version 2" in watcher.err
    assert json.loads(watcher("state", "get", "one", "--version", "1")) == {"page": 1}
    assert '-    "page": 1' in watcher("state", "diff", "one")
    assert watcher.json("state", "diff", "one")["patch"] == [{"op": "replace", "path": "/state/page", "value": 2}]
    watcher("state", "rollback", "one", "1")
    assert json.loads(watcher("state", "get", "one")) == {"page": 1}
    assert [v["version"] for v in watcher.json("state", "history", "one")] == [3, 2, 1]
    watcher("state", "set", "one", "--cursor", "2026-01-01T00:00:00Z")
    assert watcher.json("state", "get", "one")["cursor"] == "2026-01-01T00:00:00Z"
    watcher("state", "set", "one", "--cursor", "17")
    assert watcher.json("state", "get", "one") | {"validators": {}} == {
        "version": 5, "state": {"page": 1}, "cursor": 17, "known": 0, "validators": {},
    }  # fmt: skip
    watcher("state", "reset", "one", "--yes")
    assert watcher.json("state", "get", "one")["version"] == 0


def test_a_state_that_moved_meanwhile_is_not_overwritten(watcher: Desk) -> None:
    watcher("state", "set", "one", "1")
    watcher("state", "set", "one", "2", "--if-version", "0", expect=1)
    assert "one is at version 1, not 0" in watcher.err
    assert watcher("state", "get", "one") == "1\n"
    watcher("state", "get", "one", "--version", "9", expect=69)
    watcher("state", "set", "one", "{", expect=2)


def test_forgetting_everything_is_asked_about(watcher: Desk, typed: Typed) -> None:
    watcher("state", "set", "one", "1")
    typed("")
    watcher("state", "reset", "one", expect=2)
    assert "add --yes" in watcher.err
    typed("y\n", person=True)
    watcher("state", "reset", "one")
    assert watcher.json("state", "get", "one")["version"] == 0


# --- variables, resources, tokens


def test_a_secret_comes_from_stdin_and_lies_encrypted(
    watcher: Desk,
    typed: Typed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    typed("correct horse\n")
    watcher("variable", "set", "u/admin/token", "--secret", expect=1)
    assert "no key" in watcher.err
    monkeypatch.setenv("WATCHER_SECRET_KEY", secrets.new_key())
    typed("correct horse\n")
    watcher("variable", "set", "u/admin/token", "--secret", "--description", "theirs")
    assert watcher.json("variable", "list")[0]["value"] is None
    assert "(secret)" in watcher("variable", "list")
    assert watcher("variable", "get", "u/admin/token") == "correct horse\n"
    assert b"correct horse" not in Path("watcher.db").read_bytes()
    watcher("variable", "set", "u/admin/plain", "x")
    assert watcher("variable", "get", "u/admin/plain") == "x\n"
    watcher("variable", "delete", "u/admin/plain")
    watcher("variable", "get", "u/admin/plain", expect=2)
    watcher("variable", "delete", "u/admin/plain", expect=2)


def test_what_the_file_says_is_shown_and_not_overwritten(watcher: Desk, typed: Typed) -> None:
    typed("{}")
    watcher.configure(
        '\n[variables]\n"u/a/b" = "fixed"\n\n[resources."u/a/r"]\ntype = "github"\nvalue = { token = "t" }\n'
    )
    assert watcher("variable", "get", "u/a/b") == "fixed\n"
    watcher("variable", "set", "u/a/b", "other", expect=2)
    assert "configuration file" in watcher.err
    assert watcher.json("resource", "get", "u/a/r")["value"] == {"token": "t"}
    assert watcher.json("resource", "list", "--type", "github")[0]["source"] == "file"
    watcher("resource", "set", "u/a/r", "--type", "github", expect=2)


def test_a_resource_is_kept_as_it_was_given(watcher: Desk, typed: Typed) -> None:
    typed('{"token": "$var:u/admin/token"}')
    watcher("resource", "set", "u/admin/github", "--type", "github")
    assert json.loads(watcher("resource", "get", "u/admin/github")) == {"token": "$var:u/admin/token"}
    assert watcher.json("resource", "list")[0]["path"] == "u/admin/github"
    watcher("resource", "delete", "u/admin/github")
    watcher("resource", "get", "u/admin/github", expect=2)
    typed("{")
    watcher("resource", "set", "u/admin/github", "--type", "github", expect=2)


def test_a_token_is_shown_once_and_revoked_by_its_label(watcher: Desk) -> None:
    token = watcher("token", "create", "ci", "--scope", "jobs:run", "--expires", "30d").strip()
    assert token.startswith("wtc_")
    assert len(token) > 40
    (listed,) = watcher.json("token", "list")
    assert token.startswith(listed["prefix"])
    assert (listed["label"], listed["scopes"]) == ("ci", ["jobs:run"])
    assert token not in json.dumps(listed)
    assert token.encode() not in Path("watcher.db").read_bytes()
    watcher("token", "revoke", "ci")
    assert watcher.json("token", "list") == []
    watcher("token", "revoke", "ci", expect=2)
    watcher("token", "create", "ci", "--expires", "soon", expect=2)
    for scope in ("job:run", "jobs:rum", "nonsense"):
        watcher("token", "create", "ci", "--scope", scope, expect=2)
        assert f"no such scope: {scope}" in watcher.err
    assert watcher.json("token", "list") == []


# --- out and in again


def test_old_backups_make_room_for_new_ones_and_others_are_left_alone(watcher: Desk) -> None:
    watcher("run", "one")
    folder = watcher.where / "watcher-data" / "backups"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"watcher-2026010{day}T030000Z.db" for day in range(1, 6)]
    for name in [*names, "before-upgrade-20250101T000000.0.db", "watcher-mine.db"]:
        (folder / name).touch()
    new = Path(watcher("backup", "--keep", "3").strip()).name
    assert {file.name for file in folder.iterdir()} == {
        *names[-2:], new, "before-upgrade-20250101T000000.0.db", "watcher-mine.db",
    }  # fmt: skip
    watcher("backup", "here.db", "--keep", "3", expect=2)


def test_a_backup_comes_back_with_new_ids_and_the_old_database_aside(watcher: Desk) -> None:
    watcher("run", "one")
    before = {item["key"]: item["id"] for item in watcher.json("items")}
    file = watcher("backup", "copy.db").strip()
    assert os.stat(file).st_mode & 0o777 == 0o600
    watcher("backup", "copy.db", expect=1)
    assert "already there" in watcher.err
    watcher("state", "reset", "one", "--yes")
    watcher("restore", "copy.db", expect=2)
    assert "--yes" in watcher.err
    done = watcher.json("restore", "copy.db", "--yes")
    assert Path(done["aside"]).exists()
    assert watcher.json("state", "get", "one")["version"] == 1
    watcher("state", "reset", "one", "--yes")
    watcher("run", "one")
    after = {item["key"]: item["id"] for item in watcher.json("items", "--limit", "2")}
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())


def test_everything_goes_out_as_lines_and_into_an_empty_database(
    watcher: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher("run", "one")
    watcher("export", "all.jsonl")
    lines = Path("all.jsonl").read_text().splitlines()
    assert watcher("export").splitlines() == lines
    monkeypatch.setenv("WATCHER_DATABASE", "sqlite:///other.db")
    watcher("import", "all.jsonl")
    assert {item["key"] for item in watcher.json("items")} == {"a", "b"}
    watcher("import", "all.jsonl", expect=69)
    assert "in use" in watcher.err
    Path("cut.jsonl").write_text("\n".join(lines[:-1]))
    monkeypatch.setenv("WATCHER_DATABASE", "sqlite:///third.db")
    watcher("import", "cut.jsonl", expect=69)
    assert "damaged or cut short" in watcher.err


def test_a_database_that_another_process_holds_is_left_alone(watcher: Desk) -> None:
    watcher("status")
    with store_db.lock(f"sqlite:///{watcher.where}/watcher.db"):
        watcher("pause", "one", expect=69)
        assert f"in use by process {os.getpid()}" in watcher.err
        watcher("status")  # reading does no harm


def test_a_database_that_is_none_is_not_touched(watcher: Desk) -> None:
    Path("watcher.db").write_bytes(b"not a database, " * 1000)
    watcher("status", expect=69)
    assert "watcher restore" in watcher.err
    assert Path("watcher.db").read_bytes() == b"not a database, " * 1000


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_makes_belongs_to_the_service_s_user(watcher: Desk) -> None:
    """Else a service that runs as that user could not write its own database any more."""
    os.chown(watcher.where, 65534, 65534)
    watcher("pause", "one")
    watcher("backup")
    made = [*watcher.where.glob("watcher.db*"), *(watcher.where / "watcher-data").rglob("*")]
    assert {path.stat().st_uid for path in made} == {65534}
    watcher("restore", str(next((watcher.where / "watcher-data" / "backups").glob("*.db"))), "--yes")
    assert {path.stat().st_uid for path in watcher.where.glob("watcher.db*")} == {65534}


# --- doctor


def test_the_doctor_finds_a_flow_that_does_not_answer(watcher: Desk) -> None:
    found = {finding["what"]: finding for finding in watcher.json("doctor")}
    assert found["flow sink"]["level"] == "WARN"
    assert "127.0.0.1:1" in found["flow sink"]["found"]
    assert found["configuration"]["level"] == "OK"
    assert all(finding["fix"] for finding in found.values() if finding["level"] != "OK")


def test_the_doctor_tells_a_bad_configuration_from_a_broken_script(watcher: Desk) -> None:
    Path("listing.py").write_text("def main(:\n")
    watcher("doctor", expect=78)
    assert "FAIL  trigger" in watcher.out
    Path("watcher.toml").write_text("[watchers")
    watcher("doctor", expect=78)
    assert "FAIL  configuration" in watcher.out


def test_the_doctor_misses_the_key_of_stored_secrets(
    watcher: Desk,
    typed: Typed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WATCHER_SECRET_KEY", watcher("doctor", "--new-key").strip())
    typed("x")
    watcher("variable", "set", "u/a/b", "--secret")
    watcher("doctor")
    monkeypatch.delenv("WATCHER_SECRET_KEY")
    watcher("doctor", expect=78)
    assert "no key to read them" in watcher.out
    monkeypatch.setenv("WATCHER_SECRET_KEY", secrets.new_key())
    watcher("doctor", expect=78)
    assert "u/a/b was encrypted with another key" in watcher.out


def test_the_doctor_tells_of_a_secret_that_was_altered_as_the_service_does(
    watcher: Desk,
    typed: Typed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WATCHER_SECRET_KEY", secrets.new_key())
    typed("x")
    watcher("variable", "set", "u/a/b", "--secret")
    with closing(sqlite3.connect(next(watcher.where.glob("*.db")))) as db:
        db.execute("UPDATE variable SET value = substr(value, 1, 20) || 'AAAA' || substr(value, 25)")
        db.commit()
    watcher("doctor", expect=78)
    assert "u/a/b: its stored value was altered" in watcher.out
    typed("x")
    watcher("variable", "set", "u/a/b", "--secret")  # as it advises
    watcher("doctor")


def test_known_bad_versions_of_sqlite_are_named() -> None:
    from watcher.cli.doctor import _sqlite

    levels = {
        version: _sqlite(version).level for version in ((3, 40, 1), (3, 51, 3), (3, 50, 7), (3, 44, 6), (3, 51, 2))
    }
    assert levels == {(3, 40, 1): "WARN", (3, 51, 3): "OK", (3, 50, 7): "OK", (3, 44, 6): "OK", (3, 51, 2): "WARN"}
    assert _sqlite((3, 30, 0)).level == "FAIL"


# --- check, init, schema


def test_every_mistake_is_told_at_once_with_its_place(watcher: Desk) -> None:
    watcher("check")
    watcher.configure('\n[watchers.two]\ntrigger = "./listing.py"\nevery = "5 parsecs"\nflow = "sinc"\n')
    watcher("check", expect=78)
    assert "watcher.toml:" in watcher.err
    assert "did you mean sink" in watcher.err
    found = watcher.json("check", expect=78)
    assert {m["where"] for m in found["mistakes"]} == {"watchers.two.every", "watchers.two.flow"}
    assert all(m["line"] for m in found["mistakes"])


def test_arguments_are_held_against_the_script_s_signature(watcher: Desk) -> None:
    watcher.configure(change=lambda text: text.replace("with = { file =", "with = { fiel ="))
    watcher("check", expect=78)
    assert "fiel" in watcher.err
    assert "file" in watcher.err


def test_where_a_value_came_from_can_be_asked(watcher: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHER_LOGGING__LEVEL", "warning")
    assert "WATCHER_LOGGING__LEVEL" in watcher("check", "--show-origin")


def test_what_init_writes_is_good_and_is_never_overwritten(watcher: Desk) -> None:
    watcher("init", "demo")
    watcher("check", "-c", "demo/watcher.toml")
    Path("demo/announce.py").write_text("mine")
    watcher("init", "demo", expect=2)
    assert "--force" in watcher.err
    assert Path("demo/announce.py").read_text() == "mine"
    assert json.loads(Path("demo/watcher.schema.json").read_text()) == json.loads(watcher("schema"))


def test_reload_without_a_service_says_so(watcher: Desk) -> None:
    watcher("reload", expect=69)
    assert "no service is running" in watcher.err


# --- PostgreSQL


def test_the_verbs_work_the_same_on_postgresql(watcher: Desk, postgres: Postgres) -> None:
    url = postgres.create()
    watcher.configure(change=lambda text: f'database = "{url}"\n{text}')
    assert watcher.json("status")["watchers"][0]["condition"] == "new"
    assert watcher.json("run", "one")["outcome"] == "ok"
    watcher("pause", "one", "--reason", "lunch")
    assert watcher.json("status")["watchers"][0]["condition"] == "paused"
    watcher("state", "set", "one", '{"page": 2}')
    assert watcher.json("state", "diff", "one")["patch"]
    assert watcher.json("why", "a")[0]["deliveries"][0]["status"] == "pending"
    kept = Path(watcher("backup").strip())
    assert kept.suffix == ".jsonl"
    watcher("state", "reset", "one", "--yes")
    watcher("restore", str(kept), "--yes")
    assert json.loads(watcher("state", "get", "one")) == {"page": 2}
    watcher("export", "all.jsonl")
    watcher.configure()
    watcher("import", "all.jsonl")
    assert {item["key"] for item in watcher.json("items")} == {"a", "b"}
    postgres.drop(url)


def test_a_database_server_that_does_not_answer_exits_69_without_its_password(watcher: Desk) -> None:
    watcher.configure(change=lambda text: f'database = "postgresql://ada:correcthorse@127.0.0.1:1/none"\n{text}')
    watcher("status", expect=69)
    assert "does not answer" in watcher.err
    assert "correcthorse" not in watcher.err
    watcher("doctor", expect=69)
    assert "correcthorse" not in watcher.out
