"""Object storage through the service beside obstore on the same storage directly: a large object, many small ones,
and Polars reading parquet. Each way through the service has the same goal, by itself.

python benchmarks/objects.py [--size MIB] [--small COUNT] [--rounds N] [--kind s3|folder]
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent))

import obstore
from floor import Once, Report, Took, interleave, took
from obstore.store import LocalStore, S3Store

from tests.support import windmill
from tests.support.servers import SeaweedFS

MIB = 1024 * 1024
BLOCK = bytes(range(256)) * (8 * MIB // 256)
AT_ONCE = 16
SPEED = 0.8
"""Of obstore's directly: what each way through the service is to reach."""

CONFIG = """
database = "sqlite:///{where}/watcher.db"
[server]
bind = "127.0.0.1:{port}"
[storage]
"""


class Place:
    """The service, the storage behind it, and both ways to it."""

    def __init__(self, here: windmill.Place, direct: Any, settings: dict[str, Any]) -> None:
        self.here = here
        self.direct = direct
        self.polars = settings
        self.url = urlsplit(here.service.url)
        options = settings["storage_options"]
        self.proxy = S3Store(
            settings["s3_bucket"],
            endpoint=options["aws_endpoint_url"],
            access_key_id=options["aws_access_key_id"],
            secret_access_key=options["aws_secret_access_key"],
            region=options["aws_region"],
            client_options={"allow_http": True, "timeout": "600s"},
        )

    @property
    def pid(self) -> int:
        assert self.here.service.process is not None
        return self.here.service.process.pid

    def peak(self) -> float:
        """MiB of the service that were in memory at most until now."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

    # --- Windmill's own endpoints, by a client that costs next to nothing ---

    def upload(self, size: int) -> None:
        wire = http.client.HTTPConnection(self.url.hostname or "", self.url.port, timeout=600)
        wire.putrequest("POST", "/api/w/main/job_helpers/upload_s3_file?file_key=bench/endpoint")
        for name, value in {"authorization": f"Bearer {self.here.token}", "content-length": str(size)}.items():
            wire.putheader(name, value)
        wire.endheaders()
        for block in blocks(size):
            wire.send(block)
        answer = wire.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
        wire.close()

    def download(self, size: int) -> None:
        wire = http.client.HTTPConnection(self.url.hostname or "", self.url.port, timeout=600)
        headers = {"authorization": f"Bearer {self.here.token}"}
        wire.request("GET", "/api/w/main/job_helpers/download_s3_file?file_key=bench/endpoint", headers=headers)
        answer = wire.getresponse()
        buffer, found = bytearray(MIB), 0
        while got := answer.readinto(buffer):
            found += got
        assert (answer.status, found) == (200, size)
        wire.close()


def blocks(size: int) -> Any:
    return (BLOCK[: min(len(BLOCK), size - at)] for at in range(0, size, len(BLOCK)))


async def stream(size: int) -> AsyncIterator[bytes]:
    for block in blocks(size):
        yield block


async def put(store: Any, key: str, size: int) -> None:
    await obstore.put_async(store, key, stream(size), chunk_size=8 * MIB, max_concurrency=4)


async def get(store: Any, key: str, size: int) -> None:
    found = 0
    async for chunk in (await obstore.get_async(store, key)).stream(min_chunk_size=MIB):
        found += len(chunk)
    assert found == size


async def many(store: Any, count: int, one: Callable[[Any, str], Any]) -> None:
    names = iter([f"bench/small/{number % 100:02}/{number:05}" for number in range(count)])

    async def some() -> None:
        for name in names:
            await one(store, name)

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))


async def put_small(store: Any, key: str) -> None:
    await obstore.put_async(store, key, BLOCK[:1024], use_multipart=False)


async def get_small(store: Any, key: str) -> None:
    assert len(await (await obstore.get_async(store, key)).bytes_async()) == 1024


async def listed(store: Any, count: int) -> None:
    found = 0
    async for page in obstore.list(store, "bench/small"):
        found += len(page)
    assert found == count


def timed(do: Callable[[], Any]) -> Once:
    async def once() -> Took:
        return await took(do)

    return once


async def compare(
    report: Report, title: str, kinds: Mapping[str, Callable[[], Any]], rounds: int, bytes: int = 0, warm: bool = True
) -> None:
    """Print all; the first is the floor. Where bytes are counted each of the others is to reach SPEED of it."""
    print(f"\n{title}", flush=True)
    for do in kinds.values() if warm else ():
        await do()  # what is connected and compiled once
    figures = await interleave({kind: timed(do) for kind, do in kinds.items()}, rounds)
    floor = next(iter(kinds))
    for kind, t in figures.items():
        speed = f"{bytes / MIB / t.wall:8.0f} MiB/s" if bytes else ""
        report.line(kind, f"{t.wall * 1e3:9.0f} ms  {figures[floor].wall / t.wall:5.2f} of the floor  {speed}")
    for kind, t in figures.items():
        if bytes and kind != floor:
            report.goal(f"  {kind}: times the floor ({SPEED} of its speed)", t.wall / figures[floor].wall, 1 / SPEED)


async def large(report: Report, place: Place, size: int, rounds: int) -> None:
    small = min(size, 128 * MIB)  # enough for all buffers to be full once: what comes then must not cost more
    for how in (place.upload, place.download):
        await asyncio.to_thread(how, small)
    await put(place.proxy, "bench/proxy", small)
    await get(place.proxy, "bench/proxy", small)
    before = place.peak()
    ups = {
        "obstore directly": partial(put, place.direct, "bench/direct", size),
        "obstore through the proxy": partial(put, place.proxy, "bench/proxy", size),
        "upload_s3_file": lambda: asyncio.to_thread(place.upload, size),
    }
    await compare(report, f"upload of {size // MIB} MiB", ups, rounds, size)
    downs = {
        "obstore directly": partial(get, place.direct, "bench/direct", size),
        "obstore through the proxy": partial(get, place.proxy, "bench/proxy", size),
        "download_s3_file": lambda: asyncio.to_thread(place.download, size),
    }
    await compare(report, f"download of {size // MIB} MiB", downs, rounds, size)
    report.goal("MiB of memory that all this took beyond the first 128 MiB", place.peak() - before, 48)
    for key in ("direct", "proxy", "endpoint"):
        await obstore.delete_async(place.direct, f"bench/{key}")


async def small(report: Report, place: Place, count: int, rounds: int) -> None:
    ways = {"obstore directly": place.direct, "obstore through the proxy": place.proxy}
    for title, one in (("written", put_small), ("read", get_small)):
        kinds = {kind: partial(many, store, count, one) for kind, store in ways.items()}
        await compare(report, f"{count:,} objects of 1 KiB {title}, {AT_ONCE} at once", kinds, rounds, warm=False)
    await compare(report, "listed", {kind: partial(listed, store, count) for kind, store in ways.items()}, rounds)


async def parquet(report: Report, place: Place, direct: tuple[str, dict[str, str]], rounds: int) -> None:
    import polars as pl

    rows = 4_000_000
    frame = pl.DataFrame({"n": range(rows), "t": [f"text {n % 100_000}" for n in range(rows)]})
    ways = {
        "directly": direct,
        "through the proxy": (f"s3://{place.polars['s3_bucket']}", place.polars["storage_options"]),
    }
    url, options = direct
    frame.write_parquet(f"{url}/bench/data.parquet", storage_options=options or None)

    def read(url: str, options: dict[str, str]) -> None:
        lazy = pl.scan_parquet(f"{url}/bench/data.parquet", storage_options=options or None)
        assert lazy.select(pl.col("n").sum(), pl.col("t").str.len_bytes().max()).collect().rows()[0][0] > 0

    kinds = {kind: partial(asyncio.to_thread, read, *way) for kind, way in ways.items()}
    await compare(report, f"Polars reads {rows:,} rows of parquet", kinds, rounds)


async def main(asked: argparse.Namespace) -> None:
    report = Report("Object storage through the service")
    server = SeaweedFS()
    with tempfile.TemporaryDirectory() as where:
        try:
            rules = 'permissions = [{pattern = "**/*", allow = "read,write,delete,list"}]\n'
            if asked.kind == "s3":
                await asyncio.to_thread(server.start)
                value = ", ".join(f"{name} = {json.dumps(each)}" for name, each in server.resource.items())
                table = f'kind = "s3"\nresource = "u/admin/lake"\n{rules}[resources."u/admin/lake"]\n'
                config = f'{CONFIG}{table}type = "s3"\nvalue = {{ {value} }}\n'
                keys = {"access_key_id": server.access_key, "secret_access_key": server.resource["secretKey"]}
                client = {"allow_http": True, "timeout": "600s"}
                direct: Any = S3Store(
                    server.bucket, endpoint=server.url, region="us-east-1", client_options=client, **keys
                )
                known = {"aws_endpoint_url": server.url, "aws_region": "us-east-1", "aws_allow_http": "true"}
                polars = (f"s3://{server.bucket}", known | {f"aws_{name}": value for name, value in keys.items()})
            else:
                folder = Path(where) / "objects"
                folder.mkdir()
                config, direct = f"{CONFIG}path = {json.dumps(str(folder))}\n{rules}", LocalStore(folder)
                polars = (str(folder), {})
            async with windmill.place(Path(where), config) as here:
                text = await here.api("POST", "job_helpers/v2/polars_connection_settings", {})
                place = Place(here, direct, json.loads(text))
                await large(report, place, asked.size * MIB, asked.rounds)
                await small(report, place, asked.small, 1)
                await parquet(report, place, polars, asked.rounds)
        finally:
            server.close()
    report.exit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="MiB of the large object")
    parser.add_argument("--small", type=int, default=10_000, help="how many small ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=["s3", "folder"], default="s3")
    asyncio.run(main(parser.parse_args()))
