"""Metrics against literals and independent implementations."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef, roc_auc_score

from leukoflow.runs.records import CLASSES
from leukoflow.tasks.evaluation.metrics import (
    auc,
    cluster_bootstrap,
    expected_calibration_error,
    full_summary,
    point_metrics,
    summary,
)


def test_calibration_error_literal() -> None:
    p = np.array([[0.8, 0.2, 0, 0]] * 10)
    assert expected_calibration_error(p, np.array([0] * 8 + [1] * 2)) == pytest.approx(0.0)
    assert expected_calibration_error(p, np.zeros(10, np.int64)) == pytest.approx(0.2)


def test_point_metrics_literal() -> None:
    p = np.eye(4)[[0, 0, 1, 1]] * 0.7 + 0.075
    found = point_metrics(p, np.array([0, 0, 1, 0]))
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["mcc"] == pytest.approx(np.sqrt(1 / 3))
    assert found["auc_ovr"] == pytest.approx(5 / 6)


def test_point_metrics_agree_with_an_independent_implementation() -> None:
    rng = np.random.default_rng(0)
    p, y = np.round(rng.dirichlet(np.ones(4), 200), 2), rng.integers(0, 4, 200)
    found = point_metrics(p, y)
    assert found["macro_f1"] == pytest.approx(f1_score(y, p.argmax(1), average="macro"))
    assert found["mcc"] == pytest.approx(matthews_corrcoef(y, p.argmax(1)))
    assert found["auc_ovr"] == pytest.approx(np.mean([roc_auc_score(y == k, p[:, k]) for k in range(4)]))
    assert np.isnan(auc(p[:, 0], np.zeros(200, np.bool_)))


def test_bootstrap_draws_clusters() -> None:
    value = np.array([0.0] * 10 + [1.0] * 30)
    clusters = ["a"] * 10 + ["b"] * 30
    low, high = cluster_bootstrap(lambda rows: {"mean": float(value[rows].mean())}, clusters)["mean"]
    assert (low, high) == (0.0, 1.0)


def test_summary_names_the_worst_group_and_counts_abstentions() -> None:
    y = np.array([0, 0, 1, 1, 2, 3])
    p = np.full((6, 4), 0.1)
    p[np.arange(6), [0, 0, 1, 0, 2, 3]] = 0.7
    sets = p > 0.5
    sets[3, 1] = True
    reasons = ["", "", "", "ambiguous: 1 < 2", "", ""]
    found = full_summary(p, sets, reasons, y, ["a", "a", "b", "b", "c", "d"], 2, CLASSES)
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["worst_group"] == {"group": "b", "accuracy": 0.5, "fields": 2}
    assert found["per_group"]["b"] == {"label": "Early", "fields": 2, "accuracy": 0.5, "answered": 0.5}
    assert found["abstained"] == {"ambiguous": 1}
    assert found["accuracy_answered"] == 1.0
    assert found["accuracy_abstention_is_error"] == pytest.approx(5 / 6)
    assert found["coverage"] == 1.0
    assert found["mean_set_size"] == pytest.approx(7 / 6)
    assert found["confusion"][1] == [1, 1, 0, 0]
    assert found["per_class"]["Early"]["sensitivity"] == 0.5
    assert found["malignant"]["specificity_at_sensitivity_0.99"] == 0.0
    assert found["malignant"]["sensitivity_at_specificity_0.95"] == pytest.approx(3 / 4)


def test_a_small_group_is_not_the_worst() -> None:
    y = np.array([0, 0, 0, 1])
    p = np.eye(4)[[0, 0, 1, 0]] * 0.8 + 0.05
    assert summary(p, y, ["a", "a", "a", "b"], 2, CLASSES)["worst_group"]["group"] == "a"
    assert summary(p, y, ["a", "a", "a", "b"], 1, CLASSES)["worst_group"]["group"] == "b"
