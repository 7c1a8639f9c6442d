"""Reproducing a finished run: shards are computed again from the source, and held against what is stored, bit for bit.

With the same code on the same kind of machine nothing may differ. Where something does, the report says how far the
numbers are apart, and in what software, machine and settings differ from those that the run recorded.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from leukoflow.cluster.code import code_digest
from leukoflow.cluster.host import cores, this_host
from leukoflow.core.codec import loads
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import BundleError, ConfigError, ShardError, SourceError, words_of
from leukoflow.models.bundle import Bundle, load_bundle
from leukoflow.models.registry import Registry
from leukoflow.runs.progress import RunBinding
from leukoflow.runs.records import Host, RunManifest, Shard, Source, read_reason
from leukoflow.runs.schema import SINCE_2
from leukoflow.sources.members import identify, spool
from leukoflow.storage.base import Storage
from leukoflow.tasks.inference.shard import (
    STAGES,
    ShardJob,
    attempt_prefix,
    classify,
    extract,
    known_culprits,
    marker_key,
    opened_bundle,
    planned,
    prepare,
    read_marker,
    segment,
    stage_keys,
    trail_of,
)
from leukoflow.tasks.intake.manifest_file import META_PREFIX
from leukoflow.tasks.intake.open_run import spooled
from leukoflow.tasks.intake.plan import read_shard, read_summary
from leukoflow.tasks.intake.plan import shards as shards_of
from leukoflow.tasks.store.compact import shard_counts_of
from leukoflow.tasks.store.tables import finished, table_files
from leukoflow.tasks.upkeep.amend import rows_of
from leukoflow.tasks.upkeep.erase import erased_key

TABLES = ("fields", "predictions", "cells")
STORES = ("masks.zarr", "features.zarr", "activations.zarr")
_ERASURES = 100
"""So many patients may have been erased from one shard for it to be recognised."""

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


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


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What reproducing a run has found."""

    run_id: str
    shards: tuple[str, ...]  # that were computed again
    of_shards: int
    images: int
    left_out: int
    values: tuple[tuple[str, int], ...]  # compared, in all
    differences: tuple[Difference, ...]
    not_stored: tuple[str, ...]
    environment: tuple[tuple[str, str, str], ...]  # (what, as recorded, here) where they differ
    notes: tuple[str, ...]
    seconds: float

    @property
    def same(self) -> bool:
        """Whether every value is the same to the last bit."""
        return not self.differences


# --- pure ------------------------------------------------------------------------------------------------------------


def environment_differences(
    recorded: Sequence[Host], here: Sequence[Host], software: Sequence[tuple[str, str]] = ()
) -> tuple[tuple[str, str, str], ...]:
    """In what the machines here are none of those that a run recorded; `software` stands in where it recorded none.

    The number of cores is left out: what counts is how many of them a process computes with.
    """
    found = []
    if recorded:
        for field in fields(Host):
            if field.name in ("cores", "software"):
                continue
            then, now = ({_words(getattr(h, field.name)) for h in hosts} for hosts in (recorded, here))
            if not now <= then:
                found.append((field.name.replace("_", " "), ", ".join(sorted(then)), ", ".join(sorted(now))))
    versions = [dict(h.software) for h in recorded] or [dict(software)]
    mine = [dict(h.software) for h in here]
    for name in dict.fromkeys(name for table in [*versions, *mine] for name in table):
        then, now = ({table.get(name, "absent") for table in tables} for tables in (versions, mine))
        if not now <= then:
            found.append((name, ", ".join(sorted(then)), ", ".join(sorted(now))))
    return tuple(found)


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join("=".join(v) if isinstance(v, tuple) else str(v) for v in value) or "none"
    return str(value) or "none"


def compare_arrays(shard: str, where: str, stored: NDArray[Any], again: NDArray[Any]) -> Difference | None:
    """How two arrays differ, bit for bit: other bits of the same number (-0.0 and 0.0) are a difference, too."""
    if stored.shape != again.shape or stored.dtype != again.dtype:
        return Difference(shard, where, stored.size, stored.size, None)
    a, b = (np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}") for x in (stored, again))
    differs = a != b
    if not differs.any():
        return None
    apart = np.abs(stored[differs].astype(np.float64) - again[differs].astype(np.float64))
    return Difference(shard, where, int(differs.sum()), stored.size, float(np.max(apart)))


