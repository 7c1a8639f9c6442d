"""Correct to whom images belong, in all runs of an output folder: a patient or a slide was assigned wrongly.

Plan, predictions and missing images name the right patient; slides are ranked again, and identical images under more
than one patient are looked for again. What was computed from pixels stays as it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from leukoflow.core.errors import ConfigError
from leukoflow.tasks.upkeep.amend import amend_runs
from leukoflow.tasks.upkeep.amendment import Amended, Amendment, salted


@dataclass(frozen=True, slots=True)
class Correction(Amendment):
    """Images of a patient, of a slide, or of a patient on a slide belong to another patient (all pseudonyms)."""

    to: str
    patient: str | None = None
    slide: str | None = None
    doing, done = "correct", "corrected"

    def concerned(self, table: pa.Table) -> pa.ChunkedArray:
        """Select the rows of the patient and slide that name another patient than the right one, or none."""
        theirs = pc.fill_null(pc.not_equal(table["patient_id"], self.to), True)
        for name, value in (("patient_id", self.patient), ("slide_id", self.slide)):
            if value is not None:
                theirs = pc.and_(theirs, pc.fill_null(pc.equal(table[name], value), False))
        return theirs

    def changed(self, table: pa.Table) -> pa.Table:
        """Return the same rows, with the right patient."""
        i = table.schema.get_field_index("patient_id")
        right = pc.if_else(self.concerned(table), pa.scalar(self.to, pa.string()), table["patient_id"])
        return table.set_column(i, table.schema.field(i), right)

    def key(self, key: str) -> str:
        """Return one that no run looks for: predictions carry the patient."""
        return hashlib.sha256(f"corrected {key}".encode()).hexdigest()

    def details(self) -> dict[str, str]:
        """Return patients and slide, salted and hashed."""
        named = (("patient", self.patient), ("slide", self.slide), ("to", self.to))
        return {name: salted(value) for name, value in named if value is not None}


def correct_patient(
    out: str,
    to: str,
    patient: str | None = None,
    slide: str | None = None,
    dry_run: bool = False,
    key: bytes | None = None,
) -> tuple[Amended, ...]:
    """Assign the images of a patient, or of a slide, to the patient `to` in all runs.

    Patients are pseudonyms, by `key` where that is known. Returns what was done to the runs that are concerned. Raises
    ConfigError where nothing says which images are meant, or a run that is concerned has pseudonyms by another key;
    StorageError before anything is changed where a run that may be concerned is not finished or damaged.
    """
    if patient is None and slide is None:
        raise ConfigError("say whose images to correct: name the wrong patient, the slide, or both")
    if patient == to:
        raise ConfigError("the wrong patient and the right one are the same; nothing was changed")
    return amend_runs(out, Correction(to, patient, slide), dry_run, key)
