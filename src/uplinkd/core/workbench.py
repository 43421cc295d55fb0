"""The signature workbench: what is wrong with a login that a firmware engineer pastes.

The rules themselves are those of `wire` and `signature`, which say no in English; here each no gets a stable kind and its
Chinese sentence, and a sign that is wrong is explained by the mistake that makes it. No text ever holds the secret.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from uplinkd.core import mistakes, names, pasted, signature, wire
from uplinkd.core.errors import Refused, Rejected
from uplinkd.core.pasted import Pasted

__all__ = ["KINDS", "MAX_TEXT", "Examined", "Finding", "examine", "names_in"]

MAX_TEXT = pasted.MAX_TEXT
_SHOWN = 400
_SHORTEST_TRACE = 8  # of a secret that was cut in a quotation: so many of its characters are taken for it
_DAY = 86_400_000
_ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `kind` is one of KINDS; `good`: it is in order."""

    kind: str
    good: bool
    text: str
    text_zh: str


@dataclass(frozen=True, slots=True)
class Examined:
    """What was pasted, as the server understands it.

    `source` is http (JSON of POST /auth), mqtt (clientId, user name and password of CONNECT) or content (the bare content).
    `content` is what must be signed, empty if it cannot be told; `members` are its name/value pairs in the signed order.
    `given` is the sign that was pasted; `expected` what the server computes, empty without a secret, for eyes alone that may see
    the secret. `matches` is None where there is nothing to compare. `first_difference` is an index from 0: where the pasted
    content leaves the right one, else where `given` leaves `expected`, letter case aside. `skew_ms` is the device's timestamp
    minus now. `findings`: the most important first.
    """

    source: str
    product_key: str
    device_name: str
    client_id: str
    method: str
    content: str = field(repr=False)
    members: tuple[tuple[str, str], ...] = field(repr=False)
    given: str = field(repr=False)
    expected: str = field(repr=False)
    matches: bool | None
    first_difference: int | None
    skew_ms: int | None
    findings: tuple[Finding, ...]


def examine(text: str, *, secret: str | None, now: int, window: int) -> Examined:
    """What `text` says and what is wrong with it, of any text at all.

    `secret` is the DeviceSecret, None where it is not known; `now` and `window` are ms, a window of 0 is not checked.
    """
    found = pasted.read(text)
    secret = secret or None
    masked = _Mask(secret)
    login = _READERS[found.source](found)
    bad = [Finding(each.kind, False, masked(each.text), masked(each.text_zh)) for each in found.faults]
    bad += [Finding(kind, False, masked(text), masked(text_zh)) for kind, text, text_zh in login.faults]
    bad += _odd_names(login, masked)
    if secret and _sends(found, secret):
        bad.append(
            Finding(
                "secret_sent",
                False,
                "The DeviceSecret itself is in the text that the device sends; it never leaves the device. Give it a new one.",
                "设备发送的内容里带有 DeviceSecret 本身；密钥绝不能离开设备，请更换密钥。",
            )
        )
    good: list[Finding] = []
    expected, matches = "", None
    difference = _difference(found.content, login.content) if found.content and login.content else None
    if difference is not None:
        bad.insert(0, _other_content(found.content, difference, masked))
    elif found.content and login.content:
        good.append(
            Finding(
                "content_ok",
                True,
                "The pasted content is exactly what the server signs.",
                "粘贴的 content 与服务器签名的完全一致。",
            )
        )
    if secret and login.content and login.method in signature.METHODS:
        expected = signature.sign(secret, login.content, login.method) if _is_text(secret + login.content) else ""
    if expected and login.sign:
        matches = expected == login.sign.lower()
        if matches:
            good.append(_right_sign(login))
        else:
            difference = _difference(login.sign.lower(), expected) if difference is None else difference
            bad = _why_wrong(login, found, secret or "", masked) + bad
    elif login.sign and secret is None:
        bad += _without_secret(login)
    skew = None if login.timestamp is None else login.timestamp - now
    if skew is not None:
        clock = _clock(login, skew, now, window)
        (good if clock.good else bad).append(clock)
    if matches and not bad:
        good.insert(0, _ok(login))
    return Examined(
        source=found.source,
        product_key=login.product_key,
        device_name=login.device_name,
        client_id=login.client_id,
        method=login.method,
        content=login.content,
        members=login.members,
        given=login.sign,
        expected=expected,
        matches=matches,
        first_difference=difference,
        skew_ms=skew,
        findings=(*bad, *good),
    )


