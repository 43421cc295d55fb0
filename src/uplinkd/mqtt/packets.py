"""MQTT as bytes: packets from a client, split anywhere, and the packets that answer them. Pure; no socket, no clock, no rights.

Sources: OASIS "MQTT Version 3.1.1" (the numbers in brackets are its normative statements) and IBM's "MQTT V3.1 Protocol
Specification", of which version 3.1 differs in the protocol's name alone as far as this subset goes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

__all__ = [
    "CONNECT",
    "PINGRESP",
    "Connect",
    "Disconnect",
    "Malformed",
    "Packet",
    "Parser",
    "Pingreq",
    "Puback",
    "Publish",
    "Subscribe",
    "Unsubscribe",
    "connack",
    "puback",
    "publish",
    "suback",
    "unsuback",
]

PINGRESP = b"\xd0\x00"
CONNECT = 0x10
"""The first byte of a CONNECT."""

_CONNECT, _PUBLISH, _PUBACK, _PUBREC, _PUBREL, _PUBCOMP = 1, 3, 4, 5, 6, 7
_SUBSCRIBE, _UNSUBSCRIBE, _PINGREQ, _DISCONNECT = 8, 10, 12, 14
_LEVELS = {"MQTT": 4, "MQIsdp": 3}
_USERNAME, _PASSWORD, _WILL_RETAIN, _WILL_QOS, _WILL, _CLEAN, _RESERVED = 0x80, 0x40, 0x20, 0x18, 0x04, 0x02, 0x01
_U16 = struct.Struct(">H")


class Malformed(Exception):  # noqa: N818 - names what the bytes are
    """The bytes are not MQTT as this door speaks it; the text says why. The connection ends [MQTT-4.8.0-1]."""


@dataclass(frozen=True, slots=True)
class Connect:
    """`level` is 4 for 3.1.1 and 3 for 3.1; of another one (`supported` False) nothing else was read. Seconds in `keep_alive`."""

    level: int
    supported: bool = True
    client_id: str = ""
    clean: bool = True
    keep_alive: int = 0
    will: bool = False
    username: str | None = None
    password: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Publish:
    """`packet_id` is 0 at QoS 0."""

    topic: str
    payload: bytes
    qos: int
    dup: bool
    retain: bool
    packet_id: int


@dataclass(frozen=True, slots=True)
class Puback:
    packet_id: int


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Topic filters with the QoS (0, 1 or 2) that is asked for."""

    packet_id: int
    filters: list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    packet_id: int
    filters: list[str]


@dataclass(frozen=True, slots=True)
class Pingreq:
    pass


@dataclass(frozen=True, slots=True)
class Disconnect:
    pass


Packet = Connect | Publish | Puback | Subscribe | Unsubscribe | Pingreq | Disconnect


