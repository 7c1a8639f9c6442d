"""Pictures of every depth, codec, colour and page that microscopes write: the right values, or the right words."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageCms

from leukoflow.core.config import LimitSettings
from leukoflow.core.method import SegmentSettings
from leukoflow.tasks.decoding.decode import Field, decode_image
from leukoflow.tasks.decoding.errors import RefusedError
from leukoflow.tasks.decoding.ingest import Decoder
from leukoflow.tasks.decoding.wide_pixels import Depth, eight_bits

SETTINGS = SegmentSettings()
SIDE = 224


def picture(seed: int = 0, low: int = 0) -> NDArray[np.uint8]:
    small = np.random.default_rng(seed).integers(low, 256, (7, 7, 3), np.uint8)
    return np.asarray(cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC), np.uint8)


RGB = picture()
GREY = RGB[:, :, 0].copy()
TWELVE = (RGB.astype(np.uint32) * 4095 // 255).astype(np.uint16)
SIXTEEN = RGB.astype(np.uint16) * 257


def decode(data: bytes, pixels: int = 120_000_000) -> Field:
    return decode_image(data, None, SETTINGS, pixels, 32)


def encoded(image: Image.Image | NDArray[Any], form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def tiff(values: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, metadata=None, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG with one chunk more, behind its header."""
    return png[:33] + chunk(kind, data) + png[33:]


def same(data: bytes, expected: NDArray[np.uint8], within: int = 0) -> tuple[str, ...]:
    """The remarks of a picture that must have these pixels."""
    field = decode(data)
    shown = np.dstack([expected] * 3) if expected.ndim == 2 else expected
    assert field.rgb.shape == shown.shape
    assert np.abs(field.rgb.astype(int) - shown).max() <= within
    return field.remarks


# ---------------------------------------------------------------- codecs and byte orders


@pytest.mark.parametrize("compression", ["jpeg2000", "webp", "lerc", "zstd", "lzma", "jpegxl", "png"])
@pytest.mark.parametrize("options", [{}, {"tile": (64, 64)}, {"rowsperstrip": 50}], ids=str)
def test_tiff_with_codecs_that_pillow_lacks(compression: str, options: dict[str, Any]) -> None:
    data = tiff(RGB, photometric="rgb", compression=compression, **options)
    assert same(data, RGB) == ()
    for kept in (0.4, 0.95):
        cut = data[: int(len(data) * kept)]
        with pytest.raises(RefusedError, match="truncated: the image's data ends early"):
            decode(cut)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits"])
def test_big_endian_bigtiff(compression: str | None) -> None:
    options: dict[str, Any] = {"bigtiff": True, "byteorder": ">", "compression": compression}
    assert same(tiff(RGB, photometric="rgb", **options), RGB) == ()
    assert same(tiff(SIXTEEN, photometric="rgb", **options), RGB) == ()
    assert same(tiff(GREY, photometric="miniswhite", **options), 255 - GREY) == ()
    cmyk = Image.fromarray(RGB).convert("CMYK")
    assert same(tiff(np.asarray(cmyk), photometric="separated", **options), RGB) == ()


