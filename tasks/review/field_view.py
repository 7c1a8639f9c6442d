"""A field of a run as pictures: pixels from the source, masks and activation maps from what the run has stored.

Where the pixels are gone or have changed, the view says so, and what is stored is shown alone.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from numpy.typing import NDArray

from leukoflow.core.errors import LeukoflowError
from leukoflow.runs.layout import RunKey, Stage
from leukoflow.runs.records import CLASSES, Status
from leukoflow.storage.base import Storage
from leukoflow.tasks.decoding.ingest import Decoded, Decoder
from leukoflow.tasks.imaging.normalize import normalize
from leukoflow.tasks.inference.single import MAX_VIEWS, TileView
from leukoflow.tasks.review.bundle_settings import method_of
from leukoflow.tasks.review.pixels import Pixels, cut, shared_decoder
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.wording import reason_words

ERASED = "the patient was erased from this run, and with the patient what was computed from the image"


@dataclass(frozen=True, slots=True)
class FieldView:
    """A field of a run as pictures.

    `pixels` is False where the tiles' `original` and `normalized` are blank, since the image cannot be had any more;
    `mapped` where `maps` are zeros for want of activation maps. `remarks` say in words what is absent and why.
    """

    ordinal: int
    tiles: tuple[TileView, ...]
    cells: pa.Table  # rows of leukoflow.runs.schema.CELLS, in the order of cell_id
    pixels: bool
    mapped: bool
    remarks: tuple[str, ...] = field(default=())


def view(table: RunTable, ordinal: int, decoder: Decoder | None = None) -> FieldView:
    """Return a field of a run as pictures; what cannot be had is absent, and `remarks` say why.

    Raises NotFoundError where the run has no such field. Without a `decoder`, one that stays with the process is used.
    """
    row = table.stored_row(ordinal)
    cells = table.cells(ordinal)
    status = Status(row["status"])
    if status is Status.QUARANTINED:
        return FieldView(ordinal, (), cells, False, False, (" ".join(filter(None, reason_words(row["reason"])[:2])),))
    with ExitStack() as stack:
        bundle = table.bundle[0]
        pixels = Pixels(table.storage, bundle, stack, decoder or shared_decoder(bundle))
        decoded, remark = pixels.image(row)
        remarks = [remark] if remark else []
        if row["zarr_index"] is None or not row["n_tiles"]:
            return _without_masks(table, ordinal, row, cells, decoded, remarks)
        return _with_masks(table, ordinal, row, cells, decoded, remarks)


def _normal(table: RunTable, decoded: Decoded, remarks: list[str]) -> NDArray[np.uint8]:
    assert decoded.rgb is not None
    method = method_of(table.bundle[0])
    if method is None:
        remarks.append("the run's bundle is not on this machine, so the image is shown without normalisation")
        return decoded.rgb
    return normalize(decoded.rgb, method.normalize)


def _without_masks(
    table: RunTable, ordinal: int, row: dict[str, Any], cells: pa.Table, decoded: Decoded | None, remarks: list[str]
) -> FieldView:
    """Return a rejected field: its picture alone, or a corner of it where it is large."""
    remarks.append(f"nothing was segmented: {row['reason']}" if row["reason"] else "nothing was segmented")
    if decoded is None or decoded.rgb is None:
        return FieldView(ordinal, (), cells, False, False, tuple(remarks))
    normal = _normal(table, decoded, remarks)
    height, width = decoded.rgb.shape[:2]
    scale = decoded.source_width / width
    affine = np.array([[scale, 0, 0.5 * scale - 0.5], [0, scale, 0.5 * scale - 0.5]], np.float32)
    tile = TileView(
        original=decoded.rgb,
        normalized=normal,
        semantic=np.zeros((height, width), np.uint8),
        cells=np.zeros((height, width), np.uint16),
        to_source=affine,
        cell_ids=np.zeros(0, np.int32),
        field_x=np.zeros(0, np.float32),
        field_y=np.zeros(0, np.float32),
        maps=np.zeros((0, len(CLASSES), 1, 1), np.float16),
        window_px=1,
    )
    return FieldView(ordinal, (tile,), cells, True, False, tuple(remarks))


def _with_masks(
    table: RunTable, ordinal: int, row: dict[str, Any], cells: pa.Table, decoded: Decoded | None, remarks: list[str]
) -> FieldView:
    shard = row["shard"]
    try:
        masks: Any = zarr.open_group(
            table.storage.zarr(RunKey.group(RunKey.MASKS, shard), read_only=True), mode="r", zarr_format=3
        )
        names = list(masks["cell_table"].attrs["columns"])
        first, count = int(row["zarr_index"]), int(row["n_tiles"])
        chosen = _chosen(cells, first, count)
        if len(chosen) < count:
            remarks.append(f"{len(chosen)} of {count} tiles are shown, those with most attention")
        normal = None if decoded is None else _normal(table, decoded, remarks)
        maps = _maps(table.storage, shard)
        tiles = [_tile(masks, names, i, decoded, normal, maps) for i in chosen]
    except (KeyError, ValueError, OSError, LeukoflowError) as error:
        remarks.append(f"the masks cannot be read ({type(error).__name__}); `leukoflow verify` says what to do")
        return FieldView(ordinal, (), cells, False, False, tuple(remarks))
    fits = decoded is not None and all(fit for _, fit in tiles)
    if decoded is not None and not fits:
        remarks.append("the image's scale no longer fits its mask; only the mask is shown")
    shown = tuple(tile for tile, _ in tiles)
    if len(cells) and not any(tile.semantic.any() for tile in shown):
        remarks.append(ERASED)
    if maps is None:
        remarks.append(
            "there are no activation maps: features were taken over from a run with another classifier, or the maps "
            "were lost; a new run without --reuse makes them"
        )
    return FieldView(ordinal, shown, cells, fits, maps is not None, tuple(remarks))


def _chosen(cells: pa.Table, first: int, count: int) -> list[int]:
    """Choose the tiles that become pictures, in order: all, or those with most attention."""
    if count <= MAX_VIEWS:
        return list(range(first, first + count))
    places = cells["zarr_index"].to_numpy() - first
    weight = np.bincount(places, weights=cells["attention"].to_numpy().astype(np.float64), minlength=count)
    return sorted(first + int(i) for i in np.argsort(-weight, kind="stable")[:MAX_VIEWS])


def _maps(storage: Storage, shard: str) -> Any | None:
    """Return the array of a shard's activation maps; None where it has none."""
    try:
        storage.read(RunKey.marker(Stage.ACTIVATIONS, shard))  # without it, what lies there means nothing
        group: Any = zarr.open_group(
            storage.zarr(RunKey.group(RunKey.ACTIVATIONS, shard), read_only=True), mode="r", zarr_format=3
        )
        maps = group["maps"]
        return maps if list(maps.attrs["classes"]) == list(CLASSES) else None
    except Exception:  # maps are an extra: a field is shown without them
        return None


