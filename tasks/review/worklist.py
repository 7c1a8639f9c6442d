"""The reading side of an output folder, for people: runs, their slides, patients and fields, and what was said of them.

Of a run only the columns that lists need are held, as arrays, so that filtering, sorting and turning pages cost
milliseconds. What is held is told apart by the manifest's stamp, or by the markers of a run in progress: nothing here
is ever out of date. Keys that go into addresses are opaque: neither slides nor patients can be read off them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.special import betaincinv

from leukoflow.core.errors import (
    LeukoflowError,
    NotFoundError,
    RequestError,
    RunBusyError,
    RunNotFoundError,
    StorageError,
    words_of,
)
from leukoflow.runs.progress import ProgressReader, RunProgress, read_manifest
from leukoflow.runs.progress import list_runs as run_names
from leukoflow.runs.records import CLASSES, RunManifest, Status, read_reason
from leukoflow.runs.schema import CELLS, PREDICTIONS, SCHEMA_VERSION, as_cells
from leukoflow.storage.base import Storage
from leukoflow.tasks.intake.plan import read_summary
from leukoflow.tasks.review import wording
from leukoflow.tasks.review.verdicts import Action, Standing, Target, Verdict, VerdictReader, Verdicts, moment
from leukoflow.tasks.store.slides import MALIGNANT, disagreement, mean_malignant_probability, urgency_of
from leukoflow.tasks.store.tables import INTENT, shard_name, table_files

T = TypeVar("T")
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

STATUSES = tuple(str(s) for s in Status)
PREDICTED, ABSTAINED, REJECTED, QUARANTINED = range(4)
PROBABILITIES = ("prob_benign", "prob_early", "prob_pre", "prob_pro")
COLUMNS = (
    "slide_id", "patient_id", "site", "scanner", "status", "reason", *PROBABILITIES, "prediction_set", "ood_score",
    "n_cells",
)  # fmt: skip
"""Columns of the predictions that are read when a run is opened. The others are read when something asks for them."""
SHOWN = (
    "image_key", "patient_id", "site", "scanner", "status", "reason", "prediction_set", "ood_score",
)  # fmt: skip
"""Columns that the line of a field shows as they are."""
MAX_PAGE = 500
READERS = 8
HELD_ROWS = 2_000_000
"""Rows of all runs that are held at the same time; those looked at last stay."""
HELD_SELECTIONS = 64
LEVEL = 0.95


# --- questions -------------------------------------------------------------------------------------------------------


class Sort(StrEnum):
    """What lists are sorted by."""

    URGENCY = "urgency"
    NAME = "name"
    ORDER = "order"  # as in the plan
    LABEL = "label"
    MALIGNANT = "malignant"
    UNCERTAINTY = "uncertainty"
    CONFIDENCE = "confidence"
    FIELDS = "fields"
    CELLS = "cells"
    REVIEWED = "reviewed"


class Review(StrEnum):
    """Which of them, by what people have said."""

    REVIEWED = "reviewed"
    UNREVIEWED = "unreviewed"
    FLAGGED = "flagged"
    CORRECTED = "corrected"


@dataclass(frozen=True, slots=True)
class Query:
    """What a list shall show. Raises RequestError for what there is not.

    `slide` and `patient` are opaque keys. Filters on label, status and review hold of the line itself: of a slide,
    `status` asks for at least one such field, and `label` for the slide's own.
    """

    text: str = ""
    label: str | None = None
    status: Status | None = None
    site: str | None = None
    scanner: str | None = None
    review: Review | None = None
    slide: str | None = None
    patient: str | None = None
    sort: Sort = Sort.URGENCY
    descending: bool = True
    offset: int = 0
    limit: int = 50

    def __post_init__(self) -> None:
        if self.label is not None and self.label not in CLASSES:
            raise RequestError(f"there is no label {self.label!r}: one of {', '.join(CLASSES)}")
        for name, kind in (("status", Status), ("review", Review), ("sort", Sort)):
            value = getattr(self, name)
            if value is None or isinstance(value, kind):
                continue
            try:
                object.__setattr__(self, name, kind(value))
            except ValueError:
                raise RequestError(f"there is no {name} {value!r}: one of {', '.join(kind)}") from None
        if not 0 <= self.offset <= 1 << 40 or not 1 <= self.limit <= MAX_PAGE:
            raise RequestError(f"a page begins at 0 or later and has 1 to {MAX_PAGE} lines")
        if len(self.text) > 200:
            raise RequestError("a search has at most 200 characters")


EVERYTHING = Query()


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list, and how long the list is."""

    items: tuple[T, ...]
    total: int
    offset: int
    limit: int


@dataclass(frozen=True, slots=True)
class RunLine:
    """A run in the list of runs. `state` is `damaged` where its records cannot be read; `message` says why."""

    run_key: str
    run_id: str
    state: str
    started_at: str
    finished_at: str | None
    source_kind: str
    members: int
    done: int
    predicted: int
    abstained: int
    rejected: int
    quarantined: int
    missing: int
    bundle: str
    bundle_digest: str
    shadow_of: str | None = None
    message: str = ""
    phase: str = ""  # what a running run does or waits for


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """Where every image is. `received` = predicted + abstained + rejected + quarantined + `waiting`."""

    received: int
    predicted: int
    abstained: int
    rejected: int
    quarantined: int
    waiting: int  # of a run in progress: not done yet
    missing: int | None  # None: no manifest says what should be there
    ignored: int
    truncated: str | None
    conflicts: int  # rows with images that are found under more than one patient
    finished: bool
    state: str
    balanced: bool
    failed_shards: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Counts:
    """Fields by status."""

    predicted: int
    abstained: int
    rejected: int
    quarantined: int

    @property
    def fields(self) -> int:
        """All of them."""
        return self.predicted + self.abstained + self.rejected + self.quarantined


@dataclass(frozen=True, slots=True)
class Summary:
    """What the fields of a slide or patient say together; None where no field was predicted.

    `urgency` is that of `slides.parquet`. `mean_malignant_probability` is that of `slides.py`, over the answered
    (predicted) fields, which have `answered_cells` cells: no differential count, since no cell is classified by itself.
    `interval` is its 95 % interval from even odds as urgency has them (Beta(1, 1)), as if fields were independent,
    which those of one slide are not; None of fewer than `MIN_INTERVAL_FIELDS` answered fields. `uncertainty` is the
    share of diagnosed fields that were abstained from or whose prediction set has more than one class; `entropy` the
    mean entropy of the predicted fields' probabilities, 0 to 1.
    """

    counts: Counts
    label: str | None
    probabilities: tuple[float, ...]
    urgency: float
    mean_malignant_probability: float | None
    interval: tuple[float, float] | None
    malignant_fields: int
    uncertainty: float | None
    entropy: float | None
    cells: int
    answered_cells: int
    reviewed: int  # fields with a decision, of those that were diagnosed
    corrected: int  # answered fields that people have labelled otherwise
    diagnosed: int
    flagged: int  # fields
    worst: int  # ordinal of the field to look at first

    @property
    def outweighed(self) -> bool:
        """Whether the label is Benign although the three malignant classes together are at least as probable."""
        return is_outweighed(self.label, self.mean_malignant_probability)


@dataclass(frozen=True, slots=True)
class SlideLine:
    """A slide, or the folder that stands for one."""

    slide_key: str
    name: str
    grouping: str
    patient_key: str | None
    patient: str | None  # a pseudonym
    site: str | None
    scanner: str | None
    summary: Summary
    standing: Standing  # what was said of the slide as a whole
    rank: int  # by urgency among all slides of the run, from 1
    patients: int  # whose fields are on it; `patient` is one of them
    missing: int  # images that the manifest lists for it and the source does not hold

    @property
    def in_no_folder(self) -> bool:
        """Whether it is no slide at all, but what lies in no folder of the source."""
        return self.grouping == "folder" and self.name == NO_FOLDER

    @property
    def title(self) -> str:
        """Its name for people."""
        return title_of(self.name) if self.in_no_folder else self.name


@dataclass(frozen=True, slots=True)
class PatientLine:
    """A patient, by the pseudonym. The urgency is that of the most urgent slide; all else is over all fields."""

    patient_key: str
    patient: str
    site: str | None
    slides: int
    summary: Summary
    worst_slide: str  # its key
    missing: int  # images that the manifest lists for the patient and the source does not hold


@dataclass(frozen=True, slots=True)
class FieldLine:
    """A field. `urgency` is its malignant probability; a field without a prediction has one half.

    A slide's urgency is drawn towards one half where few fields speak; a single field's is not, or no field could ever
    have more than two thirds.

    `label`, `confidence` and `prediction_set` are those of an answer: of a field that the model abstained from they are
    None and empty, though its run has stored what the model leaned to. `probabilities` are there, and no answer.
    """

    ordinal: int
    image_key: str
    slide_key: str
    slide: str
    patient_key: str | None
    patient: str | None
    site: str | None
    scanner: str | None
    status: Status
    reason: str | None
    label: str | None
    confidence: float | None
    probabilities: tuple[float, ...]
    prediction_set: tuple[str, ...]
    ood: float | None
    n_cells: int
    urgency: float
    uncertainty: float | None  # entropy, 0 to 1
    standing: Standing
    details: FieldDetails | None = None  # only of a single field

    @property
    def outweighed(self) -> bool:
        """As that of a summary."""
        return is_outweighed(self.label, self.urgency)

    @property
    def slide_title(self) -> str:
        """The name of its slide for people."""
        return title_of(self.slide)


