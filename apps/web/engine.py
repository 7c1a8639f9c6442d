"""Diagnosis for the web server: a fair queue in front of inference processes that can be killed and replaced.

The server's own process never decodes an image and never holds a model. It hands bytes to a worker
(`apps.web.engine_child`), which decodes them in a disposable child of its own, and believes nothing that comes back
before it is checked (`apps.web.frames`). Workers are forked by a process that has everything loaded, so a dead one is
replaced at once. Everything here runs in one event loop, so there are no locks.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import math
import os
import socket
import statistics
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import leukoflow
from leukoflow.apps.web.frames import (
    HEADER,
    Answer,
    BundleCard,
    Ended,
    Failure,
    Frame,
    FrameError,
    Hello,
    Kill,
    Order,
    Ready,
    Setup,
    Spawn,
    Stage,
    Withdrawn,
    finding_of,
    frame,
    header_of,
    record_of,
)
from leukoflow.cluster.host import worker_environment
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import BundleError, LeukoflowError, place_of, words_of
from leukoflow.core.geometry import MAX_UM_PER_PX, MIN_UM_PER_PX
from leukoflow.runs.records import DIED, Status
from leukoflow.tasks.decoding.ingest import too_large
from leukoflow.tasks.inference.single import STAGES, Finding

_log = logging.getLogger(__name__)
_START_SECONDS = 600.0  # importing torch from a cold disk, on a machine that does other things
_END_SECONDS = 10.0
_TRIES = 2
_FAILED_STARTS = 3  # in a row, before those who wait are told
_SAMPLES = 512
_CLOSING = "the server is closing; hand the image in again"

T = TypeVar("T")


class BusyError(LeukoflowError):
    """The queue is full; `retry_after` is in seconds."""

    def __init__(self, words: str, retry_after: int) -> None:
        super().__init__(words)
        self.retry_after = retry_after


class EngineError(LeukoflowError):
    """There is no engine to answer: not started, closed, or its workers do not start."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy the engine is. Seconds are from handing over an image to its answer, over the last few hundred."""

    waiting: int
    running: int
    workers: int
    ready: int  # workers whose models are loaded
    restarts: int  # workers that were replaced
    answered: int
    p50_seconds: float
    p95_seconds: float
    trouble: str  # why workers do not start, empty where they do


class FairQueue(Generic[T]):
    """First come, first served within a person; one each in turn between persons. Bounded in all and per person."""

    def __init__(self, most: int, most_each: int) -> None:
        self._most, self._most_each = most, most_each
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        """How many wait."""
        return sum(len(line) for line in self._lines.values())

    def full_for(self, who: str) -> str | None:
        """Why nothing more is taken from this person now, None where it is."""
        if len(self._lines.get(who, ())) >= self._most_each:
            return f"{self._most_each} of your images are waiting already"
        if len(self) >= self._most:
            return f"{self._most} images are waiting already"
        return None

    def put(self, who: str, item: T, *, again: bool = False) -> None:
        """At the end of the person's line; `again`: at its head, whatever the bounds."""
        line = self._lines.setdefault(who, deque())
        if again:
            line.appendleft(item)
        else:
            line.append(item)

    def take(self) -> T | None:
        """The next one; its owner goes behind all others who wait."""
        if not self._lines:
            return None
        who, line = next(iter(self._lines.items()))
        item = line.popleft()
        if line:
            self._lines.move_to_end(who)
        else:
            del self._lines[who]
        return item

    def discard(self, who: str, item: T) -> bool:
        """Takes one out; whether it was there."""
        line = self._lines.get(who)
        if line is None or item not in line:
            return False
        line.remove(item)
        if not line:
            del self._lines[who]
        return True


@dataclass(slots=True, eq=False)
class _Job:
    number: int
    who: str
    data: bytes
    card: BundleCard
    um_per_px: float | None
    told: Callable[[str], None] | None
    answer: asyncio.Future[Finding]
    began: float = field(default_factory=time.monotonic)
    tries: int = 0
    worker: _Worker | None = None


