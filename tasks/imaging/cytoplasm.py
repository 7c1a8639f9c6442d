"""Whether a cell's nucleus-to-cell ratio was measured at all, and how it is shown.

The segmenter often sees no cytoplasm, and a mask that is nucleus throughout has the ratio 1 whatever the cell is like.
The stored column `nc_ratio` keeps it; anything that shows, averages or compares ratios asks here first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UNMEASURED_FROM = 0.95
"""Ratios from here on are of masks in which no cytoplasm was seen.

A closed rim one pixel wide, the least that a mask can show, is 5 % of a cell of 5,000 pixels and more of any smaller
one, and cells are smaller. What is less is a stray pixel at the edge of a nucleus, and no rim around it.
"""
UNSEEN = "cytoplasm not seen"
DESCRIPTION = f"area of the nucleus over that of the cell; null where it was not measured: {UNSEEN}"


def is_measured(nc_ratio: NDArray[np.floating] | Sequence[float]) -> NDArray[np.bool_]:
    """Say which ratios [n] were measured; NaN is not."""
    return np.asarray(np.asarray(nc_ratio, np.float64) < UNMEASURED_FROM, np.bool_)


def measured(nc_ratio: float | None) -> float | None:
    """Return the ratio where it was measured, else None."""
    return nc_ratio if nc_ratio is not None and bool(is_measured([nc_ratio])[0]) else None


def ratio_words(nc_ratio: float | None) -> str:
    """Write a ratio to two places; a dash with the reason where it was not measured."""
    found = measured(nc_ratio)
    return f"– ({UNSEEN})" if found is None else f"{found:.2f}"


def measured_words(nc_ratios: Sequence[float]) -> str:
    """Say of how many cells the ratio was measured, with the median of those; empty without cells."""
    if not len(nc_ratios):
        return ""
    seen = np.asarray(nc_ratios, np.float64)[is_measured(nc_ratios)]
    if not len(seen):
        return f"measured in 0 of {len(nc_ratios)} cells: {UNSEEN}"
    return f"measured in {len(seen)} of {len(nc_ratios)} cells, median {float(np.median(seen)):.2f}"
