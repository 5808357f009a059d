"""What a state costs Windmill's own Python client on loopback: get_state and set_state, median and 95th percentile.

    python -m benchmarks.windmill [ROUNDS]

Goal: both under 5 ms at the median. get_state is one request, set_state two: the client asks what is there, then sends.
The floor is what the same HTTP client needs for as many requests of the same size to a handler of the same server that
does nothing.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support import windmill

CODE = """
import os, statistics, time
import httpx, wmill

state = {"last": 1, "ids": list(range(50))}
wmill.set_state(state)
floor = httpx.Client(base_url=os.environ["BASE_INTERNAL_URL"], headers=wmill.client._client.headers)

def two_that_do_nothing():
    floor.get("/healthz")
    floor.post("/healthz", json={"value": state})  # 405

calls = {"get_state": wmill.get_state, "floor of get_state": lambda: floor.get("/healthz"),
         "set_state": lambda: wmill.set_state(state), "floor of set_state": two_that_do_nothing}
times = {name: [] for name in calls}
for _ in range(ROUNDS):
    for name, call in calls.items():  # in turn, so that a noisy moment meets all of them
        began = time.perf_counter()
        call()
        times[name].append((time.perf_counter() - began) * 1000)
show({name: [statistics.median(each), sorted(each)[int(len(each) * 0.95)]] for name, each in times.items()})
"""


async def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as where:
        async with windmill.place(Path(where)) as here:
            env = await here.job()
            said = await windmill.python(windmill.NEWEST, CODE.replace("ROUNDS", str(rounds)), env, seconds=300)
            for name, (median, late) in said.value.items():
                print(f"{name:20} {median:6.2f} ms   95 %: {late:6.2f} ms")
            await here.let_go()


asyncio.run(main(int(sys.argv[1]) if sys.argv[1:] else 500))
