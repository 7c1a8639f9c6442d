"""Normalisation against a float64 implementation of the same equations, and overlays on drawn fields."""

from __future__ import annotations

import csv
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from leukoflow.core.errors import LeukoflowError
from leukoflow.core.method import NormalizeSettings
from leukoflow.tasks.imaging.normalize import anchors, clahe, multiscale, normalize, reinhard, zscore
from leukoflow.tasks.imaging.overlays import mask_overlays

ALL_OFF = NormalizeSettings(mask_overlays=False, reinhard=False, clahe=False, multiscale=False)


def draw_field(seed: int = 0, side: int = 224) -> NDArray[np.uint8]:
    """A bright field with bluish red cells, purple white cells and mild noise."""
    rng = np.random.default_rng(seed)
    image = np.full((side, side, 3), (244, 246, 240), np.uint8)
    for _ in range(60):
        x, y = (int(v) for v in rng.integers(0, side, 2))
        cv2.circle(image, (x, y), 8, (178, 190, 214), -1, cv2.LINE_AA)
    for _ in range(6):
        x, y = (int(v) for v in rng.integers(0, side, 2))
        cv2.circle(image, (x, y), 13, (140, 90, 190), -1, cv2.LINE_AA)
    noise = rng.normal(0, 4, image.shape)
    return np.clip(cv2.GaussianBlur(image, (0, 0), 0.8) + noise, 0, 255).astype(np.uint8)


# --- the same equations in float64, without OpenCV ---------------------------------------------------------------

TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
WHITE = np.array([0.950456, 1.0, 1.088754])


def to_lab(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    v = rgb / 255.0
    linear = np.where(v > 0.04045, ((v + 0.055) / 1.055) ** 2.4, v / 12.92)
    t = linear @ TO_XYZ.T / WHITE
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    lab = np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
    return lab * (2.55, 1, 1) + (0, 128, 128)


def to_rgb(lab8: NDArray[np.float64]) -> NDArray[np.uint8]:
    lab8 = lab8.clip(0, 255)
    lab = (lab8 - (0, 128, 128)) / (2.55, 1, 1)
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], axis=-1)
    t = np.where(f > 6 / 29, f**3, (116 * f - 16) * 27 / 24389)
    linear = (t * WHITE @ np.linalg.inv(TO_XYZ).T).clip(0, 1)
    v = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return np.rint(v * 255).clip(0, 255).astype(np.uint8)


def reinhard_reference(
    field: NDArray[np.uint8], lab: NDArray[np.float64], settings: NormalizeSettings
) -> NDArray[np.float64]:
    background, red = anchors(field)
    assert red is not None
    gain = (settings.background[0] - settings.red_lightness) / (background[0] - red)
    return (lab - background) * gain + settings.background


