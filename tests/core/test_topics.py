"""Topics: which are well formed, who may publish where, and under which subject they are stored."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uplinkd.core import topics
from uplinkd.core.errors import Code, Refused
from uplinkd.core.model import Device, DeviceName, ProductKey, Right, TopicClass
from uplinkd.core.subjects import filters_of, from_subject, to_subject

PK, DN = "a1GFjLP3xxC", "device123"
CLASSES = (
    TopicClass("user/update", Right.PUBLISH),
    TopicClass("user/get", Right.SUBSCRIBE),
    TopicClass("pub", Right.BOTH),
)
LEVELS = frozenset(item.levels for item in CLASSES if item.right.publishes)

names = st.text("abcXYZ019_@.:-", min_size=1, max_size=64)
keys = st.text("abcXYZ019", min_size=1, max_size=30).filter(lambda key: key not in ("sys", "ota", "ext"))


def device(product_key: str = PK, name: str = DN) -> Device:
    return Device(1, ProductKey(product_key), DeviceName(name), "s", True, 0, 0, None, None)


def may(path: str, who: Device | None = None) -> bool:
    return topics.may_publish(topics.parse(path.encode()), who or device(), LEVELS)


@pytest.mark.parametrize(
    "path",
    [
        f"/{PK}/{DN}/pub",
        f"/{PK}/{DN}/user/update",
        f"/{PK}/{DN}/user%2Fupdate",
        f"/sys/{PK}/{DN}/thing/event/alarm/post",
        f"/sys/{PK}/{DN}/thing/event/property/post",
        f"/sys/{PK}/{DN}/thing/deviceinfo/update",
        f"/sys/{PK}/{DN}/thing/model/up_raw",
        f"/sys/{PK}/{DN}/thing/config/get",
        f"/sys/{PK}/{DN}/thing/service/property/set_reply",
        f"/ota/device/inform/{PK}/{DN}",
        f"/ota/device/progress/{PK}/{DN}",
        f"/ota/device/request/{PK}/{DN}",
        f"/shadow/update/{PK}/{DN}",
    ],
)
def test_a_device_publishes_to_its_own_topics(path: str) -> None:
    """Its product's publish classes and the platform's uplinks are open to it."""
    assert may(path)


@pytest.mark.parametrize(
    "path",
    [
        f"/{PK}/{DN}/user/get",
        f"/{PK}/{DN}/unknown",
        f"/{PK}/{DN}",
        f"/{PK}",
        f"/{PK}/{DN}/user/update/more",
        f"/{PK}/other/user/update",
        f"/other/{DN}/user/update",
        f"/{PK}/{DN}/../other/user/update",
        f"/sys/{PK}/{DN}/thing/service/property/set",
        f"/sys/{PK}/{DN}/thing/model/down_raw",
        f"/sys/{PK}/{DN}/thing/config/push",
        f"/sys/{PK}/{DN}/thing/config/get_reply",
        f"/sys/{PK}/{DN}/thing/deviceinfo/update_reply",
        f"/sys/{PK}/other/thing/model/up_raw",
        f"/sys/{PK}/{DN}",
        f"/ota/device/upgrade/{PK}/{DN}",
        f"/ota/device/inform/{PK}/other",
        f"/shadow/get/{PK}/{DN}",
        f"/broadcast/{PK}/all",
    ],
)
def test_other_topics_are_closed_and_the_reason_says_why(path: str) -> None:
    """Others' topics, downlinks and unknown classes are refused with words for the operator."""
    assert not may(path)
    assert len(topics.explain(topics.parse(path.encode()), device(), CLASSES)) > 40


def test_the_reason_names_the_class_that_nearly_matched() -> None:
    """Someone who publishes to a subscribe class reads just that."""
    reason = topics.explain(topics.parse(f"/{PK}/{DN}/user/get".encode()), device(), CLASSES)
    assert "user/get has the right to subscribe" in reason
    assert f"/{PK}/{DN}/user/update" in reason
    wildcard = (TopicClass("down/#", Right.SUBSCRIBE),)
    reason = topics.explain(topics.parse(f"/{PK}/{DN}/down/a/b".encode()), device(), wildcard)
    assert "down/# has the right to subscribe" in reason


