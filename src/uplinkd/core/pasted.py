"""What a firmware engineer pastes: a login found in JSON, in a curl command, in an HTTP request, in MQTT's parameters, or as the
bare text that was signed.

Reading is forgiving, so that a login with a fault is understood all the same; what the server would not forgive is kept as a
`Fault` beside it. Every pattern reads a text once from left to right: what is pasted may be long and hostile.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["MAX_TEXT", "Fault", "Pasted", "read"]

MAX_TEXT = 65_536


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with the form of the text: a stable `kind`, and one sentence in English and in Chinese."""

    kind: str
    text: str
    text_zh: str


@dataclass(frozen=True, slots=True)
class Pasted:
    """A login as it was found. `source` is http, mqtt or content.

    http: `pairs` in the submitted order, `body` the JSON object that holds them, as well-formed JSON; `opaque` names the
    members whose value is null, an array or an object.
    mqtt: `client_id`, `username`, `password` as CONNECT has them.
    content: `content` the text that was signed, `pairs` the names and values in it, `sign` and `method` where they were given.
    """

    source: str
    pairs: tuple[tuple[str, str], ...] = ()
    opaque: frozenset[str] = frozenset()
    body: str = ""
    client_id: str = ""
    username: str = ""
    password: str = ""
    content: str = ""
    sign: str = ""
    method: str = ""
    faults: tuple[Fault, ...] = ()


def read(text: str) -> Pasted:
    """The login in `text`, of at most MAX_TEXT characters; whatever it is, nothing is raised."""
    if len(text) > MAX_TEXT:
        return Pasted(
            "content",
            faults=(
                Fault(
                    "too_long",
                    f"The text has {len(text)} characters; at most {MAX_TEXT} are examined.",
                    f"文本共 {len(text)} 个字符，最多分析 {MAX_TEXT} 个。",
                ),
            ),
        )
    if not text.strip():
        return Pasted("content", faults=(Fault("empty", "There is no text to examine.", "没有可供分析的文本。"),))
    return _mosquitto(text) or _json(text) or _connect(text) or _content(text)


# -- JSON, alone or in a request


class _Pairs(list[tuple[str, Any]]):
    """An object's members in order, repeated names included."""


class _Number(str):
    """A number as the text that was submitted."""

    __slots__ = ()


_decoder = json.JSONDecoder(object_pairs_hook=_Pairs, parse_int=_Number, parse_float=_Number)
_CURL = re.compile(r"(?:^|[\s;&|$(`])curl(?:\.exe)?\s")
_REQUEST_LINE = re.compile(r"^\s*([A-Z]{3,8})[ \t]+(\S+)(?:[ \t]+HTTP/[0-9.]+)?[ \t]*\r?$", re.MULTILINE)
_HEADER = re.compile(r"^[ \t]*([A-Za-z-]{1,40}):[ \t]*([^\r\n]*)", re.MULTILINE)
_DATA_OPTIONS = ("-d", "--data", "--data-raw", "--data-binary", "--data-ascii", "--json")
_NAMES = re.compile(r"""["']?\b(?:productKey|deviceName|clientId|signmethod|sign)\b["']?\s*:""")
# One member of an object that is nearly JSON: any quotes or none, `=>` or `=` for the colon.
_MEMBER = re.compile(
    r"""[\s,]*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|([A-Za-z_]\w*))\s*(?::|=>?)\s*"""
    r"""(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|([^\s,{}"']+))""",
    re.DOTALL,
)
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SHOWN = 40


def _json(text: str) -> Pasted | None:
    """A JSON object, alone or within a request; None where there is none."""
    faults: list[Fault] = []
    if _CURL.search(text):
        shown = _curl_body(text, faults)
        wrapped = True
    else:
        request = _REQUEST_LINE.search(text)
        wrapped = request is not None and "{" not in text[: request.start()]
        shown = text
        if request and wrapped:
            _check_request(request, text, faults)
    start = shown.find("{")
    if start < 0 or not (wrapped or _NAMES.search(shown) or shown.lstrip()[0] == "{"):
        return None
    before = shown[:start].strip()
    found = _strict(shown, start)
    if found is None:
        found = _lenient(shown, start, faults)
    pairs, end = found
    after = shown[end:].strip()
    if not wrapped and (before or after):
        junk = before or after
        where, where_zh = ("before", "之前") if before else ("after", "之后")
        faults.append(
            Fault(
                "junk_around",
                f"There is more text {where} the JSON object, {_cut(junk)}; the body of POST /auth must be the object alone.",
                f"JSON 对象{where_zh}还有多余文本 {_cut(junk)}；POST /auth 的请求体必须只有该对象。",
            )
        )
    body = shown[start:end] if _is_json(shown[start:end]) else _rebuilt(pairs)
    if connect := _connect_of(pairs):
        return replace(connect, faults=tuple(faults))
    texts = tuple((name, _as_text(value)) for name, value in pairs)
    opaque = frozenset(name for name, value in pairs if value is None or isinstance(value, list))
    return Pasted("http", pairs=texts, opaque=opaque, body=body, faults=tuple(faults))


