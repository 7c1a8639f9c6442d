"""Damage: what is missing is refused with the reason, what is odd is remarked, and what is whole passes."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from functools import cache
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from harness import screen_here, table, write_zip
from numpy.typing import NDArray
from PIL import Image

from leukoflow.core.errors import SourceError
from leukoflow.core.method import SegmentSettings
from leukoflow.models.bundle import Bundle
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.decoding.decode import Field, decode_image
from leukoflow.tasks.decoding.errors import MissingError, RefusedError
from leukoflow.tasks.decoding.integrity.pixels import check_end, check_rows, check_sectors
from leukoflow.tasks.decoding.integrity.sectors import even_sectors
from leukoflow.tasks.imaging.synthetic import render_field
from leukoflow.tasks.training.data import read_members

SETTINGS = SegmentSettings()

WAYS: dict[str, tuple[str, dict[str, object]]] = {
    "jpeg": ("JPEG", {"quality": 92}),
    "optimised": ("JPEG", {"quality": 92, "optimize": True}),
    "progressive": ("JPEG", {"quality": 92, "progressive": True}),
    "restarts": ("JPEG", {"quality": 92, "restart_marker_rows": 2}),
    "grey jpeg": ("JPEG", {"quality": 92}),
    "cmyk jpeg": ("JPEG", {"quality": 92}),
    "png": ("PNG", {}),
    "palette": ("PNG", {}),
    "black and white": ("PNG", {}),
    "tiff": ("TIFF", {}),
    "lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "packbits": ("TIFF", {"compression": "packbits"}),
    "jpeg in tiff": ("TIFF", {"compression": "jpeg"}),
    "bmp": ("BMP", {}),
    "grey bmp": ("BMP", {}),
}


@cache
def drawn(seed: int) -> NDArray[np.uint8]:
    return render_field(np.random.default_rng(seed), CLASSES[seed % 4]).rgb


@cache
def stored(way: str, seed: int = 0) -> bytes:
    image = Image.fromarray(drawn(seed))
    if "grey" in way:
        image = image.convert("L")
    elif "cmyk" in way:
        image = image.convert("CMYK")
    elif way == "palette":
        image = image.quantize(64)
    elif way == "black and white":
        image = image.convert("1")
    form, options = WAYS[way]
    sink = io.BytesIO()
    image.save(sink, form, **options)  # type: ignore[arg-type]
    return sink.getvalue()


def decode(data: bytes) -> Field:
    return decode_image(data, None, SETTINGS, 10**8, 32)


def refused(data: bytes) -> str:
    with pytest.raises(RefusedError) as refusal:
        decode(data)
    return str(refusal.value)


def caught(data: bytes) -> bool:
    try:
        decode(data)
    except RefusedError:
        return True
    return False


def zeroed(data: bytes, size: int, at: int) -> bytes:
    return data[: at * size] + bytes(len(data[at * size : (at + 1) * size])) + data[(at + 1) * size :]


def chunk(kind: bytes, data: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data) ^ wrong)


def with_chunk(data: bytes, added: bytes) -> bytes:
    """Behind the header of a PNG."""
    return data[:33] + added + data[33:]


# ---------------------------------------------------------------- whole pictures


@pytest.mark.parametrize("way", WAYS)
def test_whole_pictures_pass_without_a_remark(way: str) -> None:
    for seed in range(6):
        assert decode(stored(way, seed)).remarks == ()


def test_interlaced_png_passes() -> None:
    """Written by hand, since no library here writes any: seven passes, of 40 x 36 pixels in grey."""
    grey = drawn(1)[:36, :40, 1]
    rows = b""
    for x, y, dx, dy in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        rows += b"".join(b"\0" + row.tobytes() for row in grey[y::dy, x::dx])
    head = chunk(b"IHDR", struct.pack(">2L5B", 40, 36, 8, 0, 0, 0, 1))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), grey)
    assert decode(data).remarks == ()
    short = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows[:-9])) + chunk(b"IEND", b"")
    assert refused(short) == "picture data missing: the PNG holds 1,499 of 1,508 bytes of pixels"


# ---------------------------------------------------------------- PNG


def test_one_wrong_byte_in_a_png_is_refused_wherever_it_is() -> None:
    data = stored("png")
    for at in [*range(8, 41), *range(41, len(data), 997), len(data) - 1]:
        assert refused(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]).startswith(
            ("damaged:", "truncated:", "too large:")
        )


def test_the_words_for_a_png_with_a_wrong_checksum() -> None:
    data = stored("png")
    assert refused(zeroed(data, 512, 9)) == "damaged: the checksum of chunk IDAT of the PNG is wrong"


def test_a_png_whose_data_end_before_its_picture_is_refused() -> None:
    """All checksums are right, and the decoder leaves the rest black without a word."""
    head = chunk(b"IHDR", struct.pack(">2L5B", 64, 64, 8, 2, 0, 0, 0))
    body = zlib.compress(b"\0" + bytes(range(192)) + b"\0" + bytes(192))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    assert refused(data) == "picture data missing: the PNG holds 386 of 12,352 bytes of pixels"


@pytest.mark.parametrize("kind", [b"tEXt", b"pHYs", b"eXIf", b"gAMA"])
def test_a_broken_chunk_beside_the_picture_is_remarked(kind: bytes) -> None:
    data = stored("png")
    found = decode(with_chunk(data, chunk(kind, b"\0\1\2\3\4\5\6\7\1", wrong=1)))
    np.testing.assert_array_equal(found.rgb, drawn(0))
    assert found.remarks == (
        f"damaged beside the picture: the checksum of chunk {kind.decode()} of the PNG is wrong",
    )  # fmt: skip


def test_a_broken_transparency_is_no_thing_beside_the_picture() -> None:
    data = with_chunk(stored("png"), chunk(b"tRNS", b"\0\1\0\1\0\1", wrong=1))
    assert refused(data) == "damaged: the checksum of chunk tRNS of the PNG is wrong"


def test_a_rotated_png_that_is_damaged_is_refused() -> None:
    """Asking a PNG for its orientation decodes it, and no error may be lost there."""
    exif = Image.Exif()
    exif[0x0112] = 6
    sink = io.BytesIO()
    Image.fromarray(drawn(0)[:64, :64]).save(sink, "PNG", exif=exif)
    data = sink.getvalue()
    decode(data)
    start = data.index(b"IDAT") + 4
    length = struct.unpack(">L", data[start - 8 : start - 4])[0]
    half = zlib.decompress(data[start : start + length])[: 30 * 193]
    broken = data[: start - 8] + chunk(b"IDAT", zlib.compress(half)) + data[start + length + 4 :]
    assert refused(broken) == "picture data missing: the PNG holds 5,790 of 12,352 bytes of pixels"


# ---------------------------------------------------------------- JPEG


@pytest.mark.parametrize("way", ["jpeg", "optimised", "progressive", "restarts", "grey jpeg", "cmyk jpeg"])
@pytest.mark.parametrize("kept", [0.5, 0.8, 0.95])
def test_a_jpeg_cut_off_is_refused_with_and_without_an_end_mark(way: str, kept: float) -> None:
    data = stored(way)
    short = data[: int(len(data) * kept)]
    assert refused(short) == f"truncated: the image's data ends early ({len(short):,} bytes)"
    assert refused(short + b"\xff\xd9").startswith(("picture data missing: the JPEG's data end", "damaged: the JPEG"))


@pytest.mark.parametrize("way", ["jpeg", "optimised", "progressive", "restarts"])
@pytest.mark.parametrize("size", [512, 4096])
def test_a_zeroed_sector_of_a_jpeg_is_refused(way: str, size: int) -> None:
    for seed in range(4):
        data = stored(way, seed)
        for at in range(-(-640 // size), len(data) // size, 3 if size == 512 else 1):
            assert refused(zeroed(data, size, at)).startswith(("picture data missing:", "damaged:", "truncated:"))


def test_zero_bits_of_an_even_surface_are_no_damage() -> None:
    """Optimised tables say "as before" with zero bits, so an even picture is made of zeros."""
    even = np.full((1024, 1024, 3), 240, np.uint8)
    even[:16, :16] = drawn(0)[:16, :16]
    sink = io.BytesIO()
    Image.fromarray(even).save(sink, "JPEG", quality=92, optimize=True)
    assert bytes(64) in sink.getvalue()
    decode(sink.getvalue())


def test_what_is_odd_about_a_jpeg_but_complete_is_remarked() -> None:
    data = stored("jpeg")
    whole = decode(data).rgb
    odd: dict[str, bytes] = {
        "odd but complete: 5 bytes follow the picture's end": data + b"trail",
        "odd but complete: 7 bytes between the JPEG's segments belong to none": data[:20] + b"padding" + data[20:],
        "odd but complete: padding before the JPEG's end mark": data[:-2] + bytes(30) + data[-2:],
    }
    for words, changed in odd.items():
        found = decode(changed)
        assert found.remarks == (words,)
        np.testing.assert_array_equal(found.rgb, whole)
    assert decode(data + bytes(300)).remarks == ()  # padding to a block's size


def test_more_picture_data_than_the_picture_needs_is_refused() -> None:
    data = stored("jpeg")
    at = len(data) - 700
    doubled = data[:-2] + data[at:-2] + data[-2:]
    assert refused(doubled) == "damaged: the JPEG holds more picture data than its picture needs"


def half(jpeg: bytes) -> bytes:
    return jpeg[: len(jpeg) // 2] + b"\xff\xd9"


MISSING = "picture data missing: the JPEG's data end before its picture does"


@pytest.mark.parametrize("odd", ["JFIF 0", "JFIF 2", "Adobe 5"])
def test_an_odd_header_hides_no_damage(odd: str) -> None:
    plain = stored("jpeg")
    assert plain[2:11] == b"\xff\xe0\x00\x10JFIF\0"
    if odd == "Adobe 5":
        data = plain[:2] + b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0\x05" + plain[20:]
    else:
        data = plain[:11] + bytes([int(odd[-1])]) + plain[12:]
    assert decode(data).remarks == ()
    assert refused(half(data)) == MISSING


def test_samplings_without_a_name_are_checked() -> None:
    """4:4:1 raises another error in the library than 4 x 2, which it does not know at all."""
    data = bytearray(imagecodecs.jpeg8_encode(np.tile(drawn(0), (2, 2, 1))[:320, :320], level=90, subsampling="411"))
    at = data.index(b"\xff\xc0") + 11
    assert data[at] == 0x41
    data[at] = 0x14  # as many blocks, in other places
    assert decode(bytes(data)).remarks == ()
    assert refused(half(bytes(data))) == MISSING
    data = bytearray(stored("jpeg"))
    at = data.index(b"\xff\xc0") + 11
    data[at] = 0x42  # needs fewer blocks than there are
    decode(bytes(data))
    assert refused(bytes(data[: len(data) // 8]) + b"\xff\xd9") == MISSING


def test_a_wrong_scan_header_of_a_whole_jpeg_is_remarked() -> None:
    data = stored("jpeg")
    at = data.index(b"\x00\x3f\x00", data.index(b"\xff\xda"))
    odd = data[:at] + bytes(3) + data[at + 3 :]
    found = decode(odd)
    assert found.remarks == ("odd but complete: the JPEG's scan header is wrong",)
    np.testing.assert_array_equal(found.rgb, decode(data).rgb)
    assert refused(half(odd)) == MISSING


def test_what_cannot_be_checked_is_remarked(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise ValueError("something that no version has said so far")

    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", unknown)
    assert decode(stored("jpeg")).remarks == ("the JPEG's data could not be checked for damage",)


def test_zeroed_sectors_of_a_jpeg_2000_are_refused() -> None:
    for values in (drawn(0), drawn(0).astype(np.uint16) * 257):
        data = imagecodecs.jpeg2k_encode(values, level=0)
        assert decode(data).remarks == ()
        for at in range(8, len(data) // 512 - 1, 17):
            assert refused(zeroed(data, 512, at)) == (
                "picture data missing: the JPEG 2000 has a stretch of bytes all alike"
            )


# ---------------------------------------------------------------- TIFF and BMP


def tagged(data: bytes, tag: int, **changed: int) -> bytes:
    """Change the name, count or value of an entry in a little-endian TIFF's first directory."""
    out = bytearray(data)
    at = struct.unpack_from("<L", data, 4)[0]
    for place in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
        if struct.unpack_from("<H", data, place)[0] == tag:
            for key, value in changed.items():
                form, offset = {"name": ("<H", 0), "count": ("<L", 4), "value": ("<L", 8)}[key]
                struct.pack_into(form, out, place + offset, value)
            return bytes(out)
    raise AssertionError(f"no tag {tag}")


