"""PNG: what is missing or wrong is refused with the reason, what lies beside the picture is remarked."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from damaged_pictures import chunk, decode, drawn, refused, stored, with_chunk, zeroed
from PIL import Image


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
