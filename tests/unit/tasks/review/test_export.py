"""Hand-off: whole, readable by others' tools, harmless in spreadsheets, valid FHIR, and labels that training reads."""

from __future__ import annotations

import csv
import io
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.diagnosticreport import DiagnosticReport
from fhir.resources.R4B.observation import Observation
from harness import table as table_of
from typer.testing import CliRunner

from leukoflow.apps.cli.main import app
from leukoflow.core.errors import ConfigError, NotFoundError, RequestError, SourceError
from leukoflow.runs.records import Status
from leukoflow.tasks.intake.open_run import Run
from leukoflow.tasks.intake.patient_key import pseudonym
from leukoflow.tasks.review.export import (
    EXPORTED,
    LABELS,
    Format,
    Scope,
    export,
    export_patient,
    guessed_fields,
    labels_csv,
    safe_text,
    scale_caution,
    training_labels,
    write_training_set,
)
from leukoflow.tasks.review.verdicts import Action, add
from leukoflow.tasks.review.wording import CLASS_CAUTION, RESEARCH_USE, SCALE_CAUTION
from leukoflow.tasks.review.worklist import Query, RunTable, SlideLine, Sort, open_run_table, patient_key_of, run_key_of
from leukoflow.tasks.training.data import read_labels, read_members
from leukoflow.tasks.upkeep.erase import erase_patient

KEY = b"a key that only these tests have"
MARY, JANE = pseudonym("mary", KEY), pseudonym("jane", KEY)
NIGHT = run_key_of("night")


@pytest.fixture(scope="module")
def opened(night: Run) -> RunTable:
    return open_run_table(str(Path(night.root).parent), NIGHT)


def bytes_of(table: RunTable, scope: Scope, kind: Format) -> bytes:
    return b"".join(export(table, scope, kind))


def csv_rows(data: bytes) -> list[dict[str, str]]:
    assert data.startswith(b"\xef\xbb\xbf")
    return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))


def test_csv_and_parquet_hold_every_field_once(night: Run, opened: RunTable) -> None:
    stored = table_of(Path(night.root), "predictions", ()).to_pylist()
    whole = pq.read_table(io.BytesIO(bytes_of(opened, Scope(), Format.PARQUET)))
    assert whole.schema.metadata[b"leukoflow.notice"] == RESEARCH_USE.encode()
    assert tuple(whole.schema.names) == EXPORTED
    shared = [name for name in EXPORTED if name in stored[0]]
    assert [{n: r[n] for n in shared} for r in whole.to_pylist()] == [{n: r[n] for n in shared} for r in stored]
    rows = csv_rows(bytes_of(opened, Scope(), Format.CSV))
    assert [r["image_key"] for r in rows] == [r["image_key"] for r in stored]
    for row, expected in zip(rows, stored, strict=True):
        assert row["confidence"] == ("" if expected["confidence"] is None else repr(expected["confidence"]))
        assert row["prediction_set"] == " ".join(expected["prediction_set"] or ())
        assert row["notice"] == RESEARCH_USE


def test_a_slide_and_a_patient_alone(opened: RunTable) -> None:
    slide = next(s for s in opened.slides().items if s.name == "S1")
    rows = csv_rows(bytes_of(opened, Scope(slide=slide.slide_key), Format.CSV))
    assert {r["slide_id"] for r in rows} == {"S1"}
    assert len(rows) == slide.summary.counts.fields
    rows = csv_rows(bytes_of(opened, Scope(patient=patient_key_of(MARY)), Format.CSV))
    assert {r["patient_id"] for r in rows} == {MARY}
    assert len(rows) == 13


def test_what_there_is_not_is_said_before_the_first_byte(opened: RunTable) -> None:
    with pytest.raises(RequestError, match="csv, parquet, fhir"):
        export(opened, Scope(), "xlsx")
    for kind in Format:
        with pytest.raises(NotFoundError):
            export(opened, Scope(patient="0" * 16), kind)
    with pytest.raises(NotFoundError):
        export_patient(opened.out, "0" * 16)


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "\uff1d1+1", "=cmd|' /C calc'!A0", "\n=1", "  @x"],
)
def test_formulas_are_made_harmless(text: str) -> None:
    assert safe_text(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "ward-1/07.jpg", "a=b", "p_00", "O'Hara", "<b>"])
def test_other_texts_stay(text: str) -> None:
    assert safe_text(text) == text