def _tile(
    masks: Any,
    names: list[str],
    place: int,
    decoded: Decoded | None,
    normal: NDArray[np.uint8] | None,
    maps: Any | None,
) -> tuple[TileView, bool]:
    """Return one tile, and whether its pixels are there."""
    semantic = np.asarray(masks["semantic"][place], np.uint8)
    labels = np.asarray(masks["cells"][place], np.uint16)
    affine = np.asarray(masks["to_source"][place], np.float32)
    begin, end = np.asarray(masks["cell_offsets"][place : place + 2]).tolist()
    measured = np.asarray(masks["cell_table"][begin:end], np.float32)
    ids, xs, ys = (measured[:, names.index(n)] for n in ("cell_id", "field_x", "field_y"))
    original = normalized = None
    exact = affine.astype(np.float64)
    if decoded is not None:
        original = cut(decoded, semantic.shape, exact)
        normalized = cut(decoded, semantic.shape, exact, normal)
    if original is None or normalized is None:
        blank = np.full((*semantic.shape, 3), 255, np.uint8)
        original = normalized = blank
        fits = False
    else:
        fits = True
    height, width = original.shape[:2]
    window, values = 1, np.zeros((len(ids), len(CLASSES), 1, 1), np.float16)
    if maps is not None:
        window = int(maps.attrs["window_px"])
        values = np.nan_to_num(np.asarray(maps[begin:end], np.float16))
    tile = TileView(
        original=np.ascontiguousarray(original),
        normalized=np.ascontiguousarray(normalized),
        semantic=semantic[:height, :width],
        cells=labels[:height, :width],
        to_source=affine,
        cell_ids=ids.astype(np.int32),
        field_x=xs,
        field_y=ys,
        maps=values,
        window_px=window,
    )
    return tile, fits
