"""Page by page through a listing, safe against a listing that moves meanwhile.

Each function is an async generator of pages (lists of items), for use in an ``async def main``; those in
`watcher.http.pages.sync` are the same for a plain ``def main``. A page is asked for only when the one before has
been taken, so a script that yields each page to the service stops where everything is known:

    @trigger(key="id")
    async def main(repo: str):
        async for page in http.pages.link(f"https://api.github.com/repos/{repo}/issues"):
            yield page
"""

from __future__ import annotations
