"""The chain of one shard: prepare, segment, extract, classify. Each is one plain Dask task per block of members.

A stage reads what it needs, calls the pure functions of its own module, writes below the shard's attempt, and the last
block's task commits: a marker that is created only if absent names the winning attempt, and its files move to their
final keys. A shard is one block unless its images are large; blocks bound what is decoded at any time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zarr
from distributed import get_worker
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from leukoflow.cluster.code import code_digest
from leukoflow.cluster.host import this_host
from leukoflow.cluster.telemetry import told
from leukoflow.core.codec import dumps, loads
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import AttemptError, ClusterError, ShardError, StorageError
from leukoflow.core.method import SegmentSettings
from leukoflow.models.bundle import Bundle, load_bundle
from leukoflow.models.hybrid_cn_nas import Readout
from leukoflow.runs.records import (
    CLASSES,
    DIED,
    Marker,
    Member,
    PartRef,
    Quality,
    Shard,
    ShardReceipt,
    Source,
    StageTiming,
    Status,
)
from leukoflow.runs.schema import predictions_schema
from leukoflow.sources.members import Reader, open_reader
from leukoflow.storage.base import Storage
from leukoflow.tasks.decoding.ingest import Decoder, ingest
from leukoflow.tasks.imaging.classify import Verdict, diagnose, pool_tiles, readout
from leukoflow.tasks.imaging.segment import CellTable, concatenate
from leukoflow.tasks.inference.blocks import (
    Block,
    Fact,
    Prepared,
    block_of,
    cell_rows,
    explain_tiles,
    outcome,
    prepare_image,
    refused,
    segment_tiles,
)
from leukoflow.tasks.intake.plan import read_shard

ACTIVATIONS = "activations"
"""The stage that no other is made from: a shard may lack it and yet be whole. It is made while the pixels are there."""
STAGES = ("masks", "features", ACTIVATIONS, "predictions")
REVISIONS = {"masks": 4, "features": 1, ACTIVATIONS: 1, "predictions": 2}
"""Raised when a stage's code changes what it writes; part of every content key."""

ARRAYS = {
    "masks.zarr": ("semantic", "cells", "to_source", "cell_table", "cell_offsets"),
    "features.zarr": ("hybrid", "cells", "cell_offsets"),
    "activations.zarr": ("maps",),
}
"""What a shard's group holds in each store."""

ZARR_CHUNK, ZARR_SHARD = 10, 250

NOTE_SECONDS = 60.0
"""How long a process that has exceeded its time may take to leave a note of why it ends."""

_PROBABILITIES = ("prob_benign", "prob_early", "prob_pre", "prob_pro")


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


@dataclass(frozen=True, slots=True)
class Trail:
    """What one block's task hands to the same stage's task of the next block: all that was written so far."""

    facts: tuple[Fact, ...] = ()
    rows: int = 0
    cells: int = 0
    timings: tuple[StageTiming, ...] = ()


@dataclass(frozen=True, slots=True)
class Segmented:
    """A block with its cells: `cells` uint16 [t, S, S], `table` rows grouped by tile, `offsets` into it."""

    block: Block
    cells: NDArray[np.uint16]
    table: CellTable
    offsets: NDArray[np.int64]
    trail: Trail


# --- keys and markers ------------------------------------------------------------------------------------------------


def stage_keys(bundle: Bundle, members: Sequence[Member], device: str) -> dict[str, str]:
    """Content address of each stage of a shard: what it is made from, upstream's key included."""
    who = hashlib.sha256()
    for m in members:
        who.update(repr((m.image_key, m.identity, m.refusal, m.um_per_px)).encode())
    manifest = repr([(m.slide_id, m.patient_id, m.site, m.scanner, m.meta) for m in members])
    chain, keys = who.hexdigest(), {}
    for stage, component, extra in (
        ("masks", "segmenter", device),
        ("features", "features", device),
        (ACTIVATIONS, "classifier", device),
        ("predictions", "classifier", manifest),
    ):
        parts = (stage, REVISIONS[stage], bundle.component_digest(component), extra, chain)  # type: ignore[arg-type]
        keys[stage] = hashlib.sha256(repr(parts).encode()).hexdigest()
        if stage != ACTIVATIONS:  # predictions are made from features alone
            chain = keys[stage]
    return keys


def marker_key(stage: str, shard: Shard) -> str:
    """Key of a stage's marker."""
    return f"markers/{stage}/{shard.name}.json"


