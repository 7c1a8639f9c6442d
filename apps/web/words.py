"""Words of the pages: classes, confidence, prediction sets and reasons in sentences, and one field as they show it.

Confidence is stated as a frequency, since that is what calibration means; attention is called what it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from leukoflow.core.method import SegmentSettings
from leukoflow.runs.records import CLASSES, Quality, Status
from leukoflow.tasks.report import numbers
from leukoflow.tasks.review import wording
from leukoflow.tasks.review.confidence import Frequency
from leukoflow.tasks.review.lines import Summary
from leukoflow.tasks.review.wording import Scale

CLASS_NOTES = {
    "Benign": "haematogones",
    "Early": "malignant, early precursor B cells",
    "Pre": "malignant, precursor B cells",
    "Pro": "malignant, progenitor B cells",
}
_BECAME = (
    ("predicted", "answered"),
    ("abstained", "without an answer"),
    ("rejected", "rejected"),
    ("quarantined", "quarantined"),
    ("", "not classified"),
)
STATUSES = ("predicted", "abstained", "rejected", "quarantined")
STATUS_WORDS = {
    "predicted": "answered: a label with its confidence",
    "abstained": "no answer: the model does not know",
    "rejected": "quality too poor to classify",
    "quarantined": "could not be read",
    "missing": "listed, but not received",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell as pages show it. Lengths in source pixels, areas in pixels of the mask."""

    cell_id: int
    rank: int  # 1 has the highest attention of the field
    tile: int
    attention: float
    weight: float  # attention relative to the field's highest, 0 to 1
    nc_ratio: float
    nucleus_area_px: float
    cell_area_px: float
    eccentricity: float
    touches_border: bool
    box: tuple[float, float, float, float]  # xmin, ymin, xmax, ymax in the tile's pixels


@dataclass(frozen=True, slots=True)
class Subject:
    """One field, from a run or from the bench, as pages and exports report it.

    `label` and `prediction_set` are those of an answer: None and empty where the model abstained.
    """

    title: str
    status: str
    reason: str | None
    label: str | None
    probabilities: tuple[float, ...]
    prediction_set: tuple[str, ...]
    ood: float | None
    width_px: int | None
    height_px: int | None
    um_per_px: float | None  # that lengths and areas may be given in; None where it is an assumption
    n_cells: int
    quality: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]
    bundle: str
    bundle_digest: str
    sha256: str | None
    facts: tuple[tuple[str, str], ...] = ()
    settings: SegmentSettings = field(default_factory=SegmentSettings)  # of the method that diagnosed it
    alpha: float = 0.05  # miss rate that its prediction set was built for, per class
    max_ood: float | None = None  # distance above which its model abstains
    frequency: Frequency | None = None  # what the confidence of its answer means; None without an answer
    where: str = "run"  # or "bench"
    source: str | None = None  # how the scale is known (`ScaleSource`)
    scale: str = ""  # the scale in words
    shadow: str = ""  # what precedes everything reported about a field of a shadow run

    @property
    def why(self) -> tuple[str, str, str]:
        """Why there is no answer: what, the likeliest cause with what to do about it, and the measured part."""
        scale = Scale(self.width_px, self.height_px, self.um_per_px, self.settings, self.source)
        return reason_words(self.reason, scale, self.where, self.remarks)

    @property
    def caution(self) -> str:
        """Caution before an answer that may rest on a wrong size; empty otherwise, and without an answer."""
        if self.label is None:
            return ""
        return Scale(self.width_px, self.height_px, self.um_per_px, self.settings).caution

    @property
    def confidence(self) -> float | None:
        """Calibrated probability of the label."""
        if self.label is None or not self.probabilities:
            return None
        return self.probabilities[CLASSES.index(self.label)]

    @property
    def malignant(self) -> float | None:
        """Probability of the three malignant classes together."""
        return sum(self.probabilities[1:]) if self.probabilities else None


def reason_words(
    reason: str | None, scale: Scale | None = None, where: str = "run", remarks: Sequence[str] = ()
) -> tuple[str, str, str]:
    """Put a stored reason in words: what, the likeliest cause with what to do about it, and the measured part."""
    what, remedy, measured = wording.reason_words(reason, scale, where, remarks)
    return (numbers.shown(what, 300), remedy, numbers.shown(measured, 200))


def quality_words(quality: Quality | None) -> tuple[tuple[str, str], ...]:
    """Return the measurements of quality, named and rounded."""
    if quality is None:
        return ()
    return (
        ("Focus", f"{quality.focus:.1f}"),
        ("Mean lightness", f"{quality.exposure:.2f}"),
        ("Clipped pixels", f"{100 * quality.saturated:.1f} %"),
        ("Stained area", f"{100 * quality.foreground:.1f} %"),
        ("Distance from blood stains", f"{quality.stain:.2f}"),
    )


