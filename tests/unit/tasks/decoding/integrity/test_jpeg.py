"""JPEG and JPEG 2000: what is missing is refused with the reason, what is odd is remarked."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import pytest
import simplejpeg
from damaged_pictures import decode, drawn, refused, stored, zeroed
from PIL import Image


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
