"""Layers of a field, drawn from arrays at the model's scale.

Outlines are vectors, so that they stay sharp when zoomed; what covers an area (an activation map) is a transparent PNG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leukoflow.apps.web.words import Cell
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.report.overlay import outline
from leukoflow.tasks.report.palette import AGAINST, FOR, attention_colour

NUCLEUS, CYTOPLASM = "#35d6ff", "#ffd23e"  # visible on violet nuclei and on the pale background
_STRONGEST = 217  # opacity of the strongest place of an activation map: the cell must be seen through it


class Tile(Protocol):
    """The part of `tasks.inference.single.TileView` that is drawn, from the bench or from a run."""

    @property
    def original(self) -> NDArray[np.uint8]: ...  # noqa: D102
    @property
    def normalized(self) -> NDArray[np.uint8]: ...  # noqa: D102
    @property
    def semantic(self) -> NDArray[np.uint8]: ...  # noqa: D102
    @property
    def cells(self) -> NDArray[np.uint16]: ...  # noqa: D102
    @property
    def to_source(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def cell_ids(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def field_x(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def field_y(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def maps(self) -> NDArray[np.float16]: ...  # noqa: D102
    @property
    def window_px(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Shape:
    """A cell's outline: an SVG path in the tile's pixels, and the colour of its attention."""

    cell: Cell
    path: str
    colour: str


def webp(rgb: NDArray[np.uint8]) -> bytes:
    """Encode uint8 [H, W, 3] as lossless WebP."""
    sink = BytesIO()
    Image.fromarray(rgb).save(sink, "WEBP", lossless=True, method=1)
    return sink.getvalue()


def thumbnail(rgb: NDArray[np.uint8], side: int = 264) -> bytes:
    """Encode uint8 [H, W, 3] as a small, lossy WebP for lists."""
    image = Image.fromarray(rgb)
    image.thumbnail((side, side))
    sink = BytesIO()
    image.save(sink, "WEBP", quality=82, method=2)
    return sink.getvalue()


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode uint8 [H, W, 3] or [H, W, 4] as PNG."""
    sink = BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", compress_level=4)
    return sink.getvalue()


def nucleus_path(tile: Tile) -> str:
    """Return the outlines of all nuclei, as an SVG path."""
    return outline(tile.semantic == 2, holes=True)


def cytoplasm_path(tile: Tile) -> str:
    """Return the outlines of all cell bodies, nucleus and cytoplasm together, as an SVG path."""
    return outline(tile.semantic > 0, holes=True)


def shapes(tile: Tile, cells: Sequence[Cell]) -> tuple[Shape, ...]:
    """Return the outlines of the tile's cells, lowest attention first, so that the highest is drawn on top."""
    known = {c.cell_id: c for c in cells}
    drawn = []
    for cell_id in np.unique(tile.cells):
        cell = known.get(int(cell_id))
        if cell is not None:
            drawn.append(Shape(cell, outline(tile.cells == cell_id), attention_colour(cell.weight)))
    return tuple(sorted(drawn, key=lambda s: -s.cell.rank))


def has_maps(tile: Tile) -> bool:
    """Return whether there are activation maps to draw."""
    return tile.maps.size > 0 and tile.maps.shape[0] == tile.cell_ids.shape[0]


def activation(tile: Tile, label: str, attention: Mapping[int, float]) -> NDArray[np.float64]:
    """Return what each pixel adds to the logit of a class: maps of all cells times attention. float64 [H, W]."""
    height, width = tile.cells.shape
    total = np.zeros((height, width), np.float64)
    k = CLASSES.index(label)
    for row, cell_id in enumerate(tile.cell_ids):
        values = np.nan_to_num(tile.maps[row, k].astype(np.float64)) * attention.get(int(cell_id), 0.0)
        side, grid = float(tile.window_px), values.shape[0]
        # Map pixel centres of the tile to places of the grid; both count from the middle of their first square.
        scale = side / grid
        left = float(tile.field_x[row]) - side / 2 + scale / 2
        upper = float(tile.field_y[row]) - side / 2 + scale / 2
        x0, y0 = max(0, math.floor(left - scale)), max(0, math.floor(upper - scale))
        x1, y1 = min(width, math.ceil(left + side)), min(height, math.ceil(upper + side))
        if x0 >= x1 or y0 >= y1:
            continue
        affine = np.asarray([[scale, 0, left - x0], [0, scale, upper - y0]], np.float64)
        total[y0:y1, x0:x1] += cv2.warpAffine(values, affine, (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR)
    return total


def activation_png(tile: Tile, label: str, attention: Mapping[int, float]) -> bytes:
    """Return the activation map of a class as a transparent PNG: yellow speaks for it, blue against it.

    Its strength is relative to the tile's strongest place over all classes, so that classes can be compared.
    """
    maps = {name: activation(tile, name, attention) for name in CLASSES}
    top = max(float(np.abs(m).max(initial=0.0)) for m in maps.values()) or 1.0
    values = maps[label] / top
    colours = np.asarray([rgb_of(AGAINST), rgb_of(FOR)], np.uint8)
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = colours[(values > 0).astype(np.intp)]
    pixels[..., 3] = np.round(np.abs(values) * _STRONGEST)
    return png(pixels)


def rgb_of(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue (0 to 255) of `#rrggbb`."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def crop(rgb: NDArray[np.uint8], box: tuple[float, float, float, float]) -> NDArray[np.uint8]:
    """Return the part of a picture within a box, uint8 [h, w, 3]; edge pixels are repeated beyond the edge."""
    x0, y0, x1, y1 = (round(v) for v in box)
    pad = max(0, -x0, -y0, x1 - rgb.shape[1], y1 - rgb.shape[0])
    big = np.pad(rgb, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    return np.ascontiguousarray(big[y0 + pad : y1 + pad, x0 + pad : x1 + pad])
