"""How a device signs its identity, and how a sign is checked.

Content: every submitted member but `version`, `sign` and `signmethod`, sorted by name, name and value concatenated.
Sign: hex of the HMAC over the content with the DeviceSecret; letter case does not matter.
Source: the platform's page "HTTP connection", test vectors in tests/vectors.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from uplinkd.core import mac

__all__ = ["DEFAULT_METHOD", "HEX_DIGITS", "METHODS", "content_of", "matches", "sign"]

METHODS: dict[str, str] = {"hmacmd5": "md5", "hmacsha1": "sha1", "hmacsha256": "sha256"}
HEX_DIGITS: dict[str, int] = {"hmacmd5": 32, "hmacsha1": 40, "hmacsha256": 64}
DEFAULT_METHOD = "hmacmd5"
_UNSIGNED = frozenset({"version", "sign", "signmethod"})


def content_of(members: Mapping[str, str]) -> str:
    """The text that is signed, from the members as they were submitted."""
    return "".join([name + members[name] for name in sorted(members) if name not in _UNSIGNED])


def sign(secret: str, content: str, method: str) -> str:
    """Lower-case hex; `method` is a key of METHODS."""
    return mac.digest(secret.encode(), content.encode(), METHODS[method]).hex()


def matches(secret: str, content: str, method: str, given: str) -> bool:
    """Whether `given` is the sign of `content`, compared in constant time."""
    # JSON can name half of a surrogate pair, which cannot be encoded; no sign has a question mark either.
    return hmac.compare_digest(sign(secret, content, method).encode(), given.lower().encode(errors="replace"))
