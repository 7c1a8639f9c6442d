"""Ingest: from members of the source to pixels at the model's scale, or the reason why there are none.

Untrusted bytes are decoded only in a disposable child process (`decode_child.py`) with limits on memory, CPU and
wall time. Images go there one at a time, so a process that dies is blamed on exactly one image, and that image is
tried once more in a new process before it is blamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

import leukoflow
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import LeukoflowError, MemberError
from leukoflow.core.method import SegmentSettings
from leukoflow.runs.records import Member
from leukoflow.sources.reading import Reader
from leukoflow.tasks.decoding.decode_child import ANSWER, OUT_OF_MEMORY, PIXELS, READY, RED_CELLS, REQUEST, SETUP

T = TypeVar("T")

_PIPE_BYTES = 1 << 20
_START_SECONDS = 120.0  # importing the libraries takes under a second, but disks of shared nodes can be slow at night
_GRACE_SECONDS = 5.0
_WALL_FACTOR = 5


@dataclass(frozen=True, slots=True)
class Decoded:
    """One member's pixels, or the reason why there are none.

    `rgb` is uint8 [height, width, 3] at the model's scale; `source_width` and `source_height` (pixels, upright) are 0
    without it. `sha256` is of the member's bytes, None where they could not be read. `remarks` do not reject.
    """

    rgb: NDArray[np.uint8] | None
    reason: str | None
    source_width: int
    source_height: int
    sha256: str | None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """What one image says of its own scale.

    `red_cells` float32 [n], diameters in source pixels; `um_per_px` from the file's metadata, None where they say
    nothing.
    """

    red_cells: NDArray[np.float32]
    um_per_px: float | None


UNMEASURED = Measured(np.zeros(0, np.float32), None)
"""Of an image that could not be read."""


class _DeathError(Exception):
    """The child ended or hangs; says how, and whether another try makes sense."""

    def __init__(self, words: str, worth_a_retry: bool = True) -> None:
        super().__init__(words)
        self.worth_a_retry = worth_a_retry


@dataclass(frozen=True, slots=True)
class _Answer:
    """The child's answer before the pixels: `sizes` are height and width of these, width and height of the source."""

    child: subprocess.Popen[bytes]
    deadline: float
    good: bool
    sizes: tuple[int, ...]
    text: str


class Decoder:
    """Owns the child process: starts it when first needed, replaces it when it dies, ends it on `close`.

    One per worker process is enough: calls from several threads wait for each other. `limits.decode_seconds` is CPU
    time, so that a busy machine condemns no image; wall time (five times as much) only catches a child that waits for
    ever. `command` starts another child, for tests.
    """

    def __init__(self, limits: LimitSettings, settings: SegmentSettings, command: Sequence[str] | None = None) -> None:
        self.limits = limits
        self.settings = settings
        self._command = tuple(command or (sys.executable, "-P", "-m", "leukoflow.tasks.decoding.decode_child"))
        self._lock = threading.Lock()
        self._children: list[subprocess.Popen[bytes]] = []  # one at most; a list, so that `_end` can share it
        self._finalizer = weakref.finalize(self, _end, self._children)
        self.starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def decode(self, images: Iterable[tuple[bytes, float | None]]) -> list[Decoded]:
        """Decode (bytes, micrometres per pixel or None) in order; an image that fails leaves the others alone."""
        return [self.decode_one(data, um_per_px) for data, um_per_px in images]

    def decode_one(self, data: bytes, um_per_px: float | None = None) -> Decoded:
        """Decode one image. Raises LeukoflowError only where no child process can be started."""
        sha256 = hashlib.sha256(data).hexdigest()
        try:
            return self._twice(lambda: self._exchange(data, um_per_px, sha256))
        except _DeathError as death:
            return Decoded(None, str(death), 0, 0, sha256)

    def measure(self, data: bytes) -> Measured:
        """Measure the red cells of one image, and read what its file says of its scale.

        Of an image that cannot be decoded nothing is known. Raises LeukoflowError only where no child process can be
        started.
        """
        try:
            return self._twice(lambda: self._exchange_measures(data))
        except _DeathError:
            return UNMEASURED

    def _twice(self, exchange: Callable[[], T]) -> T:
        """Exchange a request for an answer, and once more in a new process where the first one dies of it."""
        with self._lock:
            try:
                return exchange()
            except _DeathError as death:
                self._stop()
                if not death.worth_a_retry:
                    raise
            except BaseException:  # an interrupt amid an exchange leaves half an answer in the pipe
                self._stop()
                raise
            try:
                return exchange()
            except BaseException:
                self._stop()
                raise

    def close(self) -> None:
        """End the child process. The decoder can be used again and starts another then."""
        with self._lock:
            self._stop()

    def _request(self, data: bytes, um_per_px: float | None, wanted: int) -> _Answer:
        """Send an image and receive the answer up to its pixels."""
        alive = self._children and self._children[0].poll() is None
        child = self._children[0] if alive else self._start()
        deadline = time.monotonic() + _WALL_FACTOR * self.limits.decode_seconds
        scale = float("nan") if um_per_px is None else um_per_px
        _send(child, REQUEST.pack(len(data), scale, wanted), deadline)
        _send(child, data, deadline)
        good, *sizes, length = ANSWER.unpack(_receive(child, ANSWER.size, deadline))
        return _Answer(child, deadline, bool(good), tuple(sizes), bytes(_receive(child, length, deadline)).decode())

    def _exchange_measures(self, data: bytes) -> Measured:
        answer = self._request(data, None, RED_CELLS)
        if not answer.good:
            return UNMEASURED
        found = json.loads(answer.text)
        return Measured(np.array(found["red_cells"], np.float32), found["um_per_px"])

    def _exchange(self, data: bytes, um_per_px: float | None, sha256: str) -> Decoded:
        answer = self._request(data, um_per_px, PIXELS)
        child, deadline, text = answer.child, answer.deadline, answer.text
        height, width, source_width, source_height = answer.sizes
        if not answer.good:
            return Decoded(None, text, 0, 0, sha256)
        pixels = _receive(child, height * width * 3, deadline)
        rgb = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
        return Decoded(rgb, None, source_width, source_height, sha256, tuple(text.splitlines()))

    def _start(self) -> subprocess.Popen[bytes]:
        """Start a child and wait until it is ready. Raises LeukoflowError with what it said where it is not."""
        self._stop()
        root = str(Path(leukoflow.__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"
        }  # fmt: skip
        child = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
            bufsize=0,
        )  # fmt: skip
        self._children.append(child)
        self.starts += 1
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            _widen(pipe.fileno())
        limits, settings = self.limits, self.settings.model_dump_json().encode()
        pixels, memory = int(limits.max_megapixels * 1e6), limits.decode_memory_mb << 20
        setup = SETUP.pack(pixels, limits.min_side_px, memory, limits.decode_seconds, len(settings))
        deadline = time.monotonic() + _START_SECONDS
        try:
            _send(child, setup + settings, deadline)
            if bytes(_receive(child, len(READY), deadline)) != READY:
                raise _DeathError("it gave an unexpected answer")
        except _DeathError as death:
            child.kill()
            said = child.communicate()[1].decode(errors="replace").strip().splitlines()
            self._stop()
            raise LeukoflowError(
                f"the process that decodes images does not start ({death}): {said[-1] if said else 'it said nothing'}; "
                "run `leukoflow doctor` on this machine"
            ) from death
        return child

    def _stop(self) -> None:
        _end(self._children)


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    while children:
        child = children.pop()
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        child.kill()
        child.wait()


