"""Tar archives as a stream of headers, plain or compressed, in bounded memory.

Unlike the standard library's reader this one keeps no list of members, says when an archive ends early instead of
taking a damaged header for its end, and goes on after one. Layout: POSIX.1-2017 `pax`, GNU tar manual.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, Protocol, cast

import zstandard

BLOCK = 512
_CHUNK = 1 << 18
_MAX_WINDOW = 1 << 28  # bytes that a zstd decoder may hold: `--long=28`
_MAX_XZ = 1 << 29  # bytes that an xz decoder may hold; `xz -9` needs 65 MiB
_MOST_JUNK = 10_240  # bytes behind compressed data that cannot be an archive of images: less than an empty tar
_EXAMPLES = 3  # ranges of bytes that are named
_MAGIC_AT = 257  # of `ustar` in a header
_MAX_EXTENDED = 1 << 20  # bytes of a long name or of pax records: more is an attack, not a name
_ZEROS = bytes(BLOCK)
_ASCII = bytes(range(128))
_COMPRESSIONS = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst"}
_CUT_OFF = "the compressed data is cut off"
_REFUSALS = {
    b"1": "hard link: links are not followed",
    b"2": "symbolic link: links are not followed",
    b"3": "device: not a regular file",
    b"4": "device: not a regular file",
    b"6": "named pipe: not a regular file",
    b"M": "continued from another volume: unpack all volumes together (tar --multi-volume), hand over the images",
    b"S": "sparse file: repack the archive without --sparse",
}


class ByteStream(Protocol):
    """What a walk needs: bytes in order. A short read means that there are no more."""

    position: int
    damage: str | None
    remarks: list[str]

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; fewer only at the end."""

    def unread(self, data: bytes) -> None:
        """Give back what was read last."""

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
        self.remarks: list[str] = []

    def read(self, count: int) -> bytes:
        """Up to `count` bytes."""
        data = self._file.read(count)
        self.position += len(data)
        return data

    def unread(self, data: bytes) -> None:
        """Seek back."""
        self.position -= len(data)
        self._file.seek(self.position)

    def skip(self, count: int) -> int:
        """Seek forward, at most to the end."""
        count = min(count, self._size - self.position)
        if count > 0:
            self._file.seek(count, 1)
            self.position += count
        return max(count, 0)


class _StreamError(Exception):
    """Why no more can be unpacked, in words for people."""


class CompressedStream:
    """A gzip, bzip2, xz or zstd file as one stream, however many frames it has; `damage` says why it ended early.

    `remarks` say what is odd although all of it was unpacked. At most about 1 MiB is decompressed ahead of the reader,
    whatever the ratio.
    """

    def __init__(self, file: BinaryIO, compression: str) -> None:
        self.position = 0
        self.damage: str | None = None
        self.remarks: list[str] = []
        self._chunks = _frames(_Feed(file), compression, self._remark)
        self._buffer = memoryview(b"")

    def _remark(self, words: str) -> None:
        if words not in self.remarks:
            self.remarks.append(words)

    def _pull(self) -> bool:
        try:
            self._buffer = memoryview(next(self._chunks, b""))
        except _StreamError as error:
            self.damage = str(error)
            self._buffer = memoryview(b"")
        except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError, zstandard.ZstdError):
            self.damage = "the compressed data is damaged"
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

    def unread(self, data: bytes) -> None:
        """Keep it for the next reading."""
        self.position -= len(data)
        self._buffer = memoryview(data + bytes(self._buffer))

    def skip(self, count: int) -> int:
        """Decompress and drop."""
        left = count
        while left > 0 and (len(self._buffer) or self._pull()):
            step = min(left, len(self._buffer))
            self._buffer = self._buffer[step:]
            left -= step
        self.position += count - left
        return count - left


# ---------------------------------------------------------------- compressed frames


def compression_of(head: bytes) -> str | None:
    """The compression that a file or a further frame begins with: gz, bz2, xz, zst or None."""
    if len(head) >= 4 and head[0] & 0xF0 == 0x50 and head[1:4] == b"\x2a\x4d\x18":
        return "zst"  # a frame to be skipped, with which parallel zstd begins
    return next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), None)


