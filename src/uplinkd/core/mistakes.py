"""The usual mistakes in signing: which of them, alone or up to three together, make a given sign.

A sign is made in steps (members, values, order, text, key, construction), and at each step a firmware may go another way than
the protocol. All ways that are known are tried, those with the fewest detours first.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote, unquote

from uplinkd.core.signature import DEFAULT_METHOD, METHODS

__all__ = ["KINDS", "Explained", "Facts", "Mistake", "explain"]

_MOST = 3
_MAX_CONTENT = 1024  # characters: a usual login has 200, and up to some ten thousand signs are made of it
_SHORTEST = 8  # hex digits that are taken for the beginning of a sign; fewer prove nothing
_SDK_TIMESTAMP = "2524608000000"  # what Link SDKs sign over MQTT
_UNSIGNED = ("version", "sign", "signmethod")

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Mistake:
    """One detour: a stable `kind`, one sentence in English and in Chinese. `cost` 2 marks the far-fetched.

    `of_content`: the text that was signed is another than it must be.
    """

    kind: str
    text: str
    text_zh: str
    cost: int = 1
    of_content: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What a sign should have been made of. `members` in the signed order; `submitted` all that came, in the order in which it came;
    `method` a key of METHODS; `named` whether the device named it; `pasted` a content that the device is known to have signed."""

    members: Pairs
    submitted: Pairs
    method: str
    named: bool = True
    whole_client_id: str = ""
    pasted: str = ""


@dataclass(frozen=True, slots=True)
class Explained:
    """How the given sign was made: the detours, none when it is the right one, and the text that was signed."""

    mistakes: tuple[Mistake, ...]
    content: str


def explain(given: str, secret: str, facts: Facts) -> Explained | None:
    """The fewest mistakes that make `given` of `secret`; None when none of the known ones does."""
    wanted = _Given(given)
    if not wanted.hex or sum(len(name) + len(value) for name, value in facts.submitted) > _MAX_CONTENT:
        return None
    made = _ways_to_make(secret, facts)
    contents: dict[str, tuple[int, tuple[Mistake, ...]]] = {}
    for most in range(_MOST + 1):
        for detours, content in _contents(facts, most):
            contents.setdefault(content, (most, detours))
        for content, (content_cost, detours) in contents.items():
            message = content.encode(errors="surrogatepass")
            for ways, key, make in made[most - content_cost]:
                drawn = wanted.is_drawn_as(make(key, message))
                if drawn is not None:
                    return Explained((*detours, *ways, *drawn), content)
    return None


def _ways_to_make(secret: str, facts: Facts) -> list[list[tuple[tuple[Mistake, ...], bytes, Make]]]:
    """(detours, key, construction) by what they cost: at index 2 those of two mistakes."""
    by_cost: list[list[tuple[tuple[Mistake, ...], bytes, Make]]] = [[] for _ in range(_MOST + 1)]
    makers = list(_makers(facts))
    for way_to_key, key in _keys(secret, facts):
        for ways, make in makers:
            if (cost := _cost(way_to_key, *ways)) <= _MOST:
                by_cost[cost].append(((*((way_to_key,) if way_to_key else ()), *ways), key, make))
    return by_cost


# -- members, values, order, text


def _contents(facts: Facts, cost: int) -> Iterator[tuple[tuple[Mistake, ...], str]]:
    """(detours, content) of every way to the text that is signed whose detours cost just this; a text may come twice."""
    for of_set, members in _sets(facts):
        for of_values, valued in _values(facts, members):
            if (after_values := cost - _cost(of_set, of_values)) < 0:
                continue
            for of_order, ordered in _orders(facts, valued, after_values):
                after_order = after_values - _cost(of_order)
                for of_text, text in _texts(ordered, after_order):
                    for of_end, ended in _ends(text, after_order - _cost(of_text)):
                        yield tuple(each for each in (of_set, of_values, of_order, of_text, of_end) if each), ended
    if facts.pasted and cost == 1:
        yield (_PASTED,), facts.pasted


