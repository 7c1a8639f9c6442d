"""Feature selection: minimum redundancy, maximum relevance (mRMR)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from leukoflow.core.errors import LeukoflowError

MIN_CORRELATION = 0.001  # floor of |r| in the quotient, or one orthogonal column would get an infinite score
BLOCK = 128  # columns whose correlations are computed at once
CACHE_BYTES = 256 * 2**20
CONSTANT = 1e-20  # a column whose variance is below this share of its mean square carries rounding only


def mrmr(
    x: NDArray[np.floating], y: NDArray[np.integer], k: int, scheme: Literal["fcq", "fcd"] = "fcq"
) -> NDArray[np.int64]:
    """Choose `k` columns by relevance to the class against redundancy with those already chosen.

    Relevance is the F statistic, redundancy the mean |Pearson r| with the chosen columns; the score is their quotient
    ("fcq") or difference ("fcd"). Ding and Peng (2005); names of the schemes as in Zhao et al. (2019). Exact and
    incremental: a running sum of |r| gains one row of the correlation matrix per pick. Rows come from blocked matrix
    products over the columns most likely to be chosen next, and are kept within `CACHE_BYTES`, so the whole matrix
    never needs to exist. Constant columns are chosen last. Ties go to the lowest index.

    Args:
        x: float [n, d], finite.
        y: int [n], class of each row.
        k: how many columns, 1 to d.
        scheme: "fcq" or "fcd".

    Returns:
        int64 [k], columns in the order of choice.

    Raises:
        LeukoflowError: shapes do not fit, k out of range, unknown scheme, fewer than two classes, values not finite.
    """
    if scheme not in ("fcq", "fcd"):
        raise LeukoflowError(f'unknown mRMR scheme "{scheme}": use "fcq" or "fcd"')
    if x.ndim != 2 or not 1 <= k <= x.shape[1]:
        raise LeukoflowError(f"mRMR cannot choose {k} columns of x {x.shape}: pass x [n, d] and 1 <= k <= d")
    relevance = f_statistic(x, y)
    unit, constant = _unit_columns(x)
    d = len(unit)
    floor = MIN_CORRELATION if scheme == "fcq" else 0.0
    redundancy = np.zeros(d)
    score = relevance.copy()
    last = np.finfo(np.float64).min
    score[constant] = last
    rows: dict[int, NDArray[np.float64]] = {}
    most_rows = max(BLOCK, CACHE_BYTES // (8 * d))
    taken = np.zeros(d, np.bool_)
    chosen = np.empty(k, np.int64)
    for i in range(k):
        pick = int(np.argmax(score))
        chosen[i] = pick
        taken[pick] = True
        if i + 1 == k:
            break
        if pick not in rows:
            if len(rows) + BLOCK > most_rows:
                rows.clear()
            rows.update(_correlations(unit, _likely(score, pick, rows), floor))
        redundancy += rows.pop(pick)
        mean = redundancy / (i + 1)
        score = relevance / mean if scheme == "fcq" else relevance - mean
        score[constant] = last
        score[taken] = -np.inf
    return chosen


def f_statistic(x: NDArray[np.floating], y: NDArray[np.integer]) -> NDArray[np.float64]:
    """Compute the one-way analysis of variance of every column against the class: float64 [d]; constant columns get 0.

    A column that separates the classes perfectly gets a huge, finite value.

    Raises:
        LeukoflowError: shapes do not fit, fewer than two classes, as many classes as rows, values not finite.
    """
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise LeukoflowError(f"features {x.shape} and labels {y.shape} do not fit: pass x [n, d] and y [n]")
    if not np.isfinite(x).all():
        raise LeukoflowError("features hold NaN or infinite values: drop those rows or columns first")
    _, group = np.unique(y, return_inverse=True)
    counts = np.bincount(group)
    if not 2 <= len(counts) < len(group):
        raise LeukoflowError(
            f"{len(counts)} classes in {len(group)} rows: the F statistic needs two classes or more, "
            "and more rows than classes"
        )
    values, constant = _centred(x)
    total = np.einsum("ij,ij->i", values, values)
    between = np.zeros(len(values))
    for g, count in enumerate(counts):
        between += values[:, group == g].sum(axis=1) ** 2 / count
    within = np.maximum(total - between, 1e-12 * total)
    f = np.zeros(len(values))
    np.divide(between * (len(group) - len(counts)), within * (len(counts) - 1), out=f, where=~constant)
    return f


def _centred(x: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return columns as rows, float64 [d, n], minus their means; and which of them are constant but for rounding."""
    values = np.array(x.T, dtype=np.float64, order="C")
    square = np.einsum("ij,ij->i", values, values)
    values -= values.mean(axis=1, keepdims=True)
    return values, np.asarray(np.einsum("ij,ij->i", values, values) <= CONSTANT * square, np.bool_)


def _unit_columns(x: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return centred columns as rows of length 1, constant ones as zeros: their products are Pearson correlations."""
    values, constant = _centred(x)
    values[constant] = 0.0
    norm = np.sqrt(np.einsum("ij,ij->i", values, values))
    values /= np.where(constant, 1.0, norm)[:, None]
    return values, constant


def _likely(score: NDArray[np.float64], pick: int, rows: dict[int, NDArray[np.float64]]) -> NDArray[np.int64]:
    """Return the pick and the best scored columns beside it whose correlations are not known yet."""
    masked = score.copy()
    masked[[pick, *rows]] = -np.inf
    size = min(BLOCK, len(score)) - 1
    best = np.argpartition(-masked, size)[:size] if size < len(score) - 1 else np.arange(len(score))
    return np.asarray([pick, *best[np.isfinite(masked[best])]], np.int64)


def _correlations(
    unit: NDArray[np.float64], columns: NDArray[np.int64], floor: float
) -> dict[int, NDArray[np.float64]]:
    block = np.abs(unit[columns] @ unit.T)
    np.maximum(block, floor, out=block)
    # Copies, since a view of one row would keep its whole block alive.
    return {int(column): block[i].copy() for i, column in enumerate(columns)}
