"""Which addresses uplinkd may connect to on an owner's behalf: those of the internet, and of networks that the operator has named.

Whoever sets a webhook could otherwise have the server reach what only the server can: its own ports, the machines beside it, the
metadata service of its cloud (169.254.169.254).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

__all__ = ["Address", "Network", "literal", "may_reach", "networks_of"]

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# IANA's registries of special-purpose addresses, rather than `is_global`, whose idea of them differs between Pythons.
_NOT_PUBLIC: tuple[Network, ...] = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
        "2001::/23",  # with Teredo, which holds an IPv4 address that nobody has checked
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
    )
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_PART = re.compile(r"0[xX][0-9a-fA-F]*|\d+")


def networks_of(texts: Iterable[str]) -> tuple[Network, ...]:
    return tuple(ip_network(text) for text in texts)


def may_reach(address: Address, allowed: Iterable[Network], *, internet: bool = True) -> bool:
    """Whether `address` is of the internet (unless that does not count) or of an allowed network; an IPv6 address that stands for
    an IPv4 address is as good as that."""
    return any(
        (internet and _is_public(each)) or any(each in network for network in allowed) for each in _meanings(address)
    )


def literal(host: str) -> Address | None:
    """The address that `host` of a URL is: in any spelling that a resolver takes for one, such as 0x7f.1 or 2130706433."""
    host = host.removeprefix("[").removesuffix("]").removesuffix(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return IPv4Address("127.0.0.1")
    try:
        return ip_address(host)
    except ValueError:
        return _old_spelling(host.split("."))


def _meanings(address: Address) -> list[Address]:
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return [address, address.ipv4_mapped]
        if address.sixtofour:
            return [address, address.sixtofour]
        if address in _NAT64:
            return [address, IPv4Address(int(address) & 0xFFFF_FFFF)]
    return [address]


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return not any(address in network for network in _NOT_PUBLIC)


def _old_spelling(parts: list[str]) -> IPv4Address | None:
    """What inet_aton makes of one to four numbers, decimal, octal or hexadecimal; the last one fills what is left."""
    if len(parts) > 4 or not all(_PART.fullmatch(part) for part in parts):
        return None
    try:
        *firsts, last = (_number(part) for part in parts)
    except ValueError:
        return None
    if any(first > 255 for first in firsts) or last >= 256 ** (4 - len(firsts)):
        return None
    return IPv4Address(sum(first << 8 * (3 - index) for index, first in enumerate(firsts)) + last)


def _number(part: str) -> int:
    if part[:2] in ("0x", "0X"):
        return int(part[2:] or "0", 16)
    return int(part, 8 if part[0] == "0" else 10)
