"""Topic ⇄ NATS subject, by the mapping of NATS' own MQTT server, so that `nats` users see subjects that they know.

`/` separates levels where NATS has `.`; an empty level and a dot inside a level become `/` and `//`
(`/pk/d.e/get` ⇄ `/.pk.d//e.get`). Only publish topics come here, checked by `core.topics` first: a wildcard, white
space or control character would change what the subject means.
"""

from __future__ import annotations

__all__ = ["SENDING", "filters_of", "from_subject", "subjects_of_filter", "to_subject"]

SENDING = "uplinkd.send."
"""What stands before the subject of a topic in the request that sends a message down to it."""


def to_subject(topic: str) -> str:
    """The NATS subject of `topic`, which begins with a slash, has no empty level and does not end in one."""
    return "/" + topic.replace(".", "\0").replace("/", ".").replace("\0", "//")


def from_subject(subject: str) -> str:
    """The topic of `subject`; the inverse of `to_subject`."""
    return subject[1:].replace("//", "\0").replace(".", "/").replace("\0", ".")


def subjects_of_filter(topic_filter: str) -> list[str]:
    """The subjects that together match what an MQTT filter matches; it begins with a slash and has no empty level."""
    subject = to_subject(topic_filter)
    levels = ["*" if level == "+" else level for level in subject.split(".")]
    if levels[-1] != "#":
        return [".".join(levels)]
    parents = levels[:-1]
    return [".".join([*parents, ">"]), *([".".join(parents)] if len(parents) > 1 else [])]


def filters_of(product_key: str | None, device_name: str | None) -> list[str]:
    """Subject filters that match every topic of a product, or of one of its devices; all topics without a product.

    No two of them overlap: JetStream does not take overlapping filters.
    """
    if product_key is None:
        return ["/.>"]
    if device_name is None:
        return [
            f"/.{product_key}.>",
            f"/.sys.{product_key}.>",
            f"/.ota.device.*.{product_key}.*",
            f"/.shadow.*.{product_key}.*",
            f"/.ext.*.{product_key}.>",
            f"/.as.mqtt.status.{product_key}.*",
        ]
    device = to_subject("/" + device_name)[2:]
    return [
        f"/.{product_key}.{device}.>",
        f"/.sys.{product_key}.{device}.>",
        f"/.ota.device.*.{product_key}.{device}",
        f"/.shadow.*.{product_key}.{device}",
        f"/.ext.*.{product_key}.{device}.>",
        f"/.as.mqtt.status.{product_key}.{device}",
    ]
