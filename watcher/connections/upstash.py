"""Upstash's Redis over REST: its address with the token in it, or the two lines that its console gives."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from watcher.connections import text
from watcher.connections.text import Split
from watcher.values import Json

SCHEMES = {"https": "", "http": ""}
SECRETS = ("token",)
HARMLESS: tuple[str, ...] = ()

_LINES = re.compile(r"(?:export\s+)?([A-Z_]*(?:REST_API|REST)(?:_API)?_(URL|TOKEN))\s*=\s*(\S+)")


def of_lines(given: str) -> str | None:
    """``UPSTASH_REDIS_REST_URL=…`` and ``UPSTASH_REDIS_REST_TOKEN=…`` as one address, None if it is not those."""
    said = {found[2]: found[3].strip("'\"") for found in _LINES.finditer(given)}
    if set(said) != {"URL", "TOKEN"}:
        return None
    return f"{said['URL'].rstrip('/')}?_token={text.escaped(said['TOKEN'])}"


def read(found: Split) -> dict[str, Json]:
    """The resource of an address; mistakes are noted in ``found``."""
    host = found.hosts[0] if found.hosts else None
    if host is None:
        found.wrong("no host", found.scheme.end + 3, found.scheme.end + 4)
    elif found.scheme.value == "http" and host.name.endswith(".upstash.io"):
        found.wrong("the token would go over the net as it is", found.scheme.start, found.scheme.end, "write https://")
    tokens = [part.value for part in (found.password or found.user,) if part]
    for parameter in found.parameters:
        if parameter.name not in ("_token", "token"):
            text.unknown(found, parameter, ["_token"])
        elif tokens:
            found.wrong("the token is said twice", parameter.start, parameter.end)
        else:
            tokens.append(parameter.value)
    if not any(tokens):
        end = len(found.text)
        found.wrong("no token", end, end + 1, "write ?_token=… behind the address")
    where = text.host_port(host.name, host.port) if host else ""
    path = f"/{found.path.value}".rstrip("/")
    return {"url": f"{found.scheme.value}://{where}{path}", "token": tokens[0] if tokens else ""}


def write(value: Mapping[str, Any]) -> str:
    """The address of a resource, its token in the query as Upstash's own documents have it."""
    return f"{value.get('url', '')}{text.query([('_token', value.get('token', ''))])}"
