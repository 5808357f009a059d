"""Records of a Singer tap: any of the hundreds that exist, unmodified, as a source.

[watchers.orders]
trigger = "singer"
every = "15m"
flow = "ship"
timeout = "10m"
with = { tap = "tap-shopify", requirements = ["tap-shopify"], config = { shop = "me", api_key = "$var:u/me/shop" } }

Each record is an item ``{"stream": …, "record": {…}}``, known by its stream and the tap's key properties. What the tap
says of its state is kept with the items and given back to it at the next run.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from watcher import get_state, set_state, trigger

keys: dict[str, list[str]] = {}  # key properties, by stream


def key(item: dict[str, Any]) -> str | None:
    """The stream and the key properties; without any the whole record counts."""
    names = keys.get(item["stream"])
    return "/".join([item["stream"], *(str(item["record"].get(name)) for name in names)]) if names else None


@trigger(key=key)
def main(
    tap: str,
    requirements: list[str] | None = None,
    config: dict[str, Any] | None = None,
    streams: list[str] | None = None,
    catalog: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run the tap once, from its last state on.

    Args:
        tap: the program, such as "tap-github": of the ``requirements``, on the PATH, or at a path.
        requirements: what to install for it, such as ["tap-github==4.0.0"]: made once, apart from everything else.
        config: the tap's own configuration.
        streams: which streams to select of those that it discovers. Without this and ``catalog`` the tap decides.
        catalog: a catalog, as the tap's --discover gives it, with the selection made.
    """
    with tempfile.TemporaryDirectory(prefix="watcher-singer-") as folder:
        command = [tap, "--config", written(folder, "config.json", config or {})]
        if streams and catalog is None:
            catalog = selected(json.loads(output([*command, "--discover"])), streams)
        if catalog is not None:
            command += ["--catalog", written(folder, "catalog.json", catalog)]
        if (state := get_state()) is not None:
            command += ["--state", written(folder, "state.json", state)]
        items = []
        for message in messages(command):
            match message.get("type"):
                case "RECORD":
                    items.append({"stream": message["stream"], "record": message["record"]})
                case "SCHEMA":
                    keys[message["stream"]] = list(message.get("key_properties") or [])
                case "STATE":
                    state = message["value"]
                case "BATCH":
                    raise ValueError(f"{tap} sends batches in files: switch its batch_config off")
                case _:
                    pass  # ACTIVATE_VERSION tells targets to drop what is old: here the ledger knows
        if state is not None:
            set_state(state)
        return items


def written(folder: str, name: str, value: Any) -> str:
    file = Path(folder, name)
    file.write_text(json.dumps(value))
    return os.fspath(file)


def output(command: list[str]) -> bytes:
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True).stdout


def messages(command: list[str]) -> Iterator[dict[str, Any]]:
    """What the tap says, line by line; what it prints beside that goes to the log. An error if it fails."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout
        for line in process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if isinstance(message, dict):
                yield message
            elif line.strip():
                print(line.decode("utf-8", "replace"), end="")
    if process.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ended with status {process.returncode}: its log says why")


def selected(catalog: dict[str, Any], streams: list[str]) -> dict[str, Any]:
    """The catalog with these streams selected, the old way and the new."""
    there = [stream.get("tap_stream_id") or stream.get("stream") for stream in catalog["streams"]]
    if missing := sorted(set(streams) - set(there)):
        raise ValueError(f"the tap has no stream {', '.join(missing)}: it has {', '.join(map(str, there))}")
    for name, stream in zip(there, catalog["streams"], strict=True):
        chosen = name in streams
        stream["selected"] = chosen
        stream.setdefault("schema", {})["selected"] = chosen
        metadata = stream.setdefault("metadata", [])
        whole = next((entry for entry in metadata if not entry.get("breadcrumb")), None)
        if whole is None:
            whole = {"breadcrumb": [], "metadata": {}}
            metadata.append(whole)
        whole["metadata"]["selected"] = chosen
    return catalog