def names_in(text: str) -> tuple[str, str]:
    """(productKey, deviceName) where they can be read from the text, so that the secret can be looked up; empty where not."""
    found = pasted.read(text)
    login = _READERS[found.source](found)
    return login.product_key, login.device_name


# -- the login behind what was pasted


@dataclass(frozen=True, slots=True)
class _Login:
    """A login, whether the server would take it or not. `faults`: (kind, English, Chinese) of what it would not take."""

    source: str
    product_key: str = ""
    device_name: str = ""
    client_id: str = ""
    sign: str = ""
    method: str = ""
    named: bool = False
    timestamp: int | None = None
    content: str = ""
    members: tuple[tuple[str, str], ...] = ()
    submitted: tuple[tuple[str, str], ...] = ()
    whole_client_id: str = ""
    faults: tuple[tuple[str, str, str], ...] = ()


def _http(found: Pasted) -> _Login:
    values: dict[str, str] = {}
    for name, value in found.pairs:
        values.setdefault(name, value)
    repeated = len(values) < len(found.pairs)
    required = all(values.get(name) for name in ("productKey", "deviceName", "clientId"))
    told = required and not repeated and not found.opaque.difference(("sign", "signmethod", "version"))
    members = tuple((name, values[name]) for name in sorted(values) if name not in ("version", "sign", "signmethod"))
    return _Login(
        "http",
        product_key=values.get("productKey", ""),
        device_name=values.get("deviceName", ""),
        client_id=values.get("clientId", ""),
        sign=values.get("sign", ""),
        method=values.get("signmethod", signature.DEFAULT_METHOD).lower(),
        named="signmethod" in values,
        timestamp=_milliseconds(values.get("timestamp")),
        content=signature.content_of(values) if told else "",
        members=members if told else (),
        submitted=tuple(values.items()),
        faults=tuple(_http_faults(found)),
    )


def _http_faults(found: Pasted) -> Iterator[tuple[str, str, str]]:
    """Each rule of POST /auth that is broken: what wire.login refuses is mended here and shown to it again."""
    body = found.body
    for _ in range(_ROUNDS):
        try:
            wire.login(body.encode(errors="surrogatepass"))
        except Refused as refused:
            kind, english, chinese, member = _words_of(refused.reason)
            yield kind, english, chinese
            mended = _mended(body, kind, member)
            if mended is None:
                return
            body = mended
        else:
            return


def _mended(body: str, kind: str, member: str) -> str | None:
    """The body without the fault that was just told, so that the next shows; None where there is no going on."""
    if kind not in (
        "missing_member",
        "wrong_type",
        "duplicate_member",
        "long_client_id",
        "unknown_method",
        "bad_timestamp",
    ):
        return None
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if kind in ("unknown_method", "bad_timestamp"):
        values.pop("signmethod" if kind == "unknown_method" else "timestamp", None)
    elif kind != "duplicate_member":
        values["clientId" if kind == "long_client_id" else member] = "0"
    try:
        return json.dumps(values)
    except (ValueError, RecursionError):
        return None


_PARAMETERS = re.compile(r"([^|]*)\|([^|]*)")


