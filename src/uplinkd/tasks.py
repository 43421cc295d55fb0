"""asyncio tasks with an owner, and an end for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

__all__ = ["end_tasks", "spawn"]

_AGAIN_SECONDS = 0.1


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
