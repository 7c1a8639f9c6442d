"""Commit the stages of a shard: name their contents, mark what is complete, take back what no longer holds.

A marker that is created only if absent names the winning attempt, and that attempt's files move to their final keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from functools import lru_cache, partial

import numpy as np
import zarr

from leukoflow.cluster.host import this_host
from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import StorageError
from leukoflow.models.bundle import Bundle
from leukoflow.runs.layout import RunKey, Stage
from leukoflow.runs.records import Marker, Member, PartRef, Shard, ShardReceipt
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.store.arrays import ARRAYS, arrays_of
from leukoflow.tasks.store.job import ShardJob, attempt_prefix

ACTIVATIONS = Stage.ACTIVATIONS
"""The stage that no other is made from: a shard may lack it and yet be whole. It is made while the pixels are there."""
STAGES = (Stage.MASKS, Stage.FEATURES, Stage.ACTIVATIONS, Stage.PREDICTIONS)

REVISIONS = {"masks": 4, "features": 1, ACTIVATIONS: 1, "predictions": 3}
"""Raised when a stage's code changes what it writes; part of every content key."""


def stage_keys(bundle: Bundle, members: Sequence[Member], device: str) -> dict[str, str]:
    """Return the content address of each stage of a shard: what it is made from, upstream's key included.

    `members` are those of the shard, each with its scale.
    """
    who = hashlib.sha256()
    for m in members:
        who.update(repr((m.image_key, m.identity, m.refusal, m.scale.um_per_px)).encode())
    manifest = repr([(m.slide_id, m.patient_id, m.site, m.scanner, m.meta, astuple(m.scale)) for m in members])
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
    """Return the key of a stage's marker."""
    return RunKey.marker(stage, shard.name)


def read_marker(storage: Storage, stage: str, shard: Shard) -> Marker | None:
    """Read the marker, or None while the stage is not committed."""
    key = marker_key(stage, shard)
    try:
        return loads(Marker, storage.read(key), storage.uri(key))
    except FileNotFoundError:
        return None


def committed(storage: Storage, shard: Shard, keys: dict[str, str]) -> dict[str, Marker]:
    """Find the stages of a shard whose parts are there, unaltered and made from what they should be made from.

    A marker whose files have not been moved yet (its writer died in between) is completed here. A marker that does not
    hold is deleted together with those of the stages that follow, so that they are done again. Activation maps that do
    not hold are deleted alone: making them again would cost all pixels, and no prediction depends on them.
    """
    found: dict[str, Marker] = {}
    for i, stage in enumerate(STAGES):
        marker = read_marker(storage, stage, shard)
        if marker is not None and marker.part.key == keys[stage] and _is_settled(storage, marker.part):
            found[stage] = marker
            continue
        if stage == ACTIVATIONS:
            if marker is not None:
                storage.delete(marker_key(stage, shard))
                storage.delete(RunKey.group(RunKey.ACTIVATIONS, shard.name))
            continue
        for later in STAGES[i:]:
            if read_marker(storage, later, shard) is not None:
                storage.delete(marker_key(later, shard))
        break
    return found


def _is_settled(storage: Storage, part: PartRef) -> bool:
    if storage.intact(part.files):
        return True
    shard = Shard(int(part.shard), 0, 0)
    storage.promote(attempt_prefix(shard, part.attempt), part.files)
    return storage.intact(part.files)


def forget(storage: Storage, shard: Shard) -> None:
    """Take back all commits of a shard; its stages are done again."""
    for stage in reversed(STAGES):
        storage.delete(marker_key(stage, shard))


def commit(job: ShardJob, stage: str, key: str, roots: Sequence[str], receipt: ShardReceipt | None = None) -> Marker:
    """Digest what the attempt wrote below `roots`, create the marker, and move the files to their final keys.

    When another attempt was first, its marker stands and this attempt's files are left for the clean-up.
    """
    storage = open_storage(job.root)
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
    if first is None or not _is_settled(storage, first.part):
        raise StorageError(
            f"shard {job.shard.name}: the marker of stage {stage} does not match its files; it is redone"
        )
    return first


@lru_cache(maxsize=32)
def _sign(root: str) -> None:
    """Leave a note in the run of what machine commits here, once per process; alike machines leave the same one."""
    note = dumps(this_host())
    open_storage(root).create(RunKey.host(f"{hashlib.sha256(note).hexdigest()[:16]}.json"), note)


def digests_below(storage: Storage, root: str) -> list[tuple[str, int, str]]:
    """Return (key, bytes, sha256) of one Parquet file, or of all files of a Zarr group that was written just now.

    An object store's listing may lag behind what was written, and a chunk that is left out would be read as zeros. So
    there the keys follow from the arrays' metadata; a chunk that holds nothing but zeros is not written.
    """
    if root.endswith(".parquet"):
        return [storage.digest(root)]
    if storage.is_local:
        return [storage.digest(key) for key in storage.files(root)]
    group = zarr.open_group(storage.zarr(root, read_only=True), mode="r", zarr_format=3)
    needed, chunks = {f"{root}/zarr.json"}, set()
    for name, array in arrays_of(group, ARRAYS[root.split("/")[0]]):
        needed.add(f"{root}/{name}/zarr.json")
        grid = [-(-n // c) for n, c in zip(array.shape, array.shards or array.chunks, strict=True)]
        chunks |= {f"{root}/{name}/{array.metadata.encode_chunk_key(place)}" for place in np.ndindex(*grid)}
    found = sorted(storage.digests(needed | chunks, absent=True))
    if lost := needed - {key for key, _, _ in found}:
        raise FileNotFoundError(storage.uri(min(lost)))
    return found


def adopt_stages(job: ShardJob, other: Storage, keys: dict[str, str], done: dict[str, Marker]) -> dict[str, Marker]:
    """Take masks, features and activation maps from another run where they were made from the very same things."""
    storage, found = open_storage(job.root), dict(done)
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