def test_csv_survives_hostile_names_and_comments(copy: Path) -> None:
    hostile = ["=1+1", '@x,"y"', "a\r\nb", "<script>", "-2", "\u202ex", "%0A"]
    path = copy / "predictions" / "part-00000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row, name in zip(rows, hostile, strict=False):
        row["slide_id"] = name
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path, use_dictionary=False)
    opened = open_run_table(str(copy.parent), NIGHT)
    add(opened.out, opened.verdict_on_field(0, Action.COMMENT, "=who", comment='=HYPERLINK("http://x")\n2nd line, "q"'))
    opened = open_run_table(str(copy.parent), NIGHT)
    found = csv_rows(bytes_of(opened, Scope(), Format.CSV))
    assert [r["slide_id"] for r in found[:7]] == ["'=1+1", '\'@x,"y"', "a\r\nb", "<script>", "'-2", "\u202ex", "%0A"]
    assert found[0]["comment"] == '\'=HYPERLINK("http://x")\n2nd line, "q"'
    assert len(found) == 38
    resources = fhir(opened, Scope())  # valid whatever the names
    assert len([r for r in resources if r["resourceType"] == "DiagnosticReport"]) == opened.slides().total


def fhir(table: RunTable, scope: Scope) -> list[dict[str, Any]]:
    """The resources of an export, after the library has accepted the whole of it."""
    data = json.loads(bytes_of(table, scope, Format.FHIR))
    Bundle.model_validate(data)
    resources = [entry["resource"] for entry in data["entry"]]
    for resource in resources:
        {"DiagnosticReport": DiagnosticReport, "Observation": Observation}[resource["resourceType"]].model_validate(
            resource
        )
    urls = [entry["fullUrl"] for entry in data["entry"]]
    assert len(set(urls)) == len(urls)
    for resource in resources:
        for reference in resource.get("result", ()):
            assert reference["reference"] in urls
    return resources


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


def test_an_abstained_field_leaves_the_house_without_an_answer(copy: Path) -> None:
    path = copy / "predictions" / "part-00000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0] |= {"status": "abstained", "reason": "ambiguous: confidence 0.49 < 0.53", "prediction_set": ["Benign"]}
    assert rows[0]["label"] is not None
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)
    opened = open_run_table(str(copy.parent), NIGHT)
    row = csv_rows(bytes_of(opened, Scope(), Format.CSV))[0]
    assert (row["status"], row["label"], row["confidence"], row["prediction_set"]) == ("abstained", "", "", "")
    assert float(row["prob_benign"]) == rows[0]["prob_benign"]
    whole = pq.read_table(io.BytesIO(bytes_of(opened, Scope(), Format.PARQUET))).to_pylist()[0]
    assert (whole["label"], whole["confidence"], whole["prediction_set"]) == (None, None, None)


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


def test_a_patient_over_all_runs(copy: Path) -> None:
    out = copy.parent
    shutil.copytree(copy, out / "second")
    for name in ("manifest.json", "run.json"):
        path = out / "second" / name
        record = json.loads(path.read_text()) | {"run_id": "second", "started_at": "2027-01-01T00:00:00+00:00"}
        path.write_text(json.dumps(record, ensure_ascii=False, sort_keys=True, indent=1) + "\n")
    rows = csv_rows(b"".join(export_patient(str(out), patient_key_of(MARY))))
    assert [r["run_id"] for r in rows] == ["night"] * 13 + ["second"] * 13
    data = json.loads(b"".join(export_patient(str(out), patient_key_of(MARY), Format.FHIR)))
    Bundle.model_validate(data)
    reports = [e["resource"] for e in data["entry"] if e["resource"]["resourceType"] == "DiagnosticReport"]
    assert len({r["identifier"][0]["value"] for r in reports}) == len(reports) == 2


def test_reviews_are_handed_over(copy: Path) -> None:
    out = str(copy.parent)
    opened = open_run_table(out, NIGHT)
    add(out, opened.verdict_on_field(1, Action.CORRECT, "dr. grey", "Pro", "rim"))
    add(out, opened.verdict_on_field(1, Action.FLAG, "dr. grey"))
    add(out, opened.verdict_on_slide(opened.field(1).slide_key, Action.CORRECT, "dr. grey", "Early"))
    opened = open_run_table(out, NIGHT)
    row = csv_rows(bytes_of(opened, Scope(), Format.CSV))[1]
    assert (row["reviewed_label"], row["reviewed_by"], row["flagged"], row["comment"]) == (
        "Pro",
        "dr. grey",
        "true",
        "rim",
    )
    reports = [r for r in fhir(opened, Scope(slide=opened.field(1).slide_key)) if "conclusion" in r]
    assert "A reviewer has labelled the slide: Malignant, early pre-B." in reports[0]["conclusion"]


