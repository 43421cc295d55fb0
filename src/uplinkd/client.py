"""Acts as a device over HTTPS: signs in, reports, and says in words what went wrong. Standard library alone."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from uplinkd.core import signature
from uplinkd.core.errors import Rejected, Unavailable
from uplinkd.settings import is_host

__all__ = ["Answered", "Device", "Published", "login_body", "split_url"]

_SECONDS = 10
# OpenSSL's numbers for a certificate that is trusted and does not name the host or the address.
_NAME_MISMATCHES = (62, 64)


class Answered(Exception):  # noqa: N818 - an answer, not an error of ours
    """The server said no."""

    def __init__(self, status: int, code: int, message: str, request_id: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.request_id = request_id


@dataclass(frozen=True, slots=True)
class Published:
    """A stored message; with it may have come a message for the device: its topic, and `data`, None where none came."""

    message_id: int
    topic: str
    data: str | None


class Device:
    """One device on one connection; `close` ends it."""

    def __init__(self, url: str, product_key: str, device_name: str, secret: str, *, ca: Path | None = None) -> None:
        self._url = url.rstrip("/")
        self._names = (product_key, device_name)
        self._secret = secret
        parts = split_url(self._url)
        if parts.scheme == "https":
            try:
                context = ssl.create_default_context(cafile=str(ca) if ca else None)
            except (OSError, ssl.SSLError) as error:
                raise Rejected(f"the CA file {ca} cannot be used: {error.strerror or error}") from error
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                str(parts.hostname), parts.port, timeout=_SECONDS, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=_SECONDS)

    def close(self) -> None:
        self._connection.close()

    def authenticate(self, method: str = "hmacsha256") -> str:
        """A token; raise Answered or Unavailable."""
        body = login_body(*self._names, self._secret, method=method)
        answer = self._post("/auth", body.encode(), {"Content-Type": "application/json"})
        return str(self._expected(answer, "token"))

    def publish(self, token: str, topic: str, payload: bytes) -> Published:
        """Report; raise Answered or Unavailable."""
        headers = {"Content-Type": "application/octet-stream", "password": token}
        answer = self._post("/topic" + quote(topic, safe="/@:._-"), payload, headers)
        message_id = int(self._expected(answer, "messageId"))
        info = answer["info"]
        return Published(message_id, str(info.get("topic", "")), info.get("data"))

    def _expected(self, answer: Any, name: str) -> Any:
        try:
            return answer["info"][name]
        except (KeyError, TypeError) as error:
            raise Unavailable(f"{self._url} answered success without a {name}: is it a device endpoint?") from error

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> Any:
        try:
            self._connection.request("POST", path, body, headers)
            response = self._connection.getresponse()
            text = response.read(64 * 1024)
        except ssl.SSLCertVerificationError as error:
            if error.verify_code in _NAME_MISMATCHES:
                raise Unavailable(
                    f"the certificate of {self._url} is for other names: add this one to the server's --tls-name, or call the "
                    "server by a name that the certificate has"
                ) from error
            raise Unavailable(
                f"the certificate of {self._url} is not trusted: {error.verify_message}; name its CA with --ca, for a server of "
                "this machine it is tls/ca.pem in the data folder"
            ) from error
        except ConnectionRefusedError as error:
            raise Unavailable(f"nothing listens at {self._url}; is `uplinkd serve` running?") from error
        except socket.gaierror as error:
            raise Unavailable(f"the name {self._connection.host} cannot be found: {error.strerror}") from error
        except TimeoutError as error:
            raise Unavailable(f"{self._url} did not answer within {_SECONDS} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{self._url} could not be talked to: {error or type(error).__name__}") from error
        try:
            answer = json.loads(text)
            code, message = int(answer["code"]), str(answer["message"])
        except (ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"{self._url} answered {response.status} with something that is not uplinkd's") from error
        if code != 0:
            request_id = (answer.get("info") or {}).get("requestId") or response.getheader("X-Request-Id") or ""
            raise Answered(response.status, code, message, str(request_id))
        return answer


def split_url(url: str) -> SplitResult:
    """The parts of the URL of a device endpoint; raise Rejected for what cannot be one."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("https", "http") and is_host(parts.hostname or "") and parts.port != 0:
            return parts
    raise Rejected(f"{url!r} is not a URL such as https://127.0.0.1:8443")


def login_body(
    product_key: str,
    device_name: str,
    secret: str,
    *,
    client_id: str | None = None,
    timestamp: str | None = None,
    method: str = "hmacsha256",
) -> str:
    """The JSON of POST /auth, signed; `client_id` defaults to `productKey.deviceName`, as the C SDK has it."""
    members = {
        "productKey": product_key,
        "deviceName": device_name,
        "clientId": client_id or f"{product_key}.{device_name}"[:64],
        **({"timestamp": timestamp} if timestamp else {}),
    }
    sign = signature.sign(secret, signature.content_of(members), method)
    return json.dumps({**members, "signmethod": method, "sign": sign, "version": "default"}, ensure_ascii=False)
