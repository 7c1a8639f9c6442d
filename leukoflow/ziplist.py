"""Zip archives in bounded memory: list members as a stream, also those of a damaged archive, and read one member.

The standard library builds an object for every member before the first can be used, and gives up when the central
directory is missing. Here the central directory is parsed in pieces, and where it is missing or cut off, the local
headers in front of every member's data take its place. Layout: PKWARE APPNOTE 6.3.10.
"""

from __future__ import annotations

import bz2
import lzma
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import zstandard

from leukoflow.errors import MemberError, SourceError

_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64, _LOCATOR64, _DESCRIPTOR = b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_CENTRAL_HEADER = struct.Struct("<4s2B5H3L5H2L")
_END_RECORD = struct.Struct("<4s4H2LH")
_END64_RECORD = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64_RECORD = struct.Struct("<4sLQL")
_FULL32 = 0xFFFFFFFF
_CHUNK = 1 << 20
_ENCRYPTED = 0x2041  # bits 0 (traditional), 6 (strong) and 13 (masked header)
_HAS_DESCRIPTOR = 0x8
_METHODS = {0: "stored", 8: "deflate", 12: "bzip2", 14: "LZMA", 93: "zstd"}
_UNSUPPORTED = {1: "shrink", 6: "implode", 9: "Deflate64", 20: "zstd (old)", 95: "xz", 98: "PPMd", 99: "AES"}


class ZipEntry(NamedTuple):
    """One member as the archive describes it. `offset` is of the local header, from the start of the file."""

    name: bytes
    method: int
    crc: int
    stored: int
    size: int
    offset: int
    refusal: str | None
    is_directory: bool = False


class ZipWalk:
    """Members of a zip archive in the order of its central directory.

    `truncated` holds, once the iteration has ended, why the archive is known to be incomplete, or None.
    """

    def __init__(self, file: BinaryIO, size: int, repair: bool = True) -> None:
        """Without `repair` a damaged archive ends early: looking for members may mean to unpack all of them."""
        self._file = file
        self._size = size
        self._repair = repair
        self.truncated: str | None = None

    def __iter__(self) -> Iterator[ZipEntry]:
        directory = find_directory(self._file, self._size)
        if directory is None:
            self.truncated = "the zip archive is cut off: its central directory is missing"
            if self._repair:
                yield from self._scan(0)
            return
        start, length, shift, expected = directory
        count, end = 0, shift
        for entry in self._central(start, length, shift):
            count += 1
            end = max(end, entry.offset + _LOCAL_HEADER.size + len(entry.name) + entry.stored)
            yield entry
        if count < expected:
            self.truncated = f"the zip archive's central directory is damaged after {count:,} of {expected:,} members"
            if self._repair:
                yield from self._scan(end)

    def _central(self, start: int, length: int, shift: int) -> Iterator[ZipEntry]:
        """Entries of the central directory, read in pieces; ends early at the first record that is none."""
        self._file.seek(start)
        buffer, at, left = b"", 0, length
        while True:
            if len(buffer) - at < 46 + 3 * 0xFFFF and left:  # a record with its longest name, extra and comment
                more = self._file.read(min(_CHUNK, left))
                left = left - len(more) if more else 0
                buffer, at = buffer[at:] + more, 0
            if len(buffer) - at < _CENTRAL_HEADER.size:
                return
            fields = _CENTRAL_HEADER.unpack_from(buffer, at)
            signature, _, host, _, flags, method, _, _, crc, stored, size, n_name, n_extra, n_comment = fields[:14]
            attributes, offset = fields[16:]
            stop = at + _CENTRAL_HEADER.size + n_name + n_extra + n_comment
            if signature != _CENTRAL or stop > len(buffer):
                return
            at += _CENTRAL_HEADER.size
            name = buffer[at : at + n_name]
            if _FULL32 in (stored, size, offset):
                extra = buffer[at + n_name : at + n_name + n_extra]
                size, stored, offset = _zip64(extra, size, stored, offset)
            at = stop
            if host in (0, 10, 14) and b"/" not in name:  # FAT, NTFS, VFAT: some Windows tools write backslashes
                name = name.replace(b"\\", b"/")
            unix_mode = attributes >> 16 if host in (3, 19) else 0
            yield ZipEntry(
                name, method, crc, stored, size, offset + shift, _refusal(flags, method, unix_mode), name[-1:] == b"/"
            )

    def _scan(self, position: int) -> Iterator[ZipEntry]:
        """Entries found by walking the local headers from `position`; the one that is cut off gets a refusal."""
        while position < self._size:
            self._file.seek(position)
            header = self._file.read(_LOCAL_HEADER.size)
            if header[:4] in (_CENTRAL, _END, _END64):
                return
            if len(header) < _LOCAL_HEADER.size or header[:4] != _LOCAL:
                self.truncated = (
                    f"{self.truncated or 'the zip archive is damaged'}; nothing readable after byte {position:,}"
                )
                return
            _, _, flags, method, _, _, crc, stored, size, n_name, n_extra = _LOCAL_HEADER.unpack(header)
            name, extra = self._file.read(n_name), self._file.read(n_extra)
            if len(name) < n_name or len(extra) < n_extra:
                return
            if _FULL32 in (stored, size):
                size, stored, _ = _zip64(extra, size, stored, 0)
            data = position + _LOCAL_HEADER.size + n_name + n_extra
            refusal = _refusal(flags, method, 0)
            if flags & _HAS_DESCRIPTOR and not stored and name[-1:] != b"/":
                found = _by_descriptor(self._file, data, self._size, method)
                if found is None:
                    yield ZipEntry(name, method, 0, 0, 0, position, "truncated: the archive ends within this file")
                    return
                crc, stored, size, after = found
            else:
                after = data + stored
                if after > self._size:
                    present = self._size - data
                    yield ZipEntry(
                        name, method, crc, 0, size, position, f"truncated: {present:,} of {stored:,} stored bytes"
                    )
                    return
                if flags & _HAS_DESCRIPTOR:
                    after += _descriptor_length(self._file, after)
            yield ZipEntry(name, method, crc, stored, size, position, refusal, name[-1:] == b"/")
            position = after