def _strict(text: str, start: int) -> tuple[_Pairs, int] | None:
    try:
        value, end = _decoder.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return (value, end) if isinstance(value, _Pairs) else None


def _is_json(text: str) -> bool:
    found = _strict(text, 0) if text.startswith("{") else None
    return found is not None and found[1] == len(text)


def _lenient(text: str, start: int, faults: list[Fault]) -> tuple[_Pairs, int]:
    """The members of a flat object that is not JSON, with the reason why it is none."""
    pairs, at, single = _Pairs(), start + 1, False
    while member := _MEMBER.match(text, at):
        double_name, single_name, bare_name, double, quoted, bare = member.groups()
        single = single or single_name is not None or quoted is not None
        name = next(each for each in (double_name, single_name, bare_name) if each is not None)
        value: Any = _bare(bare) if bare is not None else _unescaped(double if double is not None else quoted or "")
        pairs.append((_unescaped(name), value))
        at = member.end()
    close = text.find("}", at)
    end = close + 1 if close >= 0 else len(text)
    if single:
        faults.append(
            Fault(
                "single_quotes",
                "The object is written with single quotes, as Python prints a dict; JSON has names and texts in double quotes.",
                "对象使用了单引号（如 Python 打印的 dict）；JSON 的名称与文本必须使用双引号。",
            )
        )
    else:
        message, position = _json_error(text[start:end])
        faults.append(
            Fault(
                "not_json",
                f"The body is not JSON: {message} at character {position}, near {_cut(text[start + position :])}.",
                f"请求体不是 JSON：第 {position} 个字符处有误（{message}），附近为 {_cut(text[start + position :])}。",
            )
        )
    return pairs, end


def _json_error(text: str) -> tuple[str, int]:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg, error.pos
    except RecursionError:
        return "it is nested too deeply", 0
    return "it is no object", 0


def _bare(text: str) -> Any:
    if _JSON_NUMBER.fullmatch(text):
        return _Number(text)
    return {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}.get(text, text)


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL) if "\\" in text else text


def _as_text(value: Any) -> str:
    """As it is signed, where it is: `true` and `false` in words, as wire.login has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, str) else ""


def _rebuilt(pairs: _Pairs) -> str:
    """Well-formed JSON of what was nearly that."""
    members = (
        json.dumps(name) + ":" + (str(value) if isinstance(value, _Number) else json.dumps(value))
        for name, value in pairs
    )
    return "{" + ",".join(members) + "}"


def _curl_body(text: str, faults: list[Fault]) -> str:
    """What the curl command sends, as far as it can be told; else the text itself."""
    words = _words(text)
    bodies = [words[index + 1] for index, word in enumerate(words[:-1]) if word in _DATA_OPTIONS]
    bodies += [word.partition("=")[2] for word in words if word.startswith(("--data", "--json=")) and "=" in word]
    bodies += [word[2:] for word in words if word.startswith("-d") and len(word) > 2]
    body = next((each for each in bodies if "{" in each), None)
    typed = "--json" in words or re.search(r"content-type\s*:\s*application/json", text, re.IGNORECASE)
    if body is not None and not typed:
        _wrong_type(faults, "application/x-www-form-urlencoded", "curl -d", "curl -d")
    if body is not None:
        return body
    return text


def _check_request(request: re.Match[str], text: str, faults: list[Fault]) -> None:
    """What the head of a pasted HTTP request says."""
    if request[1] != "POST":
        faults.append(
            Fault(
                "wrong_http_method",
                f"The request is a {request[1]}; the server takes POST alone.",
                f"请求方法为 {request[1]}；服务器只接受 POST。",
            )
        )
    head_end = text.find("{", request.end())
    head = text[request.end() : head_end if head_end >= 0 else len(text)]
    for name, value in _HEADER.findall(head):
        media_type = value.partition(";")[0].strip()
        if name.lower() == "content-type" and media_type.lower() != "application/json":
            _wrong_type(faults, media_type, "the request", "该请求")
        if name.lower() == "content-length" and head_end >= 0 and value.strip().isdecimal():
            found = _strict(text, head_end)
            size = len(text[head_end : found[1] if found else len(text)].rstrip().encode(errors="replace"))
            if int(value.strip()[:9]) != size:
                faults.append(
                    Fault(
                        "wrong_content_length",
                        f"Content-Length is {value.strip()[:9]} and the body has {size} bytes; the two must be equal.",
                        f"Content-Length 为 {value.strip()[:9]}，而请求体有 {size} 字节；两者必须相等。",
                    )
                )


def _wrong_type(faults: list[Fault], media_type: str, who: str, who_zh: str) -> None:
    faults.append(
        Fault(
            "wrong_content_type",
            f"The Content-Type that {who} sends is {_cut(media_type)}; it must be application/json.",
            f"{who_zh} 发送的 Content-Type 为 {_cut(media_type)}；必须是 application/json。",
        )
    )


def _words(text: str) -> list[str]:
    """The words of a shell command; none where its quotes do not close."""
    try:
        return shlex.split(re.sub(r"\\\r?\n", " ", text))
    except ValueError:
        return []


def _cut(text: str) -> str:
    return ascii(text[:_SHOWN]) if not text[:_SHOWN].isprintable() else f"{text[:_SHOWN]!r}"


# -- MQTT

_MOSQUITTO = re.compile(r"\bmosquitto_(?:pub|sub|rr)\b")
_MOSQUITTO_OPTIONS = {
    "-i": "client_id",
    "--id": "client_id",
    "-u": "username",
    "--username": "username",
    "-P": "password",
    "--pw": "password",
}
_LABEL = re.compile(
    r"""^[\s"'*-]{0,20}(?:mqtt[\s_-]?)?(client[\s_-]?id|user[\s_-]?name|user|pass(?:word|wd)?|pwd|pw)"""
    r"""["']?(?:\s*[:=：]\s*|[ \t]+)(.+)$""",
    re.IGNORECASE,
)
_FIELDS = {"c": "client_id", "u": "username", "p": "password"}
_CLIENT_ID_LINE = re.compile(r"[^|]*\|[^|]*(?:securemode|signmethod)=[^|]*\|?")
_USERNAME_LINE = re.compile(r"[^\s&=]+&[^\s&=]+")


