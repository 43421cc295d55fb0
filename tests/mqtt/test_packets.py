"""MQTT as bytes: literal packets in, split anywhere, and literal packets out; what is malformed is named by its rule."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.clients.packets import packet as whole
from tests.clients.packets import text
from uplinkd.mqtt import packets
from uplinkd.mqtt.packets import (
    Connect,
    Disconnect,
    Malformed,
    Packet,
    Parser,
    Pingreq,
    Puback,
    Publish,
    Subscribe,
    Unsubscribe,
)

LIMIT = 300_000


def parse(data: bytes, *, limit: int = LIMIT) -> list[Packet]:
    """All packets in `data`."""
    parser = Parser(limit)
    parser.feed(data)
    found = []
    while (packet := parser.next()) is not None:
        found.append(packet)
    return found


# CONNECT as the platform's C SDK sends it.
SDK_CONNECT = whole(
    0x10,
    text("MQTT")
    + b"\x04\xc2\x04\xb0"
    + text("pk.dn|securemode=2,signmethod=hmacsha1,timestamp=2524608000000|")
    + text("dn&pk")
    + text("fafd82a3d602b37fb0fa8b7892f24a477f851a14"),
)


def test_a_connect_of_the_sdk_is_read() -> None:
    """Every field."""
    (found,) = parse(SDK_CONNECT)
    assert found == Connect(
        level=4,
        client_id="pk.dn|securemode=2,signmethod=hmacsha1,timestamp=2524608000000|",
        clean=True,
        keep_alive=1200,
        username="dn&pk",
        password=b"fafd82a3d602b37fb0fa8b7892f24a477f851a14",
    )
    assert "fafd82" not in repr(found)


def test_mqtt_3_1_and_a_will_are_read() -> None:
    """The will's topic and message are passed over; the flag tells that there was one."""
    body = text("MQIsdp") + b"\x03\x2c\x00\x3c" + text("id") + text("will/topic") + text("gone")
    assert parse(whole(0x10, body)) == [Connect(3, client_id="id", clean=False, keep_alive=60, will=True)]


