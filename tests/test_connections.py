"""Connection strings: what they stand for, the way back, and what is said of a typo; what a client's error means."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cli import Desk, desk
from watcher import connections, context, resource_types, secrets
from watcher.connections import Typo, clients, parse, probe, write
from watcher.connections.verdicts import Place, judge, judge_store
from watcher.context import Context
from watcher.errors import ObjectsError, TriggerError


def value(type: str, url: str) -> dict[str, Any]:
    found = parse(type, url)
    resource_types.check(found.type, resource_types.SHIPPED[found.type][1], found.value)
    assert parse(found.type, write(found.type, found.value)).value == found.value
    return dict(found.value)


def wrong(type: str, url: str) -> str:
    with pytest.raises(Typo) as caught:
        parse(type, url)
    return str(caught.value)


# --- what they stand for ----------------------------------------------------------------------------------------------


def test_postgresql_with_all_that_a_url_can_say() -> None:
    found = value(
        "postgresql", "postgres://me:s%40c%2Fret@db.example.com:6432/shop?sslmode=verify-full&connect_timeout=5"
    )
    assert found == {
        "host": "db.example.com", "port": 6432, "user": "me", "password": "s@c/ret", "dbname": "shop",
        "sslmode": "verify-full", "connect_timeout": 5,
    }  # fmt: skip


def test_what_psql_itself_makes_of_it_is_the_same() -> None:
    from psycopg.conninfo import conninfo_to_dict

    url = (
        "postgresql://me:s%40cret@[2001:db8::1]:5433,b.example.com/shop?application_name=it%20is"
        "&options=-csearch_path%3Da%2Cb&target_session_attrs=read-write"
    )
    ours, theirs = parse("postgresql", url).value, conninfo_to_dict(url)
    assert {name: str(each) for name, each in ours.items()} == {**theirs, "port": "5433,5432"}
    assert conninfo_to_dict(write("postgresql", ours)) == {**theirs, "port": "5433,5432"}


def test_neon_as_its_console_gives_it() -> None:
    found = value(
        "postgresql",
        "psql 'postgresql://alex:AbC123@ep-cool-rain-123-pooler.us-east-2.aws.neon.tech/neondb"
        "?sslmode=require&channel_binding=require&options=endpoint%3Dep-cool-rain-123'",
    )
    assert found["options"] == "endpoint=ep-cool-rain-123"
    assert (found["channel_binding"], found["dbname"], found["port"]) == ("require", "neondb", 5432)


@pytest.mark.parametrize("port", [5432, 6543])
def test_supabase_through_its_pooler(port: int) -> None:
    found = parse(
        "postgresql",
        f"DATABASE_URL=postgresql://postgres.abcdef:pw123456@aws-0-eu.pooler.supabase.com:{port}/postgres?pgbouncer=true",
    )
    assert (found.value["user"], found.value["port"]) == ("postgres.abcdef", port)
    assert "pgbouncer" not in found.value
    assert found.notes == ("pgbouncer is a parameter of Prisma alone: left out",)


def test_a_password_that_looks_like_a_reference_or_a_placeholder_is_a_password() -> None:
    for url in ("postgres://me:$ecret@h/d", "postgres://me:%24var:u%2Fa%2Fb@h/d", "postgres://me:%3Cabc>@h/d"):
        found = parse("postgresql", url)
        assert connections.secrets(found.type, found.value) == {"password": found.value["password"]}
        assert connections.apart("u/me/db", found)[0]["password"] == "$var:u/me/db_password"


@pytest.mark.parametrize("url", ["postgresql:///app?host=/run/pg", "postgresql://%2Frun%2Fpg/app"])
def test_a_socket_of_postgresql(url: str) -> None:
    assert value("postgresql", url) == {"host": "/run/pg", "dbname": "app"}


def test_several_hosts_with_ports_of_their_own() -> None:
    found = value("postgresql", "postgresql://u@a,b:5433,[::1]/d")
    assert (found["host"], found["port"]) == ("a,b,::1", "5432,5433,5432")
    assert value("postgresql", "postgresql://u@a:6000,b:6000/d")["port"] == 6000


def test_marks_in_a_password_that_nobody_escaped() -> None:
    assert value("postgresql", "postgres://u:a@b#c?d@host/db")["password"] == "a@b#c?d"
    assert value("redis", "redis://host:6379?client_name=a@b")["host"] == "host"


def test_mysql_and_mariadb() -> None:
    assert value("mysql", "mariadb://u:p@h/db?ssl-mode=REQUIRED&charset=utf8mb4") == {
        "host": "h", "port": 3306, "user": "u", "password": "p", "database": "db", "ssl": True, "charset": "utf8mb4",
    }  # fmt: skip
    assert value("mysql", "mysql+pymysql://u@h/db?ssl_mode=VERIFY_IDENTITY")["ssl_mode"] == "VERIFY_IDENTITY"
    assert value("mysql", "mysql://u@localhost/db?socket=/run/mysqld.sock")["host"] == "/run/mysqld.sock"
    assert value("mysql", 'mysql://u@h/db?ssl={"rejectUnauthorized":true}')["ssl"] is True


def test_atlas_and_replica_sets_of_mongodb() -> None:
    atlas = value("mongodb", "mongodb+srv://u:p@c0.abc.mongodb.net/shop?retryWrites=true&w=majority&appName=C0")
    assert atlas == {
        "db": "shop", "servers": [{"host": "c0.abc.mongodb.net"}], "tls": True, "srv": True, "w": "majority",
        "credential": {"username": "u", "password": "p"}, "retryWrites": True, "appName": "C0",
    }  # fmt: skip
    many = value(
        "mongodb",
        "mongodb://u:p@a,b:27018,%2Frun%2Fm.sock/shop?replicaset=rs0&authSource=admin&readPreference=secondarypreferred"
        "&readPreferenceTags=dc:ny,rack:1&readPreferenceTags=&tls=true&maxPoolSize=5&w=2",
    )
    assert many["servers"] == [{"host": "a", "port": 27017}, {"host": "b", "port": 27018}, {"host": "/run/m.sock"}]
    assert (many["replicaSet"], many["readPreference"], many["w"]) == ("rs0", "secondaryPreferred", 2)
    assert many["credential"]["db"] == "admin"
    assert many["readPreferenceTags"] == ["dc:ny,rack:1", ""]


def test_what_pymongo_itself_makes_of_it_is_the_same() -> None:
    from pymongo.uri_parser import parse_uri

    url = "mongodb://u:p%40@a:1,[::1]:2/shop?replicaSet=rs0&authSource=admin&readPreference=nearest&tls=true"
    assert parse_uri(write("mongodb", parse("mongodb", url).value)) == parse_uri(url)


def test_redis_in_each_of_its_forms() -> None:
    assert value("redis", "rediss://app:p%3Aw@cache.example.com/3?socket_timeout=2.5") == {
        "host": "cache.example.com", "port": 6379, "username": "app", "password": "p:w", "db": 3, "tls": True,
        "socket_timeout": 2.5,
    }  # fmt: skip
    assert value("redis", "redis://:pw@h?db=2")["db"] == 2
    assert value("redis", "unix://u:pw@/run/redis.sock?db=1") == {
        "host": "/run/redis.sock", "username": "u", "password": "pw", "db": 1,
    }  # fmt: skip
    nodes = value("redis", "rediss+cluster://u:pw@a:7000,b:7001")
    assert (nodes["cluster"], nodes["host"], nodes["nodes"]) == (True, "a", [{"host": "b", "port": 7001}])
    assert value("redis", "redis://a:7000,b:7001")["cluster"] is True


def test_upstash_over_rest_and_over_redis() -> None:
    pasted = 'UPSTASH_REDIS_REST_URL="https://eu1-cat.upstash.io"\nUPSTASH_REDIS_REST_TOKEN="AX_8=="'
    rest = {"url": "https://eu1-cat.upstash.io", "token": "AX_8=="}
    assert value("upstash", pasted) == rest
    assert value("upstash", "https://eu1-cat.upstash.io?_token=AX_8%3D%3D") == rest
    assert value("upstash", "https://default:AX_8==@eu1-cat.upstash.io") == rest
    found = parse("upstash", "rediss://default:pw@eu1-cat.upstash.io:6379")
    assert (found.type, found.value["tls"]) == ("redis", True)


# --- and back ---------------------------------------------------------------------------------------------------------

LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
NAME = st.lists(LABEL, min_size=1, max_size=3).map(".".join)
ADDRESS = st.ip_addresses(v=6).map(str)
SOCKET = NAME.map(lambda name: f"/run/{name}/x.sock")
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
PORT = st.integers(1, 65535)
FEW = settings(max_examples=30, deadline=None)


def resource(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional)


@FEW
@given(
    resource(
        {"host": NAME | ADDRESS, "port": PORT, "dbname": TEXT},
        {
            "user": TEXT, "password": TEXT, "options": TEXT, "application_name": TEXT, "connect_timeout": PORT,
            "sslmode": st.sampled_from(["disable", "require", "verify-full"]), "sslrootcert": TEXT,
        },
    )
)  # fmt: skip
def test_any_postgresql_comes_back(it: dict[str, Any]) -> None:
    assert parse("postgresql", write("postgresql", it)).value == it


@FEW
@given(st.lists(st.tuples(NAME | ADDRESS, PORT), min_size=2, max_size=4))
def test_any_list_of_hosts_comes_back(hosts: list[tuple[str, int]]) -> None:
    url = write(
        "postgresql", {"host": ",".join(h for h, _ in hosts), "port": ",".join(str(p) for _, p in hosts), "dbname": "d"}
    )
    again = parse("postgresql", url).value
    assert str(again["host"]).split(",") == [host for host, _ in hosts]
    assert write("postgresql", again) == url


@FEW
@given(
    resource(
        {"host": NAME | ADDRESS, "port": PORT, "database": TEXT},
        {"user": TEXT, "password": TEXT, "ssl": st.booleans(), "charset": TEXT, "connect_timeout": PORT},
    )
)
def test_any_mysql_comes_back(it: dict[str, Any]) -> None:
    assert parse("mysql", write("mysql", it)).value == it


SERVER = resource({"host": NAME | ADDRESS, "port": PORT}, {}) | resource({"host": SOCKET}, {})


@FEW
@given(
    resource(
        {"db": TEXT, "tls": st.booleans(), "servers": st.lists(SERVER, min_size=1, max_size=3)},
        {
            "credential": resource({"username": TEXT}, {"password": TEXT, "db": TEXT}), "replicaSet": TEXT,
            "retryWrites": st.booleans(), "maxPoolSize": PORT, "readPreference": st.just("nearest"),
            "readPreferenceTags": st.lists(TEXT, min_size=1, max_size=3), "w": PORT | st.just("majority"),
        },
    )
)  # fmt: skip
def test_any_mongodb_comes_back(it: dict[str, Any]) -> None:
    assert parse("mongodb", write("mongodb", it)).value == it


@FEW
@given(
    resource(
        {"host": NAME | ADDRESS, "port": PORT, "db": st.integers(0, 99_999), "tls": st.booleans()},
        {"username": TEXT, "password": TEXT, "client_name": TEXT, "socket_keepalive": st.booleans()},
    )
    | resource({"host": SOCKET, "db": st.integers(0, 16)}, {"username": TEXT, "password": TEXT})
    | resource(
        {
            "host": NAME, "port": PORT, "db": st.just(0), "tls": st.booleans(), "cluster": st.just(True),
            "nodes": st.lists(resource({"host": NAME | ADDRESS, "port": PORT}, {}), min_size=1, max_size=3),
        },
        {"password": TEXT},
    )
)  # fmt: skip
def test_any_redis_comes_back(it: dict[str, Any]) -> None:
    assert parse("redis", write("redis", it)).value == it


@FEW
@given(NAME, TEXT)
def test_any_upstash_comes_back(host: str, token: str) -> None:
    it = {"url": f"https://{host}", "token": token}
    assert parse("upstash", write("upstash", it)).value == it


# --- typos ------------------------------------------------------------------------------------------------------------


def test_a_typo_is_shown_under_a_caret() -> None:
    assert wrong("postgresql", "postgres://me:hunter22@db.example.com/shop?sslmod=require") == (
        "this is no connection string of type postgresql:\n"
        "  no such parameter: sslmod (did you mean sslmode?)\n"
        "    postgres://*****@db.example.com/shop?sslmod=*****\n"
        "                                         ^^^^^^"
    )


def test_all_mistakes_are_told_at_once() -> None:
    said = wrong("postgresql", "postgres://u:p@h:99999/d?sslmode=requre&connect_timeout=soon")
    assert said.count("^^") >= 3
    assert "did you mean require?" in said


@pytest.mark.parametrize(
    ("type", "url", "hint"),
    [
        ("postgresql", "postgers://u:p@h/d", "did you mean postgres"),
        ("postgresql", "mongodb://u:p@h/d", "watcher resource add mongodb"),
        ("postgresql", "host=h dbname=d", "another form"),
        ("postgresql", "", "it is empty"),
        ("postgresql", "postgres://u:p@h/d?sslmode=no-verify", "does not check the certificate"),
        ("postgresql", "postgres://u:p@h/d?sslmode=require?connect_timeout=1", "parameters are joined with &"),
        ("postgresql", "postgres://u:p@h/d&sslmode=require", "begins with ?"),
        ("postgresql", "postgres://u:p@h/d?sslmode=require&amp;user=x", "write & alone"),
        ("postgresql", "postgres://u:p@h/d?sslmode=require&sslmode=disable", "said twice"),
        ("postgresql", "postgres://u:[YOUR-PASSWORD]@h/d", "put the password in its place"),
        ("postgresql", "postgres://postgres:p@aws-0-eu.pooler.supabase.com/postgres", "postgres.PROJECT-REF"),
        ("postgresql", "postgres://u:p@::1/d", "must stand in brackets"),
        ("postgresql", "postgres://u:p@[::1/d", "a [ without its ]"),
        ("postgresql", "postgres://u:p@h:port/d", "from 1 to 65535"),
        ("postgresql", "postgres://u:p@ho st/d", "a space"),
        ("postgresql", "postgres://h", "no database"),
        ("postgresql", "postgres:///d", "no host"),
        ("mysql", "mysql://u:p@h", "no database"),
        ("mysql", "mysql://u:p@a,b/d", "one host"),
        ("mongodb", "mongodb+srv://u:<db_password>@c.mongodb.net/d", "placeholder"),
        ("mongodb", "mongodb+srv://u:p@c.mongodb.net/?w=majority", "write /NAME"),
        ("mongodb", "mongodb+srv://u:p@c.mongodb.net:27017/d", "takes no port"),
        ("mongodb", "mongodb://u:p@h/d?readPreference=secondry", "did you mean secondary"),
        ("mongodb", "mongodb://u:p@h/d?tls=maybe", "true or false"),
        ("redis", "redis://u:p@h/zero", "a database of Redis is a number"),
        ("redis", "redis+cluster://u:p@h/2", "database 0 only"),
        ("redis", "redis://default:p@x.upstash.io", "rediss://"),
        ("upstash", "https://x.upstash.io", "no token"),
        ("upstash", "http://x.upstash.io?_token=abc", "write https://"),
    ],
)
def test_a_typo_comes_with_what_would_be_right(type: str, url: str, hint: str) -> None:
    assert hint in wrong(type, url)


@pytest.mark.parametrize(
    "url",
    [
        "postgres://me:hunter22",
        "postgres://me:hunter22/shop",
        "postgres://me:hunt/er22@h/d",
        "postgres://me:hunt%er22@h/d",
        "postgres:/me:hunter22@h/d",
        "postgres//me:hunter22@h/d",
        "me:hunter22@h/d",
        "postgers://me:hunter22@h/d",
        "postgres://me:hunter22@h:port/d?password=hunter22&sslmod=x",
        "postgres://h/d?user=me&password=hunter22&sslmod=x",
        "postgres://h/d?password=a&hunter22&sslmod=x",
        "postgres://me:hunter22 @h/d",
        "postgres://me/hunter22@h/d",
        "postgres://me=hunter22/d",
        "postgres://h/d?passwrd=hunter22",
        "postgres://h/d?passwordhunter22",
        "postgres://h/d?password:hunter22&sslmode=require",
        "https://x.upstash.io_token=hunter22",
        "https://x.upstash.io#_token=hunter22",
        "REDIS_URL=redis//:hunter22@h",
        "postgres://me:hunter22@h/d?sslmode=require@x",
        "postgres://hunter22@h:x/d",
        "redis://hunter22@h/x",
        "https://u:hunter22@h/d",
    ],
)
def test_the_password_is_never_shown(url: str) -> None:
    for type in connections.TYPES:
        try:
            found = parse(type, url)
        except Typo as typo:
            said = str(typo)
            assert "hunt" not in said, said
            assert "er22" not in said, said
        else:
            assert "hunt" not in repr(found) + connections.shown(found.type, found.value)


@FEW
@given(st.sampled_from(["postgresql", "mysql", "mongodb", "redis", "upstash"]), TEXT, st.text(max_size=60))
def test_no_text_ends_in_anything_but_a_resource_or_a_typo(type: str, scheme: str, text: str) -> None:
    for url in (text, f"{scheme}://{text}", f"{next(iter(connections.TYPES[type].schemes))}://{text}"):
        try:
            found = parse(type, url)
        except Typo:
            continue
        assert parse(found.type, write(found.type, found.value)).value == found.value


# --- where the secret goes --------------------------------------------------------------------------------------------


@pytest.fixture
def watcher(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    return desk(tmp_path, capsys, monkeypatch)


def test_the_password_becomes_a_secret_variable(watcher: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHER_SECRET_KEY", secrets.new_key())
    done = watcher.json("resource", "add", "postgresql", "postgres://me:hunter22@h/shop", "--path", "u/me/db")
    assert "hunter22" not in watcher.out + watcher.err
    assert done["value"]["password"] == "$var:u/me/db_password"
    assert watcher.json("resource", "get", "u/me/db")["value"] == done["value"]
    assert watcher.json("variable", "get", "u/me/db_password")["value"] == "hunter22"
    assert watcher.json("variable", "list")[0]["is_secret"] is True

    assert watcher("resource", "url", "u/me/db") == "postgresql://me:hunter22@h:5432/shop\n"
    watcher("resource", "add", "postgresql", "postgres://me:other123@h/shop", "--path", "u/me/db", expect=2)
    assert "--replace" in watcher.err
    watcher("resource", "add", "postgresql", "postgres://me:other123@h/shop", "--path", "u/me/db", "--replace")
    assert watcher.json("variable", "get", "u/me/db_password")["value"] == "other123"

    url = "mongodb+srv://u:hunter22@c.mongodb.net/my-shop"
    mongo = watcher.json("resource", "add", "mongodb", url)
    assert mongo["path"] == "u/admin/my_shop"
    assert mongo["value"]["credential"] == {"username": "u", "password": "$var:u/admin/my_shop_password"}


def test_without_a_key_it_says_what_to_do(watcher: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher("resource", "add", "postgresql", "postgres://me:hunter22@h/shop", "--path", "u/me/db", expect=78)
    assert "hunter22" not in watcher.err
    assert "watcher secret new-key" in watcher.err
    written = watcher.err[watcher.err.index("[resources.") :]
    assert 'password = "$env:DB_PASSWORD"' in written
    watcher.configure(written)
    monkeypatch.setenv("DB_PASSWORD", "hunter22")
    watcher("check")
    assert watcher.json("resource", "get", "u/me/db")["value"]["host"] == "h"


def test_without_a_password_no_key_is_needed(watcher: Desk) -> None:
    done = watcher.json("resource", "add", "redis", "redis://localhost")
    assert (done["path"], done["variables"]) == ("u/admin/redis", [])


def test_a_typo_at_the_command_line(watcher: Desk) -> None:
    watcher("resource", "add", "postgresql", "postgres://me:hunter22@h/shop?sslmod=require", expect=2)
    at = watcher.err.splitlines()[-1].index("^")
    assert watcher.err.splitlines()[-2][at:].startswith("sslmod=")
    assert "hunter22" not in watcher.err
    watcher("resource", "add", "postgres", "postgres://h/shop", expect=2)
    assert "did you mean postgresql?" in watcher.err


def test_only_what_can_be_tested_is(watcher: Desk) -> None:
    watcher.configure('\n[resources."u/me/gh"]\ntype = "github"\nvalue = { token = "x" }\n')
    watcher("resource", "test", "u/me/gh", expect=2)
    assert "cannot be tested" in watcher.err
    watcher("resource", "test", "u/me/nothing", expect=2)
    assert "no such resource" in watcher.err


# --- verdicts ---------------------------------------------------------------------------------------------------------

PLACE = Place("postgresql", "db.example.com:5432", "me", "shop")
WRONG_TLS = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")


class Coded(Exception):
    code = 18


@pytest.mark.parametrize(
    ("type", "error", "kind"),
    [
        ("postgresql", Exception('FATAL:  password authentication failed for user "me"'), "password"),
        ("postgresql", Exception('FATAL:  database "shop" does not exist'), "no_database"),
        ("postgresql", Exception('FATAL:  permission denied for database "shop"'), "permissions"),
        ("postgresql", Exception("FATAL:  Tenant or user not found"), "password"),
        ("postgresql", Exception("ERROR: Endpoint ID is not specified. Either please upgrade"), "other"),
        ("postgresql", Exception("server does not support SSL, but SSL was required"), "tls"),
        ("postgresql", Exception('no pg_hba.conf entry for host "1.2.3.4", user "me", no encryption'), "tls"),
        ("postgresql", Exception("FATAL:  sorry, too many clients already"), "busy"),
        ("postgresql", Exception('root certificate file "/home/ada/.postgresql/root.crt" does not exist'), "tls"),
        ("postgresql", Exception("server certificate for x does not match host name y"), "tls"),
        ("mysql", Exception(1045, "Access denied for user 'me'@'localhost'"), "password"),
        ("mysql", Exception(1049, "Unknown database 'shop'"), "no_database"),
        ("mysql", Exception(1044, "Access denied for user 'me' to database 'shop'"), "permissions"),
        ("mysql", Exception(3159, "Connections using insecure transport are prohibited"), "tls"),
        ("mongodb", Coded("Authentication failed."), "password"),
        ("mongodb", Exception("The DNS query name does not exist: _mongodb._tcp.c.mongodb.net."), "dns"),
        ("mongodb", Exception("reports wire version 6, but this version requires at least 8 (MongoDB 4.2)"), "version"),
        ("redis", Exception("WRONGPASS invalid username-password pair or user is disabled."), "password"),
        ("redis", Exception("DB index is out of range"), "no_database"),
        ("redis", Exception("NOPERM User me has no permissions to run the 'ping' command"), "permissions"),
        ("redis", WRONG_TLS, "tls"),
        ("redis", ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate"), "tls"),
        ("upstash", Exception("WRONGPASS invalid or missing auth token"), "password"),
        ("upstash", json.JSONDecodeError("Expecting value", "<html>", 0), "other"),
        ("redis", socket.gaierror(-2, "Name or service not known"), "dns"),
        ("redis", ConnectionRefusedError(111, "Connection refused"), "refused"),
        ("redis", OSError(113, "No route to host"), "unreachable"),
        ("redis", TimeoutError(), "timeout"),
        ("mysql", Exception("something else"), "other"),
    ],
)
def test_what_a_clients_error_means(type: str, error: Exception, kind: str) -> None:
    verdict = judge(error, Place(type, PLACE.where, PLACE.user, PLACE.database))
    assert verdict.kind == kind
    assert verdict.said
    assert verdict.do


@pytest.mark.parametrize(
    ("said", "behind", "kind"),
    [
        ("there is no bucket lake: create it", None, "no_database"),
        ("access is refused (SignatureDoesNotMatch: …)", None, "password"),
        ("access is refused (AccessDenied: …)", None, "permissions"),
        ("cannot be reached", "dns error: failed to lookup address: Name or service not known", "dns"),
        ("cannot be reached", "tcp connect error: Connection refused (os error 111)", "refused"),
        ("cannot be reached", "invalid peer certificate: certificate has expired", "tls"),
        ("cannot be reached", "received corrupt message of type InvalidContentType", "tls"),
        ("the server answers 500", None, "unreachable"),
    ],
)
def test_what_an_error_of_object_storage_means(said: str, behind: str | None, kind: str) -> None:
    error = ObjectsError(said, kind="unreachable")
    error.__cause__ = Exception(behind) if behind else None
    for type in ("s3", "azure_blob", "gcs"):
        verdict = judge_store(error, Place(type, "s3.example.com", database="bucket lake"))
        assert verdict.kind == kind
        assert verdict.do


def test_the_error_behind_an_error_counts() -> None:
    outer = RuntimeError("could not connect")
    outer.__cause__ = ConnectionRefusedError(111, "Connection refused")
    assert judge(outer, PLACE).said == "nobody listens at db.example.com:5432"


def test_a_server_that_is_too_old() -> None:
    assert probe._too_old("postgresql", "9.6.24", PLACE) is not None
    assert probe._too_old("postgresql", "17.2 (Debian)", PLACE) is None
    assert probe._too_old("redis", "4.0.14", PLACE) is not None
    assert probe._too_old("mysql", "11.8.3-MariaDB", PLACE) is None


# --- for scripts ------------------------------------------------------------------------------------------------------


def test_what_is_opened_is_closed_when_the_run_ends_the_newest_first() -> None:
    closed: list[str] = []

    async def last(name: str) -> None:
        closed.append(name)

    async def main(reach: Context) -> None:
        reach.at_end(lambda: last("a"))
        reach.at_end(lambda: last("b"))
        raise ValueError

    def run() -> None:
        reach = context.RemoteContext(None)  # type: ignore[arg-type]
        with context.use(reach):
            reach.at_end(lambda: closed.append("c"))
            reach.at_end(lambda: 1 / 0)
            asyncio.run(reach.closing(main(reach)))

    with pytest.raises(ValueError):
        run()
    assert closed == ["b", "a", "c"]


def test_what_was_opened_in_a_loop_of_the_scripts_own_is_closed_too() -> None:
    closed: list[str] = []

    async def last() -> None:
        closed.append("a")

    async def own(reach: Context) -> None:
        reach.at_end(last)

    reach = context.RemoteContext(None)  # type: ignore[arg-type]
    with context.use(reach):
        asyncio.run(own(reach))
    assert closed == ["a"]


def test_a_client_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(clients, "import_module", gone)
    with pytest.raises(TriggerError, match=r"change-watcher\[upstash\]") as caught:
        clients.redis({"url": "https://x", "token": "t"})
    assert caught.value.kind == "missing"


def test_a_pooler_gets_no_prepared_statements(monkeypatch: pytest.MonkeyPatch) -> None:
    class Psycopg:
        @staticmethod
        def connect(**arguments: Any) -> Any:
            return arguments

    monkeypatch.setattr(clients, "module", lambda name: Psycopg)
    for url in ("postgres://u@ep-a-pooler.neon.tech/d", "postgres://postgres.ref@x.pooler.supabase.com:6543/d"):
        made: Any = clients.postgres_sync(parse("postgresql", url).value)
        assert made["prepare_threshold"] is None
    assert "prepare_threshold" not in dict(clients.postgres_sync({"host": "h", "dbname": "d"}))  # type: ignore[call-overload]


def test_objects_needs_the_services_api(monkeypatch: pytest.MonkeyPatch) -> None:
    from watcher import objects

    monkeypatch.delenv("BASE_INTERNAL_URL", raising=False)
    with pytest.raises(TriggerError, match=r"\[server\]"):
        objects("secondary")  # type: ignore[operator]
