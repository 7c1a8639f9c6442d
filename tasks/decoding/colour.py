"""Colour: what an embedded profile makes of the values, in sRGB; and transparency that hides the whole picture."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ToSrgb = Callable[[Image.Image], NDArray[np.uint8]]
"""Makes uint8 RGB [h, w, 3] in sRGB of a picture in mode L, RGB or CMYK."""

_SPACES = {"L": ("GRAY", "RGB"), "RGB": ("RGB",), "CMYK": ("CMYK",)}
_ALIKE = 2
"""A profile that moves no colour by more than this is one of sRGB; its pictures are left as they are."""
_HIDES = 1


def to_srgb(profile: bytes | None, mode: str) -> tuple[ToSrgb | None, str | None]:
    """Return what converts a picture of a mode (L, RGB or CMYK) by its ICC profile, or None; and a remark.

    A profile that cannot be read, or is for other colours, does not make the pixels worse: it is left out.
    """
    if not profile or mode not in _SPACES:
        return None, None
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = str(source.profile.xcolor_space).strip()
        if space not in _SPACES[mode]:
            return None, "its colour profile is for other colours and was left out"
        through = "RGB" if space == "RGB" else mode
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), through, "RGB")

        def convert(image: Image.Image) -> NDArray[np.uint8]:
            out = ImageCms.applyTransform(image.convert(through) if image.mode != through else image, transform)
            return np.asarray(out, np.uint8)

        if mode != "CMYK" and _is_srgb(convert, mode):
            return None, None
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None, "its colour profile is damaged and was left out"
    return convert, "colours converted to sRGB by its colour profile"


def _is_srgb(convert: ToSrgb, mode: str) -> bool:
    steps = range(0, 256, 15)
    colours = [(v, v, v) for v in range(256)] if mode == "L" else list(product(steps, steps, steps))
    before = np.array([colours], np.uint8)
    image = Image.fromarray(before[:, :, 0].copy() if mode == "L" else before)
    return bool(np.abs(convert(image).astype(int) - before).max() <= _ALIKE)


def hides_everything(image: Image.Image) -> bool:
    """Tell whether a picture's transparency lets nothing of it be seen. Its pixels must be loaded."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return _range(image, -1)[1] <= _HIDES
    transparency = image.info.get("transparency")
    if image.mode != "P" or transparency is None:
        return False
    used = {index for index, count in enumerate(image.histogram()[:256]) if count}
    if isinstance(transparency, int):
        return used == {transparency}
    return all(index < len(transparency) and transparency[index] <= _HIDES for index in used)


def has_colours(image: Image.Image) -> bool:
    """Tell whether there is a picture behind its transparency: not one value alone."""
    if image.mode in ("RGBa", "La"):
        return False  # its colours were multiplied by nothing
    if image.mode == "P":
        return sum(count > 0 for count in image.histogram()[:256]) > 1
    return any(_range(image, band)[0] < _range(image, band)[1] for band in range(len(image.getbands()) - 1))


def _range(image: Image.Image, band: int) -> tuple[int, int]:
    low, high = np.asarray(image.getextrema()).reshape(-1, 2)[band]
    return int(low), int(high)
