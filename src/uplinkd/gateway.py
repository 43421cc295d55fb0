"""What uplinkd does for a device: authenticate() and publish(), in the order of the specification.

Both decide at once from what is in memory. When they lack a fact they raise Wait, whose `fetch` brings it; the door awaits
that and calls again. So the usual request needs no task of its own, and the unusual one reads the same story.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from uplinkd.core import signature, tokens, topics, wire
from uplinkd.core.errors import Code, Refused, Unavailable
from uplinkd.core.model import Device, DeviceName, ProductKey, SigningKey
from uplinkd.engine import Done, Publisher
from uplinkd.flow import Flow
from uplinkd.registry.cache import DeviceCache, Entry
from uplinkd.settings import Settings

__all__ = ["MAX_PAYLOAD_BYTES", "Gateway", "Request", "Wait"]

MAX_PAYLOAD_BYTES = 128 * 1024

_TOKENS = 100_000
_TOPICS = 20_000
_LONGEST_NAME = 64

# Unknown devices are signed with this secret, so that they cost what a wrong sign costs.
_NOBODY = Device(0, ProductKey(""), DeviceName(""), "0" * 32, False, 0, 0, None, None)


@dataclass(slots=True)
class Request:
    """What a door hands over; below the line what was learned of it on the way, for the record of a refusal.

    `path` is the topic as it stands in the URL, percent-encoded; `query` says whether the URL had a `?`.
    """

    address: str
    content_type: str | None
    body: bytes
    password: str | None = None
    path: bytes = b""
    query: bool = False
    # ---
    product_key: str = ""
    device_name: str = ""
    topic: str = ""
    entry: Entry | None = None
    fresh: bool = False


class Wait(Exception):  # noqa: N818 - not an error: the answer needs a fact that is not in memory
    """Await `fetch()` (which may raise Refused), then call again with the same request."""

    def __init__(self, fetch: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self.fetch = fetch


class Gateway:
    """One for each worker; all its doors share it."""

    def __init__(
        self,
        settings: Settings,
        *,
        cache: DeviceCache,
        engine: Publisher,
        flow: Flow,
        keys: list[SigningKey],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cache = cache
        self._engine = engine
        self._flow = flow
        self._keys = {key.id: key for key in keys}
        self._key = max((key for key in keys if not key.retired), key=lambda key: key.id)
        self._clock = clock
        self._token_ttl = round(settings.token_ttl * 1000)
        self._window = round(settings.timestamp_window * 1000)
        self._tokens: dict[str, tokens.Token] = {}
        self._topics: dict[bytes, topics.Topic] = {}

    def authenticate(self, request: Request) -> str:
        """The token for the device that `request` signs for. Raise Refused with the documented code, or Wait."""
        now = round(self._clock() * 1000)
        if not wire.media_type_is(request.content_type, "application/json"):
            raise Refused(Code.PARAM_ERROR, f"Content-Type is {request.content_type!r}; it must be application/json")
        login = wire.login(request.body)
        request.product_key, request.device_name = login.product_key[:_LONGEST_NAME], login.device_name[:_LONGEST_NAME]
        self._flow.before_login(login.product_key, login.device_name, request.address)

        entry = request.entry if request.fresh else self._cache.get_by_name(login.product_key, login.device_name)
        device = entry.device if entry else None
        fault = self._fault(login, device, now)
        if fault and not request.fresh:
            # A refusal is decided on fresh facts alone: a secret changed a moment ago counts, and what the registry
            # does not know takes as long as what it knows.
            raise Wait(lambda: self._load_by_name(request, login))
        if fault or device is None:
            self._flow.refused_login(login.product_key, login.device_name, request.address)
            raise Refused(Code.AUTH_CHECK_ERROR, fault)

        if device.activated is None:
            raise Wait(lambda: self._activate(request, device, now))
        self._flow.login(device.id)
        self._cache.saw(device.id, now)
        return tokens.issue(self._key, device, expires=now + self._token_ttl)

    def publish(self, request: Request, done: Done) -> None:
        """Store the request's body under its topic, then call `done`. Raise Refused with the documented code, or Wait."""
        now = round(self._clock() * 1000)
        token = self._token(request.password)
        entry = request.entry if request.fresh else self._cache.get(token.device_id)
        if not request.fresh and (entry is None or tokens.is_ahead(token, entry.device)):
            raise Wait(lambda: self._load(request, token.device_id))
        tokens.check(token, entry.device if entry else None, self._keys, now=now)
        assert entry is not None
        device = entry.device
        request.product_key, request.device_name = device.product_key, device.name

        self._flow.message(device.id, len(request.body))
        topic = self._topic(request)
        if not topics.may_publish(topic, device, entry.publish_levels):
            raise Refused(Code.PUBLISH_MESSAGE_ERROR, topics.explain(topic, device, entry.classes), topic=topic.text)
        self._cache.saw(device.id, now)
        self._engine.publish(topic.subject, request.body, done)

    def _fault(self, login: wire.Login, device: Device | None, now: int) -> str:
        """Why `login` is not accepted, empty if it is. Each way out has cost one HMAC."""
        right = signature.matches((device or _NOBODY).secret, login.content, login.method, login.sign)
        if device is None:
            return f"there is no device {login.device_name!r} in a product {login.product_key!r}"
        if not right:
            content = login.content.replace(device.secret, "***")
            digits = signature.HEX_DIGITS[login.method]
            length = (
                ""
                if len(login.sign) == digits
                else f"; the sign has {len(login.sign)} digits, {login.method} gives {digits}"
            )
            return f"wrong sign: the server signed {content!r} with {login.method} and the DeviceSecret that it knows{length}"
        if not device.enabled:
            return (
                f"the device is disabled; `uplinkd device enable {device.product_key} {device.name}` lets it in again"
            )
        if login.timestamp is not None and self._window and abs(now - login.timestamp) > self._window:
            off = (login.timestamp - now) / 1000
            return (
                f"stale timestamp: {login.timestamp} is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the server's "
                f"clock ({now}); at most {self._window / 1000:g} s are allowed (timestamp_window)"
            )
        return ""

    def _token(self, text: str | None) -> tokens.Token:
        if not text:
            raise Refused(
                Code.TOKEN_IS_NULL,
                "the request has no password header" if text is None else "the password header is empty",
            )
        token = self._tokens.get(text)
        if token is None:
            token = tokens.read(text, self._keys)
            if len(self._tokens) >= _TOKENS:
                self._tokens.clear()
            self._tokens[text] = token
        return token

    def _topic(self, request: Request) -> topics.Topic:
        if not wire.media_type_is(request.content_type, "application/octet-stream"):
            raise Refused(
                Code.PARAM_ERROR, f"Content-Type is {request.content_type!r}; it must be application/octet-stream"
            )
        if request.query:
            raise Refused(Code.PARAM_ERROR, "the URL has a query string, which /topic does not take")
        topic = self._topics.get(request.path)
        if topic is None:
            topic = topics.parse(request.path)
            if len(self._topics) >= _TOPICS:
                self._topics.clear()
            self._topics[request.path] = topic
        request.topic = topic.text
        return topic

    async def _load_by_name(self, request: Request, login: wire.Login) -> None:
        try:
            request.entry = await self._cache.load_by_name(login.product_key, login.device_name)
        except Unavailable as fault:
            raise Refused(Code.UPDATE_SESSION_ERROR, str(fault)) from fault
        request.fresh = True

    async def _activate(self, request: Request, device: Device, now: int) -> None:
        try:
            request.entry = await self._cache.activate(device, now)
        except Unavailable as fault:
            raise Refused(Code.UPDATE_SESSION_ERROR, str(fault)) from fault
        request.fresh = True

    async def _load(self, request: Request, device_id: int) -> None:
        try:
            request.entry = await self._cache.load(device_id)
        except Unavailable as fault:
            raise Refused(Code.COMMON_ERROR, str(fault)) from fault
        request.fresh = True
