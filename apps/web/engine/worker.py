"""Handle of one inference process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress

from leukoflow.apps.web.engine.errors import DeathError, EngineError
from leukoflow.apps.web.engine.fork_server import ForkServer
from leukoflow.apps.web.engine.frames import (
    Answer,
    Failure,
    Frame,
    FrameError,
    Order,
    Ready,
    Stage,
    Withdrawn,
    diagnosis_of,
    frame,
)
from leukoflow.apps.web.engine.pending import PendingImage, quarantined, report_stage
from leukoflow.apps.web.engine.waiting import END_SECONDS, fail, read_frame, within_start_time
from leukoflow.core.errors import BundleError, LeukoflowError, words_of
from leukoflow.tasks.inference.single import STAGES, Examination


class Worker:
    """One inference process, as seen by the web server."""

    def __init__(self, fork_server: ForkServer) -> None:
        self._fork_server = fork_server
        self._number = 0
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.Task[None] | None = None
        self._image: PendingImage | None = None
        self._said: asyncio.Future[Examination | LeukoflowError] | None = None
        self.gone = asyncio.Event()
        self.cause_of_death = ""  # for the log
        loop = asyncio.get_running_loop()
        self._warm: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[str] = loop.create_future()

    async def start(self) -> None:
        """Have the process forked, and wait until its models are warm. Raises DeathError."""
        mine, theirs = socket.socketpair()
        with theirs:
            try:
                reader, self._writer = await asyncio.open_unix_connection(sock=mine, limit=1 << 20)
            except BaseException:
                mine.close()
                raise
            self._number, self._ended = self._fork_server.spawn(theirs)
        self._reader = asyncio.create_task(self._read(reader))
        await within_start_time(self._warm)

    async def ask(self, image: PendingImage, seconds: float) -> Examination | LeukoflowError:
        """Return the diagnosis, or the error to raise instead. After a DeathError the worker must be replaced."""
        said: asyncio.Future[Examination | LeukoflowError] = asyncio.get_running_loop().create_future()
        self._said = said
        self._image = image
        try:
            async with asyncio.timeout(seconds):
                if not self.gone.is_set():
                    await self._send(frame(Order(image.number, image.card.name, image.um_per_px), image.data))
                return await said
        except TimeoutError:
            raise DeathError(f"it ran longer than {seconds:g} s") from None
        finally:
            self._image = self._said = None
            said.cancel()

    def withdraw(self, image: PendingImage) -> None:
        """Inform the worker that nobody waits for its image any more; it stops before the next stage."""
        if self._image is image and self._writer is not None and not self.gone.is_set():
            self._writer.writelines(frame(Withdrawn(image.number)))

    def give_up(self, cause: str) -> None:
        """Have the process and its decoder killed."""
        self.cause_of_death = cause
        self.gone.set()
        self._fork_server.kill(self._number)

    async def end(self) -> None:
        """Have the process and its decoder killed, and wait until it is gone."""
        self.gone.set()
        self._fork_server.kill(self._number)
        if self._writer is not None:
            self._writer.transport.abort()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    await asyncio.shield(self._ended)
        self._warm.cancel()

    async def _send(self, pieces: Sequence[bytes | memoryview]) -> None:
        assert self._writer is not None
        try:
            for piece in pieces:
                self._writer.write(piece)
            await self._writer.drain()
        except OSError:
            pass  # the reader reports how it died

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Handle what the worker sends until it ends; then fail what waits for it, with the cause."""
        words = ""
        try:
            while True:
                self._handle(*await read_frame(reader))
        except (asyncio.IncompleteReadError, OSError):
            pass
        except Exception as error:  # nothing that a worker sends may make this process fail
            words = f"it sent nonsense ({words_of(error)})"
        self.gone.set()
        self._fork_server.kill(self._number)
        ended = await asyncio.shield(self._ended)
        words = words or ended
        self.cause_of_death = self.cause_of_death or words
        for future in (self._warm, self._said):
            if future is not None:
                fail(future, DeathError(words))

    def _handle(self, record: Frame, body: bytes) -> None:
        image, said = self._image, self._said
        match record:
            case Ready() if not self._warm.done():
                self._warm.set_result(None)
            case Stage(number, stage):
                if image is not None and number == image.number and stage in STAGES and not image.answer.done():
                    report_stage(image, stage)
            case Answer() if image is not None and said is not None and record.number == image.number:
                if not said.done():
                    said.set_result(diagnosis_of(record, body))
            case Failure(number, kind, words) if image is not None and said is not None and number == image.number:
                if said.done():
                    return
                if kind == "error":
                    said.set_exception(DeathError(f"a bug in the program ({words})"))
                elif kind == "bundle":
                    said.set_result(BundleError(words))
                elif kind == "memory":
                    reason = "too large: diagnosing it needs more memory than the limit allows"
                    said.set_result(quarantined(image.data, image.card, reason))
                else:
                    said.set_result(EngineError("it was withdrawn"))
            case _:
                raise FrameError(f"a {type(record).__name__} that was not asked for")
