"""Tar archives as a stream of headers, plain or compressed, in bounded memory.

Unlike the standard library's reader this one keeps no list of members, says when an archive ends early instead of
taking a damaged header for its end, and goes on after one. Layout: POSIX.1-2017 `pax`, GNU tar manual.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol

import zstandard

BLOCK = 512
_CHUNK = 1 << 18
_MAX_EXTENDED = 1 << 20  # bytes of a long name or of pax records: more is an attack, not a name
_ZEROS = bytes(BLOCK)
_REFUSALS = {
    b"1": "hard link: links are not followed",
    b"2": "symbolic link: links are not followed",
    b"3": "device: not a regular file",
    b"4": "device: not a regular file",
    b"6": "named pipe: not a regular file",
    b"S": "sparse file: repack the archive without --sparse",
}


class ByteStream(Protocol):
    """What a walk needs: bytes in order. A short read means that there are no more."""

    position: int
    damage: str | None

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; fewer only at the end."""

    def skip(self, count: int) -> int:
        """Pass over `count` bytes; returns how many there were."""


class TarEntry(NamedTuple):
    """One member. `offset` is of its data from the start of the (uncompressed) archive."""

    name: bytes
    size: int
    mtime: int
    offset: int
    refusal: str | None
    is_directory: bool


class PlainStream:
    """A seekable file; passing over data costs a seek."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self.position = 0
        self.damage: str | None = None

    def read(self, count: int) -> bytes:
        """Up to `count` bytes."""
        data = self._file.read(count)
        self.position += len(data)
        return data

    def skip(self, count: int) -> int:
        """Seek forward, at most to the end."""
        count = min(count, self._size - self.position)
        if count > 0:
            self._file.seek(count, 1)
            self.position += count
        return max(count, 0)


class CompressedStream:
    """A gzip, bzip2, xz or zstd file as one stream, however many frames it has; `damage` says why it ended early.

    At most about 1 MiB is decompressed ahead of the reader, whatever the ratio.
    """

    def __init__(self, file: BinaryIO, compression: str) -> None:
        self._chunks = _zstd_chunks(file) if compression == "zst" else _chunks(file, compression)
        self._buffer = memoryview(b"")
        self.position = 0
        self.damage: str | None = None

    def _pull(self) -> bool:
        try:
            self._buffer = memoryview(next(self._chunks, b""))
        except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError, zstandard.ZstdError) as error:
            self.damage = str(error) if isinstance(error, EOFError) else "the compressed data is damaged"
            self._buffer = memoryview(b"")
        return len(self._buffer) > 0

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; fewer only at the end or where the data is damaged."""
        parts = []
        while count > 0 and (len(self._buffer) or self._pull()):
            parts.append(bytes(self._buffer[:count]))
            self._buffer = self._buffer[count:]
            count -= len(parts[-1])
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self.position += len(data)
        return data

    def skip(self, count: int) -> int:
        """Decompress and drop."""
        left = count
        while left > 0 and (len(self._buffer) or self._pull()):
            step = min(left, len(self._buffer))
            self._buffer = self._buffer[step:]
            left -= step
        self.position += count - left
        return count - left


class _Decompressor(Protocol):
    """The part that the decompressors of zlib (adapted), bz2 and lzma share."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    """zlib's decompressor with the interface of bz2's."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


def _decompressor(compression: str) -> _Decompressor:
    if compression == "gz":
        return _Gzip()
    return bz2.BZ2Decompressor() if compression == "bz2" else lzma.LZMADecompressor()


