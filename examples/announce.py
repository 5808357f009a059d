"""First step of the example's local flow: say what came in, in one readable line."""

from pathlib import Path


def main(item: dict) -> dict:
    """Print the item's line and leave it in ./shared, where the next step finds it. What is returned goes there too."""
    line = sentence(item)
    print(line)
    Path("shared/line.txt").write_text(line, encoding="utf-8")
    return item


def sentence(item: dict) -> str:
    """A commit, a file, or anything else, in words."""
    if "sha" in item:
        return f"commit {item['sha'][:10]} by {item['author']['name']}: {item['subject']}"
    if "size" in item and "path" in item:
        return f"file {item['path']}, {item['size']} bytes"
    title = item.get("title") or item.get("name") or item.get("id") or "something"
    link = item.get("url") or item.get("html_url") or item.get("link") or ""
    return f"{title} {link}".strip()
