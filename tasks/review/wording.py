"""What people read about a prediction: one wording for the web application, the report and the command line.

A prediction set excludes nothing, an abstention is no answer, and where nobody gave a scale, that comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from leukoflow.core.counts import count_of
from leukoflow.core.geometry import scale_is_guessed
from leukoflow.core.method import SegmentSettings
from leukoflow.runs.records import CLASS_NAMES, CLASSES, OUT_OF_DISTRIBUTION, ScaleSource, read_reason
from leukoflow.tasks.imaging.scale import CONTRADICTED, NO_SCALE

RESEARCH_USE = (
    "Research use only. Not a medical device: no diagnosis, and no decision about a patient, may rest on this. "
    "Every finding must be confirmed by a haematologist on the slide itself."
)
CLASS_CAUTION = (
    "The classes are labels of the training data: morphology does not establish the B-cell stage, and Benign does not "
    "mean a normal smear."
)
BENIGN_BUT = "is the most probable single class; malignant classes together"
"""Stands between Benign and the malignant probability of a slide, where that is the higher one."""
SHADOW = "Shadow run, a trial of a candidate model: do not act on it."
"""Stands before whatever leaves a shadow run."""
UNFINISHED = "The run has not finished: this is not its final result."
INTERVAL_NOTE = (
    "With its 95 % interval, as if fields were independent; those of one slide are not, so it is too narrow."
)
ATTENTION_NOTE = (
    "Attention is the weight that a cell had in the result; the cell may have spoken for or against any class. It does "
    "not mark that cell as diseased."
)
NO_ANSWER = "No answer: the model abstained."
SCALE_CAUTION = (
    "No scale was given and this picture is not of the training size: its cells may have been judged at the wrong "
    "size. Do not rely on this answer."
)
LEANING = (
    "The probabilities were computed all the same. They are no answer: what is known of their calibration does not "
    "hold for fields that the model abstains from."
)
MEAN_MALIGNANT = "Mean malignant probability"
"""The one name of `tasks.store.slides.mean_malignant_probability`."""
MEAN_MALIGNANT_NOTE = (
    "The mean of P(Early Pre-B) + P(Pre-B) + P(Pro-B) over the answered fields, each field counting once. It is no "
    "differential count and no percentage of blasts: no cell is classified by itself."
)
SET_NOTE = (
    "Classes of the prediction set. It excludes no class: by design, up to one field in twenty has a true class that "
    "is not in its set"
)
SET_DESCRIPTION = (
    "classes of the answer's prediction set, empty without an answer; classes outside it are not excluded: by design, "
    "up to one field in twenty has a true class that is not in its set"
)

_REASONS = {
    OUT_OF_DISTRIBUTION: ("It is unlike the fields the model learned from.", ""),
    "ambiguous": (
        "No class stands out.",
        "Even the most probable one is not probable enough to be an answer. Other fields of the slide may help.",
    ),
    "too few cells": (
        "There are too few white cells to judge.",
        "Choose a field with more leukocytes, or judge the slide by its other fields.",
    ),
    "empty: 0 bytes": ("The file is empty.", "It has no bytes: copy or export it again."),
    "out of focus": ("It is out of focus.", "Focus again, and photograph the field again."),
    "empty": ("Hardly anything in it is stained.", "Move to an area where cells lie side by side."),
    "too dark": ("It is too dark.", "More light or a longer exposure helps."),
    "too bright": ("It is too bright.", "Less light or a shorter exposure helps."),
    "clipped pixels": (
        "Large parts are pure black or white.",
        "Adjust the exposure; dark or white borders and labels also count.",
    ),
    "colours are not those of a blood stain": (
        "Its colours are not those of a blood stain.",
        "Check the white balance, and that the image shows a Romanowsky-stained smear.",
    ),
}
_OF_SCALE = {
    NO_SCALE: (
        "Nobody stated its scale, and its red cells do not tell it.",
        "Without a scale, cells may have been judged at the wrong size.",
    ),
    CONTRADICTED: (
        "The scale that was stated does not fit its red cells.",
        "One of the two is wrong, so cells may have been judged at the wrong size.",
    ),
}
_ABSTENTIONS = (OUT_OF_DISTRIBUTION, "ambiguous", "too few cells")
_DEPTH = "bits in 16?"
"""How the remark on values that fill a small part of their range ends (`tasks.decoding.wide_pixels`)."""
_DEPTH_FIRST = (
    "The likeliest cause is the file: it may use only a part of its 16 bits. Have the camera's software state the "
    "depth, or save with 8 bits. If that is not it, more light or a longer exposure helps."
)
_THEN = "If it abstains again, think of another stain, scanner or tissue."
_REMEDIES = {
    "run": "Have the run repeated with the scale: --um-per-px, or the column um_per_px of the manifest.",
    "bench": "Enter the scale (µm per pixel) on the bench and send the picture again.",
    "notebook": "Call diagnose() again with the scale: um_per_px=...",
}


@dataclass(frozen=True, slots=True)
class Scale:
    """What is known of a picture's size: pixels of the upright source, micrometres per pixel, the method's settings."""

    width_px: int | None
    height_px: int | None
    um_per_px: float | None
    settings: SegmentSettings = field(default_factory=SegmentSettings)
    source: str | None = None  # how the scale is known (`ScaleSource`); None in runs of schema 1 and 2

    @property
    def guessed(self) -> bool:
        """Whether the scale is no more than a guess.

        In runs of schema 1 and 2 it is one where nobody gave the scale of a picture that is not of the training
        fields' size.
        """
        if self.source is not None:
            return self.source == ScaleSource.ASSUMED
        if not self.width_px or not self.height_px:
            return False
        return scale_is_guessed(self.width_px, self.height_px, self.um_per_px, self.settings)

    @property
    def small(self) -> bool:
        """Whether the picture has less than half of a training field's pixels along a side."""
        return bool(self.width_px and self.height_px) and 2 * min(self.width_px or 0, self.height_px or 0) < (
            self.settings.field_px
        )

    @property
    def caution(self) -> str:
        """What stands before an answer whose scale is a guess; empty for any other."""
        return SCALE_CAUTION if self.guessed else ""


