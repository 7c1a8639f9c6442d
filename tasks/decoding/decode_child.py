"""The disposable process in which untrusted bytes become pixels.

Started by `Decoder` in `ingest.py` with `python -m`; it imports little, so that it can be replaced quickly. It reads
one request at a time from standard input and answers on standard output before it reads the next; end of input ends it.
A crash, a memory or a CPU limit ends it too, and is then blamed on the image in hand.

Frames (little endian): first, once, the limits as LIMITS and the settings as JSON; the process answers READY. Then
requests of REQUEST and the image's bytes, answered by ANSWER, a text of words for people, and pixels.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import resource
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFile, PngImagePlugin, UnidentifiedImageError

from leukoflow.core.geometry import field_geometry
from leukoflow.tasks.decoding.colour import ToSrgb, has_colours, hides_everything, to_srgb
from leukoflow.tasks.decoding.integrity import (
    NO_LENGTHS,
    MissingError,
    Strips,
    check_end,
    check_jpeg,
    check_jpeg2000,
    check_png_pixels,
    check_rows,
    check_sectors,
    check_tiff,
    ends_early,
    sound_png,
)
from leukoflow.tasks.decoding.picture_header import (
    JPEG2000,
    PROFILE_BYTES,
    Tiff,
    TiffPage,
    describe,
    jpeg2000_precision,
    jpeg2000_profile,
    jpeg_frame,
    jpeg_refusal,
    png_depth,
    read_tiff,
    refusal_of,
    tiff_choice,
    tiff_refusal,
    without_long_texts,
)
from leukoflow.tasks.decoding.wide_pixels import (
    Depth,
    UnreadableError,
    Values,
    jpeg2000_values,
    jpeg_values,
    needs_tifffile,
    picture_of,
    png_values,
    tiff_unreadable,
    tiff_values,
)

if TYPE_CHECKING:
    from leukoflow.core.method import SegmentSettings

SETUP = struct.Struct("<3QdQ")
"""Limits (pixels, shortest side in pixels, memory in bytes, CPU seconds an image) and the length of the settings."""
REQUEST = struct.Struct("<Qd")
"""Length of the image's bytes, micrometres per pixel (not a number where unknown)."""
ANSWER = struct.Struct("<B5L")
"""Decoded (1) or refused (0), height and width of the pixels, width and height of the source, length of the text."""
READY = b"leukoflow decoder\n"
OUT_OF_MEMORY = 12
"""Exit code where not even the image's bytes fit."""

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "JPEG2000")
_PNG = b"\x89PNG"
_TOO_MUCH_MEMORY = "too large: decoding it needs more memory than the limit allows"
_STRIP_PIXELS = 4_000_000
_DRAFT_PIXELS = 16_000_000  # a larger JPEG is decoded at a fraction of its size where that is enough
_ORIENTATION = 0x0112
_UNSUPPORTED = re.compile(r"unsupported (?!marker)|not supported|not implemented", re.IGNORECASE)
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True, slots=True)
class Field:
    """A decoded image at the model's scale, with the size it had (upright), and remarks."""

    rgb: NDArray[np.uint8]
    source_width: int
    source_height: int
    remarks: tuple[str, ...] = ()


class RefusedError(Exception):
    """Why an image is not decoded, in words for people."""


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
        data, remarks = sound_png(data) if data.startswith(_PNG) else (data, [])
        with _own_limits(), _opened(data) as picture:
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


def check_image(data: bytes) -> None:
    """Ask a picture's file whether the picture is whole. Raises RefusedError where it is not."""
    if (reason := refusal_of(data)) is not None:
        raise RefusedError(reason)
    try:
        data, _ = sound_png(data) if data.startswith(_PNG) else (data, [])
        with _own_limits(), _opened(data) as picture:
            picture.check()
    except MissingError as missing:
        raise RefusedError(str(missing)) from None
    except UnidentifiedImageError:
        raise RefusedError("damaged: the image's header cannot be read") from None


@contextmanager
def _own_limits() -> Iterator[None]:
    """Our limit on pixels, checked from the header, instead of the library's; and no warnings about odd metadata."""
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, PROFILE_BYTES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = before


@dataclass(frozen=True, slots=True)
class _Picture:
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
def _opened(data: bytes) -> Iterator[_Picture]:
    """A picture of any kind that is read, after asking its header what it is. Raises RefusedError."""
    page: TiffPage | None = None
    remark: str | None = None
    values: Callable[[], Values] | None = None
    depth, header = Depth(8), data
    if data[:2] in (b"II", b"MM") and (tiff := read_tiff(data)) is not None:
        page, remark = _page_of(tiff)
        if needs_tifffile(tiff, page):
            yield _wide_tiff(data, page, remark)
            return
    elif data.startswith(_PNG):
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

        yield _Picture(image.size, load, lambda: _check_whole(image, data), orientation, profile, remark)


