"""Where commands look at the messages of consumer groups: the engine of this machine, or a server elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from uplinkd.asking import Live, Trial, live_now, try_hook
from uplinkd.cli.common import server_elsewhere, warn
from uplinkd.cli.messages import may_be_there
from uplinkd.core.errors import Unavailable
from uplinkd.core.groups import Group
from uplinkd.engine import DeadLetter
from uplinkd.engine.embedded import access_for
from uplinkd.engine.groups import JetStreamDesk, open_desk
from uplinkd.engine.standing import Standing, Standings
from uplinkd.registry import ImportProgress
from uplinkd.settings import Settings

__all__ = ["Desk", "desk_of", "standings_of"]

T = TypeVar("T")

# What is wrong with the engine is told once, in the words of the command: without any handler its log would go to standard error.
logging.getLogger("uplinkd.engine").addHandler(logging.NullHandler())


class Desk(Protocol):
    """The messages of groups, of this machine or of a server elsewhere."""

    def standings(self, groups: Sequence[Group]) -> list[Standing | None]: ...
    def try_hook(self, group: Group) -> Trial: ...
    def look(self, group: Group) -> tuple[Standing, Live]: ...
    def dead(self, group: Group, *, after: int = 0, limit: int = 100) -> list[DeadLetter]: ...
    def dead_letter(self, group: Group, number: int) -> DeadLetter | None: ...
    def retry(
        self, group: Group, numbers: Sequence[int] | None = None, progress: ImportProgress | None = None
    ) -> int: ...
    def purge(self, group: Group, numbers: Sequence[int] | None = None) -> int: ...


@contextlib.contextmanager
def desk_of(settings: Settings, *, serving: bool = False) -> Iterator[Desk]:
    """`serving`: only with a server that runs, else Unavailable."""
    if server := server_elsewhere():
        from uplinkd.remote import RemoteDesk

        yield RemoteDesk(server)
        return
    with access_for(settings, start=not serving) as access:

        def run(act: Callable[[JetStreamDesk], Awaitable[T]]) -> T:
            async def at_desk() -> T:
                desk = await open_desk(access)
                try:
                    return await act(desk)
                finally:
                    await desk.close()

            return asyncio.run(at_desk())

        yield _Here(run)


class _Here:
    """The engine of this machine; `run` opens a desk at it for what is done there."""

    def __init__(self, run: Callable[[Callable[[JetStreamDesk], Awaitable[Any]]], Any]) -> None:
        self._run = run

    def standings(self, groups: Sequence[Group]) -> list[Standing | None]:
        return list(self._run(lambda desk: Standings(desk).measured(groups)))

    def try_hook(self, group: Group) -> Trial:
        patience = group.plan.webhook.timeout if group.plan.webhook else 0.0
        trial: Trial = self._run(lambda desk: try_hook(desk.bus, group.name, patience=patience))
        return trial

    def look(self, group: Group) -> tuple[Standing, Live]:
        async def look(desk: JetStreamDesk) -> tuple[Standing, Live]:
            (standing,) = await Standings(desk).measured([group])
            return standing, await live_now(desk.bus)

        found: tuple[Standing, Live] = self._run(look)
        return found

    def dead(self, group: Group, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        return list(self._run(lambda desk: desk.dead(group, after=after, limit=limit)))

    def dead_letter(self, group: Group, number: int) -> DeadLetter | None:
        found: DeadLetter | None = self._run(lambda desk: desk.dead_letter(group, number))
        return found

    def retry(self, group: Group, numbers: Sequence[int] | None = None, progress: ImportProgress | None = None) -> int:
        def tell(count: int) -> None:
            if progress:
                progress("retrying", None, count)

        return int(self._run(lambda desk: desk.retry(group, numbers, progress=tell)))

    def purge(self, group: Group, numbers: Sequence[int] | None = None) -> int:
        return int(self._run(lambda desk: desk.purge(group, numbers)))


def standings_of(settings: Settings, groups: Sequence[Group]) -> list[Standing | None]:
    """None for all while the engine is away, which is said."""
    if groups and may_be_there(settings):
        try:
            with desk_of(settings) as desk:
                return desk.standings(groups)
        except Unavailable as fault:
            warn(f"how far they are is not known: {fault}")
    return [None] * len(groups)
