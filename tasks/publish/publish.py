"""Publish a run: reconcile plan and parts, rank slides, flag mixed-up patients, and write the manifest last of all."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.cluster.host import software
from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import ReconciliationError
from leukoflow.runs.layout import RunKey, Stage
from leukoflow.runs.progress import now, read_manifest
from leukoflow.runs.receipts import RunTotals
from leukoflow.runs.records import Host, PartRef, RunManifest, ScaleSource, ShardReceipt, Status
from leukoflow.runs.schema import SCHEMA_VERSION
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.inference.worker import open_plan
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.plan_file import shards
from leukoflow.tasks.publish.ranking import CONFLICT_COLUMNS, Ranking, SharedImages, list_conflicts
from leukoflow.tasks.review.wording import scale_note
from leukoflow.tasks.store.commit import ACTIVATIONS, STAGES, read_marker

NAMED = 5


def publish(
    run: Run, startup_seconds: float, processing_seconds: float, processed: int, notes: tuple[str, ...] = ()
) -> RunManifest:
    """Write slides, duplicates and manifest. Raises ReconciliationError unless every member has exactly one row.

    `notes` are for people, beside those that the parts give rise to. Where another command has published the run
    meanwhile, its manifest stands and is returned: the run may have been compacted since, or changed by an erasure.
    """
    storage = open_storage(run.root)
    if (theirs := read_manifest(storage)) is not None:
        return theirs
    totals = RunTotals.of(_receipts(run, storage))
    slides, conflicts, rows, guessed = _read_tables(run, storage)
    expected = run.summary.members
    counted = totals.counts.accounted
    if not rows == counted == expected:
        raise ReconciliationError(
            f"run {run.run_id}: {expected} members, {rows} rows, {counted} accounted for; nothing is published. "
            f"Run the same command again; if it stays, delete {storage.uri(RunKey.MARKERS)} and rerun"
        )
    if (theirs := read_manifest(storage)) is not None:  # looked at again, since the tables take their time
        return theirs
    tables = [_table(storage, RunKey.SLIDES, slides)]
    if len(conflicts):
        tables.append(_table(storage, RunKey.DUPLICATES, conflicts))
    else:
        storage.delete(RunKey.DUPLICATES)
    tables.append(storage.digest(RunKey.PLAN))
    tables.append(storage.digest(RunKey.SCALES))
    if run.summary.missing:
        tables.append(storage.digest(RunKey.MISSING))
    parts = tuple(_parts(run, storage))
    counts = totals.counts
    manifest = RunManifest(
        run_id=run.run_id,
        schema_version=SCHEMA_VERSION,
        fingerprint=run.fingerprint,
        source=run.source,
        source_truncated=run.summary.truncated,
        bundle=run.binding.bundle,
        bundle_digest=run.bundle.digest,
        device=run.device,
        shard_size=run.summary.shard_size,
        started_at=run.binding.started_at,
        finished_at=now(),
        startup_seconds=startup_seconds,
        processing_seconds=processing_seconds,
        processed=processed,
        members=expected,
        predicted=counts.predicted,
        abstained=counts.abstained,
        rejected=counts.rejected,
        quarantined=counts.quarantined,
        missing=run.summary.missing,
        ignored=run.summary.ignored,
        cells=counts.cells,
        labels=counts.labels,
        reasons=totals.frequent_reasons,
        conflicts=len(conflicts),
        timings=totals.timings,
        slowest=totals.slowest,
        parts=parts,
        tables=tuple(tables),
        software=software(),
        notes=(
            *run.summary.remarks,
            *_notes(run, parts),
            *filter(None, [scale_note(guessed, sum(slides["n_abstained"].to_pylist()))]),
            *notes,
        ),
        hosts=_hosts(storage),
        config=run.config.canonical(),
        bundle_reference=run.binding.bundle_reference,
        shadow_of=run.binding.shadow_of,
    )
    if not storage.create(RunKey.MANIFEST, dumps(manifest)) and (theirs := read_manifest(storage)) is not None:
        return theirs
    return manifest


def _receipts(run: Run, storage: Storage) -> Iterator[ShardReceipt]:
    """Yield the receipt of every shard, in the order of the plan."""
    for shard in shards(run.summary):
        marker = read_marker(storage, Stage.PREDICTIONS, shard)
        if marker is None or marker.receipt is None:
            raise ReconciliationError(
                f"run {run.run_id}: shard {shard.name} is not committed; run the same command again"
            )
        yield marker.receipt


def _parts(run: Run, storage: Storage) -> Iterator[PartRef]:
    for shard in shards(run.summary):
        for stage in STAGES:
            marker = read_marker(storage, stage, shard)
            if marker is None and stage == ACTIVATIONS:
                continue
            if marker is None:
                raise ReconciliationError(f"run {run.run_id}: stage {stage} of shard {shard.name} is not committed")
            yield marker.part


def _hosts(storage: Storage) -> tuple[Host, ...]:
    """Read the kinds of machines that have committed parts of this run, in all its sessions."""
    names = storage.names(RunKey.HOSTS)
    return tuple(loads(Host, storage.read(RunKey.host(name)), storage.uri(RunKey.host(name))) for name in names)


def _notes(run: Run, parts: Sequence[PartRef]) -> tuple[str, ...]:
    """Say which shards have no activation maps, why, and how to have them."""
    mapped = {part.shard for part in parts if part.stage == ACTIVATIONS}
    bare = [shard.name for shard in shards(run.summary) if shard.name not in mapped]
    if not bare:
        return ()
    named = ", ".join(bare[:NAMED]) + (", ..." if len(bare) > NAMED else "")
    return (
        f"activation maps are absent for {len(bare)} of {run.summary.shards} shards ({named}): their features were "
        "taken over without maps of this classifier, or the maps were lost; a new run without --reuse makes them",
    )


def _table(storage: Storage, name: str, table: pa.Table) -> tuple[str, int, str]:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    storage.write(name, sink.getvalue())
    return storage.digest(name)


def _read_tables(run: Run, storage: Storage) -> tuple[pa.Table, pa.Table, int, int]:
    """Pass over the predictions once, a part at a time.

    Return slides, conflicts, the number of rows, and how many abstentions are from pictures of assumed
    scale. Keys are compared with the plan's, part by part, so that a row too few, too many or for somebody else is
    found.
    """
    ranking, images = Ranking(), SharedImages()
    frozen, rows, guessed = open_plan(run.root), 0, 0
    columns = [
        "run_id", "image_key", "member_sha256", "slide_id", "patient_id", "site", "status", "n_cells",
        "prob_benign", "prob_early", "prob_pre", "prob_pro", "confidence", "um_per_px_source",
    ]  # fmt: skip
    for shard in shards(run.summary):
        part = _read_part(storage, shard.name, columns)
        planned = frozen.read_row_group(shard.ordinal, columns=["image_key"])["image_key"]
        if not part["image_key"].combine_chunks().equals(planned.combine_chunks()):
            raise ReconciliationError(f"run {run.run_id}: the rows of shard {shard.name} are not the plan's members")
        rows += len(part)
        found = part.to_pylist()
        images.add(found)
        for row in found:
            ranking.add(row)
            if row["status"] == Status.ABSTAINED:
                guessed += row["um_per_px_source"] == ScaleSource.ASSUMED
    shared = images.digests()
    parts = (_read_part(storage, shard.name, CONFLICT_COLUMNS) for shard in shards(run.summary) if shared)
    return ranking.table(), list_conflicts(parts, shared), rows, guessed


def _read_part(storage: Storage, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
    with storage.open(RunKey.part(RunKey.PREDICTIONS, shard)) as file:
        return pq.read_table(file, columns=list(columns) if columns else None)
