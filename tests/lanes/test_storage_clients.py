"""Databases as resources, against real servers: what `resource test` says, and what scripts are given."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support.cli import Desk, desk
from tests.support.postgres import Postgres
from tests.support.running import Bench, running
from tests.support.servers import PASSWORD, Azurite, MariaDB, MongoDB, Redis, SeaweedFS, serving
from tests.support.service import Service, free_port
from watcher import connections, secrets
from watcher.cli import main as command_line
from watcher.store.db import Database

pytestmark = pytest.mark.long

WRONG = "not-the-passw0rd"


class Typist:
    """Adds resources and tests them, as somebody at the command line does."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.told = ""

    def __call__(self, type: str, url: str, expect: int = 0, seconds: float = 20, **changes: Any) -> dict[str, Any]:
        """Add, perhaps change, and test. No password is ever shown."""
        added = self.desk.json("resource", "add", type, url, "--path", "u/me/it", "--replace")
        self.told += self.desk.out + self.desk.err
        if changes:
            file = self.desk.where / "it.json"
            file.write_text(json.dumps(added["value"] | changes))
            self.desk("resource", "set", "u/me/it", str(file), "--type", added["type"])
        self.desk("resource", "test", "u/me/it", "--timeout", str(seconds), expect=expect)
        self.told += self.desk.out + self.desk.err
        found: dict[str, Any] = self.desk.json("resource", "test", "u/me/it", "--timeout", str(seconds), expect=expect)
        self.told += self.desk.out + self.desk.err
        for secret in (PASSWORD, WRONG):
            assert secret not in self.told
        assert found["ok"] == (expect == 0)
        assert found["said"]
        assert found["do"] or found["ok"]
        return found

    def fails(self, type: str, url: str, kind: str, **more: Any) -> dict[str, Any]:
        found = self(type, url, expect=1, **more)
        assert found["kind"] == kind, found
        return found


