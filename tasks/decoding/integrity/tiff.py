"""Damage of a TIFF: strips and tiles that are missing, too short, or do not decompress to their size."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from leukoflow.tasks.decoding.errors import MissingError
from leukoflow.tasks.decoding.integrity.jpeg import check_jpeg
from leukoflow.tasks.decoding.integrity.sectors import even_sectors
from leukoflow.tasks.decoding.integrity.words import NO_LENGTHS, ends_early

_UNCOMPRESSED, _LZW, _JPEG_IN_TIFF, _DEFLATE, _OLD_DEFLATE, _PACKBITS = 1, 5, 7, 8, 32946, 32773
_WORDS = {_LZW: "LZW", _DEFLATE: "deflate", _OLD_DEFLATE: "deflate", _PACKBITS: "PackBits", _JPEG_IN_TIFF: "JPEG"}


@dataclass(frozen=True, slots=True)
class Strips:
    """Where a TIFF page's strips or tiles lie, and what each should hold when it is decompressed.

    `expected` are bytes, 0 where the compression leaves that open; `tables` are the page's JPEG tables. `padded` is
    what the last strip of each of the `planes` may hold, rows of `row` bytes behind the picture's included; 0 for
    tiles, which always are full.
    """

    compression: int
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    expected: tuple[int, ...]
    tables: bytes = b""
    padded: int = 0
    row: int = 1
    planes: int = 1


def check_tiff(data: bytes, strips: Strips) -> list[str]:
    """Look for the data of each strip and tile, and decompress those without a checksum to count them; returns remarks.

    Raises MissingError where data are missing or wrong.
    """
    counts, remarks = strips.counts, list[str]()
    if strips.compression == _UNCOMPRESSED and not any(counts):
        counts = strips.expected
        remarks.append(NO_LENGTHS)
    count, wanted = min(len(strips.offsets), len(counts)), len(strips.expected)
    if count < wanted:
        raise MissingError(f"picture data missing: the TIFF names {count:,} of {wanted:,} strips or tiles")
    of_a_plane = max(wanted // strips.planes, 1)
    for i in range(wanted):
        start, length, expected = strips.offsets[i], counts[i], strips.expected[i]
        most = strips.padded if strips.padded > expected and i % of_a_plane == of_a_plane - 1 else expected
        where = f"strip or tile {i + 1:,} of {wanted:,}"
        if start + length > len(data):
            raise MissingError(ends_early(data))
        if length == 0:
            raise MissingError(f"picture data missing: the TIFF's {where} is empty")
        if strips.compression == _UNCOMPRESSED:
            if length < expected:
                raise MissingError(f"picture data missing: the TIFF's {where} is too short")
        elif strips.compression in _WORDS:
            piece = data[start : start + length]
            if strips.compression == _JPEG_IN_TIFF:
                remarks += check_jpeg(strips.tables[:-2] + piece[2:] if strips.tables else piece)
            elif (got := _decompressed(strips.compression, piece, expected, most)) != expected:
                if not expected < got <= most or got % strips.row:
                    lack, kind = "picture data missing" if got < expected else "damaged", _WORDS[strips.compression]
                    raise MissingError(f"{lack}: {kind} data of the TIFF's {where} give another size")
                remarks.append("odd but complete: the TIFF's last strip holds more rows than the picture")
            if even_sectors(data, start, start + length) and expected < 64 * length:
                raise MissingError(f"picture data missing: the TIFF's {where} has a stretch of bytes all alike")
    return list(dict.fromkeys(remarks))


def _decompressed(compression: int, data: bytes, expected: int, most: int) -> int:
    """Count the bytes that a strip gives, up to one more than it may. Raises MissingError where it is corrupt."""
    import imagecodecs

    try:
        if compression in (_DEFLATE, _OLD_DEFLATE):
            inflate = zlib.decompressobj()
            got = len(inflate.decompress(data, most + 1))
            if expected <= got <= most and not inflate.eof:
                got += len(inflate.decompress(inflate.unconsumed_tail, 1))  # reads the checksum
                if not inflate.eof:
                    raise MissingError("damaged: compressed data of the TIFF have no end")
            return got
        decode = imagecodecs.lzw_decode if compression == _LZW else imagecodecs.packbits_decode
        return len(decode(data))
    except (zlib.error, RuntimeError, ValueError):
        raise MissingError(f"damaged: {_WORDS[compression]} data of the TIFF cannot be decompressed") from None
