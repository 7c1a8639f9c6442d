"""The numbers of a run as its report shows them: from its manifest or, while there is none, from what is committed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from leukoflow.core.codec import loads
from leukoflow.runs.layout import RunKey, Stage
from leukoflow.runs.progress import RunProgress, read_binding
from leukoflow.runs.receipts import RunTotals, StageTiming
from leukoflow.runs.records import Marker, RunManifest, ShardReceipt, SourceKind, read_reasons
from leukoflow.storage.base import Storage
from leukoflow.tasks.intake.plan_file import read_summary


@dataclass(frozen=True, slots=True)
class Totals:
    """The run's numbers; `counts` and `reasons` in the order in which they are shown, times ISO 8601."""

    run_id: str
    source_uri: str
    kind: SourceKind
    bundle: str
    bundle_digest: str
    device: str
    started_at: str
    finished_at: str | None
    members: int
    counts: tuple[tuple[str, int], ...]
    missing: int
    ignored: int
    truncated: str | None
    conflicts: int
    cells: int
    reasons: tuple[tuple[str, int], ...]
    timings: tuple[StageTiming, ...]
    slowest: tuple[tuple[str, float], ...]
    startup_seconds: float | None
    processing_seconds: float | None
    processed: int
    shards: int
    shard_size: int
    fingerprint: str
    software: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def done(self) -> int:
        """Members that have a row."""
        return sum(count for _, count in self.counts)


def committed_shards(storage: Storage) -> list[str]:
    """List the names of the shards whose predictions are committed."""
    return [RunKey.shard_of_json(name) for name in storage.names(RunKey.markers(Stage.PREDICTIONS))]


def read_receipts(storage: Storage, shards: Iterable[str]) -> Iterator[ShardReceipt]:
    """Read the receipts of shards, leaving out what was taken back in the meantime since a part was altered."""
    for shard in shards:
        try:
            marker = loads(Marker, storage.read(RunKey.marker(Stage.PREDICTIONS, shard)), f"marker of shard {shard}")
        except FileNotFoundError:
            continue
        if marker.receipt is not None:
            yield marker.receipt


def totals_of_manifest(m: RunManifest) -> Totals:
    """Take the numbers of a finished run from its manifest."""
    return Totals(
        run_id=m.run_id,
        source_uri=m.source.uri,
        kind=m.source.kind,
        bundle=m.bundle,
        bundle_digest=m.bundle_digest,
        device=m.device,
        started_at=m.started_at,
        finished_at=m.finished_at,
        members=m.members,
        counts=(
            ("predicted", m.predicted),
            ("abstained", m.abstained),
            ("rejected", m.rejected),
            ("quarantined", m.quarantined),
        ),
        missing=m.missing,
        ignored=m.ignored,
        truncated=m.source_truncated,
        conflicts=m.conflicts,
        cells=m.cells,
        reasons=read_reasons(m.reasons),
        timings=m.timings,
        slowest=m.slowest,
        startup_seconds=m.startup_seconds,
        processing_seconds=m.processing_seconds,
        processed=m.processed,
        shards=-(-m.members // m.shard_size),
        shard_size=m.shard_size,
        fingerprint=m.fingerprint,
        software=m.software,
        notes=m.notes,
    )


def totals_of_receipts(storage: Storage, progress: RunProgress, receipts: Sequence[ShardReceipt]) -> Totals:
    """Add up the numbers of an unfinished run from its plan, its progress and the receipts of its shards."""
    binding = read_binding(storage)
    with storage.open(RunKey.PLAN) as file:
        summary = read_summary(file)
    totals = RunTotals.of(receipts)
    return Totals(
        run_id=binding.run_id,
        source_uri=binding.source_uri,
        kind=summary.source.kind,
        bundle=binding.bundle,
        bundle_digest=binding.bundle_digest,
        device=binding.device,
        started_at=binding.started_at,
        finished_at=None,
        members=binding.members,
        counts=(
            ("predicted", progress.counts.predicted),
            ("abstained", progress.counts.abstained),
            ("rejected", progress.counts.rejected),
            ("quarantined", progress.counts.quarantined),
        ),
        missing=summary.missing,
        ignored=summary.ignored,
        truncated=summary.truncated,
        conflicts=0,
        cells=totals.counts.cells,
        reasons=read_reasons(totals.frequent_reasons),
        timings=totals.timings,
        slowest=totals.slowest,
        startup_seconds=None,
        processing_seconds=None,
        processed=0,
        shards=binding.shards,
        shard_size=binding.shard_size,
        fingerprint=binding.fingerprint,
        software=(),
        notes=summary.remarks,
    )