def compare_columns(shard: str, where: str, stored: pa.ChunkedArray, again: pa.ChunkedArray) -> Difference | None:
    """How two columns differ."""
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


def sample(total: int, wanted: int | None, seed: int) -> list[int]:
    """Ordinals of the shards to compute again: all, or a seeded choice of so many."""
    if wanted is None or wanted >= total:
        return list(range(total))
    return sorted(random.Random(seed).sample(range(total), wanted))


# --- one shard, in a process of its own ------------------------------------------------------------------------------


def recompute(job: ShardJob) -> None:
    """A shard through its stages, as the nightly run does it."""
    first, before, features = job.shard.first, None, None
    while first < job.shard.first + job.shard.count:
        block = prepare(job, first)
        segmented = segment(job, block, before)
        before, features, first = trail_of(segmented), extract(job, segmented, features), block.next
    classify(job, features)


def reproduce_shard(job: ShardJob, root: str, files: Sequence[tuple[str, str]]) -> Compared:
    """Computes a shard again below `job.root` and holds it against the run at `root`.

    `files` names the Parquet file of each table that has the shard's rows.
    """
    scratch, stored = Storage(job.root), Storage(root)
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
    gone = _erased(job, stored, rows["predictions"])
    for name in TABLES:
        mine = rows_of_shard(scratch, f"{name}/part-{shard}.parquet", job.shard.ordinal)
        theirs = rows[name]
        if name == "cells" and gone and len(mine) == len(theirs):
            kept = pa.array([key not in gone for key in theirs["image_key"].to_pylist()], pa.bool_())
            mine, theirs = mine.filter(kept), theirs.filter(kept)
        for column in dict.fromkeys([*theirs.column_names, *mine.column_names]):
            where = f"{name}/{column}"
            if name == "cells" and column in SINCE_2 and column not in theirs.column_names:
                continue  # a run of schema 1 has nothing to compare it with
            if column not in theirs.column_names or column not in mine.column_names:
                found.append(Difference(shard, where, len(theirs), len(theirs), None))
                continue
            values.append((where, len(theirs)))
            stored_column = _in_todays_words(theirs[column]) if column == "reason" else theirs[column]
            found += _some(compare_columns(shard, where, stored_column, mine[column]))
    tiles, cells = _places(stored, shard, rows["predictions"], gone)
    for top in STORES:
        if not scratch.exists(f"{top}/{shard}/zarr.json"):
            continue
        if not stored.exists(f"{top}/{shard}/zarr.json"):
            absent.append(f"{top}/{shard}")
            continue
        mine_group = zarr.open_group(scratch.zarr(f"{top}/{shard}", read_only=True), mode="r")
        their_group = zarr.open_group(stored.zarr(f"{top}/{shard}", read_only=True), mode="r")
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
    """Images of the shard from which a patient was erased: their parts' key says so, and they have no identity."""
    marker = read_marker(stored, "masks", job.shard)
    members, bundle = planned(job.root, job.shard), opened_bundle(job.bundle, job.bundle_digest)
    keys = {stage_keys(bundle, members, device)["masks"] for device in ("cpu", "cuda")}
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
    """Which tiles and which cells of a shard are compared."""
    group: Any = zarr.open_group(stored.zarr(f"masks.zarr/{shard}", read_only=True), mode="r")
    offsets = np.asarray(group["cell_offsets"][:], np.int64) if "cell_offsets" in group else np.zeros(1, np.int64)
    tiles, cells = np.ones(max(0, len(offsets) - 1), bool), np.ones(int(offsets[-1]) if len(offsets) else 0, bool)
    for row in rows.select(["image_key", "zarr_index", "n_tiles"]).to_pylist():
        if row["image_key"] in gone and row["zarr_index"] is not None:
            first, last = row["zarr_index"], row["zarr_index"] + row["n_tiles"]
            tiles[first:last] = False
            cells[offsets[first] : offsets[last]] = False
    return tiles, cells


