"""The preset for Slack's incoming webhooks: one message per item; the address itself is the secret."""

from __future__ import annotations

import json
from datetime import datetime, timedelta

from watcher.flows import envelope, shape
from watcher.flows import preset as p
from watcher.values import Delivery, Flow, Json, Judgement, Request, Response, Verdict

LIMIT = 40_000
"""Characters of a message's text."""

_ITEM = frozenset({"invalid_payload", "no_text", "invalid_blocks", "invalid_blocks_format", "too_many_attachments",
                   "msg_too_long", "invalid_attachments"})  # fmt: skip
"""What Slack says of a message that it will never take."""


class Settings(p.PresetSettings):
    """What only the slack preset knows: nothing."""


def request(flow: Flow, delivery: Delivery, resolved: p.Resolved, now: datetime) -> Request:
    message = shape.body(flow, delivery) if flow.body is not None else _said_of(delivery)
    if not isinstance(message, dict):
        message = {"text": message if isinstance(message, str) else json.dumps(message)}
    if len(str(message.get("text", ""))) > LIMIT:
        raise p.oversized("Slack", len(str(message["text"])), LIMIT, "characters")
    body = envelope.dumped(flow, message)
    headers = envelope.headers(flow, delivery, resolved, now, body, envelope.JSON)
    return Request("POST", resolved.url, headers, body)


def judge(flow: Flow, delivery: Delivery, resolved: p.Resolved, response: Response, now: datetime) -> Judgement:
    """Slack says in one word what is wrong: with this message, or with the webhook and thus with every message."""
    word = response.body.decode("utf-8", "replace").strip()[:100]
    if response.status == 200:
        if word == "ok":
            return Judgement(Verdict.DELIVERED)
        return Judgement(Verdict.TARGET, f"answered 200 and {word!r} instead of ok: is url an incoming webhook?")
    judgement = p.judge_status(response, now)
    note = f"answered {response.status}: {word}" if word else f"answered {response.status}"
    if 400 <= response.status < 500 and judgement.verdict is not Verdict.PASSING:
        return Judgement(Verdict.ITEM if word in _ITEM or response.status == 413 else Verdict.TARGET, note)
    return Judgement(judgement.verdict, note, judgement.retry_after)


def _said_of(delivery: Delivery) -> dict[str, Json]:
    """A line about an item, where no `body` says better: its title, and where it is."""
    item = json.loads(delivery.payload)["item"]
    named = item if isinstance(item, dict) else {}
    title = next(
        (named[n] for n in ("title", "name", "subject", "text") if isinstance(named.get(n), str)), delivery.key
    )
    url = next((named[n] for n in ("url", "html_url", "link") if isinstance(named.get(n), str)), "")
    change = "" if delivery.change == "new" else f" ({delivery.change})"
    return {
        "text": "\n".join(filter(None, [f"*{_plain(delivery.watcher)}*{change}: {_plain(title[:3000])}", _plain(url)]))
    }


def _plain(text: str) -> str:
    """Three characters are Slack's own."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


preset = p.Preset(Settings, request, judge, formats=(), secret_url=True, rate=(1, timedelta(seconds=1)), max_item=None)
