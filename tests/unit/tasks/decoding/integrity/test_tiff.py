"""TIFF: strips that are missing, short or corrupt are refused, what is odd is remarked."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import tifffile
from damaged_pictures import decode, drawn, refused, stored, tagged, tiff, zeroed


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
