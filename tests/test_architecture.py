"""The import lines of docs/design.md: who may know whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WATCHER = ROOT / "watcher"


def modules(where: Path) -> list[Path]:
    return sorted(p for p in where.rglob("*.py") if "versions" not in p.parts)


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, inside functions too, as dotted names."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers_of(package: str) -> set[str]:
    return {
        str(file.relative_to(WATCHER))
        for file in modules(WATCHER)
        if any(name == package or name.startswith(package + ".") for name in imports(file))
    }


def test_layers_import_one_way() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--config", str(ROOT / "pyproject.toml"), "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "NO_COLOR": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_schedule_imports_apscheduler() -> None:
    assert importers_of("apscheduler") == {"schedule.py"}


@pytest.mark.parametrize("package", ["httpx", "aiohttp", "httpx_aiohttp"])
def test_only_http_imports_an_http_client(package: str) -> None:
    assert all(file.startswith("http") for file in importers_of(package))


def test_sql_is_written_in_the_store_alone() -> None:
    assert all(file == "models.py" or file.startswith("store/") for file in importers_of("sqlalchemy"))


def test_only_the_app_knows_the_server() -> None:
    outside = {file for file in importers_of("watcher.server") if not file.startswith("server/")}
    assert outside == {"app.py"}


def test_run_and_dispatch_meet_in_the_outbox_only() -> None:
    assert not any(name.startswith("watcher.dispatch") for name in imports(WATCHER / "run.py"))
    assert not any(name.startswith("watcher.run") for name in imports(WATCHER / "dispatch.py"))


def test_a_trigger_imports_only_what_watcher_shows() -> None:
    shown = {"watcher"} | {
        f"watcher.{name}"
        for node in ast.walk(ast.parse((WATCHER / "__init__.py").read_text()))
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets)
        for name in ast.literal_eval(node.value)
    }
    for file in (ROOT / "triggers").glob("*.py"):
        ours = {name for name in imports(file) if name == "watcher" or name.startswith("watcher.")}
        assert ours <= shown, f"{file.name} imports {ours - shown}"


def test_every_module_opens_with_one_sentence() -> None:
    for file in modules(WATCHER):
        doc = ast.get_docstring(ast.parse(file.read_text()))
        if file.name == "__init__.py" and not file.read_text().strip():
            continue
        assert doc, f"{file} says nothing of itself"
        first = doc.splitlines()[0]
        assert first.endswith((".", ":")), f"{file}: the first line is not a sentence: {first}"


def test_a_trigger_script_loads_nothing_heavy() -> None:
    """A worker process starts in the time of its imports."""
    code = (
        "import sys; from watcher import trigger, get_state, set_state; import watcher.http, watcher.scripts.worker;"
        "heavy = ('sqlmodel', 'sqlalchemy', 'pydantic', 'httpx', 'aiohttp', 'starlette');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
