"""A picture whose header is read and whose pixels are not: what it is, whether it is whole, and how to load it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from leukoflow.tasks.decoding.errors import RefusedError, UnreadableError
from leukoflow.tasks.decoding.headers.jpeg import jpeg2000_precision, jpeg2000_profile, jpeg_frame, jpeg_refusal
from leukoflow.tasks.decoding.headers.kinds import JPEG2000
from leukoflow.tasks.decoding.headers.png import png_depth, without_long_texts
from leukoflow.tasks.decoding.headers.tiff import Tiff, TiffPage, read_tiff
from leukoflow.tasks.decoding.headers.tiff_pages import describe, tiff_choice, tiff_refusal
from leukoflow.tasks.decoding.integrity.jpeg import check_jpeg, check_jpeg2000
from leukoflow.tasks.decoding.integrity.pixels import check_rows, check_sectors
from leukoflow.tasks.decoding.integrity.png import check_png_pixels
from leukoflow.tasks.decoding.integrity.tiff import Strips, check_tiff
from leukoflow.tasks.decoding.integrity.words import NO_LENGTHS
from leukoflow.tasks.decoding.wide_pixels import (
    Depth,
    Values,
    jpeg2000_values,
    jpeg_values,
    needs_tifffile,
    picture_of,
    png_values,
    tiff_unreadable,
    tiff_values,
)

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "JPEG2000")
PNG = b"\x89PNG"
_DRAFT_PIXELS = 16_000_000  # a larger JPEG is decoded at a fraction of its size where that is enough
_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture whose header is read and whose pixels are not. `load` is given the size that is wanted.

    `check` comes before whatever may decode.
    """

    size: tuple[int, int]
    load: Callable[[tuple[int, int]], tuple[Image.Image, str | None]]
    check: Callable[[], list[str]]  # whether the file is whole: remarks, or MissingError
    orientation: Callable[[], int]
    profile: bytes | None
    remark: str | None = None


@contextmanager
def open_picture(data: bytes) -> Iterator[Picture]:
    """Open a picture of any kind that is read, after asking its header what it is. Raises RefusedError."""
    page: TiffPage | None = None
    remark: str | None = None
    values: Callable[[], Values] | None = None
    depth, header = Depth(8), data
    if data[:2] in (b"II", b"MM") and (tiff := read_tiff(data)) is not None:
        page, remark = _page_of(tiff)
        if needs_tifffile(tiff, page):
            yield _wide_tiff(data, page, remark)
            return
    elif data.startswith(PNG):
        depth, header = Depth(*png_depth(data)), without_long_texts(data)
        values = partial(png_values, data) if depth.stored == 16 else None
    elif data.startswith(JPEG2000):
        depth = Depth(jpeg2000_precision(data))
        values = partial(jpeg2000_values, data) if depth.stored > 8 else None
    elif data.startswith(b"\xff\xd8"):
        frame = jpeg_frame(data)
        if (reason := jpeg_refusal(frame)) is not None:
            raise RefusedError(reason)
        if frame is not None and frame.precision == 12:
            # Pillow reads no header with 12 bits, of which everything else is as with 8.
            header = data[: frame.precision_at] + b"\x08" + data[frame.precision_at + 1 :]
            depth, values = Depth(12), partial(jpeg_values, data)
    try:
        image = Image.open(io.BytesIO(header), formats=FORMATS)
    except UnidentifiedImageError:
        if page is None or not page.width:
            raise
        raise RefusedError(f"not supported: {describe(page)}; save it in RGB with 8 or 16 bits") from None
    with image:
        if values is not None and image.mode == "CMYK":
            raise RefusedError("a JPEG of 12 bits in CMYK is not supported: save it in RGB")
        if page is not None and page.place[0] > 0:
            image.seek(page.place[0])

        def load(size: tuple[int, int]) -> tuple[Image.Image, str | None]:
            if values is not None:
                wide, remark = picture_of(values(), depth)
                if wide.size != image.size:
                    raise UnreadableError("damaged: the image's data does not fit its header")
                return wide, remark
            if image.format == "JPEG" and image.width * image.height > _DRAFT_PIXELS:
                image.draft(None, size)
            image.load()
            return image, None

        profile = jpeg2000_profile(data) if data.startswith(JPEG2000) else image.info.get("icc_profile")

        def orientation() -> int:
            if image.format == "PNG":
                image.load()  # asking for it would, and must not be what meets damage
            return 1 if image.format == "TIFF" else _orientation(image)  # of a TIFF the library itself applies it

        yield Picture(image.size, load, lambda: _check_whole(image, data), orientation, profile, remark)