def class_name(label: str | None) -> str:
    """Write a label as haematologists do."""
    return "no label" if label is None else CLASS_NAMES.get(label, label)


def of_hundred(share: float) -> str:
    """Write a share as a count of 100, never as a certainty."""
    if share > 0.995:
        return "more than 99"
    return "fewer than 1" if share < 0.005 else f"about {round(100 * share)}"


def confidence_words(label: str, share: float, counted: bool = False, calibrated: bool = False) -> str:
    """Say what the confidence of an answer means, and no more than was measured.

    Args:
        label: of the answer.
        share: of the answers of this confidence that are right, 0 to 1: as it was counted, else the confidence itself.
        counted: whether `share` was counted on answers of about this confidence.
        calibrated: whether how far such confidences are off was at least measured on average.
    """
    name, count = class_name(label), of_hundred(share)
    if counted:
        return f"{name}: of 100 answers with about this confidence, {count} were right when that was counted."
    if calibrated:
        return f"{name}: of 100 answers with this confidence, {count} should be right. That is calibrated, not counted."
    return f"The model's own confidence is {count} of 100 for {name}; how often such answers are right is not known."


def repeated_words(protocol: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """Say on how many fields a protocol measured: each repeat answers every field again, and adds none.

    Args:
        protocol: of `metrics` in `bundle.json`, with `repeats`.
        measured: what it measured of one model, with `fields`: all answers of all repeats.
    """
    repeats = max(1, int(protocol.get("repeats") or 1))
    fields = int(measured.get("fields") or 0)
    if repeats == 1 or fields % repeats:
        return f"{fields:,} fields"
    return f"{fields // repeats:,} fields, {repeats} repeats"


def over_repeats(protocol: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    """Say behind counts that each field counts once in every repeat; empty where there are none, or one repeat."""
    repeats = int(protocol.get("repeats") or 1)
    return f" (counted over all {repeats} repeats)" if repeats > 1 and counts else ""


def mean_words(value: float | None) -> str:
    """Write a mean probability to two places, never rounded to certainty; a dash where there is none."""
    if value is None:
        return "–"
    return "> 0.99" if value >= 0.995 else "< 0.01" if value < 0.005 else f"{value:.2f}"


def probability(value: float) -> str:
    """Write a probability to three places, never rounded to a certainty: `> 0.999`, `0.732`, `< 0.001`."""
    shown = f"{value:.3f}"
    return {"1.000": "> 0.999", "0.000": "< 0.001"}.get(shown, shown)


NOT_EXCLUDED = 0.2
"""Probability from which a class outside the set is named beside it."""


def set_words(prediction_set: Sequence[str], alpha: float = 0.05, probabilities: Sequence[float] = ()) -> str:
    """Say what the prediction set of an answer means; empty where there is no answer, and so no set.

    Args:
        prediction_set: labels.
        alpha: share of the fields of a class whose set may miss that class.
        probabilities: of all classes in the order of `CLASSES`; a likely class outside the set is named where given.
    """
    names = [class_name(c) for c in prediction_set]
    if not names:
        return ""
    if len(names) == len(CLASSES):
        return "Prediction set: all four classes. The model cannot tell them apart here."
    likely = [
        f"{class_name(c)} ({p:.3f})"
        for c, p in zip(CLASSES, probabilities, strict=False)
        if c not in prediction_set and p >= NOT_EXCLUDED
    ]
    fall = f" {_and(likely)} {'fall' if len(likely) > 1 else 'falls'} outside the set but" if likely else ""
    outside = f"{fall} {'are' if len(likely) > 1 else 'is'} not excluded." if likely else ""
    missed = f"by design, up to {_missed(alpha)}."
    between = ", which the model cannot tell apart" if len(names) > 1 else ""
    return f"Prediction set: {_or(names)}{between}.{outside} This excludes no other class: {missed}"


def reason_words(
    reason: str | None, scale: Scale | None = None, where: str = "run", remarks: Sequence[str] = ()
) -> tuple[str, str, str]:
    """Put a stored reason into words: what it is, the likeliest cause with the remedy, and the measured part.

    Args:
        reason: as stored; its kind stands before the colon.
        scale: of the picture, where it is known. An abstention from a picture of unknown scale names that first.
        where: `run` or `bench`, which decides the remedy.
        remarks: on the picture, as decoding has left them; they may name a likelier cause.

    Returns:
        Three texts, the last two possibly empty. What is stored otherwise is returned as it is, as a sentence.
    """
    reason = read_reason(reason)
    if not reason:
        return ("No reason was stored.", "", "")
    kind, _, rest = (part.strip() for part in reason.partition(":"))
    if f"{kind}: {rest}" in _REASONS:
        kind, rest = f"{kind}: {rest}", ""
    if kind == "damaged":
        return (f"The file is damaged{f' ({rest})' if rest else ''}.", "Copy or export it again.", "")
    if kind in _OF_SCALE:
        what, so = _OF_SCALE[kind]
        return (what, f"{so} {_REMEDIES[where]}", rest.partition(";")[0])
    if kind not in _REASONS:
        return (sentence(reason), "", "")
    what, remedy = _REASONS[kind]
    if kind == "too dark" and any(_DEPTH in r for r in remarks):
        remedy = _DEPTH_FIRST
    if kind == "out of focus" and scale is not None and scale.small:
        remedy = (
            f"It has only {scale.width_px} × {scale.height_px} px, too few to tell: send the field as the camera "
            "took it. If it is that already, focus again."
        )
    if kind not in _ABSTENTIONS:
        return (what, remedy, rest)
    if scale is not None and scale.guessed:
        return (what, f"{_missing_scale(scale)} {_REMEDIES[where]} {_THEN}", rest)
    return (what, remedy or _stain(scale), rest)


def scale_words(um_per_px: float | None, source: str | None, sd: float | None) -> str:
    """Say what scale an image was judged at and how it is known; empty where nothing is known.

    Args:
        um_per_px: micrometres per pixel in use.
        source: as in the column `um_per_px_source`; None in runs of schema 1 and 2, which knew stated scales alone.
        sd: standard deviation in the same unit, None where it is not known.
    """
    if um_per_px is None:
        return ""
    value = f"{um_per_px:.3f}{f' ± {sd:.3f}' if sd else ''} µm per pixel"
    return {
        str(ScaleSource.METADATA): f"{value}, as the file states",
        str(ScaleSource.RULER): f"{value}, measured on red cells",
        str(ScaleSource.ASSUMED): f"{value}, an assumption",
    }.get(source or "", f"{value}, as stated")


def sentence(text: str) -> str:
    """Write a text as a sentence: with a capital and a full stop."""
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}" if text else ""


def answered_scale_note(guessed: int, answered: int, settings: SegmentSettings) -> str:
    """Say that answers may rest on a wrong size, for want of a scale; empty where none does.

    Args:
        guessed: answers to pictures of unknown scale (`Scale.guessed`).
        answered: all answers.
        settings: of the method.
    """
    if not guessed:
        return ""
    are = "is to a picture" if guessed == 1 else "are to pictures"
    return (
        f"{guessed:,} of {count_of(answered, 'answer')} {are} of another size than the training "
        f"fields ({settings.field_px} px), and without a scale: cells may have been judged at the wrong size. Do not "
        "rely on them"
    )


def scale_note(guessed: int, abstained: int) -> str:
    """Say of a whole run that abstentions may come from a missing scale; empty where none does.

    Args:
        guessed: abstentions from pictures of unknown scale (`Scale.guessed`).
        abstained: all abstentions.
    """
    if not guessed:
        return ""
    return (
        f"{guessed:,} of {count_of(abstained, 'abstention')} "
        f"{'is from a picture' if guessed == 1 else 'are from pictures'} without a scale, neither stated nor told by "
        "red cells. State it: repeat the run with --um-per-px, or with the column um_per_px in the manifest"
    )


def _missing_scale(scale: Scale) -> str:
    return (
        f"The likeliest cause is the missing scale: the picture has {scale.width_px} × {scale.height_px} px, the "
        f"fields that the model learned from have {scale.settings.field_px} × {scale.settings.field_px}, and no "
        "micrometres per pixel were given. So its cells may have been judged at the wrong size."
    )


def _stain(scale: Scale | None) -> str:
    given = scale.um_per_px if scale is not None else None
    how = "measured on red cells" if scale is not None and scale.source == ScaleSource.RULER else "given"
    too = f", or the scale that was {how} ({given:g} µm per pixel)," if given else ""
    return f"Another stain, scanner or tissue{too} may be the cause. Judge the slide by eye."


def _missed(alpha: float) -> str:
    """Say how often sets miss the true class."""
    n = round(1 / alpha) if alpha > 0 else 0
    if n and abs(1 / alpha - n) < 1e-6:
        return f"1 field in {n} has a true class that is not in its set"
    return f"{100 * alpha:g} of 100 fields have a true class that is not in their set"


def _and(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