class _DeathError(Exception):
    """A worker ended, hangs, or talks nonsense; says how."""


class Engine:
    """Examines images in worker processes. All calls belong to the event loop in which `start` was awaited.

    Args:
        bundles: names or places of bundles; the first is the default.
        limits: on one image's bytes, pixels, decoding time and memory.
        workers: inference processes.
        waiting: images that may wait in all.
        waiting_each: images that may wait of one person.
        seconds: wall time of one image in a worker; after it the worker is killed and replaced.
        kept: bundles that a worker keeps loaded.
        threads: of a worker's networks. One field takes a tenth of a second of one core; several threads wait for each
            other, which costs more than they bring as soon as the machine has something else to do.
        memory_mb: what examining one image may take beyond models and libraries.
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
        """What is known of each bundle; there once the engine is started."""
        self._limits, self._seconds, self._workers = limits, float(seconds), max(1, workers)
        self._setup = Setup(tuple(bundles), limits.model_dump_json(), max(1, kept), max(1, threads), memory_mb)
        self._queue: FairQueue[_Job] = FairQueue(waiting, waiting_each)
        self._numbers = itertools.count(1)
        self._running: set[_Job] = set()
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
        """Starts the workers and returns once all bundles have been opened; models are loaded in the background.

        Raises:
            BundleError: a bundle is absent or damaged.
            EngineError: workers do not start on this machine.
        """
        if self._open:
            return
        self._open = True
        self._arrived = asyncio.Event()
        self._hello: asyncio.Future[tuple[BundleCard, ...]] = asyncio.get_running_loop().create_future()
        self._nursery = _Nursery(self._setup)
        self._slots = [asyncio.create_task(self._slot()) for _ in range(self._workers)]
        try:
            self.bundles = await asyncio.shield(self._hello)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Ends all workers; whoever still waits hears EngineError. No process is left."""
        self._open = False
        for task in self._slots:
            task.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        if self._slots:
            await self._nursery.close()
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
        """Waits until a worker's models are loaded and warm; nobody needs to."""
        while self._open and not self._ready:
            await asyncio.sleep(0.02)

    def load(self) -> EngineLoad:
        """How busy the engine is."""
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
        told: Callable[[str], None] | None = None,
    ) -> Finding:
        """Examines one image. Whoever cancels this takes the image back.

        Args:
            data: the image file's bytes, untrusted.
            who: on whose behalf; persons take turns.
            bundle: name as in `bundles`; the first where it is empty.
            um_per_px: micrometres per pixel, None where unknown.
            told: hears each of `tasks.inference.single.STAGES` as it begins; again from the start where a worker died.

        Returns:
            A finding whatever the bytes are: what no worker survives twice is quarantined.

        Raises:
            BusyError: too many images wait.
            BundleError: no such bundle, or it can no longer be loaded.
            EngineError: not started, closed, or no worker starts.
            ValueError: a scale that is none.
        """
        if not self._open:
            raise EngineError("the engine is not running")
        card = self._card(bundle)
        if um_per_px is not None and not MIN_UM_PER_PX <= um_per_px <= MAX_UM_PER_PX:
            raise ValueError(
                f"micrometres per pixel must be between {MIN_UM_PER_PX:g} and {MAX_UM_PER_PX:g}, not {um_per_px:g}"
            )
        if (reason := too_large(len(data), self._limits)) is not None:
            return _quarantined(data, card, reason)
        if self._down and not self._ready:
            raise EngineError(self._trouble)
        if (words := self._queue.full_for(who)) is not None:
            after = self._retry_after()
            raise BusyError(f"{words}; try again in {after} s", after)
        loop = asyncio.get_running_loop()
        job = _Job(next(self._numbers), who, bytes(data), card, um_per_px, told, loop.create_future())
        self._queue.put(who, job)
        self._arrived.set()
        try:
            finding = await job.answer
        except asyncio.CancelledError:
            if not self._queue.discard(who, job) and job.worker is not None:
                job.worker.withdraw(job)
            raise
        self._answered += 1
        self._took.append(time.monotonic() - job.began)
        return finding

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
        while (job := self._queue.take()) is not None:
            _settle(job, EngineError(words))

    # --- one worker and its successors -------------------------------------------------------------------------------

    async def _slot(self) -> None:
        """Keeps one worker alive and gives it work, until cancelled."""
        failed = 0
        while True:
            worker = _Worker(self._nursery)
            try:
                cards = await self._nursery.open()
                if not self._hello.done():
                    self._hello.set_result(cards)
                await worker.start()
            except (_DeathError, LeukoflowError, OSError) as error:
                await worker.end()
                failed += 1
                self._trouble = f"the process that diagnoses does not start: {error}"
                _log.error("%s", self._trouble)
                _fail(self._hello, error if isinstance(error, LeukoflowError) else EngineError(self._trouble))
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
                _log.error("a worker is given up: %s", place_of(error))
            finally:
                self._ready -= 1
                await worker.end()
            self._restarts += 1
            _log.warning("a worker was replaced: %s", worker.epitaph)

    async def _work(self, worker: _Worker) -> None:
        """Gives a worker one image after the other until it is gone."""
        while not worker.gone.is_set():
            job = self._queue.take()
            if job is None:
                self._arrived.clear()
                await _first(self._arrived, worker.gone)
                continue
            if not job.answer.done():
                await self._serve(worker, job)

    async def _serve(self, worker: _Worker, job: _Job) -> None:
        """One image on one worker: answered, given back to the queue, or given up."""
        job.tries += 1
        job.worker = worker
        self._running.add(job)
        began = time.monotonic()
        try:
            said = await worker.ask(job, self._seconds)
        except _DeathError as death:
            worker.give_up(str(death))
            if job.tries >= _TRIES:
                _settle(job, _quarantined(job.data, job.card, f"{DIED}: {death}"))
            elif not job.answer.done():
                self._queue.put(job.who, job, again=True)
                self._arrived.set()
        except asyncio.CancelledError:
            _settle(job, EngineError(_CLOSING))
            raise
        except Exception:
            _settle(job, EngineError("a fault of the program; the server's log says where"))
            raise
        else:
            _settle(job, said)
        finally:
            self._busy.append(time.monotonic() - began)
            self._running.discard(job)
            job.worker = None


