"""Second step of the example's local flow: append the item to a JSON-lines file, announced.jsonl in the data directory.

A step runs in a directory of its own, <data>/jobs/<id>, with ./shared in it; when the flow is done that directory is
gone. What is to stay must therefore be put elsewhere, here two folders up. A flow that a crash interrupted runs again
under the same id, so the line carries it: whoever reads the file may drop a repeated one.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path


def main(item: dict) -> dict:
    """Write one line, in one call, so that two flows at once cannot mix theirs."""
    file = Path("../../announced.jsonl").resolve()
    record = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "job": os.environ.get("WM_JOB_ID", ""),
        "line": Path("shared/line.txt").read_text(encoding="utf-8"),
        "item": item,
    }
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, json.dumps(record).encode() + b"\n")
    finally:
        os.close(descriptor)
    return {"recorded": str(file)}
