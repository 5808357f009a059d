"""S3 and what speaks it, Azure Blob and Google Cloud Storage, through obstore: the only importer of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from watcher.errors import ObjectsError
from watcher.objects.meta import CHUNK, Body, Level, Meta, Reading
from watcher.values import Json

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART = 8 * 1024 * 1024
"""Bytes of one part of an upload: ten thousand of them, S3's limit, are 80 GiB."""
_AT_ONCE = 4
"""Parts of one upload under way."""
_RETRIES: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
_TIMEOUTS = {"connect_timeout": "5s", "timeout": "300s"}


def store(kind: str, value: Json) -> ObjectStore:
    """obstore's own store for a resource of type ``s3``, ``azure_blob`` or ``gcs``. Raises ObjectsError."""
    try:
        from obstore.store import AzureStore, GCSStore, S3Store
    except ImportError as error:
        raise ObjectsError(
            'object storage in a cloud needs obstore: pip install "change-watcher[objects]"', kind="unreachable"
        ) from error
    if not isinstance(value, Mapping):
        raise ObjectsError(f"a resource of type {kind} is an object with the connection in it", kind="unreachable")
    settings, options = {"s3": s3, "azure_blob": azure, "gcs": gcs}[kind](value)
    of: Any = {"s3": S3Store, "azure_blob": AzureStore, "gcs": GCSStore}[kind]
    try:
        made: ObjectStore = of(config=settings, client_options={**_TIMEOUTS, **options}, retry_config=_RETRIES)
    except Exception as error:  # each kind of mistake is an exception of its own there
        raise ObjectsError(f"the resource of type {kind}: {_short(error)}", kind="unreachable") from error
    return made


# --- resources, as Windmill writes them -------------------------------------------------------------------------------


