"""What a calibrated confidence means to people: of 100 such answers, how many were right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leukoflow.tasks.review import wording

PROTOCOL, MODEL = "cluster", "leukoflow"


@dataclass(frozen=True, slots=True)
class Frequency:
    """A confidence in words: of 100 answers, how many were right when that was measured, and where it is from."""

    of_100: int
    words: str
    basis: str


def frequency(metrics: Mapping[str, Any], label: str, confidence: float) -> Frequency:
    """Return what a calibrated confidence means: of 100 answers of this confidence, how many were what the label says.

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
