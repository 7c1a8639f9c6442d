"""Damage of a JPEG: its structure, the JPEG library's complaints, and stretches that were never written."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from leukoflow.tasks.decoding.errors import MissingError
from leukoflow.tasks.decoding.integrity.sectors import even_stretch
from leukoflow.tasks.decoding.integrity.words import ends_early, trailing

_SCAN_END = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)
_ZEROS = re.compile(rb"\x00{64,}")
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker")
_STANDALONE = (0x01, *range(0xD0, 0xD8))
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_SEQUENTIAL, _WHOLE_BAND = (0xC0, 0xC1, 0xC9), b"\x00\x3f\x00"
RUBBISH = b"\x5a\xa5\x33" * 32
"""In front of a JPEG's end mark, what no decoder of a whole picture reaches."""

UNCHECKED_JPEG = "the JPEG's data could not be checked for damage"


@dataclass(frozen=True, slots=True)
class _Scan:
    """Bytes of one scan's entropy-coded data, and whether all zero bits would mean an even surface."""

    start: int
    end: int
    zeros_are_even: bool


@dataclass(frozen=True, slots=True)
class _Jpeg:
    """The structure of a JPEG: its scans, what lies between its segments, and how it is coded."""

    scans: tuple[_Scan, ...]
    gaps: tuple[tuple[int, int], ...]  # bytes between segments that belong to none
    end: int | None  # after the end mark
    progressive: bool
    arithmetic: bool
    sequential: bool
    precision: int


def jpeg_end(data: bytes) -> int | None:
    """Find the byte after a JPEG's own end mark, whatever follows it; None where it has none."""
    return _walk_jpeg(data).end


def check_jpeg(data: bytes) -> list[str]:
    """Ask the JPEG library for its complaints, and the file for its structure; returns remarks.

    Raises MissingError where data of the picture are missing or wrong.
    """
    walk = _walk_jpeg(data)
    remarks = []
    if walk.gaps:
        lost = sum(b - a for a, b in walk.gaps)
        remarks.append(f"odd but complete: {lost:,} bytes between the JPEG's segments belong to none")
    if walk.end is None:
        raise MissingError(ends_early(data))
    usual = _usual_scans(data, walk)
    if usual != data:
        remarks.append("odd but complete: the JPEG's scan header is wrong")
    padding, unchecked = _complaints(_bare(_without(usual[: walk.end], walk.gaps)), walk)
    remarks += unchecked
    if any(memoryview(data)[walk.end :]):
        remarks.append(trailing(len(data) - walk.end))
    for i, scan in enumerate(walk.scans):
        own = padding if i == len(walk.scans) - 1 else 0
        _check_runs(data, scan, scan.end - own, walk)
        if own:
            tail = data[scan.end - own : scan.end]
            if tail.strip(b"\0") and tail.strip(b"\xff"):
                raise MissingError("damaged: the JPEG holds more picture data than its picture needs")
            remarks.append("odd but complete: padding before the JPEG's end mark")
    return remarks


def _walk_jpeg(data: bytes) -> _Jpeg:
    """Go through the segments of a JPEG (ITU-T T.81, annex B) up to its end mark, whatever lies between them."""
    scans: list[_Scan] = []
    gaps: list[tuple[int, int]] = []
    first: dict[int, int] = {}  # of each Huffman table, the symbol that zero bits stand for
    progressive = arithmetic = sequential = False
    precision = 8
    at, end = 2, None
    while True:
        mark = data.find(b"\xff", at)
        while mark >= 0 and mark + 1 < len(data) and data[mark + 1] in (0x00, 0xFF):
            if data[mark + 1] == 0xFF:
                mark += 1
            else:
                mark = data.find(b"\xff", mark + 2)
        if mark < 0 or mark + 1 >= len(data):
            break
        if data[at:mark].strip(b"\xff"):
            gaps.append((at, mark))
        kind = data[mark + 1]
        at = mark + 2
        if kind == 0xD9:
            end = at
            break
        if kind in _STANDALONE:
            continue
        if at + 2 > len(data):
            break
        length = int.from_bytes(data[at : at + 2])
        body = data[at + 2 : at + length]
        at += max(length, 2)
        if kind in _FRAMES:
            progressive = kind in (0xC2, 0xC6, 0xCA, 0xCE)
            arithmetic = kind >= 0xC9
            sequential = kind in _SEQUENTIAL
            precision = body[0] if body else 8
        elif kind == 0xC4:
            _note_tables(body, first)
        elif kind == 0xDA:
            found = _SCAN_END.search(data, at)
            stop = found.start() if found else len(data)
            scans.append(_Scan(at, stop, _zeros_are_even(body, first)))
            at = stop
    return _Jpeg(tuple(scans), tuple(gaps), end, progressive, arithmetic, sequential, precision)


