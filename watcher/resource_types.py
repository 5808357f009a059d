"""Resource types: those that come with watcher, and values checked against a type's JSON Schema."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from watcher.errors import WatcherError
from watcher.values import REFERENCES, Json

_TEXT: Json = {"type": "string"}
_BOOL: Json = {"type": "boolean"}
_PORT: Json = {"type": "integer", "minimum": 1, "maximum": 65535}
_PORTS: Json = {"anyOf": [_PORT, {"type": "string", "pattern": r"^\d+(,\d+)*$"}]}  # a list, as libpq has it


class Unfit(WatcherError):
    """The value does not fit its resource type, or the type's schema is none."""

    exit_code = 2


def _type(required: str = "", **properties: Json) -> Json:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "order": list(properties),
        "required": required.split(),
        "properties": properties,
    }


SHIPPED: Mapping[str, tuple[str, Json]] = {
    "any": ("any JSON value", {}),
    "state": ("what a script remembers: any JSON value", {}),
    "s3": (
        "S3, R2, MinIO: an object store",
        _type(
            "bucket", bucket=_TEXT, region=_TEXT, endPoint=_TEXT, port=_PORT, useSSL=_BOOL, pathStyle=_BOOL,
            accessKey=_TEXT, secretKey=_TEXT, token=_TEXT,
        ),
    ),
    "azure_blob": (
        "Azure Blob Storage",
        _type(
            "accountName containerName", accountName=_TEXT, containerName=_TEXT, accessKey=_TEXT, endpoint=_TEXT,
            useSSL=_BOOL, tenantId=_TEXT, clientId=_TEXT, federatedTokenFile=_TEXT,
        ),
    ),
    "gcs": (
        "Google Cloud Storage",
        _type("bucket", bucket=_TEXT, serviceAccountKey={"type": ["object", "string"]}),
    ),
    "postgresql": (
        "PostgreSQL, also Neon and Supabase",
        _type(
            "host dbname", host=_TEXT, port=_PORTS, user=_TEXT, password=_TEXT, dbname=_TEXT,
            sslmode={"enum": ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]},
            root_certificate_pem=_TEXT,
        ),
    ),
    "mysql": (
        "MySQL or MariaDB",
        _type("host database", host=_TEXT, port=_PORT, user=_TEXT, password=_TEXT, database=_TEXT, ssl=_BOOL),
    ),
    "mongodb": (
        "MongoDB",
        _type(
            "db servers", db=_TEXT, tls=_BOOL, srv=_BOOL,
            servers={"type": "array", "minItems": 1, "items": _type("host", host=_TEXT, port=_PORT)},
            credential=_type("", username=_TEXT, password=_TEXT, db=_TEXT, mechanism=_TEXT),
        ),
    ),
    "mongodb_rest": ("MongoDB's Data API", _type("endpoint api_key", endpoint=_TEXT, api_key=_TEXT)),
    "redis": (
        "Redis or Valkey",
        _type(
            "host", host=_TEXT, port=_PORT, username=_TEXT, password=_TEXT, db={"type": "integer"}, tls=_BOOL,
            cluster=_BOOL, nodes={"type": "array", "items": _type("host", host=_TEXT, port=_PORT)},
        ),
    ),
    "upstash": ("Upstash over REST", _type("url token", url=_TEXT, token=_TEXT)),
    "supabase": ("Supabase's API", _type("url key", url=_TEXT, key=_TEXT)),
    "github": ("a GitHub token", _type("token", token=_TEXT)),
    "gitlab": ("a GitLab token", _type("token", token=_TEXT, baseUrl=_TEXT)),
    "slack": ("a Slack token", _type("token", token=_TEXT)),
    "discord_webhook": ("a Discord webhook", _type("webhook_url", webhook_url=_TEXT)),
    "openai": ("an OpenAI key", _type("api_key", api_key=_TEXT, organization_id=_TEXT)),
    "stripe": ("a Stripe key", _type("token", token=_TEXT)),
    "notion": ("a Notion token", _type("token", token=_TEXT)),
    "airtable": ("an Airtable key", _type("apiKey", apiKey=_TEXT)),
    "linear": ("a Linear key", _type("apiKey", apiKey=_TEXT)),
    "smtp": ("a mail server", _type("host", host=_TEXT, port=_PORT, user=_TEXT, password=_TEXT)),
}  # fmt: skip
"""Name → description and JSON Schema. Only what a connection cannot do without is required."""

