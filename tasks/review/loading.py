"""Reading of a run into a snapshot: only the columns that lists need, once for each state of the run."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from leukoflow.core.errors import LeukoflowError, StorageError
from leukoflow.runs.layout import RunKey, Stage
from leukoflow.runs.progress import ProgressReader, read_manifest
from leukoflow.runs.schema import SCHEMA_VERSION
from leukoflow.storage.base import Storage
from leukoflow.tasks.intake.plan_file import read_summary
from leukoflow.tasks.review.columns import read_columns, read_plan_column, translate_read_errors
from leukoflow.tasks.review.frame import COLUMNS, Frame
from leukoflow.tasks.review.snapshot import Snapshot
from leukoflow.tasks.store.tables import shard_name, table_files


def load_finished(run: Storage, run_id: str, stamp: str, patient: str | None = None) -> Snapshot:
    """Read a finished run, or of it the rows of one patient.

    Raises FileNotFoundError where there is no manifest, StorageError where the run is damaged or too new.
    """
    manifest = read_manifest(run)
    if manifest is None:
        raise FileNotFoundError
    if manifest.schema_version > SCHEMA_VERSION:
        raise StorageError(
            f"run {run_id} was written by a newer leukoflow (schema {manifest.schema_version}, this one knows "
            f"{SCHEMA_VERSION}): look at it with that one"
        )
    if manifest.shard_size < 1:
        raise StorageError(f"run {run_id}: its manifest is damaged; `leukoflow verify` says what to do")
    listed = table_files(manifest.parts, RunKey.PREDICTIONS)
    keys = [f.key for f in listed]
    where = None if patient is None else pc.field("patient_id") == patient
    table = read_columns(run, keys, COLUMNS, where)
    ordinals = np.arange(len(table), dtype=np.int64)
    if patient is not None:  # rows are in the plan's order
        planned = read_plan_column(run, "patient_id")
        ordinals = np.flatnonzero(pc.fill_null(pc.equal(planned, patient), False).to_numpy())
        if len(ordinals) != len(table):
            raise StorageError(f"run {run_id}: plan and predictions differ; `leukoflow verify` says what to do")

    def later(name: str) -> pa.ChunkedArray:
        with translate_read_errors(run_id):
            if name == "image_key":  # one file instead of hundreds; publishing has compared the two
                names = read_plan_column(run, name)
                return names if patient is None else names.take(pa.array(ordinals))
            if patient is None:
                return read_columns(run, keys, [name])[name]
            return read_columns(run, keys, [name, "patient_id"], where)[name]

    return Snapshot(
        run=run,
        run_id=run_id,
        stamp=stamp,
        frame=Frame(table, ordinals, later),
        manifest=manifest,
        progress=None,
        fingerprint=manifest.fingerprint,
        shard_size=manifest.shard_size,
        files={shard_name(ordinal): f.key for f in listed for ordinal in f.shards},
        missing=known_missing(manifest.missing, manifest.config),
        ignored=manifest.ignored,
        truncated=manifest.source_truncated,
    )


def load_in_progress(run: Storage, run_id: str, reader: ProgressReader, before: Snapshot | None) -> Snapshot:
    """Read what is committed so far; shards that are in the snapshot `before` are not read again."""
    progress, binding = reader.read(), reader.binding()
    committed = sorted(
        (
            name.removesuffix(".json")
            for name in run.names(RunKey.markers(Stage.PREDICTIONS))
            if name.removesuffix(".json").isdecimal()
        ),
        key=int,
    )
    pieces = before.pieces if before is not None and before.manifest is None else {}
    found: dict[str, pa.Table] = {}
    for shard in committed:
        try:
            found[shard] = pieces.get(shard) or read_columns(run, [RunKey.part(RunKey.PREDICTIONS, shard)], COLUMNS)
        except FileNotFoundError:
            continue  # committed, but not moved to its place yet
    stamp = ",".join(found)
    if before is not None and before.manifest is None and before.stamp == stamp:
        before.progress = progress
        return before
    ignored, missing, truncated = 0, 0, None
    try:
        with run.open(RunKey.PLAN) as file:
            summary = read_summary(file)
        ignored, missing, truncated = summary.ignored, summary.missing, summary.truncated
    except (FileNotFoundError, LeukoflowError, pa.ArrowException):
        pass  # it is being planned
    table = pa.concat_tables(found.values()) if found else read_columns(run, [], COLUMNS)
    ordinals = [np.arange(len(t), dtype=np.int64) + int(shard) * binding.shard_size for shard, t in found.items()]
    files = {shard: RunKey.part(RunKey.PREDICTIONS, shard) for shard in found}

    def later(name: str) -> pa.ChunkedArray:
        with translate_read_errors(run_id):
            return read_columns(run, list(files.values()), [name])[name]

    return Snapshot(
        run=run,
        run_id=run_id,
        stamp=stamp,
        frame=Frame(table, np.concatenate(ordinals) if ordinals else np.zeros(0, np.int64), later),
        manifest=None,
        progress=progress,
        fingerprint=binding.fingerprint,
        shard_size=max(1, binding.shard_size),
        files=files,
        missing=known_missing(missing, binding.config),
        ignored=ignored,
        truncated=truncated,
        pieces=found,
    )


def known_missing(count: int, config: str) -> int | None:
    """Return how many listed images were not handed over; None where the settings name no manifest that lists any."""
    listed = not config or json.loads(config).get("manifest") is not None
    return count if listed or count else None