class Parser:
    """Takes bytes, gives packets. `limit` bounds a packet's remaining length, in bytes; it may be raised between packets."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer: bytes | bytearray = b""
        self._start = 0  # of the next packet in the buffer
        self._wanted = 2  # bytes from there, with fewer there is nothing to look at

    @property
    def pending(self) -> bool:
        """Whether a packet has begun to arrive and is not complete."""
        return len(self._buffer) > self._start

    def feed(self, data: bytes) -> None:
        if not self._buffer:
            self._buffer = data
            return
        # What is taken apart piece by piece is not copied piece by piece.
        if isinstance(self._buffer, bytes):
            self._buffer = bytearray(self._buffer[self._start :])
        else:
            del self._buffer[: self._start]
        self._start = 0
        self._buffer += data

    def next(self) -> Packet | None:
        """The next packet, None until more bytes come; raise Malformed."""
        buffer, start = self._buffer, self._start
        size = len(buffer)
        if size - start < self._wanted:
            return None
        length = shift = 0
        position = start + 1
        while True:
            if position == size:
                return None
            byte = buffer[position]
            position += 1
            length |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 21:
                raise Malformed("the remaining length has more than four bytes")
        if length > self.limit:
            raise Malformed(f"a packet has {length} bytes; at most {self.limit} are allowed")
        end = position + length
        if end > size:
            self._wanted = end - start
            return None
        self._wanted = 2
        if end == size:
            self._buffer, self._start = b"", 0
        else:
            self._start = end
        return _packet(buffer[start], bytes(buffer[position:end]))


def connack(code: int, *, session_present: bool = False) -> bytes:
    return bytes((0x20, 2, session_present and code == 0, code))


def puback(packet_id: int) -> bytes:
    return b"\x40\x02" + _U16.pack(packet_id)


def suback(packet_id: int, codes: list[int]) -> bytes:
    """`codes`: the QoS granted to each filter, or 0x80."""
    return b"\x90" + _remaining(2 + len(codes)) + _U16.pack(packet_id) + bytes(codes)


def unsuback(packet_id: int) -> bytes:
    return b"\xb0\x02" + _U16.pack(packet_id)


def publish(topic: bytes, payload: bytes, *, packet_id: int = 0, dup: bool = False) -> bytes:
    """A message for a client: at QoS 1 where it has a `packet_id`, else at QoS 0. `topic` is UTF-8."""
    if packet_id:
        head = b"\x3a" if dup else b"\x32"
        length = 4 + len(topic) + len(payload)
        return b"".join((head, _remaining(length), _U16.pack(len(topic)), topic, _U16.pack(packet_id), payload))
    return b"".join((b"\x30", _remaining(2 + len(topic) + len(payload)), _U16.pack(len(topic)), topic, payload))


def _remaining(length: int) -> bytes:
    encoded = bytearray()
    while length >= 0x80:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes(encoded)


def _packet(first: int, body: bytes) -> Packet:
    kind, flags = first >> 4, first & 0x0F
    if kind == _PUBLISH:
        return _publish(flags, body)
    wanted = 2 if kind in (_SUBSCRIBE, _UNSUBSCRIBE, _PUBREL) else 0
    if flags != wanted:
        raise Malformed(f"a packet of type {kind} has the flags {flags:04b} [MQTT-2.2.2-2]")
    if kind == _PUBACK:
        return Puback(_only_packet_id(body))
    if kind in (_PINGREQ, _DISCONNECT):
        if body:
            raise Malformed(f"a packet of type {kind} has {len(body)} bytes where it has none")
        return Pingreq() if kind == _PINGREQ else Disconnect()
    if kind == _SUBSCRIBE:
        return _subscribe(body)
    if kind == _UNSUBSCRIBE:
        return _unsubscribe(body)
    if kind == _CONNECT:
        return _connect(body)
    if kind in (_PUBREC, _PUBREL, _PUBCOMP):
        raise Malformed(f"a packet of type {kind} belongs to QoS 2, which is not spoken")
    raise Malformed(f"a packet of type {kind} does not come from a client")


def _connect(body: bytes) -> Connect:
    name, position = _text(body, 0)
    if name not in _LEVELS:
        raise Malformed(f"the protocol's name is {name[:40]!r}; MQTT and MQIsdp are known")
    if position == len(body):
        raise Malformed("a CONNECT ends before its protocol level")
    level = body[position]
    if level != _LEVELS[name]:
        return Connect(level, supported=False)
    if position + 4 > len(body):
        raise Malformed("a CONNECT ends before its keep-alive")
    flags = body[position + 1]
    keep_alive = _U16.unpack_from(body, position + 2)[0]
    if flags & _RESERVED:
        raise Malformed("the reserved flag of a CONNECT is set [MQTT-3.1.2-3]")
    will = bool(flags & _WILL)
    if flags & _WILL_QOS == _WILL_QOS or (not will and flags & (_WILL_QOS | _WILL_RETAIN)):
        raise Malformed("the will flags of a CONNECT contradict each other [MQTT-3.1.2-11 to 15]")
    if flags & _PASSWORD and not flags & _USERNAME:
        raise Malformed("a CONNECT has a password and no user name [MQTT-3.1.2-22]")
    client_id, position = _text(body, position + 4)
    if will:
        _, position = _text(body, position)
        _, position = _octets(body, position)
    username: str | None = None
    password: bytes | None = None
    if flags & _USERNAME:
        username, position = _text(body, position)
    if flags & _PASSWORD:
        password, position = _octets(body, position)
    if position != len(body):
        raise Malformed(f"a CONNECT has {len(body) - position} bytes too many")
    return Connect(level, True, client_id, bool(flags & _CLEAN), keep_alive, will, username, password)


def _publish(flags: int, body: bytes) -> Publish:
    qos = flags >> 1 & 3
    dup = bool(flags & 8)
    if qos == 3:
        raise Malformed("a PUBLISH has QoS 3 [MQTT-3.3.1-4]")
    if dup and not qos:
        raise Malformed("a PUBLISH at QoS 0 has the flag DUP [MQTT-3.3.1-2]")
    topic, position = _text(body, 0)
    if not topic:
        raise Malformed("a PUBLISH has an empty topic [MQTT-4.7.3-1]")
    packet_id = 0
    if qos:
        packet_id = _packet_id(body, position)
        position += 2
    return Publish(topic, body[position:], qos, dup, bool(flags & 1), packet_id)


def _subscribe(body: bytes) -> Subscribe:
    packet_id = _packet_id(body, 0)
    position = 2
    filters = []
    while position < len(body):
        text, position = _text(body, position)
        if position == len(body):
            raise Malformed("a SUBSCRIBE ends before the QoS of a filter")
        qos = body[position]
        position += 1
        if qos > 2:
            raise Malformed(f"a SUBSCRIBE asks for QoS {qos} [MQTT-3.8.3-4]")
        filters.append((text, qos))
    if not filters:
        raise Malformed("a SUBSCRIBE has no filter [MQTT-3.8.3-3]")
    return Subscribe(packet_id, filters)


def _unsubscribe(body: bytes) -> Unsubscribe:
    packet_id = _packet_id(body, 0)
    position = 2
    filters = []
    while position < len(body):
        text, position = _text(body, position)
        filters.append(text)
    if not filters:
        raise Malformed("an UNSUBSCRIBE has no filter [MQTT-3.10.3-2]")
    return Unsubscribe(packet_id, filters)


def _packet_id(body: bytes, position: int) -> int:
    if position + 2 > len(body):
        raise Malformed("a packet ends before its packet identifier")
    packet_id: int = _U16.unpack_from(body, position)[0]
    if not packet_id:
        raise Malformed("a packet identifier is 0 [MQTT-2.3.1-1]")
    return packet_id


def _only_packet_id(body: bytes) -> int:
    if len(body) != 2:
        raise Malformed(f"a PUBACK has {len(body)} bytes; it has 2")
    return _packet_id(body, 0)


def _octets(body: bytes, position: int) -> tuple[bytes, int]:
    """(octets, position behind them) of a field that begins with its length."""
    start = position + 2
    if start > len(body):
        raise Malformed("a packet ends before the length of a field")
    end = start + _U16.unpack_from(body, position)[0]
    if end > len(body):
        raise Malformed("a packet ends within a field")
    return body[start:end], end


def _text(body: bytes, position: int) -> tuple[str, int]:
    octets, position = _octets(body, position)
    try:
        text = octets.decode()
    except UnicodeDecodeError:
        raise Malformed("a string is not UTF-8 [MQTT-1.5.3-1]") from None
    if "\0" in text:
        raise Malformed("a string holds the character U+0000 [MQTT-1.5.3-2]")
    return text, position
