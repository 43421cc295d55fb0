"""The console speaks both languages, wholly."""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from babel.messages.extract import extract_from_dir
from fastapi import Request

import uplinkd
from uplinkd.admin.words import age, catalogue, language_of, size, told
from uplinkd.settings import Settings

TEMPLATES = Path(__file__).parent.parent.parent / "src/uplinkd/admin/templates"


def texts() -> set[str]:
    found = extract_from_dir(str(TEMPLATES), method_map=[("**.html", "jinja2")], keywords={"_": None})
    return {message for _, _, message, _, _ in found if isinstance(message, str)}


SOURCES = Path(uplinkd.__file__).parent
# Whose faults people meet in the console.
FAULTY = [
    *sorted((SOURCES / "admin").glob("*.py")),
    *(
        SOURCES / name
        for name in ("asking.py", "core/groups.py", "core/names.py", "core/webhooks.py", "engine/reader.py")
    ),
    *(
        SOURCES / "registry" / name
        for name in ("database.py", "fleet.py", "groups.py", "operators.py", "postgresql.py", "sql.py", "sqlite.py")
    ),
]
FAULTS = {"Conflict", "Denied", "Forbidden", "NotFound", "Rejected", "Stale", "Unavailable"}
# What is put together elsewhere: an answer's status, a wait.
FURTHER = {
    "the engine did not answer within {} s",
    "there is nothing at {}",
    "too many attempts to sign in; try again in {} s",
    "{} is not for {}",
    "{} jobs are under way: wait for one to end, or cancel it; try again in {} s",
    "{} streams are watched already; try again in {} s",
    "a fault of uplinkd; its log has the traceback",
    "it did not answer within {} s",
    "its certificate is not accepted: {}",
    "its name is not found: {}",
    "no TLS with it: {}",
    "it closed the connection without an answer",
    "no connection to it: {}",
    "the connection to it failed: {}",
    "it answered {}",
    "it answered {}, a redirect, which webhooks do not follow",
    "it answered {}, once",
    "it answered {}, once: {}",
    "it answered {}, {} times",
    "it answered {}, {} times: {}",
    "it answered {}, {} (too many messages of its device wait for a further try; there are {})",
    "it answered {}, {} (too many messages of its device wait for a further try; there are {}): {}",
    "it was offered {} times and not accepted",
    "its URL is none that can be reached",
    "its answer is not HTTP: {}",
    "its answer broke off ({})",
    "{}, which is no address of the internet and not in webhook_networks",
    "{}, which is not in webhook_networks: anywhere else it is https:// alone",
}


# Why devices are refused; what is put together of parts is here as a whole.
REFUSING = [
    SOURCES / name
    for name in (
        "gateway.py",
        "core/tokens.py",
        "core/wire.py",
        "floods.py",
        "flow.py",
        "mqtt/session.py",
        "delivery/amqp.py",
        "delivery/sasl.py",
    )
]
REFUSALS = {"Malformed", "Refused", "_refused", "_unauthenticated", "_reason"}
OBJECTING = [SOURCES / "delivery/amqp.py"]
OBJECTIONS = {"_object", "_record", "_refuse_link"}
TOGETHER = re.compile(r"malformed topic |no topic class |the topic class |stale timestamp: |wrong sign: ")


def reasons() -> set[str]:
    """The texts of refusals that stand in the code as they are shown."""
    found = said(REFUSING, REFUSALS) | said(OBJECTING, OBJECTIONS)
    return {text for text in found if not TOGETHER.match(text)} - {
        "{} reaches beyond the products of the application {}: {}"
    }


def said(paths: Iterable[Path], calls: set[str]) -> set[str]:
    """The texts that calls of these names are given, with `{}` for each value."""
    return {
        form
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        if ast.unparse(node.func).removeprefix("self.") in calls
        for argument in node.args
        if (form := form_of(argument))
    }


def written(paths: Iterable[Path]) -> set[str]:
    """All texts in these files."""
    return {
        form
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.expr) and (form := form_of(node))
    }


def faults() -> set[str]:
    """The texts of faults in the code."""
    return said(FAULTY, FAULTS)