def rows_of_shard(storage: Storage, key: str, ordinal: int) -> pa.Table:
    """A shard's rows from its own file or a merged one, of which only the row groups with them are read."""
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
    for top in STORES:
        scratch.delete(f"{top}/{job.shard.name}")
    for name in TABLES:
        scratch.delete(f"{name}/part-{job.shard.name}.parquet")
    for stage in STAGES:
        scratch.delete(marker_key(stage, job.shard))
    scratch.delete(attempt_prefix(job.shard, job.attempt))
    if job.spool is not None:
        scratch.delete(job.spool)


# --- a run -----------------------------------------------------------------------------------------------------------


def reproduce_run(
    root: str,
    shards: int | None = None,
    seed: int = 0,
    workers: int = 0,
    bundle: str | None = None,
    registry: str | None = None,
    scratch: str | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Reproduction:
    """Computes a finished run's shards again, all or a seeded sample, and compares. Nothing in the run is changed.

    Args:
        bundle: where the run's bundle is now; by default where it was, else in the registry under its digest.
        workers: processes, 0 for one per core; each computes with as many threads as the run's did.
        scratch: folder for what is computed, by default that of temporary files; a shard's is deleted when compared.

    Raises StorageError (no finished run there), SourceError (changed or gone), BundleError (not to be had),
    ConfigError, ShardError.
    """
    started = time.monotonic()
    storage, manifest = finished(root)
    opened = _bundle(manifest, bundle, registry)
    source = identify(manifest.source.uri)
    if source.identity != manifest.source.identity:
        raise SourceError(f"{source.uri} was changed since run {manifest.run_id}, which cannot be reproduced from it")
    notes = []
    device = manifest.device
    if device == "cuda" and not _has_gpu():
        device = "cpu"
        notes.append("the run was computed on a GPU, and there is none here: other last digits are to be expected")
    limits, noted = _limits(storage)
    notes += noted
    chosen = sample(-(-manifest.members // manifest.shard_size), shards, seed)
    threads = manifest.hosts[0].threads if manifest.hosts else None
    compared: list[Compared] = []
    with tempfile.TemporaryDirectory(prefix="leukoflow-rerun-", dir=scratch) as folder:
        jobs = _jobs(storage, manifest, source, opened, device, limits, folder, chosen)
        count = 1 if device == "cuda" else min(workers or cores(), len(chosen))
        with _pool(count, threads or max(1, cores() // count)) as pool:
            report(0, len(chosen))
            waiting: set[Future[Compared]] = set()
            for job, files in jobs:
                waiting.add(pool.submit(reproduce_shard, job, storage.root, files))
                while len(waiting) >= 2 * count:
                    _gather(waiting, compared)
                    report(len(compared), len(chosen))
            while waiting:
                _gather(waiting, compared)
                report(len(compared), len(chosen))
    return _summary(manifest, compared, notes, len(chosen), time.monotonic() - started)


def _gather(waiting: set[Future[Compared]], compared: list[Compared]) -> None:
    """Takes one result of those that are waited for."""
    future = next(as_completed(waiting))
    waiting.discard(future)
    try:
        compared.append(future.result())
    except BrokenProcessPool:
        raise ShardError(
            "a process that computed a shard again died (out of memory?); give the command again with fewer --workers"
        ) from None


def _summary(
    m: RunManifest, compared: list[Compared], notes: Sequence[str], wanted: int, seconds: float
) -> Reproduction:
    compared.sort(key=lambda c: c.shard)
    values: dict[str, int] = {}
    for c in compared:
        for where, n in c.values:
            values[where] = values.get(where, 0) + n
    if not m.hosts:
        notes = [*notes, "the run did not record on what machines it was computed; only versions are compared"]
    here = list(dict.fromkeys(c.host for c in compared))
    return Reproduction(
        run_id=m.run_id,
        shards=tuple(c.shard for c in compared),
        of_shards=-(-m.members // m.shard_size),
        images=sum(c.images for c in compared),
        left_out=sum(c.left_out for c in compared),
        values=tuple(values.items()),
        differences=tuple(d for c in compared for d in c.differences),
        not_stored=tuple(name for c in compared for name in c.not_stored),
        environment=environment_differences(m.hosts, here, m.software),
        notes=tuple(notes),
        seconds=seconds,
    )


def _bundle(m: RunManifest, place: str | None, registry: str | None) -> Bundle:
    """The run's bundle, by its digest: where it is said to be, where it was, or in the registry."""
    places = [place] if place is not None else [m.bundle]
    if place is None and registry and (found := Registry(registry)).holds(m.bundle_digest):
        places.insert(0, found.location(m.bundle_digest))
    seen = []
    for where in places:
        try:
            bundle = load_bundle(where)
        except BundleError as error:
            seen.append(str(error))
            continue
        if bundle.digest == m.bundle_digest:
            return bundle
        seen.append(f"{where} is {bundle.digest[:12]} now")
    raise BundleError(
        f"the bundle {m.bundle_digest[:12]} of run {m.run_id} is not to be had ({'; '.join(seen)}): say with --bundle "
        "where it is, or register it again"
    )


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _limits(storage: Storage) -> tuple[LimitSettings, list[str]]:
    """The limits that the run was made with, as far as it recorded them."""
    recorded = loads(RunBinding, storage.read("run.json"), storage.uri("run.json")).config
    if not recorded:
        return LimitSettings(), ["the run did not record its settings; limits are taken to be the usual ones"]
    try:
        return LimitSettings.model_validate(json.loads(recorded)["limits"]), []
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{storage.uri('run.json')}: its settings cannot be read ({words_of(error)})") from None


def _jobs(
    storage: Storage,
    m: RunManifest,
    source: Source,
    bundle: Bundle,
    device: str,
    limits: LimitSettings,
    folder: str,
    chosen: Sequence[int],
) -> Iterator[tuple[ShardJob, tuple[tuple[str, str], ...]]]:
    """The shards to do, each with the files that it is held against; members of a compressed tar are unpacked ahead."""
    (Path(folder) / "plan.parquet").write_bytes(storage.read("plan.parquet"))
    with storage.open("plan.parquet") as file:
        plan = pq.ParquetFile(file)
        summary = read_summary(file)
        metas = [n.removeprefix(META_PREFIX) for n in plan.schema_arrow.names if n.startswith(META_PREFIX)]
        wanted = [shard for shard in shards_of(summary) if shard.ordinal in set(chosen)]
        files = {name: {i: f.key for f in table_files(m.parts, name) for i in f.shards} for name in TABLES}
        scratch = Storage(folder)

        def key(shard: Shard) -> str:
            return f"spool/{shard.name}.bin"

        ready: Iterator[Shard] = iter(wanted)
        if spooled(source):
            listed = ((shard, read_shard(plan, shard.ordinal)) for shard in wanted)
            ready = spool(source, listed, lambda shard: scratch.writer(key(shard)))
        for shard in ready:
            job = ShardJob(
                root=folder,
                run_id=m.run_id,
                source=m.source,
                shard=shard,
                attempt="again",
                bundle=str(bundle.path),
                bundle_digest=bundle.digest,
                device=device,
                code=code_digest(),
                limits=limits,
                meta_columns=tuple(metas),
                spool=key(shard) if spooled(source) else None,
            )
            known = known_culprits(replace(job, root=storage.root))
            yield replace(job, culprits=known), tuple((name, files[name][shard.ordinal]) for name in TABLES)


@contextmanager
def _pool(count: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compute with so many threads each; what they need to know before they import is inherited."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, str(threads)))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_bind, initargs=(threads,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _bind(threads: int) -> None:
    import cv2
    import torch

    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)


def to_json(found: Reproduction) -> str:
    """The whole report."""
    return json.dumps({**asdict(found), "same": found.same}, ensure_ascii=False, indent=1) + "\n"
