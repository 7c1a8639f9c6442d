"""Measure and crop single cells: the table of a tile, its areas in square micrometres, windows around cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from leukoflow.core.errors import LeukoflowError
from leukoflow.tasks.imaging.semantic import NUCLEUS


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


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of t tiles.

    `labels` uint16 [t, S, S] holds the `cell_id`, 0 for background; it goes on over the tiles of one image. `table` has
    their m rows grouped by tile; `offsets` int64 [t + 1]: tile i has the rows offsets[i] to offsets[i + 1].
    """

    labels: NDArray[np.uint16]
    table: CellTable
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of cells."""
        return len(self.table)

    @property
    def area(self) -> NDArray[np.float32]:
        """Area of each cell in model pixels, float32 [m]."""
        return self.table.cell_area_px.astype(np.float32)

    @property
    def centers(self) -> NDArray[np.float32]:
        """Centroid (x, y) of each cell in its tile's pixels, float32 [m, 2]."""
        return np.stack([self.table.field_x, self.table.field_y], axis=1).astype(np.float32)

    def rows(self, tile: int) -> slice:
        """Return the rows of one tile's cells."""
        return slice(int(self.offsets[tile]), int(self.offsets[tile + 1]))


def concatenate(tables: Sequence[CellTable]) -> CellTable:
    """Join tables, rows in the order given; no tables give an empty table."""
    parts = tables or [
        cell_table(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint16), np.eye(2, 3, dtype=np.float32))
    ]
    return CellTable(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(CellTable)))


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
    """Convert areas to square micrometres, float32 [m]; NaN where the scale is not known.

    Args:
        area_px: [m], areas in pixels of the masks.
        to_source: float32 [m, 2, 3], from a pixel of the cell's mask to the source pixel; axis-parallel.
        um_per_px: float64 [m], micrometres per source pixel, NaN where unknown.
    """
    source_px = np.abs(to_source[:, 0, 0].astype(np.float64) * to_source[:, 1, 1].astype(np.float64))
    out: NDArray[np.float32] = (area_px * source_px * um_per_px**2).astype(np.float32)
    return out


def crop_cells(rgb: NDArray[np.uint8], centers: NDArray[np.float32], window_px: int, out_px: int) -> NDArray[np.uint8]:
    """Cut windows around cells, resampled to one size; beyond the border the image is mirrored.

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
    """Mark where in its window each cell lies, beside `crop_cells`: uint8 [m, out_px, out_px], 255 inside, 0 outside.

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
    """Resample one square window around `centre` (x, y) into `out`."""
    side = out.shape[0]
    step = window_px / side
    # Output pixel centre to image pixel centre; WARP_INVERSE_MAP takes the map in this direction.
    start = 0.5 * step - 0.5 - (window_px - 1) / 2
    inverse = np.array([[step, 0, centre[0] + start], [0, step, centre[1] + start]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(image, inverse, (side, side), dst=out, flags=flags, borderMode=border)
