"""Which scale is used: stated, measured or assumed, and when the model must not answer at it."""

from __future__ import annotations

import math

import pytest

from leukoflow.core.method import SegmentSettings
from leukoflow.runs.records import ImageScale, ScaleSource
from leukoflow.tasks.imaging.magnification import Magnification
from leukoflow.tasks.imaging.scale import settle_scale, stated_scale

SETTINGS = SegmentSettings()  # 0.42 µm per pixel
UNKNOWN = Magnification(math.nan, math.nan, 0, 0, "2 round red cells in the image, 3 are needed")


def measured(um_per_px: float, sd: float = 0.08, cells: int = 300, images: int = 20) -> Magnification:
    return Magnification(7.2 / um_per_px, sd, cells, images)


def test_a_measured_scale_is_used_where_none_is_stated() -> None:
    found = settle_scale(None, None, measured(0.19), SETTINGS)
    assert found.um_per_px == pytest.approx(0.19)
    assert (found.source, found.stated, found.doubt, found.remark) == (ScaleSource.RULER, None, "", "")
    assert found.sd == 0.015


@pytest.mark.parametrize("um_per_px", [0.38, 0.42, 0.47])
def test_an_image_is_not_resampled_by_less_than_the_measurement_knows(um_per_px: float) -> None:
    assert settle_scale(None, None, measured(um_per_px), SETTINGS).um_per_px == 0.42


@pytest.mark.parametrize("um_per_px", [0.28, 0.34, 0.52])
def test_another_magnification_is_another_scale(um_per_px: float) -> None:
    assert settle_scale(None, None, measured(um_per_px), SETTINGS).um_per_px == pytest.approx(um_per_px)


def test_without_any_scale_one_is_assumed_and_nothing_answered() -> None:
    found = settle_scale(None, None, UNKNOWN, SETTINGS)
    assert found == ImageScale(doubt="no scale: 2 round red cells in the image, 3 are needed; give um_per_px")
    assert found.source is ScaleSource.ASSUMED
    assert found.known is None


def test_a_stated_scale_is_used_as_it_is() -> None:
    for found in (settle_scale(0.4, None, measured(0.42), SETTINGS), settle_scale(0.4, None, UNKNOWN, SETTINGS)):
        assert found == ImageScale(0.4, ScaleSource.MANIFEST, None, 0.4)
    assert settle_scale(None, 0.25, UNKNOWN, SETTINGS) == ImageScale(0.25, ScaleSource.METADATA, None, 0.25)


def test_a_stated_scale_that_red_cells_contradict_is_said_with_both_numbers() -> None:
    odd = settle_scale(0.3, None, measured(0.39), SETTINGS)
    assert (odd.um_per_px, odd.doubt) == (0.3, "")
    assert odd.remark == "stated scale 0.3 µm per pixel, red cells say 0.39 ± 0.031"
    wrong = settle_scale(0.1, None, measured(0.42), SETTINGS)
    assert wrong.um_per_px == 0.1
    assert wrong.doubt == ("scale contradicted: stated scale 0.1 µm per pixel, red cells say 0.42; check um_per_px")
    of_file = settle_scale(None, 0.1, measured(0.42), SETTINGS)
    assert of_file.doubt.startswith("scale contradicted: the file's scale 0.1 µm per pixel")


def test_the_manifest_goes_before_the_file_and_the_difference_is_said() -> None:
    found = settle_scale(0.5, 0.25, UNKNOWN, SETTINGS)
    assert (found.um_per_px, found.source) == (0.5, ScaleSource.MANIFEST)
    assert found.remark == "stated scale 0.5 µm per pixel, the file says 0.25"
    assert settle_scale(0.25, 0.2504, UNKNOWN, SETTINGS).remark == ""


def test_an_image_that_stands_alone_says_so_and_needs_more_cells_for_an_unusual_scale() -> None:
    usual = settle_scale(None, None, measured(0.4, 0.19, cells=3, images=1), SETTINGS)
    assert (usual.um_per_px, usual.doubt) == (0.42, "")
    assert usual.remark == "scale from the red cells of this image alone"
    odd = settle_scale(None, None, measured(0.2, 0.19, cells=3, images=1), SETTINGS)
    assert odd.doubt.startswith("no scale: 3 round red cells in the image alone, 5 are needed")
    assert settle_scale(None, None, measured(0.2, 0.12, cells=9, images=1), SETTINGS).doubt == ""


def test_where_nothing_was_measured_the_statement_or_an_assumption_stands() -> None:
    assert stated_scale(0.3) == ImageScale(0.3, ScaleSource.MANIFEST, None, 0.3)
    assert stated_scale(None) == ImageScale()
