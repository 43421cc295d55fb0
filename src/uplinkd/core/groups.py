"""Consumer groups: which stored messages a backend takes, how often it is offered one, and where a webhook sends them.

JetStream narrows by subject as far as it can (`subjects_of`), `wants` decides. A subject filter may be wider than the plan:
JetStream takes no two filters that overlap.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from urllib.parse import urlsplit

from uplinkd.core import topics
from uplinkd.core.errors import Refused, Rejected
from uplinkd.core.model import Message, Origin, ProductKey
from uplinkd.core.subjects import filters_of, subjects_of_filter

__all__ = [
    "ALL_KINDS",
    "LONGEST_PAUSE",
    "Form",
    "Group",
    "Kind",
    "Plan",
    "Webhook",
    "check_plan",
    "kind_of",
    "pause_before",
    "shown_url",
    "subjects_of",
    "wants",
]

LONGEST_PAUSE = 600.0
"""A message that was not accepted comes again after at most this many seconds."""

_FIRST_PAUSE = 1.0
_LONGEST_URL = 500
_MOST_PRODUCTS = 100
_STATUS = "/as/mqtt/status/{}/+"
_LIFECYCLE = "/{}/+/thing/lifecycle"
# Matches nothing that is ever stored: a group that has lost its last product gets nothing, not everything.
_NOTHING = "/.uplinkd.nothing"


class Kind(StrEnum):
    """What a message tells: what a device reported, that it came or went, that its owner made, deleted, disabled or enabled it."""

    UPLINK = "uplink"
    STATUS = "status"
    LIFECYCLE = "lifecycle"


ALL_KINDS = frozenset(Kind)


class Form(StrEnum):
    """How a webhook gets messages, by the CloudEvents HTTP binding: one with its attributes in headers, one as JSON, several as a
    JSON array."""

    BINARY = "binary"
    STRUCTURED = "structured"
    BATCH = "batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """Where and how messages are posted. `batch` bounds how many go in one request (of the form BATCH; others have one), `linger`
    how many seconds the first of them waits for others, `lanes` how many requests are under way at a time: the messages of
    one device are all in one lane, and so in order. An attempt may take `timeout` seconds."""

    url: str
    form: Form = Form.BINARY
    batch: int = 100
    linger: float = 0.0
    lanes: int = 4
    timeout: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All of a group that can be changed: `products` (None: all, also future ones) and `kinds` that it takes; `topic`, an MQTT
    filter that narrows what devices report, or empty; how long a consumer may keep a message without accepting it before it
    comes again (`ack_wait`, seconds) and how often it is offered (`tries`) before it goes to the dead letters; `apps`, the
    names of the applications that may consume it; `webhook`, where its messages are posted instead."""

    products: tuple[ProductKey, ...] | None = None
    topic: str = ""
    kinds: frozenset[Kind] = frozenset({Kind.UPLINK})
    ack_wait: float = 30.0
    tries: int = 16
    apps: tuple[str, ...] = ()
    webhook: Webhook | None = None
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """A consumer group; `name` is its consumerGroupId on the wire. Its messages are those stored at or after `start` (ms);
    `generation` rises when that is set anew. `secret` signs what its webhook gets, empty without one."""

    id: int
    name: str
    plan: Plan
    start: int
    generation: int
    created: int
    secret: str = field(repr=False, default="")

    @property
    def version(self) -> str:
        """Another one after each change; the same in every process, whatever order a set has there."""
        plan, kinds = replace(self.plan, kinds=frozenset()), sorted(self.plan.kinds)
        facts = repr((plan, kinds, self.start, self.generation, self.secret))
        return f"{self.id}-{zlib.crc32(facts.encode()):08x}"


def kind_of(message: Message) -> Kind:
    match message.origin:
        case Origin.STATUS:
            return Kind.STATUS
        case Origin.LIFECYCLE:
            return Kind.LIFECYCLE
        case _:
            return Kind.UPLINK


def wants(plan: Plan, message: Message) -> bool:
    """Whether a message belongs to a group of this plan."""
    kind = kind_of(message)
    return (
        kind in plan.kinds
        and (plan.products is None or message.product_key in plan.products)
        and (kind is not Kind.UPLINK or not plan.topic or topics.filter_matches(plan.topic, message.topic))
    )


def subjects_of(plan: Plan) -> list[str]:
    """Subject filters that together match at least what a plan wants; no two overlap."""
    if plan.products is not None and not plan.products:
        return [_NOTHING]
    found: list[str] = []
    products: Iterable[str | None] = [None] if plan.products is None else plan.products
    for product_key in products:
        wanted: list[str] = []
        if Kind.UPLINK in plan.kinds:
            mine = filters_of(product_key, None)
            narrow = subjects_of_filter(plan.topic) if plan.topic else [">"]
            common = [_common(each, other) for each in mine for other in narrow]
            status = subjects_of_filter(_STATUS.format(product_key or "+"))[0]
            wanted += [each for each in common if each and (product_key is None or each != status)]
        if Kind.STATUS in plan.kinds:
            wanted += subjects_of_filter(_STATUS.format(product_key or "+"))
        if Kind.LIFECYCLE in plan.kinds:
            wanted += subjects_of_filter(_LIFECYCLE.format(product_key or "+"))
        found += _apart(wanted)  # those of two products have nothing in common
    return found or [_NOTHING]