class _Feed:
    """The compressed bytes, in order, with those at hand that were read and not used."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.position = 0
        self._buffer = b""
        self._at = 0

    def peek(self, count: int) -> bytes:
        """The next bytes, without using them; fewer only at the end."""
        while len(self._buffer) - self._at < count and (more := self.file.read(_CHUNK)):
            self._buffer, self._at = self._buffer[self._at :] + more, 0
        return self._buffer[self._at : self._at + count]

    def take(self, count: int = _CHUNK) -> bytes:
        """Some of the next bytes, at most `count`; none only at the end."""
        data = self._buffer[self._at : self._at + count] or self.peek(min(count, _CHUNK))
        self._at += len(data)
        self.position += len(data)
        return data

    def exactly(self, count: int) -> bytes:
        """The next `count` bytes. Raises _StreamError where there are fewer."""
        if len(self.peek(count)) < count:
            raise _StreamError(_CUT_OFF)
        return self.take(count)

    def give_back(self, data: bytes) -> None:
        """What a decoder has not used."""
        self._buffer, self._at = data + self._buffer[self._at :], 0
        self.position -= len(data)

    def skip(self, count: int) -> None:
        """Raises _StreamError where there are fewer."""
        while count > 0:
            data = self.take(count)
            if not data:
                raise _StreamError(_CUT_OFF)
            count -= len(data)

    def skip_zeros(self) -> None:
        """Pass over padding, as tapes have it."""
        while data := self.take():
            if kept := data.lstrip(b"\0"):
                self.give_back(kept)
                return

    def skip_text(self) -> None:
        """Pass over a text that ends with a zero."""
        while data := self.take():
            _, zero, kept = data.partition(b"\0")
            if zero:
                self.give_back(kept)
                return


def _frames(feed: _Feed, compression: str, remark: Callable[[str], None]) -> Iterator[bytes]:
    """Decompressed pieces of at most 1 MiB, frame after frame. Raises what the decoders raise, and _StreamError."""
    while feed.peek(1):
        if compression_of(feed.peek(6)) != compression:
            at = feed.position
            left = feed.file.seek(0, 2) - at
            if not _is_junk(feed.peek(BLOCK), left):
                raise _StreamError(f"bytes {at:,} to {at + left - 1:,} behind its compressed data cannot be read")
            remark(f"{left:,} bytes behind the compressed data, from byte {at:,}, belong to no file")
            return
        match compression:
            case "gz":
                yield from _gzip_frame(feed, remark)
            case "zst":
                yield from _zstd_frame(feed)
            case "bz2":
                yield from _plain_frame(feed, bz2.BZ2Decompressor())
            case _:
                yield from _plain_frame(feed, lzma.LZMADecompressor(memlimit=_MAX_XZ))
        feed.skip_zeros()


def _is_junk(head: bytes, size: int) -> bool:
    """Whether bytes behind a whole archive can be passed over: few, and not the beginning of another archive."""
    return size <= _MOST_JUNK and not is_header(head) and compression_of(head) is None and head[:2] != b"PK"


def _plain_frame(feed: _Feed, decompressor: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> Iterator[bytes]:
    while not decompressor.eof:
        raw = feed.take() if decompressor.needs_input else b""
        if decompressor.needs_input and not raw:
            raise _StreamError(_CUT_OFF)
        try:
            out = decompressor.decompress(raw, 4 * _CHUNK)
        except lzma.LZMAError as error:
            if "emory" not in str(error):
                raise
            raise _StreamError(
                f"its xz dictionary needs more than {_MAX_XZ >> 20} MiB: compress it with xz -9"
            ) from None
        if out:
            yield out
    feed.give_back(decompressor.unused_data)


def _gzip_frame(feed: _Feed, remark: Callable[[str], None]) -> Iterator[bytes]:
    """One gzip member (RFC 1952). Its checksum stands behind the data, so the data is there even where they differ."""
    flags = feed.exactly(10)[3]
    if flags & 4:
        feed.skip(int.from_bytes(feed.exactly(2), "little"))
    for named in (8, 16):  # a name, a comment
        if flags & named:
            feed.skip_text()
    if flags & 2:
        feed.skip(2)
    inflater, crc, size = zlib.decompressobj(-15), 0, 0
    while not inflater.eof:
        raw = inflater.unconsumed_tail or feed.take()
        if not raw:
            raise _StreamError(_CUT_OFF)
        out = inflater.decompress(raw, 4 * _CHUNK)
        crc, size = zlib.crc32(out, crc), size + len(out)
        if out:
            yield out
    feed.give_back(inflater.unused_data)
    trailer = feed.exactly(8)
    if trailer != crc.to_bytes(4, "little") + (size & 0xFFFFFFFF).to_bytes(4, "little"):
        remark("the checksum of its gzip data does not match: some of its files may be damaged without a trace")


def _zstd_frame(feed: _Feed) -> Iterator[bytes]:
    """One zstd frame, or nothing where it is to be skipped (RFC 8878)."""
    head = feed.peek(18)
    if head[0] & 0xF0 == 0x50:
        feed.skip(int.from_bytes(feed.exactly(8)[4:], "little"))
        return
    if len(head) < 6 or len(head) < zstandard.frame_header_size(head):
        raise _StreamError(_CUT_OFF)
    window = zstandard.get_frame_parameters(head).window_size
    if window > _MAX_WINDOW:
        raise _StreamError(
            f"its zstd window of {window >> 20:,} MiB is larger than {_MAX_WINDOW >> 20} MiB: compress it with "
            "--long=28 at most"
        )
    raw = _ZstdBlocks(feed, head)
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    with decompressor.stream_reader(cast(BinaryIO, raw), read_across_frames=False, closefd=False) as reader:
        while out := reader.read1(_CHUNK):
            yield out
    if not raw.ended:
        raise _StreamError(_CUT_OFF)


class _ZstdBlocks:
    """The bytes of one frame, to be read by a decoder, and not one byte more."""

    def __init__(self, feed: _Feed, head: bytes) -> None:
        self._feed = feed
        self._left = zstandard.frame_header_size(head)  # bytes until the next block begins
        self._checksum = 4 if zstandard.get_frame_parameters(head).has_checksum else 0
        self._last = False
        self.ended = False

    def read(self, count: int) -> bytes:
        """Up to `count` bytes (at least three); none at the frame's end, and where the file ends before it."""
        if not self._left:
            if self._last:
                self.ended = True
                return b""
            header = self._feed.peek(3)
            if len(header) < 3:
                return b""
            block = int.from_bytes(header, "little")
            self._last = bool(block & 1)
            self._left = 3 + (1 if block >> 1 & 3 == 1 else block >> 3) + (self._checksum if self._last else 0)
        data = self._feed.take(min(count, self._left))
        self._left -= len(data)
        self.ended = self._last and not self._left
        return data


