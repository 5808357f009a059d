"""Each way in which a configuration can be wrong, where the mistake is pointed at, and what is said to do."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.config import GOOD, load, mistakes, write
from watcher import config
from watcher.errors import ConfigError

EXAMPLE = (Path(__file__).parent.parent / "config.example.toml").read_text()


@dataclass(frozen=True)
class Bad:
    """``text`` with a mistake at the sign ¶ (which is taken out), said in ``message``, and what ``hint`` advises."""

    text: str
    message: str
    hint: str = ""
    where: str = ""


def flow(line: str) -> str:
    return GOOD.replace('url = "https://hooks.example.com/notify"', f'url = "https://hooks.example.com/notify"\n{line}')


def url(value: str) -> str:
    return GOOD.replace('"https://hooks.example.com/notify"', f'¶"{value}"')


def watcher(line: str) -> str:
    return GOOD + line + "\n"


def every(lines: str) -> str:
    return GOOD.replace('every = "5m"', lines)


BAD = {
    # the text itself
    "a value without quotes": Bad("a = 1\nb = ¶hello\n" + GOOD, "not a TOML value", "quotes"),
    "a key without a value": Bad(GOOD + "jitter¶\n", "a key without a value", "key = value"),
    "a text that does not end": Bad(GOOD.replace('"5m"', '"5m¶'), "illegal character"),
    "a list that does not end": Bad(
        GOOD.replace('flow = "notify"', 'flow = ["notify"').replace("with", "¶with"), "unclosed"
    ),
    "a table twice": Bad(GOOD + '\n[¶server]\nbind = "127.0.0.1:1"\n', "[server] is there twice", "on line 3"),
    "a key twice": Bad(GOOD + '¶every = "6m"\n', "given a value before"),
    "a NUL byte": Bad(GOOD.replace('"sqlite:///w.db"', '"sqlite:///w¶\0.db"'), "illegal character"),
    "a table of the wrong kind": Bad("[watchers]\nhello = ¶3\n", "must be a table", where="watchers.hello"),
    "a table that is a list": Bad("[[¶flows]]\n" + 'url = "https://a.example/"\n', "must be a table"),
    # options
    "an unknown option at the top": Bad("¶databse = 'sqlite:///w.db'\n", "no such option", "did you mean database?"),
    "an unknown table": Bad(GOOD + "[¶watcher.x]\n", "no such option", "did you mean watchers?"),
    "an unknown option of a flow": Bad(flow("¶at_onec = 3"), "no such option", "did you mean at_once?"),
    "an option of another preset": Bad(flow('¶kind = "flow"'), "no such option", where="flows.notify.kind"),
    "an unknown option of a watcher": Bad(watcher("¶timout = '3s'"), "no such option", "did you mean timeout?"),
    "an option that has another name here": Bad(watcher("¶args = {}"), "no such option", "did you mean with?"),
    "an unknown option of the server": Bad(GOOD.replace("bind", "¶bnid"), "no such option", "did you mean bind?"),
    "a missing trigger": Bad(GOOD.replace('trigger = "git"\n', "").replace("[w", "[¶w"), "`trigger` is required"),
    "a missing flow": Bad(GOOD.replace('flow = "notify"\n', "").replace("[w", "[¶w"), "`flow` is required"),
    "a missing url": Bad("[¶flows.x]\n", "`url` is required", "steps"),
    "a missing option of a preset": Bad(
        flow('preset = "windmill"').replace("[flows", "[¶flows"), "`path` is required", "f/news/summarise"
    ),
    "text for a number": Bad(flow('at_once = ¶"8"'), "must be a whole number"),
    "a fraction for a number": Bad(flow("at_once = ¶1.5"), "must be a whole number"),
    "a number for a text": Bad(GOOD.replace('"127.0.0.1:0"', "¶8321"), "must be text, in quotes"),
    "text for true or false": Bad(watcher('enabled = ¶"yes"'), "must be true or false"),
    "a list for a table": Bad(GOOD.replace('{ repo = "." }', "¶[1]"), "must be a table"),
    "a number for a list": Bad(watcher("on = ¶1"), "must be a list"),
    "nothing at once": Bad(flow("at_once = ¶0"), "must be 1 or more"),
    "a word that is not among those allowed": Bad(flow('order = ¶"kye"'), '"key", "watcher", "none"', "mean key?"),
    "a change that does not exist": Bad(watcher('on = [¶"delete"]'), '"new", "changed", "removed"'),
    "a change twice": Bad(watcher('on = ¶["new", "new"]'), "twice"),
    "no change at all": Bad(watcher("on = ¶[]"), "must not be empty"),
    # names
    "a watcher's name with a space": Bad(GOOD.replace("[watchers.commits]", '[¶watchers."my commits"]'), "not a name"),
    "a flow's name with a slash": Bad(GOOD + '[¶flows."a/b"]\nurl = "https://a.example/"\n', "not a name"),
    "a variable's path of one part": Bad(GOOD + '[variables]\n¶token = "x"\n', "not a path: write it like"),
    "a resource's path that climbs": Bad(GOOD + '[¶resources."u/../b c"]\ntype = "x"\nvalue = 1\n', "not a path"),
    # times
    "a duration without a unit": Bad(every("every = ¶300"), 'has a unit: write "300s"'),
    "a duration in words": Bad(every('every = ¶"5 minutes"'), "is not a duration"),
    "a negative duration": Bad(every('every = ¶"-5m"'), "is not a duration"),
    "an interval of nothing": Bad(every('every = ¶"0s"'), "must be 100ms or more"),
    "an endless interval": Bad(every('every = ¶"9999w"'), "at most ten years"),
    "both every and cron": Bad(every('every = "5m"\n¶cron = "* * * * *"'), "either every or cron", "remove one"),
    "neither every nor cron": Bad(every("").replace("[w", "[¶w"), "`every` or `cron` is required"),
    "a cron minute of 61": Bad(every('cron = ¶"61 * * * *"'), "the minute (61) is not valid"),
    "cron with seconds": Bad(every('cron = ¶"* * * * * *"'), "five fields, this has 6", 'every = "30s"'),
    "cron with four fields": Bad(every('cron = ¶"* * * *"'), "five fields, this has 4"),
    "a cron word that does not exist": Bad(every('cron = ¶"@dayly"'), "no such word", "did you mean @daily?"),
    "a day that never comes": Bad(every('cron = ¶"0 0 30 2 *"'), "day"),
    "a time zone that does not exist": Bad(
        every('cron = "* * * * *"\ntimezone = ¶"Europe/Pariss"'), "no such time zone", "did you mean Europe/Paris?"
    ),
    "a time zone without cron": Bad(watcher('¶timezone = "Europe/Paris"'), "means nothing without cron"),
    "a jitter longer than the interval": Bad(watcher('jitter = ¶"6m"'), "shorter than `every`"),
    # watchers
    "a flow that does not exist": Bad(GOOD.replace('"notify"', '¶"notfy"'), "no such flow", "did you mean notify?"),
    "a flow in a list that does not exist": Bad(
        GOOD.replace('flow = "notify"', 'flow = ["notify", ¶"notfy"]'), "no such flow", "did you mean notify?"
    ),
    "the same flow twice": Bad(GOOD.replace('flow = "notify"', 'flow = ¶["notify", "notify"]'), "the same flow twice"),
    "no flow": Bad(GOOD.replace('flow = "notify"', "flow = ¶[]"), "must not be empty"),
    "a trigger that does not exist": Bad(GOOD.replace('"git"', '¶"gti"'), "no such trigger", "did you mean git?"),
    "a script that does not exist": Bad(GOOD.replace('"git"', '¶"./nothing.py"'), "no such file", "relative"),
    "a script that is a folder": Bad(GOOD.replace('"git"', '¶"./"'), "is a directory"),
    "a script with NUL in its name": Bad(GOOD.replace('"git"', '¶"./a\\u0000.py"'), "no such file"),
    "a key that is no JMESPath": Bad(watcher('key = ¶"a..b"'), "not a JMESPath expression"),
    "a cursor that is no JMESPath": Bad(watcher('cursor = ¶"[unclosed"'), "not a JMESPath expression"),
    "an unknown first run": Bad(watcher('first_run = ¶"newest"'), "newest:N"),
    "a first run of nothing": Bad(watcher('first_run = ¶"newest:0"'), "newest:N"),
    "a silence of no length": Bad(watcher('silent_after = ¶"never"'), '"auto" or "off"'),
    "a silence of a moment": Bad(watcher('silent_after = ¶"10s"'), "a minute at least"),
    "a host with a scheme": Bad(
        GOOD.replace("[server]\n", '[server]\nhosts = [¶"http://x"]\n'), "is not the name of a host"
    ),
    "a share of more than all": Bad(watcher('max_change = ¶"150%"'), "a share of the known keys"),
    "a lookback that is neither": Bad(watcher('lookback = ¶"soon"'), "a duration"),
    "a size in words": Bad(watcher('memory_limit = ¶"lots"'), "a size is text"),
    "too little memory": Bad(watcher('memory_limit = ¶"1MB"'), "must be 16MiB or more"),
    "an infinite argument": Bad(GOOD.replace('"."', "inf").replace("{ r", "¶{ r"), "nan and inf"),
    "a name that it has": Bad(watcher('was = ¶"commits"'), "cannot have been called"),
    "a name of another watcher": Bad(
        GOOD + 'was = ¶"b"\n[watchers.b]\ntrigger = "git"\nevery = "1m"\nflow = "notify"\n', "still a watcher"
    ),
    "two watchers that were one": Bad(
        GOOD + 'was = "old"\n[watchers.b]\ntrigger = "git"\nevery = "1m"\nflow = "notify"\nwas = ¶"old"\n',
        "was old too",
    ),
    # flows
    "a url of another scheme": Bad(url("ftp://a.example/"), "must begin with https:// or http://"),
    "a url without a scheme": Bad(url("hooks.example.com/x"), "must begin with", "https://hooks.example.com/x"),
    "a url without a host": Bad(url("https:///x"), "names no host"),
    "a url with a space": Bad(url("https://a.example/a b"), "spaces or control characters", "a%20b"),
    "a url with a line break": Bad(url("https://a.example/\\nHost: b"), "control characters"),
    "a url with a bad port": Bad(url("https://a.example:99999/"), "not a URL"),
    "a url with a password": Bad(url("https://u:p@a.example/"), "user name or a password", "`user` and `password`"),
    "a url with a fragment": Bad(url("https://a.example/#x"), "#fragment"),
    "a preset that does not exist": Bad(flow('preset = ¶"windmil"'), "no such preset", "did you mean windmill?"),
    "a method that does not exist": Bad(flow('method = ¶"FETCH"'), '"POST"'),
    "a rate without a span": Bad(flow('rate = ¶"10"'), "a rate is text"),
    "a rate of nothing": Bad(flow('rate = ¶"0/s"'), "a rate is text"),
    "a filter that cannot be read": Bad(flow('filter = ¶"item.points >"'), "", where="flows.notify.filter"),
    "a filter over an unknown name": Bad(flow('filter = ¶"itm.points > 1"'), "no such name: itm", "did you mean item"),
    "a body that cannot be read": Bad(flow('body = { text = ¶"{{ item.title" }'), "", where="flows.notify.body.text"),
    "a body over an unknown name": Bad(flow('body = { a = ["{{ item.x }}", ¶"{{ titel }}"] }'), "no such name: titel"),
    "a header with a line break": Bad(flow('headers = { X-A = ¶"a\\r\\nX-B: c" }'), "no line breaks"),
    "a header that is no name": Bad(flow('headers = { "X A" = ¶"a" }'), "not the name of a header"),
    "a header of our own": Bad(flow('headers = { webhook-id = ¶"a" }'), "sets this header itself"),
    "a header that smuggles": Bad(flow('headers = { Content-Length = ¶"0" }'), "sets this header itself"),
    "a secret that is too short": Bad(flow('secret = ¶"whsec_c2hvcnQ="'), "24 to 64 random bytes"),
    "a secret that is no base64": Bad(flow('secret = ¶"whsec_***"'), "base64"),
    "a second secret that is too short": Bad(
        flow('secret = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", ¶"whsec_c2hvcnQ="]'), "24 to 64 random bytes"
    ),
    "a timeout longer than the lease": Bad(flow('timeout = ¶"2m"'), "a lease of 1m30s", '"2m5s"'),
    "a local flow with a url": Bad(flow('steps = ["watcher.toml"]').replace("url", "¶url"), "either url or steps"),
    "a local flow without a server": Bad('[flows.x]\nsteps = ¶["watcher.toml"]\n', "needs the [server] table"),
    "a step that does not exist": Bad(GOOD + '[flows.x]\nsteps = [¶"nothing.py"]\n', "no such file"),
    "a local flow with a preset": Bad(
        GOOD + '[flows.x]\nsteps = ["watcher.toml"]\n¶preset = "windmill"\npath = "f/a"\n', "a local flow has no preset"
    ),
    # references
    "a variable of the environment that is not set": Bad(flow('token = ¶"$env:NOTHING"'), "NOTHING is not set"),
    "the database from an unset variable": Bad('database = ¶"$env:NOTHING"\n', "NOTHING is not set"),
    "a stored variable where there is no store yet": Bad('database = ¶"$var:u/a/b"\n', "not open yet", "$env:"),
    "a file that is not there": Bad(flow('token = ¶"$file:nothing.txt"'), "no such file"),
    "a reference to no path": Bad(flow('token = ¶"$var:token"'), "is not a path", "$var:u/admin/name"),
    # service
    "a database of another kind": Bad('database = ¶"mysql://a/b"\n', "sqlite:/// or postgresql://"),
    "a database in memory": Bad('database = ¶"sqlite:///:memory:"\n', "must name a file"),
    "a PostgreSQL without a database": Bad('database = ¶"postgresql://host"\n', "names no database"),
    "an address without a port": Bad(GOOD.replace('"127.0.0.1:0"', '¶"127.0.0.1"'), "host:port"),
    "a port that does not exist": Bad(GOOD.replace("127.0.0.1:0", "127.0.0.1:70000").replace('"127', '¶"127'), "host"),
    "IPv6 without brackets": Bad(GOOD.replace('"127.0.0.1:0"', '¶"::1:8321"'), "in brackets", "[::1]:8321"),
    "an empty schedule": Bad(GOOD + "[delivery]\nschedule = ¶[]\n", "must not be empty"),
    "a schedule in words": Bad(GOOD + '[delivery]\nschedule = ["5s", ¶"later"]\n', "is not a duration"),
    "a level that does not exist": Bad(GOOD + '[logging]\nlevel = ¶"inf"\n', "must be one of", "did you mean info?"),
    "a resource without a type": Bad(GOOD + '[¶resources."u/a/b"]\nvalue = 1\n', "`type` is required"),
    # storages
    "a storage of no kind": Bad(GOOD + '[storage]\nkind = ¶"minio"\n', "must be one of", where="storage.kind"),
    "a folder with a resource": Bad(GOOD + '[storage]\n¶resource = "u/a/b"\n', "a path and no resource", "s3"),
    "a bucket with a path": Bad(
        GOOD + '[storage]\nkind = "s3"\nresource = "u/a/b"\n¶path = "x"\n', "a resource and no path", "folder"
    ),
    "a bucket without a resource": Bad(GOOD + '[¶storage]\nkind = "gcs"\n', "`resource` is required", "u/admin/bucket"),
    "a resource of another type": Bad(
        GOOD + '[storage]\nkind = "s3"\nresource = ¶"u/a/b"\n[resources."u/a/b"]\ntype = "github"\nvalue = {}\n',
        "of type github, not s3",
    ),
    "a resource from the environment": Bad(
        GOOD + '[storage]\nkind = "s3"\nresource = ¶"$env:BUCKET"\n', "names no resource", "path"
    ),
    "a resource that is no path": Bad(GOOD + '[storage]\nkind = "s3"\nresource = ¶"bucket"\n', "is not a path"),
    "a folder that is a file": Bad(GOOD + '[storage]\npath = ¶"/dev/null/x"\n', "is a file, not a directory"),
    "a folder around everything": Bad(GOOD + '[storage]\npath = ¶"."\n', "the service's own files", "directory"),
    "a folder in a folder": Bad(
        GOOD + '[storage]\npath = ¶"files"\n[storage.secondary.archive]\npath = "files/old"\n',
        "holds the storage archive",
    ),
    "no storage, but public": Bad(GOOD + '[storage]\nkind = "none"\n¶public = true\n', "no storage", "remove"),
    "a rule that allows what there is not": Bad(
        GOOD + '[storage]\npermissions = [{ pattern = "**", allow = ¶"read,wirte" }]\n', "read, write, delete and list"
    ),
    "a rule with an unknown variable": Bad(
        GOOD + '[storage]\npermissions = [{ pattern = ¶"u/{user}/**", allow = "" }]\n',
        "there is no variable {user}",
        "{username}",
    ),
    "a rule with a misspelt option": Bad(
        GOOD + '[storage]\npermissions = [{ ¶patern = "**", allow = "" }]\n', "no such option", "pattern"
    ),
    "a secondary folder without a path": Bad(GOOD + "[¶storage.secondary.archive]\n", "`path` is required"),
    "a secondary storage that is none": Bad(
        GOOD + '[storage.secondary.archive]\nkind = ¶"none"\n', "must be one of", where="storage.secondary.archive.kind"
    ),
    "a secondary storage with a bound": Bad(
        GOOD + '[storage.secondary.archive]\npath = "x"\n¶max_upload = "1MB"\n', "no such option"
    ),
    "an upload of nothing": Bad(GOOD + '[storage]\nmax_upload = ¶"1B"\n', "1KiB or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_found_where_it_stands(tmp_path: Path, name: str) -> None:
    bad = BAD[name]
    before, sign, _ = bad.text.partition("¶")
    line, column = before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1
    found = mistakes(tmp_path, bad.text.replace("¶", ""))
    assert sign
    mine = [m for m in found if bad.message.lower() in m.message.lower() and bad.where in m.where]
    assert mine, found
    assert (mine[0].line, mine[0].column) == (line, column), mine
    assert bad.hint in mine[0].hint
    assert len(found) <= 2 if "a = 1" not in bad.text else True, found
    shown = config.render(ConfigError(found))
    assert f"watcher.toml:{line}:{column}: " in shown
    assert "Traceback" not in shown


def test_there_are_many() -> None:
    assert len(BAD) >= 100


# --- files that are none ----------------------------------------------------------------------------------------------


def refusal(file: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(file, environ={})
    assert caught.value.exit_code == 78
    return config.render(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no such configuration file" in refusal(tmp_path / "none.toml")
    assert "watcher init" in refusal(tmp_path / "none.toml")


def test_a_folder(tmp_path: Path) -> None:
    assert "is a directory, not a file" in refusal(tmp_path)


def test_a_pipe_without_a_writer_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal(tmp_path / "pipe")


def test_a_link_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert "cannot be read: Too many levels of symbolic links" in refusal(tmp_path / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    file = write(tmp_path)
    file.chmod(0)
    assert "cannot be read: Permission denied" in refusal(file)


def test_a_hundred_megabytes_are_not_parsed(tmp_path: Path) -> None:
    file = tmp_path / "watcher.toml"
    with file.open("wb") as stream:
        stream.truncate(100 * 1024 * 1024)
    began = time.monotonic()
    assert "is larger than" in refusal(file)
    assert time.monotonic() - began < 2


def test_text_in_another_encoding(tmp_path: Path) -> None:
    found = mistakes(tmp_path, b'a = "x"\nb = "caf\xe9"\n')
    assert [(m.line, m.column, m.message) for m in found] == [(2, 9, "is not UTF-8 text")]


def test_lists_in_lists_without_end(tmp_path: Path) -> None:
    assert "nested" in mistakes(tmp_path, "a = " + "[" * 100_000)[0].message


def test_an_empty_file_is_good(tmp_path: Path) -> None:
    assert load(tmp_path, "").config.watchers == {}


def test_a_half_written_file_is_a_mistake(tmp_path: Path) -> None:
    """Wherever an editor was interrupted: what remains is good, or a told mistake; no other error."""
    for length in range(len(GOOD)):
        with suppress(ConfigError):
            load(tmp_path, GOOD[:length])


def test_windows_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = "\ufeff" + GOOD.replace("\n", "\r\n").replace('"git"', '"gti"')
    found = mistakes(tmp_path, text.encode())
    assert [(m.line, m.column) for m in found] == [(10, 11)]
    assert found[0].source == 'trigger = "gti"'


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.integers(0, 10_000),
    length=st.integers(0, 20),
    text=st.sampled_from(
        [*"\"'[]{}=.#\n\\\t\0é$,0", '"$env:X"', "[[1]]", "{a={b=[1]}}", "nan", "1979-01-01", "true", '"""']
    ),
)
def test_no_damage_ends_in_another_error(tmp_path: Path, place: int, length: int, text: str) -> None:
    place %= len(EXAMPLE)
    with suppress(ConfigError):
        load(tmp_path, EXAMPLE[:place] + text + EXAMPLE[place + length :])


