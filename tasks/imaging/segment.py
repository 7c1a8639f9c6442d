"""From classes of pixels to single cells: classical segmentation, watershed, the cell table and crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

from leukoflow.core.errors import LeukoflowError
from leukoflow.core.method import SegmentSettings

BACKGROUND, CYTOPLASM, NUCLEUS = 0, 1, 2

RED_BELOW = 224  # grey value midway between background and red cells of a normalised field
MIN_RED_RADIUS_PX = 3.0
MIN_RED_PX, MAX_RED_PX = 10.0, 90.0  # diameters outside of these are no measurement
SPECK_SHARE = 0.05  # of a red cell's area: smaller spots and gaps of nuclei are noise
LARGEST_SHARE = 0.5  # of the largest white component's area, where no component is as large as a red cell
WHITE_SHARE = 0.6  # of a red cell's area: nothing smaller is a white cell

RED_WEIGHT = 0.6  # see pseudo_semantic
CELL_DENSITY = 0.08  # of the signal, in natural units of optical density
CORE_DENSITY = 0.17  # of the upper quartile; pale smudges and rims of red cells stay below
NUCLEUS_STEP = 0.35  # share of the nucleus' green density by which cytoplasm must be lighter
NUCLEUS_SHARE = 0.12  # darker specks than that share of the cell are no nucleus
MIN_COMPONENT_PX = 80
WAIST = 0.87  # two basins are two cells where their waist is below this share of the shallower one's depth


@dataclass(frozen=True, slots=True)
class CellTable:
    """One row per cell; arrays of equal length m.

    Bounding boxes are half open (xmin, ymin inclusive; xmax, ymax exclusive) and, like the centroids, in source pixels;
    `field_x`, `field_y` are the centroid in the tile's pixels; areas are in model pixels.
    """

    cell_id: NDArray[np.int32]
    bbox_xmin_px: NDArray[np.float32]
    bbox_ymin_px: NDArray[np.float32]
    bbox_xmax_px: NDArray[np.float32]
    bbox_ymax_px: NDArray[np.float32]
    centroid_x_px: NDArray[np.float32]
    centroid_y_px: NDArray[np.float32]
    field_x: NDArray[np.float32]
    field_y: NDArray[np.float32]
    nucleus_area_px: NDArray[np.int32]
    cell_area_px: NDArray[np.int32]
    nc_ratio: NDArray[np.float32]
    eccentricity: NDArray[np.float32]
    touches_border: NDArray[np.bool_]

    def __len__(self) -> int:
        """Number of cells."""
        return len(self.cell_id)


def concatenate(tables: Sequence[CellTable]) -> CellTable:
    """One table from several, rows in the order given; no tables give an empty table."""
    parts = tables or [
        cell_table(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint16), np.eye(2, 3, dtype=np.float32))
    ]
    return CellTable(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(CellTable)))


def pseudo_semantic(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Classical segmentation of white cells: uint8 [H, W], 0 background, 1 cytoplasm, 2 nucleus.

    Optical density relative to the field's own background separates the stains: white cells absorb green, hardly blue,
    and less red than green; red cells absorb red (bluish ones) or blue (pinkish ones) nearly as much as green. So
    green - 0.6 red - blue is near zero for background and red cells of every stain seen, and positive for white cells.
    Inside a cell, Otsu's threshold on green density parts nucleus from cytoplasm where the two differ; a cell without
    such a step, as a blast of high nucleus-to-cytoplasm ratio, is nucleus throughout.

    Args:
        rgb: uint8 [H, W, 3] at the model's scale, before stain normalisation.
    """
    red, green, blue = _optical_density(cv2.GaussianBlur(rgb, (0, 0), 1.0))
    signal = _white_signal(red, green, blue)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    opened = cv2.morphologyEx(np.asarray(signal > CELL_DENSITY, np.uint8), cv2.MORPH_OPEN, kernel)
    cell = np.asarray(ndimage.binary_fill_holes(opened), np.uint8)
    cells = _split(cell, SegmentSettings().peak_distance_px)
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


