"""The stages of one shard: prepare, segment, extract, classify. Each is one plain Dask task per block of members.

A stage reads what it needs, calls the pure functions of the chain, writes below the shard's attempt, and the last
block's task commits. A shard is one block unless its images are large; blocks bound what is decoded at any time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from leukoflow.core.errors import ShardError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.receipts import StageTiming
from leukoflow.runs.records import CLASSES, ShardReceipt, Status
from leukoflow.tasks.decoding.ingest import ingest
from leukoflow.tasks.imaging.cells import Cells, CellTable
from leukoflow.tasks.imaging.extract import Features
from leukoflow.tasks.inference.blocks import Block, Prepared, prepare_block, prepare_image, refused
from leukoflow.tasks.inference.chain import classify_block, extract_block, segment_block
from leukoflow.tasks.inference.rows import cell_rows, prediction_rows
from leukoflow.tasks.inference.worker import (
    component,
    decoder_of,
    guarded,
    members_of,
    opened_bundle,
    opened_reader,
    readout_of,
)
from leukoflow.tasks.store.arrays import read_cells, read_features, read_labels, write_features, write_maps, write_masks
from leukoflow.tasks.store.commit import ACTIVATIONS, commit, stage_keys
from leukoflow.tasks.store.facts import Fact, read_facts, write_facts
from leukoflow.tasks.store.job import ShardJob, write_parquet


@dataclass(frozen=True, slots=True)
class Written:
    """What one block's task hands to the same stage's task of the next block: all that was written so far."""

    facts: tuple[Fact, ...] = ()
    rows: int = 0
    cells: int = 0
    timings: tuple[StageTiming, ...] = ()


@dataclass(frozen=True, slots=True)
class Segmented:
    """A block with its cells, and what was written up to and with it."""

    block: Block
    cells: Cells
    written: Written


# --- prepare ---------------------------------------------------------------------------------------------------------


def prepare(job: ShardJob, first: int) -> Block:
    """Read, decode, judge and normalise members from ordinal `first` on, until the block's bytes are spent."""
    started = time.perf_counter()
    with guarded(job, "prepare"):
        method = opened_bundle(job.bundle, job.bundle_digest).spec.method
        tile_bytes, budget = 3 * method.segment.field_px**2, job.limits.block_mb << 20
        culprits = dict(job.culprits)
        members = members_of(job)[first - job.shard.first :]
        wanted = [m for m in members if m.refusal is None and m.ordinal not in culprits and _looked_at(job, m.ordinal)]
        done: list[Prepared] = []
        tiles = 0
        with opened_reader(job) as reader:
            decoder = decoder_of(job.limits, method.segment.model_dump_json())
            images = ingest(reader, wanted, job.limits, decoder)
            for member in members:
                if tiles * tile_bytes >= budget:
                    break
                refusal = member.refusal or culprits.get(member.ordinal)
                if refusal is not None or not _looked_at(job, member.ordinal):
                    done.append(Prepared(refused(member.ordinal, refusal or "not looked at")))
                    continue
                done.append(prepare_image(member.ordinal, next(images), member.scale.um_per_px, method))
                tiles += len(done[-1].tiles)
        return prepare_block(done, method, first, time.perf_counter() - started)


def next_of(block: Block) -> int:
    """Return the ordinal of the first member after a block."""
    return block.next


def _looked_at(job: ShardJob, ordinal: int) -> bool:
    """Say whether a member is processed, while searching for culprits."""
    return job.only is None or ordinal in job.only


# --- segment ---------------------------------------------------------------------------------------------------------


def segment(job: ShardJob, block: Block, before: Written | None = None) -> Segmented:
    """Segment a block's tiles; write `masks.zarr`; with the last block, write `fields/` and commit."""
    started = time.perf_counter()
    with guarded(job, "segment"):
        bundle = opened_bundle(job.bundle, job.bundle_digest)
        model = component(job.bundle, job.bundle_digest, job.device, "segmenter")
        semantic, cells = segment_block(block, model, bundle.spec.method.segment, job.device)
        before = before or Written()
        facts = before.facts + _indexed(block.facts, before.rows)
        written = Written(facts, before.rows + len(semantic), before.cells + len(cells), before.timings + block.timings)
        if job.only is None:
            write_masks(job, semantic, cells, block.to_source, before.rows, before.cells)
            if block.next == job.shard.first + job.shard.count:
                write_facts(job, facts)
                roots = (RunKey.group(RunKey.MASKS, job.shard.name), RunKey.part(RunKey.FIELDS, job.shard.name))
                commit(job, "masks", _keys(job)["masks"], roots)
        timing = StageTiming("segment", time.perf_counter() - started, len(block.facts))
        return Segmented(block, cells, replace(written, timings=(*written.timings, timing)))


def recall(job: ShardJob, block: Block, before: Written | None = None) -> Segmented:
    """Read the cells of a block that an earlier attempt or run has committed, instead of segmenting again."""
    with guarded(job, "segment"):
        before = before or Written()
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
        written = Written(facts, rows.stop, before.cells + len(table), before.timings + block.timings)
        cells = Cells(read_labels(job.root, job.shard, rows), table, piece - piece[0])
        return Segmented(block, cells, written)


def written_by(segmented: Segmented) -> Written:
    """Return what the next block's task must know, without the pixels."""
    return segmented.written


def _indexed(facts: Sequence[Fact], row: int) -> tuple[Fact, ...]:
    """Give facts the Zarr row of each member's first tile."""
    out = []
    for fact in facts:
        out.append(replace(fact, zarr_index=row) if fact.n_tiles else fact)
        row += fact.n_tiles
    return tuple(out)