def _cost(*ways: Mistake | None) -> int:
    return sum(way.cost for way in ways if way)


_PASTED = Mistake(
    "pasted_content",
    "The sign is that of the content as it was pasted, which is another than the server signs.",
    "该签名与粘贴的 content 相符，但服务器签名的 content 与之不同。",
    of_content=True,
)


def _sets(facts: Facts) -> Iterator[tuple[Mistake | None, Pairs]]:
    """Which members were signed."""
    yield None, facts.members
    submitted = dict(facts.submitted)
    extra = {name: submitted[name] for name in submitted if name not in dict(facts.members)}
    extra.setdefault("version", "default")
    extra.setdefault("signmethod", facts.method)
    for name in sorted(extra):
        known = name if name in _UNSIGNED else "parameter"
        values = ("", extra[name]) if name == "sign" else (extra[name],)
        for value in values:
            mistake = Mistake(
                f"signed_{known}",
                f"The member {name!r} was signed too; version, sign and signmethod are not part of the content.",
                f"把 {name!r} 也拼进了 content；version、sign、signmethod 不参与签名。",
                of_content=True,
            )
            yield mistake, _sorted((*facts.members, (name, value)))
    everything = tuple(extra.items())
    mistake = Mistake(
        "signed_everything",
        f"All members were signed, {', '.join(sorted(extra))} included; version, sign and signmethod are not part of the content.",
        f"把所有字段（包括 {'、'.join(sorted(extra))}）都拼进了 content；version、sign、signmethod 不参与签名。",
        of_content=True,
    )
    yield mistake, _sorted((*facts.members, *everything))
    without_sign = tuple(pair for pair in everything if pair[0] != "sign")
    yield mistake, _sorted((*facts.members, *without_sign))
    for left_out, _ in facts.members:
        kind = "timestamp_not_signed" if left_out == "timestamp" else "member_not_signed"
        mistake = Mistake(
            kind,
            f"The member {left_out!r} is sent and was not signed; every member that is sent is signed.",
            f"提交了字段 {left_out!r} 却没有参与签名；凡提交的字段都要参与签名。",
            of_content=True,
        )
        yield mistake, tuple(pair for pair in facts.members if pair[0] != left_out)
    if "timestamp" not in submitted:
        mistake = Mistake(
            "timestamp_added",
            f"A timestamp, {_SDK_TIMESTAMP}, was signed and is not sent; what is signed must be sent.",
            f"签名中包含 timestamp（{_SDK_TIMESTAMP}），却没有提交；参与签名的字段必须提交。",
            of_content=True,
        )
        yield mistake, _sorted((*facts.members, ("timestamp", _SDK_TIMESTAMP)))


def _sorted(pairs: Pairs) -> Pairs:
    return tuple(sorted(pairs, key=lambda pair: pair[0]))


