"""New stars of a GitHub repository; whoever takes a star away and gives it again is no new one.

[watchers.stars]
trigger = "github_stars"
every = "10m"
flow = "thank"
with = { repo = "owner/name", token = "$var:u/admin/github_token" }
"""

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

from watcher import http, trigger

REACHABLE_PAGES = 400  # GitHub lists the first 40,000 stars and no more


@trigger(key="user.id", loop=True)
async def main(
    repo: str, token: str | None = None, api: str = "https://api.github.com"
) -> AsyncIterator[list[dict[str, Any]]]:
    """List who gave a star and when, newest first.

    Args:
        repo: "owner/name".
        token: for private repositories, and for more requests.
        api: the API's address; of GitHub Enterprise "https://HOST/api/v3".
    """

    async def page(number: int) -> Any:
        return await http.get(
            f"{api}/repos/{repo}/stargazers",
            params={"per_page": 100, "page": number},
            headers={"accept": "application/vnd.github.star+json", "x-github-api-version": "2022-11-28"},
            auth=token,
            fresh=number > 1,
        )

    first = await page(1)
    last = int(parse_qs(urlsplit(first.links.get("last", "")).query).get("page", ["1"])[0])
    if last >= REACHABLE_PAGES:
        raise RuntimeError(f"{repo} has more stars than GitHub lists: the newest cannot be seen this way")
    # GitHub lists the oldest first. Backwards, a star taken away meanwhile makes us see one twice and miss none.
    for number in range(last, 1, -1):
        yield list(reversed((await page(number)).json()))
    yield list(reversed(first.json()))
