"""Uploads and their diagnoses, in memory only: each belongs to one person, has an unguessable id, and soon expires.

Nothing of an uploaded image is ever written to disk.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import Request

from leukoflow.apps.web.engine.errors import BusyError
from leukoflow.apps.web.settings import UploadLimits
from leukoflow.core.errors import LeukoflowError, place_of

if TYPE_CHECKING:
    from leukoflow.apps.web.gate.uploads import Upload

_log = logging.getLogger("leukoflow.web")
_AT_ONCE = 8  # images of one person in the engine's queue
_TRIES = 5  # of an image that found the queue full, a second apart


class EngineLike(Protocol):
    """What is needed of `apps.web.engine.engine.Engine`."""

    bundles: tuple[Any, ...]

    async def examine(
        self,
        data: bytes,
        *,
        who: str,
        bundle: str = "",
        um_per_px: float | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> Any:
        """Return a Diagnosis."""

    def load(self) -> Any:
        """Return an EngineLoad."""


@dataclass(slots=True)
class Item:
    """One image with one bundle. It has a `diagnosis` or an `error` once `stage` is `done`."""

    name: str  # as the browser gave it, for display only
    size: int
    bundle: str  # empty: the first one
    stage: str = "waiting"  # then decode, normalize, segment, extract, classify, done
    diagnosis: Any = None  # of leukoflow.tasks.inference.single.Examination
    error: str = ""  # why there is none, for people
    busy: bool = False  # the error is that the queue was full
    fault: bool = False  # the error is the program's, not the image's
    seconds: float = 0.0  # from upload to result
    data: bytes = b""  # the image as uploaded, for the original layer at full size
    um_per_px: float | None = None  # as stated with the upload

    @property
    def done(self) -> bool:
        """Whether it has a result."""
        return self.stage == "done"


@dataclass(slots=True, eq=False)
class Job:
    """One upload and its results. `version` grows with every change."""

    id: str
    owner: str
    items: list[Item]  # one per image and bundle
    pictures: int = 0  # images that were sent, unpacked from archives
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
        """Bytes held, approximately."""
        return sum(len(i.data) + _weight(i.diagnosis) for i in self.items)

    def notify(self) -> None:
        """Wake everyone who waits for a change."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def changes(self, seconds: float = 15.0) -> AsyncIterator[int]:
        """Yield the version at once, after every change, and at least every `seconds`; end with the job."""
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
        """Wait until all images have a result."""
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
        """Diagnose each image with each bundle, in the background. To be called within the event loop.

        Raises BusyError (503) if images of others fill the memory.
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
        """Keep a job; older ones of the same person, then of anyone, make room."""
        self._sweep()
        self._jobs[job.id] = job
        mine = [j for j in self._jobs.values() if j.owner == job.owner]
        for old in mine[: max(0, len(mine) - self._limits.jobs_each)]:
            self._drop(old)
        finished = [j for j in self._jobs.values() if j.done and j is not job]
        while finished and sum(j.size for j in self._jobs.values()) > self._limits.jobs_mb << 20:
            self._drop(finished.pop(0))

    def get(self, job_id: str, owner: str) -> Job | None:
        """Return a person's job; None if it is gone, never existed, or is somebody else's."""
        self._sweep()
        job = self._jobs.get(job_id)
        return job if job is not None and job.owner == owner else None

    def of(self, owner: str) -> list[Job]:
        """Return all jobs of a person, newest first."""
        self._sweep()
        return [j for j in reversed(self._jobs.values()) if j.owner == owner]

    def drop(self, job_id: str, owner: str) -> bool:
        """Delete a job; return whether there was one."""
        job = self.get(job_id, owner)
        if job is not None:
            self._drop(job)
        return job is not None

    async def close(self) -> None:
        """Stop all work and delete everything."""
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
            def on_stage(stage: str) -> None:
                item.stage = stage
                job.notify()

            async with slots:
                try:
                    for attempt in range(_TRIES):
                        try:
                            item.diagnosis = await engine.examine(
                                item.data,
                                who=job.owner,
                                bundle=item.bundle,
                                um_per_px=item.um_per_px,
                                on_stage=on_stage,
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
                    _log.error("%s", place_of(error))
                    item.error = "this image could not be classified because of a bug in the program"
                    item.fault = True
                finally:
                    item.seconds = time.monotonic() - job.created
                    item.stage = "done"
                    job.notify()

        await asyncio.gather(*(one(i) for i in job.items if not i.done))
        job.notify()
        if not any(j.owner == job.owner and not j.done for j in self._jobs.values()):
            self._slots.pop(job.owner, None)


def _weight(diagnosis: Any) -> int:
    total = 0
    for tile in getattr(diagnosis, "tiles", ()):
        for name in ("original", "normalized", "semantic", "cells", "maps"):
            total += getattr(getattr(tile, name, None), "nbytes", 0)
    return total


def jobs_of(request: Request) -> Jobs:
    """Return the application's jobs."""
    jobs = request.app.state.jobs
    assert isinstance(jobs, Jobs)
    return jobs
