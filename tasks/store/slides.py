"""Define what a slide is, and how urgent its fields make it, for the run's tables and the worklist alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from leukoflow.core.counts import count_of
from leukoflow.runs.records import CLASS_NAMES

MALIGNANT = slice(1, 4)
"""Places of the malignant classes among CLASSES."""


def slide_of(slide_id: str | None, image_key: str) -> tuple[str, str]:
    """Return (grouping, slide) of an image: what the manifest says, else the folder it lies in."""
    return ("folder", image_key.rpartition("/")[0] or ".") if slide_id is None else ("manifest", slide_id)


def urgency_of(malignant: Any, predicted: Any) -> Any:
    """Return the expected share of malignant fields, shrunk towards one half where few speak.

    `malignant` is the sum of the predicted fields' malignant probabilities, `predicted` their number; arrays of both do
    as well. A slide on which nothing could be predicted has urgency one half: nobody may take silence for health.
    """
    return (malignant + 1.0) / (predicted + 2.0)


def mean_malignant_probability(sums: Any, answered: Any) -> Any:
    """Return the mean over answered fields of P(Early) + P(Pre) + P(Pro), each counting once, however many its cells.

    It is `malignant_score` in `slides.parquet`. No differential count: no cell is diagnosed by itself.

    Args:
        sums: sums of the answered fields' probabilities, float64 [..., 4] in the order of CLASSES.
        answered: their number [...], at least 1.
    """
    return (sums / np.asarray(answered)[..., None])[..., MALIGNANT].sum(-1)


NAMED = 3  # runs or slides of a label that a remark names


def disagreement(found: Iterable[tuple[str, str | None, int]]) -> str:
    """Say where runs, or slides, of one patient were given different labels; empty where they agree.

    `found` has a run's or slide's name, its label (None where nothing was predicted), and its predicted fields.
    """
    by_label: dict[str, list[tuple[str, int]]] = {}
    for name, label, fields in found:
        if label is not None:
            by_label.setdefault(label, []).append((name, fields))
    if len(by_label) < 2:
        return ""
    parts = []
    for label, named in by_label.items():
        shown = ", ".join(name for name, _ in named[:NAMED])
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        fields = sum(n for _, n in named)
        parts.append(f"{CLASS_NAMES[label]} in {shown}{more} ({count_of(fields, 'field')})")
    if "Benign" in by_label:
        causes = "Another sample or treatment can be the reason, but also a wrong answer or a mix-up of patients."
    else:
        causes = "One of the answers may be wrong, or the samples may not be of one patient."
    return f"{'; '.join(parts)}. {causes} Judge the slides by eye."


def patients_in_disagreement(slides: Iterable[dict[str, Any]]) -> dict[str, str]:
    """List patients whose slides have different labels, each with the remark; `slides` are rows of `slides.parquet`."""
    by_patient: dict[str, list[tuple[str, str | None, int]]] = {}
    for s in slides:
        if s["patient_id"] is not None:
            by_patient.setdefault(s["patient_id"], []).append((s["slide_id"], s["label"], s["n_predicted"]))
    said = {patient: disagreement(own) for patient, own in by_patient.items()}
    return {patient: remark for patient, remark in said.items() if remark}
