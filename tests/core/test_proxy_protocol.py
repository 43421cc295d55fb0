"""PROXY protocol: headers as proxies write them, in any pieces, and not a byte beyond them."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uplinkd.core.proxy_protocol import Header, begins_like_one, trusting

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")


def v2(source: str, *, more: bytes = b"", command: int = 0x21, family: int | None = None, size: int = -1) -> bytes:
    """As HAProxy writes it, `more` being what follows the addresses."""
    ip = ipaddress.ip_address(source)
    there = b"\x7f\x00\x00\x01" if ip.version == 4 else bytes(15) + b"\x01"
    body = ip.packed + there + struct.pack("!HH", 50000, 443) + more
    kind = {4: 0x11, 6: 0x21}[ip.version] if family is None else family
    return SIGNATURE + struct.pack("!BBH", command, kind, len(body) if size < 0 else size) + body


WHOLE = [
    (b"PROXY TCP4 192.0.2.7 192.0.2.1 51234 443\r\n", "192.0.2.7"),
    (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", "255.255.255.255"),
    (b"PROXY TCP6 2001:DB8::7 2001:db8::1 51234 443\r\n", "2001:db8::7"),
    (b"PROXY TCP6 " + 2 * b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff " + b"65535 65535\r\n", ":".join(8 * ["ffff"])),
    (b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:192.0.2.1 51234 443\r\n", "192.0.2.7"),
    (b"PROXY UNKNOWN\r\n", ""),
    (b"PROXY UNKNOWN " + 2 * b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff " + b"65535 65535\r\n", ""),
    (v2("192.0.2.7"), "192.0.2.7"),
    (v2("2001:db8::7"), "2001:db8::7"),
    (v2("::ffff:192.0.2.7"), "192.0.2.7"),
    (v2("192.0.2.7", family=0x12), "192.0.2.7"),
    (v2("192.0.2.7", more=b"\x01\x00\x02h2" + b"\x20\x00\x08" + bytes(8)), "192.0.2.7"),
    (v2("2001:db8::7", more=bytes(65535 - 36)), "2001:db8::7"),
    # LOCAL: by HAProxy's checks without and with addresses; and what has none to tell.
    (SIGNATURE + b"\x20\x00\x00\x00", ""),
    (v2("192.0.2.7", command=0x20), ""),
    (SIGNATURE + b"\x21\x00\x00\x00", ""),
    (SIGNATURE + b"\x21\x00\x00\x05hello", ""),
    (SIGNATURE + b"\x21\x31\x00\xd8" + bytes(216), ""),
    (v2("192.0.2.7", family=0x10), ""),
]

BROKEN = [
    b"\x16\x03\x01\x02\x00",  # a TLS hello
    b"POST /auth HTTP/1.1\r\n",
    b"\x10\x10\x00\x04MQTT",
    b"PROXY\r\n",
    b"proxy TCP4 192.0.2.7 192.0.2.1 51234 443\r\n",
    b"PROXY TCP4  192.0.2.7 192.0.2.1 51234 443\r\n",
    b"PROXY TCP4 192.0.2.7 192.0.2.1 51234\r\n",
    b"PROXY TCP4 192.0.2.7 192.0.2.1 51234 443 \r\n",
    b"PROXY TCP4 192.0.2.7 192.0.2.1 51234 443\n\r\n",
    b"PROXY TCP4 192.0.2.256 192.0.2.1 51234 443\r\n",
    b"PROXY TCP4 192.0.2.07 192.0.2.1 51234 443\r\n",
    b"PROXY TCP4 192.0.2.7 192.0.2 51234 443\r\n",
    b"PROXY TCP4 192.0.2.7 192.0.2.1 65536 443\r\n",
    b"PROXY TCP4 192.0.2.7 192.0.2.1 051 443\r\n",
    b"PROXY TCP4 2001:db8::7 2001:db8::1 51234 443\r\n",
    b"PROXY TCP6 192.0.2.7 192.0.2.1 51234 443\r\n",
    b"PROXY TCP6 fe80::1%lo ::1 51234 443\r\n",
    b"PROXY UDP4 192.0.2.7 192.0.2.1 51234 443\r\n",
    b"PROXY UNKNOWNS\r\n",
    b"PROXY UNKNOWN" + b" " * 200,
    b"PROXY " + b"x" * 99 + b"\r\r\n",
    SIGNATURE[:-1] + b"\x00",
    v2("192.0.2.7", command=0x11),
    v2("192.0.2.7", command=0x22),
    v2("192.0.2.7", family=0x41),
    v2("192.0.2.7", family=0x13),
    v2("192.0.2.7", size=11),
    v2("2001:db8::7", size=35),
    v2("192.0.2.7", family=0x21),
]


def read(stream: bytes, sizes: list[int]) -> tuple[Header, bytes]:
    """The header at the beginning of a stream that comes in pieces, and what is left of it."""
    header, arrived, sizes = Header(), 0, sizes or [len(stream)]
    taken = turn = 0
    while not header.whole and (arrived < len(stream) or taken < arrived):
        arrived = min(len(stream), arrived + sizes[turn % len(sizes)])
        turn += 1
        while taken < arrived and not header.whole:
            count = header.feed(stream[taken:arrived])
            assert 0 < count <= arrived - taken  # who peeks goes on, and never waits for what has come
            taken += count
    return header, stream[taken:]


@pytest.mark.parametrize(("raw", "source"), WHOLE)
def test_a_header_tells_the_address_and_leaves_what_follows(raw: bytes, source: str) -> None:
    """TLS begins with the byte behind it, also where that could be a part of the header."""
    for behind in (b"", b"\x16\x03\x01", b"\r\nPROXY ", SIGNATURE):
        header, left = read(raw + behind, [])
        assert (header.whole, header.source, left) == (True, source, behind)


@given(st.sampled_from(WHOLE), st.lists(st.integers(1, 120), min_size=1, max_size=40), st.binary(max_size=40))
def test_it_may_come_in_any_pieces(case: tuple[bytes, str], sizes: list[int], behind: bytes) -> None:
    """Byte by byte, or with what follows."""
    header, left = read(case[0] + behind, sizes)
    assert header.whole
    assert header.source == case[1]
    assert behind.endswith(left)
    assert len(left) <= len(behind)


@given(st.sampled_from(WHOLE), st.data())
def test_less_than_all_of_it_is_not_whole(case: tuple[bytes, str], data: st.DataObject) -> None:
    """And tells nobody."""
    cut = data.draw(st.integers(0, len(case[0]) - 1))
    header, left = read(case[0][:cut], [data.draw(st.integers(1, 60))])
    assert not header.whole
    assert not header.source
    assert not left


@pytest.mark.parametrize("raw", BROKEN)
@pytest.mark.parametrize("sizes", [[], [1], [7]], ids=["whole", "byte by byte", "in pieces"])
def test_what_is_no_header_is_refused(raw: bytes, sizes: list[int]) -> None:
    """With a reason for the operator."""
    with pytest.raises(ValueError, match=r".") as fault:
        read(raw, sizes)
    assert "\n" not in str(fault.value)


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=200).map(lambda rest: SIGNATURE + rest)))
def test_no_bytes_are_a_fault(raw: bytes) -> None:
    """Whatever comes, it is a header, a part of one, or refused; an address that is told is one."""
    header = Header()
    try:
        while raw and not header.whole:
            raw = raw[header.feed(raw) :]
    except ValueError:
        return
    if header.source:
        ipaddress.ip_address(header.source)


@given(st.ip_addresses(), st.binary(max_size=50))
def test_what_is_written_is_read(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, more: bytes) -> None:
    """Any address, in both versions."""
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    line = f"PROXY TCP{ip.version} {ip} {ip} 1 2\r\n".encode()
    for raw in (v2(str(ip), more=more), line):
        assert read(raw, [])[0].source == str(mapped or ip)


def test_only_the_named_addresses_are_trusted() -> None:
    """In each spelling that a socket shows, and in no other that only looks like one."""
    trusts = trusting(["10.0.0.0/8", "192.0.2.1", "fd00::/8"])
    assert all(map(trusts, ["10.1.2.3", "192.0.2.1", "::ffff:10.1.2.3", "fd00::1"]))
    assert not any(map(trusts, ["11.0.0.1", "192.0.2.2", "::ffff:11.0.0.1", "2002:a00:1::1", "64:ff9b::a00:1", "::1"]))
    assert not trusting([])("127.0.0.1")


def test_it_is_known_by_its_beginning() -> None:
    """For a hint to who has forgotten to name the proxy."""
    assert all(begins_like_one(raw) for raw, _ in WHOLE)
    assert not any(map(begins_like_one, [b"", b"POST /auth", b"PUT / HTTP/1.1", b"\x16\x03\x01"]))
