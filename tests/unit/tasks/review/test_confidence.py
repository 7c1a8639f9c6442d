"""Confidence as a frequency."""

from __future__ import annotations

from typing import Any

from leukoflow.tasks.review.confidence import frequency


def _metrics(**measured: Any) -> dict[str, Any]:
    return {"protocols": {"cluster": {"models": {"leukoflow": {"fields": 1000, **measured}}}}}


def test_confidence_as_a_frequency() -> None:
    counted = frequency(
        _metrics(ece=0.02, reliability=[
            {"confidence": 0.55, "accuracy": 0.4, "fields": 50}, {"confidence": 0.97, "accuracy": 0.93, "fields": 500},
        ]), "Early", 0.99,
    )  # fmt: skip
    assert counted.of_100 == 93
    assert counted.words == (
        "Early Pre-B: of 100 answers with about this confidence, about 93 were right when that was counted."
    )
    assert "500 answers" in counted.basis
    derived = frequency(_metrics(ece=0.0176), "Pro", 0.93)
    assert derived.of_100 == 93
    assert derived.words == (
        "Pro-B: of 100 answers with this confidence, about 93 should be right. That is calibrated, not counted."
    )
    assert derived.basis == (
        "over all confidences, abstained fields included, they were off by 1.8 of 100 on average, measured on fields "
        "of clusters that the classifier had not seen (1,000 fields)"
    )
    assert frequency(_metrics(ece=0.0176), "Pro", 1.0).of_100 == 99
    unknown = frequency({}, "Pro", 0.93)
    assert unknown.of_100 == 93
    assert "not known" in unknown.words
    assert "never measured" in unknown.basis
