"""Keep what a worker process needs for many shards (bundle, networks, decoder, plan), and guard its stages."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pyarrow.parquet as pq
from distributed import get_worker

from leukoflow.cluster.code import code_digest
from leukoflow.cluster.telemetry import stage_telemetry
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import AttemptError, ClusterError, ShardError, StorageError
from leukoflow.core.method import SegmentSettings
from leukoflow.models.bundle import Bundle, load_bundle
from leukoflow.models.hybrid_cn_nas import Readout
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import Member, Shard
from leukoflow.sources.reading import Reader, open_reader
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.decoding.ingest import Decoder
from leukoflow.tasks.imaging.classify import readout
from leukoflow.tasks.imaging.scale import settle_scale, stated_scale
from leukoflow.tasks.inference.rows import check_storable
from leukoflow.tasks.intake.plan_file import read_shard
from leukoflow.tasks.store.job import ShardJob, attempt_prefix, started_key
from leukoflow.tasks.store.scales import StoredScale, read_scales

NOTE_SECONDS = 60.0
"""How long a process that has exceeded its time may take to leave a note of why it ends."""


@lru_cache(maxsize=4)
def opened_bundle(name: str, digest: str) -> Bundle:
    """Open the bundle, checked once per process.

    Raises:
        ShardError: this machine has another one under the name.
        BundleError: a run cannot store what a bundle with these classes says.
    """
    bundle = load_bundle(name, digest)
    if bundle.digest != digest:
        raise ShardError(
            f"bundle {name} is {bundle.digest[:12]} on this worker, the run wants {digest[:12]}; install the same one"
        )
    check_storable(bundle)
    return bundle


def load_models(bundle: str, digest: str, device: str) -> None:
    """Load all of a bundle's models into this process, so that the first shard finds them there."""
    for part in ("segmenter", "hybrid", "classifier"):
        component(bundle, digest, device, part)


@lru_cache(maxsize=6)
def component(bundle: str, digest: str, device: str, part: str) -> Any:
    """Load a component (`segmenter`, `hybrid`, `classifier`) once per process."""
    return getattr(opened_bundle(bundle, digest), part)(device)


@lru_cache(maxsize=2)
def readout_of(bundle: str, digest: str, device: str) -> Readout:
    """Make what activation maps show, once per process: the classifier's evidence as a function of features."""
    return readout(opened_bundle(bundle, digest), component(bundle, digest, device, "classifier"), device)


@lru_cache(maxsize=1)
def decoder_of(limits: LimitSettings, settings: str) -> Decoder:
    """Return this process's disposable decoding child."""
    return Decoder(limits, SegmentSettings.model_validate_json(settings))


def open_plan(root: str) -> pq.ParquetFile:
    """Open the frozen plan; its footer is read once per process. For one thread: others use `planned`."""
    return _opened_table(root, RunKey.PLAN, open_storage(root).stamp(RunKey.PLAN))


@lru_cache(maxsize=4)
def _opened_table(root: str, key: str, stamp: str) -> pq.ParquetFile:
    """Open a table; `stamp` changes with a run that was deleted and started again while this process lived on."""
    storage = open_storage(root)
    return pq.ParquetFile(storage.uri(key) if storage.is_local else storage.open(key))


_plan_lock = threading.Lock()


def planned(root: str, shard: Shard) -> list[Member]:
    """Read a shard's members from the frozen plan. One reader serves one thread at a time."""
    with _plan_lock:
        return read_shard(open_plan(root), shard.ordinal)


def scaled(root: str, shard: Shard, settings: SegmentSettings) -> list[Member]:
    """Read a shard's members from the frozen plan, each with its scale.

    A run that older versions have started has no `scales.parquet`; its images have the scale that was stated.
    """
    members, storage = planned(root, shard), open_storage(root)
    stored: Sequence[StoredScale | None] = [None] * len(members)
    with suppress(FileNotFoundError), _plan_lock:
        stored = read_scales(_opened_table(root, RunKey.SCALES, storage.stamp(RunKey.SCALES)), shard.ordinal)
    return [
        replace(
            member,
            scale=stated_scale(member.um_per_px)
            if one is None
            else settle_scale(member.um_per_px, one.of_file, one.found, settings),
        )
        for member, one in zip(members, stored, strict=True)
    ]


def members_of(job: ShardJob) -> list[Member]:
    """Read the members of the job's shard from the frozen plan, each with its scale."""
    return scaled(job.root, job.shard, opened_bundle(job.bundle, job.bundle_digest).spec.method.segment)


@contextmanager
def opened_reader(job: ShardJob) -> Iterator[Reader]:
    """Open the source's members; those of a compressed tar from the shard's spooled bytes."""
    bound = job.limits.max_member_mb << 20
    if job.spool is None:
        with open_reader(job.source, member_bytes=bound) as reader:
            yield reader
        return
    storage = open_storage(job.root)
    with tempfile.NamedTemporaryFile(prefix="leukoflow-spool-") as local:
        path = storage.uri(job.spool)
        if not storage.is_local:
            for piece in storage.pieces(job.spool):
                local.write(piece)
            local.flush()
            path = local.name
        with open_reader(job.source, spool_file=path, member_bytes=bound) as reader:
            yield reader


def _current_task() -> str | None:
    """Return the key of the Dask task that runs here, None outside of Dask."""
    try:
        return str(get_worker().get_current_task())
    except ValueError:
        return None


@contextmanager
def guarded(job: ShardJob, stage: str) -> Iterator[None]:
    """Refuse other code, and end this process when the stage exceeds its time.

    The clock starts with the processing, not with submission. A thread cannot be interrupted, so the process goes; the
    nanny restarts it and Prefect sees the death. The note left behind says why.
    """
    if job.code != code_digest():
        raise ClusterError(
            f"this worker runs other code ({code_digest()}) than the flow ({job.code}); restart the workers"
        )
    if (task := _current_task()) is not None and not open_storage(job.root).create(started_key(job, task), b""):
        raise AttemptError(f"shard {job.shard.name}: results of its {stage} were lost with a worker")
    limit = job.limits.stage_seconds

    def give_up() -> None:
        note = {
            "stage": stage,
            "message": f"stage {stage} ran longer than its limit of {limit:.0f} s (limits.stage_seconds)",
        }
        last = threading.Timer(NOTE_SECONDS, os._exit, (75,))  # for a store that never answers
        last.daemon = True
        last.start()
        try:
            open_storage(job.root).write(
                f"{attempt_prefix(job.shard, job.attempt)}/timeout.json", json.dumps(note).encode()
            )
        finally:  # also where no note can be written: the process must go
            os._exit(75)

    timer = threading.Timer(limit, give_up)
    timer.daemon = True
    timer.start()
    try:
        with stage_telemetry(job.run_id, job.shard.name, stage):
            yield
    finally:
        timer.cancel()
        _sweep_up(job)


def _sweep_up(job: ShardJob) -> None:
    """Remove the attempt if the run is finished: the task of a flow that was killed may end after another one's."""
    if job.only is not None:
        return
    storage = open_storage(job.root)
    with suppress(StorageError):
        if storage.exists(RunKey.MANIFEST):
            storage.delete(attempt_prefix(job.shard, job.attempt))
            storage.prune(RunKey.attempt(job.shard.name))
