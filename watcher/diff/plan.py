"""What a run would commit, and why, as a value that can be shown, kept, and applied as it is."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from watcher import ids
from watcher.errors import Damaged
from watcher.values import UNSET, Decision, Json, Memory, NewDelivery, NewItem, Proposal, RunRecord, Seen, StagedState

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would commit, and why: everything that was decided, ready to be shown, kept and applied as it is."""

    watcher: str
    epoch: str
    made_at: datetime
    proposal: Proposal
    decisions: tuple[Decision, ...] = ()
    quarantine: str = ""  # why it was not simply committed
    state: Json = UNSET  # before the run
    cursor: Json = None  # before the run

    def to_json(self) -> dict[str, Json]:
        """As a JSON object: first what a reader wants to see, then what applying it needs."""
        p = self.proposal
        return {
            "format": _FORMAT,
            "watcher": self.watcher,
            "made_at": written(self.made_at),
            "counts": dict(p.run.counts),
            "gap": p.run.gap,
            "quarantine": self.quarantine,
            "warnings": list(p.run.warnings),
            "decisions": [asdict(decision) for decision in self.decisions],
            "items": [_item_to_json(item) for item in p.items],
            "state": {
                "before": {"version": p.expected, **optional("state", self.state), "cursor": self.cursor},
                "after": {**optional("state", p.memory.state), "cursor": p.memory.cursor},
            },
            "commit": {
                "epoch": self.epoch,
                "expected": p.expected,
                "keep_history": p.keep_history,
                "memory": memory_to_json(p.memory),
                "learn": [seen_to_json(row) for row in p.learn],
                "touch": [key.hex() for key in p.touch],
                "states": [state_to_json(state) for state in p.states],
                "run": {
                    "started_at": written(p.run.started_at),
                    "finished_at": written(p.run.finished_at),
                    "logs": p.run.logs,
                },
            },
        }

    @classmethod
    def from_json(cls, data: Json) -> Plan:
        """The reverse of `to_json`. Raises KeyError, TypeError or ValueError when it is no plan."""
        if data["format"] != _FORMAT:
            raise ValueError(f"a plan of format {data['format']}, and this program reads format {_FORMAT}")
        commit = data["commit"]
        record = RunRecord(
            watcher=data["watcher"],
            outcome="ok",
            started_at=read_instant(commit["run"]["started_at"]),
            finished_at=read_instant(commit["run"]["finished_at"]),
            counts=data["counts"],
            logs=commit["run"]["logs"],
            gap=data["gap"],
            warnings=tuple(data["warnings"]),
        )
        proposal = Proposal(
            watcher=data["watcher"],
            expected=commit["expected"],
            memory=memory_from_json(commit["memory"]),
            items=[_item_from_json(item) for item in data["items"]],
            learn=[seen_from_json(row) for row in commit["learn"]],
            touch=[bytes.fromhex(key) for key in commit["touch"]],
            run=record,
            keep_history=commit["keep_history"],
            states=[StagedState(s["path"], s.get("value", UNSET), s["expected"]) for s in commit.get("states", [])],
        )
        before = data["state"]["before"]
        return cls(
            watcher=data["watcher"],
            epoch=commit["epoch"],
            made_at=read_instant(data["made_at"]),
            proposal=proposal,
            decisions=tuple(Decision(**decision) for decision in data["decisions"]),
            quarantine=data["quarantine"],
            state=before.get("state", UNSET),
            cursor=before["cursor"],
        )

    def pack(self) -> bytes:
        """As it is stored with a quarantined run."""
        return zlib.compress(dump(self.to_json()), 1)

    @classmethod
    def unpack(cls, packed: bytes) -> Plan:
        """The reverse of `pack`. Raises Damaged."""
        try:
            return cls.from_json(json.loads(zlib.decompress(packed)))
        except (zlib.error, KeyError, TypeError, ValueError) as error:
            raise Damaged("the stored plan cannot be read: `watcher resume` drops it and looks again") from error


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def dump(value: Json) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which UTF-8 has no bytes for, is written as JSON's own escape."""
    try:
        return _encode(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def written(at: datetime) -> str:
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")


def read_instant(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"an instant without a time zone: {text}")
    return at.astimezone(UTC)


def optional(name: str, value: Json) -> dict[str, Json]:
    return {} if value is UNSET else {name: value}


def _item_to_json(item: NewItem) -> dict[str, Json]:
    return {
        "id": item.id,
        "key": item.key,
        "change": item.change,
        "revision": item.revision,
        "content": item.content.hex(),
        "note": item.note,
        "payload": json.loads(item.payload),
        "deliveries": [
            {"id": d.id, "flow": d.flow, "lane": d.lane.hex(), "due_at": written(d.due_at), "dead": d.dead}
            for d in item.deliveries
        ],
    }


def _item_from_json(data: Json) -> NewItem:
    return NewItem(
        id=data["id"],
        key=data["key"],
        key_hash=ids.key_hash(data["key"]),
        change=data["change"],
        revision=data["revision"],
        content=bytes.fromhex(data["content"]),
        payload=dump(data["payload"]),
        deliveries=tuple(
            NewDelivery(d["id"], d["flow"], bytes.fromhex(d["lane"]), read_instant(d["due_at"]), d["dead"])
            for d in data["deliveries"]
        ),
        note=data["note"],
    )


def state_to_json(state: StagedState) -> dict[str, Json]:
    return {"path": state.path, "expected": state.expected, **optional("value", state.value)}


def memory_to_json(memory: Memory) -> dict[str, Json]:
    values = {name: getattr(memory, name) for name in Memory.__dataclass_fields__ if name != "state"}
    return {**values, **optional("state", memory.state)}


def memory_from_json(data: Json) -> Memory:
    return Memory(**data)


def seen_to_json(row: Seen) -> dict[str, Json]:
    hashed = {"key_hash": row.key_hash.hex(), "content": row.content.hex()}
    return {**hashed, "revision": row.revision, "present": row.present, "key": row.key, **optional("value", row.value)}


def seen_from_json(data: Json) -> Seen:
    hashed = {name: bytes.fromhex(data[name]) for name in ("key_hash", "content")}
    return Seen(**{**data, **hashed})
