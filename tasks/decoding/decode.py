"""From untrusted bytes to a field: RGB pixels at the model's scale, or the reason why there are none."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from leukoflow.core.geometry import field_geometry
from leukoflow.tasks.decoding.colour import has_colours, hides_everything, to_srgb
from leukoflow.tasks.decoding.conversion import TURNED, colour_mode, pixels_of, resize, to_rgb, turn_upright
from leukoflow.tasks.decoding.errors import MissingError, RefusedError, UnreadableError
from leukoflow.tasks.decoding.headers.kinds import refusal_of
from leukoflow.tasks.decoding.headers.pixel_size import stated_um_per_px
from leukoflow.tasks.decoding.headers.png import PROFILE_BYTES
from leukoflow.tasks.decoding.integrity.pixels import check_end
from leukoflow.tasks.decoding.integrity.png import sound_png
from leukoflow.tasks.decoding.integrity.words import ends_early
from leukoflow.tasks.decoding.picture import PNG, Picture, open_picture
from leukoflow.tasks.imaging.ruler import measure_red_cells

if TYPE_CHECKING:
    from leukoflow.core.method import SegmentSettings

_TOO_MUCH_MEMORY = "too large: decoding it needs more memory than the limit allows"
_UNSUPPORTED = re.compile(r"unsupported (?!marker)|not supported|not implemented", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Field:
    """A decoded image at the model's scale, with the size it had (upright), and remarks."""

    rgb: NDArray[np.uint8]
    source_width: int
    source_height: int
    remarks: tuple[str, ...] = ()


def decode_image(
    data: bytes, um_per_px: float | None, settings: SegmentSettings, max_pixels: int, min_side_px: int
) -> Field:
    """Decode JPEG, PNG, TIFF, BMP or JPEG 2000 to uint8 RGB [height, width, 3] at the scale of `field_geometry`.

    Size limits are checked from the header, before anything is decoded. Values of more than 8 bits are scaled by the
    depth that the header states, else by their full range; grey becomes RGB; an embedded colour profile is converted to
    sRGB; palettes, CMYK and transparency (over white) are resolved; EXIF rotation is applied, and the source's width
    and height are those of the upright image. Of several pages the first at full size is used. Resolution tags are
    ignored: microscopes' software leaves screen resolutions there. Raises RefusedError.
    """
    if (reason := refusal_of(data)) is not None:
        raise RefusedError(reason)
    try:
        data, remarks = sound_png(data) if data.startswith(PNG) else (data, [])
        with _own_limits(), open_picture(data) as picture:
            return _decode(picture, remarks, um_per_px, settings, max_pixels, min_side_px)
    except RefusedError:
        raise
    except MissingError as missing:
        raise RefusedError(str(missing)) from None
    except ModuleNotFoundError as error:
        raise RefusedError(
            f"not supported by this installation, which lacks {error.name}: run `make install`"
        ) from None
    except (MemoryError, ImportError):  # a codec whose library does not fit
        raise RefusedError(_TOO_MUCH_MEMORY) from None
    except UnreadableError as error:
        raise RefusedError(str(error)) from None
    except UnidentifiedImageError:
        raise RefusedError("damaged: the image's header cannot be read") from None
    except Exception as error:  # whatever a decoder raises on hostile bytes is about the bytes
        words = str(error) or type(error).__name__
        if "insufficient memory" in words.lower():
            raise RefusedError(_TOO_MUCH_MEMORY) from None
        if _UNSUPPORTED.search(words):
            raise RefusedError(f"not supported: {words[:200]}; save it as PNG or TIFF with 8 bits a colour") from None
        if "truncated" in words or "end of file" in words.lower():
            raise RefusedError(ends_early(data)) from None
        raise RefusedError(f"damaged: {words[:200]}") from None


def measure_image(
    data: bytes, settings: SegmentSettings, max_pixels: int, min_side_px: int
) -> dict[str, list[float] | float | None]:
    """Measure the red cells of an image at its own scale; limits and errors are those of `decode_image`.

    Returns:
        `red_cells`: diameters in source pixels; `um_per_px`: what the file's metadata say, None where they say nothing.
    """
    field = decode_image(data, settings.um_per_px, settings, max_pixels, min_side_px)
    diameters = [round(float(px), 2) for px in measure_red_cells(field.rgb)]
    return {"red_cells": diameters, "um_per_px": stated_um_per_px(data)}


def check_image(data: bytes) -> None:
    """Ask a picture's file whether the picture is whole. Raises RefusedError where it is not."""
    if (reason := refusal_of(data)) is not None:
        raise RefusedError(reason)
    try:
        data, _ = sound_png(data) if data.startswith(PNG) else (data, [])
        with _own_limits(), open_picture(data) as picture:
            picture.check()
    except MissingError as missing:
        raise RefusedError(str(missing)) from None
    except UnidentifiedImageError:
        raise RefusedError("damaged: the image's header cannot be read") from None


@contextmanager
def _own_limits() -> Iterator[None]:
    """Put our limit on pixels in the place of the library's, and silence its warnings about odd metadata."""
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, PROFILE_BYTES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = before


def _decode(
    picture: Picture,
    remarks: list[str],
    um_per_px: float | None,
    settings: SegmentSettings,
    max_pixels: int,
    min_side_px: int,
) -> Field:
    found: list[str | None] = [*remarks, picture.remark]
    width, height = picture.size
    if width * height > max_pixels:
        raise RefusedError(f"too large: {width:,} x {height:,} px, at most {max_pixels:,} pixels")
    if min(width, height) < min_side_px:
        raise RefusedError(f"too small: {width} x {height} px, at least {min_side_px}")
    found += picture.check()
    orientation = picture.orientation()
    turned = orientation in TURNED
    upright = (height, width) if turned else (width, height)
    target = field_geometry(*upright, um_per_px, settings)
    if target.width * target.height > max_pixels:
        raise RefusedError(
            f"too large: {target.width:,} x {target.height:,} px at the model's scale; "
            f"are {um_per_px:g} micrometres per pixel right?"
        )
    size = (target.height, target.width) if turned else (target.width, target.height)
    image, remark = picture.load(size)
    found.append(remark)
    hidden = hides_everything(image)
    if hidden and not has_colours(image):
        raise RefusedError("wholly transparent: there is no picture in it")
    if hidden:
        found.append("wholly transparent: its colours are used as if it were not")
    colour, remark = to_srgb(picture.profile, colour_mode(image))
    found.append(remark)
    pixels = pixels_of(image, colour, opaque=hidden)
    found += check_end(pixels)
    return Field(turn_upright(to_rgb(resize(pixels, size)), orientation), *upright, tuple(filter(None, found)))
