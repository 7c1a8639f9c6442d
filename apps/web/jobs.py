"""Diagnoses at work and done, in memory only: each belongs to one person, has an unguessable id, and goes in minutes.

Nothing of an uploaded image is ever written to a disk.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from leukoflow.apps.web.engine import BusyError
from leukoflow.apps.web.guard import log
from leukoflow.apps.web.settings import UploadLimits
from leukoflow.core.errors import LeukoflowError, place_of

if TYPE_CHECKING:
    from leukoflow.apps.web.uploads import Upload


_AT_ONCE = 8  # images of one person in the engine's queue
_TRIES = 5  # of an image that found the queue full, a second apart


class EngineLike(Protocol):
    """What is needed of `apps.web.engine.Engine`."""

    bundles: tuple[Any, ...]

    async def examine(
        self,
        data: bytes,
        *,
        who: str,
        bundle: str = "",
        um_per_px: float | None = None,
        told: Callable[[str], None] | None = None,
    ) -> Any:
        """A Finding."""

    def load(self) -> Any:
        """An EngineLoad."""


@dataclass(slots=True)
class Item:
    """One image with one bundle. `finding` or `error` is there once `stage` is `done`."""

    name: str  # as the browser gave it, for display only
    size: int
    bundle: str  # empty: the first one
    stage: str = "waiting"  # then decode, normalize, segment, extract, classify, done
    finding: Any = None  # leukoflow.tasks.inference.single.Finding
    error: str = ""  # why there is none, for people
    busy: bool = False  # the error is that the queue was full
    fault: bool = False  # the error is the program's, not the image's
    seconds: float = 0.0  # from upload to result
    data: bytes = b""  # the image as uploaded, for the original layer at full size
    um_per_px: float | None = None  # as whoever sent it said

    @property
    def done(self) -> bool:
        """Whether nothing more will happen."""
        return self.stage == "done"


@dataclass(slots=True, eq=False)
class Job:
    """What one upload has become. `version` grows with every change."""

    id: str
    owner: str
    items: list[Item]  # of each picture as many as there are bundles
    pictures: int = 0  # that were sent, unpacked from archives
    created: float = field(default_factory=time.monotonic)
    version: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    @property
    def done(self) -> bool:
        """Whether all images have a result."""
        return all(item.done for item in self.items)

    @property
    def size(self) -> int:
        """Bytes held, about."""
        return sum(len(i.data) + _weight(i.finding) for i in self.items)

    def tell(self) -> None:
        """Wakes whoever watches."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def changes(self, seconds: float = 15.0) -> AsyncIterator[int]:
        """The version at once, after every change, and at least every so many seconds; ends with the job."""
        while True:
            event = self._changed
            yield self.version
            if self.done:
                return
            try:
                await asyncio.wait_for(event.wait(), seconds)
            except TimeoutError:
                continue

    async def wait(self) -> None:
        """Until all images have a result."""
        async for _ in self.changes():
            pass


class Jobs:
    """All jobs of this server."""

    def __init__(self, limits: UploadLimits) -> None:
        self._limits = limits
        self._jobs: dict[str, Job] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}

    def start(
        self,
        owner: str,
        uploads: Sequence[Upload],
        engine: EngineLike,
        *,
        bundles: Sequence[str] = ("",),
        um_per_px: float | None = None,
    ) -> Job:
        """Begins to diagnose each image with each bundle, in the background. To be called within the event loop.

        Raises BusyError (503) where others' images fill the memory.
        """
        if sum(j.size for j in self._jobs.values() if not j.done) > self._limits.jobs_mb << 20:
            raise BusyError("many images are waiting to be diagnosed; try again in a moment", 5)
        items = [
            Item(
                u.name, len(u.data), bundle, "done" if u.refusal else "waiting", None, u.refusal or "", data=u.data,
                um_per_px=um_per_px,
            )
            for u in uploads
            for bundle in bundles
        ]  # fmt: skip
        job = Job(secrets.token_urlsafe(16), owner, items, len(uploads))
        self.put(job)
        job._task = asyncio.create_task(self._work(job, engine))
        return job

    def put(self, job: Job) -> None:
        """Keeps a job; older ones of the same person, then of all, make room."""
        self._sweep()
        self._jobs[job.id] = job
        mine = [j for j in self._jobs.values() if j.owner == job.owner]
        for old in mine[: max(0, len(mine) - self._limits.jobs_each)]:
            self._drop(old)
        finished = [j for j in self._jobs.values() if j.done and j is not job]
        while finished and sum(j.size for j in self._jobs.values()) > self._limits.jobs_mb << 20:
            self._drop(finished.pop(0))

    def get(self, job_id: str, owner: str) -> Job | None:
        """The job of that person; None where there is none (any more), also for somebody else's."""
        self._sweep()
        job = self._jobs.get(job_id)
        return job if job is not None and job.owner == owner else None

    def of(self, owner: str) -> list[Job]:
        """All jobs of a person, newest first."""
        self._sweep()
        return [j for j in reversed(self._jobs.values()) if j.owner == owner]

    def drop(self, job_id: str, owner: str) -> bool:
        """Forgets a job at once."""
        job = self.get(job_id, owner)
        if job is not None:
            self._drop(job)
        return job is not None

    async def close(self) -> None:
        """Stops what is at work and forgets everything."""
        tasks = [j._task for j in self._jobs.values() if j._task is not None]
        for job in list(self._jobs.values()):
            self._drop(job)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _drop(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        if job._task is not None:
            job._task.cancel()

    def _sweep(self) -> None:
        oldest = time.monotonic() - self._limits.job_minutes * 60
        for job in [j for j in self._jobs.values() if j.created < oldest]:
            self._drop(job)

    async def _work(self, job: Job, engine: EngineLike) -> None:
        # Few of one person are in the engine's queue at a time, so that a large upload never fills it.
        slots = self._slots.setdefault(job.owner, asyncio.Semaphore(_AT_ONCE))

        async def one(item: Item) -> None:
            def told(stage: str) -> None:
                item.stage = stage
                job.tell()

            async with slots:
                try:
                    for attempt in range(_TRIES):
                        try:
                            item.finding = await engine.examine(
                                item.data, who=job.owner, bundle=item.bundle, um_per_px=item.um_per_px, told=told
                            )
                            break
                        except LeukoflowError as error:
                            item.busy = isinstance(error, BusyError)
                            if not item.busy or attempt == _TRIES - 1:
                                item.error = str(error)
                                break
                        item.stage = "waiting"
                        await asyncio.sleep(1.0)
                except Exception as error:
                    log.error("%s", place_of(error))
                    item.error = "this image could not be classified because of a fault of the program"
                    item.fault = True
                finally:
                    item.seconds = time.monotonic() - job.created
                    item.stage = "done"
                    job.tell()

        await asyncio.gather(*(one(i) for i in job.items if not i.done))
        job.tell()
        if not any(j.owner == job.owner and not j.done for j in self._jobs.values()):
            self._slots.pop(job.owner, None)


def _weight(finding: Any) -> int:
    total = 0
    for tile in getattr(finding, "tiles", ()):
        for name in ("original", "normalized", "semantic", "cells", "maps"):
            total += getattr(getattr(tile, name, None), "nbytes", 0)
    return total