def s3(value: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and client options for a resource of type ``s3``."""
    address = endpoint(value)
    path_style = value.get("pathStyle") is not False
    settings: dict[str, Any] = {
        "bucket": _needed(value, "bucket"),
        "region": value.get("region") or "us-east-1",
        "endpoint": address,
        "virtual_hosted_style_request": not path_style,
    }
    for ours, theirs in (
        ("accessKey", "access_key_id"),
        ("secretKey", "secret_access_key"),
        ("token", "session_token"),
    ):
        if value.get(ours):
            settings[theirs] = value[ours]
    return settings, {"allow_http": address.startswith("http://")}


def endpoint(value: Mapping[str, Any]) -> str:
    """The address of an ``s3`` resource: its scheme from ``useSSL`` unless it has one, its port, and with
    ``pathStyle = false`` the bucket before the host."""
    host = str(value.get("endPoint") or "").strip().rstrip("/")
    scheme, separator, bare = host.rpartition("://")
    if not separator:
        scheme = "http" if value.get("useSSL") is False else "https"
    bare = bare or f"s3.{value.get('region') or 'us-east-1'}.amazonaws.com"
    if value.get("port") and not bare.rpartition(":")[2].isdigit():
        bare += f":{value['port']}"
    bucket = value.get("bucket")
    if value.get("pathStyle") is False and not bare.startswith(f"{bucket}."):
        bare = f"{bucket}.{bare}"
    return f"{scheme}://{bare}"


def azure(value: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and client options for a resource of type ``azure_blob``."""
    settings: dict[str, Any] = {
        "account_name": _needed(value, "accountName"),
        "container_name": _needed(value, "containerName"),
    }
    named = (
        ("accessKey", "account_key"),
        ("tenantId", "tenant_id"),
        ("clientId", "client_id"),
        ("federatedTokenFile", "federated_token_file"),
    )
    for ours, theirs in named:
        if value.get(ours):
            settings[theirs] = value[ours]
    address = str(value.get("endpoint") or "").strip().rstrip("/")
    if address:
        if "://" not in address:
            address = ("http://" if value.get("useSSL") is False else "https://") + address
        settings["endpoint"] = address
    return settings, {"allow_http": address.startswith("http://")}


def gcs(value: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and client options for a resource of type ``gcs``."""
    key = value.get("serviceAccountKey")
    settings: dict[str, Any] = {"bucket": _needed(value, "bucket")}
    if key:
        settings["service_account_key"] = key if isinstance(key, str) else json.dumps(key)
    return settings, {"allow_http": "gcs_base_url" in str(settings.get("service_account_key"))}


def _needed(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not found:
        raise ObjectsError(f"the resource of the storage has no {name}", kind="unreachable")
    return found


# --- operations -------------------------------------------------------------------------------------------------------


class Cloud:
    """The objects of one bucket or container."""

    def __init__(self, kind: str, value: Json) -> None:
        self.kind = kind
        self.store = store(kind, value)
        bucket = value.get("containerName") if kind == "azure_blob" else value.get("bucket")
        self.where = f"{'container' if kind == 'azure_blob' else 'bucket'} {bucket}"

    async def put(
        self, key: str, body: Body, *, content_type: str | None, content_disposition: str | None, if_absent: bool
    ) -> Meta:
        import obstore

        attributes: Any = {}
        if content_type:
            attributes["Content-Type"] = content_type
        if content_disposition:
            attributes["Content-Disposition"] = content_disposition
        with self._errors(key):
            await obstore.put_async(
                self.store,
                key,
                body,
                attributes=attributes or None,
                mode="create" if if_absent else "overwrite",
                chunk_size=PART,
                max_concurrency=_AT_ONCE,
            )
        return await self.head(key)

    async def get(self, key: str, *, start: int, end: int | None) -> Reading:
        import obstore

        options: Any = {}
        if end is not None:
            options["range"] = (start, max(end, start))
        elif start:
            options["range"] = {"offset": start}
        with self._errors(key):
            found = await obstore.get_async(self.store, key, options=options or None)
        meta = _meta(found.meta, found.attributes.get("Content-Type"))
        first, last = found.range
        return Reading(meta, first, last, self._chunks(key, found))

    async def _chunks(self, key: str, found: Any) -> AsyncIterator[bytes]:
        with self._errors(key):
            async for chunk in found.stream(min_chunk_size=CHUNK):
                yield bytes(chunk)

    async def head(self, key: str) -> Meta:
        import obstore

        with self._errors(key):
            found = await obstore.get_async(self.store, key, options={"head": True})
        return _meta(found.meta, found.attributes.get("Content-Type"))

    async def delete(self, key: str) -> None:
        import obstore

        with self._errors(key), suppress(FileNotFoundError):
            await obstore.delete_async(self.store, key)

    async def list(self, prefix: str, *, after: str | None, limit: int) -> list[Meta]:
        import obstore

        parent = prefix.rpartition("/")[0]
        found: list[Meta] = []
        with self._errors(prefix):
            async for page in obstore.list(self.store, parent or None, offset=after, chunk_size=limit):
                for each in page:
                    if not each["path"].startswith(prefix):
                        continue
                    found.append(_meta(each))
                    if len(found) == limit:
                        return found
        return found

    async def level(self, prefix: str, *, after: str | None, limit: int) -> Level:
        import obstore

        parent = prefix.rpartition("/")[0]
        with self._errors(prefix):
            found = await obstore.list_with_delimiter_async(self.store, parent or None)
        objects = {each["path"]: _meta(each) for each in found["objects"]}
        names = sorted(
            name
            for name in [*objects, *(f"{folder}/" for folder in found["common_prefixes"])]
            if name.startswith(prefix) and name > (after or "")
        )
        shown = names[:limit]
        return Level(
            tuple(objects[name] for name in shown if name in objects),
            tuple(name for name in shown if name not in objects),
            shown[-1] if len(names) > limit else None,
        )

    def _errors(self, key: str) -> _Errors:
        return _Errors(self.where, key)


class _Errors:
    """What obstore raises, as ObjectsError."""

    def __init__(self, where: str, key: str) -> None:
        self.where = where
        self.key = key

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        from obstore import exceptions

        if isinstance(error, FileNotFoundError):
            raise ObjectsError(f"there is no object {self.key}", kind="missing") from error
        if isinstance(error, exceptions.AlreadyExistsError):
            raise ObjectsError(f"there is an object {self.key} already", kind="exists") from error
        if isinstance(error, exceptions.BaseError):
            raise ObjectsError(f"{self.where}: {_short(error)}", kind="unreachable") from error


def _meta(found: Mapping[str, Any], content_type: str | None = None) -> Meta:
    return Meta(found["path"], found["size"], found["e_tag"] or "", found["last_modified"], content_type)


def _short(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300]
