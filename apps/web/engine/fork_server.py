"""Handle of the fork server, the process that has everything loaded and forks workers."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import leukoflow
from leukoflow.apps.web.engine.errors import DeathError
from leukoflow.apps.web.engine.frames import BundleCard, Ended, Failure, FrameError, Hello, Kill, Setup, Spawn, frame
from leukoflow.apps.web.engine.waiting import END_SECONDS, fail, read_frame, within_start_time
from leukoflow.cluster.host import worker_environment
from leukoflow.core.errors import BundleError


class ForkServer:
    """The process that forks workers, as seen by the web server; restarted once it has ended."""

    program: tuple[str, ...] = ("-m", "leukoflow.apps.web.engine.child")

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: asyncio.subprocess.Process | None = None
        self._orders: socket.socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._one = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._ended: dict[int, asyncio.Future[str]] = {}

    async def open(self) -> tuple[BundleCard, ...]:
        """Start the process if it is not running; return the bundles once it has opened them."""
        async with self._one:
            if self._orders is None:
                await self._start()
            return await within_start_time(self._hello)

    async def _start(self) -> None:
        await self._finish()
        loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[tuple[BundleCard, ...]] = loop.create_future()
        root = str(Path(leukoflow.__file__).resolve().parent.parent)
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        kept = {k: v for k, v in os.environ.items() if not is_secret(k, self._setup.bundles)}
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
        self._send(self._setup)

    def spawn(self, theirs: socket.socket) -> tuple[int, asyncio.Future[str]]:
        """Have a worker forked that serves this socket; return its number, and a future of how it ends."""
        number = next(self._numbers)
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._ended[number] = ended
        self._send(Spawn(number), theirs.fileno())
        return number, ended

    def kill(self, number: int) -> None:
        """Have a worker killed."""
        if number in self._ended:
            self._send(Kill(number))

    async def close(self) -> None:
        """End the process and all workers."""
        async with self._one:
            await self._finish()

    async def _finish(self) -> None:
        if self._orders is not None:
            self._orders.close()  # it then kills what it has started, and ends
            self._orders = None
        if self._process is not None:
            try:
                async with asyncio.timeout(END_SECONDS):
                    await self._process.wait()
            except TimeoutError:  # still importing; then there are no workers
                with suppress(ProcessLookupError):
                    self._process.kill()
            if self._reader is not None:
                await self._reader
        self._process = self._reader = None

    def _send(self, record: Spawn | Kill | Setup, *descriptors: int) -> None:
        try:
            if self._orders is None:
                raise OSError
            socket.send_fds(self._orders, [bytes(piece) for piece in frame(record)], descriptors)
        except OSError:
            self._mark_lost("it ended")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        words = ""
        try:
            while True:
                record, _ = await read_frame(process.stdout)
                match record:
                    case Hello(cards) if not self._hello.done():
                        self._hello.set_result(cards)
                    case Failure(0, kind, said):
                        words = said
                        fail(self._hello, BundleError(said) if kind == "bundle" else DeathError(said))
                    case Ended(number, how):
                        ended = self._ended.pop(number, None)
                        if ended is not None and not ended.done():
                            ended.set_result(how)
        except (asyncio.IncompleteReadError, OSError, FrameError):
            pass
        code = await process.wait()
        self._mark_lost(words or (f"signal {-code}" if code < 0 else f"exit code {code}"))

    def _mark_lost(self, words: str) -> None:
        """Record that the process is gone, and its workers with it."""
        if self._orders is not None:
            self._orders.close()
            self._orders = None
        fail(self._hello, DeathError(words))
        for ended in self._ended.values():
            if not ended.done():
                ended.set_result(f"what started it ended ({words})")
        self._ended.clear()


def is_secret(name: str, bundles: Sequence[str]) -> bool:
    """Return whether an environment variable is kept from workers, which handle hostile files."""
    if name.startswith("AWS_"):
        return not any(bundle.startswith("s3://") for bundle in bundles)
    return any(word in name for word in ("KEY", "SECRET", "PASSWORD", "TOKEN"))
