"""From a loaded picture of any mode to upright RGB pixels of a size."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from leukoflow.tasks.decoding.colour import ToSrgb
from leukoflow.tasks.decoding.errors import RefusedError

_STRIP_PIXELS = 4_000_000
TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def colour_mode(image: Image.Image) -> str:
    """Tell which of L, RGB and CMYK a picture's profile speaks of."""
    if image.mode == "CMYK":
        return "CMYK"
    return "L" if image.mode in ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L") else "RGB"


def pixels_of(image: Image.Image, colour: ToSrgb | None, opaque: bool) -> NDArray[np.uint8]:
    """Return all pixels as uint8 [h, w] or [h, w, 3], converted in strips so that no second whole copy is needed."""
    width, height = image.size
    if width * height <= _STRIP_PIXELS:
        return _converted(image, colour, opaque)
    rows = max(1, _STRIP_PIXELS // width)
    out: NDArray[np.uint8] | None = None
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = image.crop((0, top, width, bottom))
        strip.info, strip.format = image.info, image.format  # transparency of a palette is kept there
        part = _converted(strip, colour, opaque)
        if out is None:
            out = np.empty((height, *part.shape[1:]), np.uint8)
        out[top:bottom] = part
    assert out is not None
    return out


def _converted(image: Image.Image, colour: ToSrgb | None, opaque: bool) -> NDArray[np.uint8]:
    if image.mode == "CMYK":
        if image.format == "JPEG" and "adobe" not in image.info:
            image = ImageChops.invert(image)  # the library takes all for Adobe's, whose colours are stored inverted
        return np.asarray(image.convert("RGB")) if colour is None else colour(image)
    pixels = _over_white(image, opaque)
    return pixels if colour is None else colour(Image.fromarray(pixels))


def _over_white(image: Image.Image, opaque: bool) -> NDArray[np.uint8]:
    """Return a picture in grey or colours without its transparency: over white, or left out where it is `opaque`."""
    mode = image.mode
    if mode in ("L", "RGB"):
        if "transparency" not in image.info:
            return np.asarray(image)
        image = image.convert("RGBA")
    elif mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise RefusedError("pixels of 32 bits are not supported: save it with 8 or 16 bits")
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif mode == "F":
        raise RefusedError("floating-point pixels are not supported: save it with 8 or 16 bits")
    elif mode == "1":
        return np.asarray(image.convert("L"))
    elif mode in ("P", "PA", "LA", "La", "RGBa"):
        image = image.convert("RGBA")
    if image.mode == "RGBA" and not opaque:
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return np.asarray(white)
    return np.asarray(image.convert("RGB"))


def resize(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize pixels [h, w] or [h, w, 3] to `size` (width, height): by areas where it shrinks."""
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    shrinking = size[0] < pixels.shape[1] or size[1] < pixels.shape[0]
    resized = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8)


def to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return grey [h, w] as RGB [h, w, 3]; RGB as it is."""
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def turn_upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation (Exif 2.32, tag 274)."""
    if orientation in TURNED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
