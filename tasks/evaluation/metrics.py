"""Measure answers against the truth: accuracy, calibration, coverage, intervals from whole clusters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from leukoflow.tasks.evaluation.statistics import (
    reliability,
    risk_coverage,
    sensitivity_at_specificity,
    specificity_at_sensitivity,
)

RESAMPLES = 1000
BINS = 15
BENIGN = "Benign"
"""The class that is not malignant."""


def expected_calibration_error(probabilities: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    """Return the ECE of the top label over equally wide bins (Guo et al. 2017)."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = [
        (place == b).mean() * abs(right[place == b].mean() - confidence[place == b].mean())
        for b in range(BINS)
        if (place == b).any()
    ]
    return float(sum(gaps))


def auc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve by ranks (Mann and Whitney 1947); NaN where one side is empty."""
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def confusion(predicted: NDArray[np.int64], y: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Count answers, int64 [true class, predicted class]."""
    return np.bincount(y * classes + predicted, minlength=classes**2).reshape(classes, classes)


def point_metrics(probabilities: NDArray[np.float64], y: NDArray[np.int64]) -> dict[str, float]:
    """Return accuracy, macro-F1 and macro one-vs-rest AUC over the classes that occur, MCC (Gorodkin 2004) and ECE."""
    table = confusion(probabilities.argmax(1), y, probabilities.shape[1]).astype(np.float64)
    n, hits, truth, answers = table.sum(), np.trace(table), table.sum(1), table.sum(0)
    occurs = truth > 0
    f1 = 2 * np.diag(table) / np.maximum(truth + answers, 1)
    spread = np.sqrt((n**2 - (answers**2).sum()) * (n**2 - (truth**2).sum()))
    aucs = np.array([auc(probabilities[:, k], y == k) for k in np.flatnonzero(occurs)])
    return {
        "accuracy": float(hits / n),
        "macro_f1": float(f1[occurs].mean()),
        "mcc": float((hits * n - (answers * truth).sum()) / spread) if spread else 0.0,
        "auc_ovr": float(np.nanmean(aucs)) if np.isfinite(aucs).any() else float("nan"),
        "ece": expected_calibration_error(probabilities, y),
    }


def class_metrics(
    probabilities: NDArray[np.float64], y: NDArray[np.int64], classes: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return sensitivity, specificity, AUC and number of fields per class."""
    predicted = probabilities.argmax(1)
    out: dict[str, dict[str, float]] = {}
    for k, name in enumerate(classes):
        own = y == k
        out[name] = {
            "fields": int(own.sum()),
            "sensitivity": float((predicted[own] == k).mean()) if own.any() else float("nan"),
            "specificity": float((predicted[~own] != k).mean()) if (~own).any() else float("nan"),
            "auc": auc(probabilities[:, k], own),
        }
    return out


def cluster_bootstrap(
    statistic: Callable[[NDArray[np.int64]], dict[str, float]], clusters: Sequence[str], seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return 95 % percentile intervals from drawing whole clusters with replacement.

    `statistic` maps row numbers to named values. With few clusters the intervals are wide, which is the truth.
    """
    rng = np.random.default_rng(seed)
    names = sorted(set(clusters))
    members = [np.flatnonzero(np.array(clusters) == name) for name in names]
    draws: dict[str, list[float]] = {}
    for _ in range(RESAMPLES):
        rows = np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])
        for key, value in statistic(rows).items():
            draws.setdefault(key, []).append(value)
    return {
        key: (float(np.nanpercentile(values, 2.5)), float(np.nanpercentile(values, 97.5)))
        for key, values in draws.items()
    }


def per_group(
    probabilities: NDArray[np.float64],
    answered: NDArray[np.bool_],
    y: NDArray[np.int64],
    groups: Sequence[str],
    classes: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Return class, number of fields, accuracy and share answered of each group; rows may repeat fields."""
    right, names = probabilities.argmax(1) == y, np.array(groups)
    return {
        g: {
            "label": classes[int(np.bincount(y[names == g]).argmax())],
            "fields": int((names == g).sum()),
            "accuracy": float(right[names == g].mean()),
            "answered": float(answered[names == g].mean()),
        }
        for g in sorted(set(groups))
    }


def summary(
    probabilities: NDArray[np.float64],
    y: NDArray[np.int64],
    groups: Sequence[str],
    smallest: int,
    classes: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """Sum up the metrics that a baseline has too: JSON-ready.

    Args:
        probabilities: float64 [n, C].
        y: true classes, int64 [n].
        groups: of each field [n]; drawn as a whole for the intervals.
        smallest: least size of a group that may be the worst.
        classes: names [C].
        seed: of the draws.
    """

    def values(rows: NDArray[np.int64]) -> dict[str, float]:
        return point_metrics(probabilities[rows], y[rows])

    table = per_group(probabilities, np.ones(len(y), np.bool_), y, groups, classes)
    large = {name: row for name, row in table.items() if row["fields"] >= smallest} or table
    worst = min(sorted(large), key=lambda name: float(large[name]["accuracy"]))
    return {
        "fields": len(y),
        **point_metrics(probabilities, y),
        "intervals_95": cluster_bootstrap(values, groups, seed),
        "per_group": table,
        "worst_group": {"group": worst, "accuracy": large[worst]["accuracy"], "fields": large[worst]["fields"]},
    }


def full_summary(
    probabilities: NDArray[np.float64],
    sets: NDArray[np.bool_],
    reasons: Sequence[str],
    y: NDArray[np.int64],
    groups: Sequence[str],
    smallest: int,
    classes: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """Sum up all metrics of answers out of fold: JSON-ready. Fields that were abstained from count like the others."""
    answered = np.array([not r for r in reasons], np.bool_)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    inside = sets[np.arange(len(y)), y]
    kinds = [r.split(":")[0] for r in reasons if r]
    malignant, score = y != classes.index(BENIGN), 1 - probabilities[:, classes.index(BENIGN)]
    return {
        **summary(probabilities, y, groups, smallest, classes, seed),
        "per_group": per_group(probabilities, answered, y, groups, classes),
        "per_class": class_metrics(probabilities, y, classes),
        "malignant": {
            "sensitivity_at_specificity_0.95": sensitivity_at_specificity(score, malignant, 0.95),
            "sensitivity_at_specificity_0.99": sensitivity_at_specificity(score, malignant, 0.99),
            "specificity_at_sensitivity_0.99": specificity_at_sensitivity(score, malignant, 0.99),
        },
        "reliability": [asdict(b) for b in reliability(confidence, right)],
        "risk_coverage": risk_coverage(confidence, right),
        "confusion": confusion(probabilities.argmax(1), y, len(classes)).tolist(),
        "coverage": float(inside.mean()),
        "coverage_per_class": {name: float(inside[y == k].mean()) for k, name in enumerate(classes) if (y == k).any()},
        "mean_set_size": float(sets.sum(1).mean()),
        "abstention_rate": float(1 - answered.mean()),
        "abstained": {k: kinds.count(k) for k in sorted(set(kinds))},
        "accuracy_answered": float(right[answered].mean()) if answered.any() else None,
        "accuracy_abstention_is_error": float((right & answered).mean()),
    }