@pytest.mark.parametrize(("name", "level"), [("MQTT", 5), ("MQTT", 3), ("MQIsdp", 4), ("MQTT", 0)])
def test_of_another_version_nothing_else_is_read(name: str, level: int) -> None:
    """Its CONNECT may look otherwise."""
    assert parse(whole(0x10, text(name) + bytes([level]) + b"\xff\xff")) == [Connect(level, supported=False)]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (bytes.fromhex("300500016168690a")[:7], Publish("a", b"hi", 0, False, False, 0)),
        (bytes.fromhex("32070001610007 6869"), Publish("a", b"hi", 1, False, False, 7)),
        (bytes.fromhex("3b0500016100ff"), Publish("a", b"", 1, True, True, 255)),
        (bytes.fromhex("34050001610001"), Publish("a", b"", 2, False, False, 1)),
        (bytes.fromhex("40020102"), Puback(258)),
        (bytes.fromhex("8206000a00016101"), Subscribe(10, [("a", 1)])),
        (bytes.fromhex("820a000a000161000001 6202")[:12], Subscribe(10, [("a", 0), ("b", 2)])),
        (bytes.fromhex("a205000b000161"), Unsubscribe(11, ["a"])),
        (bytes.fromhex("c000"), Pingreq()),
        (bytes.fromhex("e000"), Disconnect()),
    ],
)
def test_each_packet_is_read(data: bytes, found: Packet) -> None:
    """From its literal bytes."""
    if data[0] == 0x82 and len(data) == 12:
        data = whole(0x82, b"\x00\x0a" + text("a") + b"\x00" + text("b") + b"\x02")
    assert parse(data) == [found]


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ("10 80 80 80 80 01", "more than four bytes"),
        ("30 81 a8 12", "at most 300000 are allowed"),
        ("00 00", "type 0 does not come from a client"),
        ("20 02 00 00", "type 2 does not come from a client"),
        ("f0 00", "type 15 does not come from a client"),
        ("90 03 00 01 00", "type 9 does not come from a client"),
        ("50 02 00 01", "belongs to QoS 2"),
        ("62 02 00 01", "belongs to QoS 2"),
        ("70 02 00 01", "belongs to QoS 2"),
        ("60 02 00 01", "has the flags 0000"),
        ("41 02 00 01", "has the flags 0001"),
        ("80 06 00 0a 00 01 61 01", "has the flags 0000"),
        ("c1 00", "has the flags 0001"),
        ("c0 01 00", "where it has none"),
        ("e0 01 00", "where it has none"),
        ("40 03 00 01 00", "has 3 bytes; it has 2"),
        ("40 02 00 00", "identifier is 0"),
        ("40 01 00", "has 1 bytes"),
        ("36 05 00 01 61 00 01", "QoS 3"),
        ("38 03 00 01 61", "DUP"),
        ("30 02 00 00", "empty topic"),
        ("30 01 00", "before the length of a field"),
        ("30 03 00 05 61", "ends within a field"),
        ("32 03 00 01 61", "before its packet identifier"),
        ("32 05 00 01 61 00 00", "identifier is 0"),
        ("30 03 00 01 ff", "not UTF-8"),
        ("30 05 00 03 ed a0 80", "not UTF-8"),
        ("30 03 00 01 00", "U.0000"),
        ("82 02 00 01", "has no filter"),
        ("82 05 00 01 00 01 61", "before the QoS"),
        ("82 06 00 01 00 01 61 03", "asks for QoS 3"),
        ("82 06 00 01 00 01 61 81", "asks for QoS 129"),
        ("82 06 00 00 00 01 61 01", "identifier is 0"),
        ("a2 02 00 01", "has no filter"),
        ("10 02 00 00", "the protocol's name is ''"),
        ("10 06 00 04 48 54 54 50", "the protocol's name is 'HTTP'"),
        ("10 06 00 04 4d 51 54 54", "before its protocol level"),
        ("10 08 00 04 4d 51 54 54 04 02", "before its keep-alive"),
        ("10 0c 00 04 4d 51 54 54 04 03 00 3c 00 00", "reserved flag"),
        ("10 0c 00 04 4d 51 54 54 04 1e 00 3c 00 00", "contradict"),
        ("10 0c 00 04 4d 51 54 54 04 22 00 3c 00 00", "contradict"),
        ("10 0c 00 04 4d 51 54 54 04 42 00 3c 00 00", "a password and no user name"),
        ("10 0d 00 04 4d 51 54 54 04 02 00 3c 00 00 00", "1 bytes too many"),
        ("10 0c 00 04 4d 51 54 54 04 82 00 3c 00 00", "before the length of a field"),
    ],
)
def test_what_is_malformed_is_named(data: str, rule: str) -> None:
    """The connection ends then; nothing of the packet is used."""
    with pytest.raises(Malformed, match=rule):
        parse(bytes.fromhex(data))


def test_what_is_not_complete_is_waited_for() -> None:
    """Byte by byte nothing comes until the last one; then the next packet may follow in the same bytes."""
    parser = Parser(LIMIT)
    for byte in SDK_CONNECT[:-1]:
        parser.feed(bytes([byte]))
        assert parser.next() is None
        assert parser.pending
    parser.feed(SDK_CONNECT[-1:] + b"\xc0")
    assert isinstance(parser.next(), Connect)
    assert parser.next() is None
    parser.feed(b"\x00")
    assert parser.next() == Pingreq()
    assert not parser.pending


def test_a_size_is_refused_before_its_bytes_have_come() -> None:
    """Nobody makes us keep what will be refused."""
    parser = Parser(1000)
    parser.feed(b"\x30\xe9\x07")
    with pytest.raises(Malformed, match="1001 bytes; at most 1000"):
        parser.next()


