"""What a notebook says of an image, in the words of `tasks.review.wording`: the same for a diagnosis and for a run."""

from __future__ import annotations

from collections.abc import Sequence

from leukoflow.runs.records import Status
from leukoflow.tasks.review.wording import (
    CLASS_CAUTION,
    NO_ANSWER,
    RESEARCH_USE,
    Scale,
    class_name,
    probability,
    reason_words,
    set_words,
)


def headline(status: str, label: str | None, confidence: float | None) -> str:
    """Return the result in one line; a label that the model leant to without answering is never in it."""
    if status == Status.PREDICTED and confidence is not None:
        return f"{class_name(label)}, {probability(confidence)}"
    return NO_ANSWER if status == Status.ABSTAINED else f"No answer: {status}."


def sentences(
    status: str,
    reason: str | None,
    scale: Scale,
    prediction_set: Sequence[str],
    probabilities: Sequence[float],
    alpha: float,
    where: str,
) -> tuple[str, ...]:
    """Return what stands below the headline: caution and prediction set of an answer, else reason and remedy.

    Args:
        status: of the image.
        reason: why there is no answer, as stored; None where there is one.
        scale: what is known of the picture's size.
        prediction_set: classes of the answer's set.
        probabilities: in the order of CLASSES.
        alpha: the miss rate that the set was built for.
        where: `run` or `notebook`, for the remedy.
    """
    if status == Status.PREDICTED:
        said: tuple[str, ...] = (scale.caution, set_words(prediction_set, alpha, probabilities), CLASS_CAUTION)
    else:
        said = reason_words(reason, scale, where) if reason else ()
    return tuple(filter(None, (*said, RESEARCH_USE)))
