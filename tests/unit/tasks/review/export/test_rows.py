"""Exports as rows: whole, readable by others' tools, harmless in spreadsheets, never an answer where there is none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from exports import NIGHT, bytes_of, changed, csv_rows, fhir, slide_named
from harness import table as table_of

from leukoflow.runs.records import Status
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.review.cautions import guessed_fields, scale_caution
from leukoflow.tasks.review.export.rows import EXPORTED, safe_text
from leukoflow.tasks.review.export.stream import Format, Scope
from leukoflow.tasks.review.query import Query
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.verdict_record import Action
from leukoflow.tasks.review.verdicts import add
from leukoflow.tasks.review.wording import RESEARCH_USE, SCALE_CAUTION


def test_csv_and_parquet_hold_every_field_once(night: Run, opened: RunTable) -> None:
    stored = table_of(Path(night.root), "predictions", ()).to_pylist()
    none = dict.fromkeys(("label", "confidence", "prediction_set"))  # what it leaned to is no answer
    stored = [row | none if row["status"] == "abstained" else row for row in stored]
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


def test_answers_at_a_guessed_scale_leave_with_the_caution(copy: Path) -> None:
    def blow_up(row: dict[str, Any]) -> None:
        if row["slide_id"] == "S1":
            row |= {"width_px": 1999, "height_px": 1999, "um_per_px": None, "um_per_px_source": None}  # schema 2

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
