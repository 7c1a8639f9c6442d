"""Describe the work on one shard, and write what an attempt at it leaves where no other attempt writes."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.core.config import LimitSettings
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import Shard, Source
from leukoflow.storage.opening import open_storage


@dataclass(frozen=True, slots=True)
class ShardJob:
    """Everything a worker needs to know about a shard: small, and the same for all tasks of its chain."""

    root: str  # storage URI of the run
    run_id: str
    source: Source
    shard: Shard
    attempt: str
    bundle: str
    bundle_digest: str
    device: str
    code: str  # digest of the code that the flow runs
    limits: LimitSettings
    meta_columns: tuple[str, ...]
    spool: str | None = None  # key of the shard's spooled bytes (compressed tars)
    culprits: tuple[tuple[int, str], ...] = ()  # (ordinal, reason): members known to kill their worker
    only: tuple[int, ...] | None = None  # when searching for culprits: nothing else is touched, nothing written


def attempt_prefix(shard: Shard, attempt: str) -> str:
    """Return the key prefix below which an attempt writes; nobody else does."""
    return RunKey.attempt(f"{shard.name}/{attempt}")


def started_key(job: ShardJob, task: str) -> str:
    """Return the key of what a Dask task leaves behind when it begins: it shows who ran on a worker that died.

    It also keeps an attempt from running a stage twice, as Dask does to replace results that a dead worker held: the
    second one would write into what the stages after it have written since.
    """
    return f"{attempt_prefix(job.shard, job.attempt)}/started/{task}"


def write_parquet(job: ShardJob, name: str, table: pa.Table) -> None:
    """Write one part, whole, below the attempt."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, store_schema=True)
    open_storage(job.root).write(f"{attempt_prefix(job.shard, job.attempt)}/{name}", sink.getvalue())
