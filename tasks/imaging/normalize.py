"""Preparation of a field: overlays out, stain and illumination brought to a reference, detail enhanced, z-score.

Lab is kept in 16 bits, 256 steps per unit of OpenCV's 8-bit Lab (L in 0..255, a and b offset by 128): rounding to 8
bits before the contrast is stretched would show. In cube roots of X, Y and Z both Lab and Reinhard's transfer are
affine, so a field crosses to Lab and back with tables and matrix products, in strips, never as floats. Lightness
becomes 8 bits only for CLAHE and for the blurs of the detail enhancement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from leukoflow.core.errors import LeukoflowError
from leukoflow.core.method import NormalizeSettings
from leukoflow.tasks.imaging.segment import white_cell_signal

FIELD_PX = 224
"""Side of the training fields; lengths below are in their pixels."""

OVERLAY_ZONE_PX = 34  # corner square that holds every burned-in scale bar of the training fields
OVERLAY_REACH_PX = 112  # a longer bar is followed this far along the edge
OVERLAY_MIN_GLYPH_PX = 6
OVERLAY_MIN_COLUMNS = 5  # text and bars are wide; a speck is not
GLYPH_RED, GLYPH_REDDER = 5, 20  # half the excess of red over green and blue: at all, and over the surroundings
OVERLAY_GAP_PX = 8
OVERLAY_MIN_CONTRAST = 10.0  # density of glyph pixels in the corner against the rest of the image
MIN_GAIN, MAX_GAIN = 0.5, 1.15  # of Reinhard's contrast: pale fields, stretched far, leave the gamut as flat dark blue
ANCHOR_PX = 448  # longer side of the image on which the anchors are measured
WHITE_SIGNAL = 0.06  # of `white_cell_signal`, above which a pixel is no anchor
MIN_ANCHOR_SHARE = 0.01
DETAIL_SIGMAS_PX = (2.0, 4.0)
STRIP_PX = 2**18  # an image is converted in strips of about so many pixels

LAB_STEPS = 256.0  # per unit of 8-bit Lab
ROOT_STEPS = 40000.0  # per unit of a cube root; roots stay below 1.6
LINEAR_STEPS = 65535.0
BACK_STEPS = 30000.0  # per unit of X, Y, Z on the way back, where they may reach 2.1

_T = TypeVar("_T", bound=np.generic)


def mask_overlays(rgb: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Paint over burned-in scale bars and their text in the corners.

    A glyph is thin (top-hat) and near black or red, which hardly any stained structure is at the field's scale; a
    corner counts as annotated where it is much denser in such pixels than the rest of the image. There, one square of
    fixed size is filled with the local background whatever the bar's style, since the style follows the laboratory and
    with it the class. A longer bar widens the square.

    Args:
        rgb: uint8 [H, W, 3].

    Returns:
        The image (the same array where nothing was found) and bool [H, W], true where pixels were replaced.
    """
    _check_rgb(rgb)
    height, width = rgb.shape[:2]
    painted = np.zeros((height, width), np.bool_)
    scale = max(height, width) / FIELD_PX
    small = rgb
    if scale > 1.25:
        size = (max(1, round(width / scale)), max(1, round(height / scale)))
        small = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
    else:
        scale = 1.0
    glyphs = _glyphs(small)
    total = int(np.count_nonzero(glyphs))
    h, w = glyphs.shape
    zone = min(OVERLAY_ZONE_PX, h // 2, w // 2)
    if total < OVERLAY_MIN_GLYPH_PX or zone < 8:
        return rgb, painted
    out = rgb
    for bottom in (True, False):
        for right in (True, False):
            # Views with the corner at the origin, so that one piece of code serves all four.
            corner = _from_corner(glyphs, bottom, right)
            inside = int(np.count_nonzero(corner[:zone, :zone]))
            wide_enough = np.count_nonzero(corner[:zone, :zone].any(axis=0)) >= OVERLAY_MIN_COLUMNS
            rest = (total - inside) / max(1, h * w - zone * zone)
            if not wide_enough or inside < OVERLAY_MIN_GLYPH_PX or inside / (zone * zone) < OVERLAY_MIN_CONTRAST * rest:
                continue
            columns = np.flatnonzero(corner[:zone, : min(OVERLAY_REACH_PX, w)].any(axis=0))
            # A longer bar goes on without a gap; a speck farther off has nothing to do with it.
            gaps = np.flatnonzero(np.diff(columns) > OVERLAY_GAP_PX)
            reach = min(w, max(zone, int(columns[gaps[0] if gaps.size else -1]) + 4))
            tall, wide = round(zone * scale), min(width, round(reach * scale))
            if out is rgb:
                out = rgb.copy()
            target = _from_corner(out, bottom, right)
            target[:tall, :wide] = _background(_from_corner(small, bottom, right), zone, reach)
            _from_corner(painted, bottom, right)[:tall, :wide] = True
    return out, painted


def reinhard(rgb: NDArray[np.uint8], background: Sequence[float], red_lightness: float) -> NDArray[np.uint8]:
    """Colour transfer of Reinhard et al. (IEEE CG&A 2001) in Lab, anchored to background and red cells.

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
    """Median Lab of the background, float64 [3], and median lightness of red cells, None where there are hardly any.

    White cells are left out by their stain. What remains is split by Otsu's threshold (1979) on grey values. Units are
    those of 8-bit Lab.
    """
    _check_rgb(rgb)
    height, width = rgb.shape[:2]
    scale = min(0.5, ANCHOR_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
    white = cv2.dilate(np.asarray(white_cell_signal(small) > WHITE_SIGNAL, np.uint8), np.ones((3, 3), np.uint8)) > 0
    grey = np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)
    lab = np.asarray(_to_lab(small))
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
    """Contrast-limited adaptive histogram equalisation of Lab lightness (Zuiderveld 1994).

    Args:
        rgb: uint8 [H, W, 3].
        clip: clip limit as a multiple of the uniform histogram.
        grid: tiles per side, or (columns, rows).

    Returns:
        uint8 [H, W, 3].
    """
    return _adjust(rgb, equalisation=(clip, (grid, grid) if isinstance(grid, int) else grid))


def multiscale(rgb: NDArray[np.uint8], amount: float) -> NDArray[np.uint8]:
    """Multi-scale detail enhancement of Lab lightness (after Kim et al. 2015): differences of Gaussians added back.

    With blurs B2 and B4 (sigma 2 and 4 px) the bands are L - B2 and B2 - B4, weighted 1 and 1/2.

    Args:
        rgb: uint8 [H, W, 3].
        amount: weight of the finest band; 0 leaves the image as it is.

    Returns:
        uint8 [H, W, 3].
    """
    return _adjust(rgb, amount=amount)


def normalize(rgb: NDArray[np.uint8], settings: NormalizeSettings) -> NDArray[np.uint8]:
    """All enabled steps with one Lab round trip. A pure function of its arguments.

    CLAHE's tiles keep their size in pixels, so a mosaic is treated like the fields it consists of.

    Args:
        rgb: uint8 [H, W, 3] at the model's scale.
        settings: switches, reference and strengths.

    Returns:
        uint8 [H, W, 3]; the input itself where every step is off.
    """
    _check_rgb(rgb)
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
    """Network input: channels first, each channel shifted and scaled.

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


def _check_rgb(rgb: NDArray[np.uint8]) -> None:
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or 0 in rgb.shape:
        raise LeukoflowError(f"expected an RGB image uint8 [H, W, 3], got {rgb.dtype} {rgb.shape}: convert it first")


def _adjust(
    rgb: NDArray[np.uint8],
    reference: tuple[Sequence[float], float] | None = None,
    equalisation: tuple[float, tuple[int, int]] | None = None,
    amount: float | None = None,
) -> NDArray[np.uint8]:
    """Reinhard, CLAHE and detail enhancement, each if wanted, between one conversion to Lab and one back."""
    _check_rgb(rgb)
    if reference is None and equalisation is None and amount is None:
        return rgb
    strips = _strips(rgb)
    transfer = np.eye(3, 4)
    # A field is one strip and is converted once; the strips of a large image are converted anew in each pass.
    whole = _to_lab(rgb) if len(strips) == 1 else None
    if reference is not None:
        wanted, red = np.asarray(reference[0], np.float64), reference[1]
        background, dark = anchors(rgb)
        gain = 1.0 if dark is None else (wanted[0] - red) / max(background[0] - dark, 1.0)
        gain = min(max(gain, MIN_GAIN), MAX_GAIN)
        transfer = np.column_stack([np.eye(3) * gain, (wanted - gain * background) * LAB_STEPS])
    if whole is not None:
        whole = cv2.transform(whole, transfer)

    def lab_of(rows: slice) -> cv2.typing.MatLike:
        return cv2.transform(_to_lab(rgb[rows]), transfer) if whole is None else whole

    lightness = None
    if equalisation is not None or amount is not None:
        lightness = np.empty(rgb.shape[:2], np.uint8)
        for rows in strips:
            cv2.LUT(cv2.extractChannel(lab_of(rows), 0), _TO_8_BITS, dst=lightness[rows])
        if equalisation is not None:
            clip, tiles = equalisation
            lightness = np.asarray(cv2.createCLAHE(clipLimit=clip, tileGridSize=tiles).apply(lightness), np.uint8)
        if amount is not None:
            lightness = np.asarray(_detail(lightness, amount), np.uint8)
    out = np.empty_like(rgb, order="C")
    for rows in strips:
        lab = lab_of(rows)
        if lightness is not None:
            cv2.insertChannel(cv2.LUT(lightness[rows], _FROM_8_BITS), lab, 0)
        roots = cv2.transform(lab, _LAB_TO_ROOTS)
        linear = cv2.transform(cv2.LUT(roots, _CUBE), _XYZ_TO_RGB)
        cv2.LUT(linear, _COMPRESS, dst=out[rows])
    return out


def _to_lab(rgb: NDArray[np.uint8]) -> cv2.typing.MatLike:
    """Lab (CIE 1976, D65) of sRGB, uint16 [H, W, 3] in `LAB_STEPS`."""
    xyz = cv2.transform(cv2.LUT(rgb, _EXPAND), _RGB_TO_XYZ)
    return cv2.transform(cv2.LUT(xyz, _ROOT), _ROOTS_TO_LAB)


def _strips(rgb: NDArray[np.uint8]) -> list[slice]:
    rows = max(1, STRIP_PX // rgb.shape[1])
    return [slice(start, start + rows) for start in range(0, rgb.shape[0], rows)]


def _tables() -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint8]]:
    """sRGB to linear [256]; X, Y, Z to cube root, the root back, linear to sRGB [65536], with CIE's linear toes."""
    v = np.arange(256) / 255
    expand = np.where(v > 0.04045, ((v + 0.055) / 1.055) ** 2.4, v / 12.92)
    u = np.arange(65536.0)
    t = u / LINEAR_STEPS
    root = np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29)
    f = u / ROOT_STEPS
    cube = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2)
    compress = np.where(t > 0.0031308, 1.055 * t ** (1 / 2.4) - 0.055, t * 12.92)

    def words(values: NDArray[np.float64], steps: float) -> NDArray[np.uint16]:
        return np.rint(values * steps).clip(0, 65535).astype(np.uint16)

    return (
        words(expand, LINEAR_STEPS),
        words(root, ROOT_STEPS),
        words(cube, BACK_STEPS),
        np.rint(compress * 255).astype(np.uint8),
    )


