"""Decoding: every kind of image to pixels, every kind of trouble to a reason."""

from __future__ import annotations

import io
import struct

import cv2
import numpy as np
import pytest
import tifffile
from encoded_pictures import SETTINGS, decode, encoded, jpeg, picture, png_header
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin

from leukoflow.core.geometry import field_geometry
from leukoflow.tasks.decoding.decode import decode_image
from leukoflow.tasks.decoding.errors import RefusedError


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
def test_lossless_formats_arrive_exactly(form: str) -> None:
    rgb = picture()
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(rgb), form)), rgb)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}], ids=str)
def test_jpeg_arrives_nearly(options: dict[str, object]) -> None:
    rgb = picture()
    difference = np.abs(decode(jpeg(**options)).astype(int) - rgb)
    assert difference.mean() < 2


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_tiff_compressions(compression: str) -> None:
    rgb = picture()
    difference = np.abs(decode(encoded(Image.fromarray(rgb), "TIFF", compression=compression)).astype(int) - rgb)
    assert difference.mean() < 2


def test_grey_becomes_rgb() -> None:
    grey = picture()[:, :, 0]
    for form in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey), form)), np.dstack([grey] * 3))


def test_black_and_white_becomes_rgb() -> None:
    black = picture()[:, :, 0] > 128
    out = decode(encoded(Image.fromarray(black), "PNG"))
    np.testing.assert_array_equal(out, np.dstack([black * np.uint8(255)] * 3))


@pytest.mark.parametrize("extension", [".png", ".tiff"])
def test_sixteen_bits_are_scaled_by_their_full_range(extension: str) -> None:
    grey = np.linspace(0, 65535, 224 * 224).reshape(224, 224).astype(np.uint16)
    out = decode(cv2.imencode(extension, grey)[1].tobytes())
    np.testing.assert_array_equal(out[:, :, 1], np.round(grey / 257).astype(np.uint8))
    colour = np.dstack([grey, grey[::-1], 65535 - grey])
    out = decode(cv2.imencode(extension, colour[:, :, ::-1])[1].tobytes())
    assert np.abs(out.astype(int) - colour / 257).max() <= 1


def test_transparency_is_laid_over_white() -> None:
    rgb, alpha = picture(), picture(seed=1)[:, :, 0]
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    share = alpha[:, :, None] / 255
    expected = rgb * share + 255 * (1 - share)
    for form in ("PNG", "TIFF"):
        assert np.abs(decode(encoded(rgba, form)) - expected).max() <= 1


def test_palettes_and_their_transparency() -> None:
    image = Image.fromarray(picture()).quantize(16)
    np.testing.assert_array_equal(decode(encoded(image, "PNG")), np.asarray(image.convert("RGB")))
    out = decode(encoded(image, "PNG", transparency=3))
    index = np.asarray(image)
    assert (out[index == 3] == 255).all()
    np.testing.assert_array_equal(out[index != 3], np.asarray(image.convert("RGB"))[index != 3])


def test_cmyk() -> None:
    rgb = picture()
    image = Image.fromarray(rgb).convert("CMYK")
    np.testing.assert_array_equal(decode(encoded(image, "TIFF")), rgb)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(form: str, orientation: int) -> None:
    image = Image.fromarray(picture(224, 160))
    image.getexif()[0x0112] = orientation
    data = encoded(image, form, exif=image.getexif(), **({"quality": 95} if form == "JPEG" else {}))
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    field = decode_image(data, None, SETTINGS, 10**8, 32)
    assert (field.source_width, field.source_height) == ((160, 224) if orientation > 4 else (224, 160))
    np.testing.assert_array_equal(field.rgb, expected)


def test_damaged_exif_does_not_matter() -> None:
    data = jpeg()
    exif = b"Exif\0\0II*\0" + b"\xff" * 40
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert decode(data).shape == (224, 224, 3)


def test_of_several_pages_the_first_is_used() -> None:
    first, second = picture(seed=1), picture(seed=2)
    data = encoded(Image.fromarray(first), "TIFF", save_all=True, append_images=[Image.fromarray(second)])
    field = decode_image(data, None, SETTINGS, 10**8, 32)
    np.testing.assert_array_equal(field.rgb, first)
    assert field.remarks == ("first of 2 pages",)


@pytest.mark.parametrize(
    ("width", "height", "um_per_px"),
    [(640, 480, None), (32, 32, None), (100, 300, 0.42), (500, 300, 0.1), (2048, 1500, None), (60, 50, 0.84)],
)
def test_images_arrive_at_the_models_scale(width: int, height: int, um_per_px: float | None) -> None:
    rgb = picture(width, height)
    out = decode(encoded(Image.fromarray(rgb), "PNG"), um_per_px)
    target = field_geometry(width, height, um_per_px, SETTINGS)
    assert out.shape == (target.height, target.width, 3)
    assert np.abs(out.mean((0, 1)) - rgb.mean((0, 1))).max() < 3


