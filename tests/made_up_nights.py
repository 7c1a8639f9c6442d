"""Records of nights that need no pixels: bindings, manifests, facts about drift, and whole runs made of them."""

from __future__ import annotations

import json

import numpy as np

from leukoflow.core.codec import dumps
from leukoflow.runs.progress import Heartbeat, RunBinding, now
from leukoflow.runs.receipts import StageTiming
from leukoflow.runs.records import Marker, PartRef, RunManifest, Shard, ShardReceipt, Source, SourceKind
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.monitor.drift import QUANTITIES, DriftFacts, Group, facts_bytes

BUNDLE = "no-such-bundle"
PLACES = sum(q.places for q in QUANTITIES)


def binding(run_id: str, started_at: str, members: int = 96) -> RunBinding:
    return RunBinding(
        run_id, "f" * 16, f"/in/{run_id}.zip", members, -(-members // 32), 32, BUNDLE, "d" * 64, "cpu", started_at,
        f"leukoflow run /in/{run_id}.zip --out out --run-id {run_id}",
    )  # fmt: skip


def manifest(run_id: str, started_at: str, quarantined: int = 4, missing: int = 0) -> RunManifest:
    return RunManifest(
        run_id=run_id,
        schema_version=2,
        fingerprint="f" * 16,
        source=Source(f"/in/{run_id}.zip", SourceKind.ZIP, "identity", 1),
        source_truncated=None,
        bundle=BUNDLE,
        bundle_digest="d" * 64,
        device="cpu",
        shard_size=32,
        started_at=started_at,
        finished_at=started_at.replace("T22:00", "T22:40"),
        startup_seconds=5.0,
        processing_seconds=48.0,
        processed=96,
        members=96,
        predicted=80 - quarantined,
        abstained=12,
        rejected=4,
        quarantined=quarantined,
        missing=missing,
        ignored=0,
        cells=400,
        labels=(34, 26, 8, 12 - quarantined),
        reasons=(("ambiguous", 12), ("out of focus", 4), ("not an image", quarantined)),
        conflicts=0,
        timings=(StageTiming("segment", 9.6, 96), StageTiming("extract", 4.8, 96)),
        slowest=(("00000", 5.0),),
        parts=(),
        tables=(),
        software=(),
    )


def facts(run_id: str, seed: int, shift: float = 0.0) -> DriftFacts:
    """Twelve slides of two sites; `shift` moves the stain of Site-B by so many deviations within a slide."""
    rng = np.random.default_rng(seed)
    groups = []
    for site, move in (("Site-A", 0.0), ("Site-B", shift)):
        counts = np.zeros((6, PLACES), np.int64)
        values = 1.0 + 0.05 * (0.5 * rng.normal(size=(6, 1)) + rng.normal(size=(6, 10)) + move)
        for row, places in zip(counts, QUANTITIES[0].place(values), strict=True):
            np.add.at(row, places, 1)
        groups.append(Group(site, "Scanner-1", counts))
    return DriftFacts((run_id,), "d" * 64, now(), tuple(groups))


def put(out: str, run_id: str, day: int, shift: float = 0.0, finished: bool = True, **changes: int) -> None:
    storage = open_storage(f"{out}/{run_id}")
    started = f"2026-03-{day:02d}T22:00:00+00:00"
    storage.write("run.json", dumps(binding(run_id, started)))
    if finished:
        storage.write("manifest.json", dumps(manifest(run_id, started, **changes)))
        storage.write("drift.json", facts_bytes(facts(run_id, day, shift)))
        return
    storage.write("heartbeat.json", dumps(Heartbeat(1, "elsewhere", started, "running")))
    receipt = ShardReceipt(
        Shard(0, 0, 32), 20, 6, 4, 2, 90, (8, 6, 4, 2), (("ambiguous", 6),), 4.0, (StageTiming("segment", 3.2, 32),)
    )
    part = PartRef("predictions", "00000", "one", "key", ())
    storage.write("markers/predictions/00000.json", dumps(Marker(part, receipt)))
    storage.write("failures/00001.json", json.dumps({"message": "its worker <died>"}).encode())