def clahe_reference(lightness: NDArray[np.float64], clip: float, grid: int) -> NDArray[np.float64]:
    bins = np.rint(lightness).clip(0, 255).astype(int)
    side = lightness.shape[0] // grid
    limit = max(1, int(clip * side * side / 256))
    maps = np.empty((grid, grid, 256))
    for j in range(grid):
        for i in range(grid):
            tile = bins[j * side : (j + 1) * side, i * side : (i + 1) * side]
            histogram = np.bincount(tile.ravel(), minlength=256)
            excess = int((histogram - limit).clip(0).sum())
            histogram = np.minimum(histogram, limit) + excess // 256
            rest = excess % 256
            if rest:
                step = max(1, 256 // rest)
                histogram[np.arange(0, 256, step)[:rest]] += 1
            maps[j, i] = np.rint(np.cumsum(histogram) * 255 / (side * side))
    at = (np.arange(lightness.shape[0]) / side - 0.5).clip(0, grid - 1)
    low = at.astype(int)
    high = np.minimum(low + 1, grid - 1)
    w = at - low
    wy, wx = w[:, None], w[None, :]
    pick = lambda rows, columns: maps[rows[:, None], columns[None, :], bins]  # noqa: E731
    return np.asarray(
        (1 - wy) * ((1 - wx) * pick(low, low) + wx * pick(low, high))
        + wy * ((1 - wx) * pick(high, low) + wx * pick(high, high))
    )


def blur_reference(lightness: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    # The kernel of OpenCV's 8-bit blur: 6 sigma wide, rounded to odd.
    radius = (round(sigma * 6 + 1) | 1) // 2
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(lightness, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
        lightness = np.apply_along_axis(np.convolve, axis, padded, kernel, "valid")
    return lightness


def detail_reference(lightness: NDArray[np.float64], amount: float) -> NDArray[np.float64]:
    fine, coarse = blur_reference(lightness, 2), blur_reference(lightness, 4)
    return (lightness + amount * ((lightness - fine) + (fine - coarse) / 2)).clip(0, 255)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "steps", [("reinhard",), ("reinhard", "clahe"), ("multiscale",), ("reinhard", "clahe", "multiscale")]
)
def test_within_one_grey_level_of_float64(seed: int, steps: tuple[str, ...]) -> None:
    field = draw_field(seed)
    settings = ALL_OFF.model_copy(update=dict.fromkeys(steps, True))
    lab = to_lab(field)
    if "reinhard" in steps:
        lab = reinhard_reference(field, lab, settings).clip(0, 255)
    if "clahe" in steps:
        lab[..., 0] = clahe_reference(lab[..., 0], settings.clahe_clip, settings.clahe_grid)
    if "multiscale" in steps:
        lab[..., 0] = detail_reference(lab[..., 0], settings.multiscale_amount)
    difference = np.abs(to_rgb(lab).astype(int) - normalize(field, settings).astype(int))
    assert difference.mean() <= 0.5
    assert np.percentile(difference, 99) <= 2


def test_single_steps_agree_with_the_pass() -> None:
    field = draw_field(4)
    s = NormalizeSettings()
    only = lambda **on: normalize(field, ALL_OFF.model_copy(update=on))  # noqa: E731
    assert np.array_equal(only(reinhard=True), reinhard(field, s.background, s.red_lightness))
    assert np.array_equal(only(clahe=True), clahe(field, s.clahe_clip, s.clahe_grid))
    assert np.array_equal(only(multiscale=True), multiscale(field, s.multiscale_amount))
    assert normalize(field, ALL_OFF) is field


def draw_smear(white_cells: int, tint: float = 1.0) -> NDArray[np.uint8]:
    """Red cells in a grid and as many white ones as wanted, far apart from them."""
    image = np.full((224, 224, 3), (240, 244, 238), np.uint8)
    for y in range(20, 120, 24):
        for x in range(12, 220, 24):
            cv2.circle(image, (x, y), 8, (176, 188, 212), -1, cv2.LINE_AA)
    for i in range(white_cells):
        cv2.circle(image, (20 + 36 * (i % 6), 150 + 36 * (i // 6)), 15, (140, 70, 190), -1, cv2.LINE_AA)
    return np.asarray(image * tint, np.uint8)


def test_anchors_are_those_of_background_and_red_cells() -> None:
    background, red = anchors(draw_smear(4))
    wanted = to_lab(np.array([[(240, 244, 238), (176, 188, 212)]], np.uint8))[0]
    assert background == pytest.approx(wanted[0], abs=1.0)
    assert red == pytest.approx(wanted[1, 0], abs=2.0)


def test_the_number_of_white_cells_does_not_move_the_anchors() -> None:
    few, many = draw_smear(1), draw_smear(12)
    whole = [cv2.cvtColor(i, cv2.COLOR_RGB2LAB).reshape(-1, 3).mean(0) for i in (few, many)]
    assert np.abs(whole[0] - whole[1]).max() > 8
    (a, red_a), (b, red_b) = anchors(few), anchors(many)
    assert red_a is not None
    assert red_b is not None
    assert np.abs(a - b).max() < 1
    assert abs(red_a - red_b) < 1
    s = NormalizeSettings()
    at = (150, 20)  # the middle of the white cell that both have
    first, second = (reinhard(i, s.background, s.red_lightness)[at].astype(int) for i in (few, many))
    assert np.abs(first - second).max() <= 2


def test_reinhard_undoes_the_exposure() -> None:
    s = NormalizeSettings()
    bright, dark = (reinhard(draw_smear(4, tint), s.background, s.red_lightness) for tint in (1.0, 0.85))
    assert np.abs(draw_smear(4).astype(int) - draw_smear(4, 0.85)).mean() > 25
    assert np.abs(bright.astype(int) - dark).mean() < 4


def test_without_red_cells_only_the_background_is_moved() -> None:
    image = np.full((64, 64, 3), (230, 226, 210), np.uint8)
    background, red = anchors(image)
    assert red is None
    out = reinhard(image, (250.0, 128.0, 128.0), 198.0)
    assert np.abs(to_lab(out)[0, 0] - (250, 128, 128)).max() < 1
    assert background == pytest.approx(to_lab(image)[0, 0], abs=0.5)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_blank_field_stays_blank(level: int) -> None:
    out = normalize(np.full((64, 64, 3), level, np.uint8), NormalizeSettings())
    assert out.reshape(-1, 3).std(axis=0).max() == 0


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 500, 3), (37, 41, 3), (224, 224, 3), (500, 300, 3)])
def test_any_size_and_no_change_to_the_input(shape: tuple[int, int, int]) -> None:
    field = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    before = field.copy()
    first = normalize(field, NormalizeSettings())
    assert first.shape == shape
    assert first.dtype == np.uint8
    assert np.array_equal(field, before)
    assert np.array_equal(first, normalize(field, NormalizeSettings()))


@pytest.mark.parametrize(
    "bad",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
)
def test_refuses_what_is_no_rgb_image(bad: NDArray[np.uint8]) -> None:
    with pytest.raises(LeukoflowError, match="expected an RGB image"):
        normalize(bad, NormalizeSettings())


def test_a_mosaic_is_treated_like_its_fields() -> None:
    field = draw_field(7)
    mosaic = np.tile(field, (3, 3, 1))
    settings = NormalizeSettings(multiscale=False, mask_overlays=False)
    middle = normalize(mosaic, settings)[224:448, 224:448]
    # CLAHE's interpolation reaches half a tile of 56 px over the field's own edge.
    inner = np.s_[28:-28, 28:-28]
    difference = np.abs(middle[inner].astype(int) - normalize(field, settings)[inner])
    assert difference.max() <= 2
    assert difference.mean() < 0.1


def test_numpy_memory_is_a_few_images() -> None:
    big = np.tile(draw_field(8), (5, 5, 1))
    tracemalloc.start()
    try:
        normalize(big, NormalizeSettings())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * big.nbytes


# --- overlays ----------------------------------------------------------------------------------------------------


def annotate(field: NDArray[np.uint8], style: str) -> NDArray[np.uint8]:
    """The three styles of burned-in bars, at the bottom right."""
    out = field.copy()
    h, w = out.shape[:2]
    if style == "big":
        out[h - 30 : h - 2, w - 31 :] = 255
        cv2.putText(out, "200", (w - 25, h - 14), cv2.FONT_HERSHEY_PLAIN, 0.6, (0, 0, 0), 1)
        out[h - 9 : h - 7, w - 28 :] = 0
        out[h - 14 : h - 3, w - 29] = 0
        return out
    if style == "small":
        out[h - 18 : h - 7, w - 29 : w - 6] = 254
    colour = np.array((40, 40, 40) if style == "small" else (220, 90, 110), np.uint8)
    for x in range(w - 24, w - 12, 2):
        out[h - 14 : h - 11, x] = colour
    out[h - 11 : h - 7, w - 29] = colour
    return out


@pytest.mark.parametrize("style", ["big", "small", "red"])
@pytest.mark.parametrize("flip", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_overlays_vanish_without_a_trace_of_their_style(style: str, flip: tuple[int, int]) -> None:
    field = draw_field(9)
    out, mask = mask_overlays(annotate(field, style)[:: flip[0], :: flip[1]])
    out, mask = out[:: flip[0], :: flip[1]], mask[:: flip[0], :: flip[1]]
    assert mask.sum() == 34 * 34
    assert mask[-34:, -34:].all()
    assert np.array_equal(out[~mask], field[~mask])
    filled = out[mask]
    assert np.ptp(filled, axis=0).max() == 0
    plain, _ = mask_overlays(annotate(field, "small"))
    assert np.array_equal(filled[0], plain[-1, -1])


def test_overlays_scale_with_the_image() -> None:
    large = cv2.resize(annotate(draw_field(10), "big"), (896, 896), interpolation=cv2.INTER_CUBIC)
    _, mask = mask_overlays(np.asarray(large, np.uint8))
    assert mask[-136:, -136:].all()
    assert mask.sum() == 136 * 136


def test_a_longer_bar_is_followed() -> None:
    field = annotate(draw_field(11), "big")
    field[-30:-2, -80:-31] = 255
    field[-9:-7, -78:-28] = 0
    _, mask = mask_overlays(field)
    assert mask[-9:-7, -78:].all()
    assert not mask[:, :-84].any()


@pytest.mark.parametrize("seed", range(8))
def test_fields_without_overlays_are_left_alone(seed: int) -> None:
    field = draw_field(seed)
    out, mask = mask_overlays(field)
    assert out is field
    assert not mask.any()


def test_dark_specks_everywhere_are_no_overlay() -> None:
    rng = np.random.default_rng(0)
    field = draw_field(12)
    for y, x in rng.integers(2, 222, (400, 2)):
        field[y, x] = 20
    _, mask = mask_overlays(field)
    assert not mask.any()


def test_overlays_on_real_fields(shared_data: Path) -> None:
    import zipfile

    with (shared_data / "all_fields.csv").open() as table:
        keys = [row["image_key"] for row in csv.DictReader(table)][::40]

    def read(archive: zipfile.ZipFile, key: str) -> NDArray[np.uint8]:
        pixels = cv2.imdecode(np.frombuffer(archive.read(key), np.uint8), cv2.IMREAD_COLOR_RGB)
        assert pixels is not None
        return np.asarray(pixels, np.uint8)

    with zipfile.ZipFile(shared_data / "all_fields.zip") as archive:
        masks = [mask_overlays(read(archive, key))[1] for key in keys]
    assert all(mask[-34:, -34:].all() and mask.sum() == 34 * 34 for mask in masks)
    with zipfile.ZipFile(shared_data / "bccd_fields.zip") as archive:
        others = [name for name in archive.namelist() if name.endswith(".jpg")][::8]
        assert not any(mask_overlays(read(archive, name))[1].any() for name in others)


# --- network input -----------------------------------------------------------------------------------------------


def test_zscore() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    out = zscore(images, mean, std)
    assert out.shape == (2, 3, 5, 7)
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    expected = np.moveaxis((images / 255 - mean) / std, -1, -3)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(zscore(images[0], mean, std), out[0])
