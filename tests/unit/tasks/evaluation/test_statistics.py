"""Statistics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from leukoflow.tasks.evaluation.statistics import (
    corrected_resampled_t,
    effect_size,
    holm,
    reliability,
    risk_coverage,
    sensitivity_at_specificity,
    specificity_at_sensitivity,
    wilcoxon_p,
)


def test_corrected_t_enlarges_the_variance() -> None:
    # Mean 2, variance 1; (1/3 + 1/4) * 1 = 7/12.
    value, p = corrected_resampled_t([1.0, 2.0, 3.0], 0.25)
    assert value == pytest.approx(2 / math.sqrt(7 / 12))
    assert p == pytest.approx(0.1199, abs=1e-3)
    plain, _ = corrected_resampled_t([1.0, 2.0, 3.0], 0.0)
    assert plain == pytest.approx(2 / math.sqrt(1 / 3))


def test_equal_differences() -> None:
    assert corrected_resampled_t([0.0, 0.0], 0.25) == (0.0, 1.0)
    assert corrected_resampled_t([-0.1, -0.1], 0.25)[1] == 0.0
    assert wilcoxon_p([0.0, 0.0, 0.0]) == 1.0
    assert wilcoxon_p([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 32)


def test_effect_size() -> None:
    assert effect_size([1.0, 2.0, 3.0]) == pytest.approx(2.0)
    assert effect_size([0.0, 0.0]) == 0.0
    assert effect_size([-1.0, -1.0]) == -99.0


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_reliability_keeps_occupied_bins() -> None:
    found = reliability(np.array([0.91, 0.99, 0.45]), np.array([True, False, True]))
    assert [(b.confidence, b.accuracy, b.fields) for b in found] == [(0.45, 1.0, 1), (pytest.approx(0.95), 0.5, 2)]


def test_risk_grows_with_coverage() -> None:
    confidence = np.linspace(1, 0.5, 20)
    right = np.array([True] * 15 + [False] * 5)
    curve = risk_coverage(confidence, right)
    assert curve[-1] == (1.0, 0.25)
    assert curve[14] == (0.75, 0.0)
    assert curve[15] == (0.8, pytest.approx(1 / 16))


def test_sensitivity_and_specificity() -> None:
    score = np.array([0.1, 0.4, 0.35, 0.8, 0.9])
    positive = np.array([False, False, True, True, True])
    assert sensitivity_at_specificity(score, positive, 1.0) == pytest.approx(2 / 3)
    assert sensitivity_at_specificity(score, positive, 0.5) == 1.0
    assert specificity_at_sensitivity(score, positive, 0.99) == 0.5
    assert specificity_at_sensitivity(score, positive, 0.6) == 1.0
    assert math.isnan(sensitivity_at_specificity(score, np.ones(5, np.bool_), 0.9))
