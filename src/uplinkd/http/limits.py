"""How much a connection may ask of us, in bytes, counts and seconds."""

from __future__ import annotations

from dataclasses import dataclass

from uplinkd.gateway import MAX_PAYLOAD_BYTES
from uplinkd.settings import Settings

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings that a connection obeys, and the constants beside them."""

    head_timeout: float
    body_timeout: float
    idle_timeout: float
    connections: int

    head_bytes: int = 8 * 1024
    headers: int = 64
    body_bytes: int = MAX_PAYLOAD_BYTES
    # A peer that does not take its answers is dropped after this time.
    write_timeout: float = 30.0
    # After a fault the peer may still be sending: read and discard that long, or a reset would destroy our answer.
    linger: float = 1.0
    # Bytes of further requests that are held while one is being answered; then the socket is not read.
    held_bytes: int = 64 * 1024

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        return cls(
            head_timeout=settings.head_timeout,
            body_timeout=settings.body_timeout,
            idle_timeout=settings.idle_timeout,
            connections=settings.max_connections,
        )
