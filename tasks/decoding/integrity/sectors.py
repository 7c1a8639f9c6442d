"""Disk sectors that were never written: bytes all alike from one sector's border to another's."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

import numpy as np

SECTOR = 512
"""Bytes: disks and network file systems lose data in multiples of this, at multiples of this."""


def even_sectors(data: bytes, start: int, end: int) -> list[int]:
    """Return the offsets of the sectors between `start` and `end` whose bytes are all the same."""
    low, high = -(-start // SECTOR), end // SECTOR
    if high <= low:
        return []
    sectors = np.frombuffer(data, np.uint8, (high - low) * SECTOR, low * SECTOR).reshape(-1, SECTOR)
    return ((np.flatnonzero((sectors == sectors[:, :1]).all(1)) + low) * SECTOR).tolist()


def even_stretch(data: bytes, start: int, end: int) -> bool:
    """Tell whether between `start` and `end` bytes all alike begin at one sector's border and end at another's."""
    return next(even_stretches(data, start, end), None) is not None


def even_stretches(data: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each stretch of bytes all alike that begins and ends at sectors' borders."""
    even = even_sectors(data, start, end)
    after = {at + SECTOR for at in even}
    begins = [at for at in even if at > start and data[at - 1] != data[at]]
    stops = [at for at in sorted(after) if at < end and data[at - 1] != data[at]]
    for first, stop in _pairs(begins, stops):
        if all(at in after for at in range(first + SECTOR, stop, SECTOR)):
            yield first, stop


def _pairs(begins: list[int], stops: list[int]) -> Iterator[tuple[int, int]]:
    """Yield each beginning with the next stop after it."""
    for first in begins:
        place = bisect.bisect_right(stops, first)
        if place < len(stops):
            yield first, stops[place]
