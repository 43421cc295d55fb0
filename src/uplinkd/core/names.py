"""What the names may look like: product keys and names, device names, secrets, topic levels; and how new ones are made."""

from __future__ import annotations

import base64
import re
import secrets
import string

from uplinkd.core.errors import Rejected
from uplinkd.core.model import DeviceName, ProductKey, Right

__all__ = [
    "DEFAULT_CLASSES",
    "MAX_CUSTOM_CLASSES",
    "MAX_TOPIC_BYTES",
    "MAX_TOPIC_SLASHES",
    "check_app_name",
    "check_device_name",
    "check_device_secret",
    "check_group_name",
    "check_levels",
    "check_product_key",
    "check_product_name",
    "check_product_secret",
    "check_user_name",
    "make_api_key",
    "make_app_key",
    "make_app_secret",
    "make_device_name",
    "make_device_secret",
    "make_password",
    "make_product_key",
    "make_product_secret",
    "make_webhook_secret",
]

MAX_TOPIC_BYTES = 128
MAX_TOPIC_SLASHES = 7
MAX_CUSTOM_CLASSES = 50

DEFAULT_CLASSES: tuple[tuple[str, Right], ...] = (
    ("user/update", Right.PUBLISH),
    ("user/update/error", Right.PUBLISH),
    ("user/get", Right.SUBSCRIBE),
    ("update", Right.PUBLISH),
    ("update/error", Right.PUBLISH),
    ("get", Right.SUBSCRIBE),
)
"""The topic classes of a new product; they do not count against MAX_CUSTOM_CLASSES."""

_ALPHANUMERIC = string.ascii_letters + string.digits
_RESERVED_KEYS = frozenset({"sys", "ota", "shadow", "ext", "broadcast", "as"})
_PRODUCT_KEY = re.compile(r"[A-Za-z0-9]{1,30}")
_DEVICE_NAME = re.compile(r"[A-Za-z0-9_@.:-]{4,32}")
_IMPORTED_DEVICE_NAME = re.compile(r"[A-Za-z0-9_@.:-]{1,64}")
_LEVEL = re.compile(r"[A-Za-z0-9_]+")
# They stand in addresses, where . and .. are other places: no browser could ask for such a one.
_APP_NAME = re.compile(r"(?!\.\.?$)[A-Za-z0-9_.-]{1,64}")


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(length))


def make_product_key() -> ProductKey:
    return ProductKey("a1" + _random(9))


def make_product_secret() -> str:
    return _random(16)


def make_device_name() -> DeviceName:
    return DeviceName(_random(20))


def make_device_secret() -> str:
    return _random(32)


def make_app_key() -> str:
    """An application's user name: in lower case, and without a character that means something in a NATS subject."""
    return "app-" + "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(12))


def make_app_secret() -> str:
    """43 characters of 256 random bits, so that a plain hash of it suffices."""
    return secrets.token_urlsafe(32)


def make_api_key() -> str:
    """A key for the management API: 256 random bits, behind letters by which a search for leaked keys finds it."""
    return "uplk_" + secrets.token_urlsafe(32)


def make_webhook_secret() -> str:
    """A key that signs webhooks, as Standard Webhooks writes them: 256 random bits in base64 behind `whsec_`."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def make_password() -> str:
    """A one-time password, in groups that can be typed: about 95 bits."""
    alphabet = "abcdefghjkmnpqrstuvwxyz23456789"
    return "-".join("".join(secrets.choice(alphabet) for _ in range(5)) for _ in range(4))


def check_product_key(text: str) -> ProductKey:
    """A key that an operator brings along; raise Rejected with the rule."""
    if not _PRODUCT_KEY.fullmatch(text):
        raise Rejected(f"ProductKey {text!r}: it has 1 to 30 letters and digits")
    if text.lower() in _RESERVED_KEYS:
        raise Rejected(
            f"ProductKey {text!r} is the beginning of system topics (/{text.lower()}/…) and cannot name a product"
        )
    return ProductKey(text)


def check_product_name(text: str) -> str:
    if not 4 <= len(text) <= 30 or not text.isprintable() or text != text.strip():
        raise Rejected(f"product name {text!r}: it has 4 to 30 printable characters, without spaces around them")
    return text


def check_product_secret(text: str) -> str:
    return _check_secret(text, "ProductSecret")


def check_device_name(text: str, *, imported: bool = False) -> DeviceName:
    """`imported`: a fleet from elsewhere may bring names of 1 to 64 characters."""
    shortest, longest, pattern = (1, 64, _IMPORTED_DEVICE_NAME) if imported else (4, 32, _DEVICE_NAME)
    if not pattern.fullmatch(text):
        raise Rejected(f"DeviceName {text!r}: it has {shortest} to {longest} characters: letters, digits and - _ @ . :")
    return DeviceName(text)


def check_device_secret(text: str) -> str:
    return _check_secret(text, "DeviceSecret")


def check_app_name(text: str) -> str:
    if not _APP_NAME.fullmatch(text):
        raise Rejected(f"application name {text!r}: it has 1 to 64 letters, digits and - _ . and is not . or ..")
    return text


def check_group_name(text: str) -> str:
    if not _APP_NAME.fullmatch(text):
        raise Rejected(f"consumer group {text!r}: its name has 1 to 64 letters, digits and - _ . and is not . or ..")
    return text


def check_user_name(text: str) -> str:
    if not _APP_NAME.fullmatch(text):
        raise Rejected(f"user name {text!r}: it has 1 to 64 letters, digits and - _ . and is not . or ..")
    return text


def _check_secret(text: str, what: str) -> str:
    if not 1 <= len(text) <= 64 or not text.isprintable() or text != text.strip():
        raise Rejected(
            f"the {what} has 1 to 64 printable characters without spaces around them; this one has {len(text)}"
        )
    return text


def check_levels(text: str, right: Right, *, product_key: str) -> str:
    """The levels of a topic class below `/${productKey}/${deviceName}/`; a leading slash is allowed and dropped.

    The longest device name is not known here, so the bytes that count are those of the class with a name of 1.
    """
    levels = text.removeprefix("/")
    for number, level in enumerate(parts := levels.split("/"), 1):
        if level in ("+", "#"):
            if right.publishes:
                raise Rejected(
                    f"topic class {text!r}: the wildcard {level} is for classes with the right to subscribe alone"
                )
            if level == "#" and number < len(parts):
                raise Rejected(f"topic class {text!r}: the wildcard # may only be the last level")
        elif not _LEVEL.fullmatch(level):
            what = "an empty level" if not level else f"the level {level!r}"
            raise Rejected(f"topic class {text!r} has {what}; levels are letters, digits and underscores")
    topic = f"/{product_key}/d/{levels}"
    if topic.count("/") > MAX_TOPIC_SLASHES:
        raise Rejected(
            f"topic class {text!r}: its topics would have {topic.count('/')} slashes; at most {MAX_TOPIC_SLASHES} are allowed"
        )
    if len(topic.encode()) > MAX_TOPIC_BYTES:
        raise Rejected(f"topic class {text!r}: its topics would be longer than {MAX_TOPIC_BYTES} bytes")
    return levels
