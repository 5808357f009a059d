"""What a Python script says that it needs: PEP 723 metadata, Windmill's comments and lock files, or its imports."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from watcher.errors import TriggerError

LARGEST = 4 * 1024 * 1024  # bytes of a lock file

_BLOCK = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")  # as PEP 723 gives it
_COMMENT = re.compile(r"(?mi)^#\s*(?P<extra>extra_)?requirements:[ \t]*$\n(?P<lines>(^#.*$\n?)*)")
_PYTHON = re.compile(r"(?m)^#\s*py(?:: *(?P<range>[\d.<>=!~, ]+)|(?P<short>3\d+))[ \t]*$")
_NAME = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)")

# Packages whose modules are called otherwise; of all others the module's name is the package's.
PACKAGES = {
    "PIL": "pillow",
    "attr": "attrs",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python-headless",
    "dateutil": "python-dateutil",
    "docx": "python-docx",
    "dotenv": "python-dotenv",
    "github": "pygithub",
    "googleapiclient": "google-api-python-client",
    "jwt": "pyjwt",
    "psycopg2": "psycopg2-binary",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


@dataclass(frozen=True, slots=True)
class Needs:
    """What an environment is made from: PEP 723 metadata as TOML, and a lock if somebody has made one."""

    metadata: str
    lock: str = ""  # uv's own, of a script
    pinned: str = ""  # a requirements file that names everything: Windmill's lock; used instead of the metadata


def needs(script: Path, text: str) -> Needs | None:
    """What a script needs beyond the service's own environment; None: nothing. TriggerError for a bad declaration.

    Where several are there the first counts: PEP 723 metadata (with uv's ``script.py.lock`` beside it), comments
    ``#requirements:``, a Windmill lock ``script.script.lock``. A script that imports ``wmill`` is Windmill's: as there,
    it gets what its imports name, unless the service has all of it.
    """
    if found := _BLOCK.search(text):
        lines = (line[2:] if line.startswith("# ") else line[1:] for line in found["content"].splitlines())
        return Needs(_checked(script, "\n".join(lines)), lock=_beside(script, script.name + ".lock"))
    python = _python(text)
    comments = list(_COMMENT.finditer(text))
    if listed := [comment for comment in comments if not comment["extra"]]:
        return Needs(_metadata(_listed(listed[0]["lines"]), python))
    extra = _listed("".join(comment["lines"] for comment in comments))
    imported = _imported(script, text)
    if not extra and ("wmill" not in imported or all(map(_is_here, imported))):
        return None
    wanted = _metadata(_with(imported, extra), python)
    return Needs(wanted, pinned=_beside(script, script.stem + ".script.lock"))


def metadata(requirements: list[str], python: str = "") -> str:
    """PEP 723 metadata for a list of requirements."""
    return _metadata(requirements, python)


def _metadata(requirements: list[str], python: str) -> str:
    lines = [f"requires-python = {json.dumps(python)}"] if python else []
    return "\n".join([*lines, f"dependencies = {json.dumps(requirements)}"])


def _checked(script: Path, text: str) -> str:
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TriggerError(f"{script.name}: the metadata in its comments is not TOML: {error}", kind="raised") from None
    listed = found.get("dependencies", [])
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise TriggerError(f"{script.name}: dependencies in its metadata is a list of texts", kind="raised")
    return text


def _listed(lines: str) -> list[str]:
    return [text for line in lines.splitlines() if (text := line.lstrip("#").strip())]


def _python(text: str) -> str:
    """Windmill's ``# py311`` or ``#py: >=3.10``, as a range."""
    found = _PYTHON.search(text)
    if not found:
        return ""
    if found["short"]:
        return f"=={found['short'][0]}.{found['short'][1:]}.*"
    version = found["range"].strip()
    return version if version[:1] in "<>=!~" else f"=={version}.*"


def _imported(script: Path, text: str) -> list[str]:
    """Top-level modules that are neither the standard library's, ours, nor lie beside the script."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []  # the run tells of it better
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= dict.fromkeys(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names[node.module.partition(".")[0]] = None
    folder = script.parent
    return [
        name
        for name in names
        if name not in sys.stdlib_module_names
        and name not in ("watcher", "f", "u")  # the last two are folders of a Windmill workspace
        and not (folder / f"{name}.py").exists()
        and not (folder / name).is_dir()
    ]


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _with(imported: list[str], extra: list[str]) -> list[str]:
    """The packages of the imports, with those that are named with a version instead."""
    named = {_plain(found[1]) for line in extra if (found := _NAME.match(line))}
    inferred = [PACKAGES.get(name, name) for name in imported]
    return [*(name for name in inferred if _plain(name) not in named), *extra]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _beside(script: Path, name: str) -> str:
    file = script.with_name(name)
    try:
        if file.stat().st_size > LARGEST:
            raise TriggerError(f"{file}: a lock of more than {LARGEST:,} bytes is not read", kind="raised")
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise TriggerError(f"{file}: cannot read the lock: {error}", kind="raised") from error
