"""Exports as HL7 FHIR: a Bundle of DiagnosticReports with the Observations that they refer to."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from leukoflow.runs.progress import now
from leukoflow.tasks.review.cautions import notice_of
from leukoflow.tasks.review.export.conclusion import CLASS_WORDS, clean, conclude, interval_words, outweighed
from leukoflow.tasks.review.lines import PatientLine, SlideLine, Summary
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.wording import (
    CLASS_CAUTION,
    MEAN_MALIGNANT,
    MEAN_MALIGNANT_NOTE,
    RESEARCH_USE,
    sentence,
)

LOCAL = "urn:leukoflow:codes"
"""Our own code system: what a model says of pictures is none of the quantities that LOINC or SNOMED CT name."""

_SPACE = uuid.UUID("6d4c1d0e-8a39-5a5e-9d3a-52b0c6f7a1c4")
_UCUM = "http://unitsofmeasure.org"

Line: TypeAlias = SlideLine | PatientLine


def write_fhir(lines: Iterable[tuple[RunTable, Line]]) -> Iterator[bytes]:
    """Write a Bundle (collection), in pieces: for each slide or patient a DiagnosticReport with its Observations."""
    head = {
        "resourceType": "Bundle",
        "type": "collection",
        "timestamp": now(),
        "meta": {
            "security": [
                {
                    "system": "http://terminology.hl7.org/CodeSystem/v3-ActReason",
                    "code": "HRESCH",
                    "display": "healthcare research",
                }
            ],
            "tag": [{"system": LOCAL, "code": "research-use-only", "display": RESEARCH_USE}],
        },
    }
    yield json.dumps(head, ensure_ascii=True)[:-1].encode()
    before = b', "entry": ['  # an array without entries would not be valid
    for table, line in lines:
        for url, resource in _report(table, line):
            text = json.dumps({"fullUrl": url, "resource": resource}, ensure_ascii=True, allow_nan=False)
            yield before + text.encode()
            before = b",\n"
    yield b"}\n" if before != b",\n" else b"]}\n"


def _url(table: RunTable, *words: str) -> str:
    """Return the address of a resource: the same thing has the same one in every export."""
    return f"urn:uuid:{uuid.uuid5(_SPACE, chr(0).join((table.run_key, *words)))}"


def _concept(code: str, display: str) -> dict[str, Any]:
    return {"coding": [{"system": LOCAL, "code": code, "display": display}], "text": display}


def _quantity(value: float, code: str, unit: str) -> dict[str, Any]:
    return {"value": round(value, 6), "unit": unit, "system": _UCUM, "code": code}


def _report(table: RunTable, line: Line) -> list[tuple[str, dict[str, Any]]]:
    """Return the DiagnosticReport of a slide or a patient, then its Observations, each with its address."""
    if isinstance(line, SlideLine):
        about, name = ("slide", line.slide_key), f"slide {line.name}"
        patient = line.patient if line.patients == 1 else None  # fields of several: it is no patient's report
    else:
        about, patient, name = ("patient", line.patient_key), line.patient, "all slides of the patient in this run"
    digest = table.bundle[1]
    notice = notice_of(table)
    shared: dict[str, Any] = {
        "status": "preliminary",
        "issued": table.manifest.finished_at if table.manifest is not None else now(),
    }
    if patient is not None:
        shared["subject"] = {
            "type": "Patient",
            "identifier": {"system": "urn:leukoflow:pseudonym", "value": patient},
            "display": "a pseudonym",
        }
    specimen = None
    if isinstance(line, SlideLine):
        slide = {"system": "urn:leukoflow:slide", "value": clean(line.name)}
        specimen = {"type": "Specimen", "identifier": slide}
    out = []
    for code, display, values, note in _observations(line.summary):
        observation = {
            "resourceType": "Observation",
            **shared,
            "category": [
                {
                    "coding": [
                        {
                            "system": "http://terminology.hl7.org/CodeSystem/observation-category",
                            "code": "laboratory",
                            "display": "Laboratory",
                        }
                    ]
                }
            ],
            "code": _concept(code, display),
            **values,
            "device": {"type": "Device", "display": f"leukoflow, bundle {digest}"},
            "note": [{"text": f"{note} {notice}"}],
        }
        if specimen is not None:
            observation["specimen"] = specimen
        out.append((_url(table, *about, code), observation))
    report = {
        "resourceType": "DiagnosticReport",
        **shared,
        "identifier": [{"system": "urn:leukoflow:report", "value": f"{table.run_key}-{about[1]}"}],
        "category": [
            {
                "coding": [
                    {
                        "system": "http://terminology.hl7.org/CodeSystem/v2-0074",
                        "code": "HM",
                        "display": "Hematology",
                    }
                ]
            }
        ],
        "code": _concept("smear-screening", "Screening of a blood smear by an image classifier, research use"),
        "result": [{"reference": url, "type": "Observation"} for url, _ in out],
        "conclusion": conclude(table, line, name),
    }
    if specimen is not None:
        report["specimen"] = [specimen]
    return [(_url(table, *about, "report"), report), *out]


def _absent(code: str, display: str, text: str) -> dict[str, Any]:
    system = "http://terminology.hl7.org/CodeSystem/data-absent-reason"
    return {"dataAbsentReason": {"coding": [{"system": system, "code": code, "display": display}], "text": text}}


def _observations(summary: Summary) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """Yield (code, display, value, note) of each Observation; one without a value says why there is none."""
    if summary.diagnosed:
        absent = _absent("unknown", "Unknown", "the model abstained")
    else:
        absent = _absent("not-performed", "Not Performed", "no field could be predicted")
    but = outweighed(summary)
    if summary.label is None:
        label = absent
    else:
        concept = _concept(f"class-{summary.label.lower()}", CLASS_WORDS[summary.label])
        if but:
            concept["text"] += f" {but}"
        label = {"valueCodeableConcept": concept}
    yield "likeliest-class", "Likeliest class of the fields", label, (
        "The class of highest mean probability over the predicted fields; calibrated on fields, not on slides. "
        + (f"Benign {but}. " if but else "")
        + CLASS_CAUTION
    )  # fmt: skip
    for code, display, value, note in (
        (
            "mean-malignant-probability",
            MEAN_MALIGNANT,
            summary.mean_malignant_probability,
            f"{MEAN_MALIGNANT_NOTE} {summary.counts.predicted:,} answered fields, {summary.answered_cells:,} cells. "
            f"{sentence(interval_words(summary))}",
        ),
        (
            "uncertain-share",
            "Share of answered or abstained fields with several classes in the prediction set, or abstained from",
            summary.uncertainty,
            "Fields that were abstained from, or whose prediction set has more than one class.",
        ),
    ):
        yield code, display, absent if value is None else {"valueQuantity": _quantity(value, "1", "1")}, note
    for code, display, count in (
        ("fields-predicted", "Fields with a prediction", summary.counts.predicted),
        ("fields-abstained", "Fields that were abstained from", summary.counts.abstained),
        ("fields-rejected", "Fields of insufficient quality", summary.counts.rejected),
        ("fields-quarantined", "Fields that could not be read", summary.counts.quarantined),
        ("fields-reviewed", "Answered or abstained fields on which a reviewer decided", summary.reviewed),
        ("cells", "Cells outlined in the pictures", summary.cells),
    ):
        unit, note = "fields", "A count."
        if code == "cells":
            unit = "cells"
            note = "Outlines in the answered and abstained fields. No white cell count and no differential count."
        yield code, display, {"valueQuantity": _quantity(count, f"{{{unit}}}", unit)}, note
