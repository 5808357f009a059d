"""TypeScript by the real deno, and any executable: called, limited and killed like a Python script."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.scripts import FakeHost, alive, noted, until, write
from watcher.errors import TriggerError
from watcher.scripts import Call, Scripts, engines
from watcher.scripts.signature import signature
from watcher.values import ScriptSettings

SECONDS = timedelta(seconds=60)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
async def scripts(data: Path) -> AsyncIterator[Scripts]:
    found = Scripts(ScriptSettings(workers=2, max_result=100_000), data=data)
    yield found
    await found.close()


def program(folder: Path, text: str, name: str = "program") -> Path:
    path = write(folder, text, name)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


async def failure(scripts: Scripts, script: Path, seconds: float = 30, **args: object) -> TriggerError:
    with pytest.raises(TriggerError) as caught:
        await scripts.call(Call(script, args, timeout=timedelta(seconds=seconds)), FakeHost())
    return caught.value


# --- the signature


def test_a_signature_is_read_without_running_anything() -> None:
    read = signature(
        """
        // What is new in a shop.
        import * as wmill from "windmill-client"
        import { S3Object } from "windmill-client@1.500"
        type Postgresql = { host: string; port?: number }
        interface HubSpot { token: string }
        export async function main(
          db: Postgresql, hub: HubSpot, n: number = 3, names: string[] = [], kind: "a" | "b" = "a",
          maybe?: { deep: Array<number> }, when: Date, any: unknown, either: string | null, on = true,
        ): Promise<object[]> { throw new Error("never run") }
        """,
        "x.ts",
    )
    fields = read.schema["properties"]
    assert read.schema["required"] == ["db", "hub", "when", "any", "either"]
    assert fields["db"]["format"] == "resource-postgresql"
    assert fields["db"]["required"] == ["host"]
    assert fields["hub"]["format"] == "resource-hub_spot"
    assert fields["n"] == {"type": "number", "default": 3}
    assert fields["names"] == {"type": "array", "items": {"type": "string"}, "default": []}
    assert fields["kind"] == {"enum": ["a", "b"], "default": "a"}
    assert fields["maybe"]["properties"]["deep"]["items"] == {"type": "number"}
    assert fields["when"]["format"] == "date-time"
    assert fields["any"] == {}
    assert fields["either"] == {"anyOf": [{"type": "string"}, {"type": "null"}]}
    assert fields["on"] == {"type": "boolean", "default": True}
    assert read.doc == "What is new in a shop."
    assert read.imports == ("windmill-client", "windmill-client@1.500")


@pytest.mark.parametrize("text", ["function main() {}", "export const other = 1", ""])
def test_a_script_without_an_exported_main_is_refused(text: str) -> None:
    with pytest.raises(TriggerError, match="has no main: export it"):
        signature(text, "x.ts")


def test_what_is_no_typescript_is_told_with_its_line() -> None:
    with pytest.raises(TriggerError, match=r"x\.ts:2: this is not TypeScript"):
        signature("export function main() {}\nlet = = 3", "x.ts")


# --- deno


async def test_a_typescript_main_says_what_is_new(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import { double } from "./helper.ts";
        export async function main(n: number, name: string = "x", more?: number) {
          console.log("looking at", n);
          return [{ id: double(n), name, more: more ?? null, secret: Deno.env.get("HOME_OF_NOTHING") ?? null }];
        }
        """,
        "watch.ts",
    )
    write(tmp_path, "export const double = (n: number) => 2 * n;", "helper.ts")
    listing = await scripts.call(Call(script, {"n": 21}, timeout=SECONDS), FakeHost())
    assert listing.entries[0].item == {"id": 42, "name": "x", "more": None, "secret": None}
    assert (listing.entries[0].key, listing.label.style) == ("42", "windmill")
    assert "looking at 21" in listing.logs
    write(tmp_path, "export const double = (n: number) => 3 * n;", "helper.ts")
    assert (await scripts.call(Call(script, {"n": 21}, timeout=SECONDS), FakeHost())).entries[0].key == "63"


async def test_a_label_stands_in_a_comment(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        // @trigger(key="name", cursor="at", on=("new", "changed"))
        export async function* main(since?: number) {
          yield [{ name: "a", at: since ?? 0 }];
          yield { name: "b", at: 9 };
        }
        """,
        "watch.ts",
    )
    described = await scripts.describe(script)
    assert (described.label.style, described.takes_since) == ("cursor", True)
    listing = await scripts.call(Call(script, since=5, timeout=SECONDS), FakeHost())
    assert [(entry.key, entry.cursor) for entry in listing.entries] == [("a", 5), ("b", 9)]


async def test_the_official_client_is_there(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import * as wmill from "windmill-client";
        import { join } from "path";
        export async function main() { return [{ id: typeof wmill.getState, path: join("a", "b") }]; }
        """,
        "watch.ts",
    )
    listing = await scripts.call(Call(script, timeout=SECONDS), FakeHost())
    assert listing.entries[0].item == {"id": "function", "path": "a/b"}


