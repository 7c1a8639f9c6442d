"""Runs of schema 1 stay readable: what they lack is null, what they count otherwise is counted as today."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from harness import finish_here, table, tables
from older import as_schema_1

from leukoflow.core.codec import loads
from leukoflow.runs.progress import read_manifest
from leukoflow.runs.records import CLASSES, Marker, RunManifest, Status
from leukoflow.runs.schema import CELLS, SCHEMA_VERSION, SINCE_2, SLIDES
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.patient_key import pseudonym
from leukoflow.tasks.monitor.drift import run_facts
from leukoflow.tasks.monitor.metrics import RunsCollector, exposition
from leukoflow.tasks.monitor.nights import read_run
from leukoflow.tasks.report.run_report import build_report
from leukoflow.tasks.review.export.rows import exported_schema
from leukoflow.tasks.review.keys import run_key_of
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.store.compact import compact_run
from leukoflow.tasks.upkeep.correct import correct_patient
from leukoflow.tasks.upkeep.diff import diff_runs
from leukoflow.tasks.upkeep.reproduce import reproduce_run
from leukoflow.tasks.upkeep.verify import verify_run

ABSTAINED = 3


def manifest_of(root: Path) -> RunManifest:
    found = read_manifest(open_storage(str(root)))
    assert found is not None
    return found


@pytest.fixture
def old(copy: Path) -> Path:
    """The run as schema 1 had it, three of its answers abstained from as foreign."""
    as_schema_1(copy, ABSTAINED)
    return copy


def answered(root: Path) -> tuple[int, ...]:
    rows = table(root, "predictions", drop=()).to_pylist()
    counts = Counter(r["label"] for r in rows if r["status"] == "predicted")
    return tuple(counts[c] for c in CLASSES)


def test_an_old_run_verifies_and_compacts(old: Path) -> None:
    m = manifest_of(old)
    assert (m.schema_version, sum(m.labels)) == (1, m.predicted + m.abstained)
    assert set(SINCE_2).isdisjoint(pq.read_schema(next((old / "cells").iterdir())).names)
    assert verify_run(str(old)).findings == ()
    compact_run(str(old))
    assert verify_run(str(old)).findings == ()


def test_a_new_run_counts_answers_alone(night: Run, copy: Path) -> None:
    m = manifest_of(copy)
    assert m.schema_version == SCHEMA_VERSION == 3
    assert m.labels == answered(copy)
    assert sum(m.labels) == m.predicted
    for name in open_storage(str(copy)).names("markers/predictions"):
        receipt = loads(Marker, (copy / "markers/predictions" / name).read_bytes(), name).receipt
        assert receipt is not None
        assert sum(receipt.labels) == receipt.predicted


def test_the_nights_and_metrics_count_the_answers_of_an_old_run(old: Path) -> None:
    m = manifest_of(old)
    found = read_run(str(old), UTC)
    assert found.counts.labels == answered(old) != m.labels
    assert sum(found.counts.labels) == found.counts.predicted == m.predicted
    reasons = dict(found.reasons)
    assert reasons["out of distribution"] >= ABSTAINED
    assert "foreign" not in reasons
    lines = exposition(RunsCollector(str(old.parent))).decode().splitlines()
    for name, n in zip(CLASSES, answered(old), strict=True):
        assert f'leukoflow_last_run_labels{{label="{name}"}} {n}.0' in lines
    (old / "manifest.json").unlink()  # unfinished: from the receipts of its shards
    assert read_run(str(old), UTC).counts.labels == answered(old)


def test_the_report_of_an_old_run(old: Path) -> None:
    html = build_report(str(old), manifest_of(old))
    m = manifest_of(old)
    assert f"Of the {m.predicted} predicted fields. Fields that were abstained from, {m.abstained}," in html
    assert "out of distribution" in html
    assert "foreign" not in html


def test_words_alone_are_no_difference(copy: Path) -> None:
    aside = copy.parent / "before"
    shutil.copytree(copy, aside)
    as_schema_1(aside)
    found = diff_runs(str(aside), str(copy))
    assert found.same
    assert ("schema_version", "1", "3") in found.setup


def test_cells_of_an_old_run_have_nulls_for_what_it_lacks(old: Path) -> None:
    opened = open_run_table(str(old.parent), run_key_of("night"))
    row = next(r for r in opened.fields().items if r.status is Status.PREDICTED)
    cells = opened.cells(row.ordinal)
    assert cells.schema.equals(CELLS)
    assert len(cells) == row.n_cells
    assert set(cells["run_id"].to_pylist()) == {"night"}
    assert cells["nucleus_area_um2"].null_count == cells["cell_area_um2"].null_count == len(cells)
    refused = [r for r in opened.fields().items if r.status is Status.ABSTAINED]
    assert any((r.reason or "").startswith("out of distribution: distance") for r in refused)
    assert "reason" in exported_schema().names


def test_an_old_run_is_corrected_and_summed_up(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = b"a key that only these tests have"
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", key.decode())
    assert run_facts(str(old), "night", manifest_of(old), "d").counts().sum() > 0
    correct_patient(str(old.parent), pseudonym("janet", key), pseudonym("jane", key))
    slides = pq.read_table(old / "slides.parquet")
    assert slides.schema.equals(SLIDES)
    assert set(slides["run_id"].to_pylist()) == {"night"}
    assert verify_run(str(old)).findings == ()


def test_the_work_of_an_old_run_is_taken_over(night: Run, copy: Path) -> None:
    """Its masks and features; its predictions are made again, in today's form."""
    as_schema_1(copy)
    config = night.config.model_copy(update={"out": str(copy.parent), "run_id": "again", "reuse": "night"})
    root = Path(finish_here(config).root)
    assert set(table(root, "cells", drop=())["run_id"].to_pylist()) == {"again"}
    assert tables(root) == tables(Path(night.root))
    assert manifest_of(root).labels == manifest_of(Path(night.root)).labels
    marker = loads(Marker, (root / "markers/predictions/00000.json").read_bytes(), "marker")
    assert marker.receipt is not None
    assert set(marker.receipt.resumed) == {"masks", "features", "activations"}


@pytest.mark.slow
def test_an_old_run_computed_again_is_the_same(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        def submit(self, function: Any, *arguments: Any) -> Future[Any]:
            done: Future[Any] = Future()
            done.set_result(function(*arguments))
            return done

    @contextmanager
    def pool(count: int, threads: int) -> Iterator[Here]:
        yield Here()

    monkeypatch.setattr("leukoflow.tasks.upkeep.reproduce._pool", pool)
    as_schema_1(copy)
    found = reproduce_run(str(copy))
    assert [d.where for d in found.differences] == []
