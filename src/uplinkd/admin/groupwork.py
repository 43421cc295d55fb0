"""What is done to the dead letters of consumer groups: at once, or as long work."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi.concurrency import run_in_threadpool

from uplinkd import asking
from uplinkd.admin.jobs import Job, Progress
from uplinkd.admin.office import Office
from uplinkd.asking import Trial
from uplinkd.core import webhooks
from uplinkd.core.groups import Group, Plan

__all__ = ["check_target", "purge", "retry", "retry_all", "try_hook"]


def check_target(office: Office, plan: Plan) -> None:
    """Raise Rejected when its webhook's URL alone shows that this server may never reach it."""
    if plan.webhook:
        webhooks.check_target(plan.webhook.url, office.settings.webhook_networks)


async def try_hook(office: Office, group: Group) -> Trial:
    """Have a sample event posted; the audit has it first. Raise Unavailable or Rejected."""
    await run_in_threadpool(office.registry.operators.note, "group.test", group.name)
    patience = group.plan.webhook.timeout if group.plan.webhook else 0.0
    return await asking.try_hook(office.bus, group.name, patience=patience)


async def retry(office: Office, group: Group, numbers: Sequence[int]) -> int:
    """Offer these dead letters again; the audit has it first."""
    await _note(office, "group.retry", group, numbers)
    return await office.desk.retry(group, numbers)


async def purge(office: Office, group: Group, numbers: Sequence[int] | None) -> int:
    """Throw these dead letters, or all, away; the audit has it first."""
    await _note(office, "group.purge", group, numbers)
    return await office.desk.purge(group, numbers)


async def retry_all(office: Office, group: Group) -> Job:
    """Begin to offer all dead letters again: of 100,000 it takes half a minute. Cancelled, it leaves the others."""
    (standing,) = await office.standings([group])
    loop = asyncio.get_running_loop()

    def act(progress: Progress) -> dict[str, Any]:
        work = office.desk.retry(group, progress=progress)
        return {"count": asyncio.run_coroutine_threadsafe(work, loop).result()}

    await _note(office, "group.retry", group, None)
    return office.jobs.start("dead-letter-retry", group.name, "messages", act, total=standing.state.dead)


async def _note(office: Office, action: str, group: Group, numbers: Sequence[int] | None) -> None:
    detail = "all"
    if numbers is not None:
        detail = f"dead letters {' '.join(map(str, numbers[:10]))}{' …' if len(numbers) > 10 else ''}"
    await run_in_threadpool(office.registry.operators.note, action, group.name, detail)
