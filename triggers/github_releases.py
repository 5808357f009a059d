"""New releases of a GitHub repository, drafts only once they are published.

    [watchers.python_releases]
    trigger = "github_releases"
    every = "15m"
    flow = "announce"
    with = { repo = "python/cpython", token = "$var:u/admin/github_token" }

Without a token GitHub answers 60 requests an hour; an answer that nothing changed costs none of them.
"""

from collections.abc import AsyncIterator
from typing import Any

from watcher import http, trigger

FLICKERING = ("reactions", "mentions_count")  # they change without the release having changed


@trigger(key="id", loop=True)
async def main(
    repo: str, token: str | None = None, prereleases: bool = True, api: str = "https://api.github.com"
) -> AsyncIterator[list[dict[str, Any]]]:
    """List the releases, newest first. Add ``on = ["new", "changed"]`` to hear of edits.

    Args:
        repo: "owner/name".
        token: for private repositories, and for more requests.
        prereleases: also those.
        api: the API's address; of GitHub Enterprise "https://HOST/api/v3".
    """
    # A draft keeps the date of its making when it is published, so it can appear further down: pages are large.
    pages = http.pages.link(
        f"{api}/repos/{repo}/releases",
        params={"per_page": 100},
        headers={"accept": "application/vnd.github+json", "x-github-api-version": "2022-11-28"},
        auth=token,
        stop_if_unchanged=True,
    )
    async for page in pages:
        yield [
            shown(release) for release in page if not release["draft"] and (prereleases or not release["prerelease"])
        ]


def shown(release: dict[str, Any]) -> dict[str, Any]:
    """What a flow is told: the release without what changes by itself."""
    item = {name: value for name, value in release.items() if name not in FLICKERING}
    item["assets"] = [
        {name: value for name, value in asset.items() if name != "download_count"} for asset in item.get("assets", [])
    ]
    return item