def _widen(descriptor: int) -> None:
    """Let a pipe hold a whole small image, so that it passes in one go; Linux only, and never essential."""
    import fcntl

    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _wait(child: subprocess.Popen[bytes], descriptor: int, event: int, deadline: float) -> None:
    poller = select.poll()
    poller.register(descriptor, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poller.poll(1000 * left):
        raise _DeathError("decoding it takes too long: the decoder does not answer")


def _send(child: subprocess.Popen[bytes], data: bytes, deadline: float) -> None:
    assert child.stdin is not None
    descriptor, left = child.stdin.fileno(), memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            _wait(child, descriptor, select.POLLOUT, deadline)
        except BrokenPipeError:
            raise _death_of(child) from None


def _receive(child: subprocess.Popen[bytes], length: int, deadline: float) -> bytearray:
    assert child.stdout is not None
    descriptor, data = child.stdout.fileno(), bytearray(length)
    left = memoryview(data)
    while left:
        try:
            count = os.readv(descriptor, [left])
        except BlockingIOError:
            _wait(child, descriptor, select.POLLIN, deadline)
            continue
        if count == 0:
            raise _death_of(child)
        left = left[count:]
    return data


def _death_of(child: subprocess.Popen[bytes]) -> _DeathError:
    """Put in words how a child ended that has closed its pipes."""
    try:
        code = child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return _DeathError("decoding it hangs")
    if code == -signal.SIGXCPU:
        return _DeathError("decoding it takes too long: its CPU time is used up", worth_a_retry=False)
    if code == OUT_OF_MEMORY:
        return _DeathError("too large: its bytes need more memory than the limit allows", worth_a_retry=False)
    if code < 0:
        return _DeathError(f"decoding it kills the decoder ({signal.Signals(-code).name})")
    return _DeathError(f"decoding it ends the decoder (exit code {code})")


def too_large(size_bytes: int, limits: LimitSettings) -> str | None:
    """Say why an image's bytes are not even looked at; None where they are."""
    if size_bytes <= limits.max_member_mb << 20:
        return None
    return f"too large: {size_bytes:,} bytes, the limit is {limits.max_member_mb << 20:,}"


def read_bytes(reader: Reader, member: Member, limits: LimitSettings) -> bytes:
    """Read a member's bytes. Raises MemberError where they are too many or cannot be had."""
    if (reason := too_large(member.size_bytes, limits)) is not None:
        raise MemberError(reason)
    return reader.read(member)


def ingest(reader: Reader, members: Iterable[Member], limits: LimitSettings, decoder: Decoder) -> Iterator[Decoded]:
    """Read and decode members one at a time, in order; one result for each, whatever it is.

    Nothing is held back: the consumer decides how many decoded images are in memory. Raises SourceError or
    StorageError where not the member but the source fails.
    """
    for member in members:
        try:
            data = read_bytes(reader, member, limits)
        except MemberError as error:
            yield Decoded(None, str(error), 0, 0, None)
            continue
        yield decoder.decode_one(data, member.scale.um_per_px)
