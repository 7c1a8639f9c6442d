"""Fields with their cells: a row of the predictions, the drawing of its field, and what may be said below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import zarr
from markupsafe import Markup

from leukoflow.core.method import SegmentSettings
from leukoflow.runs.layout import RunKey, Stage
from leukoflow.runs.schema import PROBABILITY_OF
from leukoflow.storage.base import Storage
from leukoflow.tasks.report.overlay import Heat, draw_field, heaviest_cells
from leukoflow.tasks.review.bundle_settings import alpha_of, segment_settings
from leukoflow.tasks.review.pixels import Pixels
from leukoflow.tasks.review.wording import Scale, reason_words, set_words


@dataclass(frozen=True, slots=True)
class Figure:
    """One field of a gallery: its row, the drawing (SVG), a remark about it, and whether its maps are stored.

    `settings` and `alpha` are the bundle's: how it takes a picture of unknown scale, and how often its sets may miss.
    """

    row: dict[str, Any]
    drawing: Markup
    remark: str
    settings: SegmentSettings
    alpha: float
    mapped: bool = False

    @property
    def answered(self) -> bool:
        """Whether the field has a label that is an answer."""
        return bool(self.row["status"] == "predicted")

    @property
    def probabilities(self) -> list[tuple[str, float]]:
        """Classes with their probabilities."""
        return [(name, self.row[column]) for name, column in PROBABILITY_OF.items()]

    @property
    def scale(self) -> Scale:
        """What is known of the picture's size."""
        size = (self.row["width_px"], self.row["height_px"], self.row["um_per_px"])
        return Scale(*size, self.settings, self.row.get("um_per_px_source"))

    @property
    def set_words(self) -> str:
        """The prediction set in sentences."""
        return set_words(self.row["prediction_set"] or (), self.alpha, [value for _, value in self.probabilities])

    @property
    def reason_words(self) -> tuple[str, str, str]:
        """Why there is no answer: what it is, a remedy, what was measured."""
        return reason_words(self.row["reason"], self.scale)


class Painter:
    """Draws single fields: pixels from the source where they can be had, outlines from the masks.

    `cells` maps shards to the files of their cells. What the reader should know about all drawings is in `notes`.
    """

    def __init__(self, storage: Storage, bundle: str, cells: Mapping[str, str], stack: ExitStack) -> None:
        self.storage = storage
        self._cell_files = cells
        self._pixels = Pixels(storage, bundle, stack)
        self._settings, self._alpha = segment_settings(bundle), alpha_of(bundle)
        self.notes: list[str] = [self._pixels.note] if self._pixels.note else []

    def figure(self, row: dict[str, Any]) -> Figure:
        """Draw the field of one row of the predictions. Failures become a remark, never an exception."""
        try:
            cells = self._cells(row)
            tile = self._tile(row, cells)
            group: Any = zarr.open_group(
                self.storage.zarr(RunKey.group(RunKey.MASKS, row["shard"]), read_only=True), mode="r"
            )
            labels = np.asarray(group["cells"][tile], np.uint16)
            affine = np.asarray(group["to_source"][tile], np.float64)
        except Exception as error:
            remark = f"its mask cannot be read ({type(error).__name__})"
            return Figure(row, Markup(), remark, self._settings, self._alpha)
        photo, remark = None, ""
        if self._pixels.there:
            photo, remark = self._pixels.photo(row, labels.shape, affine)
        if row["n_tiles"] > 1:
            part = (
                f"tile {tile - row['zarr_index'] + 1} of {row['n_tiles']}, the one with the cell of highest attention"
            )
            remark = f"{part}; {remark}" if remark else part
        mine = {c["cell_id"]: c for c in cells if c["zarr_index"] == tile}
        heats = self._heats(row, tile, group, mine)
        drawing = draw_field(photo, labels, mine, heats or ())
        return Figure(row, drawing, remark, self._settings, self._alpha, heats is not None)

    def _heats(self, row: dict[str, Any], tile: int, masks: Any, cells: dict[int, dict[str, Any]]) -> list[Heat] | None:
        """Read the activation maps of a tile's heaviest cells; None where there are none to be had."""
        try:
            self.storage.read(
                RunKey.marker(Stage.ACTIVATIONS, row["shard"])
            )  # without it, what lies there means nothing
            group: Any = zarr.open_group(
                self.storage.zarr(RunKey.group(RunKey.ACTIVATIONS, row["shard"]), read_only=True), mode="r"
            )
            maps = group["maps"]
            window, label = int(maps.attrs["window_px"]), list(maps.attrs["classes"]).index(row["label"])
            first, end = np.asarray(masks["cell_offsets"][tile : tile + 2]).tolist()
            measured = np.asarray(masks["cell_table"][first:end], np.float64)
            names = list(masks["cell_table"].attrs["columns"])
            ids, xs, ys = (measured[:, names.index(name)] for name in ("cell_id", "field_x", "field_y"))
            heats = []
            for cell in heaviest_cells(cells):
                (place,) = np.flatnonzero(ids == cell["cell_id"])
                values = np.nan_to_num(np.asarray(maps[first + place, label], np.float64)) * cell["attention"]
                corner = 0.5 - window / 2  # a pixel's centre lies half a pixel from its edge
                heats.append(Heat(xs[place] + corner, ys[place] + corner, window, values))
        except Exception:  # maps are an extra: a field is shown without them
            return None
        return heats

    def _cells(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        columns = ["image_key", "cell_id", "attention", "nc_ratio", "cell_area_px", "zarr_index"]
        with self.storage.open(self._cell_files[row["shard"]]) as file:
            table = pq.read_table(file, columns=columns, filters=[("image_key", "=", row["image_key"])])
        return list(table.to_pylist())

    def _tile(self, row: dict[str, Any], cells: Sequence[dict[str, Any]]) -> int:
        """Find the row in the shard's masks; of a tiled field the tile with the cell of highest attention."""
        if row["n_tiles"] > 1 and cells:
            return int(max(cells, key=lambda c: (c["attention"], -c["cell_id"]))["zarr_index"])
        return int(row["zarr_index"])
