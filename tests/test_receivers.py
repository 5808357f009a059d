"""The examples of docs/receivers.md, as printed: they take what is ours and new, and nothing else."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook

from tests.support.deliveries import delivery, resolved
from watcher.flows import presets
from watcher.flows.sign import sign
from watcher.values import Flow

TEXT = (Path(__file__).parent.parent / "docs" / "receivers.md").read_text()
SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
OLD = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ED25519 = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
NODE = shutil.which("node")


def example(heading: str, language: str) -> str:
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found, heading
    return found[1]


def sent(*secrets: str, at: datetime | None = None, item: Any = None, **more: Any) -> tuple[dict[str, str], bytes]:
    """What watcher sends, as a receiver sees it."""
    flow = Flow("hook", url="http://127.0.0.1/", secrets=secrets or (SECRET,), **more)
    request = presets["http"].request(flow, delivery(item), resolved(flow), at or datetime.now(UTC))
    return dict(request.headers), request.body


def altered() -> Iterator[tuple[str, dict[str, str], bytes]]:
    """Requests that no receiver may take."""
    headers, body = sent()
    for name in ("webhook-id", "webhook-timestamp", "webhook-signature"):
        yield f"without {name}", {key: value for key, value in headers.items() if key != name}, body
    yield "another id", headers | {"webhook-id": "msg_other"}, body
    yield "a body that was altered", headers, body.replace(b"Hello", b"Hallo")
    yield "a body that was written again", headers, json.dumps(json.loads(body)).encode()
    yield "no timestamp", headers | {"webhook-timestamp": "hello"}, body
    for seconds in (-301, 360):  # what is ahead comes nearer while a test runs
        late, content = sent(at=datetime.now(UTC) + timedelta(seconds=seconds))
        yield f"{seconds} s off", late, content
    yield "another time", headers | {"webhook-timestamp": str(int(headers["webhook-timestamp"]) + 1)}, body
    signature = headers["webhook-signature"]
    yield "a signature of nothing", headers | {"webhook-signature": "v1,"}, body
    yield "the start of a signature", headers | {"webhook-signature": signature[:11]}, body
    yield "another version", headers | {"webhook-signature": signature.replace("v1,", "v2,")}, body
    yield "bad ones only", headers | {"webhook-signature": "v1,Zm9v v2,YmFy v1a,YmF6"}, body
    yield "another secret", *sent(OLD)


# --- Python -----------------------------------------------------------------------------------------------------------


class Python:
    """The Python example, run in a directory of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        self.done: list[Any] = []
        self.names: dict[str, Any] = {"work": self.work}
        exec(example("Python", "python"), self.names)
        self.broken = False

    def work(self, item: Any) -> None:
        if self.broken:
            raise RuntimeError("no")
        self.done.append(item)

    def receive(self, headers: dict[str, str], body: bytes) -> None:
        self.names["receive"](headers, body)


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Python]:
    receiver = Python(monkeypatch, tmp_path)
    yield receiver
    receiver.names["seen"].close()


def test_the_python_example_takes_an_item_once(python: Python) -> None:
    for _ in range(3):
        python.receive(*sent())
    assert python.done == [{"id": 1, "title": "Hello"}]


def test_the_python_example_tries_again_what_failed(python: Python) -> None:
    python.broken = True
    with pytest.raises(RuntimeError):
        python.receive(*sent())
    python.broken = False
    python.receive(*sent())
    assert len(python.done) == 1


@pytest.mark.parametrize("what", [name for name, _, _ in altered()])
def test_the_python_example_refuses_what_is_not_ours(python: Python, what: str) -> None:
    headers, body = next((headers, body) for name, headers, body in altered() if name == what)
    with pytest.raises(Exception):  # noqa: B017 -- the library raises several kinds; all mean 401
        python.receive(headers, body)
    assert python.done == []


def test_while_a_secret_is_replaced_receivers_with_either_take_it(python: Python) -> None:
    python.receive(*sent(OLD, SECRET, ED25519))
    assert len(python.done) == 1
    headers, body = sent(OLD, SECRET, ED25519)
    Webhook(OLD).verify(body, headers)
    assert [one.partition(",")[0] for one in headers["webhook-signature"].split()] == ["v1", "v1", "v1a"]


# --- JavaScript -------------------------------------------------------------------------------------------------------

TYPES = (": Record<string, string>", ": Buffer", ": (item: unknown) => void", ": number", "<string>")
"""All that makes the example TypeScript; older Nodes do not know how to pass over it."""