def _mqtt(found: Pasted) -> _Login:
    device_name, _, product_key = found.username.rpartition("&")
    parts = _PARAMETERS.match(found.client_id)
    client_id = parts[1] if parts else found.client_id
    parameters = dict(part.partition("=")[::2] for part in parts[2].split(",") if part) if parts else {}
    values = {"clientId": client_id, "deviceName": device_name, "productKey": product_key}
    if "timestamp" in parameters:
        values["timestamp"] = parameters["timestamp"]
    told = all((client_id, device_name, product_key))
    try:
        wire.mqtt_login(found.client_id, found.username, found.password.encode(errors="replace"))
        refusal: tuple[tuple[str, str, str], ...] = ()
    except Refused as refused:
        refusal = (_words_of(refused.reason)[:3],)
    if not found.password:
        missing = "The password is missing; it is the sign.", "缺少 password；它就是签名。"
        refusal += (("missing_member", *missing),)
    return _Login(
        "mqtt",
        product_key=product_key,
        device_name=device_name,
        client_id=client_id,
        sign=found.password,
        method=parameters.get("signmethod", signature.DEFAULT_METHOD).lower(),
        named="signmethod" in parameters,
        timestamp=_milliseconds(parameters.get("timestamp")),
        content=signature.content_of(values) if told else "",
        members=tuple(values.items()) if told else (),
        submitted=tuple({**values, **parameters}.items()),
        whole_client_id=found.client_id if parts else "",
        faults=refusal,
    )


def _content(found: Pasted) -> _Login:
    values: dict[str, str] = {}
    for name, value in found.pairs:
        values.setdefault(name, value)
    product_key, device_name, client_id = (values.get(name, "") for name in ("productKey", "deviceName", "clientId"))
    told = all((product_key, device_name, client_id))
    faults: list[tuple[str, str, str]] = []
    if not found.pairs and not found.faults:
        faults.append(
            (
                "nothing_recognised",
                "This is neither the JSON of POST /auth nor the parameters of an MQTT CONNECT nor a content "
                "(clientId…deviceName…productKey…).",
                "这既不是 POST /auth 的 JSON，也不是 MQTT CONNECT 的参数，也不是 content（clientId…deviceName…productKey…）。",
            )
        )
    elif not told and not found.faults:
        for name in ("clientId", "deviceName", "productKey"):
            if not values.get(name):
                faults.append(
                    (
                        "missing_member",
                        f"The content has no {name!r}; it is always signed.",
                        f"content 中没有 {name!r}；它必须参与签名。",
                    )
                )
    stated = (found.method or values.get("signmethod", "")).lower()
    digits = {digits: method for method, digits in signature.HEX_DIGITS.items()}
    if stated and stated not in signature.METHODS:
        faults.append(_words_of(_unknown_method(stated))[:3])
    return _Login(
        "content",
        product_key=product_key,
        device_name=device_name,
        client_id=client_id,
        sign=found.sign,
        method=stated or digits.get(len(found.sign), signature.DEFAULT_METHOD),
        named=bool(stated),
        timestamp=_milliseconds(values.get("timestamp")),
        content=signature.content_of(values) if told else "",
        members=tuple((name, values[name]) for name in sorted(values) if name not in ("version", "signmethod"))
        if told
        else (),
        submitted=tuple(values.items()),
        faults=tuple(faults),
    )


_READERS = {"http": _http, "mqtt": _mqtt, "content": _content}


def _unknown_method(method: str) -> str:
    """The reason that wire gives for it."""
    try:
        wire.mqtt_login(f"x|signmethod={re.sub('[|,]', '', method)}|", "d&p", b"0")
    except Refused as refused:
        return refused.reason
    return f"signmethod {method!r} is not known; it is one of {', '.join(signature.METHODS)}"


def _milliseconds(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,15}", text) else None


# -- wire's reasons, with a kind and in Chinese

