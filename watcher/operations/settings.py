"""Verbs about variables, resources, tokens and the key that encrypts them."""

from __future__ import annotations

import hashlib
import secrets as random
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from watcher import connections, resource_types
from watcher.errors import SecretError, WatcherError
from watcher.failpoint import failpoint
from watcher.log import mask, register
from watcher.operations.operator import Operator, Unknown, Unsuited, did_you_mean, plain, reads, verb, write_down
from watcher.store import audit
from watcher.store import resources as resource_store
from watcher.store import tokens as token_store
from watcher.store import variables as variable_store
from watcher.values import SCOPES, Json

if TYPE_CHECKING:
    from watcher.secrets import Key
    from watcher.store.db import Database, Tx

TOKEN_PREFIX = "wtc_"  # noqa: S105  (what a token starts with, so that leaked ones can be recognised)


@reads
async def variable_list(op: Operator) -> Json:
    """Every variable, from the configuration and from the database, secret values left out."""
    async with op.db.read() as tx:
        rows = await variable_store.list(tx)
    stored = [plain(row) | {"source": "database"} for row in rows if row.path not in op.config().variables]
    fixed = [
        {"path": path, "value": value, "is_secret": False, "source": "file"}
        for path, value in op.config().variables.items()
    ]
    found = stored + fixed
    return sorted((_shown(variable) for variable in found), key=lambda variable: variable["path"])


def _shown(variable: dict[str, Json]) -> dict[str, Json]:
    return variable | {"value": None} if variable["is_secret"] else variable


@verb
async def variable_get(op: Operator, path: str) -> Json:
    """The value of one variable; reading a secret one is noted in the audit list."""
    if path in op.config().variables:
        return {"path": path, "value": op.config().variables[path], "is_secret": False, "source": "file"}
    async with op.db.read() as tx:
        row = await variable_store.get(tx, path)
    if row is None:
        raise Unknown(f"no such variable: {path} (`watcher variable list` shows them)")
    value = row.value
    if row.is_secret:
        value = _key(op).decrypt(path, row.value)
        await write_down(op, "variable.read", path)
    return plain(row) | {"value": value, "source": "database"}


@verb
async def variable_set(op: Operator, path: str, value: str, secret: bool = False, description: str = "") -> Json:
    """Create or replace a variable; a secret one is stored encrypted."""
    if path in op.config().variables:
        raise Unsuited(f"{path} is set in the configuration file, which goes first: change it there")
    now = op.clock()
    stored = _key(op).encrypt(path, value) if secret else value
    await op.db.write(lambda tx: variable_store.put(tx, path, stored, now, is_secret=secret, description=description))
    await write_down(op, "variable.set", path)
    return {"path": path, "is_secret": secret}


@verb
async def variable_delete(op: Operator, path: str) -> Json:
    """Delete a variable of the database."""
    if not await op.db.write(lambda tx: variable_store.delete(tx, path)):
        raise Unknown(f"no such variable in the database: {path}")
    await write_down(op, "variable.delete", path)
    return {"deleted": path}


@reads
async def resource_list(op: Operator, type: str | None = None) -> Json:
    """Every resource, from the configuration and from the database, values left out."""
    fixed = op.config().resources
    async with op.db.read() as tx:
        rows = await resource_store.list(tx, type)
    found = [plain(row) | {"source": "database"} for row in rows if row.path not in fixed]
    found += [
        {"path": path, "type": resource.type, "source": "file"}
        for path, resource in fixed.items()
        if type in (None, resource.type)
    ]
    return sorted(({k: v for k, v in r.items() if k != "value"} for r in found), key=lambda r: r["path"])


@reads
async def resource_get(op: Operator, path: str) -> Json:
    """One resource with its value as it is stored: references in it stay references."""
    if path in op.config().resources:
        fixed = op.config().resources[path]
        return {"path": path, "type": fixed.type, "value": fixed.value, "source": "file"}
    async with op.db.read() as tx:
        row = await resource_store.get(tx, path)
    if row is None:
        raise Unknown(f"no such resource: {path} (`watcher resource list` shows them)")
    return plain(row) | {"source": "database"}


