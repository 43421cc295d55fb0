"""The signature workbench: each usual mistake is named, what is right is called right, and nothing breaks it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uplinkd.core import mistakes, signature
from uplinkd.core.workbench import KINDS, Examined, examine, names_in

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent.parent / "vectors" / "signatures.json").read_text())[
    "vectors"
]
NOW, WINDOW = 1_501_668_289_957, 900_000
SECRET = "q8Zk+0iN'wT\\7v$Lp2\"xY4rB"
MEMBERS = {"productKey": "a1GFjLP3xxC", "deviceName": "device123", "clientId": "mylight1000002", "timestamp": str(NOW)}
CONTENT = signature.content_of(MEMBERS)


def look(text: str, secret: str | None = SECRET, *, now: int = NOW, window: int = WINDOW) -> Examined:
    """What is found, with what holds of everything that is found."""
    found = examine(text, secret=secret, now=now, window=window)
    assert {each.kind for each in found.findings} <= KINDS
    assert found.findings
    for each in found.findings:
        assert each.text.endswith((".", "?")), each
        assert each.text_zh.endswith(("。", "？")), each
        assert secret is None or len(secret) < 8 or secret not in each.text + each.text_zh
    assert (found.product_key, found.device_name) == names_in(text)
    return found


def kinds(found: Examined) -> list[str]:
    return [each.kind for each in found.findings]


def body(sign: str, members: dict[str, Any] | None = None, **more: Any) -> str:
    return json.dumps({**(members or MEMBERS), "signmethod": "hmacsha1", "sign": sign, **more}, ensure_ascii=False)


def hexmac(content: str, secret: str = SECRET, digest: str = "sha1") -> str:
    return hmac.digest(secret.encode(), content.encode(), digest).hex()


def reason(sign: str, **more: Any) -> list[str]:
    """The kinds of what explains a wrong sign in an otherwise right body."""
    found = look(body(sign, **more))
    assert found.matches is False
    assert "ok" not in kinds(found)
    return [each for each in kinds(found) if each in mistakes.KINDS]


# -- what is right


@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize("upper", [False, True])
def test_published_vectors_are_in_order(vector: dict[str, Any], upper: bool) -> None:
    """As JSON, over MQTT and as bare content, in any letter case."""
    for method, sign in vector["signs"].items():
        sign = sign.upper() if upper else sign.lower()
        members = {**vector["members"], "sign": sign, "signmethod": method}
        http = look(json.dumps(members), vector["secret"], now=789)
        assert (http.source, http.content, http.matches) == ("http", vector["content"], True)
        assert (http.expected, http.first_difference, http.skew_ms) == (sign.lower(), None, 0)
        assert kinds(http) == ["ok", "sign_ok", "clock_ok"]
        connect = (
            f"clientId: 12345|securemode=2,signmethod={method},timestamp=789|\nusername: device&pk\npassword: {sign}"
        )
        mqtt = look(connect, vector["secret"])
        assert (mqtt.source, mqtt.content, mqtt.matches) == ("mqtt", vector["content"], True)
        assert kinds(mqtt) == ["ok", "sign_ok", "clock_not_checked"]
        bare = look(f"{vector['content']}\n{sign}", vector["secret"], now=789)
        assert (bare.source, bare.content, bare.matches) == ("content", vector["content"], True)
        assert kinds(bare) == ["ok", "content_ok", "sign_ok", "clock_ok"]


def test_members_are_shown_in_the_signed_order() -> None:
    """Version, sign and signmethod aside."""
    found = look(body(hexmac(CONTENT), version="default"))
    assert [name for name, _ in found.members] == ["clientId", "deviceName", "productKey", "timestamp"]
    assert "".join(name + value for name, value in found.members) == found.content == CONTENT


def test_a_number_is_signed_as_it_is_sent() -> None:
    """Alibaba's Node.js sample sends the timestamp so."""
    assert look(body(hexmac(CONTENT), timestamp=NOW)).matches


