"""Prepare a field: overlays out, stain and illumination brought to a reference, detail enhanced, z-score.

Between one conversion to 16-bit Lab and one back (`lab16.py`), lightness becomes 8 bits only for CLAHE and for the
blurs of the detail enhancement.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from leukoflow.core.method import NormalizeSettings
from leukoflow.tasks.imaging.lab16 import (
    LAB_STEPS,
    check_rgb,
    from_lab,
    read_lightness,
    strips,
    to_lab,
    write_lightness,
)
from leukoflow.tasks.imaging.overlays import FIELD_PX, mask_overlays
from leukoflow.tasks.imaging.stain import white_cell_signal

MIN_GAIN, MAX_GAIN = 0.5, 1.15  # of Reinhard's contrast: pale fields, stretched far, leave the gamut as flat dark blue
ANCHOR_PX = 448  # longer side of the image on which the anchors are measured
WHITE_SIGNAL = 0.06  # of `white_cell_signal`, above which a pixel is no anchor
MIN_ANCHOR_SHARE = 0.01
DETAIL_SIGMAS_PX = (2.0, 4.0)


def reinhard(rgb: NDArray[np.uint8], background: Sequence[float], red_lightness: float) -> NDArray[np.uint8]:
    """Transfer colour in Lab after Reinhard et al. (IEEE CG&A 2001), anchored to background and red cells.

    The original matches mean and deviation over all pixels, so the colour of a white cell would depend on how many of
    them share its field. Every smear has background and red cells: these two are brought to the reference, and white
    cells follow.

    Args:
        rgb: uint8 [H, W, 3].
        background: wanted L, a and b of the background in OpenCV's 8-bit units.
        red_lightness: wanted lightness of red cells, same units.

    Returns:
        uint8 [H, W, 3].
    """
    return _adjust(rgb, reference=(background, red_lightness))


def anchors(rgb: NDArray[np.uint8]) -> tuple[NDArray[np.float64], float | None]:
    """Measure the background's median Lab, float64 [3], and red cells' median lightness, None where hardly any are.

    White cells are left out by their stain. What remains is split by Otsu's threshold (1979) on grey values. Units are
    those of 8-bit Lab.
    """
    check_rgb(rgb)
    height, width = rgb.shape[:2]
    scale = min(0.5, ANCHOR_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
    white = cv2.dilate(np.asarray(white_cell_signal(small) > WHITE_SIGNAL, np.uint8), np.ones((3, 3), np.uint8)) > 0
    grey = np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)
    lab = np.asarray(to_lab(small))
    rest = ~white
    if rest.mean() < MIN_ANCHOR_SHARE:  # nothing but white cells: their brightest pixels must do
        rest = np.ones(grey.shape, np.bool_)
    cut, _ = cv2.threshold(grey[rest].reshape(-1, 1), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    bright, dark = rest & (grey > cut), rest & (grey <= cut)
    if not bright.any():  # a single grey value
        bright, dark = rest, ~rest & False
    background = np.median(lab[bright], axis=0) / LAB_STEPS
    if dark.mean() < MIN_ANCHOR_SHARE:
        return background, None
    return background, float(np.median(lab[..., 0][dark])) / LAB_STEPS


def clahe(rgb: NDArray[np.uint8], clip: float, grid: int | tuple[int, int]) -> NDArray[np.uint8]:
    """Equalise Lab lightness, contrast-limited and adaptive (CLAHE, Zuiderveld 1994).

    Args:
        rgb: uint8 [H, W, 3].
        clip: clip limit as a multiple of the uniform histogram.
        grid: tiles per side, or (columns, rows).

    Returns:
        uint8 [H, W, 3].
    """
    return _adjust(rgb, equalisation=(clip, (grid, grid) if isinstance(grid, int) else grid))


def multiscale(rgb: NDArray[np.uint8], amount: float) -> NDArray[np.uint8]:
    """Enhance detail of Lab lightness at several scales (after Kim et al. 2015): add back differences of Gaussians.

    With blurs B2 and B4 (sigma 2 and 4 px) the bands are L - B2 and B2 - B4, weighted 1 and 1/2.

    Args:
        rgb: uint8 [H, W, 3].
        amount: weight of the finest band; 0 leaves the image as it is.

    Returns:
        uint8 [H, W, 3].
    """
    return _adjust(rgb, amount=amount)


def normalize(rgb: NDArray[np.uint8], settings: NormalizeSettings) -> NDArray[np.uint8]:
    """Take all enabled steps with one Lab round trip. A pure function of its arguments.

    CLAHE's tiles keep their size in pixels, so a mosaic is treated like the fields it consists of.

    Args:
        rgb: uint8 [H, W, 3] at the model's scale.
        settings: switches, reference and strengths.

    Returns:
        uint8 [H, W, 3]; the input itself where every step is off.
    """
    check_rgb(rgb)
    if settings.mask_overlays:
        rgb, _ = mask_overlays(rgb)
    tile = FIELD_PX / settings.clahe_grid
    grid = (max(1, round(rgb.shape[1] / tile)), max(1, round(rgb.shape[0] / tile)))
    return _adjust(
        rgb,
        reference=(settings.background, settings.red_lightness) if settings.reinhard else None,
        equalisation=(settings.clahe_clip, grid) if settings.clahe else None,
        amount=settings.multiscale_amount if settings.multiscale else None,
    )


def zscore(rgb: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """Make a network's input: channels first, each channel shifted and scaled.

    Args:
        rgb: uint8 [..., H, W, 3].
        mean: per channel, in units of 0 to 1.
        std: per channel, in units of 0 to 1.

    Returns:
        float32 [..., 3, H, W], C-contiguous.
    """
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    out = np.empty((*rgb.shape[:-3], 3, *rgb.shape[-3:-1]), np.float32)
    for c in range(3):
        table = ((levels - np.float32(mean[c])) / np.float32(std[c])).astype(np.float32)
        out[..., c, :, :] = table[rgb[..., c]]
    return out


def _adjust(
    rgb: NDArray[np.uint8],
    reference: tuple[Sequence[float], float] | None = None,
    equalisation: tuple[float, tuple[int, int]] | None = None,
    amount: float | None = None,
) -> NDArray[np.uint8]:
    """Apply Reinhard, CLAHE and detail enhancement, each if wanted, between one conversion to Lab and one back."""
    check_rgb(rgb)
    if reference is None and equalisation is None and amount is None:
        return rgb
    pieces = strips(rgb)
    transfer = np.eye(3, 4)
    # A field is one strip and is converted once; the strips of a large image are converted again in each pass.
    whole = to_lab(rgb) if len(pieces) == 1 else None
    if reference is not None:
        wanted, red = np.asarray(reference[0], np.float64), reference[1]
        background, dark = anchors(rgb)
        gain = 1.0 if dark is None else (wanted[0] - red) / max(background[0] - dark, 1.0)
        gain = min(max(gain, MIN_GAIN), MAX_GAIN)
        transfer = np.column_stack([np.eye(3) * gain, (wanted - gain * background) * LAB_STEPS])
    if whole is not None:
        whole = cv2.transform(whole, transfer)

    def lab_of(rows: slice) -> cv2.typing.MatLike:
        return cv2.transform(to_lab(rgb[rows]), transfer) if whole is None else whole

    lightness = None
    if equalisation is not None or amount is not None:
        lightness = np.empty(rgb.shape[:2], np.uint8)
        for rows in pieces:
            read_lightness(lab_of(rows), lightness[rows])
        if equalisation is not None:
            clip, tiles = equalisation
            lightness = np.asarray(cv2.createCLAHE(clipLimit=clip, tileGridSize=tiles).apply(lightness), np.uint8)
        if amount is not None:
            lightness = np.asarray(_detail(lightness, amount), np.uint8)
    out = np.empty_like(rgb, order="C")
    for rows in pieces:
        lab = lab_of(rows)
        if lightness is not None:
            write_lightness(lightness[rows], lab)
        from_lab(lab, out[rows])
    return out


def _detail(lightness: cv2.typing.MatLike, amount: float) -> cv2.typing.MatLike:
    # (L - B2) + (B2 - B4) / 2 = L - (B2 + B4) / 2: two blurs and two sums, all in uint8.
    fine, coarse = (cv2.GaussianBlur(lightness, (0, 0), sigma) for sigma in DETAIL_SIGMAS_PX)
    cv2.addWeighted(fine, 0.5, coarse, 0.5, 0.0, dst=fine)
    return cv2.addWeighted(lightness, 1.0 + amount, fine, -amount, 0.0)
