"""What scripts open databases with: the field's own clients, closed when the run ends, whatever ends it.

Exported by ``watcher``. Each takes the path of a resource, its value, or a connection string; whatever else is given
goes to the client as it is.
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from watcher import connections, context
from watcher.connections import clients
from watcher.errors import TriggerError
from watcher.values import Json

if TYPE_CHECKING:
    from obstore.store import ObjectStore
    from psycopg import AsyncConnection, Connection
    from pymongo import AsyncMongoClient, MongoClient
    from pymysql.connections import Connection as MySQLConnection

T = TypeVar("T")
Resource = str | Mapping[str, Json]


class _Postgres:
    """``connection = await postgres("u/me/db")``, and in a plain main ``postgres.sync("u/me/db")``.

    A transaction that is not committed when the run ends is rolled back, as everywhere in psycopg; with
    ``autocommit=True`` there is none.
    """

    async def __call__(self, resource: Resource, **options: Any) -> AsyncConnection[Any]:
        """psycopg's AsyncConnection, open."""
        connection = await clients.postgres(_value("postgresql", resource), **options)
        return _kept(connection, connection.close)

    def sync(self, resource: Resource, **options: Any) -> Connection[Any]:
        """psycopg's Connection, open."""
        connection = clients.postgres_sync(_value("postgresql", resource), **options)
        return _kept(connection, connection.close)


class _Mongo:
    """``client = mongo("u/me/db")``, and in a plain main ``mongo.sync("u/me/db")``.

    ``client.get_default_database()`` is the database that the resource names.
    """

    def __call__(self, resource: Resource, **options: Any) -> AsyncMongoClient[Any]:
        """pymongo's AsyncMongoClient."""
        client = clients.mongo(_value("mongodb", resource), **options)
        return _kept(client, client.close)

    def sync(self, resource: Resource, **options: Any) -> MongoClient[Any]:
        """pymongo's MongoClient."""
        client = clients.mongo_sync(_value("mongodb", resource), **options)
        return _kept(client, client.close)


class _Redis:
    """``client = redis("u/me/cache")``, and in a plain main ``redis.sync("u/me/cache")``.

    A resource of type ``upstash`` gives the client of upstash-redis, whose commands have the same names.
    """

    def __call__(self, resource: Resource, **options: Any) -> Any:
        """redis-py's ``redis.asyncio.Redis`` (or RedisCluster), or ``upstash_redis.asyncio.Redis``."""
        client = clients.redis(_value("redis", resource), **options)
        return _kept(client, getattr(client, "aclose", None) or client.close)

    def sync(self, resource: Resource, **options: Any) -> Any:
        """redis-py's ``redis.Redis`` (or RedisCluster), or ``upstash_redis.Redis``."""
        client = clients.redis_sync(_value("redis", resource), **options)
        return _kept(client, client.close)


class _MySQL:
    """``connection = mysql.sync("u/me/db")``: MySQL and MariaDB, whose client has no other way."""

    def sync(self, resource: Resource, **options: Any) -> MySQLConnection[Any]:
        """pymysql's Connection, open."""
        connection = clients.mysql_sync(_value("mysql", resource), **options)
        return _kept(connection, connection.close)


postgres = _Postgres()
mysql = _MySQL()
mongo = _Mongo()
redis = _Redis()


def objects(storage: str | Mapping[str, Json] | None = None) -> ObjectStore:
    """obstore's store: the workspace's primary storage, a secondary one by its name, or that of a resource.

        store = objects("secondary")
        await store.put_async("u/me/report.csv", b"…")      # store.put in a plain main

    The workspace's own are reached through the service with the run's token: their credentials stay there, their
    permissions hold, and a folder is like a bucket. A path such as u/me/bucket, or the value of a resource of type
    s3, azure_blob or gcs, is opened with the credentials in it.
    """
    clients.module("obstore")
    from watcher.objects import cloud

    value: Any = context.get_resource(storage) if isinstance(storage, str) and "/" in storage else storage
    if not isinstance(value, Mapping):
        value = _proxied(value)
    kind = "azure_blob" if "accountName" in value else "gcs" if "serviceAccountKey" in value else "s3"
    return cloud.store(kind, value)


def _proxied(storage: str | None) -> Json:
    """How this run reaches a storage of the workspace, as a resource of type s3."""
    environ = os.environ
    if "BASE_INTERNAL_URL" not in environ or "WM_TOKEN" not in environ:
        raise TriggerError(
            "objects() asks the service for the way, which has no API: add [server] to the configuration",
            kind="missing",
        )
    base = urlsplit(environ["BASE_INTERNAL_URL"])
    made = http.client.HTTPSConnection if base.scheme == "https" else http.client.HTTPConnection
    connection = made(base.netloc, timeout=30)
    try:
        connection.request(
            "POST",
            f"{base.path.rstrip('/')}/api/w/{environ.get('WM_WORKSPACE', 'main')}/job_helpers/v2/s3_resource_info",
            json.dumps({"storage": storage}),
            {"Authorization": f"Bearer {environ['WM_TOKEN']}", "Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        body = answer.read(64 * 1024)
    except (OSError, http.client.HTTPException) as error:
        raise TriggerError(f"objects(): the service did not answer: {error}", kind="unreachable") from error
    finally:
        connection.close()
    if answer.status != 200:
        said = body.decode("utf-8", "replace")[:300]
        raise TriggerError(f"objects({storage or ''}): {said}", kind="missing" if answer.status == 404 else "http")
    return json.loads(body)


def _value(kind: str, resource: Resource) -> Mapping[str, Json]:
    """The value of a resource, its references followed. TriggerError says what was given instead."""
    if isinstance(resource, str):
        if "://" in resource:
            over_rest = kind == "redis" and resource.startswith(("https://", "http://"))
            return connections.parse("upstash" if over_rest else kind, resource).value
        resource = context.get_resource(resource)
    if isinstance(resource, Mapping) and resource:
        return resource
    raise TriggerError(f"a resource of type {kind} is an object, or the path of one such as u/me/db", kind="arguments")


def _kept(client: T, close: Callable[[], Awaitable[None] | None]) -> T:
    """The client, to be closed at the end of the run; in a test that calls main itself, by that test."""
    try:
        run = context.current()
    except RuntimeError:
        return client
    run.at_end(close)
    return client
