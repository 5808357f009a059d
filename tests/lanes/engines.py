"""Real flow engines, each in an environment and processes of its own: start, kill -9, start again, count the runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.lanes.harness import ROOT, Service, free_port, query, until
from tests.support.postgres import Postgres
from watcher.scripts.warden import descendants

ENGINES = Path(os.environ.get("WATCHER_ENGINES") or ROOT / ".engines")
START = 300.0  # seconds; a busy machine takes its time


class Http:
    """Just enough of a client for the engines' own APIs: JSON, a bearer token, cookies."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.headers: dict[str, str] = {}
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))

    def __call__(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, method=method)
        for name, text in (self.headers | {"content-type": "application/json"}).items():
            request.add_header(name, text)
        with self._opener.open(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def fine(self, path: str) -> bool:
        try:
            self("GET", path)
        except (OSError, ValueError):
            return False
        return True


class Engine:
    """One engine over one private directory. ``flow`` is the configuration of the flow that starts its runs."""

    name: ClassVar[str]
    version: ClassVar[str]
    idempotent: ClassVar[bool] = True
    rate: ClassVar[str] = ""
    at_once: ClassVar[int] = 8

    def __init__(self, where: Path) -> None:
        self.where = where
        where.mkdir()
        self.port = free_port()
        self.http = Http(f"http://127.0.0.1:{self.port}")
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        return self.http.base

    @property
    def home(self) -> Path:
        return ENGINES / self.name

    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.home / 'bin'}:{os.environ['PATH']}", "HOME": str(self.where), "LANG": "C.UTF-8"}

    def installed(self) -> bool:
        return (self.home / "bin").exists()

    def require(self) -> None:
        if not self.installed():
            pytest.skip(f"{self.name} is not installed: run tests/lanes/engines.sh {self.name}")

    def spawn(self, *command: str) -> None:
        with open(self.where / "engine.log", "ab") as log:
            self.processes.append(
                subprocess.Popen(
                    ["nice", "-n", "10", *command],
                    cwd=self.where,
                    env=self.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def run(self, *command: str) -> None:
        """A command of the engine's that must succeed."""
        done = subprocess.run(
            ["nice", "-n", "10", *command], cwd=self.where, env=self.environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"

    def tail(self) -> str:
        return (self.where / "engine.log").read_text(errors="replace")[-4000:]

    def kill(self) -> None:
        """kill -9 of every process of the engine at once."""
        for process in self.processes:
            for pid in (*descendants(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()

    def wait(self, path: str) -> None:
        def up() -> bool:
            for process in self.processes:
                assert process.poll() is None, f"{self.name} ended: {self.tail()}"
            return self.http.fine(path)

        until(up, START, f"{self.name} answers {path}", every=0.2)

    def prepare(self) -> None:
        """Whatever must be there before the first start."""

    def start(self) -> None:
        raise NotImplementedError

    def deploy(self) -> None:
        """Make the flow; the engine has started."""

    def flow(self) -> str:
        raise NotImplementedError

    def runs(self) -> list[str]:
        """Of every flow run, the key of the item that it was started for: from the engine's own API."""
        raise NotImplementedError

    def remarks(self) -> str:
        return ""

    def close(self) -> None:
        self.kill()


class Prefect(Engine):
    name = "prefect"
    version = "3.8.8"
    at_once = 2  # on SQLite, more requests that write at once than this are answered 503

    def environment(self) -> dict[str, str]:
        return super().environment() | {
            "PREFECT_HOME": str(self.where / "home"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }

    def start(self) -> None:
        self.spawn(str(self.home / "bin" / "prefect"), "server", "start", "--no-services", "--port", str(self.port))
        self.wait("/api/health")

    def deploy(self) -> None:
        flow = self.http("POST", "/api/flows/", {"name": "one"})
        schema = {"type": "object", "properties": {"id": {"type": "string"}, "n": {"type": "integer"}}}
        self.http(
            "POST",
            "/api/deployments/",
            {"name": "items", "flow_id": flow["id"], "parameter_openapi_schema": schema},
        )

    def flow(self) -> str:
        return f'preset = "prefect"\nurl = "{self.url}/api"\ndeployment = "one/items"\n'

    def runs(self) -> list[str]:
        found: list[str] = []
        while page := self.http("POST", "/api/flow_runs/filter", {"limit": 200, "offset": len(found)}):
            found += [run["parameters"]["id"] for run in page]
        return found


DAG = """
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG

with DAG("one", schedule=None, max_active_runs=64):
    EmptyOperator(task_id="nothing")
"""


class Airflow(Engine):
    """On PostgreSQL, which is not killed: on SQLite it answers most requests with 500, the database being locked."""

    name = "airflow"
    version = "3.3.2"
    at_once = 4

    def __init__(self, where: Path) -> None:
        super().__init__(where)
        self.password = secrets.token_hex(16)
        self.secret = secrets.token_hex(32)
        self.postgres = Postgres()
        self.database = ""

    def environment(self) -> dict[str, str]:
        return super().environment() | {
            "AIRFLOW_HOME": str(self.where / "home"),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": self.database,
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__DAGS_FOLDER": str(self.where / "dags"),
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(self.where / "passwords.json"),
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(self.port),
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API__SECRET_KEY": self.secret,
            "AIRFLOW__API_AUTH__JWT_SECRET": self.secret,
            "AIRFLOW__CORE__PARALLELISM": "2",
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "WARNING",
        }

    def airflow(self, *arguments: str) -> tuple[str, ...]:
        return (str(self.home / "bin" / "airflow"), *arguments)

    def prepare(self) -> None:
        (self.where / "dags").mkdir()
        (self.where / "dags" / "one.py").write_text(DAG)
        (self.where / "passwords.json").write_text(json.dumps({"admin": self.password}))
        self.database = self.postgres.create().replace("postgresql://", "postgresql+psycopg2://", 1)
        self.run(*self.airflow("db", "migrate"))

    def start(self) -> None:
        for piece in ("api-server", "scheduler", "dag-processor"):
            self.spawn(*self.airflow(piece))
        self.wait("/api/v2/monitor/health")
        self.http.headers.clear()
        token = self.http("POST", "/auth/token", {"username": "admin", "password": self.password})
        self.http.headers["authorization"] = f"Bearer {token['access_token']}"
        self.wait("/api/v2/dags/one")

    def flow(self) -> str:
        return f'preset = "airflow"\nurl = "{self.url}"\ndag = "one"\nuser = "admin"\npassword = "{self.password}"\n'

    def close(self) -> None:
        super().close()
        self.postgres.stop()

    def dag_runs(self) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        while page := self.http("GET", f"/api/v2/dags/one/dagRuns?limit=100&offset={len(found)}")["dag_runs"]:
            found += page
        return found

    def runs(self) -> list[str]:
        return [run["conf"]["id"] for run in self.dag_runs()]

    def remarks(self) -> str:
        with contextlib.suppress(AssertionError):
            until(lambda: all(run["state"] == "success" for run in self.dag_runs()), 180, "all ran", every=3)
        return f"{sum(run['state'] == 'success' for run in self.dag_runs())} DAG runs ended well"


WORKFLOW = {
    "id": "onePerItem",
    "name": "one",
    "active": False,
    "nodes": [
        {
            "id": "w",
            "name": "Webhook",
            "type": "n8n-nodes-base.webhook",
            "typeVersion": 2,
            "position": [0, 0],
            "webhookId": "one",
            "parameters": {"httpMethod": "POST", "path": "one", "responseMode": "onReceived", "options": {}},
        },
        {
            "id": "n",
            "name": "Nothing",
            "type": "n8n-nodes-base.noOp",
            "typeVersion": 1,
            "position": [200, 0],
            "parameters": {},
        },
    ],
    "connections": {"Webhook": {"main": [[{"node": "Nothing", "type": "main", "index": 0}]]}},
    "settings": {"executionOrder": "v1"},
}


class N8n(Engine):
    name = "n8n"
    version = "2.40.7"
    idempotent = False
    rate = "40/s"

    def environment(self) -> dict[str, str]:
        return super().environment() | {
            "N8N_USER_FOLDER": str(self.where),
            "N8N_PORT": str(self.port),
            "N8N_LISTEN_ADDRESS": "127.0.0.1",
            "N8N_SECURE_COOKIE": "false",
            "N8N_DIAGNOSTICS_ENABLED": "false",
            "N8N_VERSION_NOTIFICATIONS_ENABLED": "false",
            "N8N_TEMPLATES_ENABLED": "false",
            "N8N_PERSONALIZATION_ENABLED": "false",
            "N8N_RUNNERS_BROKER_PORT": str(self.broker),
            "EXECUTIONS_DATA_SAVE_ON_SUCCESS": "all",
        }

    def __init__(self, where: Path) -> None:
        super().__init__(where)
        self.broker = free_port()

    def installed(self) -> bool:
        return (self.home / "node_modules" / "n8n").exists()

    def n8n(self, *arguments: str) -> tuple[str, ...]:
        return (str(self.home / "bin" / "node"), str(self.home / "node_modules" / "n8n" / "bin" / "n8n"), *arguments)

    def prepare(self) -> None:
        (self.where / "one.json").write_text(json.dumps([WORKFLOW]))
        self.run(*self.n8n("import:workflow", "--input=one.json"))
        self.run(*self.n8n("publish:workflow", "--id=onePerItem"))

    def start(self) -> None:
        self.spawn(*self.n8n("start"))
        self.wait("/healthz/readiness")

    def deploy(self) -> None:
        """Nobody may ask n8n before it has an owner."""
        owner = {"email": "a@example.com", "firstName": "A", "lastName": "B", "password": secrets.token_hex(8) + "Aa1"}
        self.http("POST", "/rest/owner/setup", owner)
        key = {"label": "lane", "expiresAt": None, "scopes": ["execution:list", "execution:read"]}
        made = self.http("POST", "/rest/api-keys", key)
        self.http.headers["x-n8n-api-key"] = made["data"]["rawApiKey"]

    def flow(self) -> str:
        return f'preset = "n8n"\nurl = "{self.url}"\npath = "one"\n'

    def executions(self) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        path = more = "/api/v1/executions?limit=100&includeData=true"
        while more:
            page = self.http("GET", more)
            found += page["data"]
            cursor = page.get("nextCursor")
            more = f"{path}&cursor={urllib.parse.quote(cursor)}" if cursor else ""
        return found

    def runs(self) -> list[str]:
        def key(execution: Mapping[str, Any]) -> str:
            # An execution that crashed has no results, only what it was going to work on.
            found = re.search(r'"item": ?\{"id": ?"(\w+)"', json.dumps(execution["data"]))
            return found[1] if found else f"? {execution['id']}"

        return [key(execution) for execution in self.executions()]

    def remarks(self) -> str:
        def states() -> list[str]:
            return [str(execution["status"]) for execution in self.executions()]

        until(lambda: not {"new", "running", "waiting"} & {*states()}, 60, "all ended", every=1)
        found = states()
        return ", ".join(f"{found.count(state)} {state}" for state in sorted({*found}))


STEP = '''"""Writes down that it ran."""
import os


def main(id: str, n: int = 0) -> str:
    ran = os.open({ran!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(ran, id.encode() + b"\\n")
    os.close(ran)
    return id
'''

OURS = """
database = "sqlite:///watcher.db"

[server]
bind = "127.0.0.1:{port}"

[flows.one]
steps = "./step.py"
at_once = 8
"""


class Ours(Engine):
    """A second watcher service, whose local flow is reached as Windmill's flows are."""

    name = "windmill"
    version = "our own endpoint"
    rate = "40/s"

    def __init__(self, where: Path) -> None:
        super().__init__(where)
        self.service = Service(where, OURS.format(port=self.port), self.port)
        self.token = ""

    def installed(self) -> bool:
        return True

    def prepare(self) -> None:
        self.service.write("step.py", STEP.format(ran=str(self.where / "ran")))

    def start(self) -> None:
        self.service.start()
        assert self.service.ready(60), self.service.tail()

    def deploy(self) -> None:
        command = [sys.executable, "-m", "watcher", "token", "create", "lane", "-c", "watcher.toml"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        made = subprocess.run(command, cwd=self.where, env=environment, capture_output=True, text=True, check=True)
        self.token = made.stdout.split()[-1]

    def kill(self) -> None:
        self.service.kill()

    def tail(self) -> str:
        return self.service.tail()

    def flow(self) -> str:
        return f'preset = "windmill"\nurl = "{self.url}"\npath = "one"\ntoken = "{self.token}"\n'

    def jobs(self) -> Sequence[tuple[Any, ...]]:
        return query(self.where / "watcher.db", "SELECT id, args, status FROM job")

    def runs(self) -> list[str]:
        http = Http(self.url)
        http.headers["authorization"] = f"Bearer {self.token}"
        return [http("GET", f"/api/w/main/jobs_u/get/{id}")["args"].get("id", f"? {id}") for id, _, _ in self.jobs()]

    def remarks(self) -> str:
        until(lambda: all(status not in ("queued", "running") for *_, status in self.jobs()), 60, "all ran")
        ran = (self.where / "ran").read_text().split()
        ended = sum(status == "succeeded" for *_, status in self.jobs())
        return f"{ended} jobs succeeded, {len(ran)} steps ran for {len(set(ran))} items"
