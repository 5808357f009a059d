"""The address guard: whatever a URL says, nothing private is connected to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support import site as site_module
from tests.support.site import Site
from watcher.errors import DeliveryError, TriggerError
from watcher.http import Fetcher, Sender, guard, wire
from watcher.values import HttpSettings, Request

# fmt: off
PRIVATE = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.127.255.254", "127.0.0.1",
    "127.255.255.254", "169.254.169.254", "169.254.0.1", "172.16.0.1", "172.31.255.254", "192.0.0.1", "192.0.0.192",
    "192.0.2.1", "192.88.99.1", "192.168.0.1", "192.168.255.254", "198.18.0.1", "198.19.255.254", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1",
    "64:ff9b:1::1", "100::1", "2001::1", "2001:1ff::1", "2001:db8::1", "2002:7f00:1::", "3fff::1", "5f00::1",
    "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1",
]
# fmt: on
PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.215.14", "2606:4700:4700::1111", "2a00:1450:4001:830::200e"]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The addresses that passed the guard. None of them is connected to."""
    passed: list[tuple[Any, ...]] = []
    real = wire._checked_socket

    def recording(info: Any) -> socket.socket:
        real(info).close()
        passed.append(info[4])
        raise ConnectionRefusedError("recorded, not connected")

    monkeypatch.setattr(wire, "_checked_socket", recording)
    return passed


def answering(*rounds: list[str]) -> Callable[..., list[Any]]:
    """A name server: a round of addresses for each look-up, the last one repeats."""
    left = list(rounds)

    def look_up(host: str, port: int, *_: Any) -> list[Any]:
        addresses = left.pop(0) if len(left) > 1 else left[0]
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (a, port, 0, 0))
            if ":" in a
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port))
            for a in addresses
        ]

    return look_up


async def refusal(url: str, look_up: Callable[..., list[Any]] = socket.getaddrinfo) -> str:
    """The kind of DeliveryError that a guarded delivery ends with."""
    sender = Sender(look_up=look_up)
    try:
        with pytest.raises(DeliveryError) as caught:
            await sender.send(Request("POST", url), timeout=timedelta(seconds=5), private_addresses=False)
        return caught.value.kind
    finally:
        await sender.close()


def test_there_are_47() -> None:
    assert len(set(PRIVATE)) == 47


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("address", PRIVATE)
async def test_a_private_address_is_refused_as_itself_and_behind_a_name(
    scheme: str, address: str, tried: list[Any]
) -> None:
    host = f"[{address}]" if ":" in address else address
    assert await refusal(f"{scheme}://{host}/") == "guard"
    assert await refusal(f"{scheme}://name.example/", answering([address])) == "guard"
    assert tried == []


@pytest.mark.parametrize("address", PUBLIC)
async def test_a_public_address_is_connected_to(address: str, tried: list[Any]) -> None:
    host = f"[{address}]" if ":" in address else address
    assert await refusal(f"https://{host}/") == "refused"
    assert await refusal("https://name.example/", answering([address])) == "refused"
    assert [sockaddr[:2] for sockaddr in tried] == [(address, 443)] * 2


async def test_one_private_address_among_public_ones_condemns_the_name(tried: list[Any]) -> None:
    assert await refusal("https://name.example/", answering(["8.8.8.8", "10.0.0.1"])) == "guard"
    assert tried == []


async def test_a_name_that_changes_between_check_and_connection(tried: list[Any]) -> None:
    """Rebinding: what was checked is what is connected to, after one look-up."""
    look_ups = 0

    def counting(host: str, port: int, *rest: Any) -> list[Any]:
        nonlocal look_ups
        look_ups += 1
        return answering(["8.8.8.8"] if look_ups == 1 else ["127.0.0.1"])(host, port)

    assert await refusal("https://name.example/", counting) == "refused"
    assert look_ups == 1
    assert [sockaddr[0] for sockaddr in tried] == ["8.8.8.8"]


SPELLINGS = [
    "http://2130706433:{port}/", "http://0x7f000001:{port}/", "http://0177.0.0.1:{port}/", "http://127.1:{port}/",
    "http://0:{port}/", "http://[::ffff:7f00:1]:{port}/", "http://①②⑦.⓪.⓪.①:{port}/", "http://127.0.0.1.:{port}/",
    "http://public.example@127.0.0.1:{port}/", "http://public.example\\@127.0.0.1:{port}/",
    "http://127.0.0.1%00.public.example:{port}/", "http://[::1%25lo]:{port}/",
]  # fmt: skip


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site() as site:
        site.on("/", site_module.json({}))
        yield site