def _page_of(tiff: Tiff) -> tuple[TiffPage, str | None]:
    """Choose the page that shows the field, with a remark. Raises RefusedError where there is none."""
    try:
        page, remark = tiff_choice(tiff)
    except ValueError as error:
        raise RefusedError(str(error)) from None
    if (reason := tiff_refusal(page)) is not None:
        raise RefusedError(reason)
    return page, remark


def _wide_tiff(data: bytes, page: TiffPage, remark: str | None) -> Picture:
    """Make the picture of a page that tifffile decodes. Raises RefusedError."""
    if (reason := tiff_unreadable(page)) is not None:
        raise RefusedError(reason)

    def load(size: tuple[int, int]) -> tuple[Image.Image, str | None]:
        alpha = bool(page.extra) and page.extra[0] in (1, 2)
        depth = Depth(max(page.bits), page.stated_bits)
        return picture_of(tiff_values(data, page), depth, page.photometric == 5, alpha, page.extra[:1] == (1,))

    def check() -> list[str]:  # tifffile and its codecs raise for what else is missing or corrupt
        if page.compression == 1 and not page.tiled and page.whole(len(data)) and page.in_one_piece():
            row = -(-page.width * (1 if page.planar == 2 else page.samples) * max(page.bits) // 8)
            rows = page.height * (page.samples if page.planar == 2 else 1)
            check_sectors(data, page.segments[0][0], row, rows, alone=True)
        return [NO_LENGTHS] if page.without_lengths else []

    return Picture((page.width, page.height), load, check, lambda: page.orientation, page.profile, remark)


def _check_whole(image: Image.Image, data: bytes) -> list[str]:
    """Ask the file for its own wholeness; returns remarks. Raises MissingError."""
    if image.format == "PNG":
        check_png_pixels(data)
    elif image.format in ("JPEG", "MPO"):
        return check_jpeg(data)
    elif image.format == "TIFF":
        return check_tiff(data, _strips(image)) + _check_plain(image, data)
    elif image.format == "BMP":
        return _check_plain(image, data)
    elif image.format == "JPEG2000":
        check_jpeg2000(data)
    return []


def _check_plain(image: Image.Image, data: bytes) -> list[str]:
    """Look at pixels that lie uncompressed in one piece where they lie. Raises MissingError."""
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    pieces = [(tile.extents, tile.offset, tile.args) for tile in tiles if tile.codec_name == "raw"]
    if not pieces or len(pieces) != len(tiles):
        return []
    width, height = image.size
    _, start, layout = pieces[0]
    mode = str(layout[0]) if isinstance(layout, tuple) else str(layout)
    stride = layout[1] if isinstance(layout, tuple) and len(layout) > 1 else 0
    channels = {"RGB": 3, "BGR": 3, "L": 1, "P": 1, "BGRX": 4, "RGBX": 4, "RGBA": 4, "BGRA": 4}.get(mode)
    if channels is None:
        return []
    stride = stride or width * channels
    at = start
    for extents, offset, _ in pieces:
        if offset != at or extents is None or extents[0] or extents[2] != width:
            return []
        at += stride * (extents[3] - extents[1])
    if at <= len(data):
        check_rows(data, start, stride, height)
    return []


def _strips(image: Image.Image) -> Strips:
    """Tell where the strips or tiles of the first page lie, from its tags (TIFF 6.0)."""
    tags: dict[int, Any] = getattr(image, "tag_v2", {})
    width, height = int(tags[256]), int(tags[257])
    bits = tags.get(258, (1,))
    if len(bits) == 1:  # said once for all
        bits *= int(tags.get(277, 1))
    planes = len(bits) if tags.get(284) == 2 else 1
    depth = bits[0] if planes > 1 else sum(bits)
    compression = int(tags.get(259, 1))
    padded, row = 0, 1
    if 322 in tags:
        wide, high = int(tags[322]), int(tags[323])
        sizes = [high * -(-wide * depth // 8)] * (-(-width // wide) * -(-height // high))
        places = (324, 325)
    else:
        rows, row = int(tags.get(278, height)) or height, -(-width * depth // 8)
        high = min(rows, height)
        sizes = [min(high, height - top) * row for top in range(0, height, high)]
        padded = rows * row if rows <= 2 * height else 0
        places = (273, 279)
    if tags.get(262) == 6 and compression != 7:  # subsampled colours, whose size is another
        compression = 0
    offsets, counts = (tuple(int(v) for v in tags.get(place, ())) for place in places)
    return Strips(compression, offsets, counts, tuple(sizes * planes), bytes(tags.get(347, b"")), padded, row, planes)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation. Nothing is decoded here: of a PNG the pixels have been loaded before."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF does not make the pixels worse
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