async def test_arguments_are_checked_against_the_signature(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "export function main(n: number, names: string[]) { return []; }", "watch.ts")
    with pytest.raises(TriggerError, match=r"names is missing; n: input should be a number; nam: .*did you mean names"):
        await scripts.check(script, {"n": "x", "nam": 1})


async def test_an_error_of_main_is_told_with_its_stack(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, 'export function main() { throw new TypeError("no such luck"); }', "watch.ts")
    error = await failure(scripts, script)
    assert (str(error), error.kind) == ("TypeError: no such luck", "raised")
    assert "watch.ts:1" in error.detail


async def test_a_script_reads_its_own_folder_and_starts_nothing(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        export async function main() {
          const tried: Record<string, string> = {};
          for (const [name, what] of Object.entries({
            own: () => Deno.readTextFileSync(new URL("./watch.ts", import.meta.url)),
            other: () => Deno.readTextFileSync("/etc/passwd"),
            write: () => Deno.writeTextFileSync(new URL("./x", import.meta.url), "x"),
            run: () => new Deno.Command("/bin/true").outputSync(),
          })) { try { await what(); tried[name] = "yes"; } catch (e) { tried[name] = e.name; } }
          return [tried];
        }
        """,
        "watch.ts",
    )
    listing = await scripts.call(Call(script, timeout=SECONDS), FakeHost())
    refused = "NotCapable"
    assert listing.entries[0].item == {"own": "yes", "other": refused, "write": refused, "run": refused}


async def test_a_hanging_typescript_is_stopped(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "export function main() { while (true); }", "watch.ts")
    assert (await failure(scripts, script, seconds=5)).kind == "timeout"


async def test_a_greedy_typescript_meets_its_limit(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "export function main() { const a: number[][] = []; for (;;) a.push(new Array(100000).fill(1.5)); }",
        "watch.ts",
    )
    with pytest.raises(TriggerError) as caught:
        await scripts.call(Call(script, timeout=SECONDS, memory_limit=64 << 20), FakeHost())
    assert caught.value.kind == "memory"


async def test_an_import_that_does_not_exist_is_told_at_the_check(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, 'import "./nowhere.ts"; export function main() { return []; }', "watch.ts")
    with pytest.raises(TriggerError, match=r"what it imports cannot be had.*nowhere\.ts"):
        await scripts.describe(script)


async def test_without_deno_the_check_says_what_to_install(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find", lambda name: None)
    script = write(tmp_path, "export function main() { return []; }", "watch.ts")
    with pytest.raises(TriggerError, match=r"install change-watcher\[typescript\]"):
        await scripts.describe(script)


@pytest.mark.skipif(engines.find("bun") is None, reason="there is no bun here")
async def test_bun_runs_what_asks_for_it(scripts: Scripts, tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import { getState } from "windmill-client";
        export async function main(n: number) {
          console.log("hi");
          return [{ id: n, what: typeof getState, bun: !!Bun }];
        }
        """,
        "watch.bun.ts",
    )
    listing = await scripts.call(Call(script, {"n": 7}, timeout=SECONDS), FakeHost())
    assert listing.entries[0].item == {"id": 7, "what": "function", "bun": True}
    assert "hi" in listing.logs


@pytest.mark.parametrize(
    ("imported", "package"),
    [
        ("lodash", ("lodash", "*")),
        ("lodash@4.17", ("lodash", "4.17")),
        ("lodash/fp", ("lodash", "*")),
        ("@scope/name@1.2/inside", ("@scope/name", "1.2")),
        ("@scope/name/inside", ("@scope/name", "*")),
    ],
)
def test_the_package_of_an_import(imported: str, package: tuple[str, str]) -> None:
    assert engines._package(imported) == package


async def test_a_step_in_typescript_takes_the_whole_value(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "export function main(item: any) { return { got: item.a }; }", "step.ts")
    result = await scripts.step(script, {"a": [1, None]}, cwd=tmp_path, timeout=SECONDS, host=FakeHost())
    assert result.result == {"got": [1, None]}


# --- executables