_REASONS: tuple[tuple[str, re.Pattern[str], str], ...] = tuple(
    (kind, re.compile(pattern, re.DOTALL), chinese)
    for kind, pattern, chinese in (
        ("too_long", r"the body has (\d+) bytes; at most (\d+) are allowed", "请求体有 {0} 字节，最多 {1} 字节"),
        ("empty", r"the body is empty.*", "请求体为空；必须是 JSON 对象"),
        ("not_text", r"the body is not UTF-8: byte (\d+) is wrong", "请求体不是 UTF-8：第 {0} 个字节有误"),
        ("not_text", r"a member holds half of a UTF-16 surrogate pair.*", "某个字段含有半个 UTF-16 代理对，不是字符"),
        ("not_json", r"the body is not JSON: (.*) at character (\d+)", "请求体不是 JSON：第 {1} 个字符处有误（{0}）"),
        ("not_json", r"the body is not a login: it is nested too deeply", "请求体嵌套过深，不是登录信息"),
        ("not_json", r"the body is a JSON (\w+); it must be an object", "请求体是 JSON {0}，必须是对象"),
        ("duplicate_member", r"the member (.*) is there twice", "字段 {0} 出现了两次；无法确定签名的是哪一个"),
        (
            "wrong_type",
            r"the member (.*) is a JSON (\w+); it must be text or a number",
            "字段 {0} 是 JSON {1}，必须是文本或数字",
        ),
        ("wrong_type", r"the member (.*) is a number; .*", "字段 {0} 是数字，必须是非空字符串"),
        ("missing_member", r"the member (.*) is missing", "缺少字段 {0}"),
        ("missing_member", r"the member (.*) is empty; .*", "字段 {0} 为空，必须是非空字符串"),
        (
            "long_client_id",
            r"clientId has (\d+) characters; at most (\d+) are allowed",
            "clientId 有 {0} 个字符，最多 {1} 个",
        ),
        ("unknown_method", r"signmethod (.*) is not known; it is one of (.*)", "signmethod {0} 不受支持；可用的有 {1}"),
        ("bad_timestamp", r"timestamp (.*) is not a whole number .*", "timestamp {0} 不是 1970 年以来的毫秒整数"),
        ("bad_username", r"the user name is (.*); it must be .*", "用户名为 {0}；必须是 deviceName&productKey"),
        (
            "bad_client_id",
            r"the clientId is (.*); it must be .*",
            "clientId 为 {0}；必须形如 ID|securemode=…,signmethod=…|",
        ),
        ("auth_type", r"authType is (.*): .*", "authType 为 {0}：只允许拥有自己密钥的设备登录"),
    )
)


def _words_of(reason: str) -> tuple[str, str, str, str]:
    """(kind, English, Chinese, the member or first value that it names) of a reason that wire gives."""
    for kind, pattern, chinese in _REASONS:
        if match := pattern.fullmatch(reason):
            first = (match.groups() or ("",))[0]
            quoted = first[1:-1] if first[:1] in ("'", '"') else first
            return kind, _sentence(reason), chinese.format(*match.groups()) + "。", quoted
    return "refused", _sentence(reason), f"服务器拒绝：{reason}。", ""


def _sentence(reason: str) -> str:
    # clientId, signmethod and the like keep their spelling.
    start = reason[:1].upper() if reason.startswith(("the ", "a ")) else reason[:1]
    return start + reason[1:] + "."


# -- findings


