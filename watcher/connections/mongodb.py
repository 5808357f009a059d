"""MongoDB's connection strings, with Atlas's ``mongodb+srv``.

https://www.mongodb.com/docs/manual/reference/connection-string/
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from watcher.connections import text
from watcher.connections.text import Parameter, Split
from watcher.values import Json

SCHEMES = {"mongodb": "", "mongodb+srv": "srv"}
SECRETS = ("credential.password", "tlsCertificateKeyFilePassword")
PORT = 27017

_TRUTHS = (
    "tls", "ssl", "tlsInsecure", "tlsAllowInvalidCertificates", "tlsAllowInvalidHostnames",
    "tlsDisableOCSPEndpointCheck", "retryWrites", "retryReads", "journal", "directConnection", "loadBalanced",
)  # fmt: skip
_NUMBERS = (
    "connectTimeoutMS", "socketTimeoutMS", "serverSelectionTimeoutMS", "heartbeatFrequencyMS", "localThresholdMS",
    "maxPoolSize", "minPoolSize", "maxIdleTimeMS", "maxConnecting", "waitQueueTimeoutMS", "wTimeoutMS", "timeoutMS",
    "maxStalenessSeconds", "zlibCompressionLevel", "srvMaxHosts",
)  # fmt: skip
_TEXTS = (
    "replicaSet", "appName", "authSource", "authMechanismProperties", "compressors", "w", "tlsCAFile",
    "tlsCertificateKeyFile", "tlsCertificateKeyFilePassword", "srvServiceName", "readPreferenceTags",
)  # fmt: skip
_CHOICES = {
    "readPreference": ("primary", "primaryPreferred", "secondary", "secondaryPreferred", "nearest"),
    "readConcernLevel": ("local", "majority", "linearizable", "available", "snapshot"),
    "authMechanism": (
        "SCRAM-SHA-1", "SCRAM-SHA-256", "MONGODB-X509", "MONGODB-AWS", "MONGODB-OIDC", "GSSAPI", "PLAIN",
    ),
    "serverMonitoringMode": ("auto", "poll", "stream"),
    "uuidRepresentation": ("standard", "unspecified", "javaLegacy", "csharpLegacy", "pythonLegacy"),
}  # fmt: skip
_KNOWN = {name.lower(): name for name in (*_TRUTHS, *_NUMBERS, *_TEXTS, *_CHOICES)}
"""Their names are the same in any case, says the specification of connection strings."""
HARMLESS = (*_TRUTHS, *_NUMBERS, *_CHOICES, "replicaSet", "appName", "authSource", "w")
_OWN = ("db", "tls", "servers", "credential", "srv")


def read(found: Split) -> dict[str, Json]:
    """The resource of a connection string; mistakes are noted in ``found``."""
    srv = SCHEMES[found.scheme.value] == "srv"
    value: dict[str, Json] = {"db": found.path.value, "servers": _servers(found, srv), "tls": srv}
    if srv:
        value["srv"] = True
    if not found.path.value:
        end = found.path.end
        found.wrong("no database", end, end + 1, "write /NAME behind the host, before any ?")
    credential: dict[str, Json] = {}
    if found.user:
        credential["username"] = found.user.value
    if found.password:
        credential["password"] = found.password.value
    said: dict[str, Json] = {}
    for parameter in found.parameters:
        _parameter(found, parameter, said)
    for name, field in (("authSource", "db"), ("authMechanism", "mechanism")):
        if name in said:
            credential[field] = said.pop(name)
    if credential:
        value["credential"] = credential
    return value | said


def _servers(found: Split, srv: bool) -> list[dict[str, Json]]:
    if not found.hosts:
        found.wrong("no host", found.scheme.end + 3, found.scheme.end + 4)
    if srv and len(found.hosts) > 1:
        second = found.hosts[1]
        found.wrong(
            "mongodb+srv takes one name", second.start, second.end, "DNS tells the servers; else write mongodb://"
        )
    if srv and found.hosts and found.hosts[0].port:
        host = found.hosts[0]
        found.wrong("mongodb+srv takes no port", host.start, host.end, "DNS tells it; else write mongodb://")
    return [
        {"host": host.name} if srv or host.name.startswith("/") else {"host": host.name, "port": host.port or PORT}
        for host in found.hosts
    ]


def _parameter(found: Split, parameter: Parameter, said: dict[str, Json]) -> None:
    name = _KNOWN.get(parameter.name.lower())
    if name is None:
        text.unknown(found, parameter, list(_KNOWN.values()))
        return
    name = "tls" if name == "ssl" else name
    if name == "readPreferenceTags":
        said[name] = [*said.get(name, []), parameter.value]
    elif not text.once(found, parameter, said, name):
        pass
    elif name in _TRUTHS:
        said[name] = text.truth(found, parameter)
    elif name in _NUMBERS:
        said[name] = text.number(found, parameter)
    elif name in _CHOICES:
        said[name] = text.chosen(found, parameter, _CHOICES[name])
    elif name == "w" and parameter.value.isascii() and parameter.value.isdigit():
        said[name] = int(parameter.value[:9])
    elif parameter.value:
        said[name] = parameter.value


def write(value: Mapping[str, Any]) -> str:
    """The connection string of a resource."""
    credential: Mapping[str, Any] = value.get("credential") or {}
    srv, pairs = bool(value.get("srv")), list[tuple[str, Json]]()
    pairs += [(name, credential[field]) for name, field in (("authSource", "db"), ("authMechanism", "mechanism"))
              if credential.get(field)]  # fmt: skip
    if bool(value.get("tls", srv)) != srv:
        pairs.append(("tls", bool(value["tls"])))
    pairs += [(k, v) for k, v in value.items() if k not in _OWN and v is not None]
    servers = value.get("servers") or []
    listed = ",".join(text.host_port(str(server["host"]), server.get("port")) for server in servers)
    user = text.user_info(credential.get("username"), credential.get("password"))
    db = text.escaped(value.get("db") or "")
    return f"mongodb{'+srv' if srv else ''}://{user}{listed}/{db}{text.query(pairs)}"
