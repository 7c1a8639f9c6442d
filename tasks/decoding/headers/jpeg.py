"""Headers of JPEG (ITU-T T.81, annex B) and of JPEG 2000 (ISO 15444-1, annex I)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from leukoflow.tasks.decoding.headers.kinds import EXPORT


@dataclass(frozen=True, slots=True)
class JpegFrame:
    """What a JPEG's frame header says. `precision_at` is where in the file the byte with its bits a colour lies."""

    process: int  # the marker's second byte: C0 to CF, F7 of JPEG-LS
    precision: int
    precision_at: int


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """Read the frame header of a JPEG; None where there is none (ITU-T T.81, annex B)."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return JpegFrame(marker, data[at + 4], at + 4)
        elif marker == 0xDA:
            return None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def jpeg_refusal(frame: JpegFrame | None) -> str | None:
    """Say what kind of JPEG this is where it is one that is not decoded."""
    if frame is None:
        return None
    if frame.process == 0xF7:
        return f"not supported: a JPEG-LS picture; {EXPORT}"
    if frame.process in (0xC3, 0xC7, 0xCB, 0xCF):
        return f"not supported: a lossless JPEG, as DICOM files hold it; {EXPORT}"
    if frame.process in (0xC5, 0xC6, 0xCD, 0xCE):
        return f"not supported: a hierarchical JPEG; {EXPORT}"
    return None


# ---------------------------------------------------------------- JPEG 2000


def jpeg2000_precision(data: bytes) -> int:
    """Return the bits a colour of a JPEG 2000 picture, the most of all its components; 8 where it cannot be read."""
    at = data.find(b"\xff\x4f\xff\x51", 0, 1 << 20)
    if at < 0 or len(data) < at + 42:
        return 8
    count = int.from_bytes(data[at + 40 : at + 42], "big")
    bits = [(value & 0x7F) + 1 for value in data[at + 42 : at + 42 + 3 * min(count, 16) : 3]]
    return max(bits, default=8)


def jpeg2000_profile(data: bytes) -> bytes | None:
    """Return the ICC profile of a JPEG 2000 file; None where it has none (ISO 15444-1, annex I)."""
    for kind, begin, end in _boxes(data, 0, len(data)):
        if kind == b"jp2h":
            for inner, start, stop in _boxes(data, begin, end):
                if inner == b"colr" and data[start : start + 1] == b"\2":
                    return data[start + 3 : stop]
        elif kind == b"jp2c":
            break
    return None


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while at + 8 <= end:
        length, begin = int.from_bytes(data[at : at + 4], "big"), at + 8
        if length == 1:
            length, begin = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        stop = end if length == 0 else at + length
        if stop < begin or stop > end:
            return
        yield data[at + 4 : at + 8], begin, stop
        at = stop
