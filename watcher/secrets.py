"""Secrets at rest, encrypted with the installation's key, and out of every text that people read."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from watcher.errors import SecretError
from watcher.log import mask, register

__all__ = ["Key", "is_encrypted", "load_key", "mask", "new_key", "register", "require"]

CREDENTIAL = "watcher-key"
"""The name of the systemd credential: ``LoadCredentialEncrypted=watcher-key:…``."""

_BYTES = 32
_NONCE = 12  # NIST SP 800-38D 5.2.1.1: 96 random bits
_MOST_BYTES = 64 * 1024
_ADVICE = "make one with `watcher doctor --new-key`, or restore the one that belongs to this database"


@dataclass(frozen=True, slots=True)
class Key:
    """The newest key, which encrypts, and the older ones, which still decrypt. ``repr`` shows none of them."""

    keys: Mapping[str, bytes]
    current: str

    def __repr__(self) -> str:
        return f"Key({self.current})"

    def encrypt(self, path: str, text: str) -> str:
        """``text`` as ``v1:<key id>:<base64 of nonce and ciphertext>``, bound to the variable at ``path``."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce = os.urandom(_NONCE)
        sealed = AESGCM(self.keys[self.current]).encrypt(nonce, text.encode("utf-8", "surrogatepass"), _bound_to(path))
        return f"v1:{self.current}:{base64.b64encode(nonce + sealed).decode()}"

    def decrypt(self, path: str, stored: str) -> str:
        """The text that `encrypt` was given for this very path. Raises SecretError: another key, or altered."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        version, _, rest = stored.partition(":")
        name, _, body = rest.partition(":")
        if version != "v1" or not body:
            raise SecretError(f"variable {path}: its stored value is not an encrypted one")
        if name not in self.keys:
            raise SecretError(f"variable {path} was encrypted with another key ({name}): put that key's line back")
        try:
            sealed = base64.b64decode(body, validate=True)
            text = AESGCM(self.keys[name]).decrypt(sealed[:_NONCE], sealed[_NONCE:], _bound_to(path))
        except (InvalidTag, binascii.Error, ValueError) as error:
            raise SecretError(
                f"variable {path}: its stored value was altered, or belongs to another variable; set it anew"
            ) from error
        return text.decode("utf-8", "surrogatepass")


def _bound_to(path: str) -> bytes:
    """A row copied over another one does not decrypt."""
    return f"variable:{path}".encode()


def is_encrypted(stored: str) -> bool:
    """Whether a stored value is one that `Key.encrypt` made."""
    version, _, rest = stored.partition(":")
    return version == "v1" and ":" in rest


def require(key: Key | None, stored: Mapping[str, str]) -> None:
    """Refuse to start when secrets are stored (path → encrypted value) that the key does not open. Raises SecretError.

    Without this the service would run until the first delivery that needs one.
    """
    for path, value in stored.items():
        if key is None:
            raise SecretError(
                f"variable {path} is encrypted, and there is no key: put it back as the credential {CREDENTIAL}, as "
                "secret_key_file, or in WATCHER_SECRET_KEY"
            )
        key.decrypt(path, value)


def exposed(file: Path | None) -> str:
    """What is wrong with who may read a key file; nothing when only its owner may, or there is none."""
    try:
        mode = 0 if file is None else stat.S_IMODE(file.stat().st_mode)
    except OSError:
        return ""  # `load_key` says what is wrong with it
    return f"{file} can be read by others (mode {mode:o}): chmod 600 {file}" if mode & 0o077 else ""


def from_elsewhere(environ: Mapping[str, str]) -> bool:
    """Whether the key comes as a systemd credential, which stands before ``secret_key_file``."""
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    return bool(credentials) and (Path(credentials or "") / CREDENTIAL).exists()


def write_keys(file: Path, lines: Sequence[str]) -> None:
    """Replace a key file, whole or not at all, on the disk before this returns. Raises SecretError."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        status = file.stat()
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            if os.geteuid() == 0:
                os.fchown(out.fileno(), status.st_uid, status.st_gid)
            out.write("".join(f"{line}\n" for line in lines))
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SecretError(f"{file}: the key cannot be written: {error.strerror}") from error


def lines_of(file: Path) -> list[str]:
    """The keys of a file, as they are written there. Raises SecretError."""
    return _read(file).split()


def new_key() -> str:
    """A new key as text, for a file or a systemd credential."""
    return base64.b64encode(os.urandom(_BYTES)).decode()


def load_key(environ: Mapping[str, str], file: Path | None = None) -> Key | None:
    """The installation's key, or None when there is none.

    Looked for in the systemd credential ``watcher-key``, then in ``file`` (``secret_key_file``), then in
    ``WATCHER_SECRET_KEY``. A text of several lines is a rotation: the first line encrypts, the others still decrypt.
    Raises SecretError for a key that is there but unusable: going on without it would look like "no secrets".
    """
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    if credentials and (Path(credentials) / CREDENTIAL).exists():
        return _parse(_read(Path(credentials) / CREDENTIAL), str(Path(credentials) / CREDENTIAL))
    if file is not None:
        return _parse(_read(file), str(file))
    if "WATCHER_SECRET_KEY" in environ:
        return _parse(environ["WATCHER_SECRET_KEY"], "WATCHER_SECRET_KEY")
    return None


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MOST_BYTES)
        return raw.decode("ascii")
    except OSError as error:
        raise SecretError(f"{file}: the key cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SecretError(f"{file}: this is not a key; {_ADVICE}") from error


def _parse(text: str, where: str) -> Key:
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.split(), 1):
        register(line)
        try:
            key = base64.b64decode(line, validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if len(key) != _BYTES or len(set(key)) < 8:
            raise SecretError(f"{where}: line {number} is not a key of {_BYTES} random bytes in base64; {_ADVICE}")
        keys[hashlib.sha256(b"watcher key id" + key).hexdigest()[:8]] = key
    if not keys:
        raise SecretError(f"{where}: there is no key in it; {_ADVICE}")
    return Key(keys, next(iter(keys)))
