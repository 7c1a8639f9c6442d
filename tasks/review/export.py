"""Handing results on: a run, a slide or a patient as CSV, Parquet or HL7 FHIR, and verdicts as training labels.

Every export says that it is for research use. Rows and resources are made piece by piece, so that a large run needs no
large memory.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.core.errors import ConfigError, LeukoflowError, NotFoundError, RequestError
from leukoflow.runs.progress import now
from leukoflow.runs.records import CLASSES, SourceKind, read_reason
from leukoflow.sources.members import open_reader
from leukoflow.tasks.intake.plan import read_shard, read_summary
from leukoflow.tasks.report.page import probability
from leukoflow.tasks.review.field_view import segment_settings
from leukoflow.tasks.review.verdicts import Standing
from leukoflow.tasks.review.wording import (
    BENIGN_BUT,
    CLASS_CAUTION,
    MEAN_MALIGNANT,
    MEAN_MALIGNANT_NOTE,
    RESEARCH_USE,
    SCALE_CAUTION,
    SHADOW,
    UNFINISHED,
    Scale,
    answered_scale_note,
    mean_words,
    sentence,
)
from leukoflow.tasks.review.worklist import (
    MAX_PAGE,
    PROBABILITIES,
    FieldLine,
    Ints,
    PatientLine,
    Query,
    RunTable,
    SlideLine,
    Sort,
    Summary,
    list_runs,
    open_run_table,
    slide_labels,
    timeline,
)
from leukoflow.tasks.store.slides import disagreement

ROWS = 4096
_SIZES = ("width_px", "height_px", "um_per_px")
FHIR_VERSION = "4.3.0"
"""R4B; the resources and elements that are used here are the same in R4."""
LOCAL = "urn:leukoflow:codes"
"""Our own code system: what a model says of pictures is none of the quantities that LOINC or SNOMED CT name."""


class Format(StrEnum):
    """What an export looks like."""

    CSV = "csv"
    PARQUET = "parquet"
    FHIR = "fhir"

    @property
    def media_type(self) -> str:
        """For the Content-Type header."""
        return {
            Format.CSV: "text/csv; charset=utf-8",
            Format.PARQUET: "application/vnd.apache.parquet",
            Format.FHIR: "application/fhir+json",
        }[self]

    @property
    def suffix(self) -> str:
        """For file names."""
        return {Format.CSV: ".csv", Format.PARQUET: ".parquet", Format.FHIR: ".fhir.json"}[self]


@dataclass(frozen=True, slots=True)
class Scope:
    """What of a run: all of it, or what belongs to a slide or a patient, by opaque key."""

    slide: str | None = None
    patient: str | None = None


WHOLE = Scope()
EXPORTED = (
    "run_id", "image_key", "slide_id", "patient_id", "site", "scanner", "status", "reason", "caution", "label",
    "confidence", *PROBABILITIES, "prediction_set", "ood_score", "n_cells", "bundle_digest", "reviewed_label",
    "reviewed_by", "reviewed_at", "flagged", "comment", "notice",
)  # fmt: skip


def exported_schema() -> pa.Schema:
    """Columns of CSV and Parquet exports: those of `predictions/` that are for people, and what people said.

    `label`, `confidence` and `prediction_set` are empty where the model abstained: there is no answer. `caution` is
    what must be read before an answer to a picture whose scale is a guess, and empty otherwise.
    """
    types = {
        **dict.fromkeys(("confidence", "ood_score", *PROBABILITIES), pa.float64()),
        "prediction_set": pa.list_(pa.string()),
        "n_cells": pa.int32(),
        "reviewed_at": pa.timestamp("ms", "UTC"),
        "flagged": pa.bool_(),
    }
    return pa.schema([pa.field(name, types.get(name, pa.string())) for name in EXPORTED])


def export(table: RunTable, scope: Scope = WHOLE, kind: Format | str = Format.CSV) -> Iterator[bytes]:
    """A run, a slide or a patient of it, in pieces. Raises RequestError for an unknown format, NotFoundError."""
    return export_all([(table, scope)], kind)


def export_patient(out: str, patient_key: str, kind: Format | str = Format.CSV) -> Iterator[bytes]:
    """A patient over all runs, the oldest first. Raises NotFoundError where no run knows the patient."""
    points = timeline(out, patient_key).points
    return export_all([(open_run_table(out, p.run_key), Scope(patient=patient_key)) for p in points], kind)


def export_all(what: Sequence[tuple[RunTable, Scope]], kind: Format | str) -> Iterator[bytes]:
    """Parts of several runs in one export."""
    try:
        chosen = Format(kind)
    except ValueError:
        raise RequestError(f"there is no format {str(kind)!r}: one of {', '.join(Format)}") from None
    rows = [(table, table.rows_of(scope.slide, scope.patient)) for table, scope in what]  # before the first byte
    if chosen is Format.CSV:
        return _csv(_tables(rows))
    if chosen is Format.PARQUET:
        return _parquet(_tables(rows))
    return _fhir([(table, scope) for table, scope in what])


# --- rows ------------------------------------------------------------------------------------------------------------


def _tables(what: Sequence[tuple[RunTable, Ints]]) -> Iterator[pa.Table]:
    for table, rows in what:
        for start in range(0, len(rows), ROWS):
            yield _rows(table, rows[start : start + ROWS])


def _notice(table: RunTable) -> str:
    """What stands beside whatever leaves a run."""
    return RESEARCH_USE if table.shadow_of is None else f"{SHADOW} {RESEARCH_USE}"


def _rows(table: RunTable, rows: Ints) -> pa.Table:
    frame, schema = table.frame, exported_schema()
    places = pa.array(rows)
    keys = frame.keys.take(places).to_pylist()
    said = [table.reviews.standings.get(("image", key), Standing()) for key in keys]
    decisions = [s.decision for s in said]
    answered = frame.answer[rows] >= 0  # what the model leaned to where it abstained is no answer, and stays here
    confidence = np.where(answered, frame.p[rows].max(1, initial=-np.inf), np.nan)
    sets = frame.column("prediction_set").take(places).to_pylist()
    given: dict[str, Any] = {
        "run_id": [table.run_id] * len(rows),
        "reason": [read_reason(r) for r in frame.column("reason").take(places).to_pylist()],
        "caution": [SCALE_CAUTION if guessed else None for guessed in _guessed(table, rows)],
        "label": [CLASSES[code] if code >= 0 else None for code in frame.answer[rows].tolist()],
        "prediction_set": [found if given_ else None for found, given_ in zip(sets, answered.tolist(), strict=True)],
        "confidence": pa.array(confidence, pa.float64(), from_pandas=True),
        "bundle_digest": [table.bundle[1]] * len(rows),
        "reviewed_label": [d.said if d else None for d in decisions],
        "reviewed_by": [d.who if d else None for d in decisions],
        "reviewed_at": [datetime.fromisoformat(d.at) if d else None for d in decisions],
        "flagged": [s.flagged for s in said],
        "comment": [s.comment for s in said],
        "notice": [_notice(table)] * len(rows),
    }
    arrays = []
    for field in schema:
        if field.name not in given:
            arrays.append(frame.column(field.name).take(places).combine_chunks().cast(field.type))
            continue
        values = given[field.name]
        arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
    return pa.table(arrays, schema=schema)


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What makes a spreadsheet take a text for a formula, full-width forms included."""


