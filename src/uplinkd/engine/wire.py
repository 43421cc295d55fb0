"""The NATS client protocol as bytes: the few operations that a publisher reads, parsed as they arrive, split anywhere."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

__all__ = ["ACK", "DUPLICATE", "Reader", "Received", "ack_of", "acks_from"]

ACK = re.compile(rb'MSG _INBOX\.[0-9a-f]+\.a\.(\d+) 1 \d+\r\n\{"stream":"[^"\\]*", ?"seq":(\d+)\}\r\n')
"""A whole acknowledgement of a stored message, the one thing that comes a thousand times as often as all else."""


def acks_from(stream: str, inbox: str) -> re.Pattern[bytes]:
    """The same, word for word as nats-server writes it, of one stream and with one connection's reply subjects: found in two thirds of
    the time."""
    subject = re.escape(inbox.encode())
    return re.compile(
        rb'MSG %b\.a\.(\d+) 1 \d+\r\n\{"stream":"%b","seq":(\d+)\}\r\n' % (subject, re.escape(stream.encode()))
    )


DUPLICATE = "duplicate"
"""In place of a reason: it was stored before, under this sequence."""

_LONGEST_LINE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Received:
    """One operation from the server: `name` is MSG, HMSG, INFO, PING, PONG, -ERR or +OK. `number` is what follows the last
    dot of a message's subject, when that is a number, else -1; `sid` its subscription."""

    name: str
    text: str = ""
    sid: int = 0
    number: int = -1
    header: bytes = b""
    payload: bytes = b""


class Reader:
    """Takes bytes, gives operations. `acks` gives the plain acknowledgements at the front of what it holds; `usual` is what they nearly
    always look like."""

    def __init__(self, usual: re.Pattern[bytes] = ACK) -> None:
        self._buffer = b""
        self._usual = usual

    def feed(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data

    def acks(self) -> list[tuple[bytes, bytes]]:
        """(number, sequence) of each acknowledgement until something else comes, in digits."""
        buffer = self._buffer
        if buffer.endswith(b"\r\n"):
            # Nearly always there is nothing else: that would have line ends of its own, around whatever it holds.
            every: list[tuple[bytes, bytes]] = self._usual.findall(buffer)
            if 2 * len(every) == buffer.count(b"\n"):
                self._buffer = b""
                return every
        found, position = [], 0
        while ack := ACK.match(buffer, position):
            position = ack.end()
            found.append((ack[1], ack[2]))
        self._buffer = buffer[position:]
        return found

    def next(self) -> Received | None:
        """The next operation, or None until more bytes come; ValueError when this is not NATS."""
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > _LONGEST_LINE:
                raise ValueError("a line without an end")
            return None
        line = self._buffer[:end]
        words = line.split()
        name = words[0].upper() if words else b""
        if name not in (b"MSG", b"HMSG"):
            if name not in (b"INFO", b"PING", b"PONG", b"-ERR", b"+OK"):
                raise ValueError(f"not the NATS protocol: {line[:40]!r}")
            self._buffer = self._buffer[end + 2 :]
            return Received(name.decode(), line[len(name) :].strip().decode(errors="replace"))
        start, total = end + 2, int(words[-1])
        if len(self._buffer) < start + total + 2:
            return None
        header_size = int(words[-2]) if name == b"HMSG" else 0
        body = self._buffer[start : start + total]
        self._buffer = self._buffer[start + total + 2 :]
        last = words[1].rpartition(b".")[2]
        number = int(last) if last.isdigit() else -1
        return Received(name.decode(), words[1].decode(), int(words[2]), number, body[:header_size], body[header_size:])


def ack_of(received: Received) -> tuple[int, str | None]:
    """(sequence, "") of an acknowledgement, (sequence, DUPLICATE) of one for what was stored before;
    (0, why not) of a refusal, (0, None) of what JetStream did not say."""
    if received.header:
        status = received.header.split(b"\r\n", 1)[0].removeprefix(b"NATS/1.0").strip().decode(errors="replace")
        if status.startswith("503"):
            return 0, "no stream takes this subject: JetStream is off, or the stream is gone"
        return 0, f"the engine answered {status}" if status else None
    try:
        answer = json.loads(received.payload)
        if error := answer.get("error"):
            return 0, f"the engine did not store it: {error.get('description', error)}"
        return (int(answer["seq"]), DUPLICATE if answer.get("duplicate") else "") if answer["stream"] else (0, None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0, None