def read_marker(storage: Storage, stage: str, shard: Shard) -> Marker | None:
    """The marker, or None while the stage is not committed."""
    key = marker_key(stage, shard)
    try:
        return loads(Marker, storage.read(key), storage.uri(key))
    except FileNotFoundError:
        return None


def attempt_prefix(shard: Shard, attempt: str) -> str:
    """Where an attempt writes; nobody else does."""
    return f"_attempts/{shard.name}/{attempt}"


def committed(storage: Storage, shard: Shard, keys: dict[str, str]) -> dict[str, Marker]:
    """The stages of a shard whose parts are there, unaltered and made from what they should be made from.

    A marker whose files have not been moved yet (its writer died in between) is completed here. A marker that does not
    hold is deleted together with those of the stages that follow, so that they are done again. Activation maps that do
    not hold are deleted alone: making them again would cost all pixels, and no prediction depends on them.
    """
    found: dict[str, Marker] = {}
    for i, stage in enumerate(STAGES):
        marker = read_marker(storage, stage, shard)
        if marker is not None and marker.part.key == keys[stage] and _settled(storage, marker.part):
            found[stage] = marker
            continue
        if stage == ACTIVATIONS:
            if marker is not None:
                storage.delete(marker_key(stage, shard))
                storage.delete(f"activations.zarr/{shard.name}")
            continue
        for later in STAGES[i:]:
            if read_marker(storage, later, shard) is not None:
                storage.delete(marker_key(later, shard))
        break
    return found


def _settled(storage: Storage, part: PartRef) -> bool:
    if storage.intact(part.files):
        return True
    shard = Shard(int(part.shard), 0, 0)
    storage.promote(attempt_prefix(shard, part.attempt), part.files)
    return storage.intact(part.files)


def forget(storage: Storage, shard: Shard) -> None:
    """Takes back all commits of a shard; its stages are done again."""
    for stage in reversed(STAGES):
        storage.delete(marker_key(stage, shard))


def known_culprits(job: ShardJob) -> tuple[tuple[int, str], ...]:
    """The members that the committed masks leave out because they kill their worker."""
    facts = read_facts(job.root, job.shard)
    return tuple((f.ordinal, f.reason) for f in facts if f.reason is not None and f.reason.startswith(DIED))


def commit(job: ShardJob, stage: str, key: str, roots: Sequence[str], receipt: ShardReceipt | None = None) -> Marker:
    """Digests what the attempt wrote below `roots`, creates the marker, and moves the files to their final keys.

    When another attempt was first, its marker stands and this attempt's files are left for the clean-up.
    """
    storage = Storage(job.root)
    prefix = attempt_prefix(job.shard, job.attempt)
    attempt = storage.child(prefix)
    with ThreadPoolExecutor(len(roots)) as pool:
        files = tuple(file for found in pool.map(partial(digests_below, attempt), roots) for file in found)
    part = PartRef(stage, job.shard.name, job.attempt, key, files)
    _sign(job.root)
    marker = Marker(part, receipt)
    if storage.create(marker_key(stage, job.shard), dumps(marker)):
        storage.promote(prefix, part.files)
        return marker
    first = read_marker(storage, stage, job.shard)
    if first is None or not _settled(storage, first.part):
        raise StorageError(
            f"shard {job.shard.name}: the marker of stage {stage} does not match its files; it is redone"
        )
    return first


@lru_cache(maxsize=32)
def _sign(root: str) -> None:
    """Leaves a note in the run of what machine commits here, once per process; alike machines leave the same one."""
    note = dumps(this_host())
    Storage(root).create(f"hosts/{hashlib.sha256(note).hexdigest()[:16]}.json", note)


