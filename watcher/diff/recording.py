"""What the script of one run was answered, kept so that the run can be repeated without the network."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from datetime import datetime

from watcher.diff.plan import memory_from_json, memory_to_json, read_instant, seen_from_json, seen_to_json, written
from watcher.errors import TriggerError
from watcher.http import redacted
from watcher.http.fetcher import name_of
from watcher.values import Json, Memory, Request, Response, Seen

_FORMAT = 1
_LARGEST = 256 * 1024 * 1024  # bytes of all answers


@dataclass(slots=True)
class Recording:
    """What one run was answered, and what was remembered before it: enough to run it again without the network."""

    watcher: str
    made_at: datetime
    memory: Memory
    known: dict[bytes, Seen] = field(default_factory=dict)
    answers: dict[str, list[Response]] = field(default_factory=dict)  # by name of the request
    size: int = 0

    def add(self, request: Request, response: Response) -> None:
        self.size += len(response.body)
        if self.size > _LARGEST:
            raise TriggerError(f"the answers are larger than a recording may be ({_LARGEST:,} bytes)", kind="too_large")
        self.answers.setdefault(name_of(request), []).append(response)

    def answer(self, request: Request) -> Response:
        """The recorded answer; of several to one request each once, and then the last."""
        answers = self.answers.get(name_of(request))
        if not answers:
            raise TriggerError(
                f"the recording holds no answer to {request.method} {redacted(request.url)}: "
                f"`watcher plan {self.watcher} --record FILE` makes a new one",
                kind="missing",
            )
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def to_json(self) -> dict[str, Json]:
        return {
            "format": _FORMAT,
            "watcher": self.watcher,
            "made_at": written(self.made_at),
            "memory": memory_to_json(self.memory),
            "known": [seen_to_json(row) for row in self.known.values()],
            "answers": {name: [_answer_to_json(a) for a in answers] for name, answers in self.answers.items()},
        }

    @classmethod
    def from_json(cls, data: Json) -> Recording:
        """The reverse of `to_json`. Raises KeyError, TypeError, ValueError or AttributeError when it is none."""
        if data["format"] != _FORMAT:
            raise ValueError(f"a recording of format {data['format']}, and this program reads format {_FORMAT}")
        known = [seen_from_json(row) for row in data["known"]]
        return cls(
            watcher=data["watcher"],
            made_at=read_instant(data["made_at"]),
            memory=memory_from_json(data["memory"]),
            known={row.key_hash: row for row in known},
            answers={name: [_answer_from_json(a) for a in answers] for name, answers in data["answers"].items()},
        )


def _answer_to_json(response: Response) -> dict[str, Json]:
    headers = {name: value for name, value in response.headers.items() if name != "set-cookie"}
    body = base64.b64encode(response.body).decode()
    return {"status": response.status, "headers": headers, "body": body, "url": redacted(response.url)}


def _answer_from_json(data: Json) -> Response:
    return Response(data["status"], data["headers"], base64.b64decode(data["body"]), data["url"])
