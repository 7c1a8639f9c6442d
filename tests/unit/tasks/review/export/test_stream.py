"""Exports of a run, a slide or a patient: refused before the first byte, with what people said, by command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from exports import KEY, MARY, NIGHT, bytes_of, csv_rows, fhir, report_of
from fhir.resources.R4B.bundle import Bundle
from typer.testing import CliRunner

from leukoflow.apps.cli.main import app
from leukoflow.core.errors import NotFoundError, RequestError
from leukoflow.tasks.review.export.labels import training_labels
from leukoflow.tasks.review.export.stream import Format, Scope, export, export_patient
from leukoflow.tasks.review.keys import patient_key_of
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.verdict_record import Action
from leukoflow.tasks.review.verdicts import add
from leukoflow.tasks.review.wording import RESEARCH_USE


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


def test_reviews_are_exported(copy: Path) -> None:
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


def test_a_withdrawn_decision_is_not_exported(copy: Path) -> None:
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


def test_a_shadow_run_is_exported_as_one(copy: Path, opened: RunTable) -> None:
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
        (("export", out, "night", "--to", "x.xlsx"), "the ending of the name decides the format"),
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
