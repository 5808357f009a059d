"""Clients of databases, made from a resource's value: the field's own, imported when the first one is asked for."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from watcher import connections
from watcher.connections import mysql as mysql_strings
from watcher.connections import redis as redis_strings
from watcher.errors import TriggerError

if TYPE_CHECKING:
    from psycopg import AsyncConnection, Connection
    from pymongo import AsyncMongoClient, MongoClient
    from pymysql.connections import Connection as MySQLConnection

Value = Mapping[str, Any]

_EXTRAS = {
    "psycopg": "postgres", "pymongo": "mongodb", "redis": "redis", "upstash_redis": "upstash", "pymysql": "mysql",
    "obstore": "objects",
}  # fmt: skip
_POOLED = ("-pooler.", ".pooler.supabase.com")
"""In the names of hosts behind which another connection may answer the next statement (Neon, Supabase)."""


def module(name: str) -> Any:
    """A client's module. TriggerError, kind ``missing``, says how to install it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        package = top.replace("_", "-")
        raise TriggerError(
            f"{package} is not installed: `pip install 'change-watcher[{_EXTRAS[top]}]'`; a script with packages of "
            f"its own names {package} among them",
            kind="missing",
        ) from error


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


async def postgres(value: Value, **options: Any) -> AsyncConnection[Any]:
    """A connection, open."""
    with _postgres(value, options) as arguments:
        opened: AsyncConnection[Any] = await module("psycopg").AsyncConnection.connect(**arguments)
        return opened


def postgres_sync(value: Value, **options: Any) -> Connection[Any]:
    """A connection, open."""
    with _postgres(value, options) as arguments:
        opened: Connection[Any] = module("psycopg").connect(**arguments)
        return opened


@contextmanager
def _postgres(value: Value, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What psycopg's connect takes. A certificate in the resource is a file only as long as it connects."""
    arguments = {
        name: each for name, each in value.items() if each not in (None, "") and name != "root_certificate_pem"
    }
    if arguments.get("port") == 6543 or any(name in str(value.get("host", "")) for name in _POOLED):
        arguments["prepare_threshold"] = None
    certificate = value.get("root_certificate_pem")
    if not certificate:
        yield {**arguments, **options}
        return
    file = os.memfd_create("root_certificate")
    try:
        os.write(file, str(certificate).encode())
        yield {**arguments, "sslrootcert": f"/proc/self/fd/{file}", **options}
    finally:
        os.close(file)


# --- MongoDB ----------------------------------------------------------------------------------------------------------


def mongo(value: Value, **options: Any) -> AsyncMongoClient[Any]:
    """A client, which connects at the first operation. ``get_default_database()`` is the resource's."""
    client: AsyncMongoClient[Any] = module("pymongo").AsyncMongoClient(connections.write("mongodb", value), **options)
    return client


def mongo_sync(value: Value, **options: Any) -> MongoClient[Any]:
    """A client, which connects at the first operation. ``get_default_database()`` is the resource's."""
    client: MongoClient[Any] = module("pymongo").MongoClient(connections.write("mongodb", value), **options)
    return client


# --- Redis and Upstash ------------------------------------------------------------------------------------------------


def redis(value: Value, **options: Any) -> Any:
    """redis-py's client or its client of clusters, Upstash's for a resource of Upstash. Connects when first used."""
    return _redis(value, options, "redis.asyncio", "upstash_redis.asyncio")


def redis_sync(value: Value, **options: Any) -> Any:
    """redis-py's client or its client of clusters, Upstash's for a resource of Upstash. Connects when first used."""
    return _redis(value, options, "redis", "upstash_redis")


def _redis(value: Value, options: Mapping[str, Any], client: str, over_rest: str) -> Any:
    if "token" in value and "url" in value:
        known = {"url": str(value["url"]), "token": str(value["token"]), "allow_telemetry": False}
        return module(over_rest).Redis(**{**known, **options})
    host = str(value.get("host", ""))
    rest = {k: v for k, v in value.items() if k not in redis_strings.OWN and v not in (None, "")}
    arguments: dict[str, Any] = {k: value[k] for k in ("username", "password") if value.get(k)} | rest
    if host.startswith("/"):
        arguments |= {"unix_socket_path": host, "db": int(value.get("db") or 0)}
        return module(client).Redis(**{**arguments, **options})
    arguments |= {"host": host, "port": int(value.get("port") or redis_strings.PORT)}
    if value.get("tls"):
        arguments["ssl"] = True
    if not value.get("cluster"):
        return module(client).Redis(**{**arguments, "db": int(value.get("db") or 0), **options})
    nodes = value.get("nodes") or []
    if nodes:
        node = module(f"{client}.cluster").ClusterNode
        arguments["startup_nodes"] = [
            node(str(each["host"]), int(each.get("port") or redis_strings.PORT)) for each in [arguments, *nodes]
        ]
    return module(client).RedisCluster(**{**arguments, **options})


# --- MySQL and MariaDB ------------------------------------------------------------------------------------------------


def mysql_sync(value: Value, **options: Any) -> MySQLConnection[Any]:
    """A connection, open."""
    host = str(value.get("host", ""))
    rest = {k: v for k, v in value.items() if k not in mysql_strings.OWN and v not in (None, "")}
    certificates = {name: rest.pop(name, None) for name in ("ssl_ca", "ssl_cert", "ssl_key")}
    arguments = {k: value[k] for k in ("user", "password", "database") if value.get(k)} | rest
    if host.startswith("/"):
        arguments["unix_socket"] = host
    else:
        arguments |= {"host": host, "port": int(value.get("port") or mysql_strings.PORT)}
    if value.get("ssl"):
        arguments["ssl"] = _tls(str(value.get("ssl_mode") or ""), certificates)
    elif value.get("ssl") is False:
        arguments["ssl_disabled"] = True
    opened: MySQLConnection[Any] = module("pymysql").connect(**{**arguments, **options})
    return opened


def _tls(mode: str, certificates: Mapping[str, Any]) -> ssl.SSLContext:
    """REQUIRED encrypts and checks nothing, as MySQL's own clients do; the VERIFY_… check what they say."""
    context = ssl.create_default_context(cafile=certificates["ssl_ca"])
    context.check_hostname = mode == "VERIFY_IDENTITY"
    if not mode.startswith("VERIFY_"):
        context.verify_mode = ssl.CERT_NONE
    if certificates["ssl_cert"]:
        context.load_cert_chain(certificates["ssl_cert"], certificates["ssl_key"])
    return context