# --- many at once -----------------------------------------------------------------------------------------------------


def test_every_mistake_is_told_at_once_in_file_order(tmp_path: Path) -> None:
    text = """\
databse = "x"
[server]
bind = 8321
[flows.notify]
url = "htps://x.example/h"
at_onec = 3
preset = "htp"
token = "$env:NOPE"
[watchers.a]
triger = "git"
every = "5 minutes"
flow = ["notfy"]
[watchers.b]
trigger = "gti"
cron = "61 * * * *"
timezone = "Europe/Pariss"
flow = "notify"
key = "a..b"
"""
    found = mistakes(tmp_path, text)
    assert [m.line for m in found] == [1, 3, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 16, 18]


def test_after_a_syntax_error_the_rest_is_still_read(tmp_path: Path) -> None:
    text = GOOD.replace('"sqlite:///w.db"', "sqlite").replace('"git"', '"gti"').replace('"5m"', "5m")
    assert [(m.line, m.where.rpartition("/")[2]) for m in mistakes(tmp_path, text)] == [
        (1, "watcher.toml"),
        (10, "watchers.commits.trigger"),
        (11, "watcher.toml"),
    ]


def test_what_a_syntax_error_hides_is_not_called_missing(tmp_path: Path) -> None:
    """The flow's address is there; only its line cannot be read."""
    found = mistakes(tmp_path, GOOD.replace('"https://hooks.example.com/notify"', "https://hooks.example.com/notify"))
    assert [(m.line, m.message) for m in found] == [(7, "not a TOML value")]