def safe_text(value: str) -> str:
    """A text that no spreadsheet calculates: one that begins like a formula gets an apostrophe in front."""
    return f"'{value}" if value.lstrip(" ").startswith(_FORMULA) else value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="seconds")
    if isinstance(value, list):
        return safe_text(" ".join(value))
    return safe_text(value) if isinstance(value, str) else str(value)


def _csv(tables: Iterable[pa.Table]) -> Iterator[bytes]:
    """RFC 4180 in UTF-8 with a byte order mark, without which spreadsheets take it for something else."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\r\n")
    writer.writerow(EXPORTED)
    yield b"\xef\xbb\xbf" + sink.getvalue().encode()
    for table in tables:
        sink.seek(0)
        sink.truncate()
        columns = [table[name].to_pylist() for name in EXPORTED]
        writer.writerows([_cell(value) for value in row] for row in zip(*columns, strict=True))
        yield sink.getvalue().encode("utf-8", "backslashreplace")


class _Pipe(io.RawIOBase):
    """Takes what is written, and hands it out."""

    def __init__(self) -> None:
        self.waiting = bytearray()
        self.at = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def write(self, data: Any) -> int:
        self.waiting += data
        self.at += len(data)
        return len(data)

    def taken(self) -> bytes:
        found = bytes(self.waiting)
        self.waiting.clear()
        return found


def _parquet(tables: Iterable[pa.Table]) -> Iterator[bytes]:
    schema = exported_schema().with_metadata({"leukoflow.notice": RESEARCH_USE})
    pipe = _Pipe()
    with pq.ParquetWriter(pipe, schema, compression="zstd", use_dictionary=False) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))
            if data := pipe.taken():
                yield data
    yield pipe.taken()


# --- FHIR ------------------------------------------------------------------------------------------------------------

_SPACE = uuid.UUID("6d4c1d0e-8a39-5a5e-9d3a-52b0c6f7a1c4")
_CLASS_WORDS = {
    "Benign": "Benign (haematogones)",
    "Early": "Malignant, early pre-B",
    "Pre": "Malignant, pre-B",
    "Pro": "Malignant, pro-B",
}
_UCUM = "http://unitsofmeasure.org"


def _fhir(what: Sequence[tuple[RunTable, Scope]]) -> Iterator[bytes]:
    """A Bundle (collection): for each slide, or for a patient, a DiagnosticReport and the Observations it refers to."""
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
    for table, scope in what:
        for resources in _reports(table, scope):
            for url, resource in resources:
                text = json.dumps({"fullUrl": url, "resource": resource}, ensure_ascii=True, allow_nan=False)
                yield before + text.encode()
                before = b",\n"
    yield b"}\n" if before != b",\n" else b"]}\n"


def _reports(table: RunTable, scope: Scope) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    if scope.patient is not None:
        yield _report(table, table.patient(scope.patient))
    elif scope.slide is not None:
        yield _report(table, table.slide(scope.slide))
    else:
        offset = 0
        while True:
            page = table.slides(Query(sort=Sort.URGENCY, offset=offset, limit=MAX_PAGE))
            for line in page.items:
                yield _report(table, line)
            offset += MAX_PAGE
            if offset >= page.total:
                return


def _url(table: RunTable, *words: str) -> str:
    """The same thing has the same address in every export."""
    return f"urn:uuid:{uuid.uuid5(_SPACE, chr(0).join((table.run_key, *words)))}"


def _concept(code: str, display: str) -> dict[str, Any]:
    return {"coding": [{"system": LOCAL, "code": code, "display": display}], "text": display}


def _quantity(value: float, code: str, unit: str) -> dict[str, Any]:
    return {"value": round(value, 6), "unit": unit, "system": _UCUM, "code": code}


def _report(table: RunTable, line: SlideLine | PatientLine) -> list[tuple[str, dict[str, Any]]]:
    """The DiagnosticReport of a slide or a patient, with its Observations."""
    if isinstance(line, SlideLine):
        about, name = ("slide", line.slide_key), f"slide {line.name}"
        patient = line.patient if line.patients == 1 else None  # fields of several: it is no patient's report
    else:
        about, patient, name = ("patient", line.patient_key), line.patient, "all slides of the patient in this run"
    digest = table.bundle[1]
    notice = _notice(table)
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
        slide = {"system": "urn:leukoflow:slide", "value": _clean(line.name)}
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
        "conclusion": _conclusion(table, line, name),
    }
    if specimen is not None:
        report["specimen"] = [specimen]
    return [(_url(table, *about, "report"), report), *out]


def _clean(text: str) -> str:
    """FHIR strings hold no control characters and are never blank."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text).strip() or "-"


