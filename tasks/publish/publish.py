"""The last step: reconcile plan and parts, rank slides, flag mixed-up patients, and write the manifest last of all."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leukoflow.cluster.host import software
from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import ReconciliationError
from leukoflow.runs.layout import RunKey, Stage
from leukoflow.runs.progress import now, read_manifest
from leukoflow.runs.receipts import RunTotals
from leukoflow.runs.records import CLASSES, Host, PartRef, RunManifest, ShardReceipt, Status
from leukoflow.runs.schema import DUPLICATES, SCHEMA_VERSION, SLIDES
from leukoflow.storage.base import Storage
from leukoflow.tasks.inference.shard import ACTIVATIONS, STAGES, open_plan, read_marker
from leukoflow.tasks.intake.open_run import Run
from leukoflow.tasks.intake.plan import shards
from leukoflow.tasks.review.wording import Scale, scale_note
from leukoflow.tasks.store.slides import MALIGNANT, mean_malignant_probability, slide_of, urgency_of

RANKED = (
    "run_id", "image_key", "slide_id", "patient_id", "site", "status", "n_cells", "prob_benign", "prob_early",
    "prob_pre", "prob_pro",
)  # fmt: skip
"""Columns of the predictions that the ranking of the slides looks at."""
NAMED = 5


@dataclass(slots=True)
class _Slide:
    """Running sums of one slide; never more than one slide's numbers, however many fields it has."""

    run_id: str
    grouping: str
    patient_id: str | None
    site: str | None
    status: Counter[str] = field(default_factory=Counter)
    probabilities: NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))
    malignant: int = 0
    cells: int = 0
    top: tuple[float, str] | None = None


def publish(
    run: Run, startup_seconds: float, processing_seconds: float, processed: int, notes: tuple[str, ...] = ()
) -> RunManifest:
    """Writes slides, duplicates and manifest. Raises ReconciliationError unless every member has exactly one row.

    `notes` are for people, beside those that the parts give rise to. Where another command has published the run
    meanwhile, its manifest stands and is returned: the run may have been compacted since, or changed by an erasure.
    """
    storage = Storage(run.root)
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
            *_scale_notes(run, guessed, sum(slides["n_abstained"].to_pylist())),
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
    """The kinds of machines that have committed parts of this run, in all its sessions."""
    names = storage.names(RunKey.HOSTS)
    return tuple(loads(Host, storage.read(RunKey.host(name)), storage.uri(RunKey.host(name))) for name in names)


def _notes(run: Run, parts: Sequence[PartRef]) -> tuple[str, ...]:
    """Says which shards have no activation maps, why, and how to have them."""
    mapped = {part.shard for part in parts if part.stage == ACTIVATIONS}
    bare = [shard.name for shard in shards(run.summary) if shard.name not in mapped]
    if not bare:
        return ()
    named = ", ".join(bare[:NAMED]) + (", ..." if len(bare) > NAMED else "")
    return (
        f"activation maps are absent for {len(bare)} of {run.summary.shards} shards ({named}): their features were "
        "taken over without maps of this classifier, or the maps were lost; a new run without --reuse makes them",
    )


def _scale_notes(run: Run, guessed: int, abstained: int) -> tuple[str, ...]:
    note = scale_note(guessed, abstained, run.bundle.spec.method.segment)
    return (note,) if note else ()


def _table(storage: Storage, name: str, table: pa.Table) -> tuple[str, int, str]:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    storage.write(name, sink.getvalue())
    return storage.digest(name)


def _read_tables(run: Run, storage: Storage) -> tuple[pa.Table, pa.Table, int, int]:
    """One pass over the predictions, a part at a time: slides, conflicts, the number of rows, and how many abstentions
    are from pictures whose scale is a guess.

    Keys are compared with the plan's, part by part, so that a row too few, too many or for somebody else is found.
    """
    slides: dict[str, _Slide] = {}
    hashes: list[NDArray[np.uint64]] = []
    patients: list[NDArray[np.uint64]] = []
    frozen, rows, guessed = open_plan(run.root), 0, 0
    settings = run.bundle.spec.method.segment
    columns = [
        "run_id", "image_key", "member_sha256", "slide_id", "patient_id", "site", "status", "n_cells",
        "prob_benign", "prob_early", "prob_pre", "prob_pro", "confidence", "um_per_px", "width_px", "height_px",
    ]  # fmt: skip
    for shard in shards(run.summary):
        part = _read_part(storage, shard.name, columns)
        planned = frozen.read_row_group(shard.ordinal, columns=["image_key"])["image_key"]
        if not part["image_key"].combine_chunks().equals(planned.combine_chunks()):
            raise ReconciliationError(f"run {run.run_id}: the rows of shard {shard.name} are not the plan's members")
        rows += len(part)
        pairs = []
        for row in part.to_pylist():
            _count(slides, row)
            if row["status"] == Status.ABSTAINED:
                guessed += Scale(row["width_px"], row["height_px"], row["um_per_px"], settings).guessed
            if row["member_sha256"] and row["patient_id"]:
                pairs.append((int(row["member_sha256"][:16], 16), hash_patient(row["patient_id"])))
        if pairs:
            array = np.array(pairs, np.uint64)
            hashes.append(array[:, 0])
            patients.append(array[:, 1])
    shared = _shared_hashes(hashes, patients)
    parts = (_read_part(storage, shard.name, CONFLICT_COLUMNS) for shard in shards(run.summary) if shared)
    return _slides_table(slides), _conflicts(parts, shared), rows, guessed


