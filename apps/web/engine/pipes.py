"""Frames over pipes and sockets, in the fork server and in workers."""

from __future__ import annotations

import os
import signal
from typing import BinaryIO

from leukoflow.apps.web.engine.frames import HEADER, Buffer, Frame, frame, header_of, record_of
from leukoflow.core.errors import LeukoflowError


class Speaker:
    """Writes whole frames to a file descriptor; ends the process once nobody reads them."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __call__(self, record: Frame) -> None:
        """Write a record without a body."""
        self.write(frame(record))

    def write(self, pieces: list[Buffer]) -> None:
        """Write the pieces of a frame."""
        try:
            for piece in pieces:
                left = memoryview(piece)
                while left:
                    left = left[os.write(self.descriptor, left) :]
        except BrokenPipeError:
            leave()


def read_frame(source: BinaryIO) -> tuple[Frame, bytes] | None:
    """Return the next record and its body, None at the end."""
    head = source.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    kind, words, length = header_of(head)
    record, body = record_of(kind, source.read(words)), source.read(length)
    return (record, body) if len(body) == length else None


def parse(data: bytes) -> Frame:
    """Return the record of a frame without a body that came as one message; the engine is trusted."""
    kind, words, _ = header_of(data[: HEADER.size])
    return record_of(kind, data[HEADER.size : HEADER.size + words])


def leave() -> None:
    """End this process and its decoder, which form a process group."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def words_for_people(error: Exception) -> str:
    """Return the words of an error of ours; of any other its type only, since its words may quote an image's data."""
    return str(error) if isinstance(error, LeukoflowError) else type(error).__name__