@verb
async def resource_set(op: Operator, path: str, type: str, value: Json, description: str = "") -> Json:
    """Create or replace a resource. Raises Unfit when its type is known and the value is none of it."""
    if path in op.config().resources:
        raise Unsuited(f"{path} is set in the configuration file, which goes first: change it there")
    await _fits(op, type, value)
    now = op.clock()
    version = await op.db.write(
        lambda tx: resource_store.put(tx, path, type, value, now, description=description, by="operator")
    )
    await write_down(op, "resource.set", path)
    return {"path": path, "type": type, "version": version}


async def _fits(op: Operator, type: str, value: Json) -> None:
    async with op.db.read() as tx:
        own = await resource_store.get_type(tx, type)
    known = resource_types.SHIPPED.get(type) or (own and (own.description, own.json_schema))
    if known:
        await resource_types.fits(type, known[1], value)


@verb
async def resource_add(
    op: Operator, type: str, url: str, path: str | None = None, description: str = "", replace: bool = False
) -> Json:
    """A resource out of a connection string, its secrets in secret variables beside it.

    Raises Typo, Unfit, and Unsuited for a path that is taken unless it is to be ``replace``d.
    """
    if type not in connections.TYPES:
        raise Unknown(f"no connection string makes a {type}{did_you_mean(type, connections.TYPES)}; see `resource set`")
    found = connections.parse(type, url)
    hidden = connections.secrets(found.type, found.value)
    for secret in hidden.values():
        register(secret)
    path = path or connections.suggested_path(found)
    if not replace and await _taken(op, path):
        raise Unsuited(f"there is a resource {path}: name another path with --path, or --replace it")
    if path in op.config().resources:
        raise Unsuited(f"{path} is set in the configuration file, which goes first: change it there")
    if hidden and op.key is None:
        raise SecretError(connections.without_key(path, found))
    value, variables = connections.apart(path, found)
    await _fits(op, found.type, value)
    now = op.clock()

    async def put(tx: Tx) -> int:
        for name, secret in variables.items():
            sealed = _key(op).encrypt(name, secret)
            await variable_store.put(tx, name, sealed, now, is_secret=True, description=f"of resource {path}")
        return await resource_store.put(tx, path, found.type, value, now, description=description, by="operator")

    version = await op.db.write(put)
    await write_down(op, "resource.set", path)
    return {
        "path": path, "type": found.type, "version": version, "value": value, "variables": list(variables),
        "notes": list(found.notes),
    }  # fmt: skip


async def _taken(op: Operator, path: str) -> bool:
    async with op.db.read() as tx:
        return await resource_store.get(tx, path) is not None


@verb
async def resource_url(op: Operator, path: str) -> Json:
    """The connection string of a resource, its secrets in it, which is noted in the audit list."""
    from watcher.resolve import Resolver

    type = (await resource_get(op, path))["type"]
    if type not in connections.TYPES:
        raise Unsuited(f"{path} is of type {type}, which has no connection string: {', '.join(connections.TYPES)} have")
    value = await Resolver(op.config, op.db, op.key).resource(path)
    await _fits(op, type, value)
    await write_down(op, "resource.read", path)
    return {"path": path, "type": type, "url": connections.write(type, value)}


@reads
async def resource_test(op: Operator, path: str, timeout: float = 10.0) -> Json:  # noqa: ASYNC109 -- kept by the probe
    """Connect to what a resource describes, from where this runs, and say what is wrong and what to do about it."""
    from watcher.connections.probe import TESTED, probe
    from watcher.objects import Objects
    from watcher.resolve import Resolver

    type = (await resource_get(op, path))["type"]
    if type not in TESTED:
        raise Unsuited(f"{path} is of type {type}, which cannot be tested: {', '.join(TESTED)} can")
    resolver = Resolver(op.config, op.db, op.key)
    value = await resolver.resource(path)
    await _fits(op, type, value)
    store = Objects(op.config, resolver.resource).of_resource
    started = monotonic()
    verdict = await probe(type, value, timeout, store)
    return {
        "path": path, "type": type, "ok": verdict.ok, "kind": verdict.kind, "said": mask(verdict.said),
        "do": mask(verdict.do), "version": verdict.version, "seconds": round(monotonic() - started, 3),
    }  # fmt: skip


@verb
async def resource_delete(op: Operator, path: str) -> Json:
    """Delete a resource of the database."""
    if not await op.db.write(lambda tx: resource_store.delete(tx, path)):
        raise Unknown(f"no such resource in the database: {path}")
    await write_down(op, "resource.delete", path)
    return {"deleted": path}