def test_a_withdrawn_decision_is_not_handed_over(copy: Path) -> None:
    out = str(copy.parent)
    opened = open_run_table(out, NIGHT)
    slide = opened.field(1).slide_key
    never = (csv_rows(bytes_of(opened, Scope(), Format.CSV)), fhir(opened, Scope(slide=slide)))
    add(out, opened.verdict_on_field(1, Action.CORRECT, "dr. grey", "Pro"))
    add(out, opened.verdict_on_slide(slide, Action.CORRECT, "dr. grey", "Early"))
    opened = open_run_table(out, NIGHT)
    assert [x.ordinal for x in training_labels(out)] == [1]
    assert csv_rows(bytes_of(opened, Scope(), Format.CSV)) != never[0]
    assert fhir(opened, Scope(slide=slide)) != never[1]
    add(out, opened.verdict_on_field(1, Action.WITHDRAW, "dr. grey"))
    add(out, opened.verdict_on_slide(slide, Action.WITHDRAW, "dr. grey"))
    opened = open_run_table(out, NIGHT)
    assert training_labels(out) == []
    assert csv_rows(bytes_of(opened, Scope(), Format.CSV)) == never[0]
    assert fhir(opened, Scope(slide=slide)) == never[1]


def test_labels_are_what_training_reads(copy: Path, tmp_path: Path) -> None:
    out = str(copy.parent)
    with pytest.raises(ConfigError, match="nothing to train on"):
        write_training_set(out, tmp_path / "data")
    opened = open_run_table(out, NIGHT)
    ordinals = [
        f.ordinal for f in opened.fields(Query(status=Status.PREDICTED, sort=Sort.ORDER, descending=False)).items
    ]
    for i, ordinal in enumerate(ordinals[:12]):
        action, label = (Action.ACCEPT, None) if i % 2 else (Action.CORRECT, "Pro")
        add(out, opened.verdict_on_field(ordinal, action, "dr. grey", label))
    add(out, opened.verdict_on_field(ordinals[3], Action.FLAG, "dr. grey"))
    add(out, opened.verdict_on_field(35, Action.CORRECT, "dr. grey", "Benign"))  # rejected, but a person knows better
    add(out, opened.verdict_on_field(ordinals[20], Action.COMMENT, "dr. grey", comment="no label"))
    labels = training_labels(out)
    assert len(labels) == 12
    text = labels_csv(labels).decode()
    assert text.splitlines()[0] == ",".join(LABELS)
    for word in (MARY, JANE, "mary", "jane", "ward-", "S0,", "S1,", "dr."):
        assert word not in text.replace("S0000", "").replace("S0001", "")
    made = write_training_set(out, tmp_path / "data")
    assert (made.images, made.lost) == (12, 0)
    read = read_labels(tmp_path / "data")
    assert len(read) == 12
    assert len(list(read_members(tmp_path / "data" / "all_fields.zip", read.keys))) == 12
    assert len(set(read.cluster)) == 2  # mary's and jane's fields stay together
    with zipfile.ZipFile(tmp_path / "data" / "all_fields.zip") as archive:
        assert sorted(archive.namelist()) == sorted(read.keys)
    with pytest.raises(ConfigError, match="name another folder"):
        write_training_set(out, tmp_path / "data")
    assert training_labels(out, [run_key_of("other")]) == []
    erase_patient(out, MARY)
    left = training_labels(out)
    assert 0 < len(left) < 12
    assert {x.group for x in left} == {"G0000"}