def tiff(values: NDArray[np.uint8] | NDArray[np.uint16], **options: object) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, values, metadata=None, photometric="rgb", **options)  # type: ignore[arg-type]
    return sink.getvalue()


def test_a_black_bar_of_whole_rows_is_no_damage() -> None:
    for width in (224, 223):  # a BMP's rows of 669 bytes are padded with zeros to 672
        rgb = np.maximum(drawn(0)[:, :width], 20)
        rgb[:40] = 0
        for form, pixels in (("BMP", rgb), ("TIFF", rgb[::-1])):
            sink = io.BytesIO()
            Image.fromarray(pixels).save(sink, form)
            assert all(r == "the last 40 rows are one even surface" for r in decode(sink.getvalue()).remarks)


def test_a_bar_from_sector_to_sector_is_no_damage() -> None:
    rgb = np.maximum(np.tile(drawn(0), (1, 3, 1))[:, :640], 20)  # every fourth row begins at a sector's border
    rgb[100:108] = 0
    check_sectors(bytes(512) + rgb.tobytes(), 512, 1920, 224)
    data = zeroed(bytes(512) + rgb.tobytes(), 512, 100)
    with pytest.raises(MissingError, match="a disk sector's length of bytes all alike"):
        check_sectors(data, 512, 1920, 224)


