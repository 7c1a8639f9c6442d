"""Measure red cells, the ruler that every smear brings along: a discocyte is about 7.2 µm wide wherever it is stained.

Only what looks like one red cell counts. Inscribed circles of what is stained, with the pale centres filled, are
candidates, so that cells that touch others or are cut by the image's edge count too as long as their centre and most of
their outline are seen. From each centre rays run to the outline; a candidate of which too few rays end at background,
or at very different distances, is no single round cell. Nuclei of white cells absorb green far more than blue, which
haemoglobin does not; platelets are too small to weigh.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from leukoflow.tasks.imaging.stain import optical_density

RED_CELL_UM = 7.2
"""Mean diameter of red cells in dried smears of healthy people, in micrometres; from 6.7 to 7.7 (Price-Jones 1933)."""

MAX_SIDE = 2048
"""Pixels of a larger image's middle that are looked at: there are red cells enough in them."""

_RAYS, _STEPS = 32, np.linspace(0.5, 1.6, 23, dtype=np.float32)
_ANGLES = np.arange(_RAYS, dtype=np.float32) * np.float32(2 * np.pi / _RAYS)
_X, _Y = np.cos(_ANGLES), np.sin(_ANGLES)
_MAX_DENSITY = 2.5
_RED_CELL_DENSITY = 1.5  # summed over the channels; what is denser counts as this, so that nuclei do not set the level
_FILLED = 9.0  # density that no pixel has
_BEYOND = -5.0  # what a ray reads beyond the image
_CANDIDATES = 600  # more would tell little more; those in the middle are taken, whatever their size
_MIN_RADIUS_PX = 3.0
_MIN_SUPPORT, _MIN_VISIBLE, _MAX_SPREAD, _MAX_NUCLEAR = 0.6, 0.55, 0.10, 0.30


def measure_red_cells(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Measure the diameters of single, round red cells.

    Args:
        rgb: uint8 [H, W, 3] at any scale; of a larger image than `MAX_SIDE` its middle is looked at.

    Returns:
        Diameters of circles of the same area in pixels, float32 [n], in no particular order; n is 0 where none is seen.
    """
    rgb = _middle(rgb)
    red, green, blue = _densities(rgb)
    total = red + green + blue
    stained, level = _stained(total)
    filled = _fill_pale_centres(stained, total)
    x, y, radius = _inscribed_circles(stained)
    if not len(x):
        return np.zeros(0, np.float32)
    length, seen, beyond = _outline(filled, level, x, y, radius)
    visible = (_RAYS - beyond.sum(1)) / _RAYS
    count = seen.sum(1)
    support = count / np.maximum(_RAYS * visible, 1)
    mean = (length * seen).sum(1) / np.maximum(count, 1)
    square = (length**2 * seen).sum(1) / np.maximum(count, 1)
    spread = np.sqrt(np.maximum(square - mean**2, 0)) / np.maximum(mean, 1e-6)
    nuclear = _inside(green - blue, x, y, radius) / np.maximum(_inside(total, x, y, radius), 1e-6)
    single = (support >= _MIN_SUPPORT) & (visible >= _MIN_VISIBLE) & (spread <= _MAX_SPREAD) & (nuclear < _MAX_NUCLEAR)
    found: NDArray[np.float32] = (2 * np.sqrt(square[single])).astype(np.float32)
    return found


def _middle(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = rgb.shape[:2]
    y, x = max(0, (height - MAX_SIDE) // 2), max(0, (width - MAX_SIDE) // 2)
    return np.ascontiguousarray(rgb[y : y + MAX_SIDE, x : x + MAX_SIDE])


def _densities(rgb: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Compute smoothed optical densities of the channels against the image's own background, each float32 [H, W]."""
    return [
        np.asarray(cv2.GaussianBlur(np.clip(plane, 0, _MAX_DENSITY), (0, 0), 1.0), np.float32)
        for plane in optical_density(rgb)
    ]


def _stained(total: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float]:
    """Tell what is stained, uint8 [H, W] of 0 and 1, and above which density (Otsu 1979)."""
    grey = cv2.convertScaleAbs(total, alpha=255 / _RED_CELL_DENSITY)
    level, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_OTSU)
    return (grey > level).astype(np.uint8), float(level) * _RED_CELL_DENSITY / 255


