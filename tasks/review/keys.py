"""How runs, slides and patients are named: opaque keys for addresses, from which no name can be read, and titles."""

from __future__ import annotations

import hashlib

NO_FOLDER = "."
"""The name that stands for the root of the source, whose images lie in no folder."""


def opaque_key(*words: str) -> str:
    """Return a key for addresses: 16 hex digits that reveal nothing of the words."""
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def run_key_of(run_id: str) -> str:
    """Return the key of a run."""
    return opaque_key(run_id)


def patient_key_of(patient: str) -> str:
    """Return the key of a patient, by the pseudonym; it is the same in all runs."""
    return opaque_key("patient", patient)


def slide_key_of(run_key: str, fingerprint: str, slide: str) -> str:
    """Return the key of a slide (grouping and name, joined by a colon) of a run over the source with a fingerprint."""
    return opaque_key("slide", run_key, fingerprint, slide)


def title_of(slide: str) -> str:
    """Return the name that people see of a slide, or of the folder that stands for it."""
    return "(no folder)" if slide == NO_FOLDER else slide