def pause_before(attempt: int) -> float:
    """Seconds before the attempt of this number, 2 the first one that is a repetition: doubling from one second."""
    return min(_FIRST_PAUSE * 2.0 ** min(max(attempt - 2, 0), 30), LONGEST_PAUSE)


def shown_url(url: str) -> str:
    """A webhook's URL without its query, which may hold a secret."""
    return url.partition("?")[0]


def check_plan(plan: Plan) -> None:
    """Raise Rejected with the value and the rule that it breaks."""
    if plan.topic:
        try:
            topics.check_filter(plan.topic)
        except Refused as refused:
            raise Rejected(refused.reason) from refused
    if not plan.kinds:
        raise Rejected(f"a group takes at least one kind of message: {', '.join(Kind)}")
    if plan.products is not None and len(plan.products) > _MOST_PRODUCTS:
        raise Rejected(f"a group names at most {_MOST_PRODUCTS} products, not {len(plan.products)}; or takes them all")
    if plan.topic and plan.products != () and Kind.UPLINK in plan.kinds and _narrowed_to_nothing(plan):
        raise Rejected(
            f"topic filter {plan.topic!r}: nothing that devices of these products report matches it; it is such as "
            "/+/+/user/update, from the ProductKey on"
        )
    _check_range("ack_wait", plan.ack_wait, 1, 3600, in_seconds=True)
    _check_range("tries", plan.tries, 1, 1000)
    if plan.webhook:
        if plan.apps:
            raise Rejected(
                "a group's messages go to a webhook or to applications, not to both; make one group for each"
            )
        _check_webhook(plan.webhook)


def _check_webhook(webhook: Webhook) -> None:
    shown = repr(webhook.url[:_LONGEST_URL])
    if (
        len(webhook.url) > _LONGEST_URL
        or not webhook.url.isascii()
        or not webhook.url.isprintable()
        or " " in webhook.url
    ):
        raise Rejected(f"webhook URL {shown}: it has at most {_LONGEST_URL} printable ASCII characters and no space")
    try:
        parts = urlsplit(webhook.url)
        port = parts.port
    except ValueError as error:
        raise Rejected(f"webhook URL {shown} cannot be read: {error}") from error
    if parts.scheme not in ("https", "http") or not parts.hostname or port == 0:
        raise Rejected(f"webhook URL {shown}: it is such as https://backend.example.com/uplinkd")
    if parts.username is not None or parts.password is not None:
        raise Rejected("a webhook URL has no user name and password in it: what it gets is signed")
    if parts.fragment:
        raise Rejected(f"webhook URL {shown}: it has no fragment (#{parts.fragment})")
    _check_range("batch", webhook.batch, 1, 1000)
    _check_range("linger", webhook.linger, 0, 60, in_seconds=True)
    _check_range("lanes", webhook.lanes, 1, 64)
    _check_range("timeout", webhook.timeout, 1, 120, in_seconds=True)


def _narrowed_to_nothing(plan: Plan) -> bool:
    return subjects_of(replace(plan, kinds=frozenset({Kind.UPLINK}))) == [_NOTHING]


def _check_range(name: str, value: float, low: int, high: int, *, in_seconds: bool = False) -> None:
    if low <= value <= high and not math.isnan(value):
        return
    if in_seconds:
        raise Rejected(f"{name} = {value:g}: it is from {low} to {high} seconds")
    raise Rejected(f"{name} = {value:g}: it is from {low} to {high}")


def _common(one: str, other: str) -> str:
    """The subject filter that matches what both match; empty when that is nothing."""
    left, right = one.split("."), other.split(".")
    common: list[str] = []
    for index in range(max(len(left), len(right))):
        ours = left[index] if index < len(left) else ""
        theirs = right[index] if index < len(right) else ""
        if ours == ">":
            return ".".join([*common, *right[index:]]) if theirs else ""
        if theirs == ">":
            return ".".join([*common, *left[index:]]) if ours else ""
        if not ours or not theirs:
            return ""
        if ours != theirs and "*" not in (ours, theirs):
            return ""
        common.append(theirs if ours == "*" else ours)
    return ".".join(common)


def _apart(filters: list[str]) -> list[str]:
    """`filters` without overlaps: of two where one covers the other the wider one stays, others become one that covers both."""
    apart: list[str] = []
    for one in filters:
        merged = one
        while clash := next((each for each in apart if _common(each, merged)), None):
            apart.remove(clash)
            merged = _covering(clash, merged)
        apart.append(merged)
    return apart


def _covering(one: str, other: str) -> str:
    """A filter that matches at least what either matches."""
    left, right = one.split("."), other.split(".")
    covering: list[str] = []
    for ours, theirs in zip(left, right, strict=False):
        if ">" in (ours, theirs):
            return ".".join([*covering, ">"])
        covering.append(ours if ours == theirs else "*")
    return ".".join(covering if len(left) == len(right) else [*covering, ">"])
