"""Images changed on purpose: does the model look at cells, or at how the field was photographed? How robust is it?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from leukoflow.tasks.imaging.overlays import mask_overlays

Image = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Degradation:
    """One kind of damage at one severity, 1 mildest."""

    kind: str
    severity: int
    value: str
    apply: Callable[[Image], Image]


def moved_bar(rgb: Image) -> Image:
    """Move the scale bar, if there is one, from its corner to the top left one."""
    clean, painted = mask_overlays(rgb)
    if not painted.any():
        return rgb
    ys, xs = np.nonzero(painted)
    bar = rgb[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    out = clean.copy()
    out[: bar.shape[0], : bar.shape[1]] = bar
    return out


def pasted_bar(rgb: Image, donor: Image) -> Image:
    """Paste the donor's scale bar instead of the image's own; both uint8 [H, W, 3] of one size."""
    clean, _ = mask_overlays(rgb)
    _, painted = mask_overlays(donor)
    out = clean.copy()
    out[painted] = donor[painted]
    return out


def colours_of(rgb: Image, donor: Image) -> Image:
    """Give the image mean and deviation of the donor's Lab channels (Reinhard et al. 2001, over all pixels)."""
    own, other = (cv2.cvtColor(i, cv2.COLOR_RGB2LAB).astype(np.float32) for i in (rgb, donor))
    gain = other.std((0, 1)) / np.maximum(own.std((0, 1)), 1.0)
    lab = (own - own.mean((0, 1))) * gain + other.mean((0, 1))
    return np.asarray(cv2.cvtColor(np.clip(lab, 0, 255).astype(np.uint8), cv2.COLOR_LAB2RGB), np.uint8)


def painted_out(rgb: Image, cells: NDArray[np.bool_]) -> Image:
    """Replace white cells by what surrounds them (Telea 2004); `cells` bool [H, W]."""
    mask = cv2.dilate(cells.astype(np.uint8), np.ones((7, 7), np.uint8))
    return np.asarray(cv2.inpaint(rgb, mask, 3, cv2.INPAINT_TELEA), np.uint8)


def cells_only(rgb: Image, cells: NDArray[np.bool_]) -> Image:
    """Paint everything but white cells, red cells included, in the median colour of the brighter half."""
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    background = np.median(rgb[grey >= np.median(grey)], axis=0)
    keep = cv2.dilate(cells.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return np.where(keep[..., None], rgb, background.astype(np.uint8))


def _blur(sigma: float) -> Callable[[Image], Image]:
    return lambda rgb: np.asarray(cv2.GaussianBlur(rgb, (0, 0), sigma), np.uint8)


def _jpeg(quality: float) -> Callable[[Image], Image]:
    def apply(rgb: Image) -> Image:
        data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, int(quality)])[1]
        return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB), np.uint8)

    return apply


def _stain(amount: float) -> Callable[[Image], Image]:
    # Optical densities of red up and of blue down, as with more azure and less eosin.
    gains = np.array([1 + amount, 1.0, 1 - amount])

    def apply(rgb: Image) -> Image:
        return np.asarray(255 * (np.maximum(rgb, 1) / 255.0) ** gains, np.uint8)

    return apply


def _exposure(factor: float) -> Callable[[Image], Image]:
    return lambda rgb: np.clip(rgb * factor, 0, 255).astype(np.uint8)


def _scale(factor: float) -> Callable[[Image], Image]:
    def apply(rgb: Image) -> Image:
        height, width = rgb.shape[:2]
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), 0, factor)
        way = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        return np.asarray(cv2.warpAffine(rgb, matrix, (width, height), flags=way, borderMode=cv2.BORDER_REFLECT_101))

    return apply


DEGRADATIONS = tuple(
    Degradation(kind, severity, words.format(value), make(value))
    for kind, words, make, values in (
        ("blur", "sigma {} px", _blur, (0.7, 1.2, 2.0)),
        ("JPEG", "quality {}", _jpeg, (60, 30, 12)),
        ("stain", "densities of red and blue by {}", _stain, (0.1, 0.2, 0.4)),
        ("exposure", "times {}", _exposure, (0.9, 0.8, 0.65)),
        ("scale", "times {}", _scale, (1.1, 1.25, 1.5)),
    )
    for severity, value in enumerate(values, start=1)
)
