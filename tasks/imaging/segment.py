"""Find single cells in classes of pixels, each once: watershed per tile, and which tile a cell belongs to."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from leukoflow.core.errors import LeukoflowError
from leukoflow.core.method import SegmentSettings
from leukoflow.tasks.imaging.semantic import BACKGROUND, NUCLEUS, clean_semantic
from leukoflow.tasks.imaging.watershed import drop_small, split_touching

LARGEST_SHARE = 0.5  # of the largest white component's area, where no component is as large as a red cell


def single_cells(
    rgb: NDArray[np.uint8], semantic: NDArray[np.uint8], settings: SegmentSettings
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Clean classes of pixels and find the single cells in them; what is no cell is background in both.

    Args:
        rgb: uint8 [H, W, 3], normalised.
        semantic: uint8 [H, W], as the network gives it.
        settings: see `watershed_cells`.
    """
    cleaned, smallest = clean_semantic(rgb, semantic)
    cells = watershed_cells(cleaned, settings, smallest)
    if not cells.any():
        # Clumps of red cells can be taken for huge ones; the largest white cell must not fall victim to that.
        areas = cv2.connectedComponentsWithStats(np.asarray(cleaned > BACKGROUND, np.uint8))[2][1:, cv2.CC_STAT_AREA]
        cells = watershed_cells(cleaned, settings, LARGEST_SHARE * float(areas.max()) if areas.size else 0.0)
    return np.where(cells > 0, cleaned, np.uint8(BACKGROUND)), cells


def watershed_cells(
    semantic: NDArray[np.uint8], settings: SegmentSettings, smallest_px: float = 0.0
) -> NDArray[np.uint16]:
    """Find single cells in classes of pixels: watershed (Beucher and Lantuejoul 1979) on the distance transform.

    Two touching cells are separated by their waist, relative to their size, so lobes and scale matter little.

    Args:
        semantic: uint8 [H, W]; 0 background, 1 cytoplasm, 2 nucleus.
        settings: smallest areas and the distance between two peaks, in model pixels.
        smallest_px: area below which a component is no white cell, where that is more than the settings'.

    Returns:
        uint16 [H, W]: 0 background, cells 1..k in raster order of their first pixel.
    """
    cell = np.asarray(semantic > BACKGROUND, np.uint8)
    nucleus = np.asarray(semantic == NUCLEUS, np.uint8)
    nucleus = drop_small(nucleus, settings.min_nucleus_area_px)
    if not nucleus.any():
        return np.zeros(semantic.shape, np.uint16)
    flooded = split_touching(cell, settings.peak_distance_px)
    areas = np.bincount(flooded.ravel())
    nuclei = np.bincount(flooded[nucleus > 0], minlength=len(areas))
    keep = (areas >= max(settings.min_cell_area_px, smallest_px)) & (nuclei >= settings.min_nucleus_area_px)
    if not settings.touching_border:
        keep[_edge_labels(flooded)] = False
    return _relabel(flooded, keep)


def own_cells(
    cells: NDArray[np.uint16], origin: tuple[int, int], core: tuple[int, int, int, int]
) -> NDArray[np.uint16]:
    """Keep the cells whose centroid lies in the tile's core (half open); the others belong to a neighbouring tile.

    Args:
        cells: uint16 [H, W] of one tile.
        origin: (x, y) of the tile's first pixel in the scaled image.
        core: (x0, y0, x1, y1) in the scaled image.

    Returns:
        uint16 [H, W], relabelled 1..k in raster order.
    """
    area, cx, cy = _centroids(cells)
    x, y = cx + origin[0], cy + origin[1]
    keep = (area > 0) & (x >= core[0]) & (x < core[2]) & (y >= core[1]) & (y < core[3])
    return _relabel(cells.astype(np.int32), keep)


def _edge_labels(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))


def _centroids(cells: NDArray[np.uint16]) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """Measure area and centroid (x, y) by label; entry 0 is a filler with area 0."""
    ys, xs = np.nonzero(cells)
    label = cells[ys, xs].astype(np.intp)
    area = np.bincount(label, minlength=1)
    n = np.maximum(area, 1)
    return area, np.bincount(label, xs, len(area)) / n, np.bincount(label, ys, len(area)) / n


def _relabel(labels: NDArray[np.int32], keep: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """Renumber kept labels 1..k by the raster order of their first pixel."""
    flat = labels.ravel()
    at = np.flatnonzero(flat)
    first = np.full(len(keep), flat.size, np.intp)
    # Assigned from the end, so that the first pixel has the last word.
    first[flat[at[::-1]]] = at[::-1]
    order = np.argsort(first, kind="stable")
    order = order[keep[order] & (first[order] < flat.size)]
    if len(order) > np.iinfo(np.uint16).max:
        raise LeukoflowError(
            f"{len(order)} cells in one tile, at most {np.iinfo(np.uint16).max}: cut it into smaller tiles"
        )
    names = np.zeros(len(keep), np.uint16)
    names[order] = np.arange(1, len(order) + 1)
    return names[labels]
