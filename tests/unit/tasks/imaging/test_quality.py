"""Quality: real fields pass, what is no field is refused in words."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from leukoflow.core.errors import LeukoflowError
from leukoflow.core.geometry import field_geometry
from leukoflow.core.method import QualitySettings, SegmentSettings
from leukoflow.tasks.imaging.quality import assess

SETTINGS = QualitySettings()


def field(red: tuple[int, int, int] = (178, 190, 214), cells: int = 60, side: int = 224) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    image = np.full((side, side, 3), (240, 246, 244), np.uint8)
    for x, y in rng.integers(0, side, (cells, 2)).tolist():
        cv2.circle(image, (x, y), 8, red, -1, cv2.LINE_AA)
    for x, y in rng.integers(0, side, (6, 2)).tolist():
        cv2.circle(image, (x, y), 13, (140, 90, 190), -1, cv2.LINE_AA)
    return np.clip(cv2.GaussianBlur(image, (0, 0), 1.0) + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)


def test_the_stain_is_the_densities_of_what_is_stained() -> None:
    """One half is background of 199, the other has densities ln(200/100), ln(200/50) and ln(200/160)."""
    image = np.full((64, 64, 3), 199, np.uint8)
    image[:, :32] = (99, 49, 159)
    found = assess(image, QualitySettings(max_stain=1e9))
    assert found.foreground == 0.5
    assert found.stain_density == pytest.approx(np.log(4), rel=1e-5)
    assert found.stain_red == pytest.approx(np.log(2) / np.log(4), rel=1e-5)
    assert found.stain_blue == pytest.approx(np.log(1.25) / np.log(4), rel=1e-5)
    blank = assess(np.full((64, 64, 3), 230, np.uint8), SETTINGS)
    assert (blank.stain_red, blank.stain_blue, blank.stain_density) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("red", [(178, 190, 214), (225, 170, 175), (200, 195, 200), (170, 190, 222)])
def test_fields_of_several_stains_pass(red: tuple[int, int, int]) -> None:
    quality = assess(field(red), SETTINGS)
    assert quality.reasons == ()
    assert 0.2 < quality.foreground < 0.7
    assert 0.6 < quality.exposure < 0.97


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((224, 224, 3), np.uint8), "too dark: mean lightness 0.00 < 0.25"),
        (np.full((224, 224, 3), 255, np.uint8), "too bright: mean lightness 1.000 > 0.985"),
        (np.full((224, 224, 3), 230, np.uint8), "empty: stained share 0.0000 < 0.005"),
        (cv2.GaussianBlur(field(), (0, 0), 6), "out of focus"),
        (np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8), "colours are not those of a blood stain"),
        (np.repeat(field()[..., 1:2], 3, axis=2), "colours are not those of a blood stain"),
        (255 - field(), "too dark"),
        (field() // 5, "too dark"),
        (np.where(field()[..., 1:2] > 215, 255, np.zeros(3)).astype(np.uint8), "clipped pixels: 1.00 > 0.9"),
    ],
    ids=["black", "white", "blank", "blurred", "noise", "grey", "negative", "underexposed", "clipped"],
)
def test_what_is_no_field_is_refused_in_words(image: NDArray[np.uint8], reason: str) -> None:
    assert any(words.startswith(reason) for words in assess(np.ascontiguousarray(image), SETTINGS).reasons)


def test_focus_falls_with_blur() -> None:
    sharp = field()
    values = [assess(cv2.GaussianBlur(sharp, (0, 0), sigma), SETTINGS).focus for sigma in (1, 2, 4, 8)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 5 * values[2]


def test_thresholds_are_the_settings_and_reasons_quote_both() -> None:
    quality = assess(field(), SETTINGS)
    strict = SETTINGS.model_copy(update={"min_focus": quality.focus + 1})
    (reason,) = assess(field(), strict).reasons
    assert reason == f"out of focus: {quality.focus:.1f} < {quality.focus + 1:g}"
    lax = QualitySettings(min_focus=0, min_exposure=0, max_exposure=1, max_saturated=1, min_foreground=0, max_stain=1e9)
    assert assess(np.zeros((50, 50, 3), np.uint8), lax).reasons == ()


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 200, 3), (200, 3, 3)])
def test_any_size(shape: tuple[int, int, int]) -> None:
    assert np.isfinite(assess(np.full(shape, 99, np.uint8), SETTINGS).stain)


def test_refuses_what_is_no_rgb_image() -> None:
    with pytest.raises(LeukoflowError, match="expected an RGB image"):
        assess(np.zeros((10, 10), np.uint8), SETTINGS)


def test_real_fields_pass_and_blurred_ones_do_not(shared_data: Path) -> None:
    with (shared_data / "all_fields.csv").open() as table:
        keys = {"all_fields.zip": [row["image_key"] for row in csv.DictReader(table)][::50]}
    for name, step in (("bccd_fields.zip", 12), ("healthy_other_source.zip", 4)):
        with zipfile.ZipFile(shared_data / name) as archive:
            keys[name] = [n for n in archive.namelist() if n.lower().endswith((".jpg", ".png", ".bmp", ".jpeg"))][
                ::step
            ]
    for name, members in keys.items():
        assert members, name
        with zipfile.ZipFile(shared_data / name) as archive:
            for member in members:
                image = cv2.imdecode(np.frombuffer(archive.read(member), np.uint8), cv2.IMREAD_COLOR_RGB)
                assert image is not None
                g = field_geometry(image.shape[1], image.shape[0], None, SegmentSettings())
                small = np.asarray(cv2.resize(image, (g.width, g.height), interpolation=cv2.INTER_AREA), np.uint8)
                assert assess(small, SETTINGS).reasons == (), (name, member)
                blurred = np.asarray(cv2.GaussianBlur(small, (0, 0), 6), np.uint8)
                assert any("out of focus" in words for words in assess(blurred, SETTINGS).reasons), (name, member)
