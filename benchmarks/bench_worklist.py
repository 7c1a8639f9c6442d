"""The worklist of a run of 100,000 fields: opening, filtering, sorting, turning pages, a patient's course.

The run is written with the product's own schemas, shard by shard, without any image. Everything is measured in a
process of its own that has read none of it; wall and processor seconds are reported, since machines are shared.

By hand: `python -m benchmarks.bench_worklist [FIELDS]`.
"""

from __future__ import annotations

import hashlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leukoflow.core.codec import dumps
from leukoflow.runs.progress import RunBinding
from leukoflow.runs.records import CLASSES, PartRef, PlanSummary, RunManifest, Source, SourceKind, Status
from leukoflow.runs.schema import CELLS, PREDICTIONS, SCHEMA_VERSION
from leukoflow.tasks.intake.plan_file import plan_schema

FIELDS = 100_000
SHARD = 128  # the default, which makes most files
FIELDS_PER_SLIDE, SLIDES_PER_PATIENT = 20, 3
CELLS_PER_FIELD = 8
RUN = "night"


def _table(arrays: dict[str, Any], schema: pa.Schema, n: int) -> pa.Table:
    columns = [pa.array(arrays[f.name], f.type) if f.name in arrays else pa.nulls(n, f.type) for f in schema]
    return pa.table(columns, schema=schema)


def _rows(rng: np.random.Generator, first: int, n: int) -> dict[str, Any]:
    """Columns of predictions and of cells for the fields from `first` on."""
    index = np.arange(first, first + n)
    slide = index // FIELDS_PER_SLIDE
    lean = np.array([[6, 1, 1, 1], [1, 6, 1, 0.5], [0.5, 1, 6, 1], [0.5, 0.5, 1, 6]])[slide % 4]
    raised = rng.gamma(lean)
    p = raised / raised.sum(1, keepdims=True)
    draw = rng.random(n)
    status = np.where(draw < 0.88, "predicted", np.where(draw < 0.96, "abstained", np.where(draw < 0.99, "rejected",
                                                                                         "quarantined")))  # fmt: skip
    known = np.isin(status, ["predicted", "abstained"])
    reason = np.where(status == "predicted", None, np.where(status == "abstained", "ambiguous: confidence 0.41 < 0.53",
                                                            "out of focus: 0.1 < 0.5")).astype(object)  # fmt: skip
    sets = [[c for c, v in zip(CLASSES, row, strict=True) if v > 0.25] for row in p]
    keys = [f"ward-{s % 9}/slide-{s:05d}/field-{i:06d}.jpg" for i, s in zip(index, slide, strict=True)]
    number = np.where(known, rng.poisson(CELLS_PER_FIELD, n), 0)
    pick = [None if not k else v for k, v in zip(known, p.max(1), strict=True)]
    found: dict[str, Any] = {
        "run_id": [RUN] * n,
        "image_key": keys,
        "source_uri": ["/data/night.zip"] * n,
        "member_sha256": [hashlib.sha256(k.encode()).hexdigest() for k in keys],
        "slide_id": [f"SL-{s:05d}" for s in slide],
        "patient_id": [f"p_{hashlib.md5(str(s // SLIDES_PER_PATIENT).encode()).hexdigest()}" for s in slide],
        "site": [f"Site-{s % 3}" for s in slide],
        "scanner": [f"Scanner-{s % 5}" for s in slide],
        "um_per_px": [0.42] * n,
        "status": status,
        "reason": reason,
        "label": [None if not k else CLASSES[int(c)] for k, c in zip(known, p.argmax(1), strict=True)],
        "confidence": pick,
        "prediction_set": [None if not k else s for k, s in zip(known, sets, strict=True)],
        "ood_score": [None if not k else 1.0 for k in known],
        "n_cells": [None if not k else int(c) for k, c in zip(known, number, strict=True)],
        "shard": [f"{first // SHARD:05d}"] * n,
        "zarr_index": [None if not k else i for i, k in enumerate(known)],
        "n_tiles": known.astype(np.int32),
        "bundle_digest": ["b" * 64] * n,
    }
    for c, name in enumerate(("prob_benign", "prob_early", "prob_pre", "prob_pro")):
        found[name] = [None if not k else float(v) for k, v in zip(known, p[:, c], strict=True)]
    return {"predictions": found, "number": number}


