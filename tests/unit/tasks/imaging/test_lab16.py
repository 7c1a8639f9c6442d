"""16-bit Lab against scikit-image, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.color import rgb2lab

from leukoflow.tasks.imaging.lab16 import LAB_STEPS, STRIP_PX, from_lab, strips, to_lab


def colours() -> NDArray[np.uint8]:
    """Every 15th level of each channel, all combinations: black, white and the corners of the gamut among them."""
    levels = np.arange(0, 256, 15)
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3).astype(np.uint8)


def test_lab_is_that_of_scikit_image() -> None:
    rgb = colours()
    found = np.asarray(to_lab(rgb))
    assert found.dtype == np.uint16
    lab = (found / LAB_STEPS - (0, 128, 128)) / (2.55, 1, 1)
    difference = np.abs(lab - rgb2lab(rgb))
    assert difference.max() < 0.1  # the primaries differ in their fourth digit
    assert difference.mean() < 0.02


def test_lab_and_back_is_the_same_to_one_grey_level() -> None:
    rgb = colours()
    back = np.empty_like(rgb)
    from_lab(to_lab(rgb), back)
    assert np.abs(back.astype(int) - rgb).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (1000, 700), (3, STRIP_PX + 5)])
def test_strips_cover_each_row_once(shape: tuple[int, int]) -> None:
    pieces = strips(np.zeros((*shape, 3), np.uint8))
    rows = np.concatenate([np.arange(shape[0])[piece] for piece in pieces])
    assert rows.tolist() == list(range(shape[0]))
    assert all(len(range(*p.indices(shape[0]))) * shape[1] <= max(STRIP_PX, shape[1]) for p in pieces)