SECONDS = 5.0
"""How long a pattern that somebody wrote may search."""


async def fits(type: str, schema: Json, value: Json) -> None:
    """As `check`, for a schema that anybody may have written.

    A regular expression may search for ever, and nothing within a process can stop it. So those of other types than
    ours search in a process of their own, which can be.
    """
    if type in SHIPPED or '"pattern' not in json.dumps(schema):
        check(type, schema, value)
        return
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", f"import sys; sys.path[:] = {sys.path!r}\nfrom {__name__} import _apart; _apart()",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env={},
    )  # fmt: skip
    try:
        async with asyncio.timeout(SECONDS):
            said, _ = await process.communicate(json.dumps([type, schema, value]).encode())
    except TimeoutError:
        raise Unfit(f"a pattern in the schema of resource type {type} takes too long on this value") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise Unfit(f"this value could not be compared with the schema of resource type {type}")
    if said:
        raise Unfit(said.decode())


def _apart() -> None:
    """What the other process does: the arguments of `check` come in, what it finds wrong goes out."""
    try:
        check(*json.load(sys.stdin))
    except Unfit as error:
        sys.stdout.buffer.write(str(error).encode("utf-8", "replace"))


def check(type: str, schema: Json, value: Json) -> None:
    """Raise Unfit, with every place that does not fit, unless ``value`` is one of ``type``.

    A reference ("$var:…") stands for a value that is not known yet, and fits everywhere.
    """
    if schema in ({}, None, True):
        return
    from jsonschema.exceptions import SchemaError
    from referencing.exceptions import Unresolvable

    try:
        wrong = sorted(_errors(schema, value), key=lambda error: list(map(str, error.absolute_path)))
    except (SchemaError, Unresolvable, RecursionError) as error:
        raise Unfit(f"the JSON Schema of resource type {type} cannot be used: {str(error)[:200]}") from error
    if wrong:
        places = "; ".join(f"{_place(error.absolute_path)}: {error.message[:200]}" for error in wrong[:10])
        raise Unfit(f"this is no {type}: {places}")


def check_schema(name: str, schema: Json) -> None:
    """Raise Unfit unless this is a JSON Schema that needs nothing from elsewhere."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    if not isinstance(schema, dict | bool):
        raise Unfit(f"the schema of resource type {name} is no JSON Schema: it must be an object")
    try:
        Draft202012Validator.check_schema(schema, Draft202012Validator.FORMAT_CHECKER)  # patterns are a format
    except (SchemaError, RecursionError) as error:
        raise Unfit(f"the schema of resource type {name} is no JSON Schema: {str(error).splitlines()[0]}") from error


def _errors(schema: Json, value: Json) -> Iterator[Any]:
    from jsonschema import Draft202012Validator, validators
    from referencing import Registry

    def lenient(keyword: Any) -> Any:
        def check(validator: Any, argument: Any, instance: Any, schema: Any) -> Iterator[Any]:
            if isinstance(instance, str) and instance.startswith(REFERENCES):
                return iter(())
            return keyword(validator, argument, instance, schema) or iter(())

        return check

    kind = validators.extend(  # type: ignore[no-untyped-call]
        Draft202012Validator, {name: lenient(does) for name, does in Draft202012Validator.VALIDATORS.items()}
    )
    yield from kind(schema, registry=Registry()).iter_errors(value)  # that registry fetches nothing


def _place(path: Any) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or "the value"