def _cells(rng: np.random.Generator, keys: list[str], number: np.ndarray[Any, Any]) -> pa.Table:
    m = int(number.sum())
    arrays: dict[str, Any] = {f.name: rng.random(m, np.float32) for f in CELLS if pa.types.is_float32(f.type)}
    arrays["run_id"] = np.full(m, RUN, object)
    arrays["image_key"] = np.repeat(np.array(keys, object), number)
    arrays["cell_id"] = np.concatenate([np.arange(1, k + 1) for k in number]) if m else []
    arrays["touches_border"] = np.zeros(m, np.bool_)
    arrays["zarr_index"] = np.repeat(np.arange(len(keys)), number)
    return _table(arrays, CELLS, m)


def write_run(out: Path, fields: int) -> None:
    """A finished run of so many fields, without masks, features and pictures."""
    root, rng = out / RUN, np.random.default_rng(0)
    for name in ("predictions", "cells"):
        (root / name).mkdir(parents=True, exist_ok=True)
    source = Source("/data/night.zip", SourceKind.ZIP, "0", 0)
    parts, counts, labels = [], dict.fromkeys(map(str, Status), 0), [0, 0, 0, 0]
    cells, schema = 0, plan_schema()
    with pq.ParquetWriter(root / "plan.parquet", schema, compression="zstd", use_dictionary=False) as plan:
        for first in range(0, fields, SHARD):
            n = min(SHARD, fields - first)
            made = _rows(rng, first, n)
            columns, name = made["predictions"], f"{first // SHARD:05d}"
            files = []
            own = _cells(rng, columns["image_key"], made["number"])
            tables = {"predictions": _table(columns, PREDICTIONS, n)}
            if first // SHARD == fields // 2 // SHARD:  # where cells are looked up
                tables["cells"] = own
            for folder, table in tables.items():
                sink = io.BytesIO()
                pq.write_table(table, sink, compression="zstd", use_dictionary=False)
                data = sink.getvalue()
                (root / folder / f"part-{name}.parquet").write_bytes(data)
                files.append((f"{folder}/part-{name}.parquet", len(data), hashlib.sha256(data).hexdigest()))
            parts.append(PartRef("predictions", name, "one", name, tuple(files)))
            cells += len(own)
            for status in columns["status"]:
                counts[str(status)] += 1
            for label, status in zip(columns["label"], columns["status"], strict=True):
                if str(status) == "predicted":
                    labels[CLASSES.index(label)] += 1
            zeros = dict.fromkeys(("offset", "stored_bytes", "size_bytes", "method"), np.zeros(n, np.int64))
            planned = {name: columns[name] for name in schema.names if name in columns}
            planned |= {"ordinal": np.arange(first, first + n), "locator": columns["image_key"], "identity": ["0"] * n}
            plan.write_table(_table({**zeros, **planned}, schema, n))
        summary = PlanSummary(source, fields, 0, 0, None, SHARD, "0")
        plan.add_key_value_metadata({"leukoflow.plan": json.dumps(asdict(summary))})
    at = "2026-03-01T02:00:00+00:00"
    binding = RunBinding(
        RUN, "f" * 64, source.uri, fields, len(parts), SHARD, "pocket", "b" * 64, "cpu", at, "leukoflow run"
    )
    (root / "run.json").write_bytes(dumps(binding))
    manifest = RunManifest(
        run_id=RUN, schema_version=SCHEMA_VERSION, fingerprint="f" * 64, source=source, source_truncated=None,
        bundle="pocket", bundle_digest="b" * 64, device="cpu", shard_size=SHARD, started_at=at, finished_at=at,
        startup_seconds=1.0, processing_seconds=1.0, processed=fields, members=fields, **counts, missing=0, ignored=0,
        cells=cells, labels=(labels[0], labels[1], labels[2], labels[3]), reasons=(), conflicts=0, timings=(),
        slowest=(), parts=tuple(parts), tables=(), software=(),
    )  # fmt: skip
    (root / "manifest.json").write_bytes(dumps(manifest))


