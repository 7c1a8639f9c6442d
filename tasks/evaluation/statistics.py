"""Statistics of evaluations: paired tests over resampled folds, calibration and selective prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student
from scipy.stats import wilcoxon

LARGEST_EFFECT = 99.0  # JSON knows no infinity
POINTS = 20  # of the curve of risk against coverage


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Mean confidence and accuracy of the fields whose confidence lies in one bin."""

    confidence: float
    accuracy: float
    fields: int


def corrected_resampled_t(differences: Sequence[float] | NDArray[np.float64], ratio: float) -> tuple[float, float]:
    """Return t and two-sided p of a mean difference over repeated folds (Nadeau and Bengio 2003).

    Training sets of different folds overlap, which the plain paired t-test ignores; the variance is enlarged by the
    ratio of test to training fields (Bouckaert and Frank 2004). Equal differences give p 1 where they are zero and 0
    where they are not.

    Args:
        differences: of paired scores, one for each fold of each repeat.
        ratio: test fields over training fields, 1/4 for five folds.
    """
    d = np.asarray(differences, np.float64)
    n = len(d)
    if n < 2 or np.ptp(d) == 0:
        same = n < 2 or d[0] == 0
        return (0.0, 1.0) if same else (float(np.sign(d[0])) * LARGEST_EFFECT, 0.0)
    value = float(d.mean() / np.sqrt((1 / n + ratio) * d.var(ddof=1)))
    return value, float(2 * student.sf(abs(value), n - 1))


def wilcoxon_p(differences: Sequence[float] | NDArray[np.float64]) -> float:
    """Return two-sided p of Wilcoxon's signed-rank test (1945); 1 where all differences are zero."""
    d = np.asarray(differences, np.float64)
    return float(wilcoxon(d).pvalue) if np.any(d != 0) else 1.0


def effect_size(differences: Sequence[float] | NDArray[np.float64]) -> float:
    """Return Cohen's d of paired differences, mean over deviation; 0 where all are zero."""
    d = np.asarray(differences, np.float64)
    mean, spread = float(d.mean()), float(d.std(ddof=1)) if len(d) > 1 else 0.0
    if spread == 0:
        return float(np.sign(mean)) * LARGEST_EFFECT
    return float(np.clip(mean / spread, -LARGEST_EFFECT, LARGEST_EFFECT))


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), in the order given."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate((len(values) - np.arange(len(values))) * values[order])
    out = np.empty(len(values))
    out[order] = np.minimum(stepped, 1.0)
    return [float(v) for v in out]


def reliability(confidence: NDArray[np.float64], right: NDArray[np.bool_], bins: int = 10) -> list[ReliabilityBin]:
    """Return the occupied bins of equal width, by confidence."""
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    out = []
    for b in range(bins):
        own = place == b
        if own.any():
            out.append(ReliabilityBin(float(confidence[own].mean()), float(right[own].mean()), int(own.sum())))
    return out


def risk_coverage(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Return error rates among the most confident share of fields, up to 1 (El-Yaniv and Wiener 2010)."""
    order = np.argsort(-confidence, kind="stable")
    errors = np.cumsum(~right[order])
    out = []
    for i in range(1, POINTS + 1):
        count = max(1, round(len(order) * i / POINTS))
        out.append((count / len(order), float(errors[count - 1]) / count))
    return out


def sensitivity_at_specificity(score: NDArray[np.float64], positive: NDArray[np.bool_], specificity: float) -> float:
    """Return the largest sensitivity of a threshold whose specificity is at least the wanted one; NaN if one-sided."""
    if not positive.any() or positive.all():
        return float("nan")
    best = 0.0
    for cut in np.append(np.unique(score), np.inf):
        said = score >= cut
        if (~said[~positive]).mean() >= specificity:
            best = max(best, float(said[positive].mean()))
    return best


def specificity_at_sensitivity(score: NDArray[np.float64], positive: NDArray[np.bool_], sensitivity: float) -> float:
    """Return the largest specificity of a threshold whose sensitivity is at least the wanted one; NaN if one-sided."""
    return sensitivity_at_specificity(-score, ~positive, sensitivity)
