"""Redis's and Valkey's connection strings: TLS, users, databases, clusters and sockets.

https://www.iana.org/assignments/uri-schemes/prov/redis, and what redis-py adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from watcher.connections import text
from watcher.connections.text import Parameter, Split
from watcher.values import Json

SCHEMES = {
    "redis": "", "rediss": "tls", "valkey": "", "valkeys": "tls", "unix": "socket", "redis+socket": "socket",
    "redis+unix": "socket", "redis+cluster": "cluster", "rediss+cluster": "tls cluster", "redis-cluster": "cluster",
    "rediss-cluster": "tls cluster",
}  # fmt: skip
SECRETS = ("password",)
PORT = 6379

_NUMBERS = ("max_connections", "health_check_interval", "protocol")
_SECONDS = ("socket_timeout", "socket_connect_timeout")
_TRUTHS = ("socket_keepalive", "retry_on_timeout", "ssl_check_hostname", "decode_responses")
_TEXTS = ("client_name", "encoding", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_CHOICES = {"ssl_cert_reqs": ("none", "optional", "required")}
_KNOWN = ("db", "username", "password", "cluster", *_NUMBERS, *_SECONDS, *_TRUTHS, *_TEXTS, *_CHOICES)
HARMLESS = ("db", "cluster", *_NUMBERS, *_SECONDS, *_TRUTHS, "client_name", *_CHOICES)
OWN = ("host", "port", "username", "password", "db", "tls", "cluster", "nodes")


def read(found: Split) -> dict[str, Json]:
    """The resource of a connection string; mistakes are noted in ``found``."""
    means = SCHEMES[found.scheme.value]
    value: dict[str, Json] = {}
    if "socket" in means:
        _socket(found, value)
    else:
        _servers(found, value, "cluster" in means)
        value |= {"tls": "tls" in means}
        if found.path.value:
            value["db"] = _db(found, found.path.value, found.path.start, found.path.end)
    for parameter in found.parameters:
        _parameter(found, parameter, value)
    if found.user:
        value["username"] = found.user.value
    if found.password:
        value["password"] = found.password.value
    value.setdefault("db", 0)
    _check(found, value)
    return value


def _socket(found: Split, value: dict[str, Json]) -> None:
    if found.hosts:
        host = found.hosts[0]
        found.wrong("a socket has no host", host.start, host.end, "its path begins with a third slash: unix:///run/…")
    value["host"] = "/" + found.path.value


def _servers(found: Split, value: dict[str, Json], cluster: bool) -> None:
    if not found.hosts:
        found.wrong("no host", found.scheme.end + 3, found.scheme.end + 4)
        return
    first, *further = found.hosts
    value["host"] = first.name
    if first.port or not first.name.startswith("/"):
        value["port"] = first.port or PORT
    if cluster or further:  # redis-py's and others' way: several hosts are the nodes of one cluster
        value["cluster"] = True
    if further:
        value["nodes"] = [{"host": host.name, "port": host.port or PORT} for host in further]


def _db(found: Split, number: str, start: int, end: int) -> int:
    if number.isascii() and number.isdigit() and len(number) < 6:
        return int(number)
    found.wrong("a database of Redis is a number", start, max(end, start + 1), "such as 0")
    return 0


def _parameter(found: Split, parameter: Parameter, value: dict[str, Json]) -> None:
    name = parameter.name
    if name == "virtual_host":
        name = "db"
    if name not in _KNOWN:
        text.unknown(found, parameter, _KNOWN)
    elif not text.once(found, parameter, value, name):
        pass
    elif name == "db":
        value["db"] = _db(found, parameter.value, parameter.value_start, parameter.end)
    elif name in ("cluster", *_TRUTHS):
        if text.truth(found, parameter):
            value[name] = True
        elif name != "cluster":
            value[name] = False
    elif name in _NUMBERS:
        value[name] = text.number(found, parameter)
    elif name in _CHOICES:
        value[name] = text.chosen(found, parameter, _CHOICES[name])
    elif name in _SECONDS:
        value[name] = _seconds(found, parameter)
    elif parameter.value:
        value[name] = parameter.value


def _seconds(found: Split, parameter: Parameter) -> float:
    try:
        seconds = float(parameter.value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        found.wrong(f"{parameter.name} is a number of seconds", parameter.value_start, parameter.end)
    return seconds


def _check(found: Split, value: Mapping[str, Json]) -> None:
    host = str(value.get("host", ""))
    if value.get("cluster") and value["db"]:
        at = found.path if found.path.value else found.scheme
        found.wrong("a cluster has database 0 only", at.start, at.end)
    if host.endswith(".upstash.io") and not value.get("tls"):
        found.wrong("Upstash speaks TLS only", found.scheme.start, found.scheme.end, "write rediss://")


def write(value: Mapping[str, Any]) -> str:
    """The connection string of a resource."""
    host, pairs = (
        str(value.get("host", "")),
        [(k, v) for k, v in value.items() if k not in OWN and v not in (None, "")],
    )
    user, db = text.user_info(value.get("username"), value.get("password")), int(value.get("db") or 0)
    if host.startswith("/") and not value.get("tls") and not value.get("cluster"):
        path = "/".join(map(text.escaped, host.split("/")))
        return f"unix://{user}{path}{text.query([*([('db', db)] if db else []), *pairs])}"
    scheme = ("rediss" if value.get("tls") else "redis") + ("+cluster" if value.get("cluster") else "")
    nodes = [{"host": host, "port": value.get("port")}, *(value.get("nodes") or [])]
    listed = ",".join(text.host_port(str(node["host"]), node.get("port")) for node in nodes)
    return f"{scheme}://{user}{listed}/{db}{text.query(pairs)}"