@dataclass(frozen=True, slots=True)
class FieldDetails:
    """What only the page of a single field shows."""

    member_sha256: str | None
    bundle_digest: str
    um_per_px: float | None
    width_px: int | None
    height_px: int | None
    focus: float | None
    exposure: float | None
    quality_flags: tuple[str, ...]
    shard: str
    zarr_index: int | None
    n_tiles: int
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Frequency:
    """A confidence in words: of 100 answers, how many were right when that was measured, and where it is from."""

    of_100: int
    words: str
    basis: str


@dataclass(frozen=True, slots=True)
class TimelinePoint:
    """A patient in one run."""

    run_key: str
    run_id: str
    at: str  # when the run began; the data format knows no date of the blood
    finished: bool
    slides: int
    summary: Summary
    corrected: int  # fields that people have labelled otherwise
    bundle_digest: str
    same_bundle: bool  # as the point before: only then are two points made by the same measure
    same_images: bool  # as the point before, byte by byte: then the two are no course
    missing: int  # images that the manifest lists for the patient and the source does not hold
    patient: str  # the pseudonym
    slide_labels: tuple[tuple[str, str | None, int], ...] = ()  # slide, label, fields that speak for it; the patient's


@dataclass(frozen=True, slots=True)
class Timeline:
    """A patient's course over runs, the oldest first; shadow runs are left out."""

    patient_key: str
    patient: str
    points: tuple[TimelinePoint, ...]
    unread: tuple[str, ...] = ()  # runs that could not be looked into
    remarks: tuple[str, ...] = ()  # where runs, or the slides of a run, do not agree on the class


@dataclass(frozen=True, slots=True)
class WeekLine:
    """Decisions of one week."""

    week: str  # 2026-W48
    n: int
    accepted: int
    corrected: int
    kappa: float | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """Decisions on fields against the predictions that they saw, one for each field of each run: the last.

    People choose what they look at and see the prediction first: this is no independent reading, and no accuracy.
    """

    n: int
    accepted: int
    corrected: int  # to another label; a correction to the label that was predicted counts as accepted
    without_prediction: int  # labelled by people where nothing was predicted, abstained fields included; not in n
    confusion: tuple[tuple[int, ...], ...]  # [4, 4]: predicted by row, said by column
    kappa: float | None  # Cohen's
    kappa_interval: tuple[float, float] | None  # 95 %
    weeks: tuple[WeekLine, ...]
    reviewers: tuple[tuple[str, int, int], ...]  # who, decisions, corrections
    no_kappa: str = ""  # why there is no kappa
    unread: tuple[str, ...] = ()


# --- pure ------------------------------------------------------------------------------------------------------------