def _values(facts: Facts, members: Pairs) -> Iterator[tuple[Mistake | None, Pairs]]:
    """Which values were signed."""
    yield None, members
    values = dict(members)
    if "productKey" in values and "deviceName" in values:
        other = {"productKey": values["deviceName"], "deviceName": values["productKey"]}
        yield (
            Mistake(
                "swapped_names",
                "productKey and deviceName were signed with each other's value.",
                "签名时 productKey 与 deviceName 的值互换了。",
                of_content=True,
            ),
            tuple((name, other.get(name, value)) for name, value in members),
        )
    encoded = Mistake(
        "url_encoded",
        "The values were signed in URL encoding; they are signed as they are.",
        "签名时对值做了 URL 编码；应按原值签名。",
        of_content=True,
    )
    yield encoded, tuple((name, quote(value, safe="", errors="replace")) for name, value in members)
    yield (
        Mistake(
            "url_decoded",
            "The values are sent in URL encoding and were signed without it; what is sent is what is signed.",
            "提交的值经过 URL 编码，而签名用的是编码前的值；提交什么就签什么。",
            of_content=True,
        ),
        tuple((name, unquote(value, errors="replace")) for name, value in members),
    )
    if facts.whole_client_id:
        yield (
            Mistake(
                "whole_client_id",
                "The clientId was signed with its part between bars, |…|; only what stands before the first bar is signed.",
                "签名时 clientId 带上了竖线之间的 |…| 部分；只有第一个竖线之前的部分参与签名。",
                of_content=True,
            ),
            tuple((name, facts.whole_client_id if name == "clientId" else value) for name, value in members),
        )
    elif "|" in values.get("clientId", ""):
        yield (
            Mistake(
                "cut_client_id",
                "The clientId was signed up to its first bar alone; over HTTPS it is signed as it is sent, |…| included.",
                "签名时只用了 clientId 第一个竖线之前的部分；HTTPS 下提交什么就签什么，包括 |…|。",
                of_content=True,
            ),
            tuple((name, value.partition("|")[0] if name == "clientId" else value) for name, value in members),
        )
    number = re.compile(r"([0-9]{1,15})\.0*")
    yield (
        Mistake(
            "number_text",
            "A number was signed in another notation than it is sent in; its text is signed as it is sent.",
            "数字签名时的写法与提交时不同；应按提交的原文签名。",
            of_content=True,
        ),
        tuple((name, whole[1] if (whole := number.fullmatch(value)) else value) for name, value in members),
    )
    yield (
        Mistake(
            "value_whitespace",
            "Values are sent with white space around them and were signed without it; they are signed as they are sent.",
            "提交的值前后带有空白，而签名时去掉了；提交什么就签什么。",
            of_content=True,
        ),
        tuple((name, value.strip()) for name, value in members),
    )


def _orders(facts: Facts, members: Pairs, left: int) -> Iterator[tuple[Mistake | None, Pairs]]:
    """In which order they were signed; `left` is what this way and those that follow may cost."""
    yield None, members
    if left >= 1:
        rank = {name: index for index, (name, _) in enumerate(facts.submitted)}
        yield _AS_SENT, tuple(sorted(members, key=lambda pair: rank.get(pair[0], len(rank))))
        yield _CASELESS, tuple(sorted(members, key=lambda pair: pair[0].lower()))
        yield _BACKWARDS, members[::-1]
    if left >= 2 and len(members) <= 4:
        for order in itertools.permutations(members):
            names = [name for name, _ in order]
            yield _unsorted("signed as " + ", ".join(names), "按 " + "、".join(names) + " 的顺序签名", 2), order


def _unsorted(how: str, how_zh: str, cost: int = 1) -> Mistake:
    return Mistake(
        "unsorted",
        f"The members were not sorted by name ({how}); they are signed in the order of their names.",
        f"各字段没有按名称排序（{how_zh}）；应按名称升序拼接。",
        cost,
        of_content=True,
    )


_AS_SENT = _unsorted("signed in the order in which they were sent", "按提交顺序签名")
_CASELESS = _unsorted("signed without regard to letter case", "排序时忽略了大小写")
_BACKWARDS = _unsorted("signed backwards", "按名称降序签名")


def _texts(members: Pairs, left: int) -> Iterator[tuple[Mistake | None, str]]:
    """How names and values were put together."""
    yield None, "".join([name + value for name, value in members])
    if not left:
        return
    for mistake, joint, between in _SEPARATED:
        yield mistake, between.join([name + joint + value for name, value in members])
    for mistake, between in _VALUES_ONLY:
        yield mistake, between.join([value for _, value in members])
    for separators in ((",", ":"), (", ", ": ")):
        yield _JSON, json.dumps(dict(members), separators=separators, ensure_ascii=False)


def _separated(joint: str, between: str) -> Mistake:
    shown = f"name{joint}value{between}name{joint}value".replace("\n", "\\n")
    return Mistake(
        "separators",
        f"The members were joined as {shown}; names and values follow one another without separators.",
        f"各字段拼接成了 {shown} 的形式；名与值应直接拼接，不加任何分隔符。",
        of_content=True,
    )


