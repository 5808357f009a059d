"""Secrets at rest: what the key opens, what it must refuse, and where it is looked for."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from watcher import secrets
from watcher.errors import SecretError
from watcher.secrets import Key, is_encrypted, load_key, new_key

PATH = "u/admin/token"


def key(*texts: str) -> Key:
    found = load_key({"WATCHER_SECRET_KEY": "\n".join(texts or (new_key(),))})
    assert found is not None
    return found


@pytest.mark.parametrize("text", ["", "x", "hunter2", "Zürich ☃ 日本", "\0\n", "a" * 100_000, "v1:abc:def", "\ud800"])
def test_what_was_encrypted_comes_back(text: str) -> None:
    mine = key()
    stored = mine.encrypt(PATH, text)
    assert stored.startswith(f"v1:{mine.current}:")
    assert is_encrypted(stored)
    assert mine.decrypt(PATH, stored) == text


def test_a_key_file_that_others_may_read_is_told_of(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(new_key())
    file.chmod(0o600)
    assert secrets.exposed(file) == ""
    file.chmod(0o640)
    assert secrets.exposed(file) == f"{file} can be read by others (mode 640): chmod 600 {file}"
    assert secrets.exposed(tmp_path / "none") == secrets.exposed(None) == ""


def test_the_same_text_is_never_stored_twice_alike() -> None:
    mine = key()
    assert len({mine.encrypt(PATH, "x") for _ in range(1000)}) == 1000


def test_a_row_copied_over_another_one_does_not_open() -> None:
    mine = key()
    with pytest.raises(SecretError, match="altered, or belongs to another variable"):
        mine.decrypt("u/admin/other", mine.encrypt(PATH, "hunter2"))


def test_a_byte_changed_anywhere_does_not_open() -> None:
    mine = key()
    version, name, body = mine.encrypt(PATH, "hunter2").split(":")
    raw = bytearray(base64.b64decode(body))
    for place in range(len(raw)):
        raw[place] ^= 1
        with pytest.raises(SecretError):
            mine.decrypt(PATH, f"{version}:{name}:{base64.b64encode(raw).decode()}")
        raw[place] ^= 1


@pytest.mark.parametrize("length", range(29))
def test_a_cut_value_does_not_open(length: int) -> None:
    mine = key()
    version, name, body = mine.encrypt(PATH, "hunter2").split(":")
    cut = base64.b64encode(base64.b64decode(body)[:length]).decode()
    with pytest.raises(SecretError):
        mine.decrypt(PATH, f"{version}:{name}:{cut}")


@pytest.mark.parametrize("stored", ["", "hunter2", "v1", "v1:", "v1::", "v2:aa:bb", "v1:{kid}:***", "v1:{kid}:"])
def test_what_is_no_encrypted_value_does_not_open(stored: str) -> None:
    mine = key()
    with pytest.raises(SecretError, match=PATH):
        mine.decrypt(PATH, stored.replace("{kid}", mine.current))


def test_another_key_is_refused_by_its_name() -> None:
    stored = key().encrypt(PATH, "hunter2")
    with pytest.raises(SecretError, match="encrypted with another key"):
        key().decrypt(PATH, stored)


def test_rotation_the_first_line_encrypts_and_all_decrypt() -> None:
    old, new = new_key(), new_key()
    stored = key(old).encrypt(PATH, "hunter2")
    both = key(new, old)
    assert both.decrypt(PATH, stored) == "hunter2"
    again = both.encrypt(PATH, "hunter2")
    assert key(new).decrypt(PATH, again) == "hunter2"
    with pytest.raises(SecretError):
        key(old).decrypt(PATH, again)


def test_no_error_and_no_repr_shows_a_key_or_a_secret() -> None:
    text = new_key()
    mine = key(text)
    raw = next(iter(mine.keys.values()))
    assert text not in repr(mine)
    assert repr(raw) not in repr(mine)
    for spoil in ("v1:00000000:AAAA", f"v1:{mine.current}:AAAA", "hunter2hunter2"):
        with pytest.raises(SecretError) as caught:
            mine.decrypt(PATH, spoil)
        assert text not in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_a_start_with_secrets_and_no_key_or_another_one_is_refused() -> None:
    mine = key()
    stored = {PATH: mine.encrypt(PATH, "hunter2"), "u/admin/b": mine.encrypt("u/admin/b", "x")}
    secrets.require(mine, stored)
    secrets.require(None, {})
    with pytest.raises(SecretError, match="there is no key"):
        secrets.require(None, stored)
    with pytest.raises(SecretError, match="another key"):
        secrets.require(key(), stored)
    with pytest.raises(SecretError, match="altered"):
        secrets.require(mine, {PATH: stored["u/admin/b"]})


# --- where the key is -------------------------------------------------------------------------------------------------


def test_no_key_anywhere_is_none() -> None:
    assert load_key({}) is None


def test_a_credential_goes_before_a_file_before_the_environment(tmp_path: Path) -> None:
    texts = [new_key() for _ in range(3)]
    names = [key(text).current for text in texts]
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "watcher-key").write_text(texts[0] + "\n")
    (tmp_path / "file").write_text(texts[1] + "\n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"), "WATCHER_SECRET_KEY": texts[2]}

    def current(file: Path | None) -> str:
        found = load_key(environ, file)
        assert found is not None
        return found.current

    assert current(tmp_path / "file") == names[0]
    del environ["CREDENTIALS_DIRECTORY"]
    assert current(tmp_path / "file") == names[1]
    assert current(None) == names[2]


def test_credentials_without_the_key_are_no_mistake(tmp_path: Path) -> None:
    assert load_key({"CREDENTIALS_DIRECTORY": str(tmp_path)}) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "hunter2",
        "aGVsbG8=",
        base64.b64encode(bytes(32)).decode(),
        base64.b64encode(b"ab" * 16).decode(),
        base64.b64encode(bytes(range(31))).decode(),
        "x" * 44,
        f"{base64.b64encode(bytes(range(32))).decode()}\nrubbish",
    ],
)
def test_a_key_that_is_none_is_refused_not_ignored(tmp_path: Path, text: str) -> None:
    """Going on without it would look like an installation without secrets."""
    (tmp_path / "key").write_text(text)
    with pytest.raises(SecretError, match="doctor --new-key") as caught:
        load_key({}, tmp_path / "key")
    assert caught.value.exit_code == 78
    assert "hunter2" not in str(caught.value)


def test_a_key_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match="cannot be read: No such file"):
        load_key({}, tmp_path / "none")


def test_a_binary_key_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(range(200, 232)))
    with pytest.raises(SecretError, match="not a key"):
        load_key({}, tmp_path / "key")


def test_a_key_is_masked_once_loaded() -> None:
    text = new_key()
    key(text)
    assert text not in secrets.mask(f"key {text}")