def digests_below(storage: Storage, root: str) -> list[tuple[str, int, str]]:
    """(key, bytes, sha256) of one Parquet file, or of all files of a shard's Zarr group that was written just now.

    An object store's listing may lag behind what was written, and a chunk that is left out would be read as zeros. So
    there the keys follow from the arrays' metadata; a chunk that holds nothing but zeros is not written.
    """
    if root.endswith(".parquet"):
        return [storage.digest(root)]
    if storage.is_local:
        return [storage.digest(key) for key in storage.files(root)]
    group = zarr.open_group(storage.zarr(root, read_only=True), mode="r", zarr_format=3)
    needed, chunks = {f"{root}/zarr.json"}, set()
    for name, array in _arrays_of(group, ARRAYS[root.split("/")[0]]):
        needed.add(f"{root}/{name}/zarr.json")
        grid = [-(-n // c) for n, c in zip(array.shape, array.shards or array.chunks, strict=True)]
        chunks |= {f"{root}/{name}/{array.metadata.encode_chunk_key(place)}" for place in np.ndindex(*grid)}
    found = sorted(storage.digests(needed | chunks, absent=True))
    if lost := needed - {key for key, _, _ in found}:
        raise FileNotFoundError(storage.uri(min(lost)))
    return found


def adopt_stages(job: ShardJob, other: Storage, keys: dict[str, str], done: dict[str, Marker]) -> dict[str, Marker]:
    """Takes masks, features and activation maps from another run where they were made from the very same things."""
    storage, found = Storage(job.root), dict(done)
    prefix = attempt_prefix(job.shard, job.attempt)
    for stage in ("masks", "features", ACTIVATIONS):
        if stage in found:
            continue
        theirs = read_marker(other, stage, job.shard)
        if theirs is None or theirs.part.key != keys[stage] or not other.intact(theirs.part.files):
            break
        storage.adopt(other, theirs.part.files, prefix)
        mine = Marker(replace(theirs.part, attempt=job.attempt))
        if storage.create(marker_key(stage, job.shard), dumps(mine)):
            storage.promote(prefix, mine.part.files)
        found[stage] = mine
    return found


# --- what a worker process keeps -------------------------------------------------------------------------------------


@lru_cache(maxsize=6)
def _models(bundle: str, digest: str, device: str, part: str) -> Any:
    """A component, loaded once per process."""
    return getattr(opened_bundle(bundle, digest), part)(device)


@lru_cache(maxsize=2)
def _readout(bundle: str, digest: str, device: str) -> Readout:
    """What activation maps show: the classifier's evidence as a function of features, made once per process."""
    return readout(opened_bundle(bundle, digest), _models(bundle, digest, device, "classifier"), device)


@lru_cache(maxsize=4)
def opened_bundle(name: str, digest: str) -> Bundle:
    """The bundle, checked once per process. Raises ShardError when this machine has another one under the name."""
    bundle = load_bundle(name, digest)
    if bundle.digest != digest:
        raise ShardError(
            f"bundle {name} is {bundle.digest[:12]} on this worker, the run wants {digest[:12]}; install the same one"
        )
    return bundle


def load_models(bundle: str, digest: str, device: str) -> None:
    """Loads all of a bundle's models into this process, so that the first shard finds them there."""
    for part in ("segmenter", "hybrid", "classifier"):
        _models(bundle, digest, device, part)


@lru_cache(maxsize=1)
def _decoder(limits: LimitSettings, settings: str) -> Decoder:
    """This process's disposable decoding child."""
    return Decoder(limits, SegmentSettings.model_validate_json(settings))


def open_plan(root: str) -> pq.ParquetFile:
    """The frozen plan; its footer is read once per process. For one thread: others use `planned`."""
    return _open_plan(root, Storage(root).stamp("plan.parquet"))


@lru_cache(maxsize=2)
def _open_plan(root: str, stamp: str) -> pq.ParquetFile:
    """`stamp` tells a plan from that of a run which was deleted and begun anew while this process lived on."""
    storage = Storage(root)
    return pq.ParquetFile(storage.uri("plan.parquet") if storage.is_local else storage.open("plan.parquet"))


_plan_lock = threading.Lock()


def planned(root: str, shard: Shard) -> list[Member]:
    """A shard's members, from the frozen plan. One reader serves one thread at a time."""
    with _plan_lock:
        return read_shard(open_plan(root), shard.ordinal)


def members_of(job: ShardJob) -> list[Member]:
    """The shard's members, from the frozen plan."""
    return planned(job.root, job.shard)


def started_key(job: ShardJob, task: str) -> str:
    """Left behind by a Dask task when it begins: tells who ran on a worker that died from who waited there.

    It also keeps an attempt from running a stage twice, as Dask does to replace results that a dead worker held: the
    second one would write into what the stages after it have written since.
    """
    return f"{attempt_prefix(job.shard, job.attempt)}/started/{task}"


def _current_task() -> str | None:
    """Key of the Dask task that runs here, None outside of Dask."""
    try:
        return str(get_worker().get_current_task())
    except ValueError:
        return None


@contextmanager
def _guard(job: ShardJob, stage: str) -> Iterator[None]:
    """Refuses other code, and ends this process when the stage exceeds its time.

    The clock starts with the processing, not with submission. A thread cannot be interrupted, so the process goes; the
    nanny restarts it and Prefect sees the death. The note left behind tells the flow why.
    """
    if job.code != code_digest():
        raise ClusterError(
            f"this worker runs other code ({code_digest()}) than the flow ({job.code}); restart the workers"
        )
    if (task := _current_task()) is not None and not Storage(job.root).create(started_key(job, task), b""):
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
            Storage(job.root).write(f"{attempt_prefix(job.shard, job.attempt)}/timeout.json", json.dumps(note).encode())
        finally:  # also where no note can be written: the process must go
            os._exit(75)

    timer = threading.Timer(limit, give_up)
    timer.daemon = True
    timer.start()
    try:
        with told(job.run_id, job.shard.name, stage):
            yield
    finally:
        timer.cancel()
        _sweep_up(job)


def _sweep_up(job: ShardJob) -> None:
    """Removes the attempt if the run is finished: the task of a flow that was killed may end after another one's."""
    if job.only is not None:
        return
    storage = Storage(job.root)
    with suppress(StorageError):
        if storage.exists("manifest.json"):
            storage.delete(attempt_prefix(job.shard, job.attempt))
            storage.prune(f"_attempts/{job.shard.name}")


# --- prepare ---------------------------------------------------------------------------------------------------------


def prepare(job: ShardJob, first: int) -> Block:
    """Reads, decodes, judges and normalises members from ordinal `first` on, until the block's bytes are spent."""
    started = time.perf_counter()
    with _guard(job, "prepare"):
        method = opened_bundle(job.bundle, job.bundle_digest).spec.method
        tile_bytes, budget = 3 * method.segment.field_px**2, job.limits.block_mb << 20
        culprits = dict(job.culprits)
        members = members_of(job)[first - job.shard.first :]
        wanted = [m for m in members if m.refusal is None and m.ordinal not in culprits and _looked_at(job, m.ordinal)]
        done: list[Prepared] = []
        tiles = 0
        with _reader(job) as reader:
            decoder = _decoder(job.limits, method.segment.model_dump_json())
            images = ingest(reader, wanted, job.limits, decoder)
            for member in members:
                if tiles * tile_bytes >= budget:
                    break
                refusal = member.refusal or culprits.get(member.ordinal)
                if refusal is not None or not _looked_at(job, member.ordinal):
                    done.append(Prepared(refused(member.ordinal, refusal or "not looked at")))
                    continue
                done.append(prepare_image(member.ordinal, next(images), member.um_per_px, method))
                tiles += len(done[-1].tiles)
        return block_of(first, done, method, time.perf_counter() - started)


def next_of(block: Block) -> int:
    """Ordinal of the first member after a block."""
    return block.next


def _looked_at(job: ShardJob, ordinal: int) -> bool:
    return job.only is None or ordinal in job.only


@contextmanager
def _reader(job: ShardJob) -> Iterator[Reader]:
    """The source's members; those of a compressed tar from the shard's spooled bytes."""
    bound = job.limits.max_member_mb << 20
    if job.spool is None:
        with open_reader(job.source, member_bytes=bound) as reader:
            yield reader
        return
    storage = Storage(job.root)
    with tempfile.NamedTemporaryFile(prefix="leukoflow-spool-") as local:
        path = storage.uri(job.spool)
        if not storage.is_local:
            for piece in storage.pieces(job.spool):
                local.write(piece)
            local.flush()
            path = local.name
        with open_reader(job.source, spool_file=path, member_bytes=bound) as reader:
            yield reader


# --- segment ---------------------------------------------------------------------------------------------------------


def segment(job: ShardJob, block: Block, before: Trail | None = None) -> Segmented:
    """U-Net and watershed over a block's tiles; writes `masks.zarr`; the last block writes `fields/` and commits."""
    started = time.perf_counter()
    with _guard(job, "segment"):
        bundle = opened_bundle(job.bundle, job.bundle_digest)
        model = _models(job.bundle, job.bundle_digest, job.device, "segmenter")
        semantic, cells, table, offsets = segment_tiles(model, block, bundle.spec.method.segment, job.device)
        n = len(semantic)
        before = before or Trail()
        facts = before.facts + _indexed(block.facts, before.rows)
        trail = Trail(facts, before.rows + n, before.cells + len(table), before.timings + block.timings)
        if job.only is None:
            _write_masks(job, block, semantic, cells, table, offsets, before)
            if block.next == job.shard.first + job.shard.count:
                _write_facts(job, facts)
                roots = (f"masks.zarr/{job.shard.name}", f"fields/part-{job.shard.name}.parquet")
                commit(job, "masks", _keys(job)["masks"], roots)
        timing = StageTiming("segment", time.perf_counter() - started, len(block.facts))
        return Segmented(block, cells, table, offsets, replace(trail, timings=(*trail.timings, timing)))


def recall(job: ShardJob, block: Block, before: Trail | None = None) -> Segmented:
    """A block with the cells that an earlier attempt or run has committed, instead of segmenting again."""
    with _guard(job, "segment"):
        before = before or Trail()
        facts = before.facts + _indexed(block.facts, before.rows)
        stored = {f.ordinal: f for f in read_facts(job.root, job.shard)}
        for fact in facts:
            if fact.sha256 != stored[fact.ordinal].sha256 or fact.zarr_index != stored[fact.ordinal].zarr_index:
                raise ShardError(
                    f"shard {job.shard.name}: member {fact.ordinal} is no longer what its masks were made from; "
                    "the source changed, so start a new run"
                )
        table, offsets, _ = read_cells(job.root, job.shard)
        rows = slice(before.rows, before.rows + len(block.tiles))
        piece = offsets[rows.start : rows.stop + 1]
        table = CellTable(*(getattr(table, f.name)[piece[0] : piece[-1]] for f in fields(CellTable)))
        trail = Trail(facts, rows.stop, before.cells + len(table), before.timings + block.timings)
        masks = _stored(job.root, f"masks.zarr/{job.shard.name}")
        cells = np.asarray(array_of(masks, "cells")[rows], np.uint16)
        return Segmented(block, cells, table, piece - piece[0], trail)


def trail_of(segmented: Segmented) -> Trail:
    """What the next block's task must know, without the pixels."""
    return segmented.trail


def _indexed(facts: Sequence[Fact], row: int) -> tuple[Fact, ...]:
    """Facts with the Zarr row of each member's first tile."""
    out = []
    for fact in facts:
        out.append(replace(fact, zarr_index=row) if fact.n_tiles else fact)
        row += fact.n_tiles
    return tuple(out)


def _write_masks(
    job: ShardJob,
    block: Block,
    semantic: NDArray[np.uint8],
    cells: NDArray[np.uint16],
    table: CellTable,
    offsets: NDArray[np.int64],
    before: Trail,
) -> None:
    group = _attempt_group(job, "masks.zarr")
    side = semantic.shape[1:]
    rows = np.stack([getattr(table, f.name).astype(np.float32) for f in fields(CellTable)], axis=1)
    classes = {"classes": {"0": "background", "1": "cytoplasm", "2": "nucleus"}}
    columns = {"columns": [f.name for f in fields(CellTable)]}
    write_arrays(
        group,
        ("semantic", before.rows, semantic, (ZARR_CHUNK, *side), (ZARR_SHARD, *side), classes),
        ("cells", before.rows, cells, (ZARR_CHUNK, *side), (ZARR_SHARD, *side)),
        ("to_source", before.rows, block.to_source, (4096, 2, 3)),
        ("cell_table", before.cells, rows, (4096, rows.shape[1]), None, columns),
        ("cell_offsets", before.rows, offsets + before.cells, (4096,)),
    )


def write_arrays(group: zarr.Group, *arrays: Any) -> None:
    """`write_rows` for several arrays at the same time, so that their waits for an object store are one wait."""
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
    """Writes rows from `start` on into an array of a group that only this task writes; creates or grows the array.

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
    array = _array(group, name, found)
    if array.shape != shape:
        array.resize(shape)
    if len(rows):
        array[start:] = rows


def _arrays_of(group: zarr.Group, names: Sequence[str]) -> list[tuple[str, zarr.Array[Any]]]:
    """Arrays of a group with their names, opened at the same time."""
    with ThreadPoolExecutor(len(names)) as pool:
        return list(zip(names, pool.map(partial(array_of, group), names), strict=True))


def _read_arrays(group: zarr.Group, *names: str) -> list[NDArray[Any]]:
    """Whole arrays of a group, read at the same time, so that their waits for an object store are one wait."""
    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(lambda name: np.asarray(array_of(group, name)[:]), names))


def array_of(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """An array of a group. Raises StorageError when it is absent."""
    return _array(group, name, group.get(name))


def _array(group: zarr.Group, name: str, found: Any) -> zarr.Array[Any]:
    if not isinstance(found, zarr.Array):
        raise StorageError(f"{group.store_path} lacks the array {name}; rerun to have its shard done again")
    return found


def _attempt_group(job: ShardJob, name: str) -> zarr.Group:
    key = f"{attempt_prefix(job.shard, job.attempt)}/{name}/{job.shard.name}"
    return zarr.open_group(Storage(job.root).zarr(key), mode="a", zarr_format=3)


def _stored(root: str, key: str) -> zarr.Group:
    """A committed group. Its format is given, or the store would be asked for the files of older formats, too."""
    return zarr.open_group(Storage(root).zarr(key, read_only=True), mode="r", zarr_format=3)


FACTS = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("member_sha256", pa.string()),
        pa.field("width_px", pa.int32()),
        pa.field("height_px", pa.int32()),
        pa.field("focus", pa.float64()),
        pa.field("exposure", pa.float64()),
        pa.field("saturated", pa.float64()),
        pa.field("foreground", pa.float64()),
        pa.field("stain", pa.float64()),
        pa.field("stain_red", pa.float64()),
        pa.field("stain_blue", pa.float64()),
        pa.field("stain_density", pa.float64()),
        pa.field("flags", pa.list_(pa.string())),
        pa.field("reasons", pa.list_(pa.string())),
        pa.field("n_tiles", pa.int32(), nullable=False),
        pa.field("zarr_index", pa.int32()),
    ]
)
"""`fields/part-<shard>.parquet`: what ingest and quality found out, so that later stages need no pixels."""


def _write_facts(job: ShardJob, facts: Sequence[Fact]) -> None:
    rows = []
    for f in facts:
        q = f.quality
        rows.append(
            {
                "ordinal": f.ordinal,
                "status": f.status,
                "reason": f.reason,
                "member_sha256": f.sha256,
                "width_px": f.width,
                "height_px": f.height,
                "focus": q and q.focus,
                "exposure": q and q.exposure,
                "saturated": q and q.saturated,
                "foreground": q and q.foreground,
                "stain": q and q.stain,
                "stain_red": q and q.stain_red,
                "stain_blue": q and q.stain_blue,
                "stain_density": q and q.stain_density,
                "flags": q and list(q.flags),
                "reasons": q and list(q.reasons),
                "n_tiles": f.n_tiles,
                "zarr_index": f.zarr_index,
            }
        )
    write_parquet(job, f"fields/part-{job.shard.name}.parquet", pa.Table.from_pylist(rows, FACTS))


def read_facts(root: str, shard: Shard) -> list[Fact]:
    """The committed facts of a shard's members, in order."""
    table = pq.read_table(io.BytesIO(Storage(root).read(f"fields/part-{shard.name}.parquet")), schema=FACTS)
    out = []
    for r in table.to_pylist():
        quality = None
        if r["focus"] is not None:
            quality = Quality(
                r["focus"], r["exposure"], r["saturated"], r["foreground"], r["stain"], r["stain_red"], r["stain_blue"],
                r["stain_density"], tuple(r["flags"]), tuple(r["reasons"]),
            )  # fmt: skip
        status = Status(r["status"]) if r["status"] else None
        out.append(
            Fact(
                r["ordinal"],
                status,
                r["reason"],
                r["member_sha256"],
                r["width_px"],
                r["height_px"],
                quality,
                r["n_tiles"],
                r["zarr_index"],
            )
        )
    return out


def read_cells(root: str, shard: Shard) -> tuple[CellTable, NDArray[np.int64], NDArray[np.float32]]:
    """The committed cell table of a shard, the offsets of each tile's rows, int64 [tiles + 1], and each tile's map to
    the source, float32 [tiles, 2, 3]."""
    group = _stored(root, f"masks.zarr/{shard.name}")
    rows, offsets, to_source = _read_arrays(group, "cell_table", "cell_offsets", "to_source")
    empty = concatenate([])
    columns = {f.name: rows[:, i].astype(getattr(empty, f.name).dtype) for i, f in enumerate(fields(CellTable))}
    return CellTable(**columns), offsets.astype(np.int64), to_source.astype(np.float32)


def write_parquet(job: ShardJob, name: str, table: pa.Table) -> None:
    """One part, written whole, below the attempt."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, store_schema=True)
    Storage(job.root).write(f"{attempt_prefix(job.shard, job.attempt)}/{name}", sink.getvalue())


def _keys(job: ShardJob) -> dict[str, str]:
    bundle = opened_bundle(job.bundle, job.bundle_digest)
    return stage_keys(bundle, members_of(job), job.device)


# --- extract ---------------------------------------------------------------------------------------------------------


def extract(job: ShardJob, segmented: Segmented, before: Trail | None = None) -> Trail:
    """Hybrid features of a block's tiles and cells, and activation maps of the cells; commits with the last block."""
    started = time.perf_counter()
    with _guard(job, "extract"):
        bundle = opened_bundle(job.bundle, job.bundle_digest)
        hybrid = _models(job.bundle, job.bundle_digest, job.device, "hybrid")
        features = bundle.spec.method.features
        block, table, offsets = segmented.block, segmented.table, segmented.offsets
        shown = _readout(job.bundle, job.bundle_digest, job.device)
        whole, single, maps = explain_tiles(hybrid, shown, block, segmented.cells, table, offsets, features, job.device)
        columns = hybrid.num_features
        before = before or Trail()
        if job.only is None:
            names = {"columns": [{"backbone": b, "layer": layer, "dimension": d} for b, layer, d in hybrid.columns]}
            write_arrays(
                _attempt_group(job, "features.zarr"),
                ("hybrid", before.rows, whole, (16, columns), (512, columns), names),
                ("cells", before.cells, single, (64, columns), (4096, columns), names),
                ("cell_offsets", before.rows, offsets + before.cells, (4096,)),
            )
            _write_activations(job, bundle, maps, before)
            if block.next == job.shard.first + job.shard.count:
                keys = _keys(job)
                # Maps first: whoever finds the features committed does not come back for maps.
                commit(job, ACTIVATIONS, keys[ACTIVATIONS], (f"activations.zarr/{job.shard.name}",))
                commit(job, "features", keys["features"], (f"features.zarr/{job.shard.name}",))
        trail = segmented.trail
        timing = StageTiming("extract", time.perf_counter() - started, len(block.facts))
        mine = tuple(t for t in before.timings if t.stage == "extract")
        return replace(trail, timings=(*trail.timings, *mine, timing))


def _write_activations(job: ShardJob, bundle: Bundle, maps: NDArray[np.float16], before: Trail) -> None:
    group = _attempt_group(job, "activations.zarr")
    attributes = {
        "classes": list(CLASSES),
        "window_px": bundle.spec.method.features.cell_window_px,
        "grid": maps.shape[-1],
        "classifier_digest": bundle.component_digest("classifier"),
    }
    write_rows(group, "maps", before.cells, maps, (64, *maps.shape[1:]), (4096, *maps.shape[1:]), attributes)


# --- classify --------------------------------------------------------------------------------------------------------


def classify(job: ShardJob, trail: Trail | None, resumed: tuple[str, ...] = ()) -> ShardReceipt:
    """Diagnoses a shard from exactly the values its earlier stages have committed; writes and commits its tables."""
    started = time.perf_counter()
    with _guard(job, "classify"):
        bundle = opened_bundle(job.bundle, job.bundle_digest)
        classifier = _models(job.bundle, job.bundle_digest, job.device, "classifier")
        members = members_of(job)
        with ThreadPoolExecutor(3) as pool:  # what an object store has is waited for once
            known, counted, stored = (
                pool.submit(read_facts, job.root, job.shard),
                pool.submit(read_cells, job.root, job.shard),
                pool.submit(_read_features, job.root, job.shard),
            )
        facts, (table, _, to_source), (hybrid, cells, offsets) = known.result(), counted.result(), stored.result()
        diagnosis = diagnose(
            bundle,
            classifier,
            hybrid.astype(np.float32, copy=False),
            cells.astype(np.float32, copy=False),
            offsets,
            table.cell_area_px.astype(np.float32),
            job.device,
        )
        fields_ = [f for f in facts if f.zarr_index is not None]
        verdicts = pool_tiles(bundle, diagnosis, offsets, np.array([f.n_tiles for f in fields_], np.int64))
        rows, found_cells = _tables(job, members, facts, fields_, table, offsets, to_source, verdicts)
        write_parquet(job, f"predictions/part-{job.shard.name}.parquet", rows)
        write_parquet(job, f"cells/part-{job.shard.name}.parquet", found_cells)
        receipt = _receipt(job, rows, len(found_cells), trail, resumed, started)
        if receipt.rows != job.shard.count:
            raise ShardError(f"shard {job.shard.name}: {receipt.rows} rows for {job.shard.count} members")
        roots = (f"predictions/part-{job.shard.name}.parquet", f"cells/part-{job.shard.name}.parquet")
        marker = commit(job, "predictions", _keys(job)["predictions"], roots, receipt)
        return marker.receipt or receipt


def _read_features(root: str, shard: Shard) -> list[NDArray[Any]]:
    """The committed features of a shard's tiles and cells, and the offsets of each tile's cells."""
    return _read_arrays(_stored(root, f"features.zarr/{shard.name}"), "hybrid", "cells", "cell_offsets")


def _tables(
    job: ShardJob,
    members: Sequence[Member],
    facts: Sequence[Fact],
    diagnosed: Sequence[Fact],
    table: CellTable,
    offsets: NDArray[np.int64],
    to_source: NDArray[np.float32],
    verdicts: Sequence[Verdict],
) -> tuple[pa.Table, pa.Table]:
    """Rows of `predictions/` (one per member, in plan order) and of `cells/` (one per cell)."""
    verdict_of = {fact.ordinal: verdict for fact, verdict in zip(diagnosed, verdicts, strict=True)}
    rows: list[dict[str, Any]] = []
    keys_of_tiles: list[str] = []
    scales: list[float | None] = []
    for member, fact in zip(members, facts, strict=True):
        verdict = verdict_of.get(fact.ordinal)
        found = outcome(fact, verdict)
        quality = fact.quality
        row: dict[str, Any] = {
            "run_id": job.run_id,
            "image_key": member.image_key,
            "source_uri": job.source.uri,
            "member_sha256": fact.sha256,
            "slide_id": member.slide_id,
            "patient_id": member.patient_id,
            "site": member.site,
            "scanner": member.scanner,
            "um_per_px": member.um_per_px,
            "status": str(found.status),
            "reason": found.reason,
            "n_cells": None if verdict is None else verdict.n_cells,
            "shard": job.shard.name,
            "zarr_index": fact.zarr_index,
            "n_tiles": fact.n_tiles,
            "width_px": fact.width,
            "height_px": fact.height,
            "focus": quality and quality.focus,
            "exposure": quality and quality.exposure,
            "quality_flags": list(quality.flags) if quality else None,
            "bundle_digest": job.bundle_digest,
        }
        if verdict is not None:
            keys_of_tiles += [member.image_key] * fact.n_tiles
            scales += [member.um_per_px] * fact.n_tiles
            row |= dict(zip(_PROBABILITIES, found.probabilities, strict=True))
            row |= {
                "label": found.label,
                "confidence": max(found.probabilities),
                "prediction_set": list(found.prediction_set),
                "ood_score": found.ood,
            }
        row |= dict(member.meta)
        rows.append(row)
    predictions = pa.Table.from_pylist(rows, predictions_schema(job.meta_columns))
    return predictions, cell_rows(table, offsets, keys_of_tiles, verdicts, to_source, scales, job.run_id)


def _receipt(
    job: ShardJob, rows: pa.Table, cells: int, trail: Trail | None, resumed: tuple[str, ...], started: float
) -> ShardReceipt:
    status = Counter(rows["status"].to_pylist())
    labels = Counter(rows.filter(pc.field("status") == str(Status.PREDICTED))["label"].to_pylist())
    # "out of focus: 1.8 < 4.0" is counted as "out of focus": a reason is a kind, its numbers are in the row.
    reasons = Counter(r.split(":")[0] for r in rows["reason"].to_pylist() if r)
    seconds: dict[str, float] = {}
    for timing in trail.timings if trail else ():
        seconds[timing.stage] = seconds.get(timing.stage, 0.0) + timing.seconds
    seconds["classify"] = time.perf_counter() - started
    # To the microsecond: a last digit that somebody alters must not vanish when verifying adds them up.
    seconds = {stage: round(s, 6) for stage, s in seconds.items()}
    return ShardReceipt(
        shard=job.shard,
        predicted=status[Status.PREDICTED],
        abstained=status[Status.ABSTAINED],
        rejected=status[Status.REJECTED],
        quarantined=status[Status.QUARANTINED],
        cells=cells,
        labels=(labels["Benign"], labels["Early"], labels["Pre"], labels["Pro"]),
        reasons=tuple(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        seconds=sum(seconds.values()),
        timings=tuple(StageTiming(stage, s, job.shard.count) for stage, s in seconds.items()),
        resumed=resumed,
    )


# --- the search for a culprit ----------------------------------------------------------------------------------------


def probe(job: ShardJob) -> None:
    """Runs the chain over the members in `job.only`, writes nothing; the caller looks whether this process lives."""
    first, end = job.shard.first, job.shard.first + job.shard.count
    before = Trail()
    while first < end:
        block = prepare(job, first)
        extract(job, segment(job, block, before))
        first = block.next
