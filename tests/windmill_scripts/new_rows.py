import requests
import wmill


def main(url: str):
    """Everything with an id above the highest one of the last run."""
    last_id = wmill.get_state() or 0
    rows = requests.get(url).json()
    new_rows = [row for row in rows if row["id"] > last_id]
    if new_rows:
        wmill.set_state(max(row["id"] for row in new_rows))
    return new_rows