# ---------------------------------------------------------------- members


class TarWalk:
    """Members of a tar archive in order; between two of them the caller may read the first one's data from `stream`.

    Once the iteration has ended, `truncated` says why the archive is known to be incomplete, or is None, `remarks` say
    what is odd about it although nothing is missing, and `only_zeros` whether it holds nothing else.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._faults: list[str] = []
        self._remarks: list[str] = []
        self._torn = False  # whether something else stood in front of the last header
        self._damaged = 0  # ranges of bytes that belong to no member
        self.only_zeros = False

    @property
    def truncated(self) -> str | None:
        """Why the archive is known to be incomplete, or None."""
        more = self._damaged - _EXAMPLES
        return "; ".join([*self._faults, *([f"and {more:,} further ranges of bytes"] if more > 0 else [])]) or None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is odd although nothing is missing."""
        return (*self._remarks, *self._stream.remarks)

    def __iter__(self) -> Iterator[TarEntry]:
        name: bytes | None = None
        size: int | None = None
        refusal: str | None = None
        for kind, header in self._headers():
            if self._torn:  # what stood in front of lost bytes says nothing of the file behind them
                name = size = refusal = None
                self._torn = False
            length = _number(header[124:136])
            stream = self._stream
            if kind in b"LKxXgV":
                data = stream.read(min(length, _MAX_EXTENDED))
                stream.skip(_padded(length) - len(data))
                if kind == b"L":
                    name = data.rstrip(b"\0")
                elif kind == b"V":
                    self._remark("the tar archive has a volume label, which is no file")
                elif kind in b"xX":
                    records = dict(_pax_records(data))
                    name = records.get(b"GNU.sparse.name", records.get(b"path", name))
                    stated = records.get(b"size", b"")
                    size = int(stated) if stated.isdigit() and len(stated) < 20 else size
                    if any(key.startswith(b"GNU.sparse.") for key in records):
                        refusal = _REFUSALS[b"S"]
                continue
            name = name if name is not None else _name(header)
            length = size if size is not None else length
            if kind in b"123456":
                length = 0  # links, devices and folders have no data, whatever their size field says
            if kind == b"M":
                self._fault("the tar archive is a later volume of several: its first file begins in another one")
            more = kind == b"S" and header[482] != 0
            while more:  # the map of a sparse file goes on, in front of its data
                block = stream.read(BLOCK)
                more = len(block) == BLOCK and block[504] != 0
            is_directory = kind in (b"5", b"D") or (kind in (b"0", b"\0") and name.endswith(b"/") and not length)
            if refusal is None and kind not in (b"0", b"\0", b"7", b"5", b"D"):
                refusal = _REFUSALS.get(kind, f"tar entry of the unknown type {kind!r}: not a regular file")
            data_at = stream.position
            yield TarEntry(name, length, _number(header[136:148]), data_at, refusal, is_directory)
            stream.skip(data_at + _padded(length) - stream.position)
            name = size = refusal = None

    def _headers(self) -> Iterator[tuple[bytes, bytes]]:
        """Kinds and headers; what is neither a header nor an end mark is named when its end is known."""
        stream = self._stream
        hole: int | None = None  # where bytes began that belong to nothing
        before = start_of_hole = b""  # the block before this one, and that with which they began
        zeros, ended, found, end_mark = 0, False, False, 0
        while True:
            at = stream.position
            block = stream.read(BLOCK)
            if hole is not None and (start := _header_within(before + block)):
                stream.unread((before + block)[start + BLOCK :])
                at, block = at - len(before) + start, (before + block)[start : start + BLOCK]
            if is_header(block) and _number(block[124:136]) >= 0:
                if hole is None and zeros == 1:
                    hole = at - BLOCK
                self._torn = hole is not None or zeros > 0 or ended
                if hole is not None:
                    self._damage(hole, at)
                elif ended:
                    self._remark(
                        f"more files follow behind an end mark at byte {end_mark:,}: archives that were joined, or "
                        "zeros in the place of files"
                    )
                hole, zeros, ended, found = None, 0, False, True
                yield block[156:157], block
                continue
            if block == _ZEROS:  # two of them mark the end; what follows is read all the same, so nothing is lost
                zeros += 1
                end_mark = at if zeros == 1 else end_mark
                ended = ended or zeros > 1
                before = block
                continue
            if hole is None and block.strip(b"\0"):
                hole, start_of_hole = at, block
            if len(block) == BLOCK:
                zeros, before = 0, block
                continue
            end = at + len(block)
            if hole is not None and ended and not zeros and _is_junk(start_of_hole, end - hole):
                self._remark(f"bytes {hole:,} to {end - 1:,} behind the end of the tar archive belong to no file")
            elif hole is not None and (hole < at or ended or zeros):  # else it is a header that is cut off
                self._damage(hole, end if block.strip(b"\0") else end - zeros * BLOCK)
            if not (zeros or ended) or stream.damage:
                self._fault(f"the tar archive is cut off at byte {end:,}: {stream.damage or 'it has no end mark'}")
            self.only_zeros = not found and hole is None and not stream.damage
            return

    def _damage(self, start: int, stop: int) -> None:
        self._damaged += 1
        if self._damaged <= _EXAMPLES:
            self._fault(
                f"the tar archive is damaged at byte {start:,}: bytes {start:,} to {stop - 1:,} belong to no file that "
                "can be read"
            )

    def _fault(self, words: str) -> None:
        if words not in self._faults:
            self._faults.append(words)

    def _remark(self, words: str) -> None:
        if words not in self._remarks and len(self._remarks) < _EXAMPLES:
            self._remarks.append(words)


def _header_within(blocks: bytes) -> int:
    """Where in two blocks a header stands that does not begin with one of them; 0 where there is none."""
    at = blocks.find(b"ustar", _MAGIC_AT + 1)
    while 0 <= at < BLOCK + _MAGIC_AT:
        start = at - _MAGIC_AT
        if is_header(blocks[start : start + BLOCK]):
            return start
        at = blocks.find(b"ustar", at + 1)
    return 0


def is_header(block: bytes) -> bool:
    """Whether a 512-byte block is a tar header: its checksum holds (unsigned, or signed as old tars wrote it)."""
    if len(block) < BLOCK or block == _ZEROS:
        return False
    stated = _number(block[148:156])
    if not -(128 * BLOCK) < stated < 256 * BLOCK or stated == -1:
        return False
    others = block[:148] + b"        " + block[156:]
    unsigned = sum(others)
    return stated == unsigned or stated == unsigned - 256 * len(others.translate(None, _ASCII))


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
