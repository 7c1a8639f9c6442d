"""Diagnosis for the web server: a fair queue in front of inference processes that can be killed and replaced.

The server's own process never decodes an image and never holds a model. It hands bytes to a worker
(`apps.web.engine.inference`), which decodes them in a disposable child of its own, and checks everything that comes
back (`apps.web.engine.frames`). Workers are forked by a process that has everything loaded (`apps.web.engine.child`),
so a dead one is replaced at once. Everything here runs in one event loop, so there are no locks.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from leukoflow.apps.web.engine.errors import BusyError, DeathError, EngineError
from leukoflow.apps.web.engine.fair_queue import FairQueue
from leukoflow.apps.web.engine.fork_server import ForkServer
from leukoflow.apps.web.engine.frames import BundleCard, Setup
from leukoflow.apps.web.engine.pending import PendingImage, quarantined, settle
from leukoflow.apps.web.engine.waiting import fail, wait_for_first
from leukoflow.apps.web.engine.worker import Worker
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import BundleError, LeukoflowError, place_of
from leukoflow.core.geometry import MAX_UM_PER_PX, MIN_UM_PER_PX
from leukoflow.runs.records import DIED
from leukoflow.tasks.decoding.ingest import too_large
from leukoflow.tasks.inference.single import Examination

_log = logging.getLogger(__name__)
_TRIES = 2
_FAILED_STARTS = 3  # in a row, before those who wait get an error
_SAMPLES = 512
_CLOSING = "the server is shutting down; submit the image again"


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy the engine is. Seconds run from submission to answer, over the last few hundred images."""

    waiting: int
    running: int
    workers: int
    ready: int  # workers whose models are loaded
    restarts: int  # workers that were replaced
    answered: int
    p50_seconds: float
    p95_seconds: float
    trouble: str  # why workers do not start, empty where they do