_EXPAND, _ROOT, _CUBE, _COMPRESS = _tables()
_TO_8_BITS = np.minimum(np.rint(np.arange(65536) / LAB_STEPS), 255).astype(np.uint8)
_FROM_8_BITS = (np.arange(256) * int(LAB_STEPS)).astype(np.uint16)
_PRIMARIES = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_RGB_TO_XYZ = _PRIMARIES / _PRIMARIES.sum(axis=1, keepdims=True)  # relative to the white point
_XYZ_TO_RGB = np.linalg.inv(_RGB_TO_XYZ) * (LINEAR_STEPS / BACK_STEPS)
_LAB_OF_ROOTS = np.array([[0.0, 116 * 2.55, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]])
_LAB_OFFSET = np.array([-16 * 2.55, 128.0, 128.0])
_ROOTS_TO_LAB = np.column_stack([_LAB_OF_ROOTS * (LAB_STEPS / ROOT_STEPS), _LAB_OFFSET * LAB_STEPS])
_LAB_TO_ROOTS = np.column_stack(
    [
        np.linalg.inv(_LAB_OF_ROOTS) * (ROOT_STEPS / LAB_STEPS),
        -np.linalg.inv(_LAB_OF_ROOTS) @ _LAB_OFFSET * ROOT_STEPS,
    ]
)


