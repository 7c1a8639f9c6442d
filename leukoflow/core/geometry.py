"""From an image of any size to the model's field: scale, tiles, and the way back to source pixels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the disposable decoding process uses this module, and starts faster without pydantic
    from leukoflow.core.method import SegmentSettings

MAX_ENLARGEMENT = 8.0
MIN_UM_PER_PX, MAX_UM_PER_PX = 0.01, 100.0
"""The widest range in which cells are seen; 420 would be nanometres, 4.2e-7 metres."""
SAME_SIZE = 1.1
"""A picture whose longer side is within this factor of the training fields' is of their size."""


@dataclass(frozen=True, slots=True)
class FieldGeometry:
    """The way in which one source image becomes tiles of `field_px`.

    The image is resized to `width` x `height` (model pixels), then cut at `origins` (x, y of each tile's top left
    corner, row by row). A tile that reaches beyond the image is padded; a cell belongs to the tile whose `core`
    (x0, y0, x1, y1 in the scaled image; half open) holds its centroid, so no cell is counted twice or lost at a seam.
    """

    source_width: int
    source_height: int
    width: int
    height: int
    origins: tuple[tuple[int, int], ...]
    cores: tuple[tuple[int, int, int, int], ...]

    def to_source(self) -> NDArray[np.float32]:
        """Compute affine maps float32 [n, 2, 3] from a tile's pixel centre (x, y) to the image's pixel (x, y)."""
        sx, sy = self.source_width / self.width, self.source_height / self.height
        out = np.zeros((len(self.origins), 2, 3), np.float32)
        for i, (x, y) in enumerate(self.origins):
            out[i] = [[sx, 0, (x + 0.5) * sx - 0.5], [0, sy, (y + 0.5) * sy - 0.5]]
        return out


def scale_of(width: int, height: int, um_per_px: float | None, settings: SegmentSettings) -> float:
    """Factor from source to model pixels.

    With a known scale the image is brought to the training fields' micrometres per pixel. Without one, an image whose
    longer side is at most `assumed_field_px` is taken to be one microscope field and scaled to fit; a larger one is
    taken to be a mosaic sampled like a field of `assumed_field_px`.
    """
    if um_per_px is not None and um_per_px > 0:
        return min(um_per_px / settings.um_per_px, MAX_ENLARGEMENT)
    return min(settings.field_px / min(max(width, height), settings.assumed_field_px), MAX_ENLARGEMENT)


def scale_is_guessed(width: int, height: int, um_per_px: float | None, settings: SegmentSettings) -> bool:
    """Tell whether the size of the cells in an image of `width` x `height` pixels is no more than an assumption.

    So it is without micrometres per pixel, unless the picture is of the training fields' own size.
    """
    if um_per_px is not None and um_per_px > 0:
        return False
    ratio = max(width, height) / settings.field_px
    return not 1 / SAME_SIZE <= ratio <= SAME_SIZE


def field_geometry(width: int, height: int, um_per_px: float | None, settings: SegmentSettings) -> FieldGeometry:
    """Compute the geometry of a source image of `width` x `height` pixels."""
    scale = scale_of(width, height, um_per_px, settings)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    xs, ys = _cuts(w, settings), _cuts(h, settings)
    return FieldGeometry(
        width,
        height,
        w,
        h,
        tuple((x, y) for y, _, _ in ys for x, _, _ in xs),
        tuple((x0, y0, x1, y1) for _, y0, y1 in ys for _, x0, x1 in xs),
    )


def _cuts(length: int, settings: SegmentSettings) -> list[tuple[int, int, int]]:
    """Return tile starts along one axis with the core interval of each: (start, core start, core end)."""
    side, overlap = settings.field_px, settings.tile_overlap_px
    if length <= side:
        return [(0, 0, length)]
    n = 1 + -(-(length - side) // (side - overlap))
    starts = [round(i * (length - side) / (n - 1)) for i in range(n)]
    seams = [0] + [(a + side + b) // 2 for a, b in pairwise(starts)] + [length]
    return [(s, seams[i], seams[i + 1]) for i, s in enumerate(starts)]
