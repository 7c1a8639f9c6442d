"""A patient's course over runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from review_world import JANE, MARY, NIGHT, PROBABILITIES

from leukoflow.apps.web.drawing.plots import timeline_svg
from leukoflow.core.errors import NotFoundError
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.review.keys import patient_key_of
from leukoflow.tasks.review.run_cache import cache_of
from leukoflow.tasks.review.runs import list_runs, open_run_table
from leukoflow.tasks.review.timeline import timeline


def test_a_patients_course(weeks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(weeks)
    for warm in (False, True):
        if warm:
            for line in list_runs(out):
                if line.state != "damaged":
                    open_run_table(out, line.run_key)
        found = timeline(out, patient_key_of(JANE))
        assert [p.run_id for p in found.points] == ["night", "second", "third"]
        assert [p.at[:10] for p in found.points] == ["2026-03-01", "2026-03-08", "2026-03-15"]
        assert [p.same_bundle for p in found.points] == [True, True, False]
        assert (found.patient, found.unread) == (JANE, ("wreck",))
        expected = open_run_table(out, NIGHT).patient(patient_key_of(JANE))
        assert found.points[0].summary == expected.summary
        assert found.points[0].slides == expected.slides
    with pytest.raises(NotFoundError):
        timeline(out, patient_key_of("p_nobody"))


def test_runs_of_the_same_images_are_no_course(weeks: Path) -> None:
    for path in (weeks / "second" / "predictions").iterdir():
        rows = pq.read_table(path).to_pylist()
        hers = [row for row in rows if row["patient_id"] == JANE]
        if hers:
            hers[0]["member_sha256"] = "f" * 64
            pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)
    for patient, same in ((MARY, [False, True, True]), (JANE, [False, False, False])):
        found = timeline(str(weeks), patient_key_of(patient))
        assert [p.same_images for p in found.points] == same
        # Of three points, the third has another bundle; the first two are joined unless they are of the same images.
        assert timeline_svg(found.points).count('class="line"') == (0 if any(same) else 1)
    day = [
        replace(p, at=f"2026-03-01T{hour}:30:00+00:00")
        for p, hour in zip(found.points, ("06", "14", "22"), strict=True)
    ]
    assert "2026-03-01 06:30" in timeline_svg(day)
    assert ">2026-03-01<" in timeline_svg(found.points)


def _answer(run: Path, patient: str, labels: dict[int, str]) -> None:
    """Predicts a patient's diagnosed fields: of slide number `i` the label `labels[i]`, all others the last one."""
    for path in sorted((run / "predictions").iterdir()):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            if row["label"] is None or row["patient_id"] != patient:
                continue
            label = labels.get(int(row["image_key"][5]), next(iter(labels.values())))
            row |= {"status": "predicted", "reason": None, "label": label, "confidence": 0.97}
            row |= {p: 0.97 if c == label else 0.01 for p, c in zip(PROBABILITIES, CLASSES, strict=True)}
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)


def test_runs_that_contradict_each_other_are_remarked(weeks: Path) -> None:
    for run, label in (("night", "Pro"), ("second", "Pro"), ("third", "Early")):
        _answer(weeks / run, MARY, {0: label})
    found = timeline(str(weeks), patient_key_of(MARY))
    fields = [p.summary.counts.predicted for p in found.points]
    assert found.remarks == (
        f"Runs do not agree on this patient: Pro-B in night, second ({fields[0] + fields[1]} fields); Early Pre-B in "
        f"third ({fields[2]} fields). One of the answers may be wrong, or the samples may not be of one patient. Judge "
        "the slides by eye. Not all of these runs used the same model.",
    )


def test_slides_of_a_run_that_contradict_each_other_are_remarked(weeks: Path) -> None:
    for run in ("night", "second", "third"):
        _answer(weeks / run, JANE, {1: "Pre", 2: "Pre"})
    assert timeline(str(weeks), patient_key_of(JANE)).remarks == ()
    _answer(weeks / "second", JANE, {1: "Pre", 2: "Benign"})
    remarks = timeline(str(weeks), patient_key_of(JANE)).remarks
    (remark,) = [r for r in remarks if r.startswith("Slides of run second do not agree: ")]
    assert re.search(r"Pre-B in S1 \(\d+ fields\)", remark)
    assert re.search(r"Benign in (S2, ward-2|ward-2, S2) \(\d+ fields\)", remark)
    assert all("Slides of run night" not in r for r in remarks)


def test_reading_one_patient_does_not_hold_the_run(weeks: Path) -> None:
    timeline(str(weeks), patient_key_of(MARY))
    assert cache_of(str(weeks)).snapshots == {}
