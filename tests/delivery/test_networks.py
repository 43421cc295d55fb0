"""What webhooks may reach."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uplinkd.core.errors import Rejected
from uplinkd.core.networks import literal, may_reach, networks_of
from uplinkd.core.webhooks import check_target

PUBLIC = ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::1"]
PRIVATE = [
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.255",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.168.1.1",
    "198.18.0.1",
    "203.0.113.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "2002:7f00:1::1",
    "2001:0:1:2::3",
    "2001:db8::1",
    "3fff::1",
    "fe80::1",
    "fe80::1%lo",
    "fc00::1",
    "fd12::1",
    "fec0::1",
    "ff02::1",
]
SPELLINGS = [
    "127.1",
    "0x7f.1",
    "0x7f000001",
    "2130706433",
    "017700000001",
    "0177.0.0.1",
    "127.0.0.1.",
    "[::ffff:7f00:1]",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_the_internet_may_be_reached(address: str) -> None:
    """Also by an IPv6 address that stands for an IPv4 one; but not without TLS."""
    assert may_reach(ip_address(address), [])
    assert not may_reach(ip_address(address), [], internet=False)


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_not_the_internet_may_not(address: str) -> None:
    """In whatever form; an operator's own list is another matter."""
    assert not may_reach(ip_address(address), [])
    assert not may_reach(ip_address(address), networks_of(["192.0.2.0/24", "2001:4860::/32"]))
    assert may_reach(ip_address(address), networks_of(["0.0.0.0/0", "::/0"]))


def test_a_named_network_may_be_reached_and_no_other() -> None:
    """Without TLS too, and by the addresses that stand for its own."""
    allowed = networks_of(["10.1.0.0/16"])
    for address in ("10.1.2.3", "::ffff:10.1.2.3"):
        assert may_reach(ip_address(address), allowed, internet=False)
    assert not may_reach(ip_address("10.2.0.1"), allowed)


@pytest.mark.parametrize("host", SPELLINGS)
def test_an_address_is_known_in_all_its_spellings(host: str) -> None:
    """A resolver takes each of them for 127.0.0.1."""
    assert not may_reach(literal(host) or ip_address("1.1.1.1"), [])
    with pytest.raises(Rejected, match="webhook_networks"):
        check_target(f"https://{host}/hook", [])


@given(st.text("0123456789abcdefxX.", max_size=20))
def test_a_host_is_read_as_the_system_reads_it(host: str) -> None:
    """What inet_aton takes for an address is that address here."""
    try:
        expected = ip_address(socket.inet_aton(host))
    except OSError:
        return
    assert literal(host) == expected


@pytest.mark.parametrize(
    ("url", "networks", "fault"),
    [
        ("https://backend.example.com/hook", [], ""),
        ("https://1.1.1.1/hook", [], ""),
        ("https://localhost/hook", [], "localhost is no address of the internet"),
        ("https://10.0.0.1/hook", [], "such as 10.0.0.1/32"),
        ("https://10.0.0.1/hook", ["10.0.0.0/8"], ""),
        ("http://10.0.0.1/hook", ["10.0.0.0/8"], ""),
        ("https://[fd00::1]/hook", [], "such as fd00::1/128"),
        ("http://1.1.1.1/hook", ["10.0.0.0/8"], "in clear"),
        ("http://backend.example.com/hook", [], "in clear"),
        ("http://backend.lan/hook", ["10.0.0.0/8"], ""),
        ("https://10.0.0.1/hook?token=secret", [], "no address of the internet"),
        ("https://[backend.example.com/hook?token=secret", [], "cannot be read"),
    ],
)
def test_a_url_that_can_never_be_reached_is_refused_at_once(url: str, networks: list[str], fault: str) -> None:
    """With the reason, and without its query; names are found out when they are looked up."""
    if not fault:
        check_target(url, networks)
        return
    with pytest.raises(Rejected, match=fault) as caught:
        check_target(url, networks)
    assert "secret" not in str(caught.value)
