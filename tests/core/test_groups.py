"""Which messages a group takes, and what its filters promise."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from uplinkd.core.errors import Rejected
from uplinkd.core.groups import (
    LONGEST_PAUSE,
    Form,
    Group,
    Kind,
    Plan,
    Webhook,
    check_plan,
    kind_of,
    pause_before,
    shown_url,
    subjects_of,
    wants,
)
from uplinkd.core.model import DeviceName, Message, Origin, ProductKey
from uplinkd.core.subjects import to_subject

LAMPS, DOORS = ProductKey("a1Lamps"), ProductKey("a1Doors")
URL = "https://backend.example.com/uplinkd"

keys = st.sampled_from(["a1Lamps", "a1Doors", "a1Bells"])
names = st.sampled_from(["lamp-1", "x.y", "status"])
levels = st.sampled_from(["user", "update", "thing", "event", "lifecycle", "a.b"])
patterns = st.one_of(st.just("+"), keys, names, levels)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    key, name = draw(keys), draw(names)
    origin = draw(st.sampled_from(Origin))
    if origin is Origin.STATUS:
        topic = f"/as/mqtt/status/{key}/{name}"
    elif origin is Origin.LIFECYCLE:
        topic = f"/{key}/{name}/thing/lifecycle"
    else:
        inner = "/".join(draw(st.lists(levels, min_size=1, max_size=3)))
        topic = draw(st.sampled_from([f"/{key}/{name}/{inner}", f"/sys/{key}/{name}/{inner}"]))
    return Message(1, topic, ProductKey(key), DeviceName(name), 0, b"", origin)


@st.composite
def filters(draw: st.DrawFn) -> str:
    found = draw(st.lists(patterns, min_size=1, max_size=5))
    if draw(st.booleans()):
        found[-1] = "#"
    return "/" + "/".join(found)


plans = st.builds(
    Plan,
    products=st.one_of(st.none(), st.lists(keys.map(ProductKey), max_size=3, unique=True).map(tuple)),
    topic=st.one_of(st.just(""), filters()),
    kinds=st.sets(st.sampled_from(Kind), min_size=1).map(frozenset),
)


def matches(pattern: str, subject: str) -> bool:
    """As NATS has it: * is one token, > at least one."""
    wanted, tokens = pattern.split("."), subject.split(".")
    for place, each in enumerate(wanted):
        if each == ">":
            return len(tokens) > place
        if place == len(tokens) or each not in ("*", tokens[place]):
            return False
    return len(wanted) == len(tokens)


def overlap(one: str, other: str) -> bool:
    """Whether some subject matches both, by the meaning of the wildcards alone."""
    left, right = one.split("."), other.split(".")
    for place in range(max(len(left), len(right))):
        ours = left[place] if place < len(left) else None
        theirs = right[place] if place < len(right) else None
        if ours is None or theirs is None:
            return False
        if ">" in (ours, theirs):
            return True
        if "*" not in (ours, theirs) and ours != theirs:
            return False
    return True


@given(plans, messages())
def test_what_a_group_wants_its_filters_match(plan: Plan, message: Message) -> None:
    """JetStream narrows by them; what they leave out never arrives."""
    assume(wants(plan, message))
    subject = to_subject(message.topic)
    assert any(matches(pattern, subject) for pattern in subjects_of(plan)), (subject, subjects_of(plan))


@given(plans)
def test_no_two_filters_of_a_group_overlap(plan: Plan) -> None:
    """JetStream refuses a consumer of which two do, and one without any takes everything."""
    found = subjects_of(plan)
    assert found
    for place, one in enumerate(found):
        assert not any(overlap(one, other) for other in found[place + 1 :]), found


def test_a_group_without_products_wants_nothing() -> None:
    """As one whose last product was deleted: it must not get everything."""
    plan = Plan(products=(), kinds=frozenset(Kind))
    message = Message(1, f"/{LAMPS}/lamp-1/user/update", LAMPS, DeviceName("lamp-1"), 0, b"")
    assert not wants(plan, message)
    assert not any(matches(pattern, to_subject(message.topic)) for pattern in subjects_of(plan))


def test_the_topic_filter_narrows_reports_alone() -> None:
    """Who asks for reports on one topic and for status changes gets all status changes of the products."""
    plan = Plan(products=(LAMPS,), topic="/+/+/user/alarm", kinds=frozenset({Kind.UPLINK, Kind.STATUS}))
    update = Message(1, f"/{LAMPS}/lamp-1/user/update", LAMPS, DeviceName("lamp-1"), 0, b"")
    status = replace(update, topic=f"/as/mqtt/status/{LAMPS}/lamp-1", origin=Origin.STATUS)
    assert not wants(plan, update)
    assert wants(plan, replace(update, topic=f"/{LAMPS}/lamp-1/user/alarm"))
    assert wants(plan, status)
    assert not wants(plan, replace(status, product_key=DOORS))


@pytest.mark.parametrize(
    ("origin", "kind"),
    [
        (Origin.HTTPS, Kind.UPLINK),
        (Origin.MQTT, Kind.UPLINK),
        (Origin.STATUS, Kind.STATUS),
        (Origin.LIFECYCLE, Kind.LIFECYCLE),
    ],
)
def test_the_kind_goes_by_the_origin(origin: Origin, kind: Kind) -> None:
    assert kind_of(Message(1, "/a/b/c", LAMPS, DeviceName("b"), 0, b"", origin)) is kind


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(topic="no/slash"), "does not begin with a slash"),
        (Plan(topic="/a/#/b"), "# may only be the last"),
        (Plan(products=(LAMPS,), topic="/user/#"), "nothing that devices of these products report matches it"),
        (Plan(products=(LAMPS, DOORS), topic="/a1Bells/+/user/update"), "nothing that devices of these products"),
        (Plan(kinds=frozenset()), "at least one kind"),
        (Plan(products=tuple(ProductKey(f"p{number}") for number in range(101))), "at most 100 products, not 101"),
        (Plan(ack_wait=0.5), "ack_wait = 0.5: it is from 1 to 3600 seconds"),
        (Plan(ack_wait=float("nan")), "ack_wait = nan"),
        (Plan(tries=0), "tries = 0: it is from 1 to 1000"),
        (Plan(apps=("billing",), webhook=Webhook(url=URL)), "not to both"),
        (Plan(webhook=Webhook(url="ftp://example.com")), "it is such as https://"),
        (Plan(webhook=Webhook(url="https:///path")), "it is such as https://"),
        (Plan(webhook=Webhook(url="https://example.com:0/")), "it is such as https://"),
        (Plan(webhook=Webhook(url="https://example.com:x/")), "webhook URL"),
        (Plan(webhook=Webhook(url="https://u:p@example.com/")), "no user name and password"),
        (Plan(webhook=Webhook(url="https://example.com/#part")), "no fragment"),
        (Plan(webhook=Webhook(url="https://example.com/a b")), "no space"),
        (Plan(webhook=Webhook(url="https://ex\nample.com/")), "no space"),
        (Plan(webhook=Webhook(url=f"https://example.com/{'x' * 500}")), "at most 500"),
        (Plan(webhook=Webhook(url=URL, batch=0)), "batch = 0"),
        (Plan(webhook=Webhook(url=URL, linger=61)), "linger = 61"),
        (Plan(webhook=Webhook(url=URL, lanes=65)), "lanes = 65"),
        (Plan(webhook=Webhook(url=URL, timeout=0)), "timeout = 0"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused_with_it(plan: Plan, words: str) -> None:
    """The refusal names the value and the rule, and never a password in a URL."""
    with pytest.raises(Rejected) as refusal:
        check_plan(plan)
    assert words in str(refusal.value)
    assert "u:p@" not in str(refusal.value)


def test_a_plan_that_keeps_the_rules_passes() -> None:
    check_plan(Plan())
    check_plan(
        Plan(products=(), topic="/+/+/user/#", kinds=frozenset(Kind), ack_wait=3600, tries=1000, apps=("billing",))
    )
    check_plan(Plan(webhook=Webhook(url=f"{URL}?key=1", form=Form.BATCH, batch=1000, linger=60, lanes=64, timeout=120)))


def test_a_filter_may_match_nothing_where_there_is_nothing_to_match() -> None:
    """A group that has lost its products can still be changed; one without reports has no use for a filter."""
    check_plan(Plan(products=(), topic="/a1Bells/#"))
    check_plan(Plan(products=(LAMPS,), topic="/a1Bells/#", kinds=frozenset({Kind.STATUS})))
    check_plan(Plan(products=(LAMPS, DOORS), topic="/a1Doors/#"))
    check_plan(Plan(products=(LAMPS,), topic="/sys/+/+/thing/event/property/post"))


def test_pauses_double_from_a_second_to_ten_minutes() -> None:
    """The first one is before the second attempt."""
    assert [pause_before(attempt) for attempt in (2, 3, 4, 5)] == [1, 2, 4, 8]
    assert [pause_before(attempt) for attempt in (11, 12, 13, 1000)] == [
        512,
        LONGEST_PAUSE,
        LONGEST_PAUSE,
        LONGEST_PAUSE,
    ]


def test_a_shown_url_has_no_query() -> None:
    """It may hold a secret."""
    assert shown_url(f"{URL}?key=s3cret") == URL


def test_the_version_is_the_same_in_every_process() -> None:
    """Otherwise a form that somebody has open, or an If-Match, is out of date when the console was started again."""
    code = (
        "from uplinkd.core.groups import Group, Kind, Plan; "
        "print(Group(1, 'billing', Plan(kinds=frozenset(Kind)), 0, 1, 0).version)"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "123"
    }
    assert len(told) == 1


def test_the_version_changes_with_every_change_and_tells_no_secret() -> None:
    group = Group(1, "billing", Plan(), 0, 1, 0, "whsec_s3cret")
    others = [
        replace(group, plan=replace(group.plan, paused=True)),
        replace(group, start=1),
        replace(group, generation=2),
        replace(group, secret="whsec_other"),
        replace(group, id=2),
    ]
    assert len({group.version, *(other.version for other in others)}) == 6
    assert "s3cret" not in group.version + repr(group)