@pytest.mark.parametrize(
    "text",
    [
        f"curl -sk https://127.0.0.1:8443/auth -H 'Content-Type: application/json' -d '{body(hexmac(CONTENT))}' -o out",
        f'curl https://h/auth \\\n  -H "content-type:application/json" \\\n  --data-raw {json.dumps(body(hexmac(CONTENT)))}',
        f"curl --json '{body(hexmac(CONTENT))}' https://h/auth",
        f"POST /auth?_v=sdk-c-4.1.0& HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: "
        f"{len(body(hexmac(CONTENT)))}\r\n\r\n{body(hexmac(CONTENT))}",
        f"POST /auth HTTP/1.1\nHost: h\nContent-Type: application/json; charset=utf-8\nbody: {body(hexmac(CONTENT))}\n",
        f"\n  {json.dumps(json.loads(body(hexmac(CONTENT))), indent=4)}  \n",
    ],
    ids=["curl", "curl with escapes", "curl --json", "SDK 4", "the platform's page", "indented"],
)
def test_a_login_is_found_in_a_request(text: str) -> None:
    """A whole command or request may be pasted."""
    assert kinds(look(text)) == ["ok", "sign_ok", "clock_ok"]


CLIENT_ID = "12345|securemode=3,signmethod=hmacsha256,timestamp=2524608000000,_ss=1|"
MQTT_SIGN = hexmac("clientId12345deviceNamedevice123productKeya1GFjLP3xxCtimestamp2524608000000", digest="sha256")


@pytest.mark.parametrize(
    "text",
    [
        f"clientId  {CLIENT_ID}\nusername  device123&a1GFjLP3xxC\npassword  {MQTT_SIGN}",
        f'client_id = "{CLIENT_ID}";\nuser_name = "device123&a1GFjLP3xxC";\npassword = "{MQTT_SIGN}";',
        json.dumps({"clientId": CLIENT_ID, "username": "device123&a1GFjLP3xxC", "passwd": MQTT_SIGN, "port": 1883}),
        f"mosquitto_pub -h h -p 8883 -i '{CLIENT_ID}' \\\n -u 'device123&a1GFjLP3xxC' -P {MQTT_SIGN} -t /x -m '{{}}'",
        f"{CLIENT_ID}\ndevice123&a1GFjLP3xxC\n{MQTT_SIGN}",
    ],
    ids=["uplinkd sign", "source code", "JSON", "mosquitto_pub", "three lines"],
)
def test_mqtt_parameters_are_read_in_every_form(text: str) -> None:
    """As the command line, consoles, source code and mosquitto show them."""
    found = look(text)
    assert (found.source, found.client_id, found.method) == ("mqtt", "12345", "hmacsha256")
    assert kinds(found) == ["ok", "sign_ok", "clock_not_checked"]


def test_what_uplinkd_sign_prints_can_be_examined() -> None:
    """Content, method and sign, each with its name."""
    found = look(f"content     {CONTENT}\nsignmethod  hmacsha1\nsign        {hexmac(CONTENT)}")
    assert kinds(found) == ["ok", "content_ok", "sign_ok", "clock_ok"]


# -- what is wrong with the sign


def test_another_method_than_signmethod_says() -> None:
    """Or than the default, when it is left out."""
    assert reason(hexmac(CONTENT, digest="sha256")) == ["other_method"]
    assert reason(hexmac(CONTENT, digest="md5")) == ["other_method"]
    left_out = {**MEMBERS, "sign": hexmac(CONTENT)}
    found = look(json.dumps(left_out))
    assert kinds(found)[0] == "other_method"
    assert "not sent" in found.findings[0].text


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (SECRET + "\n", "padded_secret"),
        (SECRET + "\r\n", "padded_secret"),
        (" " + SECRET, "padded_secret"),
        (f'"{SECRET}"', "padded_secret"),
        (SECRET[:-1], "trimmed_secret"),
        (SECRET[1:], "trimmed_secret"),
        (SECRET.lower(), "secret_case"),
        (SECRET.encode().hex(), "encoded_secret"),
        (base64.b64encode(SECRET.encode()).decode(), "encoded_secret"),
        ("", "name_for_secret"),
        (MEMBERS["productKey"], "name_for_secret"),
    ],
)
def test_another_key_made_of_the_secret(key: str, kind: str) -> None:
    """Read with its line feed, cut by a small buffer, encoded, or not there at all."""
    assert reason(hexmac(CONTENT, key)) == [kind]