def _absent(code: str, display: str, text: str) -> dict[str, Any]:
    system = "http://terminology.hl7.org/CodeSystem/data-absent-reason"
    return {"dataAbsentReason": {"coding": [{"system": system, "code": code, "display": display}], "text": text}}


def _observations(summary: Summary) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """(code, display, value, note) of each Observation; one without a value says why there is none."""
    if summary.diagnosed:
        absent = _absent("unknown", "Unknown", "the model abstained")
    else:
        absent = _absent("not-performed", "Not Performed", "no field could be predicted")
    outweighed = _outweighed(summary)
    if summary.label is None:
        label = absent
    else:
        concept = _concept(f"class-{summary.label.lower()}", _CLASS_WORDS[summary.label])
        if outweighed:
            concept["text"] += f" {outweighed}"
        label = {"valueCodeableConcept": concept}
    yield "likeliest-class", "Likeliest class of the fields", label, (
        "The class of highest mean probability over the predicted fields; calibrated on fields, not on slides. "
        + (f"Benign {outweighed}. " if outweighed else "")
        + CLASS_CAUTION
    )  # fmt: skip
    for code, display, value, note in (
        (
            "mean-malignant-probability",
            MEAN_MALIGNANT,
            summary.mean_malignant_probability,
            f"{MEAN_MALIGNANT_NOTE} {summary.counts.predicted:,} answered fields, {summary.answered_cells:,} cells. "
            f"{sentence(_interval_words(summary))}",
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


def _outweighed(summary: Summary) -> str:
    """What stands behind Benign where malignancy as a whole is as probable or more; empty elsewhere."""
    if not summary.outweighed or summary.mean_malignant_probability is None:
        return ""
    return f"{BENIGN_BUT} {mean_words(summary.mean_malignant_probability)}"


def _interval_words(summary: Summary) -> str:
    if summary.interval is None:
        return "too few fields for an interval" if summary.counts.predicted else "no field was predicted"
    low, high = (probability(v) for v in summary.interval)
    return (
        f"95 % interval {low} to {high}, as if fields were independent; those of one slide are not, so it is too narrow"
    )


def _rows_of(table: RunTable, line: SlideLine | PatientLine) -> Ints:
    if isinstance(line, SlideLine):
        return table.rows_of(slide_key=line.slide_key)
    return table.rows_of(patient_key=line.patient_key)


def _contradiction(table: RunTable, line: SlideLine | PatientLine) -> str:
    """What to remark where the slides of a patient were given different labels."""
    if isinstance(line, SlideLine):
        return ""
    said = disagreement(slide_labels(table, table.rows_of(patient_key=line.patient_key)))
    return f"The slides do not agree: {said}" if said else ""


def _mixed(table: RunTable, line: SlideLine | PatientLine) -> str:
    """What to remark where fields of several patients are on a slide."""
    if isinstance(line, SlideLine):
        if line.patients < 2:
            return ""
        return (
            f"Fields of {line.patients:,} patients are on this slide, so no patient is named: resolve this before "
            "reading."
        )
    frame, mine = table.frame, table.rows_of(patient_key=line.patient_key)
    others = (frame.patient >= 0) & (frame.patient != frame.patient[mine[0]])
    shared = len(np.intersect1d(frame.slide[mine], frame.slide[others]))
    if not shared:
        return ""
    are = "slide of this patient also holds" if shared == 1 else "slides of this patient also hold"
    return f"{shared:,} {are} fields of other patients: resolve this before reading."


def _unfinished(table: RunTable, line: SlideLine | PatientLine) -> str:
    """What to remark where more images are to come, or have never arrived."""
    remarks = [] if table.finished else [UNFINISHED]
    if line.missing:
        were = "listed image was" if line.missing == 1 else "listed images were"
        remarks.append(f"{line.missing:,} {were} not received.")
    if table.reconciliation().truncated:
        remarks.append("The source of the run was incomplete: images may be absent.")
    return " ".join(remarks)


def _guessed(table: RunTable, rows: Ints) -> list[bool]:
    """Which of these fields were answered although their scale is a guess."""
    settings, answered = segment_settings(table.bundle[0]), table.frame.answer[rows] >= 0
    width, height, um = (table.frame.column(name).take(pa.array(rows)).to_pylist() for name in _SIZES)
    return [
        said and Scale(w, h, u, settings).guessed
        for said, w, h, u in zip(answered.tolist(), width, height, um, strict=True)
    ]


def guessed_fields(table: RunTable, lines: Iterable[FieldLine]) -> frozenset[int]:
    """Tells which of these fields, by ordinal, were answered although their scale is a guess."""
    ordinals = [line.ordinal for line in lines]
    rows = np.searchsorted(table.frame.ordinals, np.asarray(ordinals, np.int64))
    return frozenset(o for o, guessed in zip(ordinals, _guessed(table, rows), strict=True) if guessed)


def scale_caution(table: RunTable, line: SlideLine | PatientLine) -> str:
    """Says where answers were given to pictures whose scale is a guess, as a sentence; empty where none was."""
    rows = _rows_of(table, line)
    answered = rows[table.frame.answer[rows] >= 0]
    note = answered_scale_note(sum(_guessed(table, answered)), len(answered), segment_settings(table.bundle[0]))
    return sentence(note)


def _reviewed(s: Summary) -> str:
    """What reviewers have decided on the fields, which changes no figure."""
    if not s.reviewed:
        return f"no reviewer has decided on any of the {s.diagnosed:,} answered or abstained fields"
    return (
        f"reviewers decided on {s.reviewed:,} of the {s.diagnosed:,} answered or abstained fields, and gave "
        f"{s.corrected:,} of the answered ones another label"
        + ("; the figures are the model's, without these corrections" if s.corrected else "")
    )


def _conclusion(table: RunTable, line: SlideLine | PatientLine, name: str) -> str:
    s = line.summary
    if s.label is None or s.mean_malignant_probability is None:
        found = f"{name}: no answer on any of {s.counts.fields:,} fields."
    else:
        outweighed = _outweighed(s)
        label = _CLASS_WORDS[s.label] + (f", which {outweighed}" if outweighed else "")
        found = (
            f"{name}: likeliest class {label}; {MEAN_MALIGNANT.lower()} "
            f"{mean_words(s.mean_malignant_probability)} ({s.counts.predicted:,} answered fields, "
            f"{s.answered_cells:,} cells; {_interval_words(s)}; no differential count); {s.malignant_fields:,} of the "
            f"answered fields have a malignant probability above one half; {s.counts.abstained:,} abstained, "
            f"{s.counts.rejected:,} rejected, {s.counts.quarantined:,} quarantined; {_reviewed(s)}. {CLASS_CAUTION}"
        )
    said = [
        SHADOW if table.shadow_of is not None else "",
        _mixed(table, line),
        _unfinished(table, line),
        found,
        _contradiction(table, line),
        scale_caution(table, line),
    ]
    if isinstance(line, SlideLine) and line.standing.decision is not None and line.standing.decision.said:
        said.append(f"A reviewer has labelled the slide: {_CLASS_WORDS[line.standing.decision.said]}.")
    return f"{_clean(' '.join(filter(None, said)))} {RESEARCH_USE}"


# --- training labels -------------------------------------------------------------------------------------------------

LABELS = ("image_key", "label", "slide_id", "cluster_id")
"""What `leukoflow train` reads in `all_fields.csv`."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A field that a person has labelled. `slide` and `group` are numbers within one export: no patient is told."""

    image_key: str  # in the export
    label: str
    slide: str
    group: str
    run_id: str
    stored_key: str  # in the run
    ordinal: int


def training_labels(out: str, run_keys: Sequence[str] | None = None) -> list[Labelled]:
    """Labels that people gave or accepted, of the given runs or of all: one for each image, the latest.

    Left out are flagged fields and shadow runs. Images of one patient share a group, which training keeps together; so
    do those of one slide where there is no patient. Neither is named.
    """
    found: dict[str, tuple[str, Labelled]] = {}
    slides: dict[tuple[str, str], str] = {}
    groups: dict[str, str] = {}
    for line in list_runs(out):
        if (
            line.shadow_of is not None
            or line.state == "damaged"
            or (run_keys is not None and line.run_key not in run_keys)
        ):
            continue
        try:
            table = open_run_table(out, line.run_key)
        except NotFoundError:
            continue
        frame = table.frame
        places: dict[str, int] = {}
        digests: list[str | None] = []
        for (kind, key), standing in table.reviews.standings.items():
            decision = standing.decision
            if kind != "image" or standing.flagged or decision is None or decision.said is None:
                continue
            if not places:
                places = {name: row for row, name in enumerate(frame.keys.to_pylist())}
                digests = frame.column("member_sha256").to_pylist()
            row = places.get(key, -1)
            digest = digests[row] if row >= 0 else None
            if digest is None:
                continue
            slide = (line.run_key, frame.slides[frame.slide[row]])
            patient = frame.patients[frame.patient[row]] if frame.patient[row] >= 0 else "\0".join(slide)
            name = f"{digest[:32]}{_suffix(key)}"
            labelled = Labelled(
                image_key=name,
                label=decision.said,
                slide=slides.setdefault(slide, f"S{len(slides):04d}"),
                group=groups.setdefault(patient, f"G{len(groups):04d}"),
                run_id=line.run_id,
                stored_key=key,
                ordinal=int(frame.ordinals[row]),
            )
            if digest not in found or found[digest][0] < decision.at:
                found[digest] = (decision.at, labelled)
    return [labelled for _, labelled in sorted(found.values(), key=lambda f: f[1].image_key)]


def _suffix(key: str) -> str:
    """The ending of an image's name where it is one; names may tell of patients."""
    suffix = Path(key).suffix.lower()
    return suffix if suffix in (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp") else ""


def labels_csv(labels: Iterable[Labelled]) -> bytes:
    """`all_fields.csv`, as `leukoflow train` reads it."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(LABELS)
    writer.writerows((x.image_key, x.label, x.slide, x.group) for x in labels)
    return sink.getvalue().encode()


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """What `write_training_set` wrote. `lost` are labelled images that cannot be read any more; they are left out."""

    folder: Path
    images: int
    lost: int


def write_training_set(out: str, folder: str | Path, run_keys: Sequence[str] | None = None) -> TrainingSet:
    """`all_fields.csv` and `all_fields.zip` of everything that people have labelled, for `leukoflow train`.

    The images are read again from their sources and named by their digests. Raises ConfigError where the folder has
    such files, or nothing is labelled.
    """
    target = Path(folder)
    labels = training_labels(out, run_keys)
    if not labels:
        raise ConfigError("nobody has accepted or corrected a prediction yet: there is nothing to train on")
    paths = target / "all_fields.csv", target / "all_fields.zip"
    if any(p.exists() for p in paths):
        raise ConfigError(f"{target} has training data already: name another folder")
    target.mkdir(parents=True, exist_ok=True)
    kept: list[Labelled] = []
    with zipfile.ZipFile(paths[1], "w", zipfile.ZIP_STORED) as archive:
        for labelled, data in _images(out, labels):
            archive.writestr(zipfile.ZipInfo(labelled.image_key, (1980, 1, 1, 0, 0, 0)), data)
            kept.append(labelled)
    paths[0].write_bytes(labels_csv(sorted(kept, key=lambda x: x.image_key)))
    return TrainingSet(target, len(kept), len(labels) - len(kept))


def _images(out: str, labels: Sequence[Labelled]) -> Iterator[tuple[Labelled, bytes]]:
    """The bytes of labelled images, run by run; those that are gone or have changed are left out."""
    runs: dict[str, list[Labelled]] = {}
    for labelled in labels:
        runs.setdefault(labelled.run_id, []).append(labelled)
    keys = {line.run_id: line.run_key for line in list_runs(out)}
    for run_id, own in runs.items():
        with ExitStack() as stack:
            try:
                table = open_run_table(out, keys[run_id])
                plan = pq.ParquetFile(stack.enter_context(table.storage.open("plan.parquet")))
                source = read_summary(stack.enter_context(table.storage.open("plan.parquet"))).source
                if source.kind is SourceKind.COMPRESSED_TAR:
                    continue
                reader = stack.enter_context(open_reader(source))
            except (LeukoflowError, OSError, KeyError):
                continue
            members: Mapping[int, Any] = {}
            for labelled in sorted(own, key=lambda x: x.ordinal):
                if labelled.ordinal not in members:
                    shard = labelled.ordinal // table.shard_size
                    members = {m.ordinal: m for m in read_shard(plan, shard)}
                try:
                    data = reader.read(members[labelled.ordinal])
                except (LeukoflowError, OSError, KeyError):
                    continue
                if hashlib.sha256(data).hexdigest().startswith(Path(labelled.image_key).stem):
                    yield labelled, data


def classes_of(labels: Iterable[Labelled]) -> dict[str, int]:
    """How many fields of each class."""
    found = dict.fromkeys(CLASSES, 0)
    for labelled in labels:
        found[labelled.label] += 1
    return found