@pytest.fixture
async def sender() -> AsyncIterator[Sender]:
    sender = Sender()
    yield sender
    await sender.close()


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_no_spelling_of_this_machine_reaches_it(spelling: str, site: Site) -> None:
    url = spelling.format(port=site.port)
    assert await refusal(url) in ("guard", "dns", "invalid")
    fetcher = Fetcher(HttpSettings(private_addresses=False), lambda: datetime.now(UTC))
    with pytest.raises(TriggerError):
        await fetcher.fetch(Request("GET", url))
    await fetcher.close()
    assert site.connections == 0


async def test_some_of_the_spellings_do_reach_it_when_nobody_guards(site: Site, sender: Sender) -> None:
    """Else the test above would prove nothing. The others are refused by the library, whose guard is welcome too."""
    reached = []
    for spelling in SPELLINGS:
        try:
            await sender.send(Request("POST", spelling.format(port=site.port)), timeout=timedelta(seconds=5))
            reached.append(spelling)
        except DeliveryError:
            pass
    assert SPELLINGS[8] in reached
    assert len(site.asked) == len(reached) >= 2


@pytest.mark.parametrize("port", [22, 25, 6379 - 6000, 1023])
async def test_a_port_of_another_service_is_refused(port: int, tried: list[Any]) -> None:
    assert await refusal(f"http://8.8.8.8:{port}/") == "guard"
    assert tried == []


async def test_a_redirect_to_the_metadata_service(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = guard.denied_by("127.0.0.1")
    monkeypatch.setattr(guard, "_DENIED", tuple(n for n in guard._DENIED if n != loopback))
    site.on("/out", site_module.redirect("http://169.254.169.254/latest/meta-data/"))
    fetcher = Fetcher(HttpSettings(private_addresses=False), lambda: datetime.now(UTC))
    with pytest.raises(TriggerError, match=r"private address \(169.254.169.254, in 169.254.0.0/16\)"):
        await fetcher.fetch(Request("GET", site.url + "/out"))
    await fetcher.close()
    assert len(site.asked) == 1


async def test_a_connection_made_without_the_guard_is_not_lent_to_a_guarded_request(site: Site, sender: Sender) -> None:
    assert (await sender.send(Request("POST", site.url + "/"), timeout=timedelta(seconds=5))).status == 200
    with pytest.raises(DeliveryError, match="private address"):
        await sender.send(Request("POST", site.url + "/"), timeout=timedelta(seconds=5), private_addresses=False)


async def test_a_proxy_from_the_environment_is_used_only_when_asked_for(
    site: Site, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Site() as proxy:
        proxy.on("/", site_module.json("proxy"))
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        request, limit = Request("POST", site.url + "/"), timedelta(seconds=5)
        assert (await sender.send(request, timeout=limit)).body == b"{}"
        assert proxy.asked == []
        assert (await sender.send(request, timeout=limit, trust_env=True)).body == b'"proxy"'
        assert proxy.asked[0].target == site.url + "/"
        with pytest.raises(DeliveryError, match="set trust_env = false") as caught:
            await sender.send(request, timeout=limit, trust_env=True, private_addresses=False)
        assert caught.value.kind == "guard"


async def test_a_name_server_that_hangs_holds_up_nobody_else(site: Site) -> None:
    import threading

    free = threading.Event()

    def look_up(host: str, port: int, *rest: Any) -> list[Any]:
        if host == "hangs.example":
            free.wait(30)
        return answering(["127.0.0.1"])(host, port)

    sender = Sender(look_up=look_up)
    slow = [
        asyncio.create_task(sender.send(Request("POST", "http://hangs.example/"), timeout=timedelta(seconds=20)))
        for _ in range(40)
    ]
    await asyncio.sleep(0)
    quick = await sender.send(Request("POST", f"http://quick.example:{site.port}/"), timeout=timedelta(seconds=5))
    assert quick.status == 200
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    free.set()
    await sender.close()