class _Nursery:
    """The process that forks workers, seen from here; started anew where it has ended."""

    program: tuple[str, ...] = ("-m", "leukoflow.apps.web.engine_child")

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: asyncio.subprocess.Process | None = None
        self._orders: socket.socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._one = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._ended: dict[int, asyncio.Future[str]] = {}

    async def open(self) -> tuple[BundleCard, ...]:
        """Has the process running, and returns once it has opened all bundles."""
        async with self._one:
            if self._orders is None:
                await self._start()
            return await _within(self._hello)

    async def _start(self) -> None:
        await self._finish()
        loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[tuple[BundleCard, ...]] = loop.create_future()
        root = str(Path(leukoflow.__file__).resolve().parent.parent)
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        kept = {k: v for k, v in os.environ.items() if not _secret(k, self._setup.bundles)}
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", *self.program, str(os.getpid()), str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, pass_fds=(theirs.fileno(),),
                env=kept | worker_environment(1) | {"ARROW_DEFAULT_MEMORY_POOL": "system", "PYTHONPATH": paths},
                process_group=0,
            )  # fmt: skip
        self._reader = asyncio.create_task(self._read(self._process))
        self._orders.setblocking(False)
        self._say(self._setup)

    def spawn(self, theirs: socket.socket) -> tuple[int, asyncio.Future[str]]:
        """Has a worker forked that speaks over this socket: its number, and how it ended once it has."""
        number = next(self._numbers)
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._ended[number] = ended
        self._say(Spawn(number), theirs.fileno())
        return number, ended

    def kill(self, number: int) -> None:
        """Has a worker ended."""
        if number in self._ended:
            self._say(Kill(number))

    async def close(self) -> None:
        """Ends the process and all workers."""
        async with self._one:
            await self._finish()

    async def _finish(self) -> None:
        if self._orders is not None:
            self._orders.close()  # it then kills what it has started, and ends
            self._orders = None
        if self._process is not None:
            try:
                async with asyncio.timeout(_END_SECONDS):
                    await self._process.wait()
            except TimeoutError:  # amid its imports; then there are no workers
                with suppress(ProcessLookupError):
                    self._process.kill()
            if self._reader is not None:
                await self._reader
        self._process = self._reader = None

    def _say(self, record: Spawn | Kill | Setup, *descriptors: int) -> None:
        try:
            if self._orders is None:
                raise OSError
            socket.send_fds(self._orders, [bytes(piece) for piece in frame(record)], descriptors)
        except OSError:
            self._lost("it ended")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        words = ""
        try:
            while True:
                record, _ = await _frame_from(process.stdout)
                match record:
                    case Hello(cards) if not self._hello.done():
                        self._hello.set_result(cards)
                    case Failure(0, kind, said):
                        words = said
                        _fail(self._hello, BundleError(said) if kind == "bundle" else _DeathError(said))
                    case Ended(number, how):
                        ended = self._ended.pop(number, None)
                        if ended is not None and not ended.done():
                            ended.set_result(how)
        except (asyncio.IncompleteReadError, OSError, FrameError):
            pass
        code = await process.wait()
        self._lost(words or (f"signal {-code}" if code < 0 else f"exit code {code}"))

    def _lost(self, words: str) -> None:
        """The process is gone, and its workers with it."""
        if self._orders is not None:
            self._orders.close()
            self._orders = None
        _fail(self._hello, _DeathError(words))
        for ended in self._ended.values():
            if not ended.done():
                ended.set_result(f"what started it ended ({words})")
        self._ended.clear()


