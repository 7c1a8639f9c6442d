"""One member of a zip archive: what the archive says of it, and its bytes."""

from __future__ import annotations

import bz2
import lzma
import zlib
from typing import BinaryIO, NamedTuple

import zstandard

from leukoflow.archives.errors import EntryError
from leukoflow.archives.zip_format import ENCRYPTED, LOCAL, LOCAL_HEADER, refusal_of


class ZipEntry(NamedTuple):
    """One member as the archive describes it. `offset` is of the local header, from the start of the file.

    `name` is text as `decode_name` makes it: bytes that are no text are in it as surrogates.
    """

    name: str
    method: int
    crc: int
    stored: int
    size: int
    offset: int
    refusal: str | None
    is_directory: bool = False


def read_entry(file: BinaryIO, offset: int, method: int, stored: int, size: int, crc: int) -> bytes:
    """Read the member whose local header is at `offset`, and check it against its size and CRC-32.

    Never holds more than `size` + 1 decompressed bytes. Raises EntryError with a reason for people.
    """
    file.seek(offset)
    header = file.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size or header[:4] != LOCAL:
        raise EntryError("damaged: the archive has no file at the place where its directory says")
    fields = LOCAL_HEADER.unpack(header)
    if fields[2] & ENCRYPTED:
        raise EntryError(refusal_of(fields[2], method, 0) or "")
    file.seek(fields[-2] + fields[-1], 1)
    raw = file.read(stored)
    if len(raw) < stored:
        raise EntryError(f"truncated: {len(raw):,} of {stored:,} stored bytes")
    data = _expand(raw, method, size)
    if len(data) < size:
        raise EntryError(f"damaged: only {len(data):,} of {size:,} bytes could be unpacked")
    if len(data) > size:
        raise EntryError(f"damaged: unpacks to more than the {size:,} bytes that the archive states")
    if zlib.crc32(data) != crc:
        raise EntryError("damaged: checksum does not match")
    return data


def _expand(raw: bytes, method: int, size: int) -> bytes:
    """Unpack at most `size` + 1 bytes. Raises EntryError."""
    if method == 0:
        return raw
    try:
        if method == 8:
            return zlib.decompressobj(-15).decompress(raw, size + 1)
        if method == 12:
            return bz2.BZ2Decompressor().decompress(raw, size + 1)
        if method == 14:
            return _lzma(raw).decompress(raw[4 + raw[2] + 256 * raw[3] :], size + 1)
        if method == 93:
            with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(raw) as reader:
                return reader.read(size + 1)
    except (zlib.error, OSError, EOFError, ValueError, IndexError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise EntryError("damaged: the compressed data cannot be unpacked") from error
    raise EntryError(refusal_of(0, method, 0) or "")


def _lzma(raw: bytes) -> lzma.LZMADecompressor:
    """Make the decoder for a member's LZMA data (APPNOTE 5.8.8).

    Two bytes of version, two bytes of length, then the properties.
    """
    properties = raw[4 : 4 + raw[2] + 256 * raw[3]]
    first, dictionary = properties[0], int.from_bytes(properties[1:5], "little")
    if dictionary > 1 << 28:
        raise EntryError("refused: its LZMA dictionary is larger than 256 MiB; repack it with deflate")
    spec = {"id": lzma.FILTER_LZMA1, "dict_size": max(dictionary, 4096)}
    spec |= {"lc": first % 9, "lp": first // 9 % 5, "pb": first // 45}
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[spec])