def _values_only(between: str) -> Mistake:
    return Mistake(
        "values_only",
        f"The values were signed without their names{f', joined by {between}' if between else ''}; name and value are both signed.",
        f"只签了值而没有名称{f'，以 {between} 连接' if between else ''}；名与值都要参与签名。",
        of_content=True,
    )


_SEPARATED = tuple(
    (_separated(joint, between), joint, between)
    for joint, between in itertools.product(("", "=", ":"), ("", "&", ",", ";", "|", " ", "\n"))
    if joint or between
)
_VALUES_ONLY = tuple((_values_only(between), between) for between in ("", "&", ","))
_JSON = Mistake(
    "signed_json",
    "The JSON text was signed; names and values are signed one after another, without braces, quotes and commas.",
    "对 JSON 文本签名了；应把名与值直接拼接，不带花括号、引号和逗号。",
    of_content=True,
)


def _ends(text: str, left: int) -> Iterator[tuple[Mistake | None, str]]:
    """What was done to the whole text, where all of `left` is spent by it."""
    if left == 0:
        yield None, text
    elif left == 1:
        for mistake, end in _TRAILING:
            yield mistake, text + end
        yield _LOWER, text.lower()
        yield _UPPER, text.upper()


_TRAILING = tuple(
    (
        Mistake(
            "trailing_character",
            f"The content was signed with {name} at its end (echo, or sizeof for strlen?); it ends with the last value.",
            f"签名的 content 末尾多了{name_zh}（是否来自 echo，或把 sizeof 当作 strlen？）；content 到最后一个值为止。",
            of_content=True,
        ),
        end,
    )
    for end, name, name_zh in (
        ("\n", "a line feed", "换行符"),
        ("\r\n", "a carriage return and a line feed", "回车换行符"),
        ("\0", "the zero byte that ends a C string", "C 字符串结尾的零字节"),
        (" ", "a space", "空格"),
    )
)


def _other_case(case: str, case_zh: str) -> Mistake:
    return Mistake(
        "content_case",
        f"The content was turned into {case} case before it was signed; its letters are signed as they are sent.",
        f"签名前把 content 转成了{case_zh}；应保持提交时的大小写。",
        of_content=True,
    )


_LOWER, _UPPER = _other_case("lower", "小写"), _other_case("upper", "大写")


# -- key and construction


def _keys(secret: str, facts: Facts) -> Iterator[tuple[Mistake | None, bytes]]:
    raw = secret.encode(errors="surrogatepass")
    yield None, raw
    padded = Mistake(
        "padded_secret",
        "The DeviceSecret was used with white space or quotes around it (a line feed read from a file?); it is used as it is.",
        "使用的 DeviceSecret 前后带有空白或引号（是否从文件读入了换行？）；应原样使用。",
    )
    for before, after in (
        ("", "\n"),
        ("", "\r\n"),
        ("", "\r"),
        ("", " "),
        (" ", ""),
        ("\t", ""),
        ('"', '"'),
        ("'", "'"),
    ):
        yield padded, before.encode() + raw + after.encode()
    decoded = Mistake(
        "decoded_secret",
        "The DeviceSecret was decoded, as if it were hexadecimal or base64; its characters themselves are the key.",
        "把 DeviceSecret 当作十六进制或 base64 解码了；密钥就是这些字符本身。",
    )
    for decode in (bytes.fromhex, base64.b64decode):
        try:
            yield decoded, decode(secret)
        except (ValueError, binascii.Error):
            continue
    encoded = Mistake(
        "encoded_secret",
        "The DeviceSecret was encoded in hexadecimal or base64 first; its characters themselves are the key.",
        "先把 DeviceSecret 编码成了十六进制或 base64；密钥就是这些字符本身。",
    )
    yield encoded, raw.hex().encode()
    yield encoded, base64.b64encode(raw)
    case = Mistake(
        "secret_case",
        "The DeviceSecret was used in another letter case; upper and lower case are not the same in it.",
        "使用的 DeviceSecret 大小写不对；密钥区分大小写。",
    )
    yield case, secret.lower().encode(errors="surrogatepass")
    yield case, secret.upper().encode(errors="surrogatepass")
    names = dict(facts.members)
    other = Mistake(
        "name_for_secret",
        "The key was empty, or the productKey, deviceName or clientId; it must be the DeviceSecret.",
        "所用密钥为空，或者是 productKey、deviceName、clientId；密钥必须是 DeviceSecret。",
    )
    for key in ("", *(names.get(name, "") for name in ("productKey", "deviceName", "clientId"))):
        yield other, key.encode(errors="surrogatepass")
    # A buffer of 32 bytes holds 31 characters and the zero byte.
    for length in range(1, min(len(raw), 64)):
        yield _trimmed(), raw[:length]
        yield _trimmed(), raw[length:]