def test_turned_tiffs_that_pillow_does_not_read() -> None:
    turned = (274, "H", 1, 6, True)
    data = tiff(RGB[:160].copy(), photometric="rgb", compression="zstd", extratags=[turned])
    field = decode(data)
    assert (field.source_width, field.source_height) == (160, 224)
    np.testing.assert_array_equal(field.rgb, np.rot90(RGB[:160], -1))


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("planar", [False, True])
def test_packed_bits(bits: int, planar: bool) -> None:
    values = (RGB.astype(np.uint32) * ((1 << bits) - 1) // 255).astype(np.uint16)
    options: dict[str, Any] = {"planarconfig": "separate"} if planar else {}
    if planar:
        values = np.moveaxis(values, -1, 0).copy()
    assert same(tiff(values, photometric="rgb", bitspersample=bits, **options), RGB) == ()


@pytest.mark.parametrize("predictor", [False, True])
def test_sixteen_bits_in_separate_planes(predictor: bool) -> None:
    planes = np.moveaxis(SIXTEEN, -1, 0).copy()
    data = tiff(planes, photometric="rgb", planarconfig="separate", compression="lzw", predictor=predictor)
    assert same(data, RGB) == ()


def test_plain_jpeg_2000_of_every_depth() -> None:
    assert same(encoded(RGB, "JPEG2000"), RGB) == ()
    assert same(encoded(GREY, "JPEG2000", no_jp2=True), GREY) == ()
    for values, bits in ((TWELVE, 12), (SIXTEEN, 16), (TWELVE[:, :, 0].copy(), 12)):
        for form in ("jp2", "j2k"):
            data = imagecodecs.jpeg2k_encode(values, level=0, bitspersample=bits, codecformat=form)
            assert same(data, RGB if values.ndim == 3 else GREY) == ()
            with pytest.raises(RefusedError, match="damaged"):
                decode(data[: len(data) // 2])
    with pytest.raises(RefusedError, match="too large: 224 x 224 px"):
        decode(encoded(RGB, "JPEG2000"), pixels=SIDE * SIDE - 1)


def test_jpeg_of_twelve_bits() -> None:
    for values, expected in ((TWELVE, RGB), (TWELVE[:, :, 0].copy(), GREY)):
        data = imagecodecs.jpeg_encode(values, level=99, bitspersample=12)
        assert same(data, expected, within=3) == ()
        for kept in (0.3, 0.9, 0.99):
            cut = data[: int(len(data) * kept)]
            with pytest.raises(RefusedError, match="truncated: the image's data ends early"):
                decode(cut)
            with pytest.raises(RefusedError, match="truncated: picture data is missing"):
                decode(cut + b"\xff\xd9")
            with pytest.raises(RefusedError, match="truncated: picture data is missing"):
                decode(cut + b"\xff\xd9" + encoded(RGB, "JPEG"))  # another picture follows
    with pytest.raises(RefusedError, match="too large: 224 x 224 px"):
        decode(data, pixels=SIDE * SIDE - 1)


def test_a_jpeg_of_twelve_bits_is_turned_by_its_exif() -> None:
    data = imagecodecs.jpeg_encode(TWELVE[:160].copy(), level=99, bitspersample=12)
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes()
    field = decode(data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:])
    assert (field.source_width, field.source_height) == (160, 224)
    assert np.abs(field.rgb.astype(int) - np.rot90(RGB[:160], -1)).max() <= 6


COLOURS, CHANNELS, UNKNOWN = (struct.pack("<HHLHH", 262, 3, 1, value, 0) for value in (2, 1, 77))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: imagecodecs.jpegls_encode(RGB), "not supported: a JPEG-LS picture; export it"),
        (lambda: imagecodecs.ljpeg_encode(GREY), "not supported: a lossless JPEG, as DICOM files hold it; export it"),
        (lambda: tiff(RGB, photometric="rgb", compression="jpegxr"), "are compressed as JPEG XR; save it with LZW"),
        (lambda: tiff(RGB.astype(np.int8)[:, :, 0].copy()), "signed values are not supported"),
        (lambda: tiff(np.full((64, 64), 900, np.int16)), "signed values are not supported"),
        (lambda: tiff(np.full((64, 64), 900, np.int32)), "signed values are not supported"),
        (lambda: tiff(np.full((64, 64), 70_000, np.uint32)), "pixels of 32 bits are not supported"),
        (lambda: tiff(np.ones((64, 64), np.float32)), "floating-point pixels are not supported"),
        (lambda: tiff(np.ones((64, 64), np.float16)), "floating-point pixels are not supported"),
        (lambda: tiff(np.ones((64, 64), np.complex64)), "complex values are not supported"),
        (lambda: tiff(np.ones((64, 64, 3), np.uint32), photometric="rgb"), "pixels of 32 bits are not supported"),
        (lambda: tiff(RGB, photometric="cielab"), "CIELAB colours are not supported: save it in RGB"),
        (lambda: imagecodecs.jpeg_encode(np.dstack([TWELVE, TWELVE[:, :, :1]]), bitspersample=12), "12 bits in CMYK"),
        (lambda: tiff(RGB, photometric="rgb").replace(COLOURS, CHANNELS), "3 channels without colours"),
        (
            lambda: tiff(SIXTEEN, photometric="minisblack", planarconfig="contig", extrasamples=(0, 0)),
            "3 channels without colours",
        ),
        (lambda: tiff(RGB, photometric="rgb").replace(COLOURS, UNKNOWN), "a TIFF of 3 x 8 bits, photometric 77, compr"),
        (lambda: tiff(RGB, photometric="rgb", subfiletype=1), "not a field: a reduced copy (preview)"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_never_called_damaged(make: Callable[[], bytes], words: str) -> None:
    with pytest.raises(RefusedError) as refused:
        decode(make())
    assert words in str(refused.value)
    assert "damaged" not in str(refused.value)


def test_the_page_behind_a_preview_is_decoded() -> None:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(picture(1)[::2, ::2].copy(), photometric="rgb", subfiletype=1, metadata=None)
        writer.write(RGB, photometric="rgb", metadata=None)
    assert same(buffer.getvalue(), RGB) == ("page 2 of 2, the only one at full size",)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(picture(1)[::2, ::2].copy(), photometric="rgb", subfiletype=1, subifds=1, metadata=None)
        writer.write(RGB, photometric="rgb", subfiletype=0, metadata=None)
    assert same(buffer.getvalue(), RGB) == ("page 2 of 2, the only one at full size",)


# ---------------------------------------------------------------- depth


def test_eight_bits_of_any_depth() -> None:
    values = np.array([[0, 1, 2048, 4095]], np.uint16)
    scaled, remark = eight_bits(values, Depth(12))
    assert (scaled.tolist(), remark) == ([[0, 0, 128, 255]], None)
    scaled, remark = eight_bits(values, Depth(16, 12))
    assert (scaled.tolist(), remark) == ([[0, 0, 128, 255]], "12 bits in 16, as its header says")
    scaled, remark = eight_bits(values, Depth(16))
    assert scaled.tolist() == [[0, 0, 8, 16]]
    assert remark == "values reach 4,095 of 65,535: is this 12 bits in 16? If so, save it with its bits stated"
    full = np.array([[0, 65535]], np.uint16)  # a depth that was stated, and values that were spread as PNG asks for
    assert eight_bits(full, Depth(16, 12))[0].tolist() == [[0, 255]]
    assert eight_bits(full, Depth(16, 12))[1] is None
    assert eight_bits(np.zeros((1, 2), np.uint16), Depth(16))[1] is None


REACH = "values reach 4,095 of 65,535: is this 12 bits in 16? If so, save it with its bits stated"
STATED = "12 bits in 16, as its header says"


def test_twelve_bits_in_sixteen() -> None:
    full = TWELVE.copy()
    full[0, 0] = 4095
    expected, dark = np.round(full / 4095 * 255).astype(np.uint8), np.round(full / 257).astype(np.uint8)
    png = imagecodecs.png_encode(full)
    assert same(png, dark) == (REACH,)
    assert same(tiff(full, photometric="rgb"), dark) == (REACH,)
    assert same(tiff(full[:, :, 0].copy()), dark[:, :, 0]) == (REACH,)
    assert same(with_chunk(png, b"sBIT", bytes([12] * 3)), expected) == (STATED,)
    maximum = (281, "H", 3, (4095,) * 3, True)
    assert same(tiff(full, photometric="rgb", extratags=[maximum]), expected) == (STATED,)
    spread = imagecodecs.png_encode(SIXTEEN)
    assert same(with_chunk(spread, b"sBIT", bytes([12] * 3)), RGB) == ()


def test_sixteen_bits_keep_what_is_below_the_upper_eight() -> None:
    values = np.full((64, 64, 3), 0x40E0, np.uint16)  # 64.6 of 255
    for data in (imagecodecs.png_encode(values), tiff(values, photometric="rgb")):
        assert np.unique(decode(data).rgb).tolist() == [65]


# ---------------------------------------------------------------- PNG with much beside its pixels


@pytest.mark.parametrize("kind", ["text", "packed text", "international text", "profile"])
def test_a_png_with_a_long_text_or_profile_is_a_good_picture(kind: str) -> None:
    long = bytes(2 << 20)
    name, body = {
        "text": (b"tEXt", b"d\0" + long),
        "packed text": (b"zTXt", b"d\0\0" + zlib.compress(long)),
        "international text": (b"iTXt", b"d\0\1\0\0\0" + zlib.compress(long)),
        "profile": (b"iCCP", b"d\0\0" + zlib.compress(long)),
    }[kind]
    for values in (RGB, SIXTEEN):
        remarks = same(with_chunk(imagecodecs.png_encode(values), name, body), RGB)
        assert remarks == (("its colour profile is damaged and was left out",) if kind == "profile" else ())


# ---------------------------------------------------------------- transparency


def test_colours_behind_nothing_but_transparency_are_used() -> None:
    remark = ("wholly transparent: its colours are used as if it were not",)
    for value in (0, 1):
        hidden = np.dstack([RGB, np.full((SIDE, SIDE), value, np.uint8)])
        assert same(encoded(hidden, "PNG"), RGB) == remark
        assert same(encoded(hidden, "TIFF"), RGB) == remark
    assert same(encoded(np.dstack([GREY, np.zeros_like(GREY)]), "PNG"), GREY) == remark
    assert same(imagecodecs.png_encode(np.dstack([SIXTEEN, np.zeros((SIDE, SIDE), np.uint16)])), RGB) == remark
    palette = Image.fromarray(RGB).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert same(encoded(palette, "PNG", transparency=bytes(16)), expected) == remark
    large = cv2.resize(RGB, (2400, 2400), interpolation=cv2.INTER_NEAREST)  # in strips
    whole = decode(encoded(np.dstack([large, np.zeros((2400, 2400), np.uint8)]), "PNG", compress_level=1))
    np.testing.assert_array_equal(whole.rgb, decode(encoded(large, "PNG", compress_level=1)).rgb)
    assert whole.remarks == remark


def test_nothing_behind_transparency_is_no_picture() -> None:
    with pytest.raises(RefusedError, match="wholly transparent: there is no picture in it"):
        decode(encoded(np.zeros((64, 64, 4), np.uint8), "PNG"))
    premultiplied = tiff(np.zeros((64, 64, 4), np.uint8), photometric="rgb", extrasamples=["assocalpha"])
    with pytest.raises(RefusedError, match="wholly transparent: there is no picture in it"):
        decode(premultiplied)


def test_transparency_of_wide_pictures_is_laid_over_white() -> None:
    alpha = picture(1)[:, :, 0]
    share = alpha[:, :, None] / 255
    expected = RGB * share + 255 * (1 - share)
    wide = np.dstack([SIXTEEN, alpha.astype(np.uint16) * 257])
    for data in (imagecodecs.png_encode(wide), tiff(wide, photometric="rgb", extrasamples=["unassalpha"])):
        assert np.abs(decode(data).rgb - expected).max() <= 1.5
    unspecified = tiff(wide, photometric="rgb", extrasamples=["unspecified"])
    assert same(unspecified, RGB) == ()


# ---------------------------------------------------------------- colours


D50 = (0.9642, 1.0, 0.8249)
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
PROPHOTO = ((0.79767, 0.28804, 0.0), (0.13519, 0.71187, 0.0), (0.03135, 0.00009, 0.82521))
STANDARD = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def profile(colourants: tuple[tuple[float, ...], ...], gamma: float) -> bytes:
    """An ICC profile (version 2) of three colourants (XYZ at D50) and a gamma; of grey without colourants."""

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3l", *(round(value * 65536) for value in values))

    curve = b"curv\0\0\0\0" + struct.pack(">LH", 1, round(gamma * 256)) + b"\0\0"
    text = b"text\0\0\0\0none\0\0\0\0"
    words = b"desc\0\0\0\0" + struct.pack(">L", 5) + b"test\0" + bytes(78 + 3)
    tags = {b"desc": words, b"cprt": text, b"wtpt": xyz(D50)}
    if colourants:
        for name, values in zip((b"r", b"g", b"b"), colourants, strict=True):
            tags |= {name + b"XYZ": xyz(values), name + b"TRC": curve}
    else:
        tags[b"kTRC"] = curve
    table, body, at = struct.pack(">L", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">2L", at + len(body), len(data))
        body += data
    head = struct.pack(
        ">L4sL4s4s4s", at + len(body), b"none", 0x02100000, b"mntr", b"RGB " if colourants else b"GRAY", b"XYZ "
    )
    head += (
        struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
        + b"acsp"
        + bytes(28)
        + struct.pack(">3l", *(round(v * 65536) for v in D50))
    )
    return head.ljust(128, b"\0") + table + body


def standard(values: NDArray[np.uint8], colourants: tuple[tuple[float, ...], ...], gamma: float) -> NDArray[np.float64]:
    """The same colours in sRGB, by the formulas of IEC 61966-2-1."""
    linear = (values / 255.0) ** gamma @ np.array(colourants) @ np.linalg.inv(np.array(STANDARD))
    linear = linear.clip(0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(255 * curved)


@pytest.mark.parametrize(("colourants", "gamma"), [(ADOBE, 2.19921875), (PROPHOTO, 1.8)], ids=["Adobe RGB", "ProPhoto"])
@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG"])
def test_colour_profiles_are_converted(colourants: tuple[tuple[float, ...], ...], gamma: float, form: str) -> None:
    rgb = picture(2, low=150)
    embedded = profile(colourants, gamma)
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    data = encoded(rgb, form, icc_profile=embedded, **options)
    with Image.open(io.BytesIO(data)) as stored:
        rgb = np.asarray(stored)
    field = decode(data)
    expected = standard(rgb, colourants, gamma)
    assert np.abs(expected - rgb).max() > 20  # it matters
    assert np.abs(field.rgb - expected).max() <= 3
    assert field.remarks == ("colours converted to sRGB by its colour profile",)


def test_colour_profiles_of_wide_and_grey_pictures() -> None:
    rgb = picture(2, low=150)
    wide = rgb.astype(np.uint16) * 257
    embedded = profile(PROPHOTO, 1.8)
    expected = standard(rgb, PROPHOTO, 1.8)
    for data in (
        tiff(wide, photometric="rgb", iccprofile=embedded),
        with_chunk(imagecodecs.png_encode(wide), b"iCCP", b"x\0\0" + zlib.compress(embedded)),
    ):
        field = decode(data)
        assert np.abs(field.rgb - expected).max() <= 3
        assert field.remarks == ("colours converted to sRGB by its colour profile",)
    plain = encoded(rgb, "JPEG2000")
    box = b"colr\2\0\0" + embedded
    at = plain.index(b"colr") - 4
    box = struct.pack(">L", len(box) + 4) + box
    old = struct.unpack_from(">L", plain, at)[0]
    head = plain.index(b"jp2h") - 4
    grown = struct.pack(">L", struct.unpack_from(">L", plain, head)[0] + len(box) - old)
    field = decode(plain[:head] + grown + plain[head + 4 : at] + box + plain[at + old :])
    assert np.abs(field.rgb - expected).max() <= 3
    grey = rgb[:, :, 0]
    field = decode(encoded(grey, "PNG", icc_profile=profile((), 1.0)))
    linear = grey / 255.0
    curved = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(field.rgb - curved[:, :, None]).max() <= 2
    large = cv2.resize(rgb, (2400, 2400), interpolation=cv2.INTER_NEAREST)  # in strips
    whole = decode(encoded(large, "PNG", icc_profile=embedded, compress_level=1)).rgb
    plain = decode(encoded(large, "PNG", compress_level=1)).rgb
    assert np.abs(whole - standard(plain, PROPHOTO, 1.8)).mean() < 1


def test_pictures_in_srgb_are_left_as_they_are() -> None:
    embedded = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for form in ("PNG", "TIFF"):
        assert same(encoded(RGB, form, icc_profile=embedded), RGB) == ()
        assert same(encoded(GREY, form, icc_profile=embedded), GREY) == ()


def test_a_profile_that_is_no_use_is_left_out_with_a_remark() -> None:
    damaged, other = profile(ADOBE, 2.2)[:90], profile((), 1.0)
    assert same(encoded(RGB, "PNG", icc_profile=damaged), RGB) == ("its colour profile is damaged and was left out",)
    assert same(encoded(RGB, "PNG", icc_profile=b"x" * 500), RGB) == ("its colour profile is damaged and was left out",)
    remark = ("its colour profile is for other colours and was left out",)
    assert same(encoded(RGB, "TIFF", icc_profile=other), RGB) == remark


def without_adobe(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    length = struct.unpack_from(">H", jpeg, at + 2)[0]
    assert jpeg[at + 4 : at + 9] == b"Adobe"
    return jpeg[:at] + jpeg[at + 2 + length :]


def test_cmyk_jpegs_are_inverted_only_where_adobe_says_so() -> None:
    cmyk = np.asarray(Image.fromarray(RGB).convert("CMYK"))
    adobe = encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100, subsampling=0)
    same(adobe, RGB, within=6)
    upright = encoded(Image.fromarray(255 - cmyk, "CMYK"), "JPEG", quality=100, subsampling=0)
    same(without_adobe(upright), RGB, within=6)
    ycck = imagecodecs.jpeg_encode(255 - cmyk, level=100, colorspace="CMYK", outcolorspace="YCCK", subsampling="444")
    same(ycck, RGB, within=8)


# ---------------------------------------------------------------- the process


@pytest.mark.slow
def test_rare_codecs_are_imported_only_for_the_pictures_that_need_them() -> None:
    code = (
        "import sys; from leukoflow.tasks.decoding.decode_child import decode_image;"
        "from leukoflow.core.method import SegmentSettings;"
        "data = sys.stdin.buffer.read(); decode_image(data, None, SegmentSettings(), 10**8, 32);"
        "print(*{'tifffile', 'imagecodecs', 'PIL.ImageCms'} & set(sys.modules))"
    )

    def imported(data: bytes) -> str:
        return subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True).stdout.decode()

    assert imported(encoded(RGB, "PNG")).split() == []
    assert imported(encoded(RGB, "JPEG")).split() == []
    assert imported(encoded(RGB, "TIFF")).split() == []
    assert "tifffile" in imported(tiff(TWELVE, photometric="rgb", bitspersample=12)).split()


def test_random_damage_gives_pixels_or_a_reason() -> None:
    generator = np.random.default_rng(1)
    small, twelve = RGB[:64, :64].copy(), TWELVE[:64, :64].copy()
    kinds = [
        tiff(twelve, photometric="rgb", bitspersample=12),
        tiff(small, photometric="rgb", bigtiff=True, byteorder=">", compression="lerc"),
        imagecodecs.jpeg_encode(twelve, level=95, bitspersample=12),
        imagecodecs.jpeg2k_encode(twelve, level=0, bitspersample=12),
        imagecodecs.png_encode(SIXTEEN[:64, :64].copy()),
        encoded(small, "PNG", icc_profile=profile(PROPHOTO, 1.8)),
    ]
    with Decoder(LimitSettings(), SETTINGS) as decoder:
        for pristine in (np.frombuffer(data, np.uint8) for data in kinds):
            for _ in range(40):
                damaged = pristine.copy()
                at = np.append(generator.integers(0, len(damaged), 4), generator.integers(4, 300, 2))
                damaged[at] = generator.integers(0, 256, 6)
                out = decoder.decode_one(damaged.tobytes())
                assert (out.rgb is None) == (out.reason is not None)
                assert "OpenCV" not in (out.reason or "")


@pytest.mark.slow
def test_the_child_decodes_them_within_its_limits() -> None:
    kinds = [
        tiff(RGB, photometric="rgb", compression="jpeg2000"),
        tiff(TWELVE, photometric="rgb", bitspersample=12),
        encoded(RGB, "JPEG2000"),
        imagecodecs.png_encode(SIXTEEN),
    ]
    with Decoder(LimitSettings(), SETTINGS) as decoder:
        for out in decoder.decode((data, None) for data in kinds):
            np.testing.assert_array_equal(out.rgb, RGB)
        assert decoder.starts == 1
    with Decoder(LimitSettings(decode_memory_mb=256), SETTINGS) as small:
        for out in small.decode((data, None) for data in kinds):
            np.testing.assert_array_equal(out.rgb, RGB)
    wide = tiff(np.zeros((8000, 8000, 3), np.uint16), photometric="rgb", compression="zstd")
    with Decoder(LimitSettings(decode_memory_mb=256), SETTINGS) as small:
        assert "memory" in (small.decode_one(wide).reason or "")
