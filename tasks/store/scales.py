"""Store how many pixels a red cell is wide in each image: `scales.parquet`, settled before the first shard.

It has one row for each member of the plan, in its order, and one row group for each shard, so that a shard's are read
alone. It holds measurements, not decisions: which scale is used is settled with the bundle's settings when it is read.
Until all shards are measured, each one's red cells lie in a file of its own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import Shard
from leukoflow.storage.base import Storage
from leukoflow.tasks.imaging.magnification import Magnification, Reading

SCALES = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("red_cells", pa.int32(), nullable=False),
        pa.field("red_cell_px", pa.float64()),
        pa.field("red_cell_sd", pa.float64()),
        pa.field("pooled_cells", pa.int32(), nullable=False),
        pa.field("pooled_images", pa.int32(), nullable=False),
        pa.field("doubt", pa.string()),
        pa.field("file_um_per_px", pa.float64()),
    ]
)
"""`red_cells` were seen in the image itself; `red_cell_px` is their diameter over all images that it was pooled with,
`red_cell_sd` the relative standard deviation of that, null where `doubt` says why there is none."""

_RED_CELLS = pa.schema(
    [
        pa.field("red_cells", pa.list_(pa.float32())),
        pa.field("typical_cells", pa.int32()),
        pa.field("typical_log_px", pa.float64()),
        pa.field("file_um_per_px", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class ImageRedCells:
    """The red cells of one image, and the micrometres per pixel that its file states; None where it states none."""

    reading: Reading
    of_file: float | None


@dataclass(frozen=True, slots=True)
class StoredScale:
    """What `scales.parquet` says of one image."""

    found: Magnification
    of_file: float | None


def write_red_cells(storage: Storage, shard: Shard, found: Sequence[ImageRedCells]) -> None:
    """Write the red cells of a shard's images; writing them again changes nothing."""
    columns: list[list[Any]] = [
        [one.reading.diameters.tolist() for one in found],
        [one.reading.cells for one in found],
        [_or_null(one.reading.log_px) for one in found],
        [one.of_file for one in found],
    ]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, _RED_CELLS, strict=True)], schema=_RED_CELLS)
    storage.write(RunKey.part(RunKey.RED_CELLS, shard.name), _bytes([table], _RED_CELLS))


def read_red_cells(storage: Storage, shard: Shard) -> list[ImageRedCells]:
    """Read the red cells of a shard's images. Raises FileNotFoundError while they are not measured."""
    table = pq.read_table(io.BytesIO(storage.read(RunKey.part(RunKey.RED_CELLS, shard.name))), schema=_RED_CELLS)
    rows = zip(*(table[name].to_pylist() for name in _RED_CELLS.names), strict=True)
    return [
        ImageRedCells(Reading(np.array(own, np.float32), cells, math.nan if log_px is None else log_px), of_file)
        for own, cells, log_px, of_file in rows
    ]


def write_scales(
    storage: Storage,
    shards: Iterable[Shard],
    seen: NDArray[np.int32],
    of_file: Sequence[float | None],
    found: Sequence[Magnification],
) -> None:
    """Write `scales.parquet`.

    Args:
        storage: of the run.
        shards: of the run.
        seen: int32 [n], how many red cells each member shows, in the plan's order; so are the others.
        of_file: micrometres per pixel that each one's file states.
        found: the magnification of each.
    """
    tables = []
    for shard in shards:
        rows = range(shard.first, shard.first + shard.count)
        tables.append(
            pa.table(
                [
                    pa.array(list(rows), pa.int64()),
                    pa.array(seen[shard.first : shard.first + shard.count], pa.int32()),
                    pa.array([_or_null(found[i].px) for i in rows], pa.float64()),
                    pa.array([_or_null(found[i].sd) for i in rows], pa.float64()),
                    pa.array([found[i].cells for i in rows], pa.int32()),
                    pa.array([found[i].images for i in rows], pa.int32()),
                    pa.array([found[i].doubt or None for i in rows], pa.string()),
                    pa.array([of_file[i] for i in rows], pa.float64()),
                ],
                schema=SCALES,
            )
        )
    storage.write(RunKey.SCALES, _bytes(tables, SCALES))


def read_scales(file: pq.ParquetFile, ordinal: int) -> list[StoredScale]:
    """Read what is stored of one shard's images, in order, from its row group."""
    return [
        StoredScale(
            Magnification(
                math.nan if row["red_cell_px"] is None else row["red_cell_px"],
                math.nan if row["red_cell_sd"] is None else row["red_cell_sd"],
                row["pooled_cells"],
                row["pooled_images"],
                row["doubt"] or "",
            ),
            row["file_um_per_px"],
        )
        for row in file.read_row_group(ordinal).to_pylist()
    ]


def _bytes(tables: Sequence[pa.Table], schema: pa.Schema) -> bytes:
    """Return a Parquet file with a row group for each table."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False, store_schema=True) as writer:
        for table in tables:
            writer.write_table(table)
    return sink.getvalue()


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value