def white_cell_signal(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How much a pixel absorbs as white cells do, float32 [H, W]; near zero for background and red cells."""
    return _white_signal(*_optical_density(rgb))


def red_cell_px(rgb: NDArray[np.uint8], semantic: NDArray[np.uint8]) -> float | None:
    """Diameter of the field's red cells in pixels, None where there are none: a ruler that every smear carries.

    In a clump the distance transform still peaks at each cell's radius. Peaks are weighted by area, so that debris
    counts little.

    Args:
        rgb: uint8 [H, W, 3], normalised, so that background and red cells have known lightness.
        semantic: uint8 [H, W]; white cells are left out.
    """
    grey = np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), np.uint8)
    white = cv2.dilate(np.asarray(semantic > BACKGROUND, np.uint8), _disc(2)) > 0
    red = cv2.morphologyEx(np.asarray((grey < RED_BELOW) & ~white, np.uint8), cv2.MORPH_OPEN, _disc(1))
    depth = cv2.distanceTransform(np.asarray(ndimage.binary_fill_holes(red), np.uint8), cv2.DIST_L2, 5)
    depth = np.asarray(cv2.GaussianBlur(depth, (0, 0), 1.0))
    radii = np.sort(depth[(depth >= cv2.dilate(depth, _disc(4))) & (depth > MIN_RED_RADIUS_PX)])
    if not radii.size:
        return None
    weight = np.cumsum(radii.astype(np.float64) ** 2)
    return 2 * float(radii[np.searchsorted(weight, weight[-1] / 2)])


def clean_semantic(rgb: NDArray[np.uint8], semantic: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
    """Holes filled and specks taken out, both as the field's own red cells measure them.

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
    cell = np.asarray(ndimage.binary_fill_holes(cell), np.uint8)
    speck = max(1, int(SPECK_SHARE * red_area))
    nucleus = _drop_small(np.asarray(semantic == NUCLEUS, np.uint8), speck)
    gaps = (1 - nucleus).astype(np.uint8)
    nucleus[(gaps > 0) & (_drop_small(gaps, speck) == 0) & (cell > 0)] = 1
    out = np.where(nucleus > 0, np.uint8(NUCLEUS), cell)
    return out, WHITE_SHARE * red_area


def watershed_cells(
    semantic: NDArray[np.uint8], settings: SegmentSettings, smallest_px: float = 0.0
) -> NDArray[np.uint16]:
    """Single cells from classes of pixels: watershed (Beucher and Lantuejoul 1979) on the distance transform.

    Two touching cells are told apart by their waist, relative to their size, so lobes and scale matter little.

    Args:
        semantic: uint8 [H, W]; 0 background, 1 cytoplasm, 2 nucleus.
        settings: smallest areas and the distance between two peaks, in model pixels.
        smallest_px: area below which a component is no white cell, where that is more than the settings'.

    Returns:
        uint16 [H, W]: 0 background, cells 1..k in raster order of their first pixel.
    """
    cell = np.asarray(semantic > BACKGROUND, np.uint8)
    nucleus = np.asarray(semantic == NUCLEUS, np.uint8)
    nucleus = _drop_small(nucleus, settings.min_nucleus_area_px)
    if not nucleus.any():
        return np.zeros(semantic.shape, np.uint16)
    flooded = _split(cell, settings.peak_distance_px)
    areas = np.bincount(flooded.ravel())
    nuclei = np.bincount(flooded[nucleus > 0], minlength=len(areas))
    keep = (areas >= max(settings.min_cell_area_px, smallest_px)) & (nuclei >= settings.min_nucleus_area_px)
    if not settings.touching_border:
        keep[_edge_labels(flooded)] = False
    return _relabel(flooded, keep)


def own_cells(
    cells: NDArray[np.uint16], origin: tuple[int, int], core: tuple[int, int, int, int]
) -> NDArray[np.uint16]:
    """Cells whose centroid lies in the tile's core (half open); the others belong to a neighbouring tile.

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


def cell_table(
    semantic: NDArray[np.uint8], cells: NDArray[np.uint16], to_source: NDArray[np.float32], first_id: int = 1
) -> CellTable:
    """Measure every cell of a tile.

    Args:
        semantic: uint8 [H, W].
        cells: uint16 [H, W], labels 1..k without gaps.
        to_source: float32 [2, 3], from a tile pixel's centre (x, y) to the source pixel; axis-parallel.
        first_id: `cell_id` of label 1, so that ids are unique across an image's tiles.

    Returns:
        The table, row i for label i + 1.
    """
    if semantic.shape != cells.shape:
        raise LeukoflowError(f"semantic {semantic.shape} and cells {cells.shape} differ: pass both of the same tile")
    height, width = cells.shape
    ys, xs = np.nonzero(cells)
    label = cells[ys, xs].astype(np.intp) - 1
    k = int(label.max()) + 1 if label.size else 0
    area = np.bincount(label, minlength=k)
    n = np.maximum(area, 1).astype(np.float64)
    cx, cy = np.bincount(label, xs, k) / n, np.bincount(label, ys, k) / n
    dx, dy = xs - cx[label], ys - cy[label]
    # Second central moments; 1/12 is that of a pixel's own square.
    mxx = np.bincount(label, dx * dx, k) / n + 1 / 12
    myy = np.bincount(label, dy * dy, k) / n + 1 / 12
    mxy = np.bincount(label, dx * dy, k) / n
    spread = np.sqrt((mxx - myy) ** 2 + 4 * mxy**2)
    major, minor = (mxx + myy + spread) / 2, (mxx + myy - spread) / 2
    eccentricity = np.sqrt(np.clip(1 - minor / np.maximum(major, 1e-12), 0, 1))
    nucleus = np.bincount(label[semantic[ys, xs] == NUCLEUS], minlength=k)
    x0, y0 = np.full(k, width), np.full(k, height)
    x1, y1 = np.zeros(k, np.intp), np.zeros(k, np.intp)
    np.minimum.at(x0, label, xs)
    np.minimum.at(y0, label, ys)
    np.maximum.at(x1, label, xs + 1)
    np.maximum.at(y1, label, ys + 1)
    (sx, _, tx), (_, sy, ty) = to_source.astype(np.float64)
    return CellTable(
        cell_id=np.arange(first_id, first_id + k, dtype=np.int32),
        # Edges of pixels, hence the half pixels: the map is between centres.
        bbox_xmin_px=((x0 - 0.5) * sx + tx + 0.5).astype(np.float32),
        bbox_ymin_px=((y0 - 0.5) * sy + ty + 0.5).astype(np.float32),
        bbox_xmax_px=((x1 - 0.5) * sx + tx + 0.5).astype(np.float32),
        bbox_ymax_px=((y1 - 0.5) * sy + ty + 0.5).astype(np.float32),
        centroid_x_px=(cx * sx + tx).astype(np.float32),
        centroid_y_px=(cy * sy + ty).astype(np.float32),
        field_x=cx.astype(np.float32),
        field_y=cy.astype(np.float32),
        nucleus_area_px=nucleus.astype(np.int32),
        cell_area_px=area.astype(np.int32),
        nc_ratio=(nucleus / n).astype(np.float32),
        eccentricity=eccentricity.astype(np.float32),
        touches_border=np.asarray((x0 == 0) | (y0 == 0) | (x1 == width) | (y1 == height), np.bool_),
    )


def square_micrometres(
    area_px: NDArray[Any], to_source: NDArray[np.float32], um_per_px: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Areas in square micrometres, float32 [m]; NaN where the scale is not known.

    Args:
        area_px: [m], areas in pixels of the masks.
        to_source: float32 [m, 2, 3], from a pixel of the cell's mask to the source pixel; axis-parallel.
        um_per_px: float64 [m], micrometres per source pixel, NaN where unknown.
    """
    source_px = np.abs(to_source[:, 0, 0].astype(np.float64) * to_source[:, 1, 1].astype(np.float64))
    out: NDArray[np.float32] = (area_px * source_px * um_per_px**2).astype(np.float32)
    return out


def crop_cells(rgb: NDArray[np.uint8], centers: NDArray[np.float32], window_px: int, out_px: int) -> NDArray[np.uint8]:
    """Windows around cells, resampled to one size; beyond the border the image is mirrored.

    Args:
        rgb: uint8 [H, W, 3].
        centers: float32 [m, 2], (x, y) of pixel centres.
        window_px: side of the window in the image's pixels.
        out_px: side of a crop.

    Returns:
        uint8 [m, out_px, out_px, 3].
    """
    out = np.empty((len(centers), out_px, out_px, 3), np.uint8)
    for i, centre in enumerate(np.asarray(centers, np.float64)):
        _window(rgb, centre, window_px, out[i], cv2.BORDER_REFLECT_101)
    return out


def crop_masks(
    cells: NDArray[np.uint16],
    labels: NDArray[np.int32],
    centers: NDArray[np.float32],
    window_px: int,
    out_px: int,
) -> NDArray[np.uint8]:
    """Where in its window each cell lies, beside `crop_cells`: uint8 [m, out_px, out_px], 255 inside, 0 outside.

    Args:
        cells: uint16 [H, W].
        labels: int32 [m], the cells' values in `cells`.
        centers: float32 [m, 2], as for `crop_cells`.
        window_px: side of the window in the image's pixels.
        out_px: side of a crop.
    """
    out = np.empty((len(centers), out_px, out_px), np.uint8)
    for i, (label, centre) in enumerate(zip(labels, np.asarray(centers, np.float64), strict=True)):
        own = np.asarray(cells == label, np.uint8) * 255
        _window(own, centre, window_px, out[i], cv2.BORDER_CONSTANT)
    return out


def _window(
    image: NDArray[np.uint8], centre: NDArray[np.float64], window_px: int, out: NDArray[np.uint8], border: int
) -> None:
    """One square window around `centre` (x, y), resampled into `out`."""
    side = out.shape[0]
    step = window_px / side
    # Output pixel centre to image pixel centre; WARP_INVERSE_MAP takes the map in this direction.
    start = 0.5 * step - 0.5 - (window_px - 1) / 2
    inverse = np.array([[step, 0, centre[0] + start], [0, step, centre[1] + start]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(image, inverse, (side, side), dst=out, flags=flags, borderMode=border)


def _disc(radius: int) -> cv2.typing.MatLike:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def _white_signal(
    red: NDArray[np.float32], green: NDArray[np.float32], blue: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Green density less what red cells would add to it, see `pseudo_semantic`."""
    out: NDArray[np.float32] = green - RED_WEIGHT * red - np.maximum(blue, -0.05)
    return out


def _optical_density(
    rgb: NDArray[np.uint8] | cv2.typing.MatLike,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Three planes float32 [H, W]: natural log of background over pixel, the background being the 90th percentile."""
    levels = np.arange(256, dtype=np.float64) + 1
    planes = []
    for plane in cv2.split(rgb):
        white = np.percentile(plane[::2, ::2], 90) + 1
        planes.append(np.log(white / levels).astype(np.float32)[plane])
    return planes[0], planes[1], planes[2]


def _nucleus(green: NDArray[np.float32], inside: NDArray[np.bool_], core: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Nuclear pixels of one cell by Otsu (1979) on its green density; all of it where there is no clear step.

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


def _split(cell: NDArray[np.uint8], peak_distance_px: int) -> NDArray[np.int32]:
    """Touching cells apart: int32 [H, W], basins of the distance transform; those without a waist are merged."""
    # Distances are to background pixels only, so a cell that the field's edge cuts is deepest at the edge.
    depth = cv2.distanceTransform(cell, cv2.DIST_L2, 5)
    depth = cv2.GaussianBlur(depth, (0, 0), 1.0)
    side = 2 * peak_distance_px + 1
    highest = cv2.dilate(depth, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))
    peaks = np.asarray((depth >= highest) & (cell > 0), np.uint8)
    markers = cv2.connectedComponents(peaks, connectivity=8)[1]
    flooded = np.asarray(watershed(-depth, markers, mask=cell > 0), np.int32)  # type: ignore[no-untyped-call]
    return _merge_shallow(flooded, np.asarray(depth, np.float32))[flooded]


def single_cells(
    rgb: NDArray[np.uint8], semantic: NDArray[np.uint8], settings: SegmentSettings
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Cleaned classes and the single cells in them; what is no cell is background in both.

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


def _merge_shallow(labels: NDArray[np.int32], depth: NDArray[np.float32]) -> NDArray[np.int32]:
    """Table from basin to cell: neighbours whose waist is nearly as deep as the shallower of them are one cell."""
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


def _drop_small(mask: NDArray[np.uint8] | cv2.typing.MatLike, smallest: int) -> NDArray[np.uint8]:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= smallest
    keep[0] = False
    return np.asarray(keep[labels], np.uint8)


def _edge_labels(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))


def _centroids(cells: NDArray[np.uint16]) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """Area and centroid (x, y) by label; entry 0 is a filler with area 0."""
    ys, xs = np.nonzero(cells)
    label = cells[ys, xs].astype(np.intp)
    area = np.bincount(label, minlength=1)
    n = np.maximum(area, 1)
    return area, np.bincount(label, xs, len(area)) / n, np.bincount(label, ys, len(area)) / n


def _relabel(labels: NDArray[np.int32], keep: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """Kept labels renumbered 1..k by the raster order of their first pixel."""
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
