"""Write and read the Zarr arrays of a shard: masks, cell tables, features and activation maps."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from leukoflow.core.errors import StorageError
from leukoflow.models.bundle import Bundle
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import Shard
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.imaging.cells import Cells, CellTable, concatenate
from leukoflow.tasks.imaging.extract import Features
from leukoflow.tasks.store.job import ShardJob, attempt_prefix

ARRAYS = {
    RunKey.MASKS: ("semantic", "cells", "to_source", "cell_table", "cell_offsets"),
    RunKey.FEATURES: ("hybrid", "cells", "cell_offsets"),
    RunKey.ACTIVATIONS: ("maps",),
}
"""What a shard's group holds in each store."""

ZARR_CHUNK, ZARR_SHARD = 10, 250


def write_masks(
    job: ShardJob,
    semantic: NDArray[np.uint8],
    cells: Cells,
    to_source: NDArray[np.float32],
    tiles_before: int,
    cells_before: int,
) -> None:
    """Write a block's masks, uint8 [t, S, S], its cells, and maps to the source, float32 [t, 2, 3], after earlier ones.

    Args:
        job: of the shard.
        semantic: classes of pixels.
        cells: of the same tiles.
        to_source: from a tile's pixel to the source pixel.
        tiles_before: tiles that the shard's earlier blocks have written.
        cells_before: their cells.
    """
    side = semantic.shape[1:]
    rows = np.stack([getattr(cells.table, f.name).astype(np.float32) for f in fields(CellTable)], axis=1)
    classes = {"classes": {"0": "background", "1": "cytoplasm", "2": "nucleus"}}
    columns = {"columns": [f.name for f in fields(CellTable)]}
    write_arrays(
        attempt_group(job, RunKey.MASKS),
        ("semantic", tiles_before, semantic, (ZARR_CHUNK, *side), (ZARR_SHARD, *side), classes),
        ("cells", tiles_before, cells.labels, (ZARR_CHUNK, *side), (ZARR_SHARD, *side)),
        ("to_source", tiles_before, to_source, (4096, 2, 3)),
        ("cell_table", cells_before, rows, (4096, rows.shape[1]), None, columns),
        ("cell_offsets", tiles_before, cells.offsets + cells_before, (4096,)),
    )


def write_features(
    job: ShardJob,
    features: Features,
    columns: Sequence[tuple[str, str, int]],
    tiles_before: int,
    cells_before: int,
) -> None:
    """Write a block's features after those of earlier blocks; `columns` are (backbone, layer, dimension), in order."""
    width = features.cells.shape[1]
    names = {"columns": [{"backbone": b, "layer": layer, "dimension": d} for b, layer, d in columns]}
    write_arrays(
        attempt_group(job, RunKey.FEATURES),
        ("hybrid", tiles_before, features.field, (16, width), (512, width), names),
        ("cells", cells_before, features.cells, (64, width), (4096, width), names),
        ("cell_offsets", tiles_before, features.offsets + cells_before, (4096,)),
    )


def write_maps(job: ShardJob, bundle: Bundle, maps: NDArray[np.float16], cells_before: int) -> None:
    """Write the activation maps of a block's cells, float16 [m, C, g, g], after those of earlier blocks."""
    attributes = {
        "classes": list(bundle.spec.classes),
        "window_px": bundle.spec.method.features.cell_window_px,
        "grid": maps.shape[-1],
        "classifier_digest": bundle.component_digest("classifier"),
    }
    chunks, shards = (64, *maps.shape[1:]), (4096, *maps.shape[1:])
    write_rows(attempt_group(job, RunKey.ACTIVATIONS), "maps", cells_before, maps, chunks, shards, attributes)


