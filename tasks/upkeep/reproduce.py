"""Reproduce a finished run: shards are computed again from the source, and held against what is stored, bit for bit.

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

import pyarrow.parquet as pq

from leukoflow.cluster.code import code_digest
from leukoflow.cluster.host import cores
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import BundleError, ConfigError, ShardError, SourceError, words_of
from leukoflow.models.bundle import Bundle, load_bundle
from leukoflow.models.registry import Registry
from leukoflow.runs.layout import RunKey
from leukoflow.runs.progress import read_binding
from leukoflow.runs.records import Host, RunManifest, Shard, Source
from leukoflow.sources.identify import identify
from leukoflow.sources.spool import spool
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.manifest import META_PREFIX
from leukoflow.tasks.intake.open_run import spooled
from leukoflow.tasks.intake.plan_file import read_shard, read_summary
from leukoflow.tasks.intake.plan_file import shards as shards_of
from leukoflow.tasks.store.facts import known_culprits
from leukoflow.tasks.store.job import ShardJob
from leukoflow.tasks.store.tables import finished, table_files
from leukoflow.tasks.upkeep.recompute import TABLES, Compared, Difference, reproduce_shard

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


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


# --- machines and shards ---------------------------------------------------------------------------------------------


def environment_differences(
    recorded: Sequence[Host], here: Sequence[Host], software: Sequence[tuple[str, str]] = ()
) -> tuple[tuple[str, str, str], ...]:
    """Say in what the machines here are none of those that a run recorded.

    `software` stands in where it recorded none.

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


def sample(total: int, wanted: int | None, seed: int) -> list[int]:
    """Choose the ordinals of the shards to compute again: all, or a seeded choice of so many."""
    if wanted is None or wanted >= total:
        return list(range(total))
    return sorted(random.Random(seed).sample(range(total), wanted))


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
    """Compute a finished run's shards again, all or a seeded sample, and compare. Nothing in the run is changed.

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
        notes.append("the run was computed on a GPU, and there is none here: expect the last digits to differ")
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
    """Take one result of those that are waited for."""
    future = next(as_completed(waiting))
    waiting.discard(future)
    try:
        compared.append(future.result())
    except BrokenProcessPool:
        raise ShardError(
            "a process that computed a shard again died (out of memory?); run the command again with fewer --workers"
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
    """Find the run's bundle by its digest: where it is said to be, where it was, or in the registry."""
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
        f"the bundle {m.bundle_digest[:12]} of run {m.run_id} cannot be found ({'; '.join(seen)}): say with --bundle "
        "where it is, or register it again"
    )


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _limits(storage: Storage) -> tuple[LimitSettings, list[str]]:
    """Read the limits that the run was made with, as far as it recorded them."""
    recorded = read_binding(storage).config
    if not recorded:
        return LimitSettings(), ["the run did not record its settings; the default limits are assumed"]
    try:
        return LimitSettings.model_validate(json.loads(recorded)["limits"]), []
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{storage.uri(RunKey.BINDING)}: its settings cannot be read ({words_of(error)})") from None


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
    """Yield the shards to do, each with the files that it is held against; a compressed tar is unpacked ahead."""
    for name in (RunKey.PLAN, RunKey.SCALES):
        if storage.exists(name):  # older runs have no scales
            (Path(folder) / name).write_bytes(storage.read(name))
    with storage.open(RunKey.PLAN) as file:
        plan = pq.ParquetFile(file)
        summary = read_summary(file)
        metas = [n.removeprefix(META_PREFIX) for n in plan.schema_arrow.names if n.startswith(META_PREFIX)]
        wanted = [shard for shard in shards_of(summary) if shard.ordinal in set(chosen)]
        files = {name: {i: f.key for f in table_files(m.parts, name) for i in f.shards} for name in TABLES}
        scratch = open_storage(folder)

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
    """Start processes with so many threads each; what they need to know before they import is inherited."""
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
    """Return the whole report as JSON."""
    return json.dumps({**asdict(found), "same": found.same}, ensure_ascii=False, indent=1) + "\n"