def find_directory(file: BinaryIO, size: int) -> tuple[int, int, int, int] | None:
    """Where the central directory is: (start, length, shift of all offsets, members); None where it is missing.

    Raises SourceError for one part of a split archive.
    """
    base = max(0, size - _END_RECORD.size - 0xFFFF)
    file.seek(base)
    tail = file.read(size - base)
    at = tail.rfind(_END)
    while at >= 0 and len(tail) - at < _END_RECORD.size:
        at = tail.rfind(_END, 0, at)
    if at < 0:
        return None
    _, disk, _, _, count, length, offset, _ = _END_RECORD.unpack_from(tail, at)
    end = base + at
    if end >= _LOCATOR64_RECORD.size:
        file.seek(end - _LOCATOR64_RECORD.size)
        signature, _, at64, _ = _LOCATOR64_RECORD.unpack(file.read(_LOCATOR64_RECORD.size))
        if signature == _LOCATOR64:
            for position in (at64, end - _LOCATOR64_RECORD.size - _END64_RECORD.size):
                file.seek(min(position, size))
                record = file.read(_END64_RECORD.size)
                if len(record) == _END64_RECORD.size and record[:4] == _END64:
                    count, length, offset = _END64_RECORD.unpack(record)[7:]
                    end, disk = position, 0
                    break
    if disk not in (0, 0xFFFF):
        raise SourceError(f"one part of a split zip archive (part {disk + 1}): join the parts before handing it over")
    start = end - length
    if start < offset:
        return None
    return start, length, start - offset, count


