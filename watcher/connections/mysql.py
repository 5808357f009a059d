"""MySQL's and MariaDB's connection strings, with the parameters that their many clients have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from watcher.connections import text
from watcher.connections.text import Parameter, Split
from watcher.values import Json

SCHEMES = {"mysql": "", "mariadb": "", "mysql+pymysql": "", "mariadb+pymysql": "", "mysql2": ""}
SECRETS = ("password",)
PORT = 3306

_MODES = ("DISABLED", "PREFERRED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")
_SAID_ELSEWHERE = {
    "disable": "did you mean DISABLED?", "require": "did you mean REQUIRED?", "verify-ca": "did you mean VERIFY_CA?",
    "verify-full": "did you mean VERIFY_IDENTITY?", "true": "did you mean REQUIRED?",
}  # fmt: skip
_NUMBERS = ("connect_timeout", "read_timeout", "write_timeout")
_TEXTS = ("charset", "collation", "init_command", "ssl_ca", "ssl_cert", "ssl_key")
OWN = ("host", "port", "user", "password", "database", "ssl", "ssl_mode")
_KNOWN = ("ssl-mode", "ssl", "socket", *_NUMBERS, *_TEXTS)
HARMLESS = (*_KNOWN, "ssl_mode", "sslmode")
_FOREIGN = {
    "sslaccept": "Prisma", "connection_limit": "Prisma", "pool_timeout": "Prisma", "servertimezone": "JDBC",
    "allowpublickeyretrieval": "JDBC", "autoreconnect": "JDBC", "useunicode": "JDBC", "characterencoding": "JDBC",
    "parsetime": "Go", "loc": "Go", "pool": "ActiveRecord", "reconnect": "ActiveRecord",
}  # fmt: skip


def read(found: Split) -> dict[str, Json]:
    """The resource of a connection string; mistakes are noted in ``found``."""
    value: dict[str, Json] = {}
    if len(found.hosts) > 1:
        second = found.hosts[1]
        found.wrong("MySQL's clients take one host", second.start, second.end)
    if found.hosts:
        value |= {"host": found.hosts[0].name}
        if found.hosts[0].port or not found.hosts[0].name.startswith("/"):
            value["port"] = found.hosts[0].port or PORT
    if found.user:
        value["user"] = found.user.value
    if found.password:
        value["password"] = found.password.value
    if found.path.value:
        value["database"] = found.path.value
    else:
        end = len(found.text)
        found.wrong("no database", end, end + 1, "write /NAME behind the host")
    for parameter in found.parameters:
        _parameter(found, parameter, value)
    if "host" not in value:
        found.wrong("no host", found.scheme.end + 3, found.scheme.end + 4)
    return value


def _parameter(found: Split, parameter: Parameter, value: dict[str, Json]) -> None:
    name = parameter.name.replace("-", "_").lower()
    if name in _FOREIGN:
        found.notes.append(f"{parameter.name} is a parameter of {_FOREIGN[name]} alone: left out")
    elif name in ("ssl_mode", "sslmode"):
        if text.once(found, parameter, value, "ssl"):
            value |= _mode(text.chosen(found, parameter, _MODES, _SAID_ELSEWHERE))
    elif name in ("ssl", "tls", "usessl"):
        if text.once(found, parameter, value, "ssl"):
            value["ssl"] = parameter.value.startswith("{") or text.truth(found, parameter)  # {…}: PlanetScale's
    elif name in ("socket", "unix_socket"):
        value["host"] = parameter.value
        value.pop("port", None)
    elif name not in (*_NUMBERS, *_TEXTS):
        text.unknown(found, parameter, _KNOWN)
    elif text.once(found, parameter, value, name) and (parameter.value or name in _NUMBERS):
        value[name] = text.number(found, parameter) if name in _NUMBERS else parameter.value


def _mode(mode: str) -> dict[str, Json]:
    if mode in ("VERIFY_CA", "VERIFY_IDENTITY"):
        return {"ssl": True, "ssl_mode": mode}
    return {} if mode == "PREFERRED" else {"ssl": mode == "REQUIRED"}


def write(value: Mapping[str, Any]) -> str:
    """The connection string of a resource."""
    pairs: list[tuple[str, Json]] = []
    if value.get("ssl") is not None:
        pairs.append(("ssl-mode", value.get("ssl_mode") or ("REQUIRED" if value["ssl"] else "DISABLED")))
    pairs += [(k, v) for k, v in value.items() if k not in OWN and v not in (None, "")]
    where = text.host_port(str(value.get("host", "")), value.get("port"))
    user = text.user_info(value.get("user"), value.get("password"))
    return f"mysql://{user}{where}/{text.escaped(value.get('database') or '')}{text.query(pairs)}"
