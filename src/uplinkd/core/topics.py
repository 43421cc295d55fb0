"""Which topics there are and who may publish to them: no device ever publishes outside its own topics.

Sources: the platform's pages "Topics", "TSL topics" and "Shadow"; the system topics that its SDKs publish to.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from uplinkd.core.errors import Code, Refused
from uplinkd.core.model import Device, Right, TopicClass
from uplinkd.core.names import MAX_TOPIC_BYTES, MAX_TOPIC_SLASHES
from uplinkd.core.subjects import to_subject

__all__ = ["Topic", "explain", "may_publish", "owner", "parse"]

_PLAIN = re.compile(rb"(?:/[A-Za-z0-9_@:.-]+)+")
_BAD_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_WILDCARDS = frozenset("+#*>")

# What follows /sys/PK/DN/ in topics that a device publishes to; + is one level.
_SYS_UPLINKS = (
    "thing/event/+/post",
    "thing/event/property/+/post",  # batch, pack, history
    "thing/deviceinfo/+",  # update, delete, get
    "thing/model/up_raw",
    "thing/model/down_raw_reply",
    "thing/config/get",
    "thing/config/push_reply",
    "thing/config/log/get",
    "thing/property/desired/+",  # get, delete
    "thing/service/+_reply",
    "thing/service/+/+_reply",
    "thing/dsltemplate/get",
    "thing/ota/firmware/get",
    "thing/log/post",
    "thing/file/upload/mqtt/+",
    "thing/list/found",
    "thing/sub/+",
    "thing/sub/+/+",
    "thing/topo/+",
    "thing/topo/+/+_reply",
    "rrpc/response/+",
)
_SYS_UPLINK = re.compile("|".join(re.escape(pattern).replace(r"\+", "[^/]+") for pattern in _SYS_UPLINKS))
_SYS_DOWNLINK = re.compile(r".*_reply|thing/service/.*|thing/model/down_raw|thing/config/push")
_SYS_REPLY_OF_DEVICE = re.compile(
    r"thing/service/.+_reply|thing/model/down_raw_reply|thing/config/push_reply|thing/topo/.+/.+_reply"
)
_OTA_UPLINKS = frozenset({"inform", "progress", "request"})


@dataclass(frozen=True, slots=True)
class Topic:
    """A well-formed topic, whose it is, and under which NATS subject it is stored.

    `levels` is what follows `/${productKey}/${deviceName}/` in a custom topic. `system` is set for the platform's own
    topics, of which `uplink` says whether a device publishes to them.
    """

    text: str
    subject: bytes
    product_key: str
    device_name: str
    levels: str
    system: bool
    uplink: bool


def parse(path: bytes) -> Topic:
    """The topic that a request's path names after `/topic`, percent-decoded once; raise Refused 10001 with the rule."""
    if not _PLAIN.fullmatch(path):
        _refuse_malformed(path)
    text = unquote_to_bytes(path).decode()
    if len(text.encode()) > MAX_TOPIC_BYTES:
        raise _malformed(text, f"it has {len(text.encode())} bytes; at most {MAX_TOPIC_BYTES} are allowed")
    product_key, device_name, levels, system, uplink = _layout(text)
    if not system and text.count("/") > MAX_TOPIC_SLASHES:
        raise _malformed(text, f"it has {text.count('/')} slashes; at most {MAX_TOPIC_SLASHES} are allowed")
    return Topic(text, to_subject(text).encode(), product_key, device_name, levels, system, uplink)


def owner(topic: str) -> tuple[str, str]:
    """(productKey, deviceName) of a topic that was stored; empty where the topic has none."""
    product_key, device_name, *_ = _layout(topic)
    return product_key, device_name


def may_publish(topic: Topic, device: Device, publish_levels: Collection[str]) -> bool:
    """Whether `device`, whose product's publish classes have `publish_levels`, may publish to `topic`."""
    return (
        topic.product_key == device.product_key
        and topic.device_name == device.name
        and (topic.uplink if topic.system else topic.levels in publish_levels)
    )


