"""Exports as tests read them: bytes, rows of CSV, and resources of FHIR that a library has accepted."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.diagnosticreport import DiagnosticReport
from fhir.resources.R4B.observation import Observation

from leukoflow.tasks.intake.patient_key import pseudonym
from leukoflow.tasks.review.export.stream import Format, Scope, export
from leukoflow.tasks.review.keys import run_key_of
from leukoflow.tasks.review.lines import SlideLine
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.table import RunTable

KEY = b"a key that only these tests have"
MARY, JANE = pseudonym("mary", KEY), pseudonym("jane", KEY)
NIGHT = run_key_of("night")


def bytes_of(table: RunTable, scope: Scope, kind: Format) -> bytes:
    return b"".join(export(table, scope, kind))


def csv_rows(data: bytes) -> list[dict[str, str]]:
    assert data.startswith(b"\xef\xbb\xbf")
    return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))


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