def test_the_secret_decoded_as_hexadecimal() -> None:
    """A secret of hexadecimal digits tempts."""
    secret = "0123456789abcdef0123456789abcdef"
    sign = hmac.digest(bytes.fromhex(secret), CONTENT.encode(), "sha1").hex()
    assert "decoded_secret" in kinds(look(body(sign), secret))


def test_key_and_message_swapped() -> None:
    """HMAC's arguments stand in another order in each library."""
    assert reason(hexmac(SECRET, CONTENT)) == ["swapped_key"]


@pytest.mark.parametrize("text", [CONTENT + SECRET, SECRET + CONTENT, SECRET + CONTENT + SECRET, CONTENT])
def test_a_plain_hash_is_no_hmac(text: str) -> None:
    """Nor is it with the secret in front or behind."""
    assert reason(hashlib.sha1(text.encode()).hexdigest()) == ["plain_hash"]
    assert reason(hashlib.md5(text.encode()).hexdigest()) == ["other_method", "plain_hash"]


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_base64_instead_of_hexadecimal(encode: Any) -> None:
    """Of the digest, or of the hexadecimal digits."""
    assert reason(encode(bytes.fromhex(hexmac(CONTENT))).decode()) == ["base64_sign"]
    assert reason(encode(hexmac(CONTENT).encode()).decode()) == ["base64_sign"]


@pytest.mark.parametrize(
    ("sign", "kind"),
    [
        (hexmac(CONTENT)[:32], "truncated_sign"),
        (hexmac(CONTENT)[:-1], "truncated_sign"),
        (hexmac(CONTENT) + "00", "overlong_sign"),
        ("0x" + hexmac(CONTENT), "decorated_sign"),
        (" ".join(hexmac(CONTENT)[index : index + 2] for index in range(0, 40, 2)), "decorated_sign"),
        (hexmac(CONTENT) + "\n", "decorated_sign"),
        (
            "".join(
                f"{byte - 256 & 0xFFFFFFFF if byte > 127 else byte:02x}" for byte in bytes.fromhex(hexmac(CONTENT))
            ),
            "sign_extended",
        ),
    ],
)
def test_a_right_digest_written_wrongly(sign: str, kind: str) -> None:
    """Cut, padded, with separators, or printed from signed chars."""
    assert reason(sign) == [kind]


def test_a_digest_that_lost_its_zeros() -> None:
    """%x where %02x is meant."""
    content = next(
        text
        for text in (CONTENT.replace("mylight", f"m{number}") for number in range(999))
        if "0" in hexmac(text)[4::2]
    )
    members = {**MEMBERS, "clientId": content.removeprefix("clientId").partition("deviceName")[0]}
    sign = "".join(f"{byte:x}" for byte in bytes.fromhex(hexmac(content)))
    assert "lost_zeros" in kinds(look(body(sign, members)))


def joined(order: str, joint: str = "", between: str = "") -> str:
    return between.join(name + joint + MEMBERS[name] for name in order.split())


