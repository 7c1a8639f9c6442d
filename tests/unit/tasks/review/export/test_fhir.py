"""Exports as FHIR: valid whatever the names, and saying what the worklist says, in words that no one misreads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from exports import MARY, NIGHT, bytes_of, changed, fhir, report_of, slide_named

from leukoflow.runs.records import Status
from leukoflow.tasks.review.export.stream import Format, Scope
from leukoflow.tasks.review.keys import patient_key_of
from leukoflow.tasks.review.query import Query
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.verdict_record import Action
from leukoflow.tasks.review.verdicts import add
from leukoflow.tasks.review.wording import CLASS_CAUTION, RESEARCH_USE


def test_fhir_is_valid_and_says_what_the_worklist_says(opened: RunTable) -> None:
    resources = fhir(opened, Scope())
    reports = [r for r in resources if r["resourceType"] == "DiagnosticReport"]
    lines = opened.slides(Query(limit=500)).items
    assert len(reports) == len(lines)
    for report, line in zip(reports, lines, strict=True):
        assert RESEARCH_USE in report["conclusion"]
        assert report["status"] == "preliminary"
        assert report["specimen"][0]["identifier"]["value"] == line.name
        assert ("subject" in report) == (line.patient is not None)
        assert len(report["result"]) == 9
    observations = [r for r in resources if r["resourceType"] == "Observation"]
    for code, values in (
        ("mean-malignant-probability", [x.summary.mean_malignant_probability for x in lines]),
        ("fields-quarantined", [x.summary.counts.quarantined for x in lines]),
    ):
        found = [o for o in observations if o["code"]["coding"][0]["code"] == code]
        assert [o["valueQuantity"]["value"] for o in found] == [round(v, 6) for v in values]  # type: ignore[arg-type]
        assert all(RESEARCH_USE in o["note"][0]["text"] for o in found)
    tags = json.loads(bytes_of(opened, Scope(), Format.FHIR))["meta"]
    assert tags["tag"][0]["code"] == "research-use-only"
    assert tags["security"][0]["code"] == "HRESCH"


def test_fhir_says_the_mean_in_one_name_and_never_as_a_share_of_blasts(opened: RunTable) -> None:
    line = opened.slides().items[0]
    resources = fhir(opened, Scope(slide=line.slide_key))
    (mean,) = [r for r in resources if r.get("code", {}).get("text") == "Mean malignant probability"]
    note = mean["note"][0]["text"]
    assert "no differential count and no percentage of blasts" in note
    assert f"{line.summary.counts.predicted} answered fields, {line.summary.answered_cells} cells" in note
    assert mean["code"]["coding"][0]["system"].startswith("urn:leukoflow:")
    assert "mean malignant probability" in resources[0]["conclusion"]
    assert "blast fraction" not in json.dumps(resources).lower()


def test_fhir_names_no_code_system_that_it_has_no_code_of(opened: RunTable) -> None:
    systems = set()

    def look(value: Any) -> None:
        if isinstance(value, dict):
            if "system" in value:
                systems.add(value["system"])
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    look(json.loads(bytes_of(opened, Scope(), Format.FHIR)))
    foreign = {s for s in systems if not s.startswith("urn:leukoflow:")}
    assert foreign <= {
        "http://unitsofmeasure.org",
        "http://terminology.hl7.org/CodeSystem/observation-category",
        "http://terminology.hl7.org/CodeSystem/v2-0074",
        "http://terminology.hl7.org/CodeSystem/v3-ActReason",
        "http://terminology.hl7.org/CodeSystem/data-absent-reason",
    }


def test_fhir_of_a_patient_without_any_prediction(copy: Path) -> None:
    for path in (copy / "predictions").iterdir():
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row |= {"status": "rejected", "label": None, "n_cells": None, "prediction_set": None}
            row |= dict.fromkeys(("confidence", "prob_benign", "prob_early", "prob_pre", "prob_pro"))
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)
    opened = open_run_table(str(copy.parent), NIGHT)
    resources = fhir(opened, Scope(patient=patient_key_of(MARY)))
    assert resources[0]["subject"]["identifier"]["value"] == MARY
    assert "no answer on any of 13 fields" in resources[0]["conclusion"]
    absent = [r for r in resources if "dataAbsentReason" in r]
    assert {r["code"]["coding"][0]["code"] for r in absent} == {
        "likeliest-class", "mean-malignant-probability", "uncertain-share",
    }  # fmt: skip


def test_a_slide_of_several_patients_is_filed_under_none(copy: Path) -> None:
    patients = iter(["p-1", "p-2", "p-3"])

    def mix(row: dict[str, Any]) -> None:
        if row["slide_id"] == "S1":
            row["patient_id"] = next(patients, "p-3")

    opened = changed(copy, mix)
    line = slide_named(opened, "S1")
    report, observations = report_of(opened, line)
    assert line.patients == 3
    assert all("subject" not in r for r in (report, *observations.values()))
    said = "Fields of 3 patients are on this slide, so no patient is named: resolve this before reading."
    assert report["conclusion"].startswith(said)
    own = fhir(opened, Scope(patient=patient_key_of("p-1")))[0]
    assert own["subject"]["identifier"]["value"] == "p-1"
    assert own["conclusion"].startswith("1 slide of this patient also holds fields of other patients: resolve this")


def test_benign_never_stands_alone_where_malignancy_is_likelier(copy: Path) -> None:
    def lean(row: dict[str, Any]) -> None:
        if row["status"] == "predicted":
            row |= {"label": "Benign", "confidence": 0.4, "prediction_set": ["Benign", "Early"]}
            row |= {"prob_benign": 0.4, "prob_early": 0.3, "prob_pre": 0.2, "prob_pro": 0.1}

    opened = changed(copy, lean)
    report, observations = report_of(opened, opened.slides().items[0])
    said = "is the most probable single class; malignant classes together 0.60"
    assert f"likeliest class Benign (haematogones), which {said};" in report["conclusion"]
    assert CLASS_CAUTION in report["conclusion"]
    concept = observations["likeliest-class"]["valueCodeableConcept"]
    assert (concept["text"], concept["coding"][0]["display"]) == (
        f"Benign (haematogones) {said}",
        "Benign (haematogones)",
    )
    note = observations["likeliest-class"]["note"][0]["text"]
    assert f"Benign {said}." in note
    assert CLASS_CAUTION in note


def test_corrections_are_not_said_as_a_confirmation(copy: Path) -> None:
    out, opened = str(copy.parent), open_run_table(str(copy.parent), NIGHT)
    key = opened.field(1).slide_key
    line = opened.slide(key)
    words = report_of(opened, line)[0]["conclusion"]
    n = line.summary.diagnosed
    assert f"no reviewer has decided on any of the {n} answered or abstained fields." in words
    field = opened.field(1)
    assert field.status is Status.PREDICTED
    add(out, opened.verdict_on_field(1, Action.CORRECT, "dr. grey", "Pro" if field.label != "Pro" else "Pre"))
    opened = open_run_table(out, NIGHT)
    assert (opened.slide(key).summary.reviewed, opened.slide(key).summary.corrected) == (1, 1)
    assert (
        f"reviewers decided on 1 of the {n} answered or abstained fields, and gave 1 of the answered ones another "
        "label; the figures are the model's, without these corrections."
    ) in report_of(opened, opened.slide(key))[0]["conclusion"]


def test_what_is_not_final_or_not_whole_is_said_in_fhir(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_run_table(str(copy.parent), NIGHT)
    line = replace(opened.slides().items[0], missing=2)
    assert "not its final result" not in report_of(opened, line)[0]["conclusion"]
    monkeypatch.setattr(RunTable, "slide", lambda table, key: line)
    assert report_of(opened, line)[0]["conclusion"].startswith("2 listed images were not received.")
    monkeypatch.undo()
    (copy / "manifest.json").unlink()
    opened = open_run_table(str(copy.parent), NIGHT)
    words = report_of(opened, opened.slides().items[0])[0]["conclusion"]
    assert words.startswith("The run has not finished: this is not its final result.")


def test_an_abstention_is_not_said_as_not_performed(copy: Path) -> None:
    def abstain(row: dict[str, Any]) -> None:
        if row["status"] == "predicted":
            row |= {"status": "abstained", "reason": "ambiguous: confidence 0.49 < 0.53"}

    opened = changed(copy, abstain)
    line = next(s for s in opened.slides().items if s.summary.diagnosed)
    report, observations = report_of(opened, line)
    absent = observations["likeliest-class"]["dataAbsentReason"]
    assert (absent["coding"][0]["code"], absent["text"]) == ("unknown", "the model abstained")
    assert "no answer on any of" in report["conclusion"]


def test_fhir_has_no_time_of_the_sample_and_no_cell_count(opened: RunTable) -> None:
    resources = fhir(opened, Scope())
    assert all("effectiveDateTime" not in r for r in resources)
    _, observations = report_of(opened, opened.slides().items[0])
    cells = observations["cells"]
    assert cells["code"]["text"] == "Cells outlined in the pictures"
    assert "No white cell count and no differential count." in cells["note"][0]["text"]
    assert observations["fields-reviewed"]["code"]["text"] == "Answered or abstained fields on which a reviewer decided"
    note = observations["mean-malignant-probability"]["note"][0]["text"]
    assert note.endswith(f"so it is too narrow. {RESEARCH_USE}") or "Too few fields for an interval. " in note
