"""The drawing of a field."""

from __future__ import annotations

import numpy as np

from leukoflow.tasks.report.overlay import outline


def test_an_outline_encloses_its_cell() -> None:
    mask = np.zeros((9, 9), bool)
    mask[2:6, 3:8] = True
    assert outline(mask) == "M3.5 2.5L3.5 5.5L7.5 5.5L7.5 2.5Z"
