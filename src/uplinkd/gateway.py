"""What uplinkd does for a device: authenticate() and publish() over HTTPS, connect(), report() and subscribe() over MQTT, send()
towards it; each in the order of the specification.

What a device asks for is decided at once from what is in memory. When a fact is lacking, Wait is raised, whose `fetch` brings
it; the door awaits that and calls again. So the usual request needs no task of its own, and the unusual one reads the same
story.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from uplinkd.core import signature, tokens, topics, wire
from uplinkd.core.errors import Code, NotFound, Refused, Rejected, Unavailable
from uplinkd.core.model import Device, DeviceName, Origin, ProductKey, SigningKey
from uplinkd.engine import Done, Downlink, Publisher, Waiting
from uplinkd.flow import Flow
from uplinkd.presence import Presence
from uplinkd.registry.cache import DeviceCache, Entry
from uplinkd.roster import Roster
from uplinkd.settings import Settings

__all__ = ["MAX_MQTT_PAYLOAD_BYTES", "MAX_PAYLOAD_BYTES", "Gateway", "Outcome", "Request", "Sent", "Wait", "check_size"]

MAX_PAYLOAD_BYTES = 128 * 1024
MAX_MQTT_PAYLOAD_BYTES = 256 * 1024

_TOKENS = 100_000
_TOPICS = 20_000
# A message on its way home is nobody else's for so long: more than any answer takes to be written.
_CLAIM_SECONDS = 10.0
# A device asks for two facts at most, one after the other, and has its answer within 5 s.
_REGISTRY_SECONDS = 2.0
_CLAIM_PATIENCE, _CLAIM_PAUSE, _CLAIM_PAUSE_AFAR = 0.2, 0.002, 0.02
# Where nothing of what waits could ride home, the next look is made after so long, or when something new waits.
_FRUITLESS_SECONDS = 5.0
_FRUITLESS = 100_000
_LONGEST_NAME = 64
_DAY = 24 * 3600 * 1000
_OCTETS = "application/octet-stream"
# Who tries a million secrets a second needs 10^15 years for one of so many letters and digits.
_NEVER_GUESSED = 16

# Unknown devices are signed with this secret, so that they cost what a wrong sign costs.
_NOBODY = Device(0, ProductKey(""), DeviceName(""), "0" * 32, False, 0, 0, None, None)


@dataclass(slots=True)
class Request:
    """What a door hands over; below the line what was learned of it on the way, for the record of a refusal, and for a report with
    another body that is the same in all else: it may be handed over anew, once `fresh` is False again.

    `path` is the topic as it stands in the URL, percent-encoded; `query` says whether the URL had a `?`. `network` is whom limits by
    address hold for (see flow.network_of), empty where the device's address is not known.
    """

    address: str
    content_type: str | None
    body: bytes
    password: str | None = None
    path: bytes = b""
    query: bool = False
    network: str = ""
    # ---
    product_key: str = ""
    device_name: str = ""
    topic: str = ""
    entry: Entry | None = None
    fresh: bool = False
    target: topics.Topic | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended, for the record. `endpoint` is auth, topic, http (before it was known) or mqtt; `status` is HTTP's, or
    the return code of a CONNACK; `reason` is for the operator. The code SUCCESS marks a note: nothing was refused. `times`: it stands
    for so many alike."""

    request_id: str
    endpoint: str
    status: int
    code: Code
    reason: str
    address: str
    product_key: str = ""
    device_name: str = ""
    topic: str = ""
    times: int = 1


