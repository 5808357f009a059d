"""New entries of a feed: RSS, Atom or JSON Feed, also of feeds whose ids cannot be trusted.

    [watchers.blog]
    trigger = "rss"
    every = "30m"
    flow = "summarise"
    with = { url = "https://blog.example.com/feed.xml" }

Needs feedparser: ``pip install 'change-watcher[feeds]'``. Dates decide nothing: they may be missing, edited or in the
future. An entry is known by its id; where several share one, by id and link; where there is none, by its link or its
content. One that comes again with another id, but with the same link, title and date, is the same entry.
"""

from __future__ import annotations

import hashlib
import io
import json
from calendar import timegm
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urljoin

from watcher import get_state, http, set_state, trigger

REMEMBERED = 1000  # entries by link, title and date; more than any feed shows at once


@trigger(key="id")
def main(url: str, headers: dict[str, str] | None = None, token: str | None = None) -> list[dict[str, Any]]:
    """List the entries of a feed as it lists them, usually newest first.

    Args:
        url: the feed.
        headers: request headers.
        token: sent as "Authorization: Bearer …".
    """
    answer = http.sync.get(url, headers=headers, auth=token, stop_if_unchanged=True)
    entries = read_json(answer.json()) if is_json(answer) else read_xml(answer)
    known: dict[str, str] = get_state() or {}
    items, looks = identified(entries, known)
    remembered = dict(list({**looks, **known}.items())[:REMEMBERED])
    if remembered != known:
        set_state(remembered)
    return items


def identified(entries: list[dict[str, Any]], known: dict[str, str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Each entry with its id, and which id belongs to which look: what a random id cannot change."""
    shared = Counter(entry["guid"] for entry in entries)
    alike = Counter(map(look_of, entries))
    items, looks = [], {}
    for entry in entries:
        look = look_of(entry)
        key = known.get(look) if alike[look] == 1 else None
        if key is None:
            key = entry["guid"] or entry["link"] or digest([entry["title"], entry["summary"], entry["content"]])
            if entry["guid"] and shared[entry["guid"]] > 1:
                key = f"{entry['guid']} {entry['link'] or digest([entry['title'], entry['summary']])}"
        if alike[look] == 1:
            looks[look] = key
        items.append({"id": key, **entry})
    return items, looks


def look_of(entry: dict[str, Any]) -> str:
    """What shows that two entries are one: link, title and date; without a date the whole text."""
    return digest([entry["link"], entry["title"], entry["published"] or [entry["summary"], entry["content"]]])


def read_xml(answer: http.Response) -> list[dict[str, Any]]:
    """The entries of an RSS or Atom document. ValueError for anything else: a page is no empty feed."""
    try:
        import feedparser
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the rss trigger needs feedparser: pip install 'change-watcher[feeds]'") from error
    # It is not told the address: it would make every id an address below it, and another one when the feed moves.
    told = {"content-type": answer.headers.get("content-type", "")}
    feed = feedparser.parse(io.BytesIO(answer.body), response_headers=told)
    if not feed.entries and (not feed.get("version") or feed.bozo):
        start = " ".join(answer.text[:200].split())
        raise ValueError(f"{answer.url} is not a feed ({feed.get('bozo_exception', 'no RSS or Atom')}): {start!r}")
    return [
        {
            "guid": entry.get("id", ""),
            "link": urljoin(answer.url, entry["link"]) if entry.get("link") else "",
            "title": entry.get("title", ""),
            "published": instant(entry.get("published_parsed")),
            "updated": instant(entry.get("updated_parsed")),
            "summary": entry.get("summary", ""),
            "content": "".join(part.get("value", "") for part in entry.get("content", [])),
            "author": entry.get("author", ""),
            "tags": [tag.get("term") for tag in entry.get("tags", []) if tag.get("term")],
            "enclosures": [
                {"url": urljoin(answer.url, part.get("href", "")), "type": part.get("type", "")}
                for part in entry.get("enclosures", [])
            ],
        }
        for entry in feed.entries
    ]


def is_json(answer: http.Response) -> bool:
    return answer.body.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def read_json(feed: Any) -> list[dict[str, Any]]:
    """The entries of a JSON Feed (jsonfeed.org, versions 1 and 1.1)."""
    if "jsonfeed.org" not in str(feed.get("version")) or not isinstance(feed.get("items"), list):
        raise ValueError("this is JSON, but no JSON Feed: for other JSON there is the trigger http_json")
    return [
        {
            "guid": str(entry.get("id") or ""),
            "link": entry.get("url") or entry.get("external_url") or "",
            "title": entry.get("title") or "",
            "published": entry.get("date_published"),
            "updated": entry.get("date_modified"),
            "summary": entry.get("summary") or "",
            "content": entry.get("content_html") or entry.get("content_text") or "",
            "author": ", ".join(names(entry.get("authors") or [entry.get("author")])),
            "tags": entry.get("tags") or [],
            "enclosures": [
                {"url": part.get("url", ""), "type": part.get("mime_type", "")}
                for part in entry.get("attachments") or []
            ],
        }
        for entry in feed["items"]
    ]


def names(authors: Iterable[Any]) -> Iterable[str]:
    return (author["name"] for author in authors if isinstance(author, dict) and author.get("name"))


def instant(parsed: Any) -> str | None:
    """A date as RFC 3339 in UTC, or None where there is none or it makes no sense."""
    try:
        return datetime.fromtimestamp(timegm(parsed), UTC).isoformat() if parsed else None
    except (ValueError, OverflowError):
        return None


def digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()