class Engine:
    """Diagnoses images in worker processes. All calls belong to the event loop in which `start` was awaited.

    Args:
        bundles: names or places of bundles; the first is the default.
        limits: on one image's bytes, pixels, decoding time and memory.
        workers: inference processes.
        waiting: images that may wait in all.
        waiting_each: images of one person that may wait.
        seconds: wall time of one image in a worker, which is then killed and replaced.
        kept: bundles that a worker keeps loaded.
        threads: of a worker's networks. One field takes a tenth of a second of one core; several threads wait for each
            other, which costs more than they bring as soon as the machine has something else to do.
        memory_mb: memory for one image, beyond models and libraries.
    """

    def __init__(
        self,
        bundles: Sequence[str],
        limits: LimitSettings,
        *,
        workers: int = 1,
        waiting: int = 256,
        waiting_each: int = 64,
        seconds: float = 60,
        kept: int = 2,
        threads: int = 1,
        memory_mb: int = 4096,
    ) -> None:
        if not bundles:
            raise BundleError("no bundle was named: name one, such as pocket")
        self.bundles: tuple[BundleCard, ...] = ()
        """The bundles that can be used, once the engine is started."""
        self._limits, self._seconds, self._workers = limits, float(seconds), max(1, workers)
        self._setup = Setup(tuple(bundles), limits.model_dump_json(), max(1, kept), max(1, threads), memory_mb)
        self._queue: FairQueue[PendingImage] = FairQueue(waiting, waiting_each)
        self._numbers = itertools.count(1)
        self._running: set[PendingImage] = set()
        self._ready = 0
        self._restarts = 0
        self._answered = 0
        self._took: deque[float] = deque(maxlen=_SAMPLES)
        self._busy: deque[float] = deque(maxlen=_SAMPLES)
        self._trouble = ""
        self._down = False
        self._open = False
        self._slots: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the workers; return once all bundles have been opened. Models are loaded in the background.

        Raises:
            BundleError: a bundle is missing or damaged.
            EngineError: workers do not start on this machine.
        """
        if self._open:
            return
        self._open = True
        self._arrived = asyncio.Event()
        self._hello: asyncio.Future[tuple[BundleCard, ...]] = asyncio.get_running_loop().create_future()
        self._fork_server = ForkServer(self._setup)
        self._slots = [asyncio.create_task(self._slot()) for _ in range(self._workers)]
        try:
            self.bundles = await asyncio.shield(self._hello)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End all workers; calls that still wait raise EngineError. No process is left."""
        self._open = False
        for task in self._slots:
            task.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        if self._slots:
            await self._fork_server.close()
        self._slots = []
        self._fail_waiting(_CLOSING)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def ready(self) -> None:
        """Wait until a worker's models are loaded and warm; calling this is optional."""
        while self._open and not self._ready:
            await asyncio.sleep(0.02)

    def load(self) -> EngineLoad:
        """Return how busy the engine is."""
        took = sorted(self._took)
        return EngineLoad(
            waiting=len(self._queue),
            running=len(self._running),
            workers=self._workers,
            ready=self._ready,
            restarts=self._restarts,
            answered=self._answered,
            p50_seconds=_quantile(took, 0.5),
            p95_seconds=_quantile(took, 0.95),
            trouble=self._trouble,
        )

    async def examine(
        self,
        data: bytes,
        *,
        who: str,
        bundle: str = "",
        um_per_px: float | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> Examination:
        """Diagnose one image. Cancelling this withdraws the image.

        Args:
            data: the image file's bytes, untrusted.
            who: on whose behalf; people take turns.
            bundle: name or digest as in `bundles`; the first if it is empty.
            um_per_px: micrometres per pixel, None where unknown.
            on_stage: called with each of `tasks.inference.single.STAGES` as it starts; from the first again if a worker
                dies.

        Returns:
            A diagnosis, whatever the bytes are: what kills two workers is quarantined.

        Raises:
            BusyError: too many images wait.
            BundleError: no such bundle, or it can no longer be loaded.
            EngineError: not started, closed, or no worker starts.
            ValueError: the scale is out of range.
        """
        if not self._open:
            raise EngineError("the engine is not running")
        card = self._card(bundle)
        if um_per_px is not None and not MIN_UM_PER_PX <= um_per_px <= MAX_UM_PER_PX:
            raise ValueError(
                f"micrometres per pixel must be between {MIN_UM_PER_PX:g} and {MAX_UM_PER_PX:g}, not {um_per_px:g}"
            )
        if (reason := too_large(len(data), self._limits)) is not None:
            return quarantined(data, card, reason)
        if self._down and not self._ready:
            raise EngineError(self._trouble)
        if (words := self._queue.full_for(who)) is not None:
            after = self._retry_after()
            raise BusyError(f"{words}; try again in {after} s", after)
        loop = asyncio.get_running_loop()
        image = PendingImage(next(self._numbers), who, bytes(data), card, um_per_px, on_stage, loop.create_future())
        self._queue.put(who, image)
        self._arrived.set()
        try:
            diagnosis = await image.answer
        except asyncio.CancelledError:
            if not self._queue.discard(who, image) and image.worker is not None:
                image.worker.withdraw(image)
            raise
        self._answered += 1
        self._took.append(time.monotonic() - image.started)
        return diagnosis

    def _card(self, name: str) -> BundleCard:
        if not name:
            return self.bundles[0]
        for card in self.bundles:
            if name in (card.name, card.digest):
                return card
        raise BundleError(f"no bundle {name!r} is loaded here; there are: {', '.join(c.name for c in self.bundles)}")

    def _retry_after(self) -> int:
        each = statistics.fmean(self._busy) if self._busy else 1.0
        return max(1, min(60, math.ceil(each * len(self._queue) / self._workers)))

    def _fail_waiting(self, words: str) -> None:
        while (image := self._queue.take()) is not None:
            settle(image, EngineError(words))

    # --- one worker and its successors -------------------------------------------------------------------------------

    async def _slot(self) -> None:
        """Keep one worker alive and busy, until cancelled."""
        failed = 0
        while True:
            worker = Worker(self._fork_server)
            try:
                cards = await self._fork_server.open()
                if not self._hello.done():
                    self._hello.set_result(cards)
                await worker.start()
            except (DeathError, LeukoflowError, OSError) as error:
                await worker.end()
                failed += 1
                self._trouble = f"the process that diagnoses images does not start: {error}"
                _log.error("%s", self._trouble)
                fail(self._hello, error if isinstance(error, LeukoflowError) else EngineError(self._trouble))
                if failed >= _FAILED_STARTS and not self._ready:
                    self._down = True
                    self._fail_waiting(self._trouble)
                await asyncio.sleep(min(30.0, 0.5 * 2**failed))
                continue
            except BaseException:
                await worker.end()
                raise
            failed, self._trouble, self._down = 0, "", False
            self._ready += 1
            try:
                await self._work(worker)
            except Exception as error:  # a fault of ours must not end the service
                _log.error("a worker is abandoned: %s", place_of(error))
            finally:
                self._ready -= 1
                await worker.end()
            self._restarts += 1
            _log.warning("a worker was replaced: %s", worker.cause_of_death)

    async def _work(self, worker: Worker) -> None:
        """Give a worker one image after the other until it is gone."""
        while not worker.gone.is_set():
            image = self._queue.take()
            if image is None:
                self._arrived.clear()
                await wait_for_first(self._arrived, worker.gone)
                continue
            if not image.answer.done():
                await self._serve(worker, image)

    async def _serve(self, worker: Worker, image: PendingImage) -> None:
        """Have a worker diagnose an image: answer it, return it to the queue, or quarantine it."""
        image.tries += 1
        image.worker = worker
        self._running.add(image)
        started = time.monotonic()
        try:
            said = await worker.ask(image, self._seconds)
        except DeathError as death:
            worker.give_up(str(death))
            if image.tries >= _TRIES:
                settle(image, quarantined(image.data, image.card, f"{DIED}: {death}"))
            elif not image.answer.done():
                self._queue.put(image.who, image, again=True)
                self._arrived.set()
        except asyncio.CancelledError:
            settle(image, EngineError(_CLOSING))
            raise
        except Exception:
            settle(image, EngineError("an internal error; the server's log says where"))
            raise
        else:
            settle(image, said)
        finally:
            self._busy.append(time.monotonic() - started)
            self._running.discard(image)
            image.worker = None


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
