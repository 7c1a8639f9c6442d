"""A finished run as a leukoflow of schema 1 has left it, made from one of today."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.core.codec import dumps, loads
from leukoflow.runs.progress import read_manifest
from leukoflow.runs.records import CLASSES, Marker, PartRef
from leukoflow.runs.schema import SINCE_3
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage

NEW, OLD = "out of distribution", "foreign"


def as_schema_1(root: Path, abstain: int = 0) -> None:
    """Rewrites a run's tables, markers and manifest as they were: no run in cells and slides, no square micrometres,
    labels of abstained images counted with the others, the old word for what is out of distribution, and no scale but
    what was stated.

    So many predicted rows of the first shard become abstained ones for that reason first.
    """
    storage = open_storage(str(root))
    manifest = read_manifest(storage)
    assert manifest is not None
    labels: Counter[str] = Counter()
    refs: dict[str, tuple[str, int, str]] = {}
    for path in sorted((root / "cells").iterdir()):
        refs[_key(root, path)] = _rewrite(
            storage, path, lambda t: t.drop_columns(["run_id", "nucleus_area_um2", "cell_area_um2"])
        )
    receipts = {}
    for path in sorted((root / "predictions").iterdir()):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            if abstain and row["status"] == "predicted":
                abstain -= 1
                row |= {"status": "abstained", "reason": f"{NEW}: distance from the training images 9.00 > 1.50"}
            if row["reason"] is not None:
                row["reason"] = row["reason"].replace(NEW, OLD)
            row["um_per_px"] = row["um_per_px_stated"]
        schema = pa.schema([f for f in pq.read_schema(path) if f.name not in SINCE_3])
        refs[_key(root, path)] = _rewrite(storage, path, lambda t, r=rows, s=schema: pa.Table.from_pylist(r, s))
        mine = Counter(r["label"] for r in rows if r["label"] is not None)
        labels += mine
        name = path.stem.removeprefix("part-")
        marker = loads(Marker, storage.read(f"markers/predictions/{name}.json"), name)
        assert marker.receipt is not None
        status = Counter(r["status"] for r in rows)
        kinds = Counter(r["reason"].split(":")[0] for r in rows if r["reason"])
        receipts[name] = replace(
            marker.receipt,
            predicted=status["predicted"],
            abstained=status["abstained"],
            labels=tuple(mine[c] for c in CLASSES),
            reasons=tuple(sorted(kinds.items(), key=lambda item: (-item[1], item[0]))),
        )
        part = _older(marker.part, refs)
        storage.write(f"markers/predictions/{name}.json", dumps(Marker(part, receipts[name])))
    slides = root / "slides.parquet"
    refs["slides.parquet"] = _rewrite(storage, slides, lambda t: t.drop_columns(["run_id"]))
    reasons: Counter[str] = Counter()
    for receipt in receipts.values():
        reasons.update(dict(receipt.reasons))
    storage.write(
        "manifest.json",
        dumps(
            replace(
                manifest,
                schema_version=1,
                predicted=sum(r.predicted for r in receipts.values()),
                abstained=sum(r.abstained for r in receipts.values()),
                labels=tuple(labels[c] for c in CLASSES),
                reasons=tuple(reasons.most_common()),
                parts=tuple(_older(p, refs) if p.stage == "predictions" else p for p in manifest.parts),
                tables=tuple(refs.get(f[0], f) for f in manifest.tables if f[0] != "scales.parquet"),
            )
        ),
    )
    storage.delete("drift.json")
    storage.delete("scales.parquet")


def _older(part: PartRef, refs: dict[str, tuple[str, int, str]]) -> PartRef:
    """A part with its new files, under the content key of another revision."""
    key = hashlib.sha256(f"schema 1 {part.key}".encode()).hexdigest()
    return replace(part, key=key, files=tuple(refs.get(f[0], f) for f in part.files))


def _key(root: Path, path: Path) -> str:
    return str(path.relative_to(root))


def _rewrite(storage: Storage, path: Path, change: Callable[[pa.Table], pa.Table]) -> tuple[str, int, str]:
    pq.write_table(change(pq.read_table(path)), path, compression="zstd", use_dictionary=False)
    return storage.digest(_key(Path(storage.root), path))