def node(script: str, requests: list[tuple[dict[str, str], bytes]], tmp_path: Path) -> Any:
    assert NODE
    file = tmp_path / "receiver.mjs"
    file.write_text(script)
    given = json.dumps([[headers, base64.b64encode(body).decode()] for headers, body in requests])
    done = subprocess.run([NODE, file], input=given, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def typescript() -> str:
    code = example("TypeScript", "typescript")
    for annotation in TYPES:
        assert annotation in code
        code = code.replace(annotation, "")
    return (
        code
        + """
const done = [];
const statuses = [];
for (const [headers, body] of JSON.parse((await import("node:fs")).readFileSync(0, "utf8")))
  statuses.push(receive(headers, Buffer.from(body, "base64"), (item) => done.push(item)));
console.log(JSON.stringify({ statuses, done }));
"""
    )


def n8n() -> str:
    return (
        """
import { createRequire } from "node:module";
const require = createRequire(import.meta.url);
const results = [];
for (const [headers, body] of JSON.parse((await import("node:fs")).readFileSync(0, "utf8"))) {
  const $input = { first: () => ({ json: { headers } }) };
  const self = { helpers: { getBinaryDataBuffer: async () => Buffer.from(body, "base64") } };
  const code = async function () {
"""
        + example("n8n", "javascript")
        + """
  };
  try { results.push(await code.call(self)); } catch { results.push(null); }
}
console.log(JSON.stringify(results));
"""
    )


@pytest.mark.skipif(not NODE, reason="needs Node.js")
def test_the_typescript_example_takes_an_item_once_and_refuses_what_is_not_ours(tmp_path: Path) -> None:
    bad = [(headers, body) for _, headers, body in altered()]
    found = node(typescript(), [sent(OLD, SECRET), sent(), *bad], tmp_path)
    assert found["statuses"] == [204, 204, *[401] * len(bad)]
    assert found["done"] == [{"id": 1, "title": "Hello"}]


@pytest.mark.skipif(not NODE, reason="needs Node.js")
def test_the_n8n_example_takes_what_is_ours_and_refuses_the_rest(tmp_path: Path) -> None:
    headers, body = sent(OLD, SECRET)
    bad = [(headers, body) for _, headers, body in altered()]
    found = node(n8n(), [(headers, body), *bad], tmp_path)
    assert found[0] == [{"json": {"id": headers["webhook-id"], **json.loads(body)}}]
    assert found[1:] == [None] * len(bad)


@pytest.mark.skipif(not NODE, reason="needs Node.js")
def test_a_thousand_odd_bodies_verify_in_javascript(tmp_path: Path) -> None:
    texts = [chr(0x20 + (n * 7919) % 0xD7E0) * (n % 50) + '\u2028\x00"\\é☃😀' for n in range(1000)]
    requests = [sent(item={"id": n, "text": text}) for n, text in enumerate(texts)]
    found = node(n8n(), requests, tmp_path)
    assert [result[0]["json"]["data"]["item"]["text"] for result in found] == texts


# --- Windmill ---------------------------------------------------------------------------------------------------------


def test_the_windmill_example_takes_what_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    wmill = types.ModuleType("wmill")
    wmill.get_variable = lambda path: SECRET  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wmill", wmill)
    names: dict[str, Any] = {}
    exec(example("Windmill", "python"), names)
    headers, body = sent(format="plain")
    given = {name.replace("-", "_"): value for name, value in headers.items() if name.startswith("webhook-")}
    assert names["main"](raw_string=body.decode(), **given) == "Hello"
    with pytest.raises(Exception):  # noqa: B017
        names["main"](raw_string=body.decode() + " ", **given)


# --- every byte counts ------------------------------------------------------------------------------------------------


@given(
    body=st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")),
    where=st.sampled_from(["id", "timestamp", "body"]),
    index=st.integers(0, 10_000),
)
@settings(max_examples=1000, deadline=None)
def test_one_byte_changed_anywhere_is_found(body: bytes, where: str, index: int) -> None:
    now = datetime.now(UTC)
    parts = {"id": "msg_p5jXN8AQM9LWM0D4loKWxJek", "timestamp": str(int(now.timestamp())), "body": body.decode()}
    headers = {"webhook-signature": sign([SECRET], parts["id"], now, body)}
    Webhook(SECRET).verify(body, _headers(parts) | headers, json_parse=False)
    text = parts[where] or " "
    at = index % len(text)
    parts[where] = text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :] if parts[where] else "x"
    with pytest.raises(Exception):  # noqa: B017
        Webhook(SECRET).verify(parts["body"].encode(), _headers(parts) | headers, json_parse=False)


def _headers(parts: dict[str, str]) -> dict[str, str]:
    return {"webhook-id": parts["id"], "webhook-timestamp": parts["timestamp"]}