def test_a_table_twice_does_not_spill_into_the_one_before(tmp_path: Path) -> None:
    text = GOOD + '[flows.notify]\nurl = "https://b.example/"\nat_once = 1\n\n[logging]\nlevel = "inf"\n'
    assert [m.line for m in mistakes(tmp_path, text)] == [14, 19]


# --- how it looks -----------------------------------------------------------------------------------------------------


def test_a_mistake_is_shown_with_its_line_and_a_caret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = mistakes(tmp_path, GOOD.replace('flow = "notify"', 'flow = "notfy"'))
    assert config.render(ConfigError(found)) == (
        "watcher.toml:12:8: watchers.commits.flow: no such flow: notfy\n"
        '   12 | flow = "notfy"\n'
        "      |        ^ did you mean notify?\n"
        "1 mistake.\n"
    )


def test_color_is_only_added(tmp_path: Path) -> None:
    error = ConfigError(mistakes(tmp_path, GOOD.replace('"git"', '"gti"')))
    assert "\033[" in config.render(error, color=True)
    assert re.sub(r"\033\[\d+m", "", config.render(error, color=True)) == config.render(error)


def caret_column(shown: str) -> tuple[str, str]:
    _, source, caret, *_ = shown.splitlines()
    return source.partition("| ")[2], caret.partition("| ")[2]


