"""What is held of a run between two questions: its fields as arrays, grouped, and where the rest of it lies."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.core.errors import NotFoundError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.progress import RunProgress
from leukoflow.runs.records import RunManifest
from leukoflow.storage.base import Storage
from leukoflow.tasks.review.columns import translate_read_errors
from leukoflow.tasks.review.frame import Floats, Frame, Ints, encode_slides
from leukoflow.tasks.review.groups import Groups
from leukoflow.tasks.review.keys import patient_key_of, run_key_of, slide_key_of
from leukoflow.tasks.review.reviews import Reviews
from leukoflow.tasks.review.verdict_record import Verdicts
from leukoflow.tasks.store.slides import urgency_of


class PatientSlides(NamedTuple):
    """Every slide of every patient, over that patient's fields on it; one entry each."""

    patient: Ints
    slide: Ints
    urgency: Floats


class MissingImages(NamedTuple):
    """Images that the manifest lists and the source does not hold."""

    by_slide: Counter[str]  # grouping and name, joined by a colon
    by_patient: Counter[str]


@dataclass(eq=False)
class Snapshot:
    """A run as it was when its files bore `stamp`. Of a run in progress `progress` alone is replaced afterwards."""

    run: Storage
    run_id: str
    stamp: str
    frame: Frame
    manifest: RunManifest | None
    progress: RunProgress | None
    fingerprint: str
    shard_size: int
    files: Mapping[str, str]  # of the shards: where their predictions are
    missing: int | None
    ignored: int
    truncated: str | None
    pieces: Mapping[str, pa.Table] = field(default_factory=dict)  # of a run in progress, by shard
    selections: OrderedDict[Any, Ints] = field(default_factory=OrderedDict)  # kept by `Selection`
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the selections

    def __post_init__(self) -> None:
        self.run_key = run_key_of(self.run_id)
        self.slides = Groups(self.frame, self.frame.slide, len(self.frame.slides))
        self.patients = Groups(self.frame, self.frame.patient, len(self.frame.patients))
        self._reviews: Reviews | None = None

    def reviews(self, verdicts: Verdicts) -> Reviews:
        """Return verdicts as arrays; they are made once for each state of the verdicts."""
        made = self._reviews
        if made is None or made.verdicts is not verdicts:
            made = self._reviews = Reviews(verdicts, self.frame, self.slides, self.patients)
        return made

    def row_of(self, ordinal: int) -> int:
        """Return the row of a field. Raises NotFoundError."""
        ordinals = self.frame.ordinals
        at = int(np.searchsorted(ordinals, ordinal)) if 0 <= ordinal < 1 << 62 else len(ordinals)
        if at >= len(ordinals) or ordinals[at] != ordinal:
            raise NotFoundError(f"run {self.run_id} has no field {ordinal} (yet)")
        return at

    def slide_key(self, code: int) -> str:
        """Return the opaque key of a slide."""
        return slide_key_of(self.run_key, self.fingerprint, self.frame.slides[code])

    def slide_code(self, slide_key: str) -> int:
        """Return the code of the slide with a key. Raises NotFoundError."""
        if slide_key not in self._slide_codes:
            raise NotFoundError("this run has no such slide (yet)")
        return self._slide_codes[slide_key]

    def patient_code(self, patient_key: str) -> int:
        """Return the code of the patient with a key. Raises NotFoundError."""
        if patient_key not in self._patient_codes:
            raise NotFoundError("this run has no such patient (yet)")
        return self._patient_codes[patient_key]

    @cached_property
    def _slide_codes(self) -> dict[str, int]:
        return {self.slide_key(i): i for i in range(len(self.frame.slides))}

    @cached_property
    def _patient_codes(self) -> dict[str, int]:
        return {patient_key_of(patient): i for i, patient in enumerate(self.frame.patients)}

    @cached_property
    def patient_slides(self) -> PatientSlides:
        """The slides of each patient."""
        frame = self.frame
        width = max(1, len(frame.slides))
        inside = frame.patient >= 0
        joint = np.where(inside, frame.patient * width + frame.slide, -1)
        values, codes = np.unique(joint[inside], return_inverse=True)
        spread = np.full(len(frame), -1, np.int64)
        spread[inside] = codes
        counted = frame.predicted & inside
        n = np.bincount(spread[counted], minlength=len(values))
        malignant = np.bincount(spread[counted], weights=frame.malignant[counted], minlength=len(values))
        return PatientSlides(values // width, values % width, np.asarray(urgency_of(malignant, n), np.float64))

    @cached_property
    def patient_urgency(self) -> Floats:
        """Urgency of each patient's most urgent slide [k]."""
        out = np.zeros(len(self.frame.patients))
        np.maximum.at(out, self.patient_slides.patient, self.patient_slides.urgency)
        return out

    @cached_property
    def slide_ranks(self) -> Ints:
        """Place of each slide by urgency, from 1 [k]; ties stay in the plan's order."""
        ranks = np.zeros(self.slides.k, np.int64)
        ranks[np.argsort(-self.slides.urgency, kind="stable")] = np.arange(1, self.slides.k + 1)
        return ranks

    @cached_property
    def missing_images(self) -> MissingImages:
        """The missing images by slide and patient, read when they are first asked for."""
        if not self.missing:
            return MissingImages(Counter(), Counter())
        with translate_read_errors(self.run_id):
            try:
                with self.run.open(RunKey.MISSING) as file:
                    table = pq.ParquetFile(file).read(columns=["image_key", "slide_id", "patient_id"])
            except FileNotFoundError:  # all of it was erased, or the run is being planned
                return MissingImages(Counter(), Counter())
        codes, slides = encode_slides(table["slide_id"], lambda: table["image_key"])
        patients = Counter(p for p in table["patient_id"].to_pylist() if p is not None)
        return MissingImages(Counter(slides[code] for code in codes.tolist()), patients)
