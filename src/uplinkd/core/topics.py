"""Which topics there are, who may publish and subscribe to them: no device ever does so outside its own topics.

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

__all__ = [
    "Topic",
    "broadcast_product",
    "check_filter",
    "covers",
    "explain",
    "explain_filter",
    "filter_matches",
    "may_publish",
    "may_receive",
    "may_subscribe",
    "of_text",
    "owner",
    "parse",
    "patterns_of_product",
    "system_downlinks",
]

_PLAIN = re.compile(rb"(?:/[A-Za-z0-9_@:.-]+)+")
_PLAIN_TEXT = re.compile(r"(?:/[A-Za-z0-9_@:.-]+)+")
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

# Topic filters of what reaches a device from the platform: {0} is its ProductKey, {1} its DeviceName.
_DOWNLINKS = (
    "/sys/{0}/{1}/thing/service/#",
    "/sys/{0}/{1}/thing/model/down_raw",
    "/sys/{0}/{1}/thing/config/push",
    "/sys/{0}/{1}/thing/disable",
    "/sys/{0}/{1}/thing/enable",
    "/sys/{0}/{1}/thing/delete",
    "/sys/{0}/{1}/thing/topo/change",
    "/sys/{0}/{1}/thing/gateway/permit",
    "/sys/{0}/{1}/rrpc/request/+",
    "/ota/device/upgrade/{0}/{1}",
    "/shadow/get/{0}/{1}",
    "/ext/ntp/{0}/{1}/response",
    "/broadcast/{0}/+",
)
_REPLIES = "/sys/{0}/{1}/thing/"
_REPLY = "_reply"


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
    return of_text(unquote_to_bytes(path).decode())


def of_text(text: str) -> Topic:
    """The topic that `text` is; raise Refused 10001 with the rule."""
    if not _PLAIN_TEXT.fullmatch(text):
        _check_characters(text)
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
            f"{device.name!r} of {device.product_key!r} publishes to its own topics alone"
        )
    if topic.system:
        return f"{topic.text} is a system topic that devices do not publish to"
    for topic_class in classes:
        if topic_class.right is Right.SUBSCRIBE and filter_matches(topic_class.levels, topic.levels):
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


def filter_matches(pattern: str, topic: str) -> bool:
    """Whether `topic` (or its levels) lies in a filter with wildcards: + for one level, # for the rest and for none."""
    wanted, given = pattern.split("/"), topic.split("/")
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index == len(given) or level not in ("+", given[index]):
            return wanted[index:] == ["#"]
    return len(wanted) == len(given)


def covers(pattern: str, topic_filter: str) -> bool:
    """Whether every topic that `topic_filter` matches lies in `pattern`."""
    wide, narrow = pattern.split("/"), topic_filter.split("/")
    for index, level in enumerate(wide):
        if level == "#":
            return True
        if index == len(narrow) or narrow[index] == "#" or level not in ("+", narrow[index]):
            return wide[index:] == ["#"] and index == len(narrow)
    return len(wide) == len(narrow)


def check_filter(text: str) -> str:
    """`text` if it is a well-formed topic filter; raise Refused 10001 with the rule."""
    if len(text.encode()) > MAX_TOPIC_BYTES:
        raise _malformed_filter(text, f"it has {len(text.encode())} bytes; at most {MAX_TOPIC_BYTES} are allowed")
    if not text.startswith("/"):
        raise _malformed_filter(text, "it does not begin with a slash; it is such as /+/+/user/update")
    levels = text[1:].split("/")
    for number, level in enumerate(levels, 1):
        if level == "#" and number < len(levels):
            raise _malformed_filter(text, "the wildcard # may only be the last level")
        if not level:
            raise _malformed_filter(text, "it has an empty level")
        if level in ("+", "#"):
            continue
        for char in level:
            if char in "+#":
                raise _malformed_filter(
                    text, f"the wildcard {char} is a whole level, between two slashes or at the end"
                )
            if char in _WILDCARDS:
                raise _malformed_filter(text, f"{char} is no wildcard here: + is one level, # are all further ones")
            if char.isspace() or not char.isprintable():
                raise _malformed_filter(text, f"the character {char!a} has no place in it")
    return text


