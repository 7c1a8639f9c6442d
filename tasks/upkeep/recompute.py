"""Compute one shard again, and hold it against what a run has stored of it, bit for bit.

Runs in a process of its own; `tasks/upkeep/reproduce.py` hands out the shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from leukoflow.cluster.host import this_host
from leukoflow.runs.layout import RunKey, Stage
from leukoflow.runs.records import Host, read_reason
from leukoflow.runs.schema import SINCE_2, SINCE_3
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.inference.stages import classify, extract, prepare, segment, written_by
from leukoflow.tasks.inference.worker import members_of, opened_bundle
from leukoflow.tasks.intake.manifest import META_PREFIX
from leukoflow.tasks.store.commit import STAGES, marker_key, read_marker, stage_keys
from leukoflow.tasks.store.compact import shard_counts_of
from leukoflow.tasks.store.job import ShardJob, attempt_prefix
from leukoflow.tasks.upkeep.amendment import rows_of
from leukoflow.tasks.upkeep.erase import erased_key

TABLES = (RunKey.FIELDS, RunKey.PREDICTIONS, RunKey.CELLS)
_LATER = {(RunKey.CELLS, name) for name in SINCE_2} | {(RunKey.PREDICTIONS, name) for name in SINCE_3}
"""Columns of tables that runs of older schemas do not have."""

_ERASURES = 100
"""So many patients may have been erased from one shard for it to be recognised."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs in one array or column of one shard."""

    shard: str
    where: str  # `features.zarr/hybrid`, `predictions/confidence`
    values: int  # that differ; all of them where shapes or types do
    of: int
    largest: float | None  # largest absolute difference; None for what is no number


@dataclass(frozen=True, slots=True)
class Compared:
    """One shard: how many values were compared in what, and what differs."""

    shard: str
    images: int
    left_out: int  # images of patients that were erased: their cells, masks and features
    values: tuple[tuple[str, int], ...]
    differences: tuple[Difference, ...]
    not_stored: tuple[str, ...]  # what computing again gives and the run does not have
    host: Host


# --- values ---------------------------------------------------------------------------------------------------------


def compare_arrays(shard: str, where: str, stored: NDArray[Any], again: NDArray[Any]) -> Difference | None:
    """Say how two arrays differ, bit for bit: other bits of the same number (-0.0 and 0.0) are a difference, too."""
    if stored.shape != again.shape or stored.dtype != again.dtype:
        return Difference(shard, where, stored.size, stored.size, None)
    a, b = (np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}") for x in (stored, again))
    differs = a != b
    if not differs.any():
        return None
    apart = np.abs(stored[differs].astype(np.float64) - again[differs].astype(np.float64))
    return Difference(shard, where, int(differs.sum()), stored.size, float(np.max(apart)))


def compare_columns(shard: str, where: str, stored: pa.ChunkedArray, again: pa.ChunkedArray) -> Difference | None:
    """Say how two columns differ; None where they do not."""
    if len(stored) != len(again):
        return Difference(shard, where, len(stored), len(stored), None)
    if stored.type == again.type and stored.combine_chunks().equals(again.combine_chunks()):
        return None
    pairs = [(a, b) for a, b in zip(stored.to_pylist(), again.to_pylist(), strict=True) if a != b]
    if not pairs:  # Parquet names the entries of lists otherwise than Arrow does
        return None
    numbers = [abs(a - b) for a, b in pairs if isinstance(a, int | float) and isinstance(b, int | float)]
    return Difference(
        shard, where, len(pairs), len(stored), float(max(numbers)) if len(numbers) == len(pairs) else None
    )


# --- a shard --------------------------------------------------------------------------------------------------------


def recompute(job: ShardJob) -> None:
    """Take a shard through its stages, as the nightly run does."""
    first, before, features = job.shard.first, None, None
    while first < job.shard.first + job.shard.count:
        block = prepare(job, first)
        segmented = segment(job, block, before)
        before, features, first = written_by(segmented), extract(job, segmented, features), block.next
    classify(job, features)


def reproduce_shard(job: ShardJob, root: str, files: Sequence[tuple[str, str]]) -> Compared:
    """Compute a shard again below `job.root` and hold it against the run at `root`.

    `files` names the Parquet file of each table that has the shard's rows.
    """
    scratch, stored = open_storage(job.root), open_storage(root)
    recompute(job)
    try:
        return _compare(job, scratch, stored, dict(files))
    finally:
        _clear(scratch, job)