def _fill_pale_centres(stained: NDArray[np.uint8], total: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fill convex holes in `stained`, in place; return the densities with those holes as dense as can be.

    Gaps between touching cells are concave and stay.
    """
    height, width = stained.shape
    filled = total.copy()
    outlines, places = cv2.findContours(stained, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for outline, place in zip(outlines, [] if places is None else places[0], strict=True):
        if place[3] < 0:
            continue
        x, y, w, h = cv2.boundingRect(outline)
        area = cv2.contourArea(outline)
        inside = x > 1 and y > 1 and x + w < width - 1 and y + h < height - 1
        if area < 30 or (inside and area > 0.85 * cv2.contourArea(cv2.convexHull(outline))):
            cv2.drawContours(stained, [outline], -1, 1, -1)
            cv2.drawContours(filled, [outline], -1, _FILLED, -1)
    return filled


def _inscribed_circles(
    stained: NDArray[np.uint8],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Find the largest circles that fit into what is stained: x, y and radius in pixels, each float32 [n].

    The image's edge is no outline, so that a cell that it cuts keeps its radius while its centre is in the image.
    """
    distance = cv2.distanceTransform(stained, cv2.DIST_L2, 5)
    smooth = cv2.GaussianBlur(distance, (0, 0), 1.0)
    peaks = (smooth >= cv2.dilate(smooth, np.ones((5, 5), np.uint8))) & (distance > _MIN_RADIUS_PX)
    peaks[:2] = peaks[-2:] = False
    peaks[:, :2] = peaks[:, -2:] = False
    places = np.argwhere(peaks)
    away = ((places - np.array(stained.shape) / 2) ** 2).sum(1)
    places = places[np.argsort(away, kind="stable")[:_CANDIDATES]]
    radius = np.asarray(distance, np.float32)[places[:, 0], places[:, 1]]
    order = np.argsort(-radius, kind="stable")
    radius = radius[order]
    x, y = places[order, 1].astype(np.float32), places[order, 0].astype(np.float32)
    keep = np.ones(len(x), bool)
    for i in range(len(x)):
        if keep[i]:
            near = (x[i + 1 :] - x[i]) ** 2 + (y[i + 1 :] - y[i]) ** 2 < (0.6 * radius[i]) ** 2
            keep[i + 1 :][near] = False
    return x[keep], y[keep], radius[keep]


def _outline(
    filled: NDArray[np.float32],
    level: float,
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    radius: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Follow rays from each centre to where the density falls below `level`.

    Returns:
        Lengths in pixels, float32 [n, rays]; whether a ray ends at background near the inscribed circle, and whether it
        leaves the image before that, bool [n, rays].
    """
    n, steps = len(x), len(_STEPS)
    reach = radius[:, None, None] * _STEPS
    rays_x = (x[:, None, None] + reach * _X[None, :, None]).reshape(n * _RAYS, steps)
    rays_y = (y[:, None, None] + reach * _Y[None, :, None]).reshape(n * _RAYS, steps)
    read = cv2.remap(
        filled, rays_x, rays_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=(_BEYOND,) * 4
    ).reshape(n, _RAYS, steps)
    low = read <= level
    first, ends = low.argmax(-1), low.any(-1)
    last = np.take_along_axis(read, first[..., None], -1)[..., 0]
    before = np.minimum(np.take_along_axis(read, np.maximum(first - 1, 0)[..., None], -1)[..., 0], _MAX_DENSITY)
    beyond = ends & (last < -0.5)
    between = np.where(first > 0, (before - level) / np.maximum(before - last, 1e-6), 1.0)
    step = _STEPS[1] - _STEPS[0]
    length = radius[:, None] * (_STEPS[first] - step * (1 - np.clip(between, 0, 1)))
    return length.astype(np.float32), ends & ~beyond & (length < 1.45 * radius[:, None]), beyond


def _inside(
    plane: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.float32], radius: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Average a plane over points inside each circle, float32 [n]."""
    reach = radius[:, None, None] * np.array([0.2, 0.45, 0.7], np.float32)
    points_x = (x[:, None, None] + reach * _X[None, ::4, None]).reshape(len(x), -1)
    points_y = (y[:, None, None] + reach * _Y[None, ::4, None]).reshape(len(y), -1)
    found: NDArray[np.float32] = cv2.remap(
        plane, points_x, points_y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE
    ).mean(1)
    return found