def _mosquitto(text: str) -> Pasted | None:
    if not _MOSQUITTO.search(text):
        return None
    words = _words(text)
    found = {
        _MOSQUITTO_OPTIONS[word]: words[index + 1]
        for index, word in enumerate(words[:-1])
        if word in _MOSQUITTO_OPTIONS
    }
    return _connect_with(found) if found else None


def _connect_with(found: dict[str, str]) -> Pasted:
    return Pasted(
        "mqtt",
        client_id=found.get("client_id", ""),
        username=found.get("username", ""),
        password=found.get("password", ""),
    )


def _connect_of(pairs: _Pairs) -> Pasted | None:
    """A CONNECT in JSON, as consoles show it."""
    found: dict[str, str] = {}
    for name, value in pairs:
        label = _LABEL.match(f"{name}:x")
        if label and isinstance(value, str):
            found.setdefault(_FIELDS[label[1][0].lower()], str(value))
    if "username" in found and not any(name == "productKey" for name, _ in pairs):
        return _connect_with(found)
    return None


def _connect(text: str) -> Pasted | None:
    """Lines such as `clientId: 12345|securemode=2|`, or the three values alone."""
    found: dict[str, str] = {}
    plain: dict[str, str] = {}
    for line in text.splitlines()[:100]:
        if label := _LABEL.match(line):
            found.setdefault(_FIELDS[label[1][0].lower()], _unquoted(label[2]))
        value = _unquoted(line)
        if _CLIENT_ID_LINE.fullmatch(value):
            plain.setdefault("client_id", value)
        elif _USERNAME_LINE.fullmatch(value):
            plain.setdefault("username", value)
        elif "client_id" in plain and _SIGN_LINE.fullmatch(value):
            plain.setdefault("password", value)
    if "username" in found or ("client_id" in found and "|" in found["client_id"]):
        return _connect_with(found)
    if "client_id" in plain:
        return _connect_with(plain)
    return None


def _unquoted(text: str) -> str:
    text = text.strip()
    # A device's name or a sign ends with neither; a line copied from source code does.
    text = text.rstrip(",;") if text[-2:-1] in "\"'" else text
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`":
        return text[1:-1]
    return text


# -- the bare content

_SIGN_LINE = re.compile(
    r"(?:0x)?[0-9A-Fa-f]{8,}|[A-Za-z0-9+/_-]{22,43}={0,2}|[0-9A-Fa-f]{2}(?:[ :-][0-9A-Fa-f]{2}){7,}"
)
_CONTENT_LABEL = re.compile(
    r"""^\s{0,20}["']?(content|signcontent|string[\s_-]?to[\s_-]?sign|signmethod|sign|signature|method)"""
    r"""["']?(?:\s*[:=：]\s*|[ \t]+)(.+)$""",
    re.IGNORECASE,
)
_PART = re.compile(r"[&,;]?\s?(clientId|deviceName|productKey|timestamp|signmethod|version)[=:]?\s?")


def _content(text: str) -> Pasted:
    """The text that was signed, and the sign below it."""
    content, sign, method = "", "", ""
    for line in text.splitlines():
        label = _CONTENT_LABEL.match(line)
        value = _unquoted(label[2] if label else line)
        what = re.sub(r"[\s_-]", "", label[1].lower()) if label else ""
        if what in ("sign", "signature"):
            sign = sign or value
        elif what in ("signmethod", "method"):
            method = method or value
        elif not value:
            continue
        elif not what and content and _SIGN_LINE.fullmatch(value):
            sign = sign or value
        else:
            content = content or value
    pieces = _PART.split(content)
    pairs = tuple(zip(pieces[1::2], pieces[2::2], strict=True))
    return Pasted("content", pairs=pairs, content=content, sign=sign, method=method)
