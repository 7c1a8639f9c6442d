"""Runs for the tests of what people see: as it is, with predictions that differ, and several weeks of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from review_world import NIGHT, PROBABILITIES

from leukoflow.runs.records import CLASSES
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.table import RunTable


@pytest.fixture(scope="module")
def opened(night: Run) -> RunTable:
    return open_run_table(str(Path(night.root).parent), NIGHT)


@pytest.fixture
def spread(copy: Path) -> Path:
    """The run with predictions that differ from field to field, as a trained model's do; the manifest is let be."""
    rng = np.random.default_rng(3)
    for path in sorted((copy / "predictions").iterdir()):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            if row["label"] is None:
                continue
            p = rng.dirichlet([0.4] * 4)
            row |= dict(zip(PROBABILITIES, p.tolist(), strict=True)) | {"confidence": float(p.max())}
            row["label"] = CLASSES[int(p.argmax())]
            row["prediction_set"] = [c for c, v in zip(CLASSES, p, strict=True) if v > 0.2]
            row["status"] = "abstained" if p.max() < 0.5 else "predicted"
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)
    return copy


@pytest.fixture
def weeks(spread: Path) -> Path:
    """Three runs of the same patients, a week apart; one is a shadow run, one damaged."""
    out = spread.parent
    for name, at, bundle in (
        ("second", "2026-03-08", None),
        ("third", "2026-03-15", "f" * 64),
        ("shade", "2026-03-16", None),
    ):
        shutil.copytree(spread, out / name)
        for file in ("manifest.json", "run.json"):
            path = out / name / file
            record = json.loads(path.read_text()) | {"run_id": name, "started_at": f"{at}T06:00:00+00:00"}
            record |= {"bundle_digest": bundle} if bundle else {}
            record |= {"shadow_of": "night"} if name == "shade" else {}
            path.write_text(json.dumps(record, ensure_ascii=False, sort_keys=True, indent=1) + "\n")
    shutil.copytree(spread, out / "wreck")
    (out / "wreck" / "manifest.json").write_text("{}")
    path = spread / "manifest.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"started_at": "2026-03-01T06:00:00+00:00"}, sort_keys=True)
    )
    return out
