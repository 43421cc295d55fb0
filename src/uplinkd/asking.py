"""Asking the gateways to send a message down, and what goes on there: what the command line and the management API say, and what is
answered."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from uplinkd.core import topics
from uplinkd.core.errors import NotFound, Rejected, Unavailable
from uplinkd.core.subjects import SENDING, to_subject
from uplinkd.engine import Bus

__all__ = [
    "LIVE",
    "PATIENCE_SECONDS",
    "TRYING",
    "Ask",
    "Consumer",
    "HookState",
    "Live",
    "Trial",
    "answered",
    "check_down_topic",
    "live_now",
    "send_down",
    "send_subject",
    "try_hook",
]

log = logging.getLogger("uplinkd.asking")

PATIENCE_SECONDS = 10.0

Ask = Callable[[str, bytes], Awaitable[bytes]]
"""Asks a NATS subject, and gives the answer; it raises Unavailable when there is none within PATIENCE_SECONDS."""

LIVE = "uplinkd.groups.live"
"""Where every process that delivers to consumer groups answers what goes on there."""
_LIVE_SECONDS = 0.3
TRYING = "uplinkd.groups.try"
"""Where a process that delivers is asked to post a sample event to the webhook of the group that is named."""

_KINDS = {"rejected": Rejected, "not_found": NotFound, "unavailable": Unavailable}


def send_subject(topic: str) -> str:
    """Where a message for `topic` is asked to be sent."""
    return SENDING + to_subject(topic)


async def send_down(ask: Ask, topic: str, payload: bytes) -> dict[str, Any]:
    """`{"messageId": …, "way": …}`, or `{"sessions": n}` for a broadcast; raise Rejected, NotFound or Unavailable."""
    return _understood(await ask(send_subject(topic), payload))


async def answered(act: Awaitable[dict[str, Any]]) -> bytes:
    """What `act` gives, or why it fails, as an answer for whoever has asked over NATS: `{"error": …, "kind": …}` for a failure."""
    try:
        document = await act
    except NotFound as fault:
        document = {"error": str(fault), "kind": "not_found"}
    except Rejected as fault:
        document = {"error": str(fault), "kind": "rejected"}
    except Unavailable as fault:
        document = {"error": str(fault), "kind": "unavailable"}
    except Exception:
        log.exception("a fault of ours while doing what was asked for")
        document = {"error": "a fault of uplinkd; its log has the traceback", "kind": "unavailable"}
    return json.dumps(document).encode()


def _understood(answer: bytes) -> dict[str, Any]:
    """What `answered` has made; raise what it says."""
    document: dict[str, Any] = json.loads(answer)
    if "error" in document:
        raise _KINDS[document["kind"]](document["error"])
    return document


def check_down_topic(topic: str, product_key: str, device_name: str | None) -> None:
    """Return if `topic` is of that device, or (None) of a broadcast to the product: a slip of the hand would reach another.

    Raise Rejected with the rule.
    """
    try:
        topic.encode()
    except UnicodeEncodeError as error:
        raise Rejected(f"topic {topic!r} is not UTF-8") from error
    if any(char.isspace() or char in "*>+#" or not char.isprintable() for char in topic) or not topic.startswith("/"):
        raise Rejected(f"topic {topic!r}: it begins with a slash, and has no wildcard and no white space")
    if device_name is None:
        if topics.broadcast_product(topic) != product_key:
            raise Rejected(
                f"topic {topic!r}: to all devices of a product it is /broadcast/{product_key}/ and one level more"
            )
    elif topics.owner(topic) != (product_key, device_name):
        raise Rejected(
            f"topic {topic!r} is not of the device {device_name!r} of {product_key}: it is such as "
            f"/{product_key}/{device_name}/user/get"
        )


@dataclass(frozen=True, slots=True)
class Consumer:
    """A connection that takes messages of `group` over AMQP: of the application `app`, from `address`, since `since` (ms); `client` is
    what it calls itself. It holds `held` messages, and would take `credit` more."""

    group: str
    app: str
    client: str
    address: str
    since: int
    held: int
    credit: int


@dataclass(frozen=True, slots=True)
class HookState:
    """How the webhook of `group` fares: `open` while its target counts as dead (the circuit is open) and is tried at `next_try` alone.
    Times are ms, 0 before there was one; `accepted` messages and `failed` attempts since the process started."""

    group: str
    open: bool
    accepted: int
    failed: int
    last_success: int
    last_failure: int
    fault: str
    next_try: int


@dataclass(frozen=True, slots=True)
class Live:
    """What goes on in the processes that deliver, all together."""

    consumers: list[Consumer] = field(default_factory=list)
    hooks: list[HookState] = field(default_factory=list)

    def document(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of a sample event: the HTTP `status` (0 without an answer), what was wrong or empty, how the answer's text begins,
    and how many seconds it took."""

    status: int
    fault: str
    text: str
    seconds: float

    def document(self) -> dict[str, Any]:
        return asdict(self)


async def try_hook(bus: Bus, name: str, *, patience: float) -> Trial:
    """Have a sample event posted to the webhook of the group `name`, which may take `patience` seconds; raise Unavailable, NotFound
    or Rejected."""
    try:
        told = await bus.ask(TRYING, name.encode(), patience=patience + _LIVE_SECONDS)
    except Unavailable as fault:
        raise Unavailable(f"nobody posts: {fault}; start a server with `uplinkd serve`") from fault
    return Trial(**_understood(told.payload))


async def live_now(bus: Bus) -> Live:
    """What every process tells that answers within a moment; raise Unavailable when the engine is away."""
    live = Live()
    for told in await bus.ask_each(LIVE, patience=_LIVE_SECONDS):
        answer = json.loads(told.payload)
        live.consumers.extend(Consumer(**each) for each in answer["consumers"])
        live.hooks.extend(HookState(**each) for each in answer["hooks"])
    return live
