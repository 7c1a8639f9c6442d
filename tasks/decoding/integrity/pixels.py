"""Damage that shows in pixels alone: sectors never written or foreign, and surfaces that a cut picture ends in."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from leukoflow.tasks.decoding.errors import MissingError
from leukoflow.tasks.decoding.integrity.sectors import SECTOR, even_stretches

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
    for first, stop in even_stretches(data, start, end):
        if (first - start) % stride == 0 and (stop - start) % stride == 0:
            continue
        near = [data[at : at + SECTOR] for at in (first - stride, stop - SECTOR + stride) if start <= at < end - SECTOR]
        if not alone or all(2 * piece.count(data[first]) < SECTOR for piece in near):
            raise MissingError("picture data missing: a disk sector's length of bytes all alike within the picture")


def _torn(pixels: NDArray[np.uint8], wide: int, borders: NDArray[np.int64]) -> bool:
    """Tell whether other data begin at one of the `borders` (bytes) within rows of `wide` bytes."""
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
    """Tell whether from a border on, for the length of a whole row, most of the picture differs from what lies above.

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
    """Tell whether what begins at a byte also begins above or below it, as the side of a drawn scale bar does."""

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
