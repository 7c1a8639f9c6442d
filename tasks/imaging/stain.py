"""Measure how strongly the stains absorb: optical densities, and the signal that tells white cells from all else."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

RED_WEIGHT = 0.6  # see semantic.pseudo_semantic


def white_cell_signal(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Measure how much a pixel absorbs as white cells do, float32 [H, W]; near zero for background and red cells."""
    return white_signal(*optical_density(rgb))


def white_signal(
    red: NDArray[np.float32], green: NDArray[np.float32], blue: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the green density less what red cells would add to it, float32 [H, W]; see `semantic.pseudo_semantic`."""
    out: NDArray[np.float32] = green - RED_WEIGHT * red - np.maximum(blue, -0.05)
    return out


def optical_density(
    rgb: NDArray[np.uint8] | cv2.typing.MatLike,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return three planes float32 [H, W]: natural log of background (the 90th percentile) over pixel."""
    levels = np.arange(256, dtype=np.float64) + 1
    planes = []
    for plane in cv2.split(rgb):
        white = np.percentile(plane[::2, ::2], 90) + 1
        planes.append(np.asarray(cv2.LUT(plane, np.log(white / levels).astype(np.float32)), np.float32))
    return planes[0], planes[1], planes[2]
