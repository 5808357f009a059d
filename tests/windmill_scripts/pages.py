import requests
import wmill

STATE = "f/shared/pages"


def main(url: str, size: int = 5):
    """An offset into a list that only grows, kept under a path of the script's own choice."""
    offset = wmill.get_state(STATE) or 0
    rows = requests.get(url).json()[offset : offset + size]
    wmill.set_state(offset + len(rows), STATE)
    return rows