def _page_of(tiff: Tiff) -> tuple[TiffPage, str | None]:
    try:
        page, remark = tiff_choice(tiff)
    except ValueError as error:
        raise RefusedError(str(error)) from None
    if (reason := tiff_refusal(page)) is not None:
        raise RefusedError(reason)
    return page, remark


def _wide_tiff(data: bytes, page: TiffPage, remark: str | None) -> _Picture:
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

    return _Picture((page.width, page.height), load, check, lambda: page.orientation, page.profile, remark)


def _decode(
    picture: _Picture,
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
    turned = orientation in _TURNED
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
    colour, remark = to_srgb(picture.profile, _colour_mode(image))
    found.append(remark)
    pixels = _pixels(image, colour, opaque=hidden)
    found += check_end(pixels)
    return Field(_upright(_rgb(_resize(pixels, size)), orientation), *upright, tuple(filter(None, found)))


def _colour_mode(image: Image.Image) -> str:
    """Which of L, RGB and CMYK a picture's profile speaks of."""
    if image.mode == "CMYK":
        return "CMYK"
    return "L" if image.mode in ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L") else "RGB"


def _check_whole(image: Image.Image, data: bytes) -> list[str]:
    """What the file says of its own wholeness; returns remarks. Raises MissingError."""
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
    """Pixels that lie uncompressed in one piece are looked at where they lie."""
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
    """Where the strips or tiles of the first page lie, from its tags (TIFF 6.0)."""
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
    """The EXIF orientation. Nothing is decoded here: of a PNG the pixels have been loaded before."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF does not make the pixels worse
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _pixels(image: Image.Image, colour: ToSrgb | None, opaque: bool) -> NDArray[np.uint8]:
    """All pixels as uint8 [h, w] or [h, w, 3], converted strip by strip so that no second whole copy is needed."""
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
    """A picture in grey or colours without its transparency: over white, or left out where it is `opaque`."""
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


def _resize(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    shrinking = size[0] < pixels.shape[1] or size[1] < pixels.shape[0]
    resized = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8)


def _rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation (Exif 2.32, tag 274)."""
    if orientation in _TURNED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# ---------------------------------------------------------------- the process


def main() -> None:
    """Serve requests until the input ends."""
    source = os.fdopen(os.dup(0), "rb")
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that a library prints may mix with the answers
    cv2.setNumThreads(1)
    max_pixels, min_side, memory_bytes, cpu_seconds, length = SETUP.unpack(source.read(SETUP.size))
    # The parent has validated them, and importing pydantic here would double the time that a new process takes.
    settings = cast("SegmentSettings", SimpleNamespace(**json.loads(source.read(length))))
    _limit_memory(memory_bytes)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must leave no copy of an image on disk
    sink.write(READY)
    sink.flush()
    os.dup2(1, 2)  # from here on, complaints of image libraries are not ours
    while len(header := source.read(REQUEST.size)) == REQUEST.size:
        length, scale = REQUEST.unpack(header)
        _allow_cpu(cpu_seconds)
        try:
            data = _exactly(source, length)
            field = decode_image(data, None if math.isnan(scale) else scale, settings, max_pixels, min_side)
        except RefusedError as refusal:
            _answer(sink, None, str(refusal))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)  # for the bytes themselves: the rest of them is still in the pipe
        else:
            del data
            _answer(sink, field, "\n".join(field.remarks))


def _exactly(source: BinaryIO, length: int) -> bytes:
    data = source.read(length)
    if len(data) < length:
        sys.exit(0)  # the parent has gone
    return data


def _answer(sink: BinaryIO, field: Field | None, text: str) -> None:
    words = text.encode("utf-8", "replace")
    if field is None:
        sink.write(ANSWER.pack(0, 0, 0, 0, 0, len(words)) + words)
    else:
        height, width = field.rgb.shape[:2]
        sink.write(ANSWER.pack(1, height, width, field.source_width, field.source_height, len(words)) + words)
        sink.write(np.ascontiguousarray(field.rgb).reshape(-1).data)
    sink.flush()


def _limit_memory(more: int) -> None:
    """Allow `more` bytes of address space above what the imported libraries have taken."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, resource.RLIM_INFINITY))


def _allow_cpu(seconds: float) -> None:
    """Let this process live for `seconds` more of CPU time; the kernel ends it when they are spent."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    until = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
