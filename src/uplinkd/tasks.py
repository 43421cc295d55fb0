"""asyncio tasks with an owner, and an end for certain; and turns for those who have more to do than their share."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["Turns", "end_tasks", "spawn"]

_AGAIN_SECONDS = 0.1
_AT_ONCE = 4


def spawn(act: Coroutine[Any, Any, None], owned: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    """Run `act` as a task that is in `owned` until it has ended: asyncio alone would let it be collected."""
    task = asyncio.get_running_loop().create_task(act)
    owned.add(task)
    task.add_done_callback(owned.discard)
    return task


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and return when all have ended; what they raised is passed over.

    Once is not enough: before Python 3.12, asyncio.wait_for swallows a cancellation that comes in the moment in which what it
    waits for is there (python/cpython#86296), and the task goes on.
    """
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=_AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)


class Turns:
    """Those that have used up their share of the event loop wait here, and go on one after the other: four in each turn of the loop,
    so that a turn is no longer the more of them there are."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._called = False

    def wait(self, go_on: Callable[[], None]) -> None:
        self._waiting.append(go_on)
        self._call()

    def _call(self) -> None:
        if not self._called:
            self._called = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        try:
            for _ in range(min(_AT_ONCE, len(self._waiting))):
                self._waiting.popleft()()
        finally:  # a fault of ours in one's turn is not the end of the others'
            self._called = False
            if self._waiting:
                self._call()
