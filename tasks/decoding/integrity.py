"""What a picture's file says of its own wholeness: checksums, lengths, a decoder's complaints, and seams in its pixels.

Decoders for viewing show what they can of a damaged file: grey or black where data are missing, the rest displaced or
in other colours. A diagnosis of that misleads, so whatever can tell is asked here. Nothing in this module needs more
than bytes or pixels. Functions raise `MissingError` where data of the picture are missing or wrong, and return remarks
where something is odd but the picture is complete.
"""

from __future__ import annotations

import bisect
import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

SECTOR = 512
"""Bytes: disks and network file systems lose data in multiples of this, at multiples of this."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIXEL_CHUNKS = (b"tRNS",)  # ancillary by name, but the colours depend on it
_FED_BYTES, _INFLATE_BYTES = 1 << 16, 1 << 20

_SCAN_END = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)
_ZEROS = re.compile(rb"\x00{64,}")
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker")
_STANDALONE = (0x01, *range(0xD0, 0xD8))
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_SEQUENTIAL, _WHOLE_BAND = (0xC0, 0xC1, 0xC9), b"\x00\x3f\x00"
RUBBISH = b"\x5a\xa5\x33" * 32
"""In front of a JPEG's end mark, what no decoder of a whole picture reaches."""

UNCHECKED_JPEG = "the JPEG's data could not be checked for damage"
NO_LENGTHS = "odd but complete: the TIFF does not say how long its strips are"


class MissingError(Exception):
    """Data of the picture are missing or wrong; says what, in words for people."""


# ---------------------------------------------------------------- PNG


def sound_png(data: bytes) -> tuple[bytes, list[str]]:
    """Check the checksum of every chunk; returns the file without broken chunks that are no part of the picture.

    The remarks name those. Raises MissingError where the picture itself is hit.
    """
    kept: list[tuple[int, int]] = []
    remarks: list[str] = []
    at, view, pieces = len(_PNG_SIGNATURE), memoryview(data), False
    while True:
        if at + 12 > len(data):
            raise MissingError(ends_early(data))
        length, kind = struct.unpack_from(">L4s", data, at)
        end = at + 12 + length
        if not kind.isalpha():
            raise MissingError(f"damaged: what should be a chunk of the PNG at byte {at:,} is none")
        if end > len(data):
            raise MissingError(ends_early(data))
        name = kind.decode()
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            if kind[0] < 97 or kind in _PIXEL_CHUNKS:
                raise MissingError(f"damaged: the checksum of chunk {name} of the PNG is wrong")
            remarks.append(f"damaged beside the picture: the checksum of chunk {name} of the PNG is wrong")
        else:
            kept.append((at, end))
        pieces |= kind == b"IDAT"
        at = end
        if kind == b"IEND":
            break
    if not pieces:
        raise MissingError("damaged: the PNG has no picture data")
    if any(view[at:]):
        remarks.append(_trailing(len(data) - at))
    if not any(r.startswith("damaged") for r in remarks):
        return data, remarks
    return b"".join([_PNG_SIGNATURE, *(view[a:b] for a, b in kept)]), remarks


def check_png_pixels(data: bytes) -> None:
    """Inflate the picture data of a PNG and compare their length and checksum. Raises MissingError."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">2L5B", data, 16)
    bits = depth * _PNG_CHANNELS.get(colour, 1)
    passes = [(width, height)]
    if interlaced:
        passes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in _PNG_PASSES]
    expected = sum(h * (1 + -(-w * bits // 8)) for w, h in passes if w > 0 and h > 0)
    inflate, got = zlib.decompressobj(), 0
    try:
        for start, end in _png_data(data):
            for at in range(start, end, _FED_BYTES):
                rest = data[at : min(at + _FED_BYTES, end)]
                while rest and not inflate.eof and got <= expected:
                    got += len(inflate.decompress(rest, _INFLATE_BYTES))
                    rest = inflate.unconsumed_tail
    except zlib.error:
        raise MissingError("damaged: the picture data of the PNG cannot be decompressed") from None
    if got < expected:
        raise MissingError(f"picture data missing: the PNG holds {got:,} of {expected:,} bytes of pixels")
    if got == expected and not inflate.eof:
        raise MissingError("damaged: the picture data of the PNG have no end")


def _png_data(data: bytes) -> Iterator[tuple[int, int]]:
    at = len(_PNG_SIGNATURE)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">L4s", data, at)
        if kind == b"IDAT":
            yield at + 8, at + 8 + length
        at += 12 + length


# ---------------------------------------------------------------- JPEG


@dataclass(frozen=True, slots=True)
class _Scan:
    """Bytes of one scan's entropy-coded data, and whether all zero bits would mean an even surface."""

    start: int
    end: int
    zeros_are_even: bool


