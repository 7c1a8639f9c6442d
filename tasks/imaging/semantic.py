"""Classify pixels as background, cytoplasm or nucleus: classically, and by cleaning what the network says."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from leukoflow.core.method import SegmentSettings
from leukoflow.tasks.imaging.stain import optical_density, white_signal
from leukoflow.tasks.imaging.watershed import drop_small, fill_holes, split_touching

BACKGROUND, CYTOPLASM, NUCLEUS = 0, 1, 2
"""Classes of pixels."""

RED_BELOW = 224  # grey value midway between background and red cells of a normalised field
MIN_RED_RADIUS_PX = 3.0
MIN_RED_PX, MAX_RED_PX = 10.0, 90.0  # diameters outside of these are no measurement
SPECK_SHARE = 0.05  # of a red cell's area: smaller spots and gaps of nuclei are noise
WHITE_SHARE = 0.6  # of a red cell's area: nothing smaller is a white cell

CELL_DENSITY = 0.08  # of the signal, in natural units of optical density
CORE_DENSITY = 0.17  # of the upper quartile; pale smudges and rims of red cells stay below
NUCLEUS_STEP = 0.35  # share of the nucleus' green density by which cytoplasm must be lighter
NUCLEUS_SHARE = 0.12  # darker specks than that share of the cell are no nucleus
MIN_COMPONENT_PX = 80


def pseudo_semantic(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Segment white cells classically: uint8 [H, W], 0 background, 1 cytoplasm, 2 nucleus.

    Optical density relative to the field's own background separates the stains: white cells absorb green, hardly blue,
    and less red than green; red cells absorb red (bluish ones) or blue (pinkish ones) nearly as much as green. So
    green - 0.6 red - blue is near zero for background and red cells of every stain seen, and positive for white cells.
    Inside a cell, Otsu's threshold on green density parts nucleus from cytoplasm where the two differ; a cell without
    such a step, as a blast of high nucleus-to-cytoplasm ratio, is nucleus throughout.

    Args:
        rgb: uint8 [H, W, 3] at the model's scale, before stain normalisation.
    """
    red, green, blue = optical_density(cv2.GaussianBlur(rgb, (0, 0), 1.0))
    signal = white_signal(red, green, blue)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    opened = cv2.morphologyEx(np.asarray(signal > CELL_DENSITY, np.uint8), cv2.MORPH_OPEN, kernel)
    cell = fill_holes(opened)
    cells = split_touching(cell, SegmentSettings().peak_distance_px)
    core = cv2.erode(cell, kernel) > 0
    out = np.zeros(cell.shape, np.uint8)
    for i, at in enumerate(ndimage.find_objects(cells), start=1):
        if at is None:
            continue
        inside = cells[at] == i
        # Rims of red cells pass the threshold barely; white cells far exceed it somewhere.
        if inside.sum() < MIN_COMPONENT_PX or np.percentile(signal[at][inside], 75) < CORE_DENSITY:
            continue
        out[at][inside] = CYTOPLASM
        out[at][_nucleus(green[at], inside, core[at])] = NUCLEUS
    return out


def red_cell_px(rgb: NDArray[np.uint8], semantic: NDArray[np.uint8]) -> float | None:
    """Measure the diameter of red cells in pixels, None where there are none: a ruler that every smear carries.

    In a clump the distance transform still peaks at each cell's radius. Peaks are weighted by area, so that debris
    counts little.

    Args:
        rgb: uint8 [H, W, 3], normalised, so that background and red cells have known lightness.
        semantic: uint8 [H, W]; white cells are left out.
    """
    grey = np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), np.uint8)
    white = cv2.dilate(np.asarray(semantic > BACKGROUND, np.uint8), _disc(2)) > 0
    red = cv2.morphologyEx(np.asarray((grey < RED_BELOW) & ~white, np.uint8), cv2.MORPH_OPEN, _disc(1))
    depth = cv2.distanceTransform(fill_holes(red), cv2.DIST_L2, 5)
    depth = np.asarray(cv2.GaussianBlur(depth, (0, 0), 1.0))
    radii = np.sort(depth[(depth >= cv2.dilate(depth, _disc(4))) & (depth > MIN_RED_RADIUS_PX)])
    if not radii.size:
        return None
    weight = np.cumsum(radii.astype(np.float64) ** 2)
    return 2 * float(radii[np.searchsorted(weight, weight[-1] / 2)])


def clean_semantic(rgb: NDArray[np.uint8], semantic: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
    """Fill holes and take out specks, both as the field's own red cells measure them.

    Args:
        rgb: uint8 [H, W, 3], normalised.
        semantic: uint8 [H, W], as the network gives it.

    Returns:
        uint8 [H, W], and the smallest area in pixels that a white cell may have: they are no smaller than red cells.
        Where no red cell is seen, half the diameter of the largest white one stands in for theirs.
    """
    cell = np.asarray(semantic > BACKGROUND, np.uint8)
    diameter = red_cell_px(rgb, semantic)
    if diameter is None:
        areas = cv2.connectedComponentsWithStats(cell)[2][1:, cv2.CC_STAT_AREA]
        diameter = float(np.sqrt(areas.max() / np.pi)) if areas.size else MIN_RED_PX
    red_area = np.pi / 4 * min(max(diameter, MIN_RED_PX), MAX_RED_PX) ** 2
    cell = fill_holes(cell)
    speck = max(1, int(SPECK_SHARE * red_area))
    nucleus = drop_small(np.asarray(semantic == NUCLEUS, np.uint8), speck)
    gaps = (1 - nucleus).astype(np.uint8)
    nucleus[(gaps > 0) & (drop_small(gaps, speck) == 0) & (cell > 0)] = 1
    out = np.where(nucleus > 0, np.uint8(NUCLEUS), cell)
    return out, WHITE_SHARE * red_area


def _nucleus(green: NDArray[np.float32], inside: NDArray[np.bool_], core: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Find the nuclear pixels of one cell by Otsu (1979) on its green density; all of it where there is no clear step.

    The step is looked for in the core, off the cell's outline, whose blur passes through all densities.
    """
    values = np.asarray(np.clip(green * 150, 0, 255), np.uint8)
    own = values[inside & core]
    if own.size == 0:
        return inside
    cut, _ = cv2.threshold(own.reshape(-1, 1), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    dark = own > cut
    if not NUCLEUS_SHARE < dark.mean() < 1.0 or own[~dark].mean() > (1 - NUCLEUS_STEP) * own[dark].mean():
        return inside
    return np.asarray(inside & (values > cut), np.bool_)


def _disc(radius: int) -> cv2.typing.MatLike:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