@pytest.mark.parametrize("compression", ["lzw", "zlib", "packbits"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_a_last_strip_of_more_rows_than_the_picture_is_remarked(compression: str, planes: str) -> None:
    values = drawn(0)[:192]
    laid = values if planes == "contig" else np.moveaxis(values, 2, 0)
    data = tiff(laid, compression=compression, rowsperstrip=64, planarconfig=planes)
    data = tagged(data, 257, value=150)
    found = decode(data)
    assert found.remarks == ("odd but complete: the TIFF's last strip holds more rows than the picture",)
    np.testing.assert_array_equal(found.rgb, decode(tiff(values[:150])).rgb)
    assert "give another size" in refused(tagged(data, 278, value=63))


def test_a_padded_last_strip_is_read_to_its_checksum() -> None:
    data = bytearray(tagged(tiff(drawn(0)[:192], compression="zlib", rowsperstrip=64), 257, value=150))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        end = page.dataoffsets[2] + page.databytecounts[2]
    data[end - 1] ^= 1
    assert refused(bytes(data)) == "damaged: deflate data of the TIFF cannot be decompressed"


@pytest.mark.parametrize("compression", [None, "lzw"])
def test_bits_said_once_for_all_colours(compression: str | None) -> None:
    data = tagged(tiff(drawn(0), compression=compression), 258, count=1, value=8)
    assert decode(data).remarks == ()
    if compression is None:
        assert refused(tagged(data, 279, value=224 * 224)).endswith("strip or tile 1 of 1 is too short")


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("change", [{"name": 280}, {"value": 0}])
def test_a_tiff_without_lengths_is_remarked(bits: int, change: dict[str, int]) -> None:
    values = drawn(0) if bits == 8 else drawn(0).astype(np.uint16) * 257
    whole = tiff(values)
    found = decode(tagged(whole, 279, **change))
    assert found.remarks == ("odd but complete: the TIFF does not say how long its strips are",)
    np.testing.assert_array_equal(found.rgb, decode(whole).rgb)
    assert refused(tagged(whole, 279, **change)[:-700]).startswith("truncated: the image's data ends early")


@pytest.mark.parametrize("bits", [8, 16])
def test_strips_of_no_rows_are_one_strip(bits: int) -> None:
    values = drawn(0) if bits == 8 else drawn(0).astype(np.uint16) * 257
    assert decode(tagged(tiff(values), 278, value=0)).remarks == ()


def test_sectors_that_were_never_written_among_sixteen_bits_are_refused() -> None:
    values = np.maximum(drawn(0), 20)[:, :220].astype(np.uint16) * 257
    data = tiff(values)
    for size in (512, 4096):
        for at in range(4096 // size, len(data) // size - 1, 5):
            assert refused(zeroed(data, size, at)) == (
                "picture data missing: a disk sector's length of bytes all alike within the picture"
            )


def test_saturated_and_black_areas_of_sixteen_bits_are_no_damage() -> None:
    """Among all shifts, many rows of the area begin and end at sectors' borders."""
    values = np.tile(drawn(1), (1, 2, 1))[:, :440].astype(np.uint16) * 257
    for value in (0, 65535):
        values[60:160, 100:356] = value  # 1,536 bytes of each row, three sectors
        data = values.tobytes()
        for start in range(0, 512, 2):
            check_sectors(bytes(start) + data, start, 2640, 224, alone=True)


@pytest.mark.parametrize("way", ["tiff", "lzw", "deflate", "packbits", "jpeg in tiff"])
def test_a_tiff_cut_off_is_refused(way: str) -> None:
    data = stored(way)
    for kept in (0.5, 0.9, 0.99):
        short = data[: int(len(data) * kept)]
        # "damaged" of those whose header comes last
        assert refused(short).startswith(("truncated: the image's data ends early", "damaged: "))


@pytest.mark.parametrize("way", ["lzw", "deflate"])
def test_a_zeroed_sector_of_a_compressed_tiff_is_refused(way: str) -> None:
    for seed in range(4):
        data = stored(way, seed)
        for at in range(2, len(data) // 512, 9):
            assert refused(zeroed(data, 512, at)).startswith(("picture data missing:", "damaged:"))


def test_a_wrong_byte_in_a_deflated_tiff_is_refused() -> None:
    data = stored("deflate")
    for at in range(2000, len(data) - 2000, 4001):
        assert refused(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]).startswith(
            ("picture data missing:", "damaged:")
        )


def test_a_tiff_that_lacks_a_strip_is_refused() -> None:
    data = bytearray(stored("lzw"))
    entry = data.index(struct.pack("<HH", 279, 4))
    count, where = struct.unpack_from("<LL", data, entry + 4)
    assert count == 3
    struct.pack_into("<L", data, where + 4, 0)
    assert refused(bytes(data)) == "picture data missing: the TIFF's strip or tile 2 of 3 is empty"


@pytest.mark.parametrize("way", ["tiff", "bmp"])
def test_uncompressed_pixels_that_were_never_written_are_refused(way: str) -> None:
    for seed in range(4):
        data = stored(way, seed)
        for kept in (0.31, 0.62, 0.93):
            short = data[: int(len(data) * kept) // 672 * 672 + 300]
            assert refused(short + bytes(len(data) - len(short))) == (
                "picture data missing: the picture's data end in zeros, from within a row on"
            )


@pytest.mark.parametrize("way", ["tiff", "bmp"])
def test_a_zeroed_or_foreign_sector_of_uncompressed_pixels_is_refused(way: str) -> None:
    zeros = foreign = tried = 0
    for seed in range(4):
        data, other = stored(way, seed), stored(way, seed + 4)
        for at in range(8, len(data) // 512 - 8, 37):
            tried += 1
            zeros += caught(zeroed(data, 512, at))
            foreign += caught(data[: at * 512] + other[at * 512 : (at + 1) * 512] + data[(at + 1) * 512 :])
    assert tried == 32
    assert zeros == tried
    assert foreign > 0.25 * tried  # background among background shows nowhere


def test_a_drawn_bar_or_frame_is_no_damage() -> None:
    for start in (8, 54, 512):
        for left, top in ((40, 60), (100, 200), (0, 30)):
            rgb = drawn(2).copy()
            rgb[top : top + 9, left:200] = 0
            check_rows(bytes(start) + rgb.tobytes(), start, 224 * 3, 224)
        framed = drawn(2).copy()
        framed[:6] = framed[-6:] = framed[:, :6] = framed[:, -6:] = 20
        check_rows(bytes(start) + framed.tobytes(), start, 224 * 3, 224)


def test_a_round_field_of_view_is_no_damage() -> None:
    yy, xx = np.mgrid[:224, :224]
    rgb = np.where((np.hypot(yy - 112, xx - 112) < 100)[:, :, None], drawn(3), 0).astype(np.uint8)
    for way in ("TIFF", "BMP"):
        sink = io.BytesIO()
        Image.fromarray(rgb).save(sink, way)
        decode(sink.getvalue())


# ---------------------------------------------------------------- pixels of any format


def test_a_picture_saved_once_more_after_it_was_cut_off_is_refused() -> None:
    rgb = drawn(1).copy()
    rgb[128:] = 128
    rgb[120:128, 96:] = 128
    with pytest.raises(MissingError, match=r"an even surface from within a row on to the end \(96 rows\)"):
        check_end(rgb)
    bar = drawn(1).copy()
    bar[200:] = 30
    assert check_end(bar) == ["the last 24 rows are one even surface"]
    white = drawn(1).copy()
    white[200:] = 255
    assert check_end(white) == check_end(drawn(1)) == check_end(np.full((64, 64), 9, np.uint8)) == []


def test_even_sectors_are_found_where_sectors_are() -> None:
    data = bytes(range(256)) * 8
    assert even_sectors(data, 0, len(data)) == []
    assert even_sectors(zeroed(data, 512, 2), 100, len(data)) == [1024]
    assert even_sectors(zeroed(data, 512, 2), 1025, len(data)) == []
    assert even_sectors(data[:1024] + b"\xff" * 512 + data[1536:], 0, len(data)) == [1024]


# ---------------------------------------------------------------- in a run, and in training


def test_a_run_accounts_for_damaged_and_odd_pictures(small: Bundle, tmp_path: Path) -> None:
    jpeg, png = stored("jpeg"), stored("png")
    members: dict[str, bytes] = {
        "whole.jpg": jpeg,
        "cut.jpg": jpeg[: len(jpeg) * 4 // 5] + b"\xff\xd9",
        "flipped.png": png[:9000] + bytes([png[9000] ^ 1]) + png[9001:],
        "trailing.jpg": jpeg + b"trail",
    }
    run = screen_here(write_zip(tmp_path / "night.zip", members), tmp_path / "out", "night", small)
    rows = {r["image_key"]: r for r in table(Path(run.root), "predictions").to_pylist()}
    assert rows["cut.jpg"]["status"] == rows["flipped.png"]["status"] == "quarantined"
    assert rows["cut.jpg"]["reason"] == "picture data missing: the JPEG's data end before its picture does"
    assert rows["flipped.png"]["reason"] == "damaged: the checksum of chunk IDAT of the PNG is wrong"
    assert "odd but complete: 5 bytes follow the picture's end" in rows["trailing.jpg"]["quality_flags"]
    assert rows["trailing.jpg"]["label"] == rows["whole.jpg"]["label"]
    assert not any("odd" in f for f in rows["whole.jpg"]["quality_flags"])


def test_damaged_pictures_are_not_trained_on(tmp_path: Path) -> None:
    jpeg = stored("jpeg")
    archive = write_zip(tmp_path / "all_fields.zip", {"a.jpg": jpeg, "b.jpg": jpeg[: len(jpeg) // 2] + b"\xff\xd9"})
    with pytest.raises(SourceError, match=r"'b.jpg'.*picture data missing"):
        list(read_members(archive, None))


# ---------------------------------------------------------------- real fields


def test_no_false_alarm_on_real_pictures(shared_data: Path) -> None:
    for name in ("all_fields", "bccd_fields", "healthy_other_source", "healthy_pbc_raabin", "other_centre_allidb2"):
        with zipfile.ZipFile(shared_data / f"{name}.zip") as stored_fields:
            keys = [k for k in stored_fields.namelist() if k.lower().endswith((".jpg", ".png", ".tif", ".bmp"))]
            for key in keys[:: max(1, len(keys) // 50)]:
                assert decode(stored_fields.read(key)).remarks == (), (name, key)
