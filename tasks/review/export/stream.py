"""Exports of a run, a slide or a patient as streams of bytes: formats, scopes, and where an export begins.

Every export says that it is for research use. Rows and resources are made piece by piece, so that a large run needs no
large memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from leukoflow.core.errors import RequestError
from leukoflow.tasks.review.export.fhir import Line, write_fhir
from leukoflow.tasks.review.export.rows import tables, write_csv, write_parquet
from leukoflow.tasks.review.query import MAX_PAGE, Query, Sort
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.timeline import timeline


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


def export(table: RunTable, scope: Scope = WHOLE, kind: Format | str = Format.CSV) -> Iterator[bytes]:
    """Export a run, or a slide or patient of it, as pieces of one file.

    Raises RequestError for an unknown format, NotFoundError for a slide or patient that the run does not have.
    """
    return export_all([(table, scope)], kind)


def export_patient(out: str, patient_key: str, kind: Format | str = Format.CSV) -> Iterator[bytes]:
    """Export a patient over all runs, the oldest first. Raises NotFoundError where no run knows the patient."""
    points = timeline(out, patient_key).points
    return export_all([(open_run_table(out, p.run_key), Scope(patient=patient_key)) for p in points], kind)


def export_all(what: Sequence[tuple[RunTable, Scope]], kind: Format | str) -> Iterator[bytes]:
    """Export parts of several runs in one file; what is wrong is raised before the first piece."""
    try:
        chosen = Format(kind)
    except ValueError:
        raise RequestError(f"there is no format {str(kind)!r}: one of {', '.join(Format)}") from None
    rows = [(table, table.rows_of(scope.slide, scope.patient)) for table, scope in what]  # before the first byte
    if chosen is Format.CSV:
        return write_csv(tables(rows))
    if chosen is Format.PARQUET:
        return write_parquet(tables(rows))
    return write_fhir((table, line) for table, scope in what for line in _lines(table, scope))


def _lines(table: RunTable, scope: Scope) -> Iterator[Line]:
    """Yield the slides of a scope, or its patient: each makes one report."""
    if scope.patient is not None:
        yield table.patient(scope.patient)
    elif scope.slide is not None:
        yield table.slide(scope.slide)
    else:
        offset = 0
        while True:
            page = table.slides(Query(sort=Sort.URGENCY, offset=offset, limit=MAX_PAGE))
            yield from page.items
            offset += MAX_PAGE
            if offset >= page.total:
                return