def read_cells(root: str, shard: Shard) -> tuple[CellTable, NDArray[np.int64], NDArray[np.float32]]:
    """Read the committed cell table of a shard without labels.

    Returns:
        The table, offsets of each tile's rows, int64 [t + 1], and each tile's map to the source, float32 [t, 2, 3].
    """
    group = stored_group(root, RunKey.group(RunKey.MASKS, shard.name))
    rows, offsets, to_source = read_arrays(group, "cell_table", "cell_offsets", "to_source")
    empty = concatenate([])
    columns = {f.name: rows[:, i].astype(getattr(empty, f.name).dtype) for i, f in enumerate(fields(CellTable))}
    return CellTable(**columns), offsets.astype(np.int64), to_source.astype(np.float32)


def read_labels(root: str, shard: Shard, tiles: slice) -> NDArray[np.uint16]:
    """Read the committed labels of some tiles' cells, uint16 [t, S, S]."""
    return np.asarray(array_of(stored_group(root, RunKey.group(RunKey.MASKS, shard.name)), "cells")[tiles], np.uint16)


def read_features(root: str, shard: Shard) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Read the committed features of a shard's tiles [t, D] and cells [m, D], and the cells' offsets [t + 1]."""
    group = stored_group(root, RunKey.group(RunKey.FEATURES, shard.name))
    field, cells, offsets = read_arrays(group, "hybrid", "cells", "cell_offsets")
    return field.astype(np.float32, copy=False), cells.astype(np.float32, copy=False), offsets


def write_arrays(group: zarr.Group, *arrays: Any) -> None:
    """Do `write_rows` for several arrays at the same time, so that their waits for an object store are one wait."""
    with ThreadPoolExecutor(len(arrays)) as pool:
        list(pool.map(lambda words: write_rows(group, *words), arrays))


def write_rows(
    group: zarr.Group,
    name: str,
    start: int,
    rows: NDArray[Any],
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None = None,
    attributes: dict[str, Any] | None = None,
) -> None:
    """Write rows from `start` on into an array of a group that only this task writes; create the array or let it grow.

    `attributes` are those of the array when it is created: set afterwards, each costs two more requests to a store.

    The place is explicit, so that a task which Dask runs a second time writes the same bytes and appends nothing.
    """
    shape = (start + len(rows), *rows.shape[1:])
    if (found := group.get(name)) is None:
        found = group.create_array(
            name,
            shape=shape,
            chunks=chunks,
            shards=shards,
            dtype=rows.dtype,
            compressors=ZstdCodec(level=1),
            fill_value=0,
            attributes=attributes,
        )
    array = _checked(group, name, found)
    if array.shape != shape:
        array.resize(shape)
    if len(rows):
        array[start:] = rows


def arrays_of(group: zarr.Group, names: Sequence[str]) -> list[tuple[str, zarr.Array[Any]]]:
    """Open arrays of a group at the same time; with their names."""
    with ThreadPoolExecutor(len(names)) as pool:
        return list(zip(names, pool.map(partial(array_of, group), names), strict=True))


def read_arrays(group: zarr.Group, *names: str) -> list[NDArray[Any]]:
    """Read whole arrays of a group at the same time, so that their waits for an object store are one wait."""
    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(lambda name: np.asarray(array_of(group, name)[:]), names))


def array_of(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Open an array of a group. Raises StorageError when it is absent."""
    return _checked(group, name, group.get(name))


def _checked(group: zarr.Group, name: str, found: Any) -> zarr.Array[Any]:
    if not isinstance(found, zarr.Array):
        raise StorageError(f"{group.store_path} lacks the array {name}; rerun to have its shard done again")
    return found


def attempt_group(job: ShardJob, name: str) -> zarr.Group:
    """Open or create the shard's group of one store below the attempt."""
    key = f"{attempt_prefix(job.shard, job.attempt)}/{name}/{job.shard.name}"
    return zarr.open_group(open_storage(job.root).zarr(key), mode="a", zarr_format=3)


def stored_group(root: str, key: str) -> zarr.Group:
    """Open a committed group. Its format is given, or the store would be asked for the files of older formats, too."""
    return zarr.open_group(open_storage(root).zarr(key, read_only=True), mode="r", zarr_format=3)
