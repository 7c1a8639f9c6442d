"""Find scale bars and text that are burned into the corners of a field, and paint over them."""

from __future__ import annotations

from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from leukoflow.tasks.imaging.lab16 import check_rgb

FIELD_PX = 224
"""Side of the training fields; lengths below are in their pixels."""

OVERLAY_ZONE_PX = 34  # corner square that holds every burned-in scale bar of the training fields
OVERLAY_REACH_PX = 112  # a longer bar is followed this far along the edge
OVERLAY_MIN_GLYPH_PX = 6
OVERLAY_MIN_COLUMNS = 5  # text and bars are wide; a speck is not
GLYPH_RED, GLYPH_REDDER = 5, 20  # half the excess of red over green and blue: at all, and over the surroundings
OVERLAY_GAP_PX = 8
OVERLAY_MIN_CONTRAST = 10.0  # density of glyph pixels in the corner against the rest of the image

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
    check_rgb(rgb)
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


def _glyphs(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Find thin structures that are near black or red: bool [H, W]."""
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
    """Flip [H, W, ...], as a view, so that the named corner is its first pixel."""
    view: NDArray[_T] = image[:: -1 if bottom else 1, :: -1 if right else 1]
    return view


def _background(corner: NDArray[np.uint8], zone: int, reach: int) -> NDArray[np.uint8]:
    """Return the median colour uint8 [3] of the brightest third around the corner's overlay."""
    around = corner[: 3 * zone, : reach + 2 * zone]
    keep = np.ones(around.shape[:2], np.bool_)
    keep[:zone, :reach] = False
    pixels = around[keep]
    if pixels.size == 0:
        pixels = corner.reshape(-1, 3)
    green = pixels[:, 1]
    return np.asarray(np.median(pixels[green >= np.percentile(green, 67)], axis=0), np.uint8)