# --- extract ---------------------------------------------------------------------------------------------------------


def extract(job: ShardJob, segmented: Segmented, before: Written | None = None) -> Written:
    """Extract features of a block's tiles and cells, and activation maps of the cells; commit with the last block."""
    started = time.perf_counter()
    with guarded(job, "extract"):
        bundle = opened_bundle(job.bundle, job.bundle_digest)
        hybrid = component(job.bundle, job.bundle_digest, job.device, "hybrid")
        shown = readout_of(job.bundle, job.bundle_digest, job.device)
        block, settings = segmented.block, bundle.spec.method.features
        features, maps = extract_block(block, segmented.cells, hybrid, shown, settings, job.device)
        before = before or Written()
        if job.only is None:
            write_features(job, features, hybrid.columns, before.rows, before.cells)
            write_maps(job, bundle, maps, before.cells)
            if block.next == job.shard.first + job.shard.count:
                keys = _keys(job)
                # Maps first: who finds the features committed does not come back for maps.
                commit(job, ACTIVATIONS, keys[ACTIVATIONS], (RunKey.group(RunKey.ACTIVATIONS, job.shard.name),))
                commit(job, "features", keys["features"], (RunKey.group(RunKey.FEATURES, job.shard.name),))
        written = segmented.written
        timing = StageTiming("extract", time.perf_counter() - started, len(block.facts))
        mine = tuple(t for t in before.timings if t.stage == "extract")
        return replace(written, timings=(*written.timings, *mine, timing))


# --- classify --------------------------------------------------------------------------------------------------------


def classify(job: ShardJob, written: Written | None, resumed: tuple[str, ...] = ()) -> ShardReceipt:
    """Diagnose a shard from exactly the values its earlier stages have committed; write and commit its tables."""
    started = time.perf_counter()
    with guarded(job, "classify"):
        bundle = opened_bundle(job.bundle, job.bundle_digest)
        classifier = component(job.bundle, job.bundle_digest, job.device, "classifier")
        members = members_of(job)
        with ThreadPoolExecutor(3) as pool:  # what an object store has is waited for once
            known, counted, stored = (
                pool.submit(read_facts, job.root, job.shard),
                pool.submit(read_cells, job.root, job.shard),
                pool.submit(read_features, job.root, job.shard),
            )
        facts, (table, _, to_source), (field, cells, offsets) = known.result(), counted.result(), stored.result()
        features = Features(field, cells, offsets, table.cell_area_px.astype(np.float32))
        diagnosed = [(m, f) for m, f in zip(members, facts, strict=True) if f.zarr_index is not None]
        n_tiles = np.array([f.n_tiles for _, f in diagnosed], np.int64)
        images = classify_block(features, n_tiles, bundle, classifier, job.device)
        by_ordinal = {f.ordinal: image for (_, f), image in zip(diagnosed, images, strict=True)}
        rows = prediction_rows(job, members, facts, by_ordinal, bundle.spec)
        keys = [m.image_key for m, f in diagnosed for _ in range(f.n_tiles)]
        scales = [m.scale.known for m, f in diagnosed for _ in range(f.n_tiles)]
        found_cells = cell_rows(table, offsets, keys, images, to_source, scales, job.run_id)
        write_parquet(job, RunKey.part(RunKey.PREDICTIONS, job.shard.name), rows)
        write_parquet(job, RunKey.part(RunKey.CELLS, job.shard.name), found_cells)
        receipt = _receipt(job, rows, len(found_cells), written, resumed, started)
        if receipt.rows != job.shard.count:
            raise ShardError(f"shard {job.shard.name}: {receipt.rows} rows for {job.shard.count} members")
        roots = (RunKey.part(RunKey.PREDICTIONS, job.shard.name), RunKey.part(RunKey.CELLS, job.shard.name))
        marker = commit(job, "predictions", _keys(job)["predictions"], roots, receipt)
        return marker.receipt or receipt


def _receipt(
    job: ShardJob, rows: pa.Table, cells: int, written: Written | None, resumed: tuple[str, ...], started: float
) -> ShardReceipt:
    """Sum up a shard."""
    status = Counter(rows["status"].to_pylist())
    labels = Counter(rows.filter(pc.field("status") == str(Status.PREDICTED))["label"].to_pylist())
    benign, early, pre, pro = (labels[name] for name in CLASSES)
    # "out of focus: 1.8 < 4.0" is counted as "out of focus": a reason is a kind, its numbers are in the row.
    reasons = Counter(r.split(":")[0] for r in rows["reason"].to_pylist() if r)
    seconds: dict[str, float] = {}
    for timing in written.timings if written else ():
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
        labels=(benign, early, pre, pro),
        reasons=tuple(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        seconds=sum(seconds.values()),
        timings=tuple(StageTiming(stage, s, job.shard.count) for stage, s in seconds.items()),
        resumed=resumed,
    )


def _keys(job: ShardJob) -> dict[str, str]:
    """Return the content address of each stage of the job's shard."""
    bundle = opened_bundle(job.bundle, job.bundle_digest)
    return stage_keys(bundle, members_of(job), job.device)


# --- the search for a culprit ----------------------------------------------------------------------------------------


def probe(job: ShardJob) -> None:
    """Run the chain over the members in `job.only`, write nothing; the caller looks whether this process lives."""
    first, end = job.shard.first, job.shard.first + job.shard.count
    before = Written()
    while first < end:
        block = prepare(job, first)
        extract(job, segment(job, block, before))
        first = block.next