SORTED = "clientId deviceName productKey timestamp"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (joined("productKey deviceName clientId timestamp"), "unsorted"),
        (joined("timestamp productKey deviceName clientId"), "unsorted"),
        (joined("deviceName clientId productKey timestamp"), "unsorted"),
        (joined(SORTED, "=", "&"), "separators"),
        (joined(SORTED, "=", ","), "separators"),
        (joined(SORTED, "", "&"), "separators"),
        (joined(SORTED, "="), "separators"),
        ("".join(MEMBERS[name] for name in SORTED.split()), "values_only"),
        ("&".join(MEMBERS[name] for name in SORTED.split()), "values_only"),
        (joined("clientId deviceName productKey"), "timestamp_not_signed"),
        (joined("deviceName productKey timestamp"), "member_not_signed"),
        (CONTENT + "\n", "trailing_character"),
        (CONTENT + "\0", "trailing_character"),
        (CONTENT.lower(), "content_case"),
        (json.dumps(dict(sorted(MEMBERS.items())), separators=(",", ":")), "signed_json"),
        (CONTENT.replace("productKey", "productKey\0").replace("timestamp", "signmethodhmacsha1timestamp").replace("\0", ""),
         "signed_signmethod"),
        (CONTENT + "versiondefault", "signed_version"),
        (CONTENT.replace("timestamp", "signtimestamp"), "signed_sign"),
        (signature.content_of({**MEMBERS, "productKey": "device123", "deviceName": "a1GFjLP3xxC"}), "swapped_names"),
    ],
)  # fmt: skip
def test_another_content_was_signed(content: str, kind: str) -> None:
    """It is named and shown, and whose rule it breaks."""
    assert reason(hexmac(content), version="default") == [kind]
    found = look(body(hexmac(content), version="default"))
    assert f"The sign is that of {content!r}." in found.findings[0].text
    assert f"{content!r}" in found.findings[0].text_zh


def test_a_timestamp_that_is_signed_and_not_sent() -> None:
    """Link SDKs know one number for it."""
    members = {name: value for name, value in MEMBERS.items() if name != "timestamp"}
    content = signature.content_of({**members, "timestamp": "2524608000000"})
    assert "timestamp_added" in kinds(look(body(hexmac(content), members)))


def test_values_in_url_encoding() -> None:
    """Sent plain and signed encoded, or the other way about."""
    plain, encoded = {**MEMBERS, "clientId": "aa:bb cc"}, {**MEMBERS, "clientId": "aa%3Abb%20cc"}
    plain["deviceName"] = encoded["deviceName"] = "device"
    assert kinds(look(body(hexmac(signature.content_of(encoded)), plain)))[0] == "url_encoded"
    assert kinds(look(body(hexmac(signature.content_of(plain)), encoded)))[0] == "url_decoded"


def test_white_space_and_numbers_are_signed_as_they_are_sent() -> None:
    """A library may print a number otherwise than its author thinks."""
    spaced = {**MEMBERS, "clientId": "mylight1000002\n"}
    assert kinds(look(body(hexmac(CONTENT), spaced)))[0] == "value_whitespace"
    text = body(hexmac(CONTENT)).replace(f'"{NOW}"', f"{NOW}.0")
    assert "number_text" in kinds(look(text))


def test_the_client_ids_parameters_are_not_signed() -> None:
    """Over MQTT its part between bars is not; over HTTPS all of it is."""
    content = f"clientId{CLIENT_ID}deviceNamedevice123productKeya1GFjLP3xxCtimestamp2524608000000"
    connect = f"clientId: {CLIENT_ID}\nusername: device123&a1GFjLP3xxC\npassword: {hexmac(content, digest='sha256')}"
    assert kinds(look(connect))[0] == "whole_client_id"
    content = content.replace("timestamp2524608000000", "securemode3timestamp2524608000000").replace(CLIENT_ID, "12345")
    connect = f"clientId: {CLIENT_ID}\nusername: device123&a1GFjLP3xxC\npassword: {hexmac(content, digest='sha256')}"
    assert kinds(look(connect))[0] == "signed_parameter"
    assert (
        kinds(look(body(hexmac(CONTENT), {**MEMBERS, "clientId": "mylight1000002|securemode=2|"})))[0]
        == "cut_client_id"
    )


def test_mistakes_are_found_together() -> None:
    """Up to three; each is told."""
    content = joined("productKey deviceName clientId timestamp", "=", "&")
    assert reason(hexmac(content, SECRET + "\n")) == ["unsorted", "separators", "padded_secret"]
    assert reason(hexmac(content, digest="md5")) == ["unsorted", "separators", "other_method"]
    everything = joined("clientId deviceName productKey") + "signmethodhmacsha1" + f"timestamp{NOW}" + "versiondefault"
    assert reason(hexmac(everything)) == ["signed_everything"]


