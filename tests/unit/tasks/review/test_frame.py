"""The fields of a run as arrays."""

from __future__ import annotations

import numpy as np
import pytest

from leukoflow.tasks.review.frame import entropy


def test_entropy() -> None:
    found = entropy(np.array([[1.0, 0, 0, 0], [0.25] * 4, [np.nan] * 4]))
    assert found[:2] == pytest.approx([0.0, 1.0], abs=1e-9)
    assert np.isnan(found[2])
