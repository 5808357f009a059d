"""New Hacker News stories that mention a word, or have won enough points.

    [watchers.hacker_news]
    trigger = "hacker_news"
    every = "5m"
    flow = "summarise"
    with = { query = "sqlite", min_points = 20 }

It asks Algolia's index of Hacker News, newest first. A story counts as new when it first meets the conditions, so one
that takes hours to win its points is still found.
"""

from collections.abc import AsyncIterator
from typing import Any

from watcher import http, trigger


@trigger(key="objectID", loop=True)
async def main(
    query: str = "",
    tags: str = "story",
    min_points: int = 0,
    url: str = "https://hn.algolia.com/api/v1/search_by_date",
) -> AsyncIterator[list[dict[str, Any]]]:
    """List the newest matches.

    Args:
        query: words to look for in title, address and text; empty: everything.
        tags: "story", "comment", "ask_hn", "show_hn", "poll", "author_pg", "front_page"; all of those given.
        min_points: only from so many points on.
        url: the index.
    """
    conditions = {"query": query, "tags": tags, "hitsPerPage": 100}
    if min_points:
        conditions["numericFilters"] = f"points>={min_points}"
    pages = http.pages.numbered(
        url, page="page", first=0, last="nbPages", params=conditions, items="hits", key="objectID"
    )
    async for hits in pages:
        yield [shown(hit) for hit in hits]


def shown(hit: dict[str, Any]) -> dict[str, Any]:
    """What a flow is told: the hit without the marks that show where the words were found."""
    item = {name: value for name, value in hit.items() if not name.startswith("_")}
    return {**item, "discussion": f"https://news.ycombinator.com/item?id={hit['objectID']}"}
