"""Erase a patient from all runs of an output folder, so that every image stays accounted for.

The patient's rows stay, without slide, patient and further manifest columns; cells, masks and features of the images
are blanked; plan, slides, duplicates and missing images forget the patient as well.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from leukoflow.tasks.intake.manifest import META_PREFIX
from leukoflow.tasks.upkeep.amend import amend_runs
from leukoflow.tasks.upkeep.amendment import Amended, Amendment, salted

IDENTIFYING = ("slide_id", "patient_id")


def without_identity(table: pa.Table, patient: str) -> pa.Table:
    """Return the same rows; those of the patient without patient, slide and further manifest columns."""
    theirs = pc.fill_null(pc.equal(table["patient_id"], patient), False)
    for i, field in enumerate(table.schema):
        if field.name in IDENTIFYING or field.name.startswith(META_PREFIX):
            blank = pc.if_else(theirs, pa.scalar(None, field.type), table[field.name])
            table = table.set_column(i, field, blank)
    return table


def erased_key(key: str) -> str:
    """Return the content address of a part that was blanked, so that no run takes it for what it was."""
    return hashlib.sha256(f"erased {key}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Erasure(Amendment):
    """A patient (a pseudonym) goes."""

    patient: str
    doing, done, blanks = "erase", "erased", True

    def concerned(self, table: pa.Table) -> pa.ChunkedArray:
        """Select the patient's rows."""
        return pc.fill_null(pc.equal(table["patient_id"], self.patient), False)

    def changed(self, table: pa.Table) -> pa.Table:
        """Return the same rows; those of the patient without identity."""
        return without_identity(table, self.patient)

    def key(self, key: str) -> str:
        """Return one that no run looks for."""
        return erased_key(key)

    def details(self) -> dict[str, str]:
        """Return the patient, salted and hashed."""
        return {"patient": salted(self.patient)}


def erase_patient(out: str, patient: str, dry_run: bool = False) -> tuple[Amended, ...]:
    """Erase a patient (a pseudonym) from all runs; return what was done to those that know the patient.

    Raises StorageError before anything is changed where a run that may know the patient is not finished or damaged.
    """
    return amend_runs(out, Erasure(patient), dry_run)
