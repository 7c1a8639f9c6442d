"""A finished run of made-up figures, for tests of what is shown of runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from leukoflow.runs.progress import now
from leukoflow.runs.receipts import StageTiming
from leukoflow.runs.records import PlanSummary, RunManifest, Source, SourceKind

SUMMARY = PlanSummary(Source("smears.zip", SourceKind.ZIP, "1-2", 10), 100, 3, 0, None, 32, "d")


def manifest_of(**changes: Any) -> RunManifest:
    return replace(
        RunManifest(
            run_id="smears-1", schema_version=2, fingerprint="f", source=SUMMARY.source, source_truncated=None,
            bundle="pocket", bundle_digest="b", device="cpu", shard_size=32, started_at=now(), finished_at=now(),
            startup_seconds=12.3, processing_seconds=10.0, processed=100, members=100, predicted=90, abstained=6,
            rejected=4, quarantined=0, missing=0, ignored=3, cells=500, labels=(39, 28, 18, 5),
            reasons=(("out of focus", 4),), conflicts=0,
            timings=(StageTiming("prepare", 2.0, 100),), slowest=(), parts=(), tables=(), software=(),
        ),
        **changes,
    )  # fmt: skip