def may_subscribe(topic_filter: str, device: Device, classes: Collection[TopicClass]) -> bool:
    """Whether `device` may subscribe to a well-formed filter: to nothing beyond its own topics, wildcards included."""
    own = f"/{device.product_key}/{device.name}/"
    if topic_filter.startswith(own):
        levels = topic_filter[len(own) :]
        return any(item.right.subscribes and covers(item.levels, levels) for item in classes)
    names = device.product_key, device.name
    if topic_filter.startswith(_REPLIES.format(*names)) and topic_filter.endswith(_REPLY):
        return True
    return any(covers(pattern.format(*names), topic_filter) for pattern in _DOWNLINKS)


def explain_filter(topic_filter: str, device: Device, classes: Collection[TopicClass]) -> str:
    """Why `may_subscribe` said no, with what it may subscribe to."""
    own = f"/{device.product_key}/{device.name}/"
    known = ", ".join(own + item.levels for item in classes if item.right.subscribes) or "no custom topic"
    if not topic_filter.startswith(own):
        return (
            f"{topic_filter} reaches beyond the topics of {device.name!r} of {device.product_key!r}, which subscribes to its own "
            f"alone: {known}, and its system topics"
        )
    return (
        f"no topic class of product {device.product_key} with the right to subscribe covers {topic_filter}; "
        f"it may subscribe to {known}"
    )


def may_receive(topic: Topic, device: Device, classes: Collection[TopicClass]) -> bool:
    """Whether a message on `topic` may be sent down to `device`: one that it may subscribe to, and is no uplink of the system."""
    return (
        (topic.product_key, topic.device_name) == (device.product_key, device.name)
        and not (topic.system and topic.uplink)
        and may_subscribe(topic.text, device, classes)
    )


def system_downlinks(device: Device) -> list[str]:
    """The filters to which the platform subscribes a device by itself, where its clientId says `_ss=1` (Link SDKs do)."""
    return [pattern.format(device.product_key, device.name) for pattern in (*_DOWNLINKS, _REPLIES + "#")]


def broadcast_product(topic: str) -> str:
    """The product of a broadcast topic, `/broadcast/${productKey}/…` with one level more; empty for any other topic."""
    parts = topic.split("/")
    return parts[2] if len(parts) == 4 and parts[1] == "broadcast" else ""


def patterns_of_product(product_key: str) -> list[str]:
    """Topic filters that together match every topic of a product's devices, their status included."""
    return [
        f"/{product_key}/#",
        f"/sys/{product_key}/#",
        f"/ota/device/+/{product_key}/+",
        f"/shadow/+/{product_key}/+",
        f"/ext/+/{product_key}/#",
        f"/as/mqtt/status/{product_key}/+",
    ]


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
    if first == "as" and text.count("/") == 5 and text.startswith("/as/mqtt/status/"):
        _, _, _, _, product_key, device_name = text.split("/")
        return product_key, device_name, "", True, False
    if first in ("sys", "ota", "shadow", "ext", "broadcast", "as"):
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
    _check_characters(text)


def _check_characters(text: str) -> None:
    if text in ("", "/"):
        raise _malformed(text, "it is empty; the path is /topic/${productKey}/${deviceName}/…")
    if not text.startswith("/"):
        raise _malformed(text, "it does not begin with a slash; it is such as /${productKey}/${deviceName}/…")
    if "" in text[1:].split("/"):
        raise _malformed(text, "it has an empty level")
    for char in text:
        if char in _WILDCARDS:
            raise _malformed(text, f"the wildcard {char} has no place in a topic that is published to")
        if char.isspace() or not char.isprintable():
            raise _malformed(text, f"the character {char!a} has no place in a topic")


def _malformed_filter(text: str, rule: str) -> Refused:
    return Refused(Code.PARAM_ERROR, f"malformed topic filter {text[:300]!r}: {rule}", topic=text[:300])


def _malformed(text: str, rule: str) -> Refused:
    return Refused(Code.PARAM_ERROR, f"malformed topic {text[:300]!r}: {rule}", topic=text[:300])