def _detail(lightness: cv2.typing.MatLike, amount: float) -> cv2.typing.MatLike:
    # (L - B2) + (B2 - B4) / 2 = L - (B2 + B4) / 2: two blurs and two sums, all in uint8.
    fine, coarse = (cv2.GaussianBlur(lightness, (0, 0), sigma) for sigma in DETAIL_SIGMAS_PX)
    cv2.addWeighted(fine, 0.5, coarse, 0.5, 0.0, dst=fine)
    return cv2.addWeighted(lightness, 1.0 + amount, fine, -amount, 0.0)


def _glyphs(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Thin structures that are near black or red: bool [H, W]."""
    red, green, blue = cv2.split(rgb)
    brightest = cv2.max(red, cv2.max(green, blue))
    darkest = cv2.min(red, cv2.min(green, blue))
    window = np.ones((7, 7), np.uint8)
    thin_dark = cv2.morphologyEx(darkest, cv2.MORPH_BLACKHAT, window) > 60
    black = thin_dark & (brightest < 130) & (cv2.subtract(brightest, darkest) < 25)
    redness = cv2.addWeighted(red, 0.5, cv2.max(green, blue), -0.5, 128.0)
    thin_red = (redness > 128 + GLYPH_RED) & (cv2.morphologyEx(redness, cv2.MORPH_TOPHAT, window) > GLYPH_REDDER)
    return np.asarray(black | thin_red, np.bool_)


def _from_corner(image: NDArray[_T], bottom: bool, right: bool) -> NDArray[_T]:
    """View of [H, W, ...] flipped so that the named corner is its first pixel."""
    view: NDArray[_T] = image[:: -1 if bottom else 1, :: -1 if right else 1]
    return view


def _background(corner: NDArray[np.uint8], zone: int, reach: int) -> NDArray[np.uint8]:
    """Median colour uint8 [3] of the brightest third around the corner's overlay."""
    around = corner[: 3 * zone, : reach + 2 * zone]
    keep = np.ones(around.shape[:2], np.bool_)
    keep[:zone, :reach] = False
    pixels = around[keep]
    if pixels.size == 0:
        pixels = corner.reshape(-1, 3)
    green = pixels[:, 1]
    return np.asarray(np.median(pixels[green >= np.percentile(green, 67)], axis=0), np.uint8)
