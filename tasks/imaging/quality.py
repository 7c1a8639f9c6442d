"""Is a field fit for diagnosis? Focus, exposure, saturation, emptiness and stain, each with its value and threshold."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from leukoflow.core.errors import LeukoflowError
from leukoflow.core.method import QualitySettings
from leukoflow.runs.records import Quality

FOREGROUND_DENSITY = 0.25  # natural optical density, summed over the channels, above which a pixel is stained
CLIPPED_BLACK, CLIPPED_WHITE = 4, 251


def assess(rgb: NDArray[np.uint8], settings: QualitySettings) -> Quality:
    """Measure one field and say, in words, why it cannot be diagnosed, if so.

    Focus is the variance of the Laplacian (Pech-Pacheco et al. 2000) of grey values, after a blur of 1 px against
    sensor noise and JPEG blocks. The rest is measured on optical densities against the field's own background.

    Args:
        rgb: uint8 [H, W, 3] at the model's scale, overlays masked.
        settings: thresholds.

    Returns:
        Measurements, and reasons such as "out of focus: 1.8 < 4"; no reasons means fit.

    Raises:
        LeukoflowError: not an RGB image of 8 bits.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or 0 in rgb.shape:
        raise LeukoflowError(f"expected an RGB image uint8 [H, W, 3], got {rgb.dtype} {rgb.shape}: convert it first")
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    # In float: the rounding of a blur in 8 bits alone has a Laplacian of variance 1.7.
    smooth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 1.0)
    _, deviation = cv2.meanStdDev(cv2.Laplacian(smooth, cv2.CV_32F))
    focus = float(deviation[0, 0]) ** 2
    levels = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel() / grey.size
    exposure = float(levels @ np.arange(256)) / 255
    saturated = float(levels[: CLIPPED_BLACK + 1].sum() + levels[CLIPPED_WHITE:].sum())
    foreground, stain, tint = _stain(rgb)
    checks = (
        (exposure < settings.min_exposure, f"too dark: mean lightness {exposure:.2f} < {settings.min_exposure:g}"),
        (exposure > settings.max_exposure, f"too bright: mean lightness {exposure:.3f} > {settings.max_exposure:g}"),
        (saturated > settings.max_saturated, f"clipped pixels: {saturated:.2f} > {settings.max_saturated:g}"),
        (foreground < settings.min_foreground, f"empty: stained share {foreground:.4f} < {settings.min_foreground:g}"),
        (focus < settings.min_focus, f"out of focus: {focus:.1f} < {settings.min_focus:g}"),
        (stain > settings.max_stain, f"colours are not those of a blood stain: {stain:.2f} > {settings.max_stain:g}"),
    )
    return Quality(
        focus, exposure, saturated, foreground, stain, *tint, reasons=tuple(words for failed, words in checks if failed)
    )


def _stain(rgb: NDArray[np.uint8]) -> tuple[float, float, tuple[float, float, float]]:
    """Measure the share of stained pixels, how far their mean hue lies outside that of blood stains, and the stain.

    The hue is that of the summed densities: red and blue relative to green. In Romanowsky stains bluish red cells lie
    near (1.6, 0.4), pinkish ones near (0.3, 0.9), white cells below; grey is (1, 1). Distance 0 is typical, 1 the edge.
    The stain is red over green, blue over green, and the mean density in green.
    """
    height, width = rgb.shape[:2]
    # Averaging first makes grey of colour noise.
    small = cv2.resize(rgb, (max(1, width // 4), max(1, height // 4)), interpolation=cv2.INTER_AREA)
    levels = np.log(np.arange(256, dtype=np.float64) + 1)
    red, green, blue = (
        (np.log(np.percentile(plane, 90) + 1) - levels).astype(np.float32)[plane] for plane in cv2.split(small)
    )
    stained = red + green + blue > FOREGROUND_DENSITY
    share = float(np.mean(stained))
    if share == 0.0:
        return 0.0, 0.0, (0.0, 0.0, 0.0)
    total = max(float(green[stained].sum()), 1e-6)
    r, b = float(red[stained].sum()) / total, float(blue[stained].sum()) / total
    distance = max(0.0, (r + 1.58 * b - 2.2) / 0.2, (r - 1.5) / 0.2, (b - 0.95) / 0.1)
    return share, distance, (r, b, total / float(np.count_nonzero(stained)))
