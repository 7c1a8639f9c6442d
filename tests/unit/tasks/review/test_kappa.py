"""Kappa against an independent reference."""

from __future__ import annotations

import numpy as np
import pytest

from leukoflow.tasks.review.kappa import kappa_of


def test_kappa_and_its_interval_against_a_reference() -> None:
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 4000)
    said = np.where(rng.random(4000) < 0.7, truth, rng.integers(0, 4, 4000))
    confusion = np.zeros((4, 4), np.int64)
    np.add.at(confusion, (truth, said), 1)
    kappa, interval = kappa_of(confusion)
    assert kappa == pytest.approx(cohen_kappa_score(truth, said))
    assert interval is not None
    draws = []
    for _ in range(300):
        pick = rng.integers(0, 4000, 4000)
        draws.append(cohen_kappa_score(truth[pick], said[pick]))
    assert (interval[1] - interval[0]) / 2 == pytest.approx(1.96 * np.std(draws), rel=0.15)
