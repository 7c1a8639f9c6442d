"""report.html: every number in its place, nothing foreign unescaped, useful for unfinished runs and lost sources."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up_report import (
    REASONS,
    change,
    checked,
    figures_of,
    plain,
    store_maps,
)
from markupsafe import escape

from leukoflow.core.codec import dumps
from leukoflow.core.errors import StorageError
from leukoflow.runs.progress import Heartbeat, now
from leukoflow.runs.records import RunManifest
from leukoflow.runs.schema import PREDICTIONS, SLIDES
from leukoflow.tasks.report.run_report import build_report


def test_a_finished_run_reconciles_and_shows_its_fields(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    page = build_report(str(root), manifest)
    text = plain(page)
    assert "Reconciled. Each of the 20 members has exactly one row: 17 predicted + 1 abstained" in text
    assert "5.0 per second" in text
    assert "1,100.0 ms" in text
    assert "Research use only." in text
    assert page.count("data:image/jpeg;base64,") == 24  # twelve suspicious and twelve uncertain fields
    assert "only the mask is shown" not in text
    for i in (3, 7, 18):
        assert f"field-{i:05d}.jpg" in text
        assert str(escape(REASONS[i])) in page


def test_a_field_without_an_answer_shows_none(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    given = {"confidence": 0.3, "prediction_set": ["Pre"], "label": "Pre", "um_per_px": None}
    change(root, "predictions", "field-00003.jpg", **given, width_px=2592, height_px=1944)
    page = build_report(str(root), manifest)
    figure = figures_of(page, "uncertain")["field-00003.jpg"]
    caption = figure.partition("<figcaption>")[2]
    assert '<p class="said">No answer: the model abstained.</p>' in caption
    assert "The likeliest cause is the missing scale: the picture has 2592 × 1944 px" in caption
    assert "--um-per-px" in caption
    assert "rediction set" not in caption
    assert "0.300" not in caption
    before, _, after = caption.partition("<details>")
    assert "Pre-B" not in before
    assert after.startswith("<summary>Probabilities, which are no answer</summary>")
    assert "1 of 1 abstention is from a picture without a scale, neither stated nor told by red cells" in plain(page)


def test_an_answer_of_unknown_scale_is_cautioned_against(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    assert "Do not rely on" not in build_report(str(root), manifest)
    change(root, "predictions", "field-00014.jpg", um_per_px=None, width_px=112, height_px=112)
    page = build_report(str(root), manifest)
    figures = figures_of(page, "suspicious")
    caption = figures["field-00014.jpg"].partition("<figcaption>")[2]
    assert caption.index("No scale was given and this picture is not of the training size") < caption.index('"said"')
    assert "Do not rely on this answer" not in figures["field-00019.jpg"]
    assert "1 of 17 answers is to a picture of another size" in plain(page)


def test_headings_say_what_is_shown(run: tuple[Path, RunManifest]) -> None:
    page = build_report(str(run[0]), run[1])
    for heading in ("Most suspicious field of each slide, then others", "Least certain fields, answered or not"):
        assert f"<h2>{heading}</h2>" in page
    assert "<h3>Highest probability</h3>" in page
    assert "<h3>Confidence</h3>" not in page


def test_the_patient_of_a_slide_is_said_to_be_the_first(run: tuple[Path, RunManifest]) -> None:
    rows = [{**dict.fromkeys(SLIDES.names), **s} for s in pq.read_table(run[0] / "slides.parquet").to_pylist()]
    note = "Where fields of several patients are on a slide, only the first patient is named; the web application shows"
    for patient, said in ((None, False), ("p-1", True)):
        table = pa.Table.from_pylist([r | {"patient_id": patient} for r in rows], SLIDES)
        pq.write_table(table, run[0] / "slides.parquet")
        page = build_report(str(run[0]), run[1])
        assert ">first patient</th>" in page
        assert (note in plain(page)) is said


def test_a_set_of_one_is_no_exclusion_in_the_report(run: tuple[Path, RunManifest]) -> None:
    text = plain(build_report(str(run[0]), run[1]))
    assert "Prediction set: Early Pre-B. " in text
    assert "This excludes no other class: by design, up to 1 field in 20 has" in text
    assert "Early Pre-B alone" not in text
    assert "remains possible" not in text
    assert "Mean malignant probability" in text


def test_labels_are_counted_over_the_predicted(run: tuple[Path, RunManifest]) -> None:
    text = plain(build_report(str(run[0]), run[1]))
    counts = [int(n) for n in re.findall(r"(?:Benign|Pre-B|Pro-B) (\d+) [\d.]+ %", text.partition("Labels")[2])]
    assert sum(counts) == run[1].predicted == 17
    assert "Of the 17 predicted fields. Fields that were abstained from, 1, have no label here." in text


def test_patients_whose_slides_disagree_are_named(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    rows = pq.read_table(root / "slides.parquet").to_pylist()
    assert "not agree on the class" not in build_report(str(root), manifest)
    for row, label in zip(rows, ("Early", "Pro", "Pre", "Pre"), strict=True):
        row |= {"patient_id": "p_one" if row["rank"] < 3 else "p_two", "label": label, "n_predicted": 5}
    pq.write_table(pa.Table.from_pylist(rows, SLIDES), root / "slides.parquet")
    text = plain(build_report(str(root), manifest))
    assert "The slides of 1 patient do not agree on the class." in text
    assert "p_one Early Pre-B in slide-0003 (5 fields); Pro-B in slide-0002 (5 fields)." in text
    assert "p_two Pre" not in text


def test_benign_as_the_likeliest_of_malignant_classes_is_said(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    rows = pq.read_table(root / "slides.parquet").to_pylist()
    for row, score in zip(rows, (0.58, 0.42, 0.9, 0.9), strict=True):
        row |= {"malignant_score": score, "label": "Benign" if row["rank"] < 3 else "Pro"}
    pq.write_table(pa.Table.from_pylist(rows, SLIDES), root / "slides.parquet")
    text = plain(build_report(str(root), manifest))
    assert text.count("malignant classes together 0.") == 1
    assert "Benign is the most probable single class; malignant classes together 0.580" in text


def test_no_probability_is_rounded_to_a_certainty(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    for path in sorted((root / "predictions").iterdir()):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            if row["status"] == "predicted":
                row |= {"prob_benign": 1e-9, "prob_early": 0.0, "prob_pre": 1e-5, "prob_pro": 0.99999}
                row |= {"label": "Pro", "confidence": 0.99999}
        pq.write_table(pa.Table.from_pylist(rows, PREDICTIONS), path, use_dictionary=False)
    html = build_report(str(root), manifest)
    assert '<span class="n">&gt; 0.999</span>' in html
    assert '<td class="n">&lt; 0.001</td>' in html
    assert not re.search(r'class="n">(1|0)\.000<', html)


def test_the_page_needs_nothing_from_outside(run: tuple[Path, RunManifest]) -> None:
    store_maps(run[0], "00000")
    checker = checked(build_report(str(run[0]), run[1]))
    assert "script" not in checker.tags
    assert checker.sources
    assert all(s.startswith(("data:image/jpeg;base64,", "data:image/png;base64,", "#")) for s in checker.sources)
    assert not any("url(" in text or "@import" in text for text in checker.texts)


def test_suspicious_fields_come_slide_by_slide_in_order_of_urgency(run: tuple[Path, RunManifest]) -> None:
    page = build_report(str(run[0]), run[1])
    section = page.partition('id="suspicious"')[2].partition("</section>")[0]
    keys = re.findall(r'<p class="key">(field-\d+)', section)
    assert keys[:5] == ["field-00019", "field-00014", "field-00017", "field-00016", "field-00015"]
    uncertain = page.partition('id="uncertain"')[2].partition("</section>")[0]
    confidences = [float(c) for c in re.findall(r'<span class="n">(\d\.\d+)</span></p>', uncertain)]
    assert len(confidences) == 12
    assert confidences == sorted(confidences)


def test_unfinished_runs_are_labelled_as_such(run: tuple[Path, RunManifest]) -> None:
    root, _ = run
    shutil.rmtree(root / "cells")
    (root / "markers/predictions/00001.json").unlink()
    beat = Heartbeat(pid=2**22 + 1, host="elsewhere", at="2026-03-01T22:05:00+00:00", state="running")
    (root / "heartbeat.json").write_bytes(dumps(beat))
    (root / "failures").mkdir()
    (root / "failures/00001.json").write_text('{"message": "its worker <died>"}')
    text = plain(build_report(str(root), None))
    assert "Not a final result: the run is killed." in text
    assert "16 of 20 members are accounted for so far" in text
    assert "To continue: leukoflow run smears.zip --out out" in text
    assert "Shard 00001 failed: its worker <died>" in text
    assert "Reconciled" not in text
    assert "cannot be read (FileNotFoundError)" in text  # the cells are gone: said, and no reason to fail
    running = replace(beat, at=now())
    (root / "heartbeat.json").write_bytes(dumps(running))
    assert "the run is running." in plain(build_report(str(root), None))


def test_a_run_that_does_not_balance_says_so(run: tuple[Path, RunManifest]) -> None:
    text = plain(build_report(str(run[0]), replace(run[1], predicted=16, missing=3, conflicts=2)))
    assert "The totals do not balance" in text
    assert "make 19, not 20 members" in text
    assert "3 images that the manifest lists were not in the source" in text
    assert "identical images under different patients" in text


def test_hostile_names_stay_text(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    part = root / "predictions/part-00000.parquet"
    rows = pq.read_table(part).to_pylist()
    rows[7]["image_key"] = '"><script>alert(1)</script>\u202egpj.exe'
    rows[7]["reason"] = "<img src=x onerror=alert(1)>"
    pq.write_table(pa.Table.from_pylist(rows, PREDICTIONS), part)
    page = build_report(str(root), manifest)
    checker = checked(page)
    assert "script" not in checker.tags
    assert "&lt;script&gt;" in page
    assert "\u202e" not in page
    assert "onerror=alert(1)>" not in page


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no run"):
        build_report(str(tmp_path), None)
