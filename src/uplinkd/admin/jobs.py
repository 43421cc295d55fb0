"""Long work of operators: it runs in a thread, tells how far it is, and can be cancelled."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from uplinkd.admin.access import TooOften
from uplinkd.core.errors import NotFound, Rejected, Unavailable
from uplinkd.core.operators import acting

__all__ = ["Cancelled", "Job", "JobState", "Jobs", "Progress"]

log = logging.getLogger("uplinkd.admin")

_KEPT = 50
_AT_ONCE = 3


class JobState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Cancelled(Exception):  # noqa: N818 - names what happened
    """Somebody has cancelled the work."""


@dataclass(slots=True)
class Job:
    """`done` of `total` (None: not known) in `unit`; `result` when it is done, `fault` when it has failed; times in ms."""

    id: str
    kind: str
    target: str
    by: str
    begun: int
    unit: str
    state: JobState = JobState.RUNNING
    done: int = 0
    total: int | None = None
    result: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    ended: int | None = None
    cancelling: bool = False


class Progress:
    """The pen of whoever does the work."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, done: int, total: int | None = None) -> None:
        """Tell how far it is; raise Cancelled when it is to end here."""
        self._job.done = done
        if total is not None:
            self._job.total = total
        if self._job.cancelling:
            raise Cancelled


class Jobs:
    """All long work of this process; what has ended is remembered for a while."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self, kind: str, target: str, unit: str, act: Callable[[Progress], dict[str, Any]], *, total: int | None = None
    ) -> Job:
        """Have `act` done in a thread; it returns the result. Raise TooOften while too much is under way."""
        if sum(job.state is JobState.RUNNING for job in self._jobs.values()) >= _AT_ONCE:
            raise TooOften(5, f"{_AT_ONCE} jobs are under way: wait for one to end, or cancel it")
        job = Job(secrets.token_hex(8), kind, target, acting.get().name, _now(), unit, total=total)
        self._jobs[job.id] = job
        ended = [each.id for each in self._jobs.values() if each.state is not JobState.RUNNING]
        for each in ended[: max(0, len(self._jobs) - _KEPT)]:
            del self._jobs[each]
        task = asyncio.get_running_loop().create_task(self._run(job, act))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    def all(self) -> list[Job]:
        """Newest first."""
        return list(reversed(self._jobs.values()))

    def get(self, job_id: str) -> Job:
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFound(f"there is no job {job_id!r}; a restart of the server forgets jobs") from None

    def cancel(self, job_id: str) -> Job:
        """Ask it to end; it does at its next step."""
        job = self.get(job_id)
        job.cancelling = True
        return job

    async def close(self) -> None:
        """Cancel what runs and wait for its next step."""
        for job in self._jobs.values():
            job.cancelling = True
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=2)

    async def _run(self, job: Job, act: Callable[[Progress], dict[str, Any]]) -> None:
        try:
            job.result = await asyncio.to_thread(act, Progress(job))
            job.state = JobState.DONE
        except Cancelled:
            job.state = JobState.CANCELLED
        except (Rejected, Unavailable) as fault:
            job.state, job.fault = JobState.FAILED, str(fault)
        except Exception:
            log.exception("a fault of ours in the job %s", job.kind)
            job.state, job.fault = JobState.FAILED, "a fault of uplinkd; its log has the traceback"
        job.ended = _now()


def _now() -> int:
    return time.time_ns() // 1_000_000