@pytest.fixture
def typist(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Typist:
    made = desk(tmp_path, capsys, monkeypatch)
    monkeypatch.setenv("WATCHER_SECRET_KEY", secrets.new_key())
    return Typist(made)


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


class Guarded:
    """A PostgreSQL server on TCP that wants passwords there, and none of the administrator at its socket."""

    def __init__(self) -> None:
        self.server = Postgres()
        self.server.start()
        self._admin = self.server.url("postgres")
        self.folder = self.ask("SHOW unix_socket_directories")
        Path(self.ask("SHOW hba_file")).write_text(
            "local all all trust\n"
            "hostnossl locked all 127.0.0.1/32 reject\n"
            "host all all 127.0.0.1/32 scram-sha-256\n"
        )  # fmt: skip
        self.port = free_port()
        self.server._control("restart", "-m", "fast", "-o", f"-h 127.0.0.1 -p {self.port} -k {self.folder}")
        self._admin = f"postgresql://postgres:@/postgres?host={self.folder}&port={self.port}"
        self.do(
            f"CREATE ROLE me LOGIN PASSWORD '{PASSWORD}'",
            f"CREATE ROLE guest LOGIN PASSWORD '{PASSWORD}'",
            "CREATE DATABASE shop OWNER me",
            "CREATE DATABASE locked OWNER me",
            "CREATE DATABASE private OWNER me",
            "REVOKE CONNECT ON DATABASE private FROM PUBLIC",
        )
        with psycopg.connect(self.url()) as connection:
            connection.execute("CREATE TABLE things (id int)")
            connection.execute("INSERT INTO things VALUES (1), (2)")

    def do(self, *statements: str) -> None:
        """As its administrator."""
        with psycopg.connect(self._admin, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    def ask(self, statement: str) -> str:
        """As its administrator: the first field of the first row."""
        with psycopg.connect(self._admin) as connection:
            row = connection.execute(statement).fetchone()
            assert row is not None
            return str(row[0])

    def connections(self, application: str) -> int:
        """How many connections of this name there are."""
        return int(self.ask(f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{application}'"))

    def url(self, database: str = "shop", user: str = "me", password: str = PASSWORD, more: str = "") -> str:
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{database}{more}"


class Encrypted:
    """TLS in front of a server that has none; ``asked``: the client first asks for it, as PostgreSQL's do."""

    ASKED = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")

    def __init__(self, port: int, folder: Path, *, asked: bool = False) -> None:
        self._behind = port
        self._asked = asked
        self.certificate, key = certificate_for("127.0.0.1")
        self.file = folder / "certificate.pem"
        self.file.write_text(self.certificate)
        (folder / "key.pem").write_text(key)
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(self.file, folder / "key.pem")
        self.port = 0

    async def __aenter__(self) -> Encrypted:
        context = None if self._asked else self._context
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if self._asked:
                if await reader.readexactly(8) != self.ASKED:
                    writer.close()
                    return
                writer.write(b"S")
                await writer.start_tls(self._context)
            back, forth = await asyncio.open_connection("127.0.0.1", self._behind)
            await asyncio.gather(self._copy(reader, forth), self._copy(back, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while part := await reader.read(65536):
                writer.write(part)
                await writer.drain()
        finally:
            writer.close()


def wait_until(so: Callable[[], bool], seconds: float = 30) -> None:
    import time

    until = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < until
        time.sleep(0.05)  # another process: there is nothing to wait on


def certificate_for(address: str) -> tuple[str, str]:
    """A certificate that signs itself, and its key, in PEM."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    return made.public_bytes(serialization.Encoding.PEM).decode(), private.decode()


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    server = Guarded()
    yield server
    server.server.stop()


def test_postgresql_that_works(typist: Typist, guarded: Guarded) -> None:
    found = typist("postgresql", guarded.url())
    assert "may read 1 of 1 tables of shop" in found["said"]
    assert found["version"].startswith("18")
    assert typist.desk.json("resource", "get", "u/me/it")["value"]["password"] == "$var:u/me/it_password"


def test_postgresql_and_what_can_be_wrong_with_it(typist: Typist, guarded: Guarded) -> None:
    typist.fails("postgresql", guarded.url(password=WRONG), "password")
    typist.fails("postgresql", guarded.url(user="nobody"), "password")
    typist.fails("postgresql", f"postgresql://me@127.0.0.1:{guarded.port}/shop", "password")
    assert "shup" in typist.fails("postgresql", guarded.url("shup"), "no_database")["said"]
    typist.fails("postgresql", guarded.url("private", user="guest"), "permissions")
    none = typist.fails("postgresql", guarded.url(user="guest"), "permissions")
    assert "may read none of the 1 tables" in none["said"]
    no_tls = typist.fails("postgresql", guarded.url(more="?sslmode=require"), "tls")
    assert "does not speak TLS" in no_tls["said"]
    typist.fails("postgresql", guarded.url("locked", more="?sslmode=disable"), "tls")


async def test_postgresql_with_a_certificate(typist: Typist, guarded: Guarded, tmp_path: Path) -> None:
    async with Encrypted(guarded.port, tmp_path, asked=True) as front:
        url = guarded.url(more="?sslmode=verify-full").replace(str(guarded.port), str(front.port))
        found = await asyncio.to_thread(typist, "postgresql", url.replace("verify-full", "require"))
        assert "encrypted" in found["said"]
        await asyncio.to_thread(typist.fails, "postgresql", url, "tls")
        found = await asyncio.to_thread(typist, "postgresql", url, root_certificate_pem=front.certificate)
        assert "encrypted" in found["said"]
        other = {"root_certificate_pem": certificate_for("127.0.0.1")[0]}
        found = await asyncio.to_thread(typist.fails, "postgresql", url, "tls", **other)
        assert "vouches" in found["said"]
        named = {"root_certificate_pem": front.certificate, "hostaddr": "127.0.0.1"}
        url = url.replace("127.0.0.1", "localhost")
        found = await asyncio.to_thread(typist.fails, "postgresql", url, "tls", **named)
        assert "another name" in found["said"]


# --- the net ----------------------------------------------------------------------------------------------------------

URLS = {
    "postgresql": "postgresql://me:{password}@{host}:{port}/shop",
    "mysql": "mysql://me:{password}@{host}:{port}/shop",
    "mongodb": "mongodb://me:{password}@{host}:{port}/shop",
    "redis": "redis://me:{password}@{host}:{port}/0",
    "upstash": "http://{host}:{port}?_token={password}",
}


# pymongo forgets, and leaves to the garbage collector, a socket that is closed while it shakes hands.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("type", URLS)
def test_a_host_that_cannot_be_reached(typist: Typist, type: str) -> None:
    def url(host: str, port: int) -> str:
        return URLS[type].format(password=WRONG, host=host, port=port)

    assert (
        "nobody listens at 127.0.0.1:"
        in typist.fails(type, url("127.0.0.1", free_port()), "refused", seconds=5)["said"]
    )
    nowhere = typist.fails(type, url("nowhere.invalid", 1000), "dns", seconds=5)
    assert nowhere["said"] == "there is no host nowhere.invalid"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        typist.fails(type, url("127.0.0.1", silent.getsockname()[1]), "timeout", seconds=1)


# --- MySQL and MariaDB ------------------------------------------------------------------------------------------------


def test_mariadb_and_what_can_be_wrong_with_it(typist: Typist, mariadb: MariaDB) -> None:
    url = mariadb.create()
    name = url.rpartition("/")[2]
    with mariadb.client() as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE TABLE {name}.things (id int)")
        cursor.execute(f"CREATE OR REPLACE USER guest@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'")
    assert f"sees 1 tables of {name}" in typist("mysql", url)["said"]
    typist.fails("mysql", url.replace(PASSWORD, WRONG), "password")
    typist.fails("mysql", f"{url}_gone", "no_database")
    typist.fails("mysql", url.replace("watcher:", "guest:"), "permissions")
    typist.fails("mysql", f"{url}?ssl-mode=VERIFY_IDENTITY", "tls")


# --- MongoDB ----------------------------------------------------------------------------------------------------------


class LockedMongoDB(MongoDB):
    """One user, ``me``, who may read and write ``shop``."""

    locked = False

    @property
    def url(self) -> str:
        login = f"me:{PASSWORD}@" if self.locked else ""
        return f"mongodb://{login}127.0.0.1:{self.port}/shop?authSource=admin"

    def start(self, seconds: float = 60) -> None:
        super().start(seconds)
        with self.client() as client:
            client.shop.things.insert_one({"_id": 1})
            roles = [{"role": "root", "db": "admin"}]
            client.admin.command("createUser", "me", pwd=PASSWORD, roles=roles)
        self.stop()
        self.options, self.locked = (*self.options, "--auth"), True
        super().start(seconds)


@pytest.fixture(scope="module")
def locked() -> Iterator[LockedMongoDB]:
    yield from serving(LockedMongoDB)


def test_mongodb_and_what_can_be_wrong_with_it(typist: Typist, locked: LockedMongoDB) -> None:
    assert "1 collections in shop" in typist("mongodb", locked.url)["said"]
    wrong = typist.fails("mongodb", locked.url.replace(PASSWORD, WRONG), "password")
    assert "authSource" in wrong["do"]
    typist.fails("mongodb", f"mongodb://127.0.0.1:{locked.port}/shop", "password")
    typist.fails("mongodb", locked.url.replace("/shop", "/shup"), "no_database")
    no_tls = typist.fails("mongodb", f"{locked.url}&tls=true", "tls", seconds=5)
    assert "does not speak TLS" in no_tls["said"]


# --- Redis and Upstash ------------------------------------------------------------------------------------------------


def test_redis_and_what_can_be_wrong_with_it(typist: Typist, redis: Redis) -> None:
    with redis.client() as client:
        client.execute_command("ACL", "SETUSER", "mute", "on", f">{PASSWORD}", "-@all")
        client.execute_command("ACL", "SETUSER", "me", "on", f">{PASSWORD}", "+@all", "-info", "allkeys")
    assert redis.url.rpartition("@")[2][:-2] in typist("redis", redis.url)["said"]
    me = f"redis://me:{PASSWORD}@127.0.0.1:{redis.port}"
    assert "user me" in typist("redis", f"{me}/2")["said"]
    typist.fails("redis", me.replace(PASSWORD, WRONG), "password")
    typist.fails("redis", f"redis://127.0.0.1:{redis.port}", "password")
    typist.fails("redis", f"{me}/9999", "no_database")
    typist.fails("redis", me.replace("me:", "mute:"), "permissions")
    no_tls = typist.fails("redis", me.replace("redis:", "rediss:"), "tls", seconds=3)
    assert "does not speak TLS" in no_tls["said"]
    assert "not of a cluster" in typist.fails("redis", me.replace("redis:", "redis+cluster:"), "other")["said"]


async def test_redis_with_a_certificate(typist: Typist, redis: Redis, tmp_path: Path) -> None:
    async with Encrypted(redis.port, tmp_path) as front:
        url = f"rediss://:{PASSWORD}@127.0.0.1:{front.port}/0"
        found = await asyncio.to_thread(typist.fails, "redis", url, "tls")
        assert "vouches" in found["said"]
        await asyncio.to_thread(typist, "redis", f"{url}?ssl_ca_certs={front.file}")
        plain = await asyncio.to_thread(typist.fails, "redis", url.replace("rediss:", "redis:"), "unreachable")
        assert "perhaps it wants TLS" in plain["do"]


class Socketed(Redis):
    def command(self) -> list[str]:
        return [*super().command(), "--unixsocket", str(self.folder / "redis.sock")]


def test_redis_behind_a_socket(typist: Typist) -> None:
    server = Socketed()
    try:
        server.start()
        url = f"unix://:{PASSWORD}@{server.folder}/redis.sock?db=1"
        assert "redis.sock" in typist("redis", url)["said"]
        server.stop()
        assert "there is no socket" in typist.fails("redis", url, "refused")["said"]
    finally:
        server.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Redis]:
    """One node that has all slots."""
    server = Redis("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    try:
        server.start()
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        yield server
    finally:
        server.close()


def test_a_cluster_of_redis(typist: Typist, cluster: Redis) -> None:
    url = f"redis+cluster://:{PASSWORD}@127.0.0.1:{cluster.port}"
    typist("redis", url)
    plain = typist.fails("redis", cluster.url, "other")
    assert plain["do"] == "say cluster = true in the resource"


class Upstash:
    """Upstash's REST protocol in front of a real Redis. Source: Upstash's documentation of its REST API."""

    def __init__(self, redis: Redis, token: str) -> None:
        self.token = token
        client = redis.client(decode_responses=False)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers["authorization"] != f"Bearer {token}":
                    self.answer(401, {"error": "WRONGPASS invalid or missing auth token"})
                    return
                asked = json.loads(body)
                if self.path == "/pipeline":
                    self.answer(200, [self.run(each) for each in asked])
                    return
                done = self.run(asked)
                self.answer(400 if "error" in done else 200, done)

            def run(self, asked: list[Any]) -> dict[str, Any]:
                try:
                    connection = client.connection_pool.get_connection()
                    try:
                        connection.send_command(*asked)
                        found = connection.read_response()
                    finally:
                        client.connection_pool.release(connection)
                except Exception as error:
                    return {"error": str(error)}
                return {"result": self.plain(found)}

            def plain(self, value: Any) -> Any:
                if isinstance(value, list):
                    return [self.plain(each) for each in value]
                if isinstance(value, bytes) and value != b"OK":
                    coded = self.headers["upstash-encoding"] == "base64"
                    return base64.b64encode(value).decode() if coded else value.decode()
                return value.decode() if isinstance(value, bytes) else value

            def answer(self, status: int, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self._client = client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}?_token={self.token}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        self._client.close()


@pytest.fixture
def upstash(redis: Redis) -> Iterator[Upstash]:
    served = Upstash(redis, "AX-" + PASSWORD)
    yield served
    served.close()


def test_upstash_and_what_can_be_wrong_with_it(typist: Typist, upstash: Upstash) -> None:
    typist("upstash", upstash.url)
    typist.fails("upstash", upstash.url.replace(PASSWORD, WRONG), "password")


# --- object storage ---------------------------------------------------------------------------------------------------


def stored(typist: Typist, type: str, value: dict[str, Any], expect: int = 0) -> dict[str, Any]:
    """Set a resource of object storage, and test it."""
    file = typist.desk.where / "it.json"
    file.write_text(json.dumps(value))
    typist.desk("resource", "set", "u/me/it", str(file), "--type", type)
    found: dict[str, Any] = typist.desk.json("resource", "test", "u/me/it", "--timeout", "30", expect=expect)
    assert PASSWORD not in typist.desk.out + typist.desk.err
    assert WRONG not in typist.desk.out + typist.desk.err
    assert found["do"] or found["ok"]
    return found


def test_s3_and_what_can_be_wrong_with_it(typist: Typist, seaweedfs: SeaweedFS) -> None:
    it = seaweedfs.resource
    assert stored(typist, "s3", it)["said"] == f"bucket {seaweedfs.bucket} can be listed: at least one object in it"
    assert stored(typist, "s3", {**it, "secretKey": WRONG}, expect=1)["kind"] == "password"
    assert stored(typist, "s3", {**it, "bucket": "no-such-bucket"}, expect=1)["kind"] == "no_database"
    assert stored(typist, "s3", {**it, "endPoint": f"127.0.0.1:{free_port()}"}, expect=1)["kind"] == "refused"
    assert stored(typist, "s3", {**it, "endPoint": "nowhere.invalid"}, expect=1)["kind"] == "dns"
    assert stored(typist, "s3", {**it, "useSSL": True}, expect=1)["kind"] == "tls"


def test_azure_and_what_can_be_wrong_with_it(typist: Typist, azurite: Azurite) -> None:
    it = azurite.create()
    assert "can be listed" in stored(typist, "azure_blob", it)["said"]
    wrong = base64.b64encode(WRONG.encode() * 3).decode()
    assert stored(typist, "azure_blob", {**it, "accessKey": wrong}, expect=1)["kind"] == "password"
    gone = stored(typist, "azure_blob", {**it, "containerName": "no-such-container"}, expect=1)
    assert gone["said"] == "there is no container no-such-container"


# --- scripts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def bench(sqlite_db: Database, tmp_path: Path, now: datetime) -> AsyncIterator[Bench]:
    async with running(sqlite_db, tmp_path, now) as started:
        started.configure(first_run=started.watcher.first_run.__class__("all"), timeout=timedelta(seconds=60))
        yield started


async def given(bench: Bench, script: str, type: str, url: str) -> None:
    bench.script(script)
    bench.configure(args={"it": dict(connections.parse(type, url).value)})


async def test_postgres_in_an_async_main(bench: Bench, guarded: Guarded) -> None:
    script = """
    from watcher import postgres, trigger

    @trigger(key="id")
    async def main(it: dict):
        connection = await postgres(it, application_name="async_main")
        async with connection.cursor() as cursor:
            await cursor.execute("SELECT id FROM things ORDER BY id")
            async for (id,) in cursor:
                yield {"id": id}
    """
    await given(bench, script, "postgresql", guarded.url())
    assert (await bench.run()).outcome == "ok"
    assert await bench.keys() == ["1", "2"]
    wait_until(lambda: guarded.connections("async_main") == 0)


async def test_postgres_in_a_plain_main_that_fails(bench: Bench, guarded: Guarded) -> None:
    script = """
    from watcher import postgres

    kept = []

    def main(it: dict):
        connection = postgres.sync(it, application_name="plain_main")
        kept.append(connection)
        connection.execute("INSERT INTO things VALUES (3)")
        raise ValueError("on purpose")
    """
    await given(bench, script, "postgresql", guarded.url())
    assert "on purpose" in (await bench.run()).error
    wait_until(lambda: guarded.connections("plain_main") == 0)
    with psycopg.connect(guarded.url()) as connection:
        assert connection.execute("SELECT count(*) FROM things").fetchone() == (
            2,
        )  # what was not committed is not kept


async def test_mongo_in_both_kinds_of_main(bench: Bench, locked: LockedMongoDB) -> None:
    script = """
    from watcher import mongo

    async def main(it: dict):
        things = mongo(it).get_default_database().things
        return [{"id": each["_id"]} async for each in things.find()]
    """
    await given(bench, script, "mongodb", locked.url)
    assert (await bench.run()).outcome == "ok", (await bench.runs())[0]
    plain = """
    from watcher import mongo

    def main(it: dict):
        return [{"id": f"plain {each['_id']}"} for each in mongo.sync(it).get_default_database().things.find()]
    """
    bench.script(plain)
    assert (await bench.run()).outcome == "ok"
    assert await bench.keys() == ["1", "plain 1"]


async def test_redis_in_both_kinds_of_main(bench: Bench, redis: Redis) -> None:
    with redis.client() as client:
        client.set("greeting", "hello")
    script = """
    from watcher import redis

    async def main(it: dict):
        client = redis(it, decode_responses=True, client_name="async_main")
        return [{"id": await client.get("greeting")}]
    """
    await given(bench, script, "redis", redis.url)
    assert (await bench.run()).outcome == "ok"
    plain = """
    from watcher import redis

    def main(it: dict):
        return [{"id": "plain " + redis.sync(it, client_name="plain_main").get("greeting").decode()}]
    """
    bench.script(plain)
    assert (await bench.run()).outcome == "ok"
    assert await bench.keys() == ["hello", "plain hello"]

    def names() -> set[str]:
        with redis.client() as client:
            return {each["name"] for each in client.client_list()}

    wait_until(lambda: not names() & {"async_main", "plain_main"})


async def test_a_cluster_in_both_kinds_of_main(bench: Bench, cluster: Redis) -> None:
    script = """
    from watcher import redis

    async def main(it: dict):
        client = redis(it, decode_responses=True)
        await client.set("a", "1")
        return [{"id": await client.get("a")}]
    """
    await given(bench, script, "redis", f"redis+cluster://:{PASSWORD}@127.0.0.1:{cluster.port}")
    assert (await bench.run()).outcome == "ok", (await bench.runs())[0]
    bench.script(
        script.replace("async def", "def")
        .replace("redis(it", "redis.sync(it")
        .replace("await ", "")
        .replace('"1"', '"2"')
    )
    assert (await bench.run()).outcome == "ok"
    assert await bench.keys() == ["1", "2"]


async def test_upstash_in_both_kinds_of_main(bench: Bench, upstash: Upstash, redis: Redis) -> None:
    script = """
    from watcher import redis

    async def main(it: dict):
        client = redis(it)
        await client.set("pet", "cät")
        await client.xadd("barks", "*", {"loud": "yes"})
        return [{"id": await client.get("pet"), "barks": await client.xlen("barks")}]
    """
    await given(bench, script, "upstash", upstash.url)
    assert (await bench.run()).outcome == "ok", (await bench.runs())[0]
    with redis.client() as client:
        assert client.get("pet") == "cät".encode()
        client.set("pet", "dog")
    bench.script("from watcher import redis\ndef main(it: dict):\n    return [{'id': redis.sync(it).get('pet')}]\n")
    assert (await bench.run()).outcome == "ok"
    assert await bench.keys() == ["cät", "dog"]


async def test_mysql_in_a_plain_main(bench: Bench, mariadb: MariaDB) -> None:
    script = """
    from watcher import mysql

    def main(it: dict):
        with mysql.sync(it).cursor() as cursor:
            cursor.execute("SELECT 7")
            return [{"id": row[0]} for row in cursor]
    """
    await given(bench, script, "mysql", mariadb.create())
    assert (await bench.run()).outcome == "ok"
    assert await bench.keys() == ["7"]


CONFIG = """
database = "sqlite:///{where}/watcher.db"
[server]
bind = "127.0.0.1:{port}"

[storage.secondary.cold]
path = "{where}/cold"

[flows.sink]
url = "http://127.0.0.1:1/"

[watchers.reads]
trigger = "./reads.py"
cron = "0 0 1 1 *"
flow = "sink"
first_run = "all"
"""

READS = """
from watcher import objects, trigger

@trigger(key="id")
async def main():
    store = objects("cold")
    await store.put_async("u/watcher/a.txt", b"cold")
    objects().put("u/watcher/b.txt", b"warm")
    found = [bytes(await (await store.get_async("u/watcher/a.txt")).bytes_async())]
    found += [bytes(objects().get("u/watcher/b.txt").bytes())]
    listed = [meta["path"] for page in store.list("u/watcher/") for meta in page]
    try:
        store.put("u/someone/else.txt", b"")
    except Exception as error:
        found.append(f"{type(error).__name__} {listed}".encode())
    return [{"id": text.decode()} for text in found]
"""


async def test_objects_by_way_of_the_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = Service(tmp_path, CONFIG)
    (tmp_path / "reads.py").write_text(READS)
    service.start()
    try:
        await service.ready()
        arguments = ["run", "reads", "--config", str(tmp_path / "watcher.toml"), "--json"]
        code = await asyncio.to_thread(command_line, arguments)
        out, err = capsys.readouterr()
        assert code == 0, out + err + service.tail()
        assert (
            await asyncio.to_thread(command_line, ["items", "--config", str(tmp_path / "watcher.toml"), "--json"]) == 0
        )
        items = json.loads(capsys.readouterr().out)
        refused = "PermissionDeniedError ['u/watcher/a.txt']"
        assert {item["key"] for item in items} == {"cold", "warm", refused}
        typo = ["resource", "add", "redis", f"redis://me:{WRONG}@h/one", "--config", str(tmp_path / "watcher.toml")]
        assert await asyncio.to_thread(command_line, typo) == 2
        shown, caret = capsys.readouterr().err.splitlines()[-2:]
        assert shown[caret.index("^") :] == "one"
        assert WRONG not in shown
        assert (tmp_path / "cold/u/watcher/a.txt").read_bytes() == b"cold"
        assert await service.stop() == 0
    finally:
        service.kill()
