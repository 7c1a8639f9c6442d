"""Hold what a run has recorded against itself: manifest, markers, receipts and rows; nothing is read here.

Each check takes records or tables and says what is wrong; `tasks/upkeep/verify.py` reads them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from leukoflow.core.codec import dumps
from leukoflow.runs.layout import RunKey
from leukoflow.runs.progress import RunBinding
from leukoflow.runs.receipts import RunTotals
from leukoflow.runs.records import CLASSES, Marker, PartRef, RunManifest, ShardReceipt, Status
from leukoflow.runs.schema import SCHEMA_VERSION
from leukoflow.tasks.store.tables import is_merged, shard_counts, shard_name, span

_DIAGNOSED = (str(Status.PREDICTED), str(Status.ABSTAINED))


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """One thing that is wrong: where, what, and what to do about it."""

    where: str
    what: str
    remedy: str


def publish_again(command: str) -> str:
    """Say how the manifest and the summary tables are written again from what is committed."""
    return f"delete {RunKey.MANIFEST} and repeat the run's command, which publishes it again: {command}"


def compute_again(command: str) -> str:
    """Say how parts are repaired."""
    return f"repeat the run's command, which computes again what does not hold: {command}"


def in_manifest(what: str, command: str) -> Discrepancy:
    """Return what is wrong with the manifest, which is published again by `command`."""
    return Discrepancy(RunKey.MANIFEST, what, publish_again(command))


def as_written(data: bytes, record: object) -> bool:
    """Say whether leukoflow writes the record with these bytes, but for fields that an older version did not have."""
    found = json.loads(data)
    text = json.dumps(found, ensure_ascii=False, sort_keys=True, indent=1) + "\n"
    return text.encode() == data and _within(found, json.loads(dumps(record)))


def _within(found: Any, whole: Any) -> bool:
    if isinstance(found, dict) and isinstance(whole, dict):
        return all(key in whole and _within(value, whole[key]) for key, value in found.items())
    if isinstance(found, list) and isinstance(whole, list):
        return len(found) == len(whole) and all(map(_within, found, whole))
    return bool(found == whole)


def check_manifest(m: RunManifest, data: bytes, command: str) -> Iterator[Discrepancy]:
    """Check that a manifest agrees with itself."""
    if not as_written(data, m):
        yield in_manifest("its text is not as it was written; somebody has edited it", command)
    if not 1 <= m.schema_version <= SCHEMA_VERSION:
        yield Discrepancy(
            RunKey.MANIFEST,
            f"it has schema version {m.schema_version}, this leukoflow knows {SCHEMA_VERSION}",
            "verify it with the version of leukoflow that wrote it",
        )
    if m.counts.accounted != m.members:
        yield in_manifest("its totals do not balance", command)
    if sum(m.labels) != labelled(m, m.schema_version):
        yield in_manifest("the number of its labels is not that of the images that they count", command)
    seen: set[tuple[str, int]] = set()
    stages = list(dict.fromkeys(part.stage for part in m.parts))
    for part in m.parts:
        for ordinal in span(part):
            if (part.stage, ordinal) in seen:
                yield in_manifest(f"it lists stage {part.stage} of shard {shard_name(ordinal)} twice", command)
            seen.add((part.stage, ordinal))
    for ordinal in range(len(shard_counts(m))):
        for stage in stages:
            if (stage, ordinal) not in seen:
                yield in_manifest(f"it does not list stage {stage} of shard {shard_name(ordinal)}", command)
    if not stages and m.members:
        yield in_manifest("it lists no parts", command)


def check_binding(m: RunManifest, binding: RunBinding) -> Iterator[Discrepancy]:
    """Check that `run.json` and the manifest speak of the same run."""
    for name, mine, theirs in (
        ("run_id", binding.run_id, m.run_id),
        ("fingerprint", binding.fingerprint, m.fingerprint),
        ("source_uri", binding.source_uri, m.source.uri),
        ("members", binding.members, m.members),
        ("shard_size", binding.shard_size, m.shard_size),
        ("shards", binding.shards, len(shard_counts(m))),
        ("bundle", binding.bundle, m.bundle),
        ("bundle_digest", binding.bundle_digest, m.bundle_digest),
        ("bundle_reference", binding.bundle_reference, m.bundle_reference),
        ("shadow_of", binding.shadow_of, m.shadow_of),
        ("device", binding.device, m.device),
        ("started_at", binding.started_at, m.started_at),
        ("plan_sha256", binding.plan_sha256, {key: sha for key, _, sha in m.tables}.get(RunKey.PLAN)),
    ):
        if mine != theirs and not (name == "plan_sha256" and mine == ""):
            yield Discrepancy(
                RunKey.BINDING,
                f"its {name} is {mine!r}, the manifest's {theirs!r}",
                "one of the two was altered: take both from a backup, or run the source again under another --run-id",
            )


def labelled(counts: RunManifest | ShardReceipt, schema_version: int) -> int:
    """Return how many images the labels of a manifest or receipt count: until schema 2, abstained ones as well."""
    return counts.predicted + (counts.abstained if schema_version < 2 else 0)


def check_marker(
    marker: Marker, part: PartRef, data: bytes, stages: Collection[str], schema_version: int = SCHEMA_VERSION
) -> str | None:
    """Say what is wrong with a marker, given the part that the manifest lists; None when nothing is."""
    if not as_written(data, marker):
        return "its text is not as it was written"
    if not is_merged(part):
        if marker.part != part:
            return "it names other files or another origin than the manifest"
    elif marker.part.stage != part.stage or int(marker.part.shard) not in span(part):
        return "it belongs to another shard"
    receipt = marker.receipt
    if receipt is None:
        return None
    if receipt.shard.name != marker.part.shard or receipt.rows != receipt.shard.count:
        return f"it accounts for {receipt.rows} of {receipt.shard.count} members"
    if sum(receipt.labels) != labelled(receipt, schema_version):
        return "the number of its labels is not that of the images that they count"
    if receipt.seconds != sum(t.seconds for t in receipt.timings):
        return "its seconds are not those of its stages"
    if not set(receipt.resumed) <= set(stages):
        return "it names a stage to resume from that does not exist"
    return None


def check_totals(totals: RunTotals, m: RunManifest) -> Iterator[str]:
    """Say in which sums the markers and the manifest differ."""
    for name in ("predicted", "abstained", "rejected", "quarantined", "cells"):
        found, listed = getattr(totals.counts, name), getattr(m, name)
        if found != listed:
            yield f"{name} is {listed:,}, the markers add up to {found:,}"
    if totals.counts.labels != m.labels:
        yield f"labels are {m.labels}, the markers add up to {totals.counts.labels}"
    if totals.frequent_reasons != m.reasons:
        yield "reasons are not those of the markers"
    if totals.timings != m.timings:
        yield "seconds per stage are not those of the markers"
    if totals.slowest != m.slowest:
        yield "the slowest shards are not those of the markers"


def check_rows(planned: pa.Table, rows: pa.Table, m: RunManifest, shard: str) -> str | None:
    """Say what is wrong with a shard's predictions, given its rows of the plan; None when nothing is."""
    if len(rows) < len(planned):
        return f"{len(rows)} rows for {len(planned)} members"
    for name in planned.column_names:
        if not rows[name].combine_chunks().equals(planned[name].combine_chunks()):
            return f"its {name} are not those of the plan's members"
    for name, value in (
        ("run_id", m.run_id),
        ("source_uri", m.source.uri),
        ("bundle_digest", m.bundle_digest),
        ("shard", shard),
    ):
        if pc.any(pc.not_equal(rows[name], value)).as_py():
            return f"its {name} is not {value!r} in every row"
    status = rows["status"]
    if not pc.all(pc.is_in(status, pa.array([str(s) for s in Status]))).as_py():
        return "a status is none of " + ", ".join(Status)
    diagnosed = pc.is_in(status, pa.array(_DIAGNOSED))
    for name in ("label", "confidence", "prob_benign", "prob_early", "prob_pre", "prob_pro"):
        if pc.any(pc.not_equal(diagnosed, pc.is_valid(rows[name]))).as_py():
            return f"its {name} is null in a diagnosed row, or not in one without a diagnosis"
    return None