def form_of(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
    return ""


def test_every_text_is_translated_and_none_is_left_over() -> None:
    """The templates' texts, the descriptions of the settings, and what the code says when something goes wrong."""
    wanted = (
        texts() | {info.description or "" for info in Settings.model_fields.values()} | faults() | FURTHER | reasons()
    )
    assert len(wanted) > 400
    assert wanted - set(catalogue("zh")) == set()
    left = set(catalogue("zh")) - wanted - written([*REFUSING, SOURCES / "core/topics.py"])
    assert {text for text in left if not TOGETHER.match(text)} == set()


@pytest.mark.parametrize(
    ("reason", "translation"),
    [
        (
            "no topic class of product a1 with the right to publish has the levels 'user/nope'. It may publish to /a1/d/update; "
            "add one with `uplinkd topic add a1 user/nope --right publish`",
            "产品 a1 没有层级为 'user/nope' 且可发布的 Topic 类。设备可发布到 /a1/d/update；可用 "
            "`uplinkd topic add a1 user/nope --right publish` 添加",
        ),
        (
            "wrong sign: the server signed 'clientIdc' with hmacsha1 and the DeviceSecret that it knows",
            "签名错误：服务器用它所知的 DeviceSecret 对 'clientIdc' 做 hmacsha1",
        ),
        ("malformed topic '/a//b': it has an empty level", "Topic '/a//b' 格式错误：含有空的层级"),
    ],
)
def test_why_a_device_was_refused_is_told_in_chinese(reason: str, translation: str) -> None:
    assert told("zh", reason) == translation


@pytest.mark.parametrize(
    ("reason", "translation"),
    [
        (
            "it answered 422 Unprocessable Entity, 16 times: no, thanks",
            "对方应答 422 Unprocessable Entity，16 次：no, thanks",
        ),
        ("it answered 400 Bad Request, once", "对方应答 400 Bad Request，1 次"),
        ("it was offered 16 times and not accepted", "投递 16 次均未确认"),
        (
            "consumer 'reader-1' of the group 'erp': no receiver link was opened within 15 s",
            "消费组 'erp' 的消费者 'reader-1'：15 秒内没有建立 receiver link",
        ),
        (
            "malformed topic filter '/a1*/x': * is no wildcard here: + is one level, # are all further ones",
            "Topic 过滤器 '/a1*/x' 格式错误：* 在此不是通配符：+ 表示一级，# 表示其后的所有层级",
        ),
    ],
)
def test_why_a_backend_got_nothing_is_told_in_chinese(reason: str, translation: str) -> None:
    """Also the cause at the end of a sentence, where it is known."""
    assert told("zh", reason) == translation


def test_a_fault_is_told_in_the_readers_language() -> None:
    """With its values; one that nobody foresaw stays as it is."""
    fault = "product 'a1' has no device 'x y'; `uplinkd device list a1` shows its devices"
    assert told("zh", fault) == "产品 'a1' 没有设备 'x y'；`uplinkd device list a1` 可列出其设备"
    assert told("en", fault) == fault
    assert told("zh", "sign in first") == "请先登录"
    assert told("zh", "something else {}") == "something else {}"
    assert told("zh", "") == ""


def test_a_translated_fault_has_each_of_its_values_once() -> None:
    """They are numbered, for they may change places."""
    for text in sorted(faults() | FURTHER | reasons()):
        places = sorted(re.findall(r"\{(\d+)\}", catalogue("zh")[text]))
        assert places == [str(place) for place in range(text.count("{}"))], text


def test_a_translation_keeps_the_places_for_values() -> None:
    """`%(name)s` and `{n}` stand in both."""
    for text, translation in catalogue("zh").items():
        places = re.compile(r"%\(\w+\)s|\{n\}")
        assert sorted(places.findall(text)) == sorted(places.findall(translation)), text


def test_no_english_is_left_in_a_template() -> None:
    """What people read between tags is marked for translation."""
    names = "uplinkd|ProductKey|DeviceName|DeviceSecret|ProductSecret|requestId|messageId|HTTPS?|MQTT|AMQP|curl|Bearer|Authorization"
    for template in TEMPLATES.glob("*.html"):
        bare = re.sub(r"\{%.*?%\}|\{\{.*?\}\}|<code.*?</code>|<[^>]*>", " ", template.read_text(), flags=re.DOTALL)
        left = [word for word in re.findall(r"[A-Za-z]{3,}", bare) if not re.fullmatch(names, word)]
        assert set(left) <= {"read", "operate", "admin", "true"}, (template.name, left)


@pytest.mark.parametrize(
    ("cookie", "header", "language"),
    [
        ("", "", "en"),
        ("", "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("", "de-DE,de;q=0.9,zh;q=0.5,en;q=0.3", "zh"),
        ("", "en;q=0.3,zh;q=0.9", "zh"),
        ("", "fr, ja;q=nonsense", "en"),
        ("language=en", "zh-CN", "en"),
        ("language=zh", "en", "zh"),
        ("language=xx", "zh", "zh"),
    ],
)
def test_the_browsers_language_holds_until_one_is_chosen(cookie: str, header: str, language: str) -> None:
    """Cookie, then Accept-Language by its weights, then English."""
    headers = [(b"cookie", cookie.encode()), (b"accept-language", header.encode())]
    assert language_of(Request({"type": "http", "headers": headers})) == language


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (200 * 2**20, "200 MiB"), (2**41, "2.0 TiB")],
)
def test_sizes_are_written_as_people_do(count: int | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (-5, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_ages_are_written_in_the_largest_unit_of_which_there_are_two(seconds: int, text: str) -> None:
    """And a clock that was set back makes nothing of the future."""
    assert age(round((time.time() - seconds) * 1000)) == text


def test_nothing_has_no_age() -> None:
    assert age(None) == "–"