def _note_tables(body: bytes, first: dict[int, int]) -> None:
    """Note of each Huffman table in a segment the symbol that zero bits stand for."""
    while len(body) > 17:
        count = sum(body[1:17])
        first[body[0]] = body[17]
        body = body[17 + count :]


def _zeros_are_even(body: bytes, first: dict[int, int]) -> bool:
    """Tell whether in this scan zero bits say "like the block before, without structure" for each component."""
    tables = [body[2 + 2 * i] for i in range(body[0])] if body and len(body) > 2 * body[0] else []
    return all(first.get(t >> 4) == 0 and first.get(0x10 | (t & 15)) == 0 for t in tables)


def _usual_scans(data: bytes, walk: _Jpeg) -> bytes:
    """Return a JPEG whose sequential scans say that they hold all coefficients, as they do: decoders do not ask."""
    if not walk.sequential:
        return data
    usual = bytearray(data)
    for scan in walk.scans:
        usual[scan.start - 3 : scan.start] = _WHOLE_BAND
    return bytes(usual)


def _bare(data: bytes) -> bytes:
    """Return a JPEG without its applications' segments and comments: what is odd there hides what is damaged."""
    out, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        kind = data[at + 1]
        if kind == 0xFF:
            at += 1
            continue
        stop = at + 2 if kind in _STANDALONE else at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))
        if not (0xE0 <= kind <= 0xEF or kind == 0xFE):
            out.append(data[at:stop])
        at = stop
    return b"".join(out) + data[at:]


def _complaints(data: bytes, walk: _Jpeg) -> tuple[int, list[str]]:
    """Decode without keeping the pixels; returns the bytes that the library found too many before the end mark.

    A remark says where nothing could be found out.
    """
    if walk.precision != 8:  # the library reads none; what does (`wide_pixels`) looks for the end of its data
        return 0, []
    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
        # A small picture in grey costs the least, and all the data must be read for it.
        simplejpeg.decode_jpeg(data, "CMYK" if colours in ("CMYK", "YCCK") else "GRAY", min_factor=8)
    except KeyError:  # a sampling of colours that has a number and no name
        return 0, _check_unnamed(data, walk)
    except ValueError as complaint:
        words = str(complaint)
        if found := _EXTRANEOUS.search(words):
            return int(found[1]), []
        if "remature end" in words:
            raise MissingError("picture data missing: the JPEG's data end before its picture does") from None
        if words.startswith(("Corrupt JPEG data", "Inconsistent progression", "Invalid SOS")):
            raise MissingError("damaged: the JPEG's picture data are corrupt") from None
        return 0, _check_unnamed(data, walk) if "subsampling" in words else [UNCHECKED_JPEG]
    return 0, []


def _check_unnamed(data: bytes, walk: _Jpeg) -> list[str]:
    """Look whether a decoder that complains of nothing reaches rubbish in front of the end mark of `data`.

    Of a whole picture it does not. Returns a remark where it cannot read the picture. Raises MissingError.
    """

    def pixels(data: bytes) -> NDArray[np.uint8]:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if not walk.progressive:  # whose last scans tell nothing of a picture's averages
                image.draft(None, (1, 1))
            return np.asarray(image)

    try:
        found = pixels(data)
    except OSError:
        return [UNCHECKED_JPEG]
    try:
        same = np.array_equal(found, pixels(data[:-2] + RUBBISH + data[-2:]))
    except OSError:
        same = False
    if not same:
        raise MissingError("picture data missing: the JPEG's data end before its picture does")
    return []


def _check_runs(data: bytes, scan: _Scan, end: int, walk: _Jpeg) -> None:
    """Raise MissingError for bytes all alike where compressed data should be: a sector that was never written."""
    zeros = not (walk.progressive or walk.arithmetic or scan.zeros_are_even)
    found = zeros and _ZEROS.search(data, scan.start, end) is not None
    # Where an even surface can look so too, only a stretch that begins and ends as sectors do is damage.
    if found or even_stretch(data, scan.start, end):
        raise MissingError("picture data missing: the JPEG has a stretch of bytes all alike among its picture data")


def _without(data: bytes, gaps: tuple[tuple[int, int], ...]) -> bytes:
    for a, b in reversed(gaps):
        data = data[:a] + data[b:]
    return data


def check_jpeg2000(data: bytes) -> None:
    """Look for sectors that were never written among the picture data of a JPEG 2000. Raises MissingError.

    Where a picture is even, whole packets are zeros too, so only what begins and ends as sectors do is damage.
    """
    start = data.find(b"\xff\x93")
    if start >= 0 and even_stretch(data, start, len(data)):
        raise MissingError("picture data missing: the JPEG 2000 has a stretch of bytes all alike")
