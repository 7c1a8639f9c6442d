"""Reading of a run's Parquet files column by column, with the errors in our own words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.core.errors import RunNotFoundError, StorageError, words_of
from leukoflow.runs.layout import RunKey
from leukoflow.runs.schema import PREDICTIONS
from leukoflow.storage.base import Storage

PROBABILITIES = ("prob_benign", "prob_early", "prob_pre", "prob_pro")
READERS = 8
"""Files that are read at the same time from where each answer is waited for."""


@contextmanager
def translate_read_errors(run_id: str) -> Iterator[None]:
    """Turn what reading a run's files may raise into RunNotFoundError or StorageError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise RunNotFoundError(
            f"run {run_id} is not there any more, or some of it is gone; if it was compacted just now, try again"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise StorageError(
            f"run {run_id} cannot be read ({words_of(error)}); `leukoflow verify` says what to do"
        ) from None


def read_columns(run: Storage, keys: Sequence[str], columns: Sequence[str], where: Any = None) -> pa.Table:
    """Read columns of `predictions/` files, in order; a column that a file lacks is null.

    `where` is an Arrow expression.
    """
    schema = pa.schema([pa.field(name, PREDICTIONS.field(name).type) for name in columns])
    if not keys:
        return schema.empty_table()

    def one(key: str) -> pa.Table:
        if run.is_local:
            return _read(pq.ParquetFile(pa.OSFile(run.uri(key))), schema)
        with run.open(key) as file:
            return _read(pq.ParquetFile(file), schema)

    # A slice of the files for each thread: handing out single ones would cost as much as reading them.
    threads = min(READERS, os.cpu_count() or 1) if run.is_local else READERS
    size = -(-len(keys) // threads)
    slices = [keys[i : i + size] for i in range(0, len(keys), size)]
    with ThreadPoolExecutor(len(slices)) as pool:
        tables = list(pool.map(lambda own: [one(key) for key in own], slices))
    table = pa.concat_tables([t for own in tables for t in own])
    return table if where is None else table.filter(where)


def _read(reader: pq.ParquetFile, schema: pa.Schema) -> pa.Table:
    """Read the columns of a schema, those that are absent as nulls."""
    with reader:
        present = set(reader.schema_arrow.names)
        found = reader.read(columns=[name for name in schema.names if name in present], use_threads=False)
    arrays = [found[f.name] if f.name in present else pa.nulls(len(found), f.type) for f in schema]
    return pa.table(
        [a if a.type == f.type else a.cast(f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema
    )


def read_plan_column(run: Storage, name: str) -> pa.ChunkedArray:
    """Read a column of the plan, one value for each image."""
    with run.open(RunKey.PLAN) as file:
        return pq.ParquetFile(file).read(columns=[name])[name]