@given(
    keys,
    names,
    keys,
    names,
    st.sampled_from(["/{}/{}/pub", "/sys/{}/{}/thing/model/up_raw", "/ota/device/inform/{}/{}"]),
)
def test_rights_never_cross_devices(key: str, name: str, other_key: str, other_name: str, shape: str) -> None:
    """Whatever the names, a device publishes where its own names stand and nowhere else."""
    path = shape.format(other_key, other_name)
    try:
        topic = topics.parse(path.encode())
    except Refused:
        return
    own = (key, name) == (other_key, other_name)
    assert topics.may_publish(topic, device(key, name), LEVELS) is own


@given(
    st.lists(st.text("abc.XYZ_@:-09", min_size=1, max_size=12), min_size=1, max_size=7).map(
        lambda levels: "/" + "/".join(levels)
    )
)
def test_topic_to_subject_and_back(topic: str) -> None:
    """The mapping is a bijection, and no subject has an empty token, white space or a wildcard."""
    subject = to_subject(topic)
    assert from_subject(subject) == topic
    assert all(subject.split("."))
    assert not set(subject) & set(" *>\t\r\n")


def test_subjects_are_those_of_nats_own_mqtt_server() -> None:
    """Users of the `nats` command see what they know."""
    assert to_subject("/pk/dn/update") == "/.pk.dn.update"
    assert to_subject("/pk/d.e:v@2-x/get") == "/.pk.d//e:v@2-x.get"


@given(keys, names)
def test_a_devices_filters_match_its_topics(key: str, name: str) -> None:
    """Each topic that a device may publish to is found again under its product and under its name."""
    for path in (
        f"/{key}/{name}/pub",
        f"/sys/{key}/{name}/thing/model/up_raw",
        f"/ota/device/inform/{key}/{name}",
        f"/shadow/update/{key}/{name}",
    ):
        if len(path) <= 128 and path.count("/") == len(path.split("/")) - 1 and "//" not in path:
            subject = to_subject(path)
            assert topics.owner(path) == (key, name)
            for filters in (filters_of(key, name), filters_of(key, None), filters_of(None, None)):
                assert any(_subject_matches(pattern, subject) for pattern in filters)


def _subject_matches(pattern: str, subject: str) -> bool:
    wanted, given_ = pattern.split("."), subject.split(".")
    for index, token in enumerate(wanted):
        if token == ">":
            return len(given_) > index
        if index >= len(given_) or token not in ("*", given_[index]):
            return False
    return len(wanted) == len(given_)


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        (b"", "empty"),
        (b"/", "empty"),
        (b"//a/b", "empty level"),
        (b"/a/b/", "empty level"),
        (b"/a/+/c", "wildcard +"),
        (b"/a/%23", "wildcard #"),
        (b"/a/*", "wildcard *"),
        (b"/a/%3e", "wildcard >"),
        (b"/a/b%20c", "' '"),
        (b"/a/b%0d%0aPUB", "'\\r'"),
        (b"/a/%00", "x00"),
        (b"/a/%E3%80%80", "u3000"),
        (b"/a/%zz", "hexadecimal"),
        (b"/a/%2", "hexadecimal"),
        (b"/a/%ff%fe", "UTF-8"),
        (b"/" + b"a" * 128, "129 bytes"),
        (b"/a/b/c/d/e/f/g/h", "8 slashes"),
    ],
)
def test_a_malformed_topic_is_10001_with_the_rule(path: bytes, rule: str) -> None:
    """What would be a wildcard or a control character in a subject never gets that far."""
    with pytest.raises(Refused) as caught:
        topics.parse(path)
    assert caught.value.code is Code.PARAM_ERROR
    assert rule in caught.value.reason


def test_a_topic_is_decoded_once() -> None:
    """%2541 is %41 after one decoding, not A."""
    assert topics.parse(b"/pk/%2541").text == "/pk/%41"


@given(st.binary(max_size=140))
def test_no_path_raises_anything_but_refused_and_none_breaks_a_subject(path: bytes) -> None:
    """Any path is refused, or its subject is safe to write into a PUB line."""
    try:
        topic = topics.parse(b"/" + path)
    except Refused:
        return
    assert not set(topic.subject) & set(b" \t\r\n*>")
    assert topic.subject.startswith(b"/.")
    assert topics.parse(quote(topic.text, safe="/").encode()).text == topic.text


SYSTEM = [
    "/ext/ntp/{pk}/{dn}/response",
    "/ota/device/upgrade/{pk}/{dn}",
    "/shadow/get/{pk}/{dn}",
    "/sys/{pk}/{dn}/thing/service/property/set",
    "/sys/{pk}/{dn}/thing/event/property/post_reply",
    "/sys/{pk}/{dn}/rrpc/request/+",
]


