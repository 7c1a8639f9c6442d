"""The numbers of a run as its report shows them: from its manifest or, while there is none, from what is committed."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from leukoflow.core.codec import loads
from leukoflow.runs.progress import RunBinding, RunProgress
from leukoflow.runs.records import Marker, RunManifest, ShardReceipt, SourceKind, StageTiming, read_reasons
from leukoflow.storage.base import Storage
from leukoflow.tasks.intake.plan import read_summary


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
    return [name.removesuffix(".json") for name in storage.names("markers/predictions")]


def read_receipts(storage: Storage, shards: Iterable[str]) -> Iterator[ShardReceipt]:
    """Read the receipts of shards, leaving out what was taken back in the meantime since a part was altered."""
    for shard in shards:
        try:
            marker = loads(Marker, storage.read(f"markers/predictions/{shard}.json"), f"marker of shard {shard}")
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
    binding = loads(RunBinding, storage.read("run.json"), storage.uri("run.json"))
    with storage.open("plan.parquet") as file:
        summary = read_summary(file)
    reasons: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    images: Counter[str] = Counter()
    for receipt in receipts:
        reasons.update(dict(receipt.reasons))
        for timing in receipt.timings:
            seconds[timing.stage] = seconds.get(timing.stage, 0.0) + timing.seconds
            images[timing.stage] += timing.images
    slowest = heapq.nlargest(10, ((r.shard.name, r.seconds) for r in receipts), key=lambda s: s[1])
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
            ("predicted", progress.predicted),
            ("abstained", progress.abstained),
            ("rejected", progress.rejected),
            ("quarantined", progress.quarantined),
        ),
        missing=summary.missing,
        ignored=summary.ignored,
        truncated=summary.truncated,
        conflicts=0,
        cells=sum(r.cells for r in receipts),
        reasons=read_reasons(reasons.most_common(50)),
        timings=tuple(StageTiming(stage, seconds[stage], images[stage]) for stage in seconds),
        slowest=tuple(slowest),
        startup_seconds=None,
        processing_seconds=None,
        processed=0,
        shards=binding.shards,
        shard_size=binding.shard_size,
        fingerprint=binding.fingerprint,
        software=(),
        notes=summary.remarks,
    )