def test_large_images_are_converted_in_strips_without_a_seam() -> None:
    image = Image.fromarray(picture(3000, 2500)).quantize(32)
    expected = cv2.resize(np.asarray(image.convert("RGB")), (656, 547), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(decode(encoded(image, "PNG")), expected)


def test_a_huge_jpeg_is_decoded_at_a_fraction_but_looks_the_same() -> None:
    rgb = picture(5200, 4000)
    out = decode(encoded(Image.fromarray(rgb), "JPEG", quality=90))
    expected = cv2.resize(rgb, (out.shape[1], out.shape[0]), interpolation=cv2.INTER_AREA)
    assert np.abs(out.astype(int) - expected).mean() < 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty: 0 bytes"),
        (bytes(3000), "damaged: 3,000 bytes, all zero"),
        (b"Kein Bild, sondern ein Befund.\n", "not an image: text"),
        (b"PK\x03\x04rest", "not an image that is read: a zip archive; JPEG, PNG, TIFF and BMP are"),
        (b"GIF89a rest", "not supported: a GIF picture; export it as JPEG, PNG or TIFF"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "not supported: a WebP picture; export it as JPEG, PNG or TIFF"),
        (b"\x07\x91\xe1\x02" * 100, "not an image: its first bytes"),
        (b"\xff\xd8\xff", "damaged: the image's header cannot be read"),
        (png_header(60000, 60000), r"too large: 60,000 x 60,000 px, at most 120,000,000 pixels"),
        (png_header(20, 3000), "too small: 20 x 3000 px, at least 32"),
        (png_header(4000, 4000), "picture data missing: the PNG holds 1,000,000 of 48,004,000 bytes of pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_are_words_for_people(data: bytes, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        decode(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "BMP"])
def test_a_bomb_is_refused_by_its_header_alone(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(picture()), form)

    def load(image: Image.Image) -> None:
        raise AssertionError("pixels are decoded")

    for kind in (ImageFile.ImageFile, PngImagePlugin.PngImageFile, TiffImagePlugin.TiffImageFile):
        monkeypatch.setattr(kind, "load", load)
    with pytest.raises(RefusedError, match="too large: 224 x 224 px"):
        decode(data, pixels=224 * 224 - 1)
    with pytest.raises(RefusedError, match="pixels are decoded"):  # the trap works
        decode(data)


@pytest.mark.parametrize("form", ["JPEG", "progressive", "PNG", "TIFF", "LZW", "BMP"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9, 0.98])
def test_truncated_images_are_refused(form: str, kept: float) -> None:
    noisy = Image.fromarray(np.random.default_rng(1).integers(0, 256, (224, 224, 3), np.uint8))
    options: dict[str, object] = {
        "progressive": {"progressive": True}, "LZW": {"compression": "tiff_lzw"}
    }.get(form, {})  # type: ignore[assignment]  # fmt: skip
    data = encoded(noisy, {"progressive": "JPEG", "LZW": "TIFF"}.get(form, form), **options)
    with pytest.raises(RefusedError, match=r"truncated|damaged"):
        decode(data[: int(len(data) * kept)])


def test_a_scale_that_cannot_be_right_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"32,000 x 24,000 px at the model's scale; are 400 micrometres per pixel"):
        decode(encoded(Image.fromarray(picture(4000, 3000)), "PNG"), 400.0)


def test_floats_and_wide_integers_are_refused() -> None:
    floats = Image.fromarray(np.ones((64, 64), np.float32))
    with pytest.raises(RefusedError, match="floating-point pixels are not supported"):
        decode(encoded(floats, "TIFF"))
    wide = cv2.imencode(".tiff", np.full((64, 64), 1 << 20, np.int32))[1].tobytes()
    unsigned = wide.replace(struct.pack("<HHLHH", 339, 3, 1, 2, 0), struct.pack("<HHLHH", 339, 3, 1, 1, 0))
    assert unsigned != wide
    with pytest.raises(RefusedError, match="pixels of 32 bits are not supported"):
        decode(unsigned)
    with pytest.raises(RefusedError, match="signed values are not supported"):
        decode(wide)


def test_tiffs_that_the_library_would_get_wrong() -> None:
    grey = np.linspace(0, 65535, 224 * 224).reshape(224, 224).astype(np.uint16)
    plain = bytearray(cv2.imencode(".tiff", grey, [cv2.IMWRITE_TIFF_COMPRESSION, 1])[1].tobytes())
    entry = struct.pack("<HHLHH", 262, 3, 1, 1, 0)  # black is zero
    assert plain.count(entry) == 1
    inverted = decode(bytes(plain.replace(entry, struct.pack("<HHLHH", 262, 3, 1, 0, 0))))
    np.testing.assert_array_equal(inverted, 255 - decode(bytes(plain)))
    colour = np.dstack([grey, grey[::-1], 65535 - grey])
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.moveaxis(colour, -1, 0).copy(), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(decode(buffer.getvalue()), np.round(colour / 257).astype(np.uint8))


def test_random_damage_gives_pixels_or_a_reason() -> None:
    generator = np.random.default_rng(3)
    image = Image.fromarray(picture(64, 64))
    for form in ("JPEG", "PNG", "TIFF", "BMP"):
        pristine = np.frombuffer(encoded(image, form), np.uint8)
        for _ in range(40):
            damaged = pristine.copy()
            at = generator.integers(0, len(damaged), 5)
            damaged[at] = generator.integers(0, 256, 5)
            try:
                out = decode(damaged.tobytes(), pixels=10**6)
            except RefusedError as refusal:
                assert len(str(refusal)) > 8  # noqa: PT017
            else:
                assert out.ndim == 3
