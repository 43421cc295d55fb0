"""Asking the gateways to send a message down: what the command line and the management API say, and what is answered."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from uplinkd.core import topics
from uplinkd.core.errors import NotFound, Rejected, Unavailable
from uplinkd.core.subjects import SENDING, to_subject

__all__ = ["PATIENCE_SECONDS", "Ask", "check_down_topic", "send_down", "send_subject"]

PATIENCE_SECONDS = 10.0

Ask = Callable[[str, bytes], Awaitable[bytes]]
"""Asks a NATS subject, and gives the answer; it raises Unavailable when there is none within PATIENCE_SECONDS."""

_KINDS = {"rejected": Rejected, "not_found": NotFound, "unavailable": Unavailable}


def send_subject(topic: str) -> str:
    """Where a message for `topic` is asked to be sent."""
    return SENDING + to_subject(topic)


async def send_down(ask: Ask, topic: str, payload: bytes) -> dict[str, Any]:
    """`{"messageId": …, "way": …}`, or `{"sessions": n}` for a broadcast; raise Rejected, NotFound or Unavailable."""
    answer: dict[str, Any] = json.loads(await ask(send_subject(topic), payload))
    if "error" in answer:
        raise _KINDS[answer["kind"]](answer["error"])
    return answer


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