def test_a_sign_that_nothing_explains() -> None:
    """Another device's secret cannot be told from a random one, and that is said."""
    found = look(body(hexmac(CONTENT, "another secret")))
    assert kinds(found) == ["unexplained", "wrong_sign", "clock_ok"]
    assert kinds(look(body("abc"))) == ["sign_length", "wrong_sign", "clock_ok"]
    assert kinds(look(body("not hexadecimal!"))) == ["not_hex", "wrong_sign", "clock_ok"]


def test_the_first_difference_is_told() -> None:
    """In the contents where one was pasted, else in the signs."""
    right = hexmac(CONTENT)
    wrong = right[:7] + ("0" if right[7] != "0" else "1") + right[8:]
    assert look(body(wrong.upper())).first_difference == 7
    assert look(body(right[:30])).first_difference == 30
    found = look(CONTENT.replace("deviceName", "&deviceName=") + "\n" + wrong)
    assert found.first_difference == CONTENT.index("deviceName")
    assert "wrong_content" in kinds(found)


def test_a_content_that_the_device_alone_knows() -> None:
    """The sign is right for what was pasted, which is not what the server signs."""
    odd = CONTENT.replace("clientId", "xxclientId")
    assert kinds(look(f"{odd}\n{hexmac(odd)}"))[0] == "pasted_content"


# -- what is wrong with the form


GOOD = body(hexmac(CONTENT))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (GOOD.replace('"', "'"), ["single_quotes"]),
        (repr(json.loads(GOOD)), ["single_quotes"]),
        (GOOD + "}", ["junk_around"]),
        ("body = " + GOOD, ["junk_around"]),
        (GOOD[:-1] + ",}", ["not_json"]),
        (GOOD[:-1], ["not_json"]),
        (GOOD.replace(",", "", 1), ["not_json"]),
        (GOOD[:-1] + ', "clientId": "mylight1000002"}', ["duplicate_member"]),
        (GOOD[:-1] + ', "extra": null}', ["wrong_type"]),
        (GOOD[:-1] + ', "extra": [1]}', ["wrong_type"]),
        (GOOD.replace('"mylight1000002"', "1000002"), ["wrong_type"]),
        (GOOD.replace("mylight1000002", ""), ["missing_member"]),
        ('{"sign": "", "productKey": 1}', ["wrong_type", "missing_member", "missing_member", "missing_member"]),
        (GOOD.replace("mylight1000002", "m" * 65), ["long_client_id"]),
        (GOOD.replace("hmacsha1", "hmacsha512"), ["unknown_method"]),
        (GOOD.replace(f'"{NOW}"', '"2017-08-02"'), ["bad_timestamp"]),
        (GOOD.replace(f'"{NOW}"', f'"{NOW}"'.replace("1", "9")), ["stale_timestamp"]),
        (GOOD.replace(f'"{NOW}"', f'"{NOW // 1000}"'), ["timestamp_in_seconds"]),
        (GOOD[:-1] + ', "extra": "' + "x" * 4096 + '"}', ["too_long"]),
        (GOOD[:-1] + ', "extra": "\\ud800"}', ["not_text"]),
        (GOOD.replace("device123", "device 123"), ["impossible_name"]),
        (GOOD[:-1] + ', "deviceSecret": ' + json.dumps(SECRET) + "}", ["secret_sent"]),
        (f"curl https://h/auth -d '{GOOD}'", ["wrong_content_type"]),
        (f"POST /auth HTTP/1.1\nContent-Type: text/plain\n\n{GOOD}", ["wrong_content_type"]),
        (f"POST /auth HTTP/1.1\nContent-Length: 12\n\n{GOOD}", ["wrong_content_length"]),
        (f"GET /auth HTTP/1.1\n\n{GOOD}", ["wrong_http_method"]),
        ("", ["empty"]),
        ("x" * 70_000, ["too_long"]),
        ("what is wrong with my device?", ["nothing_recognised"]),
        ("clientId12345deviceNamedevice", ["missing_member"]),
        (f"content {CONTENT}\nsignmethod hmacsha3\nsign 00", ["unknown_method"]),
        ("clientId: 12345\nusername: device&pk\npassword: 00", ["bad_client_id"]),
        (f"clientId: {CLIENT_ID}\nusername: device\npassword: 00", ["bad_username"]),
        (f"clientId: {CLIENT_ID}\nusername: device&pk", ["missing_member"]),
        ("clientId: 1|authType=register|\nusername: device&pk\npassword: 00", ["auth_type"]),
        ("clientId: 1|signmethod=hmacx|\nusername: device&pk\npassword: 00", ["unknown_method"]),
    ],
)
def test_what_the_server_refuses_is_told(text: str, wanted: list[str]) -> None:
    """Whatever else there is; no such login is called in order."""
    found = look(text)
    faults = [each for each in kinds(found) if each not in mistakes.KINDS]
    assert [each for each in faults if each in wanted] == wanted
    assert "ok" not in faults
    assert not any(each.good for each in found.findings if each.kind in wanted)


