"""Separate touching cells: basins of the distance transform, merged where no waist lies between them."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import watershed

WAIST = 0.87  # two basins are two cells where their waist is below this share of the shallower one's depth


def split_touching(cell: NDArray[np.uint8], peak_distance_px: int) -> NDArray[np.int32]:
    """Label touching cells apart: int32 [H, W], basins of the distance transform; those without a waist are merged.

    Args:
        cell: uint8 [H, W], 1 inside of cells.
        peak_distance_px: least distance of two peaks.
    """
    # Distances are to background pixels only, so a cell that the field's edge cuts is deepest at the edge.
    depth = cv2.distanceTransform(cell, cv2.DIST_L2, 5)
    depth = cv2.GaussianBlur(depth, (0, 0), 1.0)
    side = 2 * peak_distance_px + 1
    highest = cv2.dilate(depth, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))
    peaks = np.asarray((depth >= highest) & (cell > 0), np.uint8)
    markers = cv2.connectedComponents(peaks, connectivity=8)[1]
    flooded = np.asarray(watershed(-depth, markers, mask=cell > 0), np.int32)  # type: ignore[no-untyped-call]
    return _merge_shallow(flooded, np.asarray(depth, np.float32))[flooded]


def drop_small(mask: NDArray[np.uint8] | cv2.typing.MatLike, smallest: int) -> NDArray[np.uint8]:
    """Keep the components of at least `smallest` pixels: uint8 [H, W], 0 or 1."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= smallest
    keep[0] = False
    return np.asarray(keep[labels], np.uint8)


def fill_holes(mask: NDArray[np.uint8] | cv2.typing.MatLike) -> NDArray[np.uint8]:
    """Fill what is not connected, by edges of pixels, with the outside: uint8 [H, W] of 0 and 1, as `mask` is."""
    gaps = np.pad(1 - np.asarray(mask, np.uint8), 1, constant_values=1)
    labels = cv2.connectedComponents(gaps, connectivity=4)[1]
    return np.asarray(labels[1:-1, 1:-1] != labels[0, 0], np.uint8)


def _merge_shallow(labels: NDArray[np.int32], depth: NDArray[np.float32]) -> NDArray[np.int32]:
    """Map basins to cells, int32: neighbours whose waist is nearly as deep as the shallower one are one cell."""
    peak = np.zeros(int(labels.max()) + 1, np.float32)
    np.maximum.at(peak, labels.ravel(), depth.ravel())
    pairs, saddles = [], []
    for ahead, behind in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        p, q = labels[ahead], labels[behind]
        at = np.nonzero((p != q) & (p > 0) & (q > 0))
        pairs.append(np.sort(np.stack([p[at], q[at]], axis=1), axis=1))
        saddles.append(np.minimum(depth[ahead][at], depth[behind][at]))
    edges, which = np.unique(np.concatenate(pairs), axis=0, return_inverse=True)
    waist = np.zeros(len(edges), np.float32)
    np.maximum.at(waist, which.ravel(), np.concatenate(saddles))
    parent = np.arange(len(peak), dtype=np.int32)
    for e in np.argsort(-waist, kind="stable"):  # deepest waist first, as a flood would meet them
        i, j = (_root(parent, int(v)) for v in edges[e])
        if i != j and waist[e] > WAIST * min(peak[i], peak[j]):
            parent[max(i, j)] = min(i, j)
            peak[min(i, j)] = max(peak[i], peak[j])
    return np.array([_root(parent, i) for i in range(len(parent))], np.int32)


def _root(parent: NDArray[np.int32], i: int) -> int:
    while parent[i] != i:
        i = int(parent[i])
    return i
