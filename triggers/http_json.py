"""New things in any JSON API: where the list is, what identifies an item, how the pages go on.

    [watchers.orders]
    trigger = "http_json"
    every = "1m"
    flow = "ship"
    key = "number"                     # what identifies an item; default: "id"
    on = ["new", "changed"]
    with = { url = "https://shop.example.com/api/orders", items = "data.orders", token = "$var:u/admin/shop" }

An item without the key is known by its whole content. With ``cursor = "created_at"`` beside ``key`` only what lies
after the furthest point reached counts as new, and late records within ``lookback``.
"""

from collections.abc import AsyncIterator
from typing import Any, Literal

from watcher import http, trigger


@trigger(key="id", loop=True)
async def main(
    url: str,
    items: str | None = None,
    params: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
    token: str | None = None,
    user: str | None = None,
    password: str | None = None,
    json: Any = None,
    pages: Literal["none", "link", "number", "offset", "cursor"] = "none",
    page_param: str | None = None,
    first_page: int = 1,
    page_size: int = 100,
    size_param: str = "limit",
    next: str | None = None,
    max_pages: int = 100,
    same: str = "id",
) -> AsyncIterator[list[Any]]:
    """List the items, page by page.

    Args:
        url: what to ask.
        items: JMESPath to the list in the answer ("data.orders"); default: the answer is the list. An object with
            one item in it: "[@]".
        params: query parameters.
        headers: request headers.
        token: sent as "Authorization: Bearer …".
        user: with `password`, for Basic authentication.
        password: see `user`.
        json: ask by POST with this body: a search, or a GraphQL query as {"query": "…"}.
        pages: how the listing goes on. "link": by the Link header or the URL at `next`; "number": ?page=2;
            "offset": ?offset=100&limit=100; "cursor": the value at `next` as `page_param`.
        page_param: the parameter for the number, offset or cursor; default "page", "offset" or "cursor".
        first_page: for "number".
        page_size: for "offset".
        size_param: for "offset".
        next: JMESPath to the next URL or cursor.
        max_pages: read no further.
        same: the field that tells items apart while pages are compared.
    """
    auth = token if token else (user, password or "") if user else None
    asked: dict[str, Any] = {"params": params, "headers": headers, "auth": auth}
    paged = {**asked, "items": items, "max_pages": max_pages}
    if pages == "none":
        answer = await (http.get(url, **asked) if json is None else http.post(url, json=json, **asked))
        yield listed(answer, items)
        return
    if json is not None:
        raise ValueError("`json` asks once: leave out `pages`, or ask by GET")
    if pages == "link":
        found = http.pages.link(url, next=next, key=same, **paged)
    elif pages == "number":
        found = http.pages.numbered(url, page=page_param or "page", first=first_page, key=same, **paged)
    elif pages == "offset":
        names: dict[str, Any] = {"offset": page_param or "offset", "limit": size_param, "size": page_size}
        found = http.pages.offset(url, key=same, **names, **paged)
    else:
        if next is None:
            raise ValueError('pages = "cursor" needs `next`: the JMESPath of the next cursor in the answer')
        found = http.pages.cursor(url, param=page_param or "cursor", next=next, **paged)
    async for page in found:
        yield page


def listed(answer: http.Response, items: str | None) -> list[Any]:
    """The items of one answer. GraphQL reports errors with status 200, which must not look like an empty list."""
    value = answer.json()
    if isinstance(value, dict) and value.get("errors") and not value.get("data"):
        raise RuntimeError(f"the source answered with errors: {str(value['errors'])[:500]}")
    return http.pages.listed(answer, items)
