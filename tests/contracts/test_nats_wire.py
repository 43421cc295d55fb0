"""The NATS client protocol as bytes, split anywhere."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uplinkd.engine.wire import ACK, DUPLICATE, Reader, ack_of, acks_from

STREAM = (
    b'INFO {"server_id":"x"}\r\nMSG _INBOX.ab.a.1 1 26\r\n{"stream":"UPLINKD","seq":7}\r\n'.replace(b"26", b"28")
    + b'MSG _INBOX.ab.a.2 1 28\r\n{"stream":"UPLINKD","seq":8}\r\n'
    b"PING\r\n"
    b"HMSG _INBOX.ab.a.3 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\n"
    b'MSG _INBOX.ab.a.4 1 45\r\n{"error":{"code":503,"description":"no room"}}\r\n'.replace(b" 45", b" 46")
    + b'MSG _INBOX.ab.a.5 1 45\r\n{"stream":"UPLINKD","seq":9,"duplicate":true}\r\n'
    b"MSG _INBOX.ab.a.6 1 4\r\n\r\n\r\n\r\n"
    b"-ERR 'Authorization Violation'\r\n"
    b'MSG _INBOX.ab.a.7 1 29\r\n{"stream":"UPLINKD","seq":10}\r\n'
)
WANTED = [
    ("INFO", '{"server_id":"x"}'),
    (1, 7, ""),
    (2, 8, ""),
    ("PING", ""),
    (3, 0, "no stream takes this subject: JetStream is off, or the stream is gone"),
    (4, 0, "the engine did not store it: no room"),
    (5, 9, DUPLICATE),
    (6, 0, None),
    ("-ERR", "'Authorization Violation'"),
    (7, 10, ""),
]


USUAL = [ACK, acks_from("UPLINKD", "_INBOX.ab"), acks_from("UPLINKD", "_INBOX.cd"), acks_from("ANOTHER", "_INBOX.ab")]


def read(pieces: list[bytes], usual: re.Pattern[bytes] = ACK) -> list[object]:
    reader = Reader(usual)
    found: list[object] = []
    for piece in pieces:
        reader.feed(piece)
        while True:
            found += [(int(number), int(sequence), "") for number, sequence in reader.acks()]
            received = reader.next()
            if received is None:
                break
            found.append(
                (received.number, *ack_of(received)) if "MSG" in received.name else (received.name, received.text)
            )
    return found


@pytest.mark.parametrize("usual", USUAL)
def test_a_conversation_is_read_as_it_was_meant(usual: re.Pattern[bytes]) -> None:
    """Acknowledgements, refusals, status headers, and bytes in a payload that look like the protocol."""
    assert read([STREAM], usual) == WANTED


@given(st.lists(st.integers(0, len(STREAM)), max_size=40), st.sampled_from(USUAL))
def test_the_same_wherever_it_is_split(cuts: list[int], usual: re.Pattern[bytes]) -> None:
    """TCP has no records; and what acknowledgements were thought to look like only makes them found sooner."""
    places = sorted({0, len(STREAM), *cuts})
    assert read([STREAM[start:end] for start, end in itertools.pairwise(places)], usual) == WANTED


def test_the_usual_acknowledgements_are_taken_together() -> None:
    """With a name that means something else to a pattern, too; in the bytes of another there is none."""
    acks = b"".join(b'MSG _INBOX.ab.a.%d 1 27\r\n{"stream":"UP.D+","seq":%d}\r\n' % (n, n + 7) for n in range(3))
    reader = Reader(acks_from("UP.D+", "_INBOX.ab"))
    reader.feed(acks)
    assert reader.acks() == [(b"0", b"7"), (b"1", b"8"), (b"2", b"9")]
    assert reader.next() is None
    assert acks_from("UP.D+", "_INBOX.ab").findall(acks.replace(b"UP.D+", b"UPxDD")) == []


@pytest.mark.parametrize("junk", [b"HTTP/1.1 400 Bad Request\r\n", b"\r\n", b"MSG a b c\r\n", b"x" * 70_000])
def test_what_is_not_nats_is_an_error(junk: bytes) -> None:
    """And not a wait for ever."""
    reader = Reader()
    reader.feed(junk)
    with pytest.raises(ValueError):
        reader.next()