@pytest.mark.parametrize(
    ("made", "data"),
    [
        (packets.connack(0), "20020000"),
        (packets.connack(0, session_present=True), "20020100"),
        (packets.connack(5, session_present=True), "20020005"),
        (packets.puback(0xFFFF), "4002ffff"),
        (packets.suback(1, [0, 1, 0x80]), "90050001000180"),
        (packets.unsuback(2), "b0020002"),
        (packets.publish(b"a", b"hi"), "3005000161 6869"),
        (packets.publish(b"a", b"hi", packet_id=7), "320700016100076869"),
        (packets.publish(b"a", b"", packet_id=7, dup=True), "3a050001610007"),
        (packets.PINGRESP, "d000"),
    ],
)
def test_each_answer_is_written(made: bytes, data: str) -> None:
    """As its literal bytes."""
    assert made == bytes.fromhex(data)


@pytest.mark.parametrize("size", [0, 1, 121, 122, 123, 16_378, 16_379, 16_380, 262_144])
def test_lengths_are_written_as_they_are_read(size: int) -> None:
    """Around each border of the variable length; what is written for a client is a PUBLISH that reads the same."""
    payload = bytes(size)
    (found,) = parse(packets.publish(b"/a/b", payload, packet_id=9))
    assert found == Publish("/a/b", payload, 1, False, False, 9)


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
numbers = st.integers(1, 0xFFFF)
client_packets = st.one_of(
    st.builds(
        lambda topic, payload, qos, dup, retain, number: (
            whole(
                0x30 | (8 if dup and qos else 0) | qos << 1 | retain,
                text(topic) + (number.to_bytes(2) if qos else b"") + payload,
            ),
            Publish(topic, payload, qos, bool(dup and qos), retain, number if qos else 0),
        ),
        names,
        st.binary(max_size=300),
        st.integers(0, 2),
        st.booleans(),
        st.booleans(),
        numbers,
    ),
    st.builds(lambda number: (whole(0x40, number.to_bytes(2)), Puback(number)), numbers),
    st.builds(
        lambda number, filters: (
            whole(0x82, number.to_bytes(2) + b"".join(text(each) + bytes([qos]) for each, qos in filters)),
            Subscribe(number, filters),
        ),
        numbers,
        st.lists(st.tuples(names, st.integers(0, 2)), min_size=1, max_size=5),
    ),
    st.builds(
        lambda number, filters: (
            whole(0xA2, number.to_bytes(2) + b"".join(map(text, filters))),
            Unsubscribe(number, filters),
        ),
        numbers,
        st.lists(names, min_size=1, max_size=5),
    ),
    st.just((b"\xc0\x00", Pingreq())),
)


@settings(max_examples=200, deadline=None)
@given(stream=st.lists(client_packets, max_size=12), cuts=st.lists(st.integers(0, 2000), max_size=20))
def test_bytes_split_anywhere_give_the_same_packets(stream: list[tuple[bytes, Packet]], cuts: list[int]) -> None:
    """TCP keeps no borders."""
    data = b"".join(raw for raw, _ in stream)
    parser = Parser(LIMIT)
    found, start = [], 0
    for cut in sorted({min(cut, len(data)) for cut in cuts} | {len(data)}):
        parser.feed(data[start:cut])
        start = cut
        while (packet := parser.next()) is not None:
            found.append(packet)
    assert found == [packet for _, packet in stream]
    assert not parser.pending


@settings(max_examples=400, deadline=None)
@given(data=st.binary(max_size=400))
@example(SDK_CONNECT[:20] + b"\xff" + SDK_CONNECT[21:])
def test_whatever_comes_is_a_packet_or_malformed(data: bytes) -> None:
    """Nothing else is raised, and an end is always reached."""
    parser = Parser(1000)
    parser.feed(data)
    try:
        while parser.next() is not None:
            pass
    except Malformed as fault:
        assert str(fault)


@settings(max_examples=200, deadline=None)
@given(first=st.integers(0, 255), body=st.binary(max_size=120))
def test_whatever_a_packet_holds_is_read_or_malformed(first: int, body: bytes) -> None:
    """A right length around any bytes: the reading never goes beyond them."""
    try:
        found = parse(whole(first, body))
    except Malformed:
        return
    assert len(found) == 1