def _trimmed() -> Mistake:
    return Mistake(
        "trimmed_secret",
        "Only a part of the DeviceSecret was used (a buffer one byte too short?); all of its characters are the key.",
        "只用了 DeviceSecret 的一部分（缓冲区是否少了一个字节？）；全部字符都是密钥。",
        2,
    )


Make = Callable[[bytes, bytes], bytes]
Put = Callable[[bytes, bytes], bytes]

_SWAPPED = Mistake(
    "swapped_key",
    "Key and message were swapped: the content was the HMAC's key; the DeviceSecret is the key.",
    "HMAC 的密钥与消息互换了：把 content 当成了密钥；密钥应为 DeviceSecret。",
)


def _makers(facts: Facts) -> Iterator[tuple[tuple[Mistake, ...], Make]]:
    """What may be computed of key and message."""
    for method, digest in METHODS.items():
        ways = () if method == facts.method else (_other_method(method, facts),)
        yield ways, partial(_hmac, digest)
        yield (*ways, _SWAPPED), partial(_swapped, digest)
        for how, how_zh, put in _PLAIN:
            plain = Mistake(
                "plain_hash",
                f"The sign is a plain {digest} of {how}; it must be an HMAC, with the DeviceSecret as its key.",
                f"该签名是对{how_zh}直接做的 {digest} 摘要；应使用以 DeviceSecret 为密钥的 HMAC。",
            )
            yield (*ways, plain), partial(_plain, digest, put)


def _hmac(digest: str, key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, digest)


def _swapped(digest: str, key: bytes, message: bytes) -> bytes:
    return hmac.digest(message, key, digest)


def _plain(digest: str, put: Put, key: bytes, message: bytes) -> bytes:
    return hashlib.new(digest, put(key, message)).digest()


_PLAIN: tuple[tuple[str, str, Put], ...] = (
    ("content and secret", "“content + 密钥”", lambda key, message: message + key),
    ("secret and content", "“密钥 + content”", lambda key, message: key + message),
    ("secret, content and secret", "“密钥 + content + 密钥”", lambda key, message: key + message + key),
    ("the content alone", "content 本身（没有密钥）", lambda _, message: message),
)


def _other_method(method: str, facts: Facts) -> Mistake:
    if facts.named:
        said, said_zh = f"signmethod says {facts.method}", f"signmethod 为 {facts.method}"
    else:
        said, said_zh = (
            f"signmethod is not sent, so {DEFAULT_METHOD} is expected",
            f"没有提交 signmethod，默认为 {DEFAULT_METHOD}",
        )
    return Mistake(
        "other_method",
        f"The sign was made with {method}, while {said}; the two must agree.",
        f"该签名由 {method} 计算，而{said_zh}；两者必须一致。",
    )


# -- how the sign is written