def explain(topic: Topic, device: Device, classes: Collection[TopicClass]) -> str:
    """Why `may_publish` said no, with the classes that would have matched."""
    if (topic.product_key, topic.device_name) != (device.product_key, device.name):
        return (
            f"the topic belongs to device {topic.device_name!r} of product {topic.product_key!r}; "
            f"the token is of {device.name!r} of {device.product_key!r}, which publishes to its own topics alone"
        )
    if topic.system:
        return f"{topic.text} is a system topic that devices do not publish to"
    for topic_class in classes:
        if topic_class.right is Right.SUBSCRIBE and _matches(topic_class.levels, topic.levels):
            return (
                f"the topic class /{device.product_key}/${{deviceName}}/{topic_class.levels} has the right to subscribe "
                f"alone; change it with `uplinkd topic remove` and `uplinkd topic add … --right both`. {_listed(device, classes)}"
            )
    return (
        f"no topic class of product {device.product_key} with the right to publish has the levels {topic.levels!r}. "
        f"{_listed(device, classes)}; add one with `uplinkd topic add {device.product_key} {topic.levels} --right publish`"
    )


def _listed(device: Device, classes: Collection[TopicClass]) -> str:
    names = [f"/{device.product_key}/{device.name}/{item.levels}" for item in classes if item.right.publishes]
    return "It may publish to " + (", ".join(names) or "no custom topic")


def _matches(pattern: str, levels: str) -> bool:
    """Whether `levels` lie in a class with wildcards: + for one level, # for the rest and for none."""
    wanted, given = pattern.split("/"), levels.split("/")
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index == len(given) or level not in ("+", given[index]):
            return wanted[index:] == ["#"]
    return len(wanted) == len(given)


def _layout(text: str) -> tuple[str, str, str, bool, bool]:
    """(productKey, deviceName, levels, system, uplink) of a topic."""
    parts = text.split("/", 4)
    first = parts[1]
    if first == "sys" and len(parts) == 5:
        rest = parts[4]
        device_reply = bool(_SYS_REPLY_OF_DEVICE.fullmatch(rest))
        uplink = bool(_SYS_UPLINK.fullmatch(rest)) and (device_reply or not _SYS_DOWNLINK.fullmatch(rest))
        return parts[2], parts[3], rest, True, uplink
    if first == "ota" and text.count("/") == 5:
        _, _, kind, action, product_key, device_name = text.split("/")
        return product_key, device_name, "", True, kind == "device" and action in _OTA_UPLINKS
    if first == "shadow" and len(parts) == 5 and "/" not in parts[4]:
        return parts[3], parts[4], "", True, parts[2] == "update"
    if first == "ext" and len(parts) == 5 and "/" in parts[4]:
        device_name, _, rest = parts[4].partition("/")
        return parts[3], device_name, rest, True, parts[2] == "ntp" and rest == "request"
    if first in ("sys", "ota", "shadow", "ext", "broadcast"):
        return "", "", "", True, False
    custom = text.split("/", 3)
    return custom[1], custom[2] if len(custom) > 2 else "", custom[3] if len(custom) > 3 else "", False, False


def _refuse_malformed(path: bytes) -> None:
    """Return if `path` is a topic all the same (it is percent-encoded, or has unusual characters); else say which rule it breaks."""
    shown = path.decode(errors="backslashreplace")
    if _BAD_PERCENT.search(path):
        raise _malformed(shown, "a % must be followed by two hexadecimal digits")
    try:
        text = unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        raise _malformed(shown, "percent-decoded it is not UTF-8") from None
    if not text.startswith("/") or text == "/":
        raise _malformed(text, "it is empty; the path is /topic/${productKey}/${deviceName}/…")
    if "" in text[1:].split("/"):
        raise _malformed(text, "it has an empty level")
    for char in text:
        if char in _WILDCARDS:
            raise _malformed(text, f"the wildcard {char} has no place in a topic that is published to")
        if char.isspace() or not char.isprintable():
            raise _malformed(text, f"the character {char!a} has no place in a topic")


def _malformed(text: str, rule: str) -> Refused:
    return Refused(Code.PARAM_ERROR, f"malformed topic {text[:300]!r}: {rule}", topic=text[:300])
