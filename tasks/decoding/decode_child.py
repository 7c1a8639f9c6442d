"""The disposable process in which untrusted bytes become pixels.

Started by `Decoder` in `ingest.py` with `python -m`; it imports little, so that it can be replaced quickly. It reads
one request at a time from standard input and answers on standard output before it reads the next; end of input ends it.
A crash, a memory or a CPU limit ends it too, and is then blamed on the image in hand.

Frames (little endian): first, once, the limits as LIMITS and the settings as JSON; the process answers READY. Then
requests of REQUEST and the image's bytes, answered by ANSWER, a text of words for people, and pixels. Where red cells
are to be measured, there are no pixels, and the text is a `Measured` as JSON.
"""

from __future__ import annotations

import json
import math
import os
import resource
import struct
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, BinaryIO, cast

import cv2
import numpy as np

from leukoflow.tasks.decoding.decode import Field, decode_image, measure_image
from leukoflow.tasks.decoding.errors import RefusedError

if TYPE_CHECKING:
    from leukoflow.core.method import SegmentSettings

SETUP = struct.Struct("<3QdQ")
"""Limits (pixels, shortest side in pixels, memory in bytes, CPU seconds an image) and the length of the settings."""
REQUEST = struct.Struct("<QdB")
"""Length of the image's bytes, micrometres per pixel (not a number where unknown), and PIXELS or RED_CELLS."""
PIXELS, RED_CELLS = 0, 1
ANSWER = struct.Struct("<B5L")
"""Decoded (1) or refused (0), height and width of the pixels, width and height of the source, length of the text."""
READY = b"leukoflow decoder\n"
OUT_OF_MEMORY = 12
"""Exit code where not even the image's bytes fit."""


def main() -> None:
    """Serve requests until the input ends."""
    source = os.fdopen(os.dup(0), "rb")
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that a library prints may mix with the answers
    cv2.setNumThreads(1)
    max_pixels, min_side, memory_bytes, cpu_seconds, length = SETUP.unpack(source.read(SETUP.size))
    # The parent has validated them, and importing pydantic here would double the time that a new process takes.
    settings = cast("SegmentSettings", SimpleNamespace(**json.loads(source.read(length))))
    _limit_memory(memory_bytes)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must leave no copy of an image on disk
    sink.write(READY)
    sink.flush()
    os.dup2(1, 2)  # from here on, complaints of image libraries are not ours
    while len(header := source.read(REQUEST.size)) == REQUEST.size:
        length, scale, wanted = REQUEST.unpack(header)
        _allow_cpu(cpu_seconds)
        try:
            data = _exactly(source, length)
            if wanted == RED_CELLS:
                _answer(sink, None, json.dumps(measure_image(data, settings, max_pixels, min_side)), good=True)
                continue
            field = decode_image(data, None if math.isnan(scale) else scale, settings, max_pixels, min_side)
        except RefusedError as refusal:
            _answer(sink, None, str(refusal))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)  # for the bytes themselves: the rest of them is still in the pipe
        else:
            del data
            _answer(sink, field, "\n".join(field.remarks))


def _exactly(source: BinaryIO, length: int) -> bytes:
    data = source.read(length)
    if len(data) < length:
        sys.exit(0)  # the parent has gone
    return data


def _answer(sink: BinaryIO, field: Field | None, text: str, good: bool = False) -> None:
    words = text.encode("utf-8", "replace")
    if field is None:
        sink.write(ANSWER.pack(good, 0, 0, 0, 0, len(words)) + words)
    else:
        height, width = field.rgb.shape[:2]
        sink.write(ANSWER.pack(1, height, width, field.source_width, field.source_height, len(words)) + words)
        sink.write(np.ascontiguousarray(field.rgb).reshape(-1).data)
    sink.flush()


def _limit_memory(more: int) -> None:
    """Allow `more` bytes of address space above what the imported libraries have taken."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, resource.RLIM_INFINITY))


def _allow_cpu(seconds: float) -> None:
    """Let this process live for `seconds` more of CPU time; the kernel ends it when they are spent."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    until = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