def test_labels_of_images_that_are_gone_are_counted(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    out = str(copy.parent)
    opened = open_run_table(out, NIGHT)
    add(out, opened.verdict_on_field(0, Action.ACCEPT, "dr. grey"))

    def gone(*_: Any) -> Any:
        raise SourceError("gone")

    monkeypatch.setattr("leukoflow.tasks.review.export.open_reader", gone)
    made = write_training_set(out, tmp_path / "data")
    assert (made.images, made.lost) == (0, 1)


def test_formats_know_their_names() -> None:
    assert {f.suffix for f in Format} == {".csv", ".parquet", ".fhir.json"}
    assert Format("fhir").media_type == "application/fhir+json"


def test_the_commands(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", KEY.decode())
    settings = {"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments), env=settings)

    out, target = str(copy.parent), tmp_path / "mary.csv"
    done = invoke("export", out, "night", "--to", str(target), "--patient", "mary")
    assert done.exit_code == 0, done.output
    assert "13 fields of night" in done.output
    assert {r["patient_id"] for r in csv_rows(target.read_bytes())} == {MARY}
    for again, words in (
        (("export", out, "night", "--to", str(target)), "exists"),
        (("export", out, "night", "--to", "x.xlsx"), "the name says the format"),
        (("export", out, "other", "--to", str(tmp_path / "x.csv")), "no such run"),
        (("labels", out, "--to", str(tmp_path / "data")), "nothing to train on"),
    ):
        found = invoke(*again)
        assert found.exit_code == 1
        assert words in found.stderr
    add(out, open_run_table(out, NIGHT).verdict_on_field(0, Action.ACCEPT, "dr. grey"))
    done = invoke("labels", out, "--to", str(tmp_path / "data"), "--run", "night")
    assert done.exit_code == 0, done.output
    assert "1 labelled fields" in done.output


def changed(copy: Path, change: Any) -> RunTable:
    """The run after `change` has been given every row of it."""
    for path in (copy / "predictions").iterdir():
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            change(row)
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)
    return open_run_table(str(copy.parent), NIGHT)


def slide_named(opened: RunTable, name: str) -> SlideLine:
    return next(s for s in opened.slides().items if s.name == name)


def report_of(opened: RunTable, line: SlideLine) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The report of a slide, and its Observations by code."""
    report, *rest = fhir(opened, Scope(slide=line.slide_key))
    return report, {r["code"]["coding"][0]["code"]: r for r in rest}


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


def test_a_shadow_run_is_handed_over_as_one(copy: Path, opened: RunTable) -> None:
    assert opened.shadow_of is None
    for name in ("manifest.json", "run.json"):
        record = json.loads((copy / name).read_text()) | {"shadow_of": "other"}
        (copy / name).write_text(json.dumps(record, ensure_ascii=False, sort_keys=True, indent=1) + "\n")
    shadow = open_run_table(str(copy.parent), NIGHT)
    assert shadow.shadow_of == "other"
    said = "Shadow run, a trial of a candidate model: do not act on it."
    report, observations = report_of(shadow, shadow.slides().items[0])
    assert report["conclusion"].startswith(said)
    assert all(said in o["note"][0]["text"] for o in observations.values())
    assert {r["notice"] for r in csv_rows(bytes_of(shadow, Scope(), Format.CSV))} == {f"{said} {RESEARCH_USE}"}


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


def test_answers_at_a_guessed_scale_leave_with_the_caution(copy: Path) -> None:
    def blow_up(row: dict[str, Any]) -> None:
        if row["slide_id"] == "S1":
            row |= {"width_px": 1999, "height_px": 1999, "um_per_px": None}

    opened = changed(copy, blow_up)
    for rows in (
        csv_rows(bytes_of(opened, Scope(), Format.CSV)),
        pq.read_table(io.BytesIO(bytes_of(opened, Scope(), Format.PARQUET))).to_pylist(),
    ):
        assert list(rows[0])[7:9] == ["reason", "caution"]
        said = [r["caution"] == SCALE_CAUTION for r in rows]
        assert said == [r["slide_id"] == "S1" and r["status"] == "predicted" for r in rows]
        assert all(r["caution"] in ("", None, SCALE_CAUTION) for r in rows)
    line, other = slide_named(opened, "S1"), slide_named(opened, "S0")
    n = line.summary.counts.predicted
    assert scale_caution(opened, line).startswith(f"{n} of {n} answers are to pictures of another size")
    assert scale_caution(opened, line).endswith("Do not rely on them.")
    assert scale_caution(opened, other) == ""
    fields = opened.fields(Query(limit=500)).items
    assert guessed_fields(opened, fields) == {
        f.ordinal for f in fields if f.slide == "S1" and f.status is Status.PREDICTED
    }
    assert guessed_fields(opened, ()) == frozenset()


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