class _Worker:
    """One inference process, seen from here."""

    def __init__(self, nursery: _Nursery) -> None:
        self._nursery = nursery
        self._number = 0
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.Task[None] | None = None
        self._job: _Job | None = None
        self._said: asyncio.Future[Finding | LeukoflowError] | None = None
        self.gone = asyncio.Event()
        self.epitaph = ""  # how it died, for the log
        loop = asyncio.get_running_loop()
        self._warm: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[str] = loop.create_future()

    async def start(self) -> None:
        """Has the process forked, and waits until its models are warm."""
        mine, theirs = socket.socketpair()
        with theirs:
            try:
                reader, self._writer = await asyncio.open_unix_connection(sock=mine, limit=1 << 20)
            except BaseException:
                mine.close()
                raise
            self._number, self._ended = self._nursery.spawn(theirs)
        self._reader = asyncio.create_task(self._read(reader))
        await _within(self._warm)

    async def ask(self, job: _Job, seconds: float) -> Finding | LeukoflowError:
        """The finding, or the error to raise where there is none. After a _DeathError the worker is of no use."""
        said: asyncio.Future[Finding | LeukoflowError] = asyncio.get_running_loop().create_future()
        self._said = said
        self._job = job
        try:
            async with asyncio.timeout(seconds):
                if not self.gone.is_set():
                    await self._send(frame(Order(job.number, job.card.name, job.um_per_px), job.data))
                return await said
        except TimeoutError:
            raise _DeathError(f"it ran longer than {seconds:g} s") from None
        finally:
            self._job = self._said = None
            said.cancel()

    def withdraw(self, job: _Job) -> None:
        """Tells the worker that nobody waits for the image in its hands; it stops before the next stage."""
        if self._job is job and self._writer is not None and not self.gone.is_set():
            self._writer.writelines(frame(Withdrawn(job.number)))

    def give_up(self, epitaph: str) -> None:
        """Has the process killed, and its decoder."""
        self.epitaph = epitaph
        self.gone.set()
        self._nursery.kill(self._number)

    async def end(self) -> None:
        """Has the process killed, its decoder too, and waits until it is gone."""
        self.gone.set()
        self._nursery.kill(self._number)
        if self._writer is not None:
            self._writer.transport.abort()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(_END_SECONDS):
                    await asyncio.shield(self._ended)
        self._warm.cancel()

    async def _send(self, pieces: Sequence[bytes | memoryview]) -> None:
        assert self._writer is not None
        try:
            for piece in pieces:
                self._writer.write(piece)
            await self._writer.drain()
        except OSError:
            pass  # the reader says how it died

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Hears the worker until it ends; whoever waits for it then learns how."""
        words = ""
        try:
            while True:
                self._hear(*await _frame_from(reader))
        except (asyncio.IncompleteReadError, OSError):
            pass
        except Exception as error:  # whatever nonsense it talks is no reason for this process to fail
            words = f"it talks nonsense ({words_of(error)})"
        self.gone.set()
        self._nursery.kill(self._number)
        ended = await asyncio.shield(self._ended)
        words = words or ended
        self.epitaph = self.epitaph or words
        for future in (self._warm, self._said):
            if future is not None:
                _fail(future, _DeathError(words))

    def _hear(self, record: Frame, body: bytes) -> None:
        job, said = self._job, self._said
        match record:
            case Ready() if not self._warm.done():
                self._warm.set_result(None)
            case Stage(number, stage):
                if job is not None and number == job.number and stage in STAGES and not job.answer.done():
                    _tell(job, stage)
            case Answer() if job is not None and said is not None and record.number == job.number:
                if not said.done():
                    said.set_result(finding_of(record, body))
            case Failure(number, kind, words) if job is not None and said is not None and number == job.number:
                if said.done():
                    return
                if kind == "error":
                    said.set_exception(_DeathError(f"a fault of the program ({words})"))
                elif kind == "bundle":
                    said.set_result(BundleError(words))
                elif kind == "memory":
                    reason = "too large: diagnosing it needs more memory than the limit allows"
                    said.set_result(_quarantined(job.data, job.card, reason))
                else:
                    said.set_result(EngineError("it was withdrawn"))
            case _:
                raise FrameError(f"a {type(record).__name__} that nobody asked for")


async def _frame_from(reader: asyncio.StreamReader) -> tuple[Frame, bytes]:
    """The next frame. Raises FrameError, IncompleteReadError at the end."""
    kind, words, size = header_of(await reader.readexactly(HEADER.size))
    record = record_of(kind, await reader.readexactly(words))
    return record, await reader.readexactly(size) if size else b""


async def _within(future: asyncio.Future[T]) -> T:
    """What a starting process says, if it says it in time."""
    try:
        async with asyncio.timeout(_START_SECONDS):
            return await asyncio.shield(future)
    except TimeoutError:
        raise _DeathError(f"no answer within {_START_SECONDS:.0f} s") from None


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # nobody need wait for it


async def _first(*events: asyncio.Event) -> None:
    """Waits for the first of several events."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _tell(job: _Job, stage: str) -> None:
    if job.told is None:
        return
    try:
        job.told(stage)
    except Exception as error:  # whoever watches must not harm what is watched
        _log.error("a listener failed: %s", place_of(error))


def _settle(job: _Job, said: Finding | LeukoflowError) -> None:
    if job.answer.done():
        return
    if isinstance(said, LeukoflowError):
        job.answer.set_exception(said)
    else:
        job.answer.set_result(said)


def _quarantined(data: bytes, card: BundleCard, reason: str) -> Finding:
    """A finding without an answer, for an image that no worker has looked at to the end."""
    return Finding(
        sha256=hashlib.sha256(data).hexdigest(), bundle=card.name, bundle_digest=card.digest,
        status=Status.QUARANTINED, reason=reason, label=None, probabilities=(), prediction_set=(), ood=None,
        width_px=0, height_px=0, quality=None, remarks=(), cells=None, tiles=(), seconds=(),
    )  # fmt: skip


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _secret(name: str, bundles: Sequence[str]) -> bool:
    """Environment variables that a worker does not need: it holds what hostile files become."""
    if name.startswith("AWS_"):
        return not any(bundle.startswith("s3://") for bundle in bundles)
    return any(word in name for word in ("KEY", "SECRET", "PASSWORD", "TOKEN"))
