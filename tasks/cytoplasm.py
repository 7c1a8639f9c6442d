"""Whether a cell's nucleus-to-cell ratio was measured at all, and how it is shown.

The segmenter often sees no cytoplasm, and a mask that is nucleus throughout has the ratio 1 whatever the cell is like.
The stored column `nc_ratio` keeps it; whoever shows, averages or compares ratios asks here first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UNMEASURED_FROM = 0.995
"""Ratios from here on are of masks without cytoplasm.

A closed rim of cytoplasm one pixel wide is more than 5 % of any cell of up to 5,000 px, so what is left below half a
percent is none: stray pixels at the edge of a nucleus, at most one of a cell of 200 px.
"""
UNSEEN = "cytoplasm not seen"
DESCRIPTION = f"area of the nucleus over that of the cell; null where it was not measured: {UNSEEN}"


def is_measured(nc_ratio: NDArray[np.floating] | Sequence[float]) -> NDArray[np.bool_]:
    """Tells which ratios [n] were measured; NaN is not."""
    return np.asarray(np.asarray(nc_ratio, np.float64) < UNMEASURED_FROM, np.bool_)


def measured(nc_ratio: float | None) -> float | None:
    """Returns the ratio where it was measured, else None."""
    return nc_ratio if nc_ratio is not None and bool(is_measured([nc_ratio])[0]) else None


def ratio_words(nc_ratio: float | None) -> str:
    """Writes a ratio to two places; a dash with the reason where it was not measured."""
    found = measured(nc_ratio)
    return f"– ({UNSEEN})" if found is None else f"{found:.2f}"


def measured_words(nc_ratios: Sequence[float]) -> str:
    """Says of how many cells the ratio was measured, with the median of those; empty without cells."""
    if not len(nc_ratios):
        return ""
    seen = np.asarray(nc_ratios, np.float64)[is_measured(nc_ratios)]
    if not len(seen):
        return f"measured in 0 of {len(nc_ratios)} cells: {UNSEEN}"
    return f"measured in {len(seen)} of {len(nc_ratios)} cells, median {float(np.median(seen)):.2f}"