def _compare(job: ShardJob, scratch: Storage, stored: Storage, files: dict[str, str]) -> Compared:
    shard = job.shard.name
    values: list[tuple[str, int]] = []
    found: list[Difference] = []
    absent: list[str] = []
    rows = {name: rows_of_shard(stored, files[name], job.shard.ordinal) for name in TABLES}
    gone = _erased(job, stored, rows[RunKey.PREDICTIONS])
    for name in TABLES:
        mine = rows_of_shard(scratch, RunKey.part(name, shard), job.shard.ordinal)
        theirs = rows[name]
        if name == RunKey.CELLS and gone and len(mine) == len(theirs):
            kept = pa.array([key not in gone for key in theirs["image_key"].to_pylist()], pa.bool_())
            mine, theirs = mine.filter(kept), theirs.filter(kept)
        for column in dict.fromkeys([*theirs.column_names, *mine.column_names]):
            where = f"{name}/{column}"
            if (name, column) in _LATER and column not in theirs.column_names:
                continue  # a run of an older schema has nothing to compare it with
            if column not in theirs.column_names or column not in mine.column_names:
                found.append(Difference(shard, where, len(theirs), len(theirs), None))
                continue
            values.append((where, len(theirs)))
            again = mine[column]
            if where == "predictions/um_per_px" and "um_per_px_stated" not in theirs.column_names:
                again = mine["um_per_px_stated"]  # which is what it was until schema 3
            stored_column = _in_todays_words(theirs[column]) if column == "reason" else theirs[column]
            found += _some(compare_columns(shard, where, stored_column, again))
    tiles, cells = _places(stored, shard, rows[RunKey.PREDICTIONS], gone)
    for top in RunKey.STORES:
        group_key = RunKey.group(top, shard)
        if not scratch.exists(f"{group_key}/zarr.json"):
            continue
        if not stored.exists(f"{group_key}/zarr.json"):
            absent.append(group_key)
            continue
        mine_group = zarr.open_group(scratch.zarr(group_key, read_only=True), mode="r")
        their_group = zarr.open_group(stored.zarr(group_key, read_only=True), mode="r")
        names = dict.fromkeys([*sorted(their_group.array_keys()), *sorted(mine_group.array_keys())])
        for array in names:
            where = f"{top}/{array}"
            if array not in their_group or array not in mine_group:
                found.append(Difference(shard, where, 0, 0, None))
                continue
            a, b = (np.asarray(group[array][:]) for group in (their_group, mine_group))  # type: ignore[index]
            if gone and a.shape == b.shape:  # rows of erased images are zeros in the run
                kind = rows_of(top, array, a.shape[0], len(tiles), len(cells))
                kept_rows = {"tiles": tiles, "cells": cells, None: np.ones(a.shape[0], bool)}[kind]
                a, b = a[kept_rows], b[kept_rows]
            values.append((where, int(a.size)))
            found += _some(compare_arrays(shard, where, a, b))
    return Compared(shard, job.shard.count, len(gone), tuple(values), tuple(found), tuple(absent), this_host())


def _in_todays_words(reasons: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([read_reason(r) for r in reasons.to_pylist()], reasons.type)])


def _some(found: Difference | None) -> list[Difference]:
    return [] if found is None else [found]


def _erased(job: ShardJob, stored: Storage, rows: pa.Table) -> set[str]:
    """Find the images from which a patient was erased: their parts' key says so, and they have no identity."""
    marker = read_marker(stored, Stage.MASKS, job.shard)
    members, bundle = members_of(job), opened_bundle(job.bundle, job.bundle_digest)
    keys = {stage_keys(bundle, members, device)[Stage.MASKS] for device in ("cpu", "cuda")}
    if marker is None or marker.part.key in keys:
        return set()
    for _ in range(_ERASURES):
        keys = {erased_key(key) for key in keys}
        if marker.part.key in keys:
            break
    else:  # made by another revision of the stage
        return set()
    names = ["slide_id", "patient_id", *(n for n in rows.column_names if n.startswith(META_PREFIX))]
    return {r["image_key"] for r in rows.select(["image_key", *names]).to_pylist() if not any(r[n] for n in names)}


def _places(stored: Storage, shard: str, rows: pa.Table, gone: set[str]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Say which tiles and which cells of a shard are compared: bool [tiles], bool [cells]."""
    group: Any = zarr.open_group(stored.zarr(RunKey.group(RunKey.MASKS, shard), read_only=True), mode="r")
    offsets = np.asarray(group["cell_offsets"][:], np.int64) if "cell_offsets" in group else np.zeros(1, np.int64)
    tiles, cells = np.ones(max(0, len(offsets) - 1), bool), np.ones(int(offsets[-1]) if len(offsets) else 0, bool)
    for row in rows.select(["image_key", "zarr_index", "n_tiles"]).to_pylist():
        if row["image_key"] in gone and row["zarr_index"] is not None:
            first, last = row["zarr_index"], row["zarr_index"] + row["n_tiles"]
            tiles[first:last] = False
            cells[offsets[first] : offsets[last]] = False
    return tiles, cells


def rows_of_shard(storage: Storage, key: str, ordinal: int) -> pa.Table:
    """Read a shard's rows from its own file or a merged one, of which only the row groups with them are read."""
    with storage.open(key) as file:
        reader = pq.ParquetFile(file)
        counts = shard_counts_of(reader.metadata)
        if counts is None:
            return reader.read()
        first = sum(n for other, n in counts if other < ordinal)
        wanted = dict(counts)[ordinal]
        groups: list[int] = []
        before = begin = 0
        for i in range(reader.num_row_groups):
            size = reader.metadata.row_group(i).num_rows
            if before + size > first and before < first + wanted:
                begin = before if not groups else begin
                groups.append(i)
            before += size
        if not groups:
            return reader.schema_arrow.empty_table()
        return reader.read_row_groups(groups).slice(first - begin, wanted)


def _clear(scratch: Storage, job: ShardJob) -> None:
    for top in RunKey.STORES:
        scratch.delete(RunKey.group(top, job.shard.name))
    for name in TABLES:
        scratch.delete(RunKey.part(name, job.shard.name))
    for stage in STAGES:
        scratch.delete(marker_key(stage, job.shard))
    scratch.delete(attempt_prefix(job.shard, job.attempt))
    if job.spool is not None:
        scratch.delete(job.spool)
