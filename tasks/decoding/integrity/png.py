"""Damage of a PNG: the checksum of each chunk, and the length of its picture data."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from leukoflow.tasks.decoding.errors import MissingError
from leukoflow.tasks.decoding.integrity.words import ends_early, trailing

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIXEL_CHUNKS = (b"tRNS",)  # ancillary by name, but the colours depend on it
_FED_BYTES, _INFLATE_BYTES = 1 << 16, 1 << 20


def sound_png(data: bytes) -> tuple[bytes, list[str]]:
    """Check the checksum of every chunk; returns the file without broken chunks that are no part of the picture.

    The remarks name those. Raises MissingError where the picture itself is hit.
    """
    kept: list[tuple[int, int]] = []
    remarks: list[str] = []
    at, view, pieces = len(_PNG_SIGNATURE), memoryview(data), False
    while True:
        if at + 12 > len(data):
            raise MissingError(ends_early(data))
        length, kind = struct.unpack_from(">L4s", data, at)
        end = at + 12 + length
        if not kind.isalpha():
            raise MissingError(f"damaged: what should be a chunk of the PNG at byte {at:,} is none")
        if end > len(data):
            raise MissingError(ends_early(data))
        name = kind.decode()
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            if kind[0] < 97 or kind in _PIXEL_CHUNKS:
                raise MissingError(f"damaged: the checksum of chunk {name} of the PNG is wrong")
            remarks.append(f"damaged beside the picture: the checksum of chunk {name} of the PNG is wrong")
        else:
            kept.append((at, end))
        pieces |= kind == b"IDAT"
        at = end
        if kind == b"IEND":
            break
    if not pieces:
        raise MissingError("damaged: the PNG has no picture data")
    if any(view[at:]):
        remarks.append(trailing(len(data) - at))
    if not any(r.startswith("damaged") for r in remarks):
        return data, remarks
    return b"".join([_PNG_SIGNATURE, *(view[a:b] for a, b in kept)]), remarks


def check_png_pixels(data: bytes) -> None:
    """Inflate the picture data of a PNG and compare their length and checksum. Raises MissingError."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">2L5B", data, 16)
    bits = depth * _PNG_CHANNELS.get(colour, 1)
    passes = [(width, height)]
    if interlaced:
        passes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in _PNG_PASSES]
    expected = sum(h * (1 + -(-w * bits // 8)) for w, h in passes if w > 0 and h > 0)
    inflate, got = zlib.decompressobj(), 0
    try:
        for start, end in _png_data(data):
            for at in range(start, end, _FED_BYTES):
                rest = data[at : min(at + _FED_BYTES, end)]
                while rest and not inflate.eof and got <= expected:
                    got += len(inflate.decompress(rest, _INFLATE_BYTES))
                    rest = inflate.unconsumed_tail
    except zlib.error:
        raise MissingError("damaged: the picture data of the PNG cannot be decompressed") from None
    if got < expected:
        raise MissingError(f"picture data missing: the PNG holds {got:,} of {expected:,} bytes of pixels")
    if got == expected and not inflate.eof:
        raise MissingError("damaged: the picture data of the PNG have no end")


def _png_data(data: bytes) -> Iterator[tuple[int, int]]:
    at = len(_PNG_SIGNATURE)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">L4s", data, at)
        if kind == b"IDAT":
            yield at + 8, at + 8 + length
        at += 12 + length