def read_entry(file: BinaryIO, offset: int, method: int, stored: int, size: int, crc: int) -> bytes:
    """Bytes of the member whose local header is at `offset`, checked against its size and CRC-32.

    Never holds more than `size` + 1 decompressed bytes. Raises MemberError with a reason for people.
    """
    file.seek(offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or header[:4] != _LOCAL:
        raise MemberError("damaged: the archive has no file at the place where its directory says")
    fields = _LOCAL_HEADER.unpack(header)
    if fields[2] & _ENCRYPTED:
        raise MemberError(_refusal(fields[2], method, 0) or "")
    file.seek(fields[-2] + fields[-1], 1)
    raw = file.read(stored)
    if len(raw) < stored:
        raise MemberError(f"truncated: {len(raw):,} of {stored:,} stored bytes")
    data = _expand(raw, method, size)
    if len(data) < size:
        raise MemberError(f"damaged: only {len(data):,} of {size:,} bytes could be unpacked")
    if len(data) > size:
        raise MemberError(f"damaged: unpacks to more than the {size:,} bytes that the archive states")
    if zlib.crc32(data) != crc:
        raise MemberError("damaged: checksum does not match")
    return data


def _expand(raw: bytes, method: int, size: int) -> bytes:
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
        raise MemberError("damaged: the compressed data cannot be unpacked") from error
    raise MemberError(_refusal(0, method, 0) or "")


def _lzma(raw: bytes) -> lzma.LZMADecompressor:
    """Decoder for a member's LZMA data: two bytes version, two bytes length, then the properties (APPNOTE 5.8.8)."""
    properties = raw[4 : 4 + raw[2] + 256 * raw[3]]
    first, dictionary = properties[0], int.from_bytes(properties[1:5], "little")
    if dictionary > 1 << 28:
        raise MemberError("refused: its LZMA dictionary is larger than 256 MiB; repack it with deflate")
    spec = {"id": lzma.FILTER_LZMA1, "dict_size": max(dictionary, 4096)}
    spec |= {"lc": first % 9, "lp": first // 9 % 5, "pb": first // 45}
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[spec])


def _refusal(flags: int, method: int, unix_mode: int) -> str | None:
    if flags & _ENCRYPTED or method == 99:
        return "encrypted: hand it over without a password"
    if unix_mode and stat.S_IFMT(unix_mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        link = stat.S_ISLNK(unix_mode)
        return "symbolic link: links are not followed" if link else "special file: not a regular file"
    if method not in _METHODS:
        name = f" ({_UNSUPPORTED[method]})" if method in _UNSUPPORTED else ""
        return f"compression method {method}{name} is not supported: repack it with deflate"
    return None


def _zip64(extra: bytes, size: int, stored: int, offset: int) -> tuple[int, int, int]:
    """Sizes and offset with those that were full taken from the zip64 field of `extra`."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            wide = iter(int.from_bytes(extra[i : i + 8], "little") for i in range(at, at + length - 7, 8))
            size = next(wide, size) if size == _FULL32 else size
            stored = next(wide, stored) if stored == _FULL32 else stored
            offset = next(wide, offset) if offset == _FULL32 else offset
            break
        at += length
    return size, stored, offset


def _by_descriptor(file: BinaryIO, data: int, end: int, method: int) -> tuple[int, int, int, int] | None:
    """(crc, stored, size, end) of a member written as a stream, whose sizes follow its data; None if cut off."""
    if method == 8:
        return _by_inflating(file, data)
    position, tail = data, b""
    file.seek(data)
    while chunk := file.read(_CHUNK):
        block = tail + chunk
        base = position - len(tail)
        at = block.find(_DESCRIPTOR)
        while 0 <= at <= len(block) - 16:
            stored = base + at - data
            crc, stated, size = struct.unpack_from("<3L", block, at + 4)
            if stated == stored & _FULL32:
                return crc, stored, size, base + at + 16
            at = block.find(_DESCRIPTOR, at + 1)
        position += len(chunk)
        tail = block[-15:]
    return None


def _by_inflating(file: BinaryIO, data: int) -> tuple[int, int, int, int] | None:
    inflater = zlib.decompressobj(-15)
    file.seek(data)
    crc = size = stored = 0
    while not inflater.eof:
        chunk = inflater.unconsumed_tail
        if not chunk:
            chunk = file.read(_CHUNK)
            stored += len(chunk)
            if not chunk:
                return None
        try:
            out = inflater.decompress(chunk, _CHUNK)
        except zlib.error:
            return None
        crc, size = zlib.crc32(out, crc), size + len(out)
    stored -= len(inflater.unused_data)
    return crc, stored, size, data + stored + _descriptor_length(file, data + stored)


def _descriptor_length(file: BinaryIO, position: int) -> int:
    """Length of the data descriptor at `position`: with or without signature, with sizes of four or eight bytes."""
    file.seek(position)
    block = file.read(28)
    for length in (16, 12, 24, 20):
        follower = block[length : length + 4]
        if follower in (_LOCAL, _CENTRAL, _END64):
            return length
    return 16 if block[:4] == _DESCRIPTOR else 12
