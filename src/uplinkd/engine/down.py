"""What waits for devices, in JetStream: one stream of messages with a subject for each device, one of persistent sessions.

A message is stored, then told over the bus: so whoever hears of it finds it. Who was not listening at that moment finds it
when its connection stands anew, or at the next look at all subjects.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Set
from typing import Any
from urllib.parse import quote, unquote

from uplinkd.core.errors import Unavailable
from uplinkd.engine import Bus, SessionRecord, Told, Waiting
from uplinkd.engine.api import ApiError, NotThere, ask_api, document_of, get_of_leader, get_stored
from uplinkd.engine.stream import Base, base_of_metadata, new_base, spread, with_base
from uplinkd.settings import Settings

__all__ = ["JetStreamDownlink", "shapes"]

DOWN, SESSIONS, CLAIMS = "UPLINKD_DOWN", "UPLINKD_SESSIONS", "UPLINKD_CLAIMS"
_DOWN_SUBJECT, _SESSION_SUBJECT, _CLAIM_SUBJECT = "uplinkd.down.", "uplinkd.session.", "uplinkd.claim."
# What a gateway claims is nobody else's for so long, should it die meanwhile.
_CLAIM_SECONDS = 10
_FIRST_OF_ITS_SUBJECT = {"Nats-Expected-Last-Subject-Sequence": "0"}
_NOTE = "uplinkd.note."
_TOPIC_HEADER = "Uplinkd-Topic"
# Its ids lie in a range of their own: base + sequence of two streams could meet.
_DOWN_IDS = 1 << 62
_LOOK_SECONDS = 30.0
_PAGE = 100_000


def shapes(settings: Settings) -> list[dict[str, Any]]:
    """How the streams of this module are made: of what waits, of sessions, and, where there may be other gateways, of claims."""
    age = round(settings.down_age * 1e9)

    def shape(name: str, subject: str, keep: int, age: int, storage: str = "file") -> dict[str, Any]:
        return {
            "name": name,
            "subjects": [f"{subject}*"],
            "retention": "limits",
            "storage": storage,
            "discard": "old",
            "max_age": age,
            "max_msgs_per_subject": keep,
            **spread(settings),
            "duplicate_window": min(age, 120 * 10**9),
            "allow_direct": True,
        }

    claims = [shape(CLAIMS, _CLAIM_SUBJECT, 1, _CLAIM_SECONDS * 10**9, "memory")] if settings.nats_url else []
    return [
        shape(DOWN, _DOWN_SUBJECT, settings.down_limit, age),
        shape(SESSIONS, _SESSION_SUBJECT, 1, age),
        *claims,
    ]


class JetStreamDownlink:
    """`engine.Downlink` of one worker; `shared` tells whether other gateways live. `run` looks after it until cancelled."""

    def __init__(
        self,
        settings: Settings,
        bus: Bus,
        *,
        shared: Callable[[], bool] = bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._shared = shared
        self._replicated = False
        self._claims: dict[int, int] = {}
        self._clock = clock
        self._base = Base()
        self._acts: list[Callable[[int], None]] = []
        # Device → which note has told last that something waits for it: what is found meanwhile may be older.
        self._told: dict[int, int] = {}
        self._notes = itertools.count()
        self.waiting: Set[int] = self._told.keys()
        self.persistent: set[int] = set()
        self._looking = asyncio.Lock()
        self._news: dict[int, bool] = {}  # of sessions, while they are looked at: what is found then may be older
        bus.listen(f"{_NOTE}*.*", self._noted)
        bus.on_connected(self._connected)

    def on_waiting(self, act: Callable[[int], None]) -> None:
        self._acts.append(act)

    async def run(self) -> None:
        """Look anew now and then: a note may have been lost with its sender, a stream deleted by hand."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._bus.connected:
                with contextlib.suppress(Unavailable):
                    await self._settle()

    async def store(self, device_id: int, topic: str, payload: bytes) -> int:
        base = self._known_base()
        answer = await self._bus.ask(f"{_DOWN_SUBJECT}{device_id}", payload, {_TOPIC_HEADER: quote(topic, safe="/")})
        sequence = int(document_of(answer.payload)["seq"])
        self._note("down", device_id)
        return base.id(sequence)

    async def count(self, device_id: int) -> int:
        subject = f"{_DOWN_SUBJECT}{device_id}"
        info = await self._call(f"STREAM.INFO.{DOWN}", {"subjects_filter": subject})
        return int((info["state"].get("subjects") or {}).get(subject, 0))

    async def next(self, device_id: int, after: int = 0) -> Waiting | None:
        base, told = self._known_base(), self._told.get(device_id)
        found = await self._stored(DOWN, {"seq": after + 1, "next_by_subj": f"{_DOWN_SUBJECT}{device_id}"})
        if found is None:
            if not after and told is not None and told == self._told.get(device_id):
                del self._told[device_id]
            return None
        sequence = int(found.headers["Nats-Sequence"])
        return Waiting(base.id(sequence), sequence, unquote(found.headers.get(_TOPIC_HEADER, "")), found.payload)

    async def remove(self, sequence: int) -> None:
        try:
            await self._call(f"STREAM.MSG.DELETE.{DOWN}", {"seq": sequence, "no_erase": True})
        except ApiError as error:
            if error.code not in (400, 404):
                raise

    async def claim(self, device_id: int) -> bool:
        if not self._shared():
            return True
        try:
            answer = document_of(
                (await self._bus.ask(f"{_CLAIM_SUBJECT}{device_id}", b"", _FIRST_OF_ITS_SUBJECT)).payload
            )
        except ApiError as error:
            if error.code != 400:
                raise
            return False
        self._claims[device_id] = int(answer["seq"])
        return True

    def unclaim(self, device_id: int) -> None:
        if sequence := self._claims.pop(device_id, 0):
            body = json.dumps({"seq": sequence, "no_erase": True}).encode()
            self._bus.tell(f"$JS.API.STREAM.MSG.DELETE.{CLAIMS}", body, reply=f"{_CLAIM_SUBJECT}none")

    async def session(self, device_id: int) -> SessionRecord | None:
        found = await self._stored(SESSIONS, {"last_by_subj": f"{_SESSION_SUBJECT}{device_id}"})
        if found is None:
            return None
        facts = json.loads(found.payload)
        return SessionRecord(facts["subscriptions"], facts["sent"])

    async def save_session(self, device_id: int, record: SessionRecord) -> None:
        payload = json.dumps({"subscriptions": record.subscriptions, "sent": record.sent}).encode()
        document_of((await self._bus.ask(f"{_SESSION_SUBJECT}{device_id}", payload)).payload)
        self._persists(device_id, True)
        self._note("session", device_id)

    async def forget_session(self, device_id: int) -> None:
        await self._call(f"STREAM.PURGE.{SESSIONS}", {"filter": f"{_SESSION_SUBJECT}{device_id}"})
        self._persists(device_id, False)
        self._note("gone", device_id)

    def _known_base(self) -> Base:
        if not self._base:
            raise Unavailable("the engine has only just been reached")
        return self._base

    # -- what others tell, and what is found

    def _note(self, what: str, device_id: int) -> None:
        self._bus.tell(f"{_NOTE}{what}.{device_id}", b"")

    def _noted(self, told: Told) -> None:
        _, _, what, number = told.subject.split(".")
        device_id = int(number)
        match what:
            case "down":
                self._waits(device_id)
            case "session":
                self._persists(device_id, True)
            case "gone":
                self._persists(device_id, False)

    def _persists(self, device_id: int, there: bool) -> None:
        (self.persistent.add if there else self.persistent.discard)(device_id)
        if self._looking.locked():
            self._news[device_id] = there

    def _waits(self, device_id: int) -> None:
        self._told[device_id] = next(self._notes)
        for act in self._acts:
            act(device_id)

    async def _connected(self) -> None:
        """Whatever was told meanwhile was missed, also for whom something waited before."""
        self._told.clear()
        await self._settle()

    async def _settle(self) -> None:
        """Once the connection stands: see that the streams are there and as set, then what waits in them."""
        down, *_ = [await self._ensure(shape) for shape in shapes(self._settings)]
        self._base = base_of_metadata(down["config"])
        self._replicated = down["config"]["num_replicas"] > 1
        await self._look()

    async def _look(self) -> None:
        for device_id in await self._devices(DOWN):
            if device_id not in self.waiting:
                self._waits(device_id)
        async with self._looking:
            self._news.clear()
            found = await self._devices(SESSIONS)
            self.persistent = {*found, *self._news} - {
                device_id for device_id, there in self._news.items() if not there
            }

    async def _devices(self, stream: str) -> set[int]:
        """The ids for which the stream holds something."""
        found: set[int] = set()
        while True:
            info = await self._call(f"STREAM.INFO.{stream}", {"subjects_filter": ">", "offset": len(found)})
            subjects = info["state"].get("subjects") or {}
            before = len(found)
            found.update(int(subject.rpartition(".")[2]) for subject in subjects)
            if len(subjects) < _PAGE or len(found) == before:
                return found

    async def _ensure(self, shape: dict[str, Any]) -> dict[str, Any]:
        stream = shape["name"]
        try:
            info = await self._call(f"STREAM.INFO.{stream}", {})
        except NotThere:
            config = with_base(shape, _DOWN_IDS + new_base(round(self._clock() * 1000)))
            try:
                info = await self._call(f"STREAM.CREATE.{stream}", config)
            except ApiError as error:
                if error.code != 400:
                    raise
                info = await self._call(f"STREAM.INFO.{stream}", {})  # another worker was quicker
        if self._settings.nats_url:  # the owner's servers: see streams.check
            return info
        settled = ("max_age", "max_msgs_per_subject", "duplicate_window")
        if any(info["config"].get(name) != shape.get(name) for name in settled):
            changed = {**info["config"], **{name: shape[name] for name in settled}}
            info = await self._call(f"STREAM.UPDATE.{stream}", changed)
        return info

    async def _stored(self, stream: str, wanted: dict[str, Any]) -> Told | None:
        """A stored message. Of several replicas that which leads is asked: another one may not have heard yet what was just removed, or
        stored."""
        if not self._replicated:
            return await get_stored(self._bus, stream, wanted)
        return await get_of_leader(self._bus, stream, wanted)

    async def _call(self, action: str, body: dict[str, Any]) -> dict[str, Any]:
        return await ask_api(self._bus, action, body)
