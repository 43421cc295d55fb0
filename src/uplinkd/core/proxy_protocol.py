"""PROXY protocol, versions 1 and 2: what a proxy says, ahead of a connection's own bytes, about who has connected to it.

By HAProxy's description, https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt. Pure: bytes in, how many of them are the
header's out.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable, Iterable

from uplinkd.core.networks import Address, networks_of

__all__ = ["Header", "begins_like_one", "trusting"]

_V1, _V2 = b"PROXY ", b"\r\n\r\n\x00\r\nQUIT\n"
_V1_BYTES = 107
_V2_FIXED = 16
# So much of version 2 means something here: both addresses of IPv6 and their ports. What follows, for whatever purpose, is skipped.
_V2_BYTES = _V2_FIXED + 36
_LOCAL, _PROXY = 0x20, 0x21
_FAMILIES: dict[int, tuple[int, Callable[[bytes], Address]]] = {
    1: (12, ipaddress.IPv4Address),
    2: (36, ipaddress.IPv6Address),
}
_V1_LINE = re.compile(r"PROXY TCP([46]) ([0-9a-fA-F.:]+) ([0-9a-fA-F.:]+) (0|[1-9]\d{0,4}) (0|[1-9]\d{0,4})")


class Header:
    """One header, read as it comes. Once it is `whole`, `source` is the address that it tells, and empty where it tells none: the
    connection is then the proxy's own, such as a health check."""

    __slots__ = ("_held", "_size", "source", "whole")

    def __init__(self) -> None:
        self._held = b""
        self._size = 0
        self.source = ""
        self.whole = False

    def feed(self, data: bytes) -> int:
        """How many of the bytes that come next are the header's; the first one that is not, and all behind it, are left. Raise
        ValueError with the reason where they are no header."""
        assert not self.whole
        held = self._held + data
        if _V2.startswith(held[: len(_V2)]):
            return self._feed_v2(held, len(data))
        if _V1.startswith(held[: len(_V1)]):
            return self._feed_v1(held, len(data))
        raise ValueError(f"it begins with {held[:12]!r}")

    def _feed_v1(self, held: bytes, given: int) -> int:
        line, end, _ = held[:_V1_BYTES].partition(b"\r\n")
        if not end and len(held) >= _V1_BYTES:
            raise ValueError(f"its first line has no end within {_V1_BYTES} bytes")
        if not end:
            self._held = held
            return given
        self.source, self.whole = _told_v1(line), True
        return len(line) + len(end) - len(self._held)

    def _feed_v2(self, held: bytes, given: int) -> int:
        before, known = self._size, len(held) >= _V2_FIXED
        size = _V2_FIXED + int.from_bytes(held[14:16], "big") if known else _V2_FIXED
        taken = min(size - before, given)
        self._size = before + taken
        self._held = held[: min(self._size, _V2_BYTES)]
        if known and self._size == size:
            self.source, self.whole = _told_v2(self._held, size - _V2_FIXED), True
        return taken


def begins_like_one(data: bytes) -> bool:
    """Whether it may well be a header: for a hint, never for more."""
    return data.startswith((_V1, _V2))


def trusting(networks: Iterable[str]) -> Callable[[str], bool]:
    """Tells whether an address is in one of `networks`; an IPv4 address that a socket of IPv6 shows as ::ffff:… is one of IPv4."""
    trusted = networks_of(networks)

    @functools.lru_cache(4096)
    def trusts(address: str) -> bool:
        ip = _plain(ipaddress.ip_address(address))
        return any(ip in network for network in trusted)

    return trusts


def _plain(ip: Address) -> Address:
    return (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip


def _told_v1(line: bytes) -> str:
    text = line.decode("latin-1")
    if text == "PROXY UNKNOWN" or text.startswith("PROXY UNKNOWN "):
        return ""
    found = _V1_LINE.fullmatch(text)
    if not found or max(int(found[4]), int(found[5])) > 0xFFFF:
        raise ValueError(f"its first line is {text!r}")
    make = ipaddress.IPv4Address if found[1] == "4" else ipaddress.IPv6Address
    make(found[3])
    return str(_plain(make(found[2])))


def _told_v2(held: bytes, size: int) -> str:
    command, family, transport = held[12], held[13] >> 4, held[13] & 0xF
    if command not in (_LOCAL, _PROXY):
        raise ValueError(f"its version and command are 0x{command:02x}, and known are 0x20 and 0x21")
    if command == _LOCAL:
        return ""
    if family > 3 or transport > 2:
        raise ValueError(f"its address family and transport are 0x{held[13]:02x}, which is unknown")
    if family not in _FAMILIES or not transport:
        return ""
    least, make = _FAMILIES[family]
    if size < least:
        raise ValueError(f"it has {size} bytes of addresses, and this family has {least}")
    half = (least - 4) // 2
    return str(_plain(make(held[_V2_FIXED : _V2_FIXED + half])))
