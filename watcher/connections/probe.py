"""Whether a resource works: one real connection with the field's own client, and a verdict on it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from watcher import connections
from watcher.connections import clients
from watcher.connections.verdicts import Place, Verdict, began_no_tls, judge, judge_store
from watcher.errors import TriggerError
from watcher.values import Json

if TYPE_CHECKING:
    from watcher.objects import Storage

TESTED = ("postgresql", "mysql", "mongodb", "redis", "upstash", "s3", "azure_blob", "gcs")
"""The resource types that can be tested."""

OLDEST = {"postgresql": (10, "PostgreSQL 10"), "redis": (5, "Redis 5, which has streams"), "mysql": (5, "MySQL 5.7")}
"""The first number of the oldest version that its client, or what we read with it, works with."""

STORES = ("s3", "azure_blob", "gcs")
AGAIN = 3.0  # seconds for a second look, without TLS
_HIDDEN = "*****"

_TABLES = """
SELECT count(*), count(*) FILTER (WHERE has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'))
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'v', 'm', 'p', 'f') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
AND n.nspname NOT LIKE 'pg\\_%'
"""

Value = Mapping[str, Any]


async def probe(
    type: str, value: Json, seconds: float, store: Callable[[Json, str], Awaitable[Storage]] | None = None
) -> Verdict:
    """Connect, look, hang up. ``store`` opens a resource of object storage. Never raises for what the server does.

    No secret of the resource is in the verdict, whatever a server or a client may say.
    """
    if type in STORES and store is not None:
        return _clean(await _within(seconds, _store(store, value, type), _store_place(type, value)), type, value)
    place = _place(type, value)
    work = {"postgresql": _postgresql, "mysql": _mysql, "mongodb": _mongodb, "redis": _redis, "upstash": _upstash}
    verdict = await _within(seconds, work[type](value, place, seconds), place)
    if verdict.kind == "timeout" and value.get("tls"):
        verdict = await _silent(value, place) or verdict
    return _clean(verdict, type, value)


async def _silent(value: Value, place: Place) -> Verdict | None:
    """A server that does not speak TLS may wait for the end of what it takes for a command, for ever."""
    first = value if value.get("host") else (value.get("servers") or [{}])[0]
    try:
        async with asyncio.timeout(AGAIN):
            _, writer = await asyncio.open_connection(first.get("host"), first.get("port"))
    except (OSError, TimeoutError):
        return None
    writer.close()
    return began_no_tls(place)


async def _within(seconds: float, work: Awaitable[Verdict], place: Place) -> Verdict:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TriggerError as error:
        return Verdict("client", str(error), "install it where the service runs")
    except Exception as error:  # whatever a client raises, the verdict is on the connection
        return judge_store(error, place) if place.type in STORES else judge(error, place)


def _clean(verdict: Verdict, type: str, value: Json) -> Verdict:
    """Without the secrets of the resource, should a server have said one."""
    said, do = verdict.said, verdict.do
    for secret in sorted(_secrets(type, value), key=len, reverse=True):
        said, do = said.replace(secret, _HIDDEN), do.replace(secret, _HIDDEN)
    return replace(verdict, said=said, do=do)


def _secrets(type: str, value: Json) -> list[str]:
    if not isinstance(value, Mapping):
        return []
    if type in connections.TYPES:
        return list(connections.secrets(type, value).values())
    return [str(value[name]) for name in ("secretKey", "accessKey", "token", "serviceAccountKey") if value.get(name)]


def _place(type: str, value: Value) -> Place:
    """What the resource says of where it leads."""
    credential = value.get("credential") or {}
    user = value.get("user") or value.get("username") or credential.get("username") or ""
    database = value.get("dbname") or value.get("database") or value.get("db")
    shown = connections.shown(
        type, {k: v for k, v in value.items() if k not in ("user", "username", "password", "credential")}
    )
    authority = shown.partition("://")[2]
    found = re.match(r"[^/?]*", authority)
    where = str(value["host"]) if str(value.get("host", "")).startswith("/") else (found[0] if found else "")
    return Place(type, where, str(user), "" if database is None else str(database))


# --- each with its client ---------------------------------------------------------------------------------------------


async def _postgresql(value: Value, place: Place, seconds: float) -> Verdict:
    limit = {} if "connect_timeout" in value else {"connect_timeout": max(2, int(seconds))}
    connection = await clients.postgres(value, autocommit=True, **limit)
    try:
        said = connection.info.parameter_status("server_version") or ""
        if old := _too_old("postgresql", said, place):
            return old
        row = await (await connection.execute(_TABLES)).fetchone()
        encrypted = connection.pgconn.ssl_in_use
    finally:
        await connection.close()
    tables, readable = row or (0, 0)
    if tables and not readable:
        do = f"let an administrator GRANT SELECT on them to {place.user}"
        return Verdict("permissions", f"{place.who} may read none of the {tables} tables of {place.database}", do, said)
    at = f"PostgreSQL {said} at {place.where}{', encrypted' if encrypted else ''}"
    return Verdict("ok", f"{at}: {place.who} may read {readable} of {tables} tables of {place.database}", "", said)


async def _mysql(value: Value, place: Place, seconds: float) -> Verdict:
    def work() -> tuple[str, int]:
        limits = {name: max(1, int(seconds)) for name in ("connect_timeout", "read_timeout", "write_timeout")}
        connection = clients.mysql_sync(value, **{k: v for k, v in limits.items() if k not in value})
        try:
            with connection.cursor() as cursor:
                cursor.execute(
                    "SELECT VERSION(), COUNT(*) FROM information_schema.tables WHERE table_schema = DATABASE()"
                )
                version, tables = cursor.fetchone()
                return str(version), int(tables)
        finally:
            connection.close()

    version, tables = await asyncio.to_thread(work)
    if old := _too_old("mysql", version, place):
        return old
    product = "MariaDB" if "mariadb" in version.lower() else "MySQL"
    said = f"{product} {version} at {place.where}: {place.who} sees {tables} tables of {place.database}"
    return Verdict("ok", said, "", version)


async def _mongodb(value: Value, place: Place, seconds: float) -> Verdict:
    milliseconds = int(seconds * 900)  # a little less than all of it: it then says which server had which trouble
    limits = {"serverSelectionTimeoutMS": milliseconds, "connectTimeoutMS": milliseconds}
    client = clients.mongo(value, **limits)
    try:
        version = str((await client.server_info())["version"])
        listed = await client.admin.command("listDatabases", nameOnly=True, authorizedDatabases=True)
        names = {each["name"] for each in listed["databases"]}
        collections = await client[place.database].list_collection_names()
    finally:
        await client.close()
    if place.database not in names and not collections:
        do = "look for a typo in its name; the first document that is written to it creates it"
        return Verdict("no_database", f"{place.where} has no database {place.database}", do, version)
    said = f"MongoDB {version} at {place.where}: {len(collections)} collections in {place.database}"
    return Verdict("ok", said, "", version)


async def _redis(value: Value, place: Place, seconds: float) -> Verdict:
    if "token" in value and "url" in value:
        return await _upstash(value, place, seconds)
    limits: dict[str, Any] = {"socket_timeout": seconds, "socket_connect_timeout": seconds}
    limits["retry"] = clients.module("redis.asyncio.retry").Retry(clients.module("redis.backoff").NoBackoff(), 0)
    client = clients.redis(value, **limits)
    try:
        await client.ping()
        facts = await _redis_facts(client)
    finally:
        await client.aclose()
    version = str(facts.get("valkey_version") or facts.get("redis_version") or "")
    if version and (old := _too_old("redis", version, place)):
        return old
    if "cluster" in (facts.get("redis_mode"), facts.get("server_mode")) and not value.get("cluster"):
        return Verdict("other", f"{place.where} is of a cluster", "say cluster = true in the resource", version)
    product = "Valkey" if facts.get("valkey_version") else "Redis"
    return Verdict(
        "ok", f"{product} {version} at {place.where}: it answers {place.who}".replace("  ", " "), "", version
    )


async def _redis_facts(client: Any) -> Mapping[str, Any]:
    """What INFO says; nothing where this user may not ask."""
    try:
        found = await client.info("server")
    except clients.module("redis.exceptions").ResponseError:
        return {}
    if "redis_version" in found:
        return dict(found)
    return next((each for each in found.values() if isinstance(each, Mapping)), {})  # a cluster's: by node


async def _upstash(value: Value, place: Place, seconds: float) -> Verdict:
    client = clients.redis(value, rest_retries=0)
    try:
        await client.ping()
    finally:
        await client.close()
    return Verdict("ok", f"Upstash at {place.where} takes the token")


async def _store(store: Callable[[Json, str], Awaitable[Storage]], value: Json, type: str) -> Verdict:
    opened = await store(value, type)
    found = await opened.list(limit=1)
    what = "at least one object" if found else "no object yet"
    return Verdict("ok", f"{_bucket(value)} can be listed: {what} in it")


def _store_place(type: str, value: Json) -> Place:
    said = value if isinstance(value, Mapping) else {}
    address = str(said.get("endPoint") or said.get("endpoint") or "")
    usual = {"s3": f"s3.{said.get('region') or 'us-east-1'}.amazonaws.com", "gcs": "storage.googleapis.com"}
    host = address.rpartition("://")[2].partition("/")[0] or usual.get(type, "blob.core.windows.net")
    return Place(type, host, database=_bucket(value))


def _bucket(value: Json) -> str:
    if not isinstance(value, Mapping):
        return "the bucket"
    container = value.get("containerName")
    return f"container {container}" if container else f"bucket {value.get('bucket')}"


def _too_old(type: str, version: str, place: Place) -> Verdict | None:
    number = re.match(r"\d+", version)
    least, name = OLDEST[type]
    if number is None or int(number[0]) >= least:
        return None
    return Verdict(
        "version", f"{place.where} is of version {version}, which is too old", f"upgrade it: {name} or later", version
    )