def measure(out: str) -> None:
    """Prints what each step costs, as `what: wall ms, processor ms`."""
    from leukoflow.tasks.review.keys import run_key_of
    from leukoflow.tasks.review.query import Query, Review, Sort
    from leukoflow.tasks.review.runs import list_runs, open_run_table
    from leukoflow.tasks.review.timeline import timeline
    from leukoflow.tasks.review.verdict_record import Action
    from leukoflow.tasks.review.verdicts import add_all

    key = run_key_of(RUN)
    pa.array(["what the first list brings in"])  # pandas, where it is installed; a server has done so long before

    def timed(what: str, call: Callable[[], Any], times: int = 1) -> Any:
        walls, cpus = [], []
        for _ in range(times):
            wall, cpu = time.perf_counter(), time.process_time()
            found = call()
            walls.append(1000 * (time.perf_counter() - wall))
            cpus.append(1000 * (time.process_time() - cpu))
        print(f"{what}: {statistics.median(walls):.1f} ms wall, {statistics.median(cpus):.1f} ms processor", flush=True)
        return found

    timed("list of runs, cold", lambda: list_runs(out))
    timed("list of runs, again", lambda: list_runs(out), 5)

    def first() -> Any:
        table = open_run_table(out, key)
        return table, table.reconciliation(), table.slides(Query(limit=50))

    table, _, page = timed("open: reconciliation and first page of slides, cold", first)
    timed("the same, again", first, 5)
    assert page.total == -(-len(table.frame) // FIELDS_PER_SLIDE)
    timed("first page of fields", lambda: table.fields(Query(limit=50)))
    timed("next page of fields", lambda: table.fields(Query(offset=50, limit=50)), 20)
    timed("page of fields in the middle", lambda: table.fields(Query(offset=len(table.frame) // 2, limit=50)), 20)
    timed("next page of slides", lambda: table.slides(Query(offset=50, limit=50)), 20)
    timed("patients, first page", lambda: table.patients(Query(limit=50)))
    for sort in Sort:
        timed(f"fields sorted by {sort}", lambda: table.fields(Query(sort=sort, limit=50)))  # noqa: B023 - called at once
    timed("fields of a label and status", lambda: table.fields(Query(label="Pro", status=Status.ABSTAINED)))
    timed("fields that hold a text", lambda: table.fields(Query(text="slide-00417")))
    timed("slides sorted by mean malignant probability", lambda: table.slides(Query(sort=Sort.MALIGNANT)))
    timed("slides that hold a text", lambda: table.slides(Query(text="0417")))
    patient = table.patients(Query(limit=1)).items[0].patient_key
    timed("fields of a patient", lambda: table.fields(Query(patient=patient)))
    timed("one field with all that is known", lambda: table.field(len(table.frame) // 2), 5)
    timed("its cells", lambda: table.cells(len(table.frame) // 2), 5)
    timed("a patient's course, run held", lambda: timeline(out, patient))
    given = [
        table.verdict_on_field(i, Action.ACCEPT if table.field(i).label else Action.FLAG, "dr. grey")
        for i in range(200)
    ]
    timed("200 verdicts in one file", lambda: add_all(out, given))
    for verdict in given[:50]:
        add_all(out, (verdict,))
    timed("open after 51 files of verdicts", lambda: open_run_table(out, key))
    table = open_run_table(out, key)
    timed("unreviewed slides, first page", lambda: table.slides(Query(review=Review.UNREVIEWED)))


@pytest.mark.timeout(1200)
def test_a_large_worklist(tmp_path: Path) -> None:
    print(f"\n{write_and_measure(tmp_path, FIELDS)}")


def write_and_measure(folder: Path, fields: int) -> str:
    """Write a run and measure it in another process."""
    write_run(folder, fields)
    code = f"from benchmarks.bench_worklist import measure; measure({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print(write_and_measure(Path(made), int(sys.argv[1]) if len(sys.argv) > 1 else FIELDS))
