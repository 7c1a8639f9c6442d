"""What lists and pages are answered with: frozen records of runs, slides, patients and fields.

The JSON API serves these records as they are, but for the fields that are marked `INTERNAL`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from leukoflow.runs.records import CLASSES, Status
from leukoflow.tasks.review.keys import NO_FOLDER, title_of
from leukoflow.tasks.review.public import INTERNAL, described
from leukoflow.tasks.review.verdict_record import Standing, Verdict
from leukoflow.tasks.review.wording import MEAN_MALIGNANT_NOTE, SET_DESCRIPTION

T = TypeVar("T")


def is_outweighed(label: str | None, malignant: float | None) -> bool:
    """Return whether the label is Benign, yet all malignant classes together are at least as probable."""
    return label == CLASSES[0] and malignant is not None and malignant >= 0.5


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
    shadow_of: str | None
    message: str
    phase: str = field(metadata=described("what a running run does or waits for; else empty"))


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """Where every image is: received = predicted + abstained + rejected + quarantined + waiting."""

    received: int
    predicted: int
    abstained: int
    rejected: int
    quarantined: int
    waiting: int  # of a run in progress: not done yet
    missing: int | None = field(
        metadata=described("listed, but not handed over; null where there was no manifest to list it")
    )
    ignored: int
    truncated: str | None
    conflicts: int  # rows with images that are found under more than one patient
    finished: bool
    state: str
    balanced: bool
    failed_shards: tuple[tuple[str, str], ...] = field(default=(), metadata=INTERNAL)


@dataclass(frozen=True, slots=True)
class FieldCounts:
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
    """What the fields of a slide or patient say together; `label` and the measures are null without predicted fields.

    `urgency` is that of `slides.parquet`. `uncertainty` is the share of diagnosed fields that were abstained from or
    whose prediction set has more than one class; `entropy` the mean entropy of the predicted fields' probabilities, 0
    to 1. `reviewed` counts the diagnosed fields with a decision. `worst` is the ordinal of the field to look at first.
    """

    # The mean is that of `tasks.store.slides`, and no differential count, since no cell is classified by itself. Its
    # interval starts from even odds as urgency does (Beta(1, 1)); fields of one slide are not really independent.
    counts: FieldCounts
    label: str | None
    probabilities: tuple[float, ...] = field(metadata=described("means over the answered fields, Benign Early Pre Pro"))
    urgency: float
    mean_malignant_probability: float | None = field(
        metadata=described(f"{MEAN_MALIGNANT_NOTE} Null without answered fields.")
    )
    interval: tuple[float, float] | None = field(
        metadata=described(
            "95 % interval of the mean, as if fields were independent; null for fewer than 5 answered fields"
        )
    )
    malignant_fields: int = field(metadata=described("answered fields with a malignant probability above one half"))
    uncertainty: float | None
    entropy: float | None
    cells: int
    answered_cells: int = field(metadata=described("cells of the answered fields"))
    reviewed: int
    corrected: int = field(metadata=INTERNAL)  # answered fields that people have labelled otherwise
    diagnosed: int
    flagged: int
    worst: int

    @property
    def outweighed(self) -> bool:
        """Whether the label is Benign although the three malignant classes together are at least as probable."""
        return is_outweighed(self.label, self.mean_malignant_probability)


@dataclass(frozen=True, slots=True)
class SlideLine:
    """A slide, or the folder that stands for one. `standing` is the review of the slide as a whole."""

    slide_key: str
    name: str
    grouping: str
    patient_key: str | None
    patient: str | None
    site: str | None
    scanner: str | None
    summary: Summary
    standing: Standing
    rank: int = field(metadata=described("place by urgency among all slides of the run, from 1"))
    missing: int = field(metadata=described("images that the manifest lists for it and that were not received"))
    patients: int = field(
        metadata=described("patients whose fields are on it; with several, resolve that before reading")
    )

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
    worst_slide: str = field(metadata=described("key of the most urgent slide"))
    missing: int = field(
        metadata=described("images that the manifest lists for the patient and that were not received")
    )


@dataclass(frozen=True, slots=True)
class FieldLine:
    """A field. `urgency` is its malignant probability, or one half without a prediction; `uncertainty` its entropy.

    `details` are null in lists.
    """

    # A slide's urgency is drawn towards one half where few fields speak; a single field's is not, or no field could
    # ever have more than two thirds. Label, confidence and set are those of an answer: a run also stores what the
    # model leaned to where it abstained, and that is none.
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
    label: str | None = field(metadata=described("of an answer; null where the model abstained"))
    confidence: float | None = field(metadata=described("calibrated probability of the label; null without an answer"))
    probabilities: tuple[float, ...] = field(
        metadata=described("Benign Early Pre Pro; no answer where the model abstained, nor calibrated for it")
    )
    prediction_set: tuple[str, ...] = field(metadata=described(SET_DESCRIPTION))
    ood: float | None
    n_cells: int
    urgency: float
    uncertainty: float | None
    standing: Standing
    details: FieldDetails | None = None

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
    """Details of a single field."""

    member_sha256: str | None
    bundle_digest: str
    um_per_px: float | None  # in use
    um_per_px_source: str | None
    um_per_px_sd: float | None
    um_per_px_stated: float | None
    width_px: int | None
    height_px: int | None
    focus: float | None
    exposure: float | None
    quality_flags: tuple[str, ...]
    shard: str
    zarr_index: int | None
    n_tiles: int
    verdicts: tuple[Verdict, ...]
