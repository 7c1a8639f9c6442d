"""Scenes: a tile with its outlines and cells, prepared for templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from leukoflow.apps.web.drawing import layers
from leukoflow.apps.web.drawing.layers import Shape, Tile
from leukoflow.apps.web.drawing.view_cache import field_of
from leukoflow.apps.web.words import Cell
from leukoflow.core.counts import count_of
from leukoflow.runs.records import ScaleSource, Status
from leukoflow.tasks.imaging import cytoplasm
from leukoflow.tasks.inference.single import Examination
from leukoflow.tasks.report import numbers
from leukoflow.tasks.review.field_view import FieldView
from leukoflow.tasks.review.table import RunTable

_WINDOW = 64.0  # pixels of the tile around a cell, where no activation map says what the model sees


@dataclass(frozen=True, slots=True)
class Scene:
    """A tile with its outlines and cells. Paths and boxes are in the tile's pixels."""

    pictures: str  # address below which its pictures are
    view: str  # address of this fragment
    tile: int
    tiles: int
    width: int
    height: int
    label: str | None
    maps: bool
    gone: str  # why the pixels cannot be shown; empty where they can
    remarks: tuple[str, ...]
    nucleus: str
    cytoplasm: str
    shapes: tuple[Shape, ...]
    cells: tuple[Cell, ...]  # of this tile, by attention
    words: str  # what the picture shows, for those who do not see it
    um_per_px: float | None  # at the tile's scale

    @property
    def ratios(self) -> str:
        """In how many of its cells the nucleus-to-cell ratio was measured."""
        return cytoplasm.measured_words([c.nc_ratio for c in self.cells])

    def area(self, pixels: float) -> str:
        """Return an area of the mask in words, in square micrometres if the scale is known."""
        if self.um_per_px is None:
            return f"{pixels:.0f} px²"
        return f"{pixels * self.um_per_px**2:.0f} µm²"


def cells_of(table: pa.Table | None, tiles: Sequence[Tile]) -> tuple[Cell, ...]:
    """Return all cells of a field by attention, highest first; a cell that no tile shows has `tile` -1."""
    if table is None or not len(table):
        return ()
    place: dict[int, tuple[int, float, float, float]] = {}
    for t, tile in enumerate(tiles):
        window = float(tile.window_px) if tile.window_px > 1 else _WINDOW
        for cell_id, x, y in zip(tile.cell_ids.tolist(), tile.field_x.tolist(), tile.field_y.tolist(), strict=True):
            place[cell_id] = (t, x, y, window)
    rows = sorted(table.to_pylist(), key=lambda r: (-r["attention"], r["cell_id"]))
    top = rows[0]["attention"] or 1.0
    cells = []
    for rank, row in enumerate(rows, 1):
        t, x, y, window = place.get(row["cell_id"], (-1, 0.0, 0.0, _WINDOW))
        left, upper = round(x + 0.5 - window / 2, 1), round(y + 0.5 - window / 2, 1)
        cells.append(
            Cell(
                cell_id=row["cell_id"],
                rank=rank,
                tile=t,
                attention=row["attention"],
                weight=row["attention"] / top,
                nc_ratio=row["nc_ratio"],
                nucleus_area_px=row["nucleus_area_px"],
                cell_area_px=row["cell_area_px"],
                eccentricity=row["eccentricity"],
                touches_border=row["touches_border"],
                box=(left, upper, left + window, upper + window),
            )
        )
    return tuple(cells)


def _scene(
    tiles: Sequence[Tile],
    cells: Sequence[Cell],
    tile: int | None,
    base: str,
    label: str | None,
    pixels: bool,
    mapped: bool,
    remarks: Sequence[str],
    um_per_px: float | None,
) -> Scene | None:
    """Build a scene; None if there is no picture. Without `tile`, of the one with the cell of highest attention."""
    if not tiles:
        return None
    if tile is None:
        tile = next((c.tile for c in cells if c.tile >= 0), 0)
    tile = min(max(tile, 0), len(tiles) - 1)
    view = tiles[tile]
    mine = tuple(c for c in cells if c.tile == tile)
    height, width = view.cells.shape
    what = count_of(len(mine), "cell") if mine else "no cells"
    scale = float(view.to_source[0, 0])
    return Scene(
        pictures=base,
        view=f"{base}/view",
        tile=tile,
        tiles=len(tiles),
        width=width,
        height=height,
        label=label,
        maps=mapped and bool(mine) and layers.has_maps(view),
        gone="" if pixels else f"The pixels of this field cannot be shown: {'; '.join(remarks) or 'they are gone'}.",
        remarks=tuple(numbers.shown(r, 300) for r in remarks) if pixels else (),
        nucleus=layers.nucleus_path(view),
        cytoplasm=layers.cytoplasm_path(view),
        shapes=layers.shapes(view, mine),
        cells=mine,
        words=f"Field of {width} by {height} pixels with {what} outlined",
        um_per_px=um_per_px * scale if um_per_px else None,
    )


def field_tiles(table: RunTable, ordinal: int) -> tuple[tuple[Tile, ...], tuple[Cell, ...], FieldView]:
    """Return tiles, cells and view of a field of a run. Raises NotFoundError."""
    view = field_of(table, ordinal)
    return view.tiles, cells_of(view.cells, view.tiles), view


def of_field(table: RunTable, ordinal: int, tile: int | None, base: str) -> Scene | None:
    """Return the scene of a field of a run; None if there is nothing to draw. Raises NotFoundError."""
    tiles, cells, view = field_tiles(table, ordinal)
    line = table.field(ordinal)
    d = line.details
    scale = d.um_per_px if d is not None and d.um_per_px_source != ScaleSource.ASSUMED else None
    return _scene(tiles, cells, tile, base, line.label, view.pixels, view.mapped, view.remarks, scale)


def of_diagnosis(diagnosis: Examination, tile: int, base: str) -> Scene | None:
    """Return the scene of a diagnosis on the bench; None if the image could not be decoded."""
    cells = cells_of(diagnosis.cells, diagnosis.tiles)
    mapped = bool(diagnosis.probabilities)
    label = diagnosis.label if diagnosis.status == Status.PREDICTED else None
    return _scene(diagnosis.tiles, cells, tile, base, label, True, mapped, (), diagnosis.scale.known)
