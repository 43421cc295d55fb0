"""The records of refusals of all gateways: each keeps its own, and is asked over the bus by whoever wants to see them together.

Where uplinkd looks after its nats-server itself there is one gateway, and its record is read as it is.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from typing import Any

from uplinkd import journal
from uplinkd.core.errors import Unavailable
from uplinkd.engine import Bus, Told
from uplinkd.journal import HeldBack, Refusal, Wanted
from uplinkd.peers import ALIVE, beat_of
from uplinkd.settings import Settings

__all__ = ["RECORDS", "Found", "Records", "answer"]

RECORDS = "uplinkd.records"
"""Where each gateway is asked for what it has recorded; it answers in JSON, with its name."""

_PATIENCE_SECONDS = 1.0
_MOST = 2000
# An answer is one message, and NATS takes 1 MB as shipped.
_MOST_BYTES = 900_000


@dataclass(frozen=True, slots=True)
class Found:
    """Refusals, the oldest first, and which gateways live and have not answered."""

    refusals: list[Refusal]
    silent: list[str] = field(default_factory=list)


def answer(settings: Settings, told: Told) -> bytes:
    """What this gateway has recorded, as it was asked for; call it in a thread."""
    asked = json.loads(told.payload)
    document: dict[str, Any] = {"gateway": settings.gateway}
    try:
        match asked["what"]:
            case "read":
                found = journal.read_shared(settings, Wanted(**asked["wanted"]), min(asked["limit"], _MOST))
                document["refusals"] = _fitting(found)
            case "after":
                last = asked["cursors"].get(settings.gateway)
                document["cursor"], found, _ = journal.after_shared(settings, Wanted(**asked["wanted"]), last)
                document["refusals"] = _fitting(found)
            case "counts":
                document["counts"] = journal.counts(settings, asked["since"])
            case "held_back":
                found_back = journal.held_back(settings, **asked["args"])
                document["held_back"] = [asdict(each) for each in found_back]
    except Unavailable as fault:
        document["fault"] = str(fault)
    return json.dumps(document).encode()


class Records:
    """`gateways` gives the names of those that live; None: whoever is heard of while they are asked."""

    def __init__(self, settings: Settings, bus: Bus, gateways: Callable[[], set[str]] | None = None) -> None:
        self._settings = settings
        self._bus = bus
        self._gateways = gateways

    async def read(self, wanted: Wanted, limit: int) -> Found:
        """As `journal.read`, of all gateways; raise Unavailable where not even the record here can be read."""
        if not self._settings.nats_url:
            return Found(await asyncio.to_thread(journal.read, self._settings, wanted, limit))
        asked = {"what": "read", "wanted": asdict(wanted), "limit": limit}
        answers, silent = await self._ask(asked)
        found = sorted(_refusals(answers), key=attrgetter("id"))
        return Found(found[-limit:], silent)

    async def after(self, wanted: Wanted, cursors: dict[str, int] | None) -> tuple[dict[str, int], list[Refusal]]:
        """As `journal.after`: the cursors of all gateways for the next look, and what was recorded since these."""
        if not self._settings.nats_url:
            last = (cursors or {}).get("")
            cursor, found, _ = await asyncio.to_thread(journal.after, self._settings, wanted, last)
            return {"": cursor}, found
        asked = {"what": "after", "wanted": asdict(wanted), "cursors": cursors or {}}
        answers, _ = await self._ask(asked)
        fresh = {name: told["cursor"] for name, told in answers.items() if "cursor" in told}
        return {**(cursors or {}), **fresh}, sorted(_refusals(answers), key=attrgetter("at"))

    async def counts(self, since: int) -> dict[int, int]:
        """As `journal.counts`."""
        if not self._settings.nats_url:
            return await asyncio.to_thread(journal.counts, self._settings, since)
        answers, _ = await self._ask({"what": "counts", "since": since})
        total: Counter[int] = Counter()
        for told in answers.values():
            total.update({int(code): count for code, count in told.get("counts", {}).items()})
        return dict(total)

    async def held_back(
        self, since: int, *, product: str | None = None, device: str = "", limit: int = 5
    ) -> list[HeldBack]:
        """As `journal.held_back`."""
        asked = {"since": since, "product": product, "device": device, "limit": limit}
        if not self._settings.nats_url:
            return await asyncio.to_thread(lambda: journal.held_back(self._settings, **asked))  # type: ignore[arg-type]
        answers, _ = await self._ask({"what": "held_back", "args": asked})
        total: dict[HeldBack, int] = {}
        for told in answers.values():
            for each in (HeldBack(**row) for row in told.get("held_back", [])):
                same = replace(each, times=0)
                total[same] = total.get(same, 0) + each.times
        most = sorted(total.items(), key=lambda item: -item[1])[:limit]
        return [replace(each, times=times) for each, times in most]

    async def _ask(self, asked: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """The answers by gateway, as soon as all who live have given theirs or within a second; and who has not. While the engine is
        away only this gateway is asked."""
        body = json.dumps(asked).encode()
        if not self._bus.connected:
            own = json.loads(await asyncio.to_thread(answer, self._settings, Told(RECORDS, body, {})))
            others = (self._gateways() if self._gateways else set()) - {self._settings.gateway}
            return {self._settings.gateway: own}, sorted(others)
        answers: dict[str, dict[str, Any]] = {}
        heard: set[str] = set()
        complete = asyncio.Event()

        def take(told: Told) -> None:
            if "Status" not in told.headers:  # NATS says itself when nobody is there
                document = json.loads(told.payload)
                answers[document["gateway"]] = document
                if self._gateways and self._gateways() <= answers.keys():
                    complete.set()

        inbox = f"_INBOX.records.{secrets.token_hex(8)}"
        ends = [self._bus.listen(inbox, take)]
        if self._gateways is None:
            ends.append(self._bus.listen(ALIVE, lambda told: heard.add(beat_of(told, 0.0).gateway)))
        try:
            self._bus.tell(RECORDS, body, reply=inbox)
            async with asyncio.timeout(_PATIENCE_SECONDS + (0.2 if self._gateways is None else 0.0)):
                await complete.wait()
        except TimeoutError:
            pass
        finally:
            for end in ends:
                end()
        alive = self._gateways() if self._gateways else heard
        faulty = {name for name, told in answers.items() if "fault" in told}
        return answers, sorted((alive - answers.keys()) | faulty)


def _refusals(answers: dict[str, dict[str, Any]]) -> list[Refusal]:
    return [replace(Refusal(**row), gateway=name) for name, told in answers.items() for row in told.get("refusals", [])]


def _fitting(refusals: list[Refusal]) -> list[dict[str, Any]]:
    """As many of the newest as one answer holds."""
    rows: list[dict[str, Any]] = []
    size = 0
    for each in reversed(refusals):
        row = asdict(each)
        size += len(json.dumps(row))
        if size > _MOST_BYTES:
            break
        rows.append(row)
    rows.reverse()
    return rows
