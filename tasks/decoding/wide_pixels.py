"""Pixels that Pillow does not read, or not to their full depth: by tifffile and imagecodecs.

Both are imported only when such a picture comes, since most never do. What leads there is decided from the header
(`tasks.decoding.headers`), size and kind included, so that nothing large is decoded before its size is known.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leukoflow.tasks.decoding.errors import UnreadableError
from leukoflow.tasks.decoding.headers.tiff import Tiff, TiffPage
from leukoflow.tasks.decoding.headers.tiff_pages import compression_name
from leukoflow.tasks.decoding.integrity.jpeg import RUBBISH, jpeg_end
from leukoflow.tasks.decoding.integrity.words import ends_early

Values = NDArray[np.uint8] | NDArray[np.uint16]

_STRIP_VALUES = 12_000_000
_FAR = 1 << 14
"""Values of 16 bits that never reach it are likely those of a camera of 10, 12 or 14 bits."""
_TIFF_CODECS = (1, 5, 8, 32773, 32946, 33005, 34712, 34887, 34925, 34933, 50000, 50001, 50002, 52546)
"""What tifffile decodes and complains of when it is damaged: neither JPEG nor JPEG XR, which decode in silence."""
_PILLOW_CODECS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 32809)


@dataclass(frozen=True, slots=True)
class Depth:
    """Bits of a colour: as they are stored, and as the header states them (None where it states nothing less)."""

    stored: int
    stated: int | None = None


def eight_bits(values: Values, depth: Depth) -> tuple[NDArray[np.uint8], str | None]:
    """Scale values [h, w] or [h, w, n] to 8 bits by their depth, with a remark where that needs one.

    Values of 16 bits that all fit into the stated depth are scaled by it. Where none is stated, they are scaled by
    their full range, and how far they reach is remarked where that is far less.
    """
    if values.dtype == np.uint8 and depth.stored == 8:
        return values.astype(np.uint8, copy=False), None
    most, remark = (1 << depth.stored) - 1, None
    reach = int(values.max(initial=0))
    if depth.stated is not None and reach < 1 << depth.stated:
        most = (1 << depth.stated) - 1
        remark = f"{depth.stated} bits in {depth.stored}, as its header says"
    elif depth.stored == 16 and 0 < reach < _FAR:
        bits = max(reach.bit_length(), 8)
        remark = f"values reach {reach:,} of 65,535: is this {bits} bits in 16? If so, save it with its bits stated"
    out = np.empty(values.shape, np.uint8)
    rows = max(1, _STRIP_VALUES // max(1, values[:1].size))
    for top in range(0, len(values), rows):
        part = values[top : top + rows].astype(np.uint32)
        out[top : top + rows] = np.minimum((part * 255 + most // 2) // most, 255)
    return out, remark


def picture_of(
    values: Values, depth: Depth, cmyk: bool = False, alpha: bool = True, premultiplied: bool = False
) -> tuple[Image.Image, str | None]:
    """Make a picture of 8 bits of values [h, w] or [h, w, 1 to 5], with the remark of `eight_bits`.

    What follows the colours is transparency where `alpha` says so, else it is left out. Transparency always has its
    full range.
    """
    if values.ndim == 2:
        values = values[:, :, None]
    colours = 4 if cmyk else 3 if values.shape[2] >= 3 else 1
    pixels, remark = eight_bits(values[:, :, :colours], depth)
    modes = {1: "L", 3: "RGB", 4: "CMYK"}
    mode = modes[colours]
    if values.shape[2] > colours and alpha and not cmyk:
        last = (values[:, :, colours : colours + 1] >> (depth.stored - 8)).astype(np.uint8)
        pixels = np.concatenate([pixels, last], axis=2)
        mode += "a" if premultiplied else "A"
    height, width = pixels.shape[:2]
    return Image.frombuffer(mode, (width, height), np.ascontiguousarray(pixels), "raw", mode, 0, 1), remark


# ---------------------------------------------------------------- TIFF


def needs_tifffile(tiff: Tiff, page: TiffPage) -> bool:
    """Tell whether Pillow does not read this page, or not to its full depth."""
    return (
        len(page.place) > 1
        or (tiff.big and tiff.order == ">")
        or page.compression not in _PILLOW_CODECS
        or (page.strips_of_no_rows and page.compression in _TIFF_CODECS)
        or (8 < max(page.bits) <= 16 and page.sample_format in (1, 4))
    )


def tiff_unreadable(page: TiffPage) -> str | None:
    """Say why tifffile is not asked for this page; None where it is."""
    if page.compression not in _TIFF_CODECS:
        name = compression_name(page)
        return f"not supported: a TIFF whose pixels are compressed as {name}; save it with LZW or uncompressed"
    if page.photometric not in (0, 1, 2, 5):
        return "not supported: a TIFF of this depth with a palette or YCbCr; save it in RGB with 8 or 16 bits"
    if max(page.bits) not in (8, 10, 12, 14, 16):
        return f"not supported: a TIFF of {max(page.bits)} bits a colour; save it with 8 or 16 bits"
    return None


def tiff_values(data: bytes, page: TiffPage) -> Values:
    """Decode a page to [h, w] or [h, w, colours], black at 0. Raises UnreadableError where data is missing."""
    if not page.whole(len(data)):
        raise UnreadableError(f"truncated: the image's data ends early ({len(data):,} bytes)")
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        found: Any = file.pages[page.place[0]]
        for number in page.place[1:]:
            found = found.pages[number]
        values = np.asarray(found.asarray(maxworkers=1))
    if page.planar == 2 and page.samples > 1:
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.shape[:2] != (page.height, page.width) or values.dtype not in (np.uint8, np.uint16):
        raise UnreadableError("damaged: the image's data does not fit its header")
    if page.photometric == 0:
        values = ((1 << max(page.bits)) - 1 - values.astype(np.int32)).clip(0).astype(values.dtype)
    return values


# ---------------------------------------------------------------- PNG, JPEG, JPEG 2000


def png_values(data: bytes) -> Values:
    """Decode a PNG to its full depth."""
    import imagecodecs

    return _plain(imagecodecs.png_decode(data))


def jpeg2000_values(data: bytes) -> Values:
    """Decode a JPEG 2000 picture to its full depth."""
    import imagecodecs

    return _plain(imagecodecs.jpeg2k_decode(data))


def jpeg_values(data: bytes) -> Values:
    """Decode a JPEG of 12 bits. Raises UnreadableError where picture data is missing.

    The codec fills what is missing in silence. So the data is decoded again with rubbish in front of its end mark: of
    a whole picture the decoder never reaches it.
    """
    import imagecodecs

    end = jpeg_end(data)
    if end is None:
        raise UnreadableError(ends_early(data))
    data, end = data[:end], end - 2  # another picture may follow
    values = _plain(imagecodecs.jpeg_decode(data))
    if not np.array_equal(values, imagecodecs.jpeg_decode(data[:end] + RUBBISH + data[end:])):
        raise UnreadableError(f"truncated: picture data is missing ({len(data):,} bytes)")
    return values


def _plain(values: Any) -> Values:
    array = np.asarray(values)
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3):
        raise UnreadableError("not supported: pixels of this kind; save it with 8 or 16 bits as PNG or TIFF")
    return array
