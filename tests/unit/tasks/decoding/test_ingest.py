"""Ingest: every kind of image to pixels, every kind of trouble to a reason, and neighbours unharmed."""

from __future__ import annotations

import io
import signal
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin

from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import LeukoflowError
from leukoflow.core.geometry import field_geometry
from leukoflow.core.method import SegmentSettings
from leukoflow.sources.identify import identify
from leukoflow.sources.listing import Listing
from leukoflow.sources.reading import open_reader
from leukoflow.tasks.decoding.decode import decode_image
from leukoflow.tasks.decoding.errors import RefusedError
from leukoflow.tasks.decoding.ingest import Decoded, Decoder, ingest

SETTINGS = SegmentSettings()
LIMITS = LimitSettings()


def picture(width: int = 224, height: int = 224, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth, so that JPEG keeps it nearly; no symmetry, so that a rotation shows."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (7, 7, 3), np.uint8)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def jpeg(seed: int = 0, **options: object) -> bytes:
    return encoded(Image.fromarray(picture(seed=seed)), "JPEG", quality=95, **options)


def decode(data: bytes, um_per_px: float | None = None, pixels: int = 120_000_000) -> NDArray[np.uint8]:
    return decode_image(data, um_per_px, SETTINGS, pixels, 32).rgb


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(LIMITS, SETTINGS) as shared:
        yield shared


# ---------------------------------------------------------------- what can be decoded


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


# ---------------------------------------------------------------- what is refused, and why


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    body = chunk(b"IHDR", struct.pack(">2L5B", width, height, 8, 2, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(bytes(10**6))
    )
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


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


# ---------------------------------------------------------------- the disposable process


def test_the_child_gives_what_the_function_gives(decoder: Decoder) -> None:
    data = encoded(Image.fromarray(picture(640, 480)), "PNG")
    (out,) = decoder.decode([(data, 0.3)])
    assert out.rgb is not None
    np.testing.assert_array_equal(out.rgb, decode(data, 0.3))
    assert (out.source_width, out.source_height, out.reason) == (640, 480, None)
    assert len(out.sha256 or "") == 64


def test_reasons_and_remarks_come_through(decoder: Decoder) -> None:
    pages = encoded(Image.fromarray(picture()), "TIFF", save_all=True, append_images=[Image.fromarray(picture())])
    text, good = decoder.decode([(b"text", None), (pages, None)])
    assert (text.rgb, text.reason) == (None, "not an image: text")
    assert good.remarks == ("first of 2 pages",)


def test_one_child_serves_many_images(decoder: Decoder) -> None:
    decoder.decode_one(b"")
    before = decoder.starts
    assert all(out.rgb is not None for out in decoder.decode((jpeg(i), None) for i in range(20)))
    assert decoder.starts == before


TROUBLE = """
import os, signal, sys, time
from leukoflow.tasks.decoding import decode_child
original = decode_child.decode_image

def decode_image(data, *rest):
    if b"KILL-ME" in data:
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"KILL-ONCE" in data and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if b"SPIN" in data:
        while True:
            pass
    if b"SLEEP" in data:
        time.sleep(60)
    if b"EXIT" in data:
        os._exit(3)
    return original(data, *rest)

decode_child.decode_image = decode_image
decode_child.main()
"""


@pytest.fixture
def troubled(tmp_path: Path) -> Callable[..., Decoder]:
    """A decoder whose child misbehaves where an image's comment tells it to."""
    script = tmp_path / "trouble.py"
    script.write_text(TROUBLE)
    command = (sys.executable, str(script), str(tmp_path / "killed once"))
    return lambda **limits: Decoder(LimitSettings(**limits), SETTINGS, command)


def outcomes(decoder: Decoder, *comments: bytes) -> list[Decoded]:
    with decoder:
        return decoder.decode((jpeg(i, comment=comment), None) for i, comment in enumerate(comments))


def test_an_image_that_kills_the_child_is_blamed_alone(troubled: Callable[..., Decoder]) -> None:
    decoder = troubled()
    before, culprit, after = outcomes(decoder, b"good", b"KILL-ME", b"good")
    assert before.rgb is not None
    assert after.rgb is not None
    assert (culprit.rgb, culprit.reason) == (None, "decoding it kills the decoder (SIGSEGV)")
    assert len(culprit.sha256 or "") == 64
    assert decoder.starts == 3  # at first, to be sure, and for the next


def test_a_child_that_died_by_chance_blames_nobody(troubled: Callable[..., Decoder]) -> None:
    assert [out.reason for out in outcomes(troubled(), b"good", b"KILL-ONCE", b"good")] == [None] * 3


def test_an_image_that_ends_the_child_is_blamed(troubled: Callable[..., Decoder]) -> None:
    assert outcomes(troubled(), b"EXIT")[0].reason == "decoding it ends the decoder (exit code 3)"


def test_cpu_time_is_limited(troubled: Callable[..., Decoder]) -> None:
    spinning, after = outcomes(troubled(decode_seconds=0.5), b"SPIN", b"good")
    assert spinning.reason == "decoding it takes too long: its CPU time is used up"
    assert after.rgb is not None


def test_waiting_for_ever_is_limited(troubled: Callable[..., Decoder]) -> None:
    sleeping, after = outcomes(troubled(decode_seconds=0.3), b"SLEEP", b"good")
    assert sleeping.reason == "decoding it takes too long: the decoder does not answer"
    assert after.rgb is not None


def test_memory_is_limited_and_the_next_image_is_served() -> None:
    big = encoded(Image.fromarray(np.zeros((8000, 8000, 3), np.uint8)), "PNG", compress_level=1)
    with Decoder(LimitSettings(decode_memory_mb=256), SETTINGS) as small:
        refused, after = small.decode([(big, None), (jpeg(), None)])
        unread = small.decode_one(b"\xff\xd8\xff" + bytes(300 << 20))
    assert "memory" in (refused.reason or "")
    assert after.rgb is not None
    assert unread.reason == "too large: its bytes need more memory than the limit allows"
    with Decoder(LimitSettings(decode_memory_mb=1024), SETTINGS) as enough:
        out = enough.decode_one(big)
    assert out.rgb is not None
    assert out.rgb.shape == (1750, 1750, 3)


def test_a_child_that_does_not_start_is_the_machines_fault_not_the_images() -> None:
    command = (sys.executable, "-c", "raise SystemExit('no libjpeg here')")
    with Decoder(LIMITS, SETTINGS, command) as broken, pytest.raises(LeukoflowError, match="no libjpeg here"):
        broken.decode_one(jpeg())


def test_the_child_ends_with_the_decoder_and_with_the_parent() -> None:
    before = set(psutil.Process().children())
    decoder = Decoder(LIMITS, SETTINGS)
    decoder.decode_one(b"")
    (child,) = set(psutil.Process().children()) - before
    decoder.close()
    assert not child.is_running()
    code = (
        "import os; from leukoflow.tasks.decoding.ingest import *; d = Decoder(LimitSettings(), SegmentSettings());"
        "d.decode_one(b'');"
        "print(d._children[0].pid); os.kill(os.getpid(), 9)"
    )
    run = psutil.Popen([sys.executable, "-c", code], stdout=-1)
    orphan = int(run.communicate()[0])
    assert run.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while psutil.pid_exists(orphan) and psutil.Process(orphan).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.02)


# ---------------------------------------------------------------- hostile archives


def hostile_files() -> dict[str, bytes]:
    good = jpeg(7)
    return {
        "good1.jpg": good,
        "truncated.jpg": good[: len(good) // 2],
        "zero.jpg": b"",
        "text.jpg": b"Dear Dr Kim, the images follow.",
        "bomb.png": png_header(60000, 60000),
        "../../x.jpg": good,
        "/etc/x.jpg": good,
        "killer.jpg": jpeg(8, comment=b"KILL-ME"),
        "more.zip": b"PK\x05\x06" + bytes(18),
        "nested-under-another-name.jpg": b"PK\x03\x04" + bytes(26),
        "small.png": encoded(Image.fromarray(picture(20, 20)), "PNG"),
        "good2.jpg": good,
    }


EXPECTED = {
    "good1.jpg": None,
    "truncated.jpg": "truncated: the image's data ends early",
    "zero.jpg": "empty: 0 bytes",
    "text.jpg": "not an image: text",
    "bomb.png": "too large: 60,000 x 60,000 px",
    "../../x.jpg": None,
    "/etc/x.jpg": None,
    "killer.jpg": "decoding it kills the decoder (SIGSEGV)",
    "more.zip": "archive within the source",
    "nested-under-another-name.jpg": "not an image that is read: a zip archive",
    "small.png": "too small: 20 x 20 px",
    "good2.jpg": None,
}


def check(path: Path, decoder: Decoder, expected: dict[str, str | None]) -> None:
    source = identify(path)
    members = list(Listing(source))
    assert [m.image_key for m in members] == list(expected)
    with open_reader(source) as reader, decoder:
        found = list(ingest(reader, members, LIMITS, decoder))
    assert len(found) == len(members)
    reference = decode(hostile_files()["good1.jpg"])
    for (key, reason), out in zip(expected.items(), found, strict=True):
        if reason is None:
            assert out.reason is None, key
            assert out.rgb is not None
            np.testing.assert_array_equal(out.rgb, reference)
        else:
            assert (out.reason or "").startswith(reason), key
            assert out.rgb is None


def test_hostile_zip(tmp_path: Path, troubled: Callable[..., Decoder]) -> None:
    path = tmp_path / "hostile.zip"
    files = hostile_files()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("secret.jpg", files["good1.jpg"])
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("good2.jpg", files["good1.jpg"])
        archive.writestr("cafX.jpg", files["good1.jpg"])
    whole = bytearray(path.read_bytes()).replace(b"cafX", b"caf\xe9")
    whole[whole.rfind(b"secret.jpg") - 46 + 8] |= 1
    path.write_bytes(whole)
    more = {"secret.jpg": "encrypted", "good2.jpg#2": None, "caf%E9.jpg": None}
    before = sorted(p.name for p in tmp_path.parent.iterdir())
    check(path, troubled(), EXPECTED | more)
    assert sorted(p.name for p in tmp_path.parent.iterdir()) == before  # nothing appeared outside
    assert not Path("/etc/x.jpg").exists()


def test_hostile_tar(tmp_path: Path, troubled: Callable[..., Decoder]) -> None:
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in hostile_files().items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("dev.jpg", tarfile.BLKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "good1.jpg"
            archive.addfile(info)
    more = {"link.jpg": "symbolic link", "hard.jpg": "hard link", "dev.jpg": "device"}
    check(path, troubled(), EXPECTED | more)


def test_members_beyond_the_limit_are_not_read(tmp_path: Path, decoder: Decoder) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg())
    with (tmp_path / "in" / "big.jpg").open("wb") as file:
        file.truncate(3 << 20)  # sparse
    source = identify(tmp_path / "in")
    with open_reader(source) as reader:
        found = list(ingest(reader, list(Listing(source)), LimitSettings(max_member_mb=2), decoder))
    assert [out.reason for out in found] == [None, "too large: 3,145,728 bytes, the limit is 2,097,152"]


def test_real_fields(shared_data: Path, decoder: Decoder) -> None:
    source = identify(shared_data / "all_fields.zip")
    members = list(Listing(source))[::100]
    with open_reader(source) as reader:
        found = list(ingest(reader, members, LIMITS, decoder))
        for member, out in zip(members, found, strict=True):
            with Image.open(io.BytesIO(reader.read(member))) as image:
                np.testing.assert_array_equal(out.rgb, np.asarray(image.convert("RGB")))
