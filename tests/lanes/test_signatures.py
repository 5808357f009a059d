"""What went over the wire verifies with the official libraries of Standard Webhooks, in Python and in JavaScript."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from tests.lanes.test_windmill import NETWORK
from tests.support.dispatching import dispatching
from tests.support.receiver import Receiver
from watcher.store.db import Database
from watcher.values import Flow

pytestmark = pytest.mark.long

NEW, OLD = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ED25519 = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
VERSION = "1.1.1"
VERIFY = """
import { Webhook } from "standardwebhooks";
import { readFileSync } from "node:fs";
const { secrets, requests } = JSON.parse(readFileSync(0, "utf8"));
const out = requests.map(([headers, body]) => secrets.map((secret) => {
  const text = Buffer.from(body, "base64").toString();
  const altered = text.slice(0, -1) + " " + text.slice(-1);
  const refused = () => { try { new Webhook(secret).verify(altered, headers); return false } catch { return true } };
  try { new Webhook(secret).verify(text, headers); return refused() } catch (error) { return String(error) }
}));
console.log(JSON.stringify(out));
"""


def odd_items(count: int) -> list[dict[str, Any]]:
    """Texts from all over Unicode, half surrogate pairs and control characters among them."""
    chance = random.Random(20)
    ranges = [(0x20, 0x7E), (0x00, 0x1F), (0xA0, 0x2FF), (0x2000, 0x206F), (0xD800, 0xDFFF), (0x1F300, 0x1F6FF)]

    def text() -> str:
        return "".join(chr(chance.randint(*chance.choice(ranges))) for _ in range(chance.randint(0, 60)))

    return [{"id": str(number), "text": text(), "n": chance.random()} for number in range(count)]


async def test_what_went_over_the_wire_verifies_in_python_and_in_javascript(
    sqlite_db: Database, tmp_path: Path
) -> None:
    items = odd_items(2000)
    async with Receiver() as receiver:
        flow = Flow("hook", url=f"{receiver.url}/flaky/20", secrets=(NEW, OLD, ED25519), at_once=32)
        async with dispatching(sqlite_db, flow, schedule=(timedelta(0),) * 40) as bench:
            await bench.commit(*items)
            await bench.until_done()
        requests = [(r.headers, r.body) for r in receiver.received]
    assert len(requests) > len(items)  # some were sent again, signed anew
    for headers, body in requests:
        for secret in (NEW, OLD):
            Webhook(secret).verify(body, headers)
    verified = javascript(tmp_path, requests)
    assert [one for one in verified if one != [True, True]] == []
    assert len(verified) == len(requests)


def javascript(where: Path, requests: list[tuple[dict[str, str], bytes]]) -> list[list[Any]]:
    npm, node = shutil.which("npm"), shutil.which("node")
    if not (npm and node):
        assert os.environ.get("CI") != "true", "the lane needs Node.js and npm"
        pytest.skip("needs Node.js and npm")
    (where / "package.json").write_text('{"private":true,"type":"module"}')
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", f"standardwebhooks@{VERSION}"]
    environment = NETWORK | {"PATH": os.environ["PATH"], "HOME": str(where)}
    subprocess.run(command, cwd=where, check=True, capture_output=True, timeout=300, env={**os.environ, **environment})
    (where / "verify.mjs").write_text(VERIFY)
    told = {"secrets": [NEW, OLD], "requests": [[h, base64.b64encode(body).decode()] for h, body in requests]}
    done = subprocess.run(
        [node, "verify.mjs"], cwd=where, input=json.dumps(told), capture_output=True, text=True, check=True, timeout=120
    )
    found: list[list[Any]] = json.loads(done.stdout)
    return found
