"""The NATS client protocol as bytes, split anywhere."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uplinkd.engine.wire import DUPLICATE, Reader, ack_of

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


def read(pieces: list[bytes]) -> list[object]:
    reader = Reader()
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


def test_a_conversation_is_read_as_it_was_meant() -> None:
    """Acknowledgements, refusals, status headers, and bytes in a payload that look like the protocol."""
    assert read([STREAM]) == WANTED


@given(st.lists(st.integers(0, len(STREAM)), max_size=40))
def test_the_same_wherever_it_is_split(cuts: list[int]) -> None:
    """TCP has no records."""
    places = sorted({0, len(STREAM), *cuts})
    assert read([STREAM[start:end] for start, end in itertools.pairwise(places)]) == WANTED


@pytest.mark.parametrize("junk", [b"HTTP/1.1 400 Bad Request\r\n", b"\r\n", b"MSG a b c\r\n", b"x" * 70_000])
def test_what_is_not_nats_is_an_error(junk: bytes) -> None:
    """And not a wait for ever."""
    reader = Reader()
    reader.feed(junk)
    with pytest.raises(ValueError):
        reader.next()