class Wait(Exception):  # noqa: N818 - not an error: the answer needs a fact that is not in memory
    """Await `fetch()` (which may raise Refused), then call again with the same request."""

    def __init__(self, fetch: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self.fetch = fetch


@dataclass(frozen=True, slots=True)
class Sent:
    """A message was taken for a device: `way` is mqtt when a session has subscribed to it, else waits. `dropped` is the id of
    the message that had to go for it, the oldest of as many as may wait."""

    message_id: int
    way: str
    dropped: int = 0


class Gateway:
    """One for each worker; all its doors share it."""

    def __init__(
        self,
        settings: Settings,
        *,
        cache: DeviceCache,
        engine: Publisher,
        flow: Flow,
        presence: Presence,
        roster: Roster,
        downlink: Downlink,
        keys: list[SigningKey],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._known = cache.get
        self._engine = engine
        self._flow = flow
        self._presence = presence
        self._roster = roster
        self._downlink = downlink
        self._down_limit = settings.down_limit
        self._monotonic = monotonic
        self._fruitless: dict[int, float] = {}
        self._looked_at: set[int] = set()  # for these is looked, and nothing new waits since that began
        downlink.on_waiting(self._look_again)
        self._tokens: dict[str | None, tokens.Token] = {}
        self.take_keys(keys)
        self._clock = clock
        self._token_ttl = round(settings.token_ttl * 1000)
        self._window = round(settings.timestamp_window * 1000)
        self._topics: dict[bytes | str, topics.Topic] = {}

    def take_keys(self, keys: list[SigningKey]) -> None:
        """Sign and verify tokens with these from now on."""
        self._keys = {key.id: key for key in keys}
        self._tokens.clear()
        self._signs: tuple[SigningKey, int, int] | None = None  # the key, and from when until when (ms) it is the one

    def authenticate(self, request: Request) -> str:
        """The token for the device that `request` signs for. Raise Refused with the documented code, or Wait."""
        now = round(self._clock() * 1000)
        self._flow.check_network(request.network)
        if not wire.media_type_is(request.content_type, "application/json"):
            raise Refused(Code.PARAM_ERROR, f"Content-Type is {request.content_type!r}; it must be application/json")
        login = wire.login(request.body)
        entry = self._recognise(request, login, now)
        self._presence.saw(entry, now, request.address)
        return tokens.issue(self._signing_key(now), entry.device, expires=now + self._token_ttl)

    def connect(self, request: Request, login: wire.Login) -> Entry:
        """The device that signs in over MQTT, with its rights. Raise Refused, or Wait."""
        self._flow.check_network(request.network)
        return self._recognise(request, login, round(self._clock() * 1000))

    def publish(self, request: Request, done: Done) -> None:
        """Store the request's body under its topic, then call `done`. Raise Refused with the documented code, or Wait."""
        # Of a callable that is an attribute, first the attribute and then the call: at once, Python 3.11 looks for a method.
        clock, known = self._clock, self._known
        now = round(clock() * 1000)
        token = self._tokens.get(request.password)
        if token is None:
            token = self._token(request.password)
        entry = request.entry if request.fresh else known(token.device_id)
        if entry is None or entry.shown is not token or now >= token.expires:
            entry = self._check_token(request, token, entry, now)
        device = entry.device
        if request.fresh or request.entry is not entry:
            request.product_key, request.device_name, request.entry = device.product_key, device.name, entry
        self._flow.message(device.id, len(request.body), device.product_key, request.network)
        topic = request.target
        if topic is None:
            topic = self._topic(request)
        if topic is not entry.allowed:
            self._check_right(topic, entry)
        self._presence.saw(entry, now, request.address)
        self._engine.publish(topic.subject, request.body, done)

    def report(self, request: Request, entry: Entry, done: Done) -> None:
        """The same for a message over MQTT, to `request.topic` from the device that has signed in."""
        device = entry.device
        self._flow.message(device.id, len(request.body), device.product_key, request.network)
        topic = self._topics.get(request.topic) or self._remember(request.topic, topics.of_text(request.topic))
        if topic is not entry.allowed:
            self._check_right(topic, entry)
        self._engine.publish(topic.subject, request.body, done, Origin.MQTT)

    def before_app(self, key: str, network: str) -> None:
        """Raise Refused 40000 when too many applications' logins from `network` were refused lately."""
        self._flow.before_login("", key, network)

    def refused_app(self, key: str, network: str) -> None:
        """An application's login was refused."""
        self._flow.refused_login("", key, network)

    def heard(self, entry: Entry, address: str, stamp: int) -> None:
        """The device's MQTT session `stamp` (see roster) stands."""
        self._presence.stands(entry, round(self._clock() * 1000), address, stamp)

    def left(self, entry: Entry, stamp: int) -> None:
        """It has ended."""
        self._presence.ended(entry, round(self._clock() * 1000), stamp)

    def subscribe(self, entry: Entry, topic_filter: str) -> None:
        """Return if the device may subscribe to `topic_filter`; raise Refused otherwise."""
        topics.check_filter(topic_filter)
        if not topics.may_subscribe(topic_filter, entry.device, entry.classes):
            reason = topics.explain_filter(topic_filter, entry.device, entry.classes)
            raise Refused(Code.PUBLISH_MESSAGE_ERROR, reason, topic=topic_filter)

    # -- towards devices

    async def send(self, topic_text: str, payload: bytes) -> Sent:
        """Take a message for the device that `topic_text` belongs to; return once it is stored.

        Raise Rejected when it can never arrive (NotFound: no such device), Unavailable when it cannot be stored now.
        """
        topic = _topic_to_send(topic_text)
        entry = await self._cache.load_by_name(topic.product_key, topic.device_name)
        if entry is None:
            raise NotFound(f"there is no device {topic.device_name!r} in a product {topic.product_key!r}")
        device = entry.device
        if not topics.may_receive(topic, device, entry.classes):
            raise Rejected(
                f"{topic.text} is not for messages to a device: {topics.explain_filter(topic.text, device, entry.classes)}"
            )
        check_size(payload)
        by_mqtt = await self._subscribed(device.id, topic.text)
        if not by_mqtt and (fault := wire.fits_home(payload)):
            raise Rejected(
                f"the message cannot wait for a report over HTTPS, and no MQTT session has subscribed: {fault}"
            )
        dropped = await self._oldest_of_too_many(device.id)
        message_id = await self._downlink.store(device.id, topic.text, payload)
        return Sent(message_id, "mqtt" if by_mqtt else "waits", dropped)

    def waits(self, request: Request) -> bool:
        """Whether something may wait for the device whose publish was stored."""
        entry = request.entry
        if entry is None or entry.device.id not in self._downlink.waiting:
            return False
        return self._fruitless.get(entry.device.id, 0.0) <= self._monotonic()

    def _look_again(self, device_id: int) -> None:
        self._fruitless.pop(device_id, None)
        self._looked_at.discard(device_id)

    async def take(self, device_id: int) -> Waiting | None:
        """The oldest message that may ride home in an answer to the device; nobody else takes it until `arrived` or `spared`."""
        if not await self._claim(device_id):
            return None
        after, taken = 0, False
        self._looked_at.add(device_id)
        try:
            while found := await self._downlink.next(device_id, after):
                if not wire.fits_home(found.payload) and not await self._subscribed(device_id, found.topic):
                    taken = True
                    return found
                after = found.sequence
            if after and device_id in self._looked_at:
                if len(self._fruitless) >= _FRUITLESS:
                    self._fruitless.clear()
                self._fruitless[device_id] = self._monotonic() + _FRUITLESS_SECONDS
        finally:
            self._looked_at.discard(device_id)
            if not taken:
                self._let_go(device_id)
        return None

    async def _claim(self, device_id: int) -> bool:
        """The one before may be on its way out still, in this worker, in another or on another gateway."""
        end = self._monotonic() + _CLAIM_PATIENCE
        while not self._flow.claim(device_id, _CLAIM_SECONDS):
            if self._monotonic() > end:
                return False
            await asyncio.sleep(_CLAIM_PAUSE)
        claimed = False
        try:
            while not (claimed := await self._downlink.claim(device_id)) and self._monotonic() < end:  # noqa: ASYNC110 - asks anew
                await asyncio.sleep(_CLAIM_PAUSE_AFAR)
        finally:
            if not claimed:
                self._flow.release(device_id)
        return claimed

    def _let_go(self, device_id: int) -> None:
        self._downlink.unclaim(device_id)
        self._flow.release(device_id)

    async def arrived(self, device_id: int, message: Waiting) -> None:
        """The answer with it was written."""
        try:
            await self._downlink.remove(message.sequence)
        finally:
            self._let_go(device_id)

    def spared(self, device_id: int) -> None:
        """The answer with it could not be written: it waits on."""
        self._let_go(device_id)

    async def _subscribed(self, device_id: int, topic: str) -> bool:
        """Whether an MQTT session takes messages of `topic` for the device: one that stands, or a persistent one that is away."""
        if self._roster.subscribed(device_id, topic):
            return True
        if device_id not in self._downlink.persistent:
            return False
        record = await self._downlink.session(device_id)
        return record is not None and any(topics.filter_matches(each, topic) for each in record.subscriptions)

    async def _oldest_of_too_many(self, device_id: int) -> int:
        if await self._downlink.count(device_id) < self._down_limit:
            return 0
        oldest = await self._downlink.next(device_id)
        return oldest.id if oldest else 0

    # -- what both doors share

    def _recognise(self, request: Request, login: wire.Login, now: int) -> Entry:
        """The device that `login` is of.

        Once so many logins were refused that somebody may be guessing (Flow.guessed), a wrong one is told 40000, and a right one
        passes still: the device itself may share its address with whoever guesses, and 16 characters are never guessed. A shorter
        secret, which only an import can bring, might be: then nothing passes from there, for a right guess must not be told from
        a wrong one.
        """
        request.product_key, request.device_name = login.product_key[:_LONGEST_NAME], login.device_name[:_LONGEST_NAME]
        entry = request.entry if request.fresh else self._cache.get_by_name(login.product_key, login.device_name)
        device = entry.device if entry else None
        right = signature.matches((device or _NOBODY).secret, login.content, login.method, login.sign)
        guessed = self._flow.guessed(login.product_key, login.device_name, request.network)
        if not guessed:
            fault = self._fault(login, device, right, now)
        elif device and right and len(device.secret) >= _NEVER_GUESSED and device.enabled and not self._off(login, now):
            fault = None
        else:
            fault = self._flow.guessing(guessed)
        if fault and not request.fresh:
            # A refusal is decided on fresh facts alone: a secret changed a moment ago counts, and what the registry
            # does not know takes as long as what it knows. But guesses do not keep the registry busy.
            if guessed and not self._flow.may_look_up(request.network):
                raise fault
            raise Wait(lambda: self._load_by_name(request, login))
        if guessed and fault:
            raise fault
        if fault or entry is None or device is None:
            if guessed := self._flow.refused_login(login.product_key, login.device_name, request.network):
                raise self._flow.guessing(guessed)
            raise fault or Refused(Code.AUTH_CHECK_ERROR, "the device is not known")

        if device.activated is None:
            raise Wait(lambda: self._activate(request, device, now))
        self._flow.login(device.id, request.network)
        return entry

    def _check_right(self, topic: topics.Topic, entry: Entry) -> None:
        """Allow `topic`, or raise Refused. What was allowed is not asked again until the registry changes: then the entry is another
        one."""
        device = entry.device
        if not topics.may_publish(topic, device, entry.publish_levels):
            raise Refused(Code.PUBLISH_MESSAGE_ERROR, topics.explain(topic, device, entry.classes), topic=topic.text)
        entry.allowed = topic

    def _off(self, login: wire.Login, now: int) -> int:
        """By how many ms the login's timestamp is off; 0 where that is within what is allowed."""
        off = 0 if login.timestamp is None or not self._window else login.timestamp - now
        return off if abs(off) > self._window else 0

    def _fault(self, login: wire.Login, device: Device | None, right: bool, now: int) -> Refused | None:
        """Why `login`, whose sign is `right` or not, is not accepted; None if it is."""
        if device is None:
            return _unauthenticated(f"there is no device {login.device_name!r} in a product {login.product_key!r}")
        if not right:
            content = login.content.replace(device.secret, "***")
            digits = signature.HEX_DIGITS[login.method]
            length = (
                ""
                if len(login.sign) == digits
                else f"; the sign has {len(login.sign)} digits, {login.method} gives {digits}"
            )
            return _unauthenticated(
                f"wrong sign: the server signed {content!r} with {login.method} and the DeviceSecret that it knows{length}"
            )
        if not device.enabled:
            return _unauthenticated(
                f"the device is disabled; `uplinkd device enable {device.product_key} {device.name}` lets it in again",
                forbidden=True,
            )
        if milliseconds := self._off(login, now):
            off = milliseconds / 1000
            return _unauthenticated(
                f"stale timestamp: {login.timestamp} is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the server's "
                f"clock ({now}); at most {self._window / 1000:g} s are allowed (timestamp_window)"
            )
        return None

    def _signing_key(self, now: int) -> SigningKey:
        if self._signs is None or not self._signs[1] <= now < self._signs[2]:
            until = [moment for key in self._keys.values() for moment in (key.begins, key.retired or 0) if moment > now]
            self._signs = (tokens.signing_key(self._keys.values(), now=now), now, min(until, default=now + _DAY))
        return self._signs[0]

    def _check_token(self, request: Request, token: tokens.Token, entry: Entry | None, now: int) -> Entry:
        """The device that `token` holds for. What held once does, until the registry or the keys change: then the entry or the token
        is another one; a key that is to be rotated out is looked at each time."""
        if entry is None or not tokens.holds(token, entry.device, self._keys, now=now):
            if not request.fresh and (entry is None or tokens.is_ahead(token, entry.device)):
                raise Wait(lambda: self._load(request, token.device_id))
            tokens.check(token, entry.device if entry else None, self._keys, now=now)
            assert entry is not None
        else:
            entry.shown = token
        return entry

    def _token(self, text: str | None) -> tokens.Token:
        if not text:
            raise Refused(
                Code.TOKEN_IS_NULL,
                "the request has no password header" if text is None else "the password header is empty",
            )
        token = tokens.read(text, self._keys)
        if len(self._tokens) >= _TOKENS:
            self._tokens.clear()
        self._tokens[text] = token
        return token

    def _topic(self, request: Request) -> topics.Topic:
        content_type = request.content_type
        if content_type != _OCTETS and not wire.media_type_is(content_type, _OCTETS):
            raise Refused(Code.PARAM_ERROR, f"Content-Type is {content_type!r}; it must be application/octet-stream")
        if request.query:
            raise Refused(Code.PARAM_ERROR, "the URL has a query string, which /topic does not take")
        topic = self._topics.get(request.path)
        if topic is None:
            topic = self._remember(request.path, topics.parse(request.path))
        request.topic, request.target = topic.text, topic
        return topic

    def _remember(self, text: bytes | str, topic: topics.Topic) -> topics.Topic:
        if len(self._topics) >= _TOPICS:
            self._topics.clear()
        self._topics[text] = topic
        return topic

    async def _load_by_name(self, request: Request, login: wire.Login) -> None:
        asked = self._cache.load_by_name(login.product_key, login.device_name)
        request.entry = await _in_time(asked, Code.UPDATE_SESSION_ERROR)
        request.fresh = True

    async def _activate(self, request: Request, device: Device, now: int) -> None:
        request.entry = await _in_time(self._cache.activate(device, now), Code.UPDATE_SESSION_ERROR)
        request.fresh = True

    async def _load(self, request: Request, device_id: int) -> None:
        request.entry = await _in_time(self._cache.load(device_id), Code.COMMON_ERROR)
        request.fresh = True


async def _in_time(asked: Awaitable[Entry | None], code: Code) -> Entry | None:
    """The registry's word; Refused with `code` when there is none in time."""
    try:
        async with asyncio.timeout(_REGISTRY_SECONDS):
            return await asked
    except Unavailable as fault:
        raise Refused(code, str(fault)) from fault
    except TimeoutError as late:
        reason = f"the registry has not answered for {_REGISTRY_SECONDS:g} s: its disk is slow, or another process holds its lock"
        raise Refused(code, reason) from late


def _unauthenticated(reason: str, *, forbidden: bool = False) -> Refused:
    return Refused(Code.AUTH_CHECK_ERROR, reason, forbidden=forbidden)


def _topic_to_send(text: str) -> topics.Topic:
    try:
        topic = topics.of_text(text)
    except Refused as refused:
        raise Rejected(refused.reason) from refused
    if not topic.product_key or not topic.device_name:
        raise Rejected(f"{text} is no topic of a device, such as /${{productKey}}/${{deviceName}}/user/get")
    return topic


def check_size(payload: bytes) -> None:
    """Return if a message for a device may be so large; raise Rejected otherwise."""
    if len(payload) > MAX_MQTT_PAYLOAD_BYTES:
        raise Rejected(f"the message has {len(payload)} bytes; at most {MAX_MQTT_PAYLOAD_BYTES} are allowed")
