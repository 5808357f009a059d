"""PostgreSQL's connection strings, as libpq reads them: also Neon's and Supabase's.

https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from watcher.connections import text
from watcher.connections.text import Parameter, Split
from watcher.values import Json

SCHEMES = {
    "postgresql": "", "postgres": "", "postgresql+psycopg": "", "postgresql+asyncpg": "", "postgresql+psycopg2": "",
}  # fmt: skip
SECRETS = ("password", "sslpassword")
PORT = 5432

SSLMODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_CHOICES = {
    "sslmode": SSLMODES,
    "channel_binding": ("disable", "prefer", "require"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
    "load_balance_hosts": ("disable", "random"),
    "gssencmode": ("disable", "prefer", "require"),
    "sslnegotiation": ("postgres", "direct"),
    "sslcertmode": ("disable", "allow", "require"),
}
_NUMBERS = (
    "connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout",
    "sslcompression", "sslsni", "gssdelegation",
)  # fmt: skip
_TEXTS = (
    "options", "application_name", "fallback_application_name", "client_encoding", "hostaddr", "passfile",
    "require_auth", "replication", "sslcert", "sslkey", "sslpassword", "sslrootcert", "sslcrl", "sslcrldir",
    "requirepeer", "ssl_min_protocol_version", "ssl_max_protocol_version", "krbsrvname", "gsslib", "service",
)  # fmt: skip
_OWN = ("host", "port", "user", "password", "dbname")
_KNOWN = (*_OWN, *_CHOICES, *_NUMBERS, *_TEXTS)
HARMLESS = (
    "host",
    "port",
    "user",
    "dbname",
    *_CHOICES,
    *_NUMBERS,
    "options",
    "application_name",
    "hostaddr",
    "sslrootcert",
)
_SAID_ELSEWHERE = {
    "true": "did you mean require?", "no-verify": "require does not check the certificate",
    "verify_full": "did you mean verify-full?", "verify_ca": "did you mean verify-ca?",
}  # fmt: skip
_FOREIGN = {
    "pgbouncer": "Prisma", "connection_limit": "Prisma", "pool_timeout": "Prisma", "sslaccept": "Prisma",
    "schema": "Prisma", "statement_cache_size": "Prisma", "supa": "Vercel", "uselibpqcompat": "node-postgres",
    "prepared_statement_cache_size": "SQLAlchemy", "prepare_threshold": "psycopg",
}  # fmt: skip
"""Parameters that mean something to one product only, and that PostgreSQL's own clients refuse."""


def read(found: Split) -> dict[str, Json]:
    """The resource of a connection string; mistakes are noted in ``found``."""
    value: dict[str, Json] = {}
    hosts = found.hosts
    if hosts:
        value["host"] = ",".join(host.name for host in hosts)
        if port := _ports([host.port for host in hosts], [host.name for host in hosts]):
            value["port"] = port
    if found.user:
        value["user"] = found.user.value
    if found.password:
        value["password"] = found.password.value
    if found.path.value:
        value["dbname"] = found.path.value
    for parameter in found.parameters:
        _parameter(found, parameter, value)
    _complete(found, value)
    return value


def _ports(ports: list[int | None], names: list[str]) -> Json:
    """One number where all are the same, else libpq's list. None for sockets, which are files."""
    if all(name.startswith("/") for name in names) and not any(ports):
        return None
    numbers = [port or PORT for port in ports]
    return numbers[0] if len(set(numbers)) == 1 else ",".join(map(str, numbers))


def _parameter(found: Split, parameter: Parameter, value: dict[str, Json]) -> None:
    name = parameter.name
    if name in _FOREIGN:
        instead = "; options=-csearch_path%3D… does the same" if name == "schema" else ""
        found.notes.append(f"{name} is a parameter of {_FOREIGN[name]} alone: left out{instead}")
    elif name in ("ssl", "requiressl"):
        if text.once(found, parameter, value, "sslmode") and text.truth(found, parameter):
            value["sslmode"] = "require"
    elif name not in _KNOWN:
        text.unknown(found, parameter, _KNOWN)
    elif not text.once(found, parameter, value):
        pass
    elif name in _CHOICES:
        value[name] = text.chosen(found, parameter, _CHOICES[name], _SAID_ELSEWHERE)
    elif name in _NUMBERS:
        value[name] = text.number(found, parameter)
    elif name == "port":
        _port_parameter(found, parameter, value)
    elif parameter.value:
        value[name] = parameter.value


def _port_parameter(found: Split, parameter: Parameter, value: dict[str, Json]) -> None:
    ports = parameter.value.split(",")
    if all(port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535 for port in ports):
        value["port"] = int(ports[0]) if len(set(ports)) == 1 else parameter.value
    else:
        found.wrong("a port is a number from 1 to 65535", parameter.value_start, parameter.end)


def _complete(found: Split, value: dict[str, Json]) -> None:
    end = len(found.text)
    host, user = str(value.get("host", "")), str(value.get("user", ""))
    if not host:
        found.wrong(
            "no host", found.scheme.end + 3, found.scheme.end + 4, "a socket's directory is ?host=/run/postgresql"
        )
    elif "port" not in value and not host.startswith("/"):
        value["port"] = PORT
    if "dbname" not in value:
        if not user:
            found.wrong("no database", end, end + 1, "write /NAME behind the host")
        else:
            value["dbname"] = user  # libpq's own default
    if host.endswith(".pooler.supabase.com") and found.user and "." not in user:
        found.wrong(
            "Supabase's pooler knows a project by its user", found.user.start, found.user.end, f"{user}.PROJECT-REF"
        )


def write(value: Mapping[str, Any]) -> str:
    """The connection string of a resource. A root certificate in it (``root_certificate_pem``) has no place there."""
    hosts = str(value.get("host", "")).split(",")
    ports = str(value.get("port") or "").split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    listed = ",".join(text.host_port(host, port) for host, port in zip(hosts, ports, strict=False))
    rest = {k: v for k, v in value.items() if k not in (*_OWN, "root_certificate_pem") and v not in (None, "")}
    user = text.user_info(value.get("user"), value.get("password"))
    return f"postgresql://{user}{listed}/{text.escaped(value.get('dbname') or '')}{text.query(rest.items())}"