class _Mask:
    """Keeps a secret out of what is quoted."""

    def __init__(self, secret: str | None) -> None:
        whole = {secret, repr(secret)[1:-1], ascii(secret)[1:-1], json.dumps(secret)[1:-1]} if secret else set()
        self._all = sorted(whole, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._all:
            text = text.replace(secret, "***")
            for length in range(len(secret) - 1, _SHORTEST_TRACE - 1, -1):
                if secret[:length] in text:
                    text = text.replace(secret[:length], "***")
        return text

    def quoted(self, value: str) -> str:
        value = self(value)
        return repr(value if len(value) <= _SHOWN else value[:_SHOWN] + "…")


def _sends(found: Pasted, secret: str) -> bool:
    """Whether the secret is a value of its own in what is sent; a part of a value may be chance."""
    return secret in (found.client_id, found.password, *(value for name, value in found.pairs if name != "clientId"))


def _odd_names(login: _Login, masked: _Mask) -> list[Finding]:
    """Names that no product and no device can have."""
    found = []
    for name, value, check, rule in (
        ("productKey", login.product_key, names.check_product_key, "1 至 30 个字母或数字"),
        ("deviceName", login.device_name, _device_name, "1 至 64 个字符：字母、数字和 - _ @ . :"),
    ):
        try:
            if value:
                check(value)
        except Rejected as rejected:
            english = f"No device is called so: {masked(str(rejected))[:_SHOWN]}."
            chinese = f"不可能存在这样的设备：{name} {masked.quoted(value[:64])} 不符合规则（{rule}）。"
            found.append(Finding("impossible_name", False, english, chinese))
    return found


def _device_name(text: str) -> str:
    return names.check_device_name(text, imported=True)


def _other_content(content: str, difference: int, masked: _Mask) -> Finding:
    rest = masked.quoted(content[difference : difference + 40])
    return Finding(
        "wrong_content",
        False,
        f"The pasted content is not what the server signs: they differ from character {difference} (counted from 0), at {rest}; "
        "it is every member but version, sign and signmethod, sorted by name, names and values without separators.",
        f"粘贴的 content 与服务器签名的不同：从第 {difference} 个字符（从 0 数起）开始不一致，此处为 {rest}；content 是除 version、"
        "sign、signmethod 外的所有字段，按名称升序，名与值依次直接拼接。",
    )


def _right_sign(login: _Login) -> Finding:
    return Finding(
        "sign_ok",
        True,
        f"The sign is right: {login.method} of the content with this device's DeviceSecret.",
        f"签名正确：用该设备的 DeviceSecret 对 content 做 {login.method}。",
    )


def _why_wrong(login: _Login, found: Pasted, secret: str, masked: _Mask) -> list[Finding]:
    """The mistakes that make this sign, then what the server does instead."""
    facts = mistakes.Facts(
        members=login.members,
        submitted=login.submitted,
        method=login.method,
        named=login.named,
        whole_client_id=login.whole_client_id,
        pasted=found.content,
    )
    explained = mistakes.explain(login.sign, secret, facts)
    digits = signature.HEX_DIGITS[login.method]
    findings = []
    if explained and explained.mistakes:
        for each in explained.mistakes:
            english, chinese = _named(each.text, masked, login), _named(each.text_zh, masked, login)
            if each.of_content:
                english += f" The sign is that of {masked.quoted(explained.content)}."
                chinese += f"该签名对应的原文是 {masked.quoted(explained.content)}。"
            findings.append(Finding(each.kind, False, english, chinese))
    elif not re.fullmatch(r"[0-9A-Fa-f]+", login.sign):
        findings.append(
            Finding(
                "not_hex",
                False,
                f"The sign holds characters that are no hexadecimal digits; {login.method} gives {digits} of 0-9 and a-f.",
                f"签名含有非十六进制字符；{login.method} 的结果是 {digits} 位 0-9、a-f。",
            )
        )
    elif len(login.sign) != digits:
        findings.append(
            Finding(
                "sign_length",
                False,
                f"The sign has {len(login.sign)} digits; {login.method} gives {digits}.",
                f"签名有 {len(login.sign)} 位；{login.method} 应为 {digits} 位。",
            )
        )
    else:
        findings.append(
            Finding(
                "unexplained",
                False,
                "None of the usual mistakes makes this sign: the device most likely has another DeviceSecret (or its ProductSecret), "
                "or signs other values than it sends.",
                "常见错误都得不到这个签名：设备很可能使用了另一个 DeviceSecret（或 ProductSecret），或者签名的值与提交的值不同。",
            )
        )
    content = masked.quoted(login.content)
    findings.append(
        Finding(
            "wrong_sign",
            False,
            f"The sign is not the server's: the server signs {content} with {login.method} and the DeviceSecret that it knows.",
            f"签名与服务器的不一致：服务器用它所知的 DeviceSecret 对 {content} 做 {login.method}。",
        )
    )
    return findings


def _named(text: str, masked: _Mask, login: _Login) -> str:
    """A mistake's sentence may name members, and nothing else of the device's."""
    return masked(text) if any(masked(name) != name for name, _ in login.submitted) else text


def _without_secret(login: _Login) -> list[Finding]:
    findings = [
        Finding(
            "no_secret",
            False,
            "The sign was not compared: the DeviceSecret is not known here. Is the device registered under these names?",
            "没有比对签名：这里没有该设备的 DeviceSecret。该设备是否以这些名称登记过？",
        )
    ]
    digits = signature.HEX_DIGITS.get(login.method)
    if digits and (len(login.sign) != digits or not re.fullmatch(r"[0-9A-Fa-f]+", login.sign)):
        findings.insert(
            0,
            Finding(
                "sign_length",
                False,
                f"The sign has {len(login.sign)} characters; {login.method} gives {digits} hexadecimal digits.",
                f"签名有 {len(login.sign)} 个字符；{login.method} 应为 {digits} 位十六进制数字。",
            ),
        )
    return findings


def _clock(login: _Login, skew: int, now: int, window: int) -> Finding:
    off, off_zh = ("ahead of", "快") if skew > 0 else ("behind", "慢")
    seconds = f"{abs(skew) / 1000:.0f}"
    if login.source == "mqtt":
        return Finding(
            "clock_not_checked",
            True,
            f"The timestamp {login.timestamp} is signed and not held against the clock, over MQTT.",
            f"timestamp {login.timestamp} 参与签名；MQTT 登录不校验时间。",
        )
    if not window:
        return Finding(
            "clock_not_checked",
            True,
            f"The timestamp {login.timestamp} is {seconds} s {off} the server's clock, which is not checked (timestamp_window is 0).",
            f"timestamp {login.timestamp} 比服务器时钟{off_zh} {seconds} 秒；服务器不校验时间（timestamp_window 为 0）。",
        )
    if abs(skew) <= window:
        return Finding(
            "clock_ok",
            True,
            f"The timestamp is {seconds} s {off} the server's clock; at most {window / 1000:g} s are allowed.",
            f"timestamp 比服务器时钟{off_zh} {seconds} 秒；最多允许 {window / 1000:g} 秒。",
        )
    if login.timestamp is not None and abs(login.timestamp * 1000 - now) < _DAY:
        return Finding(
            "timestamp_in_seconds",
            False,
            f"The timestamp {login.timestamp} is in seconds; it must be in milliseconds since 1970.",
            f"timestamp {login.timestamp} 以秒为单位；必须是 1970 年以来的毫秒数。",
        )
    # Of the bare content nobody knows over which door it goes.
    unknown = login.source == "content"
    over, over_zh = (" over HTTPS; over MQTT it is not checked", "（HTTPS；MQTT 不校验）") if unknown else ("", "")
    return Finding(
        "stale_timestamp",
        False,
        f"The timestamp {login.timestamp} is {seconds} s {off} the server's clock ({now}); at most {window / 1000:g} s are allowed "
        f"(timestamp_window){over}.",
        f"timestamp {login.timestamp} 比服务器时钟（{now}）{off_zh} {seconds} 秒；最多允许 {window / 1000:g} 秒"
        f"（timestamp_window）{over_zh}。",
    )


def _ok(login: _Login) -> Finding:
    return Finding(
        "ok",
        True,
        f"All is in order: the server lets {login.device_name} of {login.product_key} in with this, while the device is enabled.",
        f"一切正常：只要设备 {login.device_name}（产品 {login.product_key}）已启用，服务器就会接受。",
    )


def _difference(one: str, other: str) -> int | None:
    """The index of the first character that is not the same in both."""
    if one == other:
        return None
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _is_text(text: str) -> bool:
    """Whether it can be encoded: half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


KINDS = mistakes.KINDS | frozenset(
    {
        "auth_type",
        "bad_client_id",
        "bad_timestamp",
        "bad_username",
        "clock_not_checked",
        "clock_ok",
        "content_ok",
        "duplicate_member",
        "empty",
        "impossible_name",
        "junk_around",
        "long_client_id",
        "missing_member",
        "no_secret",
        "not_hex",
        "not_json",
        "not_text",
        "nothing_recognised",
        "ok",
        "refused",
        "secret_sent",
        "sign_length",
        "sign_ok",
        "single_quotes",
        "stale_timestamp",
        "timestamp_in_seconds",
        "too_long",
        "unexplained",
        "unknown_method",
        "wrong_content",
        "wrong_content_length",
        "wrong_content_type",
        "wrong_http_method",
        "wrong_sign",
        "wrong_type",
    }
)
"""Every kind that a Finding may have."""
