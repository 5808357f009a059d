"""What a state costs Windmill's own Python client on loopback: get_state and set_state, median and 95th percentile.

python benchmarks/windmill.py [ROUNDS]
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support import windmill

CODE = """
import statistics, sys, time, wmill
def timed(work):
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1000)
    times.sort()
    return [round(statistics.median(times), 2), round(times[int(len(times) * 0.95)], 2)]
wmill.set_state({"last": 0})
import httpx, os
floor = httpx.Client(base_url=os.environ["BASE_INTERNAL_URL"])
show({"GET /healthz (floor)": timed(lambda: floor.get("/healthz")), "get_state": timed(wmill.get_state),
      "set_state": timed(lambda: wmill.set_state({"last": 1, "ids": list(range(50))}))})
"""


async def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as where:
        async with windmill.place(Path(where)) as here:
            env = await here.job()
            said = await windmill.python(windmill.NEWEST, CODE.replace("ROUNDS", str(rounds)), env, seconds=300)
            print(json.dumps(said.value, indent=2))
            await here.let_go()


asyncio.run(main(int(sys.argv[1]) if sys.argv[1:] else 500))