@dataclass(frozen=True, slots=True)
class _Jpeg:
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
        remarks.append(_trailing(len(data) - walk.end))
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
    while len(body) > 17:
        count = sum(body[1:17])
        first[body[0]] = body[17]
        body = body[17 + count :]


def _zeros_are_even(body: bytes, first: dict[int, int]) -> bool:
    """Whether in this scan zero bits say "like the block before, without structure" for each component."""
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
    if (
        walk.precision != 8
    ):  # the library reads none; what does (`tasks.decoding.wide_pixels`) looks for the end of its data
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


def even_sectors(data: bytes, start: int, end: int) -> list[int]:
    """Offsets of the sectors between `start` and `end` whose bytes are all the same."""
    low, high = -(-start // SECTOR), end // SECTOR
    if high <= low:
        return []
    sectors = np.frombuffer(data, np.uint8, (high - low) * SECTOR, low * SECTOR).reshape(-1, SECTOR)
    return ((np.flatnonzero((sectors == sectors[:, :1]).all(1)) + low) * SECTOR).tolist()


def even_stretch(data: bytes, start: int, end: int) -> bool:
    """Whether between `start` and `end` bytes all alike begin at one sector's border and end at another's."""
    return next(_even_stretches(data, start, end), None) is not None


def _even_stretches(data: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    even = even_sectors(data, start, end)
    after = {at + SECTOR for at in even}
    begins = [at for at in even if at > start and data[at - 1] != data[at]]
    stops = [at for at in sorted(after) if at < end and data[at - 1] != data[at]]
    for first, stop in _pairs(begins, stops):
        if all(at in after for at in range(first + SECTOR, stop, SECTOR)):
            yield first, stop


def _pairs(begins: list[int], stops: list[int]) -> Iterator[tuple[int, int]]:
    """Each beginning with the next stop after it."""
    for first in begins:
        place = bisect.bisect_right(stops, first)
        if place < len(stops):
            yield first, stops[place]


def ends_early(data: bytes) -> str:
    """Words for a file that is cut off."""
    return f"truncated: the image's data ends early ({len(data):,} bytes)"


def _trailing(count: int) -> str:
    return f"odd but complete: {count:,} bytes follow the picture's end"


def check_jpeg2000(data: bytes) -> None:
    """Look for sectors that were never written among the picture data of a JPEG 2000. Raises MissingError.

    Where a picture is even, whole packets are zeros too, so only what begins and ends as sectors do is damage.
    """
    start = data.find(b"\xff\x93")
    if start >= 0 and even_stretch(data, start, len(data)):
        raise MissingError("picture data missing: the JPEG 2000 has a stretch of bytes all alike")


# ---------------------------------------------------------------- TIFF

_UNCOMPRESSED, _LZW, _JPEG_IN_TIFF, _DEFLATE, _OLD_DEFLATE, _PACKBITS = 1, 5, 7, 8, 32946, 32773
_WORDS = {_LZW: "LZW", _DEFLATE: "deflate", _OLD_DEFLATE: "deflate", _PACKBITS: "PackBits", _JPEG_IN_TIFF: "JPEG"}


@dataclass(frozen=True, slots=True)
class Strips:
    """Where a TIFF page's strips or tiles lie, and what each should hold when it is decompressed.

    `expected` are bytes, 0 where the compression leaves that open; `tables` are the page's JPEG tables. `padded` is
    what the last strip of each of the `planes` may hold, rows of `row` bytes behind the picture's included; 0 for
    tiles, which always are full.
    """

    compression: int
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    expected: tuple[int, ...]
    tables: bytes = b""
    padded: int = 0
    row: int = 1
    planes: int = 1


def check_tiff(data: bytes, strips: Strips) -> list[str]:
    """Look for the data of each strip and tile, and decompress those without a checksum to count them; returns remarks.

    Raises MissingError where data are missing or wrong.
    """
    counts, remarks = strips.counts, list[str]()
    if strips.compression == _UNCOMPRESSED and not any(counts):
        counts = strips.expected
        remarks.append(NO_LENGTHS)
    count, wanted = min(len(strips.offsets), len(counts)), len(strips.expected)
    if count < wanted:
        raise MissingError(f"picture data missing: the TIFF names {count:,} of {wanted:,} strips or tiles")
    of_a_plane = max(wanted // strips.planes, 1)
    for i in range(wanted):
        start, length, expected = strips.offsets[i], counts[i], strips.expected[i]
        most = strips.padded if strips.padded > expected and i % of_a_plane == of_a_plane - 1 else expected
        where = f"strip or tile {i + 1:,} of {wanted:,}"
        if start + length > len(data):
            raise MissingError(ends_early(data))
        if length == 0:
            raise MissingError(f"picture data missing: the TIFF's {where} is empty")
        if strips.compression == _UNCOMPRESSED:
            if length < expected:
                raise MissingError(f"picture data missing: the TIFF's {where} is too short")
        elif strips.compression in _WORDS:
            piece = data[start : start + length]
            if strips.compression == _JPEG_IN_TIFF:
                remarks += check_jpeg(strips.tables[:-2] + piece[2:] if strips.tables else piece)
            elif (got := _decompressed(strips.compression, piece, expected, most)) != expected:
                if not expected < got <= most or got % strips.row:
                    lack, kind = "picture data missing" if got < expected else "damaged", _WORDS[strips.compression]
                    raise MissingError(f"{lack}: {kind} data of the TIFF's {where} give another size")
                remarks.append("odd but complete: the TIFF's last strip holds more rows than the picture")
            if even_sectors(data, start, start + length) and expected < 64 * length:
                raise MissingError(f"picture data missing: the TIFF's {where} has a stretch of bytes all alike")
    return list(dict.fromkeys(remarks))


def _decompressed(compression: int, data: bytes, expected: int, most: int) -> int:
    """Bytes that a strip gives, looked at until one more than it may. Raises MissingError where it is corrupt."""
    import imagecodecs

    try:
        if compression in (_DEFLATE, _OLD_DEFLATE):
            inflate = zlib.decompressobj()
            got = len(inflate.decompress(data, most + 1))
            if expected <= got <= most and not inflate.eof:
                got += len(inflate.decompress(inflate.unconsumed_tail, 1))  # reads the checksum
                if not inflate.eof:
                    raise MissingError("damaged: compressed data of the TIFF have no end")
            return got
        decode = imagecodecs.lzw_decode if compression == _LZW else imagecodecs.packbits_decode
        return len(decode(data))
    except (zlib.error, RuntimeError, ValueError):
        raise MissingError(f"damaged: {_WORDS[compression]} data of the TIFF cannot be decompressed") from None


# ---------------------------------------------------------------- pixels

_BAND_ROWS = 8  # as many as a JPEG's block has
_NEARLY_WHITE = 235  # an overexposed background is as even as a missing one

_CHUNK = 8 << 20
_LEAST_STRIDE = 96
_LEAST_BLACK, _LEAST_STEP = 64, 18
_ROW_END = 8  # bytes at a row's end that may be zeros of its own: the last colours of a pixel, and padding
_SEGMENTS = 8
_AHEAD, _BEHIND, _NEAR = 384, 96, 12
"""Bytes looked at after, before, and next to a sector's border."""


def check_rows(data: bytes, start: int, stride: int, rows: int) -> None:
    """Look for parts of uncompressed pixels that were never written, or do not belong where they are.

    Within rows of `stride` bytes, bytes change little from one row to the next. Where the change is great from a
    sector's border on, small before it, and small again one row further, other data begin at the border: something no
    object in a picture does. Raises MissingError.
    """
    length = stride * rows
    if stride < _LEAST_STRIDE or rows < 6:
        return
    pixels, wide = np.frombuffer(data, np.uint8, length, start), stride
    _check_black_end(pixels, wide)
    check_sectors(data, start, stride, rows)
    borders = np.arange(-(-start // SECTOR) * SECTOR - start, length, SECTOR)
    if _torn(pixels, wide, borders) or _torn(pixels[::-1], wide, len(pixels) - borders[::-1]):
        raise MissingError("damaged: a part of the picture does not belong where it is, from a disk sector's border on")


def check_sectors(data: bytes, start: int, stride: int, rows: int, alone: bool = False) -> None:
    """Look for sectors of bytes all alike in uncompressed rows of `stride` bytes. Raises MissingError.

    Whole rows are a bar. With `alone`, only what differs from the rows above and below counts: rows of black or
    saturated values that begin and end at any byte are many in a large picture.
    """
    end = start + stride * rows
    if stride % SECTOR == 0:  # an object's sides may lie at sectors' borders
        return
    for first, stop in _even_stretches(data, start, end):
        if (first - start) % stride == 0 and (stop - start) % stride == 0:
            continue
        near = [data[at : at + SECTOR] for at in (first - stride, stop - SECTOR + stride) if start <= at < end - SECTOR]
        if not alone or all(2 * piece.count(data[first]) < SECTOR for piece in near):
            raise MissingError("picture data missing: a disk sector's length of bytes all alike within the picture")


def _torn(pixels: NDArray[np.uint8], wide: int, borders: NDArray[np.int64]) -> bool:
    chunk = max(_CHUNK // wide, 1) * wide  # whole rows
    for first in range(0, len(pixels), chunk):
        piece = pixels[max(first - 3 * wide, 0) : first + chunk + 4 * wide]
        own = borders[(borders >= first) & (borders < first + chunk)] - max(first - 3 * wide, 0)
        own = own[(own >= 2 * wide + _BEHIND) & (own + 3 * wide <= len(piece))]
        if not len(own):
            continue
        change = np.asarray(cv2.absdiff(piece[wide:], piece[:-wide]), np.uint8).reshape(-1)
        usual = max(float(np.median(change[:: max(1, len(change) // 65536)])), 1.0)
        if _torn_line(change, own - wide, own, wide):
            return True
        great = np.concatenate([[0], np.cumsum(change >= 4 * usual + 4, dtype=np.int32)])
        own = own[own + wide + _AHEAD <= len(change)] if wide >= _AHEAD + _BEHIND else own[:0]
        at = own - wide

        def share(low: NDArray[np.int64], size: int, great: NDArray[np.int32] = great) -> NDArray[np.float64]:
            return (great[low + size] - great[low]) / size

        after, before = share(at, _AHEAD), share(at - _BEHIND, _BEHIND)
        sharp = (share(at, _NEAR) > 0.5) & (share(at - _NEAR, _NEAR) < 0.35)
        calm = np.maximum(share(at - wide, _AHEAD), before)
        hits = own[sharp & (after > 0.55) & (calm < 0.2) & (after > calm + 0.4)]
        if any(not _continues(piece, int(hit), wide) for hit in hits):
            return True
    return False


def _torn_line(change: NDArray[np.uint8], at: NDArray[np.int64], own: NDArray[np.int64], wide: int) -> bool:
    """Whether from a border on, for the length of a whole row, most of the picture differs from what lies above.

    In eight parts of such a line, the change to the row above is compared with that of the lines before and after.
    A line that begins within a quarter of the picture's sides may be a drawn frame or bar, and tells nothing.
    """
    column = own % wide
    at = at[(column > wide // 4) & (column < wide - wide // 4)]
    total = np.concatenate([[0], np.cumsum(np.minimum(change, 64), dtype=np.int64)])
    part = wide // _SEGMENTS
    at = at[(at >= wide) & (at + 2 * wide + 2 * part < len(total))]
    if not len(at):
        return False
    low = at[:, None] + np.arange(-2, _SEGMENTS + 2) * part  # two parts before the line, and two after it

    def mean(shift: int) -> NDArray[np.float64]:
        return np.asarray((total[low + shift + part] - total[low + shift]) / part)

    usual = np.maximum(mean(-wide), mean(wide))
    excess = mean(0) > 2.5 * usual + 2
    calm = ~excess[:, :2].any(1) & ~excess[:, -2:].any(1)
    return bool((calm & (excess[:, 2:-2].sum(1) >= _SEGMENTS - 1)).any())


def _check_black_end(pixels: NDArray[np.uint8], wide: int) -> None:
    """Raise MissingError where the pixels end in zeros that begin within a row below one that is not black.

    A copy that was interrupted leaves that. The black of a round field of view continues from row to row.
    """
    if pixels[-_LEAST_BLACK:].any():
        return
    end = len(pixels)
    while end > wide and not pixels[end - wide : end].any():
        end -= wide
    filled = np.flatnonzero(pixels[max(end - wide, 0) : end])
    end = max(end - wide, 0) + (int(filled[-1]) + 1 if len(filled) else 0)
    if end < wide or -end % wide < _ROW_END:  # whole rows are a bar, or what check_end remarks on
        return
    above = pixels[end - wide : min((end // wide + 1) * wide, len(pixels)) - wide]
    if len(above) >= _LEAST_STEP and float(np.mean(above > 16)) > 0.9:
        raise MissingError("picture data missing: the picture's data end in zeros, from within a row on")


def _continues(pixels: NDArray[np.uint8], at: int, wide: int) -> bool:
    """Whether what begins at a byte also begins above or below it, as the side of a drawn scale bar does."""

    def edge(place: int) -> float:
        behind, ahead = pixels[place - _NEAR : place], pixels[place : place + _NEAR]
        return abs(float(ahead.mean()) - float(behind.mean()))

    return max(edge(at + k * wide) for k in (-2, -1, 1, 2)) > max(12.0, 0.8 * edge(at))


def check_end(pixels: NDArray[np.uint8]) -> list[str]:
    """Look for an even surface that the picture ends in: what a program leaves that re-saved a picture cut off.

    `pixels` are uint8 [height, width] or [height, width, channels]. Returns a remark for an even band of whole rows.
    Raises MissingError where it begins within the row of blocks before them, as a bar drawn on purpose does not.
    """
    flat = pixels.reshape(pixels.shape[0], -1)
    height, wide = flat.shape
    colour = pixels[-1, -1]
    line = np.tile(np.atleast_1d(colour), wide // np.atleast_1d(colour).size)
    if int(np.min(colour)) >= _NEARLY_WHITE or not np.array_equal(flat[-1], line):
        return []
    even = 0
    for row in flat[::-1]:
        if not np.array_equal(row, line):
            break
        even += 1
    if even < _BAND_ROWS or even == height:
        return []
    # The row of blocks above: even from some column on to the right edge, in all rows of the block.
    block = pixels[max(height - even - _BAND_ROWS, 0) : height - even]
    same = (block.reshape(len(block), pixels.shape[1], -1) == colour).all((0, 2))
    run = int(np.argmin(same[::-1])) if not same.all() else len(same)
    if run >= _BAND_ROWS and run % _BAND_ROWS == pixels.shape[1] % _BAND_ROWS and not same[:-run].any():
        raise MissingError(f"picture data missing: an even surface from within a row on to the end ({even:,} rows)")
    return [f"the last {even:,} rows are one even surface"]
