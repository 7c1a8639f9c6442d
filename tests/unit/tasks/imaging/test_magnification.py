"""Pooling of red cells: images share a magnification where they agree, and are told apart where they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leukoflow.tasks.imaging.magnification import Magnification, Reading, magnify, magnify_alone, read_image

NONE = read_image(np.zeros(0, np.float32))


def cells(seed: int, count: int, px: float, spread: float = 0.08) -> Reading:
    return read_image((px * np.exp(np.random.default_rng(seed).normal(0, spread, count))).astype(np.float32))


def images(count: int, px: float, each: int = 10, first: int = 0) -> list[Reading]:
    return [cells(first + i, each, px) for i in range(count)]


def widths(found: Sequence[Magnification]) -> set[float]:
    return {round(one.px, 1) for one in found if not math.isnan(one.px)}


def test_images_that_agree_share_one_magnification() -> None:
    found = magnify(images(20, 17.0), ["slide:a"] * 10 + ["slide:b"] * 10)
    assert len(widths(found)) == 1
    assert found[0].px == pytest.approx(17, rel=0.04)
    assert found[0].um_per_px == pytest.approx(7.2 / 17, rel=0.04)
    assert found[0].cells == pytest.approx(200, abs=5)
    assert found[0].images == 20
    assert 0.08 <= found[0].sd < 0.09  # what patients differ by stays, however many cells there are
    assert all(one == found[0] for one in found)


def test_debris_weighs_little_beside_cells() -> None:
    found = magnify(
        [read_image(np.concatenate([cells(i, 8, 30).diameters, cells(90 + i, 20, 7).diameters])) for i in range(6)],
        ["f"] * 6,
    )
    assert found[0].px == pytest.approx(30, rel=0.05)


def test_slides_of_two_microscopes_have_each_its_own() -> None:
    found = magnify(images(12, 17.0) + images(12, 34.0, first=50), ["a"] * 12 + ["b"] * 12)
    assert found[0].px == pytest.approx(17, rel=0.05)
    assert found[12].px == pytest.approx(34, rel=0.05)
    assert found[0].images == found[12].images == 12


def test_one_folder_with_pictures_of_two_microscopes_is_split() -> None:
    both = images(20, 17.0) + images(20, 27.0, first=50)
    found = magnify(both, ["folder:x"] * 40)
    assert all(one.px == pytest.approx(17, rel=0.05) for one in found[:20])
    assert all(one.px == pytest.approx(27, rel=0.05) for one in found[20:])


def test_an_image_of_a_mixed_folder_that_does_not_tell_has_none() -> None:
    both = [*images(20, 17.0), *images(20, 27.0, first=50), cells(1, 2, 17.0), NONE]
    found = magnify(both, ["folder:x"] * 42)
    for one in found[40:]:
        assert math.isnan(one.px)
        assert (
            one.doubt == "the images of its slide or folder have red cells of 17 or 28 px, and too few in it tell which"
        )


def test_an_image_that_clearly_differs_from_its_folder_has_none() -> None:
    found = magnify([*images(30, 17.0), cells(99, 12, 40.0)], ["folder:x"] * 31)
    assert math.isnan(found[30].px)
    assert found[30].doubt.startswith("red cells are 41 px wide in the image and 17 px in those of its slide or folder")
    assert not any(math.isnan(one.px) for one in found[:30])
    sure = magnify([*images(30, 17.0), cells(99, 25, 40.0)], ["folder:x"] * 31)[30]  # with many, its own
    assert (sure.px, sure.images) == (pytest.approx(40, rel=0.05), 1)


def test_a_slide_with_few_cells_follows_the_rest_of_its_source() -> None:
    found = magnify([*images(20, 17.0), cells(7, 2, 26.0), cells(8, 3, 24.0)], ["a"] * 20 + ["b"] * 2)
    assert found[20] == found[21] == found[0]


def test_too_few_red_cells_are_said() -> None:
    found = magnify([cells(1, 5, 17.0), cells(2, 3, 17.0)], ["folder:"] * 2)
    assert all(math.isnan(one.px) for one in found)
    assert found[0].doubt == "8 round red cells in the image and those of its slide or folder, 12 are needed"
    assert magnify([], []) == []
    assert math.isnan(magnify([NONE], ["x"])[0].px)


def test_an_image_alone() -> None:
    found = magnify_alone(cells(1, 9, 40.0))
    assert found.px == pytest.approx(40, rel=0.08)
    assert found.images == 1
    assert found.sd > magnify(images(20, 40.0), ["a"] * 20)[0].sd
    assert magnify_alone(cells(1, 1, 40.0)).doubt == "1 round red cell in the image, 3 are needed"
    assert NONE.cells == 0


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(24)), st.integers(0, 2**31))
def test_the_order_of_images_changes_nothing(order: list[int], seed: int) -> None:
    both = images(12, 17.0, first=seed % 1000) + images(12, 30.0, first=seed % 1000 + 50)
    groups = ["a", "b"] * 12
    straight = magnify(both, groups)
    turned = magnify([both[i] for i in order], [groups[i] for i in order])
    for place, i in enumerate(order):
        assert turned[place].doubt == straight[i].doubt
        assert turned[place].px == pytest.approx(straight[i].px, nan_ok=True, rel=1e-12)