def opaque(*words: str) -> str:
    """A key for addresses: 16 hex digits that say nothing."""
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def run_key_of(run_id: str) -> str:
    """Key of a run."""
    return hashlib.sha256(run_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def patient_key_of(patient: str) -> str:
    """Key of a patient, the same in all runs."""
    return opaque("patient", patient)


NO_FOLDER = "."
"""The name that stands for the root of the source, whose images lie in no folder."""


def title_of(slide: str) -> str:
    """The name of a slide, or of the folder that stands for it, for people."""
    return "(no folder)" if slide == NO_FOLDER else slide


def is_outweighed(label: str | None, malignant: float | None) -> bool:
    """Whether Benign is no more than the most probable single class: malignancy as a whole is as probable or more."""
    return label == CLASSES[0] and malignant is not None and malignant >= 0.5


def entropy(probabilities: Floats) -> Floats:
    """Entropy of rows [n, 4], 0 (certain) to 1 (a guess); NaN stays."""
    p = np.clip(probabilities, 1e-12, 1.0)
    out: Floats = -(p * np.log(p)).sum(1) / math.log(probabilities.shape[1])
    return np.clip(out, 0.0, 1.0)


MIN_INTERVAL_FIELDS = 5
"""Answered fields from which an interval is given: with fewer, it says more of the even odds it starts from."""


def beta_interval(malignant: Floats, predicted: Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Interval of the mean malignant probability after so many fields, from even odds: [n] and [n]."""
    a, b = 1.0 + malignant, 1.0 + predicted - malignant
    edge = (1.0 - level) / 2
    return betaincinv(a, b, edge), betaincinv(a, b, 1.0 - edge)


MIN_DECISIONS = 10
"""Decisions from which kappa is told: with fewer, a single one moves it by more than a tenth."""


def no_kappa(confusion: Ints) -> str:
    """Why there is no kappa of [4, 4], empty where there is one.

    Where all predictions, or all decisions, are of one class, kappa is 0 or undefined whatever people decide.
    """
    n = int(confusion.sum())
    if n < MIN_DECISIONS:
        return f"too few decisions ({n} of at least {MIN_DECISIONS})"
    for axis, what in ((1, "predictions"), (0, "decisions")):
        if np.count_nonzero(confusion.sum(axis)) < 2:
            return f"all {what} are of one class"
    return ""


def kappa_of(confusion: Ints) -> tuple[float | None, tuple[float, float] | None]:
    """Cohen's kappa of [4, 4] with its 95 % interval (Fleiss, Cohen and Everitt 1969).

    None where `no_kappa` gives a reason; the interval is None also where all agree, since the formula's width is then
    zero, however few they are.
    """
    if no_kappa(confusion):
        return None, None
    n = int(confusion.sum())
    p = confusion / n
    rows, columns = p.sum(1), p.sum(0)
    seen, chance = float(np.trace(p)), float(rows @ columns)
    kappa = (seen - chance) / (1.0 - chance)
    weights = rows[None, :] + columns[:, None]  # of cell (i, j): share of column class i plus share of row class j
    first = float((np.diag(p) * ((1 - chance) - (rows + columns) * (1 - seen)) ** 2).sum())
    off = p * weights**2
    second = (1 - seen) ** 2 * float(off.sum() - np.trace(off))
    variance = (first + second - (seen * chance - 2 * chance + seen) ** 2) / (n * (1 - chance) ** 4)
    if n == int(np.trace(confusion)):
        return kappa, None
    spread = 1.96 * math.sqrt(max(0.0, variance))
    return kappa, (max(-1.0, kappa - spread), min(1.0, kappa + spread))


PROTOCOL, MODEL = "cluster", "leukoflow"


def frequency(metrics: Mapping[str, Any], label: str, confidence: float) -> Frequency:
    """What a calibrated confidence means: of 100 answers of this confidence, how many were what the label says.

    `metrics` is that part of a bundle's `bundle.json`. Where the bundle keeps its reliability (how often answers of a
    confidence were right, on photographs of groups that the classifier had not seen), that is what is said; where it
    keeps only the mean miscalibration, the confidence itself is. Neither is an interval. Without metrics, nothing was
    measured.
    """
    share = min(max(float(confidence), 0.0), 1.0)
    protocol: Mapping[str, Any] = metrics.get("protocols", {}).get(PROTOCOL, {})
    measured: Mapping[str, Any] = protocol.get("models", {}).get(MODEL, {})
    bins = [b for b in measured.get("reliability", ()) if b.get("fields")]
    of = f"on fields of clusters that the classifier had not seen ({wording.repeated_words(protocol, measured)})"
    if bins:
        near = min(bins, key=lambda b: abs(b["confidence"] - share))
        share = float(near["accuracy"])
        basis = f"counted on {int(near['fields']):,} answers of about this confidence, {of}"
    elif "ece" in measured:
        off = 100 * float(measured["ece"])
        basis = (
            f"over all confidences, abstained fields included, they were off by {off:.1f} of 100 on average, measured "
            f"{of}"
        )
    else:
        basis = "the model's own confidence; how often it is right was never measured for this bundle"
    words = wording.confidence_words(label, share, bool(bins), "ece" in measured)
    return Frequency(min(99, round(100 * share)), words, basis)


def _codes(values: pa.ChunkedArray) -> tuple[Ints, list[Any]]:
    """Codes [n] (-1 for null) and what they stand for, in the order of appearance."""
    encoded = values.combine_chunks().dictionary_encode()
    codes = np.asarray(encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
    return codes, encoded.dictionary.to_pylist()


def _known(values: pa.ChunkedArray, names: Sequence[str]) -> Ints:
    """Place of each value in `names`, -1 for null and for what is not there."""
    places = pc.index_in(values, pa.array(names, pa.string()))
    return np.asarray(pc.fill_null(places, -1).to_numpy(), np.int64)


def _floats(values: pa.ChunkedArray) -> Floats:
    return np.asarray(pc.cast(values, pa.float64()).to_numpy(), np.float64)


def _slides_of(ids: pa.ChunkedArray, keys: Callable[[], pa.ChunkedArray]) -> tuple[Ints, list[str]]:
    """Code of each image's slide [n], and grouping and name of each slide, joined by a colon.

    `keys` gives the image keys, which are needed where the manifest names no slide: there the folder stands for it.
    """
    codes, names = _codes(ids)
    named = [f"manifest:{name}" for name in names]
    if not ids.null_count:
        return codes, named
    alone = codes < 0
    folders = pc.replace_substring_regex(keys().filter(pa.array(alone)), r"^[^/]*$", "")  # at the top: no folder
    folders = pc.replace_substring_regex(folders, r"/[^/]*$", "")
    more, names = _codes(folders)
    codes = codes.copy()
    codes[alone] = more + len(named)
    return codes, [*named, *(f"folder:{name or NO_FOLDER}" for name in names)]


class Frame:
    """Rows of the predictions as arrays. n fields, in the order of the plan; missing columns are nulls.

    `later` reads a column that is not in the table, in the order of its rows.
    """

    def __init__(self, table: pa.Table, ordinals: Ints, later: Callable[[str], pa.ChunkedArray]) -> None:
        table = table.combine_chunks()
        self.table = table
        self._later = later
        self._more: dict[str, pa.ChunkedArray] = {}
        self.ordinals = ordinals
        self.status = _known(table["status"], STATUSES)
        self.p = np.stack([_floats(table[name]) for name in PROBABILITIES], 1) if len(table) else np.zeros((0, 4))
        known: Mask = np.asarray(np.isfinite(self.p).all(1), np.bool_)
        self.label: Ints = np.where(known, np.where(known[:, None], self.p, 0.0).argmax(1), -1)
        self.malignant: Floats = self.p[:, MALIGNANT].sum(1)
        # `label` is the likeliest class also of abstained fields; `answer` is none where the model abstained.
        self.answer: Ints = np.where(self.status == PREDICTED, self.label, -1)
        self.predicted: Mask = (self.status == PREDICTED) & np.isfinite(self.malignant)
        self.diagnosed: Mask = (self.status == PREDICTED) | (self.status == ABSTAINED)
        self.cells = np.asarray(pc.fill_null(table["n_cells"], 0).to_numpy(), np.int64)
        sets = pc.fill_null(pc.list_value_length(table["prediction_set"]), 0).to_numpy()
        self.ambiguous: Mask = self.diagnosed & ((self.status == ABSTAINED) | (np.asarray(sets) > 1))
        self.patient, self.patients = _codes(table["patient_id"])
        self.site, self.sites = _codes(table["site"])
        self.scanner, self.scanners = _codes(table["scanner"])

    def __len__(self) -> int:
        """Number of fields."""
        return len(self.table)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of `predictions/`, read now where it is not held."""
        if name in self.table.column_names:
            return self.table[name]
        if name not in self._more:
            self._more[name] = pa.chunked_array([self._later(name).combine_chunks()])
        return self._more[name]

    @property
    def keys(self) -> pa.ChunkedArray:
        """Image keys."""
        return self.column("image_key")

    @cached_property
    def _slides(self) -> tuple[Ints, list[str]]:
        return _slides_of(self.table["slide_id"], lambda: self.keys)

    @property
    def slide(self) -> Ints:
        """Code of each field's slide [n]."""
        return self._slides[0]

    @property
    def slides(self) -> list[str]:
        """Grouping and name of each slide, joined by a colon."""
        return self._slides[1]

    @cached_property
    def entropy(self) -> Floats:
        """Of each field [n], NaN without probabilities."""
        return entropy(self.p) if len(self) else np.zeros(0)

    @cached_property
    def urgency(self) -> Floats:
        """Malignant probability of each field, one half where it was not predicted [n]."""
        return np.asarray(np.where(self.predicted, self.malignant, 0.5), np.float64)


class Groups:
    """Sums over groups of fields: `codes` [n] names each field's group, -1 for none; k groups."""

    def __init__(self, frame: Frame, codes: Ints, k: int) -> None:
        self.frame, self.codes, self.k = frame, codes, k
        inside = codes >= 0
        self._said = inside & frame.predicted
        self.counts = np.stack([self._count(inside & (frame.status == s)) for s in range(4)], 1)
        self.n = self._count(self._said)
        self.sums = np.stack([self._sum(frame.p[:, c], self._said) for c in range(4)], 1)
        self.malignant: Floats = self.sums[:, MALIGNANT].sum(1)
        self.urgency = np.asarray(urgency_of(self.malignant, self.n), np.float64)
        self.positive = self._count(self._said & (frame.malignant > 0.5))
        self.cells = self._sum(frame.cells.astype(np.float64), inside).astype(np.int64)
        self.diagnosed = self._count(inside & frame.diagnosed)

    def _count(self, mask: Mask) -> Ints:
        return np.bincount(self.codes[mask], minlength=self.k).astype(np.int64)

    def _sum(self, values: Floats, mask: Mask) -> Floats:
        return np.asarray(np.bincount(self.codes[mask], weights=values[mask], minlength=self.k), np.float64)

    def _share(self, part: Floats | Ints, whole: Floats | Ints) -> Floats:
        """NaN where there is nothing to be a share of."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(np.asarray(whole) > 0, part / np.maximum(whole, 1e-300), np.nan), np.float64)

    @cached_property
    def share(self) -> Floats:
        """Mean malignant probability of the predicted fields [k], NaN where there is none."""
        means = np.asarray(mean_malignant_probability(self.sums, np.maximum(self.n, 1)), np.float64)
        return np.where(self.n > 0, means, np.nan)

    @cached_property
    def answered_cells(self) -> Ints:
        """Cells of the predicted fields [k]."""
        return self._sum(self.frame.cells.astype(np.float64), self._said).astype(np.int64)

    @cached_property
    def uncertainty(self) -> Floats:
        """Share of diagnosed fields that are ambiguous or abstained from [k]."""
        return self._share(self._count((self.codes >= 0) & self.frame.ambiguous), self.diagnosed)

    @cached_property
    def entropy(self) -> Floats:
        """Mean entropy of the predicted fields [k]."""
        return self._share(self._sum(self.frame.entropy, self._said), self.n)

    @cached_property
    def label(self) -> Ints:
        """Likeliest class of the mean probabilities [k], -1 where nothing was predicted."""
        return np.where(self.n > 0, self.sums.argmax(1), -1) if self.k else np.zeros(0, np.int64)

    @cached_property
    def first(self) -> Ints:
        """Row of each group's first field [k]."""
        out = np.zeros(self.k, np.int64)
        rows = np.flatnonzero(self.codes >= 0)[::-1]
        out[self.codes[rows]] = rows
        return out

    @cached_property
    def worst(self) -> Ints:
        """Row of each group's most malignant predicted field [k]; without one, of an abstained one, or the first."""
        rank = np.where(self.frame.predicted, 2.0 + np.nan_to_num(self.frame.malignant), 0.0)
        rank[self.frame.status == ABSTAINED] = 1.0
        rows = np.flatnonzero(self.codes >= 0)
        order = rows[np.lexsort((-rows, rank[rows]))]  # the best of each group comes last
        out = np.zeros(self.k, np.int64)
        out[self.codes[order]] = order
        return out

    def count(self, mask: Mask) -> Ints:
        """Fields of each group for which the mask holds [k]."""
        return self._count((self.codes >= 0) & mask)

    def summary(self, i: int, reviewed: int, corrected: int, flagged: int, urgency: float | None = None) -> Summary:
        """One group in words and numbers."""
        n = int(self.n[i])
        low, high = beta_interval(self.malignant[i : i + 1], self.n[i : i + 1].astype(np.float64))
        return Summary(
            counts=Counts(*(int(c) for c in self.counts[i])),
            label=CLASSES[int(self.label[i])] if n else None,
            probabilities=tuple(float(v) / n for v in self.sums[i]) if n else (),
            urgency=float(self.urgency[i]) if urgency is None else urgency,
            mean_malignant_probability=_number(self.share[i]),
            interval=(float(low[0]), float(high[0])) if n >= MIN_INTERVAL_FIELDS else None,
            malignant_fields=int(self.positive[i]),
            uncertainty=_number(self.uncertainty[i]),
            entropy=_number(self.entropy[i]),
            cells=int(self.cells[i]),
            answered_cells=int(self.answered_cells[i]),
            reviewed=reviewed,
            corrected=corrected,
            diagnosed=int(self.diagnosed[i]),
            flagged=flagged,
            worst=int(self.frame.ordinals[self.worst[i]]),
        )


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


# --- a run's table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reviews:
    """What people have said, as arrays over the fields of a frame [n]."""

    verdicts: Verdicts
    standings: Mapping[Target, Standing]
    reviewed: Mask
    flagged: Mask
    corrected: Mask


@dataclass(slots=True)
class _Held:
    """What is kept of a run between calls."""

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
    slides: Groups
    patients: Groups
    pieces: dict[str, pa.Table] = field(default_factory=dict)  # of a run in progress, by shard
    selections: OrderedDict[Any, Ints] = field(default_factory=OrderedDict)
    reviews: Reviews | None = None
    keys: dict[str, dict[str, int]] = field(default_factory=dict)
    pairs: tuple[Ints, Ints, Floats] | None = None
    ranks: Ints | None = None
    absent: tuple[Counter[str], Counter[str]] | None = None  # images that are missing, by slide and by patient
    lock: threading.Lock = field(default_factory=threading.Lock)


class RunTable:
    """A run as it was when it was opened. Of a run in progress: what was committed by then."""

    def __init__(self, out: str, run_id: str, held: _Held, verdicts: Verdicts) -> None:
        self.out, self.run_id = out, run_id
        self.run_key = run_key_of(run_id)
        self.storage = Storage(out).child(run_id)
        self.manifest, self.progress = held.manifest, held.progress
        self.frame = held.frame
        self._held = held
        self.reviews = _reviews(held, verdicts)

    # What it is

    @property
    def stamp(self) -> str:
        """Differs when the run's predictions do."""
        return self._held.stamp

    @property
    def shard_size(self) -> int:
        """Members of a shard."""
        return self._held.shard_size

    @property
    def finished(self) -> bool:
        """Whether the run is."""
        return self.manifest is not None

    @property
    def shadow_of(self) -> str | None:
        """The run that this one only accompanies, for a trial of another bundle; None for any other."""
        source = self.manifest if self.manifest is not None else self.progress
        return None if source is None else source.shadow_of

    @property
    def bundle(self) -> tuple[str, str]:
        """Where the bundle is, and its digest."""
        if self.manifest is not None:
            return self.manifest.bundle, self.manifest.bundle_digest
        binding = ProgressReader(self.storage.root).binding()
        return binding.bundle, binding.bundle_digest

    @property
    def started_at(self) -> str:
        """When the run began, ISO 8601."""
        if self.manifest is not None:
            return self.manifest.started_at
        assert self.progress is not None
        return self.progress.started_at

    def sites(self) -> tuple[str, ...]:
        """For the filter."""
        return tuple(sorted(self.frame.sites))

    def scanners(self) -> tuple[str, ...]:
        """For the filter."""
        return tuple(sorted(self.frame.scanners))

    def reconciliation(self) -> Reconciliation:
        """Where every image is."""
        m, p, held = self.manifest, self.progress, self._held
        source: Any = m if m is not None else p
        done = source.predicted + source.abstained + source.rejected + source.quarantined
        return Reconciliation(
            received=source.members,
            predicted=source.predicted,
            abstained=source.abstained,
            rejected=source.rejected,
            quarantined=source.quarantined,
            waiting=source.members - done,
            missing=held.missing,
            ignored=held.ignored,
            truncated=held.truncated,
            conflicts=m.conflicts if m is not None else 0,
            finished=m is not None,
            state="finished" if m is not None else source.state,
            balanced=m is not None and done == m.members == len(self.frame),
            failed_shards=p.failed_shards if p is not None and m is None else (),
        )

    # Lists

    def slides(self, query: Query = EVERYTHING) -> Page[SlideLine]:
        """Slides that the query asks for."""
        groups = self._held.slides
        order = self._selected("slides", query, lambda: self._group_order(query, groups, self._slide_filter))
        return self._page(order, query, self._slide_line)

    def patients(self, query: Query = EVERYTHING) -> Page[PatientLine]:
        """Patients that the query asks for; fields without a patient are in none."""
        groups = self._held.patients
        order = self._selected("patients", query, lambda: self._group_order(query, groups, self._patient_filter))
        return self._page(order, query, self._patient_line)

    def fields(self, query: Query = EVERYTHING) -> Page[FieldLine]:
        """Fields that the query asks for."""
        order = self._selected("fields", query, lambda: self._field_order(query))
        return self._page(order, query, lambda row: self._field_line(row))

    def slide(self, slide_key: str) -> SlideLine:
        """One slide. Raises NotFoundError."""
        return self._slide_line(self._slide_code(slide_key))

    def patient(self, patient_key: str) -> PatientLine:
        """One patient. Raises NotFoundError."""
        return self._patient_line(self._patient_code(patient_key))

    def field(self, ordinal: int) -> FieldLine:
        """One field with everything that is known of it. Raises NotFoundError."""
        row = self._row(ordinal)
        full = self.stored_row(ordinal)
        line = self._field_line(row)
        details = FieldDetails(
            member_sha256=full["member_sha256"],
            bundle_digest=full["bundle_digest"],
            um_per_px=full["um_per_px"],
            width_px=full["width_px"],
            height_px=full["height_px"],
            focus=full["focus"],
            exposure=full["exposure"],
            quality_flags=tuple(full["quality_flags"] or ()),
            shard=full["shard"],
            zarr_index=full["zarr_index"],
            n_tiles=full["n_tiles"],
            verdicts=self.reviews.verdicts.of(("image", line.image_key)),
        )
        return replace(line, details=details)

    def neighbours(self, query: Query, ordinal: int) -> tuple[int | None, int | None]:
        """Ordinals of the fields before and after one in the list that the query asks for; None at its ends."""
        order = self._selected("fields", query, lambda: self._field_order(query))
        places = np.flatnonzero(self.frame.ordinals[order] == ordinal)
        if not len(places):
            return None, (int(self.frame.ordinals[order[0]]) if len(order) else None)
        at = int(places[0])
        before = int(self.frame.ordinals[order[at - 1]]) if at else None
        after = int(self.frame.ordinals[order[at + 1]]) if at + 1 < len(order) else None
        return before, after

    def undecided(self, query: Query, ordinal: int) -> int | None:
        """The next field of that list which needs a decision, from its beginning again after the end; None without one.

        Only diagnosed fields need one. `ordinal` itself is never the answer.
        """
        whole = self._field_order(replace(query, review=None))  # what was just decided may have left the list
        order = self._selected("fields", query, lambda: self._field_order(query))
        wanted = (self.frame.diagnosed & ~self.reviews.reviewed)[whole] & np.isin(whole, order)
        wanted &= self.frame.ordinals[whole] != ordinal
        found = np.flatnonzero(wanted)
        if not len(found):
            return None
        at = np.flatnonzero(self.frame.ordinals[whole] == ordinal)
        after = found[found > at[0]] if len(at) else found
        return int(self.frame.ordinals[whole[after[0] if len(after) else found[0]]])

    def cells(self, ordinal: int) -> pa.Table:
        """The cells of a field (`leukoflow.runs.schema.CELLS`), in the order of their ids. Raises NotFoundError."""
        row = self._row(ordinal)
        shard = shard_name(ordinal // self._held.shard_size)
        key = self._held.files.get(shard, "").replace("predictions/", "cells/", 1)
        name = self.frame.keys[row].as_py()
        if not key or not self.frame.diagnosed[row]:
            return CELLS.empty_table()
        with _reading(self.run_id), self.storage.open(key) as file:
            found = pq.read_table(file, filters=[("image_key", "=", name)])
        return as_cells(found, self.run_id).sort_by("cell_id")

    def stored_row(self, ordinal: int) -> dict[str, Any]:
        """A field's whole row of `predictions/`, columns that its run lacks being None. Raises NotFoundError."""
        row = self._row(ordinal)
        shard = ordinal // self._held.shard_size
        with _reading(self.run_id), self.storage.open(self._held.files[shard_name(shard)]) as file:
            name = self.frame.keys[row].as_py()
            found: list[dict[str, Any]] = pq.read_table(file, filters=[("image_key", "=", name)]).to_pylist()
        if len(found) != 1:
            raise StorageError(f"run {self.run_id}: field {ordinal} is not in its part; `leukoflow verify` tells more")
        return {**dict.fromkeys(PREDICTIONS.names), **found[0], "reason": read_reason(found[0]["reason"])}

    # Verdicts

    def verdict_on_field(
        self, ordinal: int, action: Action, who: str, label: str | None = None, comment: str | None = None
    ) -> Verdict:
        """A verdict on a field, with the prediction that it sees; for `tasks.review.verdicts.add`.

        A `withdraw` takes back the decision that stands; with `label`, only if that is its label. Raises NotFoundError,
        and RequestError where there is no (such) decision.
        """
        row = self._row(ordinal)
        line = self._field_line(row)
        if action is Action.WITHDRAW:
            label = _withdrawn(line.standing, label)
        return Verdict(
            run_id=self.run_id,
            action=action,
            who=who,
            at=moment(),
            image_key=line.image_key,
            label=label,
            comment=comment,
            seen_status=str(line.status),
            seen_label=line.label,
            seen_confidence=line.confidence,
            seen_bundle_digest=self.bundle[1],
        )

    def verdict_on_slide(
        self, slide_key: str, action: Action, who: str, label: str | None = None, comment: str | None = None
    ) -> Verdict:
        """A verdict on a slide as a whole, with what its fields say together; else like `verdict_on_field`."""
        line = self.slide(slide_key)
        if line.in_no_folder and action in (Action.ACCEPT, Action.CORRECT):
            raise RequestError("these fields are in no folder and are no slide: label each of them on its own page")
        if action is Action.WITHDRAW:
            label = _withdrawn(line.standing, label)
        probabilities = line.summary.probabilities
        return Verdict(
            run_id=self.run_id,
            action=action,
            who=who,
            at=moment(),
            slide_id=line.name,
            grouping=line.grouping,
            label=label,
            comment=comment,
            seen_status=None,
            seen_label=line.summary.label,
            seen_confidence=max(probabilities) if probabilities else None,
            seen_bundle_digest=self.bundle[1],
        )

    def rows_of(self, slide_key: str | None = None, patient_key: str | None = None) -> Ints:
        """Rows of the frame that belong to a slide, to a patient, or all of them. Raises NotFoundError."""
        inside = np.ones(len(self.frame), np.bool_)
        if slide_key is not None:
            inside &= self.frame.slide == self._slide_code(slide_key)
        if patient_key is not None:
            inside &= self.frame.patient == self._patient_code(patient_key)
        return np.flatnonzero(inside)

    # Behind these

    def _row(self, ordinal: int) -> int:
        ordinals = self.frame.ordinals
        at = int(np.searchsorted(ordinals, ordinal)) if 0 <= ordinal < 1 << 62 else len(ordinals)
        if at >= len(ordinals) or ordinals[at] != ordinal:
            raise NotFoundError(f"run {self.run_id} has no field {ordinal} (yet)")
        return at

    def _slide_key(self, code: int) -> str:
        return opaque("slide", self.run_key, self._held.fingerprint, self.frame.slides[code])

    def _slide_code(self, slide_key: str) -> int:
        keys = self._held.keys.get("slides")
        if keys is None:
            keys = self._held.keys["slides"] = {self._slide_key(i): i for i in range(len(self.frame.slides))}
        if slide_key not in keys:
            raise NotFoundError("this run has no such slide (yet)")
        return keys[slide_key]

    def _patient_code(self, patient_key: str) -> int:
        keys = self._held.keys.get("patients")
        if keys is None:
            keys = self._held.keys["patients"] = {patient_key_of(p): i for i, p in enumerate(self.frame.patients)}
        if patient_key not in keys:
            raise NotFoundError("this run has no such patient (yet)")
        return keys[patient_key]

    def _selected(self, kind: str, query: Query, make: Callable[[], Ints]) -> Ints:
        """Rows of the whole list, kept so that turning a page costs nothing."""
        about = (kind, replace(query, offset=0, limit=1), self.reviews.verdicts.head)
        kept, lock = self._held.selections, self._held.lock
        with lock:
            found = kept.get(about)
        if found is None:
            found = make()
            with lock:
                kept[about] = found
                while len(kept) > HELD_SELECTIONS:
                    kept.popitem(last=False)
        return found

    def _page(self, order: Ints, query: Query, line: Callable[[int], T]) -> Page[T]:
        chosen = order[query.offset : query.offset + query.limit]
        return Page(tuple(line(int(i)) for i in chosen), len(order), query.offset, query.limit)

    def _common(self, query: Query) -> Mask:
        """Fields at the site and scanner, of the slide and patient that are asked for."""
        frame = self.frame
        keep = np.ones(len(frame), np.bool_)
        for value, codes, names in (
            (query.site, frame.site, frame.sites),
            (query.scanner, frame.scanner, frame.scanners),
        ):
            if value is not None:
                keep &= codes == (names.index(value) if value in names else -2)
        if query.slide is not None:
            keep &= frame.slide == self._slide_code(query.slide)
        if query.patient is not None:
            keep &= frame.patient == self._patient_code(query.patient)
        return keep

    def _field_order(self, query: Query) -> Ints:
        frame, said = self.frame, self.reviews
        keep = self._common(query)
        if query.label is not None:
            keep &= frame.answer == CLASSES.index(query.label)
        if query.status is not None:
            keep &= frame.status == STATUSES.index(str(query.status))
        if query.review is not None:
            keep &= {
                Review.REVIEWED: said.reviewed,
                Review.UNREVIEWED: ~said.reviewed,
                Review.FLAGGED: said.flagged,
                Review.CORRECTED: said.corrected,
            }[query.review]
        if query.text:
            slides = _matching(pa.array(frame.slides, pa.string()), query.text)
            patients = _matching(pa.array(frame.patients, pa.string()), query.text)
            hit = _matching(frame.keys, query.text) | _at(slides, frame.slide) | _at(patients, frame.patient)
            keep &= hit
        rows = np.flatnonzero(keep)
        values: dict[Sort, Callable[[], Any]] = {
            Sort.URGENCY: lambda: frame.urgency,
            Sort.MALIGNANT: lambda: frame.malignant,
            Sort.LABEL: lambda: frame.answer.astype(np.float64),
            Sort.UNCERTAINTY: lambda: frame.entropy,
            Sort.CONFIDENCE: lambda: np.where(frame.answer >= 0, frame.p.max(1, initial=0.0), np.nan),
            Sort.CELLS: lambda: frame.cells.astype(np.float64),
            Sort.FIELDS: lambda: np.ones(len(frame)),
            Sort.REVIEWED: lambda: said.reviewed.astype(np.float64),
            Sort.ORDER: lambda: frame.ordinals.astype(np.float64),
            Sort.NAME: lambda: _ranks(frame.keys),
        }
        return rows[_sorted(values[query.sort]()[rows], query.descending)]

    def _group_order(self, query: Query, groups: Groups, own: Callable[[Query, Groups], Mask]) -> Ints:
        frame, said = self.frame, self.reviews
        keep = own(query, groups)
        if query.site is not None or query.scanner is not None or query.slide is not None or query.patient is not None:
            keep &= groups.count(self._common(query)) > 0
        if query.label is not None:
            keep &= groups.label == CLASSES.index(query.label)
        if query.status is not None:
            keep &= groups.counts[:, STATUSES.index(str(query.status))] > 0
        codes = np.flatnonzero(keep)
        values: dict[Sort, Callable[[], Any]] = {
            Sort.URGENCY: lambda: self._patient_urgency if groups is self._held.patients else groups.urgency,
            Sort.MALIGNANT: lambda: groups.share,
            Sort.LABEL: lambda: groups.label.astype(np.float64),
            Sort.UNCERTAINTY: lambda: groups.uncertainty,
            Sort.CONFIDENCE: lambda: groups.sums.max(1) / np.maximum(groups.n, 1) if groups.k else np.zeros(0),
            Sort.CELLS: lambda: groups.cells.astype(np.float64),
            Sort.FIELDS: lambda: groups.counts.sum(1).astype(np.float64),
            Sort.REVIEWED: lambda: groups.count(said.reviewed & frame.diagnosed) / np.maximum(groups.diagnosed, 1),
            Sort.ORDER: lambda: groups.first.astype(np.float64),
            Sort.NAME: lambda: _ranks(pa.array(self._names(groups), pa.string())),
        }
        return codes[_sorted(values[query.sort]()[codes], query.descending)]

    def _names(self, groups: Groups) -> list[str]:
        return (
            self.frame.patients if groups is self._held.patients else [s.partition(":")[2] for s in self.frame.slides]
        )

    def _slide_filter(self, query: Query, groups: Groups) -> Mask:
        keep = np.ones(groups.k, np.bool_)
        if query.review is not None:
            keep &= self._slide_review(groups)[query.review]
        if query.text:
            named = _matching(pa.array(self._names(groups), pa.string()), query.text)
            whose = _at(_matching(pa.array(self.frame.patients, pa.string()), query.text), self.frame.patient)
            keep &= named | (groups.count(whose) > 0)
        return keep

    def _slide_review(self, groups: Groups) -> dict[Review, Mask]:
        said = self.reviews
        done = (groups.count(said.reviewed & self.frame.diagnosed) >= groups.diagnosed) & (groups.diagnosed > 0)
        flagged, corrected = groups.count(said.flagged) > 0, groups.count(said.corrected) > 0
        for i, standing in self._slide_standings.items():
            done[i] |= standing.decision is not None
            flagged[i] |= standing.flagged
            corrected[i] |= standing.decision is not None and standing.decision.corrects
        return {
            Review.REVIEWED: done,
            Review.UNREVIEWED: ~done,
            Review.FLAGGED: flagged,
            Review.CORRECTED: corrected,
        }

    @cached_property
    def _slide_standings(self) -> dict[int, Standing]:
        wanted = {name: standing for (kind, name), standing in self.reviews.standings.items() if kind == "slide"}
        if not wanted:
            return {}
        return {i: wanted[name] for i, name in enumerate(self.frame.slides) if name in wanted}

    def _patient_filter(self, query: Query, groups: Groups) -> Mask:
        keep = np.ones(groups.k, np.bool_)
        if query.review is not None:
            said, frame = self.reviews, self.frame
            done = (groups.count(said.reviewed & frame.diagnosed) >= groups.diagnosed) & (groups.diagnosed > 0)
            keep &= {
                Review.REVIEWED: done,
                Review.UNREVIEWED: ~done,
                Review.FLAGGED: groups.count(said.flagged) > 0,
                Review.CORRECTED: groups.count(said.corrected) > 0,
            }[query.review]
        if query.text:
            slides = _at(_matching(pa.array(self.frame.slides, pa.string()), query.text), self.frame.slide)
            keep &= _matching(pa.array(self.frame.patients, pa.string()), query.text) | (groups.count(slides) > 0)
        return keep

    @property
    def _pairs(self) -> tuple[Ints, Ints, Floats]:
        """Patient, slide and urgency of every slide of every patient, over that patient's fields on it."""
        if self._held.pairs is not None:
            return self._held.pairs
        frame = self.frame
        width = max(1, len(frame.slides))
        inside = frame.patient >= 0
        joint = np.where(inside, frame.patient * width + frame.slide, -1)
        values, codes = np.unique(joint[inside], return_inverse=True)
        spread = np.full(len(frame), -1, np.int64)
        spread[inside] = codes
        said = frame.predicted & inside
        n = np.bincount(spread[said], minlength=len(values))
        malignant = np.bincount(spread[said], weights=frame.malignant[said], minlength=len(values))
        urgency = np.asarray(urgency_of(malignant, n), np.float64)
        self._held.pairs = values // width, values % width, urgency
        return self._held.pairs

    @property
    def _absent(self) -> tuple[Counter[str], Counter[str]]:
        if self._held.absent is None:
            self._held.absent = (
                _read_absent(self.storage, self.run_id) if self._held.missing else (Counter(), Counter())
            )
        return self._held.absent

    @cached_property
    def _patient_urgency(self) -> Floats:
        patient, _, urgency = self._pairs
        out = np.zeros(len(self.frame.patients))
        np.maximum.at(out, patient, urgency)
        return out

    @property
    def _ranks_by_urgency(self) -> Ints:
        if self._held.ranks is None:
            groups = self._held.slides
            ranks = np.zeros(groups.k, np.int64)
            ranks[_sorted(groups.urgency, True)] = np.arange(1, groups.k + 1)
            self._held.ranks = ranks
        return self._held.ranks

    @cached_property
    def _reviewed_by_group(self) -> dict[str, tuple[Ints, Ints, Ints]]:
        said, frame = self.reviews, self.frame
        return {
            name: (
                groups.count(said.reviewed & frame.diagnosed),
                groups.count(said.corrected),
                groups.count(said.flagged),
            )
            for name, groups in (("slides", self._held.slides), ("patients", self._held.patients))
        }

    def _slide_line(self, code: int) -> SlideLine:
        frame, groups = self.frame, self._held.slides
        grouping, _, name = frame.slides[code].partition(":")
        row = int(groups.first[code])  # as `slides.parquet`: the first field names the site
        reviewed, corrected, flagged = (int(n[code]) for n in self._reviewed_by_group["slides"])
        named: Ints = frame.patient[
            (frame.slide == code) & (frame.patient >= 0)
        ]  # and the first that names one the patient
        patient = frame.patients[named[0]] if len(named) else None
        return SlideLine(
            slide_key=self._slide_key(code),
            name=name,
            grouping=grouping,
            patient_key=None if patient is None else patient_key_of(patient),
            patient=patient,
            site=_named(frame.sites, frame.site[row]),
            scanner=_named(frame.scanners, frame.scanner[row]),
            summary=groups.summary(code, reviewed, corrected, flagged),
            standing=self._slide_standings.get(code, Standing()),
            rank=int(self._ranks_by_urgency[code]),
            patients=len(np.unique(named)),
            missing=self._absent[0][frame.slides[code]],
        )

    def _patient_line(self, code: int) -> PatientLine:
        frame, groups = self.frame, self._held.patients
        patients, slides, urgency = self._pairs
        own = np.flatnonzero(patients == code)
        worst = own[int(np.argmax(urgency[own]))]
        reviewed, corrected, flagged = (int(n[code]) for n in self._reviewed_by_group["patients"])
        return PatientLine(
            patient_key=patient_key_of(frame.patients[code]),
            patient=frame.patients[code],
            site=_named(frame.sites, frame.site[int(groups.first[code])]),
            slides=len(own),
            summary=groups.summary(code, reviewed, corrected, flagged, float(urgency[worst])),
            worst_slide=self._slide_key(int(slides[worst])),
            missing=self._absent[1][frame.patients[code]],
        )

    def _field_line(self, row: int) -> FieldLine:
        frame = self.frame
        stored = {name: frame.column(name)[row].as_py() for name in SHOWN}
        probabilities = tuple(float(v) for v in frame.p[row]) if np.isfinite(frame.p[row]).all() else ()
        patient, answered = stored["patient_id"], frame.answer[row] >= 0
        return FieldLine(
            ordinal=int(frame.ordinals[row]),
            image_key=stored["image_key"],
            slide_key=self._slide_key(int(frame.slide[row])),
            slide=frame.slides[frame.slide[row]].partition(":")[2],
            patient_key=None if patient is None else patient_key_of(patient),
            patient=patient,
            site=stored["site"],
            scanner=stored["scanner"],
            status=Status(stored["status"]),
            reason=read_reason(stored["reason"]),
            label=CLASSES[frame.answer[row]] if answered else None,
            confidence=max(probabilities) if answered else None,
            probabilities=probabilities,
            prediction_set=tuple(stored["prediction_set"] or ()) if answered else (),
            ood=stored["ood_score"],
            n_cells=int(frame.cells[row]),
            urgency=float(frame.urgency[row]),
            uncertainty=_number(frame.entropy[row]),
            standing=self.reviews.standings.get(("image", stored["image_key"]), Standing()),
        )


def _named(names: Sequence[str], code: Any) -> str | None:
    return names[int(code)] if code >= 0 else None


def _matching(values: pa.Array | pa.ChunkedArray, text: str) -> Mask:
    """Which values hold the text, whatever its case [n]."""
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if not len(values):
        return np.zeros(0, np.bool_)
    found = pc.fill_null(pc.match_substring(values, text, ignore_case=True), False)
    return np.asarray(
        found.to_numpy(zero_copy_only=False) if isinstance(found, pa.Array) else found.to_numpy(), np.bool_
    )


def _at(mask: Mask, codes: Ints) -> Mask:
    """The mask of what the codes stand for, at each code; False for -1."""
    return np.append(mask, False)[codes]


def _ranks(values: pa.Array | pa.ChunkedArray) -> Floats:
    """Place of each value in the order of all [n]."""
    out = np.zeros(len(values))
    out[np.asarray(pc.sort_indices(values))] = np.arange(len(values))
    return out


def _sorted(values: Floats, descending: bool) -> Ints:
    """Order of the values; what is not known comes last either way, and ties stay in the plan's order."""
    known = np.isfinite(values)
    keyed = np.where(known, -values if descending else values, np.inf)
    return np.argsort(keyed, kind="stable")


def _reviews(held: _Held, verdicts: Verdicts) -> Reviews:
    """Verdicts as arrays; made once for each state of them."""
    if held.reviews is not None and held.reviews.verdicts is verdicts:
        return held.reviews
    n = len(held.frame)
    reviewed, flagged, corrected = (np.zeros(n, np.bool_) for _ in range(3))
    standings = verdicts.standings()
    named = [name for kind, name in standings if kind == "image"]
    if named and n:
        places = pc.index_in(pa.array(named, pa.string()), held.frame.keys.combine_chunks()).to_pylist()
        for name, row in zip(named, places, strict=True):
            if row is None:  # of a field that is not committed (yet)
                continue
            standing = standings[("image", name)]
            reviewed[row] = standing.decision is not None
            flagged[row] = standing.flagged
            corrected[row] = standing.decision is not None and standing.decision.corrects
    held.reviews = Reviews(verdicts, standings, reviewed, flagged, corrected)
    return held.reviews


def _withdrawn(standing: Standing, label: str | None) -> str:
    """The label of the decision that a withdrawal takes back. Raises RequestError."""
    stands = standing.decision.said if standing.decision is not None else None
    if stands is None:
        raise RequestError("there is no decision to withdraw here")
    if label is not None and label != stands:
        raise RequestError("another decision has been made in the meantime: load the page again to see it")
    return stands


# --- opening ---------------------------------------------------------------------------------------------------------


class _reading:
    """Turns what reading a run's files may raise into our own words."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise RunNotFoundError(
                f"run {self.run_id} is not there any more, or some of it is gone; if it was compacted just now, "
                "try again"
            ) from None
        if isinstance(error, (pa.ArrowException, OSError)):
            raise StorageError(
                f"run {self.run_id} cannot be read ({words_of(error)}); `leukoflow verify` tells what to do"
            ) from None


class _Shelf:
    """What is held of the runs of one output folder."""

    def __init__(self, out: str) -> None:
        self.out = out
        self.storage = Storage(out)
        self.lock = threading.RLock()
        self.names: dict[str, str] = {}  # run key to run id
        self.lines: dict[str, tuple[str, RunLine]] = {}
        self.tables: OrderedDict[str, _Held] = OrderedDict()
        self.verdicts: dict[str, VerdictReader] = {}
        self.readers: dict[str, ProgressReader] = {}
        self.patients: dict[str, tuple[str, Mapping[str, str]]] = {}
        self.locks: dict[str, threading.Lock] = {}

    def lock_of(self, run_id: str) -> threading.Lock:
        with self.lock:
            return self.locks.setdefault(run_id, threading.Lock())

    def keep(self, run_id: str, held: _Held) -> None:
        with self.lock:
            self.tables[run_id] = held
            self.tables.move_to_end(run_id)
            while len(self.tables) > 1 and sum(len(h.frame) for h in self.tables.values()) > HELD_ROWS:
                self.tables.popitem(last=False)

    def forget(self, run_id: str) -> None:
        with self.lock:
            for kept in (self.lines, self.tables, self.verdicts, self.readers, self.patients):
                kept.pop(run_id, None)

    def verdict_reader(self, run_id: str) -> VerdictReader:
        with self.lock:
            return self.verdicts.setdefault(run_id, VerdictReader(self.storage.child(run_id)))

    def reader(self, run_id: str) -> ProgressReader:
        with self.lock:
            return self.readers.setdefault(run_id, ProgressReader(self.storage.uri(run_id)))


_shelves: dict[str, _Shelf] = {}
_shelves_lock = threading.Lock()


def _shelf(out: str) -> _Shelf:
    root = Storage(out).root
    with _shelves_lock:
        return _shelves.setdefault(root, _Shelf(root))


def list_runs(out: str) -> list[RunLine]:
    """All runs of an output folder or prefix, the newest first; a damaged one is listed as such."""
    shelf = _shelf(out)
    names = _names(shelf)
    lines = _each(shelf, lambda name: _line(shelf, name), names)
    with shelf.lock:
        shelf.names = {run_key_of(name): name for name in names}
    for gone in set(shelf.lines) - set(names):
        shelf.forget(gone)
    return sorted((line for line in lines if line is not None), key=lambda r: (r.started_at, r.run_id), reverse=True)


def _each(shelf: _Shelf, call: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """`map` over runs; several at a time where each answer is waited for."""
    if shelf.storage.is_local or len(names) < 2:
        return [call(name) for name in names]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(call, names))


def _names(shelf: _Shelf) -> list[str]:
    """Run ids below the output folder or prefix; those that are known already are not looked into again."""
    if shelf.storage.is_local:
        return run_names(shelf.out)
    found = shelf.storage.names("")
    there = _each(shelf, lambda name: name in shelf.lines or shelf.storage.exists(f"{name}/run.json"), found)
    return [name for name, is_run in zip(found, there, strict=True) if is_run]


def _line(shelf: _Shelf, run_id: str) -> RunLine | None:
    """One run in the list; None where it was deleted meanwhile."""
    run = shelf.storage.child(run_id)
    try:
        try:
            stamp = run.stamp("manifest.json")
        except (FileNotFoundError, NotADirectoryError):
            return _line_in_progress(shelf, run_id)
        kept = shelf.lines.get(run_id)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        line = _line_of(run_id, json.loads(run.read("manifest.json")))
        shelf.lines[run_id] = (stamp, line)
        return line
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (LeukoflowError, ValueError, KeyError, TypeError, AttributeError) as error:
        return RunLine(
            run_key_of(run_id), run_id, "damaged", "", None, "", 0, 0, 0, 0, 0, 0, 0, "", "", None, words_of(error)
        )


def _line_of(run_id: str, m: Mapping[str, Any]) -> RunLine:
    """From a manifest, which is not checked against its schema: there may be hundreds of them."""
    predicted, abstained, rejected, quarantined = (int(m[name]) for name in STATUSES)
    return RunLine(
        run_key=run_key_of(run_id),
        run_id=run_id,
        state="finished",
        started_at=str(m["started_at"]),
        finished_at=str(m["finished_at"]),
        source_kind=str(m["source"]["kind"]),
        members=int(m["members"]),
        done=predicted + abstained + rejected + quarantined,
        predicted=predicted,
        abstained=abstained,
        rejected=rejected,
        quarantined=quarantined,
        missing=int(m["missing"]),
        bundle=str(m["bundle"]),
        bundle_digest=str(m["bundle_digest"]),
        shadow_of=m.get("shadow_of"),
    )


def _line_in_progress(shelf: _Shelf, run_id: str) -> RunLine:
    reader = shelf.reader(run_id)
    with shelf.lock_of(run_id):
        p = reader.read()
    binding = reader.binding()
    kind, missing = "", 0
    try:
        with reader.storage.open("plan.parquet") as file:
            summary = read_summary(file)
        kind, missing = str(summary.source.kind), summary.missing
    except (FileNotFoundError, LeukoflowError, pa.ArrowException):
        pass  # it is being planned
    return RunLine(
        run_key=run_key_of(run_id),
        run_id=run_id,
        state=p.state,
        started_at=p.started_at,
        finished_at=None,
        source_kind=kind,
        members=p.members,
        done=p.done,
        predicted=p.predicted,
        abstained=p.abstained,
        rejected=p.rejected,
        quarantined=p.quarantined,
        missing=missing,
        bundle=binding.bundle,
        bundle_digest=binding.bundle_digest,
        shadow_of=p.shadow_of,
        message=p.message,
        phase=p.phase if p.state == "running" else "",
    )


def run_id_of(out: str, run_key: str) -> str:
    """The run with a key. Raises RunNotFoundError."""
    shelf = _shelf(out)
    name = shelf.names.get(run_key)
    if name is None:
        names = {run_key_of(found): found for found in _names(shelf)}
        with shelf.lock:
            shelf.names = names
        name = names.get(run_key)
    if name is None:
        raise RunNotFoundError("there is no such run (any more); the list of runs shows what there is")
    return name


def open_run_table(out: str, run_key: str) -> RunTable:
    """A run, by its key.

    Raises RunNotFoundError, RunBusyError while a patient is erased or corrected, StorageError where it is damaged.
    """
    return _open(_shelf(out), run_id_of(out, run_key))


def warm(out: str, runs: int = 1) -> None:
    """Reads the newest finished runs ahead, so that nobody waits for that; errors are left to whoever opens one."""
    newest = [line for line in list_runs(out) if line.state == "finished" and line.shadow_of is None]
    for line in newest[:runs]:
        with suppress(LeukoflowError):
            open_run_table(out, line.run_key)


def open_run_named(out: str, run_id: str) -> RunTable:
    """A run, by its id; else as `open_run_table`."""
    return open_run_table(out, run_key_of(run_id))


def _open(shelf: _Shelf, run_id: str) -> RunTable:
    run = shelf.storage.child(run_id)
    with shelf.lock_of(run_id):
        with _reading(run_id):
            if run.exists(INTENT):
                raise RunBusyError(f"run {run_id} is being changed just now; look again in a minute")
            if not run.exists("run.json"):
                shelf.forget(run_id)
                raise FileNotFoundError
            held = shelf.tables.get(run_id)
            try:
                stamp = run.stamp("manifest.json")
            except (FileNotFoundError, NotADirectoryError):
                held = _open_in_progress(shelf, run, run_id, held)
            else:
                if held is None or held.stamp != stamp:
                    held = _open_finished(run, run_id, stamp)
            verdicts = shelf.verdict_reader(run_id).read()
        shelf.keep(run_id, held)
        return RunTable(shelf.out, run_id, held, verdicts)


def _open_finished(run: Storage, run_id: str, stamp: str, patient: str | None = None) -> _Held:
    """A finished run, or of it the rows of one patient."""
    manifest = read_manifest(run)
    if manifest is None:
        raise FileNotFoundError
    if manifest.schema_version > SCHEMA_VERSION:
        raise StorageError(
            f"run {run_id} was written by a newer leukoflow (schema {manifest.schema_version}, this one knows "
            f"{SCHEMA_VERSION}): look at it with that one"
        )
    if manifest.shard_size < 1:
        raise StorageError(f"run {run_id}: its manifest is damaged; `leukoflow verify` tells what to do")
    listed = table_files(manifest.parts, "predictions")
    keys = [f.key for f in listed]
    where = None if patient is None else pc.field("patient_id") == patient
    table = read_columns(run, keys, COLUMNS, where)
    ordinals = np.arange(len(table), dtype=np.int64)
    if patient is not None:  # rows are in the plan's order
        planned = _planned(run, "patient_id")
        ordinals = np.flatnonzero(pc.fill_null(pc.equal(planned, patient), False).to_numpy())
        if len(ordinals) != len(table):
            raise StorageError(f"run {run_id}: plan and predictions differ; `leukoflow verify` tells what to do")

    def later(name: str) -> pa.ChunkedArray:
        with _reading(run_id):
            if name == "image_key":  # one file instead of hundreds; publishing has compared the two
                names = _planned(run, name)
                return names if patient is None else names.take(pa.array(ordinals))
            if patient is None:
                return read_columns(run, keys, [name])[name]
            return read_columns(run, keys, [name, "patient_id"], where)[name]

    frame = Frame(table, ordinals, later)
    files = {shard_name(ordinal): f.key for f in listed for ordinal in f.shards}
    return _Held(
        stamp=stamp,
        frame=frame,
        manifest=manifest,
        progress=None,
        fingerprint=manifest.fingerprint,
        shard_size=manifest.shard_size,
        files=files,
        missing=_missing(manifest.missing, manifest.config),
        ignored=manifest.ignored,
        truncated=manifest.source_truncated,
        slides=Groups(frame, frame.slide, len(frame.slides)),
        patients=Groups(frame, frame.patient, len(frame.patients)),
    )


def _missing(count: int, config: str) -> int | None:
    """Images that were listed and not handed over; None where the run's settings name no manifest that lists any."""
    listed = not config or json.loads(config).get("manifest") is not None
    return count if listed or count else None


def _planned(run: Storage, name: str) -> pa.ChunkedArray:
    """A column of the plan."""
    with run.open("plan.parquet") as file:
        return pq.ParquetFile(file).read(columns=[name])[name]


def _open_in_progress(shelf: _Shelf, run: Storage, run_id: str, before: _Held | None) -> _Held:
    """What is committed so far; shards that were read once are not read again."""
    reader = shelf.reader(run_id)
    progress, binding = reader.read(), reader.binding()
    committed = sorted(
        (
            name.removesuffix(".json")
            for name in run.names("markers/predictions")
            if name.removesuffix(".json").isdecimal()
        ),
        key=int,
    )
    pieces = dict(before.pieces) if before is not None and before.manifest is None else {}
    found: dict[str, pa.Table] = {}
    for shard in committed:
        try:
            found[shard] = pieces.get(shard) or read_columns(run, [f"predictions/part-{shard}.parquet"], COLUMNS)
        except FileNotFoundError:
            continue  # committed, but not moved to its place yet
    stamp = ",".join(found)
    if before is not None and before.manifest is None and before.stamp == stamp:
        before.progress = progress
        return before
    ignored, missing, truncated = 0, 0, None
    try:
        with run.open("plan.parquet") as file:
            summary = read_summary(file)
        ignored, missing, truncated = summary.ignored, summary.missing, summary.truncated
    except (FileNotFoundError, LeukoflowError, pa.ArrowException):
        pass
    table = pa.concat_tables(found.values()) if found else _empty(COLUMNS)
    ordinals = [np.arange(len(t), dtype=np.int64) + int(shard) * binding.shard_size for shard, t in found.items()]
    files = {shard: f"predictions/part-{shard}.parquet" for shard in found}

    def later(name: str) -> pa.ChunkedArray:
        with _reading(run_id):
            return read_columns(run, list(files.values()), [name])[name]

    frame = Frame(table, np.concatenate(ordinals) if ordinals else np.zeros(0, np.int64), later)
    return _Held(
        stamp=stamp,
        frame=frame,
        manifest=None,
        progress=progress,
        fingerprint=binding.fingerprint,
        shard_size=max(1, binding.shard_size),
        files=files,
        missing=_missing(missing, binding.config),
        ignored=ignored,
        truncated=truncated,
        slides=Groups(frame, frame.slide, len(frame.slides)),
        patients=Groups(frame, frame.patient, len(frame.patients)),
        pieces=found,
    )


def _read_absent(run: Storage, run_id: str) -> tuple[Counter[str], Counter[str]]:
    """Images that the manifest lists and the source does not hold: by grouping and name of the slide, by patient."""
    with _reading(run_id):
        try:
            with run.open("missing.parquet") as file:
                table = pq.ParquetFile(file).read(columns=["image_key", "slide_id", "patient_id"])
        except FileNotFoundError:  # all of it was erased, or the run is being planned
            return Counter(), Counter()
    codes, slides = _slides_of(table["slide_id"], lambda: table["image_key"])
    patients = Counter(p for p in table["patient_id"].to_pylist() if p is not None)
    return Counter(slides[code] for code in codes.tolist()), patients


def _empty(columns: Sequence[str]) -> pa.Table:
    return pa.schema([PREDICTIONS.field(name) for name in columns]).empty_table()


def read_columns(run: Storage, keys: Sequence[str], columns: Sequence[str], where: Any = None) -> pa.Table:
    """Columns of `predictions/` files, in order; a column that a file lacks is null. `where` is an Arrow expression."""
    schema = pa.schema([pa.field(name, PREDICTIONS.field(name).type) for name in columns])
    if not keys:
        return schema.empty_table()

    def one(key: str) -> pa.Table:
        if run.is_local:
            return _cut(pq.ParquetFile(pa.OSFile(run.uri(key))), schema)
        with run.open(key) as file:
            return _cut(pq.ParquetFile(file), schema)

    # A slice of the files for each thread: handing out single ones would cost as much as reading them.
    threads = min(READERS, os.cpu_count() or 1) if run.is_local else READERS
    size = -(-len(keys) // threads)
    slices = [keys[i : i + size] for i in range(0, len(keys), size)]
    with ThreadPoolExecutor(len(slices)) as pool:
        tables = list(pool.map(lambda own: [one(key) for key in own], slices))
    table = pa.concat_tables([t for own in tables for t in own])
    return table if where is None else table.filter(where)


def _cut(reader: pq.ParquetFile, schema: pa.Schema) -> pa.Table:
    """The columns of a schema, those that are absent as nulls."""
    with reader:
        present = set(reader.schema_arrow.names)
        found = reader.read(columns=[name for name in schema.names if name in present], use_threads=False)
    arrays = [found[f.name] if f.name in present else pa.nulls(len(found), f.type) for f in schema]
    return pa.table(
        [a if a.type == f.type else a.cast(f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema
    )


# --- over all runs ---------------------------------------------------------------------------------------------------


def timeline(out: str, patient_key: str) -> Timeline:
    """A patient's course over the runs of an output folder. Raises NotFoundError where no run knows the patient."""
    shelf = _shelf(out)
    points: list[TimelinePoint] = []
    unread: list[str] = []
    name = ""
    images: Callable[[], list[str]] = list  # of the point before
    for line in reversed(list_runs(out)):
        if line.shadow_of is not None or line.state == "damaged":
            unread += [line.run_id] if line.state == "damaged" else []
            continue
        try:
            name = _patients_of(shelf, line.run_id).get(patient_key, "")
            if not name:
                continue
            table = _open_patient(shelf, line.run_id, name)
            patient = table.patient(patient_key)
            mine = table.rows_of(patient_key=patient_key)
            digests = partial(_digests, table, mine)
            # Digests are read only where they can be the same.
            same = bool(points) and points[-1].summary.counts.fields == len(mine) and digests() == images() != []
        except NotFoundError:
            continue  # not done yet, or deleted meanwhile
        except LeukoflowError:
            unread.append(line.run_id)
            continue
        images = digests
        points.append(
            TimelinePoint(
                run_key=line.run_key,
                run_id=line.run_id,
                at=line.started_at,
                finished=table.finished,
                slides=patient.slides,
                summary=patient.summary,
                corrected=patient.summary.corrected,
                bundle_digest=line.bundle_digest,
                same_bundle=not points or points[-1].bundle_digest == line.bundle_digest,
                same_images=same,
                missing=patient.missing,
                patient=name,
                slide_labels=slide_labels(table, mine),
            )
        )
    if not points:
        raise NotFoundError("no run here knows this patient (any more)")
    return Timeline(patient_key, points[-1].patient, tuple(points), tuple(unread), course_remarks(points))


def _digests(table: RunTable, rows: Ints) -> list[str]:
    """Digests of the images of some rows, sorted; none where one is not known."""
    found = table.frame.column("member_sha256").take(pa.array(rows)).to_pylist()
    return [] if None in found else sorted(found)


def slide_labels(table: RunTable, rows: Ints) -> tuple[tuple[str, str | None, int], ...]:
    """The slides that some rows are on, in order, each with the label of these rows and how many were predicted."""
    frame = table.frame
    found: list[tuple[str, str | None, int]] = []
    for code in np.unique(frame.slide[rows]).tolist():
        own = rows[frame.slide[rows] == code]
        said = own[frame.predicted[own]]
        label = CLASSES[int(frame.p[said].sum(0).argmax())] if len(said) else None
        found.append((frame.slides[code].partition(":")[2], label, len(said)))
    return tuple(found)


def course_remarks(points: Sequence[TimelinePoint]) -> tuple[str, ...]:
    """Where a patient's runs, or the slides of one run, were given different labels, in sentences."""
    remarks = []
    if said := disagreement((p.run_id, p.summary.label, p.summary.counts.predicted) for p in points):
        bundles = len({p.bundle_digest for p in points if p.summary.label})
        models = " Not all of these runs used the same model." if bundles > 1 else ""
        remarks.append(f"Runs do not agree on this patient: {said}{models}")
    for point in points:
        if said := disagreement(point.slide_labels):
            remarks.append(f"Slides of run {point.run_id} do not agree: {said}")
    return tuple(remarks)


def _open_patient(shelf: _Shelf, run_id: str, patient: str) -> RunTable:
    """A run of which nothing but a patient's rows need be there."""
    run = shelf.storage.child(run_id)
    with _reading(run_id):
        try:
            stamp = run.stamp("manifest.json")
        except (FileNotFoundError, NotADirectoryError):
            return _open(shelf, run_id)
        held = shelf.tables.get(run_id)
        if (held is not None and held.stamp == stamp) or run.exists(INTENT):
            return _open(shelf, run_id)
        held = _open_finished(run, run_id, stamp, patient)
        return RunTable(shelf.out, run_id, held, shelf.verdict_reader(run_id).read())


def _patients_of(shelf: _Shelf, run_id: str) -> Mapping[str, str]:
    """Keys and pseudonyms of a run's patients, from its plan alone."""
    run = shelf.storage.child(run_id)
    with _reading(run_id):
        stamp = run.stamp("plan.parquet")
        kept = shelf.patients.get(run_id)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        column = _planned(run, "patient_id")
    found = {patient_key_of(p): p for p in pc.unique(column).to_pylist() if p is not None}
    shelf.patients[run_id] = (stamp, found)
    return found


def agreement(out: str) -> Agreement:
    """What people decided against what was predicted, over all runs but shadow runs."""
    shelf = _shelf(out)
    decided: list[Verdict] = []
    unread: list[str] = []
    runs = [line.run_id for line in list_runs(out) if line.shadow_of is None]
    for run_id, found in zip(runs, _each(shelf, lambda name: shelf.verdict_reader(name).read(), runs), strict=True):
        if found.damaged:
            unread.append(run_id)
        decided += [s.decision for (kind, _), s in found.standings().items() if kind == "image" and s.decision]
    return agreement_of(decided, unread)


def _answered(verdict: Verdict) -> bool:
    """Whether the field that a verdict is about was predicted: the label of an abstained one is no prediction."""
    return verdict.seen_status == Status.PREDICTED


def agreement_of(decided: Iterable[Verdict], unread: Sequence[str] = ()) -> Agreement:
    """Agreement of decisions, one for each field."""
    labelled = [v for v in decided if v.said]
    known = [(v, CLASSES.index(v.seen_answer), CLASSES.index(v.said or "")) for v in labelled if v.seen_answer]
    without = len(labelled) - len(known)
    confusion = np.zeros((4, 4), np.int64)
    weeks: dict[str, NDArray[np.int64]] = {}
    reviewers: dict[str, list[int]] = {}
    for verdict, seen, said in known:
        confusion[seen, said] += 1
        year, week, _ = datetime.fromisoformat(verdict.at).isocalendar()
        weeks.setdefault(f"{year}-W{week:02d}", np.zeros((4, 4), np.int64))[seen, said] += 1
        mine = reviewers.setdefault(verdict.who, [0, 0])
        mine[0] += 1
        mine[1] += seen != said
    kappa, interval = kappa_of(confusion)
    n, same = int(confusion.sum()), int(np.trace(confusion))
    return Agreement(
        n=n,
        accepted=same,
        corrected=n - same,
        without_prediction=without,
        confusion=tuple(tuple(int(v) for v in row) for row in confusion),
        kappa=kappa,
        kappa_interval=interval,
        no_kappa=no_kappa(confusion),
        weeks=tuple(
            WeekLine(week, int(c.sum()), int(np.trace(c)), int(c.sum() - np.trace(c)), kappa_of(c)[0])
            for week, c in sorted(weeks.items())
        ),
        reviewers=tuple((who, a, b) for who, (a, b) in sorted(reviewers.items())),
        unread=tuple(unread),
    )
