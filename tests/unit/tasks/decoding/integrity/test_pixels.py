"""Pixels alone: seams and even surfaces that damage leaves are found, drawn ones are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from damaged_pictures import caught, decode, drawn, refused, stored, tiff, zeroed
from PIL import Image

from leukoflow.tasks.decoding.errors import MissingError
from leukoflow.tasks.decoding.integrity.pixels import check_end, check_rows, check_sectors
from leukoflow.tasks.decoding.integrity.sectors import even_sectors


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