def uncertain_of(summary: Summary) -> str:
    """Say which fields the share of uncertain ones refers to, and how many more could not be used."""
    n, rest = summary.diagnosed, summary.counts.fields - summary.diagnosed
    of = f"of {number(n)} field{'s' if n != 1 else ''} that the model looked at"
    return f"{of}; {number(rest)} more could not be used" if rest else of


def bundle_name(bundle: str) -> str:
    """Return a bundle's name without its folder."""
    return numbers.shown(bundle.rstrip("/").rpartition("/")[2] or bundle, 80)


def number(value: float, digits: int = 0) -> str:
    """Format a number with thin spaces between thousands."""
    return numbers.number(value, digits).replace(",", "\u202f")


def prob(value: float) -> str:
    """Format a probability to three places, never rounded to certainty."""
    return wording.probability(value)


def percent(share: float | None, digits: int = 0) -> str:
    """Format a share in percent, a dash where there is none; never rounded to all or none of it."""
    return numbers.percent(share, digits).replace(" %", "\u202f%")


def day(at: str | None) -> str:
    """Return the day of an ISO 8601 time."""
    return at[:10] if at else "–"


def moment(at: str | None) -> str:
    """Format an ISO 8601 time to the minute, in UTC."""
    if not at:
        return "–"
    try:
        return f"{datetime.fromisoformat(at).astimezone(UTC):%Y-%m-%d %H:%M}"
    except ValueError:
        return numbers.shown(at, 40)


def sentence(text: object, limit: int = 300) -> str:
    """Format foreign text as a sentence: with a capital and a full stop."""
    return wording.sentence(numbers.shown(text, limit))


def upload_words(items: Sequence[Any], images: int) -> str:
    """Summarise an upload: the counts add up to the images chosen, times the models that were asked."""
    found = Counter(_became(i) for i in items if i.done)
    parts = [f"{found[kind]} {said}" for kind, said in _BECAME if found[kind]]
    if waiting := sum(not i.done for i in items):
        parts.append(f"{waiting} to do")
    models = len(items) // images if images else 1
    head = f"{images} image{'s' if images != 1 else ''}{f', {models} models' if models > 1 else ''}"
    return f"{head}: {', '.join(parts)}"


def _became(item: Any) -> str:
    """Return the status of an image on the bench; empty if it is not the image's fault that there is none."""
    if item.diagnosis is not None:
        return str(item.diagnosis.status)
    return "" if item.busy or item.fault else str(Status.QUARANTINED)


def versus(diagnoses: Sequence[Any]) -> str:
    """Say in a sentence whether two bundles agree on one image."""
    found = [f for f in diagnoses if f is not None]
    answers = [f for f in found if f.status == Status.PREDICTED]
    if answers and len(answers) < len(found):
        return "Only one of the models has answered: there is nothing to compare, and reason to doubt the answer."
    if len(answers) < 2:
        return ""
    if len({f.label for f in answers}) > 1:
        return "The models disagree: rely on neither answer."
    most = max(abs(a - b) for a, b in zip(answers[0].probabilities, answers[1].probabilities, strict=True))
    return f"The models agree on the label; their probabilities differ by at most {most:.3f}."


@lru_cache(maxsize=1)
def model_card() -> tuple[CardBlock, ...]:
    """Return the model card of the embedded bundle, in blocks; empty if it is not installed beside the code."""
    try:
        text = (Path(__file__).resolve().parents[2] / "docs" / "model-card.md").read_text(encoding="utf-8")
    except OSError:
        return ()
    return tuple(_blocks(text))


@dataclass(frozen=True, slots=True)
class CardBlock:
    """A heading, paragraph, list or table of a plain Markdown document."""

    kind: str  # h2, h3, p, ul, table
    lines: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def _blocks(text: str) -> Iterator[CardBlock]:
    for part in text.split("\n\n"):
        lines = part.strip().splitlines()
        if not lines or lines[0].startswith("# "):
            continue
        if lines[0].startswith("#"):
            yield CardBlock("h2" if lines[0].startswith("## ") else "h3", (lines[0].lstrip("# "),))
            lines = lines[1:]
        if not lines:
            continue
        if lines[0].startswith("|"):
            cells = [tuple(c.strip() for c in line.strip("|").split("|")) for line in lines if line.startswith("|")]
            yield CardBlock("table", rows=tuple(row for row in cells if not set("".join(row)) <= set("-: ")))
        elif lines[0].startswith("- "):
            items: list[str] = []
            for line in lines:
                if line.startswith("- "):
                    items.append(line[2:])
                else:
                    items[-1] += f" {line.strip()}"
            yield CardBlock("ul", tuple(_plain(i) for i in items))
        else:
            yield CardBlock("p", (_plain(" ".join(lines)),))


def _plain(text: str) -> str:
    return text.replace("`", "").replace("**", "")