class _Given:
    """A sign as it was given, and in which ways it may be drawn from a digest. `hex` is empty when it is no sign at all."""

    def __init__(self, text: str) -> None:
        self.hex = ""
        self._ways: tuple[Mistake, ...] = ()
        stripped = re.sub(r"^0[xX]|[\s:-]", "", text)
        if re.fullmatch(r"[0-9A-Fa-f]+", stripped):
            self.hex = stripped.lower()
            self._ways = () if stripped == text else (_DECORATED,)
        elif (raw := _of_base64(text)) is not None:
            self.hex, self._ways = raw.hex(), (_BASE64,)
            if len(raw) in (32, 40, 64) and re.fullmatch(rb"[0-9A-Fa-f]+", raw):
                self.hex = raw.decode().lower()
        if len(self.hex) < _SHORTEST:
            self.hex = ""

    def is_drawn_as(self, digest: bytes) -> tuple[Mistake, ...] | None:
        """The detours from `digest` to this text; None when it is another's."""
        right = digest.hex()
        if right == self.hex:
            return self._ways
        if len(self.hex) < len(right):
            if right.startswith(self.hex):
                return (*self._ways, _TRUNCATED)
            if "".join(f"{byte:x}" for byte in digest) == self.hex:
                return (*self._ways, _LOST_ZEROS)
        elif len(self.hex) > len(right):
            if self.hex.startswith(right):
                return (*self._ways, _OVERLONG)
            if "".join(f"{byte:02x}" if byte < 128 else f"ffffff{byte:02x}" for byte in digest) == self.hex:
                return (*self._ways, _SIGN_EXTENDED)
        return None


def _of_base64(text: str) -> bytes | None:
    bare = text.strip().replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except (ValueError, binascii.Error):
        return None


_DECORATED = Mistake(
    "decorated_sign",
    "The sign is written with 0x, white space or separators; it is hexadecimal digits alone.",
    "签名带有 0x、空白或分隔符；应只有十六进制数字。",
)
_BASE64 = Mistake(
    "base64_sign",
    "The sign is written in base64; it must be hexadecimal.",
    "签名写成了 base64；应为十六进制。",
)
_TRUNCATED = Mistake(
    "truncated_sign",
    "Only the beginning of the sign is there; all of its digits must be sent.",
    "签名只有开头一部分；必须提交全部数字。",
)
_OVERLONG = Mistake(
    "overlong_sign",
    "More digits follow the sign; it must be sent alone (is a buffer longer than the digest?).",
    "签名之后还有多余数字；应只提交签名（缓冲区是否比摘要长？）。",
)
_LOST_ZEROS = Mistake(
    "lost_zeros",
    "The sign lacks the leading zero of some bytes (%x where %02x is meant); each byte is two digits.",
    "部分字节缺少前导零（误用 %x 而不是 %02x）；每个字节应为两位数字。",
)
_SIGN_EXTENDED = Mistake(
    "sign_extended",
    "Bytes from 80 to ff are written as ffffff80 and so on (a signed char was printed); cast each byte to unsigned char.",
    "80 至 ff 的字节被写成了 ffffff80 之类（打印了有符号 char）；请先转换为 unsigned char。",
)

KINDS = frozenset(
    {
        "base64_sign",
        "content_case",
        "cut_client_id",
        "decoded_secret",
        "decorated_sign",
        "encoded_secret",
        "lost_zeros",
        "member_not_signed",
        "name_for_secret",
        "number_text",
        "other_method",
        "overlong_sign",
        "padded_secret",
        "pasted_content",
        "plain_hash",
        "secret_case",
        "separators",
        "sign_extended",
        "signed_everything",
        "signed_json",
        "signed_parameter",
        "signed_sign",
        "signed_signmethod",
        "signed_version",
        "swapped_key",
        "swapped_names",
        "timestamp_added",
        "timestamp_not_signed",
        "trailing_character",
        "trimmed_secret",
        "truncated_sign",
        "unsorted",
        "url_decoded",
        "url_encoded",
        "value_whitespace",
        "values_only",
        "whole_client_id",
    }
)
"""Every kind that a Mistake may have."""
