"""A run's results from Python: tables as lazy Arrow datasets, masks as arrays, images with their outlines.

Reading tables and masks needs neither torch nor Prefect.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import zarr
from numpy.typing import NDArray

from leukoflow.apps.notebook import words
from leukoflow.core.errors import NotFoundError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import RunManifest, Status, read_reason
from leukoflow.runs.schema import PROBABILITY_OF
from leukoflow.storage.base import Storage
from leukoflow.tasks.review.bundle_settings import alpha_of, segment_settings
from leukoflow.tasks.review.field_view import view
from leukoflow.tasks.review.pixels import Pixels, shared_decoder
from leukoflow.tasks.review.runs import open_run_named
from leukoflow.tasks.review.wording import SHADOW, Scale
from leukoflow.tasks.store.tables import finished, table_files

if TYPE_CHECKING:
    from leukoflow.apps.web.drawing.layers import Tile


@dataclass(frozen=True, slots=True)
class Masks:
    """Segmentation of one image; n tiles, one for an ordinary field.

    `semantic` uint8 [n, H, W]: 0 background, 1 cytoplasm, 2 nucleus. `cells` uint16 [n, H, W]: 0 background, else
    `cell_id`. `to_source` float32 [n, 2, 3]: affine maps from a mask pixel's centre (x, y) to source pixels.
    """

    semantic: NDArray[np.uint8]
    cells: NDArray[np.uint16]
    to_source: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Field:
    """One image of a run with its pictures; a notebook shows it with its cells outlined."""

    image_key: str
    row: dict[str, Any]
    tiles: tuple[Tile, ...]
    cells: pa.Table
    sentences: tuple[str, ...]

    @property
    def headline(self) -> str:
        """What the run says of the image, in one line."""
        return words.headline(self.row["status"], self.row["label"], self.row["confidence"])

    def __repr__(self) -> str:
        return f"<Field {self.image_key!r}: {self.headline} {len(self.cells)} cells>"

    def _repr_html_(self) -> str:
        from leukoflow.apps.notebook.pictures import field_html

        answered = self.row["status"] == Status.PREDICTED
        shown = {name: self.row[column] for name, column in PROBABILITY_OF.items()} if answered else {}
        return field_html(self.tiles, self.cells, self.headline, self.sentences, shown)


class Run:
    """A finished run. `predictions`, `cells` and `slides` are `pyarrow.dataset.Dataset`: filtered before they are read.

    Only what the manifest lists is read, so nothing that was not committed is ever seen.
    """

    def __init__(self, storage: Storage, manifest: RunManifest) -> None:
        self.storage = storage
        self.manifest = manifest

    @property
    def run_id(self) -> str:
        """Name of the run."""
        return self.manifest.run_id

    @cached_property
    def predictions(self) -> ds.Dataset:
        """One row for every image handed over, in plan order."""
        return self._dataset([file.key for file in table_files(self.manifest.parts, RunKey.PREDICTIONS)])

    @cached_property
    def cells(self) -> ds.Dataset:
        """One row for every cell."""
        return self._dataset([file.key for file in table_files(self.manifest.parts, RunKey.CELLS)])

    @cached_property
    def slides(self) -> ds.Dataset:
        """One row for every slide, most urgent first."""
        return self._dataset([RunKey.SLIDES])

    def mask(self, image_key: str) -> Masks:
        """Return the masks of one image.

        Raises:
            NotFoundError: the run has no such image, or segmented nothing in it; the message says why.
        """
        row = self.row(image_key)
        if row["zarr_index"] is None or not row["n_tiles"]:
            raise NotFoundError(f"{image_key} has no masks: {row['reason'] or row['status']}")
        group: Any = zarr.open_group(
            self.storage.zarr(RunKey.group(RunKey.MASKS, row["shard"]), read_only=True), mode="r"
        )
        tiles = slice(row["zarr_index"], row["zarr_index"] + row["n_tiles"])
        return Masks(*(np.asarray(group[name][tiles]) for name in ("semantic", "cells", "to_source")))

    def image(self, image_key: str) -> NDArray[np.uint8]:
        """Return the pixels of one image as the model saw them, uint8 [H, W, 3], read again from the source.

        Raises:
            NotFoundError: the run has no such image, or its source is gone or has changed; the message says which.
        """
        row = self.row(image_key)
        with ExitStack() as stack:
            pixels = Pixels(self.storage, self.manifest.bundle, stack, shared_decoder(self.manifest.bundle))
            decoded, remark = pixels.image(row)
        if decoded is None or decoded.rgb is None:
            raise NotFoundError(f"{image_key}: {remark.removesuffix('; only the mask is shown')}")
        return decoded.rgb

    def show(self, image_key: str) -> Field:
        """Return one image with its pictures, cells and words, for display in a notebook."""
        row = self.row(image_key)
        out, _, run_id = self.storage.root.rpartition("/")
        table = open_run_named(out, run_id)
        seen = view(table, table.ordinal_of(image_key))
        bundle = self.manifest.bundle
        size = (row["width_px"], row["height_px"], row["um_per_px"])
        scale = Scale(*size, segment_settings(bundle), row.get("um_per_px_source"))
        probabilities = [row[column] for column in PROBABILITY_OF.values()]
        said = words.sentences(
            row["status"], row["reason"], scale, row["prediction_set"] or (), probabilities, alpha_of(bundle), "run"
        )
        shadow = (SHADOW,) if self.manifest.shadow_of is not None else ()
        return Field(image_key, row, seen.tiles, seen.cells, (*shadow, *seen.remarks, *said))

    def row(self, image_key: str) -> dict[str, Any]:
        """Return the image's row of `predictions`. Raises NotFoundError."""
        found = self.predictions.to_table(filter=ds.field("image_key") == image_key).to_pylist()
        if not found:
            raise NotFoundError(
                f"run {self.run_id} has no image {image_key!r}; the column image_key of `predictions` lists them"
            )
        row: dict[str, Any] = found[0]
        return {**row, "reason": read_reason(row["reason"])}

    def _dataset(self, keys: list[str]) -> ds.Dataset:
        if self.storage.is_local:
            return ds.dataset([self.storage.uri(key) for key in keys], format="parquet")
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        files = PyFileSystem(FSSpecHandler(self.storage.fs))  # type: ignore[attr-defined]
        places = [self.storage.uri(key).removeprefix("s3://") for key in keys]
        return ds.dataset(places, format="parquet", filesystem=files)

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"<Run {self.run_id}: {m.members} images, {m.predicted} predicted, {m.abstained} abstained, {m.rejected} "
            f"rejected, {m.quarantined} quarantined, {m.missing} missing, {m.cells} cells>"
        )


def open_run(place: str) -> Run:
    """Open a finished run for reading.

    Args:
        place: `OUT/RUN_ID`, a folder or an `s3://` address.

    Raises:
        StorageError: there is no run, or it is not finished; the message says how to finish it.

    Examples:
        >>> run = open_run("out/smears-1f0c63b2")                                                # doctest: +SKIP
        >>> run.predictions.to_table(columns=["image_key", "label"]).to_pandas()                 # doctest: +SKIP
    """
    storage, manifest = finished(str(place))
    return Run(storage, manifest)