@pytest.mark.parametrize(
    "topic_filter", [each.format(pk=PK, dn=DN) for each in SYSTEM] + [f"/{PK}/{DN}/user/get", f"/{PK}/{DN}/pub"]
)
def test_a_device_subscribes_to_what_is_its_own(topic_filter: str) -> None:
    """The classes with that right, and what the platform sends down."""
    topics.check_filter(topic_filter)
    assert topics.may_subscribe(topic_filter, device(), CLASSES)


@pytest.mark.parametrize(
    "topic_filter",
    [
        "#",
        "+/#",
        "/#",
        "/+/+/user/get",
        f"/{PK}/+/user/get",
        f"/{PK}/#",
        f"/{PK}/{DN}/#",
        f"/{PK}/{DN}/+/get",
        f"/{PK}/{DN}/user/update",
        f"/{PK}/{DN}/user/+",
        f"/{PK}/other/user/get",
        f"/{PK}/{DN}x/user/get",
        f"/sys/{PK}/+/thing/service/property/set",
        f"/sys/{PK}/other/thing/service/property/set",
        f"/sys/+/{DN}/thing/service/property/set",
        f"/as/mqtt/status/{PK}/{DN}",
        "/broadcast/other/news",
        "$SYS/#",
        "$JS/API/#",
    ],
)
def test_no_filter_reaches_further(topic_filter: str) -> None:
    """Not by wildcards, not by a neighbour's name, not to topics that it only reports to; and the reason says so."""
    assert not topics.may_subscribe(topic_filter, device(), CLASSES)
    assert topic_filter in topics.explain_filter(topic_filter, device(), CLASSES)


levels = st.lists(st.sampled_from(["a", "b", "+", "user", ""]), min_size=1, max_size=5)


@given(levels, st.booleans(), levels, st.booleans(), st.lists(st.sampled_from(["a", "b", "user", "c", ""]), max_size=6))
def test_what_a_filter_covers_it_matches(
    wide: list[str], deep: bool, narrow: list[str], deeper: bool, topic: list[str]
) -> None:
    """Whoever may hear one filter hears nothing by another that it covers which it would not hear by itself."""
    outer = "/".join([*wide, "#"] if deep else wide)
    inner = "/".join([*narrow, "#"] if deeper else narrow)
    text = "/".join(topic)
    if topics.covers(outer, inner) and topics.filter_matches(inner, text):
        assert topics.filter_matches(outer, text)


@given(
    names,
    names,
    st.lists(st.sampled_from(["user", "get", "pub", "+", "#", PK, "sys", "ext", "thing"]), min_size=1, max_size=5),
)
def test_no_filter_hears_another_device(name: str, other: str, parts: list[str]) -> None:
    """Whatever a device may subscribe to, no topic of another device's matches it, broadcasts apart."""
    topic_filter = f"/{PK}/{name}/" + "/".join(parts)
    classes = (*CLASSES, TopicClass("#", Right.BOTH))
    if other != name and topics.may_subscribe(topic_filter, device(name=name), classes):
        for theirs in (
            f"/{PK}/{other}/user/get",
            f"/{PK}/{other}/pub",
            f"/sys/{PK}/{other}/thing/service/property/set",
        ):
            assert not topics.filter_matches(topic_filter, theirs)


@pytest.mark.parametrize(
    ("topic_filter", "rule"),
    [
        ("user/update", "it does not begin with a slash; it is such as /+/+/user/update"),
        ("/a1*/+/user", "* is no wildcard here: + is one level, # are all further ones"),
        ("/a1/>", "> is no wildcard here"),
        ("/a1+/user", "the wildcard + is a whole level"),
        ("/a1/user#", "the wildcard # is a whole level"),
        ("/#/user", "the wildcard # may only be the last level"),
        ("/a1//user", "it has an empty level"),
        ("/", "it has an empty level"),
        ("/a 1/user", "the character ' ' has no place in it"),
        ("/" + "x" * 200, "it has 201 bytes"),
    ],
)
def test_what_is_wrong_with_a_filter_is_said_of_the_whole_filter(topic_filter: str, rule: str) -> None:
    """In terms of filters, and not of topics that are published to."""
    with pytest.raises(Refused) as caught:
        topics.check_filter(topic_filter)
    assert caught.value.reason.startswith(f"malformed topic filter {topic_filter!r}: {rule}")
