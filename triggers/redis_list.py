"""Elements of a Redis or Valkey list that is used as a queue: each is taken out, and none is lost when a run is killed.

    [watchers.jobs]
    trigger = "redis_list"
    every = "2s"
    flow = "work"
    with = { database = "$res:u/me/redis", list = "jobs" }

Elements are moved (LMOVE) to a list of this run's own, and thrown away by the run *after* the one whose items were
committed. What a killed run had moved is found again by the next one. The first run takes nothing, so that
``first_run`` cannot swallow what waits. Two watchers of one list share it if their ``name`` is different.

Needs redis-py: ``pip install 'change-watcher[redis]'``, and Redis 6.2 or Valkey.
"""

import base64
import json
from typing import Any, Literal

from watcher import get_state, redis, set_state

TAKE = """
local turn = tonumber(redis.call('GET', KEYS[2]) or '0')
if turn > tonumber(ARGV[1]) then return turn end
redis.call('SET', KEYS[2], ARGV[1])
if redis.call('LLEN', KEYS[3]) > 0 then
  redis.call('LTRIM', KEYS[3], ARGV[2], -1)
  while redis.call('LMOVE', KEYS[3], KEYS[4], 'LEFT', 'RIGHT') do end
end
for _ = redis.call('LLEN', KEYS[4]) + 1, tonumber(ARGV[3]) do
  if not redis.call('LMOVE', KEYS[1], KEYS[4], ARGV[4], 'RIGHT') then break end
end
return redis.call('LRANGE', KEYS[4], 0, ARGV[3] - 1)
"""
"""In one step: throw away what was committed, keep what is left of it, and take more. An older run is refused."""


def main(
    database: str | dict[str, Any],
    list: str,
    end: Literal["right", "left"] = "right",
    name: str = "watcher",
    parse: bool = False,
    limit: int = 1000,
) -> list[dict[str, Any]]:
    """Take what waits, the next one first.

    Args:
        database: a resource of type redis ("$res:u/me/redis"), its path, or a URL: redis://…, rediss://….
        list: its key.
        end: where to take from: "right" where it is filled by LPUSH, "left" where by RPUSH.
        name: part of the keys of what was taken: NAME_OF_LIST:NAME:NUMBER.
        parse: elements are JSON.
        limit: elements of one run.
    """
    client = redis.sync(database, decode_responses=False, socket_timeout=30, socket_connect_timeout=10)
    if type(client).__module__.startswith("upstash"):
        raise ValueError("Upstash's REST does not do it in one step: name its other URL, rediss://…, as `database`")
    prefix = f"{list}:{name}"
    state = get_state()
    if state is None or state["of"] != prefix:
        set_state({"of": prefix, "turn": int(client.get(f"{prefix}:turn") or 0), "count": 0})
        return []
    before, turn = state["turn"], state["turn"] + 1
    keys = [list, f"{prefix}:turn", f"{prefix}:{before}", f"{prefix}:{turn}"]
    taken = client.eval(TAKE, len(keys), *keys, turn, state["count"], limit, end.upper())
    if isinstance(taken, int):
        raise RuntimeError(
            f"another run has come to turn {taken} of the list {list}, and this one to {turn}: if the state was rolled "
            "back, `watcher state reset` takes what waits and goes on from there"
        )
    if taken:
        set_state({"of": prefix, "turn": turn, "count": len(taken)})
    return [{"id": f"{turn}-{n}", "list": list, "value": as_json(value, parse)} for n, value in enumerate(taken)]


def as_json(value: bytes, parse: bool) -> Any:
    """An element as text, or as the JSON that it is; one that is neither as {"base64": …}."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}
    try:
        return json.loads(text, parse_constant=str) if parse else text
    except ValueError:
        return text
