"""Cohen's kappa of people and model, and when there is none to speak of."""

from __future__ import annotations

import math

import numpy as np

from leukoflow.tasks.review.frame import Ints

MIN_DECISIONS = 10
"""Decisions from which kappa is given: with fewer, a single one moves it by more than a tenth."""


def no_kappa(confusion: Ints) -> str:
    """Return why there is no kappa of a confusion matrix [4, 4]; empty where there is one.

    Where all predictions, or all decisions, are of one class, kappa is 0 or undefined whatever people decide.
    """
    n = int(confusion.sum())
    if n < MIN_DECISIONS:
        return f"too few decisions ({n} of at least {MIN_DECISIONS})"
    for axis, what in ((1, "predictions"), (0, "decisions")):
        if np.count_nonzero(confusion.sum(axis)) < 2:
            return f"all {what} are of one class"
    return ""


def kappa_of(confusion: Ints) -> tuple[float | None, tuple[float, float] | None]:
    """Return Cohen's kappa of a confusion matrix [4, 4] with its 95 % interval (Fleiss, Cohen and Everitt 1969).

    None where `no_kappa` gives a reason; the interval is None also where all agree, since the formula's width is then
    zero, however few they are.
    """
    if no_kappa(confusion):
        return None, None
    n = int(confusion.sum())
    p = confusion / n
    rows, columns = p.sum(1), p.sum(0)
    seen, chance = float(np.trace(p)), float(rows @ columns)
    kappa = (seen - chance) / (1.0 - chance)
    weights = rows[None, :] + columns[:, None]  # of cell (i, j): share of column class i plus share of row class j
    first = float((np.diag(p) * ((1 - chance) - (rows + columns) * (1 - seen)) ** 2).sum())
    off = p * weights**2
    second = (1 - seen) ** 2 * float(off.sum() - np.trace(off))
    variance = (first + second - (seen * chance - 2 * chance + seen) ** 2) / (n * (1 - chance) ** 4)
    if n == int(np.trace(confusion)):
        return kappa, None
    spread = 1.96 * math.sqrt(max(0.0, variance))
    return kappa, (max(-1.0, kappa - spread), min(1.0, kappa + spread))