async def test_a_program_lists_json_lines(scripts: Scripts, tmp_path: Path) -> None:
    script = program(
        tmp_path,
        """\
        #!/bin/sh
        # @trigger(key="n")
        cat >&2
        echo '{"n": 1}'
        echo '{"n": 2}'
        """,
    )
    listing = await scripts.call(Call(script, {"a": "ü"}, state={"s": 1}, since=7), FakeHost())
    assert [entry.key for entry in listing.entries] == ["1", "2"]
    assert listing.logs == '{"args":{"a":"ü"},"since":7,"state":{"s":1}}'


@pytest.mark.parametrize(
    ("printed", "items", "state"),
    [
        ("[1, 2]", [1, 2], None),
        ('{"items": [{"id": 1}], "state": {"last": 1}}', [{"id": 1}], {"last": 1}),
        ('{"id": 1}', [{"id": 1}], None),
        ("", [], None),
    ],
)
async def test_a_program_prints_a_list_a_page_with_a_state_or_nothing(
    scripts: Scripts, tmp_path: Path, printed: str, items: list[object], state: object
) -> None:
    listing = await scripts.call(Call(program(tmp_path, f"#!/bin/sh\necho '{printed}'\n")), FakeHost())
    assert [entry.item for entry in listing.entries] == items
    assert (listing.state or None) == state


async def test_what_is_no_json_is_no_news(scripts: Scripts, tmp_path: Path) -> None:
    error = await failure(scripts, program(tmp_path, "#!/bin/sh\necho hello\n"))
    assert error.kind == "junk"
    assert "standard error" in str(error)


async def test_a_status_is_an_error_with_its_last_words(scripts: Scripts, tmp_path: Path) -> None:
    error = await failure(scripts, program(tmp_path, "#!/bin/sh\necho '[1]'\necho oh no >&2\nexit 3\n"))
    assert str(error) == "program ended with status 3: oh no"


async def test_a_program_and_all_it_started_is_killed(scripts: Scripts, tmp_path: Path) -> None:
    note = tmp_path / "pids"
    script = program(
        tmp_path,
        f"#!/bin/sh\necho $$ > {note}\nsetsid sh -c 'echo $$ >> {note}; trap \"\" TERM; sleep 300' &\nsleep 300\n",
    )
    assert (await failure(scripts, script, seconds=1.5)).kind == "timeout"
    assert len(noted(note)) == 2
    assert await until(lambda: not any(map(alive, noted(note))))


async def test_a_program_that_ends_leaves_nobody_behind(scripts: Scripts, tmp_path: Path) -> None:
    note = tmp_path / "pids"
    script = program(tmp_path, f"#!/bin/sh\n(setsid sh -c 'echo $$ > {note}; sleep 300' &)\nsleep 0.3\necho '[]'\n")
    await scripts.call(Call(script), FakeHost())
    assert noted(note)
    assert not any(map(alive, noted(note)))


async def test_an_endless_output_is_cut_off(scripts: Scripts, tmp_path: Path) -> None:
    error = await failure(scripts, program(tmp_path, "#!/bin/sh\nexec yes\n"))
    assert error.kind == "too_large"


async def test_a_program_sees_only_what_is_harmless(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = program(tmp_path, '#!/bin/sh\nenv | cut -d= -f1 | sort | sed \'s/.*/{"id":"&"}/\'\n')
    listing = await scripts.call(Call(script, env={"WM_TOKEN": "t"}), FakeHost())
    seen = {entry.item["id"] for entry in listing.entries}
    assert "WM_TOKEN" in seen
    harmless = {"HOME", "LANG", "LC_ALL", "LC_CTYPE", "MALLOC_ARENA_MAX", "PATH", "PWD", "TZ", "TMPDIR", "_", "SHLVL"}
    assert seen <= harmless | {"OLDPWD", "SSL_CERT_DIR", "SSL_CERT_FILE", "WM_TOKEN"}


async def test_a_program_reads_its_input_or_not(scripts: Scripts, tmp_path: Path) -> None:
    listing = await scripts.call(Call(program(tmp_path, "#!/bin/sh\necho '[]'\n"), {"a": "x" * 500_000}), FakeHost())
    assert not listing.entries


async def test_a_step_gets_the_value_and_prints_its_result(scripts: Scripts, tmp_path: Path) -> None:
    script = program(tmp_path, "#!/bin/sh\ncat\n")
    result = await scripts.step(script, {"a": 1}, cwd=tmp_path, timeout=SECONDS, host=FakeHost())
    assert result.result == {"a": 1}


async def test_a_file_that_nothing_can_run_says_what_to_do(scripts: Scripts, tmp_path: Path) -> None:
    script = write(tmp_path, "puts 1", "script.rb")
    os.chmod(script, 0o644)
    with pytest.raises(TriggerError, match=r"chmod \+x script\.rb"):
        await scripts.describe(script)
