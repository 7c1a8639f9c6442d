"""An N:C ratio without cytoplasm is none: not shown, not averaged."""

from __future__ import annotations

import numpy as np
import pytest

from leukoflow.tasks.imaging.cytoplasm import is_measured, measured, measured_words, ratio_words


@pytest.mark.parametrize(
    ("ratio", "seen"),
    [
        (1.0, False),
        (0.9999, False),
        (301 / 305, False),
        (0.9501, False),
        (0.9499, True),
        (0.8, True),
        (0.2, True),
        (float("nan"), False),
    ],
)
def test_only_a_mask_with_cytoplasm_was_measured(ratio: float, seen: bool) -> None:
    assert is_measured(np.array([ratio], np.float32)).tolist() == [seen]
    assert measured(ratio) == (ratio if seen else None)


@pytest.mark.parametrize("radius", [5, 9, 20, 39])
def test_the_thinnest_closed_rim_is_a_measurement(radius: int) -> None:
    y, x = np.mgrid[-50:51, -50:51]
    distance = np.hypot(x, y)
    cell, nucleus = (distance <= radius).sum(), (distance <= radius - 1).sum()
    assert is_measured([nucleus / cell]).all()
    assert not is_measured([(cell - 1) / cell]).any()


def test_what_was_not_measured_is_a_dash() -> None:
    assert ratio_words(0.714) == "0.71"
    assert ratio_words(1.0) == ratio_words(None) == "– (cytoplasm not seen)"


def test_the_median_is_over_measured_cells_only() -> None:
    assert measured_words([1.0, 1.0, 0.6, 0.7, 0.8, 1.0]) == "measured in 3 of 6 cells, median 0.70"
    assert measured_words([1.0, 1.0]) == "measured in 0 of 2 cells: cytoplasm not seen"
    assert measured_words([]) == ""