@reads
async def token_list(op: Operator) -> Json:
    """The API tokens that people made: label, first characters, scopes, expiry, last use."""
    async with op.db.read() as tx:
        rows = await token_store.list(tx)
    return [{name: value for name, value in plain(row).items() if name != "sha256"} for row in rows]


@verb
async def token_create(op: Operator, label: str, scopes: Sequence[str] = (), expires_in: float | None = None) -> Json:
    """A new API token; ``expires_in`` in seconds. It is shown this once: only its hash is kept."""
    for scope in scopes:
        domain, action = [*scope.split(":"), ""][:2]
        if scope != "*" and (domain not in SCOPES or action not in ("", "*", "read", "write", "run")):
            known = ", ".join(SCOPES)
            raise Unknown(
                f"no such scope: {scope}{did_you_mean(domain, SCOPES)}; one begins with {known}, and goes on with "
                ":read, :write or :run (docs/windmill.md, Tokens)"
            )
    now = op.clock()
    token = TOKEN_PREFIX + random.token_urlsafe(32)
    expires = now + timedelta(seconds=expires_in) if expires_in else None
    digest = hashlib.sha256(token.encode()).digest()
    await op.db.write(
        lambda tx: token_store.create(tx, digest, token[:10], now, label=label, scopes=scopes, expires_at=expires)
    )
    await write_down(op, "token.create", token[:10], label)
    return {"token": token, "label": label, "scopes": list(scopes), "expires_at": plain(expires)}


@verb
async def token_revoke(op: Operator, prefix: str) -> Json:
    """Revoke the one token whose first characters or label these are."""
    async with op.db.read() as tx:
        rows = [t for t in await token_store.list(tx) if t.label == prefix or t.prefix.startswith(prefix)]
    if len(rows) != 1:
        count = "no token" if not rows else f"{len(rows)} tokens"
        raise Unknown(f"{count} with that label or beginning: {prefix} (`watcher token list` shows them)")
    await op.db.write(lambda tx: token_store.delete(tx, rows[0].prefix))
    await write_down(op, "token.revoke", rows[0].prefix, rows[0].label)
    return {"revoked": rows[0].prefix, "label": rows[0].label}


async def rotate_key(db: Database, environ: Mapping[str, str], file: Path | None, now: datetime) -> Json:
    """Encrypt every secret anew. At each moment the key file opens every stored secret, so a crash loses none.

    A file with one key gets a new first line, the secrets are encrypted with that in one transaction, and then the
    old line goes. A file with several lines is a rotation that was not finished (or a key that was added by hand):
    it is finished. Raises SecretError.
    """
    from watcher import secrets

    ours = file is not None and not secrets.from_elsewhere(environ)
    if ours and file is not None and len(lines := secrets.lines_of(file)) == 1:
        secrets.load_key(environ, file)  # nothing is written beside what is no key
        secrets.write_keys(file, [secrets.new_key(), *lines])
    failpoint("key_written")
    key = secrets.load_key(environ, file)
    if key is None:
        raise SecretError("there is no key to change: `watcher secret new-key` makes the first one")
    count, encrypted = await db.write(lambda tx: _encrypt_anew(tx, key, now))
    failpoint("key_in_use")
    if ours and file is not None:
        secrets.write_keys(file, secrets.lines_of(file)[:1])
    old = [] if ours else [name for name in key.keys if name != key.current]
    return {"key": key.current, "secrets": count, "encrypted": encrypted, "old_keys": old}


async def _encrypt_anew(tx: Tx, key: Key, now: datetime) -> tuple[int, int]:
    found = [row for row in await variable_store.list(tx) if row.is_secret]
    old = [row for row in found if not row.value.startswith(f"v1:{key.current}:")]
    for row in old:
        sealed = key.encrypt(row.path, key.decrypt(row.path, row.value))
        await variable_store.put(tx, row.path, sealed, row.edited_at, is_secret=True, description=row.description)
    await audit.note(tx, "secret.rotate", key.current, now, actor="operator", note=f"{len(old)} encrypted anew")
    return len(found), len(old)


def _key(op: Operator) -> Key:
    if op.key is None:
        raise WatcherError("there is no key to encrypt secrets with: `watcher doctor` says how to make one")
    return op.key