def hash_patient(patient_id: str) -> int:
    """64 bits of a pseudonym (`p_` and hex digits), enough to tell patients apart while counting."""
    return int(patient_id.removeprefix("p_")[:16], 16)


def _read_part(storage: Storage, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
    with storage.open(RunKey.part(RunKey.PREDICTIONS, shard)) as file:
        return pq.read_table(file, columns=list(columns) if columns else None)


def _shared_hashes(hashes: list[NDArray[np.uint64]], patients: list[NDArray[np.uint64]]) -> set[int]:
    """Image digests (64 bits) that occur under more than one patient."""
    if not hashes:
        return set()
    pairs = np.unique(np.stack([np.concatenate(hashes), np.concatenate(patients)], axis=1), axis=0)
    values, counts = np.unique(pairs[:, 0], return_counts=True)
    return {int(v) for v in values[counts > 1]}


CONFLICT_COLUMNS = ("member_sha256", "image_key", "patient_id", "shard")


def _conflicts(parts: Iterable[pa.Table], shared: set[int]) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for part in parts:
        rows += [r for r in part.to_pylist() if r["member_sha256"] and int(r["member_sha256"][:16], 16) in shared]
    return pa.Table.from_pylist(sorted(rows, key=lambda r: (r["member_sha256"], r["image_key"])), DUPLICATES)


def _count(slides: dict[str, _Slide], row: dict[str, Any]) -> None:
    """Adds a field to its slide: by `slide_id` where the manifest gave one, else by the folder it lies in."""
    grouping, slide_id = slide_of(row["slide_id"], row["image_key"])
    slide = slides.get(f"{grouping}:{slide_id}")
    if slide is None:
        slide = slides[f"{grouping}:{slide_id}"] = _Slide(row["run_id"], grouping, row["patient_id"], row["site"])
    if slide.patient_id is None:  # of an image without a line in the manifest, the slide is known and the patient not
        slide.patient_id = row["patient_id"]
    if slide.site is None:
        slide.site = row["site"]
    slide.status[row["status"]] += 1
    slide.cells += row["n_cells"] or 0
    if row["status"] != Status.PREDICTED:
        return
    p = np.array([row["prob_benign"], row["prob_early"], row["prob_pre"], row["prob_pro"]])
    slide.probabilities += p
    malignant = float(p[MALIGNANT].sum())
    slide.malignant += malignant > 0.5
    if slide.top is None or (malignant, row["image_key"]) > slide.top:
        slide.top = (malignant, row["image_key"])


def find_conflicts(read: Callable[[Sequence[str]], Iterable[pa.Table]]) -> pa.Table:
    """`duplicates.parquet` from the rows of `predictions/`, which `read` streams, given columns; it is called twice."""
    hashes: list[NDArray[np.uint64]] = []
    patients: list[NDArray[np.uint64]] = []
    for piece in read(["member_sha256", "patient_id"]):
        pairs = [
            (int(row["member_sha256"][:16], 16), hash_patient(row["patient_id"]))
            for row in piece.to_pylist()
            if row["member_sha256"] and row["patient_id"]
        ]
        if pairs:
            array = np.array(pairs, np.uint64)
            hashes.append(array[:, 0])
            patients.append(array[:, 1])
    shared = _shared_hashes(hashes, patients)
    return _conflicts(read(CONFLICT_COLUMNS) if shared else (), shared)


def rank_slides(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """`slides.parquet` from the rows of `predictions/`."""
    slides: dict[str, _Slide] = {}
    for row in rows:
        _count(slides, row)
    return _slides_table(slides)


def _slides_table(slides: dict[str, _Slide]) -> pa.Table:
    """Slides by urgency."""
    rows = []
    for key, slide in slides.items():
        n = slide.status[Status.PREDICTED]
        mean = slide.probabilities / n if n else None
        malignant = float(slide.probabilities[MALIGNANT].sum())
        rows.append(
            {
                "run_id": slide.run_id,
                "slide_id": key.split(":", 1)[1],
                "grouping": slide.grouping,
                "patient_id": slide.patient_id,
                "site": slide.site,
                "urgency": urgency_of(malignant, n),
                "label": None if mean is None else CLASSES[int(mean.argmax())],
                "malignant_score": float(mean_malignant_probability(slide.probabilities, n)) if n else None,
                "prob_benign": None if mean is None else float(mean[0]),
                "prob_early": None if mean is None else float(mean[1]),
                "prob_pre": None if mean is None else float(mean[2]),
                "prob_pro": None if mean is None else float(mean[3]),
                "n_images": slide.status.total(),
                "n_predicted": n,
                "n_abstained": slide.status[Status.ABSTAINED],
                "n_rejected": slide.status[Status.REJECTED],
                "n_quarantined": slide.status[Status.QUARANTINED],
                "n_malignant": int(slide.malignant),
                "n_cells": slide.cells,
                "top_image_key": slide.top and slide.top[1],
                "top_confidence": slide.top and slide.top[0],
            }
        )
    rows.sort(key=lambda r: (-r["urgency"], r["slide_id"]))
    for rank, row in enumerate(rows, 1):
        row["rank"] = rank
    return pa.Table.from_pylist(rows, SLIDES)
