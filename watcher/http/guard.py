"""Which addresses are nobody's business: the deny list against requests forged through a URL (SSRF)."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

# IANA's special-purpose registries, and the metadata address of one cloud. `ipaddress.is_global` lets a third of
# these pass.
# fmt: off
_DENIED = tuple(ip_network(network) for network in (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32",
    "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
    "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
))
# fmt: on
_LOWEST_FREE_PORT = 1024


class Denied(Exception):
    """This address or port may not be reached."""


def check(host: str, address: str, port: int) -> None:
    """Raise Denied unless the address is public and the port is one that web servers use.

    ``host`` is the name as it was asked for, ``address`` what is about to be connected to.
    """
    network = denied_by(address)
    if network:
        raise Denied(f"{host} is at a private address ({address}, in {network})")
    if port not in (80, 443) and port < _LOWEST_FREE_PORT:
        raise Denied(f"port {port} of {host} is not one that web servers use")


def denied_by(address: str) -> IPv4Network | IPv6Network | None:
    """The network that forbids this address, or None. What is no address at all is forbidden too."""
    try:
        ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    except ValueError:
        return _DENIED[0]
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    return next((network for network in _DENIED if ip.version == network.version and ip in network), None)
