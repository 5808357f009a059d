"""Where settings come from, which source wins, and what a good file becomes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.config import GOOD, load, mistakes, write
from watcher import config, values
from watcher.errors import ConfigError
from watcher.log import mask

FULL = """\
database = "postgresql://me:hunter2hunter2@db.example/watcher"
data = "/var/lib/w"
secret_key_file = "key"
[server]
bind = "[::1]:9000"
workspace = "prod"
[http]
at_once_per_host = 2
timeout = "5s"
max_body = "1MB"
private_addresses = false
trust_env = true
user_agent = "us"
[scripts]
workers = 3
max_runs = 4
max_result = "5MiB"
max_items = 6
environment = ["LANG"]
[delivery]
at_once = 7
schedule = ["0s", "8s"]
lease = "2m"
[logging]
level = "debug"
format = "json"
[variables]
"u/admin/name" = "value"
[resources."u/admin/db"]
type = "postgresql"
value = { host = "h", since = 2026-01-02 }
[flows.notify]
url = "https://a.example/"
method = "PUT"
token = "$env:TOKEN"
secret = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "$var:u/admin/old"]
headers = { X-A = "{{ key }}" }
format = "plain"
body = { text = "{{ item.title }}" }
filter = "item.points > 100"
timeout = "20s"
at_once = 2
rate = "10/s"
order = "watcher"
private_addresses = false
trust_env = true
idempotency_header = "Idempotency-Key"
[flows.local]
steps = "step.py"
timeout = "1h"
[watchers.hn]
trigger = "./own.py"
cron = "*/10 * * * *"
timezone = "Europe/Paris"
jitter = "30s"
flow = ["notify", "local"]
with = { a = 1, day = 2026-01-02, db = "$res:u/admin/db" }
first_run = "newest:3"
timeout = "30s"
key = "id"
cursor = "at"
lookback = "15m"
on = ["new", "removed"]
max_change = 20
max_items = 50
memory_limit = "64MiB"
forget_after = "90d"
keep_history = 5
keep_runs = "7d"
enabled = false
was = "hacker"
"""


@pytest.fixture
def full(tmp_path: Path) -> config.Loaded:
    (tmp_path / "own.py").write_text("def main(): return []")
    (tmp_path / "step.py").write_text("def main(): return []")
    return load(tmp_path, FULL, {"TOKEN": "hunter3hunter3"})


def test_every_option_arrives(full: config.Loaded, tmp_path: Path) -> None:
    seconds = timedelta(seconds=1)
    got = full.config
    assert got.database == "postgresql://me:hunter2hunter2@db.example/watcher"
    assert (got.data, got.secret_key_file) == (Path("/var/lib/w"), tmp_path / "key")
    assert (got.workspace, got.server) == ("prod", values.Server("[::1]:9000"))
    assert got.server is not None
    assert (got.server.host, got.server.port) == ("::1", 9000)
    assert got.http == values.HttpSettings(2, 5 * seconds, 1_000_000, False, True, "us")
    assert got.scripts == values.ScriptSettings(3, 4, 5 * 1024**2, 6, ("LANG",))
    assert got.delivery == values.DeliverySettings(7, (0 * seconds, 8 * seconds), 120 * seconds)
    assert (got.log_level, got.log_format) == ("debug", "json")
    assert got.variables == {"u/admin/name": "value"}
    assert got.resources == {
        "u/admin/db": values.FileResource("postgresql", {"host": "h", "since": "2026-01-02"}),
    }
    assert got.flows["notify"] == values.Flow(
        name="notify", url="https://a.example/", method="PUT", token="$env:TOKEN",
        secrets=("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "$var:u/admin/old"), headers={"X-A": "{{ key }}"},
        format="plain", body={"text": "{{ item.title }}"}, filter="item.points > 100", timeout=20 * seconds, at_once=2,
        rate=(10, seconds), order="watcher", private_addresses=False, trust_env=True,
        settings={"idempotency_header": "Idempotency-Key"},
    )  # fmt: skip
    assert got.flows["local"] == values.Flow(name="local", steps=(tmp_path / "step.py",), timeout=3600 * seconds)
    assert got.watchers["hn"] == values.Watcher(
        name="hn", trigger="./own.py", script=tmp_path / "own.py", flows=("notify", "local"),
        args={"a": 1, "day": "2026-01-02", "db": "$res:u/admin/db"}, cron="*/10 * * * *", timezone="Europe/Paris",
        jitter=30 * seconds, timeout=30 * seconds, first_run=values.FirstRun("newest", newest=3), key="id", cursor="at",
        lookback="15m", on=("new", "removed"), max_change=values.MaxChange(None, 20, 0), max_items=50,
        memory_limit=64 * 1024**2, forget_after=timedelta(days=90), keep_history=5, keep_runs=timedelta(days=7),
        enabled=False, was="hacker",
    )  # fmt: skip


def test_what_the_file_does_not_say_is_the_default(tmp_path: Path) -> None:
    got = load(tmp_path).config
    assert got.http == values.HttpSettings()
    assert got.scripts == values.ScriptSettings()
    assert got.delivery == values.DeliverySettings()
    assert got.flows["notify"] == values.Flow(name="notify", url="https://hooks.example.com/notify")
    script = got.watchers["commits"].script
    assert script.is_file()
    assert got.watchers["commits"] == values.Watcher(
        name="commits", trigger="git", script=script, flows=("notify",), args={"repo": "."}, every=timedelta(minutes=5)
    )


def test_paths_are_relative_to_the_file_not_to_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    write(tmp_path / "etc")
    monkeypatch.chdir(tmp_path)
    got = config.load(Path("etc/watcher.toml"), environ={})
    assert got.file == tmp_path / "etc" / "watcher.toml"
    assert got.database == f"sqlite:///{tmp_path}/etc/w.db"
    assert got.data == tmp_path / "etc" / "watcher-data"


def test_under_systemd_everything_lies_in_the_state_directory(tmp_path: Path) -> None:
    got = load(tmp_path, "", {"STATE_DIRECTORY": "/var/lib/watcher"}).config
    assert got.database == "sqlite:////var/lib/watcher/watcher.db"
    assert got.data == Path("/var/lib/watcher")


def test_an_equal_configuration_has_an_equal_digest(tmp_path: Path) -> None:
    first = load(tmp_path).config
    assert load(tmp_path, "# a comment\n" + GOOD).config.digest == first.digest
    assert load(tmp_path, GOOD.replace("5m", "6m")).config.digest != first.digest
    assert first.digest


# --- environment ------------------------------------------------------------------------------------------------------


def test_the_environment_goes_before_the_file(tmp_path: Path) -> None:
    environ = {
        "WATCHER_DATABASE": "sqlite:////x/y.db",
        "WATCHER_SERVER__BIND": "127.0.0.1:9",
        "WATCHER_HTTP__TRUST_ENV": "true",
        "WATCHER_HTTP__MAX_BODY": "2kB",
        "WATCHER_DELIVERY__AT_ONCE": "5",
        "WATCHER_DELIVERY__SCHEDULE": '["1s", "2s"]',
        "WATCHER_FLOWS__NOTIFY__URL": "https://b.example/",
        "WATCHER_FLOWS__NOTIFY__PASSWORD": "12345678",
        "WATCHER_FLOWS__NOTIFY__USER": "me",
        "WATCHER_WATCHERS__COMMITS__EVERY": "7m",
        "WATCHER_WATCHERS__COMMITS__ENABLED": "false",
        "WATCHER_WATCHERS__COMMITS__WITH__REPO": "/srv",
        "WATCHER_WATCHERS__COMMITS__MAX_CHANGE": "10",
        "WATCHER_LOGGING__LEVEL": "debug",
    }
    loaded = load(tmp_path, environ=environ)
    got = loaded.config
    assert got.database == "sqlite:////x/y.db"
    assert got.server == values.Server("127.0.0.1:9")
    assert (got.http.trust_env, got.http.max_body) == (True, 2000)
    assert got.delivery.at_once == 5
    assert got.delivery.schedule == (timedelta(seconds=1), timedelta(seconds=2))
    assert got.flows["notify"].url == "https://b.example/"
    assert got.flows["notify"].settings == {"password": "12345678", "user": "me"}
    watcher = got.watchers["commits"]
    assert (watcher.every, watcher.enabled, watcher.args) == (timedelta(minutes=7), False, {"repo": "/srv"})
    assert watcher.max_change == values.MaxChange(None, 10, 0)
    assert got.log_level == "debug"
    assert loaded.origins["flows.notify.url"] == "WATCHER_FLOWS__NOTIFY__URL"
    assert loaded.origins["watchers.commits.trigger"] == f"{got.file}:10"


def test_the_environment_alone_can_add_a_table(tmp_path: Path) -> None:
    environ = {"WATCHER_FLOWS__SUMMARISE__URL": "https://a.example/", "WATCHER_SERVER__BIND": "127.0.0.1:0"}
    got = load(tmp_path, "", environ).config
    assert got.flows["summarise"].url == "https://a.example/"
    assert got.server == values.Server("127.0.0.1:0")


def test_a_name_with_dashes_and_capitals_can_be_reached(tmp_path: Path) -> None:
    text = '[flows.My-Flow]\nurl = "https://a.example/"\n[variables]\n"u/admin/my.name" = "x"\n'
    environ = {"WATCHER_FLOWS__MY_FLOW__AT_ONCE": "3", "WATCHER_VARIABLES__U_ADMIN_MY_NAME": "y"}
    got = load(tmp_path, text, environ).config
    assert got.flows["My-Flow"].at_once == 3
    assert got.variables == {"u/admin/my.name": "y"}


def test_a_list_may_be_one_text_or_json(tmp_path: Path) -> None:
    text = GOOD + '[flows.b]\nurl = "https://b.example/"\n'
    one = load(tmp_path, text, {"WATCHER_WATCHERS__COMMITS__FLOW": "b"}).config
    two = load(tmp_path, text, {"WATCHER_WATCHERS__COMMITS__FLOW": '["b", "notify"]'}).config
    assert one.watchers["commits"].flows == ("b",)
    assert two.watchers["commits"].flows == ("b", "notify")


@pytest.mark.parametrize(
    ("name", "value", "message", "hint"),
    [
        ("WATCHER_DATABSE", "x", "is no option", "WATCHER_DATABASE"),
        ("WATCHER_SERVER__BNID", "x", "is no option", "WATCHER_SERVER__BIND"),
        ("WATCHER_SERVER", "x", "names a whole table", "WATCHER_SERVER__BIND"),
        ("WATCHER_FLOWS__NOTIFY__AT_ONCE", "many", "must be a whole number", ""),
        ("WATCHER_FLOWS__NOTIFY__AT_ONEC", "3", "no such option", "at_once"),
        ("WATCHER_HTTP__TRUST_ENV", "perhaps", "must be true or false", ""),
        ("WATCHER_SCRIPTS__ENVIRONMENT", "LANG,PATH", "must be a list", ""),
        ("WATCHER_WATCHERS__COMMITS__EVERY", "5 minutes", "is not a duration", ""),
        ("WATCHER_WATCHERS__COMMITS__FLOW", "nobody", "no such flow", ""),
    ],
)
def test_a_mistake_in_the_environment_is_told_with_its_variable(
    tmp_path: Path, name: str, value: str, message: str, hint: str
) -> None:
    found = mistakes(tmp_path, GOOD, {name: value})
    assert len(found) == 1
    assert message in f"{found[0].where} {found[0].message}"
    assert name in f"{found[0].where} {found[0].message}"
    assert hint in found[0].hint
    assert found[0].line == 0


def test_what_others_put_into_the_environment_is_no_mistake(tmp_path: Path) -> None:
    """Kubernetes does this for a service called watcher."""
    environ = {
        "WATCHER_PORT": "tcp://10.0.0.1:80",
        "WATCHER_SERVICE_HOST": "10.0.0.1",
        "WATCHER_PORT_80_TCP_ADDR": "10.0.0.1",
        "WATCHER_CONFIG": "x",
        "WATCHER_SECRET_KEY": "x",
        "WATCHER_TEST": "1",
        "PATH": "x",
    }
    loaded = load(tmp_path, environ=environ)
    assert len(loaded.warnings) == 3
    assert all("ignored" in warning for warning in loaded.warnings)


# --- secrets directory, references, flags -----------------------------------------------------------------------------


def test_a_secrets_directory_fills_nested_options(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "flows__notify__token").write_text("hunter4hunter4\n")
    (secrets / "WATCHER_FLOWS__NOTIFY__SECRET").write_text("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    (secrets / "..data").mkdir()
    (secrets / ".hidden").write_text("x")
    loaded = load(tmp_path, environ={"WATCHER_SECRETS_DIR": str(secrets)})
    assert loaded.config.flows["notify"].token == "hunter4hunter4"
    assert loaded.config.flows["notify"].secrets == ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",)
    assert loaded.origins["flows.notify.token"] == str(secrets / "flows__notify__token")
    assert mask("it said hunter4hunter4") == "it said *****"


def test_credentials_that_are_no_options_are_left_alone(tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "watcher-key").write_text("x")
    (credentials / "other.pem").write_text("x")
    (credentials / "flows__notify__token").write_text("hunter5hunter5")
    loaded = load(tmp_path, environ={"CREDENTIALS_DIRECTORY": str(credentials)})
    assert loaded.config.flows["notify"].token == "hunter5hunter5"
    assert loaded.warnings == ()


def test_a_secrets_directory_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    found = mistakes(tmp_path, GOOD, {"WATCHER_SECRETS_DIR": str(tmp_path / "none")})
    assert "No such file" in found[0].message


def test_an_unknown_secret_file_is_told(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "flows__notify").write_text("x")
    assert "flows__notify" in mistakes(tmp_path, GOOD, {"WATCHER_SECRETS_DIR": str(secrets)})[0].message


def test_flag_before_environment_before_secrets_before_file_before_default(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    text = GOOD.replace('[server]\nbind = "127.0.0.1:0"', "")
    environ = {"WATCHER_SECRETS_DIR": str(secrets)}

    def bind(**flags: str) -> str:
        server = load(tmp_path, text, environ, **flags).config.server
        return server.bind if server else "none"

    assert bind() == "none"
    text = GOOD.replace("127.0.0.1:0", "127.0.0.1:1")
    assert bind() == "127.0.0.1:1"
    (secrets / "server__bind").write_text("127.0.0.1:2\n")
    assert bind() == "127.0.0.1:2"
    environ["WATCHER_SERVER__BIND"] = "127.0.0.1:3"
    assert bind() == "127.0.0.1:3"
    assert bind(**{"server.bind": "127.0.0.1:4"}) == "127.0.0.1:4"


def test_what_is_needed_at_once_is_read_at_once(tmp_path: Path) -> None:
    (tmp_path / "database").write_text("sqlite:////x/z.db\n")
    text = 'database = "$file:database"\n[delivery]\nat_once = "$env:MANY"\nschedule = ["$env:FIRST"]\n'
    loaded = load(tmp_path, text, {"MANY": "9", "FIRST": "3s"})
    assert loaded.config.database == "sqlite:////x/z.db"
    assert loaded.config.delivery.at_once == 9
    assert loaded.config.delivery.schedule == (timedelta(seconds=3),)
    assert loaded.origins["delivery.at_once"] == "$env:MANY"


def test_what_can_be_rotated_stays_a_reference(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x")
    text = GOOD.replace('"https://hooks.example.com/notify"', '"$env:HOOK"\ntoken = "$file:token"')
    flow = load(tmp_path, text, {"HOOK": "https://a.example/"}).config.flows["notify"]
    assert (flow.url, flow.token) == ("$env:HOOK", "$file:token")


def test_a_text_for_an_item_may_begin_with_a_dollar_sign(tmp_path: Path) -> None:
    text = GOOD.replace("[watchers", 'body = "$env:NOTHING costs {{ item.price }}"\n[watchers')
    assert load(tmp_path, text).config.flows["notify"].body == "$env:NOTHING costs {{ item.price }}"


def test_what_is_switched_off_needs_no_secrets_yet(tmp_path: Path) -> None:
    text = GOOD + '[flows.later]\nurl = "$env:LATER"\ntoken = "$file:later"\nenabled = false\n'
    assert load(tmp_path, text).config.flows["later"].enabled is False


def test_a_variable_that_must_be_in_the_database_is_a_warning(tmp_path: Path) -> None:
    text = GOOD.replace("[watchers", 'token = "$var:u/admin/tokn"\n[watchers') + '[variables]\n"u/admin/token" = "x"\n'
    assert load(tmp_path, text).warnings == (
        "flows.notify.token: $var:u/admin/tokn is not in this file, so it must be in the database "
        "(did you mean u/admin/token?)",
    )


def test_an_open_address_is_a_warning(tmp_path: Path) -> None:
    warnings = load(tmp_path, GOOD.replace("127.0.0.1:0", "0.0.0.0:80")).warnings
    assert "reachable from other machines" in warnings[0]


@pytest.mark.usefixtures("full")
def test_secrets_in_the_file_are_masked_from_then_on() -> None:
    for secret in ("hunter2hunter2", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"):
        assert secret not in mask(f"the value is {secret}.")


# --- which file -------------------------------------------------------------------------------------------------------


def test_the_usual_places_are_looked_at_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("home/.config/watcher", "xdg/watcher", "etc", "here"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    environ = {"HOME": str(tmp_path / "home")}
    write(tmp_path / "home/.config/watcher")
    assert config.find(environ) == tmp_path / "home/.config/watcher/watcher.toml"
    environ["XDG_CONFIG_HOME"] = str(tmp_path / "xdg")
    write(tmp_path / "xdg/watcher")
    assert config.find(environ) == tmp_path / "xdg/watcher/watcher.toml"
    write(tmp_path / "here")
    assert config.find(environ) == Path("watcher.toml")
    environ["CONFIGURATION_DIRECTORY"] = str(tmp_path / "etc")
    write(tmp_path / "etc")
    assert config.find(environ) == tmp_path / "etc/watcher.toml"
    environ["WATCHER_CONFIG"] = "/nowhere.toml"
    assert config.find(environ) == Path("/nowhere.toml")


def test_no_file_anywhere_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("watcher.config.sources.SYSTEM", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="watcher init"):
        config.load(None, environ={})
