"""Red cells as a ruler: what counts as one, and that its width is right at any magnification."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from leukoflow.tasks.imaging.ruler import MAX_SIDE, measure_red_cells

PINK, VIOLET, PALE = (214, 150, 160), (120, 60, 170), (240, 214, 218)


def smear(side: int) -> NDArray[np.uint8]:
    return np.full((side, side, 3), (247, 246, 244), np.uint8)


def draw(image: NDArray[np.uint8], x: int, y: int, diameter: float, colour: tuple[int, int, int] = PINK) -> None:
    cv2.circle(image, (16 * x, 16 * y), round(8 * diameter), colour, -1, cv2.LINE_AA, 4)


@pytest.mark.parametrize("diameter", [11, 17, 40, 90, 180])
def test_single_cells_are_as_wide_as_they_are_drawn(diameter: int) -> None:
    image = smear(5 * diameter)
    for x, y in ((1, 1), (3, 1), (1, 3), (4, 4)):
        draw(image, x * diameter, y * diameter, diameter)
    found = measure_red_cells(image)
    assert len(found) == 4
    assert np.allclose(found, diameter, rtol=0.03, atol=1.3)


def test_a_pale_centre_is_part_of_its_cell() -> None:
    image = smear(200)
    draw(image, 100, 100, 60)
    draw(image, 100, 100, 26, (247, 246, 244))
    assert measure_red_cells(image) == pytest.approx([60], rel=0.04)


def test_cells_that_touch_or_that_the_edge_cuts_keep_their_width() -> None:
    image = smear(240)
    for x, y in ((60, 60), (108, 60), (150, 160), (230, 200)):  # two touch, one is alone, one is cut behind its centre
        draw(image, x, y, 50)
    found = measure_red_cells(image)
    assert len(found) == 4
    assert np.allclose(found, 50, rtol=0.08)


def test_white_cells_platelets_and_long_cells_are_no_ruler() -> None:
    image = smear(300)
    draw(image, 60, 60, 70, VIOLET)
    cv2.ellipse(image, (200, 80), (60, 18), 30, 0, 360, PINK, -1, cv2.LINE_AA)
    draw(image, 240, 240, 5, VIOLET)
    assert len(measure_red_cells(image)) == 0


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_image_without_anything_has_none(value: int) -> None:
    assert len(measure_red_cells(np.full((64, 80, 3), value, np.uint8))) == 0


def test_noise_has_none() -> None:
    assert len(measure_red_cells(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))) == 0


def test_the_middle_of_a_very_large_image_is_looked_at() -> None:
    image = np.full((64, MAX_SIDE + 400, 3), (247, 246, 244), np.uint8)
    draw(image, 100, 32, 30)
    draw(image, MAX_SIDE // 2 + 200, 32, 20)
    assert measure_red_cells(image) == pytest.approx([20], abs=1.6)


def test_the_same_smear_enlarged_has_cells_that_much_wider() -> None:
    rng = np.random.default_rng(3)
    image = smear(400)
    for x in range(30, 400, 60):
        for y in range(30, 400, 60):
            draw(image, x, y, float(rng.normal(30, 2)), PINK if rng.random() < 0.7 else PALE)
    before = float(np.median(measure_red_cells(image)))
    for factor in (0.6, 1.5, 2.0):
        resized = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        assert float(np.median(measure_red_cells(np.asarray(resized, np.uint8)))) == pytest.approx(
            before * factor, rel=0.05
        )


def test_of_very_many_cells_those_in_the_middle_count_whatever_their_size() -> None:
    """Not the largest of all: a large picture of small cells would seem to be magnified more."""
    rng = np.random.default_rng(4)
    image = smear(1400)
    drawn = {}
    for x in range(20, 1400, 28):
        for y in range(20, 1400, 28):
            drawn[x, y] = float(rng.uniform(14, 22))
            draw(image, x, y, drawn[x, y])
    found = measure_red_cells(image)
    assert 500 < len(found) <= 600
    assert float(np.median(found)) == pytest.approx(float(np.median(list(drawn.values()))), rel=0.06)
