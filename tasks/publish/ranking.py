"""Rank a run's slides by urgency, and find identical images that are on record for more than one patient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from leukoflow.runs.records import CLASSES, Status
from leukoflow.runs.schema import DUPLICATES, SLIDES
from leukoflow.tasks.store.slides import MALIGNANT, mean_malignant_probability, slide_of, urgency_of

RANKED = (
    "run_id", "image_key", "slide_id", "patient_id", "site", "status", "n_cells", "prob_benign", "prob_early",
    "prob_pre", "prob_pro",
)  # fmt: skip
"""Columns of the predictions that the ranking of the slides looks at."""

CONFLICT_COLUMNS = ("member_sha256", "image_key", "patient_id", "shard")
"""Columns of the predictions that `duplicates.parquet` has as well."""


# --- slides ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Slide:
    """Running sums of one slide; never more than one slide's numbers, however many fields it has."""

    run_id: str
    grouping: str
    patient_id: str | None
    site: str | None
    status: Counter[str] = field(default_factory=Counter)
    probabilities: NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))
    malignant: int = 0
    cells: int = 0
    top: tuple[float, str] | None = None


class Ranking:
    """Sums up fields by slide, and ranks the slides by urgency."""

    def __init__(self) -> None:
        self._slides: dict[str, _Slide] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Add a field to its slide: by `slide_id` where the manifest gave one, else by the folder it lies in."""
        grouping, slide_id = slide_of(row["slide_id"], row["image_key"])
        key = f"{grouping}:{slide_id}"
        slide = self._slides.get(key)
        if slide is None:
            slide = self._slides[key] = _Slide(row["run_id"], grouping, row["patient_id"], row["site"])
        if slide.patient_id is None:  # an image without a line in the manifest may have a slide and no patient
            slide.patient_id = row["patient_id"]
        if slide.site is None:
            slide.site = row["site"]
        slide.status[row["status"]] += 1
        slide.cells += row["n_cells"] or 0
        if row["status"] != Status.PREDICTED:
            return
        p = np.array([row["prob_benign"], row["prob_early"], row["prob_pre"], row["prob_pro"]])
        slide.probabilities += p
        malignant = float(p[MALIGNANT].sum())
        slide.malignant += malignant > 0.5
        if slide.top is None or (malignant, row["image_key"]) > slide.top:
            slide.top = (malignant, row["image_key"])

    def table(self) -> pa.Table:
        """Return `slides.parquet` over the fields so far."""
        rows = []
        for key, slide in self._slides.items():
            n = slide.status[Status.PREDICTED]
            mean = slide.probabilities / n if n else None
            malignant = float(slide.probabilities[MALIGNANT].sum())
            rows.append(
                {
                    "run_id": slide.run_id,
                    "slide_id": key.split(":", 1)[1],
                    "grouping": slide.grouping,
                    "patient_id": slide.patient_id,
                    "site": slide.site,
                    "urgency": urgency_of(malignant, n),
                    "label": None if mean is None else CLASSES[int(mean.argmax())],
                    "malignant_score": float(mean_malignant_probability(slide.probabilities, n)) if n else None,
                    "prob_benign": None if mean is None else float(mean[0]),
                    "prob_early": None if mean is None else float(mean[1]),
                    "prob_pre": None if mean is None else float(mean[2]),
                    "prob_pro": None if mean is None else float(mean[3]),
                    "n_images": slide.status.total(),
                    "n_predicted": n,
                    "n_abstained": slide.status[Status.ABSTAINED],
                    "n_rejected": slide.status[Status.REJECTED],
                    "n_quarantined": slide.status[Status.QUARANTINED],
                    "n_malignant": int(slide.malignant),
                    "n_cells": slide.cells,
                    "top_image_key": slide.top and slide.top[1],
                    "top_confidence": slide.top and slide.top[0],
                }
            )
        rows.sort(key=lambda r: (-r["urgency"], r["slide_id"]))
        for rank, row in enumerate(rows, 1):
            row["rank"] = rank
        return pa.Table.from_pylist(rows, SLIDES)


def rank_slides(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Make `slides.parquet` from the rows of `predictions/`."""
    ranking = Ranking()
    for row in rows:
        ranking.add(row)
    return ranking.table()


# --- identical images under more than one patient --------------------------------------------------------------------


class SharedImages:
    """Finds images that occur under more than one patient; keeps 128 bits for each image that has a patient."""

    def __init__(self) -> None:
        self._pairs: list[NDArray[np.uint64]] = []

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows with `member_sha256` and `patient_id`; those without one or the other are passed over."""
        pairs = [
            (int(row["member_sha256"][:16], 16), _hash_patient(row["patient_id"]))
            for row in rows
            if row["member_sha256"] and row["patient_id"]
        ]
        if pairs:
            self._pairs.append(np.array(pairs, np.uint64))

    def digests(self) -> set[int]:
        """Return the first 64 bits of the digests of the images that are shared."""
        if not self._pairs:
            return set()
        pairs = np.unique(np.concatenate(self._pairs), axis=0)
        values, counts = np.unique(pairs[:, 0], return_counts=True)
        return {int(v) for v in values[counts > 1]}


def _hash_patient(patient_id: str) -> int:
    """Return 64 bits of a pseudonym (`p_` and hex digits), enough to tell patients apart while counting."""
    return int(patient_id.removeprefix("p_")[:16], 16)


def list_conflicts(parts: Iterable[pa.Table], shared: set[int]) -> pa.Table:
    """Make `duplicates.parquet`: the rows of `parts` (`CONFLICT_COLUMNS`) whose images are shared."""
    rows: list[dict[str, Any]] = []
    for part in parts:
        rows += [r for r in part.to_pylist() if r["member_sha256"] and int(r["member_sha256"][:16], 16) in shared]
    return pa.Table.from_pylist(sorted(rows, key=lambda r: (r["member_sha256"], r["image_key"])), DUPLICATES)


def find_conflicts(read: Callable[[Sequence[str]], Iterable[pa.Table]]) -> pa.Table:
    """Make `duplicates.parquet` from the rows of `predictions/`, which `read` streams, given columns; called twice."""
    images = SharedImages()
    for piece in read(["member_sha256", "patient_id"]):
        images.add(piece.to_pylist())
    shared = images.digests()
    return list_conflicts(read(CONFLICT_COLUMNS) if shared else (), shared)
