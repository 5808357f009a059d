"""How S3 clients reach a bucket: one answer, in the words of boto3, Polars, s3fs and DuckDB. Pure.

Source: the answers that Windmill's published clients read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from watcher.values import Json

_SCHEME = re.compile(r"(https?)://", re.IGNORECASE)


class NoSettings(Exception):
    """There is no such way to reach this storage, or its resource lacks something; the message says which."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Where a bucket is and with which keys. ``host`` may carry a port and a path. ``repr`` shows no secret."""

    bucket: str
    host: str
    tls: bool
    region: str
    access_key: str | None
    secret_key: str | None = field(repr=False)
    token: str | None = field(default=None, repr=False)
    path_style: bool = True

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}"

    @property
    def own_url(self) -> str:
        """The bucket's own address, for clients that do not put it together themselves."""
        if self.path_style or self.host.startswith(f"{self.bucket}."):
            return self.url
        return self.url.replace("://", f"://{self.bucket}.", 1)


def of_resource(value: Json) -> Bucket:
    """From a resource of type ``s3``: a scheme in ``endPoint`` stands before ``useSSL``, no endPoint is Amazon's own.

    Raises NoSettings.
    """
    if not isinstance(value, dict):
        raise NoSettings("the resource is no S3 resource: it must be an object with bucket, region and endPoint")
    bucket, region = value.get("bucket"), value.get("region") or "us-east-1"
    endpoint, port = value.get("endPoint") or value.get("endpoint") or "", value.get("port")
    if not isinstance(bucket, str) or not bucket:
        raise NoSettings("the S3 resource names no bucket")
    if not isinstance(endpoint, str) or not isinstance(region, str):
        raise NoSettings("region and endPoint of the S3 resource are texts")
    scheme = _SCHEME.match(endpoint)
    host = endpoint[scheme.end() :].strip("/") if scheme else endpoint.strip("/")
    tls = scheme[1].lower() == "https" if scheme else value.get("useSSL") is not False
    host = host or f"s3.{region}.amazonaws.com"
    if isinstance(port, int | float) and port and not re.search(r":\d+(/|$)", host):
        name, slash, path = host.partition("/")
        host = f"{name}:{int(port)}{slash}{path}"
    return Bucket(
        bucket,
        host,
        tls,
        region,
        _text(value, "accessKey"),
        _text(value, "secretKey"),
        _text(value, "token"),
        value.get("pathStyle") is not False,
    )


def _text(value: dict[str, Json], name: str) -> str | None:
    found = value.get(name)
    return found if isinstance(found, str) and found else None


def info(bucket: Bucket) -> Json:
    """As the resource that both of Windmill's clients make their S3 client's options from."""
    return {
        "bucket": bucket.bucket,
        "region": bucket.region,
        "endPoint": bucket.host,
        "useSSL": bucket.tls,
        "pathStyle": bucket.path_style,
        "accessKey": bucket.access_key,  # null means: look in the environment, and must be there for Python
        "secretKey": bucket.secret_key,
        **({"token": bucket.token} if bucket.token else {}),
    }


def polars(bucket: Bucket) -> Json:
    """Arguments of s3fs's file system and Polars' storage options."""
    style = {} if bucket.path_style else {"config_kwargs": {"s3": {"addressing_style": "virtual"}}}
    s3fs = {
        "endpoint_url": bucket.url,
        "use_ssl": bucket.tls,
        "cache_regions": False,
        "client_kwargs": {"region_name": bucket.region},
        **style,
        **_given(key=bucket.access_key, secret=bucket.secret_key, token=bucket.token),
    }
    options = {
        "aws_endpoint_url": bucket.own_url,
        "aws_region": bucket.region,
        "aws_allow_http": "false" if bucket.tls else "true",
        "aws_virtual_hosted_style_request": "false" if bucket.path_style else "true",
        **_given(
            aws_access_key_id=bucket.access_key,
            aws_secret_access_key=bucket.secret_key,
            aws_session_token=bucket.token,
        ),
    }
    return {"s3fs_args": s3fs, "storage_options": options, "s3_bucket": bucket.bucket}


def duckdb(bucket: Bucket) -> Json:
    """Statements for a new DuckDB connection."""
    lines = [
        "SET home_directory='./'",
        "INSTALL 'httpfs'",
        *(["SET s3_url_style='path'"] if bucket.path_style else []),
        f"SET s3_region={_quoted(bucket.region)}",
        f"SET s3_endpoint={_quoted(bucket.host)}",
        *([] if bucket.tls else ["SET s3_use_ssl=0"]),
        *(
            f"SET {name}={_quoted(value)}"
            for name, value in _given(
                s3_access_key_id=bucket.access_key,
                s3_secret_access_key=bucket.secret_key,
                s3_session_token=bucket.token,
            ).items()
        ),
    ]
    return {"connection_settings_str": _statements(lines), "s3_bucket": bucket.bucket}


def duckdb_azure(value: Json) -> Json:
    """Statements for a new DuckDB connection to a resource of type ``azure_blob``. Raises NoSettings."""
    if not isinstance(value, dict):
        raise NoSettings("the resource is no Azure Blob resource: it must be an object with accountName")
    account, container, key = (_text(value, name) for name in ("accountName", "containerName", "accessKey"))
    if account is None or container is None:
        raise NoSettings("the Azure Blob resource must have accountName and containerName")
    if key is None:
        raise NoSettings("DuckDB needs the accessKey of the Azure Blob resource, which has none")
    tls = value.get("useSSL") is not False
    endpoint = _text(value, "endpoint")
    parts = {
        "DefaultEndpointsProtocol": "https" if tls else "http",
        "AccountName": account,
        "AccountKey": key,
        **({"BlobEndpoint": _azure_url(endpoint, account, tls)} if endpoint else {}),
    }
    secret = ";".join(f"{name}={each}" for name, each in parts.items())
    lines = [
        "SET home_directory='./'",
        "INSTALL 'azure'",
        f"CREATE SECRET az_secret (TYPE AZURE, CONNECTION_STRING {_quoted(secret)})",
    ]
    return {"connection_settings_str": _statements(lines), "azure_container_path": f"az://{container}"}


def _azure_url(endpoint: str, account: str, tls: bool) -> str:
    url = endpoint if _SCHEME.match(endpoint) else f"{'https' if tls else 'http'}://{endpoint}"
    url = url.rstrip("/")
    return url if account in url else f"{url}/{account}"  # an emulator has the account in the path


def _given(**values: str | None) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}


def _quoted(text: str) -> str:
    doubled = text.replace("'", "''")
    return f"'{doubled}'"


def _statements(lines: list[str]) -> str:
    return "".join(f"{line};\n" for line in lines)