def test_the_caret_stands_under_its_place_after_tabs_and_wide_letters(tmp_path: Path) -> None:
    found = mistakes(tmp_path, '[watchers."日本"]\n')
    source, caret = caret_column(config.render(ConfigError(found[:1])))
    assert source == '[watchers."日本"]'
    assert caret.startswith(" ^")
    found = mistakes(tmp_path, GOOD.replace("{ repo", "{ 'ü日' = 1, repo") + "\tjitter =\t5\n")
    source, caret = caret_column(config.render(ConfigError(found)))
    assert source == "\tjitter =\t5"
    assert caret.split("^")[0] == "\t        \t"


def test_a_long_line_is_cut_around_the_caret(tmp_path: Path) -> None:
    text = GOOD.replace('{ repo = "." }', '{ repo = "' + "x" * 5000 + '", n = inf }').replace("with", "on = 3\nwith")
    shown = config.render(ConfigError(mistakes(tmp_path, text)))
    assert max(map(len, shown.splitlines())) < 250
    assert "…" in shown


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    shown = config.render(ConfigError(mistakes(tmp_path, GOOD.replace('"git"', '"\x1b[2J"'))))
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    "line",
    [
        'secret = "whsec_dG9vc2hvcnQ="',
        'token = 7777777, "hunter2hunter2"',
        'headers = { X-Api-Key = "hunter2hunter2", "X A" = "hunter2hunter2" }',
        'password = "hunter2hunter2"\nuser = 3',
        'url2 = "https://user:hunter2hunter2@a.example/?token=hunter2hunter2"',
    ],
)
def test_a_mistake_does_not_show_a_secret(tmp_path: Path, line: str) -> None:
    shown = config.render(ConfigError(mistakes(tmp_path, flow(line))))
    assert "hunter2" not in shown
    assert "dG9vc2hvcnQ" not in shown


def test_a_wrong_database_password_is_not_shown(tmp_path: Path) -> None:
    shown = config.render(ConfigError(mistakes(tmp_path, 'database = "mysql://me:hunter2hunter2@host/x"\n')))
    assert "hunter2" not in shown