def _chunks(file: BinaryIO, compression: str) -> Iterator[bytes]:
    """Decompressed pieces of at most 1 MiB. Raises EOFError where the file ends within a frame."""
    decompressor = _decompressor(compression)
    raw = file.read(_CHUNK)
    while True:
        out = decompressor.decompress(raw, 4 * _CHUNK)
        if out:
            yield out
        if decompressor.eof:
            raw = (decompressor.unused_data or file.read(_CHUNK)).lstrip(b"\0")  # tapes pad with zeros
            if not raw:
                return
            decompressor = _decompressor(compression)
        elif decompressor.needs_input:
            raw = file.read(_CHUNK)
            if not raw:
                raise EOFError("the compressed data is cut off")
        else:
            raw = b""


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Decompressed pieces; the library reads frames one after the other and bounds what it holds."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    with decompressor.stream_reader(file, read_across_frames=True, closefd=False) as reader:
        while out := reader.read1(_CHUNK):
            yield out


class TarWalk:
    """Members of a tar archive in order; between two of them the caller may read the first one's data from `stream`.

    `truncated` holds, once the iteration has ended, why the archive is known to be incomplete, or None.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self.truncated: str | None = None

    def __iter__(self) -> Iterator[TarEntry]:
        stream = self._stream
        name: bytes | None = None
        size: int | None = None
        refusal: str | None = None
        zeros = 0
        while True:
            at = stream.position
            header = stream.read(BLOCK)
            if header == _ZEROS:  # two of them mark the end; what follows is read all the same, so nothing is lost
                zeros += 1
                continue
            if len(header) < BLOCK:
                if not zeros or stream.damage:
                    why = stream.damage or "it has no end mark"
                    self.truncated = self.truncated or f"the tar archive is cut off at byte {at + len(header):,}: {why}"
                return
            if zeros == 1 or not is_header(header) or _number(header[124:136]) < 0:
                self.truncated = self.truncated or f"the tar archive is damaged at byte {at:,}"
            zeros = 0
            if not is_header(header) or _number(header[124:136]) < 0:
                name = size = refusal = None
                continue
            kind = header[156:157]
            length = _number(header[124:136])
            if kind in b"LKxXg":
                data = stream.read(min(length, _MAX_EXTENDED))
                stream.skip(_padded(length) - len(data))
                if kind == b"L":
                    name = data.rstrip(b"\0")
                elif kind in b"xX":
                    records = dict(_pax_records(data))
                    name = records.get(b"path", name)
                    stated = records.get(b"size", b"")
                    size = int(stated) if stated.isdigit() else size
                    if any(key.startswith(b"GNU.sparse.") for key in records):
                        refusal = _REFUSALS[b"S"]
                continue
            name = name if name is not None else _name(header)
            length = size if size is not None else length
            if kind in b"123456":
                length = 0  # links, devices and folders have no data, whatever their size field says
            is_directory = kind in (b"5", b"D") or (kind in (b"0", b"\0") and name.endswith(b"/"))
            if refusal is None and kind not in (b"0", b"\0", b"7", b"5", b"D"):
                refusal = _REFUSALS.get(kind, f"tar entry of the unknown type {kind!r}: not a regular file")
            data_at = stream.position
            yield TarEntry(name, length, _number(header[136:148]), data_at, refusal, is_directory)
            stream.skip(data_at + _padded(length) - stream.position)
            name = size = refusal = None


def is_header(block: bytes) -> bool:
    """Whether a 512-byte block is a tar header: its checksum holds (unsigned, or signed as old tars wrote it)."""
    if len(block) < BLOCK or block == _ZEROS:
        return False
    stated = _number(block[148:156])
    others = block[:148] + b"        " + block[156:]
    unsigned = sum(others)
    return stated == unsigned or stated == unsigned - 256 * sum(byte > 127 for byte in others)


def _number(field: bytes) -> int:
    """Octal digits, or base 256 where the first bit is set; -1 where it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return -1


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        return prefix + b"/" + name if prefix else name
    return name


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Records "LENGTH KEY=VALUE\\n"; ends at the first that is none."""
    at = 0
    while at < len(data):
        digits, _, _ = data[at : at + 21].partition(b" ")
        if not digits.isdigit() or (length := int(digits)) <= len(digits) + 1:
            return
        key, equals, value = data[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if not equals:
            return
        yield key, value
        at += length
