"""What `watcher init` writes: a watcher that does something visible at once, offline."""

from __future__ import annotations

_CONFIG = """\
#:schema ./watcher.schema.json
# Every option is explained in docs/config.md. `watcher check` validates this file, `watcher serve` starts the service.

[server]                               # health, metrics, and the way into local flows
bind = "127.0.0.1:8321"

[flows.announce]                       # a local flow: steps that run here, one after another
steps = ["announce.py"]

# [flows.notify]                       # any URL: one POST per new item
# url = "https://hooks.example.com/notify"
# secret = "$env:NOTIFY_SECRET"        # signs each request (Standard Webhooks)

[watchers.inbox]                       # each file that is put into the folder "inbox" starts one flow run
trigger = "directory"                  # a built-in, or "./my_trigger.py"
every = "2s"
flow = "announce"
first_run = "all"
with = { path = "inbox", settle = 1 }

# [watchers.hacker_news]
# trigger = "hacker_news"
# every = "5m"
# flow = "notify"
# with = { query = "sqlite" }
"""

_STEP = '''\
"""Say what came in, and write it down."""

import json


def main(item: dict) -> dict:
    print(f"new: {item.get('path', item)}")
    with open("shared/item.json", "w") as file:  # ./shared is this run's own; the next step may read it
        json.dump(item, file)
    return {"announced": item}
'''

_WELCOME = "Put files beside this one: each starts one flow run. `watcher items` lists them.\n"

_IGNORE = "watcher.db*\nwatcher-data/\n"


def files() -> dict[str, str]:
    """Relative path → text."""
    return {
        "watcher.toml": _CONFIG,
        "announce.py": _STEP,
        "inbox/welcome.txt": _WELCOME,
        ".gitignore": _IGNORE,
    }