def check_stated(planned: pa.ChunkedArray, stated: pa.ChunkedArray) -> str | None:
    """Say whether predictions state another scale than the plan does; where it states none, a file's own may stand."""
    same = pc.or_(pc.is_null(planned), pc.fill_null(pc.equal(planned, stated), False))
    return None if pc.all(same).as_py() else "its stated um_per_px are not those of the plan's members"


def count_rows(rows: pa.Table, into: Counter[str], schema_version: int = SCHEMA_VERSION) -> None:
    """Add a table's statuses, and the labels that a manifest of this schema version counts."""
    counted = rows if schema_version < 2 else rows.filter(pc.field("status") == str(Status.PREDICTED))
    for column in (rows["status"], counted["label"]):
        for entry in pc.value_counts(column.combine_chunks()).to_pylist():
            if entry["values"] is not None:
                into[entry["values"]] += entry["counts"]


def check_cells(rows: pa.Table, cells: pa.Table | None) -> str | None:
    """Say what is wrong with a shard's cells, given its predictions; None when nothing is."""
    keys = rows["image_key"].combine_chunks()
    wanted = keys.take(pa.array(np.repeat(np.arange(len(rows)), rows["n_cells"].fill_null(0).to_numpy())))
    found = pa.array([], pa.string()) if cells is None else cells["image_key"].combine_chunks()
    if found.equals(wanted):
        return None
    return "it does not have the cells that its predictions count, in their order"


def check_counts(counted: Mapping[str, int], m: RunManifest) -> Iterator[str]:
    """Say where the rows and the manifest's totals differ."""
    for name in Status:
        if counted.get(name, 0) != getattr(m, name):
            yield f"{name} is {getattr(m, name):,}, the rows add up to {counted.get(name, 0):,}"
    labels = tuple(counted.get(c, 0) for c in CLASSES)
    if labels != m.labels:
        yield f"labels are {m.labels}, the rows add up to {labels}"