def test_every_reason_of_the_server_has_its_words() -> None:
    """Kind and Chinese; none falls through to the English reason."""
    found = look('{"a":1}')
    assert "refused" not in kinds(found)
    assert "缺少字段 'productKey'。" in [each.text_zh for each in found.findings]
    deep = '{"a":' * 1000 + "1" + "}" * 1000
    assert {"not_json", "wrong_type", "too_long"} & set(kinds(look(deep)))


def test_a_form_of_mistake_does_not_hide_the_right_sign() -> None:
    """The sign is checked all the same, so that one fault is left and not two."""
    found = look(GOOD.replace('"', "'"))
    assert found.matches
    assert "sign_ok" in kinds(found)


def test_a_window_of_zero_is_not_checked() -> None:
    """For devices without a clock."""
    found = look(GOOD, now=NOW + 10 * WINDOW, window=0)
    assert (found.skew_ms, kinds(found)) == (-10 * WINDOW, ["ok", "sign_ok", "clock_not_checked"])
    assert kinds(look(GOOD, now=NOW + WINDOW))[0] == "ok"
    assert kinds(look(GOOD, now=NOW + WINDOW + 1))[0] == "stale_timestamp"


def test_without_a_secret_the_form_is_examined() -> None:
    """Nothing is compared, and that is said."""
    found = look(GOOD, None)
    assert (found.matches, found.expected, found.first_difference) == (None, "", None)
    assert kinds(found) == ["no_secret", "clock_ok"]
    assert kinds(look(body("00"), None)) == ["sign_length", "no_secret", "clock_ok"]


# -- whatever is pasted

WORDS = [GOOD, CONTENT, SECRET, CLIENT_ID, "clientId", "deviceName", "productKey", "timestamp", "sign", "signmethod="]
WORDS += ["curl -d ", "POST /auth HTTP/1.1\n", "Content-Length: 1\n", "mosquitto_pub -i ", "username: ", "password: "]
WORDS += ["{", "}", "[", '"', "'", "\n", ":", "=", "&", "|", "\\", "NaN", "1e999", "9" * 5000, "null", "\\ud800"]
pieces = st.one_of(st.text(max_size=12), st.characters(categories=["Cs"]), st.sampled_from(WORDS))
scraps = st.lists(pieces, max_size=8).map("".join)


@settings(max_examples=300, deadline=None)
@given(scraps, st.sampled_from([None, "", SECRET, "\ud800", "x"]))
def test_no_text_breaks_it(text: str, secret: str | None) -> None:
    """And no finding ever holds the secret."""
    look(text, secret)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=4), st.text(max_size=41))
def test_no_login_breaks_it(extra: dict[str, str], sign: str) -> None:
    """Whatever its members and its sign."""
    assert look(json.dumps({**MEMBERS, **extra, "sign": sign}))
