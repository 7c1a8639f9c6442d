"""What exports say of a field: the answer, what it means, and where it comes from."""

from __future__ import annotations

from leukoflow.apps.web.words import Subject, prob
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.report.numbers import shown
from leukoflow.tasks.review.wording import LEANING, NO_ANSWER, class_name, set_words


def headline(subject: Subject) -> str:
    """Return the answer with its confidence, or why there is none."""
    if subject.status == "abstained":
        return NO_ANSWER
    if subject.label is None:
        return f"{subject.status.capitalize()}: {subject.why[0]}"
    return f"{class_name(subject.label)}, confidence {prob(subject.confidence or 0.0)}"


def statements(subject: Subject) -> tuple[str, ...]:
    """Return the sentences below the headline: what confidence and set of an answer mean, else why there is none."""
    if subject.label is not None:
        return tuple(filter(None, (
            subject.shadow, subject.caution, subject.frequency.words if subject.frequency else "",
            set_words(subject.prediction_set, subject.alpha, subject.probabilities),
        )))  # fmt: skip
    if subject.status == "abstained":
        return tuple(filter(None, (subject.shadow, " ".join(filter(None, subject.why[:2])), LEANING)))
    return tuple(filter(None, (subject.shadow, subject.why[1])))


def probabilities(subject: Subject) -> str:
    """Return the probabilities of all classes in one line, empty if there are none."""
    if not subject.probabilities:
        return ""
    each = ", ".join(f"{class_name(c)} {prob(p)}" for c, p in zip(CLASSES, subject.probabilities, strict=True))
    return f"Probabilities: {each}" if subject.label is not None else f"Probabilities, no answer: {each}"


def provenance(subject: Subject) -> str:
    """Return bundle and image with their digests."""
    image = f", image SHA-256 {subject.sha256[:16]}" if subject.sha256 else ""
    return f"leukoflow, bundle {shown(subject.bundle, 60)} {subject.bundle_digest[:16]}{image}"
